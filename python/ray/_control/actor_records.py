"""What the actor table keeps, and what it and the manager of a node say to each other."""

from __future__ import annotations

import msgspec

from ray._control.causes import ActorDeath  # noqa: TC001  (msgspec reads the annotation)
from ray._control.machine import Effect, Event
from ray._protocol import CAUSE_TEXT


class PlaceActor(Event, frozen=True):
    """Find a worker for this incarnation. Answered by `Placed` or `Unplaceable`, unless withdrawn.

    `retriable` says whether there may be another incarnation after this one.
    """

    actor: bytes
    incarnation: int
    job: int
    place: dict[str, int]
    run: dict[str, int]
    env: bytes
    strategy: bytes
    label: str
    creator: int
    owner: int
    retriable: bool


class WithdrawActor(Event, frozen=True):
    """The actor is not to be placed any more."""

    actor: bytes


class StopActorWorker(Effect, frozen=True):
    """Kill this worker. `reason` completes "it was stopped because ...". Its `ActorWorkerGone` follows."""

    proc: int
    reason: str


class ActorWorkerExits(Effect, frozen=True):
    """This worker is ending by intention; it is killed only if it does not get there."""

    proc: int
    reason: str


class Placed(Event, frozen=True):
    """A worker is there, and is the actor's until it ends."""

    actor: bytes
    incarnation: int
    node: int
    proc: int
    pid: int
    gpu_ids: list[int]


class Unplaceable(Event, frozen=True):
    """No worker can be had."""

    actor: bytes
    incarnation: int
    reason: str


class ActorWorkerGone(Event, frozen=True):
    """A worker's process was reaped; maybe it was an actor's."""

    proc: int
    pid: int
    cause: str
    lines: tuple[str, ...]
    exit_code: int


class Life(msgspec.Struct, frozen=True, array_like=True):
    """What of an actor changes, for the next control service. `proc` is 0 while no worker was placed."""

    incarnation: int
    proc: int
    node: int


class Actor(msgspec.Struct):
    """One actor. `state` is one of pending, starting, alive, dead; or missing, after a restart of the head: it may live
    on a node that has not come back yet.
    """

    id: bytes
    owner: int
    creator: int
    job: int
    class_name: str
    name: str
    namespace: str
    detached: bool
    max_restarts: int
    label: str
    place: dict[str, int]
    run: dict[str, int]
    env: bytes
    strategy: bytes
    spec: bytes
    owner_node: int = 0
    state: str = "pending"
    incarnation: int = 0
    proc: int = 0
    node: int = 0
    pid: int = 0
    """Where its process is, or was last: its log is still there."""
    cause_kind: int = CAUSE_TEXT
    cause: bytes = b""
    doom: ActorDeath | None = None
    """Decided while the process still lives: what its end will mean."""

    @property
    def restarts_left(self) -> int:
        return -1 if self.max_restarts < 0 else max(self.max_restarts - self.incarnation, 0)
