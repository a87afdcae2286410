"""What people are told about demands that wait, and why they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray._bundle_names import base_of
from ray._control import strategy as strategies
from ray._control.demands import ACTORS, GROUPS
from ray._control.shown import show, show_demand

if TYPE_CHECKING:
    from ray._control.waits import Group
    from ray._node.lease_records import Want
    from ray._node.resources import Ledger

USERS_SHOWN = 4


def infeasible(group: Group, want: Want, why: str, total: dict[str, int] | None) -> str:
    """Of demands that no node can ever meet.

    Args:
        group: Those that are alike.
        want: One of them.
        why: Why it cannot be met.
        total: What the only node has; None if there are several.
    """
    asked, many = show_demand({**want.place, **want.demand}), group.count > 1
    asks, it = ("ask", "they go") if many else ("asks", "it goes")
    has = f"In total this node has {show_demand(total)}. " if total is not None else ""
    return (
        f"{_who(group, want)} {asks} for {asked}, which no node has: {'each' if many else 'it'} {why}. "
        f"{has}{it.capitalize()} on waiting; ask for less, or start with more resources."
    )


def stalled(group: Group, want: Want, why: str, now: float) -> str:
    """Of demands that could be met, and wait for long."""
    many = group.count > 1
    return (
        f"{_who(group, want)} {'have' if many else 'has'} waited for {now - group.moved_at:.0f} seconds: "
        f"{'each' if many else 'it'} {why}. An actor holds what it asked for as long as it lives, also while idle."
    )


def _who(group: Group, want: Want) -> str:
    kind = {ACTORS: "actor ", GROUPS: ""}.get(want.owner, "task ")
    name = want.label or "(unnamed)"
    # Owners tell the number of tasks when it has doubled.
    number = str(group.count) if want.owner == ACTORS else f"About {group.count}"
    return f"{number} {kind.strip()}s {name}" if group.count > 1 else f"The {kind}{name}"


def lacking(want: Want, name: str, ledger: Ledger, users: list[str]) -> str:
    """Why a demand for a resource is not met, of which too little is free. `users` hold some of it."""
    total = ledger.total.get(name, 0)
    if not total and want.how.kind != strategies.GROUP:
        return f"needs {name}: {show(name, want.demand[name])}; its own node has none"
    used = total - max(ledger.free.get(name, 0), 0)
    more = f" and {len(users) - USERS_SHOWN} more" if len(users) > USERS_SHOWN else ""
    by = f" by {', '.join(users[:USERS_SHOWN])}{more}" if users else ""
    base = base_of(name)
    asked = f"needs {base}: {show(base, want.demand[name])}"
    if want.how.kind == strategies.GROUP:
        asked = f"{asked} in {want.how}"
        if not total:
            return f"{asked}, which is not on this node"
    return f"{asked}; {show(base, used)} of {show(base, total)} are in use{by}"
