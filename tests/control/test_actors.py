"""Actors: behaviours one by one, as creators, callers and workers see them."""

from __future__ import annotations

import pytest

from ray import _protocol as p
from ray._control import actors as control
from tests.node.simulated import NODE, World, actor_id, cpu, create, gpu


def states(world: World, proc: int) -> list[p.ActorState]:
    return world.take(proc, p.ActorState)  # type: ignore[return-value]


def home(world: World, actor: bytes) -> tuple[int, p.ActorInit]:
    """The living worker that was last told to be this actor."""
    found = [
        (proc, m) for proc, box in world.inbox.items() for m in box if isinstance(m, p.ActorInit) and m.actor == actor
    ]
    (place,) = found
    return place


def ready(world: World, actor: bytes) -> int:
    proc, init = home(world, actor)
    world.send(proc, p.ActorReady(actor, init.incarnation))
    return proc


def alive(world: World, driver: int, serial: int = 1, **changes: object) -> tuple[bytes, int]:
    world.send(driver, create(driver, serial, **changes))
    actor = actor_id(driver, serial)
    proc = ready(world, actor)
    states(world, driver)
    return actor, proc


def test_a_new_actor_is_told_its_specification_and_then_its_creator_that_it_lives():
    world = World()
    driver = world.driver()
    world.send(driver, create(driver, 1, name="n", namespace="space"))
    proc, init = home(world, actor_id(driver, 1))
    assert init == p.ActorInit(actor_id(driver, 1), 0, b"spec", [], "space", "n")
    world.send(proc, p.ActorReady(init.actor, 0))
    (state,) = states(world, driver)
    assert (state.state, state.proc, state.node, state.incarnation) == (p.ACTOR_ALIVE, proc, NODE, 0)
    assert state.pid == world.pid_of[proc]


def test_a_subscriber_hears_the_present_and_every_change():
    world = World()
    driver, caller = world.driver(), world.driver()
    actor, proc = alive(world, driver, max_restarts=1)
    world.send(caller, p.ActorSubscribe(actor))
    world.die(proc)
    ready(world, actor)
    world.die(home(world, actor)[0])
    heard = [(x.state, x.incarnation, x.restarts_left) for x in states(world, caller)]
    assert heard == [
        (p.ACTOR_ALIVE, 0, 1),
        (p.ACTOR_RESTARTING, 1, 0),
        (p.ACTOR_ALIVE, 1, 0),
        (p.ACTOR_DEAD, 1, 0),
    ]


def test_a_subscription_may_come_before_the_creation():
    world = World()
    driver, caller = world.driver(), world.driver()
    actor = actor_id(driver, 1)
    world.send(caller, p.ActorSubscribe(actor))
    assert [x.state for x in states(world, caller)] == [p.ACTOR_PENDING]
    world.send(driver, create(driver, 1))
    ready(world, actor)
    assert [x.state for x in states(world, caller)] == [p.ACTOR_ALIVE]


def test_a_subscriber_to_an_actor_that_is_never_created_hears_of_its_creator_s_end():
    world = World()
    driver, caller = world.driver(), world.driver()
    world.send(caller, p.ActorSubscribe(actor_id(driver, 1)))
    world.leave(driver)
    assert [x.state for x in states(world, caller)] == [p.ACTOR_PENDING, p.ACTOR_DEAD]
    world.send(caller, p.ActorSubscribe(actor_id(driver, 2)))
    assert "not known" in states(world, caller)[0].cause.decode()


def test_a_failing_constructor_is_final_and_its_error_goes_to_callers():
    world = World()
    driver = world.driver()
    world.send(driver, create(driver, 1, max_restarts=5))
    proc, _ = home(world, actor_id(driver, 1))
    world.send(proc, p.ActorFailed(actor_id(driver, 1), 0, b"payload"))
    (state,) = states(world, driver)
    assert (state.state, state.cause_kind, state.cause) == (p.ACTOR_DEAD, p.CAUSE_INIT_ERROR, b"payload")
    assert world.running == {}


