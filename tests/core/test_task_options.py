"""Options of remote functions: what they do, and which are refused."""

import os

import pytest

import ray
from tests.core.helpers import Tally, is_alive, wait_until


@ray.remote
def process_id():
    return os.getpid()


@ray.remote
def square(number):
    return number * number


@ray.remote
def pair():
    return 1, 2


def test_several_results_are_several_references(cluster):
    first, second = pair.options(num_returns=2).remote()
    assert (ray.get(first), ray.get(second)) == (1, 2)


def test_num_returns_in_the_decorator(cluster):
    @ray.remote(num_returns=3)
    def three():
        return "a", "b", "c"

    assert ray.get(three.remote()) == ["a", "b", "c"]


def test_one_result_may_be_a_tuple(cluster):
    assert ray.get(pair.remote()) == (1, 2)


def test_no_results_are_no_reference(cluster):
    assert pair.options(num_returns=0).remote() is None or pair.options(num_returns=0).remote() == []


def test_many_results_that_are_together_larger_than_a_message(cluster):
    @ray.remote(num_returns=1000)
    def many():
        return [bytes([number % 256]) * 90_000 for number in range(1000)]

    results = ray.get(many.remote())
    assert [(result[0], len(result)) for result in results] == [(number % 256, 90_000) for number in range(1000)]


def test_large_results_among_several(cluster):
    @ray.remote(num_returns=2)
    def sizes():
        return b"small", bytes(1_000_000)

    small, large = ray.get(sizes.remote())
    assert (small, len(large)) == (b"small", 1_000_000)


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_results_is_an_error(cluster, count):
    @ray.remote(num_returns=2)
    def wrong():
        return tuple(range(count))

    with pytest.raises(ValueError, match=r"(?i)2|return"):
        ray.get(wrong.remote())


def test_a_result_that_cannot_be_split_is_an_error(cluster):
    @ray.remote(num_returns=2)
    def wrong():
        return 5

    with pytest.raises((ValueError, TypeError)):
        ray.get(wrong.remote())


def test_options_do_not_change_the_original(cluster):
    assert len(pair.options(num_returns=2).remote()) == 2
    assert isinstance(pair.remote(), ray.ObjectRef)


def test_options_can_name_the_task(cluster):
    @ray.remote
    def f():
        return ray.get_runtime_context().get_task_name()

    assert ray.get(f.options(name="chosen").remote()) == "chosen"


def test_environment_variables_of_one_task(cluster):
    @ray.remote
    def colour():
        return os.environ.get("COLOUR")

    blue = colour.options(runtime_env={"env_vars": {"COLOUR": "blue"}})
    assert ray.get([blue.remote(), colour.remote(), blue.remote()]) == ["blue", None, "blue"]


def test_environment_variables_of_a_task_extend_those_of_the_job(fresh_cluster):
    fresh_cluster(num_cpus=1, runtime_env={"env_vars": {"A": "job", "B": "job"}})

    @ray.remote(runtime_env={"env_vars": {"B": "task"}})
    def both():
        return os.environ["A"], os.environ["B"]

    assert ray.get(both.remote()) == ("job", "task")


def test_max_calls_ends_the_worker_after_so_many_tasks(cluster):
    @ray.remote(max_calls=1)
    def once():
        return os.getpid()

    pids = [ray.get(once.remote()) for _ in range(3)]
    assert len(set(pids)) == 3


def test_what_a_worker_put_outlives_its_last_call(cluster):
    """The worker lends no CPU meanwhile, and ends when nobody refers to its values any more."""

    @ray.remote(max_calls=1, num_cpus=ray.cluster_resources()["CPU"])
    def put(value):
        return os.getpid(), ray.put(value), square.remote(value)

    pids, references, squares = zip(*ray.get([put.remote(number) for number in range(4)]), strict=True)
    assert len(set(pids)) == 4
    assert ray.get(list(references)) == [0, 1, 2, 3]
    assert ray.get(list(squares)) == [0, 1, 4, 9]
    del references, squares
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.parametrize("strategy", ["DEFAULT", "SPREAD"])
def test_scheduling_strategies_are_accepted(cluster, strategy):
    assert ray.get(process_id.options(scheduling_strategy=strategy).remote()) > 0


def test_a_task_may_need_no_cpu(cluster):
    assert ray.get(process_id.options(num_cpus=0).remote()) > 0


@pytest.mark.parametrize(
    "option",
    [
        {"num_cpus": True},
        {"memory": True},
        {"max_retries": True},
        {"num_returns": True},
        {"_labels": {"team": "blue"}},
        {"fallback_strategy": []},
        {"label_selector": {}},
    ],
)
def test_what_asks_for_nothing_special_is_accepted(cluster, option):
    assert ray.get(process_id.options(**option).remote(), timeout=20) > 0


def test_an_actor_may_have_labels_and_an_empty_list_of_strategies(cluster):
    @ray.remote(num_cpus=True, _labels={"team": "blue"}, fallback_strategy=[], max_restarts=True)
    class Actor:
        def held(self):
            return ray.get_runtime_context().get_assigned_resources()

    assert ray.get(Actor.remote().held.remote()) == {"CPU": 1}


