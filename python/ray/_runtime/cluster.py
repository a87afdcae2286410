"""What the cluster has: `ray.nodes`, `ray.cluster_resources`, `ray.available_resources`."""

from __future__ import annotations

from typing import Any

from ray._runtime import session
from ray._runtime.options import from_fixed

__all__ = ["available_resources", "cluster_resources", "nodes"]


def _amounts(fixed: dict[str, int]) -> dict[str, float]:
    return {name: from_fixed(units) for name, units in fixed.items() if units}


def cluster_resources() -> dict[str, float]:
    """Resources of all nodes together, by name. Memory is in bytes."""
    return _amounts(session.request("cluster_resources"))


def available_resources() -> dict[str, float]:
    """Resources that nothing holds now, by name; those that are used up are left out. Memory is in bytes."""
    return _amounts(session.request("available_resources"))


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, dead ones included.

    Returns:
        For each node a dictionary with `NodeID`, `Alive` (and `alive`), `NodeManagerAddress`, `NodeManagerHostname`,
        `Resources`, `Labels` and further keys that Ray has.
    """
    return [_describe(node) for node in session.request("nodes")]


def _describe(node: dict[str, Any]) -> dict[str, Any]:
    from ray._runtime.ids import NodeID

    key = node.get("node", node.get("NodeID", 0))
    alive = bool(node.get("alive", True))
    described = {
        "NodeID": NodeID._from_key(key).hex() if isinstance(key, int) else key,
        "Alive": alive,
        "NodeManagerAddress": node.get("address", session.node_ip_address),
        "NodeManagerHostname": node.get("hostname", ""),
        "NodeManagerPort": node.get("port", 0),
        "ObjectManagerPort": node.get("port", 0),
        "ObjectStoreSocketName": node.get("socket", ""),
        "RayletSocketName": node.get("socket", ""),
        "MetricsExportPort": 0,
        "NodeName": node.get("name", session.node_ip_address),
        "Labels": dict(node.get("labels", {})),
        "alive": alive,
    }
    if alive:
        described["Resources"] = _amounts(node.get("resources", {}))
    else:
        described["DeathReasonMessage"] = node.get("death_reason", "")
    return described
