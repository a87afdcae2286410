"""What the lease table keeps, and what the control service and it say to each other."""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control import messages
from ray._control import strategy as strategies
from ray._control.demands import ACTORS, Key
from ray._control.machine import Event
from ray._control.strategy import Strategy
from ray._node import fairness
from ray._node.resources import Allocation, Ledger  # noqa: TC001
from ray._protocol import Message  # noqa: TC001


class ActorDemand(Event, frozen=True):
    """The control service places an actor here. Answered by one of the three below, unless withdrawn."""

    message: messages.PlaceActor


class ActorWithdrawn(Event, frozen=True):
    """The actor is not wanted any more. Has no effect once it was placed."""

    actor: bytes


class LeasesPlaced(Event, frozen=True):
    """The control service has an owner, maybe of another node, get leases here."""

    message: messages.PlaceLeases


class GuestWithdrawn(Event, frozen=True):
    """What waits here for an owner of another node is not wanted any more."""

    message: messages.WithdrawLeases


class Elsewhere(Event, frozen=True):
    """Leases that an owner of this node wants are on their way from other nodes, or are not any more."""

    message: messages.PlacedElsewhere


class NowHopeless(Event, frozen=True):
    """Whether any node can ever meet a demand of this node's."""

    message: messages.Hopeless


class ToldElsewhere(Event, frozen=True):
    """Another node has granted a lease to an owner of this node, or cannot start workers for it."""

    owner: int
    message: Message


class BundlesWanted(Event, frozen=True):
    """The control service has resources set aside for a placement group. Answered to it, unless released."""

    message: messages.PrepareBundles


class BundlesCommitted(Event, frozen=True):
    """What was set aside is offered from now on."""

    message: messages.CommitBundles


class BundlesReleased(Event, frozen=True):
    """What was set aside, or waits to be, is given back."""

    message: messages.ReleaseBundles


class ActorPlaced(Event, frozen=True):
    """A worker with the actor's resources is there."""

    actor: bytes
    incarnation: int
    proc: int
    pid: int
    gpu_ids: list[int]
    retriable: bool = False


class ActorUnplaceable(Event, frozen=True):
    """No worker for the actor can be started."""

    actor: bytes
    incarnation: int
    reason: str


STARTING_PER_DEMAND_MAX: Final = 64
"""Leases of one demand that may wait for their workers at a time: four times as many as can be forked at once.
A count comes from another process and may be anything; what needs no resources would fit any number of times."""


LEASE_BASE_MASK: Final = ((1 << 63) - 1) & ~((1 << 20) - 1)
"""Leases are counted from a random number with zeros at its end."""


class Want(msgspec.Struct):
    """One owner's demand for leases of one class, one actor's for its worker, or one placement group's for bundles."""

    key: Key
    job: int
    demand: dict[str, int]
    count: int
    env: bytes
    strategy: bytes
    label: str
    place: dict[str, int]
    lives_for: int = 0
    """The process that owns the actor; for leases the key says it."""
    retriable: bool = True
    """Whether what runs there may be repeated, or the actor restarted."""
    incarnation: int = 0
    how: Strategy = Strategy()
    """`strategy`, read."""
    guest: bool = False
    """The owner is a member of another node: what does not fit is refused, unless it `queues`."""
    queues: bool = False
    starting: int = 0
    """Leases of this demand that have resources and wait for a worker."""
    elsewhere: int = 0
    """Leases that the control service has placed on other nodes and that were not granted yet."""
    placed_only: bool = False
    """Only what the control service has placed here may start here: it depends on other nodes."""
    here: int = 0
    """Leases of such a demand that it has placed on this node."""
    heard: int = 0
    """All that it has ever placed."""
    told: int = -1
    """What it was told is wanted; -1 if it was told nothing."""
    told_heard: int = 0
    hopeless: str = ""
    """Why no node of the cluster can ever meet it."""
    waits: bool = False
    """Whether people are told when it waits for long."""
    bundles: messages.PrepareBundles | None = None
    """What is to be set aside, if it is a placement group's."""
    passed_over: int = 0
    patience: int = fairness.PATIENCE
    held_back: str = ""
    """Why there may be no more leases of it for now; see `LimitLeases`."""

    @property
    def owner(self) -> int:
        return self.key[0]

    @property
    def class_id(self) -> int:
        """Of a task's demand."""
        assert isinstance(self.key[1], int)
        return self.key[1]

    def needs_view(self, node: int, ledger: Ledger, *, alone: bool) -> bool:
        """Whether only a view of all nodes can tell where the demand is met; `node` is the owner's, with its ledger."""
        if self.how.kind == strategies.GROUP:
            # Whether there is such a group, and where, others know; with a bundle here it is a resource like others.
            return not ledger.bundles or any(name not in ledger.total for name in self.demand)
        if self.how.kind == strategies.NODE and (self.how.node == node or (alone and self.how.soft)):
            return False
        return not self.how.is_local_first and not (alone and self.how.kind == strategies.SPREAD)

    @property
    def unmet(self) -> int:
        """Leases for which no resources were taken yet."""
        return max(self.count - self.starting - self.elsewhere, 0)

    @property
    def may_start(self) -> bool:
        """Whether another lease may take resources now."""
        allowed = self.here > 0 or not self.placed_only
        return allowed and self.unmet > 0 and self.starting < STARTING_PER_DEMAND_MAX and not self.held_back


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
    lives_for: int = 0
    retriable: bool = True
    """Both as in `Want`."""
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


def guest(order: messages.PlaceLeases) -> Want:
    """The demand that the control service places here for an owner of another node, without a count yet."""
    return Want(
        key=(order.owner, order.class_id),
        job=order.job,
        demand={name: units for name, units in order.demand.items() if units > 0},
        count=0,
        env=order.env,
        strategy=order.strategy,
        label=order.label,
        place={},
        retriable=order.retriable,
        guest=True,
    )


def refusal(want: Want, count: int, why: str) -> Message:
    """What the control service is told of a demand that was placed here and does not fit; `why` is for bundles."""
    if want.bundles is not None:
        return messages.BundlesRefused(want.bundles.group, want.bundles.attempt, why)
    if want.owner == ACTORS:
        assert isinstance(want.key[1], bytes)
        return messages.ActorRefused(want.key[1], want.incarnation, want.held_back)
    return messages.LeasesRefused(want.owner, want.class_id, count, want.held_back)


def overflow(want: Want, count: int, heard: int) -> messages.Overflow:
    """How the control service is told what its own node cannot give to an owner."""
    return messages.Overflow(
        want.owner,
        want.class_id,
        count,
        heard,
        want.job,
        want.demand,
        want.env,
        want.strategy,
        want.label,
        want.retriable,
    )
