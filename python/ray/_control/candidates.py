"""Which nodes could meet demands of one kind, and which of them have room now, the best first.

Demands that ask for the same share a `Candidates`, so that placing one costs no look at every node: with thousands of
nodes and a hundred thousand actors that would be seconds for each. The view is kept by what changes: a node that did is
looked at again, once, when somebody asks next.

Invariants, once `refresh` has been called: `able` are the nodes that are there, allowed and large enough; `_open` are
those of them with room for one more, each with its rank, under which it is in the heap. (The heap may have further
entries, which count for nothing.)
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

from ray._control import strategy as strategies
from ray._control.node_records import fits

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterator

    from ray._control.node_records import Node
    from ray._control.nodes import NodeTable
    from ray._control.strategy import Strategy

Rank: TypeAlias = "tuple[bool, int, float, int]"
"""What is smaller comes first: whether it is not what is wished for, how much the node got already where that counts,
how much it is used, and how many had joined before it."""


class Candidates:
    """See the module's docstring.

    Args:
        nodes: The view of the cluster.
        demand: What is taken from a node.
        place: What a node must have in total.
        strategy: Which nodes are allowed, and wished for.
        given: Leases that each node got of a demand that is to be spread, which has candidates of its own.
        is_actor: Whether, for a strategy that spreads, actors are counted.
        only: The one node that may be a candidate; 0 for any.
    """

    def __init__(
        self,
        nodes: NodeTable,
        demand: dict[str, int],
        place: dict[str, int],
        strategy: Strategy,
        *,
        given: dict[int, int] | None = None,
        is_actor: bool = False,
        only: int = 0,
    ) -> None:
        self.able: dict[int, None] = {}
        self._nodes = nodes
        self._demand, self._place, self._strategy = demand, place, strategy
        self._given = given
        self._counts_actors = is_actor and strategy.kind == strategies.SPREAD
        self._only = only
        self._dirty = nodes.watch(only)
        self._open: dict[int, Rank] = {}
        self._heap: list[tuple[Rank, int]] = []
        self._wished: OrderedDict[int, None] = OrderedDict()
        """Able nodes that are wished for, the next in line first; and the others."""
        self._others: OrderedDict[int, None] = OrderedDict()

    def close(self) -> None:
        """It is not used any more."""
        self._nodes.unwatch(self._dirty, self._only)

    # ------------------------------------------------------------------ queries

    def refresh(self) -> None:
        """Look again at the nodes that have changed."""
        if not self._dirty:
            return
        for key in self._dirty:
            self._look(key)
        self._dirty.clear()
        if len(self._heap) > 2 * len(self._open) + 64:  # stale entries are dropped before they pile up
            self._heap = [(rank, key) for key, rank in self._open.items()]
            heapq.heapify(self._heap)

    def has_others_than(self, nodes: Collection[int]) -> bool:
        """Whether any node could meet the demand that is not one of these."""
        return any(key not in nodes for key in self.able)

    def has_room(self) -> bool:
        """Whether any node has room now. (After `refresh`, as all that follows.)"""
        return bool(self._open)

    def best(self, count: int, excluded: Container[int]) -> list[tuple[Node, int]]:
        """At most so many nodes with room, the best first, and how often the demand fits there."""
        found: list[tuple[Node, int]] = []
        popped: list[tuple[Rank, int]] = []
        while self._heap and len(found) < count:
            rank, key = entry = heapq.heappop(self._heap)
            if self._open.get(key) != rank:
                continue
            del self._open[key]  # a second entry of the same rank is stale
            popped.append(entry)
            if key not in excluded:
                node = self._nodes.get(key)
                assert node is not None, "a lost node is a candidate"
                found.append((node, fits(node.left, self._demand)))
        for entry in popped:
            self._open[entry[1]] = entry[0]
            heapq.heappush(self._heap, entry)
        return found

    def with_room(self, key: int) -> tuple[Node, int] | None:
        """A node, if it has room, and how often the demand fits there."""
        node = self._nodes.get(key) if key in self._open else None
        return (node, fits(node.left, self._demand)) if node is not None else None

    def is_wished(self, node: Node) -> bool:
        return self._strategy.wishes(node)

    def in_line(self, count: int, excluded: Container[int]) -> list[int]:
        """At most so many nodes that could meet the demand, whether they have room or not: each in its turn, so that
        the lines on all nodes grow alike, those that are wished for first.
        """
        found: list[int] = []
        for turns in (self._wished, self._others):
            for key in _in_turn(turns):
                if len(found) == count:
                    return found
                if key not in excluded:
                    found.append(key)
        return found

    # ------------------------------------------------------------------ the view

    def _look(self, key: int) -> None:
        node = self._nodes.get(key)
        if node is None or not self._is_able(node):
            self._open.pop(key, None)
            self.able.pop(key, None)
            self._wished.pop(key, None)
            self._others.pop(key, None)
            return
        if key not in self.able:
            self.able[key] = None
            (self._wished if self._strategy.wishes(node) else self._others)[key] = None
        if fits(node.left, self._demand) > 0:
            rank = self._rank(node)
            if self._open.get(key) != rank:
                self._open[key] = rank
                heapq.heappush(self._heap, (rank, key))
        else:
            self._open.pop(key, None)

    def _is_able(self, node: Node) -> bool:
        is_there = node.announced and not node.away and self._only in (0, node.key)
        return is_there and self._strategy.allows(node) and node.can_ever(self._demand) and node.can_ever(self._place)

    def _rank(self, node: Node) -> Rank:
        got = self._given.get(node.key, 0) if self._given is not None else 0
        if self._counts_actors:
            got = node.actors
        return not self._strategy.wishes(node), got, node.utilization(), node.order

    def problems(self) -> Iterator[str]:
        """Where the view contradicts the nodes, apart from those that are to be looked at again."""
        for node in self._nodes.all():
            if node.key in self._dirty:
                continue
            is_able = node.alive and self._is_able(node)
            if is_able != (node.key in self.able) or is_able != (node.key in self._wished or node.key in self._others):
                yield f"{node} is able wrongly"
            rank = self._rank(node) if is_able and fits(node.left, self._demand) > 0 else None
            if self._open.get(node.key) != rank:
                yield f"{node} has room wrongly"
        entries = set(self._heap)
        if not all((rank, key) in entries for key, rank in self._open.items()):
            yield "a node with room is not in the heap"


def _in_turn(turns: OrderedDict[int, None]) -> Iterator[int]:
    """The keys from the first on, each of which goes to the end when the next is asked for."""
    for _ in range(len(turns)):
        key = next(iter(turns))
        yield key
        turns.move_to_end(key)
