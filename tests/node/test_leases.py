"""Leases and workers together, as an owner sees them."""

from __future__ import annotations

import msgspec
import pytest

from ray import _protocol as p
from ray._control import messages
from ray._node import events, fairness, leases, processes, workers
from ray._node.lease_records import GuestWithdrawn, LeasesPlaced
from ray._node.resources import Ledger
from tests.node.simulated import NODE, World, actor_id, cpu, create, gpu


def demand(class_id: int = 1, count: int = 1, asked: dict[str, int] | None = None, label: str = "f", env: bytes = b""):
    return p.LeaseDemand(class_id, cpu(1) if asked is None else asked, count, env, b"", label)


def granted(world: World, owner: int) -> list[p.LeaseGranted]:
    return world.take(owner, p.LeaseGranted)  # type: ignore[return-value]


def test_a_demand_is_granted_up_to_what_is_free_and_the_rest_as_leases_return():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=5))
    first = granted(world, driver)
    assert len(first) == 2
    assert {grant.node for grant in first} == {NODE}
    world.send(driver, p.LeaseReturn(first[0].lease))
    (third,) = granted(world, driver)
    assert third.proc == first[0].proc, "the worker is used again"


def test_a_new_count_replaces_the_old_one_and_zero_withdraws():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=5))
    first = granted(world, driver)
    world.send(driver, demand(count=0))
    world.send(driver, p.LeaseReturn(first[0].lease))
    assert granted(world, driver) == []


def test_withdrawing_while_the_worker_starts_frees_the_resources_and_keeps_the_worker():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand())
    world.send(driver, demand(count=0))
    assert world.node.leases.ledger.free == cpu(1)
    world.settle()
    assert granted(world, driver) == []
    world.send(driver, demand())
    assert len(granted(world, driver)) == 1
    assert world.forking == {}


def test_a_demand_that_lacks_a_gpu_does_not_hold_up_one_that_does_not_need_it():
    world = World({"CPU": 2, "GPU": 1})
    driver = world.driver()
    world.send(driver, demand(1, 2, gpu(1)))
    world.send(driver, demand(2, 1, cpu(1)))
    assert [grant.class_id for grant in granted(world, driver)] == [1, 2]


def test_owners_take_turns():
    world = World({"CPU": 4})
    first, second = world.driver(), world.driver()
    hog = world.driver()
    world.send(hog, demand(count=4))
    held = granted(world, hog)
    world.send(first, demand(count=100))
    world.send(second, demand(count=100))
    for grant in held:
        world.send(hog, p.LeaseReturn(grant.lease))
    assert len(granted(world, first)) == len(granted(world, second)) == 2


def test_a_large_demand_is_not_starved_by_a_stream_of_small_ones():
    world = World({"CPU": 2})
    small, large = world.driver(), world.driver()
    world.send(small, demand(count=10_000))
    held = granted(world, small)
    world.send(large, demand(asked=cpu(2)))
    for turn in range(10 * fairness.PATIENCE):
        if granted(world, large):
            break
        oldest = held.pop(turn % 2 if len(held) > 1 else 0)
        world.send(small, p.LeaseReturn(oldest.lease))
        held += granted(world, small)
        assert held or world.inbox[large], "somebody works"
    else:
        pytest.fail("the large demand was never met")


def test_a_hold_is_given_up_when_it_leads_to_nothing():
    world = World({"CPU": 2})
    stuck, small, large = world.driver(), world.driver(), world.driver()
    world.send(stuck, demand())
    assert granted(world, stuck)
    world.send(large, demand(asked=cpu(2)))
    world.send(small, demand(count=10_000))
    held = granted(world, small)
    for _ in range(10 * fairness.PATIENCE):
        if not held:
            break
        world.send(small, p.LeaseReturn(held.pop().lease))
        held += granted(world, small)
    assert held == [], "the large demand holds what becomes free"
    world.advance(fairness.HOLD_S)
    assert granted(world, small), "but not for ever"


