"""Values to bytes and back, and what the core's hooks are.

A value becomes a pickle stream (protocol 5) and a list of buffers beside it; numpy, Arrow and other buffer owners are
never copied here. C pickle does the work. It asks `_Pickler.reducer_override` about each object that is not a plain
builtin, and only functions, classes and modules go on to cloudpickle from there. What `copyreg` and cloudpickle know
by type is one flat dict, because C pickle is several times slower with any other mapping.

Readers get read-only buffers on shared memory, so arrays come back with `flags.writeable` False.

Invariant: whatever `dump` accepts, `load` gives back in any process of the cluster that can import the same modules.
"""

from __future__ import annotations

import io
import pickle
import sys
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ray._runtime.words import a

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "deregister_serializer",
    "dump",
    "dumps",
    "load",
    "load_error",
    "loads",
    "name_argument",
    "register_serializer",
]

PROTOCOL = 5

# A large top-level `bytes` travels beside the stream: pickled inside, it would be copied once more on each side.
BYTES_BESIDE_MIN = 64 * 1024

_PLAIN = frozenset((type(None), bool, int, float, str))

_custom: dict[type, Callable[[Any], tuple[Any, ...]]] = {}
_pickler: type[pickle.Pickler] | None = None
_table: dict[type, Any] = {}
_table_source: dict[type, Any] = {}  # what `copyreg` had when the table was made


class _BytesBeside:
    """Reduces to `bytes(buffer)`, so that the content goes out of band."""

    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (pickle.PickleBuffer(self.content),)


def dump(value: Any) -> tuple[bytes, list[Any]]:
    """Pickles a value: the stream, and the buffers that go beside it in order.

    Raises:
        TypeError: If the value cannot be pickled; the message says which part of it.
    """
    kind = type(value)
    if kind in _PLAIN:
        return pickle.dumps(value, PROTOCOL), []
    buffers: list[Any] = []
    if kind is bytes:
        if len(value) < BYTES_BESIDE_MIN:
            return pickle.dumps(value, PROTOCOL), buffers
        value = _BytesBeside(value)
    out = io.BytesIO()
    try:
        _make_pickler(out, buffers.append).dump(value)
    except Exception as error:
        raise _explain(value, error) from error
    return out.getvalue(), buffers


def dumps(value: Any) -> bytes:
    """Pickles a value into one piece.

    Raises:
        TypeError: If the value cannot be pickled; the message says which part of it.
    """
    out = io.BytesIO()
    try:
        _make_pickler(out, None).dump(value)
    except Exception as error:
        raise _explain(value, error) from error
    return out.getvalue()


def loads(data: bytes) -> Any:
    """The inverse of `dumps`."""
    return pickle.loads(data)


def load(stream: Any, buffers: list[Any]) -> Any:
    """The inverse of `dump`.

    Raises:
        RaySystemError: If the value cannot be read here, as when its module is missing.
    """
    try:
        return pickle.loads(stream, buffers=buffers)
    except Exception as error:
        raise _unreadable(error) from error


def _make_pickler(out: io.BytesIO, beside: Callable[[Any], Any] | None) -> pickle.Pickler:
    import copyreg

    make = _pickler or _pickler_class()
    # Others may register reducers at any time, and replace them. Comparing two dozen entries by identity costs less
    # than a tenth of the smallest pickle.
    if copyreg.dispatch_table != _table_source:
        _refresh_table()
    return make(out, PROTOCOL, buffer_callback=beside)


def _refresh_table() -> None:
    global _table_source
    import copyreg

    import cloudpickle  # type: ignore[import-untyped]

    _table.clear()
    _table.update(cloudpickle.Pickler._dispatch_table)
    _table[CodeType] = _reduce_code
    _table.update(copyreg.dispatch_table)
    _table.update(_custom)
    _table_source = dict(copyreg.dispatch_table)


def _reduce_code(code: CodeType) -> Any:
    """As cloudpickle does, but with the file's name, which the user will look for in a remote traceback."""
    import cloudpickle

    make, arguments = cloudpickle.Pickler._dispatch_table[CodeType](code)
    return make, tuple(code.co_filename if item == "<dynamic-code>" else item for item in arguments)


