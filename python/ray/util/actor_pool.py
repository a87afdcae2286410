"""A fixed set of actors that share work."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ray.actor import ActorHandle

__all__ = ["ActorPool"]

V = TypeVar("V")


class ActorPool:
    """Hands each value to an actor that is free, and gives results back in order or as they come.

    Not for use by several threads at once.

    Example:
        ```python
        pool = ActorPool([Worker.remote() for _ in range(4)])
        list(pool.map(lambda actor, value: actor.double.remote(value), [1, 2, 3, 4]))
        ```

    Args:
        actors: Handles of the actors.
    """

    def __init__(self, actors: Iterable[ActorHandle[Any]]) -> None:
        self._idle: list[ActorHandle[Any]] = list(actors)
        self._running: dict[Any, tuple[int, ActorHandle[Any]]] = {}  # by reference
        self._by_index: dict[int, Any] = {}
        self._submitted = 0
        self._next = 0  # index of the result that get_next() returns
        self._waiting: deque[tuple[Callable[[ActorHandle[Any], Any], Any], Any]] = deque()

    def map(self, fn: Callable[[ActorHandle[Any], V], Any], values: Iterable[V]) -> Iterator[Any]:
        """Results of `fn(actor, value)` for all values, in the order of the values.

        Results that were submitted before and not fetched are dropped.

        Args:
            fn: Makes the call on the actor and returns its reference.
            values: What to call it with.
        """
        self._drop_unread()
        for value in values:
            self.submit(fn, value)
        return self._drain(self.get_next)

    def map_unordered(self, fn: Callable[[ActorHandle[Any], V], Any], values: Iterable[V]) -> Iterator[Any]:
        """Like `map`, but each result as soon as it is there."""
        self._drop_unread()
        for value in values:
            self.submit(fn, value)
        return self._drain(self.get_next_unordered)

    def _drain(self, get: Callable[[], Any]) -> Iterator[Any]:
        while self.has_next():
            yield get()

    def _drop_unread(self) -> None:
        while self.has_next():
            try:
                self.get_next_unordered(timeout=0)
            except TimeoutError:
                break

    def submit(self, fn: Callable[[ActorHandle[Any], V], Any], value: V) -> None:
        """Calls `fn(actor, value)` with a free actor, or as soon as one is free."""
        if not self._idle:
            self._waiting.append((fn, value))
            return
        actor = self._idle.pop()
        ref = fn(actor, value)
        self._running[ref] = (self._submitted, actor)
        self._by_index[self._submitted] = ref
        self._submitted += 1

    def has_next(self) -> bool:
        """Whether a result is still to come."""
        return bool(self._by_index)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result, in the order of submission.

        Args:
            timeout: Seconds to wait at most.
            ignore_if_timedout: After the timeout, skip this result instead of leaving it for the next call.

        Raises:
            StopIteration: If there is none to come.
            TimeoutError: If it was not there in time.
            ValueError: If results were fetched out of order before.
        """
        import ray

        if not self.has_next():
            message = "no result is to come"
            raise StopIteration(message)
        if self._next not in self._by_index:
            message = "get_next() cannot follow get_next_unordered() before all results are fetched"
            raise ValueError(message)
        ref = self._by_index[self._next]
        in_time = True
        if timeout is not None:
            in_time = bool(ray.wait([ref], timeout=timeout)[0])
            if not in_time and not ignore_if_timedout:
                message = f"the next result was not there after {timeout} s"
                raise TimeoutError(message)
        self._take(ref)
        self._next += 1
        if in_time:
            return ray.get(ref)
        message = f"the next result was not there after {timeout} s, and is skipped"
        raise TimeoutError(message)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Any result that is there, or the first that comes.

        Args:
            timeout: Seconds to wait at most.
            ignore_if_timedout: Accepted for compatibility; there is no result to skip when none is there.

        Raises:
            StopIteration: If there is none to come.
            TimeoutError: If none was there in time.
        """
        import ray

        if not self.has_next():
            message = "no result is to come"
            raise StopIteration(message)
        ready: list[Any]
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout)
        if not ready:
            message = f"no result was there after {timeout} s"
            raise TimeoutError(message)
        index = self._take(ready[0])
        self._next = max(self._next, index + 1)
        return ray.get(ready[0])

    def _take(self, ref: Any) -> int:
        index, actor = self._running.pop(ref)
        del self._by_index[index]
        self._return(actor)
        return index

    def _return(self, actor: ActorHandle[Any]) -> None:
        self._idle.append(actor)
        if self._waiting:
            self.submit(*self._waiting.popleft())

    def has_free(self) -> bool:
        """Whether an actor is free and nothing waits for it."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle[Any] | None:
        """Takes a free actor out of the pool; None if none is free."""
        return self._idle.pop() if self.has_free() else None

    def push(self, actor: ActorHandle[Any]) -> None:
        """Adds an actor to the pool.

        Raises:
            ValueError: If it is in the pool already.
        """
        if actor in self._idle or any(actor == busy for _, busy in self._running.values()):
            message = f"{actor!r} is in the pool already"
            raise ValueError(message)
        self._return(actor)
