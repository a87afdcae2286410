"""The worker's loop with calls that the test writes down: actors of all kinds, exits, cancellation."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fake_core
import pytest

import ray
from ray._runtime import context
from ray._runtime.worker import Worker
from ray.remote_function import Pickled, pickle_blob


class Calls:
    """Writes calls down for a worker."""

    def __init__(self, core: fake_core.FakeWorkerCore) -> None:
        self.core = core
        self.worker = context.worker = Worker(core)  # type: ignore[arg-type]

    def _blob(self, target: Any, meta: dict[str, Any]) -> bytes:
        return pickle_blob(Pickled().get(self.core, target), meta, target)  # type: ignore[arg-type]

    def task(self, function: Any, *args: Any, meta: dict[str, Any] | None = None, **facts: Any) -> fake_core.Task:
        full = {"retry_exceptions": False, "max_calls": 0, "resources": {"CPU": 10_000}, **(meta or {})}
        facts = {"blob": self._blob(function, full), "name": function.__name__, **facts}
        return self.core.add(fake_core.Task(self.core, facts, self.core.hooks.dump((args, {}))))

    def create(self, cls: Any, *args: Any, **facts: Any) -> fake_core.Task:
        meta = {"options": {"name": "n", **facts.pop("options", {})}, "resources": {}, "namespace": "here"}
        facts = {"blob": self._blob(cls, meta), "name": cls.__name__, "actor_id": b"\5" * 16, **facts}
        return self.core.add(fake_core.Task(self.core, facts, self.core.hooks.dump((args, {})), kind=1))

    def call(self, method: str, *args: Any, **facts: Any) -> fake_core.Task:
        facts = {"method": method, "name": f"A.{method}", **facts}
        return self.core.add(fake_core.Task(self.core, facts, self.core.hooks.dump((args, {})), kind=2))

    def run(self) -> int:
        self.core.finish()
        return self.worker.run()


@pytest.fixture
def calls(worker_core: fake_core.FakeWorkerCore) -> Iterator[Calls]:
    made = Calls(worker_core)
    yield made
    context.worker = None


def value_of(task: fake_core.Task) -> Any:
    kind, *rest = task.outcome
    assert kind == "value", task.outcome
    return rest[0][0]


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_task_knows_where_it_runs(calls: Calls) -> None:
    def where() -> Any:
        here = ray.get_runtime_context()
        return (
            here.get_task_name(), here.get_task_id(), here.get_actor_id(), here.get_assigned_resources(),
            here.get_task_function_name(), here.is_canceled(), here.get_accelerator_ids(), here.get_actor_name(),
        )  # fmt: skip

    task = calls.task(where, gpu_ids=[3])
    assert calls.run() == 0
    name, task_id, actor, resources, function, cancelled, accelerators, actor_name = value_of(task)
    assert (name, task_id, actor, resources) == ("where", task.id.hex(), None, {"CPU": 1.0})
    assert function.endswith("where")
    assert not cancelled
    assert (accelerators, actor_name) == ({"GPU": ["3"]}, None)


def test_max_calls_ends_the_worker(calls: Calls) -> None:
    def f() -> int:
        return 1

    first = calls.task(f, meta={"max_calls": 2})
    second = calls.task(f, meta={"max_calls": 2})
    third = calls.task(f, meta={"max_calls": 2})
    assert calls.run() == 0
    assert (value_of(first), value_of(second), third.outcome) == (1, 1, None)


def test_exit_in_a_task_ends_the_worker(calls: Calls) -> None:
    def leave() -> None:
        sys.exit(3)

    task = calls.task(leave)
    assert calls.run() == 3
    assert task.outcome is None


def test_result_that_cannot_be_pickled_fails_the_task(calls: Calls) -> None:
    def lock() -> Any:
        return threading.Lock()

    task = calls.task(lock)
    calls.run()
    assert task.outcome[0] == "error"
    assert "cannot pickle" in str(task.outcome[1])


def test_code_that_cannot_be_loaded_fails_every_task_of_it(calls: Calls) -> None:
    def f() -> int:
        return 1

    facts = {"blob": b"\x80\x05garbage", "name": "f"}
    packed = calls.core.hooks.dump(((), {}))
    tasks = [calls.core.add(fake_core.Task(calls.core, facts, packed)) for _ in range(2)]
    tasks[1].blob = None
    good = calls.task(f)
    calls.run()
    for task in tasks:
        assert "could not be loaded" in str(task.outcome[1])
    assert value_of(good) == 1


def test_cancellation_interrupts_user_code_only(calls: Calls) -> None:
    def sleep() -> None:
        time.sleep(30)

    def f() -> int:
        return 1

    previous = signal.signal(signal.SIGINT, calls.worker.on_interrupt)
    try:
        os.kill(os.getpid(), signal.SIGINT)  # nothing runs: nothing happens
        task = calls.task(sleep)
        after = calls.task(f)

        def cancel() -> None:
            while not calls.worker.running:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)  # not cancelled: goes on
            time.sleep(0.01)
            calls.core.cancelled_ids.add(task.id)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=cancel).start()
        calls.run()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert task.outcome == ("code", fake_core.ERROR_CANCELLED, "")
    assert value_of(after) == 1


def test_streamed_items_and_wrong_streams(calls: Calls) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    def nothing() -> int:
        return 3

    stream = calls.task(numbers, num_returns=-1)
    wrong = calls.task(nothing, num_returns=-1)
    calls.run()
    assert stream.outcome == ("stream", None)
    assert stream.stream is not None
    assert len(stream.stream.items) == 2
    assert wrong.outcome == ("stream", None)  # its error was the last item
    assert "iterate" in str(wrong.error)


# --- actors ----------------------------------------------------------------------------------------------------------


class Plain:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, n: int) -> int:
        self.value += n
        return self.value

    def boom(self) -> None:
        raise ValueError("boom")

    def leave(self) -> None:
        ray.actor.exit_actor()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def system_exit(self, code: int) -> None:
        sys.exit(code)

    def who(self) -> Any:
        here = ray.get_runtime_context()
        return repr(here.current_actor), here.get_actor_name(), here.was_current_actor_reconstructed, here.namespace

    def thread(self) -> str:
        return threading.current_thread().name


def test_actor_keeps_state_and_survives_errors(calls: Calls) -> None:
    calls.create(Plain, 5)
    one, two, three = calls.call("add", 1), calls.call("boom"), calls.call("add", 1)
    ready, called = calls.call("__ray_ready__"), calls.call("__ray_call__", lambda self, k: self.value + k, 10)
    missing = calls.call("nope")
    who = calls.call("who")
    assert calls.run() == 0
    assert calls.core.ready
    assert (value_of(one), value_of(three)) == (6, 7)
    assert "Plain.boom" in str(two.outcome[1]) or "A.boom" in str(two.outcome[1])
    assert "actor_id=0505" in str(two.outcome[1])
    assert (value_of(ready), value_of(called)) == (True, 17)
    assert "no method 'nope'" in str(missing.outcome[1])
    handle, name, again, namespace = value_of(who)
    assert handle == f"Actor(Plain, {'05' * 16})"
    assert (name, again, namespace) == ("n", False, "here")


@pytest.mark.parametrize(
    ("method", "args", "code", "announced"),
    [("leave", (), 0, True), ("__ray_terminate__", (), 0, True), ("system_exit", (0,), 0, True),
     ("system_exit", (4,), 4, False)],
)  # fmt: skip
def test_actor_leaves(calls: Calls, method: str, args: Any, code: int, announced: bool) -> None:
    calls.create(Plain)
    leaving, after = calls.call(method, *args), calls.call("add", 1)
    assert calls.run() == code
    assert (calls.core.exit_reason is not None) == announced
    assert leaving.outcome is None
    assert after.outcome is None


def test_init_that_raises_is_reported(calls: Calls) -> None:
    class Bad:
        def __init__(self) -> None:
            raise ValueError("init")

    calls.create(Bad)
    assert calls.run() == 1
    assert not calls.core.ready
    assert "ValueError: init" in str(calls.core.failure)
    assert "Bad.__init__" in str(calls.core.failure)


def test_threaded_actor_runs_calls_at_a_time(calls: Calls) -> None:
    sys.modules[__name__].barrier = threading.Barrier(3)  # type: ignore[attr-defined]
    calls.create(ByBarrier, max_concurrency=3)
    tasks = [calls.call("meet") for _ in range(3)]
    waiter = threading.Thread(target=lambda: (_until(lambda: all(t.outcome for t in tasks)), calls.core.finish()))
    waiter.start()
    assert calls.worker.run() == 0
    assert len({value_of(task) for task in tasks}) == 3
    assert any(value_of(task) == "MainThread" for task in tasks)


class ByBarrier:
    def meet(self) -> str:
        sys.modules[__name__].barrier.wait(5)  # type: ignore[attr-defined]
        return threading.current_thread().name


class Grouped:
    def where(self) -> str:
        return threading.current_thread().name


def test_groups_have_threads_of_their_own(calls: Calls) -> None:
    calls.create(Grouped, concurrency_groups={"io": 2}, options={"concurrency_groups": {"io": 2}})
    plain, io = calls.call("where"), calls.call("where", concurrency_group="io")
    waiter = threading.Thread(target=lambda: (_until(lambda: bool(plain.outcome and io.outcome)), calls.core.finish()))
    waiter.start()
    assert calls.worker.run() == 0
    assert value_of(plain) == "MainThread"
    assert value_of(io).startswith("ray-io")


@pytest.mark.parametrize("busy", [False, True])
def test_exit_from_a_thread_of_a_group(calls: Calls, busy: bool) -> None:
    """The main thread waits for calls, or runs one, when another thread leaves: it ends at once."""
    previous = signal.signal(signal.SIGINT, calls.worker.on_interrupt)
    try:
        calls.create(Plain, concurrency_groups={"io": 1}, options={"concurrency_groups": {"io": 1}})
        sleeping = calls.call("sleep", 30) if busy else None
        calls.call("leave", concurrency_group="io")
        assert calls.worker.run() == 0
    finally:
        signal.signal(signal.SIGINT, previous)
    assert calls.core.exit_reason is not None
    assert sleeping is None or sleeping.outcome is None


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Async:
    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.running = 0
        self.most = 0

    async def wait(self) -> str:
        await self.event.wait()
        return "woken"

    async def wake(self) -> None:
        self.event.set()

    def sync(self) -> int:
        return 1

    async def boom(self) -> None:
        raise ValueError("boom")

    async def count(self) -> AsyncIterator[int]:
        for i in range(3):
            await asyncio.sleep(0)
            yield i

    async def crowd(self) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.002)
        self.running -= 1
        return self.most

    async def name(self) -> Any:
        await asyncio.sleep(0)
        return ray.get_runtime_context().get_task_name()

    async def sleep(self) -> None:
        await asyncio.sleep(60)

    async def leave(self) -> None:
        ray.actor.exit_actor()


def test_async_actor_interleaves(calls: Calls) -> None:
    calls.create(Async, is_async=True, max_concurrency=1000)
    waiting, wake, sync = calls.call("wait"), calls.call("wake"), calls.call("sync")
    boom, stream = calls.call("boom"), calls.call("count", num_returns=-1)
    listed = calls.call("count", num_returns=3)
    names = [calls.call("name", name=f"n{i}") for i in range(5)]
    assert calls.run() == 0
    assert (value_of(waiting), value_of(sync)) == ("woken", 1)
    assert value_of(wake) is None
    assert "boom" in str(boom.outcome[1])
    assert stream.outcome == ("stream", None)
    assert stream.stream is not None
    assert len(stream.stream.items) == 3
    assert listed.outcome == ("value", [0, 1, 2])
    assert [value_of(task) for task in names] == [f"n{i}" for i in range(5)]


def test_async_actor_keeps_its_limit(calls: Calls) -> None:
    calls.create(Async, is_async=True, max_concurrency=2)
    crowd = [calls.call("crowd") for _ in range(10)]
    calls.run()
    assert max(value_of(task) for task in crowd) == 2


def test_async_call_is_cancelled(calls: Calls) -> None:
    calls.create(Async, is_async=True, max_concurrency=10)
    sleeping, sync = calls.call("sleep"), calls.call("sync")

    def cancel() -> None:
        _until(lambda: sync.outcome is not None)
        calls.core.cancelled_ids.add(sleeping.id)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=cancel).start()
    assert calls.run() == 0
    assert sleeping.outcome == ("code", fake_core.ERROR_CANCELLED, "")


def test_async_actor_leaves(calls: Calls) -> None:
    calls.create(Async, is_async=True, max_concurrency=10)
    sleeping, leaving = calls.call("sleep"), calls.call("leave")
    assert calls.worker.run() == 0
    assert calls.core.exit_reason is not None
    assert sleeping.outcome is None
    assert leaving.outcome is None
