"""Tasks of one driver on several nodes."""

import pytest

import ray
from ray.exceptions import TaskPlacementGroupRemoved, TaskUnschedulableError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
)
from tests.core.helpers import Gate, Tally, wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


@ray.remote
def where():
    return ray.get_runtime_context().get_node_id()


@ray.remote
def follow(value):
    return value


@ray.remote
def meet(gate, tally):
    tally.add()
    gate.wait()
    return ray.get_runtime_context().get_node_id()


def met(tally, count):
    wait_until(lambda: tally.count() == count, what=f"the start of {count} tasks")


def test_what_the_own_node_cannot_run_now_runs_on_others(start_cluster, tmp_path):
    cluster, _ = start_cluster({"num_cpus": 2}, {"num_cpus": 1})
    gate, tally = Gate(tmp_path), Tally(tmp_path)
    refs = [meet.remote(gate, tally) for _ in range(4)]
    met(tally, 4)  # all run at the same time only if all nodes take part
    gate.open()
    places = ray.get(refs)
    assert sorted(places.count(node.node_id) for node in cluster.list_all_nodes()) == [1, 1, 2]


def test_a_resource_of_one_node_leads_there(start_cluster):
    _, (plain, special) = start_cluster({"num_cpus": 1}, {"num_cpus": 1, "resources": {"special": 2}})
    places = ray.get([where.options(resources={"special": 1}).remote() for _ in range(6)])
    assert set(places) == {special.node_id}
    assert plain.node_id not in places


def test_a_demand_that_no_node_meets_waits_for_one_that_does(start_cluster):
    cluster, _ = start_cluster()
    ref = where.options(resources={"late": 1}).remote()
    wait_until(lambda: "late" in ray.util.state.why(ref), what="the reason")
    reason = ray.util.state.why(ref)
    assert "needs late: 1" in reason
    node = cluster.add_node(num_cpus=1, resources={"late": 1})
    assert ray.get(ref, timeout=20) == node.node_id


def test_spread_uses_every_node(start_cluster, tmp_path):
    cluster, _ = start_cluster({"num_cpus": 4}, {"num_cpus": 4}, head={"num_cpus": 4})
    gate, tally = Gate(tmp_path), Tally(tmp_path)
    refs = [meet.options(scheduling_strategy="SPREAD").remote(gate, tally) for _ in range(6)]
    met(tally, 6)
    gate.open()
    places = ray.get(refs)
    assert min(places.count(node.node_id) for node in cluster.list_all_nodes()) >= 1


def test_affinity_leads_to_one_node_or_fails_when_it_is_gone(start_cluster):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    hard = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    soft = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
    assert ray.get([where.options(scheduling_strategy=x).remote() for x in (hard, soft, hard)]) == [node.node_id] * 3
    cluster.remove_node(node)
    cluster.wait_for_nodes()
    assert ray.get(where.options(scheduling_strategy=soft).remote()) == cluster.head_node.node_id
    with pytest.raises(TaskUnschedulableError, match=r"The task can never run: .*asks for node .*, which is lost"):
        ray.get(where.options(scheduling_strategy=hard).remote())


def test_a_task_bound_to_a_node_that_never_was_or_never_has_as_much_fails(start_cluster):
    cluster, _ = start_cluster({"num_cpus": 1})
    strange = NodeAffinitySchedulingStrategy("ab" * 8 + "0" * 40, soft=False)
    with pytest.raises(TaskUnschedulableError, match="asks for node abababababababab; there is no such node among 2"):
        ray.get(where.options(scheduling_strategy=strange).remote(), timeout=20)
    for each in cluster.list_all_nodes():  # its own node is asked by the driver itself, another by the cluster
        hard = NodeAffinitySchedulingStrategy(each.node_id, soft=False)
        with pytest.raises(TaskUnschedulableError, match=r"needs CPU: 2; node .* for which it asks, has 1"):
            ray.get(where.options(num_cpus=2, scheduling_strategy=hard).remote(), timeout=20)
    refs = [where.options(scheduling_strategy=strange).remote() for _ in range(3)]
    dependent = follow.remote(refs[0])
    with pytest.raises(TaskUnschedulableError, match="no such node"):
        ray.get(dependent, timeout=20)


def test_a_task_that_waits_for_its_node_fails_when_that_is_lost(start_cluster, tmp_path):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    hard = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    running = meet.options(scheduling_strategy=hard, max_retries=0).remote(gate, tally)
    met(tally, 1)
    waiting = where.options(scheduling_strategy=hard).remote()
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(TaskUnschedulableError, match=r"asks for node .*, which is lost"):
        ray.get(waiting, timeout=20)
    with pytest.raises(ray.exceptions.WorkerCrashedError, match="its node was lost"):
        ray.get(running, timeout=20)


def test_a_task_of_a_removed_group_keeps_that_error(start_cluster):
    start_cluster({"num_cpus": 1})
    group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD", name="both")
    assert group.wait(20)
    remove_placement_group(group)
    inside = where.options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
    with pytest.raises(TaskPlacementGroupRemoved, match="placement group both was removed"):
        ray.get(inside.remote(), timeout=20)


def test_labels_choose_nodes(start_cluster):
    _, (west, east) = start_cluster(
        {"num_cpus": 1, "labels": {"zone": "west"}}, {"num_cpus": 1, "labels": {"zone": "east", "disk": "ssd"}}
    )

    def place(**options):
        return ray.get(where.options(**options).remote(), timeout=20)

    assert place(label_selector={"zone": "west"}) == west.node_id
    assert place(label_selector={"zone": "!west", "disk": "in(ssd, nvme)"}) == east.node_id
    assert place(scheduling_strategy=NodeLabelSchedulingStrategy({"zone": In("east")})) == east.node_id
    wait_until(lambda: ray.available_resources()["CPU"] == 3, what="nodes without work")
    wishes = NodeLabelSchedulingStrategy({"zone": NotIn("north")}, soft={"disk": In("ssd")})
    assert place(scheduling_strategy=wishes) == east.node_id
    waiting = where.options(label_selector={"zone": "south"}).remote()
    wait_until(lambda: "zone = south" in ray.util.state.why(waiting), what="the reason")
    ray.cancel(waiting)


def test_a_task_of_a_killed_node_runs_again_elsewhere(start_cluster, tmp_path):
    cluster, (node,) = start_cluster({"num_cpus": 1, "resources": {"here": 1}})
    gate, tally = Gate(tmp_path), Tally(tmp_path)
    ref = meet.options(resources={"here": 1}, max_retries=1).remote(gate, tally)
    met(tally, 1)
    cluster.remove_node(node, allow_graceful=False)
    other = cluster.add_node(num_cpus=1, resources={"here": 1})
    gate.open()
    assert ray.get(ref, timeout=20) == other.node_id


def test_a_task_without_retries_says_which_node_was_lost(start_cluster, tmp_path):
    cluster, (node,) = start_cluster({"num_cpus": 1, "resources": {"here": 1}})
    tally = Tally(tmp_path)
    ref = meet.options(resources={"here": 1}, max_retries=0).remote(Gate(tmp_path), tally)
    met(tally, 1)
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ray.exceptions.WorkerCrashedError, match="its node was lost"):
        ray.get(ref, timeout=20)
    lost = next(x for x in ray.nodes() if x["NodeID"] == node.node_id)
    assert not lost["Alive"]
    assert "connection" in lost["DeathReasonMessage"]