def _pickler_class() -> type[pickle.Pickler]:
    """The pickler, made at its first use: cloudpickle costs as much to import as everything else together."""
    global _pickler
    import cloudpickle

    by_value = cloudpickle.Pickler.reducer_override
    functions = FunctionType
    modules = ModuleType
    classes = type

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table = _table

        def reducer_override(self, obj: Any) -> Any:
            kind = type(obj)
            if kind is functions or kind is modules or issubclass(kind, classes):
                return by_value(self, obj)
            return NotImplemented

    _pickler = Pickler
    return Pickler


def name_argument(error: TypeError, call: str, arguments: Iterator[tuple[str, Any]]) -> TypeError:
    """For an error of pickling a call's arguments as a whole: the same about the first that is at fault.

    Args:
        error: The error.
        call: The function's name.
        arguments: Each argument with its name.
    """
    from ray._core import ObjectRef

    for name, value in arguments:
        if type(value) is ObjectRef:
            continue
        try:
            _dump_plainly(value)
        except Exception as cause:
            named = _explain(value, cause, f"argument {name!r} of {call}(), ", name.lstrip("*"))
            if isinstance(named, TypeError):
                named.__cause__ = cause
                return named
    return error


def _dump_plainly(value: Any) -> None:
    _make_pickler(io.BytesIO(), lambda _: None).dump(value)


def _explain(value: Any, error: Exception, whose: str = "", name: str = "value") -> Exception:
    """The error to raise when `value` could not be pickled."""
    if isinstance(value, _BytesBeside):
        return error
    if isinstance(error, RecursionError) or "recursion" in str(error):
        message = (
            f"could not serialize {whose}a {_type_name(value)}: it is nested deeper than Python's recursion limit "
            f"({sys.getrecursionlimit()}). Flatten it, or raise the limit with sys.setrecursionlimit()."
        )
        return TypeError(message)
    from ray.util.check_serialize import find_unpicklable

    places = find_unpicklable(value, name)
    text = f"could not serialize {whose}{_short(value)}: {error}."
    if places:
        listed = "; ".join(f"{place} is {_short(part)}" for place, part in places)
        text += f" What cannot be pickled: {listed}."
    text += " See ray.util.inspect_serializability, or register a serializer with ray.util.register_serializer."
    return TypeError(text)


def _short(value: Any, limit: int = 80) -> str:
    try:
        text = repr(value)
    except Exception:  # user code: a repr may do anything
        text = f"<{_type_name(value)}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}... ({_type_name(value)})"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _unreadable(error: Exception) -> Exception:
    from ray._runtime import errors
    from ray.exceptions import RayError, RaySystemError

    if isinstance(error, RayError):
        return error
    message = f"a value could not be read here: {type(error).__name__}: {error}"
    if _lacks_module(error):
        message += ". The module must be importable, and be the same, in every process that reads the value."
    return RaySystemError(message, f"Traceback (most recent call last):\n{errors.remote_traceback(error)}")


def _lacks_module(error: Exception) -> bool:
    """Whether unpickling failed for want of a module, or of something in it."""
    if isinstance(error, AttributeError):
        # The unpickler's own words, for what it does not find in a module.
        return isinstance(error.obj, ModuleType) or str(error).startswith("Can't get attribute")
    return isinstance(error, ImportError)


# --- exceptions ---------------------------------------------------------------------------------------------------


CAUSE_BYTES_MAX = 16 << 20
"""A pickled exception above this does not travel, as its message would not; its text does."""


def dump_cause(cause: BaseException, traceback_str: str) -> bytes:
    """A user's exception as bytes, without traceback; one that says why, when it cannot be pickled or is too large."""
    from ray.exceptions import UnserializableException

    try:
        blob = dumps(cause)
    except Exception as error:
        return dumps(UnserializableException(traceback_str, str(error)))
    if len(blob) <= CAUSE_BYTES_MAX:
        return blob
    why = (
        f"it is {len(blob) / 2**20:.0f} MiB when pickled, more than the {CAUSE_BYTES_MAX >> 20} MiB that an exception "
        "may have; return large data instead, or ray.put() it and let the exception carry the reference"
    )
    return dumps(UnserializableException(traceback_str, why))


