"""Placement: which node lends what an owner's own node cannot, and on which node an actor lives.

Owns the demands that came here and are not placed yet. Decides on a view of the nodes that may be a moment old: a node
that has no room any more refuses, and the demand is placed anew. A demand that waits longer than `QUEUE_AFTER_S` also
stands in line on nodes that could meet it, where it takes part in the sharing out between owners.

How nodes are chosen: of those that are allowed and have room, those that are wished for first; then evenly, the least
used first. Nodes that have lost each other lately (`APART_S`) get nothing from one another as long as there is another
choice; but between a node and one that only connects outwards is the head, which both reach. "SPREAD" counts what the
same demand has got from each node. Actors prefer the node of their creator while it is less than half used. Demands
that ask for the same share a view of the nodes (`Candidates`) and wait in turn (`Alike`), so that nothing here goes
through all nodes or all demands for one of them.

Invariants: a demand is placed at most as often as it was asked for; what a lost node had been given and not granted
is placed anew; a demand with a count of zero waits for nothing; by its owner, by its home and by the nodes that it
remembers, each demand is found.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, TypeVar

from ray._control import strategy as strategies
from ray._control.actor_records import PlaceActor as ActorWanted
from ray._control.actor_records import Unplaceable, WithdrawActor
from ray._control.alike import Kinds
from ray._control.demands import ACTORS, Demand, Key
from ray._control.group_records import GroupOver, GroupPlaced
from ray._control.machine import (
    Deadlines,
    FromNode,
    Machine,
    Notify,
    ProcessLeft,
    Send,
    Tick,
    ToNode,
    earliest,
)
from ray._control.members import GrantPassed, NodesApart
from ray._control.messages import (
    ActorPlaced,
    ActorRefused,
    Hopeless,
    LeasesRefused,
    Overflow,
    PlaceActor,
    PlacedElsewhere,
    PlaceLeases,
    WithdrawLeases,
)
from ray._control.messages import WithdrawActor as WithdrawActorFromNode
from ray._control.node_records import NodeCame, NodeFreed, NodeLost, NodeWentAway
from ray._control.shown import show, show_demand, show_part
from ray._control.waits import Waits
from ray._protocol import FAILED_GROUP_REMOVED, FAILED_UNSCHEDULABLE, LeaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.alike import Alike, Asked
    from ray._control.candidates import Candidates
    from ray._control.groups import GroupTable
    from ray._control.node_records import Node
    from ray._control.nodes import NodeTable

T = TypeVar("T", int, bytes)

QUEUE_AFTER_S: Final = 0.1
"""How long a demand waits for room anywhere before it stands in line on nodes."""

QUEUES_MAX: Final = 4
"""Nodes on which one demand stands in line."""

LINES_MAX: Final = 16
"""Demands of one kind in line on a node, on average; more of them wait here until one of these is met. Each costs the
node time whenever it shares out."""

TRIES_MAX: Final = 64
"""Demands in a row for which there was room and none that they may have; then the rest of their kind waits for the next
occasion."""

NEAR_UTILIZATION: Final = 0.5
"""An actor lives on its creator's node while that is used less than this."""

APART_S: Final = 30.0
"""How long a node gets no demands of another one's processes after these could not reach it, though the head does: each
try costs them seconds."""

APART_MAX: Final = 10_000
"""Pairs of such nodes that are remembered; of more the oldest is forgotten, and tried again."""

SHY_S: Final = 0.05
"""After a refusal the node is not asked again for the same demand so soon: what is free there is about to change."""

SHY_OF_MEMORY_S: Final = 1.0
"""The same if the demand is held back there for want of memory, which the view of what is free does not show. Meanwhile
it stands in line there, as anywhere."""

BUNDLES_SHOWN: Final = 4
"""Of a placement group's bundles a sentence tells no more than these."""


