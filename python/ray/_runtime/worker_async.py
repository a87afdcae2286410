"""Asynchronous actors: an asyncio loop on the main thread.

The core's descriptor is readable while calls are queued; they become asyncio tasks in order. A semaphore per
concurrency group bounds how many run at a time. Methods that are not coroutines run on the loop as well, one at a time.
"""

from __future__ import annotations

import asyncio
import signal
from types import AsyncGeneratorType, GeneratorType
from typing import TYPE_CHECKING, Any

from ray import _core
from ray._runtime import context
from ray._runtime.options import STREAMING
from ray._runtime.worker import _STREAMED, Leave

if TYPE_CHECKING:
    from ray._core import Task
    from ray._runtime.worker import Worker

__all__ = ["serve"]

BATCH_MAX = 256  # calls started before other things on the loop get their turn


def serve(worker: Worker, creation: Task) -> None:
    """Serves calls until the core says that it is over, or a call has left."""
    runner = _Runner(worker, creation)
    with asyncio.Runner() as loop_runner:
        loop_runner.run(runner.run())
    if worker.leaving is not None:
        raise worker.leaving


class _Runner:
    """State of the loop. Everything here runs on it."""

    def __init__(self, worker: Worker, creation: Task) -> None:
        self._worker = worker
        self._core = worker.core
        self._limits = {"": creation.max_concurrency, **creation.concurrency_groups}
        self._semaphores: dict[str, asyncio.Semaphore] = {}
        self._running: dict[asyncio.Task[None], bytes] = {}
        self._over: asyncio.Event = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._semaphores = {group: asyncio.Semaphore(limit) for group, limit in self._limits.items()}
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        descriptor = self._core.task_fd()
        loop.add_reader(descriptor, self._drain)
        self._drain()
        try:
            await self._over.wait()
            if not self._stopping:
                await asyncio.gather(*self._running, return_exceptions=True)
        finally:
            loop.remove_reader(descriptor)
            loop.remove_signal_handler(signal.SIGINT)
            for running in list(self._running):
                running.cancel()

    def _drain(self) -> None:
        if self._stopping:
            return
        loop = asyncio.get_running_loop()
        for _ in range(BATCH_MAX):
            task = self._core.poll_task()
            if task is None:
                if self._core.tasks_over():
                    self._over.set()
                return
            running = loop.create_task(self._execute(task))
            self._running[running] = task.id
            running.add_done_callback(self._finished)
        loop.call_soon(self._drain)

    def _finished(self, running: asyncio.Task[None]) -> None:
        self._running.pop(running, None)
        if running.cancelled():
            return
        error = running.exception()
        if error is None:
            return
        if not isinstance(error, Leave):
            asyncio.get_running_loop().call_exception_handler({"message": "a call ended badly", "exception": error})
            return
        self._stopping = True
        self._over.set()

    def _on_interrupt(self) -> None:
        """The core has seen a cancellation of something that runs or waits here."""
        for running, task_id in list(self._running.items()):
            if self._core.cancelled(task_id):
                running.cancel()

    async def _execute(self, task: Task) -> None:
        try:
            async with self._semaphores[task.concurrency_group]:
                if not self._stopping:
                    await self._call(task)
        except asyncio.CancelledError:
            if self._stopping:
                raise
            self._worker.cancelled(task)

    async def _call(self, task: Task) -> None:
        worker = self._worker
        context.task.set(task)  # this asyncio task's own context
        task.enter()
        arguments = worker.arguments(task)
        if arguments is None:
            return
        name = task.method
        retry = worker.retries_of(name) if task.retry_exceptions else False
        args, kwargs = arguments
        try:
            value = (worker.bound_methods.get(name) or worker.bind(name))(*args, **kwargs)
            if hasattr(value, "__await__") and type(value) is not _core.ObjectRef:
                value = await value
            if task.num_returns != 1 or isinstance(value, GeneratorType | AsyncGeneratorType):
                value = await self._collect(task, value, retry)
        except asyncio.CancelledError:
            if self._stopping or self._core.cancelled(task.id):
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
            if may_block:
                await loop.run_in_executor(None, task.yield_item, item)
            else:
                task.yield_item(item)
        task.finish_stream()
        return _STREAMED
