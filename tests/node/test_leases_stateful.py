"""Leases and workers under arbitrary orders of events, against the books of a simple world.

The machines check their own invariants after every event (validators are on). The books here know only
what an owner can see: what it was granted, what it gave back, who is alive. In the end everything that
is under way comes to its end, and then nothing may wait that fits, and everything adds up again.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ray import _protocol as p
from ray._node import events
from ray._protocol import UNIT
from tests.node.simulated import World, actor_id, cpu, create, gpu

DEMANDS = [{}, cpu(1), cpu(2), cpu(0.5), gpu(1), gpu(0.5), {"CPU": UNIT, "GPU": 2500}, cpu(8)]
TOTAL = {"CPU": 3.0, "GPU": 2.0}


class Leases(RuleBasedStateMachine):
    owners = Bundle("owners")
    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self.world = World(TOTAL, auto=False)
        self.held: dict[int, tuple[int, p.LeaseGranted, dict[str, int]]] = {}
        self.wanted: dict[tuple[int, int], int] = {}
        self.actors: dict[bytes, int] = {}
        self.serial = 0

    # ---------------------------------------------------------- owners

    @rule(target=owners)
    def driver_joins(self) -> int:
        return self.world.driver()

    @rule(owner=consumes(owners))
    def owner_leaves(self, owner: int) -> None:
        if owner in self.world.inbox and owner not in self.world.pid_of:
            self.world.leave(owner)

    @rule(
        owner=owners,
        class_id=st.integers(0, len(DEMANDS) - 1),
        count=st.integers(0, 4),
        env=st.sampled_from([b"", b"\x80"]),
    )
    def demand(self, owner: int, class_id: int, count: int, env: bytes) -> None:
        if owner in self.world.inbox:
            self.wanted[owner, class_id] = count
            self.world.send(owner, p.LeaseDemand(class_id, DEMANDS[class_id], count, env, b"", "f"))

    @rule(target=grants, data=st.data())
    def collect(self, data: st.DataObject) -> int:
        self._collect()
        return data.draw(st.sampled_from(sorted(self.held))) if self.held else 0

    @rule(lease=grants, reusable=st.booleans())
    def give_back(self, lease: int, reusable: bool) -> None:
        owner, _, _ = self.held.pop(lease, (0, None, None))
        if owner in self.world.inbox:
            self.world.send(owner, p.LeaseReturn(lease, reusable))

    @rule(lease=grants, blocked=st.booleans())
    def block(self, lease: int, blocked: bool) -> None:
        _, grant, _ = self.held.get(lease, (0, None, None))
        if grant is not None and grant.proc in self.world.inbox:
            self.world.send(grant.proc, p.Blocked() if blocked else p.Unblocked())

    @rule(lease=grants)
    def keep(self, lease: int) -> None:
        owner, _, _ = self.held.get(lease, (0, None, None))
        if owner in self.world.inbox:
            self.world.send(owner, p.LeaseKept(lease))

    @rule(lease=grants)
    def retire(self, lease: int) -> None:
        _, grant, _ = self.held.pop(lease, (0, None, None))
        if grant is not None and grant.proc in self.world.inbox:
            self.world.send(grant.proc, p.Retired())

    @rule(target=owners, lease=grants)
    def worker_becomes_owner(self, lease: int) -> int:
        _, grant, _ = self.held.get(lease, (0, None, None))
        return grant.proc if grant is not None else 0

    # ---------------------------------------------------------- actors

    @rule(
        owner=owners, run=st.sampled_from([{}, cpu(1), gpu(0.5)]), restarts=st.integers(-1, 2), detached=st.booleans()
    )
    def create_actor(self, owner: int, run: dict[str, int], restarts: int, detached: bool) -> None:
        if owner in self.world.inbox:
            self.serial += 1
            self.actors[actor_id(owner, self.serial)] = owner
            self.world.send(owner, create(owner, self.serial, run=run, max_restarts=restarts, detached=detached))

    @rule(data=st.data(), no_restart=st.booleans())
    def kill_actor(self, data: st.DataObject, no_restart: bool) -> None:
        if self.actors and self.world.inbox:
            actor = data.draw(st.sampled_from(sorted(self.actors)))
            self.world.send(next(iter(self.world.inbox)), p.ActorKill(actor, no_restart))

    # ---------------------------------------------------------- the world

    @rule(
        data=st.data(),
        fate=st.sampled_from(["fork", "fork", "fork", "join", "join", "join", "fail", "die", "reap", "zygote"]),
    )
    def something_happens(self, data: st.DataObject, fate: str) -> None:
        world = self.world
        pools = {
            "fork": world.forking,
            "fail": world.forking,
            "join": world.joinable,
            "die": dict.fromkeys(world.running.values()),
            "reap": {world.running[pid]: None for pid in world.killed},
            "zygote": {0: None},
        }
        if not (pool := sorted(pools[fate])):
            return
        proc = data.draw(st.sampled_from(pool))
        match fate:
            case "fork":
                world.forked(proc)
            case "fail":
                del world.forking[proc]
                world.feed(events.ForkFailed(proc, "no memory"))
            case "join":
                world.join(proc)
            case "die" | "reap":
                world.die(proc)
            case "zygote":
                world.forking.clear()
                world.feed(events.ZygoteLost("killed"))

    @rule(seconds=st.sampled_from([0.01, 0.5, 3.0, 11.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    # ---------------------------------------------------------- what must be true

    def _collect(self) -> None:
        world = self.world
        for proc in list(world.inbox):
            for grant in world.take(proc, p.LeaseGranted):
                assert isinstance(grant, p.LeaseGranted)
                assert grant.lease not in self.held, "granted twice"
                self.held[grant.lease] = (proc, grant, DEMANDS[grant.class_id])
            for died in world.take(proc, p.WorkerDied):
                assert isinstance(died, p.WorkerDied)
                if died.lease:
                    self.held.pop(died.lease, None)
        for lease, (owner, grant, _) in list(self.held.items()):
            if owner not in world.inbox or grant.proc not in world.running.values():
                self.held.pop(lease)

    @invariant()
    def what_owners_hold_is_theirs_alone(self) -> None:
        self._collect()
        procs = [grant.proc for _, grant, _ in self.held.values()]
        assert len(procs) == len(set(procs)), "a worker was given to two owners"
        shares: dict[int, int] = {}
        for _, grant, asked in self.held.values():
            gpus = asked.get("GPU", 0)
            for device in grant.gpu_ids:
                shares[device] = shares.get(device, 0) + min(gpus, UNIT)
        assert all(share <= UNIT for share in shares.values()), "a device was given twice"

    @invariant()
    def no_actor_lives_twice(self) -> None:
        homes: dict[bytes, list[int]] = {}
        for proc, box in self.world.inbox.items():
            for message in box:
                if isinstance(message, p.ActorInit) and proc in self.world.running.values():
                    homes.setdefault(message.actor, []).append(message.incarnation)
        assert all(len(lives) == 1 for lives in homes.values()), "two lives at once"

    def teardown(self) -> None:
        """Faults stop; everything under way ends; then nothing that fits may wait."""
        world = self.world
        for _ in range(50):
            world.settle()
            world.advance(1.0)
            if not (world.forking or world.joinable or world.killed):
                break
        stats = world.node.leases.statistics()
        assert stats["leases_starting"] == 0, "a worker is missing"
        for proc in list(world.inbox):
            if proc in world.inbox and proc not in world.pid_of:
                world.leave(proc)
        for actor in self.actors:
            if world.control.actors.get(actor):
                spare = world.driver()
                world.send(spare, p.ActorKill(actor, no_restart=True))
                world.leave(spare)
        world.settle()
        assert world.node.leases.ledger.free == world.node.leases.ledger.total
        assert world.node.leases.statistics()["leases"] == 0
        states = world.control.actors.statistics()
        assert states["actors"] == states["actors_dead"]


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
