"""A node process in virtual time: the real machines, and a shell that forks, kills and reaps what is not there.

A head's records go into the cluster's storage, each commit after a delay of its own, all in order.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ray import _protocol as p
from ray._control import messages
from ray._control.machine import Effect, Event, Log, Multicast, Send, Tick, ToNode
from ray._control.service import ControlService
from ray._node import events
from ray._node.config import MemorySettings
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, NodeFacts, NodeManager, Shutdown
from ray._node.membership import Commit, Durable, Found, HeadNode, Membership, NotFound, Seek, WorkerNode
from tests.simulation.members import LOCAL_S, Driver, Member, Worker
from tests.simulation.timeline import Link

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster, Place

HEAD_ADDRESS = "head:1"

STORE_BYTES = 64 << 20

NO_WATCH = MemorySettings(look_s_max=0)


class SimulatedNode:
    """See the module's docstring.

    Args:
        cluster: Where it is.
        key: Its id, never used again.
        place: What it has.
        is_head: Whether it hosts the control service, with the cluster's records.
    """

    def __init__(self, cluster: Cluster, key: int, place: Place, *, is_head: bool) -> None:
        self.cluster, self.key, self.place, self.is_head = cluster, key, place, is_head
        self.alive = True
        self.members: dict[int, Member] = {}
        """Those that are connected."""
        self.links: dict[int, Link] = {}
        """Connections with other nodes, by their keys: with all on the head, with the head on others."""
        self._processes: dict[int, int] = {}
        """Workers that run or are about to: process id by pid."""
        self._worker_of: dict[int, Worker] = {}
        self._queue: deque[Event] = deque()
        self._working = False
        self._tick_at = float("inf")
        self._granted_to = 0
        """The number of the last grant for an owner elsewhere."""
        self._committed_at = 0.0
        self._commits: list[Commit] = []
        """Those that are not safe yet."""
        gpus = tuple(range(place.resources.get("GPU", 0) // p.UNIT))
        address = HEAD_ADDRESS if is_head else f"n{key}:1"
        facts = NodeFacts(
            key,
            place.resources,
            gpus,
            STORE_BYTES,
            address=address,
            name=f"n{key}",
            labels=place.labels,
            memory=NO_WATCH,
        )
        self.manager = NodeManager(facts, new_id=cluster.new_id, validate=cluster.validate)
        self.control: ControlService | None = None
        self.membership: Membership
        if is_head:
            self.control = ControlService(head=key, durable=True, validate=cluster.validate)
            if cluster.records:
                known = [(*where, value) for where, value in sorted(cluster.records.items())]
                self.control.restore(known, cluster.timeline.now)
            self.membership = HeadNode(self.manager, self.control)
        else:
            assert cluster.head is not None
            self.membership = WorkerNode(self.manager, cluster.head.key, (HEAD_ADDRESS,))

    def __str__(self) -> str:
        return f"node {self.key - (1 << 40)}{' (head)' if self.is_head else ''}"

    def start(self) -> None:
        self._working = True
        for effect in self.membership.start(self.cluster.timeline.now):
            self._perform(effect)
        self._working = False
        self._work()

    # ------------------------------------------------------------------ what happens to it

    def feed(self, event: Event) -> None:
        if self.alive:
            self._queue.append(event)
            self._work()

    def _work(self) -> None:
        if self._working:
            return
        self._working = True
        now = self.cluster.timeline.now
        while self._queue and self.alive:
            for effect in self.membership.handle(self._queue.popleft(), now):
                if self.alive:
                    self._perform(effect)
        self._working = False
        deadline = self.membership.next_deadline()
        if deadline is not None and deadline < self._tick_at and self.alive:
            self._tick_at = max(deadline, now)
            self.cluster.timeline.at(self._tick_at, self._tick, self._tick_at)

    def _tick(self, at: float) -> None:
        if self.alive and at == self._tick_at:
            self._tick_at = float("inf")
            self.feed(Tick())

    def link_left(self, link: Link, reason: str, *, ended: bool) -> None:
        """A connection with another node is over, on this side."""
        other = link.other(self)
        if self.links.get(other.key) is link:
            del self.links[other.key]
            self.feed(CoreLeft(other.key, reason, ended))

    def end(self, reason: str) -> None:
        """The process ends, and everything on it."""
        if not self.alive:
            return
        self.cluster.timeline.note(f"{self} ends: {reason}")
        self.alive = False
        for commit in self._commits[: self.cluster.random.randint(0, len(self._commits))]:
            self.cluster.write(commit)  # the storage had it, and nobody was told any more
        for link in list(self.links.values()):
            link.close(self)
        self.links.clear()
        for member in list(self.members.values()):
            self.cluster.member_gone(member)
        for worker in self._worker_of.values():
            self.cluster.member_gone(worker)
        self.members.clear()
        self.cluster.node_ended(self)

    # ------------------------------------------------------------------ its members

    def start_driver(self) -> Driver:
        pid = self.cluster.new_pid()
        driver = Driver(self, self.cluster.new_id(), pid)
        self.members[driver.proc] = driver
        self.cluster.members[driver.proc] = driver
        self.feed(CoreJoined(driver.proc, p.ROLE_DRIVER, pid))
        return driver

    def driver_ends(self, driver: Driver) -> None:
        self.cluster.member_gone(driver)
        # Behind everything that it has said.
        self.cluster.timeline.after(LOCAL_S, self._left, driver.proc)

    def _left(self, proc: int) -> None:
        if self.members.pop(proc, None) is not None:
            self.feed(CoreLeft(proc, "closed"))

    def member_said(self, proc: int, message: p.Message, corr: int) -> None:
        if not self.alive or proc not in self.members:
            return
        if isinstance(message, p.LeaseReturn) and message.node == self.key:
            self.cluster.oracle.returned(message.lease)
        self.feed(FrameCame(proc, p.KINDS[type(message)], corr, p.encode(message)))

    def workers(self) -> list[Worker]:
        return [self._worker_of[proc] for proc in self._processes.values()]

    def _fork(self, effect: events.Fork) -> None:
        self.cluster.timeline.after(self.cluster.draw(0.001, 0.01), self._forked, effect.proc)

    def _forked(self, proc: int) -> None:
        if not self.alive:
            return
        pid = self.cluster.new_pid()
        worker = Worker(self, proc, pid)
        self._processes[pid] = proc
        self._worker_of[proc] = worker
        self.cluster.members[proc] = worker
        self.feed(events.Forked(proc, pid))
        self.cluster.timeline.after(self.cluster.draw(0.001, 0.02), self._join, worker)

    def _join(self, worker: Worker) -> None:
        if not self.alive or worker.pid not in self._processes:
            return
        if self.cluster.happens("join_fails"):
            self.exits(worker.pid, -9)
        else:
            self.members[worker.proc] = worker
            self.feed(CoreJoined(worker.proc, p.ROLE_WORKER, worker.pid))

    def exits(self, pid: int, code: int) -> None:
        """A worker's process ends. What it has said arrives first; that its connection is lost and it has ended, in any
        order.
        """
        proc = self._processes.pop(pid, None)
        if proc is None or not self.alive:
            return
        worker = self._worker_of[proc]
        self.cluster.member_gone(worker)
        timeline = self.cluster.timeline
        timeline.after(LOCAL_S * (1 + self.cluster.draw(0, 2)), self._left, proc)
        timeline.after(LOCAL_S * (1 + self.cluster.draw(0, 2)), self._reaped, pid, proc, code)

    def _freeze(self, pids: tuple[int, ...]) -> None:
        for pid in pids:
            # One that is not there has ended, and was not reaped yet.
            if (proc := self._processes.get(pid)) is not None:
                self._worker_of[proc].frozen = True

    def _thaw(self, pids: tuple[int, ...]) -> None:
        for pid in pids:
            if (proc := self._processes.get(pid)) is not None:
                self._worker_of[proc].thaw()

    def _reaped(self, pid: int, proc: int, code: int) -> None:
        if self.alive:
            del self._worker_of[proc]
            self.cluster.oracle.ended(proc)
            self.feed(events.ChildExited(pid, code))

    # ------------------------------------------------------------------ what it does

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
            case ToNode():
                self._say(effect)
            case events.Fork():
                self._fork(effect)
            case events.Kill():
                self.cluster.timeline.after(self.cluster.draw(0.0001, 0.005), self.exits, effect.pid, -9)
            case events.Freeze():
                self._freeze(effect.pids)
            case events.Thaw():
                self._thaw(effect.pids)
            case events.Guard():
                pass  # for the zygote, should this process be stopped itself
            case events.ReadLogTail():
                self._queue.appendleft(events.LogTail(effect.proc, ()))
            case events.Disconnect():
                self._disconnect(effect.proc)
            case Commit():
                self._commit(effect)
            case Seek():
                self.cluster.timeline.after(self.cluster.draw(0.001, 0.02), self._sought, effect.addresses)
            case Shutdown():
                self.end(effect.reason)
            case events.LookAtDescriptors():
                few = events.DescriptorUsage(10, 1024)
                self._queue.appendleft(events.DescriptorsSeen(effect.asker, effect.proc, few, few, few))
            case Log():
                self.cluster.timeline.note(f"{self}: {effect.text}")
            case events.Labelled() | events.KnowNode() | events.ForgetNode() | events.FlushLogs():
                pass
            case _:
                raise AssertionError(f"unknown effect {effect}")

    def _deliver(self, proc: int, message: p.Message, corr: int) -> None:
        member = self.members.get(proc)
        if isinstance(message, p.LeaseGranted) and message.node == self.key:
            self.cluster.oracle.granted(self, proc, message)
        if member is not None:
            self.cluster.timeline.after(LOCAL_S, self._hears, member, message, corr)

    @staticmethod
    def _hears(member: Member, message: p.Message, corr: int) -> None:
        if member.alive:
            member.take(message, corr)

    def _say(self, effect: ToNode) -> None:
        message = effect.message
        self._watch(message)
        link = self.links.get(effect.node)
        if link is None and not self.is_head:
            link = self.cluster.reach(self, effect.node)
        if link is not None:
            message = self.cluster.shorten(message)
            kind = messages.KINDS[type(message)]
            link.send(self, FrameCame(self.key, kind, 0, p.encode(message)))

    def _watch(self, message: p.Message) -> None:
        """What passes to another node, for the oracle: grants for owners elsewhere, and leases that come back."""
        match message:
            case messages.ToMember(kind=p.KIND_LEASE_GRANTED, proc=proc, body=body) if (
                message.serial > self._granted_to
            ):
                self._granted_to = message.serial  # what is said once more, to the next head, is no other grant
                self.cluster.oracle.granted(self, proc, p.decode(p.KIND_LEASE_GRANTED, body))
            case messages.FromMember(kind=p.KIND_LEASE_RETURN, body=body):
                self.cluster.oracle.returned(p.decode(p.KIND_LEASE_RETURN, body).lease)

    def _disconnect(self, proc: int) -> None:
        if proc in self.links:
            self.links.pop(proc).close(self)
            self._queue.append(CoreLeft(proc, "disconnected"))
        elif (member := self.members.get(proc)) is not None and isinstance(member, Worker):
            self.exits(member.pid, 0)

    def _commit(self, commit: Commit) -> None:
        at = max(self.cluster.timeline.now + self.cluster.draw(0.0001, 0.01), self._committed_at)
        self._committed_at = at
        self._commits.append(commit)
        self.cluster.timeline.at(at, self._write)

    def _write(self) -> None:
        if self.alive:
            commit = self._commits.pop(0)
            self.cluster.write(commit)
            self.feed(Durable(commit.number))

    def _sought(self, addresses: tuple[str, ...]) -> None:
        if not self.alive:
            return
        found = self.cluster.listener(addresses[0])
        if found is None or self.cluster.is_cut(self, found):
            self.feed(NotFound(addresses, "nobody answers", refused=found is None))
        else:
            self.feed(Found(found.key, addresses[0]))
