"""Functions that run elsewhere."""

import asyncio
import os
import threading

import pytest

import ray
from tests.core.helpers import Gate


@ray.remote
def add(a, b=10, *rest, scale=1, **named):
    return (a + b + sum(rest) + sum(named.values())) * scale


@ray.remote
def identity(value):
    return value


@ray.remote
def describe(value):
    return type(value).__name__


def test_a_task_returns_its_value(cluster):
    assert ray.get(add.remote(1, 2)) == 3


def test_a_task_runs_in_another_process(cluster):
    @ray.remote
    def where():
        return os.getpid()

    assert ray.get(where.remote()) != os.getpid()


def test_a_task_runs_on_the_main_thread_of_its_process(cluster):
    @ray.remote
    def on_main_thread():
        return threading.current_thread() is threading.main_thread()

    assert ray.get(on_main_thread.remote())


def test_results_come_in_the_order_of_the_references(cluster):
    assert ray.get([identity.remote(i) for i in range(500)]) == list(range(500))


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {}, 11),
        ((1, 2), {}, 3),
        ((1,), {"b": 5}, 6),
        ((1, 2, 3, 4), {}, 10),
        ((1, 2), {"scale": 3}, 9),
        ((1, 2), {"extra": 4}, 7),
        ((), {"a": 1, "b": 1, "c": 1, "scale": 2}, 6),
    ],
)
def test_arguments_bind_as_in_a_plain_call(cluster, args, kwargs, expected):
    assert ray.get(add.remote(*args, **kwargs)) == expected


def test_a_reference_as_argument_arrives_as_its_value(cluster):
    assert ray.get(add.remote(ray.put(1), b=ray.put(2))) == 3
    assert ray.get(describe.remote(ray.put([1]))) == "list"


def test_a_reference_inside_an_argument_arrives_as_a_reference(cluster):
    @ray.remote
    def inspect(items, *, table):
        return type(items[0]) is ray.ObjectRef, ray.get(items[0]) + ray.get(table["key"])

    assert ray.get(inspect.remote([ray.put(1)], table={"key": ray.put(2)})) == (True, 3)


def test_the_same_reference_may_be_several_arguments(cluster):
    one = ray.put(1)
    assert ray.get(add.remote(one, one, one, scale=one, extra=one)) == 4


def test_tasks_can_depend_on_tasks(cluster):
    reference = identity.remote(0)
    for _ in range(50):
        reference = add.remote(reference, 1)
    assert ray.get(reference) == 50


def test_a_diamond_of_dependencies(cluster):
    top = identity.remote(2)
    left, right = add.remote(top, 1), add.remote(top, 2)
    assert ray.get(add.remote(left, right)) == 7


