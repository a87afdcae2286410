"""Values that lie on one node and are read on others."""

import os
import signal

import pytest

import ray
from ray.exceptions import ObjectLostError, ObjectStoreFullError, OwnerDiedError
from tests.core.helpers import Tally, wait_until

np = pytest.importorskip("numpy")

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start

MIB = 1 << 20
EMPTY_S = 40  # copies that nobody holds are kept for a while


def node(name, **arguments):
    return {"num_cpus": 1, "resources": {name: 100}, **arguments}


def at(name):
    """Options of what is to run on the node of this name."""
    return {"num_cpus": 0, "resources": {name: 1}}


@pytest.fixture
def trio(start_cluster):
    """A head, on which this driver is, and two more nodes."""
    return start_cluster(node("b"), node("c"), head=node("a"))


def array(seed, size=2 * MIB):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@ray.remote
def make(seed, size=2 * MIB):
    return array(seed, size)


@ray.remote
def total(value):
    return int(value.sum())


@ray.remote
def statistics():
    from ray._runtime import session

    return session.request("stats")


@ray.remote
class Holder:
    """Keeps what it is given, and puts what it is asked for."""

    def __init__(self):
        self.kept = {}

    def put(self, seed, size=2 * MIB):
        return [ray.put(array(seed, size))]

    def make(self, seed, size=2 * MIB):
        return array(seed, size)

    def keep(self, name, refs):
        self.kept[name] = refs

    def read(self, name):
        return int(ray.get(self.kept[name][0]).sum())

    def load(self, name):
        self.kept[name] = [ray.get(self.kept[name][0])]

    def drop(self, name):
        del self.kept[name]

    def bytes_in_use(self):
        from ray._runtime import session

        return session.require().statistics()["store_used_bytes"]

    def pid(self):
        return os.getpid()


def seen(name):
    return ray.get(statistics.options(**at(name)).remote(), timeout=20)


def sum_of(seed, size=2 * MIB):
    return int(array(seed, size).sum())


def test_what_a_driver_puts_is_read_by_tasks_and_actors_of_other_nodes(trio):
    ref = ray.put(array(1))
    tasks = [total.options(**at(name)).remote(ref) for name in "abc"]
    holder = Holder.options(**at("b")).remote()
    holder.keep.remote("x", [ref])
    assert ray.get([*tasks, holder.read.remote("x")], timeout=20) == [sum_of(1)] * 4


def test_what_tasks_and_actors_make_elsewhere_is_read_by_the_driver(trio):
    holder = Holder.options(**at("b")).remote()
    refs = [make.options(**at("b")).remote(1), make.options(**at("c")).remote(2), holder.make.remote(3)]
    (put,) = ray.get(holder.put.remote(4), timeout=20)
    values = ray.get([*refs, put], timeout=20)
    for seed, value in enumerate(values, 1):
        assert np.array_equal(value, array(seed))
        assert not value.flags.writeable
    assert values[0] is not ray.get(refs[0])
    assert np.shares_memory(values[0], ray.get(refs[0])), "a second reader finds the copy"


def test_a_reference_goes_through_three_nodes(trio):
    @ray.remote
    def pass_on(refs, names):
        if names:
            return ray.get(pass_on.options(**at(names[0])).remote(refs, names[1:]))
        return int(ray.get(refs[0]).sum()), ray.get_runtime_context().get_node_id()

    _, (_, c) = trio
    mine = ray.put(array(1))
    (theirs,) = ray.get(Holder.options(**at("b")).remote().put.remote(2), timeout=20)
    assert theirs is not None
    result = pass_on.options(**at("b")).remote([mine], ["a", "c"])
    assert ray.get(result, timeout=20) == (sum_of(1), c.node_id)


def test_owner_value_and_reader_on_three_nodes(trio):
    @ray.remote
    def own():
        ref = make.options(**at("b")).remote(5)
        ray.wait([ref], fetch_local=False)
        return ray.get(total.options(**at("c")).remote(ref))

    assert ray.get(own.remote(), timeout=20) == sum_of(5)
    ref = make.options(**at("b")).remote(6)
    ray.wait([ref], fetch_local=False)
    assert ray.get(total.options(**at("c")).remote(ref), timeout=20) == sum_of(6)
    assert seen("c")["pulls_finished"] == 2
    assert seen("a")["pulls_finished"] == 0, "what the driver only owns is not brought to it"


def test_many_readers_of_one_object_cost_one_transfer_for_each_node(trio):
    ref = ray.put(array(1, 8 * MIB))
    keepers = {name: Holder.options(**at(name)).remote() for name in "bc"}
    for keeper in keepers.values():
        keeper.keep.remote("x", [ref])
        ray.get(keeper.load.remote("x"), timeout=20)  # so that the copies stay
    sums = [total.options(**at(name)).remote(ref) for _ in range(8) for name in "abc"]
    assert ray.get(sums, timeout=40) == [sum_of(1, 8 * MIB)] * 24
    assert [seen(name)["pulls_finished"] for name in "abc"] == [0, 1, 1]


def test_a_value_outlives_the_worker_that_made_it_for_owners_on_other_nodes(trio):
    maker = Holder.options(**at("b")).remote()
    ref = maker.make.remote(7)
    ray.wait([ref], fetch_local=False)
    pid = ray.get(maker.pid.remote(), timeout=20)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: seen("b")["segments_adopted"], what="adoption")
    assert ray.get(total.options(**at("c")).remote(ref), timeout=20) == sum_of(7)
    assert np.array_equal(ray.get(ref, timeout=20), array(7))
    assert seen("b")["segments_adopted"] == 1, "its owner, on another node, has claimed a block"
    del ref
    wait_until(lambda: not seen("b")["segments_adopted"], what="the end of the segment")


