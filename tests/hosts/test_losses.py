"""Nodes that are killed, cut off or suspended: that it is noticed, what becomes of their work, and that nothing of a
node that was given up has effects while its successors have (`ray._node.fence`).
"""

import contextlib
import time

import pytest

from tests.core.helpers import is_alive, wait_until
from tests.hosts.clusters import DriverError
from tests.hosts.writers import expect_one_at_a_time, has_written, lives

# Losses are noticed after seconds, and clusters are processes that take a moment to start.
pytestmark = [pytest.mark.skate, pytest.mark.slow, pytest.mark.timeout(120)]

NOTICED_S = 15.0
"""The promise is 10 s for silence and 5 s for a broken connection; this machine may be busy with other things."""

SPOT = {"num_cpus": 1, "resources": {"spot": 1}}


def start(host_cluster, tmp_path):
    """A head, two nodes that can do the same, a driver beside the head, and a `Writer` on the first node.

    Returns:
        The cluster, the driver, the two nodes, and the pid of the writer.
    """
    cluster = host_cluster({"num_cpus": 1}, SPOT, SPOT)
    _, first, second = cluster.nodes
    driver = cluster.driver(cluster.hosts[0])
    driver(f"writer = on({first.id!r}, Writer, max_restarts=-1, max_task_retries=-1).remote({str(tmp_path / 'w')!r})")
    place, pid = driver("ray.get(writer.where.remote())")
    assert place == first.id
    wait_until(lambda: has_written(tmp_path / "w", pid), what="the first write")
    return cluster, driver, first, second, pid


def begin_work(driver, node, tmp_path):
    """A task that waits on a node, may run elsewhere, and an actor there that has one life."""
    held = f"{str(tmp_path / 'held')!r}, {str(tmp_path / 'gate')!r}"
    driver(f"task = on({node.id!r}, hold, max_retries=2).remote({held})")
    wait_until((tmp_path / "held").exists, what="the start of the task")
    driver(f"mortal = on({node.id!r}, Plain, num_cpus=0).remote(); ray.get(mortal.where.remote())")


def expect_work_elsewhere(driver, node, tmp_path):
    """The task runs on another node, the actor with one life is dead and says where, the writer lives elsewhere."""
    (tmp_path / "gate").touch()
    place, pid = driver("ray.get(writer.where.remote(), timeout=30)")
    assert place != node.id
    wait_until(lambda: has_written(tmp_path / "w", pid), what="the first write of the new writer")
    assert driver("ray.get(task, timeout=30)") != node.id
    assert len((tmp_path / "held").read_text().splitlines()) == 2
    with pytest.raises(DriverError, match=r"ActorDiedError.*its node was lost"):
        driver("ray.get(mortal.where.remote(), timeout=30)")
    return pid


def test_a_killed_node_is_noticed_by_its_connection_and_its_work_goes_elsewhere(host_cluster, tmp_path):
    _, driver, node, _, _ = start(host_cluster, tmp_path)
    begin_work(driver, node, tmp_path)
    killed_at = time.monotonic()
    node.kill()
    reason = driver.wait_for_loss(node, NOTICED_S)
    print(f"\na killed node was noticed after {time.monotonic() - killed_at:.2f} s")
    assert "connection" in reason
    expect_work_elsewhere(driver, node, tmp_path)
    expect_one_at_a_time(tmp_path / "w")


def test_a_host_that_is_cut_off_is_noticed_and_its_actors_stop_before_others_start(host_cluster, tmp_path):
    cluster, driver, node, _, old = start(host_cluster, tmp_path)
    begin_work(driver, node, tmp_path)
    cut_at = time.monotonic()
    node.host.cut()
    driver.wait_for_loss(node, NOTICED_S)
    print(f"\na cut was noticed after {time.monotonic() - cut_at:.2f} s")
    new = expect_work_elsewhere(driver, node, tmp_path)
    node.host.mend()
    # What was taken for lost ends, with everything on it; and never were there two.
    node.wait_until_gone()
    assert "actors that can be restarted are stopped until it answers" in node.log()
    expect_one_at_a_time(tmp_path / "w")
    assert [pid for pid, _, _ in lives(tmp_path / "w")] == [old, new]
    assert cluster.head.is_alive()
    assert driver("ray.get(square.remote(7))") == 49


