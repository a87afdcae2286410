"""Methods that every actor has, whatever its class: Ray's `__ray_ready__`, `__ray_terminate__` and `__ray_call__`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime import context

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SPECIAL", "missing"]


def missing(class_name: str, name: str) -> Callable[..., Any]:
    """What stands for a method that the class does not have."""

    def raise_missing(*_args: Any, **_kwargs: Any) -> Any:
        message = f"the actor's class {class_name} has no method {name!r}"
        raise AttributeError(message)

    return raise_missing


def _ray_ready(_self: Any) -> bool:
    return True


def _ray_terminate(_self: Any) -> None:
    assert context.worker is not None, "a method runs in a worker"
    context.worker.exit_actor("__ray_terminate__ was called")


def _ray_call(self: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(self, *args, **kwargs)


SPECIAL: dict[str, Any] = {
    "__ray_ready__": _ray_ready,
    "__ray_terminate__": _ray_terminate,
    "__ray_call__": _ray_call,
}
