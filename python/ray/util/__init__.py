"""Helpers on top of tasks and actors. Sub-modules load at their first use."""

from typing import TYPE_CHECKING, Any

from ray._runtime.serialization import deregister_serializer, register_serializer

# Not loaded at its first use like the others: the function has the module's name, and must not be hidden by it.
from ray.util.placement_group import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

if TYPE_CHECKING:
    from ray.util.actor_pool import ActorPool
    from ray.util.check_serialize import inspect_serializability
    from ray.util.debug import disable_log_once_globally, enable_periodic_logging, log_once
    from ray.util.helpers import as_completed, map_unordered

__all__ = [
    "ActorPool",
    "as_completed",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_instance_id",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "register_serializer",
    "remove_placement_group",
]

_LAZY = {
    "ActorPool": "ray.util.actor_pool",
    "as_completed": "ray.util.helpers",
    "disable_log_once_globally": "ray.util.debug",
    "enable_periodic_logging": "ray.util.debug",
    "inspect_serializability": "ray.util.check_serialize",
    "log_once": "ray.util.debug",
    "map_unordered": "ray.util.helpers",
}
_SUBMODULES = frozenset(
    ("accelerators", "actor_pool", "annotations", "check_serialize", "debug", "helpers", "queue",
     "scheduling_strategies", "serialization", "state")
)  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"ray.util.{name}")
    message = f"module 'ray.util' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """Names of living actors.

    Args:
        all_namespaces: Whether to list those of other namespaces too.

    Returns:
        Names; with `all_namespaces`, dictionaries with `name` and `namespace`.
    """
    from ray._runtime import session

    session.ensure()
    session.load_job()
    found = session.request("actor.list_named", namespace=None if all_namespaces else session.namespace)
    if all_namespaces:
        return [_named(entry) for entry in found]
    return [_named(entry)["name"] for entry in found]


def _named(entry: Any) -> dict[str, str]:
    if isinstance(entry, dict):
        return {"name": entry["name"], "namespace": entry["namespace"]}
    if isinstance(entry, str):
        from ray._runtime import session

        return {"name": entry, "namespace": session.namespace}
    namespace, name = entry
    return {"name": name, "namespace": namespace}


def get_node_instance_id() -> str:
    """What the cloud calls this machine: the environment variable RAY_CLOUD_INSTANCE_ID, "" where it is not set."""
    import os

    return os.environ.get("RAY_CLOUD_INSTANCE_ID", "")


def get_node_ip_address(address: str | None = None) -> str:
    """The address by which this node is reached.

    Args:
        address: A host and port that should be reachable from the address; a public one by default. Nothing is sent.
    """
    import socket

    host, _, port = (address or "8.8.8.8:53").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
            name: str = probe.getsockname()[0]
        except (OSError, ValueError):  # no route
            return "127.0.0.1"
    return name
