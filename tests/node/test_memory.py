"""The memory watch: when it looks, whom it ends, and how slowly what was ended comes back."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray import _protocol as p
from ray._control.demands import ACTORS
from ray._node import events, memory
from ray._node.config import MemorySettings, read_memory_settings
from ray._node.memory_victims import Tenant, choose
from tests.node.simulated import World, actor_id, cpu, create

MIB = 1 << 20
GIB = 1 << 30
WATCH = MemorySettings(threshold=0.9, look_s_max=1.0)


def watched(cpus: int = 4, *, auto: bool = True, limit: int = GIB) -> World:
    world = World({"CPU": cpus}, memory=WATCH, auto=auto)
    world.memory_limit = limit
    return world


def lend(world: World, owner: int, count: int = 1, class_id: int = 1, *, retriable: bool = True, label: str = "f"):
    """Workers of one class, in the order in which they were lent."""
    world.send(owner, p.LeaseDemand(class_id, cpu(1), count, b"", b"", label, retriable))
    return world.take(owner, p.LeaseGranted)


def grow(world: World, grant: p.LeaseGranted, held: int) -> None:
    world.memory_of[grant.pid] = held


def deaths(world: World, owner: int) -> list[p.WorkerDied]:
    return world.take(owner, p.WorkerDied)  # type: ignore[return-value]


def ended(world: World, owner: int) -> list[int]:
    return [died.proc for died in deaths(world, owner)]


# -- When it looks --------------------------------------------------------------------------------


def test_nobody_looks_while_no_worker_is_lent():
    world = watched()
    driver = world.driver()
    world.advance(100)
    assert world.looks == 0
    (grant,) = lend(world, driver)
    world.advance(10)
    assert world.looks > 0
    world.send(driver, p.LeaseReturn(grant.lease))
    world.advance(2)
    before = world.looks
    world.advance(1000)
    assert world.looks == before
    assert world.node.memory.next_deadline() is None


def test_the_nearer_the_limit_the_more_often_it_is_looked():
    looks = {}
    for held in (0, 33 * GIB, 35 * GIB + 900 * MIB):
        world = watched(limit=40 * GIB)
        (grant,) = lend(world, world.driver())
        grow(world, grant, held)
        world.advance(10)
        before = world.looks
        world.advance(10)
        looks[held] = world.looks - before
    far, nearer, near = looks.values()
    assert far == 10
    assert far < nearer < near
    assert near <= 10 / memory.LOOK_S_MIN


def test_a_stall_is_looked_at_at_once_if_anybody_works():
    world = watched(limit=1 << 40)
    world.feed(events.MemoryStalled())
    world.advance(0)
    assert world.looks == 0
    lend(world, world.driver())
    world.advance(5)
    before = world.looks
    world.feed(events.MemoryStalled())
    world.advance(0)
    assert world.looks == before + 1


def test_the_watch_can_be_switched_off():
    world = World({"CPU": 1}, memory=MemorySettings(look_s_max=0))
    driver = world.driver()
    (grant,) = lend(world, driver)
    grow(world, grant, 2 * GIB)
    world.advance(100)
    assert world.looks == 0
    assert ended(world, driver) == []


# -- Whom it ends ---------------------------------------------------------------------------------


def test_the_newest_of_the_owner_with_most_workers_ends():
    world = watched(8)
    many, few = world.driver(), world.driver()
    grants = []
    for owner, held in ((many, 230), (many, 190), (many, 130), (few, 200), (few, 240)):
        (grant,) = lend(world, owner)
        world.memory_of[grant.pid] = 0
        grants.append((grant, held * MIB))
        world.advance(2)
    for grant, held in grants:
        grow(world, grant, held)
    world.advance(1)
    (died,) = deaths(world, many)
    assert died.proc == grants[2][0].proc, "not the largest, nor the newest of all"
    assert (died.oom, died.intended, died.retry, died.exit_code) == (True, False, p.RETRY_FREE, -9)
    assert ended(world, few) == []


def test_of_equally_new_ones_the_largest_ends():
    world = watched()
    driver = world.driver()
    grants = lend(world, driver, 4)
    for grant, held in zip(grants, (220, 320, 210, 200), strict=True):
        grow(world, grant, held * MIB)
    world.advance(0.2)
    assert ended(world, driver) == [grants[1].proc]


def test_the_text_says_who_used_what_and_what_to_do():
    world = watched()
    driver = world.driver()
    world.memory_of[99_999] = 100 * MIB  # somebody else's
    for grant in lend(world, driver, 2, label="train"):
        grow(world, grant, 420 * MIB)
    world.advance(1)
    (died,) = deaths(world, driver)
    for part in ("420.0 MiB", "task train", "localhost (127.0.0.1)", "of 1.0 GiB", "limit of the machine", "90%"):
        assert part in died.cause
    table = died.cause[died.cause.index("What had most") : died.cause.index("What helps")].splitlines()
    assert [line.split()[0] for line in table[2:4]] == [str(pid) for pid in sorted(set(world.memory_of) - {99_999})]
    assert [line.split()[1] for line in table[2:5]] == ["0.410", "0.410", "0.098"]
    for remedy in ("num_cpus", "memory=", "RAY_memory_usage_threshold", "RAY_memory_monitor_refresh_ms=0"):
        assert remedy in died.cause
    assert any("Memory was short" in notice.text for notice in world.take(driver, p.Notice))


def test_what_may_not_be_repeated_is_spared_while_something_may():
    world = watched()
    driver = world.driver()
    old = lend(world, driver, 2)
    world.advance(5)
    (precious,) = lend(world, driver, 1, 2, retriable=False)
    for grant in (*old, precious):
        grow(world, grant, 330 * MIB)
    world.advance(1)
    (died,) = ended(world, driver)
    assert died in {grant.proc for grant in old}


def test_a_worker_that_holds_next_to_nothing_is_spared():
    world = watched(8)
    driver = world.driver()
    (hog,) = lend(world, driver, 1, 2, retriable=False)
    world.advance(5)
    small = lend(world, driver, 5)
    grow(world, hog, 990 * MIB)
    for grant in small:
        grow(world, grant, 4 * MIB)
    world.advance(1)
    assert ended(world, driver) == [hog.proc]


def test_who_is_alone_fails_for_good():
    world = watched()
    driver = world.driver()
    (grant,) = lend(world, driver)
    grow(world, grant, GIB)
    world.advance(1)
    (died,) = deaths(world, driver)
    assert (died.oom, died.retry) == (True, p.RETRY_NEVER)
    assert "same end" in died.cause


def test_who_is_alone_beside_something_larger_has_its_retries():
    world = watched()
    driver = world.driver()
    (grant,) = lend(world, driver)
    world.memory_of[99_999] = 800 * MIB
    grow(world, grant, 200 * MIB)
    world.advance(1)
    (died,) = deaths(world, driver)
    assert (died.oom, died.retry) == (True, p.RETRY_CHARGED)
    assert "at the expense of its max_retries" in died.cause
    assert lend(world, driver) == [], "and not at once"


def test_an_actor_with_restarts_left_ends_before_a_lonely_task_and_starts_again_after_a_pause():
    world = watched()
    driver, other = world.driver(), world.driver()
    world.send(driver, create(driver, 1, max_restarts=1, label="Model"))
    actor = world.control.actors.get(actor_id(driver, 1))
    assert actor is not None
    world.advance(5)
    (task,) = lend(world, other)
    grow(world, task, 500 * MIB)
    first_life = actor.proc
    world.memory_of[actor.pid] = 500 * MIB
    world.advance(1)
    assert ended(world, other) == []
    assert actor.incarnation == 1
    assert actor.proc == 0, "it waits"
    assert "memory was short" in world.node.leases.why_actor(actor.id)
    assert "held 500.0 MiB" in actor.cause.decode()
    world.memory_of[task.pid] = 100 * MIB
    world.advance(memory.PAUSE_S + 1)
    assert actor.proc not in (0, first_life)


def test_nobody_worth_ending_is_said_once():
    world = watched()
    driver = world.driver()
    (grant,) = lend(world, driver)
    grow(world, grant, 1 * MIB)
    world.memory_of[99_999] = GIB
    world.advance(30)
    assert ended(world, driver) == []
    assert len([x for x in world.take(driver, p.Notice) if "no worker holds enough" in x.text]) == 1


def test_only_one_is_ended_at_a_time():
    world = watched(auto=False)
    driver = world.driver()
    lend(world, driver, 4)
    world.settle()
    grants = world.take(driver, p.LeaseGranted)
    for grant in grants:
        grow(world, grant, GIB)
    world.advance(memory.END_S - 0.5)
    assert len(world.killed) == 1
    world.advance(2)
    assert len(world.killed) == 2, "one that does not end is waited for no longer than that"
    assert any("still has not" in line for line in world.logs)


def test_memory_that_is_not_back_yet_costs_no_second_worker():
    world = watched()
    driver = world.driver()
    first, second = lend(world, driver, 2)
    grow(world, first, 500 * MIB)
    grow(world, second, 500 * MIB)
    world.memory_of[99_999] = 0
    world.now += memory.LOOK_S_MIN
    world.feed(events.MemoryRead((events.MemoryUse("x", GIB, GIB),), (events.ProcessUse(first.pid, 500 * MIB, ""),)))
    assert ended(world, driver) == [first.proc]
    still = events.MemoryRead((events.MemoryUse("x", GIB, GIB),), (events.ProcessUse(second.pid, 500 * MIB, ""),))
    for _ in range(5):
        world.now += 0.1
        world.feed(still)
    assert ended(world, driver) == []
    world.now += memory.SETTLE_S
    world.feed(still)
    assert ended(world, driver) == [second.proc]


def test_a_worker_that_ended_by_itself_just_before_is_not_said_to_be_killed():
    world = watched(auto=False)
    driver = world.driver()
    lend(world, driver, 2)
    world.settle()
    grants = world.take(driver, p.LeaseGranted)
    for grant in grants:
        grow(world, grant, 600 * MIB)
    world.advance(0.2)
    (doomed,) = [grant for grant in grants if grant.pid in world.killed]
    world.die(doomed.proc, 3)
    (died,) = deaths(world, driver)
    assert (died.exit_code, died.oom, died.retry) == (3, False, p.RETRY_CHARGED)
    assert "exited with code 3" in died.cause


def test_what_the_kernel_ended_is_named():
    world = watched(auto=False)
    driver = world.driver()
    lend(world, driver)
    world.settle()
    (grant,) = world.take(driver, p.LeaseGranted)
    world.oom_kill = "control group /pod"
    world.die(grant.proc)
    (died,) = deaths(world, driver)
    assert (died.oom, died.retry) == (True, p.RETRY_CHARGED)
    assert "control group /pod" in died.cause


# -- How it comes back ----------------------------------------------------------------------------


def hogs(world: World, driver: int, count: int) -> list[p.LeaseGranted]:
    """As many workers of a class as fit, of which one is too many, and the demand for another in its place."""
    grants = lend(world, driver, count)
    for grant in grants:
        grow(world, grant, 1000 * MIB // count)
    world.advance(0.2)
    (died,) = deaths(world, driver)
    left = [grant for grant in grants if grant.proc != died.proc]
    assert lend(world, driver) == [], "the place of the dead stays empty for now"
    return left


def test_a_repeated_task_waits_for_room_and_says_so():
    world = watched()
    driver = world.driver()
    left = hogs(world, driver, 4)
    assert "memory was short" in world.node.leases.why(driver, 1)
    world.advance(30)
    assert world.take(driver, p.LeaseGranted) == [], "there is no room: what is left and one more would be too much"
    world.memory_of[left[0].pid] = 10 * MIB
    world.advance(memory.PAUSE_S + 1)
    assert len(world.take(driver, p.LeaseGranted)) == 1


def test_other_demands_are_not_held_up():
    world = watched()
    driver, other = world.driver(), world.driver()
    hogs(world, driver, 4)
    assert len(lend(world, other)) == 1


def test_a_lease_that_comes_back_goes_to_the_one_who_waits():
    world = watched()
    driver = world.driver()
    left = hogs(world, driver, 2)
    world.memory_of.pop(left[0].pid)
    world.send(driver, p.LeaseReturn(left[0].lease))
    assert len(world.take(driver, p.LeaseGranted)) == 1


def test_the_pause_doubles_with_each_loss():
    world = watched()
    driver, bystander = world.driver(), world.driver()
    (calm,) = lend(world, bystander)
    grow(world, calm, 20 * MIB)
    pauses = []
    grants = lend(world, driver, 2)
    for _ in range(5):
        for grant in grants:
            grow(world, grant, 480 * MIB)
        world.advance(0.2)
        (died,) = ended(world, driver)
        lost_at = world.now
        kept = next(grant for grant in grants if grant.proc != died)
        grow(world, kept, 10 * MIB)
        grants = [kept, *lend(world, driver)]
        while len(grants) < 2:
            world.advance(0.5)
            grants += world.take(driver, p.LeaseGranted)
        pauses.append(world.now - lost_at)
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(pauses)), pauses


def test_a_limit_is_forgotten_after_a_while():
    world = watched()
    driver = world.driver()
    left = hogs(world, driver, 4)
    for grant in left:
        grow(world, grant, 10 * MIB)
    world.advance(memory.FORGET_S + 5)
    assert world.node.leases._limits == {}


def test_who_lost_every_worker_starts_again_though_there_is_no_room():
    """Else a machine that others fill would never run it again."""
    world = watched()
    driver, bystander = world.driver(), world.driver()
    (calm,) = lend(world, bystander)
    grow(world, calm, 60 * MIB)
    world.send(driver, create(driver, 1, max_restarts=-1))
    actor = world.control.actors.get(actor_id(driver, 1))
    assert actor is not None
    world.memory_of[99_999] = 800 * MIB
    world.memory_of[actor.pid] = 200 * MIB
    world.advance(0.2)
    assert actor.proc == 0
    world.advance(memory.HOLD_S_MAX - 5)
    assert actor.proc == 0
    world.advance(10)
    assert actor.proc != 0


def test_an_owner_that_leaves_takes_its_limit_along():
    world = watched()
    driver = world.driver()
    hogs(world, driver, 4)
    world.leave(driver)
    assert world.node.leases._limits == {}
    world.advance(memory.FORGET_S * 2)  # validators look on


# -- Properties -----------------------------------------------------------------------------------

tenants_ = st.builds(
    lambda proc, owner, actor, since, retriable: Tenant(
        proc, proc, (ACTORS, bytes([proc % 256])) if actor else (owner, 1), owner, 1, "f", since, retriable
    ),
    st.integers(1, 200),
    st.integers(1, 4),
    st.booleans(),
    st.floats(0, 10, allow_nan=False),
    st.booleans(),
)


@given(
    st.lists(tenants_, max_size=12, unique_by=lambda tenant: tenant.proc),
    st.dictionaries(st.integers(1, 200), st.integers(0, GIB), max_size=200),
    st.randoms(use_true_random=False),
)
def test_the_choice_is_worth_it_fair_and_independent_of_the_order(tenants, held, rng):
    victim = choose(tenants, held, GIB)
    shuffled = list(tenants)
    rng.shuffle(shuffled)
    assert choose(shuffled, held, GIB) == victim
    largest = max((held.get(tenant.pid, 0) for tenant in tenants), default=0)
    if victim is None:
        assert largest < GIB * 0.01
        return
    assert victim.bytes == held[victim.tenant.pid] >= max(largest * 0.1, GIB * 0.01)
    worthy = [x for x in tenants if held.get(x.pid, 0) >= max(largest * 0.1, GIB * 0.01)]
    peers = [x for x in worthy if not x.is_actor and x.owner == victim.tenant.owner and x is not victim.tenant]
    if victim.retry == p.RETRY_FREE:
        assert peers
    if not victim.tenant.retriable:
        assert not any(x.retriable for x in worthy), "what may be repeated goes first"
    if victim.retry == p.RETRY_CHARGED:
        assert victim.tenant.is_actor or (not peers and victim.bytes < GIB // 2)
    if victim.retry == p.RETRY_NEVER:
        assert victim.bytes >= GIB // 2
        assert not victim.tenant.is_actor
        assert not peers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32))
def test_whatever_happens_the_guilty_only_are_ended_and_everybody_works_in_the_end(seed):
    """Safety: nobody is ended while less than the threshold is used, and never two at a time (by the validators and
    by `killed`). Convergence: once nobody uses much, every demand that fits is met within a bounded time.
    """
    rng = random.Random(seed)
    world = watched(rng.randrange(1, 6), auto=rng.random() < 0.7)
    drivers = [world.driver() for _ in range(rng.randrange(1, 4))]
    grants: dict[int, tuple[int, p.LeaseGranted]] = {}
    peak = rng.choice([50, 300, 900]) * MIB
    for _ in range(rng.randrange(5, 60)):
        match rng.randrange(6):
            case 0:
                demand = p.LeaseDemand(rng.randrange(3), cpu(1), rng.randrange(4), retriable=rng.random() < 0.7)
                world.send(rng.choice(drivers), demand)
            case 1 if grants:
                owner, grant = grants.pop(rng.choice(list(grants)))
                world.memory_of.pop(grant.pid, None)
                world.send(owner, p.LeaseReturn(grant.lease))
            case 2 if world.killed or world.joinable or world.forking:
                world.settle()
            case _:
                for _, grant in grants.values():
                    world.memory_of[grant.pid] = rng.randrange(peak)
                total = sum(held for pid, held in world.memory_of.items() if pid in world.running)
                before = world.node.memory.statistics()["memory_evictions"]
                pending = world.node.memory._eviction is not None
                world.advance(rng.choice([0.05, 0.3, 2.0, 30.0]))
                if total <= world.memory_limit * WATCH.threshold and not pending:
                    assert world.node.memory.statistics()["memory_evictions"] == before
        for driver in drivers:
            for grant in world.take(driver, p.LeaseGranted):
                grants[grant.proc] = (driver, grant)
            for died in deaths(world, driver):
                grants.pop(died.proc, None)
    world.memory_of.clear()
    world.settle()
    world.auto = True
    for driver, grant in grants.values():
        world.send(driver, p.LeaseReturn(grant.lease))
    for _ in range(20):
        world.advance(memory.FORGET_S)
        for driver in drivers:
            for grant in world.take(driver, p.LeaseGranted):
                world.send(driver, p.LeaseReturn(grant.lease))
    assert world.node.leases.statistics()["leases_wanted"] == 0


# -- Settings -------------------------------------------------------------------------------------


def test_settings_have_ray_s_names():
    environ = {
        "RAY_memory_usage_threshold": "0.5",
        "RAY_memory_monitor_refresh_ms": "250",
        "RAY_memory_limit_bytes": "600e6",
    }
    assert read_memory_settings(environ) == MemorySettings(0.5, 0.25, 600_000_000)
    assert read_memory_settings({}) == MemorySettings(0.95, 1.0, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RAY_memory_usage_threshold", "95"),
        ("RAY_memory_usage_threshold", "0"),
        ("RAY_memory_usage_threshold", "nan"),
        ("RAY_memory_monitor_refresh_ms", "-1"),
        ("RAY_memory_monitor_refresh_ms", "often"),
        ("RAY_memory_limit_bytes", "inf"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=name):
        read_memory_settings({name: text})
