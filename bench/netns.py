"""Speed between two hosts, as network namespaces on this machine, beside the same within one of them. Needs root.

    python bench/netns.py             all rows, as a table
    python bench/netns.py --quick     shorter samples
    python bench/netns.py --mbit 1000 over a link of so many megabits per second

The driver and the head are on one host, and a node on the other. `local` is a worker beside the driver, `remote` one
on the other host. Above the line stands what the link itself does: iperf3, if it is installed, and a round trip of 64
bytes between two plain sockets.
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

import measure  # noqa: E402  (tests are found only now)

import ray  # noqa: E402

BATCH = 1000  # calls that are in flight at once
MESSAGE_BYTES = 64
OBJECT_BYTES = 64 << 20
OBJECT_WAIT_S = 30


# -- In the hosts -----------------------------------------------------------------------------


@ray.remote
def nothing():
    return b"ok"


@ray.remote
def make(size):
    return bytes(size)


@ray.remote(num_cpus=0)
class Server:
    def nothing(self):
        return b"ok"


def on(node, remote):
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def calls(node, effort):
    """Round trips and batches of tasks and of an actor's calls with one node; {row: samples per second}."""
    task, server = on(node, nothing), on(node, Server).remote()
    rows = {"task": task.remote, "actor call": server.nothing.remote}
    found = {}
    for name, call in rows.items():
        found[f"{name}, synchronous"] = measure.rates(lambda call=call: ray.get(call()), 1, effort)
        found[f"{name}s, {BATCH} at once"] = measure.rates(
            lambda call=call: ray.get([call() for _ in range(BATCH)]), BATCH, effort
        )
    return found


def objects(node, effort):
    """Megabytes per second of large values that a node has made and the driver reads."""
    task = on(node, make)

    def step():
        ref = task.remote(OBJECT_BYTES)
        ray.wait([ref], timeout=OBJECT_WAIT_S, fetch_local=False)
        ray.get(ref, timeout=OBJECT_WAIT_S)

    return {f"value of {OBJECT_BYTES >> 20} MiB, made and read": measure.rates(step, OBJECT_BYTES / 1e6, effort)}


def echo(host):
    """Answer everything on one connection after another; prints the port."""
    with socket.create_server((host, 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(65536):
                connection.sendall(data)


def ping(host, port, quick):
    """Round trips per second with an echo, as JSON."""
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def step():
            connection.sendall(bytes(MESSAGE_BYTES))
            connection.recv(MESSAGE_BYTES)

        print(json.dumps(measure.rates(step, 1, measure.QUICK if quick == "True" else measure.FULL)))


# -- Outside of them --------------------------------------------------------------------------


def link_rows(here, there, quick):
    """What the link does without us: {(row, unit): samples}."""
    rows = {}
    script = (sys.executable, __file__)
    server = subprocess.Popen(there.argv(*script, "--echo", there.ip), stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        rows[("plain sockets, 64 bytes", "1/s")] = json.loads(here.run(*script, "--ping", there.ip, port, quick))
    finally:
        server.kill()
        server.communicate()
    if shutil.which("iperf3"):
        server = subprocess.Popen(there.argv("iperf3", "-s", "-1", "--forceflush"), stdout=subprocess.PIPE, text=True)
        try:
            while "listening" not in server.stdout.readline():
                pass
            result = json.loads(here.run("iperf3", "-c", there.ip, "-t", 1 if quick else 5, "-J"))
            rows[("iperf3, one stream", "MB/s")] = [result["end"]["sum_received"]["bits_per_second"] / 8e6]
        finally:
            server.kill()
            server.communicate()
    return rows


def measure_all(cluster, quick):
    """Prints the table."""
    near, far = cluster.nodes
    here, there = near.host, far.host
    print(f"{'':44} {'local':>12} {'remote':>12} {'unit':>6}  remote/local")
    for (name, unit), samples in link_rows(here, there, quick).items():
        print(f"{name:44} {'':12} {statistics.median(samples):12,.0f} {unit:>6}")
    print("-" * 96)
    driver = cluster.driver(here, PYTHONPATH=f"{BENCH.parent}:{BENCH}")
    driver(f"from bench import netns; import measure; effort = measure.{'QUICK' if quick else 'FULL'}")
    for what, unit in (("calls", "1/s"), ("objects", "MB/s")):
        found = [measured(driver, f"netns.{what}({node.id!r}, effort)") for node in (near, far)]
        for name in {**found[0], **found[1]}:
            print_row(name, unit, *(rows.get(name, rows.get("")) for rows in found))


def measured(driver, code):
    """The rows, or under the empty name why there are none."""
    from tests.hosts.clusters import DriverError

    try:
        return driver(code, 300)
    except DriverError as error:
        return {"": str(error)}


def print_row(name, unit, local, remote):
    figures = [statistics.median(samples) if isinstance(samples, list) else None for samples in (local, remote)]
    shown = [f"{figure:12,.0f}" if figure is not None else f"{'-':>12}" for figure in figures]
    ratio = f"{figures[1] / figures[0]:.2f}" if None not in figures else ""
    print(f"{name or '(not measured)':44} {shown[0]} {shown[1]} {unit:>6}  {ratio}")
    for where, samples in (("local", local), ("remote", remote)):
        if isinstance(samples, str):
            print(f"    {where}: {samples.splitlines()[0][:160]}")


def main():
    parser = argparse.ArgumentParser(description="Speed between two hosts.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mbit", type=int, default=0, help="limit the link to so many megabits per second")
    parser.add_argument("--echo", help=argparse.SUPPRESS)
    parser.add_argument("--ping", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        return echo(arguments.echo)
    if arguments.ping:
        return ping(*arguments.ping)

    from tests.hosts import netns
    from tests.hosts.clusters import HostCluster

    try:
        netns.probe()
    except netns.Unavailable as reason:
        return f"this machine cannot have such hosts: {reason}"
    net = netns.Net(2)
    try:
        if arguments.mbit:
            net.hosts[1].rate(arguments.mbit * 1_000_000)
        with tempfile.TemporaryDirectory() as directory:
            cluster = HostCluster(net.hosts, Path(directory), validate=False)
            try:
                for host in net.hosts:
                    cluster.add_node(host, num_cpus=1)
                measure_all(cluster, arguments.quick)
            finally:
                cluster.close()
    finally:
        net.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