def test_a_node_that_is_suspended_for_a_while_is_not_lost(host_cluster, tmp_path):
    _, driver, node, _, old = start(host_cluster, tmp_path)
    node.suspend()
    # Its workers do not need it: calls go on.
    called = driver("[ray.get(writer.call.remote(), timeout=10) for _ in range(100)][-1]")
    assert called == 100
    time.sleep(5)  # this is what is tested: a suspension of so long
    node.resume()
    assert driver("ray.get(writer.where.remote(), timeout=20)") == [node.id, old]
    assert driver(f"ray.get(on({node.id!r}, where, soft=False).remote(), timeout=20)") == node.id
    assert driver.nodes()[node.id]
    expect_one_at_a_time(tmp_path / "w")


@pytest.mark.chaos
def test_a_node_that_is_suspended_too_long_is_fenced_while_it_is_and_ends_when_it_returns(host_cluster, tmp_path):
    _, driver, node, _, old = start(host_cluster, tmp_path)
    begin_work(driver, node, tmp_path)
    suspended_at = time.monotonic()
    node.suspend()
    driver.wait_for_loss(node, NOTICED_S)
    print(f"\na suspension was noticed after {time.monotonic() - suspended_at:.2f} s")
    new = expect_work_elsewhere(driver, node, tmp_path)
    # The node itself could not do it: its zygote has stopped the worker.
    assert is_alive(old)
    expect_one_at_a_time(tmp_path / "w")
    time.sleep(max(suspended_at + 30 - time.monotonic(), 0))
    node.resume()
    node.wait_until_gone()
    expect_one_at_a_time(tmp_path / "w")
    assert [pid for pid, _, _ in lives(tmp_path / "w")] == [old, new]


@pytest.mark.chaos
def test_a_head_that_is_suspended_loses_nobody_and_actors_go_on_when_it_wakes(host_cluster, tmp_path):
    cluster, driver, node, _, old = start(host_cluster, tmp_path)
    driver("ray.get(writer.call.remote())")
    cluster.head.suspend()
    wait_until(lambda: "are stopped until it answers" in node.log(), 20, "the fence", interval_s=0.05)
    written = lives(tmp_path / "w")[-1][2]
    cluster.head.resume()
    assert driver("ray.get(writer.call.remote(), timeout=30)") == 2
    assert driver("ray.get(writer.where.remote(), timeout=30)") == [node.id, old]
    wait_until(lambda: lives(tmp_path / "w")[-1][2] > written, what="another write")
    assert [pid for pid, _, _ in lives(tmp_path / "w")] == [old]
    assert "go on" in node.log()
    assert all(driver.nodes().values())


@pytest.mark.chaos
@pytest.mark.parametrize("seconds", [3, 6.5, 7.5, 8.5, 9.5])
def test_cuts_of_any_length_never_make_two_copies(host_cluster, tmp_path, seconds):
    """Around the times at which workers are stopped (7 s), nodes are lost (8 to 10 s) and connections break (10 s)."""
    _, driver, node, _, old = start(host_cluster, tmp_path)
    node.host.cut()
    time.sleep(seconds)  # the length of the cut is what is tested
    node.host.mend()
    driver("ray.get(writer.call.remote(), timeout=60)", 70)
    place, pid = driver("ray.get(writer.where.remote(), timeout=60)", 70)
    wait_until(lambda: lives(tmp_path / "w")[-1][0] == pid, what="a write of the living copy")
    if place == node.id:
        assert pid == old
        assert driver.nodes()[node.id]
    else:
        node.wait_until_gone()
    expect_one_at_a_time(tmp_path / "w")
    with contextlib.suppress(DriverError):
        driver("ray.kill(writer)")
