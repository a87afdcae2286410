"""A queue that tasks and actors share."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from typing import Any

from ray._runtime.words import kind_of

__all__ = ["Empty", "Full", "Queue"]


class Empty(queue.Empty):
    """The queue has no item, or not as many as were asked for."""


class Full(queue.Full):
    """The queue has no room."""


class Queue:
    """A first-in-first-out queue held by an actor; its methods block like those of `queue.Queue`.

    A copy that is sent to a task or actor is the same queue. Every operation is one call of the actor.

    Args:
        maxsize: How many items it may hold; 0 for any number.
        actor_options: Options of the actor that holds it.
    """

    def __init__(self, maxsize: int = 0, actor_options: dict[str, Any] | None = None) -> None:
        import ray

        self.maxsize = maxsize
        self.actor: Any = ray.remote(_QueueActor).options(**(actor_options or {})).remote(maxsize)

    def __len__(self) -> int:
        return self.size()

    def size(self) -> int:
        """Number of items."""
        import ray

        count: int = ray.get(self.actor.qsize.remote())
        return count

    def qsize(self) -> int:
        """Number of items."""
        return self.size()

    def empty(self) -> bool:
        """Whether there is no item."""
        return self.size() == 0

    def full(self) -> bool:
        """Whether there is no room."""
        return 0 < self.maxsize <= self.size()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Adds an item.

        Args:
            item: The item.
            block: Whether to wait for room.
            timeout: Seconds to wait at most; None for ever.

        Raises:
            Full: If there was no room in time.
            ValueError: If `timeout` is negative.
        """
        import ray

        _raise_if(ray.get(self.actor.put.remote(item, _deadline(block, timeout))), Full)

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Like `put`, for asynchronous code."""
        _raise_if(await self.actor.put.remote(item, _deadline(block, timeout)), Full)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Takes the oldest item.

        Args:
            block: Whether to wait for one.
            timeout: Seconds to wait at most; None for ever.

        Raises:
            Empty: If there was none in time.
            ValueError: If `timeout` is negative.
        """
        import ray

        found, item = ray.get(self.actor.get.remote(_deadline(block, timeout)))
        _raise_if(found, Empty)
        return item

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """Like `get`, for asynchronous code."""
        found, item = await self.actor.get.remote(_deadline(block, timeout))
        _raise_if(found, Empty)
        return item

    def put_nowait(self, item: Any) -> None:
        """Adds an item, or raises Full."""
        self.put(item, block=False)

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Adds all items, or none of them and raises Full."""
        import ray

        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            message = f"items must be something to iterate over, not {kind_of(items)}"
            raise TypeError(message)
        _raise_if(ray.get(self.actor.put_batch.remote(list(items))), Full)

    def get_nowait(self) -> Any:
        """Takes the oldest item, or raises Empty."""
        return self.get(block=False)

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Takes the oldest `num_items` items, or none of them and raises Empty."""
        import ray

        if isinstance(num_items, bool) or not isinstance(num_items, int):
            message = f"num_items must be a whole number, not {num_items!r}"
            raise TypeError(message)
        if num_items < 0:
            message = f"num_items cannot be negative, but is {num_items}"
            raise ValueError(message)
        items: list[Any] | None = ray.get(self.actor.get_batch.remote(num_items))
        if items is None:
            message = f"the queue has fewer than {num_items} items"
            raise Empty(message)
        return items

    def shutdown(self, force: bool = False, grace_period_s: int = 5) -> None:
        """Ends the queue; what it holds is lost.

        Args:
            force: Whether to end it at once, without finishing the calls before.
            grace_period_s: Seconds after which it is ended at once anyway.
        """
        import ray

        if self.actor is None:
            return
        actor, self.actor = self.actor, None
        if not force:
            done, _ = ray.wait([actor.__ray_terminate__.remote()], timeout=grace_period_s)
            if done:
                return
        ray.kill(actor, no_restart=True)


def _deadline(block: bool, timeout: float | None) -> float | None:
    """Seconds that the actor waits."""
    if not block:
        return 0.0
    if timeout is not None and timeout < 0:
        message = f"timeout cannot be negative, but is {timeout}"
        raise ValueError(message)
    return timeout


def _raise_if(done: bool, error: type[Exception]) -> None:
    if not done:
        raise error


class _QueueActor:
    def __init__(self, maxsize: int) -> None:
        import asyncio

        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize)

    async def qsize(self) -> int:
        return self._queue.qsize()

    async def put(self, item: Any, timeout: float | None) -> bool:
        import asyncio

        if timeout == 0:
            if self._queue.full():
                return False
            self._queue.put_nowait(item)
            return True
        try:
            await asyncio.wait_for(self._queue.put(item), timeout)
        except TimeoutError:
            return False
        return True

    async def get(self, timeout: float | None) -> tuple[bool, Any]:
        import asyncio

        if timeout == 0:
            return (False, None) if self._queue.empty() else (True, self._queue.get_nowait())
        try:
            return True, await asyncio.wait_for(self._queue.get(), timeout)
        except TimeoutError:
            return False, None

    async def put_batch(self, items: list[Any]) -> bool:
        room = self._queue.maxsize - self._queue.qsize()
        if self._queue.maxsize > 0 and len(items) > room:
            return False
        for item in items:
            self._queue.put_nowait(item)
        return True

    async def get_batch(self, count: int) -> list[Any] | None:
        if count > self._queue.qsize():
            return None
        return [self._queue.get_nowait() for _ in range(count)]
