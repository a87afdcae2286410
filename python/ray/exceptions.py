"""Exceptions that Ray programs catch.

    RayError
    ├── RayTaskError                    user code raised; also an instance of the user's class
    ├── TaskCancelledError
    ├── TaskUnschedulableError · ActorUnschedulableError
    ├── WorkerCrashedError              the process died under a task
    ├── RayActorError
    │   ├── ActorDiedError              for good
    │   └── ActorUnavailableError       for the moment
    ├── ObjectLostError
    │   ├── OwnerDiedError
    │   ├── ObjectFreedError
    │   ├── ObjectFetchTimedOutError
    │   ├── ObjectReconstructionFailedError
    │   └── ReferenceCountingAssertionError (AssertionError)
    ├── GetTimeoutError (TimeoutError)
    ├── ObjectStoreFullError · OutOfDiskError · OutOfMemoryError
    ├── PendingCallsLimitExceeded
    ├── ActorAlreadyExistsError (ValueError) · ActorHandleNotFoundError (ValueError)
    ├── NodeDiedError · LocalRayletDiedError · RpcError · AuthenticationError
    ├── RuntimeEnvSetupError
    ├── TaskPlacementGroupRemoved · ActorPlacementGroupRemoved
    ├── UnserializableException · OufOfBandObjectRefSerializationException
    ├── AsyncioActorExit · CrossLanguageError · PlasmaObjectNotAvailable
    ├── ObjectRefStreamEndOfStreamError · UserCodeException
    └── RaySystemError
        ├── RayChannelError
        │   └── RayChannelTimeoutError (TimeoutError)
        ├── RayCgraphCapacityExceeded
        ├── RayDirectTransportError
        └── StreamingGeneratorReplayInconsistentError

A message has the cause, the place, and what to do next.
"""

from __future__ import annotations

from types import GetSetDescriptorType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ray._runtime.ids import TaskID

__all__ = [
    "RAY_EXCEPTION_TYPES",
    "ActorAlreadyExistsError",
    "ActorDiedError",
    "ActorHandleNotFoundError",
    "ActorPlacementGroupRemoved",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "AsyncioActorExit",
    "AuthenticationError",
    "CrossLanguageError",
    "GetTimeoutError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectFetchTimedOutError",
    "ObjectFreedError",
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "ObjectRefStreamEndOfStreamError",
    "ObjectStoreFullError",
    "OufOfBandObjectRefSerializationException",
    "OutOfDiskError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceeded",
    "PlasmaObjectNotAvailable",
    "RayActorError",
    "RayCgraphCapacityExceeded",
    "RayChannelError",
    "RayChannelTimeoutError",
    "RayDirectTransportError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "ReferenceCountingAssertionError",
    "RpcError",
    "RuntimeEnvSetupError",
    "StreamingGeneratorReplayInconsistentError",
    "TaskCancelledError",
    "TaskPlacementGroupRemoved",
    "TaskUnschedulableError",
    "UnserializableException",
    "UserCodeException",
    "WorkerCrashedError",
]


class RayError(Exception):
    """Base of everything the engine raises about its own work or about remote code."""

    def to_bytes(self) -> bytes:
        """This exception, pickled; `from_bytes` is the inverse."""
        from ray._runtime import serialization

        return serialization.dumps(self)

    @staticmethod
    def from_bytes(b: bytes) -> RayError:
        """The exception that `to_bytes` made these bytes from.

        Raises:
            TypeError: If the bytes hold something that is not a RayError.
        """
        from ray._runtime import serialization
        from ray._runtime.words import kind_of

        error = serialization.loads(b)
        if not isinstance(error, RayError):
            message = f"these bytes hold {kind_of(error)}, not a RayError"
            raise TypeError(message)
        return error


class CrossLanguageError(RayError):
    """A task of another language raised; only Python is supported, so this is never raised."""


