"""Actors: what `@ray.remote` makes of a class, and handles to running ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, TypeVar, Union, cast, overload

from ray._runtime import calls, session
from ray._runtime import options as opts
from ray._runtime.methods import OPTIONS_ATTRIBUTE, SPECIAL, ActorMethods, Method
from ray._runtime.words import kind_of
from ray.remote_function import Pickled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Never

    from ray._core import ActorHandleRef, Core, Template
    from ray._runtime.groups import Home
    from ray._runtime.ids import ActorID
    from ray._runtime.method_types import MarkedMethod, MethodDecorator
    from ray._runtime.signature import Signature
    from ray.exceptions import PendingCallsLimitExceeded

__all__ = [
    "ActorClass",
    "ActorClassInheritanceException",
    "ActorHandle",
    "ActorMethod",
    "ActorProxy",
    "exit_actor",
    "method",
]

T = TypeVar("T", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V")

GET_IF_EXISTS_ATTEMPTS = 10  # each one lost means that an actor of the name was born and died in between


class ActorClassInheritanceException(TypeError):
    """A class was derived from an actor class. Derive it from the plain class, and decorate both."""


# --- classes -------------------------------------------------------------------------------------------------------


class ActorClass(Generic[T]):
    """A class whose instances live in processes of their own: `handle = Counter.remote(...)`.

    Unless options say otherwise an actor needs a node with one CPU and then holds none, is not restarted when its
    process dies, and ends when the last handle to it is gone and the calls before are done.
    """

    _cls: type
    _options: dict[str, Any]

    def __init__(self, name: str, bases: tuple[Any, ...], attr: dict[str, Any]) -> None:
        _refuse_inheritance(name, bases)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (_Refusal,)  # which hears the new class's name

    @classmethod
    def _make(cls, user_class: type, options: dict[str, Any], pickled: Pickled | None = None) -> ActorClass[Any]:
        made = cls.__new__(cls)
        made._set(user_class, options, pickled)
        return made

    def _set(self, user_class: type, options: dict[str, Any], pickled: Pickled | None = None) -> None:
        self._cls = user_class
        self._options = options
        self._pickled = Pickled() if pickled is None else pickled
        self._signature: Signature | None = None
        self._described: ActorMethods | None = None
        self.__wrapped__ = user_class
        self.__dict__["__doc__"] = None  # not this class's, when the user's has none
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            value = getattr(user_class, name, None)
            if value is not None:
                self.__dict__[name] = value

    def options(self, **actor_options: Any) -> ActorClass[T]:
        """This class with other options, for `C.options(...).remote(...)`. The class itself stays as it is.

        Args:
            actor_options: What `ray.remote` takes for classes, except `concurrency_groups`. See the guide on options.

        Raises:
            ValueError, TypeError: If an option does not exist or its value is not valid; the message names it.
        """
        merged = {**self._options, **actor_options}
        opts.check(actor_options, opts.ACTOR, "actors")
        if "concurrency_groups" in actor_options:
            # The class's methods name the groups that they are in, so the two belong together.
            message = "option 'concurrency_groups' is for @ray.remote, beside the methods that name the groups"
            raise ValueError(message)
        if merged.get("get_if_exists") and not merged.get("name"):
            message = "option 'get_if_exists' needs option 'name'"
            raise ValueError(message)
        derived = ActorClass._make(self._cls, merged, self._pickled)
        derived._signature = self._signature
        return derived

    def remote(self, *args: Any, **kwargs: Any) -> ActorProxy[T]:
        """Starts an actor and returns a handle at once; calls made meanwhile wait for it.

        An exception in `__init__` is raised by `ray.get` of every call, as an `ActorDiedError`.

        Args:
            args: Arguments of `__init__`. References that are arguments themselves are replaced by their values.
            kwargs: Keyword arguments of `__init__`.

        Raises:
            TypeError: If the arguments do not fit `__init__`, or cannot be pickled.
            ActorAlreadyExistsError: If the name is taken and `get_if_exists` is not set.
        """
        core = session.ensure()
        signature = self._signature
        if signature is None:
            from ray._runtime.signature import of_class

            signature = self._signature = of_class(self._cls)
        signature.check(args, kwargs)
        options = self._options
        name = options.get("name")
        session.load_job()
        namespace = options.get("namespace") or session.namespace
        try:
            if name and options.get("get_if_exists"):
                made = self._get_or_create(core, name, namespace, args, kwargs)
            else:
                made = self._create(core, name, namespace, args, kwargs)
            return cast("ActorProxy[T]", made)
        except TypeError as error:
            from ray._runtime.serialization import name_argument

            named = name_argument(error, signature.name, signature.named(args, kwargs))
            raise named from named.__cause__

    def _get_or_create(
        self, core: Core, name: str, namespace: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ActorHandle[T]:
        from ray.exceptions import ActorAlreadyExistsError

        for _ in range(GET_IF_EXISTS_ATTEMPTS):
            found = _find(core, name, namespace)
            if found is not None:
                return found
            try:
                return self._create(core, name, namespace, args, kwargs)
            except ActorAlreadyExistsError:  # somebody else was faster
                continue
        message = f"actor {name!r} of namespace {namespace!r} appeared and vanished {GET_IF_EXISTS_ATTEMPTS} times"
        raise RuntimeError(message)

    def _create(
        self, core: Core, name: str | None, namespace: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ActorHandle[T]:
        from ray import _core
        from ray._runtime import methods

        options = self._options
        cls = self._cls
        described = self._describe()
        demand = opts.demand_of_actor(options)
        is_async = methods.is_async_class(cls)
        env = opts.inherited_env(options.get("runtime_env"))
        home = opts.home_of(options)
        place, run = demand.place, demand.run
        strategy = opts.strategy_of(options)
        if home is not None:
            home.check(f"actor {cls.__name__}", place, run)
            place, run, strategy = home.rewritten(place), home.rewritten(run), home.strategy()
        blob = self._blob(core, demand.run, namespace, env, home)
        concurrency = options.get("max_concurrency")
        if concurrency is None:
            concurrency = opts.ASYNC_MAX_CONCURRENCY if is_async else 1
        actor = core.next_actor_id()
        ref = _core.ActorHandleRef(actor, core.node)
        described.configure(core, actor)
        if name:
            _reserve(name, namespace, actor, described)
        core.create_actor(
            actor,
            blob=blob,
            args=args,
            kwargs=kwargs,
            place=place,
            run=run,
            env=opts.encode_env(env),
            strategy=strategy,
            name=name or "",
            namespace=namespace if name else "",
            class_name=cls.__name__,
            label=f"{cls.__name__}({name})" if name else cls.__name__,
            max_restarts=options.get("max_restarts") or 0,
            max_task_retries=options.get("max_task_retries") or 0,
            max_pending_calls=described.max_pending_calls,
            max_concurrency=concurrency,
            is_async=is_async,
            concurrency_groups=opts.groups_of("concurrency_groups", options.get("concurrency_groups")),
            detached=_or(options.get("lifetime"), session.default_actor_lifetime) == "detached",
            recorded=described.recorded,
        )
        return ActorHandle(ref, described)

    def _describe(self) -> ActorMethods:
        if self._described is None:
            from ray._runtime import methods

            self._described = methods.describe(self._cls, self._options)
        return self._described

    def _blob(self, core: Core, run: dict[str, int], namespace: str, env: dict[str, Any], home: Home | None) -> bytes:
        from ray.remote_function import pickle_blob

        carried = (
            "allow_out_of_order_execution",
            "concurrency_groups",
            "max_concurrency",
            "max_pending_calls",
            "max_task_retries",
            "name",
        )
        meta = {
            "options": {name: self._options[name] for name in carried if name in self._options},
            "resources": run,
            "namespace": namespace,
            "runtime_env": env,
            "group": None if home is None else home.meta(),
        }
        return pickle_blob(self._pickled.get(core, self._cls), meta, self._cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: an actor class is not called itself."""
        name = self._cls.__qualname__
        message = f"{name} is an actor class; use {name}.remote(), or {name}.__wrapped__() for a plain instance"
        raise TypeError(message)

    if not TYPE_CHECKING:  # which takes the class itself for what `@ray.remote` makes of it

        def __getattr__(self, name: str) -> Any:
            """Attributes of the class, its static and class methods: here, and not in any actor."""
            cls = self.__dict__.get("_cls")
            if cls is None or (name.startswith("__") and name.endswith("__")):
                message = f"an actor class has no attribute {name!r}"
                raise AttributeError(message)
            try:
                return getattr(cls, name)
            except AttributeError:
                message = f"actor class {cls.__qualname__} has no attribute {name!r}"
                raise AttributeError(message) from None

    def __getstate__(self) -> tuple[type, dict[str, Any]]:
        return self._cls, self._options

    def __setstate__(self, state: tuple[type, dict[str, Any]]) -> None:
        self._set(*state)

    def __repr__(self) -> str:
        return f"ActorClass({self._cls.__name__})"


