"""Demands that wait for long: when people are told, and about which.

Owns the groups of demands that are alike to a person (the same job, name and resources), so that a thousand actors
that wait are one line. Does not know why they wait, nor what is free.

Invariants: a demand is in exactly one group from `add` to `remove`; a group has members and a time of its next notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import msgspec

from ray._control.demands import ACTORS
from ray._control.machine import Deadlines

if TYPE_CHECKING:
    from ray._control.demands import Key

INFEASIBLE_DELAYS_S: Final = (0.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Delays between notices of demands that no node can ever meet; then every last one of them."""

STALLED_DELAYS_S: Final = (30.0, 60.0, 120.0, 300.0, 600.0)
"""The same for demands that could be met and are not, which may be how it is meant."""

_Alike: TypeAlias = "tuple[int, bool, str, tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]"


class Want(Protocol):
    """What this needs to know of a demand; how many leases of it are `unmet` may change."""

    @property
    def key(self) -> Key: ...
    @property
    def job(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def demand(self) -> dict[str, int]: ...
    @property
    def place(self) -> dict[str, int]: ...
    @property
    def owner(self) -> int: ...
    @property
    def unmet(self) -> int: ...


class Group(msgspec.Struct):
    """Demands that are alike. `moved_at` is when one of them was last met, or the first came."""

    alike: _Alike
    infeasible: bool
    moved_at: float
    members: dict[Any, Any]
    notices: int = 0

    @property
    def count(self) -> int:
        """Tasks or actors that wait, as far as their owners have said."""
        return sum(want.unmet for want in self.members.values())


class Waits:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._groups: dict[_Alike, Group] = {}
        self._deadlines: Deadlines[_Alike] = Deadlines()

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def members(self) -> dict[Key, Want]:
        """Every demand that waits."""
        return {key: want for group in self._groups.values() for key, want in group.members.items()}

    def add(self, want: Want, now: float, *, infeasible: bool) -> None:
        """A demand begins to wait."""
        alike = _alike(want)
        group = self._groups.get(alike)
        if group is None:
            group = self._groups[alike] = Group(alike, infeasible, now, {})
            self._set_deadline(group, now)
        group.members[want.key] = want

    def remove(self, want: Want) -> None:
        """It is met, withdrawn, or its owner has gone."""
        alike = _alike(want)
        group = self._groups[alike]
        del group.members[want.key]
        if not group.members:
            del self._groups[alike]
            self._deadlines.clear(alike)

    def moved(self, want: Want, now: float) -> None:
        """A lease was granted: who is alike waits for less long than it seems."""
        group = self._groups[_alike(want)]
        group.moved_at = now
        if not group.infeasible:
            group.notices = 0

    def due(self, now: float, working: set[Key]) -> list[Group]:
        """Groups that people should hear of now.

        Args:
            now: The time.
            working: Demands for which leases are held: their owners have work done, and only want more of it.
        """
        told: list[Group] = []
        for alike in self._deadlines.due(now):
            group = self._groups[alike]
            moved = now - group.moved_at < STALLED_DELAYS_S[0] or not working.isdisjoint(group.members)
            if group.infeasible or (not moved and group.count > 0):
                told.append(group)
                group.notices += 1
            self._set_deadline(group, now)
        return told

    def _set_deadline(self, group: Group, now: float) -> None:
        delays = INFEASIBLE_DELAYS_S if group.infeasible else STALLED_DELAYS_S
        self._deadlines.set(group.alike, now + delays[min(group.notices, len(delays) - 1)])


def _alike(want: Want) -> _Alike:
    demand, place = tuple(want.demand.items()), tuple(want.place.items())
    return want.job, want.owner == ACTORS, want.label, demand, place
