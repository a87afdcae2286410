"""Finished references as events: `await ref`, and `ref.future()`.

One `Completions` of the core for each running event loop, whose descriptor the loop watches, and one for a daemon
thread that serves concurrent futures. An event costs O(1), however many references are awaited; nothing polls.

The core's `ObjectRef` calls `await_ref` and `future_of` by name.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from ray._runtime import session
from ray._runtime.calls import translated

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures
    from collections.abc import Generator

    from ray._core import Completions, Core, ObjectRef, StreamRef

__all__ = ["as_asyncio_future", "await_ref", "future_of", "when_stream_ready"]


class _Watch:
    """References that somebody waits for, by token.

    Invariant: a token is in `_waiting` from `add` until its event or `abandon`, and its callback runs exactly once.
    """

    def __init__(self, core: Core) -> None:
        from ray import _core

        self.core = core
        self.completions: Completions = _core.Completions(core)
        self._waiting: dict[int, tuple[Any, Any]] = {}
        self._next = 0
        self._lock = threading.Lock()

    def add(self, ref: ObjectRef[Any], callback: Any) -> None:
        self.completions.watch(ref, self._token(ref, callback))

    def add_stream(self, stream: StreamRef, callback: Any) -> None:
        self.completions.watch_stream(stream, self._token(stream, callback))

    def _token(self, watched: Any, callback: Any) -> int:
        with self._lock:
            token = self._next
            self._next += 1
            self._waiting[token] = (watched, callback)
        return token

    def finish(self, tokens: list[int]) -> None:
        for token in tokens:
            with self._lock:
                entry = self._waiting.pop(token, None)
            if entry is not None:
                ref, callback = entry
                callback(ref, None)

    def abandon(self) -> None:
        """The core is gone: everything still waiting fails."""
        with self._lock:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for ref, callback in waiting:
            callback(ref, _gone())
        self.completions.close()


def _gone() -> BaseException:
    from ray.exceptions import RaySystemError

    return RaySystemError("the cluster was shut down while this reference was awaited")


# --- asyncio -------------------------------------------------------------------------------------------------------


class _LoopWatch:
    """The watch of one event loop. Used from that loop's thread only, but for `unbind`."""

    lost_by_forks = True  # loop and thread are the parent's

    def __init__(self, loop: asyncio.AbstractEventLoop, core: Core) -> None:
        self._loop = weakref.ref(loop)
        self.watch = _Watch(core)
        loop.add_reader(self.watch.completions.fileno(), self._drain)
        session.on_close(self)

    def _drain(self) -> None:
        self.watch.finish(self.watch.completions.drain())

    def unbind(self) -> None:
        loop = self._loop()
        if loop is None or loop.is_closed():
            self.watch.completions.close()
            return
        try:
            loop.call_soon_threadsafe(self._leave, loop)
        except RuntimeError:  # closed in between
            self.watch.completions.close()

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self.watch.completions.fileno())
        self.watch.abandon()


_loops: weakref.WeakKeyDictionary[Any, _LoopWatch] = weakref.WeakKeyDictionary()


def _watch_of_running_loop() -> tuple[asyncio.AbstractEventLoop, _Watch]:
    import asyncio

    loop = asyncio.get_running_loop()
    core = session.require()
    found = _loops.get(loop)
    if found is None or found.watch.core is not core:
        found = _loops[loop] = _LoopWatch(loop, core)
    return loop, found.watch


def as_asyncio_future(ref: ObjectRef[Any]) -> asyncio.Future[Any]:
    """A future of the running event loop for the reference's value.

    Raises:
        RuntimeError: If no event loop runs in this thread.
        RaySystemError: If this process is in no cluster.
    """
    loop, watch = _watch_of_running_loop()
    future = loop.create_future()

    def settle(ready: ObjectRef[Any], failure: BaseException | None) -> None:
        if future.done():  # cancelled by its awaiter
            return
        if failure is not None:
            future.set_exception(failure)
            return
        try:
            value = watch.core.get_one(ready)
        except StopIteration as error:  # which a future refuses
            future.set_exception(_stop_iteration(error))
        except BaseException as error:
            future.set_exception(translated(error))
        else:
            future.set_result(value)

    watch.add(ref, settle)
    return future


def _stop_iteration(error: StopIteration) -> RuntimeError:
    wrapped = RuntimeError(f"the task raised StopIteration:\n{error}")
    wrapped.__cause__ = error
    return wrapped


def await_ref(ref: ObjectRef[Any]) -> Generator[Any, None, Any]:
    """What `ObjectRef.__await__` returns."""
    return as_asyncio_future(ref).__await__()


def when_stream_ready(stream: StreamRef) -> asyncio.Future[None]:
    """A future of the running loop that is done when the stream's next item is there, or its end."""
    loop, watch = _watch_of_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle(_stream: StreamRef, failure: BaseException | None) -> None:
        if not future.done():
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

    watch.add_stream(stream, settle)
    return future


# --- concurrent.futures --------------------------------------------------------------------------------------------


class _ThreadWatch:
    """The watch of the thread that completes concurrent futures."""

    lost_by_forks = True

    def __init__(self, core: Core) -> None:
        self.watch = _Watch(core)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ray-futures", daemon=True)
        self._thread.start()
        session.on_close(self)

    def _run(self) -> None:
        while not self._closed:
            try:
                tokens = self.watch.completions.wait(None)
            except Exception:  # closed under it
                return
            self.watch.finish(tokens)

    def unbind(self) -> None:
        global _thread_watch
        self._closed = True
        self.watch.abandon()
        if _thread_watch is self:  # which would keep the descriptor
            _thread_watch = None


_thread_watch: _ThreadWatch | None = None
_thread_lock = threading.Lock()


def future_of(ref: ObjectRef[Any]) -> concurrent.futures.Future[Any]:
    """A concurrent future for the reference's value. Its callbacks run on a thread of the engine: keep them short.

    Raises:
        RaySystemError: If this process is in no cluster.
    """
    global _thread_watch
    import concurrent.futures

    core = session.require()
    with _thread_lock:
        if _thread_watch is None or _thread_watch.watch.core is not core:
            _thread_watch = _ThreadWatch(core)
        watch = _thread_watch.watch
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def settle(ready: ObjectRef[Any], failure: BaseException | None) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if failure is not None:
            future.set_exception(failure)
            return
        try:
            value = core.get_one(ready)
        except BaseException as error:
            future.set_exception(translated(error))
        else:
            future.set_result(value)

    watch.add(ref, settle)
    return future