class TaskCancelledError(RayError):
    """The task was cancelled by `ray.cancel`, by the death of its caller, or by its parent's end.

    Attributes:
        task_id: The cancelled task, when it is known.
    """

    def __init__(self, task_id: TaskID | None = None, error_message: str | None = None) -> None:
        super().__init__(task_id, error_message)
        self.task_id = task_id
        self.error_message = error_message

    def __str__(self) -> str:
        if self.error_message and "cancelled" in self.error_message:
            return self.error_message
        what = "This task was cancelled" if self.task_id is None else f"Task {self.task_id.hex()} was cancelled"
        return f"{what}: {self.error_message}" if self.error_message else f"{what}."


# Instances of a dual class are also instances of the user's exception class. One per user class.
_dual_classes: dict[type[BaseException], type[RayTaskError]] = {}
_DUAL_CLASSES_MAX = 1024  # beyond it classes are made anew: slower, never wrong

_NOT_COPIED = frozenset(
    ("__dict__", "__weakref__", "args", "__traceback__", "__cause__", "__context__", "__suppress_context__")
)


class RayTaskError(RayError):
    """User code raised an exception in a task or an actor method.

    `ray.get` raises an instance that is also an instance of the user's exception class, so that both
    `except RayTaskError` and `except ValueError` catch it. Its text begins with where it ran and the
    traceback there.

    Attributes:
        cause: The user's exception, without its traceback. When it could not travel, an `UnserializableException` that
            says why; this error is an instance of that, too.
        function_name: The task's function or the actor's method.
        traceback_str: The remote traceback as text.
        pid: The process where it was raised.
        ip: The node where it was raised.
        actor_repr: `repr()` of the actor, when a method raised.
        actor_id: The actor's id in hex, when a method raised.
    """

    def __init__(
        self,
        function_name: str,
        traceback_str: str,
        cause: BaseException | None,
        proctitle: str | None = None,
        pid: int | None = None,
        ip: str | None = None,
        actor_repr: str | None = None,
        actor_id: str | None = None,
    ) -> None:
        super().__init__(function_name, traceback_str, cause)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        self.proctitle = proctitle or f"ray::{function_name}"
        self.pid = pid
        self.ip = ip
        self.actor_repr = actor_repr
        self.actor_id = actor_id

    def as_instanceof_cause(self) -> RayTaskError:
        """An equal error that is also an instance of the cause's class; this one where Python forbids that."""
        cause = _root(self.cause)
        if cause is None or isinstance(self, type(cause)):
            return self
        try:
            return self.make_dual_exception_instance()
        except TypeError:  # final classes, or memory layouts that exclude each other
            return self

    def make_dual_exception_instance(self) -> RayTaskError:
        """Like `as_instanceof_cause`, but raises TypeError where the two classes cannot be combined."""
        cause = _root(self.cause)
        if cause is None:
            message = "this error has no cause"
            raise TypeError(message)
        dual = _dual_class(type(cause))
        # A group is made with its parts, which `except*` looks at.
        parts = (cause.message, cause.exceptions) if isinstance(cause, BaseExceptionGroup) else ()
        error = dual(*parts)
        error.__dict__.update(self.__dict__)
        error.args = (cause,)
        error.cause = cause
        _copy_native_fields(type(cause), cause, error)
        return error

    def __str__(self) -> str:
        return self.traceback_str

    def __reduce__(self) -> tuple[Any, ...]:
        from ray._runtime import serialization

        fields = {k: v for k, v in self.__dict__.items() if k in _TASK_ERROR_FIELDS}
        # The cause is pickled on its own: a class that the reader lacks costs the cause, not the error.
        blob = None if self.cause is None else serialization.dump_cause(self.cause, self.traceback_str)
        return _rebuild_task_error, (fields, blob, isinstance(self, _Dual))


def _root(cause: BaseException | None) -> BaseException | None:
    """The user's exception under any number of tasks through which it passed."""
    while isinstance(cause, RayTaskError) and cause.cause is not None:
        cause = cause.cause
    return cause


_TASK_ERROR_FIELDS = frozenset(("function_name", "traceback_str", "proctitle", "pid", "ip", "actor_repr", "actor_id"))


