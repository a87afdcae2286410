"""What a program can find out about where it runs."""

import os

import pytest

import ray


def test_a_driver_knows_its_job_and_node(cluster):
    context = ray.get_runtime_context()
    assert context.get_job_id()
    assert context.get_node_id() == ray.nodes()[0]["NodeID"]
    assert context.get_worker_id()
    assert context.get_task_id() is None
    assert context.get_actor_id() is None


def test_a_task_knows_itself(cluster):
    @ray.remote(num_cpus=2)
    def look():
        context = ray.get_runtime_context()
        return {
            "job": context.get_job_id(),
            "node": context.get_node_id(),
            "task": context.get_task_id(),
            "name": context.get_task_name(),
            "actor": context.get_actor_id(),
            "resources": context.get_assigned_resources(),
        }

    seen = ray.get(look.remote())
    context = ray.get_runtime_context()
    assert seen["job"] == context.get_job_id()
    assert seen["node"] == context.get_node_id()
    assert seen["task"]
    assert seen["name"].endswith("look")
    assert seen["actor"] is None
    assert seen["resources"] == {"CPU": 2}


def test_every_task_has_an_id_of_its_own(cluster):
    @ray.remote
    def task_id():
        return ray.get_runtime_context().get_task_id()

    assert len(set(ray.get([task_id.remote() for _ in range(20)]))) == 20


def test_an_actor_knows_itself(cluster):
    @ray.remote
    class Self:
        def look(self):
            context = ray.get_runtime_context()
            return {
                "actor": context.get_actor_id(),
                "name": context.get_actor_name(),
                "restarted": context.was_current_actor_reconstructed,
                "process": os.getpid(),
            }

    handle = Self.options(name="self").remote()
    seen = ray.get(handle.look.remote())
    assert seen["actor"] == handle._actor_id.hex()
    assert seen["name"] == "self"
    assert seen["restarted"] is False


def test_workers_of_one_node_have_ids_of_their_own(cluster):
    @ray.remote
    class Self:
        def worker_id(self):
            return ray.get_runtime_context().get_worker_id()

    actors = [Self.remote() for _ in range(2)]
    ids = ray.get([actor.worker_id.remote() for actor in actors])
    assert len({*ids, ray.get_runtime_context().get_worker_id()}) == 3


def test_the_namespace_is_that_of_the_job(fresh_cluster):
    fresh_cluster(num_cpus=1, namespace="mine")

    @ray.remote
    def namespace():
        return ray.get_runtime_context().namespace

    assert ray.get(namespace.remote()) == ray.get_runtime_context().namespace == "mine"


def test_the_runtime_environment_can_be_read(cluster):
    @ray.remote(runtime_env={"env_vars": {"A": "1"}})
    def environment():
        return ray.get_runtime_context().runtime_env

    assert ray.get(environment.remote())["env_vars"] == {"A": "1"}


def test_the_address_of_the_cluster_is_known(cluster):
    assert ray.get_runtime_context().gcs_address


def test_assigned_resources_include_custom_ones(cluster):
    @ray.remote(num_cpus=1, resources={"special": 1})
    def resources():
        return ray.get_runtime_context().get_assigned_resources()

    assert ray.get(resources.remote()) == {"CPU": 1, "special": 1}


def test_accelerator_ids_are_listed(fresh_cluster):
    fresh_cluster(num_cpus=1, num_gpus=1)

    @ray.remote(num_gpus=1)
    def ids():
        return ray.get_runtime_context().get_accelerator_ids()

    assert ray.get(ids.remote())["GPU"] == ["0"]


def test_a_driver_has_no_current_actor(cluster):
    with pytest.raises(RuntimeError, match=r"(?i)actor"):
        ray.get_runtime_context().current_actor  # noqa: B018


def test_the_version_is_that_of_the_api():
    assert ray.__version__.startswith("2.60.")
