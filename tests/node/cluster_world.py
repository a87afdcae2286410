"""A cluster of simulated nodes: their machines, one control service, and links between them that lose nothing.

What a node and the head say to each other waits in a queue, and is delivered when a test says so: late, but in order.
A node that is killed takes its processes along; what it had sent before still arrives, and then its end.

A head that keeps records can be killed and started anew. What was on its way to it is lost then, of what it had said a
beginning arrives at each node, and of its records a beginning is written. Nodes come back one by one.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING

from ray import _protocol as p
from ray._control import messages
from ray._control.nodes import ANNOUNCE_S
from ray._node.manager import CoreJoined, CoreLeft, FrameCame
from ray._node.membership import Durable, Found
from tests.node.simulated import NODE, World

if TYPE_CHECKING:
    from collections.abc import Callable

Frame = tuple[int, bytes]
END = (-1, b"")
"""What comes last on a link whose node has died."""


class ClusterWorld:
    """See the module's docstring.

    Args:
        resources: What each node has, the head first.
        instant: Whether messages between nodes arrive at once, and records are written at once.
        durable: Whether the head keeps records.
    """

    def __init__(self, *resources: dict[str, float], instant: bool = True, durable: bool = False) -> None:
        # Leases are counted from such a number with its last bits cleared.
        self._numbers = itertools.count(1 << 21, 1 << 20)
        self.instant = instant
        self.durable = durable
        self.head_key = NODE
        self.head_lives = True
        self._head_resources = resources[0]
        self.head = World(resources[0], numbers=self._numbers, durable=durable)
        self.control = self.head.control
        self.records: dict[tuple[str, bytes], bytes] = {}
        self.nodes: dict[int, World] = {NODE: self.head}
        """Nodes that live, by key."""
        self.absent: dict[int, None] = {}
        """Nodes that have not come back to a new head."""
        self.up: dict[int, deque[Frame]] = {}
        """What the head has not heard yet, by node; also of dead nodes."""
        self.down: dict[int, deque[Frame]] = {}
        self._used = 0
        self._heads = 0
        self._now = self.head.now
        for each in resources[1:]:
            self.add(each)

    @property
    def now(self) -> float:
        return self._now

    def add(self, resources: dict[str, float]) -> int:
        """A node joins; returns its key."""
        self._used += 1
        key = NODE + self._used
        self.up[key], self.down[key] = deque(), deque()
        self.nodes[key] = World(resources, key=key, numbers=self._numbers, now=self.now, head_key=self.head_key)
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
        if self.absent.pop(key, 0) == 0:
            self.up[key].append(END)
        self.collect()

    # ------------------------------------------------------------------ the head

    def kill_head(self, beginning: Callable[[int], int] = lambda count: count) -> None:
        """The head dies, with all that is on it.

        Args:
            beginning: Says how much of so many messages, or records, still arrives.
        """
        self.collect()
        for _ in range(beginning(len(self.head.commits))):
            self._write()
        for key in [key for key in self.nodes if key not in self.absent and key != self.head_key]:
            for _ in range(beginning(len(self.down[key]))):
                if key in self.nodes:
                    self.deliver("down", key)
        self.head.inbox.clear()
        self.head.commits.clear()
        self.head_lives = False
        del self.nodes[self.head_key]
        for queue in (*self.up.values(), *self.down.values()):
            queue.clear()
        for key, node in self.nodes.items():
            if key not in self.absent:
                node.feed(CoreLeft(self.head_key, "closed"))
                self.absent[key] = None
        self.collect()

    def start_head(self) -> None:
        """The next head goes on with the records. Nodes have still to `come_back`."""
        self._heads += 1
        self.head_key = NODE + (self._heads << 20)
        known = [(table, key, value) for (table, key), value in self.records.items()]
        self.head = World(
            self._head_resources, node=self.head_key, numbers=self._numbers, now=self.now, durable=True, known=known
        )
        self.control = self.head.control
        self.nodes = {self.head_key: self.head, **self.nodes}
        self.head_lives = True
        self.collect()

    def come_back(self, key: int) -> None:
        """A node finds the head."""
        del self.absent[key]
        self.up[key].clear()
        self.down[key].clear()
        self.head.feed(CoreJoined(key, p.ROLE_NODE, 0))
        self.nodes[key].feed(Found(self.head_key, "head"))
        self.collect()

    def all_come_back(self) -> None:
        if not self.head_lives:
            self.start_head()
        for key in list(self.absent):
            if key in self.absent:
                self.come_back(key)

    def cut(self, key: int) -> None:
        """The link of a node breaks, with all that was on it, and it comes back at once."""
        self.up[key].clear()
        self.down[key].clear()
        self.nodes[key].feed(CoreLeft(self.head_key, "reset", ended=False))
        self.head.feed(CoreLeft(key, "reset", ended=False))
        self.collect()
        self.absent[key] = None
        self.come_back(key)

    def _write(self) -> None:
        """The oldest records that wait for it are safe."""
        commit = self.head.commits.popleft()
        for record in commit.records:
            if record.value is None:
                self.records.pop((record.table, record.key), None)
            else:
                self.records[record.table, record.key] = record.value
        self.head.feed(Durable(commit.number))

    # ------------------------------------------------------------------ messages

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
            if key != self.head_key:
                self.up[key].append(frame)
            elif effect.node in self.nodes:
                self.down[effect.node].append(frame)

    def links(self) -> list[tuple[str, int]]:
        """Links with something on its way. To the disk there is one too."""
        up = [("up", key) for key, queue in self.up.items() if queue]
        disk = [("disk", self.head_key)] if self.head.commits else []
        return up + [("down", key) for key, queue in self.down.items() if queue] + disk

    def deliver(self, direction: str, key: int) -> None:
        """The next message of one link arrives."""
        if direction == "disk":
            self._write()
        elif direction == "down":
            kind, body = self.down[key].popleft()
            self.nodes[key].feed(FrameCame(self.head_key, kind, 0, body))
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
            self._now = at
            for node in self.nodes.values():
                node.now = at
            for node in list(self.nodes.values()):
                node.advance(0.0)
            self.collect()
            if at >= end:
                return

    # ------------------------------------------------------------------ processes

    def send(self, proc: int, message: p.Message) -> None:
        """A process says something to its node."""
        self.node_of(proc).send(proc, message)
        self.collect()

    def node_of(self, proc: int) -> World:
        return next(node for node in self.nodes.values() if proc in node.inbox)

    def driver(self, key: int = 0) -> int:
        """A driver joins on a node; by default on the head."""
        proc = self.nodes[key or self.head_key].driver()
        self.collect()
        return proc
