"""What people are told after a start: plain text, made of facts, without input or output."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray._node.launch import NodeProcess

__all__ = ["head_started", "joined", "joined_outbound", "table"]

CLOSED = "It listens there and on no other address, and takes nobody who does not have the token."
OPEN = "It listens on every address of this machine, and takes nobody who does not have the token."
TLS = "Nodes use TLS 1.3 between them, with certificates that follow from the token."
OUTBOUND = "It listens for nobody and only connects outwards; who wants it comes to the head, which passes it on."
LOOPBACK = "Only this machine can join and connect: the address leads to no other."


def head_started(
    node: NodeProcess,
    *,
    node_id: str,
    why: str,
    is_everywhere: bool,
    token_file: str,
    token_source: str,
    any_port: bool,
    tls: bool = False,
) -> str:
    """Of a head.

    Args:
        node: The head.
        node_id: Its id, as it is shown elsewhere.
        why: Why it announces this address.
        is_everywhere: Whether it listens on all addresses of the machine.
        token_file: Where its token is.
        token_source: Where the token was found; empty if it was made for this cluster.
        any_port: Whether the system chose the port.
        tls: Whether nodes use TLS between them.
    """
    address = node.tcp_address
    host = address.rpartition(":")[0]
    is_local = host.startswith("127.") or host == "[::1]"
    facts = [
        ("address", address),
        ("", why),
        ("", OPEN if is_everywhere else CLOSED),
        *([("", "The system chose the port.")] if any_port else []),
        *([("", TLS)] if tls else []),
        *([("", LOOPBACK)] if is_local else []),
        ("token", token_file),
        ("", f"It is that of {token_source}." if token_source else "It was made for this cluster."),
        ("logs", f"{node.session_dir}/logs"),
    ]
    elsewhere = [
        "Join from another machine:",
        f"  scp -p {host}:{token_file} ray-token",
        f"  ray start --address={address} --token-file=ray-token",
    ]
    lines = [
        f"The head of a new cluster runs: node {node_id[:16]}, process {node.pid}.",
        "",
        *_indented(facts),
        "",
        "Join from this machine:",
        f"  ray start --address={address}",
        *([] if is_local else elsewhere),
        "Connect a program:",
        f'  ray.init("{address}")',
        f"  or with RAY_ADDRESS={address} in its environment",
        *([] if is_local else ["  and, on a machine without a node, RAY_AUTH_TOKEN_PATH=ray-token as well"]),
        "Look at it, and stop all nodes that you have started on this machine:",
        "  ray status",
        "  ray stop",
    ]
    return "\n".join(lines)


def joined(
    node: NodeProcess, *, node_id: str, head_address: str, why: str, is_everywhere: bool, tls: bool = False
) -> str:
    """Of a node that has joined a cluster; see `head_started`."""
    facts = [
        ("address", node.tcp_address),
        ("", why),
        ("", OPEN if is_everywhere else CLOSED),
        *([("", TLS)] if tls else []),
        ("logs", f"{node.session_dir}/logs"),
    ]
    return _part_of(node, node_id, head_address, facts)


def joined_outbound(node: NodeProcess, *, node_id: str, head_address: str, tls: bool = False) -> str:
    """Of a node that has joined a cluster and is reached through its head."""
    facts = [
        ("address", "none"),
        ("", OUTBOUND),
        ("", f"All that other machines and this one say to each other may take the way through {head_address}."),
        *([("", TLS)] if tls else []),
        ("logs", f"{node.session_dir}/logs"),
    ]
    return _part_of(node, node_id, head_address, facts)


def _part_of(node: NodeProcess, node_id: str, head_address: str, facts: list[tuple[str, str]]) -> str:
    lines = [
        f"This machine is part of the cluster at {head_address}: node {node_id[:16]}, process {node.pid}.",
        "",
        *_indented(facts),
        "",
        "Connect a program:",
        f'  ray.init("{head_address}")',
        f"  or with RAY_ADDRESS={head_address} in its environment",
        "Look at the cluster, and stop all nodes that you have started on this machine:",
        "  ray status",
        "  ray stop",
    ]
    return "\n".join(lines)


def _indented(facts: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [f"  {name:<{width}}  {value}" for name, value in facts]


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of a table with aligned columns, the last of which is as long as it is."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1:] = [0]
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