class _Dual:
    """Marks the classes that `_dual_class` makes."""

    cause: BaseException

    def __init__(self, *_parts: object) -> None:
        """Nothing: the fields are copied, and the cause's own `__init__` has run where it was raised."""

    def __getattr__(self, name: str) -> Any:
        if name == "cause":
            raise AttributeError(name)
        return getattr(self.cause, name)

    def __str__(self) -> str:
        text: str = self.__dict__.get("traceback_str", "")
        cause = self.__dict__.get("cause")
        return cause.explain(text) if isinstance(cause, UnserializableException) else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.cause!r})"


def _dual_class(cause: type[BaseException]) -> type[RayTaskError]:
    known = _dual_classes.get(cause)
    if known is not None:
        return known
    name = f"RayTaskError({cause.__name__})"
    body = {"__module__": "ray.exceptions", "__qualname__": name, "__reduce__": RayTaskError.__reduce__}
    made: type[RayTaskError] = type(name, (_Dual, RayTaskError, cause), body)
    if len(_dual_classes) < _DUAL_CLASSES_MAX:
        _dual_classes[cause] = made
    return made


def _copy_native_fields(cls: type, source: object, target: object) -> None:
    """Copies what `__getattr__` cannot reach: `errno`, `code`, `value` and other slots of built-in classes."""
    for base in cls.__mro__:
        for name, member in vars(base).items():
            if name.startswith("__"):  # among them __class__, which would make the error a plain one again
                continue
            if isinstance(member, (GetSetDescriptorType, MemberDescriptorType)) and name not in _NOT_COPIED:
                try:
                    setattr(target, name, getattr(source, name))
                except (AttributeError, TypeError):
                    continue


def _rebuild_task_error(fields: dict[str, Any], blob: bytes | None, dual: bool) -> RayTaskError:
    from ray._runtime import serialization

    cause = None if blob is None else serialization.load_cause(blob, fields["traceback_str"])
    error = RayTaskError(fields["function_name"], fields["traceback_str"], cause)
    error.__dict__.update(fields)
    return error.as_instanceof_cause() if dual else error


class WorkerCrashedError(RayError):
    """The worker died while it ran the task: a signal, the memory watch, `os._exit`, or a native crash."""

    def __str__(self) -> str:
        return super().__str__() or "The worker died unexpectedly while it ran this task."


class RayActorError(RayError):
    """A call could not be finished because of its actor.

    Attributes:
        actor_id: The actor's id in hex, when it is known.
    """

    BASE_ERROR_MSG: ClassVar[str] = "The actor failed before it finished this call."

    def __init__(
        self,
        actor_id: str | None = None,
        error_msg: str = BASE_ERROR_MSG,
        actor_init_failed: bool = False,
        preempted: bool = False,
    ) -> None:
        super().__init__(error_msg)
        self.actor_id = actor_id
        self.error_msg = error_msg
        self._actor_init_failed = actor_init_failed
        self._preempted = preempted

    @property
    def preempted(self) -> bool:
        """Whether the actor's node was taken away on purpose."""
        return self._preempted

    @property
    def actor_init_failed(self) -> bool:
        """Whether the actor's `__init__` raised."""
        return self._actor_init_failed

    def __str__(self) -> str:
        return self.error_msg

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self.actor_id, self.error_msg, self._actor_init_failed, self._preempted)
        return _rebuild_actor_error, (type(self), state)


def _rebuild_actor_error(cls: type[RayActorError], state: tuple[Any, ...]) -> RayActorError:
    error = cls.__new__(cls)
    RayActorError.__init__(error, *state)
    return error