def test_leases_are_asked_back_once_and_only_from_who_has_more():
    world = World({"CPU": 2})
    rich, poor = world.driver(), world.driver()
    world.send(rich, demand(count=2))
    world.send(poor, demand(count=50))
    (reclaim,) = world.take(rich, p.LeaseReclaim)
    world.send(poor, demand(count=51))
    assert world.take(rich, p.LeaseReclaim) == []
    world.send(rich, p.LeaseReturn(reclaim.lease))
    assert len(granted(world, poor)) == 1
    world.advance(60)
    assert world.take(rich, p.LeaseReclaim) == [], "one each is fair"


def test_when_a_lease_is_in_use_the_next_one_is_asked_for_and_what_is_not_needed_stays():
    world = World({"CPU": 3})
    rich, poor = world.driver(), world.driver()
    world.send(rich, demand(count=3))
    leases_held = [grant.lease for grant in granted(world, rich)]
    world.send(poor, demand(count=1))
    asked = []
    for _ in range(3):
        (reclaim,) = world.take(rich, p.LeaseReclaim)
        asked.append(reclaim.lease)
        world.send(rich, p.LeaseKept(reclaim.lease))
    assert sorted(asked) == leases_held
    assert world.take(rich, p.LeaseReclaim) == []
    world.send(rich, p.LeaseReturn(asked[1]))
    assert len(granted(world, poor)) == 1
    withdrawn = world.take(rich, p.LeaseReclaim)
    assert {(message.lease, message.wanted) for message in withdrawn} == {(asked[0], False), (asked[2], False)}


def test_owners_hear_that_idle_leases_are_wanted_and_when_it_is_over():
    world = World({"CPU": 2})
    driver, other = world.driver(), world.driver()
    world.send(driver, demand(1, count=2))
    (_, idle) = granted(world, driver)
    world.send(driver, demand(2))
    assert world.take(driver, p.Pressure) == [p.Pressure(True)]
    assert world.take(other, p.Pressure) == [], "it has nothing"
    world.send(driver, p.LeaseReturn(idle.lease))
    assert [grant.class_id for grant in granted(world, driver)] == [2]
    world.advance(leases.CALM_S / 2)
    world.send(driver, demand(3))
    assert world.take(driver, p.Pressure) == [], "it knows already"
    world.send(driver, demand(3, count=0))
    world.advance(leases.CALM_S / 2)
    assert world.take(driver, p.Pressure) == []
    world.advance(leases.CALM_S)
    assert world.take(driver, p.Pressure) == [p.Pressure(False)]


def test_asking_for_what_is_in_use_ends_when_shares_are_equal():
    world = World({"CPU": 4})
    rich, poor = world.driver(), world.driver()
    world.send(rich, demand(count=4))
    granted(world, rich)
    world.send(poor, demand(count=50))
    asked: set[int] = set()
    while reclaims := [x for x in world.take(rich, p.LeaseReclaim) if x.wanted]:
        for reclaim in reclaims:
            asked.add(reclaim.lease)
            world.send(rich, p.LeaseKept(reclaim.lease))
    for count, lease in enumerate(sorted(asked)[:2], 1):
        world.send(rich, p.LeaseReturn(lease))
        asked.remove(lease)
        assert len(granted(world, poor)) == 1, count
    assert {x.lease for x in world.take(rich, p.LeaseReclaim) if not x.wanted} == asked


def test_an_owner_that_needs_its_lease_keeps_it_for_a_quantum():
    world = World({"CPU": 1})
    first, second = world.driver(), world.driver()
    world.send(first, demand(count=2))
    world.send(second, demand())
    assert world.take(first, p.LeaseReclaim) == []
    world.advance(fairness.QUANTUM_S)
    assert len(world.take(first, p.LeaseReclaim)) == 1


def test_another_class_of_the_same_owner_gets_its_turn():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand(1))
    world.send(driver, demand(2))
    assert [x.lease for x in world.take(driver, p.LeaseReclaim)] == [granted(world, driver)[0].lease]


