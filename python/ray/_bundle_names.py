"""Bundles of placement groups as resources: the names under which a node offers what it has set aside.

A node that holds bundle 2 of group ``g`` with one CPU offers ``CPU_group_2_g`` and ``CPU_group_g``, and `MARKER_UNITS`
of ``bundle_group_2_g`` and ``bundle_group_g``, of which whoever runs in the bundle holds a little. So whatever knows
resources knows bundles. A demand for one bundle asks for both names, one for any bundle only for those without an
index; the node maps it to one bundle that has room for all of it.

Owns the names and nothing else. Used by drivers, nodes and the control service; `g` is the group's id in hex.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ANY",
    "MARKER",
    "MARKER_SHARE",
    "MARKER_UNITS",
    "base_of",
    "name_in",
    "offered",
    "plain",
    "rewritten",
    "split",
    "wanted_of_any",
]

ANY: Final = -1
"""Stands for any bundle, where a bundle's index is expected."""

MARKER: Final = "bundle"
MARKER_UNITS: Final = 1000 * 10_000
"""What a bundle offers of its marker: a thousand."""
MARKER_SHARE: Final = 10
"""What whoever runs in it holds of that: a thousandth. So no more than a million run in one bundle at a time."""

_INFIX: Final = "_group_"
_ID_CHARS: Final = 36


def name_in(resource: str, group: str, bundle: int = ANY) -> str:
    """The name of a resource in a bundle, or in any bundle of the group."""
    return f"{resource}{_INFIX}{group}" if bundle == ANY else f"{resource}{_INFIX}{bundle}_{group}"


def split(name: str) -> tuple[str, str, int] | None:
    """(resource, group, bundle) of a name made by `name_in`; None for any other."""
    resource, infix, tail = name.rpartition(_INFIX)
    if not infix:
        return None
    index, _, group = tail.rpartition("_")
    if len(group) != _ID_CHARS or not (index.isdecimal() or not index):
        return None
    return resource, group, int(index) if index else ANY


def base_of(name: str) -> str:
    """The resource that a bundle's resource is made of; any other name as it is."""
    parts = split(name)
    return name if parts is None else parts[0]


def offered(amounts: dict[str, int], group: str, bundle: int) -> dict[str, int]:
    """What a bundle adds to what its node has."""
    return rewritten(amounts, group, bundle, marker=MARKER_UNITS)


def rewritten(demand: dict[str, int], group: str, bundle: int = ANY, *, marker: int = MARKER_SHARE) -> dict[str, int]:
    """A demand as one for a bundle, or for any bundle of the group."""
    asked = {**demand, MARKER: marker}
    found = {name_in(name, group, bundle): units for name, units in asked.items() if units > 0}
    if bundle != ANY:
        found.update({name_in(name, group): units for name, units in asked.items() if units > 0})
    return found


def plain(demand: dict[str, int]) -> dict[str, int]:
    """A demand as whoever wrote it knows it: without markers, and under the names of what bundles are made of."""
    found: dict[str, int] = {}
    for name, units in demand.items():
        parts = split(name)
        if parts is None:
            found[name] = units
        elif parts[0] != MARKER:
            found[parts[0]] = units
    return found


def wanted_of_any(demand: dict[str, int]) -> tuple[str, dict[str, int]] | None:
    """The group and the resources of a demand for any one bundle; None if it is no such demand."""
    group = ""
    found: dict[str, int] = {}
    for name, units in demand.items():
        parts = split(name) if _INFIX in name else None
        if parts is None or units <= 0:
            continue
        if parts[2] != ANY:
            return None
        group = parts[1]
        found[parts[0]] = units
    return (group, found) if group else None
