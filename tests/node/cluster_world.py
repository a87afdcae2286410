"""A cluster of simulated nodes: their machines, one control service, and links between them that lose nothing.

What a node and the head say to each other waits in a queue, and is delivered when a test says so: late, but in order.
A node that is killed takes its processes along; what it had sent before still arrives, and then its end.
"""

from __future__ import annotations

import itertools
from collections import deque

from ray import _protocol as p
from ray._control import messages
from ray._control.nodes import ANNOUNCE_S
from ray._node.manager import CoreJoined, CoreLeft, FrameCame
from tests.node.simulated import NODE, World

Frame = tuple[int, bytes]
END = (-1, b"")
"""What comes last on a link whose node has died."""


class ClusterWorld:
    """See the module's docstring.

    Args:
        resources: What each node has, the head first.
        instant: Whether messages between nodes arrive at once.
    """

    def __init__(self, *resources: dict[str, float], instant: bool = True) -> None:
        # Leases are counted from such a number with its last bits cleared.
        self._numbers = itertools.count(1 << 21, 1 << 20)
        self.instant = instant
        self.head = World(resources[0], numbers=self._numbers)
        self.control = self.head.control
        self.nodes: dict[int, World] = {NODE: self.head}
        """Nodes that live, by key."""
        self.up: dict[int, deque[Frame]] = {}
        """What the head has not heard yet, by node; also of dead nodes."""
        self.down: dict[int, deque[Frame]] = {}
        self._used = 0
        for each in resources[1:]:
            self.add(each)

    @property
    def now(self) -> float:
        return self.head.now

    def add(self, resources: dict[str, float]) -> int:
        """A node joins; returns its key."""
        self._used += 1
        key = NODE + self._used
        self.up[key], self.down[key] = deque(), deque()
        self.nodes[key] = World(resources, key=key, numbers=self._numbers, now=self.now)
        self.head.feed(CoreJoined(key, p.ROLE_NODE, 0))
        self.collect()
        if self.instant:
            self.advance(ANNOUNCE_S)  # until the others know it
        return key

    def kill(self, key: int) -> None:
        """A node dies, with all that is on it."""
        node = self.nodes.pop(key, None)
        if node is None:
            return  # it was told to leave meanwhile
        self._collect_from(key, node)
        node.inbox.clear()
        self.down[key].clear()
        self.up[key].append(END)
        self.collect()

    def collect(self) -> None:
        """What nodes have said is on its way."""
        for key, node in self.nodes.items():
            self._collect_from(key, node)
        if self.instant:
            self.deliver_all()

    def _collect_from(self, key: int, node: World) -> None:
        sent, node.sent = node.sent, []
        for effect in sent:
            frame = messages.KINDS[type(effect.message)], p.encode(effect.message)
            if key != NODE:
                self.up[key].append(frame)
            elif effect.node in self.nodes:
                self.down[effect.node].append(frame)

    def links(self) -> list[tuple[str, int]]:
        """Links with something on its way."""
        up = [("up", key) for key, queue in self.up.items() if queue]
        return up + [("down", key) for key, queue in self.down.items() if queue]

    def deliver(self, direction: str, key: int) -> None:
        """The next message of one link arrives."""
        if direction == "down":
            kind, body = self.down[key].popleft()
            self.nodes[key].feed(FrameCame(NODE, kind, 0, body))
        else:
            kind, body = self.up[key].popleft()
            over = (kind, body) == END
            self.head.feed(CoreLeft(key, "closed") if over else FrameCame(key, kind, 0, body))
        for each, node in self.nodes.items():
            self._collect_from(each, node)
        assert not self.head.shutdown, "the head was told to leave"
        for each in [each for each, node in self.nodes.items() if node.shutdown]:
            self.kill(each)

    def deliver_all(self) -> None:
        for _ in range(100_000):
            links = self.links()
            if not links:
                return
            self.deliver(*links[0])
        message = "nodes never stop talking"
        raise AssertionError(message)

    def advance(self, seconds: float) -> None:
        """Time passes for all, deadline by deadline."""
        end = self.now + seconds
        while True:
            deadlines = [at for node in self.nodes.values() if (at := node.head.next_deadline()) is not None]
            at = max(min([*deadlines, end]), self.now)
            for node in self.nodes.values():
                node.now = at
            for node in list(self.nodes.values()):
                node.advance(0.0)
            self.collect()
            if at >= end:
                return

    def send(self, proc: int, message: p.Message) -> None:
        """A process says something to its node."""
        self.node_of(proc).send(proc, message)
        self.collect()

    def node_of(self, proc: int) -> World:
        return next(node for node in self.nodes.values() if proc in node.inbox)

    def driver(self, key: int = NODE) -> int:
        """A driver joins on a node."""
        proc = self.nodes[key].driver()
        self.collect()
        return proc