def test_a_device_in_parts_is_asked_back_for_who_needs_it_whole():
    world = World({"CPU": 2, "GPU": 2})
    rich, poor = world.driver(), world.driver()
    world.send(rich, demand(1, 1, gpu(0.6)))
    world.send(rich, demand(2, 1, gpu(0.6)))
    assert len(granted(world, rich)) == 2
    world.send(poor, demand(1, 1, gpu(2)))
    assert len(world.take(rich, p.LeaseReclaim)) == 2


def test_a_blocked_worker_lends_its_cpus_and_takes_them_back():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand())
    (outer,) = granted(world, driver)
    world.send(outer.proc, demand())
    assert granted(world, outer.proc) == []
    world.send(outer.proc, p.Blocked())
    (inner,) = granted(world, outer.proc)
    world.send(outer.proc, p.Unblocked())
    assert world.node.leases.ledger.free["CPU"] == -10000
    world.send(outer.proc, p.LeaseReturn(inner.lease))
    world.send(driver, p.LeaseReturn(outer.lease))
    assert world.node.leases.ledger.free == cpu(1)


def test_a_retired_worker_gives_its_resources_back_and_is_not_used_again():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand(count=2))
    (first,) = granted(world, driver)
    world.send(first.proc, p.Retired())
    world.send(first.proc, p.Retired())
    (second,) = granted(world, driver)
    assert second.proc != first.proc
    assert world.node.pool.statistics()["workers_retired"] == 1
    world.advance(3600)
    assert world.node.pool.statistics()["workers_retired"] == 1
    world.die(first.proc, 0)
    world.advance(processes.TELL_ALL_AFTER_S)
    (told,) = world.take(driver, p.Deaths)
    assert [proc for proc, cause in told.dead if "max_calls" in cause] == [first.proc]


def test_a_worker_that_retires_when_it_was_returned_already_is_not_used_again():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    world.send(driver, p.LeaseReturn(grant.lease))
    world.send(grant.proc, p.Retired())
    world.send(driver, demand())
    (other,) = granted(world, driver)
    assert other.proc != grant.proc
    world.send(driver, p.LeaseReturn(other.lease))
    world.send(driver, demand())
    (again,) = granted(world, driver)
    assert again.proc == other.proc
    world.send(again.proc, p.Retired())
    assert world.node.leases.ledger.free == cpu(1), "the lease of a retired worker has ended, whoever got it"


def test_retired_workers_end_with_their_job():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    world.send(grant.proc, p.Retired())
    world.leave(driver)
    assert world.node.pool.statistics()["workers_retired"] == 0


def test_the_holder_of_a_dead_worker_learns_the_lease_and_the_cause():
    world = World({"CPU": 1})
    driver, other = world.driver(), world.driver()
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    world.die(grant.proc, -11, "about to crash", "Segmentation fault")
    (died,) = world.take(driver, p.WorkerDied)
    assert (died.proc, died.lease, died.exit_code, died.intended) == (grant.proc, grant.lease, -11, False)
    assert "SIGSEGV" in died.cause
    assert "about to crash" in died.cause
    assert not world.take(other, p.WorkerDied)
    world.advance(processes.TELL_ALL_AFTER_S)
    (told,) = world.take(other, p.Deaths)
    assert [proc for proc, _ in told.dead] == [grant.proc]
    assert world.node.leases.ledger.free == cpu(1)


def test_an_owner_s_death_ends_its_workers_and_theirs():
    world = World({"CPU": 4})
    driver, other = world.driver(), world.driver()
    world.send(driver, demand())
    (outer,) = granted(world, driver)
    world.send(outer.proc, demand())
    (inner,) = granted(world, outer.proc)
    world.leave(driver)
    assert world.pid_of[outer.proc] not in world.running
    assert world.pid_of[inner.proc] not in world.running
    assert world.node.leases.ledger.free == cpu(4)
    world.advance(processes.TELL_ALL_AFTER_S)
    (told,) = world.take(other, p.Deaths)
    assert {proc for proc, _ in told.dead} == {driver, outer.proc, inner.proc}


def test_idle_workers_of_a_finished_job_are_gone():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=2))
    for grant in granted(world, driver):
        world.send(driver, p.LeaseReturn(grant.lease))
    assert len(world.running) == 2
    world.leave(driver)
    assert world.running == {}