def test_max_calls_in_options_of_a_call_is_refused(cluster):
    with pytest.raises(ValueError, match="max_calls"):
        process_id.options(max_calls=1)


def test_memory_can_be_demanded(cluster):
    assert ray.get(process_id.options(memory=10_000_000).remote()) > 0


def test_what_a_task_demands_is_given_back(cluster):
    ray.get([process_id.options(num_cpus=3, resources={"special": 2}).remote() for _ in range(3)])
    wait_until(lambda: ray.available_resources().get("CPU") == 4, what="return of the CPUs")
    wait_until(lambda: ray.available_resources().get("special") == 2, what="return of special")


@pytest.mark.parametrize(
    "options",
    [
        {"num_cpus": -1},
        {"num_gpus": -0.5},
        {"resources": {"special": -1}},
        {"num_returns": -1},
        {"max_retries": -2},
        {"max_calls": -1},
        {"memory": -1},
    ],
)
def test_negative_options_are_refused_by_name(cluster, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}|special"):
        process_id.options(**options).remote()


@pytest.mark.parametrize(
    "options",
    [
        {"num_cpus": "two"},
        pytest.param({"num_returns": "many"}, marks=pytest.mark.skate),  # an obscure error on Ray
        {"max_retries": "x"},
        {"resources": 3},
        {"runtime_env": 7},
    ],
)
def test_options_of_the_wrong_type_are_refused_by_name(cluster, options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=name):
        process_id.options(**options).remote()


def test_an_unknown_option_is_named(cluster):
    with pytest.raises((ValueError, TypeError), match="num_cpu"):
        process_id.options(num_cpu=1)
    with pytest.raises((ValueError, TypeError), match="colour"):
        ray.remote(colour="green")(lambda: None)


def test_an_option_of_actors_is_refused_for_tasks(cluster):
    with pytest.raises((ValueError, TypeError), match="max_restarts"):
        process_id.options(max_restarts=1)


@pytest.mark.parametrize("name", ["CPU", "GPU", "memory"])
def test_reserved_resources_must_be_given_by_their_own_option(cluster, name):
    with pytest.raises(ValueError, match=name):
        process_id.options(resources={name: 1}).remote()


def test_fractions_of_a_custom_resource(cluster):
    assert ray.get(process_id.options(resources={"special": 0.25}).remote()) > 0


def test_a_fraction_above_one_is_refused_for_gpus(cluster):
    with pytest.raises(ValueError, match=r"(?i)gpu"):
        process_id.options(num_gpus=1.5).remote()


@ray.remote
def environment(*names):
    context = ray.get_runtime_context()
    return {name: os.environ.get(name) for name in names}, dict(context.runtime_env)


def test_a_task_sees_its_own_runtime_environment(fresh_cluster):
    fresh_cluster(num_cpus=2, runtime_env={"env_vars": {"A": "job", "B": "job"}})
    own = environment.options(runtime_env={"env_vars": {"B": "task"}})
    assert ray.get(own.remote("A", "B")) == ({"A": "job", "B": "task"}, {"env_vars": {"A": "job", "B": "task"}})
    assert ray.get(environment.remote())[1] == {"env_vars": {"A": "job", "B": "job"}}
    assert ray.get_runtime_context().runtime_env == {"env_vars": {"A": "job", "B": "job"}}


def test_children_inherit_the_runtime_environment(cluster):
    @ray.remote
    class Actor:
        def environment(self):
            return os.environ.get("A"), dict(ray.get_runtime_context().runtime_env)

    @ray.remote(runtime_env={"env_vars": {"A": "parent", "B": "parent"}})
    def parent():
        actor = Actor.remote()
        return ray.get(
            [
                environment.remote("A", "B"),
                environment.options(runtime_env={"env_vars": {"B": "child"}}).remote("A", "B"),
                actor.environment.remote(),
            ]
        )

    plain, with_own, actor = ray.get(parent.remote())
    assert plain == ({"A": "parent", "B": "parent"}, {"env_vars": {"A": "parent", "B": "parent"}})
    assert with_own == ({"A": "parent", "B": "child"}, {"env_vars": {"A": "parent", "B": "child"}})
    assert actor == ("parent", {"env_vars": {"A": "parent", "B": "parent"}})


def test_tasks_queued_to_a_worker_that_leaves_after_max_calls_all_run_once(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(max_calls=3, max_retries=0)
    def count(number):
        tally.add(str(number))
        return os.getpid()

    pids = ray.get([count.remote(number) for number in range(60)])
    assert sorted(map(int, tally.lines())) == list(range(60))
    assert all(pids.count(pid) <= 3 for pid in pids)


def test_coroutine_functions_are_refused(cluster):
    async def coroutine():
        return 1

    with pytest.raises(ValueError, match="async def"):
        ray.remote(coroutine)
