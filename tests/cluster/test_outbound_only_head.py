"""The head dies, which passed on what was said to a node that listens for nobody."""

import os
from pathlib import Path

import pytest

import ray
from ray._runtime.ids import NodeID
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.cluster.durable import durable_cluster
from tests.core.helpers import Gate, Tally, wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


@pytest.fixture(params=[False, True], ids=["clear", "tls"])
def durable(request, cluster_keeper, belongings, tmp_path):
    """The second node connects only outwards."""
    cluster_keeper.stop()
    with durable_cluster(tmp_path, belongings, second={"outbound_only": True}, tls=request.param) as cluster:
        yield cluster


def there(cluster, place=1):
    return NodeAffinitySchedulingStrategy(NodeID._from_key(cluster.workers[place].node).hex(), soft=False)


@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return self.count

    def wait(self, gate):
        gate.wait()
        return "waited"


@ray.remote
def square(n):
    return n * n


def test_what_can_be_repeated_goes_on_with_the_next_head_wherever_it_is(durable):
    counter = Counter.options(max_restarts=-1, max_task_retries=-1, scheduling_strategy=there(durable)).remote()
    assert ray.get(counter.increment.remote()) == 1
    for place in (0, 1):
        durable.kill_head()
        durable.start_head(place)
        assert ray.get(counter.increment.remote(), timeout=30) >= 1
        tasks = [square.options(scheduling_strategy=there(durable)).remote(n) for n in range(20)]
        assert ray.get(tasks, timeout=30) == [n * n for n in range(20)]
        wait_until(lambda: len([x for x in ray.nodes() if x["Alive"]]) == 3, what="all nodes")
        port = durable.addresses[place].rpartition(":")[2]
        assert [str(x["NodeManagerPort"]) for x in ray.nodes() if x["Alive"] and x["IsOutboundOnly"]] == [port]


def test_what_is_in_flight_through_a_head_that_dies_ends_and_never_hangs(durable, tmp_path):
    gate = Gate(tmp_path)
    counter = Counter.options(scheduling_strategy=there(durable)).remote()
    assert ray.get(counter.increment.remote()) == 1
    waiting = counter.wait.remote(gate)
    task = square.options(scheduling_strategy=there(durable)).remote(3)
    durable.kill_head()
    durable.start_head()
    with pytest.raises(RayActorError, match=r"connection with the driver .* was lost"):
        ray.get(waiting, timeout=30)
    assert ray.get(task, timeout=30) == 9
    again = Counter.options(scheduling_strategy=there(durable)).remote()
    assert ray.get(again.increment.remote(), timeout=30) == 1


@ray.remote
class Marked:
    """Says without being asked which process it is."""

    def __init__(self, path):
        Path(path).write_text(str(os.getpid()))

    def pid(self):
        return os.getpid()


@ray.remote
class Holder:
    """Has an actor made and calls it later."""

    def make(self, path, where):
        self.made = Marked.options(scheduling_strategy=where).remote(path)

    def call(self):
        return ray.get(self.made.pid.remote())


def test_who_was_not_connected_there_waits_for_the_next_head_and_finds_it_alive(durable, tmp_path):
    mark = tmp_path / "mark"
    holder = Holder.options(scheduling_strategy=there(durable, 0)).remote()
    ray.get(holder.make.remote(str(mark), there(durable)))
    pid = int(wait_until(lambda: mark.exists() and mark.read_text(), what="the actor"))
    durable.kill_head()
    called = holder.call.remote()
    assert ray.wait([called], timeout=1.0)[0] == [], "nothing is known, and nobody is given up"
    durable.start_head()
    assert ray.get(called, timeout=30) == pid


def test_a_value_there_can_be_read_when_there_is_a_head_again(durable, tmp_path):
    np = pytest.importorskip("numpy")
    tally = Tally(tmp_path)

    @ray.remote(max_retries=3)
    def make():
        tally.add()
        return np.arange(1 << 18)

    value = make.options(scheduling_strategy=there(durable)).remote()
    assert ray.wait([value], fetch_local=False)[0]
    durable.kill_head()
    with pytest.raises(GetTimeoutError):
        ray.get(value, timeout=0.5)
    durable.start_head()
    assert np.array_equal(ray.get(value, timeout=30), np.arange(1 << 18))
    assert tally.count() == 1, "it was not made anew"