def test_a_worker_that_is_not_reusable_is_killed():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    world.send(driver, p.LeaseReturn(grant.lease, reusable=False))
    assert world.running == {}
    world.advance(processes.TELL_ALL_AFTER_S)
    (told,) = world.take(driver, p.Deaths)
    assert [proc for proc, _ in told.dead] == [grant.proc]


def test_a_lease_can_only_be_returned_by_its_owner():
    world = World({"CPU": 1})
    driver, thief = world.driver(), world.driver()
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    world.send(thief, p.LeaseReturn(grant.lease))
    assert world.node.leases.is_held(grant.lease)
    assert "not its own" in world.logs[-1]


def test_an_impossible_demand_waits_and_is_mentioned_again_and_again_more_rarely():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(asked=gpu(1), label="train"))
    (notice,) = world.take(driver, p.Notice)
    assert "train asks for GPU: 1" in notice.text
    assert "this node has 0" in notice.text
    assert "CPU: 2" in notice.text
    world.advance(600)
    assert 3 <= len(world.take(driver, p.Notice)) <= 6
    assert world.node.leases.why(driver, 1) == "needs GPU: 1; this node has 0"
    world.send(driver, demand(count=0))
    world.advance(10_000)
    assert world.take(driver, p.Notice) == []


def test_impossible_demands_that_are_alike_are_one_line_with_their_number():
    world = World({"CPU": 2})
    driver = world.driver()
    for serial in range(1, 51):
        world.send(driver, create(driver, serial, run=gpu(1), label="Trainer"))
    (notice,) = world.take(driver, p.Notice)
    assert "The actor Trainer asks" in notice.text  # type: ignore[attr-defined]
    world.advance(10)
    (notice,) = world.take(driver, p.Notice)
    assert "50 actors Trainer ask for CPU: 1, GPU: 1" in notice.text  # type: ignore[attr-defined]


def test_a_wait_for_what_others_hold_is_mentioned_after_a_while_with_the_holders():
    world = World({"CPU": 2})
    driver = world.driver()
    for serial in range(1, 6):
        world.send(driver, create(driver, serial, run=cpu(1), label="Keeper"))
    world.send(driver, demand(count=7, label="work"))
    world.advance(29)
    assert world.take(driver, p.Notice) == []
    world.advance(1)
    first, second = (notice.text for notice in world.take(driver, p.Notice))  # type: ignore[attr-defined]
    assert "3 actors Keeper have waited for 30 seconds" in first
    assert "2 of 2 are in use by Keeper (pid 1), Keeper (pid 2)" in first
    assert "About 7 tasks work have waited" in second
    world.advance(3600)
    assert 5 <= len(world.take(driver, p.Notice)) <= 2 * 10
    world.send(driver, demand(count=0))
    world.take(driver, p.Notice)
    world.advance(3600)
    assert all("Keeper have" in notice.text for notice in world.take(driver, p.Notice))  # type: ignore[attr-defined]


def test_more_work_than_cpus_is_no_news_while_it_is_being_done():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=100))
    assert len(granted(world, driver)) == 2
    world.advance(3600)
    assert world.take(driver, p.Notice) == []


def test_why_names_who_uses_what_is_lacking():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(1, 2, label="simulate"))
    first, second = granted(world, driver)
    world.send(driver, demand(2, 1, label="report"))
    assert world.request(driver, "why.lease", 2, driver) == (
        f"needs CPU: 1; 2 of 2 are in use by simulate (pid {first.pid}), simulate (pid {second.pid})"
    )


def test_why_says_that_a_worker_is_starting():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand())
    assert "being started" in str(world.request(driver, "why.lease", 1, driver))


def test_a_worker_serves_one_environment():
    world = World({"CPU": 1})
    driver = world.driver()
    env = msgspec.msgpack.encode({"env_vars": {"A": "1"}})
    world.send(driver, demand(1))
    (plain,) = granted(world, driver)
    world.send(driver, p.LeaseReturn(plain.lease))
    world.send(driver, demand(2, env=env))
    (special,) = granted(world, driver)
    assert special.proc != plain.proc


