"""What the lease table keeps, and what the control service and it say to each other."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from ray._control.machine import Event
from ray._node import fairness
from ray._node.resources import Allocation  # noqa: TC001  (msgspec reads the annotation)

Key: TypeAlias = "tuple[int, int | bytes]"
"""(owner, class id) of a lease's demand; (`ACTORS`, actor id) of an actor's."""

ACTORS: Final = 0
"""Stands for the control service as an owner: process ids are never zero."""


class ActorDemand(Event, frozen=True):
    """The control service places an actor here: `place` must exist, `run` is held. Answered by one of the two below."""

    actor: bytes
    incarnation: int
    job: int
    place: dict[str, int]
    run: dict[str, int]
    env: bytes
    strategy: bytes
    label: str


class ActorWithdrawn(Event, frozen=True):
    """The actor is not wanted any more. Has no effect once it was placed."""

    actor: bytes


class ActorPlaced(Event, frozen=True):
    """A worker with the actor's resources is there."""

    actor: bytes
    incarnation: int
    proc: int
    pid: int
    gpu_ids: list[int]


class ActorUnplaceable(Event, frozen=True):
    """No worker for the actor can be started."""

    actor: bytes
    incarnation: int
    reason: str


STARTING_PER_DEMAND_MAX: Final = 64
"""Leases of one demand that may wait for their workers at a time: four times as many as can be forked at once.
A count comes from another process and may be anything; what needs no resources would fit any number of times."""


class Want(msgspec.Struct):
    """One owner's demand for leases of one class, or one actor's for its worker."""

    key: Key
    job: int
    demand: dict[str, int]
    count: int
    env: bytes
    strategy: bytes
    label: str
    place: dict[str, int]
    retriable: bool = True
    """Whether what runs there may be repeated; of actors the control service knows it."""
    incarnation: int = 0
    starting: int = 0
    """Leases of this demand that have resources and wait for a worker."""
    passed_over: int = 0
    patience: int = fairness.PATIENCE
    held_back: str = ""
    """Why there may be no more leases of it for now; see `LimitLeases`."""

    @property
    def owner(self) -> int:
        return self.key[0]

    @property
    def unmet(self) -> int:
        """Leases for which no resources were taken yet."""
        return self.count - self.starting

    @property
    def may_start(self) -> bool:
        """Whether another lease may take resources now."""
        return self.unmet > 0 and self.starting < STARTING_PER_DEMAND_MAX and not self.held_back


class Lease(msgspec.Struct):
    """Resources and, once held, a worker. The id serves as the ticket for the worker pool."""

    id: int
    key: Key
    label: str
    allocation: Allocation
    job: int
    proc: int = 0
    pid: int = 0
    since: float = 0.0
    retriable: bool = True
    reclaimed: bool = False
    """It was asked back."""
    kept: bool = False
    """It was asked back, and is in use: it comes some time."""

    @property
    def owner(self) -> int:
        return self.key[0]

    @property
    def held(self) -> bool:
        return self.proc != 0
