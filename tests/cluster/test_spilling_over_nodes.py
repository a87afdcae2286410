"""Values of an owner on one node that leave the memory of another, and are read from its disk."""

import numpy as np
import pytest

import ray
from ray._runtime import session
from tests.core.helpers import wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # several nodes, whose stores are filled several times

MIB = 1 << 20
STORE = 64 * MIB


def stats():
    return session.request("stats")


def block(seed, mib=4):
    return np.random.default_rng(seed).integers(0, 1 << 62, size=mib * MIB // 8)


@ray.remote(resources={"there": 0.5})
def make(seed):
    return block(seed)


@ray.remote(resources={"there": 0.5})
def counts():
    return session.request("stats")


def spilled_there():
    return ray.get(counts.remote())["spilled_values"]


@pytest.fixture
def two_nodes(start_cluster):
    there = {"num_cpus": 2, "resources": {"there": 1}, "object_store_memory": STORE}
    return start_cluster(there, head={"object_store_memory": STORE})


def test_results_on_another_node_leave_its_memory_and_are_read_from_its_disk(two_nodes):
    refs = [make.remote(seed) for seed in range(48)]
    ray.wait(refs, num_returns=48, fetch_local=False)
    assert spilled_there() >= 24
    for seed, ref in enumerate(refs):
        assert (ray.get(ref) == block(seed)).all()
    refs.clear()
    wait_until(lambda: not spilled_there(), what="the end of the values there")


def test_a_sort_over_two_nodes(two_nodes):
    blocks, ranges = 24, 24
    size = 3 * STORE // blocks // 8
    edges = np.linspace(0, 1 << 62, ranges + 1)[1:-1]

    @ray.remote(scheduling_strategy="SPREAD")
    def generate(seed):
        return np.random.default_rng(seed).integers(0, 1 << 62, size=size)

    @ray.remote(num_returns=ranges, scheduling_strategy="SPREAD")
    def partition(values):
        values = np.sort(values)
        return tuple(np.split(values, np.searchsorted(values, edges)))

    @ray.remote(scheduling_strategy="SPREAD")
    def merge(*parts):
        return np.sort(np.concatenate(parts))

    parts = [partition.remote(generate.remote(seed)) for seed in range(blocks)]
    merged = [merge.remote(*(part[at] for part in parts)) for at in range(ranges)]
    del parts
    before, count = -1, 0
    for ref in merged:
        values = ray.get(ref)
        assert before <= values[0]
        assert (np.diff(values) >= 0).all()
        before, count = int(values[-1]), count + len(values)
        del values
    assert count == blocks * size


def test_a_node_that_dies_takes_its_disk_along_and_values_are_made_again(two_nodes):
    cluster, (there,) = two_nodes
    refs = [make.remote(seed) for seed in range(24)]
    ray.wait(refs, num_returns=24, fetch_local=False)
    assert spilled_there()
    cluster.remove_node(there, allow_graceful=False)
    cluster.add_node(num_cpus=2, resources={"there": 1}, object_store_memory=STORE)
    assert all((ray.get(ref) == block(seed)).all() for seed, ref in enumerate(refs))