def load_cause(blob: bytes, traceback_str: str) -> BaseException:
    """The user's exception; an `UnserializableException` when it cannot be read here."""
    from ray.exceptions import UnserializableException

    try:
        cause = pickle.loads(blob)
    except Exception as error:
        return UnserializableException(traceback_str, f"it could not be read here: {type(error).__name__}: {error}")
    if isinstance(cause, BaseException):
        return cause
    return UnserializableException(traceback_str, f"its __reduce__ gives {a(_type_name(cause))}")


PICKLE_MARK = b"\x80"  # how every pickle begins, and no UTF-8 text


def load_error(code: int, body: bytes, buffers: list[Any], ref: bytes) -> BaseException:
    """The exception that `ray.get` raises for an error payload."""
    from ray import _core, exceptions

    body = bytes(body)
    if body.startswith(PICKLE_MARK):
        error = load(body, buffers)
        if isinstance(error, exceptions.RayTaskError):
            if code == _core.ERROR_ACTOR_DIED:
                return exceptions.ActorDiedError(error)
            return error.as_instanceof_cause()
        if isinstance(error, BaseException):
            return error
        return exceptions.RaySystemError(f"an error payload holds {a(_type_name(error))}")
    text = body.decode("utf-8", "replace")
    return error_of_code(code, text, ref)


def error_of_code(code: int, text: str, ref: bytes) -> BaseException:
    """The exception for an error that the engine itself, not user code, states."""
    from ray import _core, exceptions
    from ray._runtime.ids import TaskID

    hex_ref = ref.hex()
    if code == _core.ERROR_CANCELLED:
        task = TaskID(ref[: TaskID.SIZE]) if len(ref) >= TaskID.SIZE else None
        return exceptions.TaskCancelledError(task, text or None)
    if code == _core.ERROR_WORKER_CRASHED:
        return exceptions.WorkerCrashedError(text) if text else exceptions.WorkerCrashedError()
    if code == _core.ERROR_ACTOR_DIED:
        return exceptions.ActorDiedError(text or None)
    if code == _core.ERROR_ACTOR_UNAVAILABLE:
        return exceptions.ActorUnavailableError(text or "The actor cannot be reached now; it may come back.")
    if code == _core.ERROR_OWNER_DIED:
        return exceptions.OwnerDiedError(hex_ref, reason=text)
    if code == _core.ERROR_OBJECT_LOST:
        return exceptions.ObjectLostError(hex_ref, reason=text)
    if code == _core.ERROR_OUT_OF_MEMORY:
        return exceptions.OutOfMemoryError(text)
    if code == _core.ERROR_PENDING_CALLS:
        return exceptions.PendingCallsLimitExceeded(text)
    if code == _core.ERROR_GROUP_REMOVED:
        return exceptions.TaskPlacementGroupRemoved(text)
    if code == _core.ERROR_INFEASIBLE:
        return exceptions.TaskUnschedulableError(text)
    if code == _core.ERROR_ACTOR_UNSCHEDULABLE:
        return exceptions.ActorUnschedulableError(text)
    return exceptions.RaySystemError(text)


# --- user's serializers -------------------------------------------------------------------------------------------


def _deserialize_custom(cls: type, deserializer: Callable[[Any], Any], data: Any) -> Any:
    return deserializer(data)


def register_serializer(cls: type, *, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]) -> None:
    """Makes instances of exactly `cls` travel as `serializer(instance)`, and come back by `deserializer`.

    Counts in this process only; the deserializer travels with the value. Call it where values are sent, which
    includes the tasks and actors that return them.

    Args:
        cls: The class. Subclasses are not included.
        serializer: From an instance to something that pickles.
        deserializer: From that to an instance.
    """

    def reduce(value: Any) -> tuple[Any, ...]:
        return _deserialize_custom, (cls, deserializer, serializer(value))

    _custom[cls] = reduce
    _refresh_table()


def deregister_serializer(cls: type) -> None:
    """Forgets what `register_serializer` was told about `cls`; nothing happens when it was not told anything."""
    if _custom.pop(cls, None) is not None:
        _refresh_table()
