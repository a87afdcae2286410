"""Remote functions, executed by the real worker on a thread."""

from __future__ import annotations

import os
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fake_core
import pytest

import ray
from ray._runtime import serialization, session
from tests.api_unit.conftest import join


@ray.remote
def divide(x: float, y: float = 1) -> float:
    """Divides."""
    return x / y


@ray.remote
def count(n: int) -> Iterator[int]:
    yield from range(n)


@ray.remote
def fails_after(n: int) -> Iterator[int]:
    yield from range(n)
    raise ValueError("over")


def test_call_by_position_and_name(core: fake_core.Core) -> None:
    assert ray.get(divide.remote(4, 2)) == 2
    assert ray.get(divide.remote(y=2, x=4)) == 2
    assert ray.get(divide.remote(ray.put(3))) == 3


def test_calls_that_do_not_fit_are_refused_at_the_call(core: fake_core.Core) -> None:
    call: Any = divide.remote
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        call()
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 3 were given"):
        call(1, 2, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        call(1, z=2)
    assert core.submitted == []


def test_direct_call_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"divide.remote\(\)"):
        divide(1, 2)


def test_identity_is_kept() -> None:
    assert divide.__name__ == "divide"
    assert divide.__doc__ == "Divides."
    assert divide.__wrapped__(4, 2) == 2
    assert not hasattr(divide, "bind")
    assert "divide" in repr(divide)


def test_template_is_made_once_per_cluster_and_variant(core: fake_core.Core) -> None:
    for _ in range(3):
        divide.remote(1)
        divide.options(num_cpus=2, name="other").remote(1)
    templates = {id(template): template.facts for template, _, _ in core.submitted}
    assert len(templates) == 2
    plain, other = templates.values()
    assert (plain["num_returns"], plain["max_retries"], plain["demand"]) == (1, 3, {"CPU": 10_000})
    assert (other["name"], other["demand"]) == ("other", {"CPU": 20_000})
    session.detach()
    again = join()
    divide.remote(1)
    assert len(again.submitted) == 1
    assert again.submitted[0][0].core is again


def test_auto_init_is_used_when_there_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._runtime import local

    started = []
    monkeypatch.setattr(local, "init", lambda: started.append(join()))
    try:
        assert ray.get(divide.remote(4, 2)) == 2
        assert len(started) == 1
        assert ray.is_initialized()
    finally:
        session.detach()


def test_several_and_no_results(core: fake_core.Core) -> None:
    @ray.remote(num_returns=2)
    def two() -> Any:
        return 1, 2

    assert ray.get(two.remote()) == [1, 2]  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="2 values, but num_returns is 3"):
        ray.get(two.options(num_returns=3).remote())  # type: ignore[call-overload]
    assert two.options(num_returns=0).remote() is None
    with pytest.raises(TypeError):
        ray.get(divide.options(num_returns=2).remote(1))  # type: ignore[call-overload]


def test_generator_streams(core: fake_core.Core) -> None:
    stream: Any = count.remote(3)
    assert isinstance(stream, ray.ObjectRefGenerator)
    assert [ray.get(ref) for ref in stream] == [0, 1, 2]
    assert stream.is_finished()
    assert ray.get(stream.completed()) is None
    assert ray.get(count.options(num_returns=3).remote(3)) == [0, 1, 2]  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="cannot be sent"):
        pickle.dumps(stream)


def test_generator_that_raises_gives_its_error_last(core: fake_core.Core) -> None:
    stream: Any = fails_after.remote(1)
    assert ray.get(next(stream)) == 0
    with pytest.raises(ValueError, match="over"):
        ray.get(next(stream))
    with pytest.raises(StopIteration):
        next(stream)


def test_generator_in_wait_and_async_for(core: fake_core.Core) -> None:
    import asyncio

    stream: Any = count.remote(2)
    ready, _ = ray.wait([stream, divide.remote(1)], num_returns=2, timeout=5)
    assert stream in ready

    async def collect() -> list[int]:
        return [await ref async for ref in count.remote(3)]

    assert asyncio.run(collect()) == [0, 1, 2]


def test_dynamic_returns(core: fake_core.Core) -> None:
    generator: Any = ray.get(count.options(num_returns="dynamic").remote(3))  # type: ignore[call-overload]
    assert len(generator) == 3
    assert [ray.get(ref) for ref in generator] == [0, 1, 2]


def test_asynchronous_generator_functions_stream() -> None:
    async def ticks() -> AsyncIterator[int]:
        yield 1

    assert ray.remote(ticks)._function is ticks  # streaming by default, no error at decoration


def test_errors_of_arguments_arrive_with_their_cause(core: fake_core.Core) -> None:
    with pytest.raises(ZeroDivisionError, match="makes one of its arguments failed"):
        ray.get(divide.remote(divide.remote(1, 0)))


def test_retryable_is_what_the_list_says(core: fake_core.Core) -> None:
    outcomes = []
    original = fake_core.Task.fail

    def record(task: fake_core.Task, error: BaseException, *, retryable: bool) -> None:
        outcomes.append(retryable)
        original(task, error, retryable=retryable)

    fake_core.Task.fail = record  # type: ignore[method-assign]
    try:
        for retry in (False, True, [ZeroDivisionError], [KeyError]):
            with pytest.raises(ZeroDivisionError):
                ray.get(divide.options(retry_exceptions=retry).remote(1, 0))
    finally:
        fake_core.Task.fail = original  # type: ignore[method-assign]
    assert outcomes == [False, True, True, False]


def test_function_that_refers_to_itself_travels() -> None:
    @ray.remote
    def recurse(n: int) -> Any:
        return recurse, n

    arrived = serialization.loads(serialization.dumps(recurse))
    assert arrived.__wrapped__(2)[1] == 2
    assert arrived._default_options == {}


def test_function_with_captured_data_is_refused_when_too_large(core: fake_core.Core) -> None:
    data = os.urandom(50 * 1024 * 1024)

    @ray.remote
    def large() -> int:
        return len(data)

    with pytest.raises(ValueError, match=r"ray.put"):
        large.remote()


def test_captured_lock_is_named(core: fake_core.Core) -> None:
    import threading

    lock = threading.Lock()

    @ray.remote
    def use() -> Any:
        return lock

    with pytest.raises(TypeError, match="'lock'"):
        use.remote()


def test_gpus_are_made_visible(core: fake_core.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from ray._runtime.worker import Worker

    worker = Worker(core)  # type: ignore[arg-type]
    worker.set_gpus([2, 3])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    worker = Worker(core)  # type: ignore[arg-type]
    worker.set_gpus([1])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"
