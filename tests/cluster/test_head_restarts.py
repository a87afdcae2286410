"""A head that keeps records is killed, and the next one goes on where it was."""

import os
import signal
import socket
import threading

import pytest

import ray
from ray._runtime import nodes
from ray._runtime.resources import node_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.core.helpers import wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Durable:
    """A head that keeps records, without CPUs, and worker nodes beside it; this process is a driver on the first."""

    def __init__(self, directory):
        self.token = os.urandom(32)
        self.records = f"sqlite://{directory}/records.db"
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self.heads = []
        self.workers = []
        self.start_head()

    def start(self, cpus, **arguments):
        amounts = node_resources(cpus, 0, None, 80 << 20, 1 << 30)
        return nodes.start(
            token=self.token, amounts=amounts, ip="127.0.0.1", findable=True, private=True, **arguments
        )  # fmt: skip

    def start_head(self, place=0, **arguments):
        self.heads.append(self.start(0, listen=self.addresses[place], records=self.records, **arguments))

    def add(self, cpus=2):
        head = nodes.HeadFacts(self.heads[-1].node, ",".join(self.addresses))
        self.workers.append(self.start(cpus, listen="127.0.0.1:0", head=head))
        return self.workers[-1]

    def kill_head(self):
        os.kill(self.heads[-1].pid, signal.SIGKILL)
        self.heads[-1].close()

    def close(self):
        from ray._node import registry, session

        for node in (*self.workers, *self.heads):
            node.close()
            session.remove(node.session_dir)
        registry.running()


@pytest.fixture
def durable(cluster_keeper, belongings, tmp_path):
    cluster_keeper.stop()
    before = belongings.now()
    cluster = Durable(tmp_path)
    first = cluster.add()
    cluster.add()
    ray.init(first.tcp_address, namespace="n", logging_level="ERROR", log_to_driver=False)
    wait_until(lambda: len(ray.nodes()) == 3, what="all nodes")
    yield cluster
    ray.shutdown()
    cluster.close()
    before.expect_nothing_more()


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


def test_a_standby_takes_over(durable):
    counter = Counter.options(name="counter", lifetime="detached").remote()
    assert ray.get(counter.increment.remote()) == 1
    durable.start_head(place=1, standby=True)
    os.kill(durable.heads[0].pid, signal.SIGKILL)
    durable.heads[0].close()
    assert ray.get(ray.get_actor("counter").increment.remote(), timeout=20) == 2