class _Refusal:
    """What a class derives from that was written to derive from an actor class."""

    def __init_subclass__(cls) -> None:
        _refuse_inheritance(cls.__name__, cls.__dict__.get("__orig_bases__", ()))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse_inheritance(name: str, bases: tuple[Any, ...]) -> NoReturn:
    parents = ", ".join(base._cls.__qualname__ for base in bases if isinstance(base, ActorClass))
    message = (
        f"{name} cannot inherit from the actor class {parents}. Keep a plain class to inherit from, and make actor "
        "classes of it and its children with ray.remote(...)."
    )
    raise ActorClassInheritanceException(message)


# --- handles -------------------------------------------------------------------------------------------------------


class ActorHandle(Generic[T]):
    """A running actor, seen from anywhere. Methods are called as `handle.method.remote(...)`.

    Calls of one caller to one actor run in the order in which they were made, unless the actor is asynchronous,
    threaded or has concurrency groups. Handles can be passed to tasks and actors, compared and hashed. An actor lives
    as long as a handle to it exists, unless it is detached.
    """

    _ray_ref: ActorHandleRef
    _ray_methods: ActorMethods

    def __init__(self, ref: ActorHandleRef, methods: ActorMethods) -> None:
        self._ray_ref = ref
        self._ray_methods = methods

    @property
    def _actor_id(self) -> ActorID:
        from ray._runtime.ids import ActorID

        return ActorID(self._ray_ref.binary())

    _ray_actor_id = _actor_id

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> ActorMethod: ...

    else:

        def __getattr__(self, name: str) -> ActorMethod:
            methods = self.__dict__.get("_ray_methods")
            if methods is None:  # an instance under construction, as copy and pickle make them
                raise AttributeError(name)
            found = methods.methods.get(name) or SPECIAL.get(name)
            if found is None:
                message = f"actor class {methods.class_name} has no method {name!r}"
                raise AttributeError(message)
            made = ActorMethod(self._ray_ref, methods, name, found)
            self.__dict__[name] = made  # found without this function from now on
            return made

    def __dir__(self) -> list[str]:
        return sorted({*self._ray_methods.methods, *SPECIAL})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and self._ray_ref.binary() == other._ray_ref.binary()

    def __hash__(self) -> int:
        return hash(self._ray_ref.binary())

    def __repr__(self) -> str:
        return f"Actor({self._ray_methods.class_name}, {self._ray_ref.binary().hex()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_handle, (self._ray_ref, self._ray_methods.to_bytes())


