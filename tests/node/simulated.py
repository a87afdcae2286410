"""A whole node without a kernel: its machines with validators on, and a world that forks, kills and reaps.

The world keeps its own books, as simple as can be, and compares them with what the node does: it is the
oracle of the stateful tests.

Several worlds are a cluster: those that are given a `head` join that one's. What nodes say to each other then lies on
a wire, in its order, until whoever speaks has performed all its effects.
"""

from __future__ import annotations

import itertools
from collections import deque

import msgspec

from ray import _protocol as p
from ray._control import messages
from ray._control.machine import Effect, Log, Multicast, Send, Tick, ToNode
from ray._control.service import ControlService
from ray._node import events, peer_protocol
from ray._node.config import MemorySettings
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, NodeFacts, NodeManager, Shutdown
from ray._node.membership import Found, HeadNode, Membership, Seek, WorkerNode
from ray._protocol import UNIT

NODE = 1 << 40


class World:
    """See the module's docstring. Process ids, pids and time are plain numbers that count up.

    Args:
        resources: What the node has.
        store: Bytes of shared memory.
        auto: Whether forks succeed and join by themselves, and killed processes are reaped at once.
        memory: What its memory watch does.
        head: The world whose node it joins.
        key: The node's key, where others carry what it says (`cluster_world`). The one with the default is the head.
        numbers: Where the numbers of processes come from then: unique over all nodes of a cluster.
        now: The time at which it starts then.
    """

    def __init__(
        self,
        resources: dict[str, float] | None = None,
        *,
        store: int = 64 << 20,
        auto: bool = True,
        node: int = 0,
        first_proc: int = 0,
        memory: MemorySettings = MemorySettings(look_s_max=0),  # noqa: B008  (frozen)
        head: World | None = None,
        key: int = NODE,
        numbers: itertools.count[int] | None = None,
        now: float = 100.0,
    ) -> None:
        wire = {name: round(amount * UNIT) for name, amount in (resources or {"CPU": 2}).items()}
        gpus = tuple(range(wire.get("GPU", 0) // UNIT))
        self.peers: list[World] = head.peers if head is not None else []
        key = node or key + len(self.peers)
        ids = numbers or itertools.count(1000 + (len(self.peers) << 20))
        name = f"n{len(self.peers)}" if head is not None else ""
        facts = NodeFacts(key, wire, gpus, store, name=name, memory=memory)
        self.node = NodeManager(facts, new_id=lambda: next(ids), validate=True)
        self.control = head.control if head is not None else ControlService(head=key, validate=True)
        self.head: Membership = (
            WorkerNode(self.node, head.node.facts.node if head is not None else NODE, ("head",))
            if head is not None or (key != NODE and not node)
            else HeadNode(self.node, self.control)
        )
        self.wire: deque[tuple[World, FrameCame]] = head.wire if head is not None else deque()
        self.said: list[tuple[int, int, p.Message]] = []
        """What this node said to others, and the head to it: (from, to, message)."""
        self._happening: list[object] = []
        self.sent: list[ToNode] = []
        """What is on its way to other nodes, where others carry it."""
        self.now = head.now if head is not None else now
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
        self.frozen: dict[int, None] = {}
        """Worker processes that are stopped, by pid."""
        self.guarded: dict[int, None] = {}
        """Those that the zygote would stop."""
        self.exits: list[int] = []
        self.logs: list[str] = []
        self.disconnected: list[int] = []
        self.tails: dict[int, tuple[str, ...]] = {}
        self.segments: dict[int, int] = {}
        self.descriptors: dict[int, events.DescriptorUsage] = {}
        """By pid, where they are not few; the node's by 0."""
        self.history: list[events.KeepHistory] = []
        self.files_asked: list[Effect] = []
        self.refuse_memory = False
        self.memory_of: dict[int, int] = {}
        """By pid, what processes hold; all of it counts against the one limit."""
        self.memory_limit = 1 << 30
        self.looks = 0
        self.oom_kill = ""
        """Who says that the kernel has ended processes; it does so for any that this node did not kill."""
        self.pulls: dict[int, events.StartPull] = {}
        """What the bulk client is doing, by ticket; tests end it."""
        self.cancelled: list[int] = []
        self.disk: dict[int, dict[int, tuple[bytes, int]]] = {}
        """Object and length by place, by spill file."""
        self.spill_writes: dict[int, events.WriteSpill] = {}
        self.spill_reads: dict[int, events.ReadSpill] = {}
        """What is being written and read; tests end it."""
        self.to_peers: list[events.ToPeer] = []
        self.shutdown = ""
        self._late: list[events.SegmentFailed] = []
        """What the shell hears only after it has performed everything else."""
        self._pids = itertools.count(1 + 10_000 * len(self.peers))
        self._procs = numbers or itertools.count(first_proc or 1 + (len(self.peers) << 16))
        self._corr = itertools.count(1)
        self.peers.append(self)
        if head is not None:
            head.feed(CoreJoined(key, p.ROLE_NODE, 0))
        for effect in self.head.start(self.now):
            self._perform(effect)
        self._pump()

    # ------------------------------------------------------------------ what happens to the node

    def feed(self, event: object) -> None:
        """Something happens to the node. What it causes at once happens after all effects have been performed."""
        self._happening.append(event)
        if len(self._happening) > 1:
            return
        while self._happening:
            for effect in self.head.handle(self._happening[0], self.now):  # type: ignore[arg-type]
                self._perform(effect)
            self._happening.pop(0)
            if not self._happening and self._late:
                self._happening.append(self._late.pop(0))
        self._pump()

    def _pump(self) -> None:
        while self.wire and not any(world._happening for world in self.peers):
            world, frame = self.wire.popleft()
            world.feed(frame)

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
        self.frozen.pop(pid, None)
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

    def finish_write(self, file: int, kind: str = "") -> None:
        """A spill file is written, or cannot be."""
        write = self.spill_writes.pop(file)
        if not kind:
            for piece in write.pieces:
                if piece.source in self.disk:
                    assert self.disk[piece.source][piece.offset] == (piece.object, piece.len)
            self.disk[file] = {piece.at: (piece.object, piece.len) for piece in write.pieces}
        self.feed(events.SpillWritten(file, kind, f"no: {kind}" if kind else ""))

    def finish_read(self, ticket: int, kind: str = "") -> None:
        del self.spill_reads[ticket]
        self.feed(events.SpillRead(ticket, kind, f"no: {kind}" if kind else ""))

    def settle(self) -> None:
        """Everything that is under way comes to its end: forks succeed and join, the killed are reaped."""
        while self.forking or self.joinable or self.killed:
            for proc in list(self.forking):
                self.forked(proc)
            for pid in list(self.killed):
                self.die(self.running[pid])
            for proc in list(self.joinable):
                self.join(proc)

    def cut(self) -> None:
        """The link with the head breaks, which both sides see."""
        head = self.peers[0]
        self.feed(CoreLeft(head.node.facts.node, "reset", ended=False))
        head.feed(CoreLeft(self.node.facts.node, "reset", ended=False))

    def come_back(self) -> None:
        """The node finds its head again."""
        head = self.peers[0]
        head.feed(CoreJoined(self.node.facts.node, p.ROLE_NODE, 0))
        self.feed(Found(head.node.facts.node, "head"))

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
                        effect.proc,
                        self.tails.get(effect.proc, ()),
                        self.descriptors.get(0, events.DescriptorUsage()),
                        self.oom_kill if effect.unexplained else "",
                    )
                )
            case events.Freeze():
                assert all(pid in self.running for pid in effect.pids), "a process that was reaped is stopped"
                self.frozen.update(dict.fromkeys(effect.pids))
            case events.Thaw():
                for pid in effect.pids:
                    self.frozen.pop(pid, None)
            case events.Guard():
                self.guarded.update(dict.fromkeys(effect.added))
                for pid in effect.gone:
                    del self.guarded[pid]
            case events.LookAtDescriptors():
                few = events.DescriptorUsage(10, 1024)
                usage = [self.descriptors.get(pid, few) for pid in (effect.asker_pid, effect.pid, 0)]
                self.feed(events.DescriptorsSeen(effect.asker, effect.proc, *usage))
            case events.ReadMemory():
                self.looks += 1
                self.feed(self._memory(detailed=effect.detailed))
            case events.GrantSegment():
                if self.refuse_memory and not effect.recycled:
                    self._late.append(events.SegmentFailed(effect.segment, effect.corr, "Cannot allocate memory"))
                    return
                if effect.recycled:
                    del self.segments[effect.recycled]
                self.segments[effect.segment] = effect.size
                if effect.to:
                    self._deliver(effect.to, p.SegmentGranted(effect.segment, effect.size), effect.corr)
            case events.ShareSegment():
                assert effect.segment in self.segments
                message = p.SegmentMapped(effect.segment, effect.size, effect.lessee)
                self._deliver(effect.to, message, effect.corr)
            case events.DropSegment():
                assert all(pull.segment != effect.segment for pull in self.pulls.values()), "it is being written"
                del self.segments[effect.segment]
            case events.StartPull():
                assert effect.ticket not in self.pulls
                assert self.segments[effect.segment] >= effect.len
                self.pulls[effect.ticket] = effect
            case events.CancelPull():
                assert effect.ticket in self.pulls
                self.cancelled.append(effect.ticket)
            case events.ShareCopy():
                assert self.segments[effect.segment] == effect.size
                self._deliver(effect.to, p.Pulled(effect.segment, effect.size, effect.offset), effect.corr)
            case events.WriteSpill():
                assert effect.file not in self.disk
                self.spill_writes[effect.file] = effect
            case events.ReadSpill():
                assert self.disk[effect.file][effect.at] == (effect.object, effect.len)
                assert self.segments[effect.segment] >= effect.len
                self.spill_reads[effect.ticket] = effect
            case events.OfferSpill():
                assert effect.file in self.disk
            case events.DeleteSpill():
                assert all(read.file != effect.file for read in self.spill_reads.values()), "it is being read"
                used = [piece.source for write in self.spill_writes.values() for piece in write.pieces]
                assert effect.file not in used, "its values are being moved"
                del self.disk[effect.file]
            case events.ToPeer():
                if any(world.node.facts.node == effect.node for world in self.peers):
                    kind = peer_protocol.PEER_KINDS[type(effect.message)]
                    self._put_on_wire(effect.node, kind, peer_protocol.encode(effect.message))
                else:
                    self.to_peers.append(effect)
            case events.Disconnect():
                self.disconnected.append(effect.proc)
                if self.inbox.pop(effect.proc, None) is not None:
                    self.feed(CoreLeft(effect.proc, "disconnected"))
            case Log():
                self.logs.append(effect.text)
            case Shutdown():
                self.shutdown = effect.reason
            case ToNode() if len(self.peers) > 1:
                self._say(effect)
            case ToNode():
                self.sent.append(effect)
            case events.Labelled() | Seek() | events.KnowNode() | events.ForgetNode():
                pass
            case events.KeepHistory():
                self.history.append(effect)
            case events.ListFiles() | events.ReadFile():
                self.files_asked.append(effect)
            case _:
                raise AssertionError(f"unknown effect {effect}")

    def _say(self, effect: ToNode) -> None:
        kind, body = messages.KINDS[type(effect.message)], p.encode(effect.message)
        if self._put_on_wire(effect.node, kind, body):
            self.said.append((self.node.facts.node, effect.node, messages.decode(kind, body)))

    def _put_on_wire(self, node: int, kind: int, body: bytes) -> bool:
        there = [world for world in self.peers if world.node.facts.node == node]
        self.wire.extend((world, FrameCame(self.node.facts.node, kind, 0, body)) for world in there)
        return bool(there)

    def _memory(self, *, detailed: bool) -> events.MemoryRead:
        alive = {pid: held for pid, held in self.memory_of.items() if pid in self.running or pid > 80_000}
        use = events.MemoryUse("the machine", self.memory_limit, sum(alive.values()))
        listed = tuple(events.ProcessUse(pid, held, "") for pid, held in alive.items())
        return events.MemoryRead((use,), listed if detailed else ())

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
