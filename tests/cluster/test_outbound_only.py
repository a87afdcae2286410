"""Nodes that listen for nobody: programs run on them as on others, by connections that they make themselves."""

import os
import signal
from pathlib import Path

import pytest

import ray
from tests.core.helpers import listening, wait_until

np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start

MIB = 1 << 20


def node(name, **arguments):
    return {"num_cpus": 1, "resources": {name: 100}, **arguments}


def hidden(name, **arguments):
    return node(name, outbound_only=True, **arguments)


def at(name):
    """Options of what is to run on the node of this name."""
    return {"num_cpus": 0, "resources": {name: 1}}


@pytest.fixture(params=[False, True], ids=["clear", "tls"])
def tls(request):
    return request.param


def array(seed, size=2 * MIB):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@ray.remote
def make(seed, size=2 * MIB):
    return array(seed, size)


@ray.remote
def total(value):
    return int(value.sum())


@ray.remote
def square(n):
    return n * n


@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self, by=1):
        self.count += by
        return self.count

    def ask(self, other, by):
        return ray.get(other.increment.remote(by))


def test_it_listens_for_nobody_and_is_shown_so(start_cluster):
    cluster, (behind, _) = start_cluster(hidden("x"), node("y"))
    assert listening(cluster.head_node.pid), "this test sees ports"
    assert ray.get(square.options(**at("x")).remote(7)) == 49
    assert listening(behind.pid) == []
    assert behind.address == ""
    shown = {each["NodeID"]: each for each in ray.nodes()}
    head = shown[cluster.head_node.node_id]
    assert shown[behind.node_id]["NodeManagerPort"] == head["NodeManagerPort"], "that is where it is reached"
    hidden_nodes = [each["NodeID"] for each in ray.nodes() if each["IsOutboundOnly"]]
    assert hidden_nodes == [behind.node_id]


def test_tasks_and_actors_run_there_and_call_each_other_both_ways(start_cluster, tls):
    start_cluster(hidden("x"), node("y"), tls=tls)
    assert ray.get([square.options(**at("x")).remote(n) for n in range(200)]) == [n * n for n in range(200)]
    here, there, beside = (Counter.options(**at(name)).remote() for name in ("y", "x", "x"))
    assert ray.get([there.increment.remote() for _ in range(500)])[-1] == 500
    assert ray.get(here.ask.remote(there, 10)) == 510
    assert ray.get(there.ask.remote(here, 3)) == 3
    assert ray.get(beside.ask.remote(there, 1)) == 511, "on one node they use its Unix socket"
    named = Counter.options(name="there", **at("x")).remote()
    assert ray.get(named.increment.remote()) == ray.get(ray.get_actor("there").increment.remote()) - 1 == 1


def test_values_are_pulled_both_ways(start_cluster, tls):
    start_cluster(hidden("x", object_store_memory=400 * MIB), node("y"), tls=tls)
    there = make.options(**at("x")).remote(1)
    assert np.array_equal(ray.get(there), array(1)), "by the head from it"
    assert ray.get(total.options(**at("y")).remote(there)) == int(array(1).sum()), "by another node from it"
    elsewhere = make.options(**at("y")).remote(2)
    assert ray.get(total.options(**at("x")).remote(elsewhere)) == int(array(2).sum()), "by it from another node"
    assert ray.get(total.options(**at("x")).remote(ray.put(array(3)))) == int(array(3).sum()), "by it from the head"
    large = make.options(**at("x")).remote(4, 100 * MIB)
    assert np.array_equal(ray.get(large), array(4, 100 * MIB))


def test_two_of_them_reach_each_other(start_cluster, tls):
    start_cluster(hidden("x"), hidden("z"), tls=tls)
    one, other = (Counter.options(**at(name)).remote() for name in ("x", "z"))
    assert ray.get(one.ask.remote(other, 5)) == 5
    assert ray.get(other.ask.remote(one, 6)) == 6
    value = make.options(**at("x")).remote(1)
    assert ray.get(total.options(**at("z")).remote(value)) == int(array(1).sum())
    back = make.options(**at("z")).remote(2)
    assert ray.get(total.options(**at("x")).remote(back)) == int(array(2).sum())


def test_a_worker_or_the_node_that_dies_is_noticed_as_elsewhere(start_cluster, tmp_path):
    cluster, (behind, _) = start_cluster(hidden("x"), node("y"))

    @ray.remote(max_retries=3)
    def killed_once(path):
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    assert ray.get(killed_once.options(**at("x")).remote(str(tmp_path / "mark"))) == "done"
    there = Counter.options(max_restarts=1, num_cpus=0, resources={"x": 1}).remote()
    assert ray.get(there.increment.remote()) == 1
    cluster.remove_node(behind, allow_graceful=False)
    cluster.wait_for_nodes()
    cluster.add_node(**hidden("x"))
    wait_until(lambda: ray.get(there.increment.remote()), what="the actor on the next such node")


def test_a_head_that_is_to_connect_outwards_only_is_refused(cluster_keeper):
    from ray.cluster_utils import Cluster

    cluster_keeper.stop()
    with pytest.raises(ValueError, match="joins a head that passes connections on"):
        Cluster(initialize_head=True, head_node_args={"outbound_only": True})
