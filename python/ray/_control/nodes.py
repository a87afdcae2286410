"""The nodes of the cluster: which there are, what each has, and whether it still lives.

Owns the list of nodes and the view of their free resources. Does not place anything.

A node whose process has ended is lost at once: its connection was closed. One whose connection broke in any other way
is *away*, and may come back for a while; after a restart of the head all are *expected* that had been part of the
cluster before. Who is there and leaves `UNANSWERED_MAX` questions unanswered is lost. Who comes back after it was taken
to be lost is told to leave, because everything on it was given up meanwhile.

A node that only connects outwards has the head's address: of a head that was restarted elsewhere everybody hears it
anew, with the others.

Every node is told of every other. Who joins alone is announced at once; of those that join within `ANNOUNCE_S` of each
other the others hear in one message, since a message to each for each of thousands would take minutes. Until then a
node is given no work; as soon as it has some of its own, all are told (`Announce`).

Functions travel as pickles of code, which another minor version of Python cannot run: a node with another one than the
head's is told to leave, too.

Invariants: a node is there (maybe away), expected or lost; every node has been announced to every other or is one of
the newcomers, and its loss was told too; the head is never lost nor away.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.machine import Deadlines, Event, FromNode, Log, Machine, Save, Tick, ToNode
from ray._control.messages import Alive, AreYouAlive, Leave, NodeEntry, NodeHello, Nodes, Resources
from ray._control.node_records import (
    DisconnectNode,
    Node,
    NodeCame,
    NodeFreed,
    NodeLost,
    NodeReturned,
    NodeWentAway,
    is_same_python,
)

ASK_S: Final = 2.0
"""How often nodes are asked whether they live. Only with more than one node; a question is 20 bytes."""

UNANSWERED_MAX: Final = 4
"""A node that has left so many questions in a row unanswered is lost, after 8 to 10 seconds. Questions are counted, not
seconds, so that a head which was stopped for a while does not take everybody for lost. Nodes rely on so much patience:
see `_node.fence`."""

PATIENCE_S: Final = ASK_S * UNANSWERED_MAX
"""No node is taken for lost so soon after it was last heard, unless it is known that its process has ended."""

ANNOUNCE_S: Final = 0.1
"""After an announcement the next one waits for so long, to be of all who join meanwhile."""

AWAY_S: Final = 2.0
"""How long a node may at least be away whose connection broke; mostly it is until `PATIENCE_S` are over, because it may
not know that it is away, and runs on until its fence closes."""

RETURN_S: Final = PATIENCE_S
"""How long nodes have to come back after a restart of the head, if some are missing. They try ten times a second. The
head before may have heard them the moment it died, so that those who are cut off run on for almost as long."""

TABLE: Final = "nodes"

LOST_REMEMBERED: Final = 1000
"""Lost nodes that can still be listed, and of which nodes that join are told; older ones are forgotten."""


class Announce(Event, frozen=True):
    """A newcomer has something to say that others may hear of: they must know it first."""


_ANNOUNCE: Final = 0
"""Stands for the next announcement among deadlines of nodes, whose keys are never zero."""


class NodeTable(Machine):
    """See the module's docstring.

    Args:
        head: The node that hosts the control service.
        durable: Whether records are kept, so that a next control service goes on with them.
    """

    def __init__(self, *, head: int, durable: bool = False, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self.head = head
        self._durable = durable
        self._nodes: dict[int, Node] = {}
        self._expected: dict[int, NodeHello] = {}
        self._lost: dict[int, Node] = {}
        self._serial = 0
        self._joined = 0
        self._newcomers: dict[int, Node] = {}
        """Nodes that the others were not told of, in the order in which they joined."""
        self._announced_at = float("-inf")
        self._watchers: list[dict[int, None]] = []
        self._watchers_of: dict[int, list[dict[int, None]]] = {}
        self._deadlines: Deadlines[int] = Deadlines()
        """Of nodes that are away; that of the head is for the next questions."""
        self._events = {
            NodeLost: self._on_lost,
            NodeWentAway: self._on_away,
            Announce: self._on_announce,
            Tick: self._on_tick,
        }
        self._node_messages = {NodeHello: self._on_hello, Resources: self._on_resources, Alive: self._on_alive}

    # ------------------------------------------------------------------ queries

    def get(self, key: int) -> Node | None:
        """The node, if it lives."""
        return self._nodes.get(key)

    def find(self, key: int) -> Node | None:
        """The node, if it is remembered at all."""
        return self._nodes.get(key) or self._lost.get(key)

    def living(self) -> list[Node]:
        """Nodes that are there and not away, in the order in which they joined."""
        return [node for node in self._nodes.values() if not node.away]

    def ready(self) -> list[Node]:
        """Those of them that may be given work."""
        return [node for node in self._nodes.values() if node.announced and not node.away]

    def expected(self) -> list[int]:
        """Nodes of the time before the head was restarted that have not come back."""
        return list(self._expected)

    def is_expected(self, key: int) -> bool:
        """Whether the node was there before the head was restarted, and may come back."""
        return key in self._expected

    def all(self) -> list[Node]:
        """Also those that are away, or were lost."""
        return [*self._nodes.values(), *self._lost.values()]

    def is_new(self, key: int) -> bool:
        """Whether the others have not been told of it yet."""
        return key in self._newcomers

    def watch(self, only: int = 0) -> dict[int, None]:
        """A dictionary into which the keys of nodes are put that have changed; now, of all. Whoever reads it clears it.

        Args:
            only: Watch this node alone, whether it is there or not.
        """
        dirty = dict.fromkeys([only] if only else self._nodes)
        if only:
            self._watchers_of.setdefault(only, []).append(dirty)
        else:
            self._watchers.append(dirty)
        return dirty

    def unwatch(self, dirty: dict[int, None], only: int = 0) -> None:
        """Forget what `watch` returned."""
        watchers = self._watchers_of[only] if only else self._watchers
        watchers[:] = [other for other in watchers if other is not dirty]
        if only and not watchers and only not in self._nodes:
            del self._watchers_of[only]

    @property
    def is_alone(self) -> bool:
        return len(self._nodes) < 2

    def total(self) -> dict[str, int]:
        """What all nodes have together."""
        total: dict[str, int] = {}
        for node in self._nodes.values():
            for name, units in node.total.items():
                total[name] = total.get(name, 0) + units
        return total

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        return {"nodes": len(self._nodes), "nodes_lost": len(self._lost)}

    # ------------------------------------------------------------------ coming and going

    def _on_hello(self, event: FromNode, message: NodeHello, now: float) -> None:
        known = self._nodes.get(message.node)
        if message.node != event.node or (known is not None and not message.returns):
            self._emit(Log(f"node {event.node:016x} introduced itself twice, or as another one; ignored"))
        elif known is not None:
            self._return(known, now)
        elif message.returns and message.node not in self._expected:
            lost = self._lost.get(message.node)
            why = f"it was taken to be lost: {lost.reason}" if lost is not None else "it is not known any more"
            self._emit(ToNode(message.node, Leave(why)))
        else:
            self._join(message, now)

    def _return(self, node: Node, now: float) -> None:
        node.away, node.unanswered = False, 0
        node.heard_at, node.answered = now, 0
        node.forget_view()
        self._deadlines.clear(node.key)
        others = [_entry(other) for other in self._nodes.values() if other is not node]
        self._emit(ToNode(node.key, Nodes(others, [], self._durable, whole=True, welcome=True)))
        self._emit(Log(f"{node} has come back"))
        self._emit(NodeReturned(node.key))

    def _join(self, message: NodeHello, now: float) -> None:
        head = self._nodes.get(self.head)
        if head is not None and not is_same_python(message.python, head.python):
            reason = (
                f"it runs Python {message.python} and the head {head.python}, and nodes of different minor versions "
                f"cannot run each other's functions: start it with Python {head.python.rpartition('.')[0]}"
            )
            self._emit(Log(f"node {message.hostname} ({message.node:016x}) was refused: {reason}"))
            self._emit(ToNode(message.node, Leave(reason)))
            return
        new = Node(
            key=message.node,
            address=head.address if message.relayed and head is not None else message.address,
            host=message.host,
            hostname=message.hostname,
            name=message.name,
            socket=message.socket,
            session_dir=message.session_dir,
            total=dict(message.resources),
            labels=message.labels,
            free=dict(message.resources),
            joined_at=now,
            heard_at=now,
            python=message.python,
            client=message.client,
            order=self._joined,
            watchers=self._watchers,
            own_watchers=self._watchers_of.setdefault(message.node, []),
            relayed=message.relayed,
        )
        self._joined += 1
        others = [_entry(node) for node in self._nodes.values()]
        self._nodes[new.key] = self._newcomers[new.key] = new
        if self._expected.pop(new.key, None) is None and new.key != self.head:
            self._emit(Save(TABLE, _key(new.key), msgspec.msgpack.encode(message)))
        if others:
            # Values may be sought by their old places: it must know which of them it need not wait for.
            gone = [(node.key, _loss(node)) for node in self._lost.values()]
            self._emit(ToNode(new.key, Nodes(others, gone, self._durable, welcome=True)))
            self._emit(Log(f"{new} has {'come back' if message.returns else 'joined'}"))
            if self.head not in self._deadlines:
                self._deadlines.set(self.head, now + ASK_S)
        if now >= self._announced_at + ANNOUNCE_S:
            self._announce(now)
        elif _ANNOUNCE not in self._deadlines:
            self._deadlines.set(_ANNOUNCE, self._announced_at + ANNOUNCE_S)
        self._emit(NodeCame(new.key, message.returns))

    def _on_announce(self, event: Announce, now: float) -> None:
        self._announce(now)

    def _announce(self, now: float) -> None:
        """Tell everybody of those who have joined. A newcomer was told of the others that were there before it."""
        newcomers, self._newcomers = self._newcomers, {}
        self._deadlines.clear(_ANNOUNCE)
        self._announced_at = now
        entries = [_entry(node) for node in newcomers.values()]
        to_all = Nodes(entries, [], self._durable)
        heard = 0
        for node in self._nodes.values():
            if node.key in newcomers:
                heard += 1
                message = Nodes(entries[heard:], [], self._durable)
            else:
                message = to_all
            if message.joined:
                self._emit(ToNode(node.key, message))
        for node in newcomers.values():
            node.announced = True
            node.changed()
            self._emit(NodeFreed(node.key))

    def restore(self, key: bytes, value: bytes) -> None:
        """Take over a record of the control service before."""
        self._expected[int.from_bytes(key, "big")] = msgspec.msgpack.decode(value, type=NodeHello)

    def give_up_expected(self) -> None:
        """Those who have not come back by now are lost."""
        for key in self._expected:
            self._emit(Save(TABLE, _key(key), None))
        gone = [
            (x.node, f"node {x.name or x.hostname} at {x.address or x.host} was lost") for x in self._expected.values()
        ]
        self._expected.clear()
        if gone:
            for node in self._nodes.values():
                self._emit(ToNode(node.key, Nodes([], gone, self._durable)))

    def _on_away(self, event: NodeWentAway, now: float) -> None:
        node = self._nodes.get(event.node)
        if node is not None and not node.away:
            node.away, node.reason = True, event.reason
            node.forget_view()
            left_s = max(AWAY_S, node.heard_at + PATIENCE_S - now)
            self._deadlines.set(node.key, now + left_s)
            self._emit(Log(f"the connection with {node} was lost ({event.reason}); it has {left_s:.0f} s to return"))

    def _on_lost(self, event: NodeLost, now: float) -> None:
        node = self._nodes.pop(event.node, None)
        if node is None:
            return
        self._require(node.key != self.head, "the head has lost itself")
        node.alive, node.reason = False, event.reason
        node.forget_view()
        if not self._watchers_of.get(node.key):
            self._watchers_of.pop(node.key, None)
        self._newcomers.pop(node.key, None)
        self._lost[node.key] = node
        self._deadlines.clear(node.key)
        self._emit(Save(TABLE, _key(node.key), None))
        if len(self._lost) > LOST_REMEMBERED:
            del self._lost[next(iter(self._lost))]
        self._emit(Log(f"{node} is lost: {event.reason}"))
        self._emit(ToNode(node.key, Leave(f"it was taken to be lost: {event.reason}")))
        self._emit(DisconnectNode(node.key))
        gone = Nodes([], [(node.key, _loss(node))], self._durable)
        for other in self._nodes.values():
            self._emit(ToNode(other.key, gone))

    # ------------------------------------------------------------------ what they say

    def _on_resources(self, event: FromNode, message: Resources, now: float) -> None:
        node = self._nodes.get(event.node)
        if node is not None:
            node.confirm(message.free, message.serial)
            self._emit(NodeFreed(node.key))

    def _on_alive(self, event: FromNode, message: Alive, now: float) -> None:
        node = self._nodes.get(event.node)
        if node is not None:
            node.unanswered = 0
            node.heard_at, node.answered = now, message.serial

    def _on_tick(self, event: Tick, now: float) -> None:
        for key in self._deadlines.due(now):
            if key == _ANNOUNCE:
                self._announce(now)
            elif key == self.head:
                self._ask(now)
            else:
                reason = f"its connection was lost ({self._nodes[key].reason}), and it did not come back"
                self._emit(NodeLost(key, reason))

    def _ask(self, now: float) -> None:
        self._serial += 1
        for node in self.living():
            if node.key == self.head:
                continue
            if node.unanswered >= UNANSWERED_MAX:
                self._emit(NodeLost(node.key, f"it has not answered for {PATIENCE_S:.0f} seconds"))
            else:
                node.unanswered += 1
                self._emit(ToNode(node.key, AreYouAlive(self._serial, node.answered)))
        if not self.is_alone:
            self._deadlines.set(self.head, now + ASK_S)

    def check_invariants(self) -> None:
        for node in self._nodes.values():
            self._require(node.alive and node.key not in self._lost, f"{node} is both there and lost")
            self._require(node.key not in self._expected, f"{node} is there and expected")
            self._require(node.key != self.head or not node.away, "the head is away")
            self._require(node.announced != (node.key in self._newcomers), f"{node} is announced wrongly")
            node.check()
        self._require(not self._newcomers or _ANNOUNCE in self._deadlines, "newcomers are never announced")


def _key(node: int) -> bytes:
    return node.to_bytes(8, "big")


def _loss(node: Node) -> str:
    return f"{node} is lost: {node.reason}"


def _entry(node: Node) -> NodeEntry:
    if node.entry is None:
        node.entry = NodeEntry(node.key, node.address, node.hostname, node.relayed)
    return node.entry
