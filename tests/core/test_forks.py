"""Forks of the user's process, by `os.fork` and `multiprocessing`: not part of the cluster, and no danger to it."""

import asyncio
import os

import pytest

import ray
from tests.core.helpers import run_driver

pytestmark = pytest.mark.skate


def test_a_forked_child_is_told_that_it_is_in_no_cluster(no_cluster):
    status, output, errors = run_driver("""
        import os, signal
        import ray

        ray.init(num_cpus=1)

        @ray.remote
        def double(x):
            return 2 * x

        @ray.remote
        class Actor:
            def method(self):
                return 1

        actor = Actor.remote()
        reference = double.remote(1)
        attempts = {
            "get": lambda: ray.get(reference), "wait": lambda: ray.wait([reference]), "put": lambda: ray.put(1),
            "task": lambda: double.remote(2), "call": lambda: actor.method.remote(), "actor": lambda: Actor.remote(),
            "kill": lambda: ray.kill(actor), "future": lambda: reference.future(), "nodes": lambda: ray.nodes(),
        }
        assert ray.get([reference, actor.method.remote()]) == [2, 1]
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a hang must not hang the test
            for name, attempt in attempts.items():
                try:
                    attempt()
                except ray.exceptions.RaySystemError as error:
                    assert "forked" in str(error), error
                    print(name, flush=True)
            assert not ray.is_initialized()
            ray.shutdown()
            del reference, actor, attempts
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(ray.get([reference, double.remote(4), actor.method.remote()]))
    """)
    assert status == 0, errors
    *refused, last = output.splitlines()
    assert refused == ["get", "wait", "put", "task", "call", "actor", "kill", "future", "nodes"]
    assert last == "[2, 8, 1]"


def test_children_of_multiprocessing_do_not_disturb_the_cluster(no_cluster):
    status, output, errors = run_driver("""
        import multiprocessing
        import numpy
        import ray

        ray.init(num_cpus=1)
        array = ray.get(ray.put(numpy.ones(100_000)))
        reference = ray.put(numpy.ones(100_000))

        def square(x):
            return x * x

        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(square, range(4)))
        print(ray.get(reference).sum(), array.sum())
    """)
    assert status == 0, errors
    assert output.splitlines() == ["[0, 1, 4, 9]", "100000.0 100000.0"]


def test_a_forked_child_may_start_a_cluster_of_its_own(no_cluster):
    status, output, errors = run_driver("""
        import os, signal
        import ray

        ray.init(num_cpus=1)

        @ray.remote
        def double(x):
            return 2 * x

        reference = double.remote(1)
        assert ray.get(reference) == 2
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            ray.init(num_cpus=1)
            print(ray.get(double.remote(4)), flush=True)
            try:
                ray.get(reference)
            except ValueError as error:
                print("refused", flush=True)
            ray.shutdown()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(ray.get([reference, double.remote(5)]))
    """)
    assert status == 0, errors
    assert output.splitlines() == ["8", "refused", "[2, 10]"]


def test_forks_are_safe_while_other_threads_use_the_cluster(no_cluster):
    status, output, errors = run_driver("""
        import os, signal, threading
        import ray

        ray.init(num_cpus=1)

        @ray.remote
        def double(x):
            return 2 * x

        reference = ray.put(list(range(1000)))
        over = threading.Event()

        def use():
            while not over.is_set():
                ray.get([double.remote(1) for _ in range(20)])

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                del reference
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        over.set()
        for thread in threads:
            thread.join()
        print(len(ray.get(reference)), ray.get(double.remote(3)))
    """)
    assert status == 0, errors
    assert output.split() == ["1000", "6"]


def fork_and(outcome):
    """In the parent, the child's exit status. The child comes back from here to whoever called its task."""
    child = os.fork()
    if child == 0:
        outcome()
        return None
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def come_back():
    pass


def fail():
    raise ValueError("in the child")


def leave():
    raise SystemExit(5)


def fork_in_a_task(outcome):
    return ray.remote(fork_and).remote(outcome)


def fork_in_a_generator(outcome):
    @ray.remote
    def items():
        yield fork_and(outcome)

    return next(items.remote())


def fork_in_a_method(outcome):
    return Forker.remote().method.remote(outcome)


def fork_in_a_thread(outcome):
    return Forker.options(max_concurrency=2).remote().method.remote(outcome)


def fork_in_a_coroutine(outcome):
    return AsyncForker.remote().method.remote(outcome)


def fork_in_an_async_generator(outcome):
    return next(AsyncForker.remote().items.options(num_returns="streaming").remote(outcome))


def fork_in_init(outcome):
    @ray.remote
    class InInit:
        def __init__(self):
            self.status = fork_and(outcome)

        def get(self):
            return self.status

    return InInit.remote().get.remote()


@ray.remote
class Forker:
    def method(self, outcome):
        return fork_and(outcome)


@ray.remote
class AsyncForker:
    async def method(self, outcome):
        return fork_and(outcome)

    async def items(self, outcome):
        yield fork_and(outcome)

    async def await_in_the_child(self):
        others = [asyncio.create_task(self.other()) for _ in range(3)]
        child = os.fork()
        if child == 0:
            await asyncio.sleep(0)
            return None
        await asyncio.gather(*others)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), self.parent == os.getpid()

    async def other(self):
        self.parent = os.getpid()


PLACES = [
    fork_in_a_task,
    fork_in_a_generator,
    fork_in_a_method,
    fork_in_a_thread,
    fork_in_a_coroutine,
    fork_in_an_async_generator,
    fork_in_init,
]


@pytest.mark.parametrize(("outcome", "status"), [(come_back, 0), (fail, 1), (leave, 5)])
@pytest.mark.parametrize("fork", PLACES)
def test_a_child_ends_where_it_comes_back_from_its_task(cluster, fork, outcome, status):
    assert ray.get(fork(outcome), timeout=20) == status


def test_a_child_ends_where_it_comes_back_to_an_event_loop(cluster):
    assert ray.get(AsyncForker.remote().await_in_the_child.remote(), timeout=20) == (1, True)


def test_a_child_that_fails_prints_its_traceback(no_cluster):
    status, _, errors = run_driver("""
        import os
        import ray

        @ray.remote
        def fork():
            child = os.fork()
            if child == 0:
                raise ValueError("in the child")
            os.waitpid(child, 0)

        ray.init(num_cpus=1)
        ray.get(fork.remote(), timeout=20)
        ray.shutdown()
    """)
    assert status == 0, errors
    assert "ValueError: in the child" in errors
    assert "in fork" in errors
