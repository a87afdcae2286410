"""Networks that lose packets, connections, or one direction, or are slow: answers stay right, and nothing hangs."""

import time

import pytest

from tests.core.helpers import wait_until
from tests.hosts.writers import expect_one_at_a_time, has_written, lives

# Losses are noticed after seconds, and clusters are processes that take a moment to start.
pytestmark = [pytest.mark.skate, pytest.mark.slow, pytest.mark.timeout(120)]

SPOT = {"num_cpus": 1, "resources": {"spot": 1}}
NUMBERS = 200
SUM = sum(number * number for number in range(NUMBERS))


def start(host_cluster):
    """A head with a driver beside it and a node; returns the cluster, the driver and the node."""
    cluster = host_cluster({"num_cpus": 1}, SPOT)
    return cluster, cluster.driver(cluster.hosts[0]), cluster.nodes[1]


def add_up(driver, timeout_s=60):
    """Tasks and an actor's calls on the other node; returns both sums."""
    return driver(
        f"""
tasks = [square.options(resources={{'spot': 0.1}}, num_cpus=0).remote(n) for n in range({NUMBERS})]
actor = Plain.options(resources={{'spot': 0.1}}, num_cpus=0).remote()
calls = [actor.echo.remote(n * n) for n in range({NUMBERS})]
[sum(ray.get(tasks, timeout={timeout_s})), sum(ray.get(calls, timeout={timeout_s}))]
""",
        timeout_s + 10,
    )


@pytest.mark.chaos
def test_two_nodes_that_lose_each_other_alone_give_the_worker_up_and_the_task_runs_elsewhere(
    host_cluster, packet_filter, tmp_path
):
    """The owner's node and the worker's node both see the head. One retry is enough: it is not tried there again."""
    cluster = host_cluster({"num_cpus": 1}, {"num_cpus": 0}, SPOT)
    _, near, far = cluster.nodes
    driver = cluster.driver(near.host)
    held = f"{str(tmp_path / 'held')!r}, {str(tmp_path / 'gate')!r}"
    driver(f"task = hold.options(resources={{'spot': 1}}, max_retries=1).remote({held})")
    wait_until((tmp_path / "held").exists, what="the start of the task")
    near.host.block(far.host)
    (tmp_path / "gate").touch()  # its answer cannot come
    other = cluster.add_node(near.host, **SPOT)
    assert driver("ray.get(task, timeout=40)", 50) == other.id
    assert (tmp_path / "held").read_text().splitlines() == [far.id, other.id]
    assert "its connection with the driver" in far.log()
    assert all(driver.nodes().values())


def test_answers_stay_right_while_packets_are_lost(host_cluster, packet_filter):
    _, driver, node = start(host_cluster)
    node.host.drop(0.05)
    assert add_up(driver) == [SUM, SUM]
    assert all(driver.nodes().values())


def test_answers_stay_right_while_connections_between_processes_are_reset(host_cluster, packet_filter):
    """The node's port is where its workers are reached. Its own connection, with the head's port, is left alone."""
    _, driver, node = start(host_cluster)
    driver("again = square.options(resources={'spot': 0.1}, num_cpus=0, max_retries=-1); ray.get(again.remote(3))")
    for _ in range(3):
        node.host.reset(node.port)
        driver(f"tasks = [again.remote(n) for n in range({NUMBERS})]")
        time.sleep(0.3)  # for so long everything is reset
        node.host.heal()
        assert driver("sum(ray.get(tasks, timeout=60))", 70) == SUM
    assert all(driver.nodes().values())


def test_a_slow_link_is_not_taken_for_a_cut(host_cluster, slow_link):
    _, driver, node = start(host_cluster)
    node.host.rate(4_000_000)
    # A megabyte and a half, which takes three seconds.
    driver("actor = Plain.options(resources={'spot': 0.1}).remote()")
    driver("refs = [actor.echo.remote(bytes([n]) * 50_000) for n in range(30)]")
    assert (
        driver("[value == bytes([n]) * 50_000 for n, value in enumerate(ray.get(refs, timeout=60))]", 70) == [True] * 30
    )
    assert add_up(driver) == [SUM, SUM]
    assert all(driver.nodes().values())


