"""`ray status`: the nodes of a cluster, what they have and what is used, and what waits and why."""

from __future__ import annotations

from typing import Any

import click

STORE = "object_store_memory"


@click.command(name="status", short_help="Show nodes, resources, and what waits for them.")
@click.option("--address", metavar="HOST:PORT", help="The cluster; by default RAY_ADDRESS, or that of this machine.")
@click.option("-v", "--verbose", is_flag=True, help="Also show the resources of each node, and labels.")
def status(*, address: str | None, verbose: bool) -> None:
    """Shows the nodes of a cluster, its resources with how much of them is used, and what waits for them, and why.

    What waits is counted in workers. A program says anew how many it wants whenever that has doubled, so it may be up
    to twice as many.
    """
    from ray._runtime.tool import Tool

    with Tool(address) as tool:
        # Nobody misses the node of a program outside of the cluster; least of all that of this command.
        nodes = [x for x in tool.request("nodes") if x["node"] != tool.own_node and (x["Alive"] or not x["IsClient"])]
        total, free = tool.request("cluster_resources"), tool.request("available_resources")
        demands = tool.request("demands")
        where = tool.address
    click.echo("\n".join(describe(where, nodes, total, free, demands, verbose=verbose)))


def describe(
    address: str,
    nodes: list[dict[str, Any]],
    total: dict[str, int],
    free: dict[str, int],
    demands: list[dict[str, Any]],
    *,
    verbose: bool,
) -> list[str]:
    """The lines of the report.

    Args:
        address: Where the cluster is joined.
        nodes: As the request "nodes" answers.
        total: What all nodes have together, in wire units.
        free: What nothing holds now.
        demands: As the request "demands" answers.
        verbose: Whether to show each node's resources.
    """
    from ray._control.shown import show_demand
    from ray.scripts.words import table

    alive = sum(bool(node["Alive"]) for node in nodes)
    lost = len(nodes) - alive
    lines = [f"Cluster at {address}: {alive} alive" + (f", {lost} lost" if lost else ""), "", "Nodes"]
    lines += table([_node_row(node) for node in nodes])
    lines += ["", "Resources (used of total)", *_usage(total, free, verbose=verbose)]
    if verbose:
        for node in nodes:
            if node["Alive"]:
                lines += ["", f"Resources of {_name(node)} ({_id(node)})"]
                # A node that is alone has nobody to report to: what is free on it is what is free at all.
                lines += _usage(node["Resources"], free if alive == 1 else node["Free"], verbose=True)
                labels = ", ".join(f"{key}={value}" for key, value in sorted(node["Labels"].items()))
                lines += [f"  labels: {labels}"] if labels else []
    lines += ["", "Pending demands"]
    if demands:
        rows = [("WORKERS", "FOR", "EACH NEEDS", "WHY")]
        rows += [(str(d["count"]), d["label"] or "(unnamed)", show_demand(d["demand"]), d["why"]) for d in demands]
        lines += table(rows)
    else:
        lines.append("  none")
    return lines


def _node_row(node: dict[str, Any]) -> tuple[str, ...]:
    from ray._node.config import address_of

    role = "head" if node["IsHead"] else "client" if node["IsClient"] else "node"
    state = "alive" if node["Alive"] else f"lost: {node['Reason']}"
    address = address_of(node["NodeManagerAddress"], node["NodeManagerPort"])
    if node["IsOutboundOnly"]:
        address = f"{node['NodeManagerAddress']} (outbound only)"
    return (_id(node), role, _name(node), address, state)


def _id(node: dict[str, Any]) -> str:
    from ray._runtime.ids import NodeID

    return NodeID._from_key(node["node"]).hex()[:16]


def _name(node: dict[str, Any]) -> str:
    return str(node["Name"] or node["NodeManagerHostname"])


def _usage(total: dict[str, int], free: dict[str, int], *, verbose: bool) -> list[str]:
    from ray._control.shown import show
    from ray.scripts.words import table

    names = [name for name in sorted(total) if verbose or not name.startswith("node:")]
    rows = []
    for name in names:
        used = max(total[name] - free.get(name, 0), 0)
        rows.append((name, f"{show(name, used)} of {show(name, total[name])}"))
    return table(rows) if rows else ["  none"]
