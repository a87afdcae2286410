"""What the control service keeps of placement groups, and what its tables tell each other about them."""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.demands import GROUPS, Key
from ray._control.machine import Event, Save

PACK: Final = "PACK"
SPREAD: Final = "SPREAD"
STRICT_PACK: Final = "STRICT_PACK"
STRICT_SPREAD: Final = "STRICT_SPREAD"
STRATEGIES: Final = (PACK, SPREAD, STRICT_PACK, STRICT_SPREAD)

GROUPS_TABLE: Final = "groups"
BUNDLES_TABLE: Final = "bundles"

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

    `state` is one of pending (nothing is set aside), preparing (nodes were asked), created and removed; or returning,
    after a restart of the head: nodes may still say that they have its bundles. `lost` says that it was created once
    and lacks bundles now. `asked` and `placed` are nodes by the index of a bundle.
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
    placed_by: dict[int, int] = {}
    """The attempt by which each bundle was placed last."""
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


def unknown(group: bytes, now: float) -> Group:
    """What stands for a group of which only the id has been heard."""
    return Group(
        id=group,
        name="",
        namespace="",
        job=0,
        actor=b"",
        detached=True,
        strategy=PACK,
        bundles=(),
        selectors=(),
        target=0,
        created_at=now,
    )


# --- what is kept for the next control service -----------------------------------------------------------------------


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """A group as it was asked for. `removed` is why it is gone, of which then nothing else is kept but names."""

    id: bytes
    name: str
    namespace: str
    job: int
    actor: bytes
    detached: bool
    strategy: str
    bundles: tuple[dict[str, int], ...]
    selectors: tuple[dict[str, tuple[str, tuple[str, ...]]], ...]
    target: int
    removed: str = ""


class KeptBundles(msgspec.Struct, frozen=True, array_like=True):
    """Where a group's bundles were committed last: node and attempt, by index; and how long that took."""

    placed: dict[int, tuple[int, int]]
    created_s: float
    placing_s: float


def keep(group: Group, removed: str = "") -> Save:
    """The record of a group, for when it is new or gone."""
    kept = Kept(
        group.id,
        group.name,
        group.namespace,
        group.job,
        group.actor,
        group.detached,
        group.strategy,
        () if removed else group.bundles,
        () if removed else group.selectors,
        group.target,
        removed,
    )
    return Save(GROUPS_TABLE, group.id, msgspec.msgpack.encode(kept))


def keep_bundles(group: Group) -> Save:
    """The record of where its bundles are, for when they are about to be offered."""
    placed = {index: (node, group.placed_by[index]) for index, node in group.placed.items()}
    kept = KeptBundles(placed, group.ready_at - group.created_at, group.ready_at - group.began_at)
    return Save(BUNDLES_TABLE, group.id, msgspec.msgpack.encode(kept))


def restored(value: bytes, now: float) -> tuple[Group, str]:
    """The group in a record, and why it is gone."""
    kept = msgspec.msgpack.decode(value, type=Kept)
    group = Group(
        id=kept.id,
        name=kept.name,
        namespace=kept.namespace,
        job=kept.job,
        actor=kept.actor,
        detached=kept.detached,
        strategy=kept.strategy,
        bundles=kept.bundles,
        selectors=kept.selectors,
        target=kept.target,
        created_at=now,
        state="removed" if kept.removed else "returning",
    )
    return group, kept.removed


def restored_bundles(value: bytes, group: Group, now: float) -> dict[int, tuple[int, int]]:
    """Where the bundles of a group were, by a record: node and attempt, by index. The group was created once."""
    kept = msgspec.msgpack.decode(value, type=KeptBundles)
    group.ready_at, group.lost = now, True
    group.created_at, group.began_at = now - kept.created_s, now - kept.placing_s
    return kept.placed
