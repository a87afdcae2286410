"""Placement groups when a head that keeps records is killed, and the next one goes on."""

import os
import signal
import threading

import pytest

import ray
from ray.exceptions import TaskPlacementGroupRemoved, TaskUnschedulableError
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from tests.cluster.durable import durable_cluster
from tests.cluster.test_head_restarts import Counter, node_id
from tests.core.helpers import Gate, Tally, wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


@pytest.fixture
def durable(cluster_keeper, belongings, tmp_path):
    cluster_keeper.stop()
    with durable_cluster(tmp_path, belongings) as cluster:
        yield cluster


@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=1, max_retries=0)
def meet(gate, tally):
    tally.add()
    gate.wait()
    return ray.get_runtime_context().get_node_id()


def inside(group, bundle=-1):
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def state(group):
    return placement_group_table(group)["state"]


def cpus():
    return {name: amount for name, amount in ray.available_resources().items() if name == "CPU"}


def test_a_detached_group_and_what_runs_in_it_survive_every_kill(durable, tmp_path):
    group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD", name="pair", lifetime="detached")
    assert group.wait(20)
    places = [ray.get(where.options(scheduling_strategy=inside(group, index)).remote()) for index in (0, 1)]
    counter = Counter.options(
        num_cpus=1, name="inside", lifetime="detached", scheduling_strategy=inside(group, 1)
    ).remote()
    expected = 1
    assert ray.get(counter.increment.remote()) == expected
    for _ in range(3):
        gate, tally = Gate(tmp_path), Tally(tmp_path)
        running = meet.options(scheduling_strategy=inside(group, 0)).remote(gate, tally)
        wait_until(lambda tally=tally: tally.count() == 1, what="the task that runs while the head dies")
        durable.kill_head()
        expected += 1
        assert ray.get(counter.increment.remote()) == expected
        durable.start_head()
        found = get_placement_group("pair")
        assert found == group
        assert group.wait(20)
        gate.open()
        assert ray.get(running, timeout=20) == places[0]
        assert ray.get(where.options(scheduling_strategy=inside(found, 0)).remote(), timeout=20) == places[0]
        assert ray.cluster_resources()[f"CPU_group_1_{group.id.hex()}"] == 1
    ray.kill(counter)
    remove_placement_group(group)
    wait_until(lambda: cpus() == {"CPU": 4}, what="all CPUs to be free")
    assert state(group) == "REMOVED"


def test_who_waits_for_a_group_is_answered_by_the_next_head(durable):
    group = placement_group([{"CPU": 2}, {"CPU": 2}, {"CPU": 1}])
    ready, waiting = group.ready(), where.options(scheduling_strategy=inside(group)).remote()
    assert not group.wait(0.1)
    durable.kill_head()
    durable.start_head()
    assert not group.wait(0.1)
    assert ray.wait([ready, waiting], timeout=0) == ([], [ready, waiting])
    durable.add(cpus=1)
    assert ray.get(ready, timeout=20) == group
    assert ray.get(waiting, timeout=20)


def test_a_group_that_is_asked_for_and_one_that_is_removed_without_a_head(durable):
    old = placement_group([{"CPU": 2}, {"CPU": 2}])
    assert old.wait(20)
    durable.kill_head()
    remove_placement_group(old)
    group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
    thread = threading.Timer(0.3, durable.start_head)
    thread.start()
    assert group.wait(20)
    thread.join()
    assert ray.get(where.options(scheduling_strategy=inside(group)).remote(), timeout=20)
    with pytest.raises(TaskPlacementGroupRemoved, match=r"placement group .* was removed"):
        ray.get(where.options(scheduling_strategy=inside(old)).remote(), timeout=20)
    wait_until(lambda: cpus() == {"CPU": 2}, what="the CPUs of the removed group")


def test_bundles_of_a_node_that_ended_without_a_head_are_placed_anew(durable):
    first, second = [node_id(node) for node in durable.workers]
    group = placement_group([{"CPU": 2}, {"CPU": 2}], strategy="STRICT_SPREAD")
    assert group.wait(20)
    places = [ray.get(where.options(scheduling_strategy=inside(group, index)).remote()) for index in (0, 1)]
    lost = places.index(second)
    durable.kill_head()
    os.kill(durable.workers[1].pid, signal.SIGKILL)
    durable.workers[1].close()
    durable.start_head()
    other = durable.add()
    asked = where.options(scheduling_strategy=inside(group, lost)).remote()
    kept = where.options(scheduling_strategy=inside(group, 1 - lost)).remote()
    hard = where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(second, soft=False)).remote()
    assert ray.get(kept, timeout=20) == first
    assert ray.get(asked, timeout=30) == node_id(other)
    with pytest.raises(TaskUnschedulableError, match="asks for node"):
        ray.get(hard, timeout=20)
    assert state(group) == "CREATED"
