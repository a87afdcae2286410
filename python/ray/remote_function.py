"""Remote functions: what `@ray.remote` makes of a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from ray._runtime import calls, session
from ray._runtime import options as opts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from ray._core import Core, ObjectRef, Template
    from ray._runtime.generators import ObjectRefGenerator
    from ray._runtime.signature import Signature
    from ray.exceptions import PendingCallsLimitExceeded

__all__ = ["RemoteFunction"]

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
T = TypeVar("T")

# A frame between cores is at most 64 MiB; a function larger than this has captured data that belongs in an object.
FUNCTION_BYTES_MAX = 48 * 1024 * 1024
DERIVED_MAX = 64  # variants by `options()` that one function remembers

_GENERATOR_FLAGS = 0x20 | 0x200  # generator functions, and async ones
_CARRIED = ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__")


class Pickled:
    """A function's or class's pickled form, for one core; shared by all its variants.

    The core is named by its process number: a function of a module outlives it, and must not keep it.
    """

    __slots__ = ("code", "proc")

    def __init__(self) -> None:
        self.proc = 0
        self.code = b""

    def get(self, core: Core, function: Any) -> bytes:
        """The pickled form, made at the first use with this core.

        Raises:
            TypeError: If the function cannot be pickled; the message says which part of it.
        """
        if self.proc != core.proc:
            from ray._runtime import serialization

            self.code = serialization.dumps(function)
            self.proc = core.proc
        return self.code


def pickle_blob(code: bytes, meta: dict[str, Any], function: Any) -> bytes:
    """What workers get: a pickled function or class, and what they must know about its options.

    Raises:
        ValueError: If it is too large to be sent.
    """
    from ray._runtime import serialization

    if len(code) > FUNCTION_BYTES_MAX:
        name = getattr(function, "__qualname__", repr(function))
        message = (
            f"{name} is {len(code) / 2**20:.0f} MiB when pickled, more than the {FUNCTION_BYTES_MAX // 2**20} MiB that "
            "can be sent. It has probably captured data: pass that as an argument, or ray.put() it and capture the "
            "reference."
        )
        raise ValueError(message)
    return serialization.dumps((code, meta))


class _Recipe:
    """How calls of a remote function are submitted."""

    __slots__ = ("_function", "_options", "_pickled", "name")

    def __init__(self, function: Any, options: dict[str, Any], pickled: Pickled) -> None:
        self._function = function
        self._options = options
        self._pickled = pickled

    def core(self) -> Core:
        return session.ensure()

    def signature(self) -> Signature:
        from ray._runtime import signature

        return signature.of_function(self._function)

    def streaming(self) -> bool:
        return opts.returns_of(self._options, generator=is_generator(self._function)) == opts.STREAMING

    def too_many(self, error: PendingCallsLimitExceeded) -> PendingCallsLimitExceeded:
        return error

    def template(self, core: Core) -> Template:
        from ray import _core

        options = self._options
        retry_exceptions = options.get("retry_exceptions", False)
        retries = options.get("max_retries")
        backpressure = options.get("_generator_backpressure_num_objects")
        demand = opts.demand_of_task(options)
        name = options.get("name") or str(getattr(self._function, "__name__", "function"))
        home = opts.home_of(options)
        meta: dict[str, Any] = {
            "retry_exceptions": retry_exceptions,
            "max_calls": opts.max_calls_of(options),
            "resources": demand,
        }
        env = opts.inherited_env(options.get("runtime_env"))
        if env:
            meta["runtime_env"] = env
        strategy = opts.strategy_of(options)
        if home is not None:
            home.check(f"task {name}", demand)
            meta["group"] = home.meta()
            demand, strategy = home.rewritten(demand), home.strategy()
        return _core.Template(
            core,
            blob=pickle_blob(self._pickled.get(core, self._function), meta, self._function),
            name=name,
            num_returns=opts.returns_of(options, generator=is_generator(self._function)),
            max_retries=opts.DEFAULT_MAX_RETRIES if retries is None else retries,
            retry_exceptions=bool(retry_exceptions),
            demand=demand,
            env=opts.encode_env(env),
            strategy=strategy,
            backpressure=-1 if backpressure is None else backpressure,
            recorded=options.get("enable_task_events", True),
        )


def is_generator(function: Any) -> bool:
    """Whether calls of the function yield."""
    code = getattr(function, "__code__", None)
    return code is not None and bool(code.co_flags & _GENERATOR_FLAGS)


def check_streaming(options: dict[str, Any], function: Any, name: str) -> None:
    """Raises ValueError when a function that cannot yield is asked to."""
    if options.get("num_returns") == "streaming" and hasattr(function, "__code__") and not is_generator(function):
        message = f"option 'num_returns' is 'streaming', but {name} is not a generator function: it has no yield"
        raise ValueError(message)


class RemoteFunction(Generic[P, R]):
    """A function that runs in a worker when called as `f.remote(...)`.

    `f.remote(...)` returns at once with an `ObjectRef` (a list of them when `num_returns` is above 1, None when it is
    0, an `ObjectRefGenerator` for generators). Arguments are copied; an `ObjectRef` that is an argument itself, not
    inside of another, is replaced by its value before the function runs. Unless options say otherwise a call holds one
    CPU while it runs, and is run again up to 3 times when its worker dies, though not when the function raises.
    """

    if TYPE_CHECKING:
        # Calls are checked against the function's own signature, until one of the first four arguments is a reference.
        # Whether one overload shadows another is decided by mypy for `Any`, which stands for every type; here the more
        # special ones come first on purpose.
        @overload
        def remote(  # type: ignore[overload-overlap]
            self: RemoteFunction[P, Iterator[T]], *args: P.args, **kwargs: P.kwargs
        ) -> ObjectRefGenerator[T]: ...
        @overload
        def remote(  # type: ignore[overload-overlap]
            self: RemoteFunction[P, AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs
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
        def remote(
            self, _0: Any, _1: Any, _2: Any, _3: ObjectRef[Any], /, *args: Any, **kwargs: Any
        ) -> ObjectRef[R]: ...
        def remote(self, *args: Any, **kwargs: Any) -> Any:
            """Submits a call and returns at once with its reference, or references, or generator."""

        __name__: str
        __qualname__: str

    def __init__(self, function: Callable[P, R], task_options: dict[str, Any], _pickled: Pickled | None = None) -> None:
        check_streaming(task_options, function, getattr(function, "__qualname__", repr(function)))
        self._function = function
        self._default_options = task_options
        self._pickled = Pickled() if _pickled is None else _pickled
        self._derived: dict[Any, RemoteFunction[P, R]] = {}
        self._complete()

    def _complete(self) -> None:
        function = self._function
        self.__wrapped__ = function
        self.__dict__["__doc__"] = None  # not this class's, when the function has none
        for name in _CARRIED:
            value = getattr(function, name, None)
            if value is not None:
                self.__dict__[name] = value
        recipe = _Recipe(function, self._default_options, self._pickled)
        remote: Any = calls.remote_callable(recipe)
        # What `inspect` and `help` look for. They find the signature through `__wrapped__`, when they are asked.
        remote.__wrapped__ = function
        remote.__name__ = getattr(function, "__name__", "remote")
        remote.__qualname__ = getattr(function, "__qualname__", "remote")
        remote.__doc__ = self.__dict__["__doc__"]
        self.__dict__["remote"] = remote

    @property
    def _function_name(self) -> str:
        function = self._function
        return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', '?')}"

    def options(self, **task_options: Any) -> RemoteFunction[P, R]:
        """This function with other options, for `f.options(...).remote(...)`. The function itself stays as it is.

        Args:
            task_options: What `ray.remote` takes for functions, except `max_calls`. See the guide on options.

        Raises:
            ValueError, TypeError: If an option does not exist or its value is not valid; the message names it.
        """
        try:
            key = tuple(sorted(task_options.items()))
            known = self._derived.get(key)
        except TypeError:  # values without order or hash, such as resources
            key, known = None, None
        if known is not None:
            return known
        if "max_calls" in task_options:
            message = "option 'max_calls' belongs to the function, not to a call: set it in @ray.remote(max_calls=...)"
            raise ValueError(message)
        opts.check(task_options, opts.TASK, "remote functions")
        derived = RemoteFunction(self._function, {**self._default_options, **task_options}, self._pickled)
        if key is not None and len(self._derived) < DERIVED_MAX:
            self._derived[key] = derived
        return derived

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a remote function is not called itself."""
        name = getattr(self._function, "__qualname__", "f")
        message = f"{name}() is a remote function; call {name}.remote(), or {name}.__wrapped__() to run it here"
        raise TypeError(message)

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self._function, "options": self._default_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The function may be a skeleton here, when it refers to itself: nothing but its identity may be used.
        self._function = state["function"]
        self._default_options = state["options"]
        self._pickled = Pickled()
        self._derived = {}
        self._complete()

    def __repr__(self) -> str:
        return f"RemoteFunction({self._function_name})"
