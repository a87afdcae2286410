"""The control service: all machines that know the whole cluster, as one.

A message of a node goes in, and messages to nodes come out. Owns nothing but the order in which the tables hear of
things, and where the effects for a process are sent. Without input or output: a whole cluster can be simulated.

What must outlive this process leaves as records (`Save`); what is said after a record is to wait until it is safe. A
control service that starts with records (`restore`) gives nodes `RETURN_S` to come back and say what is on them, before
it decides about what they do not have (`_end_return`).

Order matters in three places. When a member has ended, its actor is placed again before the rest of the cluster is
told. When a node is lost, its members have ended one by one before what it had been given is placed anew. And when a
placement group is gone, its actors are known to be over before anything of theirs could be placed again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from ray._control import actor_records, actors, group_records, jobs, kv, messages, nodes
from ray._control.actors import ActorTable
from ray._control.group_records import GroupOver, JobOver
from ray._control.groups import GroupTable
from ray._control.jobs import JobTable
from ray._control.kv import KeyValueStore
from ray._control.machine import (
    Deadlines,
    Effect,
    Event,
    FromNode,
    Log,
    Machine,
    Multicast,
    Notify,
    ProcessJoined,
    ProcessLeft,
    Received,
    Save,
    Send,
    Tick,
    ToNode,
    earliest,
)
from ray._control.members import MemberTable
from ray._control.node_records import DisconnectNode, NodeCame, NodeFreed, NodeLost, NodeReturned, NodeWentAway
from ray._control.nodes import RETURN_S, NodeTable
from ray._control.placement import Placement
from ray._control.requests import ControlRequests
from ray._protocol import KINDS, ROLE_DRIVER, ROLE_TOOL, TO_NODE, Message, Notice, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterable


RETURNED_S: Final = 0.2
"""How long is waited for members that connect anew, once all nodes are back."""

HEARD_AT: Final = 256
HEARD_AFTER_S: Final = 0.05
"""A node is told what was heard of it after so many messages, or so long: in one message for many."""


class ControlService:
    """See the module's docstring.

    Args:
        head: The node that hosts it.
        durable: Whether somebody performs `Save`.
        validate: Check every table's invariants after each event.
    """

    def __init__(self, *, head: int, durable: bool = False, validate: bool = False) -> None:
        self._durable = durable
        self.nodes = NodeTable(head=head, durable=durable, validate=validate)
        self.members = MemberTable(validate=validate)
        self.groups = GroupTable(self.nodes, lambda proc: self.members.get(proc) is not None, validate=validate)
        self.placement = Placement(self.nodes, self.groups, self.members.node_of, validate=validate)
        self.jobs = JobTable()
        self.kv = KeyValueStore()
        self.actors = ActorTable(job_of=self.job_of, node_of=self.members.node_of, validate=validate)
        self.requests = ControlRequests(self)
        self._machines: tuple[Machine, ...] = (
            self.nodes,
            self.members,
            self.actors,
            self.groups,
            self.placement,
            self.requests,
        )
        self._queue: deque[Event | Effect] = deque()
        self._out: list[Effect] = []
        self._heard: dict[int, int] = {}
        """Messages of each node that it must not repeat, and which of them it knows of."""
        self._told_heard: dict[int, int] = {}
        self._greeted: dict[int, int | None] = {}
        """Nodes that are saying what is on them, and how much was heard of them before; None: by another head."""
        self._repeated: dict[int, int] = {}
        """How many of the next messages of a node were heard before its connection broke."""
        self._served: dict[int, tuple[int, ...]] = {}
        """By node that has come back, for whom it works; who is not known in the end has ended."""
        self._orphans: dict[tuple[int, int], FromNode] = {}
        """By node and segment, what is asked of members once all are known that have come back."""
        self._deadlines: Deadlines[str] = Deadlines()

    def restore(self, records: Iterable[tuple[str, bytes, bytes]], now: float) -> None:
        """Go on where the control service before has left off. To be called first, if at all."""
        lives: list[tuple[bytes, bytes]] = []
        bundles: list[tuple[bytes, bytes]] = []
        for table, key, value in records:
            match table:
                case nodes.TABLE:
                    self.nodes.restore(key, value)
                case jobs.TABLE:
                    self.jobs.restore(value)
                case kv.TABLE:
                    self.kv.restore(value)
                case actors.LIVES_TABLE:
                    lives.append((key, value))
                case actors.ACTORS_TABLE | actors.NAMES_TABLE:
                    self.actors.restore(table, key, value)
                case group_records.GROUPS_TABLE:
                    self.groups.restore(table, key, value, now)
                case group_records.BUNDLES_TABLE:
                    bundles.append((key, value))
        self.actors.expect_return()
        for key, value in lives:
            self.actors.restore(actors.LIVES_TABLE, key, value)
        for key, value in bundles:
            self.groups.restore(group_records.BUNDLES_TABLE, key, value, now)
        self.members.restore()
        self.groups.begin_return()
        # Who is not in the records is told to leave: nobody is waited for in vain.
        self._deadlines.set("return", now + (RETURN_S if self.nodes.expected() else 0.0))

    @property
    def is_returning(self) -> bool:
        """Whether nodes have time to come back."""
        return "return" in self._deadlines

    def handle(self, node: int, message: Message, now: float) -> list[Effect]:
        """Take a node's message. Effects are `ToNode`, `DisconnectNode` and `Log`, to be performed in order."""
        self._queue.append(FromNode(node, message))
        return self._run(now)

    def node_left(self, node: int, reason: str, now: float, *, ended: bool) -> list[Effect]:
        """A node's connection has closed; `ended`: by its end, so the process has ended too."""
        if self.nodes.get(node) is not None:
            text = f"its connection was lost ({reason})"
            self._queue.append(NodeLost(node, text) if ended else NodeWentAway(node, reason))
        return self._run(now)

    def tick(self, now: float) -> list[Effect]:
        """A deadline may have passed."""
        for key in self._deadlines.due(now):
            if key == "return" and self.members.anyone_announces:
                self._deadlines.set("return", now + RETURNED_S)  # it has begun to, and will have said all in a moment
            elif key == "return":
                self._end_return(now)
            else:
                self._tell_heard(now)
        for machine in self._machines:
            deadline = machine.next_deadline()
            if deadline is not None and deadline <= now:
                self._tell(machine, Tick(), now)
        return self._run(now)

    def next_deadline(self) -> float | None:
        return earliest(self._deadlines.next(), *(machine.next_deadline() for machine in self._machines))

    def node_to_call_back(self, proc: int) -> int:
        """The node that only connects outwards on which a process lives, or which it is; 0 if there is none."""
        node = self.nodes.get(self.members.node_of(proc) or proc)
        return node.key if node is not None and node.relayed else 0

    def job_of(self, proc: int) -> int:
        """The job of a member; 0 if unknown."""
        member = self.members.get(proc)
        return member.job if member is not None else 0

    # ------------------------------------------------------------------ routing

    def _run(self, now: float) -> list[Effect]:
        while self._queue:
            self._route(self._queue.popleft(), now)
        out, self._out = self._out, []
        return out

    def _route(self, event: Event | Effect, now: float) -> None:
        match event:
            case FromNode():
                self._on_node_message(event, now)
            case Received():
                self._tell_taker(event, now)
            case Send():
                if node := self.members.node_of(event.to):
                    self._deliver(node, (event.to,), event.message, event.corr)
            case Multicast():
                self._multicast(event.to, event.message)
            case Save():
                if self._durable:
                    self._out.append(event)
            case ToNode() | Log() | DisconnectNode():
                self._out.append(event)
            case Notify():
                self._notify(event)
            case ProcessJoined():
                self._on_joined(event, now)
            case ProcessLeft():
                self._on_left(event, now)
            case NodeCame():
                for machine in (self.members, self.groups, self.placement):
                    self._tell(machine, event, now)
                for job in self.jobs.running():
                    self._out.append(ToNode(event.node, messages.JobChanged(job.number, job.driver, job.config)))
            case NodeLost() if any(type(other) is not NodeLost for other in self._queue):
                # What was decided before leaves first: an order must not come after its own withdrawal.
                self._queue.append(event)
            case NodeLost():
                self._on_node_lost(event, now)
            case NodeWentAway():
                self._tell(self.nodes, event, now)
                self._tell(self.placement, event, now)
            case NodeReturned():
                self.members.expect_again(event.node)
                self._queue.extend(self.members.take_effects())
                self._tell(self.groups, event, now)
                for job in self.jobs.running():
                    self._out.append(ToNode(event.node, messages.JobChanged(job.number, job.driver, job.config)))
            case NodeFreed():
                for machine in (self.groups, self.placement):
                    self._tell(machine, event, now)
            case GroupOver():
                self._tell(self.actors, event, now)
                self._tell(self.placement, event, now)
            case _ if (translated := self._to_node(event)) is not None:
                self._out.append(translated)
            case Event():
                self._tell_taker(event, now)
            case _:
                msg = f"nobody performs {type(event).__name__}"
                raise AssertionError(msg)

    def _tell(self, machine: Machine, event: Event, now: float) -> None:
        self._queue.extend(machine.handle(event, now))

    def _tell_taker(self, event: Event, now: float) -> None:
        for machine in self._machines:
            if machine.takes(event):
                self._tell(machine, event, now)
                return
        msg = f"no machine takes {type(event).__name__}"
        raise AssertionError(msg)

    def _on_node_message(self, event: FromNode, now: float) -> None:
        message = event.message
        if self.nodes.get(event.node) is None and type(message) is not messages.NodeHello:
            return  # it is lost, and was told to leave
        if not self._count(event.node, message, now):
            return
        if self.nodes.is_new(event.node) and type(message) not in (messages.NodeHello, messages.Resources):
            self._tell(self.nodes, nodes.Announce(), now)
        match message:
            case messages.MemberSaid():
                self._on_said(event.node, message)
            case messages.ActorPlaced():
                self._on_actor_placed(event.node, message)
            case messages.ActorUnplaceable():
                self.placement.actor_failed(message.actor)
                self._queue.append(actor_records.Unplaceable(message.actor, message.incarnation, message.reason))
            case messages.Announced():
                for machine in (self.members, self.groups):
                    self._tell(machine, event, now)
                if self.is_returning and not self.nodes.expected():
                    # Everybody is back. What was said meanwhile and not heard is on its way right behind.
                    self._deadlines.set("return", now + RETURNED_S)
                self._served[event.node] = message.owners
                if not self.is_returning:
                    self._tell_ended()
            case messages.SegmentOrphaned() if self.is_returning:
                self._orphans[event.node, message.segment] = event
            case messages.NoticeRaised():
                self._queue.append(Notify(message.job, message.level, message.text))
            case _:
                self._tell_taker(event, now)

    def _count(self, node: int, message: Message, now: float) -> bool:
        """Count what nodes must not repeat to a next control service. False if this one has heard it already."""
        match message:
            case messages.NodeHello() if message.returns:
                self._greeted[node] = self._heard.get(node)
            case messages.NodeHello():
                self._heard[node] = self._told_heard[node] = 0
            case messages.Announced() if node in self._greeted:
                before = self._greeted.pop(node)
                self._heard[node] = message.first if before is None else before
                self._repeated[node] = self._heard[node] - message.first
                self._told_heard[node] = message.first
                self._deadlines.set("heard", now + HEARD_AFTER_S)
            case _ if node in self._greeted or node == self.nodes.head or type(message) in messages.NEWS:
                pass
            case _ if self._repeated.get(node, 0) > 0:
                self._repeated[node] -= 1
                return False
            case _:
                self._heard[node] = self._heard.get(node, 0) + 1
                if self._heard[node] - self._told_heard.get(node, 0) >= HEARD_AT:
                    # Soon, and not at once: what follows from this message is to be said before.
                    self._deadlines.set("heard", now)
                elif "heard" not in self._deadlines:
                    self._deadlines.set("heard", now + HEARD_AFTER_S)
        return True

    def _on_said(self, node: int, said: messages.MemberSaid) -> None:
        if self.members.node_of(said.proc) != node:
            return  # its end was noticed first
        try:
            message = decode(said.kind, said.body) if said.kind in TO_NODE else None
        except msgspec.MsgspecError as error:
            what = f"sent a malformed {TO_NODE[said.kind].__name__}: {error}"
            self._out.append(ToNode(node, messages.MemberBroke(said.proc, what)))
            return
        if message is None:
            self._out.append(ToNode(node, messages.MemberBroke(said.proc, f"sent a frame of unknown kind {said.kind}")))
        else:
            self._queue.append(Received(said.proc, message, said.corr))

    def _on_actor_placed(self, node: int, placed: messages.ActorPlaced) -> None:
        if self.actors.hosts(placed.proc, placed.actor):
            return  # said again by a node that came back
        if self.placement.actor_started(node, placed) or self.actors.is_missing(placed.actor, placed.incarnation):
            self._queue.extend(self.placement.take_effects())
            self._queue.append(
                actor_records.Placed(placed.actor, placed.incarnation, node, placed.proc, placed.pid, placed.gpu_ids)
            )
        else:
            reason = "the actor that it was meant for is not wanted any more"
            self._out.append(ToNode(node, messages.StopMember(placed.proc, reason)))

    # ------------------------------------------------------------------ members and nodes come and go

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        if event.role == ROLE_TOOL:
            return  # it asks and looks, but owns nothing
        if event.role == ROLE_DRIVER and not event.job:
            job = self.jobs.start(event.proc, event.pid, now)
            self.members.set_job(event.proc, job)
            self._queue.append(self.jobs.record(job))
            for node in self.nodes.living():
                self._out.append(ToNode(node.key, messages.JobChanged(job, event.proc, {})))
        self._tell(self.actors, event, now)

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        for machine in (self.actors, self.groups, self.placement, self.requests):
            self._tell(machine, event, now)
        self._end_job(self.jobs.end(event.proc, now), now)

    def _end_job(self, job: int, now: float) -> None:
        if job:
            self._queue.append(self.jobs.record(job))
            self._tell(self.groups, JobOver(job), now)
            for node in self.nodes.living():
                self._out.append(ToNode(node.key, messages.JobGone(job)))

    def _on_node_lost(self, event: NodeLost, now: float) -> None:
        if self.nodes.get(event.node) is None:
            return
        for counts in (self._heard, self._told_heard, self._greeted, self._repeated, self._served):
            counts.pop(event.node, None)
        others, self._queue = self._queue, deque()
        for machine in (self.nodes, self.groups, self.members, self.placement, self.requests):
            # The members' ends are heard of one by one, before what the node had been given is placed anew; and all
            # that follows from one node's loss comes before the loss of the next.
            self._tell(machine, event, now)
            while self._queue:
                self._route(self._queue.popleft(), now)
        self._queue = others

    def _end_return(self, now: float) -> None:
        """Nodes had their time: what is not here now is gone."""
        self.nodes.give_up_expected()
        self._queue.extend(self.nodes.take_effects())
        self.members.end_return(now)
        self._queue.extend(self.members.take_effects())
        for job in self.jobs.running():
            if not self.members.node_of(job.driver):
                self._end_job(self.jobs.end(job.driver, now), now)
        self._tell(self.placement, NodeFreed(self.nodes.head), now)  # some may have waited for a node that did not come
        self.actors.give_up_missing()
        self._queue.extend(self.actors.take_effects())
        self.groups.end_return(now)
        self._queue.extend(self.groups.take_effects())
        # What is bound to a node that did not come back can be told so now.
        self._queue.append(NodeFreed(self.nodes.head))
        self._tell_ended()
        orphans, self._orphans = self._orphans, {}
        self._queue.extend(orphans.values())

    def _tell_ended(self) -> None:
        """Nodes that have come back work for nobody who is not there."""
        served, self._served = self._served, {}
        for node, owners in served.items():
            self.members.tell_ended(node, owners)
        self._queue.extend(self.members.take_effects())

    def _tell_heard(self, now: float) -> None:
        """Let nodes forget what they keep for a next control service, which would know nothing of what is held here."""
        self._deadlines.clear("heard")
        for node, count in self._heard.items():
            if self.members.holds_something_of(node):
                self._deadlines.set("heard", now + HEARD_AFTER_S)
            elif count != self._told_heard.get(node):
                self._told_heard[node] = count
                self._out.append(ToNode(node, messages.Heard(count)))

    # ------------------------------------------------------------------ effects

    def _deliver(self, node: int, procs: tuple[int, ...], message: Message, corr: int = 0) -> None:
        self._out.append(ToNode(node, messages.Deliver(procs, KINDS[type(message)], corr, encode(message))))

    def _multicast(self, procs: Iterable[int], message: Message) -> None:
        by_node: dict[int, list[int]] = {}
        for proc in procs:
            if node := self.members.node_of(proc):
                by_node.setdefault(node, []).append(proc)
        kind, body = KINDS[type(message)], encode(message)
        for node, there in by_node.items():
            self._out.append(ToNode(node, messages.Deliver(tuple(there), kind, 0, body)))

    def _notify(self, event: Notify) -> None:
        drivers = self.members.drivers(event.job) or self.members.drivers()
        self._out.append(Log(f"notice: {event.text}"))
        self._multicast(drivers, Notice(event.level, event.text))

    def _to_node(self, effect: Effect | Event) -> ToNode | None:
        match effect:
            case actor_records.StopActorWorker():
                message: Message = messages.StopMember(effect.proc, effect.reason)
            case actor_records.ActorWorkerExits():
                message = messages.MemberExits(effect.proc, effect.reason)
            case _:
                return None
        return ToNode(self.members.node_of(effect.proc), message)
