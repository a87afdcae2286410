"""`ray status`: the nodes of a cluster, what they have and what is used, and what waits and why."""

from __future__ import annotations

from typing import Any

import click

from ray.scripts import options

STORE = "object_store_memory"


@click.command(name="status", short_help="Show nodes, resources, and what waits for them.")
@options.address
@click.option("-v", "--verbose", is_flag=True, help="Also show the resources of each node, and labels.")
@options.format_option("table", "json", "yaml", default="table")
def status(*, address: str | None, verbose: bool, form: str) -> None:
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
    if form != "table":
        from ray.scripts import printing

        click.echo(printing.as_document(facts(where, nodes, total, free, demands), form))
        return
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


def facts(
    address: str,
    nodes: list[dict[str, Any]],
    total: dict[str, int],
    free: dict[str, int],
    demands: list[dict[str, Any]],
) -> dict[str, Any]:
    """The same as data, with amounts as programs give them: memory in bytes, and halves of CPUs as 0.5."""
    from ray._runtime.options import from_fixed

    def amounts(units: dict[str, int]) -> dict[str, float]:
        return {name: from_fixed(amount) for name, amount in sorted(units.items())}

    alone = sum(bool(node["Alive"]) for node in nodes) == 1
    return {
        "address": address,
        "nodes": [
            {
                "node_id": _full_id(node),
                "role": _role(node),
                "name": _name(node),
                "ip": node["NodeManagerAddress"],
                "port": node["NodeManagerPort"],
                "state": "ALIVE" if node["Alive"] else "DEAD",
                "reason": node["Reason"] or None,
                "total": amounts(_plain(node["Resources"])),
                "used": amounts(_used(node["Resources"], free if alone else node["Free"])),
                "labels": node["Labels"],
            }
            for node in nodes
        ],
        "total": amounts(_plain(total)),
        "used": amounts(_used(total, free)),
        "reserved_by_placement_groups": {
            name: amounts({"total": held, "used": taken}) for name, (held, taken) in _reserved(total, free).items()
        },
        "pending": [
            {"count": x["count"], "for": x["label"], "each_needs": amounts(x["demand"]), "why": x["why"]}
            for x in demands
        ],
    }


def _used(total: dict[str, int], free: dict[str, int]) -> dict[str, int]:
    """What is held of each resource, also by placement groups."""
    return {name: max(units - free.get(name, 0), 0) for name, units in _plain(total).items()}


def _plain(amounts: dict[str, int]) -> dict[str, int]:
    """Without what bundles of placement groups offer: that is a part of the same."""
    from ray._bundle_names import split

    return {name: units for name, units in amounts.items() if split(name) is None}


def _reserved(total: dict[str, int], free: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What placement groups hold of each resource, and how much of that is used by what runs in them."""
    from ray._bundle_names import ANY, MARKER, split

    found: dict[str, tuple[int, int]] = {}
    for name, units in total.items():
        parts = split(name)
        if parts is not None and parts[0] != MARKER and parts[2] == ANY:
            held, taken = found.get(parts[0], (0, 0))
            found[parts[0]] = held + units, taken + max(units - free.get(name, 0), 0)
    return found


def _node_row(node: dict[str, Any]) -> tuple[str, ...]:
    from ray._node.config import address_of

    state = "alive" if node["Alive"] else f"lost: {node['Reason']}"
    address = address_of(node["NodeManagerAddress"], node["NodeManagerPort"])
    if node["IsOutboundOnly"]:
        address = f"{node['NodeManagerAddress']} (outbound only)"
    return (_id(node), _role(node), _name(node), address, state)


def _role(node: dict[str, Any]) -> str:
    return "head" if node["IsHead"] else "client" if node["IsClient"] else "node"


def _id(node: dict[str, Any]) -> str:
    return _full_id(node)[:16]


def _full_id(node: dict[str, Any]) -> str:
    from ray._runtime.ids import NodeID

    return NodeID._from_key(node["node"]).hex()


def _name(node: dict[str, Any]) -> str:
    return str(node["Name"] or node["NodeManagerHostname"])


def _usage(total: dict[str, int], free: dict[str, int], *, verbose: bool) -> list[str]:
    from ray._control.shown import show
    from ray.scripts.words import table

    used, reserved = _used(total, free), _reserved(total, free)
    names = [name for name in sorted(used) if verbose or not name.startswith("node:")]
    rows = []
    for name in names:
        text = f"{show(name, used[name])} of {show(name, total[name])}"
        if name in reserved:
            held, taken = reserved[name]
            text += f" ({show(name, held)} reserved by placement groups, {show(name, taken)} of it used)"
        rows.append((name, text))
    return table(rows) if rows else ["  none"]
