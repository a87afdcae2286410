"""Tables stay bounded when a program goes on making new functions, options, actors and generators."""

import gc

import pytest

import ray
from tests.core.helpers import wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # a table is full only after hundreds of entries

COUNT = 1200
DEFINITIONS_KEPT = 256 + 8  # unused ones, and those of this module in use


def driver_statistics():
    from ray._runtime import session

    gc.collect()
    return session.core.statistics()


@ray.remote
def known_in_worker():
    from ray._runtime import context, session

    return {**session.core.statistics(), "python_functions": len(context.worker.functions)}


def test_functions_and_options_that_are_not_used_any_more_are_forgotten(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote
    def base():
        return 0

    for number in range(COUNT):
        function = ray.remote(lambda number=number: number)
        assert ray.get(function.remote()) == number
        base.options(max_retries=number, resources={}).remote()
    del function
    in_worker = ray.get(known_in_worker.remote())
    assert driver_statistics()["definitions"] <= DEFINITIONS_KEPT
    assert in_worker["known_definitions"] <= DEFINITIONS_KEPT
    assert in_worker["known_functions"] <= DEFINITIONS_KEPT
    assert in_worker["python_functions"] <= 512
    wait_until(lambda: driver_statistics()["objects"] == 0, what="release of all objects")


def test_a_function_that_was_forgotten_works_when_it_is_called_again(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote
    def first():
        return "first"

    assert ray.get(first.remote()) == "first"
    for number in range(600):
        assert ray.get(ray.remote(lambda number=number: number).remote()) == number
    assert ray.get(first.remote()) == "first"


def test_actors_that_have_ended_leave_nothing_with_their_owner(fresh_cluster):
    fresh_cluster(num_cpus=2)

    @ray.remote(num_cpus=0)
    class Actor:
        def ping(self):
            return 1

        def numbers(self):
            yield from range(3)

    def use(actor):
        assert ray.get(actor.ping.remote()) == 1
        assert sum(ray.get(item) for item in actor.numbers.options(num_returns="streaming").remote()) == 3

    for _ in range(60):
        use(Actor.remote())
    empty = ("actors", "objects", "tasks", "streams", "watches")
    wait_until(lambda: not any(driver_statistics()[name] for name in empty), what="the end of all actors")
    assert driver_statistics()["definitions"] <= DEFINITIONS_KEPT
