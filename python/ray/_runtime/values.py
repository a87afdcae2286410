"""`ray.put`, `ray.get`, `ray.wait`, `ray.cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from ray import _core
from ray._runtime import session
from ray._runtime.calls import translated
from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray._core import Core
    from ray._core import ObjectRef as Ref
    from ray._runtime.generators import ObjectRefGenerator

__all__ = ["cancel", "get", "put", "wait"]

R = TypeVar("R")
W = TypeVar("W", bound="Ref[Any] | ObjectRefGenerator[Any]")

ObjectRef = _core.ObjectRef

TIMEOUT_S_MAX = 3_000_000_000  # a century: what is longer is a mistake, and may not even fit a float


def put(value: R, *, _owner: Any = None, _tensor_transport: str | None = None) -> Ref[R]:
    """Stores a value and returns a reference to it.

    The value is pickled now; later changes to it are not seen. Large buffers are copied once, into shared memory, and
    every process of the node reads them there. The value is kept as long as a reference to it exists anywhere.

    Args:
        value: Anything that pickles, but not a reference.

    Raises:
        TypeError: If the value is a reference itself, or cannot be pickled; the message says which part of it.
        ObjectStoreFullError: If there is no room for it.
        OutOfDiskError: If that is because the disk, which values leave the store for, is full.
    """
    if type(value) is ObjectRef:
        message = "ray.put() was given an ObjectRef, which is stored already; put a list that contains it if you must"
        raise TypeError(message)
    if _owner is not None or _tensor_transport is not None:
        message = "ray.put(): Skate has neither _owner nor _tensor_transport yet"
        raise NotImplementedError(message)
    core = session.core
    try:
        return (session.ensure() if core is None else core).put(value)
    except (_core.StoreFull, _core.CoreClosed) as error:
        raise translated(error) from None


@overload
def get(object_refs: Ref[R], *, timeout: float | None = None, _use_object_store: bool = False) -> R: ...
@overload
def get(object_refs: Sequence[Ref[R]], *, timeout: float | None = None, _use_object_store: bool = False) -> list[R]: ...


def get(object_refs: Any, *, timeout: float | None = None, _use_object_store: bool = False) -> Any:
    """Waits for the value of a reference, or of a list of them.

    Arrays inside are read-only views on shared memory. What a task raised is raised here. In a worker the CPUs of the
    waiting task serve others meanwhile. In asynchronous code `await ref` is the way: this function blocks.

    Args:
        object_refs: A reference, or a list of references.
        timeout: Seconds to wait at most; 0 only looks, None and -1 wait for ever.

    Returns:
        The value, or the list of values in the same order.

    Raises:
        GetTimeoutError: If not all values were there in time.
        RayTaskError: If a task raised; also an instance of what it raised.
        RayError: If a value cannot be had; the subclass says why.
        ValueError, TypeError: If `object_refs` is neither a reference nor a list of references.
    """
    core = session.core
    if core is None:
        core = session.ensure()
    try:
        if type(object_refs) is ObjectRef:
            if timeout is None:
                return core.get_one(object_refs)
            return _get_in_time(core, [object_refs], timeout)[0]
        if not isinstance(object_refs, list):
            return _get_other(object_refs)
        if timeout is None:
            return core.get(object_refs)
        return _get_in_time(core, object_refs, timeout)
    except TypeError:
        if isinstance(object_refs, list):
            _check_refs(object_refs)
        raise
    except (_core.StoreFull, _core.CoreClosed) as error:
        raise translated(error) from None


def _get_in_time(core: Core, refs: list[Any], timeout: float) -> list[Any]:
    if timeout == -1:  # Ray's other word for no limit, here but not in wait()
        return core.get(refs)
    _check_timeout(timeout)
    try:
        return core.get(refs, timeout)
    except TimeoutError as error:
        if type(error) is not TimeoutError:  # a task's own
            raise
        raise _timed_out(core, refs, timeout) from None


def _timed_out(core: Core, refs: list[Any], timeout: float) -> Exception:
    from ray.exceptions import GetTimeoutError

    split = core.wait(list(dict.fromkeys(refs)), len(set(refs)), 0)
    assert split is not None, "core.get() has seen that all are references"
    ready, missing = split
    message = f"{len(missing)} of {len(ready) + len(missing)} values were not there after {timeout} s."
    if missing:
        (_, reason), *deeper = core.why(missing[0])
        reasons = "; ".join([reason, *(f"{what}: {cause}" for what, cause in deeper)])
        message += f" The first of them is {missing[0].hex()}: {reasons}."
    return GetTimeoutError(message)


def _get_other(value: Any) -> Any:
    from ray._runtime.generators import ObjectRefGenerator

    if isinstance(value, ObjectRefGenerator):
        return value
    message = f"ray.get() takes an ObjectRef or a list of them, not {kind_of(value)}"
    if isinstance(value, tuple | set | frozenset | dict):
        message += "; make it a list"
    raise ValueError(message)


def _check_refs(refs: list[Any]) -> None:
    for index, ref in enumerate(refs):
        if type(ref) is not ObjectRef:
            message = f"ray.get() was given a list whose item {index} is {kind_of(ref)}, not an ObjectRef"
            raise TypeError(message)


def _check_timeout(timeout: Any) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        message = f"timeout must be a number of seconds or None, not {timeout!r}"
        raise TypeError(message)
    if timeout != timeout:
        message = "timeout must be a number of seconds or None, but is nan, which is not a number"
        raise ValueError(message)
    if timeout < 0:
        message = f"timeout cannot be negative, but is {timeout}"
        raise ValueError(message)
    if timeout > TIMEOUT_S_MAX and timeout != float("inf"):
        message = f"timeout is more than {TIMEOUT_S_MAX} s; use None to wait for ever"
        raise ValueError(message)


def wait(
    ray_waitables: list[W],
    *,
    num_returns: int = 1,
    timeout: float | None = None,
    fetch_local: bool = True,
) -> tuple[list[W], list[W]]:
    """Waits until some of the references are there.

    A reference is there when its value is, or its error. A generator is there when its next item is, or its end.

    Args:
        ray_waitables: References and generators, each once.
        num_returns: How many to wait for.
        timeout: Seconds to wait at most; 0 only looks, None waits for ever.
        fetch_local: False counts values on other nodes as there without fetching them.

    Returns:
        The first `num_returns` that are there (fewer only after the timeout), and the others; both in the given order.

    Raises:
        TypeError: If `ray_waitables` is not a list, or holds something else.
        ValueError: If it holds something twice, or `num_returns` or `timeout` are out of range.
    """
    if not isinstance(ray_waitables, list):
        message = f"ray.wait() takes a list of ObjectRefs, not {kind_of(ray_waitables)}"
        raise TypeError(message)
    if timeout is not None:
        _check_timeout(timeout)
    count = len(ray_waitables)
    if count == 0:
        return [], []
    if isinstance(num_returns, bool) or not isinstance(num_returns, int):
        message = f"num_returns must be a whole number, not {num_returns!r}"
        raise TypeError(message)
    if not 1 <= num_returns <= count:
        message = f"num_returns must be from 1 to the number of references ({count}), not {num_returns}"
        raise ValueError(message)
    core = session.core or session.ensure()
    try:
        split = core.wait(ray_waitables, num_returns, timeout)  # raises ValueError for duplicates
    except _core.CoreClosed as error:
        raise translated(error) from None
    if split is None:
        return _wait_mixed(core, ray_waitables, num_returns, timeout)
    return split


def _wait_mixed(
    core: Core, waitables: list[Any], num_returns: int, timeout: float | None
) -> tuple[list[Any], list[Any]]:
    """Waits for references and generators, by the events that they raise."""
    import time

    from ray._runtime.generators import ObjectRefGenerator

    for index, item in enumerate(waitables):
        if type(item) is not ObjectRef and not isinstance(item, ObjectRefGenerator):
            message = f"ray.wait() was given a list whose item {index} is {kind_of(item)}, not an ObjectRef"
            raise TypeError(message)
    if len(set(waitables)) != len(waitables):
        message = "ray.wait() was given the same reference twice"
        raise ValueError(message)
    deadline = None if timeout is None else time.monotonic() + timeout
    done: set[int] = set()
    events = _core.Completions(core)
    try:
        for index, item in enumerate(waitables):
            if isinstance(item, ObjectRefGenerator) and item._ahead is not None:
                done.add(index)
            elif isinstance(item, ObjectRefGenerator):
                events.watch_stream(item._stream, index)
            else:
                events.watch(item, index)
        done.update(events.drain())
        while len(done) < num_returns:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            done.update(events.wait(left))
    finally:
        events.close()
    first = [index for index in range(len(waitables)) if index in done][:num_returns]
    taken = set(first)
    return (
        [waitables[index] for index in first],
        [item for index, item in enumerate(waitables) if index not in taken],
    )


def cancel(ray_waitable: Ref[Any] | ObjectRefGenerator[Any], *, force: bool = False, recursive: bool = True) -> None:
    """Asks for the end of a task. `ray.get` of its reference raises `TaskCancelledError`, unless it was done before.

    A task that waits does not start. One that runs gets a KeyboardInterrupt in its main thread, or has its asyncio task
    cancelled. Values made by `ray.put`, and tasks that are done, are left as they are.

    Args:
        ray_waitable: The reference or generator that the call returned.
        force: Ends the worker's process instead. Not for actors.
        recursive: Whether tasks that it has called are cancelled too.

    Raises:
        TypeError: If it is neither a reference nor a generator, or `force` or `recursive` is not a boolean.
    """
    from ray._runtime.generators import ObjectRefGenerator

    for name, value in (("force", force), ("recursive", recursive)):
        if not isinstance(value, bool):
            message = f"ray.cancel(): {name} must be True or False, not {value!r}"
            raise TypeError(message)
    if isinstance(ray_waitable, ObjectRefGenerator):
        session.ensure().cancel(ray_waitable._stream, force, recursive)
        return
    if type(ray_waitable) is not ObjectRef:
        hint = " Use ray.kill() for actors." if type(ray_waitable).__name__ == "ActorHandle" else ""
        message = f"ray.cancel() takes an ObjectRef, not {kind_of(ray_waitable)}.{hint}"
        raise TypeError(message)
    session.ensure().cancel(ray_waitable, force, recursive)
