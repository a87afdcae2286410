"""A cluster whose head keeps records, and can be killed and started again."""

import contextlib
import os
import signal
import socket

import ray
from ray._node import registry, session
from ray._runtime import nodes
from ray._runtime.resources import node_resources
from tests.core.helpers import wait_until


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Durable:
    """A head that keeps records, without CPUs, and worker nodes beside it; this process is a driver on the first."""

    def __init__(self, directory, records=None, *, tls=False):
        self.token = os.urandom(32)
        self.tls = tls
        self.records = records or f"sqlite://{directory}/records.db"
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self.heads = []
        self.workers = []
        self.start_head()

    def start(self, cpus, **arguments):
        amounts = node_resources(cpus, 0, None, 80 << 20, 1 << 30)
        return nodes.start(
            token=self.token, amounts=amounts, ip="127.0.0.1", findable=True, private=True, **arguments
        )  # fmt: skip

    def start_head(self, place=0, **arguments):
        self.heads.append(self.start(0, listen=self.addresses[place], records=self.records, tls=self.tls, **arguments))

    def add(self, cpus=2, **arguments):
        head = nodes.HeadFacts(self.heads[-1].node, ",".join(self.addresses), tls=self.tls)
        self.workers.append(self.start(cpus, listen="127.0.0.1:0", head=head, **arguments))
        return self.workers[-1]

    def kill_head(self):
        os.kill(self.heads[-1].pid, signal.SIGKILL)
        self.heads[-1].close()

    def close(self):
        for node in (*self.workers, *self.heads):
            node.close()
            session.remove(node.session_dir)
        registry.running()


@contextlib.contextmanager
def durable_cluster(directory, belongings, second=None, **arguments):
    """A head without CPUs and two nodes; this process is a driver on the first of these. Nothing is left of it.

    `second` are further arguments of the second node.
    """
    before = belongings.now()
    cluster = Durable(directory, **arguments)
    try:
        first = cluster.add()
        cluster.add(**(second or {}))
        ray.init(first.tcp_address, namespace="n", logging_level="ERROR", log_to_driver=False)
        wait_until(lambda: len(ray.nodes()) == 3, what="all nodes")
        yield cluster
    finally:
        ray.shutdown()
        cluster.close()
    before.expect_nothing_more()
