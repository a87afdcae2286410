"""What callers of an actor know about its class: names, signatures and options of its methods.

Made from the class where the actor is created and inside the actor itself; everywhere else it arrives with the handle,
as bytes that equal classes share.
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, Self

from ray._runtime import signature
from ray._runtime.signature import Signature

if TYPE_CHECKING:
    from ray._core import Core

__all__ = ["ActorMethods", "Method", "method_options"]

_COROUTINE = 0x80
_GENERATOR = 0x20
_ASYNC_GENERATOR = 0x200

OPTIONS_ATTRIBUTE = "__ray_method_options__"

KNOWN_MAX = 1024  # unpickled descriptions that a process remembers

_SKIPPED = frozenset(("__init__", "__new__", "__del__", "__init_subclass__", "__class_getitem__", "__getattr__",
                      "__getattribute__", "__setattr__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__",
                      "__repr__", "__hash__", "__eq__"))  # fmt: skip


class Method:
    """One method."""

    __slots__ = ("generator", "options", "signature")

    def __init__(self, method_signature: Signature, options: dict[str, Any], generator: bool) -> None:
        self.signature = method_signature
        self.options = options
        self.generator = generator

    def __reduce__(self) -> tuple[Any, ...]:
        return Method, (self.signature, self.options, self.generator)


class ActorMethods:
    """The methods of an actor class, and what its calls have in common.

    Attributes:
        class_name: The class, for people.
        methods: By name.
        groups: Names of the concurrency groups.
        max_task_retries: How often calls are run again when the actor dies, unless a method says otherwise.
        max_pending_calls: How many unfinished calls one caller may have; -1 for any number.
        any_order: Whether a call whose arguments are there may overtake one that still waits for its own.
        recorded: Whether history is kept of its calls.
    """

    __slots__ = (
        "_bytes",
        "any_order",
        "class_name",
        "groups",
        "max_pending_calls",
        "max_task_retries",
        "methods",
        "recorded",
    )

    def __init__(
        self,
        class_name: str,
        methods: dict[str, Method],
        groups: tuple[str, ...],
        max_task_retries: int,
        max_pending_calls: int,
        any_order: bool,
        recorded: bool = True,
    ) -> None:
        self.class_name = class_name
        self.methods = methods
        self.groups = groups
        self.max_task_retries = max_task_retries
        self.max_pending_calls = max_pending_calls
        self.any_order = any_order
        self.recorded = recorded
        self._bytes: bytes | None = None

    def to_bytes(self) -> bytes:
        """This description, pickled."""
        if self._bytes is None:
            from ray._runtime import serialization

            self._bytes = serialization.dumps(
                (
                    self.class_name,
                    self.methods,
                    self.groups,
                    self.max_task_retries,
                    self.max_pending_calls,
                    self.any_order,
                    self.recorded,
                )
            )
        return self._bytes

    def configure(self, core: Core | None, actor: bytes) -> None:
        """Tells the core how such an actor is called, unless it is called as most are."""
        if core is not None and (self.any_order or self.max_pending_calls > 0):
            core.configure_calls(actor, max_pending=self.max_pending_calls, any_order=self.any_order)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`; equal bytes give one object."""
        found = _known.get(data)
        if found is None:
            from ray._runtime import serialization

            found = cls(*serialization.loads(data))
            found._bytes = data
            if len(_known) < KNOWN_MAX:
                _known[data] = found
        return found


_known: dict[bytes, Any] = {}


def method_options(function: Any) -> dict[str, Any]:
    """What `ray.method` was told about a function."""
    found = getattr(function, OPTIONS_ATTRIBUTE, None)
    return dict(found) if found else {}


def describe(cls: type, options: dict[str, Any]) -> ActorMethods:
    """The methods of a class, for an actor with these options.

    Raises:
        ValueError: If a method names a concurrency group that the class does not have.
    """
    from ray._runtime import options as opts

    groups = tuple(opts.groups_of("concurrency_groups", options.get("concurrency_groups")))
    methods = {name: _method(function, bound) for name, (function, bound) in functions_of(cls).items()}
    for name, method in methods.items():
        group = method.options.get("concurrency_group")
        if group is not None and group not in groups:
            message = f"{cls.__qualname__}.{name} is in the concurrency group {group!r}, which is not one of {groups}"
            raise ValueError(message)
    pending = options.get("max_pending_calls")
    return ActorMethods(
        cls.__name__,
        methods,
        groups,
        options.get("max_task_retries") or 0,
        -1 if pending is None else pending,
        _any_order(cls, options),
        options.get("enable_task_events", True),
    )


def _any_order(cls: type, options: dict[str, Any]) -> bool:
    """Actors that run several calls at a time keep no order anyway; those that run one promise it by default."""
    chosen = options.get("allow_out_of_order_execution")
    is_async = is_async_class(cls)
    if is_async and chosen is False:
        message = (
            f"allow_out_of_order_execution=False is not possible for {cls.__qualname__}, which has async methods: "
            "they run at the same time"
        )
        raise ValueError(message)
    if chosen is not None:
        return bool(chosen)
    return is_async or (options.get("max_concurrency") or 1) > 1 or bool(options.get("concurrency_groups"))


def functions_of(cls: type) -> dict[str, tuple[Any, int]]:
    """The functions that instances of a class have, each with the number of arguments that Python binds."""
    found: dict[str, tuple[Any, int]] = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, raw in vars(base).items():
            if name in _SKIPPED:
                continue
            if isinstance(raw, FunctionType):
                found[name] = (raw, 1)
            elif isinstance(raw, staticmethod):
                found[name] = (raw.__func__, 0)
            elif isinstance(raw, classmethod):
                found[name] = (raw.__func__, 1)
            elif callable(raw) and not isinstance(raw, type) and hasattr(type(raw), "__get__"):
                found[name] = (raw, 1)  # compiled functions and the like
            else:
                found.pop(name, None)
    return found


def is_async_class(cls: type) -> bool:
    """Whether any method is a coroutine function or an asynchronous generator."""
    return any(_flags(function) & (_COROUTINE | _ASYNC_GENERATOR) for function, _ in functions_of(cls).values())


def _flags(function: Any) -> int:
    code = getattr(function, "__code__", None)
    return 0 if code is None else int(code.co_flags)


def _method(function: Any, bound: int) -> Method:
    generator = bool(_flags(function) & (_GENERATOR | _ASYNC_GENERATOR))
    return Method(signature.of_function(function, bound=bound), method_options(function), generator)


def _special() -> dict[str, Method]:
    def accept(name: str, positional: tuple[str, ...], *, anything: bool) -> Method:
        described = Signature(name, positional, len(positional), 0, frozenset(), (), anything, anything, 1)
        return Method(described, {}, False)

    return {
        "__ray_ready__": accept("__ray_ready__", (), anything=False),
        "__ray_terminate__": accept("__ray_terminate__", (), anything=False),
        "__ray_call__": accept("__ray_call__", ("fn",), anything=True),
    }


SPECIAL = _special()
"""Methods that every actor has: to await its start, to end it after the calls before, to run a function in it."""
