"""Results as they come."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ray._core import ObjectRef
    from ray.remote_function import RemoteFunction

__all__ = ["as_completed", "map_unordered"]


def as_completed(
    refs: Sequence[ObjectRef[Any]], *, chunk_size: int = 10, yield_obj_refs: bool = False, **kwargs: Any
) -> Iterator[Any]:
    """Values of references, each as soon as it is there.

    Args:
        refs: The references.
        chunk_size: How many to wait for at a time, at most.
        yield_obj_refs: Whether to give the references that are there instead of their values.
        kwargs: Passed on to `ray.wait`.

    Raises:
        ValueError: If `chunk_size` is below 1.
    """
    import ray

    _check_positive("chunk_size", chunk_size)
    unfinished: list[Any] = list(refs)
    while unfinished:
        count = min(chunk_size, len(unfinished))
        ready: list[Any]
        ready, unfinished = ray.wait(unfinished, num_returns=_available(unfinished, count), **kwargs)
        yield from ready if yield_obj_refs else ray.get(ready)


def _available(refs: list[Any], most: int) -> int:
    """How many to take now: those that are there, from 1 to `most`."""
    import ray

    ready, _ = ray.wait(refs, num_returns=most, timeout=0)
    return max(len(ready), 1)


def map_unordered(
    fn: RemoteFunction[Any, Any],
    items: Iterable[Any],
    *,
    backpressure_size: int | None = 100,
    chunk_size: int = 10,
    yield_obj_refs: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """Results of `fn.remote(item)` for all items, each as soon as it is there.

    Args:
        fn: A remote function, or an actor's method.
        items: What to call it with.
        backpressure_size: How many calls may be unfinished; None for any number.
        chunk_size: How many to wait for at a time, at most.
        yield_obj_refs: Whether to give references instead of values.
        kwargs: Passed on to `ray.wait`.

    Raises:
        ValueError: If a size is below 1.
    """
    import ray

    _check_positive("chunk_size", chunk_size)
    if backpressure_size is not None:
        _check_positive("backpressure_size", backpressure_size)
    remaining = iter(items)
    unfinished = [fn.remote(item) for item in itertools.islice(remaining, backpressure_size)]
    while unfinished:
        count = min(chunk_size, len(unfinished))
        ready: list[Any]
        ready, unfinished = ray.wait(unfinished, num_returns=_available(unfinished, count), **kwargs)
        unfinished.extend(fn.remote(item) for item in itertools.islice(remaining, len(ready)))
        yield from ready if yield_obj_refs else ray.get(ready)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        message = f"{name} must be at least 1, but is {value}"
        raise ValueError(message)