def test_the_death_of_an_actor_says_what_happened_and_what_to_do():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver)
    world.die(proc, -9, "loading", "half way")
    (state,) = states(world, driver)
    text = state.cause.decode()
    for part in ("Counter", f"pid {world.pid_of[proc]}", "SIGKILL", "half way", "max_restarts", actor.hex()):
        assert part in text


def test_restarts_end_when_they_are_used_up():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver, max_restarts=2)
    for _ in range(2):
        world.die(proc)
        proc = ready(world, actor)
    world.die(proc)
    assert states(world, driver)[-1].state == p.ACTOR_DEAD
    assert "all 2 restarts" in world.control.actors.get(actor).cause.decode()  # type: ignore[union-attr]


def test_a_restart_begins_only_when_the_old_process_was_reaped():
    world = World(auto=False)
    driver = world.driver()
    world.send(driver, create(driver, 1, max_restarts=-1))
    world.settle()
    proc = ready(world, actor_id(driver, 1))
    world.send(driver, p.ActorKill(actor_id(driver, 1), no_restart=False))
    assert world.forking == {}
    world.die(proc)
    assert len(world.forking) == 1


def test_kill_without_restart_is_final_and_with_restart_is_not():
    world = World()
    driver = world.driver()
    actor, first = alive(world, driver, max_restarts=-1)
    world.send(driver, p.ActorKill(actor, no_restart=False))
    second = ready(world, actor)
    assert second != first
    world.send(driver, p.ActorKill(actor, no_restart=True))
    last = states(world, driver)[-1]
    assert last.state == p.ACTOR_DEAD
    assert "ray.kill" in last.cause.decode()


def test_a_kill_while_pending_needs_no_process():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, create(driver, 1, run=gpu(1)))
    world.send(driver, p.ActorKill(actor_id(driver, 1), no_restart=True))
    assert [x.state for x in states(world, driver)] == [p.ACTOR_DEAD]
    assert world.node.leases.statistics()["demands_waiting"] == 0


def test_an_announced_exit_is_not_a_crash():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver, max_restarts=-1)
    world.send(proc, p.ActorExit(actor, 0, "exit_actor was called"))
    world.die(proc, 0)
    (state,) = states(world, driver)
    assert state.state == p.ACTOR_DEAD
    assert "exit_actor was called" in state.cause.decode()
    world.send(driver, p.PeerLost(proc))
    (died,) = world.take(driver, p.WorkerDied)
    assert died.intended  # type: ignore[attr-defined]


def test_without_handles_an_actor_finishes_its_calls_and_ends():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver)
    world.send(driver, p.ActorRelease(actor))
    assert world.take(proc, p.ActorStop) == [p.ActorStop(actor)]
    assert proc in world.running.values()
    world.send(proc, p.ActorExit(actor, 0, "stopped"))
    world.die(proc, 0)
    assert "no handle" in states(world, driver)[-1].cause.decode()


def test_without_handles_an_actor_that_is_being_killed_is_not_restarted():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver, max_restarts=-1)
    world.auto = False
    world.send(driver, p.ActorKill(actor, no_restart=False))
    world.send(driver, p.ActorRelease(actor))
    world.auto = True
    world.die(proc)
    assert states(world, driver)[-1].state == p.ACTOR_DEAD


def test_only_the_owner_may_say_that_no_handle_is_left():
    world = World()
    driver, other = world.driver(), world.driver()
    actor, proc = alive(world, driver)
    world.send(other, p.ActorRelease(actor))
    assert world.take(proc, p.ActorStop) == []


def test_actors_die_with_their_owner_unless_they_are_detached():
    world = World()
    driver = world.driver()
    _, first = alive(world, driver, 1)
    _, second = alive(world, driver, 2, detached=True, name="keeper")
    world.send(driver, create(driver, 3, run=gpu(1)))
    world.leave(driver)
    assert list(world.running.values()) == [second]
    assert first not in world.inbox
    assert world.node.leases.statistics()["demands_waiting"] == 0


def test_a_detached_actor_is_restarted_after_its_creator_has_gone():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver, detached=True, name="keeper", max_restarts=-1)
    world.leave(driver)
    world.die(proc)
    assert ready(world, actor) != proc


