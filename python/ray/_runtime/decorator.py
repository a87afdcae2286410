"""`ray.remote`."""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from ray._runtime import options as opts
from ray._runtime.words import kind_of
from ray.actor import ActorClass, ActorHandle
from ray.remote_function import RemoteFunction

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["remote"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


_COMPILED = ("cython_function_or_method", "builtin_function_or_method")


class RemoteDecorator(Protocol):
    """What `ray.remote(...)` with options returns."""

    @overload
    def __call__(self, function: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload  # A class is a callable too; the first that fits counts.
def remote(function: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]
@overload
def remote(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...
@overload
def remote(**options: Any) -> RemoteDecorator: ...


def remote(*args: Any, **kwargs: Any) -> Any:
    """Makes a remote function of a function, and an actor class of a class.

    Used as `@ray.remote`, as `@ray.remote(num_cpus=2, ...)`, or called with a function or class.

    Args:
        num_cpus: CPUs to hold while a task runs or an actor lives. Tasks: 1. Actors: 1 to be placed, 0 to live.
        num_gpus: GPUs; below 1 a share of one, else a whole number.
        resources: Further resources, by name.
        memory: Bytes of memory to count.
        num_returns: Tasks: how many results (100,000 at most), "streaming" for generators, or "dynamic".
        max_retries: Tasks: how often to run again when a worker dies; -1 without end. 3 unless stated.
        retry_exceptions: Tasks: whether exceptions count as such deaths too, or which classes of them.
        max_calls: Tasks: after how many calls a worker is replaced; 0 for never. 0 unless stated, and 1 for tasks with
            GPUs, because libraries give a device's memory back only when their process ends.
        max_restarts: Actors: how often to start again when the process dies; -1 without end. 0 unless stated.
        max_task_retries: Actors: how often calls are run again after a restart; -1 without end. 0 unless stated.
        max_concurrency: Actors: calls at a time. 1, and 1000 for asynchronous actors.
        concurrency_groups: Actors: names of groups of methods with a limit each.
        max_pending_calls: Actors: unfinished calls that one caller may have; -1 for any number.
        name: Actors: a name for `ray.get_actor`. Tasks: what to show people.
        namespace: Actors: where the name counts.
        lifetime: Actors: "detached" outlives its creator.
        get_if_exists: Actors: use a living actor of this name instead of starting one.
        runtime_env: Environment of the worker; see `ray.runtime_env`.
        scheduling_strategy: "DEFAULT", "SPREAD", or an object of `ray.util.scheduling_strategies`.

    Raises:
        ValueError, TypeError: If an option does not exist or its value is not valid; the message names it.
    """
    if len(args) == 1 and not kwargs and callable(args[0]):
        return _make(args[0], {})
    if args or not kwargs:
        message = (
            "ray.remote is used as @ray.remote without parentheses, or with options by name: @ray.remote(num_cpus=2)"
        )
        raise TypeError(message)
    return lambda function: _make(function, dict(kwargs))


def _make(target: Any, options: dict[str, Any]) -> Any:
    if isinstance(target, type):
        opts.check(options, opts.ACTOR, "actors")
        return ActorClass._make(target, options)
    if isinstance(target, FunctionType) or type(target).__name__ in _COMPILED:
        opts.check(options, opts.TASK, "remote functions")
        _refuse_coroutine(target)
        return RemoteFunction(target, options)
    if isinstance(target, RemoteFunction | ActorClass):
        message = f"{target!r} is remote already; change its options with .options(...)"
    elif isinstance(target, ActorHandle):
        message = "ray.remote takes a function or a class, not a running actor"
    else:
        message = f"ray.remote takes a function or a class, not {kind_of(target)}"
    raise TypeError(message)


_COROUTINE = 0x80  # of a code object's flags


def _refuse_coroutine(function: Any) -> None:
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & _COROUTINE:
        message = (
            f"{function.__qualname__} is an 'async def', which only methods of actors can be; in a task, call "
            "asyncio.run() inside of a plain function"
        )
        raise ValueError(message)
