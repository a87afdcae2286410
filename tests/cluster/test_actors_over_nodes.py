"""Actors on several nodes."""

import pytest

import ray
from ray.exceptions import ActorUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.core.helpers import wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return self.count

    def where(self):
        return ray.get_runtime_context().get_node_id()


def on(node, *, soft=False, **options):
    return Counter.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=soft), **options)


def test_actors_that_hold_cpus_go_where_there_are_some(start_cluster):
    cluster, _ = start_cluster({"num_cpus": 2}, {"num_cpus": 1})
    actors = [Counter.options(num_cpus=1).remote() for _ in range(4)]
    places = ray.get([actor.where.remote() for actor in actors], timeout=20)
    assert sorted(places.count(node.node_id) for node in cluster.list_all_nodes()) == [1, 1, 2]


def test_many_actors_without_cpus_are_shared_out(start_cluster):
    cluster, _ = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    actors = [Counter.remote() for _ in range(24)]
    places = ray.get([actor.where.remote() for actor in actors], timeout=20)
    counts = [places.count(node.node_id) for node in cluster.list_all_nodes()]
    assert min(counts) >= 4


def test_an_actor_is_called_from_everywhere(start_cluster):
    cluster, (one, _) = start_cluster({"num_cpus": 1}, {"num_cpus": 1})

    @ray.remote
    def call(actor):
        return ray.get(actor.increment.remote())

    actor = on(one).remote()
    callers = [
        call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
        for node in cluster.list_all_nodes()
    ]
    assert sorted(ray.get([caller.remote(actor) for caller in callers], timeout=20)) == [1, 2, 3]
    assert ray.get(actor.where.remote()) == one.node_id


def test_an_actor_of_a_killed_node_is_restarted_elsewhere(start_cluster):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    actor = on(node, soft=True, max_restarts=1, max_task_retries=-1).remote()
    assert ray.get(actor.increment.remote()) == 1
    assert ray.get(actor.where.remote()) == node.node_id
    cluster.remove_node(node, allow_graceful=False)
    assert ray.get(actor.increment.remote(), timeout=20) == 1
    assert ray.get(actor.where.remote()) == cluster.head_node.node_id


def test_an_actor_that_is_not_restarted_says_that_its_node_was_lost(start_cluster):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    actor = on(node).remote()
    assert ray.get(actor.increment.remote()) == 1
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ray.exceptions.ActorDiedError, match="its node was lost"):
        ray.get(actor.increment.remote(), timeout=20)


def test_an_actor_bound_to_a_lost_node_cannot_be_made(start_cluster):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    cluster.remove_node(node)
    cluster.wait_for_nodes()
    lost = r"The actor can never be placed: Counter asks for node .*, which is lost"
    with pytest.raises(ActorUnschedulableError, match=lost):
        ray.get(on(node).remote().increment.remote(), timeout=20)


def test_an_actor_bound_to_a_node_that_never_was_or_never_has_as_much_cannot_be_made(start_cluster):
    cluster, _ = start_cluster({"num_cpus": 1})
    strange = NodeAffinitySchedulingStrategy("ab" * 8 + "0" * 40, soft=False)
    actor = Counter.options(scheduling_strategy=strange).remote()
    with pytest.raises(ActorUnschedulableError, match="Counter asks for node abababababababab; there is no such node"):
        ray.get(actor.increment.remote(), timeout=20)
    for each in cluster.list_all_nodes():
        with pytest.raises(ActorUnschedulableError, match=r"needs CPU: 2; node .* for which it asks, has 1"):
            ray.get(on(each, num_cpus=2).remote().increment.remote(), timeout=20)


def test_an_actor_that_cannot_be_restarted_on_its_lost_node_says_so(start_cluster):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    actor = on(node, max_restarts=-1, max_task_retries=-1).remote()
    assert ray.get(actor.increment.remote()) == 1
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ActorUnschedulableError, match=r"asks for node .*, which is lost"):
        ray.get(actor.increment.remote(), timeout=20)


def test_the_handle_of_an_actor_elsewhere_ends_it(start_cluster):
    _, (node,) = start_cluster({"num_cpus": 1})
    actor = on(node, num_cpus=1).remote()
    ray.get(actor.increment.remote())
    assert ray.available_resources()["CPU"] == 1
    del actor
    wait_until(lambda: ray.available_resources()["CPU"] == 2, what="the actor's end")
