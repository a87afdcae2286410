"""Three nodes on this machine: tasks spread over them, a placement group, and a value that all of them read.

The same program runs on three machines: start a head on one with `ray start --head`, join on the others with
`ray start --address=...`, and replace the cluster made here by `ray.init("auto")`.

The exit status is not zero if a node was left out, or a sum is wrong.
"""

import sys
import time

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

try:
    import numpy as np
except ImportError as missing:
    raise SystemExit(f"This example needs numpy ({missing}): pip install numpy") from None

NODES = 3
VALUE_BYTES = 32 << 20


@ray.remote(scheduling_strategy="SPREAD")
def where(seconds):
    """Return the node on which this runs."""
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


@ray.remote
def total(array, part):
    """Return the sum of one of three parts, and where it was made."""
    return float(np.array_split(array, NODES)[part].sum()), ray.get_runtime_context().get_node_id()


@ray.remote
class Counter:
    """Counts, and knows where it lives."""

    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return self.count, ray.get_runtime_context().get_node_id()


def spread():
    places = ray.get([where.remote(0.1) for _ in range(2 * NODES)])
    print(f"{len(places)} tasks ran on {len(set(places))} nodes.")
    return len(set(places)) == NODES


def group():
    """Reserve a CPU on each node, all or nothing, and put an actor into each bundle."""
    started = time.perf_counter()
    bundles = placement_group([{"CPU": 1}] * NODES, strategy="STRICT_SPREAD")
    ray.get(bundles.ready())
    print(f"A placement group over {NODES} nodes was ready after {1000 * (time.perf_counter() - started):.0f} ms.")
    counters = [
        Counter.options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, index)).remote()
        for index in range(NODES)
    ]
    counts = ray.get([counter.increment.remote() for counter in counters])
    print(f"Its actors live on {len({node for _, node in counts})} nodes.")
    remove_placement_group(bundles)
    return len({node for _, node in counts}) == NODES


def broadcast():
    """Put a value once; every node that needs it gets one copy, however many of its tasks read it."""
    array = np.arange(VALUE_BYTES // 8, dtype=np.int64)
    started = time.perf_counter()
    reference = ray.put(array)
    tasks = [total.options(scheduling_strategy="SPREAD").remote(reference, part % NODES) for part in range(2 * NODES)]
    sums = ray.get(tasks)
    took = time.perf_counter() - started
    nodes = {node for _, node in sums}
    print(f"{len(sums)} tasks on {len(nodes)} nodes read {VALUE_BYTES >> 20} MiB each in {1000 * took:.0f} ms.")
    return sum(value for value, _ in sums) == 2 * float(array.sum())


def main():
    started = time.perf_counter()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=2)
    ray.init(cluster.address)
    cluster.wait_for_nodes()
    print(f"{NODES} nodes run after {time.perf_counter() - started:.1f} s, at {cluster.address}.")
    fine = [spread(), group(), broadcast()]
    ray.shutdown()
    cluster.shutdown()
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