def test_what_nobody_refers_to_any_more_leaves_the_stores_of_all_nodes(trio):
    def held(name):
        now = seen(name)
        return now["store_bytes_used"] - now["store_bytes_warm"]

    before = {name: held(name) for name in "abc"}
    maker, keeper = (Holder.options(**at(name)).remote() for name in "bc")
    refs = [maker.make.remote(1, 8 * MIB), maker.make.remote(2, 8 * MIB), *ray.get(maker.put.remote(3, 8 * MIB))]
    keeper.keep.remote("x", refs[:1])
    ray.get(keeper.load.remote("x"), timeout=20)
    assert len(ray.get(refs, timeout=20)) == 3
    assert held("b") >= 24 * MIB
    assert held("c") >= 8 * MIB
    del refs
    ray.kill(maker)
    wait_until(lambda: held("b") < 24 * MIB, EMPTY_S, "the end of the segments in which nothing is alive")
    assert held("b") >= 8 * MIB, "a view on a copy counts as a reference to its object"
    assert held("c") >= 8 * MIB
    ray.get(keeper.drop.remote("x"), timeout=20)
    wait_until(lambda: all(held(name) <= before[name] for name in "abc"), EMPTY_S, "empty stores")
    assert [seen(name)["copies"] for name in "abc"] == [0, 0, 0]


def test_a_block_is_free_for_the_process_that_has_it_when_its_owner_elsewhere_lets_go(trio):
    maker = Holder.options(**at("b")).remote()
    ref = maker.make.remote(1, 8 * MIB)
    assert ray.get(total.options(**at("c")).remote(ref), timeout=20) == sum_of(1, 8 * MIB)
    assert ray.get(maker.bytes_in_use.remote(), timeout=20) >= 8 * MIB
    del ref
    wait_until(lambda: ray.get(maker.bytes_in_use.remote(), timeout=20) == 0, what="the free")


def test_what_a_lost_node_took_along_is_made_again_with_all_that_it_is_made_of(start_cluster, tmp_path):
    @ray.remote
    def first(tally):
        tally.add()
        return array(1)

    @ray.remote
    def second(tally, value):
        tally.add()
        return value[::-1].copy()

    cluster, (lost,) = start_cluster(node("b"), head=node("a"))
    tallies = [Tally(tmp_path), Tally(tmp_path)]
    one = first.options(**at("b")).remote(tallies[0])
    two = second.options(**at("b")).remote(tallies[1], one)
    ray.wait([two], fetch_local=False)
    del one  # only the lineage knows of it now
    assert [tally.count() for tally in tallies] == [1, 1]
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(**node("b"))
    assert np.array_equal(ray.get(two, timeout=30), array(1)[::-1])
    assert [tally.count() for tally in tallies] == [2, 2]


def test_a_task_that_needs_a_value_of_a_lost_node_gets_it_made_again(start_cluster):
    cluster, (lost, _) = start_cluster(node("b"), node("c"), head=node("a"))
    ref = make.options(num_cpus=0, resources={"b": 1}).remote(3)
    ray.wait([ref], fetch_local=False)
    cluster.remove_node(lost, allow_graceful=False)
    reader = total.options(**at("c")).remote(ref)
    cluster.add_node(**node("b"))
    assert ray.get(reader, timeout=30) == sum_of(3)


def test_what_cannot_be_made_again_is_lost_with_its_node_in_words(start_cluster):
    cluster, (lost, _) = start_cluster(node("b", node_name="basement"), node("c"), head=node("a"))
    holder = Holder.options(**at("b")).remote()
    made = holder.make.remote(1)
    (put,) = ray.get(holder.put.remote(2), timeout=20)
    ray.wait([made], fetch_local=False)
    cluster.remove_node(lost, allow_graceful=False)
    cluster.wait_for_nodes()
    with pytest.raises(ObjectLostError, match=r"was lost with its node .*basement") as caught:
        ray.get(made, timeout=20)
    assert not isinstance(caught.value, OwnerDiedError)
    with pytest.raises(OwnerDiedError, match="its node was lost"):
        ray.get(put, timeout=20)
    with pytest.raises(ObjectLostError, match="was lost with its node"):
        ray.get(total.options(**at("c")).remote(made), timeout=20)


def test_a_copy_that_has_no_room_is_refused_and_comes_when_there_is_some(start_cluster):
    start_cluster(node("b", object_store_memory=80 * MIB), head=node("a"))
    keeper = Holder.options(**at("b")).remote()
    keeper.keep.remote("own", ray.get(keeper.put.remote(1, 60 * MIB), timeout=20))
    keeper.load.remote("own")  # what somebody looks at is not spilled
    keeper.keep.remote("large", [ray.put(array(2, 100 * MIB))])
    keeper.keep.remote("mine", [ray.put(array(3, 40 * MIB))])
    with pytest.raises(ObjectStoreFullError, match="larger object_store_memory"):
        ray.get(keeper.read.remote("large"), timeout=20)
    with pytest.raises(ObjectStoreFullError, match="object store of this node is full"):
        ray.get(keeper.read.remote("mine"), timeout=40)
    keeper.drop.remote("own")
    assert ray.get(keeper.read.remote("mine"), timeout=40) == sum_of(3, 40 * MIB)