if TYPE_CHECKING:

    class _Proxied(ActorHandle[T]):
        """The half of `ActorProxy` that knows no methods, so that the class's alone are seen."""

        def __getattr__(self, name: str) -> Never: ...

else:
    _Proxied = ActorHandle

ActorProxy = Union[_Proxied[V], type[V]]  # noqa: UP007 (an alias with a parameter)
"""What a type checker takes the handle of a known class for; at run time it is an `ActorHandle`."""


def _rebuild_handle(ref: ActorHandleRef, methods: bytes) -> ActorHandle[Any]:
    return _adopt(ref, ActorMethods.from_bytes(methods))


def _adopt(ref: ActorHandleRef, methods: ActorMethods) -> ActorHandle[Any]:
    """A handle to an actor that another process may have created."""
    methods.configure(session.core, ref.binary())
    return ActorHandle(ref, methods)


class _MethodRecipe:
    """How calls of an actor's method are submitted."""

    __slots__ = ("_core", "_described", "_method", "_name", "_options", "_ref")

    def __init__(
        self, ref: ActorHandleRef, described: ActorMethods, name: str, method: Method, options: dict[str, Any]
    ) -> None:
        self._ref = ref
        self._described = described
        self._name = name
        self._method = method
        self._options = options
        self._core = session.core

    def core(self) -> Core:
        core = session.require()
        if self._core is not core:
            from ray.exceptions import ActorHandleNotFoundError

            message = f"this handle to {self._described.class_name} belongs to a cluster that was shut down"
            raise ActorHandleNotFoundError(message)
        return core

    def signature(self) -> Signature:
        return self._method.signature

    def streaming(self) -> bool:
        return opts.returns_of(self._options, generator=self._method.generator) == opts.STREAMING

    def too_many(self, error: PendingCallsLimitExceeded) -> PendingCallsLimitExceeded:
        cls = self._described.class_name
        message = (
            f"{cls}.{self._name}() was not called: {error}, and the option max_pending_calls of {cls} is "
            f"{self._described.max_pending_calls}. Wait for some of them with ray.wait() or ray.get(), or set a higher "
            "max_pending_calls in @ray.remote or .options()."
        )
        return type(error)(message)

    def template(self, core: Core) -> Template:
        from ray import _core
        from ray._runtime import serialization

        options = self._options
        backpressure = options.get("_generator_backpressure_num_objects")
        retries = options.get("max_task_retries")
        chosen = options.get("retry_exceptions")
        retryable = b""  # the method is the actor's, but what it may raise and be run again is the caller's choice
        if isinstance(chosen, list | tuple):
            retryable = serialization.dumps([serialization.dumps(kind) for kind in chosen])
        return _core.Template(
            core,
            blob=retryable,
            name=options.get("name") or f"{self._described.class_name}.{self._name}",
            num_returns=opts.returns_of(options, generator=self._method.generator),
            max_retries=self._described.max_task_retries if retries is None else retries,
            retry_exceptions=bool(options.get("retry_exceptions", False)),
            actor=self._ref,
            method=self._name,
            concurrency_group=options.get("concurrency_group") or "",
            backpressure=-1 if backpressure is None else backpressure,
            recorded=options.get("enable_task_events", self._described.recorded),
        )


