"""A whole node without a kernel: its machines with validators on, and a world that forks, kills and reaps.

The world keeps its own books, as simple as can be, and compares them with what the node does: it is the
oracle of the stateful tests.
"""

from __future__ import annotations

import itertools

import msgspec

from ray import _protocol as p
from ray._control.machine import Effect, Log, Multicast, Send, Tick
from ray._control.service import ControlService
from ray._node import events
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, NodeFacts, NodeManager, Shutdown
from ray._node.membership import HeadNode
from ray._protocol import UNIT

NODE = 1 << 40


class World:
    """See the module's docstring. Process ids, pids and time are plain numbers that count up."""

    def __init__(self, resources: dict[str, float] | None = None, *, store: int = 64 << 20, auto: bool = True) -> None:
        wire = {name: round(amount * UNIT) for name, amount in (resources or {"CPU": 2}).items()}
        gpus = tuple(range(wire.get("GPU", 0) // UNIT))
        ids = itertools.count(1000)
        self.node = NodeManager(NodeFacts(NODE, wire, gpus, store), new_id=lambda: next(ids), validate=True)
        self.control = ControlService(head=NODE, validate=True)
        self.head = HeadNode(self.node, self.control)
        self.now = 100.0
        self.auto = auto
        """Whether forks succeed and join by themselves, and killed processes are reaped at once."""
        self.inbox: dict[int, list[p.Message]] = {}
        self.replies: dict[int, dict[int, p.Message]] = {}
        self.pid_of: dict[int, int] = {}
        self.running: dict[int, int] = {}
        """Worker processes that live, by pid, with their process id."""
        self.forking: dict[int, events.Fork] = {}
        self.joinable: dict[int, None] = {}
        self.killed: dict[int, None] = {}
        self.exits: list[int] = []
        self.logs: list[str] = []
        self.tails: dict[int, tuple[str, ...]] = {}
        self.segments: dict[int, int] = {}
        self.descriptors: dict[int, events.DescriptorUsage] = {}
        """By pid, where they are not few; the node's by 0."""
        self.history: list[events.KeepHistory] = []
        self.files_asked: list[Effect] = []
        self.refuse_memory = False
        self.shutdown = ""
        self._pids = itertools.count(1)
        self._procs = itertools.count(1)
        self._corr = itertools.count(1)
        for effect in self.head.start(self.now):
            self._perform(effect)

    # ------------------------------------------------------------------ what happens to the node

    def feed(self, event: object) -> None:
        for effect in self.head.handle(event, self.now):  # type: ignore[arg-type]
            self._perform(effect)

    def driver(self) -> int:
        proc = next(self._procs)
        self.inbox[proc] = []
        self.feed(CoreJoined(proc, p.ROLE_DRIVER, 90_000 + proc))
        return proc

    def leave(self, proc: int) -> None:
        self.inbox.pop(proc)
        self.feed(CoreLeft(proc, "closed"))

    def send(self, proc: int, message: p.Message, corr: int = 0) -> None:
        """A core sends a message, through the codec."""
        self.feed(FrameCame(proc, p.KINDS[type(message)], corr, p.encode(message)))

    def request(self, proc: int, op: str, *arguments: object) -> object:
        corr = next(self._corr)
        self.send(proc, p.Request(op, msgspec.msgpack.encode(arguments)), corr)
        return self.reply(proc, corr)

    def reply(self, proc: int, corr: int) -> object:
        reply = self.replies[proc].pop(corr)
        assert isinstance(reply, p.Reply)
        body = msgspec.msgpack.decode(reply.body)
        if not reply.ok:
            raise {"ValueError": ValueError}.get(body[0], RuntimeError)(body[1])
        return body

    def forked(self, proc: int) -> None:
        del self.forking[proc]
        pid = next(self._pids)
        self.pid_of[proc] = pid
        self.running[pid] = proc
        self.joinable[proc] = None
        self.feed(events.Forked(proc, pid))

    def join(self, proc: int) -> None:
        del self.joinable[proc]
        self.inbox[proc] = []
        self.feed(CoreJoined(proc, p.ROLE_WORKER, self.pid_of[proc]))

    def die(self, proc: int, code: int = -9, *lines: str) -> None:
        """A worker's process ends and is reaped."""
        pid = self.pid_of[proc]
        del self.running[pid]
        self.killed.pop(pid, None)
        self.joinable.pop(proc, None)
        self.tails[proc] = lines
        if self.inbox.pop(proc, None) is not None:
            self.feed(CoreLeft(proc, "closed"))
        self.feed(events.ChildExited(pid, code))

    def advance(self, seconds: float) -> None:
        """Time passes, and every deadline in between is kept."""
        end = self.now + seconds
        while (deadline := self.head.next_deadline()) is not None and deadline <= end:
            self.now = max(deadline, self.now)
            self.feed(Tick())
        self.now = end

    def settle(self) -> None:
        """Everything that is under way comes to its end: forks succeed and join, the killed are reaped."""
        while self.forking or self.joinable or self.killed:
            for proc in list(self.forking):
                self.forked(proc)
            for pid in list(self.killed):
                self.die(self.running[pid])
            for proc in list(self.joinable):
                self.join(proc)

    # ------------------------------------------------------------------ what the node does

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._deliver(effect.to, effect.message, effect.corr)
            case Multicast():
                for proc in effect.to:
                    self._deliver(proc, effect.message, 0)
            case events.Pass():
                for proc in effect.procs:
                    self._deliver(proc, p.decode(effect.kind, effect.body), effect.corr)
            case events.Fork():
                self.forking[effect.proc] = effect
                if self.auto:
                    self.forked(effect.proc)
                    if effect.proc in self.joinable:
                        self.join(effect.proc)
            case events.Kill():
                if effect.pid in self.running:
                    self.killed[effect.pid] = None
                    if self.auto:
                        self.die(self.running[effect.pid])
            case events.ReadLogTail():
                self.feed(
                    events.LogTail(
                        effect.proc, self.tails.get(effect.proc, ()), self.descriptors.get(0, events.DescriptorUsage())
                    )
                )
            case events.LookAtDescriptors():
                few = events.DescriptorUsage(10, 1024)
                usage = [self.descriptors.get(pid, few) for pid in (effect.asker_pid, effect.pid, 0)]
                self.feed(events.DescriptorsSeen(effect.asker, effect.proc, *usage))
            case events.GrantSegment():
                if self.refuse_memory and not effect.recycled:
                    self.feed(events.SegmentFailed(effect.segment, effect.corr, "Cannot allocate memory"))
                    return
                if effect.recycled:
                    del self.segments[effect.recycled]
                self.segments[effect.segment] = effect.size
                self._deliver(effect.to, p.SegmentGranted(effect.segment, effect.size), effect.corr)
            case events.ShareSegment():
                assert effect.segment in self.segments
                message = p.SegmentMapped(effect.segment, effect.size, effect.lessee)
                self._deliver(effect.to, message, effect.corr)
            case events.DropSegment():
                del self.segments[effect.segment]
            case events.Disconnect():
                if self.inbox.pop(effect.proc, None) is not None:
                    self.feed(CoreLeft(effect.proc, "disconnected"))
            case Log():
                self.logs.append(effect.text)
            case Shutdown():
                self.shutdown = effect.reason
            case events.Labelled():
                pass
            case events.KeepHistory():
                self.history.append(effect)
            case events.ListFiles() | events.ReadFile():
                self.files_asked.append(effect)
            case _:
                raise AssertionError(f"unknown effect {effect}")

    def _deliver(self, proc: int, message: p.Message, corr: int) -> None:
        message = p.decode(p.KINDS[type(message)], p.encode(message))
        if corr:
            self.replies.setdefault(proc, {})[corr] = message
        elif proc in self.inbox:
            self.inbox[proc].append(message)

    def take(self, proc: int, kind: type[p.Message]) -> list[p.Message]:
        """Messages of one kind that came for a process; they are removed."""
        taken = [message for message in self.inbox[proc] if type(message) is kind]
        self.inbox[proc] = [message for message in self.inbox[proc] if type(message) is not kind]
        return taken


def cpu(amount: float) -> dict[str, int]:
    return {"CPU": round(amount * UNIT)}


def gpu(amount: float) -> dict[str, int]:
    return {"GPU": round(amount * UNIT)}


def actor_id(creator: int, serial: int) -> bytes:
    return creator.to_bytes(8, "big") + serial.to_bytes(8, "big")


def create(creator: int, serial: int, **changes: object) -> p.ActorCreate:
    """An actor's creation, with Ray's defaults."""
    fields: dict[str, object] = {
        "actor": actor_id(creator, serial),
        "spec": b"spec",
        "place": cpu(1),
        "run": {},
        "env": b"",
        "strategy": b"",
        "name": "",
        "namespace": "",
        "max_restarts": 0,
        "detached": False,
        "class_name": "Counter",
        "owner": creator,
        "label": "",
    }
    return p.ActorCreate(**{**fields, **changes})  # type: ignore[arg-type]
