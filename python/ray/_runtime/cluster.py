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
    alive = bool(node["Alive"])
    described = {
        "NodeManagerPort": 0,
        "ObjectManagerPort": 0,
        "ObjectStoreSocketName": "",
        "RayletSocketName": "",
        "MetricsExportPort": 0,
        "NodeName": node["NodeManagerAddress"],
        **node,
        "alive": alive,
    }
    described["Resources"] = _amounts(node.get("Resources", {})) if alive else {}
    return described
