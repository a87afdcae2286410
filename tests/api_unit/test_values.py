"""put, get, wait, cancel: what goes in wrong is named."""

from __future__ import annotations

import threading
from typing import Any

import fake_core
import pytest

import ray
from ray.exceptions import GetTimeoutError, TaskCancelledError
from ray.util.state import why


def pending() -> Any:
    return fake_core.ObjectRef(fake_core.new_task_id() + b"\0\0\0\0")


def test_put_and_get(core: fake_core.Core) -> None:
    refs = [ray.put(i) for i in range(3)]
    assert ray.get(refs[1]) == 1
    assert ray.get(refs) == [0, 1, 2]
    assert ray.get([]) == []
    assert ray.get(refs, timeout=1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (1, ValueError, "int"),
        ((), ValueError, "tuple; make it a list"),
        ({}, ValueError, "dict"),
        ([1], TypeError, "item 0 is a int"),
    ],
)
def test_get_of_something_else_names_it(core: fake_core.Core, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ray.get(value)


def test_get_timeout_says_what_is_waited_for(core: fake_core.Core) -> None:
    with pytest.raises(GetTimeoutError, match=r"1 of 2 values.*needs GPU: 1") as info:
        ray.get([ray.put(1), pending()], timeout=0.01)
    assert isinstance(info.value, TimeoutError)
    with pytest.raises(ValueError, match="negative"):
        ray.get(ray.put(1), timeout=-1)
    with pytest.raises(TypeError):
        ray.get(ray.put(1), timeout="1")  # type: ignore[call-overload]


def test_put_of_a_reference_is_refused(core: fake_core.Core) -> None:
    with pytest.raises(TypeError, match="list that contains it"):
        ray.put(ray.put(1))


def test_wait(core: fake_core.Core) -> None:
    ready, late = ray.put(1), pending()
    assert ray.wait([late, ready]) == ([ready], [late])
    assert ray.wait([late], timeout=0) == ([], [late])
    assert ray.wait([]) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"timeout": -1}, ValueError),
        ({"num_returns": 0}, ValueError),
        ({"num_returns": 2}, ValueError),
        ({"num_returns": 1.0}, TypeError),
    ],
)
def test_wait_refuses_bad_arguments(core: fake_core.Core, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        ray.wait([ray.put(1)], **arguments)


def test_wait_refuses_bad_references(core: fake_core.Core) -> None:
    ref: Any = ray.put(1)
    with pytest.raises(ValueError, match="twice"):
        ray.wait([ref, ref])
    with pytest.raises(TypeError, match="ObjectRef"):
        ray.wait(ref)
    with pytest.raises(TypeError, match="item 0 is a int"):
        ray.wait([1])  # type: ignore[type-var]


def test_cancel_and_kill_name_what_they_were_given(core: fake_core.Core) -> None:
    ref = pending()
    ray.cancel(ref, force=True)
    assert core.cancels == [(ref.binary(), True, True)]
    with pytest.raises(TypeError, match="int"):
        ray.cancel(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ray.cancel\(\) for tasks"):
        ray.kill(ref)


def test_why(core: fake_core.Core) -> None:
    assert "is there" in why(ray.put(1))
    assert why(pending()) == "task f: needs GPU: 1; no node has one"
    with pytest.raises(TypeError):
        why(1)  # type: ignore[arg-type]


def test_future_is_done_by_an_event(core: fake_core.Core) -> None:
    ref = pending()
    future = ref.future()
    seen = threading.Event()
    future.add_done_callback(lambda _future: seen.set())
    assert not future.done()
    fake_core.store(ref.binary(), ("value", core.hooks.dump(5)))
    assert seen.wait(5)
    assert future.result() == 5
    failing = pending()
    future = failing.future()
    fake_core.store(failing.binary(), ("error", (fake_core.ERROR_CANCELLED, b"", [])))
    with pytest.raises(TaskCancelledError):
        future.result(timeout=5)


def test_await_and_gather(core: fake_core.Core) -> None:
    import asyncio

    async def main() -> Any:
        late = pending()
        failing = pending()

        async def finish() -> None:
            fake_core.store(late.binary(), ("value", core.hooks.dump("late")))
            fake_core.store(failing.binary(), ("error", (fake_core.ERROR_WORKER_CRASHED, b"boom", [])))

        results, _ = await asyncio.gather(asyncio.gather(late, ray.put(1), failing, return_exceptions=True), finish())
        return results

    first, second, third = asyncio.run(main())
    assert (first, second) == ("late", 1)
    assert isinstance(third, ray.exceptions.WorkerCrashedError)


def test_shutdown_fails_what_is_awaited(core: fake_core.Core) -> None:
    from ray._runtime import session

    future = pending().future()
    session.detach()
    with pytest.raises(ray.exceptions.RaySystemError, match="shut down"):
        future.result(timeout=5)
