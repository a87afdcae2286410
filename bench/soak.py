"""A long run: ten million tasks and a hundred thousand actors on three nodes, and memory that stays as it was.

    python bench/soak.py                                      everything; `make soak`
    python bench/soak.py --tasks 100000 --actors 1000         less

Every result is checked. Memory is that of the node processes, the first of which is the head with the control service,
after each twentieth of the run. What it is in the last quarter may be no more than `--growth` above what it was after
the first tenth, when tables and histories that have a limit are full; otherwise the exit status is 1.
"""

import argparse
import statistics
import sys
import time

import measure
import processes

import ray
from ray.cluster_utils import Cluster

LOOKS = 20
SETTLED_AT = LOOKS // 10
LAST_LOOKS = LOOKS // 4
TASKS_AT_A_TIME = 2000
ACTORS_AT_A_TIME = 20
NODES = 2
CPUS = 2


@ray.remote(num_cpus=1)
def square(number):
    return number * number


@ray.remote(num_cpus=0)
class Sum:
    def __init__(self, start):
        self.total = start

    def add(self, number):
        self.total += number
        return self.total


def run_tasks(first, count):
    for start in range(first, first + count, TASKS_AT_A_TIME):
        numbers = range(start, min(start + TASKS_AT_A_TIME, first + count))
        assert ray.get([square.remote(number) for number in numbers]) == [number * number for number in numbers]


def run_actors(first, count):
    for start in range(first, first + count, ACTORS_AT_A_TIME):
        numbers = range(start, min(start + ACTORS_AT_A_TIME, first + count))
        actors = [Sum.remote(number) for number in numbers]
        assert ray.get([actor.add.remote(1) for actor in actors]) == [number + 1 for number in numbers]


def watch(name, load, total, nodes, growth_max):
    """Run a load in parts, with a look at the memory of each node after each. True if that has stayed as it was."""
    share = max(1, total // LOOKS)
    looks, started = [], time.perf_counter()
    for number in range(LOOKS):
        load(number * share, share)
        looks.append([processes.memory(node.pid)[0] / 1e6 for node in nodes])
        shown = ", ".join(f"{size:.1f}" for size in looks[-1])
        print(f"{name}: {(number + 1) * share:,} done, MB of nodes: {shown}", file=sys.stderr)
    measure.report(f"soak_{name}_rate", "1/s", [share * LOOKS / (time.perf_counter() - started)])
    flat = True
    for index, sizes in enumerate(zip(*looks, strict=True)):
        settled, last = sizes[SETTLED_AT - 1], statistics.median(sizes[-LAST_LOOKS:])
        which = "head" if index == 0 else f"node{index}"
        measure.report(f"soak_{name}_{which}_memory", "MB", [last])
        measure.report(f"soak_{name}_{which}_growth", "%", [100 * (last / settled - 1)])
        flat = flat and last <= settled * (1 + growth_max)
    return flat


def main():
    parser = argparse.ArgumentParser(description="Memory over a long run on several nodes.")
    parser.add_argument("--tasks", type=int, default=10_000_000)
    parser.add_argument("--actors", type=int, default=100_000)
    parser.add_argument("--growth", type=float, default=0.05, help="by which share memory may grow")
    arguments = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.head_node, *(cluster.add_node(num_cpus=CPUS) for _ in range(NODES))]
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        results = [
            watch("tasks", run_tasks, arguments.tasks, nodes, arguments.growth),
            watch("actors", run_actors, arguments.actors, nodes, arguments.growth),
        ]
    finally:
        ray.shutdown()
        cluster.shutdown()
    sys.exit(0 if all(results) else f"memory has grown by more than {arguments.growth:.0%} after the first tenth")


if __name__ == "__main__":
    main()
