"""What it costs to have a local cluster: time to start and stop, memory, processes, idle CPU.

Every sample is taken in an interpreter of its own, since an import happens only once.

    python bench/startup.py            five samples
    python bench/startup.py --quick    two samples, and a shorter look at the idle cluster
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import measure
import processes

SETTLE_S = 3.0  # Ray starts its workers in the background after `init` has returned
STOP_LIMIT_S = 15.0

UNITS = {
    "import": "ms",
    "init": "ms",
    "first_task": "ms",
    "import_to_first_result": "ms",
    "second_task": "ms",
    "cluster_pss": "MB",
    "cluster_processes": "processes",
    "cluster_threads": "threads",
    "driver_threads": "threads",
    "idle_cpu": "% of a core",
    "shutdown": "ms",
    "shutdown_all_gone": "ms",
}


def sample_here(idle_s):
    """Go through the life of a cluster once, in this process; return one figure per row."""
    driver = os.getpid()
    clock = Clock()
    import ray

    found = {"import": clock.lap()}
    ray.init(logging_level="ERROR", log_to_driver=False)
    found["init"] = clock.lap()
    double = ray.remote(lambda number: 2 * number)
    assert ray.get(double.remote(21)) == 42
    found["first_task"] = clock.lap()
    found["import_to_first_result"] = clock.total()
    ray.get(double.remote(21))
    found["second_task"] = clock.lap()

    time.sleep(SETTLE_S)  # measured is a cluster at rest, so time has to pass
    others = processes.descendants(driver)
    pss, _ = processes.memory_of_all([driver, *others])
    found["cluster_pss"] = pss / 1e6
    found["cluster_processes"] = len(others)
    found["cluster_threads"] = sum(map(processes.thread_count, others))
    found["driver_threads"] = processes.thread_count(driver)
    found["idle_cpu"] = idle_percent([driver, *others], idle_s)

    clock.lap()
    ray.shutdown()
    found["shutdown"] = clock.lap()
    wait_until_gone(others)
    found["shutdown_all_gone"] = found["shutdown"] + clock.lap()
    return found


class Clock:
    def __init__(self):
        self.started = self.last = time.perf_counter()

    def lap(self):
        """Return the milliseconds since the last lap."""
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return 1000 * lap

    def total(self):
        return 1000 * (self.last - self.started)


def idle_percent(pids, seconds):
    before = sum(map(processes.cpu_seconds, pids))
    time.sleep(seconds)
    return 100 * (sum(map(processes.cpu_seconds, pids)) - before) / seconds


def wait_until_gone(pids):
    deadline = time.perf_counter() + STOP_LIMIT_S
    while any(processes.parent_of(pid) is not None for pid in pids):
        if time.perf_counter() > deadline:
            message = f"processes are still there {STOP_LIMIT_S} s after shutdown"
            raise TimeoutError(message)
        time.sleep(0.002)


def sample_elsewhere(idle_s):
    command = [sys.executable, __file__, "--one", "--idle-s", str(idle_s)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description="Cost of having a local cluster.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--idle-s", type=float, default=None, help="how long to watch the idle cluster")
    parser.add_argument("--only", default="", help="comma-separated beginnings of row names")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    idle_s = arguments.idle_s or (2.0 if arguments.quick else 5.0)
    if arguments.one:
        print(json.dumps(sample_here(idle_s)))
        return 0

    samples = [sample_elsewhere(idle_s) for _ in range(arguments.samples or (2 if arguments.quick else 5))]
    for name, unit in UNITS.items():
        if name.startswith(tuple(arguments.only.split(","))):
            measure.report(name, unit, [sample[name] for sample in samples])
    return 0


if __name__ == "__main__":
    sys.exit(main())
