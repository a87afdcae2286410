"""What the control service keeps of nodes, and what its tables tell each other about them."""

from __future__ import annotations

import msgspec

from ray import _bundle_names as bundle_names
from ray._control.machine import Effect, Event
from ray._control.messages import NodeEntry  # noqa: TC001  (msgspec reads the annotation)
from ray._protocol import UNIT

CPU = "CPU"


class NodeCame(Event, frozen=True):
    """A node has joined and may be given work. `returns`: it was there before this control service."""

    node: int
    returns: bool = False


class NodeLost(Event, frozen=True):
    """A node is gone for good. `reason` completes "the node was lost because ...". Comes once for each `NodeCame`."""

    node: int
    reason: str


class NodeWentAway(Event, frozen=True):
    """A node's connection broke, though its process may live."""

    node: int
    reason: str


class NodeReturned(Event, frozen=True):
    """A node that was away is there again, and says what is on it."""

    node: int


class NodeFreed(Event, frozen=True):
    """A node has reported what is free on it: something that waits may fit now."""

    node: int


class DisconnectNode(Effect, frozen=True):
    """Close the connection with a node that is not part of the cluster any more."""

    node: int


class Node(msgspec.Struct):
    """One node. `free` is as it reported last; `assumed` is what was placed there since, by serial number.

    `left` is what that leaves, and `used` the `utilization`, -1 until somebody asks: both follow from the others.
    Whoever watches has the node's key put into its own dictionary at each change.
    """

    key: int
    address: str
    host: str
    hostname: str
    name: str
    socket: str
    session_dir: str
    total: dict[str, int]
    labels: dict[str, str]
    free: dict[str, int]
    joined_at: float
    python: str = ""
    """Version of its interpreter; empty if it did not say."""
    client: bool = False
    """It is only there for a program outside of the cluster, and nobody misses it."""
    relayed: bool = False
    """It only connects outwards; `address` is the head's, which passes connections on."""
    unanswered: int = 0
    """Questions whether it lives since it last answered one."""
    heard_at: float = 0.0
    """When it last answered a question, or greeted."""
    answered: int = 0
    """The last question that it has answered, which the next one tells it."""
    assumed: list[tuple[int, dict[str, int]]] = []
    serial: int = 0
    actors: int = 0
    """Actors that were placed there and have not ended."""
    alive: bool = True
    away: bool = False
    """Its connection broke, and it may come back."""
    reason: str = ""
    """Why it was lost."""
    bundles: dict[str, dict[int, dict[str, int]]] = {}
    """What is committed there for placement groups, by group and index; `total` has their names."""
    order: int = 0
    """How many had joined before."""
    announced: bool = False
    """The others know it, so that it may be given work."""
    entry: NodeEntry | None = None
    """What the others are told of it, made once."""
    left: dict[str, int] = {}
    used: float = -1.0
    watchers: list[dict[int, None]] = []
    """Of all nodes."""
    own_watchers: list[dict[int, None]] = []
    """Of this one."""

    def __post_init__(self) -> None:
        self._recount()

    def __str__(self) -> str:
        where = " that only connects outwards" if self.relayed else f" at {self.address}" if self.address else ""
        return f"node {self.name or self.hostname}{where} ({self.key:016x})"

    def room(self) -> dict[str, int]:
        """What is free, as far as is known now."""
        return dict(self.left)

    def assume(self, demand: dict[str, int], count: int = 1) -> int:
        """Note that something is placed there; returns the number under which the node will confirm it."""
        self.serial += 1
        taken = {name: units * count for name, units in demand.items()}
        self.assumed.append((self.serial, taken))
        for name, units in taken.items():
            self.left[name] = self.left.get(name, 0) - units
        self.changed()
        return self.serial

    def confirm(self, free: dict[str, int], serial: int) -> None:
        """Take over the node's own words. Of bundles that it had not heard of when it said them, all is free."""
        self.free = dict(free)
        for group, bundles in self.bundles.items():
            for index, amounts in bundles.items():
                if bundle_names.name_in(bundle_names.MARKER, group, index) not in free:
                    for name, units in bundle_names.offered(amounts, group, index).items():
                        self.free[name] = self.free.get(name, 0) + units
        self.assumed = [entry for entry in self.assumed if entry[0] > serial]
        self._recount()

    def forget_view(self) -> None:
        """What is free there is not known, until it says so."""
        self.free, self.assumed = {}, []
        self._recount()

    def count_actor(self, by: int) -> None:
        """An actor was placed there (1), or has ended or was not (-1)."""
        self.actors += by
        self.changed()

    def changed(self) -> None:
        """What is known of the node is not what it was."""
        self.used = -1.0
        for dirty in self.watchers:
            dirty[self.key] = None
        for dirty in self.own_watchers:
            dirty[self.key] = None

    def _recount(self) -> None:
        self.left = _left(self.free, self.assumed)
        self.changed()

    def check(self) -> None:
        """Raise `AssertionError` if what follows from the rest does not."""
        assert self.left == _left(self.free, self.assumed), f"{self} has miscounted what is left"
        assert self.used in (-1.0, self._utilization()), f"{self} has miscounted its use"

    def can_ever(self, demand: dict[str, int]) -> bool:
        """Whether the node has that much at all; for a demand in a placement group, in one of its bundles."""
        if not all(units <= self.total.get(name, 0) for name, units in demand.items()):
            return False
        if not self.bundles or (asked := bundle_names.wanted_of_any(demand)) is None:
            return True
        group, amounts = asked
        return any(
            all(units <= bundle.get(name, 0) for name, units in amounts.items() if name != bundle_names.MARKER)
            for bundle in self.bundles.get(group, {}).values()
        )

    def offer(self, group: str, index: int, amounts: dict[str, int]) -> None:
        """The node has this bundle from now on, and all of it is free."""
        self.bundles.setdefault(group, {})[index] = amounts
        for name, units in bundle_names.offered(amounts, group, index).items():
            self.total[name] = self.total.get(name, 0) + units
            self.free[name] = self.free.get(name, 0) + units
            self.left[name] = self.left.get(name, 0) + units
        self.changed()

    def withdraw(self, group: str) -> None:
        """The node has no bundle of this group any more."""
        for index, amounts in self.bundles.pop(group, {}).items():
            for name in bundle_names.offered(amounts, group, index):
                self.total.pop(name, None)
                self.free.pop(name, None)
        self._recount()

    def utilization(self) -> float:
        """The largest used share of CPUs, GPUs and memory, and of actors against CPUs, from 0 to 1 and above."""
        if self.used < 0:
            self.used = self._utilization()
        return self.used

    def _utilization(self) -> float:
        shares = [
            1.0 - self.left.get(name, 0) / units
            for name in (CPU, "GPU", "memory")
            if (units := self.total.get(name, 0)) > 0
        ]
        cpus = max(self.total.get(CPU, 0) // UNIT, 1)
        # Actors hold no CPU by default, and yet a node should not get all of them.
        return max(*shares, self.actors / (8 * cpus), 0.0)


def _left(free: dict[str, int], assumed: list[tuple[int, dict[str, int]]]) -> dict[str, int]:
    left = dict(free)
    for _, demand in assumed:
        for name, units in demand.items():
            left[name] = left.get(name, 0) - units
    return left


def is_same_python(one: str, other: str) -> bool:
    """Whether two versions of Python ("3.11.7") read each other's pickled functions: the patch level may differ."""
    return not one or not other or one.split(".")[:2] == other.split(".")[:2]


def fits(room: dict[str, int], demand: dict[str, int]) -> int:
    """How often a demand fits; `FITS_MAX` if it asks for nothing."""
    fit = FITS_MAX
    for name, units in demand.items():
        if units > 0 and (here := room.get(name, 0) // units) < fit:
            fit = here
    return max(fit, 0)


FITS_MAX = 64
"""Leases of one demand that one decision places on one node; more follow when these are confirmed."""
