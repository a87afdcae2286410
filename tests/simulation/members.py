"""Processes on simulated nodes: workers that become actors, and drivers, which own tasks and actors.

They are as simple as can be. What they believe is kept apart from what the control service and the nodes believe, and
is compared with it (`oracles`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ray import _protocol as p

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.cluster import Cluster
    from tests.simulation.nodes import SimulatedNode

LOCAL_S = 5e-5
"""How long a message takes between a process and its node."""

EXPECTED_FAILURES = ("which is lost", "there is no such node")
"""How demands may fail for good: they were bound to one node."""


class Member:
    """A process with a core, connected to its node."""

    role = p.ROLE_WORKER

    def __init__(self, node: SimulatedNode, proc: int, pid: int) -> None:
        self.node, self.proc, self.pid = node, proc, pid
        self.cluster: Cluster = node.cluster
        self.alive = True

    def say(self, message: p.Message, corr: int = 0) -> None:
        if self.alive:
            self.cluster.timeline.after(LOCAL_S, self.node.member_said, self.proc, message, corr)

    def take(self, message: p.Message, corr: int) -> None:
        """A message of its node arrives."""
        self.hear(message, corr)

    def hear(self, message: p.Message, corr: int) -> None:
        raise NotImplementedError


class Worker(Member):
    """Runs what it is told to; `actor` is what it has become. While `frozen` it does nothing, and all waits for it."""

    def __init__(self, node: SimulatedNode, proc: int, pid: int) -> None:
        super().__init__(node, proc, pid)
        self.actor: p.ActorInit | None = None
        self.frozen = False
        self._waiting: list[Callable[[], None]] = []

    def take(self, message: p.Message, corr: int) -> None:
        self._do(lambda: self.hear(message, corr))

    def _do(self, action: Callable[[], None]) -> None:
        if self.frozen:
            self._waiting.append(action)
        elif self.alive:
            action()

    def thaw(self) -> None:
        """It goes on."""
        self.frozen = False
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            self._do(action)

    def hear(self, message: p.Message, corr: int) -> None:
        match message:
            case p.ActorInit():
                assert self.actor is None, f"process {self.proc} became two actors"
                self.actor = message
                self.cluster.oracle.began(self)
                self.cluster.timeline.after(self.cluster.draw(0.001, 0.05), self._do, self._ready)
            case p.ActorStop():
                self._leave("no handles are left")
            case p.Exit() if self.actor is None:
                self.cluster.timeline.after(LOCAL_S, self.node.exits, self.pid, 0)

    def _ready(self) -> None:
        if self.actor is None:
            return
        if self.cluster.happens("init_fails"):
            self.say(p.ActorFailed(self.actor.actor, self.actor.incarnation, b"error"))
        else:
            self.say(p.ActorReady(self.actor.actor, self.actor.incarnation))

    def _leave(self, reason: str) -> None:
        if self.actor is not None and self.alive:
            self.say(p.ActorExit(self.actor.actor, self.actor.incarnation, reason))
            self.cluster.timeline.after(self.cluster.draw(0.0001, 0.01), self.node.exits, self.pid, 0)


class Held(msgspec.Struct):
    """A lease that a driver holds."""

    lease: int
    proc: int
    node: int
    class_id: int
    busy: bool = False
    reclaimed: bool = False


class Work(msgspec.Struct):
    """Tasks of one class. `requested` and `granted` are what `LeaseDemand` speaks of."""

    class_id: int
    demand: dict[str, int]
    strategy: bytes
    total: int
    queued: int
    seconds: float
    reuse: bool
    requested: int = 0
    granted: int = 0
    done: int = 0
    failed: str = ""


class Wanted(msgspec.Struct):
    """An actor that a driver has created, and what it has heard of it."""

    id: bytes
    create: p.ActorCreate
    state: int = p.ACTOR_PENDING
    incarnation: int = 0
    proc: int = 0
    asked: bool = False
    """Its creation has left: it may have been held back by the reservation of its name."""
    refused: str = ""
    killed: bool = False
    cause: bytes = b""

    @property
    def is_settled(self) -> bool:
        return bool(self.refused) or self.state in (p.ACTOR_ALIVE, p.ACTOR_DEAD)


class Driver(Member):
    """Owns tasks and actors, and a few keys."""

    role = p.ROLE_DRIVER

    def __init__(self, node: SimulatedNode, proc: int, pid: int) -> None:
        super().__init__(node, proc, pid)
        self.work: dict[int, Work] = {}
        self.held: dict[int, Held] = {}
        self.by_proc: dict[int, Held] = {}
        self._granted: dict[int, None] = {}
        """Every lease that it was ever given."""
        self.actors: dict[bytes, Wanted] = {}
        self._serial = 0
        self._values: dict[bytes, bytes] = {}
        self._asked: dict[int, tuple[str, bytes]] = {}
        """What replies that have not come are about: (operation, actor or key)."""

    # ------------------------------------------------------------------ tasks

    def submit(
        self, demand: dict[str, int], count: int, seconds: float, *, strategy: bytes = b"", reuse: bool = True
    ) -> Work:
        self._serial += 1
        work = Work(self._serial, demand, strategy, count, count, seconds, reuse)
        self.work[work.class_id] = work
        self._update(work)
        return work

    def _update(self, work: Work) -> None:
        """Tell the node, as rarely as the real owner does."""
        want = work.queued
        tell = work.requested > 0 if want == 0 else work.requested == 0 or want >= 2 * work.requested
        if tell:
            work.requested = want
            self.say(p.LeaseDemand(work.class_id, work.demand, want, b"", work.strategy, "task", True, work.granted))

    def _on_granted(self, message: p.LeaseGranted) -> None:
        work = self.work[message.class_id]
        assert message.lease not in self._granted, "a lease was granted twice"
        self._granted[message.lease] = None
        assert message.proc not in self.by_proc, "a worker serves two leases"
        held = Held(message.lease, message.proc, message.node, message.class_id)
        self.held[held.lease] = self.by_proc[held.proc] = held
        work.requested = max(work.requested - 1, 0)
        work.granted += 1
        self.cluster.holders[held.proc] = self
        if not self.cluster.lives(held.proc):
            self.peer_lost_soon(held.proc)
        self._pump(held)
        self._update(work)

    def _pump(self, held: Held, *, first: bool = True) -> None:
        work = self.work[held.class_id]
        if work.queued and not held.reclaimed and (first or work.reuse):
            work.queued -= 1
            held.busy = True
            self.cluster.timeline.after(self.cluster.draw(0.5 * work.seconds, 1.5 * work.seconds), self._finish, held)
        else:
            self._forget(held)
            self.say(p.LeaseReturn(held.lease, True, held.node))

    def _finish(self, held: Held) -> None:
        if not self.alive or held.lease not in self.held:
            return  # it was lost meanwhile, and the task waits again
        work = self.work[held.class_id]
        if not self.cluster.lives(held.proc):
            return  # nobody answers; the loss is on its way
        work.done += 1
        held.busy = False
        self._pump(held, first=False)
        self._update(work)

    def _forget(self, held: Held) -> None:
        del self.held[held.lease], self.by_proc[held.proc]
        self.cluster.holders.pop(held.proc, None)

    def _lost(self, proc: int) -> None:
        held = self.by_proc.get(proc)
        if held is not None:
            work = self.work[held.class_id]
            self._forget(held)
            if held.busy and not work.failed:
                work.queued += 1
                self._update(work)

    def _on_reclaim(self, message: p.LeaseReclaim) -> None:
        held = self.held.get(message.lease)
        if held is not None:
            held.reclaimed = message.wanted
        if message.wanted:
            kept = p.LeaseKept(held.lease, held.node) if held is not None else None
            self.say(kept or p.LeaseReturn(message.lease, True, message.node))

    def peer_lost_soon(self, proc: int) -> None:
        """The connection with a worker has broken."""
        self.cluster.timeline.after(self.cluster.draw(0.0001, 0.01), self._peer_lost, proc)

    def _peer_lost(self, proc: int) -> None:
        if proc in self.by_proc:
            self.say(p.PeerLost(proc))

    # ------------------------------------------------------------------ actors and keys

    def create(self, *, name: str = "", **changes: object) -> Wanted:
        self._serial += 1
        actor = self.proc.to_bytes(8, "big") + self._serial.to_bytes(8, "big")
        fields: dict[str, object] = {
            "actor": actor,
            "spec": b"spec",
            "place": {"CPU": p.UNIT},
            "run": {},
            "env": b"",
            "strategy": b"",
            "name": name,
            "namespace": "",
            "max_restarts": 0,
            "detached": False,
            "class_name": "Actor",
            "owner": self.proc,
            "label": "",
        }
        wanted = Wanted(actor, p.ActorCreate(**{**fields, **changes}))  # type: ignore[arg-type]
        self.actors[actor] = wanted
        self.cluster.created[actor] = wanted.create
        if name:
            self._request("actor.reserve_name", actor, name, "", actor, b"")
        else:
            self._create(wanted)
        return wanted

    def _create(self, wanted: Wanted) -> None:
        wanted.asked = True
        self.say(wanted.create)

    def kill(self, actor: bytes, *, no_restart: bool) -> None:
        if actor in self.actors and no_restart:
            self.actors[actor].killed = True
        self.say(p.ActorKill(actor, no_restart))

    def release(self, actor: bytes) -> None:
        self.actors[actor].killed = True
        self.say(p.ActorRelease(actor))

    def put_key(self, key: bytes, value: bytes) -> None:
        self._values[key] = value
        self._request("kv.put", key, key, value, "", True)

    def _request(self, op: str, about: bytes, *arguments: object) -> None:
        self._serial += 1
        self._asked[self._serial] = (op, about)
        self.say(p.Request(op, msgspec.msgpack.encode(arguments)), self._serial)

    def _on_reply(self, reply: p.Reply, corr: int) -> None:
        op, about = self._asked.pop(corr, ("", b""))
        if not op:
            pass  # the answer of a head that has died since came too
        elif op == "kv.put":
            assert reply.ok, reply.body
            self.cluster.oracle.acknowledged_key(about, self._values[about])
        elif not reply.ok:
            self.actors[about].refused = msgspec.msgpack.decode(reply.body)[1]
        else:
            self._create(self.actors[about])

    def _on_state(self, state: p.ActorState) -> None:
        wanted = self.actors.get(state.actor)
        if wanted is None:
            return
        assert wanted.state != p.ACTOR_DEAD or state.state == p.ACTOR_DEAD, "a life after death"
        later = state.incarnation >= wanted.incarnation or state.state == p.ACTOR_DEAD
        assert later, f"incarnation {state.incarnation} was told after {wanted.incarnation}"
        assert (state.state == p.ACTOR_ALIVE) == (state.proc != 0)
        wanted.state, wanted.proc, wanted.cause = state.state, state.proc, state.cause
        wanted.incarnation = max(state.incarnation, wanted.incarnation)
        self.cluster.oracle.acknowledged_actor(state)

    # ------------------------------------------------------------------ what it is told

    def hear(self, message: p.Message, corr: int) -> None:
        match message:
            case p.LeaseGranted():
                self._on_granted(message)
            case p.LeaseReclaim():
                self._on_reclaim(message)
            case p.LeaseFailed():
                work = self.work[message.class_id]
                work.failed, work.queued, work.requested = message.reason, 0, 0
            case p.WorkerDied():
                self._lost(message.proc)
            case p.Deaths():
                for proc, _ in message.dead:
                    self._lost(proc)
            case p.ActorState():
                self._on_state(message)
            case p.Reply():
                self._on_reply(message, corr)

    # ------------------------------------------------------------------ what is not done

    def pending(self) -> list[str]:
        """What it still waits for, in words."""
        out = []
        for work in self.work.values():
            if work.failed:
                if not any(text in work.failed for text in EXPECTED_FAILURES):
                    out.append(f"class {work.class_id} failed: {work.failed}")
            elif work.done < work.total:
                out.append(f"{work} is not done")
        for wanted in self.actors.values():
            if not wanted.is_settled or (wanted.state == p.ACTOR_ALIVE and not self.cluster.lives(wanted.proc)):
                out.append(f"actor {wanted.id.hex()} is not settled: {wanted}")
        return out