def test_a_worker_serves_one_job():
    world = World({"CPU": 1})
    first, second = world.driver(), world.driver()
    world.send(first, demand())
    (grant,) = granted(world, first)
    world.send(first, p.LeaseReturn(grant.lease))
    world.send(second, demand())
    assert granted(world, second)[0].proc != grant.proc


def test_forks_that_fail_are_repeated_and_then_refused_with_the_reason():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand(7))
    for attempt in range(workers.FORK_TRIES):
        (fork,) = world.forking
        world.forked(fork)
        world.die(fork, 7, "ImportError: no module named kaput")
        assert len(world.forking) == (attempt < workers.FORK_TRIES - 1)
    (failed,) = world.take(driver, p.LeaseFailed)
    assert failed.class_id == 7
    assert "exited with code 7" in failed.reason
    assert "kaput" in failed.reason
    assert world.node.leases.ledger.free == cpu(1)


def test_a_worker_that_does_not_join_in_time_is_killed_and_another_is_started():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand())
    (fork,) = world.forking
    world.forked(fork)
    world.advance(workers.START_DEADLINE_S)
    assert list(world.killed) == [world.pid_of[fork]]
    world.settle()
    assert granted(world, driver)[0].proc != fork


def test_a_lost_zygote_repeats_what_it_had_not_reported_under_another_id():
    world = World({"CPU": 2}, auto=False)
    driver = world.driver()
    world.send(driver, demand(count=2))
    lost, reported = world.forking
    world.forked(reported)
    del world.forking[lost]
    world.feed(events.ZygoteLost("test"))
    assert len(world.forking) == 1
    assert lost not in world.forking
    world.settle()
    assert len(granted(world, driver)) == 2
    world.feed(events.Forked(lost, 999))  # it had been forked after all: it is killed, and turned away if it joins
    assert world.node.pool.expects(lost) is False


def test_an_exit_that_is_reaped_before_the_fork_is_reported_counts():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand())
    (fork,) = world.forking
    world.feed(events.ChildExited(555, 1))
    del world.forking[fork]
    world.feed(events.Forked(fork, 555))
    assert len(world.forking) == 1
    assert fork not in world.forking


def test_at_most_so_many_processes_start_at_a_time():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand(count=100, asked={}))
    assert len(world.forking) == workers.FORKS_MAX
    world.settle()
    assert len(granted(world, driver)) == 100


def test_idle_workers_above_the_limit_are_asked_to_leave_after_a_while():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=5, asked={}))
    grants = granted(world, driver)
    for grant in grants:
        world.send(driver, p.LeaseReturn(grant.lease))
    world.advance(workers.IDLE_S)
    asked = [grant.proc for grant in grants if world.take(grant.proc, p.Exit)]
    assert len(asked) == 3
    assert world.node.next_deadline() is not None
    world.die(asked[0], 0)
    world.advance(workers.LEAVING_S)
    assert world.node.pool.statistics()["workers_idle"] == 4, "those that stay are there again"


def test_a_burst_of_workers_is_gone_within_seconds():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=30, asked={}))
    for grant in granted(world, driver):
        world.send(driver, p.LeaseReturn(grant.lease))
    assert world.node.pool.statistics()["workers_idle"] == 30
    world.advance(6)
    assert world.node.pool.statistics()["workers_leaving"] == 28


def test_a_worker_that_is_leaving_gets_no_work():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand(count=2, asked={}))
    grants = granted(world, driver)
    for grant in grants:
        world.send(driver, p.LeaseReturn(grant.lease))
    world.advance(workers.IDLE_S)
    (leaving,) = [grant.proc for grant in grants if world.take(grant.proc, p.Exit)]
    world.send(driver, demand(count=2, asked={}))
    assert leaving not in {grant.proc for grant in granted(world, driver)}


