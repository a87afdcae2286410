"""Members of the whole cluster: which processes there are, on which node, and how those ended that were.

Owns where every connected core is, which is how everything for a process of another node finds its way, and a bounded
history of deaths. Nodes tell their own members of local deaths at once; deaths elsewhere are told to every node, many
at a time.

After a restart of the head (`restore`) members that are not known may come with their node. What is for them waits
until that has said all that is on it, or until nobody is waited for any more (`end_return`); and who comes is told of
those who have ended since.

Invariants: a member is connected or remembered as ended, not both; who asked about a process is answered once; only
while nodes may come back anything waits.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from ray._control.actor_records import ActorWorkerGone
from ray._control.held import Held
from ray._control.machine import (
    Deadlines,
    Event,
    FromNode,
    Machine,
    ProcessJoined,
    ProcessLeft,
    Send,
    Tick,
    ToNode,
)
from ray._control.messages import (
    Announced,
    DeathsElsewhere,
    Deliver,
    FromMember,
    GiveUpMember,
    MayHaveMissed,
    MemberGone,
    MemberJoined,
    OwnersAsked,
    SegmentOrphaned,
    ToMember,
    ToOtherNode,
    WhoIs,
)
from ray._control.node_records import NodeCame, NodeLost
from ray._protocol import (
    KIND_LEASE_GRANTED,
    KIND_SEGMENT_ADOPTED,
    ROLE_DRIVER,
    ROLE_TOOL,
    ROLE_WORKER,
    LeaseGranted,
    SegmentAdopted,
    WorkerDied,
    decode,
    encode,
)

TELL_ALL_AFTER_S: Final = 0.1
"""How long the news of a death may wait for others, to reach every node in one message."""

TELL_ALL_AT: Final = 256
"""This many deaths do not wait for more."""

DEATHS_REMEMBERED: Final = 10_000
"""Who asks about an older death learns only that the process is unknown."""


ENDS_BY_ITSELF_S: Final = 0.5
"""Who is asked about and takes longer to end lived on when its connection was lost: it was the network that failed."""


class NodesApart(Event, frozen=True):
    """A process of one node could not reach, or lost, a worker of another one, which lived."""

    asker: int
    node: int


class GrantPassed(Event, frozen=True):
    """A node lends a worker to an owner of another node."""

    node: int
    owner: int
    class_id: int


class Member(msgspec.Struct, frozen=True):
    """A connected core."""

    proc: int
    node: int
    role: int
    pid: int
    job: int

    def __str__(self) -> str:
        return f"{'driver' if self.role == ROLE_DRIVER else 'worker'} (pid {self.pid})"


class MemberTable(Machine):
    """See the module's docstring."""

    def __init__(self, *, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._members: dict[int, Member] = {}
        self._by_node: dict[int, dict[int, Member]] = {}
        self._deaths: dict[int, WorkerDied] = {}
        self._askers: dict[int, dict[int, float]] = {}
        """For each process whose end is awaited, who asked, and when."""
        self._unconfirmed: dict[int, dict[int, Member]] = {}
        """Members of a node that has come back and has not said that they are still there."""
        self._untold: dict[int, list[tuple[int, str]]] = {}
        """Deaths that other nodes have not heard of, by the node on which they were."""
        self._returning = False
        """Nodes of the time before a restart may still come back."""
        self._announcing: dict[int, None] = {}
        """Nodes that have come back and have not said all."""
        self._held = Held()
        self._since_return: deque[tuple[int, int, str]] = deque(maxlen=DEATHS_REMEMBERED)
        """Deaths since a restart of the head, for who comes back later: on which node, process and cause."""
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {Tick: self._on_tick, NodeCame: self._on_node_came, NodeLost: self._on_node_lost}
        self._node_messages = {
            MemberJoined: self._on_joined,
            MemberGone: self._on_gone,
            Announced: self._on_announced,
            ToMember: self._on_to_member,
            ToOtherNode: self._on_to_other_node,
            WhoIs: self._on_who_is,
            SegmentOrphaned: self._on_orphaned,
        }

    # ------------------------------------------------------------------ queries

    def get(self, proc: int) -> Member | None:
        return self._members.get(proc)

    def node_of(self, proc: int) -> int:
        """Where a member is connected; 0 if it is not."""
        member = self._members.get(proc)
        return member.node if member is not None else 0

    def of_node(self, node: int) -> list[Member]:
        return list(self._by_node.get(node, {}).values())

    def drivers(self, job: int = 0) -> list[int]:
        """The driver of a job, or all drivers."""
        return [x.proc for x in self._members.values() if x.role == ROLE_DRIVER and job in (0, x.job)]

    def set_job(self, proc: int, job: int) -> None:
        """A driver's job has its number."""
        member = msgspec.structs.replace(self._members[proc], job=job)
        self._members[proc] = self._by_node[member.node][proc] = member

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        return {
            "members": len(self._members),
            "member_deaths_remembered": len(self._deaths),
            "held_for_returning_members": len(self._held),
        }

    # ------------------------------------------------------------------ coming and going

    def _on_node_came(self, event: NodeCame, now: float) -> None:
        self._by_node.setdefault(event.node, {})
        if event.returns and self._returning:
            self._announcing[event.node] = None
            if dead := [(proc, cause) for node, proc, cause in self._since_return if node != event.node]:
                self._emit(ToNode(event.node, DeathsElsewhere(dead)))

    def _on_joined(self, event: FromNode, message: MemberJoined, now: float) -> None:
        self._unconfirmed.get(event.node, {}).pop(message.proc, None)
        if event.node not in self._by_node or message.proc in self._members or message.proc in self._deaths:
            return  # said again by a node that came back, maybe of one that has ended since
        member = Member(message.proc, event.node, message.role, message.pid, message.job)
        self._members[member.proc] = self._by_node[event.node][member.proc] = member
        self._emit(ProcessJoined(member.proc, member.role, member.pid, member.job))

    def expect_again(self, node: int) -> None:
        """The node has come back: who is not announced again has gone meanwhile."""
        self._unconfirmed[node] = dict(self._by_node[node])
        if procs := tuple(self._by_node[node]):
            for other in self._by_node:
                if other != node:
                    self._emit(ToNode(other, MayHaveMissed(procs)))

    def _on_announced(self, event: FromNode, message: Announced, now: float) -> None:
        for member in self._unconfirmed.pop(event.node, {}).values():
            cause = f"the {member} has ended while its node had no connection"
            self._leave(member, MemberGone(member.proc, member.pid, cause, (), 0, intended=False), now)
        if event.node in self._announcing:
            del self._announcing[event.node]
            self._take_again(self._held.release((event.node, *self._by_node[event.node])), now)

    def _on_gone(self, event: FromNode, message: MemberGone, now: float) -> None:
        member = self._members.get(message.proc)
        self._unconfirmed.get(event.node, {}).pop(message.proc, None)
        if member is None and message.proc not in self._deaths and event.node in self._by_node:
            # It ended while this control service was not there, and the one before had not heard of it either.
            member = Member(message.proc, event.node, ROLE_WORKER, message.pid, 0)
            self._members[member.proc] = self._by_node[event.node][member.proc] = member
        if member is not None and member.node == event.node:
            self._leave(member, message, now)

    def _on_node_lost(self, event: NodeLost, now: float) -> None:
        self._unconfirmed.pop(event.node, None)
        self._announcing.pop(event.node, None)
        self._held.release((event.node,))
        for member in self._by_node.pop(event.node, {}).values():
            cause = f"its node was lost: {event.reason}"
            gone = MemberGone(member.proc, member.pid, f"the {member} is gone, because {cause}", (), 0, intended=False)
            self._leave(member, gone, now)
        for procs in self._askers.values():
            for proc in [proc for proc in procs if proc not in self._members]:
                del procs[proc]

    def _leave(self, member: Member, gone: MemberGone, now: float) -> None:
        del self._members[member.proc]
        self._by_node.get(member.node, {}).pop(member.proc, None)
        cause = _with_lines(gone)
        died = WorkerDied(member.proc, 0, cause, gone.exit_code, gone.intended, gone.oom, gone.retry)
        self._deaths[member.proc] = died
        if len(self._deaths) > DEATHS_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]
        if member.role == ROLE_WORKER:
            self._emit(ActorWorkerGone(member.proc, member.pid, gone.cause, gone.lines, gone.exit_code))
        for asker, asked_at in self._askers.pop(member.proc, {}).items():
            self._emit(Send(asker, died))
            if now - asked_at >= ENDS_BY_ITSELF_S and member.node in self._by_node and self.node_of(asker):
                self._emit(NodesApart(self.node_of(asker), member.node))
        self._emit(ProcessLeft(member.proc))
        self._take_again(self._held.release((member.proc,)), now)
        if self._returning:
            self._since_return.append((member.node, member.proc, cause))
        if len(self._by_node) > 1 or member.node not in self._by_node:
            self._untold.setdefault(member.node, []).append((member.proc, cause))
            if sum(len(dead) for dead in self._untold.values()) >= TELL_ALL_AT:
                self._tell_all()
            elif "tell" not in self._deadlines:
                self._deadlines.set("tell", now + TELL_ALL_AFTER_S)

    def _on_tick(self, event: Tick, now: float) -> None:
        if self._deadlines.due(now):
            self._tell_all()

    def tell_ended(self, node: int, procs: tuple[int, ...]) -> None:
        """A node has come back and serves these: that one has ended it may not have heard, or only a head before."""
        unknown = "it ended while the head was away"
        died = [(proc, self._deaths.get(proc)) for proc in procs if proc not in self._members]
        dead = [(proc, gone.cause if gone is not None else unknown) for proc, gone in died]
        if dead:
            self._emit(ToNode(node, DeathsElsewhere(dead)))

    def _tell_all(self) -> None:
        untold, self._untold = self._untold, {}
        self._deadlines.clear("tell")
        for node in self._by_node:
            dead = [entry for where, entries in untold.items() if where != node for entry in entries]
            if dead:
                self._emit(ToNode(node, DeathsElsewhere(dead)))

    # ------------------------------------------------------------------ coming back after a restart of the head

    def restore(self) -> None:
        """There was a control service before, and its nodes have time to come back."""
        self._returning = True

    def end_return(self, now: float) -> None:
        """Nobody is waited for any more."""
        self._returning = False
        self._announcing.clear()
        self._since_return.clear()
        self._take_again(self._held.release_all(), now)

    def holds_something_of(self, node: int) -> bool:
        """Whether anything that this node has said still waits for others."""
        return self._held.has_from(node)

    def _waits(self, event: FromNode, whom: int) -> bool:
        """Whether a message for this process or node is kept, because that may come back or has not said all."""
        if not self._returning or whom in self._deaths:
            return False
        node = whom if whom in self._by_node else self.node_of(whom)
        return (not node or node in self._announcing) and self._held.hold(whom, event)

    def _take_again(self, held: list[FromNode], now: float) -> None:
        for event in held:
            self._node_messages[type(event.message)](event, event.message, now)

    # ------------------------------------------------------------------ passing on

    def _on_to_member(self, event: FromNode, message: ToMember, now: float) -> None:
        if self._waits(event, message.proc):
            return
        if message.kind == KIND_LEASE_GRANTED:
            grant = decode(message.kind, message.body)
            assert isinstance(grant, LeaseGranted)
            # Before the grant itself, which the owner's node counts against what it expects.
            self._emit(GrantPassed(event.node, message.proc, grant.class_id))
        if node := self.node_of(message.proc):
            said = Deliver((message.proc,), message.kind, message.corr, message.body, event.node, message.serial)
            self._emit(ToNode(node, said))

    def _on_to_other_node(self, event: FromNode, message: ToOtherNode, now: float) -> None:
        if not self._waits(event, message.node) and message.node in self._by_node:
            said = FromMember(message.proc, message.kind, message.corr, message.body, event.node, message.serial)
            self._emit(ToNode(message.node, said))

    def _on_orphaned(self, event: FromNode, message: SegmentOrphaned, now: float) -> None:
        body = encode(SegmentAdopted(message.segment, event.node, message.lessee))
        by_node = {
            node: tuple(proc for proc, member in members.items() if member.role != ROLE_TOOL)
            for node, members in self._by_node.items()
            if node != event.node
        }
        asked = tuple(proc for procs in by_node.values() for proc in procs)
        self._emit(ToNode(event.node, OwnersAsked(message.segment, asked)))
        for node, procs in by_node.items():
            if procs:
                self._emit(ToNode(node, Deliver(procs, KIND_SEGMENT_ADOPTED, 0, body)))

    def _on_who_is(self, event: FromNode, message: WhoIs, now: float) -> None:
        asker, member = self._members.get(message.asker), self._members.get(message.proc)
        if asker is None or self._waits(event, message.proc):
            return
        if member is None:
            unknown = f"process {message.proc:016x} is not known: it never joined, or ended long ago"
            self._emit(Send(asker.proc, self._deaths.get(message.proc) or _lost(message.proc, unknown)))
        elif member.role == ROLE_WORKER:
            self._askers.setdefault(member.proc, {})[asker.proc] = now
            self._emit(ToNode(member.node, GiveUpMember(member.proc, f"the {asker} on another node")))
        else:
            # Drivers belong to the user and are not killed for a broken connection.
            cause = f"the connection to the {member} was lost, though it still runs"
            self._emit(Send(asker.proc, _lost(member.proc, cause)))

    def check_invariants(self) -> None:
        self._require(self._returning or not (len(self._held) or self._announcing), "something waits for nobody")
        for proc, member in self._members.items():
            self._require(proc not in self._deaths, f"process {proc} is both connected and dead")
            self._require(member.node in self._by_node, f"process {proc} is on a node that is lost")
        for proc in self._askers:
            self._require(proc in self._members, f"the end of {proc} is awaited after it came")


def _with_lines(gone: MemberGone) -> str:
    if not gone.lines or gone.intended:
        return gone.cause
    return f"{gone.cause}. Its last log lines:" + "".join(f"\n    {line}" for line in gone.lines) + "\n"


def _lost(proc: int, cause: str) -> WorkerDied:
    return WorkerDied(proc, 0, cause, 0, intended=False, oom=False)
