"""All machines of one node as one: an event goes in, and effects for the shell come out.

Owns nothing but the order in which the tables hear of things, and the translation between `_control`
(which must not know nodes) and `_node`. Still without input or output: a whole node can be simulated.

Order matters in two places. When a process has joined, every table knows it before the worker pool may
give it work. When one has ended, its resources are free before its actor is placed again, and the actor
is placed before the rest of the cluster is told.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from ray._control import actor_records
from ray._control.actors import ActorTable
from ray._control.jobs import JobTable
from ray._control.kv import KeyValueStore
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
    Tick,
    earliest,
)
from ray._node import events, lease_records, requests
from ray._node.leases import LeaseTable
from ray._node.processes import ProcessEnded, ProcessTable
from ray._node.pulls import PullTable
from ray._node.resources import Ledger
from ray._node.segments import HIGH_WATER_SHARE, SegmentTable
from ray._node.spills import SpillTable
from ray._node.workers import WorkerPool
from ray._protocol import ROLE_DRIVER, ROLE_TOOL, ROLE_WORKER, TO_NODE, UNIT, Notice, decode

if TYPE_CHECKING:
    from collections.abc import Callable


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node is, as far as its decisions depend on it."""

    node: int
    resources: dict[str, int]
    gpu_ids: tuple[int, ...]
    object_store_memory: int
    high_water_share: float = HIGH_WATER_SHARE
    spills: bool = True
    hostname: str = "localhost"
    address: str = "127.0.0.1"
    socket: str = ""
    labels: dict[str, str] = {}


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