class ActorDiedError(RayActorError):
    """The actor is dead for good. The text says why: killed, left, out of restarts, or `__init__` raised.

    Args:
        cause: What `__init__` raised, or the reason as text.
    """

    BASE_ERROR_MSG: ClassVar[str] = "The actor died before it finished this call."

    def __init__(self, cause: RayTaskError | str | None = None) -> None:
        if isinstance(cause, RayTaskError):
            message = f"The actor died because its __init__ raised:\n{cause}"
            super().__init__(cause.actor_id, message, actor_init_failed=True)
            self.__cause__ = cause
        else:
            super().__init__(None, cause or self.BASE_ERROR_MSG)

    @staticmethod
    def from_task_error(task_error: RayTaskError) -> ActorDiedError:
        """The error for callers of an actor whose `__init__` raised `task_error`."""
        return ActorDiedError(task_error)


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached now, but may come back. The call may or may not have run."""

    def __init__(self, error_message: str, actor_id: bytes | None = None) -> None:
        super().__init__(None if actor_id is None else actor_id.hex(), error_message)


class RaySystemError(RayError):
    """The engine itself failed, or a value could not be read back.

    Attributes:
        client_exc: What was raised.
        traceback_str: Its traceback as text, when there is one.
    """

    def __init__(self, client_exc: BaseException | str, traceback_str: str | None = None) -> None:
        super().__init__(client_exc, traceback_str)
        self.client_exc = client_exc
        self.traceback_str = traceback_str

    def __str__(self) -> str:
        text = f"System error: {self.client_exc}"
        return f"{text}\n{self.traceback_str}" if self.traceback_str else text


class AuthenticationError(RayError):
    """The cluster refused the token, or none was given."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UserCodeException(RayError):
    """User code that a library ran for the user raised an exception."""


class ObjectStoreFullError(RayError):
    """There is no room for the value. The text names what holds most of the store."""


class OutOfDiskError(RayError):
    """There is no room for the value, in the store nor on the disk for spilled ones. The text says which disk."""


class OutOfMemoryError(RayError):
    """The node ended the worker because memory ran short, or the kernel did; the text says who used what.

    A task that is ended beside others of its owner is repeated when there is room, if its `max_retries` is not 0:
    `RAY_task_oom_retries` times, without limit by default. This is raised where that would not help.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NodeDiedError(RayError):
    """A node died, or was cut off."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ObjectLostError(RayError):
    """Every copy of the value is gone.

    Attributes:
        object_ref_hex: The reference, in hex.
        owner_address: The process that owns it, when it is known.
        call_site: Where it was created, when that is recorded.
    """

    def __init__(
        self, object_ref_hex: str, owner_address: bytes | None = None, call_site: str = "", reason: str = ""
    ) -> None:
        super().__init__(object_ref_hex, owner_address, call_site, reason)
        self.object_ref_hex = object_ref_hex
        self.owner_address = owner_address
        self.call_site = call_site.replace("\\n", "\n") if call_site else ""
        self.reason = reason

    _WHAT: ClassVar[str] = "its copies are gone and it could not be made again"

    def __str__(self) -> str:
        reason = (self.reason or self._WHAT).rstrip(".")
        # Where the engine itself says it, it begins with the object.
        begin = "" if reason.startswith("Object ") else f"Object {self.object_ref_hex} cannot be had: "
        text = f"{begin}{reason}."
        return f"{text}\nIt was created at {self.call_site}." if self.call_site else text


class ObjectFetchTimedOutError(ObjectLostError):
    """The value could not be fetched from another node within its deadline."""

    _WHAT = "no node that holds it answered in time"


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The value was freed while a reference existed. This is a defect of the engine; please report it."""

    _WHAT = "it was freed while it was referenced, which is a defect of the engine"


class OwnerDiedError(ObjectLostError):
    """The process that owned the reference died before the value was there."""

    _WHAT = "the process that owned it died"


class ObjectFreedError(ObjectLostError):
    """The value was freed by hand."""

    _WHAT = "it was freed"


class ObjectReconstructionFailedError(ObjectLostError):
    """The value was lost and could not be made again from its task.

    Attributes:
        reason_message: Why not.
    """

    _WHAT = "it was lost and could not be made again"

    def __init__(
        self,
        object_ref_hex: str,
        reason: Any = None,
        reason_message: str | None = None,
        owner_address: bytes | None = None,
        call_site: str = "",
    ) -> None:
        super().__init__(object_ref_hex, owner_address, call_site, reason_message or "")
        self.args = (object_ref_hex, reason, reason_message, owner_address, call_site)
        self.reason_message = reason_message


class GetTimeoutError(RayError, TimeoutError):
    """`ray.get` reached its deadline. The text says what the first missing value waits for."""


class PlasmaObjectNotAvailable(RayError):
    """The value is not in this node's store. Kept for code that catches it; never raised."""


