"""Placement: which node lends what an owner's own node cannot, and on which node an actor lives.

Owns the demands that came here and are not placed yet. Decides on a view of the nodes that may be a moment old: a node
that has no room any more refuses, and the demand is placed anew. A demand that waits longer than `QUEUE_AFTER_S` also
stands in line on nodes that could meet it, where it takes part in the sharing out between owners.

How nodes are chosen: of those that are allowed and have room, those that are wished for first; then evenly, the least
used first. Nodes that have lost each other lately (`APART_S`) get nothing from one another as long as there is another
choice; but between a node and one that only connects outwards is the head, which both reach. "SPREAD" counts what the
same demand has got from each node. Actors prefer the node of their creator while it is less than half used.

Invariants: a demand is placed at most as often as it was asked for; what a lost node had been given and not granted
is placed anew; a demand with a count of zero waits for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ray._control import strategy as strategies
from ray._control.actor_records import PlaceActor as ActorWanted
from ray._control.actor_records import Unplaceable, WithdrawActor
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
from ray._control.node_records import NodeCame, NodeFreed, NodeLost, NodeWentAway, fits
from ray._control.shown import show, show_demand, show_part
from ray._control.waits import Waits
from ray._protocol import LeaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.groups import GroupTable
    from ray._control.node_records import Node
    from ray._control.nodes import NodeTable

QUEUE_AFTER_S: Final = 0.1
"""How long a demand waits for room anywhere before it stands in line on nodes."""

QUEUES_MAX: Final = 4
"""Nodes on which one demand stands in line."""

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
        self._hosts: dict[int, int] = {}
        """Nodes of the processes that are actors."""
        self._apart: dict[tuple[int, int], float] = {}
        """Nodes that have lost each other, though both are here, and until when they are kept apart; oldest first."""
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
            demand = self._demands[key] = Demand(
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
        count = max(message.count - (demand.placed - message.heard), 0)
        if count and not demand.count:
            demand.since = now
        demand.count = count
        if not count:
            self._leave_queues(demand)
            demand.held_back.clear()
        self._place(demand, now)

    def _on_leases_refused(self, event: FromNode, message: LeasesRefused, now: float) -> None:
        demand = self._demands.get((message.owner, message.class_id))
        if demand is None:
            return
        self._note_refusal(demand, event.node, message.held_back, now)
        if event.node == demand.home:  # it keeps its own books
            demand.placed -= message.count
            demand.count += message.count
        else:
            self._unplace(demand, event.node, min(message.count, demand.out.get(event.node, 0)))
        self._place(demand, now)

    def _note_refusal(self, demand: Demand, node: int, held_back: str, now: float) -> None:
        demand.shy[node] = now + (SHY_OF_MEMORY_S if held_back else SHY_S)
        demand.held_back.pop(node, None)
        if held_back:
            demand.held_back[node] = held_back

    def _unplace(self, demand: Demand, node: int, count: int) -> None:
        """What was placed on a node is not coming from there."""
        if count <= 0:
            return
        demand.placed -= count
        demand.count += count
        demand.out[node] -= count
        if not demand.out[node]:
            del demand.out[node]
        if demand.is_actor:
            if (host := self._nodes.get(node)) is not None:
                host.actors -= 1
        else:
            self._emit(ToNode(demand.home, PlacedElsewhere(demand.owner, demand.class_id, -count)))

    def _on_grant_passed(self, event: GrantPassed, now: float) -> None:
        demand = self._demands.get((event.owner, event.class_id))
        if demand is None:
            return
        demand.held_back.pop(event.node, None)
        if demand.out.get(event.node):
            demand.out[event.node] -= 1
            if not demand.out[event.node]:
                del demand.out[event.node]
        elif demand.queued.get(event.node):
            del demand.queued[event.node]
            demand.count = max(demand.count - 1, 0)
            if not demand.count:
                self._leave_queues(demand)
        self._forget_if_done(demand)

    def _on_nodes_apart(self, event: NodesApart, now: float) -> None:
        host = self._nodes.get(event.node)
        if host is not None and host.relayed:
            return  # the head was between them, maybe another one than now; with this one both are connected
        for pair in ((event.asker, event.node), (event.node, event.asker)):
            self._apart.pop(pair, None)
            self._apart[pair] = now + APART_S
        while len(self._apart) > APART_MAX or next(iter(self._apart.values())) <= now:
            del self._apart[next(iter(self._apart))]

    def _on_process_left(self, event: ProcessLeft, now: float) -> None:
        for demand in [x for x in self._demands.values() if x.key[0] == event.proc]:
            self._withdraw(demand)
        host = self._nodes.get(self._hosts.pop(event.proc, 0))
        if host is not None:
            host.actors -= 1

    # ------------------------------------------------------------------ actors

    def _on_actor_wanted(self, event: ActorWanted, now: float) -> None:
        key = (ACTORS, event.actor)
        if (old := self._demands.get(key)) is not None:
            self._withdraw(old)
        demand = self._demands[key] = Demand(
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
            count=1,
        )
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
        demand.queued.pop(node, None)
        demand.count = 0
        if not demand.out.pop(node, 0) and (host := self._nodes.get(node)) is not None:
            host.actors += 1  # it queued there, and was not counted yet
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
        if demand.strategy.kind == strategies.GROUP and self._waits_for_group(demand, now):
            return
        only = self._nodes.living()[0]
        if self._nodes.is_alone and demand.strategy.allows(only):
            # The only node knows best: it queues, shares out fairly and tells people why something waits.
            if only.key not in demand.queued:
                self._give(demand, only, demand.count, queue=True)
            return
        able = self._able(demand, now)
        if not able and demand.strategy.node in self._nodes.expected():
            return  # the node that it asks for may come back to this head
        if not able and self._is_bound_to_lost(demand):
            self._fail(demand, self._describe_hopeless(demand))
            self._withdraw(demand)
            return
        self._set_hopeless(demand, "" if able else self._describe_hopeless(demand), now)
        if not able:
            return
        for node, count in self._choose(demand, able, now):
            self._give(demand, node, count, queue=False)
        if demand.count:
            self._wait(demand, now)
        else:
            self._leave_queues(demand)
            self._end_wait(demand)

    def _able(self, demand: Demand, now: float | None = None) -> list[Node]:
        """Nodes that could meet the demand some time, of which a preference for one that can leaves only that; with
        `now` those that its home reaches, if there are any.
        """
        able = [node for node in self._nodes.living() if self._is_able(demand, node)]
        if self._apart and now is not None:
            able = [node for node in able if self._apart.get((demand.home, node.key), 0.0) <= now] or able
        if demand.strategy.kind == strategies.NODE:
            return [node for node in able if demand.strategy.wishes(node)] or able
        return able

    def _waits_for_group(self, demand: Demand, now: float) -> bool:
        """Whether no bundle that the demand may run in is there yet; if its group is gone, it fails."""
        group = demand.strategy.group
        if any(self._is_able(demand, node) for node in self._nodes.living()):
            demand.for_group = False
            return False
        if gone := self._groups.gone(group):
            self._fail(demand, gone, group_removed=True)
            self._withdraw(demand)
            return True
        demand.for_group = bool(self._groups.why(group))
        if demand.for_group:
            self._set_hopeless(demand, "", now)
            if demand.is_actor and not demand.waits:
                demand.waits = True
                self._waits.add(demand, now, infeasible=False)
        return demand.for_group

    def _is_able(self, demand: Demand, node: Node) -> bool:
        return demand.strategy.allows(node) and node.can_ever(demand.demand) and node.can_ever(demand.place)

    def _is_bound_to_lost(self, demand: Demand) -> bool:
        """Whether it may run on one node only, and that node will not come back: node ids are never used again."""
        strategy = demand.strategy
        return strategy.kind == strategies.NODE and not strategy.soft and self._nodes.get(strategy.node) is None

    def _choose(self, demand: Demand, able: list[Node], now: float) -> list[tuple[Node, int]]:
        """Nodes with room, and how many leases each gets."""
        demand.shy = {node: until for node, until in demand.shy.items() if until > now}
        room = [
            (node, fit)
            for node in able
            if node.key not in demand.shy
            and not (demand.is_actor and node.key in demand.queued)
            and not (demand.strategy.is_local_first and not demand.is_actor and node.key == demand.home)
            and (fit := fits(node.room(), demand.demand)) > 0
        ]
        room.sort(key=lambda entry: self._rank(demand, entry[0]))
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

    def _rank(self, demand: Demand, node: Node) -> tuple[object, ...]:
        """What is smaller comes first."""
        wished = not demand.strategy.wishes(node)
        used = node.utilization()
        if demand.strategy.kind == strategies.SPREAD:
            return wished, demand.given.get(node.key, 0) if not demand.is_actor else node.actors, used
        if demand.is_actor:
            near = node.key == demand.home and used < NEAR_UTILIZATION
            return wished, not near, used
        return wished, used

    def _give(self, demand: Demand, node: Node, count: int, *, queue: bool) -> None:
        demand.given[node.key] = demand.given.get(node.key, 0) + count
        # Of a node that is alone nobody asks what is free, and it does not say so.
        serial = node.serial if self._nodes.is_alone else node.assume(demand.demand, count)
        demand.count -= count
        demand.placed += count
        node.actors += demand.is_actor
        if demand.is_actor or node.key != demand.home:
            demand.out[node.key] = demand.out.get(node.key, 0) + count
        if not demand.is_actor:
            self._emit(ToNode(demand.home, PlacedElsewhere(demand.owner, demand.class_id, count)))
        self._emit(ToNode(node.key, _order(demand, count, serial, queue=queue)))

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

    def _fail(self, demand: Demand, reason: str, *, group_removed: bool = False) -> None:
        """It can never be met, and waiting does not help."""
        if demand.is_actor:
            self._emit(Unplaceable(demand.actor, demand.incarnation, reason))
        else:
            self._emit(Send(demand.owner, LeaseFailed(demand.class_id, reason, group_removed)))

    def _stand_in_line(self, demand: Demand, now: float) -> None:
        """Let nodes that could meet the demand share out to it what becomes free."""
        if demand.hopeless or now - demand.since < QUEUE_AFTER_S:
            return
        able = [
            node
            for node in self._able(demand, now)
            if node.key not in demand.queued and (demand.is_actor or node.key != demand.home)
        ]
        able.sort(key=lambda node: self._rank(demand, node))
        room = (1 if demand.is_actor else QUEUES_MAX) - len(demand.queued)
        for node in able[: max(min(room, demand.count), 0)]:
            demand.queued[node.key] = None
            self._emit(ToNode(node.key, _order(demand, 1, node.serial, queue=True)))

    def _leave_queues(self, demand: Demand) -> None:
        for node in demand.queued:
            if demand.is_actor:
                self._emit(ToNode(node, WithdrawActorFromNode(demand.actor)))
            else:
                self._emit(ToNode(node, WithdrawLeases(demand.owner, demand.class_id)))
        demand.queued.clear()

    def _withdraw(self, demand: Demand) -> None:
        self._leave_queues(demand)
        self._end_wait(demand)
        if demand.is_actor:
            for key in demand.out:
                self._emit(ToNode(key, WithdrawActorFromNode(demand.actor)))
                if (node := self._nodes.get(key)) is not None:
                    node.actors -= 1
        self._demands.pop(demand.key, None)

    def _on_tick(self, event: Tick, now: float) -> None:
        if self._deadlines.due(now):
            waiting = [demand for demand in self._demands.values() if demand.count]
            for demand in waiting:
                self._place(demand, now)
                if demand.count and not demand.for_group:
                    self._stand_in_line(demand, now)
            if any(demand.count and not demand.hopeless and not demand.for_group for demand in waiting):
                self._deadlines.set("queue", now + QUEUE_AFTER_S)
        self._tell_waits(now)

    # ------------------------------------------------------------------ nodes come and go

    def _on_node_came(self, event: NodeCame, now: float) -> None:
        self._place_all(now)

    def _on_node_freed(self, event: NodeFreed, now: float) -> None:
        self._place_all(now)

    def _place_all(self, now: float) -> None:
        for demand in list(self._demands.values()):
            if demand.count:
                self._place(demand, now)

    def _on_node_lost(self, event: NodeLost, now: float) -> None:
        self._take_back(event.node, now)

    def _on_node_away(self, event: NodeWentAway, now: float) -> None:
        self._take_back(event.node, now)

    def _take_back(self, lost: int, now: float) -> None:
        """What a node was given is placed anew. Should it have begun with some, that is too much, and goes back."""
        for demand in list(self._demands.values()):
            demand.queued.pop(lost, None)
            demand.given.pop(lost, None)
            demand.held_back.pop(lost, None)
            if not demand.is_actor and demand.home == lost:
                self._withdraw(demand)
                continue
            self._unplace(demand, lost, demand.out.get(lost, 0))
        for demand in list(self._demands.values()):
            if demand.count:
                self._place(demand, now)

    # ------------------------------------------------------------------ placement groups

    def _on_group_placed(self, event: GroupPlaced, now: float) -> None:
        for demand in self._of_group(event.group):
            self._end_wait(demand)
            self._place(demand, now)

    def _on_group_over(self, event: GroupOver, now: float) -> None:
        for demand in self._of_group(event.group):
            self._fail(demand, event.reason, group_removed=True)
            self._withdraw(demand)

    def _of_group(self, group: bytes) -> list[Demand]:
        return [demand for demand in self._demands.values() if demand.strategy.group == group]

    # ------------------------------------------------------------------ words

    def _why(self, demand: Demand) -> str:
        if demand.hopeless:
            return demand.hopeless
        if demand.for_group:
            return self._groups.why(demand.strategy.group)
        able = self._able(demand)
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
            self._demands.pop(demand.key, None)

    def check_invariants(self) -> None:
        for demand in self._demands.values():
            self._require(demand.count >= 0, f"{demand} is placed more often than wanted")
            self._require(all(demand.out.values()), f"{demand} remembers nodes for nothing")
            for node in demand.out:
                # That the node is lost is heard of after the ends of its members.
                self._require(self._nodes.find(node), f"{demand} is placed on a node that never was")


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
