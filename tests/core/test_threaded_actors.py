"""Actors that run several plain methods at once, on threads."""

import threading

import pytest

import ray
from tests.core.helpers import Gate


def test_a_threaded_actor_runs_calls_side_by_side(cluster):
    @ray.remote(max_concurrency=4)
    class Meeting:
        def __init__(self):
            self.barrier = threading.Barrier(4)

        def join(self):
            self.barrier.wait(timeout=20)
            return threading.get_ident()

    meeting = Meeting.remote()
    assert len(set(ray.get([meeting.join.remote() for _ in range(4)]))) == 4


def test_max_concurrency_is_a_limit(cluster):
    @ray.remote(max_concurrency=3)
    class Watched:
        def __init__(self):
            self.lock = threading.Lock()
            self.running = self.most = 0
            self.full = threading.Event()

        def work(self):
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
                if self.running == 3:
                    self.full.set()
            self.full.wait(timeout=20)
            with self.lock:
                self.running -= 1

        def most_at_once(self):
            return self.most

    watched = Watched.remote()
    ray.get([watched.work.remote() for _ in range(12)])
    assert ray.get(watched.most_at_once.remote()) == 3


def test_an_ordinary_actor_runs_one_call_at_a_time(cluster):
    @ray.remote
    class Watched:
        def __init__(self):
            self.running = self.most = 0

        def work(self):
            self.running += 1
            self.most = max(self.most, self.running)
            threading.Event().wait(0.001)
            self.running -= 1
            return self.most

    watched = Watched.remote()
    assert max(ray.get([watched.work.remote() for _ in range(20)])) == 1


def test_a_blocked_call_does_not_stop_the_others(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote(max_concurrency=2)
    class Worker:
        def block(self):
            gate.wait()
            return "released"

        def ping(self):
            return "pong"

    worker = Worker.remote()
    blocked = worker.block.remote()
    assert ray.get([worker.ping.remote() for _ in range(20)]) == ["pong"] * 20
    gate.open()
    assert ray.get(blocked) == "released"


def test_a_threaded_actor_can_call_itself(cluster):
    @ray.remote(max_concurrency=2)
    class Recursive:
        def outer(self):
            return ray.get(ray.get_runtime_context().current_actor.inner.remote())

        def inner(self):
            return "inner"

    assert ray.get(Recursive.remote().outer.remote()) == "inner"


def test_threads_can_get_and_put(cluster):
    @ray.remote
    def square(x):
        return x * x

    @ray.remote(max_concurrency=4)
    class Worker:
        def work(self, x):
            return ray.get(ray.put(ray.get(square.remote(x))))

    worker = Worker.remote()
    assert ray.get([worker.work.remote(i) for i in range(12)]) == [i * i for i in range(12)]


def test_errors_stay_with_their_call(cluster):
    @ray.remote(max_concurrency=4)
    class Worker:
        def work(self, x):
            if x % 2:
                raise ValueError(x)
            return x

    worker = Worker.remote()
    references = [worker.work.remote(i) for i in range(10)]
    for number, reference in enumerate(references):
        if number % 2:
            with pytest.raises(ValueError, match=str(number)):
                ray.get(reference)
        else:
            assert ray.get(reference) == number


def test_concurrency_groups_of_plain_methods(cluster, tmp_path):
    gate, started = Gate(tmp_path), Gate(tmp_path)

    @ray.remote(concurrency_groups={"slow": 1, "quick": 1})
    class Grouped:
        @ray.method(concurrency_group="slow")
        def slow(self):
            started.open()
            gate.wait()
            return "slow"

        @ray.method(concurrency_group="quick")
        def quick(self):
            return "quick"

        def other(self):
            return "other"

    grouped = Grouped.remote()
    blocked = grouped.slow.remote()
    started.wait()
    assert ray.get([grouped.quick.remote(), grouped.other.remote()]) == ["quick", "other"]
    gate.open()
    assert ray.get(blocked) == "slow"


@pytest.mark.skate  # kills the actor on Ray
def test_an_unknown_concurrency_group_is_named(cluster):
    @ray.remote(concurrency_groups={"io": 1})
    class Grouped:
        def f(self):
            return 1

    grouped = Grouped.remote()
    with pytest.raises(Exception, match="nowhere"):
        ray.get(grouped.f.options(concurrency_group="nowhere").remote(), timeout=10)


def test_max_concurrency_must_not_be_negative(cluster):
    class Plain:
        pass

    with pytest.raises(ValueError, match="max_concurrency"):
        ray.remote(max_concurrency=-1)(Plain).remote()
