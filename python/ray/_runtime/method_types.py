"""What a type checker sees of methods that `ray.method` marks. Nothing here exists at run time.

A handle stands for an instance of the user's class, but has `method.remote(...)` where that has `method(...)`. No type
can say this of any class, so marked methods say it themselves: they are descriptors, which are the plain method on an
instance, and the remote one on the class. A handle is typed as "a handle, or the class" (`ActorProxy`); what it gives
for the name of a method is then what the class gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from ray._core import ObjectRef
    from ray._runtime.generators import ObjectRefGenerator

__all__ = ["MarkedMethod", "MethodDecorator", "RemoteMethod"]

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Local = TypeVar("Local", covariant=True)
T = TypeVar("T")


class RemoteMethod(Generic[P, R]):
    """A marked method, on a handle."""

    # As in `RemoteFunction.remote`: the method's own signature, until one of the first four is a reference.
    @overload
    def remote(  # type: ignore[overload-overlap]
        self: RemoteMethod[P, Iterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> ObjectRefGenerator[T]: ...
    @overload
    def remote(  # type: ignore[overload-overlap]
        self: RemoteMethod[P, AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> ObjectRefGenerator[T]: ...
    @overload
    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[R]: ...
    @overload
    def remote(self, _0: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...
    @overload
    def remote(self, _0: Any, _1: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...
    @overload
    def remote(self, _0: Any, _1: Any, _2: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...
    @overload
    def remote(self, _0: Any, _1: Any, _2: Any, _3: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...
    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method in the actor; returns its reference, or generator, at once."""

    options: Callable[..., RemoteMethod[P, Any]]
    """This method with other options, which may change what a call returns."""


class MarkedMethod(Protocol, Generic[P, Local, R]):
    """What `ray.method` makes of a method with these parameters, that returns `Local` where it is called plainly."""

    @overload
    def __get__(self, instance: None, owner: type[Any], /) -> RemoteMethod[P, R]: ...
    @overload
    def __get__(self, instance: object, owner: type[Any], /) -> Callable[P, Local]: ...


class MethodDecorator(Protocol):
    """What `ray.method(...)` with options returns."""

    @overload  # A coroutine's result is what its reference stands for.
    def __call__(
        self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]], /
    ) -> MarkedMethod[P, Coroutine[Any, Any, T], T]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], T], /) -> MarkedMethod[P, T, T]: ...
