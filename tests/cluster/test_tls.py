"""A cluster whose nodes use TLS between them: programs run as without it, and nobody on the wire can read them.

Who looks on is a relay at the addresses that the nodes announce; the nodes listen at the same port of other addresses
of this machine, which nobody else is told.
"""

import contextlib
import os
import signal
import socket
import threading

import pytest

import ray
from ray import _core
from ray._runtime import nodes
from ray._runtime.ids import NodeID
from ray._runtime.resources import node_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.cluster.durable import durable_cluster
from tests.core.helpers import wait_until

np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start

SECRET = b"the combination is 12-34-56"
BLOCK_BYTES = 2 << 20


class Relay:
    """Passes on what comes to one address of this machine to the same port of another, and keeps it."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.host = _any_loopback()
        self.behind = _any_loopback()
        self._listener = socket.create_server((self.host, 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()
        for end in self._open:
            end.close()

    def _start(self, work, *args) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                self._open.add(near)
                with contextlib.suppress(OSError):  # the node has gone
                    far = socket.create_connection((self.behind, self.port), 20)
                    far.settimeout(None)
                    self._open.add(far)
                    self._start(self._pass, near, far)
                    self._start(self._pass, far, near)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _any_loopback() -> str:
    first, second, third = os.urandom(3)
    return f"127.{first}.{second}.{1 + third % 250}"


def start_behind(relay, token, **arguments):
    """A node that announces the relay."""
    amounts = node_resources(arguments.pop("num_cpus", 1), 0, arguments.pop("resources", None), 80 << 20, 1 << 30)
    return nodes.start(
        token=token,
        amounts=amounts,
        ip=relay.host,
        listen=f"{relay.behind}:{relay.port}",
        findable=True,
        private=True,
        **arguments,
    )


@pytest.fixture
def start_watched(cluster_keeper, belongings):
    """A function that starts a head and a node with a CPU and "there", each behind a relay, with a driver beside the
    head; it returns both relays.
    """
    from ray._node import registry, session

    cluster_keeper.stop()
    before = belongings.now()
    stack = contextlib.ExitStack()

    def start(*, tls):
        token = os.urandom(32)
        relays = [stack.enter_context(contextlib.closing(Relay())) for _ in range(2)]
        head = start_behind(relays[0], token, num_cpus=0, tls=tls)
        stack.callback(head.close)
        facts = nodes.HeadFacts(head.node, head.tcp_address, tls=tls)
        other = start_behind(relays[1], token, resources={"there": 1}, head=facts)
        stack.callback(other.close)
        for node in (head, other):
            stack.callback(session.remove, node.session_dir)
        ray.init(head.tcp_address, logging_level="ERROR", log_to_driver=False)
        stack.callback(ray.shutdown)
        wait_until(lambda: len(ray.nodes()) == 2, what="both nodes")
        return relays

    yield start
    stack.close()
    registry.running()
    before.expect_nothing_more()


@ray.remote
class Keeper:
    def __init__(self, value):
        self.value = value

    def get(self):
        return self.value


@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return self.count


@ray.remote
def echo(value):
    return value


@ray.remote
def array(seed):
    return _array(seed)


@ray.remote
def total(value):
    return int(value.sum())


def _array(seed):
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


def _total(seed):
    return int(_array(seed).sum())


@pytest.mark.parametrize("tls", [True, False])
def test_arguments_and_results_between_nodes_can_only_be_read_without_tls(start_watched, tls):
    relays = start_watched(tls=tls)
    there = {"resources": {"there": 0.5}, "num_cpus": 0.5}
    assert ray.get(echo.options(**there).remote(SECRET), timeout=20) == SECRET
    keeper = Keeper.options(**there).remote(SECRET)
    assert ray.get(keeper.get.remote(), timeout=20) == SECRET
    seen = b"".join(bytes(relay.seen) for relay in relays)
    assert len(seen) > 1000, "they do talk by way of the relays"
    assert (SECRET in seen) is not tls
    assert (b"Keeper" in seen) is not tls


@pytest.mark.parametrize("tls", [True, False])
def test_an_array_that_is_read_on_another_node_can_be_read_on_the_wire_only_without_tls(start_watched, tls):
    relays = start_watched(tls=tls)
    there = {"resources": {"there": 0.5}, "num_cpus": 0.5}
    block = np.frombuffer(SECRET * (BLOCK_BYTES // len(SECRET)), dtype=np.uint8)
    assert ray.get(total.options(**there).remote(ray.put(block)), timeout=20) == int(block.sum())
    assert np.array_equal(ray.get(array.options(**there).remote(7), timeout=20), _array(7))
    seen = b"".join(bytes(relay.seen) for relay in relays)
    assert len(seen) > 2 * BLOCK_BYTES, "there and back"
    assert (SECRET in seen) is not tls
    assert (_array(7).tobytes()[:100] in seen) is not tls


def test_values_of_each_node_are_read_on_each_other_within_tls(start_cluster):
    names = ("a", "b", "c")
    of = [{"num_cpus": 1, "resources": {name: 100}} for name in names]
    cluster, _ = start_cluster(*of[1:], head=of[0], tls=True)
    assert _core.discover(cluster.address, cluster._token, 20.0)[3], "the cluster uses TLS"
    at = {name: {"num_cpus": 0, "resources": {name: 1}} for name in names}
    made = {name: array.options(**at[name]).remote(seed) for seed, name in enumerate(names)}
    read = [total.options(**at[reader]).remote(made[maker]) for reader in names for maker in names]
    assert ray.get(read, timeout=30) == [_total(seed) for _ in names for seed in range(3)]
    assert [int(value.sum()) for value in ray.get(list(made.values()), timeout=20)] == [_total(n) for n in range(3)]


def test_the_next_head_and_a_standby_go_on_within_tls(cluster_keeper, belongings, tmp_path):
    cluster_keeper.stop()
    with durable_cluster(tmp_path, belongings, tls=True) as durable:
        counter = Counter.options(name="counter", lifetime="detached").remote()
        assert ray.get(counter.increment.remote(), timeout=20) == 1
        durable.kill_head()
        durable.start_head()
        assert ray.get(ray.get_actor("counter").increment.remote(), timeout=20) == 2
        durable.start_head(place=1, standby=True)
        os.kill(durable.heads[1].pid, signal.SIGKILL)
        durable.heads[1].close()
        assert ray.get(ray.get_actor("counter").increment.remote(), timeout=20) == 3
        assert _core.discover(durable.addresses[1], durable.token, 20.0)[3], "the new head uses TLS"
        first, second = (
            NodeAffinitySchedulingStrategy(NodeID._from_key(node.node).hex(), soft=False) for node in durable.workers
        )
        made = array.options(scheduling_strategy=second).remote(1)
        assert ray.get(total.options(scheduling_strategy=first).remote(made), timeout=20) == _total(1)


def test_tasks_and_actors_over_nodes_run_as_without_tls(start_cluster, monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")
    _, (first, second) = start_cluster(
        {"num_cpus": 1, "resources": {"a": 1}}, {"num_cpus": 1, "resources": {"b": 1}}, head={"num_cpus": 0}
    )

    @ray.remote(num_cpus=0.5, resources={"a": 0.1})
    def on_first(keeper):
        return ray.get_runtime_context().get_node_id(), ray.get(keeper.get.remote())

    keeper = Keeper.options(num_cpus=0.5, resources={"b": 0.1}).remote(list(range(10_000)))
    where, value = ray.get(on_first.remote(keeper), timeout=20)
    assert where == first.node_id
    assert value == list(range(10_000))
    on_second = echo.options(num_cpus=0.1, resources={"b": 0.1})
    assert ray.get([on_second.remote(n) for n in range(300)], timeout=20) == list(range(300))
    text = "x" * 90_000
    assert ray.get([on_second.remote(text) for _ in range(50)], timeout=20) == [text] * 50
    assert second.is_alive()


def test_a_node_without_tls_is_refused_and_told_why(start_cluster, monkeypatch):
    monkeypatch.setenv("RAY_USE_TLS", "1")
    cluster, _ = start_cluster()
    cluster._tls = False
    with pytest.raises(RuntimeError, match="the cluster's nodes use TLS"):
        cluster.add_node()


def test_a_driver_that_insists_on_tls_enters_no_cluster_without(start_cluster, monkeypatch):
    cluster, _ = start_cluster()
    ray.shutdown()
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(ConnectionError, match=r"do not use TLS.*RAY_USE_TLS"):
        ray.init(cluster.address)
