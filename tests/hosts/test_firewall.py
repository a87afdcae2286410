"""A machine behind a firewall that lets nobody in: its node joins, and works, by connections that it makes itself."""

import pytest

from tests.core.helpers import wait_until

# Clusters are processes that take a moment to start.
pytestmark = [pytest.mark.skate, pytest.mark.slow, pytest.mark.timeout(120)]

BEHIND = {"num_cpus": 1, "resources": {"behind": 1}, "outbound_only": True}
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), 1).close()
except Exception as error:
    print(type(error).__name__)
"""


def outcome(host, other):
    """What becomes of a connection from one host to another, where nobody listens."""
    return host.run("python3", "-c", CONNECT, other.ip).strip()


@pytest.fixture
def trio(host_cluster, packet_filter):
    """A head, another node with a driver, and a host that lets nobody in."""
    cluster = host_cluster({"num_cpus": 0}, {"num_cpus": 1, "resources": {"open": 1}}, None)
    head, other, behind = cluster.hosts
    assert outcome(head, behind) == "ConnectionRefusedError", "it is reached"
    behind.shut_in()
    assert outcome(head, behind) == "TimeoutError"
    assert outcome(behind, head) == "ConnectionRefusedError", "it reaches others"
    return cluster, cluster.driver(other)


def test_a_node_behind_a_firewall_joins_and_works(trio):
    cluster, driver = trio
    cluster.add_node(cluster.hosts[2], **BEHIND)
    driver("behind = dict(num_cpus=0, resources={'behind': 0.1}); beside = dict(num_cpus=0, resources={'open': 0.1})")
    assert driver("sum(ray.get([square.options(**behind).remote(n) for n in range(200)]))") == sum(
        n * n for n in range(200)
    )
    driver("there, here = Plain.options(**behind).remote(), Plain.options(**beside).remote()")
    assert driver("ray.get([there.echo.remote(n) for n in range(200)])") == list(range(200))
    assert driver("ray.get(ask.options(**beside).remote(there, 1))") == 1, "called by another node's worker"
    assert driver("ray.get(ask.options(**behind).remote(here, 2))") == 2, "and calls an actor there"
    driver("value = ray.put(b'x' * (20 << 20))")
    assert driver("len(ray.get(there.echo.remote(value)))") == 20 << 20, "a value goes there, and a copy comes back"
    assert driver("ray.get(there.where.remote())") == cluster.nodes[2].id
    assert all(driver.nodes().values())


def test_two_nodes_behind_firewalls_reach_each_other(trio, hosts):
    cluster, driver = trio
    cluster.hosts[1].shut_in()
    cluster.add_node(cluster.hosts[2], **BEHIND)
    cluster.add_node(cluster.hosts[1], num_cpus=1, resources={"too": 1}, outbound_only=True)
    behind, too = "num_cpus=0, resources={'behind': 0.1}", "num_cpus=0, resources={'too': 0.1}"
    driver(f"one, other = Plain.options({behind}).remote(), Plain.options({too}).remote()")
    assert driver(f"ray.get([ask.options({behind}).remote(other, 1), ask.options({too}).remote(one, 2)])") == [1, 2]


def test_a_program_behind_a_firewall_needs_no_port_either(trio):
    cluster, _ = trio
    inside = cluster.driver(cluster.hosts[2], RAY_OUTBOUND_ONLY="1")
    inside("beside = dict(num_cpus=0, resources={'open': 0.1})")
    assert inside("ray.get([square.options(**beside).remote(n) for n in range(50)])") == [n * n for n in range(50)]
    inside("actor = Plain.options(**beside).remote(); value = ray.put(b'x' * (20 << 20))")
    assert inside("len(ray.get(actor.echo.remote(value)))") == 20 << 20, "which the worker had to come for"


@pytest.mark.chaos  # the time after which a silent node is lost
def test_a_node_behind_a_firewall_that_is_cut_off_is_lost_and_what_it_did_is_done_elsewhere(trio, tmp_path):
    cluster, driver = trio
    node = cluster.add_node(cluster.hosts[2], **BEHIND)
    driver("actor = Plain.options(max_restarts=1, max_task_retries=-1, num_cpus=0, resources={'behind': 1}).remote()")
    assert driver("ray.get(actor.where.remote())") == node.id
    cluster.hosts[2].cut()
    driver("late = actor.where.remote()")
    driver.wait_for_loss(node, 30)
    again = cluster.add_node(cluster.hosts[1], num_cpus=1, resources={"behind": 1})
    assert driver("ray.get(late, timeout=40)", 50) == again.id
    cluster.hosts[2].mend()
    wait_until(lambda: not node.is_alive(), 30, "the end of the node that was given up", interval_s=0.05)