def test_a_lost_peer_is_explained_when_its_end_is_known():
    world = World({"CPU": 2}, auto=False)
    driver, other = world.driver(), world.driver()
    world.send(driver, demand())
    world.settle()
    (grant,) = granted(world, driver)
    world.send(other, p.PeerLost(grant.proc))
    assert world.take(other, p.WorkerDied) == []
    world.advance(workers.CLOSED_S)
    assert list(world.killed) == [grant.pid], "it is given up, so it must not go on"
    world.die(grant.proc)
    (died,) = world.take(other, p.WorkerDied)
    assert "killed by this node, because its connection with the driver" in died.cause  # type: ignore[attr-defined]
    world.send(other, p.PeerLost(grant.proc))
    assert len(world.take(other, p.WorkerDied)) == 1, "also when asked later"
    world.send(other, p.PeerLost(4711))
    assert "not known" in world.take(other, p.WorkerDied)[0].cause  # type: ignore[attr-defined]


def test_a_worker_that_lost_its_connection_is_said_to_be_killed_for_that():
    world = World({"CPU": 2}, auto=False)
    driver = world.driver()
    world.send(driver, demand())
    world.settle()
    (grant,) = granted(world, driver)
    world.leave(grant.proc)
    world.advance(workers.CLOSED_S)
    world.die(grant.proc)
    (died,) = world.take(driver, p.WorkerDied)
    assert "connection to the node was lost (closed)" in died.cause  # type: ignore[attr-defined]
    assert "kill -9" not in died.cause  # type: ignore[attr-defined]


def test_a_worker_that_a_poor_process_cannot_reach_is_explained_and_an_actor_lives_on():
    world = World({"CPU": 2})
    driver, other = world.driver(), world.driver()
    world.send(driver, create(driver, 1))
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    actor = next(proc for proc in world.running.values() if proc != grant.proc)
    world.descriptors[90_000 + driver] = events.DescriptorUsage(1020, 1024)
    world.send(other, p.PeerLost(grant.proc))
    world.advance(workers.CLOSED_S)
    assert world.take(other, p.WorkerDied), "who is not poor is believed"
    world.send(driver, demand())
    (grant,) = granted(world, driver)
    world.send(driver, p.PeerLost(grant.proc))
    (died,) = world.take(driver, p.WorkerDied)[-1:]
    assert f"the driver (pid {90_000 + driver}) has 1020 of 1024 descriptors open" in died.cause  # type: ignore[attr-defined]
    assert grant.pid not in world.running, "of no use to its owner, it makes room for others"
    world.take(driver, p.ActorState)
    world.send(driver, p.PeerLost(actor))
    (state,) = world.take(driver, p.ActorState)
    assert state.state == p.ACTOR_DEAD  # type: ignore[attr-defined]
    assert b"ulimit -n" in state.cause  # type: ignore[attr-defined]
    world.advance(60)
    assert actor in world.running.values()


def test_a_fork_server_that_does_not_answer_is_told_to_drivers_and_a_reason():
    world = World({"CPU": 2}, auto=False)
    driver = world.driver()
    world.send(driver, demand())
    world.advance(20)
    world.feed(events.ForkServerSilent(7, 10.0, 20.0))
    (notice,) = world.take(driver, p.Notice)
    assert "1 tasks or actors wait for workers, and the fork server (pid 7)" in notice.text  # type: ignore[attr-defined]
    assert "fork server (pid 7)" in world.request(driver, "why.lease", 1, driver)  # type: ignore[operator]
    world.feed(events.ZygoteLost("it was replaced"))
    assert "fork server" not in world.request(driver, "why.lease", 1, driver)  # type: ignore[operator]
    world.settle()
    assert len(granted(world, driver)) == 1


def test_garbage_closes_the_connection_and_nothing_else():
    world = World({"CPU": 1})
    driver, rude = world.driver(), world.driver()
    from ray._node.manager import FrameCame

    world.feed(FrameCame(rude, p.KIND_LEASE_DEMAND, 0, b"\xc1nonsense"))
    assert rude not in world.inbox
    assert "malformed LeaseDemand" in " ".join(world.logs)
    rude = world.driver()
    world.feed(FrameCame(rude, 93, 0, b""))
    assert rude not in world.inbox
    world.send(driver, demand())
    assert granted(world, driver)


