"""Actors that can be found by name, and outlive those who made them."""

import os
import uuid

import pytest

import ray
from tests.core.helpers import is_alive, wait_until


@ray.remote
class Counter:
    def __init__(self):
        self.value = 0

    def increment(self):
        self.value += 1
        return self.value

    def process_id(self):
        return os.getpid()


@pytest.fixture
def name():
    return f"name-{uuid.uuid4().hex}"


def test_a_named_actor_can_be_found(cluster, name):
    counter = Counter.options(name=name).remote()
    ray.get(counter.increment.remote())
    assert ray.get(ray.get_actor(name).increment.remote()) == 2


def test_a_task_can_find_a_named_actor(cluster, name):
    @ray.remote
    def find():
        return ray.get(ray.get_actor(name).increment.remote())

    counter = Counter.options(name=name).remote()
    assert ray.get(find.remote()) == 1
    assert ray.get(counter.increment.remote()) == 2


def test_a_missing_name_is_an_error_that_says_it(cluster):
    with pytest.raises(ValueError, match="nobody"):
        ray.get_actor("nobody")


@pytest.mark.parametrize("wrong", ["", None, 3])
def test_a_wrong_name_is_an_error(cluster, wrong):
    with pytest.raises((ValueError, TypeError)):
        ray.get_actor(wrong)


def test_a_name_cannot_be_taken_twice(cluster, name):
    first = Counter.options(name=name).remote()
    with pytest.raises(ValueError, match=name):
        Counter.options(name=name).remote()
    assert ray.get(first.increment.remote()) == 1


def test_get_if_exists_creates_once(cluster, name):
    first = Counter.options(name=name, get_if_exists=True).remote()
    second = Counter.options(name=name, get_if_exists=True).remote()
    assert ray.get([first.increment.remote(), second.increment.remote()]) == [1, 2]


def test_get_if_exists_from_many_tasks_creates_once(cluster, name):
    @ray.remote
    def increment():
        counter = Counter.options(name=name, get_if_exists=True, lifetime="detached").remote()
        return ray.get(counter.process_id.remote())

    assert len(set(ray.get([increment.remote() for _ in range(8)]))) == 1
    ray.kill(ray.get_actor(name))


def test_get_if_exists_needs_a_name(cluster):
    with pytest.raises(ValueError, match=r"(?i)name"):
        Counter.options(get_if_exists=True).remote()


def test_a_name_is_free_again_after_the_actor_was_killed(cluster, name):
    ray.kill(Counter.options(name=name).remote())

    def taken_again():
        try:
            return Counter.options(name=name).remote()
        except ValueError:
            return None

    assert ray.get(wait_until(taken_again, what="release of the name").increment.remote()) == 1


def test_a_named_actor_ends_with_its_last_handle(cluster, name):
    counter = Counter.options(name=name).remote()
    pid = ray.get(counter.process_id.remote())
    del counter
    wait_until(lambda: not is_alive(pid), what="end of the actor")
    with pytest.raises(ValueError, match=name):
        ray.get_actor(name)


def test_a_detached_actor_lives_without_handles(cluster, name):
    @ray.remote
    def create():
        counter = Counter.options(name=name, lifetime="detached").remote()
        return ray.get(counter.process_id.remote())

    pid = ray.get(create.remote())
    found = ray.get_actor(name)
    assert ray.get(found.process_id.remote()) == pid
    del found
    assert ray.get(ray.get_actor(name).process_id.remote()) == pid
    ray.kill(ray.get_actor(name))
    wait_until(lambda: not is_alive(pid), what="end of the actor")


def test_a_detached_actor_survives_the_worker_that_made_it(cluster, name):
    @ray.remote(max_calls=1)
    def create():
        ray.get(Counter.options(name=name, lifetime="detached").remote().increment.remote())
        return os.getpid()

    pid = ray.get(create.remote())
    wait_until(lambda: not is_alive(pid), what="end of the creating worker")
    counter = ray.get_actor(name)
    assert ray.get(counter.increment.remote()) == 2
    ray.kill(counter)


def test_namespaces_separate_names(cluster, name):
    first = Counter.options(name=name, namespace="one").remote()
    second = Counter.options(name=name, namespace="two").remote()
    ray.get([first.increment.remote(), second.increment.remote()])
    assert ray.get(ray.get_actor(name, namespace="one").increment.remote()) == 2
    with pytest.raises(ValueError, match=name):
        ray.get_actor(name)


def test_the_namespace_of_the_job_is_the_default(fresh_cluster, name):
    fresh_cluster(num_cpus=1, namespace="home")
    counter = Counter.options(name=name).remote()
    assert ray.get(ray.get_actor(name, namespace="home").increment.remote()) == 1
    assert ray.get(counter.increment.remote()) == 2


def test_named_actors_can_be_listed(cluster, name):
    counter = Counter.options(name=name, namespace="listed").remote()
    ray.get(counter.increment.remote())
    assert name not in ray.util.list_named_actors()
    assert {"name": name, "namespace": "listed"} in ray.util.list_named_actors(all_namespaces=True)


@pytest.mark.parametrize("options", [{"name": 3}, {"name": ""}, {"lifetime": "forever"}, {"namespace": 1, "name": "x"}])
def test_wrong_naming_options_are_refused(cluster, options):
    with pytest.raises((TypeError, ValueError)):
        Counter.options(**options).remote()


@pytest.mark.parametrize("end", ["kill", "drop", "exit"])
def test_a_name_is_free_as_soon_as_its_actor_is_not_wanted(cluster, end):
    for _ in range(5):
        actor = Counter.options(name="free at once").remote()
        ray.get(actor.increment.remote())
        if end == "kill":
            ray.kill(actor)
        elif end == "exit":
            with pytest.raises(ray.exceptions.ActorDiedError):
                ray.get(actor.__ray_terminate__.remote())
        del actor
        with pytest.raises(ValueError, match="free at once"):
            ray.get_actor("free at once")


def test_get_if_exists_does_not_find_what_was_killed(cluster):
    for _ in range(5):
        actor = Counter.options(name="again and again", get_if_exists=True).remote()
        ray.get(actor.increment.remote())
        ray.kill(actor)