def test_a_task_waits_for_arguments_that_are_not_ready(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()
        return 5

    reference = add.remote(late.remote(), 1)
    ready, pending = ray.wait([reference], timeout=0.05)
    assert (ready, pending) == ([], [reference])
    gate.open()
    assert ray.get(reference) == 6


def test_tasks_run_side_by_side(cluster, tmp_path):
    mine, other = Gate(tmp_path), Gate(tmp_path)

    @ray.remote
    def meet(opened, awaited):
        opened.open()
        awaited.wait()
        return True

    # Each waits for the other, so neither can end unless both run at once.
    assert ray.get([meet.remote(mine, other), meet.remote(other, mine)]) == [True, True]


def test_four_tasks_run_on_four_cpus_although_they_were_short_before(cluster, tmp_path):
    ray.get([identity.remote(i) for i in range(200)])
    gates = [Gate(tmp_path) for _ in range(4)]

    @ray.remote
    def meet_all(number):
        gates[number].open()
        for gate in gates:
            gate.wait()
        return number

    assert ray.get([meet_all.remote(i) for i in range(4)]) == [0, 1, 2, 3]


def test_none_is_a_result(cluster):
    assert ray.get(identity.remote(None)) is None


@pytest.mark.parametrize("size", [0, 1, 99_000, 101_000, 1_000_000, 20_000_000])
def test_arguments_and_results_of_any_size(cluster, size):
    data = os.urandom(size)
    assert ray.get(identity.remote(data)) == data


def test_a_closure_takes_its_variables_along(cluster):
    factor = 7
    table = {"offset": 1}

    @ray.remote
    def scale(x):
        return factor * x + table["offset"]

    assert ray.get(scale.remote(2)) == 15


def test_a_lambda_can_be_remote(cluster):
    assert ray.get(ray.remote(lambda x: x + 1).remote(1)) == 2


def test_ray_remote_can_be_called_on_a_function(cluster):
    def plain(x):
        return x * 2

    remote = ray.remote(plain)
    assert ray.get(remote.remote(3)) == 6
    assert plain(3) == 6


def test_a_decorator_with_arguments(cluster):
    @ray.remote(num_cpus=2, max_retries=0)
    def f():
        return "ran"

    assert ray.get(f.remote()) == "ran"


@pytest.mark.skate
def test_a_remote_function_keeps_name_and_docstring(cluster):
    @ray.remote
    def documented():
        """What it is for."""

    assert documented.__name__ == "documented"
    assert documented.__doc__ == "What it is for."


def test_a_task_can_call_itself(cluster):
    @ray.remote
    def factorial(n):
        return 1 if n == 0 else n * ray.get(factorial.remote(n - 1))

    assert ray.get(factorial.remote(6)) == 720


def test_a_remote_function_can_be_an_argument(cluster):
    @ray.remote
    def apply(function, x):
        return ray.get(function.remote(x))

    assert ray.get(apply.remote(identity, 3)) == 3


def test_a_task_returned_by_a_task_is_a_reference(cluster):
    @ray.remote
    def start_another():
        return identity.remote(4)

    inner = ray.get(start_another.remote())
    assert isinstance(inner, ray.ObjectRef)
    assert ray.get(inner) == 4


def test_globals_are_copied_and_changes_stay_in_the_worker(cluster):
    state = [0]

    @ray.remote
    def change():
        state[0] += 1
        return state[0]

    assert ray.get(change.remote()) == 1
    assert state == [0]


def test_a_task_does_not_see_later_changes_of_an_argument(cluster):
    numbers = [1, 2, 3]
    reference = identity.remote(numbers)
    numbers.append(4)
    assert ray.get(reference) == [1, 2, 3]


def test_a_reference_can_be_awaited(cluster):
    async def main():
        first = await identity.remote(1)
        return first, await asyncio.gather(identity.remote(2), identity.remote(3))

    assert asyncio.run(main()) == (1, [2, 3])


def test_awaiting_raises_what_the_task_raised(cluster):
    @ray.remote
    def fail():
        raise ZeroDivisionError("awaited")

    async def main():
        await fail.remote()

    with pytest.raises(ZeroDivisionError, match="awaited"):
        asyncio.run(main())


def test_a_reference_can_become_a_future(cluster):
    future = identity.remote("x").future()
    assert future.result(timeout=20) == "x"


def test_a_future_raises_what_the_task_raised(cluster):
    @ray.remote
    def fail():
        raise KeyError("future")

    with pytest.raises(KeyError):
        fail.remote().future().result(timeout=20)


def test_many_threads_of_a_driver_can_submit_and_get(cluster):
    results = {}

    def work(number):
        results[number] = ray.get([add.remote(number, i) for i in range(50)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n + i for i in range(50)] for n in range(8)}


def test_two_thousand_tasks_at_once(cluster):
    assert sum(ray.get([identity.remote(i) for i in range(2000)])) == 1999 * 1000


def test_tasks_of_different_functions_interleave(cluster):
    functions = [ray.remote(lambda x, n=n: x + n) for n in range(30)]
    assert ray.get([f.remote(1) for f in functions]) == [1 + n for n in range(30)]


def test_a_task_can_use_modules_that_the_driver_can_import(cluster):
    from tests.core import helpers

    @ray.remote
    def name():
        return helpers.plain("\x1b[31mred\x1b[0m")

    assert ray.get(name.remote()) == "red"
