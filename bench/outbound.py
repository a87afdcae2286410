"""What it costs to be reached through the head: an actor on a node that only connects outwards, beside one on a node
that listens. Both are other nodes than the driver's, all on this machine, so that the head takes processor time from
the two who talk.

python bench/outbound.py [--tls] [--samples 5]
"""

import argparse
import statistics
import time

import numpy as np

import ray
from ray.cluster_utils import Cluster

STORE_BYTES = 1 << 30
LARGE_BYTES = 256 << 20
CALLS_ONE_BY_ONE = 2000
CALLS_AT_ONCE = 20_000


@ray.remote
class Echo:
    def nothing(self):
        return None

    def make(self, size):
        return np.ones(size, dtype=np.uint8)


def per_second(count, step):
    started = time.perf_counter()
    step()
    return count / (time.perf_counter() - started)


def one_by_one(actor):
    return per_second(CALLS_ONE_BY_ONE, lambda: [ray.get(actor.nothing.remote()) for _ in range(CALLS_ONE_BY_ONE)])


def at_once(actor):
    return per_second(CALLS_AT_ONCE, lambda: ray.get([actor.nothing.remote() for _ in range(CALLS_AT_ONCE)]))


def megabytes(actor):
    value = actor.make.remote(LARGE_BYTES)
    ray.wait([value], fetch_local=False)
    return per_second(LARGE_BYTES / 1e6, lambda: ray.get(value))


MEASURES = {"calls one by one, 1/s": one_by_one, "calls at once, 1/s": at_once, "a value of 256 MiB, MB/s": megabytes}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--samples", type=int, default=5)
    arguments = parser.parse_args()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES}, tls=arguments.tls
    )
    common = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    # The driver is on a node of its own, as programs beside a cluster are, and not on the head's.
    beside = cluster.add_node(**common)
    cluster.add_node(**common, resources={"direct": 1})
    cluster.add_node(**common, resources={"relayed": 1}, outbound_only=True)
    ray.init(beside.address, logging_level="ERROR", log_to_driver=False)
    cluster.wait_for_nodes()
    ways = ("direct", "relayed")
    actors = {way: Echo.options(num_cpus=0, resources={way: 1}).remote() for way in ways}
    ray.get([actor.nothing.remote() for actor in actors.values()])
    for name, measure in MEASURES.items():
        samples = {way: [] for way in ways}
        for _ in range(arguments.samples):
            for way in ways:  # in turns: whatever else the machine does meets both
                samples[way].append(measure(actors[way]))
        shown = (f"{way} {statistics.median(found):9.0f} (best {max(found):9.0f})" for way, found in samples.items())
        print(f"{name:28}  {'   '.join(shown)}", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
