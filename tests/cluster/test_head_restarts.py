"""A head that keeps records is killed, and the next one goes on where it was."""

import os
import signal
import threading
import time

import pytest

import ray
from ray._node.fence import ABSENT_S, FENCE_S
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.cluster.durable import durable_cluster
from tests.core.helpers import wait_until
from tests.hosts.remote import Writer
from tests.hosts.writers import lives

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


@pytest.fixture
def durable(cluster_keeper, belongings, tmp_path):
    cluster_keeper.stop()
    with durable_cluster(tmp_path, belongings) as cluster:
        yield cluster


@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return self.count


def node_id(node):
    from ray._runtime.ids import NodeID

    return NodeID._from_key(node.node).hex()


def test_actors_names_and_keys_survive_and_calls_go_on(durable):
    there = NodeAffinitySchedulingStrategy(node_id(durable.workers[1]), soft=False)
    counter = Counter.options(name="counter", lifetime="detached", scheduling_strategy=there).remote()
    assert ray.get(counter.increment.remote()) == 1
    expected = 1
    for n in range(3):
        durable.kill_head()
        expected += 100
        assert ray.get([counter.increment.remote() for _ in range(100)])[-1] == expected
        durable.start_head()
        expected += 1
        assert ray.get(ray.get_actor("counter").increment.remote(), timeout=20) == expected
        other = Counter.options(name=f"other{n}", lifetime="detached").remote()
        assert ray.get(other.increment.remote(), timeout=20) == 1
        assert ray.util.list_named_actors() == ["counter", *(f"other{x}" for x in range(n + 1))]
        wait_until(lambda: len([x for x in ray.nodes() if x["Alive"]]) == 3, what="all nodes")


def test_what_is_asked_without_a_head_waits_for_the_next(durable):
    durable.kill_head()
    thread = threading.Timer(0.3, durable.start_head)
    thread.start()
    assert ray.get(Counter.options(name="late").remote().increment.remote(), timeout=20) == 1
    thread.join()


def test_an_actor_that_ended_without_a_head_is_restarted_by_the_next(durable):
    there = NodeAffinitySchedulingStrategy(node_id(durable.workers[1]), soft=True)
    counter = Counter.options(max_restarts=1, max_task_retries=-1, scheduling_strategy=there).remote()
    assert ray.get(counter.increment.remote()) == 1
    durable.kill_head()
    node = durable.workers[1]
    os.kill(node.pid, signal.SIGKILL)
    node.close()
    durable.start_head()
    assert ray.get(counter.increment.remote(), timeout=30) == 1


@pytest.mark.chaos  # it takes longer than a node waits for a head that does not answer
def test_an_actor_that_can_be_restarted_runs_on_while_no_head_does(durable, tmp_path):
    there = NodeAffinitySchedulingStrategy(node_id(durable.workers[1]), soft=True)
    writer = Writer.options(max_restarts=1, scheduling_strategy=there).remote(tmp_path / "w")
    _, pid = ray.get(writer.where.remote())
    durable.kill_head()
    silent_until = time.monotonic() + FENCE_S + ABSENT_S
    wait_until(lambda: lives(tmp_path / "w")[-1][2] > silent_until, FENCE_S + ABSENT_S + 10, "a write after so long")
    durable.start_head()
    wait_until(lambda: len([x for x in ray.nodes() if x["Alive"]]) == 3, what="all nodes")
    assert ray.get(writer.where.remote()) == (node_id(durable.workers[1]), pid)
    assert [life[0] for life in lives(tmp_path / "w")] == [pid]


def test_a_standby_takes_over(durable):
    counter = Counter.options(name="counter", lifetime="detached").remote()
    assert ray.get(counter.increment.remote()) == 1
    durable.start_head(place=1, standby=True)
    os.kill(durable.heads[0].pid, signal.SIGKILL)
    durable.heads[0].close()
    assert ray.get(ray.get_actor("counter").increment.remote(), timeout=20) == 2