class Shutdown(Effect, frozen=True):
    """The node must end, with everything on it."""

    reason: str


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
        self.leases = LeaseTable(node=facts.node, ledger=ledger, validate=validate)
        self.pool = WorkerPool(new_id=new_id, idle_limit=max(cpus, 1), validate=validate)
        self.segments = SegmentTable(
            capacity=facts.object_store_memory, high_water_share=facts.high_water_share, validate=validate
        )
        self.pulls = PullTable(node=facts.node, validate=validate)
        self.spills = SpillTable(
            node=facts.node, capacity=facts.object_store_memory, enabled=facts.spills, validate=validate
        )
        self.processes = ProcessTable(validate=validate)
        self.jobs = JobTable()
        self.kv = KeyValueStore()
        self.actors = ActorTable(node=facts.node, job_of=self.job_of, validate=validate)
        self.requests = requests.RequestTable(self)
        self._machines: tuple[Machine, ...] = (
            self.pool,
            self.leases,
            self.actors,
            self.segments,
            self.pulls,
            self.spills,
            self.processes,
            self.requests,
        )
        self._queue: deque[Event | Effect] = deque()
        self._out: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; the effects are for the shell, in order."""
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
        record = self.jobs.get(job)
        return self.processes.drivers(job) if record is not None and record.log_to_driver else []

    # ------------------------------------------------------------------ routing

    def _route(self, event: Event | Effect, now: float) -> None:
        match event:
            case FrameCame():
                self._on_frame(event, now)
            case Received():
                self._tell_first_taker(event, now)
            case CoreJoined():
                self._on_core_joined(event, now)
            case CoreLeft():
                self._on_core_left(event, now)
            case events.WorkerGone():
                self._on_worker_gone(event, now)
            case Tick():
                self._on_tick(event, now)
            case Notify():
                drivers = tuple(self.processes.drivers(event.job)) or tuple(self.processes.drivers())
                self._out.append(Log(f"notice: {event.text}"))
                if drivers:
                    self._out.append(Multicast(drivers, Notice(event.level, event.text)))
            case Event():
                self._tell_first_taker(event, now)
                if isinstance(event, events.FreeWorker):
                    self.requests.lease_ended()
                    self._queue.extend(self.requests.take_effects())
            case _ if (translated := _to_node(event)) is not None:
                self._queue.append(translated)
            case _:
                self._out.append(event)

    def _tell(self, machine: Machine, event: Event, now: float) -> None:
        self._queue.extend(machine.handle(event, now))

    def _tell_first_taker(self, event: Event, now: float) -> None:
        """Every kind of event but those that all hear of has one machine."""
        if (translated := _to_control(event)) is not None:
            event = translated
        for machine in self._machines:
            if machine.takes(event):
                self._tell(machine, event, now)
                return
        msg = f"no machine takes {type(event).__name__}"
        raise AssertionError(msg)

    def _on_frame(self, frame: FrameCame, now: float) -> None:
        if self.processes.get(frame.proc) is None:
            return  # it was turned away, or its end was noticed first
        try:
            message = decode(frame.kind, frame.body) if frame.kind in TO_NODE else None
        except msgspec.MsgspecError as error:
            self._breach(frame, f"sent a malformed {TO_NODE[frame.kind].__name__}: {error}")
            return
        if message is None:
            self._breach(frame, f"sent a frame of unknown kind {frame.kind}")
        else:
            self._queue.append(Received(frame.proc, message, frame.corr))

    def _breach(self, frame: FrameCame, what: str) -> None:
        """A peer that does not speak the protocol cannot be worked with."""
        self._out.append(Log(f"process {frame.proc:016x} {what}; closing its connection"))
        self._out.append(events.Disconnect(frame.proc))

    def _on_tick(self, tick: Tick, now: float) -> None:
        for machine in self._machines:
            deadline = machine.next_deadline()
            if deadline is not None and deadline <= now:
                self._tell(machine, tick, now)

    # ------------------------------------------------------------------ processes come and go

    def _on_core_joined(self, event: CoreJoined, now: float) -> None:
        if event.role == ROLE_WORKER:
            if not self.pool.expects(event.proc):
                self._out.append(Log(f"process {event.pid} joined as an unknown worker; turning it away"))
                self._out.append(events.Disconnect(event.proc))
                return
            job = self.pool.job_of(event.proc)
        else:
            job = self.jobs.start(event.proc, event.pid, now) if event.role == ROLE_DRIVER else 0
        joined = ProcessJoined(event.proc, event.role, event.pid, job)
        self._tell(self.processes, joined, now)
        if event.role == ROLE_TOOL:
            return  # it asks and looks, but owns nothing
        for machine in (self.segments, self.spills, self.actors, self.leases, self.pool):
            self._tell(machine, joined, now)

    def _on_core_left(self, event: CoreLeft, now: float) -> None:
        process = self.processes.get(event.proc)
        if process is None:
            return
        if process.role == ROLE_WORKER:
            # Its process is ending; everything follows when it was reaped.
            self._tell(self.pool, events.WorkerLeft(event.proc, event.reason), now)
            return
        if process.role == ROLE_DRIVER:
            cause = f"the driver (pid {process.pid}) has ended or closed its connection ({event.reason})"
            self._tell(self.processes, ProcessEnded(event.proc, cause, 0, intended=True, oom=False), now)
        self._process_left(event.proc, now)
        job = self.jobs.end(event.proc, now)
        if job:
            self._queue.append(events.JobEnded(job))

    def _on_worker_gone(self, gone: events.WorkerGone, now: float) -> None:
        holder, lease = self.leases.holder(gone.proc)
        self._out.append(Log(gone.cause))
        self._tell(self.leases, gone, now)
        self._tell(
            self.actors,
            actor_records.ActorWorkerGone(gone.proc, gone.pid, gone.cause, gone.lines, gone.exit_code),
            now,
        )
        ended = ProcessEnded(gone.proc, _with_lines(gone), gone.exit_code, gone.intended, gone.oom, holder, lease)
        self._tell(self.processes, ended, now)
        self._process_left(gone.proc, now)

    def _process_left(self, proc: int, now: float) -> None:
        left = ProcessLeft(proc)
        for machine in (
            self.leases,
            self.actors,
            self.segments,
            self.pulls,
            self.spills,
            self.processes,
            self.requests,
        ):
            self._tell(machine, left, now)


def _with_lines(gone: events.WorkerGone) -> str:
    if not gone.lines or gone.intended:
        return gone.cause
    return f"{gone.cause}. Its last log lines:" + "".join(f"\n    {line}" for line in gone.lines) + "\n"


def _to_node(effect: Effect | Event) -> Event | None:
    """What an effect of the control service means for the node."""
    match effect:
        case actor_records.PlaceActor():
            return lease_records.ActorDemand(
                effect.actor,
                effect.incarnation,
                effect.job,
                effect.place,
                effect.run,
                effect.env,
                effect.strategy,
                effect.label,
            )
        case actor_records.WithdrawActor():
            return lease_records.ActorWithdrawn(effect.actor)
        case actor_records.StopActorWorker():
            return events.StopWorker(effect.proc, effect.reason)
        case actor_records.ActorWorkerExits():
            return events.ExitAnnounced(effect.proc, effect.reason)
        case _:
            return None


def _to_control(event: Event) -> Event | None:
    """What an event of the node means for the control service."""
    match event:
        case lease_records.ActorPlaced():
            return actor_records.Placed(event.actor, event.incarnation, event.proc, event.pid, event.gpu_ids)
        case lease_records.ActorUnplaceable():
            return actor_records.Unplaceable(event.actor, event.incarnation, event.reason)
        case _:
            return None
