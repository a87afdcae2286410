"""Demands that ask for the same: they share the view of the nodes, and wait together.

Owns who waits for room, in the order in which they have their turn, and who of them should stand in line somewhere and
does not. Places nothing.

Invariants: a demand waits here while its count is above zero; who is `unlined` waits; `lines` counts the nodes on which
members stand in line.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, TypeAlias

from ray._control import strategy as strategies
from ray._control.candidates import Candidates

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ray._control.demands import Demand, Key
    from ray._control.nodes import NodeTable

Asked: TypeAlias = "tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...], bytes, bool, Key | None]"
"""What demands have in common: what is taken, what a node must have, the strategy, whether they are actors, and the
demand itself where nobody else can share its view."""

KINDS_KEPT: Final = 64
"""Views that nobody uses and that are kept for a next demand; the one unused for longest is dropped. Making one costs a
look at every node."""


class Alike:
    """See the module's docstring.

    Args:
        asked: What the members have in common.
        tiers: Views of nodes: those of the first in which any node could meet the demand count.
    """

    def __init__(self, asked: Asked, tiers: tuple[Candidates, ...]) -> None:
        self.asked = asked
        self.members: dict[Key, Demand] = {}
        self.waiting: OrderedDict[Key, Demand] = OrderedDict()
        self.unlined: OrderedDict[Key, Demand] = OrderedDict()
        self.lines = 0
        self.is_hopeless = False
        """Some of those who wait were told that no node can ever meet them."""
        self._tiers = tiers

    def candidates(self, apart: Collection[int] = ()) -> Candidates | None:
        """The view that counts now, up to date; None if no node can ever meet the demand.

        Of several views one that has only nodes in `apart` counts if the others have nobody else.
        """
        first: Candidates | None = None
        for tier in self._tiers:
            tier.refresh()
            if tier.able:
                if tier.has_others_than(apart):
                    return tier
                first = first or tier
        return first

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()

    def problems(self) -> Iterator[str]:
        for demand in self.members.values():
            if (demand.count > 0) != (demand.key in self.waiting):
                yield f"{demand} waits wrongly"
        if not self.unlined.keys() <= self.waiting.keys() or not self.waiting.keys() <= self.members.keys():
            yield f"somebody waits among {self.asked} who does not belong there"
        if self.lines != sum(len(demand.queued) for demand in self.members.values()):
            yield f"lines of {self.asked} are miscounted"
        for tier in self._tiers:
            yield from tier.problems()


class Kinds:
    """All that are alike, by what they ask for."""

    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        self._kinds: dict[Asked, Alike] = {}
        self._unused: OrderedDict[Asked, None] = OrderedDict()

    def __iter__(self) -> Iterator[Alike]:
        return iter(self._kinds.values())

    def join(self, demand: Demand) -> Alike:
        """Where a demand belongs from now on."""
        asked = _asked(demand)
        alike = self._kinds.get(asked)
        if alike is None:
            alike = self._kinds[asked] = Alike(asked, self._tiers(demand))
        self._unused.pop(asked, None)
        alike.members[demand.key] = demand
        return alike

    def leave(self, demand: Demand, alike: Alike) -> None:
        """The demand is over."""
        del alike.members[demand.key]
        alike.waiting.pop(demand.key, None)
        alike.unlined.pop(demand.key, None)
        if alike.members:
            return
        if alike.asked[4] is None:
            self._unused[alike.asked] = None
        else:
            self._drop(alike.asked)
        if len(self._unused) > KINDS_KEPT:
            self._drop(self._unused.popitem(last=False)[0])

    def _drop(self, asked: Asked) -> None:
        self._kinds.pop(asked).close()

    def _tiers(self, demand: Demand) -> tuple[Candidates, ...]:
        strategy = demand.strategy
        if strategy.kind == strategies.NODE:
            wished = Candidates(self._nodes, demand.demand, demand.place, strategy, only=strategy.node)
            if not strategy.soft:
                return (wished,)
            return wished, Candidates(self._nodes, demand.demand, demand.place, strategies.Strategy())
        given = demand.given if _is_spread_out(demand) else None
        view = Candidates(self._nodes, demand.demand, demand.place, strategy, given=given, is_actor=demand.is_actor)
        return (view,)


def _is_spread_out(demand: Demand) -> bool:
    """Whether it counts what each node has got of this very demand."""
    return demand.strategy.kind == strategies.SPREAD and not demand.is_actor


def _asked(demand: Demand) -> Asked:
    own = demand.key if _is_spread_out(demand) else None
    taken = tuple(sorted(demand.demand.items()))
    return taken, tuple(sorted(demand.place.items())), demand.packed, demand.is_actor, own
