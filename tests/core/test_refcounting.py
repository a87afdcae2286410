"""Objects live exactly as long as somebody can reach them."""

import gc

import numpy as np
import pytest

import ray
from tests.core.helpers import Gate, wait_until

MEGABYTES = 1_000_000
STORE_BYTES = 100 * MEGABYTES
BLOCK = 20 * MEGABYTES  # four of them fit, with room for what a store needs besides


@pytest.fixture
def small_store(fresh_cluster):
    fresh_cluster(num_cpus=2, object_store_memory=STORE_BYTES)


def block(value=0):
    return np.full(BLOCK, value, dtype=np.uint8)


def put_with_patience(value):
    """Put a block as soon as there is room; what another process frees takes a moment to arrive."""

    def attempt():
        try:
            return ray.put(block(value))
        except ray.exceptions.ObjectStoreFullError:
            return None

    return wait_until(attempt, what="room in the store")


@ray.remote
def make_block(value=0):
    return np.full(BLOCK, value, dtype=np.uint8)


def test_an_object_stays_while_its_reference_does(cluster):
    reference = ray.put("kept")
    gc.collect()
    assert ray.get(reference) == "kept"


def test_dropped_objects_make_room(small_store):
    for value in range(20):
        assert ray.get(ray.put(block(value)))[0] == value


def test_dropped_results_make_room(small_store):
    for value in range(20):
        assert ray.get(make_block.remote(value))[0] == value


def test_dropped_arguments_make_room(small_store):
    @ray.remote
    def first(array):
        return int(array[0])

    assert [ray.get(first.remote(block(value))) for value in range(20)] == list(range(20))


def test_results_that_nobody_fetches_make_room(small_store):
    for _ in range(20):
        ray.wait([make_block.remote()])
    assert ray.get(make_block.remote(3))[0] == 3


