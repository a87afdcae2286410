"""What the control service keeps of placement groups, and what its tables tell each other about them."""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.demands import GROUPS, Key
from ray._control.machine import Event

PACK: Final = "PACK"
SPREAD: Final = "SPREAD"
STRICT_PACK: Final = "STRICT_PACK"
STRICT_SPREAD: Final = "STRICT_SPREAD"
STRATEGIES: Final = (PACK, SPREAD, STRICT_PACK, STRICT_SPREAD)

REMOVED_ERROR: Final = "PlacementGroupRemoved"
"""The name under which requests about a group that is gone are refused."""


class JobOver(Event, frozen=True):
    """A job's driver has gone."""

    job: int


class DetachedActorOver(Event, frozen=True):
    """A detached actor is dead for good."""

    actor: bytes


class GroupPlaced(Event, frozen=True):
    """All bundles of a group are where tasks and actors can use them."""

    group: bytes


class GroupOver(Event, frozen=True):
    """There is no such group any more. `reason` is a sentence without its full stop."""

    group: bytes
    reason: str


class Waiter(msgspec.Struct, frozen=True):
    """Who is told that a group is created: the answer to the request `corr`."""

    proc: int
    corr: int


class Group(msgspec.Struct):
    """One placement group.

    `state` is one of pending (nothing is set aside), preparing (nodes were asked), created and removed; `lost` says
    that it was created once and lacks bundles now. `asked` and `placed` are nodes by the index of a bundle.
    """

    id: bytes
    name: str
    namespace: str
    job: int
    actor: bytes
    """The detached actor that created it; empty if it ends with its job."""
    detached: bool
    strategy: str
    bundles: tuple[dict[str, int], ...]
    selectors: tuple[dict[str, tuple[str, tuple[str, ...]]], ...]
    target: int
    """The node on which it should be, if that can be; 0 for any."""
    created_at: float
    state: str = "pending"
    lost: bool = False
    attempt: int = 0
    asked: dict[int, int] = {}
    unanswered: dict[int, None] = {}
    """Nodes that were asked and have not answered."""
    one_phase: bool = False
    """Its node offers what it sets aside at once."""
    gathers: bool = False
    """Nodes keep for it what becomes free, until all of it is there."""
    placed: dict[int, int] = {}
    shy: dict[int, float] = {}
    """Nodes that refused, and until when they are left alone."""
    refusals: int = 0
    """Since it was created, or lost bundles."""
    why: str = ""
    """Why it is not placed, as a sentence without its full stop."""
    infeasible: bool = False
    waits: bool = False
    waiters: dict[Waiter, None] = {}
    ready_at: float = 0.0
    began_at: float = 0.0
    """When its nodes were asked last."""

    def __str__(self) -> str:
        return f"placement group {self.name or self.hex}"

    @property
    def hex(self) -> str:
        return self.id.hex()

    @property
    def missing(self) -> dict[int, dict[str, int]]:
        """Bundles that have no node, by index."""
        return {index: bundle for index, bundle in enumerate(self.bundles) if index not in self.placed}

    # What notices about long waits ask of whoever waits (`waits.Want`).

    @property
    def key(self) -> Key:
        return GROUPS, self.id

    @property
    def owner(self) -> int:
        return GROUPS

    @property
    def label(self) -> str:
        return str(self)

    @property
    def demand(self) -> dict[str, int]:
        return {}

    @property
    def place(self) -> dict[str, int]:
        return {}

    @property
    def unmet(self) -> int:
        return 1
