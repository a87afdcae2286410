"""Whoever is not of the cluster and reaches a node's port: turned away, at a bounded cost, with few words."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.core.helpers import wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # clusters are processes that take a moment to start

COUNT = 300
"""More than a node keeps of strangers at a time (`STRANGERS_MAX` in the transport: 256)."""


def sockets(node):
    """How many it has open; files of its own, such as its log of tasks, come with work."""
    count = 0
    for descriptor in Path(f"/proc/{node.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def test_strangers_on_the_port_are_turned_away_while_work_goes_on(host_cluster):
    cluster = host_cluster({"num_cpus": 1}, None)
    head, outside = cluster.head, cluster.hosts[1]
    driver = cluster.driver(cluster.hosts[0])
    assert driver("ray.get(square.remote(3))") == 9
    before = sockets(head)
    lines_before = len(head.log().splitlines())
    visits = []
    for how in ("scan", "reset", "garbage", "half", "silent"):
        program = cluster.run(outside, "strangers_program.py", *head.address.split(":"), how, COUNT)
        visits.append(program)
        assert program.read_line(30) == "done"
        assert driver("sum(ray.get([square.remote(n) for n in range(50)]))") == sum(n * n for n in range(50))
    # Those that keep their connections open do not keep others out.
    joins = cluster.driver(outside)
    assert joins("ray.get(square.remote(4))") == 16
    for program in visits:
        program.close()
    joins.close()
    wait_until(lambda: sockets(head) <= before, 20, "the end of strangers' connections", interval_s=0.05)
    added = head.log().splitlines()[lines_before:]
    told = [line for line in added if "before its handshake" in line]
    print(f"\n{5 * COUNT} strangers left {len(told)} lines in the log: {told[:3]}")
    assert len(told) <= 20  # one a second at most
    assert head.is_alive()


def test_a_node_with_another_token_does_not_join(host_cluster):
    cluster = host_cluster({"num_cpus": 1}, None)
    with pytest.raises(RuntimeError, match="token of another cluster"):
        cluster.add_node(cluster.hosts[1], token=os.urandom(32).hex())
    driver = cluster.driver(cluster.hosts[0])
    assert list(driver.nodes().values()) == [True]


def test_a_driver_with_another_token_is_told_so(host_cluster):
    cluster = host_cluster({"num_cpus": 1}, None)
    with pytest.raises(Exception, match=r"RefusedError.*token.*RAY_AUTH_TOKEN"):
        cluster.driver(cluster.hosts[1], RAY_AUTH_TOKEN=os.urandom(32).hex())
    assert cluster.head.is_alive()
