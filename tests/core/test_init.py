"""Starting, describing and ending a local cluster."""

import os
from pathlib import Path

import pytest

import ray
from tests.core.helpers import run_driver


def test_init_makes_a_cluster_and_shutdown_ends_it(fresh_cluster):
    assert not ray.is_initialized()
    fresh_cluster(num_cpus=2)
    assert ray.is_initialized()
    ray.shutdown()
    assert not ray.is_initialized()


def test_shutdown_without_a_cluster_does_nothing(no_cluster):
    ray.shutdown()
    ray.shutdown()


def test_a_second_init_is_an_error(fresh_cluster):
    fresh_cluster(num_cpus=1)
    with pytest.raises(RuntimeError, match=r"(?i)twice|already"):
        ray.init(num_cpus=1)


def test_a_second_init_may_be_ignored(fresh_cluster):
    fresh_cluster(num_cpus=1)
    ray.init(num_cpus=8, ignore_reinit_error=True)
    assert ray.cluster_resources()["CPU"] == 1


def test_the_first_remote_call_starts_a_cluster(no_cluster):
    status, output, errors = run_driver("""
        import ray

        @ray.remote
        def double(x):
            return 2 * x

        print(ray.is_initialized())
        print(ray.get(double.remote(4)))
        print(ray.is_initialized())
    """)
    assert status == 0, errors
    assert output.splitlines()[-3:] == ["False", "8", "True"]


def test_put_starts_a_cluster(no_cluster):
    status, output, errors = run_driver("import ray; print(ray.get(ray.put(5)))")
    assert (status, output.splitlines()[-1]) == (0, "5"), errors


def test_creating_an_actor_starts_a_cluster(no_cluster):
    status, output, errors = run_driver("""
        import ray

        @ray.remote
        class Greeter:
            def greet(self):
                return "hello"

        print(ray.get(Greeter.remote().greet.remote()))
    """)
    assert (status, output.splitlines()[-1]) == (0, "hello"), errors


def test_a_remote_function_survives_a_restart_of_the_cluster(fresh_cluster):
    @ray.remote
    def double(x):
        return 2 * x

    fresh_cluster(num_cpus=1)
    assert ray.get(double.remote(1)) == 2
    ray.shutdown()
    fresh_cluster(num_cpus=1)
    assert ray.get(double.remote(2)) == 4


def test_the_context_ends_the_cluster_when_used_with_with(fresh_cluster):
    with fresh_cluster(num_cpus=1) as context:
        assert ray.is_initialized()
        assert "Context" in type(context).__name__
    assert not ray.is_initialized()


def test_the_context_can_be_read_and_shown(fresh_cluster):
    context = fresh_cluster(num_cpus=1)
    assert context.address_info["node_id"] == ray.get_runtime_context().get_node_id()
    assert "session_dir" in context.address_info
    assert ray.__version__ in repr(context)


def test_notebooks_show_the_context_as_a_table(fresh_cluster):
    shown = fresh_cluster(num_cpus=1)._repr_html_()
    assert "<table" in shown
    assert ray.__version__ in shown


def test_resources_are_those_that_were_given(fresh_cluster):
    fresh_cluster(num_cpus=3, num_gpus=2, resources={"special": 2})
    total = ray.cluster_resources()
    assert (total["CPU"], total["GPU"], total["special"]) == (3, 2, 2)
    assert total["memory"] > 0
    assert total["object_store_memory"] > 0


def test_programs_can_demand_the_head_node(cluster):
    assert ray.cluster_resources()["node:__internal_head__"] == 1.0
    pinned = ray.remote(resources={"node:__internal_head__": 0.001})(os.getpid)
    assert ray.get(pinned.remote(), timeout=20)


def test_the_size_of_the_object_store_can_be_chosen(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=100_000_000)
    assert ray.cluster_resources()["object_store_memory"] == pytest.approx(100_000_000, rel=0.05)


def test_an_object_store_larger_than_the_memory_is_refused(no_cluster):
    with pytest.raises(ValueError, match=r"(?i)memory"):
        ray.init(num_cpus=1, object_store_memory=10**14, include_dashboard=False, logging_level="ERROR")
    assert not ray.is_initialized()


@pytest.mark.skate  # the words are ours
def test_the_refusal_of_a_large_object_store_names_both_sizes(no_cluster):
    with pytest.raises(ValueError, match=r"100000000000000 bytes.* has \d+ bytes"):
        ray.init(num_cpus=1, object_store_memory=10**14)


