"""All machines of one node as one: an event goes in, and effects for the shell come out.

Owns nothing but the order in which the tables hear of things, and what of it the control service hears (`ToControl`;
its words come as `FromControl`). Whether that is in this process or on another node makes no difference here. Still
without input or output: a whole node can be simulated.

Order matters in two places. When a process has joined, every table knows it before the worker pool may
give it work. When one has ended, its resources are free before the control service hears of it, which may place its
actor again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from ray import _protocol as p
from ray._control import messages
from ray._control.demands import ACTORS, GROUPS
from ray._control.machine import (
    Effect,
    Event,
    Log,
    Machine,
    Multicast,
    Notify,
    ProcessJoined,
    ProcessLeft,
    Received,
    Send,
    Tick,
    earliest,
)
from ray._node import events, lease_records, looks, requests
from ray._node.config import MemorySettings
from ray._node.estate_questions import EstateQuestions
from ray._node.estates import Estates
from ray._node.fence import Fence
from ray._node.group_questions import OP, GroupQuestions
from ray._node.leases import LeaseTable
from ray._node.memory import MemoryWatch
from ray._node.memory_victims import Tenant
from ray._node.processes import DiedElsewhere, ProcessEnded, ProcessTable
from ray._node.pulls import PullTable
from ray._node.relay import Relay
from ray._node.resources import Ledger
from ray._node.segments import SegmentTable
from ray._node.spill_files import SPILLED
from ray._node.spill_settings import SpillSettings
from ray._node.spills import SpillTable
from ray._node.workers import WorkerPool
from ray._protocol import (
    ACTOR_DEAD,
    FOR_CONTROL,
    KIND_ACTOR_INIT,
    KIND_ACTOR_STATE,
    KIND_ESTATE_ANSWER,
    KIND_LEASE_FAILED,
    KIND_LEASE_GRANTED,
    KIND_REPLY,
    KIND_SEGMENT_ADOPTED,
    KINDS,
    ROLE_DRIVER,
    ROLE_TOOL,
    ROLE_WORKER,
    TO_NODE,
    UNIT,
    ActorCreate,
    ActorState,
    ActorSubscribe,
    BlocksFreed,
    EstateAnswer,
    EstateQuestion,
    LeaseKept,
    LeaseReturn,
    NodeAddress,
    Request,
    SegmentAdopted,
    SegmentClaims,
    WhereIsNode,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray._protocol import Message


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node is, as far as its decisions depend on it.

    `address` is where other nodes reach it, "host:port", and empty if they do not, or only through the head because it
    is `relayed`; `host` is what it calls itself.
    """

    node: int
    resources: dict[str, int]
    gpu_ids: tuple[int, ...]
    object_store_memory: int
    hostname: str = "localhost"
    host: str = "127.0.0.1"
    address: str = ""
    socket: str = ""
    name: str = ""
    session_dir: str = ""
    labels: dict[str, str] = {}
    memory: MemorySettings = MemorySettings()
    spilling: SpillSettings = SpillSettings()
    python: str = ""
    client: bool = False
    relayed: bool = False

    def hello(self) -> messages.NodeHello:
        """How the node introduces itself."""
        return messages.NodeHello(
            self.node,
            self.address,
            self.host,
            self.hostname,
            self.name,
            self.socket,
            self.session_dir,
            self.resources,
            self.labels,
            self.python,
            self.client,
            relayed=self.relayed,
        )


class FrameCame(Event, frozen=True):
    """A frame from a connected core, not decoded yet."""

    proc: int
    kind: int
    corr: int
    body: bytes


class CoreJoined(Event, frozen=True):
    """A core has finished its handshake."""

    proc: int
    role: int
    pid: int


class CoreLeft(Event, frozen=True):
    """A core's connection has closed."""

    proc: int
    reason: str
    ended: bool = True
    """The peer closed it, as the end of its process does; otherwise it broke."""


class Shutdown(Effect, frozen=True):
    """The node must end, with everything on it. Unless that is `wanted`, somebody will ask why."""

    reason: str
    wanted: bool = True


class JobFacts(msgspec.Struct, frozen=True):
    """A job as this node knows it: its driver, and what that has said."""

    number: int
    driver: int
    config: dict[str, Any]


