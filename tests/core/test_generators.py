"""Tasks and methods that hand out results one by one."""

import asyncio
import os

import numpy as np
import pytest

import ray
from tests.core.helpers import Gate, Tally, is_alive, kill_self, run_driver, wait_until


@ray.remote(num_returns="streaming")
def count(n):
    for i in range(n):  # noqa: UP028 -- Ray cannot delegate
        yield i


def test_a_generator_task_streams_references(cluster):
    stream = count.remote(4)
    assert isinstance(stream, ray.ObjectRefGenerator)
    references = list(stream)
    assert all(isinstance(reference, ray.ObjectRef) for reference in references)
    assert ray.get(references) == [0, 1, 2, 3]


def test_a_generator_function_streams_without_being_told(cluster):
    @ray.remote
    def squares(n):
        for i in range(n):
            yield i * i

    assert [ray.get(reference) for reference in squares.remote(4)] == [0, 1, 4, 9]


@pytest.mark.skate  # Ray sends into the generator, which iterators of built-in types do not support
def test_a_generator_may_delegate_to_an_iterator(cluster):
    @ray.remote
    def delegate():
        yield from [1, 2]
        yield from range(3, 5)

    assert [ray.get(reference) for reference in delegate.remote()] == [1, 2, 3, 4]


def test_an_empty_stream_ends(cluster):
    assert list(count.remote(0)) == []