def test_an_object_lives_while_a_task_needs_it(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late(gate_open):
        return None

    @ray.remote
    def wait_for_gate():
        gate.wait()

    @ray.remote
    def read(array, _):
        return int(array.sum())

    reference = ray.put(np.ones(1_000_000, dtype=np.int64))
    result = read.remote(reference, wait_for_gate.remote())
    del reference
    gc.collect()
    gate.open()
    assert ray.get(result) == 1_000_000


def test_a_reference_inside_an_argument_keeps_its_object(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def read(references):
        gate.wait()
        return ray.get(references[0])

    result = read.remote([ray.put("nested")])
    gc.collect()
    gate.open()
    assert ray.get(result) == "nested"


def test_a_reference_inside_an_object_keeps_its_object(cluster):
    outer = ray.put([ray.put([ray.put("innermost")])])
    gc.collect()
    (middle,) = ray.get(outer)
    (inner,) = ray.get(middle)
    assert ray.get(inner) == "innermost"


def test_a_reference_outlives_the_object_that_brought_it(cluster):
    outer = ray.put([ray.put("inner")])
    (inner,) = ray.get(outer)
    del outer
    gc.collect()
    assert ray.get(inner) == "inner"


def test_a_reference_returned_by_a_task_keeps_its_object(cluster):
    @ray.remote
    def make():
        return [ray.put(np.full(200_000, 5))]

    (reference,) = ray.get(make.remote())
    assert ray.get(reference)[0] == 5


def test_references_returned_through_two_tasks(cluster):
    @ray.remote
    def inner():
        return [ray.put("deep")]

    @ray.remote
    def outer():
        return ray.get(inner.remote())

    (reference,) = ray.get(outer.remote())
    assert ray.get(reference) == "deep"


def test_a_reference_stored_in_an_actor_keeps_its_object(cluster):
    @ray.remote
    class Keeper:
        def keep(self, references):
            self.references = references

        def read(self):
            return ray.get(self.references[0])

        def give(self):
            return self.references

    keeper = Keeper.remote()
    ray.get(keeper.keep.remote([ray.put("borrowed")]))
    gc.collect()
    assert ray.get(keeper.read.remote()) == "borrowed"
    (back,) = ray.get(keeper.give.remote())
    ray.kill(keeper)
    assert ray.get(back) == "borrowed"


def test_a_borrower_may_pass_a_reference_on(cluster):
    @ray.remote
    class Keeper:
        def keep(self, references):
            self.references = references

        def pass_on(self, other):
            ray.get(other.keep.remote(self.references))
            self.references = None

        def read(self):
            return ray.get(self.references[0])

    first, second = Keeper.remote(), Keeper.remote()
    ray.get(first.keep.remote([ray.put("passed on")]))
    gc.collect()
    ray.get(first.pass_on.remote(second))
    assert ray.get(second.read.remote()) == "passed on"


def test_the_death_of_a_borrower_frees_what_it_held(small_store):
    @ray.remote
    class Keeper:
        def keep(self, references):
            self.references = references

    for value in range(8):
        keeper = Keeper.remote()
        ray.get(keeper.keep.remote([put_with_patience(value)]))
        ray.kill(keeper)
    assert ray.get(put_with_patience(9))[0] == 9


def test_a_borrower_that_forgets_frees_what_it_held(small_store):
    @ray.remote
    class Keeper:
        def keep(self, references):
            self.references = references

    keeper = Keeper.remote()
    for value in range(12):
        ray.get(keeper.keep.remote([put_with_patience(value)]))
    assert ray.get(put_with_patience(3))[0] == 3


def test_a_failed_task_frees_its_arguments(small_store):
    @ray.remote
    def fail(array):
        raise ValueError

    for _ in range(12):
        with pytest.raises(ValueError):  # noqa: PT011
            ray.get(fail.remote(ray.put(block())))
    assert ray.get(ray.put(block(3)))[0] == 3


def test_a_view_keeps_a_block_and_its_end_frees_it(small_store):
    views = [ray.get(ray.put(block(value))) for value in range(3)]
    gc.collect()
    assert [view[-1] for view in views] == [0, 1, 2]
    del views
    for value in range(8):
        assert ray.get(ray.put(block(value)))[0] == value


def test_two_references_to_one_object_count_as_two(cluster):
    first = ray.put("twice")
    (second,) = ray.get(ray.put([first]))
    del first
    gc.collect()
    assert ray.get(second) == "twice"


def test_references_in_a_cycle_of_python_objects_are_freed(small_store):
    class Node:
        pass

    for value in range(12):
        node = Node()
        node.me, node.reference = node, ray.put(block(value))
        del node
        gc.collect()
    assert ray.get(ray.put(block(3)))[0] == 3


def test_a_reference_used_as_its_own_waiting_argument(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()
        return 1

    @ray.remote
    def add(a, b):
        return a + b

    reference = late.remote()
    reference = add.remote(reference, reference)
    gc.collect()
    gate.open()
    assert ray.get(reference) == 2


def test_an_actor_dies_when_the_last_object_with_its_handle_goes(cluster):
    import os

    from tests.core.helpers import is_alive

    @ray.remote
    class Counted:
        def process_id(self):
            return os.getpid()

    actor = Counted.remote()
    pid = ray.get(actor.process_id.remote())
    holder = ray.put([actor])
    del actor
    gc.collect()
    del holder
    gc.collect()
    wait_until(lambda: not is_alive(pid), what="end of the actor")


def test_a_lost_result_can_be_asked_for_in_a_nested_list(cluster):
    @ray.remote
    def collect(references):
        return sum(ray.get(references))

    assert ray.get(collect.remote([ray.put(i) for i in range(100)])) == 4950


@pytest.mark.skate
def test_an_idle_worker_keeps_nothing_of_its_last_task(small_store):
    @ray.remote
    def total(array):
        return int(array[0])

    # The store holds three: an argument that the idle worker kept would soon be one too many.
    for value in range(8):
        assert ray.get(total.remote(ray.put(block(value)))) == value
        assert ray.get(ray.put(block(value)))[0] == value


@pytest.mark.skate
def test_an_actor_keeps_nothing_of_its_constructor_s_arguments(small_store):
    @ray.remote(num_cpus=0)
    class Reader:
        def __init__(self, array):
            self.first = int(array[0])

        def read(self):
            return self.first

    readers = [Reader.remote(ray.put(block(value))) for value in range(2)]
    assert ray.get([reader.read.remote() for reader in readers]) == [0, 1]
    gc.collect()
    held = [ray.put(block(value)) for value in range(3)]
    assert [ray.get(reference)[0] for reference in held] == [0, 1, 2]


def test_what_a_constructor_keeps_outlives_its_creator_s_references(cluster):
    @ray.remote(num_cpus=0)
    class Keeper:
        def __init__(self, keepers, references):
            self.keepers, self.references = keepers, references

        def count(self):
            return len(self.keepers) + sum(ray.get(keeper.count.remote()) for keeper in self.keepers)

        def values(self):
            return ray.get(self.references)

    inner = [Keeper.remote([], []) for _ in range(2)]
    outer = Keeper.remote(inner, [ray.put("kept"), ray.remote(lambda x: x).remote("too")])
    ray.get([actor.count.remote() for actor in [*inner, outer]])
    del inner
    gc.collect()
    for _ in range(3):
        assert ray.get(outer.count.remote()) == 2
        assert ray.get(outer.values.remote()) == ["kept", "too"]
