"""Ids as users see them.

An id is a fixed number of bytes with an order and a hash. Object ids are the core's `ObjectRef`. A task's id names the
process that submitted it and is followed by an index in the ids of its results; an actor's id names the process that
created it. Ids of nodes and processes are their 64-bit keys, padded.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

__all__ = [
    "ActorClassID",
    "ActorID",
    "FunctionID",
    "JobID",
    "NodeID",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
]

KEY_BYTES = 8  # a node's or process's key


class BaseID:
    """An immutable id of a fixed size."""

    __slots__ = ("_id",)

    SIZE: ClassVar[int] = 28

    def __init__(self, id: bytes) -> None:
        if not isinstance(id, bytes) or len(id) != self.SIZE:
            message = f"{type(self).__name__} takes {self.SIZE} bytes, not {id!r}"
            raise ValueError(message)
        self._id = id

    @classmethod
    def size(cls) -> int:
        """Number of bytes."""
        return cls.SIZE

    @classmethod
    def nil(cls) -> Self:
        """The id of nothing."""
        return cls(b"\xff" * cls.SIZE)

    @classmethod
    def from_binary(cls, id_bytes: bytes) -> Self:
        """The id with these bytes."""
        return cls(id_bytes)

    @classmethod
    def from_hex(cls, hex_id: str | bytes) -> Self:
        """The id with this hexadecimal form."""
        text = hex_id.decode() if isinstance(hex_id, bytes) else hex_id
        return cls(bytes.fromhex(text))

    def binary(self) -> bytes:
        """The id's bytes."""
        return self._id

    def hex(self) -> str:
        """The id's hexadecimal form."""
        return self._id.hex()

    def is_nil(self) -> bool:
        """Whether this is the id of nothing."""
        return self._id == b"\xff" * self.SIZE

    def redis_shard_hash(self) -> int:
        """A stable number made from the id."""
        return int.from_bytes(self._id[-8:], "little")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._id == other._id

    def __lt__(self, other: Any) -> bool:
        return self._id < other._id if type(self) is type(other) else NotImplemented

    def __le__(self, other: Any) -> bool:
        return self._id <= other._id if type(self) is type(other) else NotImplemented

    def __gt__(self, other: Any) -> bool:
        return self._id > other._id if type(self) is type(other) else NotImplemented

    def __ge__(self, other: Any) -> bool:
        return self._id >= other._id if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._id.hex()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._id,)


class UniqueID(BaseID):
    """An id of 28 bytes."""

    __slots__ = ()

    @classmethod
    def from_random(cls) -> Self:
        """A new id."""
        return cls(os.urandom(cls.SIZE))

    @classmethod
    def _from_key(cls, key: int) -> Self:
        return cls(key.to_bytes(KEY_BYTES, "big") + bytes(cls.SIZE - KEY_BYTES))

    def _key(self) -> int:
        return int.from_bytes(self._id[:KEY_BYTES], "big")


class NodeID(UniqueID):
    """A node of the cluster."""

    __slots__ = ()


class WorkerID(UniqueID):
    """A process of the cluster: a worker, or a driver."""

    __slots__ = ()


class FunctionID(UniqueID):
    """A pickled function, by content."""

    __slots__ = ()


class ActorClassID(UniqueID):
    """A pickled actor class, by content."""

    __slots__ = ()


class JobID(BaseID):
    """A driver's job."""

    __slots__ = ()
    SIZE = 4

    @classmethod
    def from_int(cls, value: int) -> JobID:
        """The job with this number."""
        return cls(value.to_bytes(cls.SIZE, "little"))

    def int(self) -> int:
        """The job's number."""
        return int_from(self._id)


def int_from(data: bytes) -> int:
    """`data` read as a little-endian number."""
    return int.from_bytes(data, "little")


class TaskID(BaseID):
    """A task: the node and process that submitted it, and its number there."""

    __slots__ = ()
    SIZE = 24

    def job_id(self) -> JobID:
        """The job that this process belongs to."""
        return current_job()

    def actor_id(self) -> ActorID:
        """Nil: a task's id does not name the actor that it runs on."""
        return ActorID.nil()

    @classmethod
    def for_fake_task(cls, job_id: JobID) -> TaskID:
        """An id that no task has."""
        return cls(job_id.binary() + os.urandom(cls.SIZE - JobID.SIZE))


class ActorID(BaseID):
    """An actor: the process that created it, and its number there."""

    __slots__ = ()
    SIZE = 16

    @property
    def job_id(self) -> JobID:
        """The job that this process belongs to."""
        return current_job()

    @classmethod
    def from_random(cls) -> ActorID:
        """An id that no actor has."""
        return cls(os.urandom(cls.SIZE))


class PlacementGroupID(BaseID):
    """A placement group."""

    __slots__ = ()
    SIZE = 18

    @classmethod
    def from_random(cls) -> PlacementGroupID:
        """A new id."""
        return cls(os.urandom(cls.SIZE))

    @classmethod
    def of(cls, job_id: JobID) -> PlacementGroupID:
        """A new id for a group of this job."""
        return cls(os.urandom(cls.SIZE - JobID.SIZE) + job_id.binary())


def current_job() -> JobID:
    """The job of this process; nil outside of a cluster."""
    from ray._runtime import session

    return JobID.from_int(session.job_number) if session.core is not None else JobID.nil()
