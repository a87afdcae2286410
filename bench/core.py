"""Speed of tasks, actors and objects on one machine.

The rows have the definitions of Ray's classic microbenchmark, so that figures can be compared with
those that its users know; a few rows were added (latency percentiles, chains, long queues, new and
restarted actors). Uses the public API only: the same file runs on Ray and on Skate.

    python bench/core.py                      all rows; on Ray a quarter of an hour, for its 500 actors
    python bench/core.py --quick              shorter samples, smaller sizes
    python bench/core.py --only task_sync,put all rows whose name begins so
"""

import argparse
import dataclasses
import mmap
import os
import signal
import sys
import time

import measure
import numpy as np
import processes

import ray

BATCH = 1000  # calls that are in flight at once in the asynchronous rows
CORES = len(os.sched_getaffinity(0))
PEERS = max(2, CORES // 2)  # clients, and servers, in the rows with several of each

ROWS = {}


def row(*columns):
    """Register a function `(arguments) -> samples` (or a list of them) as the source of rows.

    `columns` are pairs of name and unit. A function with several columns yields (name, samples).
    """

    def register(function):
        ROWS[function.__name__] = (columns, function)
        return function

    return register


# -- Workloads --------------------------------------------------------------------------------


@ray.remote
def nothing():
    return b"ok"


@ray.remote
def successor(number):
    return number + 1


@ray.remote(num_cpus=0)
class Server:
    def nothing(self):
        return b"ok"

    def echo(self, value):
        return b"ok"

    def process_id(self):
        return os.getpid()


@ray.remote(num_cpus=0)
class AsyncServer:
    async def nothing(self):
        return b"ok"


@ray.remote(num_cpus=0)
class Client:
    """Runs a load from a process of its own."""

    def __init__(self, servers=()):
        self.servers = list(servers)

    def submit_tasks(self, count):
        ray.get([nothing.remote() for _ in range(count)])

    def call_servers(self, count):
        ray.get([self.servers[i % len(self.servers)].nothing.remote() for i in range(count)])

    def call_servers_with_object(self, count):
        stored = ray.put(0)
        ray.get([self.servers[i % len(self.servers)].echo.remote(stored) for i in range(count)])

    def put_small(self, count):
        for _ in range(count):
            ray.put(0)

    def put_large(self, size_bytes, count):
        array = np.zeros(size_bytes // 8, dtype=np.int64)
        for _ in range(count):
            ray.put(array)


def ready(*actors):
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    return actors if len(actors) > 1 else actors[0]


# -- Tasks ------------------------------------------------------------------------------------


@row(("task_sync", "1/s"))
def task_sync(arguments):
    return measure.rates(lambda: ray.get(nothing.remote()), 1, arguments.effort)


@row(("task_sync_p50", "us"), ("task_sync_p99", "us"))
def task_sync_latency(arguments):
    yield from percentiles("task_sync", lambda: ray.get(nothing.remote()), arguments.effort)


@row(("tasks_async", "1/s"))
def tasks_async(arguments):
    return measure.rates(lambda: ray.get([nothing.remote() for _ in range(BATCH)]), BATCH, arguments.effort)


@row(("tasks_async_multi_client", "1/s"))
def tasks_async_multi_client(arguments):
    clients = ready(*[Client.remote() for _ in range(PEERS)])
    return measure.rates(
        lambda: ray.get([client.submit_tasks.remote(BATCH) for client in clients]), BATCH * PEERS, arguments.effort
    )


@row(("task_chain_hop", "us"))
def task_chain(arguments, hops=200):
    """Tasks that each need the result of the one before; all are submitted at once."""

    def chain():
        reference = successor.remote(0)
        for _ in range(hops - 1):
            reference = successor.remote(reference)
        assert ray.get(reference) == hops

    return [1e6 / rate for rate in measure.rates(chain, hops, arguments.effort)]


@row(("tasks_queued_drained", "1/s"))
def tasks_queued(arguments):
    """Many tasks submitted at once and all waited for; one sample, since it is long."""
    ray.get([nothing.remote() for _ in range(BATCH)])
    count = arguments.queued
    started = time.perf_counter()
    references = [nothing.remote() for _ in range(count)]
    for first in range(0, count, 10_000):
        ray.get(references[first : first + 10_000])
    return [count / (time.perf_counter() - started)]


# -- Actor calls ------------------------------------------------------------------------------


@row(("actor_call_sync", "1/s"))
def actor_call_sync(arguments):
    server = ready(Server.remote())
    return measure.rates(lambda: ray.get(server.nothing.remote()), 1, arguments.effort)


@row(("actor_call_sync_p50", "us"), ("actor_call_sync_p99", "us"))
def actor_call_latency(arguments):
    server = ready(Server.remote())
    yield from percentiles("actor_call_sync", lambda: ray.get(server.nothing.remote()), arguments.effort)


@row(("actor_calls_async", "1/s"))
def actor_calls_async(arguments):
    server = ready(Server.remote())
    return measure.rates(lambda: ray.get([server.nothing.remote() for _ in range(BATCH)]), BATCH, arguments.effort)


@row(("actor_calls_threaded", "1/s"))
def actor_calls_threaded(arguments):
    server = ready(Server.options(max_concurrency=16).remote())
    return measure.rates(lambda: ray.get([server.nothing.remote() for _ in range(BATCH)]), BATCH, arguments.effort)


@row(("async_actor_call_sync", "1/s"))
def async_actor_call_sync(arguments):
    server = ready(AsyncServer.remote())
    return measure.rates(lambda: ray.get(server.nothing.remote()), 1, arguments.effort)


@row(("async_actor_calls_async", "1/s"))
def async_actor_calls_async(arguments):
    server = ready(AsyncServer.remote())
    return measure.rates(lambda: ray.get([server.nothing.remote() for _ in range(BATCH)]), BATCH, arguments.effort)


@row(("actor_calls_1_to_n", "1/s"))
def actor_calls_1_to_n(arguments):
    client = ready(Client.remote(ready(*[Server.remote() for _ in range(PEERS)])))
    count = BATCH * PEERS
    return measure.rates(lambda: ray.get(client.call_servers.remote(count)), count, arguments.effort)


@row(("actor_calls_n_to_n", "1/s"))
def actor_calls_n_to_n(arguments):
    servers = ready(*[Server.remote() for _ in range(PEERS)])
    clients = ready(*[Client.remote(servers) for _ in range(PEERS)])
    return measure.rates(
        lambda: ray.get([client.call_servers.remote(BATCH) for client in clients]), BATCH * PEERS, arguments.effort
    )


@row(("actor_calls_n_to_n_with_object", "1/s"))
def actor_calls_n_to_n_with_object(arguments):
    """Each client has a server of its own, and passes it a reference to an object it has put."""
    servers = ready(*[Server.remote() for _ in range(PEERS)])
    clients = ready(*[Client.remote([server]) for server in servers])
    return measure.rates(
        lambda: ray.get([client.call_servers_with_object.remote(BATCH) for client in clients]),
        BATCH * PEERS,
        arguments.effort,
    )


# -- Objects ----------------------------------------------------------------------------------


@row(("put_small", "1/s"))
def put_small(arguments):
    return measure.rates(lambda: ray.put(0), 1, arguments.effort)


@row(("put_small_multi_client", "1/s"))
def put_small_multi_client(arguments):
    clients = ready(*[Client.remote() for _ in range(PEERS)])
    return measure.rates(
        lambda: ray.get([client.put_small.remote(BATCH) for client in clients]), BATCH * PEERS, arguments.effort
    )


@row(("get_stored", "1/s"))
def get_stored(arguments):
    reference = ray.put(0)
    return measure.rates(lambda: ray.get(reference), 1, arguments.effort)


@row(("put_large", "GB/s"))
def put_large(arguments):
    array = np.zeros(arguments.put_bytes // 8, dtype=np.int64)
    array[:] = 1  # real pages: a fresh array of zeros is one page, mapped many times
    return measure.rates(lambda: ray.put(array), array.nbytes / 1e9, warm_store(arguments.effort))


@row(("put_large_multi_client", "GB/s"))
def put_large_multi_client(arguments):
    clients = ready(*[Client.remote() for _ in range(PEERS)])
    total = arguments.put_bytes * 4 * PEERS
    return measure.rates(
        lambda: ray.get([client.put_large.remote(arguments.put_bytes, 4) for client in clients]),
        total / 1e9,
        warm_store(arguments.effort),
    )


def warm_store(effort):
    """Give a store the time to touch its memory once; pages never touched cost ten times as much."""
    return dataclasses.replace(effort, warm_up_s=max(3.0, effort.warm_up_s))


@row(("memcpy_warm", "GB/s"))
def memcpy_warm(arguments):
    """The limit for `put_large`: one thread copying into shared memory that was touched before."""
    source = np.ones(arguments.put_bytes, dtype=np.uint8)
    target = np.frombuffer(mmap.mmap(-1, arguments.put_bytes), dtype=np.uint8)
    return measure.rates(lambda: np.copyto(target, source), source.nbytes / 1e9, arguments.effort)


@row(("wait_1000_refs", "1/s"))
def wait_1000_refs(arguments):
    """A thousand tasks, waited for one by one: a thousand calls of `wait` with ever fewer references."""

    def step():
        pending = [nothing.remote() for _ in range(1000)]
        while pending:
            _, pending = ray.wait(pending)

    return measure.rates(step, 1, arguments.effort)


@row(("wait_1000_ready_refs", "1/s"))
def wait_1000_ready_refs(arguments):
    """The same without the cost of the tasks: all references are ready before the first `wait`."""
    stored = [ray.put(number) for number in range(1000)]

    def step():
        pending = stored
        while pending:
            _, pending = ray.wait(pending)

    return measure.rates(step, 1, arguments.effort)


@row(("get_10000_refs", "1/s"))
def get_10000_refs(arguments):
    """An object that holds ten thousand references, read by a process that did not make them."""

    @ray.remote
    def many_references():
        return [ray.put(1) for _ in range(10_000)]

    reference = many_references.remote()
    ray.get(reference)
    return measure.rates(lambda: ray.get(reference), 1, arguments.effort)


# -- Placement groups -------------------------------------------------------------------------


@row(("groups_100_ready", "ms"), ("groups_100_removed", "ms"))
def groups_100(arguments):
    """A hundred groups of a hundredth of a CPU: until all are ready, and from there until all is free again."""
    whole = ray.available_resources()["CPU"]
    ready, removed = [], []
    for _ in range(arguments.effort.samples):
        started = time.perf_counter()
        groups = [ray.util.placement_group([{"CPU": 0.01}]) for _ in range(100)]
        ray.get([group.ready() for group in groups])
        ready.append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()
        for group in groups:
            ray.util.remove_placement_group(group)
        while ray.available_resources().get("CPU", 0) < whole:
            time.sleep(0.001)
        removed.append(1000 * (time.perf_counter() - started))
    yield "groups_100_ready", ready
    yield "groups_100_removed", removed


@row(("group_create_remove", "1/s"))
def group_create_remove(arguments):
    """A hundred groups created, waited for one by one, and removed."""

    def step():
        groups = [ray.util.placement_group([{"CPU": 0.001}]) for _ in range(100)]
        for group in groups:
            assert group.wait(30)
        for group in groups:
            ray.util.remove_placement_group(group)

    return measure.rates(step, 100, arguments.effort)


# -- Life and death of actors -----------------------------------------------------------------


def actor_creation(count):
    @row((f"actor_new_{count}", "ms"), (f"actor_new_{count}_pss", "MB"))
    def create(arguments):
        needed = count * arguments.actor_bytes_seen
        if needed > processes.available_bytes():
            message = f"skipped: {count} actors would need {needed / 1e9:.0f} GB"
            raise MemoryError(message)
        started = time.perf_counter()
        actors = [Server.remote() for _ in range(count)]
        pids = ray.get([actor.process_id.remote() for actor in actors])
        seconds = time.perf_counter() - started
        pss, _ = processes.memory_of_all(pids)
        arguments.actor_bytes_seen = pss / count
        yield f"actor_new_{count}", [1000 * seconds / count]
        yield f"actor_new_{count}_pss", [pss / count / 1e6]

    ROWS[f"actor_new_{count}"] = ROWS.pop("create")


for _count in (20, 100, 500):
    actor_creation(_count)


@row(("actor_restart", "ms"))
def actor_restart(arguments):
    """From `kill -9` of an actor's process to the first answer of its successor."""
    server = ready(Server.options(max_restarts=-1, max_task_retries=-1).remote())
    samples = []
    for _ in range(arguments.effort.samples):
        pid = ray.get(server.process_id.remote())
        os.kill(pid, signal.SIGKILL)
        started = time.perf_counter()
        assert ray.get(server.process_id.remote()) != pid
        samples.append(1000 * (time.perf_counter() - started))
    return samples


# -- Running ----------------------------------------------------------------------------------


def percentiles(name, step, effort):
    ordered = measure.latencies(step, effort)
    for percent in (50, 99):
        yield f"{name}_p{percent}", [1e6 * measure.percentile(sample, percent / 100) for sample in ordered]


def run(name, arguments):
    """Measure one function of ROWS in a cluster of its own state and print its rows."""
    columns, function = ROWS[name]
    try:
        result = function(arguments)
        found = dict(result) if len(columns) > 1 else {columns[0][0]: result}
    except Exception as error:  # one row that fails must not take the others with it
        for column, unit in columns:
            measure.report_error(column, unit, error)
        return False
    for column, unit in columns:
        measure.report(column, unit, found[column])
    return True


def chosen(only, quick):
    names = list(ROWS)
    if only:
        prefixes = tuple(only.split(","))
        return [n for n in names if any(column.startswith(prefixes) for column, _ in ROWS[n][0])]
    return [n for n in names if not (quick and n in ("actor_new_100", "actor_new_500"))]


def parse_arguments():
    parser = argparse.ArgumentParser(description="Speed of tasks, actors and objects.")
    parser.add_argument("--only", default="", help="comma-separated beginnings of row names")
    parser.add_argument("--quick", action="store_true", help="short samples, no large actor rows")
    parser.add_argument("--put-mb", type=int, default=100, help="size of a large object in MB (default 100)")
    parser.add_argument("--queued", type=int, help="tasks in the long queue (default 100,000; quick 10,000)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    arguments = parser.parse_args()
    arguments.effort = measure.QUICK if arguments.quick else measure.FULL
    arguments.put_bytes = arguments.put_mb * 1_000_000
    arguments.queued = arguments.queued or (10_000 if arguments.quick else 100_000)
    arguments.actor_bytes_seen = 0
    return arguments


def main():
    arguments = parse_arguments()
    names = chosen(arguments.only, arguments.quick)
    if arguments.list:
        print("\n".join(column for name in names for column, _ in ROWS[name][0]))
        return 0
    succeeded = True
    fresh = False
    for name in names:
        # Rows about processes start from an empty cluster; the others share one.
        alone = name.startswith(("actor_new", "actor_restart", "tasks_queued"))
        if alone or not fresh:
            if ray.is_initialized():
                ray.shutdown()
            ray.init(num_cpus=CORES, logging_level="ERROR", log_to_driver=False)
        succeeded &= run(name, arguments)
        fresh = not alone
    ray.shutdown()
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
