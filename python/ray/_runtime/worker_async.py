"""Asynchronous actors: an asyncio loop on the main thread.

The core's descriptor is readable while calls are queued; they become asyncio tasks in order. A semaphore per
concurrency group bounds how many run at a time. Methods that are not coroutines run on the loop as well, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from itertools import islice
from types import AsyncGeneratorType, GeneratorType
from typing import TYPE_CHECKING, Any

from ray import _core
from ray._runtime import context, forked
from ray._runtime.options import STREAMING
from ray._runtime.worker import _STREAMED, Leave
from ray.exceptions import AsyncioActorExit

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._core import Task
    from ray._runtime.worker import Worker

__all__ = ["serve"]

BATCH_MAX = 256  # calls started before other things on the loop get their turn


def serve(worker: Worker, creation: Task) -> None:
    """Serves calls until the core says that it is over, or a call has left; then lets what runs end."""
    runner = _Runner(worker, creation)
    loop_runner = asyncio.Runner()
    loop = loop_runner.get_loop()
    main = loop.create_task(runner.run())
    stray: BaseException | None = None  # from sys.exit() in a task of the user's, or a signal handler
    while not main.done():
        try:
            if stray is not None:
                worker.stray(stray)
                stray = None
            loop.run_until_complete(main)
        except BaseException as error:
            if error is worker.defect or main.done():
                raise
            stray = error
    try:
        loop_runner.close()  # cancels what the user's code has left in the background
    except BaseException as error:
        worker.stray(error)


class _Runner:
    """State of the loop. Everything here runs on it."""

    def __init__(self, worker: Worker, creation: Task) -> None:
        self._worker = worker
        self._core = worker.core
        self._limits = {"": creation.max_concurrency, **creation.concurrency_groups}
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._calls: dict[asyncio.Task[None], Task] = {}
        self._queued: set[asyncio.Task[None]] = set()  # those of the calls that have not started
        self._taken: Task | None = None  # and not started yet
        self._over: asyncio.Event = asyncio.Event()

    async def run(self) -> None:
        worker = self._worker
        loop = asyncio.get_running_loop()
        self._semaphores = {group: asyncio.Semaphore(limit) for group, limit in self._limits.items()}
        loop.set_exception_handler(_on_loop_error)
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        loop.add_reader(self._core.task_fd(), self._drain)
        worker.notice_end = lambda: _call_soon(loop, self._drain)
        worker.loop = loop
        self._drain()
        try:
            await self._over.wait()
            while self._calls:
                await asyncio.wait(list(self._calls))
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        count = 0
        try:
            # See `Worker.serve` for why the loop itself stores what it takes.
            for self._taken in islice(iter(self._core.poll_task, None), BATCH_MAX):  # noqa: B020
                self._start(loop)
                count += 1
        except BaseException as error:
            self._worker.stray(error)
            self._start(loop)
            count = BATCH_MAX
        if count == BATCH_MAX:
            loop.call_soon(self._drain)
        elif self._core.tasks_over():
            loop.remove_reader(self._core.task_fd())  # which stays readable from now on
            self._over.set()
        elif self._worker.ending is not None:
            self._end()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the call that was taken, if that was not done."""
        task = self._taken
        if task is None:
            return
        if self._worker.ending is not None:
            self._worker.refuse(task)
        else:
            call = loop.create_task(self._execute(task))
            self._calls[call] = task
            self._queued.add(call)
            call.add_done_callback(self._finished)
        self._taken = None

    def _end(self) -> None:
        """Nothing is started from now on; what comes later is refused by `_drain`."""
        for call in self._queued:
            call.cancel()
        self._over.set()

    def _finished(self, call: asyncio.Task[None]) -> None:
        task = self._calls.pop(call)
        self._queued.discard(call)
        if call.cancelled():  # before its first step: nobody has answered
            self._not_started(task)
            return
        error = call.exception()
        if error is None:
            return
        if not isinstance(error, Leave):
            self._worker.stray(error, task)
            return
        if len(self._calls) > len(self._queued):
            self._worker.refuse(task)  # its caller need not wait for calls that may wait for this one
        self._drain()

    def _on_interrupt(self) -> None:
        """The core has seen a cancellation of something that runs or waits here."""
        for call, task in list(self._calls.items()):
            if self._core.cancelled(task.id):
                call.cancel()

    async def _execute(self, task: Task) -> None:
        call = asyncio.current_task()
        assert call is not None, "calls are asyncio tasks"
        try:
            async with self._semaphores[task.concurrency_group]:
                self._queued.discard(call)
                if self._worker.ending is not None:
                    self._worker.refuse(task)
                else:
                    await self._call(task)
        except asyncio.CancelledError:
            if call in self._queued:
                self._not_started(task)
            else:
                self._worker.cancelled(task)

    def _not_started(self, task: Task) -> None:
        if self._worker.ending is not None:
            self._worker.refuse(task)
        else:
            self._worker.cancelled(task)

    async def _call(self, task: Task) -> None:
        worker = self._worker
        context.task.set(task)  # this asyncio task's own context
        task.enter()
        arguments = worker.arguments(task)
        if arguments is None:
            return
        name = task.method
        retry = worker.retries_of(task) if task.retry_exceptions else False
        args, kwargs = arguments
        try:
            value = (worker.bound_methods.get(name) or worker.bind(name))(*args, **kwargs)
            if hasattr(value, "__await__") and type(value) is not _core.ObjectRef:
                value = await value
            if worker.is_fork:
                forked.end()
            if task.num_returns != 1 or isinstance(value, GeneratorType | AsyncGeneratorType):
                value = await self._collect(task, value, retry)
            worker.check_quitter(task)
        except asyncio.CancelledError:
            if self._core.cancelled(task.id):
                raise
            worker.cancelled(task, "the actor's code cancelled it")
            return
        except BaseException as error:
            worker.failed(task, error, retry)
            return
        if value is _STREAMED:
            return
        try:
            task.finish(value)
        except Exception as error:  # not what num_returns promises, or it cannot be pickled
            worker.failed(task, error, False)

    async def _collect(self, task: Task, value: Any, retry: Any) -> Any:
        if not hasattr(value, "__aiter__"):
            return self._worker.collect(task, value, retry)
        wanted = task.num_returns
        if wanted != STREAMING:
            items = []
            async for item in value:
                items.append(item)
                if 0 < wanted < len(items):  # one too many, which is reported; there may be no end to them
                    break
            return self._worker.collect(task, iter(items), retry)
        # Where the consumer limits what may be unread, handing over an item can block: then another thread does it.
        may_block = task.backpressure > 0
        loop = asyncio.get_running_loop()
        async for item in value:
            if self._worker.is_fork:
                forked.end()
            if may_block:
                await loop.run_in_executor(None, task.yield_item, item)
            else:
                task.yield_item(item)
        if self._worker.is_fork:
            forked.end()
        self._worker.check_quitter(task)
        task.finish_stream()
        return _STREAMED


def _on_loop_error(loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
    """An actor that ends itself from a task in the background has no error to show."""
    if not isinstance(details.get("exception"), AsyncioActorExit):
        loop.default_exception_handler(details)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: it is over already
        loop.call_soon_threadsafe(callback)