@pytest.mark.skate
def test_asking_for_a_dashboard_warns_once_that_there_is_none(no_cluster):
    status, output, errors = run_driver("""
        import ray
        context = ray.init(num_cpus=1, include_dashboard=True)
        print(context.dashboard_url)
    """)
    assert (status, output.strip()) == (0, "None"), errors
    assert errors.count("dashboard") == 2, errors  # the argument's name, and that there is none
    assert len(errors.splitlines()) == 1


def test_the_number_of_cpus_defaults_to_those_of_the_machine(fresh_cluster):
    fresh_cluster()
    assert ray.cluster_resources()["CPU"] == len(os.sched_getaffinity(0))


def test_nodes_describes_the_one_node(cluster):
    (node,) = ray.nodes()
    assert node["Alive"] is True
    assert node["NodeID"] == ray.get_runtime_context().get_node_id()
    assert node["Resources"]["CPU"] == 4
    assert node["Labels"] == {"ray.io/node-id": node["NodeID"]}
    assert Path(node["RayletSocketName"]).exists()
    assert Path(node["ObjectStoreSocketName"]).exists()


def test_environment_variables_of_the_job_reach_every_worker(fresh_cluster):
    fresh_cluster(num_cpus=1, runtime_env={"env_vars": {"COLOUR": "green"}})

    @ray.remote
    def colour():
        return os.environ["COLOUR"]

    @ray.remote
    class Painter:
        def colour(self):
            return os.environ["COLOUR"]

    assert ray.get([colour.remote(), Painter.remote().colour.remote()]) == ["green", "green"]


def test_an_unknown_argument_of_init_is_named(no_cluster):
    with pytest.raises((TypeError, RuntimeError), match="nonsense"):
        ray.init(nonsense=1)
    assert not ray.is_initialized()


def test_resources_of_init_must_not_be_negative(no_cluster):
    with pytest.raises(ValueError, match=r"(?i)cpu|negative|resource"):
        ray.init(num_cpus=-1, include_dashboard=False, logging_level="ERROR")


def test_cpu_must_not_be_given_as_a_custom_resource(no_cluster):
    with pytest.raises((ValueError, AssertionError), match=r"(?i)cpu|resource"):
        ray.init(resources={"CPU": 1}, include_dashboard=False, logging_level="ERROR")


def test_logging_to_the_driver_and_the_dashboard_are_accepted_arguments(fresh_cluster):
    fresh_cluster(num_cpus=1, log_to_driver=False, include_dashboard=False, logging_level="INFO", namespace="mine")
    assert ray.get_runtime_context().namespace == "mine"


def test_a_driver_that_ends_without_shutdown_ends_well(no_cluster):
    status, output, errors = run_driver("""
        import ray

        @ray.remote
        class Holder:
            def get(self):
                return 1

        holder = Holder.remote()
        print(ray.get(holder.get.remote()))
    """)
    assert (status, output.splitlines()[-1]) == (0, "1"), errors
    assert "Traceback" not in errors


def test_a_driver_that_fails_keeps_its_exit_status(no_cluster):
    status, _, errors = run_driver("""
        import ray
        ray.init()
        raise SystemExit(3)
    """)
    assert status == 3, errors


@pytest.mark.skate  # the words are ours
def test_what_is_left_of_a_former_cluster_is_refused_and_never_waited_for(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote
    def same(value):
        return value

    @ray.remote
    class Actor:
        def method(self):
            return 1

    reference, actor = ray.put(1), Actor.remote()
    ray.get(actor.method.remote())
    ray.shutdown()
    fresh_cluster(num_cpus=1)
    for use in (
        lambda: ray.get(reference),
        lambda: ray.get([reference]),
        lambda: ray.wait([reference]),
        lambda: ray.cancel(reference),
        lambda: same.remote(reference),
        lambda: reference.future(),
    ):
        with pytest.raises(ValueError, match="shut down"):
            use()
    with pytest.raises(TypeError, match="shut down"):
        same.remote([reference])
    with pytest.raises(ray.exceptions.ActorHandleNotFoundError, match="shut down"):
        actor.method.remote()
    assert ray.get(same.remote(3)) == 3


@pytest.mark.skate  # the words are ours
def test_the_configuration_of_logging_is_checked(no_cluster):
    assert ray.Language.PYTHON.value() == 0
    assert ray.LoggingConfig.from_dict(ray.LoggingConfig(encoding="JSON").to_dict()).encoding == "JSON"
    for wrong in ({"encoding": "XML"}, {"log_level": "LOUD"}, {"additional_log_standard_attrs": ["nothing"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ray.LoggingConfig(**wrong)


@pytest.mark.skate
def test_the_client_is_refused_with_a_reason(no_cluster):
    with pytest.raises(NotImplementedError, match="Ray Client"):
        ray.client("somewhere:10001")
    with pytest.raises(TypeError, match="logging_config"):
        ray.init(logging_config="INFO")
