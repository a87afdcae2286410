"""A whole cluster in virtual time: nodes, their links and members, and the storage of the head's records.

Does what it is told (`adversary` tells it), and draws from one seed how long everything takes. Invariant: what happens
depends on the seed alone, and not on hashes of strings or the order of sets.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import msgspec

from ray import _protocol as p
from ray._control import messages
from ray._node.manager import CoreJoined
from tests.simulation.members import Driver, Member
from tests.simulation.nodes import HEAD_ADDRESS, SimulatedNode
from tests.simulation.oracles import Oracle
from tests.simulation.timeline import Link, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.service import ControlService
    from ray._node.membership import Commit

FIRST_KEY = 1 << 40


class Place(msgspec.Struct, frozen=True):
    """What a node has; whoever replaces it has the same."""

    resources: dict[str, int]
    labels: dict[str, str] = {}


class Cluster:
    """See the module's docstring.

    Args:
        seed: Draws everything.
        validate: Whether all machines check their invariants after each event.
        chances: How likely those faults are that happen by themselves.
        link_s: How long a message takes between two nodes, on average.
        large: Whether only one address of each announcement of nodes is passed on. Thousands of copies of thousands of
            addresses, which nobody there asks for, would take all memory, and are no part of what is measured.
    """

    def __init__(
        self,
        seed: int,
        *,
        validate: bool = True,
        chances: dict[str, float] | None = None,
        link_s: float = 0.001,
        large: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.timeline = Timeline()
        self.validate = validate
        self.records: dict[tuple[str, bytes], bytes] = {}
        self.nodes: dict[int, SimulatedNode] = {}
        """Those that live."""
        self.head: SimulatedNode | None = None
        self.members: dict[int, Member] = {}
        """Every process that lives."""
        self.drivers: dict[int, Driver] = {}
        """Also those that have ended."""
        self.holders: dict[int, Driver] = {}
        """Who is connected to a worker because of a lease."""
        self.lost_places: list[Place] = []
        """What nodes had that have ended and were not replaced."""
        self.created: dict[bytes, p.ActorCreate] = {}
        self.oracle = Oracle(self)
        self._chances = chances or {}
        self._link_s = link_s
        self._large = large
        self._cut_until: dict[int, float] = {}
        self._pids = itertools.count(1)
        self._keys = itertools.count(FIRST_KEY)

    # ------------------------------------------------------------------ chance and time

    def draw(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def happens(self, fault: str) -> bool:
        chance = self._chances.get(fault, 0.0)
        return chance > 0 and self.random.random() < chance

    def calm_down(self) -> None:
        """Nothing bad happens by itself any more."""
        self._chances = {}

    def new_id(self) -> int:
        return self.random.getrandbits(62) + 1

    def new_pid(self) -> int:
        return next(self._pids)

    def run_until(self, done: Callable[[], bool], within_s: float, after_step: Callable[[], None]) -> bool:
        """Let things happen. Whether it is `done` is asked ten times a second. Returns whether it was, in time."""
        end = self.timeline.now + within_s
        ask_at = self.timeline.now
        while True:
            if self.timeline.next_at() >= ask_at:
                if done():
                    return True
                if ask_at >= end:
                    return False
                ask_at += 0.1
            else:
                self.timeline.step()
                after_step()

    # ------------------------------------------------------------------ nodes and links

    @property
    def control(self) -> ControlService | None:
        return self.head.control if self.head is not None and self.head.alive else None

    def start_head(self, place: Place) -> SimulatedNode:
        self.head = self._make(place, is_head=True)
        self.head.start()
        return self.head

    def start_node(self, place: Place) -> SimulatedNode:
        node = self._make(place, is_head=False)
        assert self.head is not None
        self._connect(node, self.head)
        node.start()
        return node

    def _make(self, place: Place, *, is_head: bool) -> SimulatedNode:
        key = next(self._keys)
        node = self.nodes[key] = SimulatedNode(self, key, place, is_head=is_head)
        self.timeline.note(f"{node} starts{' as the head' if is_head else ''}")
        return node

    def node_ended(self, node: SimulatedNode) -> None:
        del self.nodes[node.key]
        self.lost_places.append(node.place)
        self.oracle.node_ended(node)

    def _connect(self, node: SimulatedNode, head: SimulatedNode) -> Link:
        old = head.links.get(node.key)
        if old is not None:
            old.leave(head, "another connection has taken its place", ended=False)
        link = Link(self.timeline, self.random, self._link_s, node, head)
        node.links[head.key] = head.links[node.key] = link
        head.feed(CoreJoined(node.key, p.ROLE_NODE, 0))
        return link

    def reach(self, node: SimulatedNode, to: int) -> Link | None:
        """A new connection, if the head is there and can be reached."""
        head = self.head
        if head is None or head.key != to or not head.alive or self.is_cut(node, head):
            return None
        return self._connect(node, head)

    def listener(self, address: str) -> SimulatedNode | None:
        if address == HEAD_ADDRESS:
            return self.head if self.head is not None and self.head.alive else None
        return self.nodes.get(int(address[1:].partition(":")[0]))

    def cut(self, node: SimulatedNode, seconds: float) -> None:
        if self.timeline.now + seconds <= self._cut_until.get(node.key, 0.0):
            return  # a shorter cut does not heal a longer one
        self._cut_until[node.key] = self.timeline.now + seconds
        for link in node.links.values():
            link.cut_for(seconds)

    def is_cut(self, one: SimulatedNode, other: SimulatedNode) -> bool:
        return any(self._cut_until.get(node.key, 0.0) > self.timeline.now for node in (one, other))

    def heal(self) -> None:
        """No connection is cut any more."""
        self._cut_until.clear()
        for node in list(self.nodes.values()):
            for link in list(node.links.values()):
                link.heal()

    def shorten(self, message: p.Message) -> p.Message:
        """See `large`."""
        if self._large and type(message) is messages.Nodes:
            assert not message.whole, "whoever comes back would take all others for lost"
            return msgspec.structs.replace(message, joined=message.joined[:1], gone=message.gone[:1])
        return message

    # ------------------------------------------------------------------ processes and records

    def lives(self, proc: int) -> bool:
        return proc in self.members

    def start_driver(self, node: SimulatedNode) -> Driver:
        driver = node.start_driver()
        self.drivers[driver.proc] = driver
        return driver

    def member_gone(self, member: Member) -> None:
        """A process has ended. Who is connected to it notices."""
        if not member.alive:
            return
        member.alive = False
        self.members.pop(member.proc, None)
        self.oracle.gone(member)
        holder = self.holders.get(member.proc)
        if holder is not None:
            holder.peer_lost_soon(member.proc)

    def write(self, commit: Commit) -> None:
        """Records become safe."""
        for record in commit.records:
            if record.value is None:
                self.records.pop((record.table, record.key), None)
            else:
                self.records[record.table, record.key] = record.value
