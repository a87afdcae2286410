"""Whether memory stays flat: a million tasks, and a hundred thousand puts.

Memory is looked at twenty times during each run. Growth is the difference between the last look
and the one at a fifth of the way, when caches and tables have filled. All references are dropped
as soon as they have been used, so growth should be close to zero however long the run.

    python bench/memory.py
    python bench/memory.py --tasks 100000 --puts 10000
"""

import argparse
import os
import sys
import time

import measure
import numpy as np
import processes

import ray

LOOKS = 20
SETTLED_AT = LOOKS // 5
TASKS_IN_FLIGHT = 1000
PUT_SIZES_BYTES = (1_000, 200_000, 2_000_000)  # inside a reply, a small block, a large block


@ray.remote
def payload(number):
    return bytes(100 + number % 1000)


def run_tasks(first, count):
    for start in range(first, first + count, TASKS_IN_FLIGHT):
        stop = min(start + TASKS_IN_FLIGHT, first + count)
        ray.get([payload.remote(number) for number in range(start, stop)])


def run_puts(first, count):
    arrays = [np.zeros(size, dtype=np.uint8) for size in PUT_SIZES_BYTES]
    for number in range(first, first + count):
        reference = ray.put(arrays[number % len(arrays)])
        assert ray.get(reference).nbytes == PUT_SIZES_BYTES[number % len(arrays)]


def look():
    """Return the megabytes of (driver, all processes, shared memory of all)."""
    driver, _ = processes.memory(os.getpid())
    everything, shared = processes.memory_of_all([os.getpid(), *processes.descendants(os.getpid())])
    return driver / 1e6, everything / 1e6, shared / 1e6


def watch(name, load, total):
    share = max(1, total // LOOKS)
    looks, started = [], time.perf_counter()
    for number in range(LOOKS):
        load(number * share, share)
        looks.append(look())
        print(f"{name}: {(number + 1) * share:,} done, MB {looks[-1]}", file=sys.stderr)
    seconds = time.perf_counter() - started
    for part, values in zip(("driver", "cluster", "shared"), zip(*looks, strict=True), strict=True):
        measure.report(f"memory_{name}_{part}_growth", "MB", [values[-1] - values[SETTLED_AT]])
        measure.report(f"memory_{name}_{part}_peak", "MB", [max(values)])
    measure.report(f"memory_{name}_rate", "1/s", [share * LOOKS / seconds])


def main():
    parser = argparse.ArgumentParser(description="Flat memory over long runs.")
    parser.add_argument("--tasks", type=int, default=None)
    parser.add_argument("--puts", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="20,000 tasks and 2,000 puts")
    arguments = parser.parse_args()
    tasks = arguments.tasks or (20_000 if arguments.quick else 1_000_000)
    puts = arguments.puts or (2_000 if arguments.quick else 100_000)

    ray.init(logging_level="ERROR", log_to_driver=False)
    watch("tasks", run_tasks, tasks)
    watch("puts", run_puts, puts)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
