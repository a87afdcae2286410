"""What the cluster has: `ray.nodes`, `ray.cluster_resources`, `ray.available_resources`."""

from __future__ import annotations

from typing import Any

from ray._runtime import session
from ray._runtime.options import from_fixed, to_fixed

__all__ = ["available_resources", "cluster_resources", "nodes"]


STORE = "object_store_memory"


def _amounts(fixed: dict[str, int]) -> dict[str, float]:
    return {name: from_fixed(units) for name, units in fixed.items() if units}


def cluster_resources() -> dict[str, float]:
    """Resources of all nodes together, by name. Memory is in bytes."""
    return _amounts(session.request("cluster_resources"))


def available_resources() -> dict[str, float]:
    """Resources that nothing holds now, by name; those that are used up are left out. Memory is in bytes.

    `object_store_memory` is less by what is lent to processes for their values. What this process has emptied, and
    keeps for its next values, counts as free; what other processes keep so does not.
    """
    fixed = session.request("available_resources")
    statistics = session.require().statistics()
    kept = statistics["store_segment_bytes"] - statistics["store_used_bytes"]
    fixed[STORE] = min(fixed.get(STORE, 0) + to_fixed(STORE, kept), session.request("cluster_resources").get(STORE, 0))
    return _amounts(fixed)


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, dead ones included.

    Returns:
        For each node a dictionary with `NodeID`, `Alive` (and `alive`), `NodeManagerAddress`, `NodeManagerHostname`,
        `Resources`, `Labels`, `RayletSocketName` and further keys that Ray has. Of a node with `IsOutboundOnly` the
        port is the head's, through which others reach it.
    """
    return [_describe(node) for node in session.request("nodes")]


def _describe(node: dict[str, Any]) -> dict[str, Any]:
    from ray._runtime.ids import NodeID

    alive, node_id = bool(node["Alive"]), NodeID._from_key(node["node"]).hex()
    return {
        "NodeID": node_id,
        "Alive": alive,
        "alive": alive,
        "NodeManagerAddress": node["NodeManagerAddress"],
        "NodeManagerHostname": node["NodeManagerHostname"],
        "NodeManagerPort": node["NodeManagerPort"],
        "NodeName": node["Name"] or node["NodeManagerAddress"],
        # One port serves for all.
        "ObjectManagerPort": node["NodeManagerPort"],
        "MetricsExportPort": 0,
        "IsOutboundOnly": bool(node["IsOutboundOnly"]),
        # One socket serves for both.
        "ObjectStoreSocketName": node["Socket"],
        "RayletSocketName": node["Socket"],
        "Resources": _amounts(node["Resources"]),
        "Labels": {"ray.io/node-id": node_id, **node["Labels"]},
        "DeathReasonMessage": node["Reason"],
    }
