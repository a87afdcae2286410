"""Values survive the way there and back, without copies of what is large."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest

import ray
from ray._runtime import serialization
from ray.exceptions import RaySystemError
from ray.util import inspect_serializability


def travel(value: Any) -> Any:
    stream, buffers = serialization.dump(value)
    return serialization.load(stream, [memoryview(buffer).toreadonly() for buffer in buffers])


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "text", b"bytes", b"x" * 200_000, [1, {"a": (2, {3})}], Point(3), {"p": [Point(1)]}, int, len,
     bytearray(b"abc"), 10**40, float("inf"), ...],
)  # fmt: skip
def test_values_come_back_equal(value: Any) -> None:
    arrived = travel(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_functions_and_local_classes_travel_by_value() -> None:
    offset = 3
    function = travel(lambda x: x + offset)
    assert function(1) == 4

    class Local:
        def value(self) -> int:
            return offset

    assert travel(Local()).value() == 3
    assert travel([sys])[0] is sys


def test_arrays_are_views_that_cannot_be_written() -> None:
    array = np.arange(1000)
    stream, buffers = serialization.dump({"a": array})
    assert len(buffers) == 1
    assert len(stream) < 500
    arrived = travel({"a": array})["a"]
    assert (arrived == array).all()
    assert not arrived.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        arrived[0] = 1


def test_large_bytes_and_arrow_go_beside_the_stream() -> None:
    stream, buffers = serialization.dump(b"x" * 1_000_000)
    assert (len(stream) < 200, len(buffers)) == (True, 1)
    table = pa.table({"a": list(range(10_000))})
    stream, buffers = serialization.dump(table)
    assert len(stream) < 2_000
    assert travel(table).equals(table)


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": [1, threading.Lock()]}, "value['a'][1]"), (Point(threading.Lock()), "value.x")],  # type: ignore[arg-type]
)
def test_what_cannot_be_pickled_is_named(value: Any, place: str) -> None:
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock'") as info:
        serialization.dump(value)
    assert place in str(info.value)


def test_closure_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    def use() -> Any:
        return lock

    with pytest.raises(TypeError, match="closure variable 'lock'"):
        serialization.dumps(use)


def test_too_deep_a_nesting_says_so() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(TypeError, match="recursion limit"):
        serialization.dump(nested)
    while nested:  # freed by hand: nested destructors are deep, too
        nested = nested[0]


def test_registered_serializer_is_used_and_forgotten() -> None:
    class Odd:
        def __init__(self, lock: Any) -> None:
            self.lock = lock
            self.x = 7

    ray.util.register_serializer(Odd, serializer=lambda odd: odd.x, deserializer=lambda x: ("odd", x))
    try:
        assert travel([Odd(threading.Lock())]) == [("odd", 7)]
    finally:
        ray.util.deregister_serializer(Odd)
    with pytest.raises(TypeError):
        travel(Odd(threading.Lock()))
    ray.util.deregister_serializer(Odd)


def test_value_that_cannot_be_read_says_why() -> None:
    class Missing:
        def __reduce__(self) -> Any:
            return __import__, ("no_such_module",)

    stream, buffers = serialization.dump(Missing())
    with pytest.raises(RaySystemError, match="no_such_module"):
        serialization.load(stream, buffers)


def test_copyreg_entries_that_come_later_count() -> None:
    import copyreg

    class Late:
        lock = threading.Lock()

    serialization.dump([1])
    copyreg.pickle(Late, lambda _late: (str, ("late",)))
    try:
        assert travel(Late()) == "late"
    finally:
        del copyreg.dispatch_table[Late]


def test_large_structures_of_builtins_stay_in_c() -> None:
    value = [{"a": i, "b": str(i)} for i in range(1000)]
    assert serialization.dump(value)[0] == cloudpickle.dumps(value, protocol=5)


def test_inspect_serializability_names_what_is_at_fault() -> None:
    lock = threading.Lock()

    def use() -> Any:
        return lock

    out = io.StringIO()
    ok, failures = inspect_serializability(use, name="use", print_file=out)
    assert not ok
    assert [failure.obj for failure in failures] == [lock]
    assert "closure variable 'lock'" in out.getvalue()
    assert inspect_serializability([1], print_file=out) == (True, set())
