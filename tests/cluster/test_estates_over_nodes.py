"""Objects outlive their creator, and are read on other nodes than the one on which it was killed."""

import os
import signal

import pytest

import ray
from ray.exceptions import OwnerDiedError
from tests.core.helpers import wait_until

np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start

LARGE = 300_000  # bytes, beyond what travels in messages
TRIALS = 20
SETTLED_S = 40


def node(name, **arguments):
    return {"num_cpus": 1, "resources": {name: 100}, **arguments}


def at(name):
    """Options of what is to run on the node of this name."""
    return {"num_cpus": 0, "resources": {name: 1}}


@ray.remote(max_retries=0)
def make(value):
    return np.full(LARGE, value, np.uint8)


@ray.remote
def process_id_of_worker():
    return os.getpid()


@ray.remote
class Holder:
    """Owns objects, or keeps references to others'."""

    def __init__(self):
        self.kept = None

    def process_id(self):
        return os.getpid()

    def put(self, *values):
        return [ray.put(value) for value in values]

    def nest(self, value):
        return [ray.put([ray.put([ray.put(value)])])]

    def have_made(self, value, name):
        reference = make.options(**at(name)).remote(value)
        ray.wait([reference], fetch_local=False)
        return [reference]

    def make_here(self, value):
        return np.full(LARGE, value, np.uint8)

    def have_made_by(self, maker, value):
        reference = maker.make_here.remote(value)
        ray.wait([reference], fetch_local=False)
        return [reference]

    def keep(self, references):
        self.kept = references

    def read(self):
        return [summary(value) for value in ray.get(self.kept, timeout=20)]


@ray.remote
def statistics():
    from ray._runtime import session

    return session.request("stats")


def seen(name):
    return ray.get(statistics.options(**at(name)).remote(), timeout=20)


def is_settled(name):
    now = seen(name)
    held = now["store_bytes_used"] - now["store_bytes_warm"] - now["store_bytes_idle"]
    return now["estates"] == 0 and now["segments_adopted"] == 0 and held == 0


def summary(value):
    return int(value.sum()) if isinstance(value, np.ndarray) else value


def holder(name):
    actor = Holder.options(**at(name)).remote()
    return actor, ray.get(actor.process_id.remote(), timeout=20)


def kill(pid):
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def trio(start_cluster):
    """A head, on which this driver is, and two more nodes."""
    return start_cluster(node("b"), node("c"), head=node("a"))


def test_what_was_put_on_another_node_outlives_its_creator(trio):
    readers = [holder(name)[0] for name in "bc"]
    for trial in range(TRIALS):
        actor, pid = holder("b")
        references = ray.get(actor.put.remote(np.full(LARGE, trial, np.uint8), f"trial {trial}"), timeout=20)
        kept = [reader.keep.remote(references) for reader in readers]
        kill(pid)
        ray.get(kept, timeout=20)
        expected = [LARGE * trial, f"trial {trial}"]
        assert [summary(value) for value in ray.get(references, timeout=20)] == expected
        assert ray.get([reader.read.remote() for reader in readers], timeout=20) == [expected] * 2
    del references, readers, kept
    for name in "bc":
        wait_until(lambda name=name: is_settled(name), SETTLED_S, f"the end of all estates on node {name}")


def test_what_lies_inside_other_objects_of_another_node_outlives_its_creator(trio):
    actor, pid = holder("b")
    references = ray.get(actor.nest.remote(np.full(LARGE, 7, np.uint8)), timeout=20)
    kill(pid)
    for _ in range(2):
        references = ray.get(references[0], timeout=20)
    assert summary(ray.get(references[0], timeout=20)) == LARGE * 7


def test_a_result_on_a_third_node_outlives_its_owner_and_then_its_maker(trio):
    maker, pid_of_maker = holder("c")
    actor, pid = holder("b")
    references = ray.get(actor.have_made_by.remote(maker, 9), timeout=20)
    kill(pid)
    wait_until(lambda: seen("b")["estate_claims"] == 1, what="the claim")
    kill(pid_of_maker)
    wait_until(lambda: seen("c")["segments_adopted"] == 1, what="adoption")
    reader, _ = holder("b")
    ray.get(reader.keep.remote(references), timeout=20)
    assert summary(ray.get(references[0], timeout=20)) == LARGE * 9
    assert ray.get(reader.read.remote(), timeout=20) == [LARGE * 9]
    del references, reader
    for name in "bc":
        wait_until(lambda name=name: is_settled(name), SETTLED_S, f"the end of all estates on node {name}")


def test_a_result_in_a_segment_that_was_adopted_before_outlives_its_owner(trio):
    maker, pid_of_maker = holder("c")
    actor, pid = holder("b")
    references = ray.get(actor.have_made_by.remote(maker, 4), timeout=20)
    kill(pid_of_maker)
    wait_until(lambda: seen("c")["segments_adopted"] == 1, what="adoption")
    kill(pid)
    wait_until(lambda: seen("b")["estate_claims"] == 1, what="the claim")
    assert summary(ray.get(references[0], timeout=20)) == LARGE * 4


def test_with_its_node_an_estate_is_lost(start_cluster):
    cluster, (lost,) = start_cluster(node("b"), head=node("a"))
    actor, pid = holder("b")
    references = ray.get(actor.put.remote("value"), timeout=20)
    kill(pid)
    wait_until(lambda: seen("b")["estate_claims"] == 1, what="the claim")
    cluster.remove_node(lost, allow_graceful=False)
    assert ray.get(references[0], timeout=20) == "value", "it had come here"
    late, _ = holder("a")
    ray.get(late.keep.remote(references), timeout=20)
    with pytest.raises(OwnerDiedError):
        ray.get(late.read.remote(), timeout=30)
