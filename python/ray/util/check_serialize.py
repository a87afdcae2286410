"""Which part of a value cannot be pickled."""

from __future__ import annotations

import io
import pickle
import sys
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FailureTuple", "inspect_serializability"]

PLACES_MAX = 5
VISITS_MAX = 2_000


class FailureTuple(NamedTuple):
    """One thing that cannot be pickled.

    Attributes:
        obj: The thing.
        path: The names that lead to it from the inspected value.
        parent: What holds it.
    """

    obj: Any
    path: tuple[str, ...]
    parent: Any


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: TextIO | None = None
) -> tuple[bool, set[FailureTuple]]:
    """Says whether a value can be sent to tasks and actors, and prints which part of it cannot.

    Looks into closures and globals of functions, attributes of objects, and containers.

    Args:
        base_obj: The value.
        name: What to call it; its `repr` by default.
        depth: How many levels to look into.
        print_file: Where to print; standard output by default.

    Returns:
        Whether it can be pickled, and the parts at fault. Parts that cannot be hashed are told apart by identity.
    """
    out = print_file or sys.stdout
    label = name or _describe(base_obj)
    reason = _reason(base_obj)
    if reason is None:
        print(f"{label} can be serialized.", file=out)
        return True, set()
    failures = list(_search(base_obj, label, (), None, depth, _Budget()))
    if not failures:
        failures = [FailureTuple(base_obj, (label,), None)]
    print(f"{label} cannot be serialized: {reason}", file=out)
    for failure in failures:
        where = " -> ".join(failure.path) if failure.path else label
        print(f"  {where}: {_reason(failure.obj)}", file=out)
    print(
        "Make what is listed inside the task or actor that uses it, leave it out with __getstate__, "
        "or register a serializer with ray.util.register_serializer.",
        file=out,
    )
    return False, {_hashable(failure) for failure in failures}


class _ById:
    """Stands for a value that cannot be hashed."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _hashable(failure: FailureTuple) -> FailureTuple:
    def wrap(value: Any) -> Any:
        try:
            hash(value)
        except TypeError:
            return _ById(value)
        return value

    return FailureTuple(wrap(failure.obj), failure.path, wrap(failure.parent))


def find_unpicklable(value: Any, name: str = "value") -> list[tuple[str, Any]]:
    """The smallest parts of `value` that cannot be pickled, each with its place written as an expression."""
    found: list[tuple[str, Any]] = []
    for failure in _search(value, name, (), None, 4, _Budget()):
        if failure.obj is value:
            continue
        place = failure.path[0] + "".join(part if part[0] in ".[" else f" {part}" for part in failure.path[1:])
        found.append((place, failure.obj))
        if len(found) == PLACES_MAX:
            break
    return found


class _Budget:
    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.keep: list[Any] = []

    def visit(self, value: Any) -> bool:
        if id(value) in self.seen or len(self.seen) >= VISITS_MAX:
            return False
        self.seen.add(id(value))
        self.keep.append(value)  # a freed object's id may be used again
        return True


def _search(
    value: Any, name: str, path: tuple[str, ...], parent: Any, depth: int, budget: _Budget
) -> Iterator[FailureTuple]:
    if not budget.visit(value) or _reason(value) is None:
        return
    here = (*path, name)
    deeper = False
    if depth > 0:
        for part_name, part in _parts(value):
            for failure in _search(part, part_name, here, value, depth - 1, budget):
                deeper = True
                yield failure
    if not deeper:
        yield FailureTuple(value, here, parent)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"[{key!r}]", item
            yield f"[key {key!r}]", key
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, type):
        for key, item in list(vars(value).items()):
            if isinstance(item, FunctionType) or not key.startswith("__"):
                yield f".{key}", item
    else:
        wrapped = getattr(value, "_function", None) if type(value).__module__ == "ray.remote_function" else None
        if wrapped is not None:
            yield ".function", wrapped
            return
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            for key, item in list(state.items()):
                yield f".{key}", item


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"closure variable {variable!r}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for variable in function.__code__.co_names:
        if variable in function.__globals__:
            yield f"global {variable!r}", function.__globals__[variable]
    for index, default in enumerate(function.__defaults__ or ()):
        yield f"default [{index}]", default


def _reason(value: Any) -> str | None:
    """Why `value` cannot be pickled, or None."""
    from ray._runtime import serialization

    try:
        serialization._make_pickler(_Nowhere(), _ignore).dump(value)
    except (RecursionError, pickle.PicklingError, TypeError) as error:
        return str(error) or type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _ignore(_buffer: pickle.PickleBuffer) -> None:
    """Takes a buffer out of the stream."""


class _Nowhere(io.BytesIO):
    """A file that forgets."""

    def write(self, data: Any) -> int:
        return len(data)


def _describe(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # user code
        text = f"<{type(value).__qualname__}>"
    return text if len(text) <= 120 else text[:117] + "..."
