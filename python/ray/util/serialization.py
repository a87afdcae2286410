"""Custom serializers; see `ray.util.register_serializer`."""

from ray._runtime.serialization import deregister_serializer, register_serializer

__all__ = ["deregister_serializer", "register_serializer"]