class AsyncioActorExit(RayError):
    """Leaves an asyncio actor. Kept for code that catches it; `ray.actor.exit_actor` is the way."""


class RuntimeEnvSetupError(RayError):
    """The runtime environment of a task or actor could not be made."""

    def __init__(self, error_message: str | None = None) -> None:
        super().__init__(error_message)
        self.error_message = error_message

    def __str__(self) -> str:
        text = "The runtime environment could not be set up."
        return f"{text} {self.error_message}" if self.error_message else text


class TaskPlacementGroupRemoved(RayError):
    """The placement group that the task was to run in is gone."""

    def __str__(self) -> str:
        return super().__str__() or "The placement group of this task was removed."


class ActorPlacementGroupRemoved(RayError):
    """The placement group that the actor was to run in is gone."""

    def __str__(self) -> str:
        return super().__str__() or "The placement group of this actor was removed."


class PendingCallsLimitExceeded(RayError):
    """The actor has `max_pending_calls` unfinished calls of this caller already."""


class LocalRayletDiedError(RayError):
    """This node's manager process died, and the work on the node with it."""

    def __str__(self) -> str:
        return super().__str__() or "The node's manager process died; everything that ran on the node is gone."


class TaskUnschedulableError(RayError):
    """The task can never run as it was asked for."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message

    def __str__(self) -> str:
        return f"The task can never run: {self.error_message}"


class ActorUnschedulableError(RayError):
    """The actor can never be placed as it was asked for."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message

    def __str__(self) -> str:
        return f"The actor can never be placed: {self.error_message}"


class ObjectRefStreamEndOfStreamError(RayError):
    """A generator has no further item."""


class OufOfBandObjectRefSerializationException(RayError):
    """A reference was pickled outside of the engine, where nobody counts it."""


class RayChannelError(RaySystemError):
    """A channel of a compiled graph failed."""


class RayChannelTimeoutError(RayChannelError, TimeoutError):
    """A channel of a compiled graph reached its deadline."""


class RayCgraphCapacityExceeded(RaySystemError):
    """A compiled graph has as many unread executions as it may."""


class RayDirectTransportError(RaySystemError):
    """A direct transfer between devices failed."""


class StreamingGeneratorReplayInconsistentError(RaySystemError):
    """A generator that was run again yielded another number of items than the first time."""


class UnserializableException(RayError):
    """The exception could not be pickled there, or not be read here. The text has its traceback, and the reason.

    Attributes:
        original_stack_trace: The remote traceback.
        reason: Why, as a clause; may be empty.
    """

    def __init__(self, original_stack_trace: str, reason: str = "") -> None:
        super().__init__(original_stack_trace, reason)
        self.original_stack_trace = original_stack_trace
        self.reason = reason

    def __str__(self) -> str:
        return self.explain(self.original_stack_trace)

    def explain(self, traceback_str: str) -> str:
        """The text for a traceback in which this exception stands in for the user's."""
        reason = self.reason.rstrip(".") or "its class must pickle, and be importable here"
        return f"{traceback_str}\n\nThe exception itself could not be brought over: {reason}."


class ActorAlreadyExistsError(ValueError, RayError):
    """The name is taken by another actor of the namespace."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message


class ActorHandleNotFoundError(ValueError, RayError):
    """The actor behind the handle is not of this cluster."""

    def __init__(self, error_message: str) -> None:
        super().__init__(error_message)
        self.error_message = error_message


class RpcError(RayError):
    """A request to another process of the cluster failed.

    Attributes:
        rpc_code: A number for the reason, when there is one.
    """

    def __init__(self, message: str, rpc_code: int | None = None) -> None:
        super().__init__(message, rpc_code)
        self.message = message
        self.rpc_code = rpc_code

    def __str__(self) -> str:
        return self.message


RAY_EXCEPTION_TYPES: list[type[RayError]] = [
    cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, RayError)
]