@pytest.mark.chaos
def test_a_link_that_is_full_for_longer_than_anybody_s_patience_is_not_taken_for_a_cut(host_cluster, slow_link):
    """Questions whether a node lives share the link with everything else, and connections that are busy are patient."""
    _, driver, node = start(host_cluster)
    node.host.rate(1_000_000)
    driver("actor = Plain.options(resources={'spot': 0.1}).remote()")
    begun = time.monotonic()
    driver("refs = [actor.echo.remote(bytes([n]) * 80_000) for n in range(30)]")
    right = driver("[value == bytes([n]) * 80_000 for n, value in enumerate(ray.get(refs, timeout=100))]", 110)
    assert right == [True] * 30
    print(f"\n2 x 2.4 MB over a megabit took {time.monotonic() - begun:.0f} s")
    assert all(driver.nodes().values())


def test_a_head_far_away_is_joined_and_used(host_cluster):
    """A tenth of a second in each direction between a node and its head."""
    cluster = host_cluster({"num_cpus": 1}, None)
    far = cluster.hosts[1]
    address = cluster.delay(far, cluster.head.address, 0.1)
    node = cluster.add_node(far, head_address=address, **SPOT)
    driver = cluster.driver(cluster.hosts[0])
    assert add_up(driver) == [SUM, SUM]
    assert driver(f"ray.get(on({node.id!r}, where, soft=False).remote())") == node.id


@pytest.mark.chaos
def test_a_cut_while_actors_are_created_leaves_each_of_them_once(host_cluster, tmp_path):
    cluster = host_cluster({"num_cpus": 2}, {"num_cpus": 2}, {"num_cpus": 2})
    node = cluster.nodes[1]
    driver = cluster.driver(cluster.hosts[0])
    log = str(tmp_path / "made")
    driver.begin(
        "actors = [Plain.options(scheduling_strategy='SPREAD', max_restarts=-1, max_task_retries=-1)"
        f".remote({log!r}) for _ in range(24)]\nray.get([actor.where.remote() for actor in actors], timeout=60)"
    )
    wait_until((tmp_path / "made").exists, what="the first actor")
    node.host.cut()
    places = driver.end(70)
    driver.wait_for_loss(node, 20)
    places = driver("ray.get([actor.where.remote() for actor in actors], timeout=60)", 70)
    assert len(places) == 24
    assert node.id not in places
    node.host.mend()
    node.wait_until_gone()
    assert driver("ray.get([actor.echo.remote(n) for n, actor in enumerate(actors)])") == list(range(24))


@pytest.mark.chaos
def test_a_cut_while_placement_groups_are_made_leaves_whole_groups_and_nothing_reserved(host_cluster, tmp_path):
    cluster = host_cluster({"num_cpus": 0}, {"num_cpus": 4}, {"num_cpus": 4}, {"num_cpus": 4})
    _, node, *others = cluster.nodes
    driver = cluster.driver(cluster.hosts[0])
    driver("from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group")
    made = tmp_path / "made"
    driver.begin(
        f"""
import pathlib
groups = []
for n in range(16):
    groups.append(placement_group([{{'CPU': 0.25}}] * 2, strategy='STRICT_SPREAD'))
    pathlib.Path({str(made)!r}).touch()
ray.get([group.ready() for group in groups], timeout=60) and None
"""
    )
    wait_until(made.exists, what="the first group")
    node.host.cut()
    driver.end(70)
    driver.wait_for_loss(node, 20)
    driver("ray.get([group.ready() for group in groups], timeout=60) and None", 70)
    places = driver("[list(placement_group_table(group)['bundles_to_node_id'].values()) for group in groups]")
    assert [sorted(nodes) for nodes in places] == [sorted(other.id for other in others)] * 16
    node.host.mend()
    node.wait_until_gone()
    driver("for group in groups: remove_placement_group(group)")
    wait_until(lambda: driver("ray.available_resources()['CPU']") == 8, what="what the groups had reserved")


@pytest.mark.chaos
def test_a_connection_to_the_head_that_is_reset_never_makes_two_copies(host_cluster, packet_filter, tmp_path):
    """The head is told that the connection is over, and the node is not: it runs on until 7 s of silence."""
    cluster = host_cluster({"num_cpus": 1}, SPOT, SPOT)
    _, node, _ = cluster.nodes
    driver = cluster.driver(cluster.hosts[0])
    driver(f"writer = on({node.id!r}, Writer, max_restarts=-1, max_task_retries=-1).remote({str(tmp_path / 'w')!r})")
    place, old = driver("ray.get(writer.where.remote())")
    assert place == node.id
    node.host.reset(cluster.head.port, told="peer")
    driver.wait_for_loss(node, 20)
    wait_until(lambda: not has_written(tmp_path / "w", old) or lives(tmp_path / "w")[-1][0] != old, 30, "a successor")
    node.host.heal()
    node.wait_until_gone()
    expect_one_at_a_time(tmp_path / "w")