def test_available_resources_counts_leases_that_nobody_uses():
    world = World({"CPU": 2})
    driver = world.driver()
    world.send(driver, demand(count=2))
    idle, busy = granted(world, driver)
    world.send(driver, p.Request("available_resources"), 77)
    assert {x.lease for x in world.take(driver, p.LeaseReclaim)} == {idle.lease, busy.lease}
    world.send(driver, p.LeaseReturn(idle.lease))
    assert 77 not in world.replies.get(driver, {})
    world.advance(0.05)
    assert world.reply(driver, 77) == cpu(1)
    world.send(driver, p.LeaseReturn(busy.lease))
    world.send(driver, p.Request("available_resources"), 78)
    assert world.reply(driver, 78) == cpu(2)


def test_actors_wait_for_what_they_run_with_but_not_for_what_they_are_placed_by():
    world = World({"CPU": 1})
    driver = world.driver()
    world.send(driver, demand())
    world.send(driver, create(driver, 1))
    world.send(driver, create(driver, 2, run=cpu(1), class_name="Heavy"))
    inits = [m for box in world.inbox.values() for m in box if isinstance(m, p.ActorInit)]
    assert [init.actor for init in inits] == [actor_id(driver, 1)]
    assert world.request(driver, "why.actor", actor_id(driver, 2)).startswith("Heavy needs CPU: 1; 1 of 1")  # type: ignore[attr-defined]
    assert len(world.take(driver, p.LeaseReclaim)) == 1


def test_an_owner_may_not_ask_for_endless_kinds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "DEMANDS_PER_OWNER_MAX", 3)
    world = World({"CPU": 1})
    driver = world.driver()
    for class_id in range(5):
        world.send(driver, demand(class_id, 1, gpu(1)))
    assert [x.class_id for x in world.take(driver, p.LeaseFailed)] == [3, 4]  # type: ignore[attr-defined]


def test_a_count_beyond_all_reason_is_served_in_portions():
    world = World({"CPU": 1}, auto=False)
    driver = world.driver()
    world.send(driver, demand(count=1 << 62, asked={}))
    stats = world.node.leases.statistics()
    assert stats["leases_starting"] == 64
    for proc in list(world.forking):
        world.forked(proc)
        world.join(proc)
    assert len(granted(world, driver)) == workers.FORKS_MAX
    assert world.node.leases.statistics()["leases_starting"] == 64


def test_a_grant_on_its_way_counts_against_what_is_asked_for_meanwhile():
    world = World({"CPU": 8})
    driver = world.driver()
    world.send(driver, p.LeaseDemand(1, cpu(1), 2, granted=0))
    world.send(driver, p.LeaseDemand(1, cpu(1), 6, granted=1))
    assert len(world.take(driver, p.LeaseGranted)) == 7, "the second of two grants had not come when six were wanted"


def test_what_a_refused_guest_held_goes_to_the_next_at_once():
    """Found by the simulation: it was passed over so often that what it lacked was kept for it, and is told to go."""
    table = leases.LeaseTable(node=1, ledger=Ledger(cpu(4), ()), new_id=lambda: 1 << 30, validate=True)
    table.handle(events.Company(alone=False), 0.0)

    def place(owner: int, demand: dict[str, int], *, queue: bool) -> list[int]:
        order = messages.PlaceLeases(owner, 1, 1, 1, demand, b"", b"", "f", 0, queue)
        return started(table.handle(LeasesPlaced(order), 0.0))

    def started(effects: list[object]) -> list[int]:
        return [effect.ticket for effect in effects if isinstance(effect, events.WantWorker)]

    assert place(7, cpu(2), queue=False)
    assert not place(8, cpu(4), queue=True)
    assert not place(8, cpu(4), queue=False)
    table._wants[8, 1].passed_over = fairness.PATIENCE
    assert not place(9, cpu(1), queue=True)
    assert started(table.handle(GuestWithdrawn(messages.WithdrawLeases(8, 1)), 0.0))
