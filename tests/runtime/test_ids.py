"""Ids are bytes with an order, a hash and a hexadecimal form."""

from __future__ import annotations

import pickle

import pytest

import ray


@pytest.mark.parametrize(
    ("cls", "size"),
    [(ray.JobID, 4), (ray.TaskID, 24), (ray.ActorID, 16), (ray.NodeID, 28), (ray.WorkerID, 28), (ray.FunctionID, 28),
     (ray.UniqueID, 28), (ray.PlacementGroupID, 18), (ray.ActorClassID, 28)],
)  # fmt: skip
def test_id(cls: type, size: int) -> None:
    assert cls.size() == size  # type: ignore[attr-defined]
    one, two = cls(b"\1" * size), cls(b"\2" * size)
    assert one == cls.from_hex(one.hex()) == cls.from_binary(one.binary())  # type: ignore[attr-defined]
    assert one < two <= two and two > one >= one and one != two  # noqa: PT018
    assert len({one, two, cls(b"\1" * size)}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    assert cls.nil().is_nil() and not one.is_nil()  # type: ignore[attr-defined]  # noqa: PT018
    assert repr(one) == f"{cls.__name__}({'01' * size})"
    assert cls.__module__ == "ray"
    with pytest.raises(ValueError, match=str(size)):
        cls(b"")


def test_job_numbers() -> None:
    assert ray.JobID.from_int(1).hex() == "01000000"
    assert ray.JobID.from_int(258).int() == 258


def test_ids_of_different_kinds_differ() -> None:
    assert ray.NodeID(b"\1" * 28) != ray.WorkerID(b"\1" * 28)


def test_object_id_is_object_ref() -> None:
    assert ray.ObjectID is ray.ObjectRef