def test_items_arrive_while_the_task_runs(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def two():
        yield "early"
        gate.wait()
        yield "late"

    stream = two.remote()
    assert ray.get(next(stream)) == "early"
    gate.open()
    assert ray.get(next(stream)) == "late"
    with pytest.raises(StopIteration):
        next(stream)


def test_a_long_stream_keeps_its_order(cluster):
    assert [ray.get(reference) for reference in count.remote(500)] == list(range(500))


def test_large_items(cluster):
    @ray.remote
    def blocks(n):
        for i in range(n):
            yield bytes([i]) * 500_000

    assert [ray.get(reference)[0] for reference in blocks.remote(5)] == [0, 1, 2, 3, 4]


def test_an_error_in_the_middle_comes_after_the_items_before_it(cluster):
    @ray.remote
    def broken():
        yield 1
        raise ValueError("in the middle")

    stream = broken.remote()
    assert ray.get(next(stream)) == 1
    with pytest.raises(ValueError, match="in the middle"):
        ray.get(next(stream))
    with pytest.raises(StopIteration):
        next(stream)


def test_methods_of_actors_can_stream(cluster):
    @ray.remote
    class Streamer:
        def count(self, n):
            for i in range(n):  # noqa: UP028 -- Ray cannot delegate
                yield i

        @ray.method(num_returns="streaming")
        def letters(self):
            yield "a"
            yield "b"

    streamer = Streamer.remote()
    assert [ray.get(r) for r in streamer.count.options(num_returns="streaming").remote(3)] == [0, 1, 2]
    assert [ray.get(r) for r in streamer.letters.remote()] == ["a", "b"]


def test_back_pressure_holds_the_generator(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(num_returns="streaming", _generator_backpressure_num_objects=2)
    def eager():
        for i in range(20):
            tally.add()
            yield i

    stream = eager.remote()
    wait_until(lambda: tally.count() >= 2, what="a start")
    for number, reference in enumerate(stream):
        assert ray.get(reference) == number
        assert tally.count() <= number + 5
    assert tally.count() == 20


def test_wait_takes_streams(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def gated():
        gate.wait()
        yield 1

    early, late = count.remote(1), gated.remote()
    ready, pending = ray.wait([late, early])
    assert (ready, pending) == ([early], [late])
    gate.open()
    assert ray.get(next(late)) == 1


def test_completed_becomes_ready_at_the_end(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def gated():
        yield 1
        gate.wait()

    stream = gated.remote()
    assert ray.wait([stream.completed()], timeout=0.05)[0] == []
    gate.open()
    ray.get(stream.completed())


def test_a_stream_can_be_iterated_asynchronously(cluster):
    async def main():
        return [await reference async for reference in count.remote(4)]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_an_unread_stream_does_not_disturb(cluster):
    for _ in range(5):
        count.remote(10)
    assert [ray.get(reference) for reference in count.remote(2)] == [0, 1]


def test_references_of_a_stream_are_arguments(cluster):
    @ray.remote
    def double(x):
        return 2 * x

    assert ray.get([double.remote(reference) for reference in count.remote(4)]) == [0, 2, 4, 6]


def test_a_task_can_consume_the_stream_of_its_child(cluster):
    @ray.remote
    def consume():
        return sum(ray.get(reference) for reference in count.remote(5))

    assert ray.get(consume.remote()) == 10


def test_a_stream_that_was_cut_by_a_crash_is_produced_again(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(max_retries=1)
    def crash_once():
        for i in range(4):
            if i == 2 and tally.add() == 1:
                os._exit(1)
            yield i

    assert [ray.get(reference) for reference in crash_once.remote()] == [0, 1, 2, 3]


def test_dynamic_returns_are_known_at_the_end(cluster):
    @ray.remote(num_returns="dynamic")
    def some(n):
        for i in range(n):  # noqa: UP028 -- Ray cannot delegate
            yield i

    references = ray.get(some.remote(3))
    assert [ray.get(reference) for reference in references] == [0, 1, 2]


def test_a_generator_may_fill_a_fixed_number_of_results(cluster):
    @ray.remote(num_returns=3)
    def three():
        yield from "abc"

    assert ray.get(three.remote()) == ["a", "b", "c"]


def test_a_stream_cannot_be_an_argument(cluster):
    @ray.remote
    def f(x):
        return x

    with pytest.raises(Exception, match=r"(?i)generator|pickle|serializ"):
        ray.get(f.remote(count.remote(1)))


@ray.remote(num_returns="dynamic")
def count_to(number, fail=False):
    yield from range(number)
    if fail:
        raise KeyError("after the last")


def test_dynamic_returns_outlive_the_worker_that_made_them(cluster):
    @ray.remote(num_returns="dynamic", max_calls=1)
    def once():
        yield os.getpid()
        yield np.ones(200_000)

    pid, array = ray.get(once.remote())
    wait_until(lambda: not is_alive(ray.get(pid)))
    assert ray.get(array).sum() == 200_000


def test_an_error_after_some_dynamic_returns_takes_the_next_place(cluster):
    *items, last = ray.get(count_to.remote(3, fail=True))
    assert ray.get(items) == [0, 1, 2]
    with pytest.raises(KeyError, match="after the last"):
        ray.get(last)


def test_dynamic_returns_can_be_passed_on(cluster):
    @ray.remote
    def total(generator):
        return sum(ray.get(list(generator)))

    reference = count_to.remote(5)
    assert ray.get(total.remote(reference)) == 10
    assert ray.get(total.remote(count_to.remote(4))) == 6
    assert len(ray.get(reference)) == 5


def test_dynamic_returns_that_nobody_holds_make_room(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=80 * 2**20)

    @ray.remote(num_returns="dynamic")
    def arrays():
        for _ in range(4):
            yield np.zeros(2**20)  # 8 MiB

    for _ in range(10):
        assert [ray.get(item).nbytes for item in ray.get(arrays.remote())] == [8 * 2**20] * 4


@pytest.mark.skate  # the original may hand out the items of both attempts
def test_dynamic_returns_of_a_task_that_crashed_halfway_are_complete(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(num_returns="dynamic")
    def crash_once():
        yield 1
        yield 2
        if tally.add() == 1:
            kill_self()
        yield 3

    assert ray.get(list(ray.get(crash_once.remote()))) == [1, 2, 3]


def test_methods_of_actors_may_have_dynamic_returns(cluster):
    @ray.remote
    class Counter:
        def count(self, number):
            yield from range(number)

    counter = Counter.remote()
    assert ray.get(list(ray.get(counter.count.options(num_returns="dynamic").remote(3)))) == [0, 1, 2]


def test_the_end_of_a_stream_is_finished_and_not_ready(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def two():
        yield 1
        gate.wait()
        yield 2

    stream = two.remote()
    wait_until(stream.next_ready)
    assert not stream.is_finished()
    assert ray.get(next(stream)) == 1
    assert not stream.next_ready()
    gate.open()
    wait_until(stream.next_ready)
    assert ray.wait([stream], timeout=20) == ([stream], [])
    assert ray.get(next(stream)) == 2
    wait_until(stream.is_finished)
    assert not stream.next_ready()
    assert list(stream) == []
    assert not stream.next_ready()


def test_a_stream_can_be_polled_to_its_end(cluster):
    async def poll():
        stream, seen = count.remote(3), []
        while not stream.is_finished():
            if stream.next_ready():
                seen.append(await anext(stream))
            await asyncio.sleep(0)
        return await asyncio.gather(*seen)

    assert asyncio.run(poll()) == [0, 1, 2]


class Yielding:
    """Methods that yield; an asynchronous actor has both."""

    def three(self):
        yield from range(3)


class AsyncYielding(Yielding):
    async def three_async(self):
        number = 0
        while True:  # without an end, so that nobody may wait for it
            yield number
            number += 1


@pytest.mark.parametrize("count_wanted", [1, 2])
def test_a_number_of_results_takes_the_first_values_of_a_generator(cluster, count_wanted):
    def first(method, *arguments):
        references = method.options(num_returns=count_wanted).remote(*arguments)
        return ray.get(references if count_wanted > 1 else [references], timeout=20)

    expected = list(range(count_wanted))
    assert first(count, 3) == expected
    actor = ray.remote(AsyncYielding).remote()
    assert first(ray.remote(Yielding).remote().three) == expected
    assert first(actor.three) == expected
    assert first(actor.three_async) == expected


def test_a_generator_with_too_few_values_is_an_error(cluster):
    for number, wanted in ((0, 1), (1, 2)):
        references = count.options(num_returns=wanted).remote(number)
        with pytest.raises(ValueError, match=f"num_returns={wanted}"):
            ray.get(references if wanted == 1 else references[-1])


def test_an_error_after_the_values_does_not_take_them_back(cluster):
    @ray.remote(num_returns=2)
    def late():
        yield 1
        yield 2
        raise ValueError("late")

    assert ray.get(late.remote()) == [1, 2]


def test_what_a_generator_yields_beyond_its_results_is_reported(no_cluster):
    status, output, errors = run_driver("""
        import time
        import ray

        @ray.remote(num_returns=2)
        def three():
            yield from [1, 2, 3]

        @ray.remote(num_returns=2)
        def late():
            yield 1
            yield 2
            raise KeyError("too late")

        ray.init(num_cpus=1)
        ray.get(three.remote())
        ray.get(late.remote())
        time.sleep(0 if "skate" in ray.__version__ else 1)  # the original cannot wait for output
        ray.shutdown()
    """)
    assert status == 0, errors
    said = output + errors
    assert "num_returns=2" in said
    assert "KeyError: 'too late'" in said
