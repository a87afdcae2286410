"""Hosts for tests: network namespaces, removed after each test with all that is in them."""

from __future__ import annotations

import pytest

from tests.hosts import netns
from tests.hosts.clusters import HostCluster


@pytest.fixture(scope="session")
def _available():
    """Skips, with the reason, where there can be no hosts; removes what killed runs have left."""
    try:
        netns.probe()
    except netns.Unavailable as reason:
        pytest.skip(str(reason))
    netns.sweep()


@pytest.fixture
def hosts(_available):
    """A function that makes some hosts on one bridge; they are gone after the test, and so is all that ran there."""
    nets = []

    def make(count):
        net = netns.Net(count)
        nets.append(net)
        return net.hosts

    yield make
    for net in nets:
        net.remove()


@pytest.fixture
def host_cluster(hosts, belongings, tmp_path):
    """A function that makes hosts and a cluster with a head on the first and a node on each other one.

    It takes a dictionary of `HostCluster.add_node`'s arguments for each host, None for a host without a node, and
    returns the cluster. Nothing of it is left after the test.
    """
    before = belongings.now()
    started = []

    def start(*nodes):
        cluster = HostCluster(hosts(len(nodes)), tmp_path)
        started.append(cluster)
        for host, arguments in zip(cluster.hosts, nodes, strict=True):
            if arguments is not None:
                cluster.add_node(host, **arguments)
        return cluster

    yield start
    for cluster in started:
        cluster.close()
    before.expect_nothing_more()


@pytest.fixture(scope="session")
def packet_filter(_available):
    """Skips where there are no packet filters, or none that lose packets at random."""
    try:
        netns.require("iptables")
        net = netns.Net(1)
        try:
            net.hosts[0].drop(0.5)
            net.hosts[0].heal()
            net.hosts[0].reset(1)
        finally:
            net.remove()
    except (netns.Unavailable, RuntimeError) as reason:
        pytest.skip(f"no packet filters: {reason}")


@pytest.fixture(scope="session")
def slow_link(_available):
    """Skips where links cannot be slowed down."""
    try:
        netns.require("tc")
        net = netns.Net(1)
        try:
            net.hosts[0].rate(1_000_000)
        finally:
            net.remove()
    except (netns.Unavailable, RuntimeError) as reason:
        pytest.skip(f"links cannot be slowed down: {reason}")
