"""References that are made while a task runs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from ray import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._core import ObjectRef, StreamRef

__all__ = ["DynamicObjectRefGenerator", "ObjectRefGenerator"]

R = TypeVar("R", covariant=True)


class ObjectRefGenerator(Generic[R]):
    """The results of a generator task, as references in order, each as soon as it was yielded.

    Iterate over it with `for` (which waits) or `async for`. When the task raises, the next reference raises its error
    from `ray.get`, and the iteration ends after it. Letting go of the generator lets go of what it has not handed
    out. It belongs to the process that called the task and cannot be sent to another.
    """

    __slots__ = ("__weakref__", "_ahead", "_finished", "_stream")

    def __init__(self, generator_ref: StreamRef, worker: Any = None) -> None:
        self._stream = generator_ref
        self._finished = False
        self._ahead: ObjectRef[R] | None = None  # taken from the stream to tell an item from the end

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ObjectRef[R]:
        return self._next_sync()

    def _next_sync(self, timeout_s: float | None = None) -> ObjectRef[R]:
        """The next reference.

        Raises:
            StopIteration: At the end.
            GetTimeoutError: If it was not there in time.
        """
        if self._ahead is not None:
            return self._take_ahead()
        try:
            ref = self._stream.next(timeout_s)
        except TimeoutError as error:
            if type(error) is not TimeoutError:
                raise
            from ray.exceptions import GetTimeoutError

            message = f"the generator's next item was not there after {timeout_s} s"
            raise GetTimeoutError(message) from None
        except _core.CoreClosed as error:
            from ray._runtime import session

            raise session.gone(error) from None
        if ref is None:
            self._finished = True
            raise StopIteration
        return ref

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ObjectRef[R]:
        from ray._runtime import futures

        if self._ahead is not None:
            return self._take_ahead()
        if not self._finished and not self._stream.ready():
            await futures.when_stream_ready(self._stream)
        ref = self._stream.next(None)
        if ref is None:
            self._finished = True
            raise StopAsyncIteration
        return ref

    def completed(self) -> ObjectRef[Any]:
        """A reference that is there when the task has ended; `ray.get` of it raises the task's error."""
        return self._stream.completed()

    def next_ready(self) -> bool:
        """Whether the next reference is there already. False at the end, which `is_finished` tells."""
        if self._ahead is None and not self._finished and self._stream.ready():
            self._ahead = self._stream.next(None)
            self._finished = self._ahead is None
        return self._ahead is not None

    def is_finished(self) -> bool:
        """Whether every reference has been handed out, and no other will come."""
        return not self.next_ready() and self._finished

    def _take_ahead(self) -> ObjectRef[R]:
        ref, self._ahead = self._ahead, None
        assert ref is not None, "asked only when there is one"
        return ref

    def task_id(self) -> Any:
        """The task's id."""
        from ray._runtime.ids import TaskID

        return TaskID(self._stream.task_id_binary())

    def send(self, value: Any) -> None:
        """Not available: nothing can be sent into a running task."""
        _one_way("send")

    def throw(self, value: Any) -> None:
        """Not available; `ray.cancel` ends the task."""
        _one_way("throw")

    def close(self) -> None:
        """Not available; `ray.cancel` ends the task."""
        _one_way("close")

    async def asend(self, value: Any) -> None:
        """Not available: nothing can be sent into a running task."""
        _one_way("asend")

    async def athrow(self, value: Any) -> None:
        """Not available; `ray.cancel` ends the task."""
        _one_way("athrow")

    async def aclose(self) -> None:
        """Not available; `ray.cancel` ends the task."""
        _one_way("aclose")

    def __getstate__(self) -> Any:
        message = (
            "an ObjectRefGenerator belongs to the process that called the task and cannot be sent to another; "
            "send the references that it yields"
        )
        raise TypeError(message)

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._stream.task_id_binary().hex()})"


def _one_way(name: str) -> None:
    message = f"ObjectRefGenerator.{name}() cannot reach into a remote task; ray.cancel(generator) ends it"
    raise NotImplementedError(message)


class DynamicObjectRefGenerator:
    """The results of a task with `num_returns="dynamic"`: references whose number the task decided."""

    def __init__(self, refs: Any) -> None:
        self._refs: deque[ObjectRef[Any]] = deque(refs)

    def __iter__(self) -> Iterator[ObjectRef[Any]]:
        while self._refs:
            yield self._refs.popleft()

    def __len__(self) -> int:
        return len(self._refs)
