"""What several nodes do, all of them on this machine: joining, work and values between them, groups, a lost node.

python bench/cluster.py            three samples of each
python bench/cluster.py --quick    one sample of each
python bench/cluster.py --only actors --actors 1000
"""

import argparse
import sys
import time

import measure
import numpy as np

import ray
from ray.cluster_utils import Cluster

NODES = 4
CPUS = 2
STORE_BYTES = 600_000_000
LARGE_BYTES = 100_000_000
BATCH = 1000
GROUPS = 100


@ray.remote(num_cpus=1)
def nothing():
    return None


@ray.remote(num_cpus=1)
def make(size):
    return np.ones(size, dtype=np.uint8)


@ray.remote(num_cpus=1)
def look(array):
    return int(array[0]) + int(array[-1])


@ray.remote
class Idle:
    def ready(self):
        return True


class Nodes:
    """A head without CPUs, on which this driver is, and nodes that have some: all work is on another node."""

    def __enter__(self):
        self.started = time.perf_counter()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
        self.nodes = [
            self.cluster.add_node(num_cpus=CPUS, resources={f"n{index}": 100}, object_store_memory=STORE_BYTES)
            for index in range(NODES)
        ]
        ray.init(self.cluster.address, logging_level="ERROR", log_to_driver=False)
        self.cluster.wait_for_nodes()
        ray.get([nothing.options(resources={f"n{index}": 1}).remote() for index in range(NODES)])
        self.start_s = time.perf_counter() - self.started
        return self

    def __exit__(self, *exc):
        ray.shutdown()
        self.cluster.shutdown()


def per_second(count, step):
    started = time.perf_counter()
    step()
    return count / (time.perf_counter() - started)


def start(samples, arguments):
    for _ in range(samples):
        with Nodes() as nodes:
            yield 1000 * nodes.start_s


def tasks(samples, arguments):
    with Nodes():
        run = lambda: ray.get([nothing.remote() for _ in range(BATCH)])  # noqa: E731
        run()
        for _ in range(samples):
            yield per_second(BATCH, run)


def calls(samples, arguments):
    with Nodes():
        actor = Idle.options(resources={"n0": 1}).remote()
        run = lambda: [ray.get(actor.ready.remote()) for _ in range(BATCH)]  # noqa: E731
        run()
        for _ in range(samples):
            yield per_second(BATCH, run)


def actors(samples, arguments):
    """Milliseconds for each of many actors, until all have answered."""
    for _ in range(samples):
        with Nodes():
            started = time.perf_counter()
            made = [Idle.options(num_cpus=0.001).remote() for _ in range(arguments.actors)]
            ray.get([actor.ready.remote() for actor in made])
            yield 1000 * (time.perf_counter() - started) / arguments.actors


def transfer(samples, arguments):
    """A value that another node has made, and that this one reads for the first time."""
    with Nodes():
        for number in range(samples + 1):
            reference = make.options(resources={"n0": 1}).remote(LARGE_BYTES)
            ray.wait([reference], fetch_local=False)
            started = time.perf_counter()
            array = ray.get(reference)
            rate = LARGE_BYTES / 1e9 / (time.perf_counter() - started)
            del array, reference
            if number:  # the first touches memory that nobody has touched before
                yield rate


def broadcast(samples, arguments):
    """One value, read on all nodes at once."""
    with Nodes():
        for number in range(samples + 1):
            reference = ray.put(np.ones(LARGE_BYTES, dtype=np.uint8))
            started = time.perf_counter()
            ray.get([look.options(resources={f"n{index}": 1}).remote(reference) for index in range(NODES)])
            took = 1000 * (time.perf_counter() - started)
            del reference
            if number:
                yield took


def groups(samples, arguments):
    """Many placement groups made, awaited and removed, one bundle each."""
    from ray.util.placement_group import placement_group, remove_placement_group

    with Nodes():
        for number in range(samples + 1):
            started = time.perf_counter()
            made = [placement_group([{"CPU": 0.01}]) for _ in range(GROUPS)]
            ray.get([group.ready() for group in made])
            for group in made:
                remove_placement_group(group)
            if number:
                yield 1000 * (time.perf_counter() - started)


def recompute(samples, arguments):
    """A lost value, from the death of its node until it is there again."""
    for _ in range(samples):
        with Nodes() as nodes:
            reference = make.options(resources={"n0": 1}, max_retries=3).remote(LARGE_BYTES // 10)
            ray.wait([reference], fetch_local=False)
            nodes.cluster.add_node(num_cpus=1, resources={"n0": 100}, object_store_memory=STORE_BYTES)
            nodes.cluster.wait_for_nodes()
            started = time.perf_counter()
            nodes.cluster.remove_node(nodes.nodes[0], allow_graceful=False)
            ray.get(reference, timeout=120)
            yield 1000 * (time.perf_counter() - started)


ROWS = {
    "cluster_start": ("ms", start),
    "tasks_on_other_nodes": ("tasks/s", tasks),
    "actor_call_sync_other_node": ("calls/s", calls),
    "actors_on_four_nodes": ("ms each", actors),
    "get_from_other_node": ("GB/s", transfer),
    "broadcast_to_four_nodes": ("ms", broadcast),
    "placement_groups_100": ("ms", groups),
    "recompute_after_node_death": ("ms", recompute),
}


def main():
    parser = argparse.ArgumentParser(description="Several nodes on one machine.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="comma-separated beginnings of row names")
    parser.add_argument("--actors", type=int, default=100, help="how many actors to make on four nodes")
    arguments = parser.parse_args()
    for name, (unit, row) in ROWS.items():
        if not name.startswith(tuple(arguments.only.split(","))):
            continue
        try:
            measure.report(name, unit, list(row(1 if arguments.quick else 3, arguments)))
        except Exception as error:
            measure.report_error(name, unit, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