def test_messages_of_an_earlier_life_are_ignored():
    world = World()
    driver = world.driver()
    actor, proc = alive(world, driver, max_restarts=1)
    world.die(proc)
    new, _ = home(world, actor)
    world.send(new, p.ActorReady(actor, 0))
    assert world.control.actors.statistics()["actors_starting"] == 1
    world.send(driver, p.ActorFailed(actor, 1, b"lie"))
    assert world.control.actors.statistics()["actors_starting"] == 1


def test_a_name_belongs_to_one_actor_per_namespace_until_it_is_dead():
    world = World()
    driver = world.driver()
    assert world.request(driver, "actor.reserve_name", "counter", "space", actor_id(driver, 1), b"meta")
    _, proc = alive(world, driver, 1, name="counter", namespace="space")
    with pytest.raises(ValueError, match=r"'counter' in namespace 'space' is taken by Counter actor"):
        world.request(driver, "actor.reserve_name", "counter", "space", actor_id(driver, 2))
    found = world.request(driver, "actor.by_name", "counter", "space")
    assert found["actor"] == actor_id(driver, 1)  # type: ignore[index]
    assert found["meta"] == b"meta"  # type: ignore[index]
    assert found["state"] == "ALIVE"  # type: ignore[index]
    world.request(driver, "actor.reserve_name", "counter", "elsewhere", actor_id(driver, 3))
    world.die(proc)
    assert world.request(driver, "actor.reserve_name", "counter", "space", actor_id(driver, 2))


def test_names_are_listed_once_their_actor_exists():
    world = World()
    driver = world.driver()
    world.request(driver, "actor.reserve_name", "later", "a", actor_id(driver, 9))
    alive(world, driver, 1, name="x", namespace="b")
    alive(world, driver, 2, name="y", namespace="a")
    assert world.request(driver, "actor.list_named", None) == [
        {"name": "y", "namespace": "a"},
        {"name": "x", "namespace": "b"},
    ]
    assert world.request(driver, "actor.list_named", "b") == [{"name": "x", "namespace": "b"}]
    with pytest.raises(ValueError, match="There are: x"):
        world.request(driver, "actor.by_name", "nobody", "b")


def test_a_reservation_falls_with_who_made_it():
    world = World()
    driver, other = world.driver(), world.driver()
    world.request(driver, "actor.reserve_name", "n", "", actor_id(driver, 1))
    world.leave(driver)
    assert world.request(other, "actor.reserve_name", "n", "", actor_id(other, 1))


def test_a_name_taken_without_reservation_makes_the_second_actor_die_with_the_reason():
    world = World()
    driver = world.driver()
    alive(world, driver, 1, name="n")
    world.send(driver, create(driver, 2, name="n"))
    (state,) = states(world, driver)
    assert state.state == p.ACTOR_DEAD
    assert "is taken" in state.cause.decode()
    assert world.request(driver, "actor.by_name", "n", "")["actor"] == actor_id(driver, 1)  # type: ignore[index]


def test_an_actor_whose_worker_cannot_start_dies_with_the_reason():
    world = World(auto=False)
    driver = world.driver()
    world.send(driver, create(driver, 1))
    for _ in range(3):
        (fork,) = world.forking
        world.forked(fork)
        world.die(fork, 1, "boom")
    (state,) = states(world, driver)
    assert state.state == p.ACTOR_DEAD
    assert "boom" in state.cause.decode()


def test_the_dead_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control, "DEAD_REMEMBERED", 3)
    world = World()
    driver = world.driver()
    for serial in range(1, 6):
        actor, _ = alive(world, driver, serial)
        world.send(driver, p.ActorKill(actor, no_restart=True))
    assert world.control.actors.statistics()["actors"] == 3
    with pytest.raises(ValueError, match="not known"):
        world.request(driver, "actor.info", actor_id(driver, 1))


def test_five_hundred_actors_need_no_cpu_each():
    world = World({"CPU": 2})
    driver = world.driver()
    for serial in range(1, 501):
        world.send(driver, create(driver, serial))
    for serial in range(1, 501):
        ready(world, actor_id(driver, serial))
    assert world.control.actors.statistics()["actors_alive"] == 500
    assert world.node.leases.ledger.free == cpu(2)