class Placement(Machine):
    """See the module's docstring.

    Args:
        nodes: The view of the cluster.
        groups: Placement groups, in which demands may be.
        node_of: Where a member is.
    """

    def __init__(
        self, nodes: NodeTable, groups: GroupTable, node_of: Callable[[int], int], *, validate: bool = False
    ) -> None:
        super().__init__(validate=validate)
        self._nodes = nodes
        self._groups = groups
        self._node_of = node_of
        self._demands: dict[Key, Demand] = {}
        self._kinds = Kinds(nodes)
        self._kind_of: dict[Key, Alike] = {}
        self._waiting: dict[Asked, Alike] = {}
        """Kinds of which any demand waits."""
        self._by_owner: dict[int, dict[Key, Demand]] = {}
        """Demands for leases."""
        self._by_home: dict[int, dict[Key, Demand]] = {}
        """The same."""
        self._at: dict[int, dict[Key, Demand]] = {}
        """Demands that remember anything of a node."""
        self._by_group: dict[bytes, dict[Key, Demand]] = {}
        """Demands in a placement group."""
        self._hosts: dict[int, int] = {}
        """Nodes of the processes that are actors."""
        self._apart: dict[tuple[int, int], float] = {}
        """Nodes that have lost each other, though both are here, and until when they are kept apart; oldest first."""
        self._apart_of: dict[int, dict[int, float]] = {}
        """The same, by the first of each pair."""
        self._waits = Waits()
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {
            ActorWanted: self._on_actor_wanted,
            WithdrawActor: self._on_actor_withdrawn,
            GrantPassed: self._on_grant_passed,
            NodesApart: self._on_nodes_apart,
            NodeCame: self._on_node_came,
            NodeFreed: self._on_node_freed,
            NodeLost: self._on_node_lost,
            NodeWentAway: self._on_node_away,
            GroupPlaced: self._on_group_placed,
            GroupOver: self._on_group_over,
            ProcessLeft: self._on_process_left,
            Tick: self._on_tick,
        }
        self._node_messages = {
            Overflow: self._on_overflow,
            LeasesRefused: self._on_leases_refused,
            ActorRefused: self._on_actor_refused,
        }

    # ------------------------------------------------------------------ queries

    def next_deadline(self) -> float | None:
        return earliest(self._deadlines.next(), self._waits.next_deadline())

    def statistics(self) -> dict[str, int]:
        return {"demands_for_nodes": sum(demand.count for demand in self._demands.values())}

    def pending(self) -> list[tuple[Demand, str]]:
        """What waits for room, and why."""
        return [(demand, self._why(demand)) for demand in self._demands.values() if demand.count > 0]

    def why(self, key: Key) -> str:
        """Why a demand is not met by any node, as a sentence without its full stop; empty if it does not wait here."""
        demand = self._demands.get(key)
        return self._why(demand) if demand is not None and demand.count > 0 else ""

    def node_of_actor(self, actor: bytes) -> int:
        """The node that an actor was given to and has not been started on yet; 0 if there is none."""
        demand = self._demands.get((ACTORS, actor))
        return next(iter({**demand.out, **demand.queued}), 0) if demand is not None else 0

    # ------------------------------------------------------------------ demands for leases

    def _on_overflow(self, event: FromNode, message: Overflow, now: float) -> None:
        key = (message.owner, message.class_id)
        demand = self._demands.get(key)
        if message.heard < 0:
            if demand is not None:
                self._withdraw(demand)
            return
        if demand is None:
            if self._nodes.get(event.node) is None or not message.count:
                return
            demand = Demand(
                key=key,
                home=event.node,
                job=message.job,
                demand=message.demand,
                place={},
                env=message.env,
                packed=message.strategy,
                strategy=strategies.parse(message.strategy),
                label=message.label,
                since=now,
                retriable=message.retriable,
            )
            self._add(demand)
        count = max(message.count - (demand.placed - message.heard), 0)
        if count and not demand.count:
            demand.since = now
        self._set_count(demand, count)
        if not count:
            self._leave_queues(demand)
            for node in list(demand.held_back):
                self._remember_held_back(demand, node, "")
        self._place(demand, now)

    def _on_leases_refused(self, event: FromNode, message: LeasesRefused, now: float) -> None:
        demand = self._demands.get((message.owner, message.class_id))
        if demand is None:
            return
        self._note_refusal(demand, event.node, message.held_back, now)
        if event.node == demand.home:  # it keeps its own books
            demand.placed -= message.count
            self._set_count(demand, demand.count + message.count)
        else:
            self._unplace(demand, event.node, min(message.count, demand.out.get(event.node, 0)))
        self._place(demand, now)

    def _note_refusal(self, demand: Demand, node: int, held_back: str, now: float) -> None:
        demand.shy[node] = now + (SHY_OF_MEMORY_S if held_back else SHY_S)
        self._remember_held_back(demand, node, held_back)

    def _remember_held_back(self, demand: Demand, node: int, held_back: str) -> None:
        demand.held_back.pop(node, None)
        if held_back:
            demand.held_back[node] = held_back
        self._index(demand, node)

    def _unplace(self, demand: Demand, node: int, count: int) -> None:
        """What was placed on a node is not coming from there."""
        if count <= 0:
            return
        demand.placed -= count
        self._set_count(demand, demand.count + count)
        self._count_out(demand, node, -count)
        if demand.is_actor:
            if (host := self._nodes.get(node)) is not None:
                host.count_actor(-1)
        else:
            self._emit(ToNode(demand.home, PlacedElsewhere(demand.owner, demand.class_id, -count)))

    def _on_grant_passed(self, event: GrantPassed, now: float) -> None:
        demand = self._demands.get((event.owner, event.class_id))
        if demand is None:
            return
        self._remember_held_back(demand, event.node, "")
        if demand.out.get(event.node):
            self._count_out(demand, event.node, -1)
        elif event.node in demand.queued:
            self._leave_line(demand, event.node)
            self._set_count(demand, max(demand.count - 1, 0))
            if not demand.count:
                self._leave_queues(demand)
        self._forget_if_done(demand)

    def _on_nodes_apart(self, event: NodesApart, now: float) -> None:
        host = self._nodes.get(event.node)
        if host is not None and host.relayed:
            return  # the head was between them, maybe another one than now; with this one both are connected
        for pair in ((event.asker, event.node), (event.node, event.asker)):
            self._apart.pop(pair, None)
            self._apart[pair] = self._apart_of.setdefault(pair[0], {})[pair[1]] = now + APART_S
        self._forget_apart(now)

    def _forget_apart(self, now: float) -> None:
        """Nodes whose time is over may have to do with each other again, and of too many pairs the oldest."""
        while self._apart and (len(self._apart) > APART_MAX or next(iter(self._apart.values())) <= now):
            home, node = next(iter(self._apart))
            del self._apart[home, node], self._apart_of[home][node]
            if not self._apart_of[home]:
                del self._apart_of[home]

    def _apart_from(self, home: int, now: float) -> dict[int, float]:
        """Nodes that are kept apart from one."""
        self._forget_apart(now)
        return self._apart_of.get(home, {})

    def _on_process_left(self, event: ProcessLeft, now: float) -> None:
        for demand in list(self._by_owner.get(event.proc, {}).values()):
            self._withdraw(demand)
        host = self._nodes.get(self._hosts.pop(event.proc, 0))
        if host is not None:
            host.count_actor(-1)

    # ------------------------------------------------------------------ actors

    def _on_actor_wanted(self, event: ActorWanted, now: float) -> None:
        key = (ACTORS, event.actor)
        if (old := self._demands.get(key)) is not None:
            self._withdraw(old)
        demand = Demand(
            key=key,
            home=self._node_of(event.creator),
            job=event.job,
            demand=event.run,
            place=event.place,
            env=event.env,
            packed=event.strategy,
            strategy=strategies.parse(event.strategy),
            label=event.label,
            since=now,
            incarnation=event.incarnation,
            lives_for=event.owner,
            retriable=event.retriable,
        )
        self._add(demand)
        self._set_count(demand, 1)
        self._place(demand, now)

    def _on_actor_withdrawn(self, event: WithdrawActor, now: float) -> None:
        demand = self._demands.get((ACTORS, event.actor))
        if demand is not None:
            self._withdraw(demand)

    def _on_actor_refused(self, event: FromNode, message: ActorRefused, now: float) -> None:
        demand = self._demands.get((ACTORS, message.actor))
        if demand is None or demand.incarnation != message.incarnation:
            return
        self._note_refusal(demand, event.node, message.held_back, now)
        self._unplace(demand, event.node, demand.out.get(event.node, 0))
        self._place(demand, now)

    def actor_started(self, node: int, message: ActorPlaced) -> bool:
        """An actor's worker is there. False if it was not expected from that node any more."""
        demand = self._demands.get((ACTORS, message.actor))
        if demand is None or demand.incarnation != message.incarnation or node not in {**demand.out, **demand.queued}:
            return False
        if node in demand.queued:
            self._leave_line(demand, node)
        if demand.out.get(node):
            self._count_out(demand, node, -demand.out[node])
        elif (host := self._nodes.get(node)) is not None:
            host.count_actor(1)  # it queued there, and was not counted yet
        self._withdraw(demand)
        self._hosts[message.proc] = node
        return True

    def actor_failed(self, actor: bytes) -> None:
        """A node has said that the actor cannot be started at all."""
        demand = self._demands.get((ACTORS, actor))
        if demand is not None:
            self._withdraw(demand)

    # ------------------------------------------------------------------ placing

    def _place(self, demand: Demand, now: float) -> None:
        """Give away as much of a demand as there is room for."""
        if not demand.count:
            self._forget_if_done(demand)
            return
        kind = self._kind_of[demand.key]
        apart = self._apart_from(demand.home, now)
        candidates = kind.candidates(apart)
        kind.is_hopeless = kind.is_hopeless or candidates is None
        if demand.strategy.kind == strategies.GROUP and self._waits_for_group(demand, candidates, now):
            return
        if candidates is None and self._is_unschedulable(demand):
            self._fail(demand, self._describe_hopeless(demand), FAILED_UNSCHEDULABLE)
            self._withdraw(demand)
            return
        if self._nodes.is_alone:
            only = self._nodes.living()[0]
            if demand.strategy.allows(only):
                # The only node knows best: it queues, shares out fairly and tells people why something waits.
                if only.key not in demand.queued:
                    self._give(demand, [(only, demand.count)], queue=True)
                return
        if candidates is None and self._nodes.is_expected(demand.strategy.node):
            return  # the node that it asks for may come back to this head
        self._set_hopeless(demand, "" if candidates is not None else self._describe_hopeless(demand), now)
        if candidates is None:
            return
        self._give(demand, self._choose(demand, candidates, apart, now), queue=False)
        if demand.count:
            self._wait(demand, now)
        else:
            self._leave_queues(demand)
            self._end_wait(demand)

    def _place_waiting(self, kind: Alike, now: float) -> None:
        """Give away what there is room for among those who wait for the same, in turn."""
        candidates = kind.candidates()
        hopeless = candidates is None
        if self._nodes.is_alone or hopeless != kind.is_hopeless or (hopeless and self._may_fail(kind)):
            for demand in list(kind.waiting.values()):
                self._place(demand, now)
            kind.is_hopeless = hopeless
            return
        fruitless = 0
        while candidates is not None and kind.waiting and candidates.has_room() and fruitless < TRIES_MAX:
            key, demand = next(iter(kind.waiting.items()))
            kind.waiting.move_to_end(key)
            before = demand.count
            self._place(demand, now)
            fruitless = fruitless + 1 if demand.count == before else 0
            candidates.refresh()

    def _waits_for_group(self, demand: Demand, candidates: Candidates | None, now: float) -> bool:
        """Whether no bundle that the demand may run in is there yet; if its group is gone, it fails."""
        group = demand.strategy.group
        if candidates is not None:
            demand.for_group = False
            return False
        if gone := self._groups.gone(group):
            self._fail(demand, gone, FAILED_GROUP_REMOVED)
            self._withdraw(demand)
            return True
        demand.for_group = bool(self._groups.why(group))
        if demand.for_group:
            self._set_hopeless(demand, "", now)
            if demand.is_actor and not demand.waits:
                demand.waits = True
                self._waits.add(demand, now, infeasible=False)
        return demand.for_group

    def _is_unschedulable(self, demand: Demand) -> bool:
        """Whether it may run on one node only, and that never has as much, or will not come back: node ids are never
        used again.
        """
        strategy = demand.strategy
        if strategy.kind != strategies.NODE or strategy.soft or self._nodes.is_expected(strategy.node):
            return False
        node = self._nodes.get(strategy.node)
        return node is None or not (node.can_ever(demand.demand) and node.can_ever(demand.place))

    def _may_fail(self, kind: Alike) -> bool:
        """Whether those who wait for the same have waited in vain: one stands for all."""
        return any(
            self._is_unschedulable(demand) or (demand.strategy.group and self._groups.gone(demand.strategy.group))
            for demand in itertools.islice(kind.waiting.values(), 1)
        )

    def _choose(
        self, demand: Demand, candidates: Candidates, apart: dict[int, float], now: float
    ) -> list[tuple[Node, int]]:
        """Nodes with room, and how many leases each gets."""
        demand.shy = {node: until for node, until in demand.shy.items() if until > now}
        excluded = dict.fromkeys(demand.shy)
        if candidates.has_others_than(apart):
            excluded.update(dict.fromkeys(apart))
        if demand.is_actor:
            excluded.update(demand.queued)
        elif demand.strategy.is_local_first:
            excluded[demand.home] = None  # it had its chance
        room = candidates.best(demand.count, excluded)
        if demand.is_actor and demand.strategy.kind != strategies.SPREAD and demand.home not in excluded:
            room = self._nearest(demand, candidates, room)
        chosen: dict[int, tuple[Node, int]] = {}
        left = demand.count
        while left > 0 and room:
            share = max(left // len(room), 1)
            following: list[tuple[Node, int]] = []
            for node, fit in room:
                count = min(share, fit, left)
                if count:
                    chosen[node.key] = (node, chosen.get(node.key, (node, 0))[1] + count)
                    left -= count
                if fit > count:
                    following.append((node, fit - count))
            room = following
        return list(chosen.values())

    def _nearest(self, demand: Demand, candidates: Candidates, room: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """An actor's creator's node, if it has room and is not much used; but what is wished for comes first."""
        home = candidates.with_room(demand.home)
        if home is None or home[0].utilization() >= NEAR_UTILIZATION:
            return room
        is_better = room and candidates.is_wished(room[0][0]) and not candidates.is_wished(home[0])
        return room if is_better else [home]

    def _give(self, demand: Demand, chosen: list[tuple[Node, int]], *, queue: bool) -> None:
        """Have these nodes lend as many leases. The owner's node hears first that they are on their way."""
        total = sum(count for _, count in chosen)
        if not total:
            return
        self._set_count(demand, demand.count - total)
        demand.placed += total
        if not demand.is_actor:
            self._emit(ToNode(demand.home, PlacedElsewhere(demand.owner, demand.class_id, total)))
        for node, count in chosen:
            if demand.strategy.kind == strategies.SPREAD:
                demand.given[node.key] = demand.given.get(node.key, 0) + count
                node.changed()
            # Of a node that is alone nobody asks what is free, and it does not say so.
            serial = node.serial if self._nodes.is_alone else node.assume(demand.demand, count)
            if demand.is_actor:
                node.count_actor(1)
            if demand.is_actor or node.key != demand.home:
                self._count_out(demand, node.key, count)
            self._index(demand, node.key)
            self._emit(ToNode(node.key, _order(demand, count, serial, queue=queue)))

    # ------------------------------------------------------------------ books

    def _add(self, demand: Demand) -> None:
        self._demands[demand.key] = demand
        self._kind_of[demand.key] = self._kinds.join(demand)
        if not demand.is_actor:
            self._by_owner.setdefault(demand.owner, {})[demand.key] = demand
            self._by_home.setdefault(demand.home, {})[demand.key] = demand
        if demand.strategy.group:
            self._by_group.setdefault(demand.strategy.group, {})[demand.key] = demand

    def _remove(self, demand: Demand) -> None:
        if self._demands.pop(demand.key, None) is None:
            return
        kind = self._kind_of.pop(demand.key)
        self._kinds.leave(demand, kind)
        if not kind.waiting:
            self._waiting.pop(kind.asked, None)
        for node in {**demand.out, **demand.queued, **demand.given, **demand.held_back}:
            _take(self._at, node, demand.key)
        if not demand.is_actor:
            _take(self._by_owner, demand.owner, demand.key)
            _take(self._by_home, demand.home, demand.key)
        if demand.strategy.group:
            _take(self._by_group, demand.strategy.group, demand.key)

    def _set_count(self, demand: Demand, count: int) -> None:
        """Note how much of it waits."""
        demand.count = count
        kind = self._kind_of[demand.key]
        if not count:
            kind.unlined.pop(demand.key, None)
            if kind.waiting.pop(demand.key, None) is not None and not kind.waiting:
                del self._waiting[kind.asked]
        elif demand.key not in kind.waiting:
            kind.waiting[demand.key] = kind.unlined[demand.key] = demand
            self._waiting[kind.asked] = kind

    def _count_out(self, demand: Demand, node: int, by: int) -> None:
        """Note how many of its leases are on their way from a node."""
        count = demand.out.get(node, 0) + by
        if count:
            demand.out[node] = count
        else:
            demand.out.pop(node, None)
        self._index(demand, node)

    def _index(self, demand: Demand, node: int) -> None:
        """Keep the demand among those that remember anything of a node, if it does."""
        if node in demand.out or node in demand.queued or node in demand.given or node in demand.held_back:
            self._at.setdefault(node, {})[demand.key] = demand
        else:
            _take(self._at, node, demand.key)

    # ------------------------------------------------------------------ waiting

    def _wait(self, demand: Demand, now: float) -> None:
        """Nothing has room now: stand in line after a while."""
        if demand.is_actor and not demand.waits:
            demand.waits = True
            self._waits.add(demand, now, infeasible=bool(demand.hopeless))
            self._tell_waits(now)
        if "queue" not in self._deadlines:
            self._deadlines.set("queue", now + QUEUE_AFTER_S)

    def _end_wait(self, demand: Demand) -> None:
        if demand.waits:
            demand.waits = False
            self._waits.remove(demand)

    def _set_hopeless(self, demand: Demand, reason: str, now: float) -> None:
        if reason == demand.hopeless:
            return
        self._end_wait(demand)
        demand.hopeless = reason
        if not demand.is_actor:
            self._emit(ToNode(demand.home, Hopeless(demand.owner, demand.class_id, reason)))
        elif reason:
            self._wait(demand, now)

    def _fail(self, demand: Demand, reason: str, code: int) -> None:
        """It can never be met, and waiting does not help."""
        if demand.is_actor:
            self._emit(Unplaceable(demand.actor, demand.incarnation, reason, code))
        else:
            self._emit(Send(demand.owner, LeaseFailed(demand.class_id, reason, code)))

    def _stand_in_line(self, kind: Alike, now: float) -> None:
        """Let nodes that could meet demands share out to them what becomes free."""
        while kind.unlined:
            key, demand = next(iter(kind.unlined.items()))
            apart = self._apart_from(demand.home, now)
            candidates = kind.candidates(apart)
            if candidates is None or kind.lines >= LINES_MAX * len(candidates.able):
                return
            if now - demand.since < QUEUE_AFTER_S:
                return
            del kind.unlined[key]
            excluded = dict.fromkeys(demand.queued)
            if candidates.has_others_than(apart):
                excluded.update(dict.fromkeys(apart))
            if not demand.is_actor:
                excluded[demand.home] = None
            room = (1 if demand.is_actor else QUEUES_MAX) - len(demand.queued)
            for node in candidates.in_line(max(min(room, demand.count), 0), excluded):
                demand.queued[node] = None
                kind.lines += 1
                self._index(demand, node)
                there = self._nodes.get(node)
                assert there is not None, "an able node is lost"
                self._emit(ToNode(node, _order(demand, 1, there.serial, queue=True)))

    def _leave_line(self, demand: Demand, node: int) -> None:
        """It does not stand in line there any more, and may stand in another one."""
        kind = self._kind_of[demand.key]
        del demand.queued[node]
        kind.lines -= 1
        self._index(demand, node)
        if demand.key in kind.waiting:
            kind.unlined[demand.key] = demand

    def _leave_queues(self, demand: Demand) -> None:
        for node in list(demand.queued):
            self._leave_line(demand, node)
            if demand.is_actor:
                self._emit(ToNode(node, WithdrawActorFromNode(demand.actor)))
            else:
                self._emit(ToNode(node, WithdrawLeases(demand.owner, demand.class_id)))

    def _withdraw(self, demand: Demand) -> None:
        self._leave_queues(demand)
        self._end_wait(demand)
        if demand.is_actor:
            for key in demand.out:
                self._emit(ToNode(key, WithdrawActorFromNode(demand.actor)))
                if (node := self._nodes.get(key)) is not None:
                    node.count_actor(-1)
        self._remove(demand)

    def _on_tick(self, event: Tick, now: float) -> None:
        if self._deadlines.due(now):
            for kind in list(self._waiting.values()):
                self._place_waiting(kind, now)
                self._stand_in_line(kind, now)
            if any(not kind.is_hopeless for kind in self._waiting.values()):
                self._deadlines.set("queue", now + QUEUE_AFTER_S)
        self._tell_waits(now)

    # ------------------------------------------------------------------ nodes come and go

    def _on_node_came(self, event: NodeCame, now: float) -> None:
        self._place_all(now)

    def _on_node_freed(self, event: NodeFreed, now: float) -> None:
        self._place_all(now)

    def _place_all(self, now: float) -> None:
        for kind in list(self._waiting.values()):
            self._place_waiting(kind, now)

    def _on_node_lost(self, event: NodeLost, now: float) -> None:
        self._take_back(event.node, now)

    def _on_node_away(self, event: NodeWentAway, now: float) -> None:
        self._take_back(event.node, now)

    def _take_back(self, lost: int, now: float) -> None:
        """What a node was given is placed anew. Should it have begun with some, that is too much, and goes back."""
        for demand in list(self._by_home.get(lost, {}).values()):
            self._withdraw(demand)
        anew = list(self._at.get(lost, {}).values())
        for demand in anew:
            if lost in demand.queued:
                self._leave_line(demand, lost)
            demand.given.pop(lost, None)
            demand.held_back.pop(lost, None)
            self._unplace(demand, lost, demand.out.get(lost, 0))
            self._index(demand, lost)
        self._place_all(now)
        for demand in anew:
            if demand.count and demand.key in self._demands:
                self._place(demand, now)

    # ------------------------------------------------------------------ placement groups

    def _on_group_placed(self, event: GroupPlaced, now: float) -> None:
        for demand in self._of_group(event.group):
            self._end_wait(demand)
            self._place(demand, now)

    def _on_group_over(self, event: GroupOver, now: float) -> None:
        for demand in self._of_group(event.group):
            self._fail(demand, event.reason, FAILED_GROUP_REMOVED)
            self._withdraw(demand)

    def _of_group(self, group: bytes) -> list[Demand]:
        return list(self._by_group.get(group, {}).values())

    # ------------------------------------------------------------------ words

    def _why(self, demand: Demand) -> str:
        if demand.hopeless:
            return demand.hopeless
        if demand.for_group:
            return self._groups.why(demand.strategy.group)
        candidates = self._kind_of[demand.key].candidates()
        able = candidates.able if candidates is not None else {}
        many = "1 node" if len(able) == 1 else f"{len(able)} nodes"
        short = [reason for node, reason in demand.held_back.items() if demand.is_actor or node != demand.home]
        if short:
            more = f" (and on {len(short) - 1} more)" if len(short) > 1 else ""
            return f"waits, where there is room: {short[0]}{more}"
        where = f" in {demand.strategy}" if demand.strategy.kind == strategies.GROUP else ""
        return f"needs {show_demand(demand.demand)}{where}; {many} could give it, and none has it free now"

    def _describe_hopeless(self, demand: Demand) -> str:
        """Why no node can meet it, with what there is."""
        nodes = self._nodes.living()
        if demand.strategy.kind == strategies.GROUP:
            return self._describe_no_bundle(demand)
        asked = {name: max(demand.demand.get(name, 0), demand.place.get(name, 0)) for name in demand.place}
        asked = {**demand.demand, **asked}
        allowed = [node for node in nodes if demand.strategy.allows(node)]
        if not allowed:
            gone = self._nodes.find(demand.strategy.node) if demand.strategy.node else None
            what = f"{gone}, which is lost" if gone is not None else str(demand.strategy)
            return f"asks for {what}; there is no such node among {len(nodes)}"
        for name, units in asked.items():
            most = max(node.total.get(name, 0) for node in allowed)
            if units > most:
                where = "this node has" if len(nodes) == 1 else "the most that one node has is"
                if demand.strategy.kind == strategies.NODE and not demand.strategy.soft:
                    where = f"{allowed[0]}, for which it asks, has"
                return f"needs {show_part(name, units)}; {where} {show(name, most) if most else 'none'}"
        return f"needs {show_demand(asked)}, which no node has together"

    def _describe_no_bundle(self, demand: Demand) -> str:
        """Why no bundle of a group that is created can meet it."""
        asked = show_demand({**demand.place, **demand.demand})
        group = self._groups.get(demand.strategy.group)
        if group is None:
            return f"needs {asked} in {demand.strategy}, which is gone"
        if not 0 <= demand.strategy.bundle < len(group.bundles):
            has = "; ".join(show_demand(bundle) for bundle in group.bundles[:BUNDLES_SHOWN])
            return f"needs {asked} in {demand.strategy}; its bundles have {has}"
        return f"needs {asked} in {demand.strategy}, which has {show_demand(group.bundles[demand.strategy.bundle])}"

    def _tell_waits(self, now: float) -> None:
        """Tell people about actors that wait for long, or for ever."""
        deadline = self._waits.next_deadline()
        if deadline is None or deadline > now:
            return
        for group in self._waits.due(now, set()):
            demand = next(iter(group.members.values()))
            many = group.count > 1
            who = f"{group.count} actors {demand.label}" if many else f"The actor {demand.label or '(unnamed)'}"
            if group.infeasible:
                text = (
                    f"{who} {'wait' if many else 'waits'} for a node that does not exist: {'each' if many else 'it'} "
                    f"{demand.hopeless}. {'They go' if many else 'It goes'} on waiting; ask for less, or add nodes."
                )
                self._emit(Notify(demand.job, "warning", text))
            else:
                text = (
                    f"{who} {'have' if many else 'has'} waited for {now - group.moved_at:.0f} seconds: "
                    f"{'each' if many else 'it'} {self._why(demand)}. An actor holds what it asked for as long as it "
                    "lives, also while idle."
                )
                self._emit(Notify(demand.job, "info", text))

    def _forget_if_done(self, demand: Demand) -> None:
        if demand.is_actor and not demand.count and not demand.out and not demand.queued:
            self._remove(demand)

    def check_invariants(self) -> None:
        for demand in self._demands.values():
            self._require(demand.count >= 0, f"{demand} is placed more often than wanted")
            self._require(all(demand.out.values()), f"{demand} remembers nodes for nothing")
            for node in demand.out:
                # That the node is lost is heard of after the ends of its members.
                self._require(self._nodes.find(node), f"{demand} is placed on a node that never was")
            for node in {**demand.out, **demand.queued, **demand.given, **demand.held_back}:
                self._require(demand.key in self._at.get(node, {}), f"{demand} is not found by node {node:x}")
            self._require(demand.key in self._kind_of, f"{demand} is of no kind")
            if not demand.is_actor:
                self._require(demand.key in self._by_owner.get(demand.owner, {}), f"{demand} is not found by its owner")
                self._require(demand.key in self._by_home.get(demand.home, {}), f"{demand} is not found by its home")
            if group := demand.strategy.group:
                self._require(demand.key in self._by_group.get(group, {}), f"{demand} is not found by its group")
        indexes = (self._at, self._by_owner, self._by_home, self._by_group)
        for entries in itertools.chain.from_iterable(index.values() for index in indexes):
            self._require(entries and entries.keys() <= self._demands.keys(), "a demand is found that is over")
        for kind in self._kinds:
            for problem in kind.problems():
                self._require(False, problem)
            is_listed = self._waiting.get(kind.asked) is kind
            self._require(is_listed == bool(kind.waiting), f"{kind.asked} waits wrongly")
        pairs = sum(len(nodes) for nodes in self._apart_of.values())
        self._require(pairs == len(self._apart), "nodes are kept apart wrongly")


def _take(index: dict[T, dict[Key, Demand]], at: T, key: Key) -> None:
    """Take an entry out of an index that has no empty ones."""
    entries = index.get(at)
    if entries is not None:
        entries.pop(key, None)
        if not entries:
            del index[at]


def _order(demand: Demand, count: int, serial: int, *, queue: bool) -> PlaceActor | PlaceLeases:
    """What the node is told."""
    if demand.is_actor:
        return PlaceActor(
            demand.actor,
            demand.incarnation,
            demand.job,
            demand.place,
            demand.demand,
            demand.env,
            demand.packed,
            demand.label,
            serial,
            queue,
            demand.lives_for,
            demand.retriable,
        )
    return PlaceLeases(
        demand.owner,
        demand.class_id,
        count,
        demand.job,
        demand.demand,
        demand.env,
        demand.packed,
        demand.label,
        serial,
        queue,
        demand.retriable,
    )