class Hosted(msgspec.Struct):
    """A worker of this node that is an actor: whether it was told so, and whether it has said that it is ready."""

    actor: bytes
    incarnation: int
    pid: int
    told: bool = False
    ready: bool = False


class NodeManager:
    """See the module's docstring.

    Args:
        facts: What this node is.
        new_id: Draws process ids.
        validate: Check every table's invariants after each event.
    """

    def __init__(self, facts: NodeFacts, *, new_id: Callable[[], int], validate: bool = False) -> None:
        self.facts = facts
        self.validates = validate
        ledger = Ledger(facts.resources, facts.gpu_ids)
        cpus = facts.resources.get("CPU", 0) // UNIT
        self.leases = LeaseTable(node=facts.node, ledger=ledger, new_id=new_id, validate=validate)
        self.pool = WorkerPool(new_id=new_id, idle_limit=max(cpus, 1), validate=validate)
        self.estates = Estates(node=facts.node, validate=validate)
        self.estate_questions = EstateQuestions(validate=validate)
        self.segments = SegmentTable(
            node=facts.node,
            capacity=facts.object_store_memory,
            high_water_share=facts.spilling.high_water_share if facts.spilling.enabled else 0.0,
            validate=validate,
        )
        self.pulls = PullTable(node=facts.node, validate=validate)
        self.spills = SpillTable(
            node=facts.node, capacity=facts.object_store_memory, enabled=facts.spilling.enabled, validate=validate
        )
        self.processes = ProcessTable(validate=validate)
        self.requests = requests.RequestTable(self)
        self.looks = looks.LookTable(self)
        self.fence = Fence(validate=validate)
        self.relay = Relay()
        self.memory = MemoryWatch(
            settings=facts.memory,
            place=f"node {facts.name or facts.hostname} ({facts.address or facts.host})",
            tenants=self._tenants,
            validate=validate,
        )
        self.jobs: dict[int, JobFacts] = {}
        self.nodes: dict[int, messages.NodeEntry] = {}
        """The other nodes."""
        self._lost_nodes: dict[int, str] = {}
        self.remembers = False
        """Whether the control service is elsewhere, and may have to be told again what is here."""
        self._hosted: dict[int, Hosted] = {}
        self._subscribed: dict[int, dict[bytes, None]] = {}
        """Actors of whose changes members have asked to hear."""
        self._questions = GroupQuestions()
        self._machines: tuple[Machine, ...] = (
            self.pool,
            self.leases,
            self.segments,
            self.estates,
            self.pulls,
            self.spills,
            self.processes,
            self.requests,
            self.looks,
            self.fence,
            self.memory,
            self.estate_questions,
        )
        self._queue: deque[Event | Effect] = deque()
        self._out: list[Effect] = []
        self._on_control: dict[type[Message], Callable[[Any, float], None]] = {
            messages.Nodes: self._on_nodes,
            messages.Deliver: self._on_deliver,
            messages.FromMember: self._on_from_member,
            messages.PlaceActor: self._on_place_actor,
            messages.WithdrawActor: lambda m, now: self._queue.append(lease_records.ActorWithdrawn(m.actor)),
            messages.PlaceLeases: self._on_place_leases,
            messages.WithdrawLeases: lambda m, now: self._tell(self.leases, lease_records.GuestWithdrawn(m), now),
            messages.PlacedElsewhere: lambda m, now: self._tell(self.leases, lease_records.Elsewhere(m), now),
            messages.Hopeless: lambda m, now: self._tell(self.leases, lease_records.NowHopeless(m), now),
            messages.PrepareBundles: lambda m, now: self._tell(self.leases, lease_records.BundlesWanted(m), now),
            messages.CommitBundles: lambda m, now: self._tell(self.leases, lease_records.BundlesCommitted(m), now),
            messages.ReleaseBundles: lambda m, now: self._tell(self.leases, lease_records.BundlesReleased(m), now),
            messages.StopMember: lambda m, now: self._queue.append(events.StopWorker(m.proc, m.reason)),
            messages.MemberExits: lambda m, now: self._queue.append(events.ExitAnnounced(m.proc, m.reason)),
            messages.MemberBroke: lambda m, now: self._breach(m.proc, m.what),
            messages.JobChanged: self._on_job_changed,
            messages.JobGone: self._on_job_gone,
            messages.DeathsElsewhere: self._on_deaths_elsewhere,
            messages.GiveUpMember: lambda m, now: self._tell(self.processes, events.GivenUp(m.proc, m.by), now),
            messages.AskFree: self._on_ask_free,
            messages.AskState: lambda m, now: self._queue.append(events.StateAsked(m)),
            messages.OwnersAsked: lambda m, now: self._queue.append(events.OwnersAsked(m.segment, m.procs)),
            messages.MayHaveMissed: lambda m, now: self._queue.append(events.MayHaveMissed(m.procs)),
            messages.AreYouAlive: self._on_are_you_alive,
            messages.Leave: lambda m, now: self._out.append(Shutdown(m.reason, wanted=False)),
        }

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; the effects are for the shell, in order."""
        if self.fence.is_due(now):
            # However late this is: nothing that waits to be heard may have an effect before.
            self._tell(self.fence, Tick(), now)
        self._queue.append(event)
        while self._queue:
            self._route(self._queue.popleft(), now)
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        return earliest(*(machine.next_deadline() for machine in self._machines))

    def job_of(self, proc: int) -> int:
        """The job of a connected process; 0 if unknown."""
        process = self.processes.get(proc)
        return process.job if process is not None else 0

    def log_receivers(self, job: int) -> list[int]:
        """Drivers that want the log lines of a job's workers."""
        facts = self.jobs.get(job)
        return [facts.driver] if facts is not None and facts.config.get("log_to_driver", True) else []

    def _tenants(self) -> Iterator[Tenant]:
        """The workers that are lent, with what the memory watch must know of them."""
        return map(self._tenant, self.leases.held())

    def _tenant(self, lease: lease_records.Lease) -> Tenant:
        owner = lease.lives_for or lease.owner
        return Tenant(lease.proc, lease.pid, lease.key, owner, lease.job, lease.label, lease.since, lease.retriable)

    # ------------------------------------------------------------------ routing

    def _route(self, event: Event | Effect, now: float) -> None:
        match event:
            case FrameCame():
                self._on_frame(event, now)
            case events.FromControl():
                self._on_control[type(event.message)](event.message, now)
            case Received() | events.BlocksHeld() | events.BlockUnneeded() if _is_of_disk(event):
                self._tell(self.spills, event, now)
            case Received():
                self._tell_first_taker(event, now)
            case CoreJoined():
                self._on_core_joined(event, now)
            case CoreLeft():
                self._on_core_left(event, now)
            case events.WorkerGone():
                self._tell(self.estates, event, now)
            case events.Departed():
                self._on_worker_gone(event.gone, now)
            case Tick():
                self._on_tick(event, now)
            case Send():
                self._on_send(event)
            case events.Forward():
                self._on_send(Send(event.proc, event.message, event.corr))
            case events.Company():
                for machine in (self.processes, self.leases, self.segments):
                    self._tell(machine, event, now)
            case events.RoomShort():
                self._tell(self.spills, event, now)
                self._tell(self.estates, event, now)
            case Notify():
                self._to_control(messages.NoticeRaised(event.job, event.level, event.text))
            case events.ToManager():
                kind, body = KINDS[type(event.message)], encode(event.message)
                self._to_control(self.relay.to_node(event.node, event.proc or self.facts.node, kind, 0, body))
            case lease_records.ActorPlaced():
                self._hosted[event.proc] = Hosted(event.actor, event.incarnation, event.pid)
                if event.retriable:
                    self._tell(self.fence, events.ActorGuarded(event.proc, event.pid), now)
                self._to_control(
                    messages.ActorPlaced(event.actor, event.incarnation, event.proc, event.pid, event.gpu_ids)
                )
            case lease_records.ActorUnplaceable():
                self._to_control(messages.ActorUnplaceable(event.actor, event.incarnation, event.reason))
            case Event():
                self._tell_first_taker(event, now)
                if isinstance(event, events.WorkerReady):
                    self._tell(self.memory, event, now)
                if isinstance(event, events.FreeWorker):
                    self.requests.lease_ended()
                    self._queue.extend(self.requests.take_effects())
            case _:
                self._out.append(event)

    def _tell(self, machine: Machine, event: Event, now: float) -> None:
        self._queue.extend(machine.handle(event, now))

    def _tell_first_taker(self, event: Event, now: float) -> None:
        """Every kind of event but those that all hear of has one machine."""
        for machine in self._machines:
            if machine.takes(event):
                self._tell(machine, event, now)
                return
        msg = f"no machine takes {type(event).__name__}"
        raise AssertionError(msg)

    def _to_control(self, message: Message) -> None:
        self._out.append(events.ToControl(message))

    def _on_frame(self, frame: FrameCame, now: float) -> None:
        if self.processes.get(frame.proc) is None:
            return  # it was turned away, or its end was noticed first
        if frame.kind in FOR_CONTROL:
            if self.remembers:
                self._remember(frame)
            self._to_control(messages.MemberSaid(frame.proc, frame.kind, frame.corr, frame.body))
            return
        try:
            message = decode(frame.kind, frame.body) if frame.kind in TO_NODE else None
        except msgspec.MsgspecError as error:
            self._breach(frame.proc, f"sent a malformed {TO_NODE[frame.kind].__name__}: {error}")
            return
        match message:
            case None:
                self._breach(frame.proc, f"sent a frame of unknown kind {frame.kind}")
            case Request():
                if message.op == OP and self.remembers:
                    self._questions.ask(frame.proc, frame.corr, message.args, now)
                self._on_request(frame, message)
            case LeaseReturn() | LeaseKept() | SegmentClaims() | BlocksFreed() if self._is_for_other(message.node):
                self._to_control(self.relay.to_node(message.node, frame.proc, frame.kind, frame.corr, frame.body))
            case EstateQuestion() if self._is_for_other(message.node):
                self._queue.append(events.AskedElsewhere(frame.proc, message))
            case WhereIsNode():
                self._on_where_is(frame, message)
            case _:
                self._queue.append(Received(frame.proc, message, frame.corr))

    def _is_for_other(self, node: int) -> bool:
        return node not in (0, self.facts.node)

    def _on_request(self, frame: FrameCame, request: Request) -> None:
        """What is not about this node alone is the control service's to answer."""
        if request.op == "stats":
            request = Request("stats", msgspec.msgpack.encode([self._counts()]))
        elif request.op == "why.lease" and (named := self._own_demand(request)) is not None:
            text = self.leases.why(named[1], named[0])
            request = Request("control.why_lease", msgspec.msgpack.encode([*named, text]))
        elif self.requests.knows(request.op) and not (request.op == "why.process" and self._is_elsewhere(request)):
            self._queue.append(Received(frame.proc, request, frame.corr))
            return
        else:
            self._to_control(messages.MemberSaid(frame.proc, frame.kind, frame.corr, frame.body))
            return
        self._to_control(messages.MemberSaid(frame.proc, frame.kind, frame.corr, encode(request)))

    def _own_demand(self, request: Request) -> tuple[int, int] | None:
        """The class and owner that a question is about, if the owner is a member of this node."""
        try:
            class_id, owner = msgspec.msgpack.decode(request.args, type=tuple[int, int])
        except msgspec.MsgspecError:
            return None
        return (class_id, owner) if self.processes.get(owner) is not None else None

    def _is_elsewhere(self, request: Request) -> bool:
        try:
            (proc,) = msgspec.msgpack.decode(request.args, type=tuple[int])
        except msgspec.MsgspecError:
            return False
        return self.processes.get(proc) is None

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        tables = (
            self.pool,
            self.leases,
            self.segments,
            self.estates,
            self.estate_questions,
            self.pulls,
            self.spills,
            self.processes,
            self.fence,
            self.memory,
        )
        for table in tables:
            counts.update(table.statistics())
        return counts

    def _breach(self, proc: int, what: str) -> None:
        """A peer that does not speak the protocol cannot be worked with."""
        self._out.append(Log(f"process {proc:016x} {what}; closing its connection"))
        self._out.append(events.Disconnect(proc))

    def _on_send(self, send: Send) -> None:
        if self.processes.get(send.to) is not None or not self.nodes:
            self._out.append(send)
        else:
            kind = KINDS[type(send.message)]
            self._to_control(self.relay.to_member(send.to, kind, send.corr, encode(send.message)))

    def _on_tick(self, tick: Tick, now: float) -> None:
        for machine in self._machines:
            deadline = machine.next_deadline()
            if deadline is not None and deadline <= now:
                self._tell(machine, tick, now)

    # ------------------------------------------------------------------ processes come and go

    def _on_core_joined(self, event: CoreJoined, now: float) -> None:
        if event.role == ROLE_WORKER and not self.pool.expects(event.proc):
            self._out.append(Log(f"process {event.pid} joined as an unknown worker; turning it away"))
            self._out.append(events.Disconnect(event.proc))
            return
        job = self.pool.job_of(event.proc) if event.role == ROLE_WORKER else 0
        joined = ProcessJoined(event.proc, event.role, event.pid, job)
        self._tell(self.processes, joined, now)
        # Before anything that the process says, and before the answer that its job has such a number.
        self._to_control(messages.MemberJoined(event.proc, event.role, event.pid, job))
        if event.role == ROLE_TOOL:
            return  # it asks and looks, but owns nothing
        for machine in (self.segments, self.spills, self.estates, self.leases, self.pool):
            self._tell(machine, joined, now)

    def _on_core_left(self, event: CoreLeft, now: float) -> None:
        process = self.processes.get(event.proc)
        if process is None:
            return
        if process.role == ROLE_WORKER:
            # Its process is ending; everything follows when it was reaped.
            self._tell(self.pool, events.WorkerLeft(event.proc, event.reason), now)
            return
        what = "driver" if process.role == ROLE_DRIVER else "tool"
        cause = f"the {what} (pid {process.pid}) has ended or closed its connection ({event.reason})"
        if process.role == ROLE_DRIVER:
            self._tell(self.processes, ProcessEnded(event.proc, cause, 0, intended=True, oom=False), now)
        self._process_left(event.proc, now)
        self._to_control(messages.MemberGone(event.proc, process.pid, cause))

    def _on_worker_gone(self, gone: events.WorkerGone, now: float) -> None:
        holder, lease = self.leases.holder(gone.proc)
        self._out.append(Log(gone.cause))
        self._tell(self.leases, gone, now)
        self._tell(self.fence, gone, now)
        ended = ProcessEnded(
            gone.proc, _with_lines(gone), gone.exit_code, gone.intended, gone.oom, holder, lease, gone.retry
        )
        for effect in self.processes.handle(ended, now):
            # Its lease's holder may be on another node. It must hear what a repetition costs before it hears, with
            # everybody, of the bare death.
            self._route(effect, now)
        self._to_control(
            messages.MemberGone(
                gone.proc, gone.pid, gone.cause, gone.lines, gone.exit_code, gone.intended, gone.oom, gone.retry
            )
        )
        self._hosted.pop(gone.proc, None)
        self._process_left(gone.proc, now)
        self._tell(self.memory, gone, now)

    def _process_left(self, proc: int, now: float) -> None:
        self._subscribed.pop(proc, None)
        self._questions.left(proc)
        left = ProcessLeft(proc)
        for machine in (
            self.leases,
            self.segments,
            self.estates,
            self.estate_questions,
            self.pulls,
            self.spills,
            self.processes,
            self.requests,
            self.looks,
        ):
            self._tell(machine, left, now)

    # ------------------------------------------------------------------ for a control service that knows nothing yet

    def _remember(self, frame: FrameCame) -> None:
        """Note what a next control service has to be told again."""
        match frame.kind:
            case p.KIND_ACTOR_READY:
                if (hosted := self._hosted.get(frame.proc)) is not None:
                    hosted.ready = True
            case p.KIND_ACTOR_SUBSCRIBE | p.KIND_ACTOR_CREATE:
                try:
                    message = decode(frame.kind, frame.body)
                except msgspec.MsgspecError:
                    return  # the control service will say what is wrong with it
                assert isinstance(message, ActorSubscribe | ActorCreate)
                self._subscribed.setdefault(frame.proc, {})[message.actor] = None

    def announcement(self, now: float) -> list[Message]:
        """What is on this node, between `NodeHello` and `Announced`."""
        said: list[Message] = [messages.MemberJoined(x.proc, x.role, x.pid, x.job) for x in self.processes.all()]
        for proc, hosted in self._hosted.items():
            if hosted.told:
                said.append(
                    messages.ActorHosted(hosted.actor, hosted.incarnation, proc, hosted.pid, ready=hosted.ready)
                )
        for proc, actors in self._subscribed.items():
            said.append(messages.MemberSubscribes(proc, list(actors)))
        held = self.leases.reservations.held()
        said += [messages.BundlesHeld(x.group, x.attempt, x.offered) for x in held]
        return [*said, *self._questions.announcement(now)]

    def owners_elsewhere(self) -> tuple[int, ...]:
        """Processes of other nodes for which leases are or wait here."""
        owners = [owner for owner in self.leases.owners() if owner not in (ACTORS, GROUPS)]
        return tuple(owner for owner in owners if self.processes.get(owner) is None)

    def say_demands_again(self, now: float) -> list[Effect]:
        """What the control service knew of this node, and what may have been lost between members and this node."""
        self.leases.say_again(now)
        self._queue.extend(self.leases.take_effects())
        self.segments.ask_again()
        self._queue.extend(self.segments.take_effects())
        return self.handle(Tick(), now)

    # ------------------------------------------------------------------ what the control service says

    def _on_nodes(self, message: messages.Nodes, now: float) -> None:
        if message.welcome:
            self._tell(self.fence, events.Welcomed(), now)
        was_alone = not self.nodes
        for entry in message.joined:
            former = self.nodes.get(entry.node)
            self.nodes[entry.node] = entry
            if former is not None and former.address != entry.address:
                # Members that have asked where it is would not ask again.
                moved = NodeAddress(entry.node, entry.address, relayed=entry.relayed)
                self._out.append(Multicast(tuple(self.processes.connected()), moved))
            self._out.append(events.KnowNode(entry.node, entry.address, entry.relayed))
            for machine in (self.pulls, self.estate_questions):
                self._tell(machine, events.PeerJoined(entry.node, entry.address), now)
        gone = list(message.gone)
        if message.whole:
            listed = {entry.node: None for entry in message.joined}
            reason = "it was lost while this node had no connection to the head"
            gone += [(node, f"node {node:016x} is lost: {reason}") for node in self.nodes if node not in listed]
        self.relay.forget(node for node, _ in gone)
        for node, reason in gone:
            self.nodes.pop(node, None)
            for machine in (self.pulls, self.estate_questions):
                self._tell(machine, events.PeerLeft(node), now)
            left = ProcessLeft(node)  # its estates may have held blocks here
            self._tell(self.segments, left, now)
            self._tell(self.spills, left, now)
            self._lost_nodes[node] = reason
            if len(self._lost_nodes) > LOST_NODES_MAX:
                del self._lost_nodes[next(iter(self._lost_nodes))]
            self._out.append(events.ForgetNode(node, reason))
            told = NodeAddress(node, "", reason)
            self._out.append(Multicast(tuple(self.processes.connected()), told))
        if was_alone != (not self.nodes):
            self._queue.append(events.Company(alone=not self.nodes))

    def _on_where_is(self, frame: FrameCame, asked: WhereIsNode) -> None:
        if (entry := self.nodes.get(asked.node)) is not None:
            told = NodeAddress(asked.node, entry.address, relayed=entry.relayed)
        else:
            unknown = f"node {asked.node:016x} is not known: it never joined, or was lost"
            told = NodeAddress(asked.node, "", self._lost_nodes.get(asked.node, unknown))
        self._out.append(Send(frame.proc, told))

    def _on_deliver(self, message: messages.Deliver, now: float) -> None:
        if self.relay.is_repeated(message):
            return
        if message.kind in (KIND_LEASE_GRANTED, KIND_LEASE_FAILED):
            told = decode(message.kind, message.body)
            for proc in message.procs:
                self._tell(self.leases, lease_records.ToldElsewhere(proc, told), now)
        elif message.kind == KIND_ACTOR_INIT:
            for proc in message.procs:
                if proc in self._hosted:
                    self._hosted[proc].told = True
        elif message.kind == KIND_SEGMENT_ADOPTED:
            adopted = decode(message.kind, message.body)
            assert isinstance(adopted, SegmentAdopted)
            self._tell(self.estates, events.EstatesAsked(adopted.node, adopted.segment), now)
        elif message.kind == KIND_ESTATE_ANSWER:
            answer = decode(message.kind, message.body)
            assert isinstance(answer, EstateAnswer)
            told_of = [*(found[0] for found in answer.found), *answer.absent]
            for proc in message.procs:
                self._tell(self.estate_questions, events.AnswerPassed(proc, told_of), now)
        elif message.kind == KIND_REPLY:
            for proc in message.procs:
                self._questions.answered(proc, message.corr)
        elif message.kind == KIND_ACTOR_STATE and self.remembers:
            state = decode(message.kind, message.body)
            assert isinstance(state, ActorState)
            if state.state == ACTOR_DEAD:
                for proc in message.procs:
                    self._subscribed.get(proc, {}).pop(state.actor, None)
        self._out.append(events.Pass(message.procs, message.kind, message.corr, message.body))

    def _on_from_member(self, message: messages.FromMember, now: float) -> None:
        # The sender's own node has decoded it already.
        if not self.relay.is_repeated(message):
            self._queue.append(Received(message.proc, decode(message.kind, message.body), message.corr))

    def _on_place_actor(self, message: messages.PlaceActor, now: float) -> None:
        self._queue.append(lease_records.ActorDemand(message))

    def _on_place_leases(self, message: messages.PlaceLeases, now: float) -> None:
        if self.processes.has_ended(message.owner):
            # Its end and this order have crossed: the order counts as heard, and nothing is lent.
            message = msgspec.structs.replace(message, count=0)
        self._tell(self.leases, lease_records.LeasesPlaced(message), now)

    def _on_job_changed(self, message: messages.JobChanged, now: float) -> None:
        self.jobs[message.job] = JobFacts(message.job, message.driver, message.config)
        process = self.processes.get(message.driver)
        if process is not None and not process.job:
            known = events.JobKnown(message.driver, message.job)
            for machine in (self.processes, self.leases):
                self._tell(machine, known, now)

    def _on_job_gone(self, message: messages.JobGone, now: float) -> None:
        facts = self.jobs.get(message.job)
        if facts is not None:
            # Its detached actors go on, and may be started again: what it said about itself stays, but for its lines.
            self.jobs[message.job] = JobFacts(message.job, 0, {**facts.config, "log_to_driver": False})
        ended = [number for number, job in self.jobs.items() if not job.driver]
        for number in ended[:-ENDED_JOBS_MAX]:
            del self.jobs[number]
        self._tell(self.estates, events.JobEnded(message.job), now)
        self._queue.append(events.JobEnded(message.job))

    def _on_deaths_elsewhere(self, message: messages.DeathsElsewhere, now: float) -> None:
        self._tell(self.processes, DiedElsewhere(message.dead), now)
        for proc, _ in message.dead:
            for machine in (self.leases, self.segments, self.spills, self.estates):
                self._tell(machine, ProcessLeft(proc), now)

    def _on_are_you_alive(self, message: messages.AreYouAlive, now: float) -> None:
        self._tell(self.fence, events.Asked(message.serial, message.heard), now)
        self._to_control(messages.Alive(message.serial))

    def _on_ask_free(self, message: messages.AskFree, now: float) -> None:
        self.requests.ask_free(message, now)
        self._queue.extend(self.requests.take_effects())


def _is_of_disk(event: Event) -> bool:
    """Whether it says of a spilled value, which is located like a block, what is said of blocks in memory."""
    match event:
        case (
            Received(message=SegmentClaims(segment=segment) | BlocksFreed(segment=segment))
            | events.BlocksHeld(segment=segment)
            | events.BlockUnneeded(segment=segment)
        ):
            return segment >= SPILLED
    return False


LOST_NODES_MAX = 1000
"""Lost nodes whose end can be told to who asks; of older ones only that they are unknown."""

ENDED_JOBS_MAX = 1000
"""Jobs without a driver whose settings are kept for their detached actors."""


def _with_lines(gone: events.WorkerGone) -> str:
    if not gone.lines or gone.intended:
        return gone.cause
    return f"{gone.cause}. Its last log lines:" + "".join(f"\n    {line}" for line in gone.lines) + "\n"