class ActorMethod:
    """A method of a running actor."""

    __slots__ = ("_described", "_method", "_name", "_options", "_ref", "remote")

    remote: Callable[..., Any]
    """Calls the method; returns an `ObjectRef`, or what `num_returns` says, at once."""

    def __init__(
        self,
        actor: ActorHandleRef,
        methods: ActorMethods,
        method_name: str,
        method: Method,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._ref = actor
        self._described = methods
        self._name = method_name
        self._method = method
        self._options = method.options if options is None else options
        self.remote = calls.remote_callable(_MethodRecipe(actor, methods, method_name, method, self._options))

    def options(self, **options: Any) -> ActorMethod:
        """This method with other options, for `handle.method.options(...).remote(...)`.

        Args:
            options: `num_returns`, `concurrency_group`, `max_task_retries`, `retry_exceptions`, `name`.

        Raises:
            ValueError, TypeError: If an option does not exist or its value is not valid; the message names it.
        """
        opts.check(options, opts.METHOD, "actor methods")
        group = options.get("concurrency_group")
        if group is not None and group not in self._described.groups:
            groups = list(self._described.groups)
            message = f"{self._described.class_name} has no concurrency group {group!r}; it has {groups}"
            raise ValueError(message)
        if options.get("num_returns") == "streaming" and not self._method.generator and self._name not in SPECIAL:
            message = f"option 'num_returns' is 'streaming', but {self._name} is not a generator: it has no yield"
            raise ValueError(message)
        return ActorMethod(self._ref, self._described, self._name, self._method, {**self._options, **options})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a method of an actor is not called itself."""
        message = f"{self._name}() is a method of an actor; call {self._name}.remote()"
        raise TypeError(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_method, (self._ref, self._described.to_bytes(), self._name, self._options)

    def __repr__(self) -> str:
        return f"ActorMethod({self._described.class_name}.{self._name}, {self._ref.binary().hex()})"


def _rebuild_method(ref: ActorHandleRef, methods: bytes, name: str, options: dict[str, Any]) -> ActorMethod:
    described = ActorMethods.from_bytes(methods)
    described.configure(session.core, ref.binary())
    return ActorMethod(ref, described, name, described.methods.get(name) or SPECIAL[name], options)


# --- functions -----------------------------------------------------------------------------------------------------


@overload  # A coroutine's result is what its reference stands for.
def method(
    function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
) -> MarkedMethod[P, Coroutine[Any, Any, R], R]: ...
@overload
def method(function: Callable[Concatenate[Any, P], R], /) -> MarkedMethod[P, R, R]: ...
@overload
def method(**kwargs: Any) -> MethodDecorator: ...


def method(*args: Any, **kwargs: Any) -> Any:
    """Options of one method of an actor class: `@ray.method(num_returns=2)`.

    As plain `@ray.method` it says nothing at run time. In both forms it lets type checkers see the method's parameters
    and result in `handle.method.remote(...)`.

    Args:
        args: The method, where there are no options.
        kwargs: `num_returns`, `concurrency_group`, `max_task_retries`, `retry_exceptions`.

    Raises:
        ValueError, TypeError: If an option does not exist or its value is not valid; the message names it.
    """
    if len(args) == 1 and not kwargs and (callable(args[0]) or isinstance(args[0], staticmethod | classmethod)):
        return args[0]
    if args:
        message = "ray.method is used as @ray.method, or with options by name: @ray.method(num_returns=2)"
        raise TypeError(message)
    opts.check(kwargs, opts.METHOD, "actor methods")

    def mark(function: Any) -> Any:
        setattr(function, OPTIONS_ATTRIBUTE, dict(kwargs))
        return function

    return mark


class ActorExit(SystemExit):
    """Unwinds the call, or the thread, that ends its actor. Not an Exception, so that user code does not swallow it."""


def exit_actor() -> NoReturn:
    """Ends the actor in which it is called, for good: no restart.

    Called anywhere in the actor: in a method, in a thread or asyncio task that it has started. Calls that run end as
    if nothing had happened; none is started any more. The call that does it and those that wait raise `ActorDiedError`
    for their callers, whatever the call does with the exception. Functions registered with `atexit` run.

    Raises:
        TypeError: If this process is not an actor.
    """
    from ray._runtime import context

    worker = context.worker
    if context.actor is None or worker is None:
        message = "exit_actor() was called outside of an actor; it ends the actor that calls it"
        raise TypeError(message)
    worker.exit_actor("the actor called exit_actor()")


def get_actor(name: str, namespace: str | None = None) -> ActorHandle[Any]:
    """A handle to a named actor.

    Args:
        name: The name that it was created with.
        namespace: Where to look; this program's namespace by default.

    Raises:
        ValueError: If there is no living actor of this name.
    """
    if not isinstance(name, str) or not name:
        message = f"get_actor() needs a name that is a string and not empty, not {name!r}"
        raise ValueError(message)
    opts.check_text("name", name)
    if namespace is not None and (not isinstance(namespace, str) or not namespace):
        message = f"namespace must be a string that is not empty, or None, not {namespace!r}"
        raise ValueError(message)
    if namespace is not None:
        opts.check_text("namespace", namespace)
    core = session.ensure()
    session.load_job()
    space = namespace or session.namespace
    found = _find(core, name, space)
    if found is None:
        message = (
            f"there is no actor {name!r} in namespace {space!r}: it was never created, it died, or it lives in another "
            "namespace. ray.util.list_named_actors(all_namespaces=True) lists what there is."
        )
        raise ValueError(message)
    return found


def _find(core: Core, name: str, namespace: str) -> ActorHandle[Any] | None:
    from ray import _core

    try:
        info = session.request("actor.by_name", name=name, namespace=namespace)
    except (ValueError, KeyError):
        return None
    ref = _core.ActorHandleRef(info["actor"], info["owner_node"])
    return _adopt(ref, ActorMethods.from_bytes(info["meta"]))


def _reserve(name: str, namespace: str, actor: bytes, described: ActorMethods) -> None:
    from ray.exceptions import ActorAlreadyExistsError

    try:
        session.request("actor.reserve_name", name=name, namespace=namespace, actor=actor, meta=described.to_bytes())
    except ValueError:
        message = (
            f"the name {name!r} is taken by another actor of namespace {namespace!r}. Choose another, or use "
            f"get_if_exists=True or ray.get_actor({name!r})."
        )
        raise ActorAlreadyExistsError(message) from None


def kill(actor: ActorHandle[Any] | type[Any], *, no_restart: bool = True) -> None:
    """Ends an actor at once, in the middle of what it does. Its unfinished calls raise `ActorDiedError`.

    Args:
        actor: The handle.
        no_restart: False lets it restart if it has restarts left.

    Raises:
        ValueError: If `actor` is not a handle.
    """
    if not isinstance(actor, ActorHandle):
        hint = " Use ray.cancel() for tasks." if type(actor).__name__ == "ObjectRef" else ""
        message = f"ray.kill() takes the handle of an actor, not {kind_of(actor)}.{hint}"
        raise ValueError(message)
    session.ensure().kill_actor(actor._ray_ref.binary(), no_restart)
