"""Types for annotations."""

from ray._core import ObjectRef

__all__ = ["ObjectRef"]
