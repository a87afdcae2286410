"""Objects outlive their creator: its process is killed, and everybody who holds a reference goes on reading.

The killing is done with SIGKILL as soon as the reference has arrived, so that nothing is left to do for the dying.
"""

import gc
import os
import signal

import pytest

import ray
from ray._runtime import session
from ray.exceptions import OwnerDiedError

from .helpers import Gate, is_alive, wait_until

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.skate

LARGE = 300_000  # bytes, beyond what travels in messages
TRIALS = 100


@ray.remote(num_cpus=0)
class Owner:
    """Makes objects of its own, and hands out references."""

    def __init__(self):
        self.kept = None

    def process_id(self):
        return os.getpid()

    def put(self, *values):
        return [ray.put(value) for value in values]

    def put_nested(self, value, depth):
        reference = ray.put(value)
        for _ in range(depth):
            reference = ray.put([reference])
        return [reference]

    def submit(self, function, *arguments):
        return [function.remote(*arguments)]

    def submit_and_wait(self, function, *arguments):
        reference = function.remote(*arguments)
        ray.wait([reference])
        return [reference]

    def take_items(self, function, count):
        return list(function.remote(count))

    def keep_result(self, function, *arguments):
        self.kept = function.remote(*arguments)
        ray.wait([self.kept])


@ray.remote(num_cpus=0)
def make(size, gate=None):
    if gate is not None:
        gate.wait()
    return np.ones(size, np.uint8)


@ray.remote(num_cpus=0, num_returns="streaming")
def make_items(count):
    for index in range(count):
        yield np.full(LARGE if index % 2 else 10, index, np.uint8)


@ray.remote(num_cpus=0, max_retries=0)
def fail():
    raise KeyError("in the task")


@ray.remote(num_cpus=0)
class Reader:
    """Keeps references, and reads them when it is asked to."""

    def __init__(self):
        self.kept = None

    def process_id(self):
        return os.getpid()

    def keep(self, references):
        self.kept = references

    def read(self):
        return [summary(value) for value in ray.get(self.kept, timeout=20)]

    def pass_on(self, other):
        ray.get(other.keep.remote(self.kept))

    def forget(self):
        self.kept = None
        gc.collect()


@ray.remote(num_cpus=0)
def add(array, number):
    return int(array.sum()) + number


def summary(value):
    return int(value.sum()) if isinstance(value, np.ndarray) else value


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def wait_until_dead(pid):
    wait_until(lambda: not is_alive(pid), what="the end of the owner")


def node_statistics():
    return session.request("stats")


def used_bytes():
    """What the store lends, apart from what it keeps warm."""
    now = node_statistics()
    return now["store_bytes_used"] - now["store_bytes_warm"]


@pytest.fixture(scope="module", autouse=True)
def nothing_left(cluster_keeper, _end_of_module):
    """After the tests the node keeps nothing for anybody who has died, and its store is as it was."""
    if not ray.is_initialized():
        cluster_keeper.start(num_cpus=4)
    ray.put(np.zeros(LARGE, np.uint8))  # the driver keeps a segment from now on
    before = used_bytes()
    yield
    gc.collect()

    def is_settled():
        now = node_statistics()
        return now["estates"] == 0 and now["estate_claims"] == 0 and used_bytes() <= before

    wait_until(is_settled, what="the end of all estates")


def owner():
    """An actor that owns objects, and its process."""
    actor = Owner.remote()
    return actor, ray.get(actor.process_id.remote())


@pytest.mark.slow  # a hundred processes are started and killed
@pytest.mark.timeout(240)
def test_what_was_put_outlives_its_creator_for_the_driver_and_an_actor(cluster):
    reader = Reader.remote()
    for trial in range(TRIALS):
        actor, pid = owner()
        references = ray.get(actor.put.remote(np.full(LARGE, trial, np.uint8), f"trial {trial}"))
        kept = reader.keep.remote(references)
        kill(pid)
        ray.get(kept)
        assert ray.get(references[0], timeout=20)[0] == trial
        assert ray.get(references[1], timeout=20) == f"trial {trial}"
        assert ray.get(reader.read.remote(), timeout=20) == [LARGE * trial, f"trial {trial}"]


def test_what_is_read_before_the_death_stays_readable(cluster):
    actor, pid = owner()
    references = ray.get(actor.put.remote(np.full(LARGE, 3, np.uint8), "small"))
    view, _ = ray.get(references)
    kill(pid)
    wait_until_dead(pid)
    reader = Reader.remote()
    ray.get(reader.keep.remote(references))
    assert ray.get(reader.read.remote(), timeout=20) == [LARGE * 3, "small"]
    assert int(view.sum()) == LARGE * 3


@pytest.mark.parametrize("value", [b"x" * 50_000, np.full(LARGE, 2, np.uint8)], ids=["small", "large"])
def test_what_lies_inside_other_objects_outlives_its_creator(cluster, value):
    actor, pid = owner()
    references = ray.get(actor.put_nested.remote(value, 4))
    kill(pid)
    for _ in range(4):
        references = ray.get(references[0], timeout=20)
    assert np.array_equal(ray.get(references[0], timeout=20), value)


