"""Forks of the user's process, by `os.fork` and `multiprocessing`: not part of the cluster, and no danger to it."""

import pytest

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
