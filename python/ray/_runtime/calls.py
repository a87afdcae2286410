"""From `.remote(...)` to the core in one Python frame.

`remote_callable` makes a closure that compares the number of arguments with two integers and calls the core. What it
needs (the core's template, the limits) is bound at the first call, and unbound when the core is closed; until then
the limits let nothing pass, so that the fast path has no question to ask about it.

The closure must not refer to what holds it: handles of actors are counted, and a cycle would leave an actor alive
until the garbage collector comes by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ray import _core
from ray.exceptions import PendingCallsLimitExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._core import Core, Template
    from ray._runtime.signature import Signature

__all__ = ["Binding", "Recipe", "remote_callable", "submitter", "translated"]


class Recipe(Protocol):
    """Knows how to make a template for a core. Holds no core."""

    def signature(self) -> Signature:
        """What calls must fit."""
        ...

    def template(self, core: Core) -> Template:
        """A template for this core."""
        ...

    def core(self) -> Core:
        """The core to submit to."""
        ...

    def streaming(self) -> bool:
        """Whether results come as a stream."""
        ...

    def too_many(self, error: PendingCallsLimitExceeded) -> PendingCallsLimitExceeded:
        """The core's refusal of a call, for the user."""
        ...


class Binding:
    """Lets go of a core when it is closed."""

    __slots__ = ("__weakref__", "_unbind")

    is_placed = True  # what was bound depends on the placement group of the task that runs

    def __init__(self, unbind: Callable[[], None]) -> None:
        self._unbind = unbind

    def unbind(self) -> None:
        """Makes the next call bind anew."""
        self._unbind()


def remote_callable(recipe: Recipe) -> Callable[..., Any]:
    """The function behind `.remote`: checks the call, and submits it."""
    low, high = 0, -1
    submit: Any = None
    signature: Signature | None = None
    binding: Binding | None = None

    def remote(*args: Any, **kwargs: Any) -> Any:
        if kwargs or not low <= len(args) <= high:
            prepare(args, kwargs)
        try:
            return submit(args, kwargs)
        except (_core.StoreFull, _core.CoreClosed) as error:
            raise translated(error) from None
        except PendingCallsLimitExceeded as error:
            raise recipe.too_many(error) from None
        except TypeError as error:
            from ray._runtime.serialization import name_argument

            assert signature is not None, "bound by the call"
            named = name_argument(error, signature.name, signature.named(args, kwargs))
            raise named from named.__cause__

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal low, high, submit, signature, binding
        if signature is None:
            signature = recipe.signature()
        signature.check(args, kwargs)
        if submit is None:
            from ray._runtime import session

            core = recipe.core()
            submit = submitter(recipe.template(core), streaming=recipe.streaming())
            low, high = signature.minimum, signature.maximum
            if binding is None:
                binding = Binding(unbind)
            session.on_close(binding)

    def unbind() -> None:
        nonlocal low, high, submit
        low, high, submit = 0, -1, None

    return remote


def translated(error: BaseException) -> BaseException:
    """Ray's exception for what the core says; anything else, user code's builtin exceptions included, as it is."""
    if isinstance(error, _core.StoreFull):
        from ray.exceptions import ObjectStoreFullError, OutOfDiskError

        return (OutOfDiskError if isinstance(error, _core.DiskFull) else ObjectStoreFullError)(str(error))
    if isinstance(error, _core.CoreClosed):
        from ray._runtime import session

        return session.gone(error)
    return error


def submitter(template: Template, *, streaming: bool) -> Callable[..., Any]:
    """What submits a call: the template itself, or what wraps its stream."""
    if not streaming:
        return template.submit
    from ray._runtime.generators import ObjectRefGenerator

    submit = template.submit

    def submit_stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ObjectRefGenerator(submit(args, kwargs))

    return submit_stream