def test_a_small_list_of_large_values_is_not_dropped_in_the_middle(cluster):
    """Objects of a dead owner that are only named in another one's value live as long as that one is claimed."""
    actor, pid = owner()
    (outer,) = ray.get(actor.put_nested.remote(np.full(LARGE, 5, np.uint8), 1))
    kill(pid)
    wait_until_dead(pid)
    ray.wait([outer], timeout=20)
    wait_until(lambda: node_statistics()["estate_claims"] == 2, what="claims of both objects")
    (inner,) = ray.get(outer, timeout=20)
    del outer
    assert int(ray.get(inner, timeout=20).sum()) == LARGE * 5


@pytest.mark.parametrize("size", [10, LARGE])
def test_results_that_the_dead_owned_and_passed_on_outlive_it(cluster, size):
    actor, pid = owner()
    reader = Reader.remote()
    references = ray.get(actor.submit_and_wait.remote(make, size))
    kept = reader.keep.remote(references)
    kill(pid)
    ray.get(kept)
    assert int(ray.get(references[0], timeout=20).sum()) == size
    assert ray.get(reader.read.remote(), timeout=20) == [size]


@pytest.mark.parametrize("size", [10, LARGE])
def test_results_that_came_after_they_were_passed_on_outlive_their_owner(cluster, size, tmp_path):
    gate = Gate(tmp_path)
    actor, pid = owner()
    references = ray.get(actor.submit.remote(make, size, gate))
    gate.open()
    ray.wait(references, timeout=20, fetch_local=False)
    kill(pid)
    assert int(ray.get(references[0], timeout=20).sum()) == size


def test_items_of_a_generator_outlive_their_owner(cluster):
    actor, pid = owner()
    references = ray.get(actor.take_items.remote(make_items, 4))
    kill(pid)
    assert [int(value[0]) for value in ray.get(references, timeout=20)] == [0, 1, 2, 3]


def test_an_exception_outlives_its_owner(cluster):
    actor, pid = owner()
    references = ray.get(actor.submit_and_wait.remote(fail))
    kill(pid)
    wait_until_dead(pid)
    with pytest.raises(KeyError, match="in the task"):
        ray.get(references[0], timeout=20)


def test_values_of_the_dead_are_arguments_of_tasks(cluster):
    actor, pid = owner()
    references = ray.get(actor.put.remote(np.full(LARGE, 2, np.uint8), 7))
    kill(pid)
    wait_until_dead(pid)
    both = add.remote(*references)
    del references
    assert ray.get(both, timeout=20) == LARGE * 2 + 7


def test_references_are_passed_on_after_the_death_of_their_owner(cluster):
    actor, pid = owner()
    references = ray.get(actor.put.remote(np.full(LARGE, 4, np.uint8), "small"))
    kill(pid)
    wait_until_dead(pid)
    first, second = Reader.remote(), Reader.remote()
    ray.get(first.keep.remote(references))
    del references
    ray.get(first.pass_on.remote(second))
    ray.get(first.forget.remote())
    assert ray.get(second.read.remote(), timeout=20) == [LARGE * 4, "small"]


def test_an_owner_that_leaves_in_order_leaves_its_values_too(cluster):
    @ray.remote(num_cpus=0, max_calls=1)
    def put_once(value):
        return os.getpid(), [ray.put(value)]

    reader = Reader.remote()
    pid, references = ray.get(put_once.remote("value"))
    ray.get(reader.keep.remote(references))
    del references
    kill(pid)  # while it waits for the end of what it has lent
    assert ray.get(reader.read.remote(), timeout=20) == ["value"]


def test_what_was_still_computed_for_the_dead_is_an_error_that_names_its_owner(cluster, tmp_path):
    gate = Gate(tmp_path)
    actor, pid = owner()
    references = ray.get(actor.submit.remote(make, 10, gate))
    there = ray.get(actor.put.remote("there"))
    kill(pid)
    with pytest.raises(OwnerDiedError, match=rf"pid {pid}.*(SIGKILL|signal 9)"):
        ray.get(references[0], timeout=20)
    gate.open()
    assert ray.get(there[0], timeout=20) == "there"


def test_blocks_in_segments_of_living_workers_are_given_back(cluster):
    """A result lies in the segment of the worker that made it, which lives; its owner, which has died, was to free it.

    What `nothing_left` sees afterwards is that the segment has gone, because nothing else is in it.
    """
    wait_until(lambda: not node_statistics()["estates"], what="the end of what tests before this one have left")
    before = used_bytes()
    actor, pid = owner()
    ray.get(actor.keep_result.remote(make, 20 * LARGE))
    assert used_bytes() >= before + 20 * LARGE
    kill(pid)
    wait_until(lambda: used_bytes() < before + 20 * LARGE, what="the end of a block that nobody knows any more")
