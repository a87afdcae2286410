"""Actors under arbitrary orders of events, as their subscribers see them.

What a subscriber is told must make sense by itself: incarnations never go back, an actor is alive in one
process at a time, nothing follows its death, and nobody is left without having heard of it.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from ray import _protocol as p
from tests.node.simulated import World, actor_id, cpu, create

NAMES = st.sampled_from(["", "", "n", "m"])


class Actors(RuleBasedStateMachine):
    drivers = Bundle("drivers")
    actors = Bundle("actors")

    def __init__(self) -> None:
        super().__init__()
        self.world = World({"CPU": 2}, auto=False)
        self.serial = 0
        self.views: dict[tuple[int, bytes], list[p.ActorState]] = {}
        self.homes: dict[int, p.ActorInit] = {}
        self.restarts: dict[bytes, int] = {}

    @rule(target=drivers)
    def joins(self) -> int:
        return self.world.driver()

    @rule(driver=drivers)
    def leaves(self, driver: int) -> None:
        if driver in self.world.inbox:
            self.world.leave(driver)

    @rule(
        target=actors,
        driver=drivers,
        restarts=st.sampled_from([0, 1, 2, -1]),
        name=NAMES,
        detached=st.booleans(),
        run=st.sampled_from([{}, {}, cpu(1)]),
    )
    def create(self, driver: int, restarts: int, name: str, detached: bool, run: dict[str, int]) -> bytes:
        self.serial += 1
        actor = actor_id(driver, self.serial)
        if driver in self.world.inbox:
            self.restarts[actor] = restarts
            changes = {"max_restarts": restarts, "name": name, "detached": detached, "run": run}
            self.world.send(driver, create(driver, self.serial, **changes))
        return actor

    @rule(driver=drivers, actor=actors)
    def subscribe(self, driver: int, actor: bytes) -> None:
        if driver in self.world.inbox:
            self.views.setdefault((driver, actor), [])
            self.world.send(driver, p.ActorSubscribe(actor))

    @rule(driver=drivers, actor=actors, what=st.sampled_from(["kill", "kill-restart", "release"]))
    def act(self, driver: int, actor: bytes, what: str) -> None:
        if driver in self.world.inbox:
            release = p.ActorRelease(actor)
            message = release if what == "release" else p.ActorKill(actor, what == "kill")
            self.world.send(driver, message)

    @rule(data=st.data(), what=st.sampled_from(["ready", "ready", "ready", "fail", "exit", "crash", "crash"]))
    def worker_acts(self, data: st.DataObject, what: str) -> None:
        self._look()
        living = sorted(proc for proc in self.homes if proc in self.world.inbox)
        if not living:
            return
        proc = data.draw(st.sampled_from(living))
        init = self.homes[proc]
        match what:
            case "ready":
                self.world.send(proc, p.ActorReady(init.actor, init.incarnation))
            case "fail":
                self.world.send(proc, p.ActorFailed(init.actor, init.incarnation, b"error"))
            case "exit":
                self.world.send(proc, p.ActorExit(init.actor, init.incarnation, "done"))
            case "crash":
                self.world.die(proc, -11)

    @rule(data=st.data())
    def world_moves(self, data: st.DataObject) -> None:
        world = self.world
        moves = [("fork", x) for x in sorted(world.forking)] + [("join", x) for x in sorted(world.joinable)]
        moves += [("reap", world.running[x]) for x in sorted(world.killed)]
        if moves:
            move, proc = data.draw(st.sampled_from(moves))
            {"fork": world.forked, "join": world.join, "reap": world.die}[move](proc)

    @rule()
    def settle(self) -> None:
        self.world.settle()

    @rule(seconds=st.sampled_from([1.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    def _look(self) -> None:
        for proc in list(self.world.inbox):
            for init in self.world.take(proc, p.ActorInit):
                assert isinstance(init, p.ActorInit)
                assert proc not in self.homes, "one worker became two actors"
                self.homes[proc] = init
            for state in self.world.take(proc, p.ActorState):
                assert isinstance(state, p.ActorState)
                self.views.setdefault((proc, state.actor), []).append(state)

    @invariant()
    def what_is_told_makes_sense(self) -> None:
        self._look()
        living: dict[bytes, int] = {}
        for proc, init in self.homes.items():
            if proc in self.world.running.values():
                living[init.actor] = living.get(init.actor, 0) + 1
        assert all(count == 1 for count in living.values()), "two lives at once"
        for (_, actor), view in self.views.items():
            incarnations = [state.incarnation for state in view if state.state != p.ACTOR_DEAD or state.incarnation]
            assert incarnations == sorted(incarnations)
            limit = self.restarts.get(actor, 0)
            assert limit < 0 or all(state.incarnation <= limit for state in view)
            kinds = [state.state for state in view]
            if p.ACTOR_DEAD in kinds:
                assert set(kinds[kinds.index(p.ACTOR_DEAD) :]) == {p.ACTOR_DEAD}, "a life after death"
            for state in view:
                assert (state.state == p.ACTOR_ALIVE) == (state.proc != 0)
                assert state.state != p.ACTOR_DEAD or state.cause, "a death without a reason"

    @invariant()
    def named_actors_are_not_dead(self) -> None:
        table = self.world.control.actors
        for name in table.names.listed(None):
            actor = table.get(name.actor)
            assert actor is not None
            assert actor.state != "dead"

    def teardown(self) -> None:
        world = self.world
        world.settle()
        world.advance(30)
        world.settle()
        watcher = world.driver()
        for actor in list(self.restarts):
            world.send(watcher, p.ActorKill(actor, no_restart=True))
        world.settle()
        self.what_is_told_makes_sense()
        assert not any(proc in world.running.values() for proc in self.homes), "a killed actor lives on"
        for (proc, actor), view in self.views.items():
            if proc in world.inbox and actor in self.restarts:
                assert view[-1].state == p.ACTOR_DEAD, "a subscriber was not told of the death"
        assert len(world.control.actors.names) == 0
        assert world.node.leases.statistics()["demands_waiting"] == 0


TestActors = Actors.TestCase
TestActors.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
