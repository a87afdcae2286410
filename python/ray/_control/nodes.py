"""The nodes of the cluster: which there are, what each has, and whether it still lives.

Owns the list of nodes and the view of their free resources. Does not place anything.

A node lives as long as its connection, and answers when asked whether it does. Who leaves `UNANSWERED_MAX`
questions unanswered is taken to be lost; should it come back, it is told to leave, because everything on it was given
up meanwhile.

Invariants: every node has been announced to every other exactly once, and its loss too; the head is never lost.
"""

from __future__ import annotations

from typing import Final

from ray._control.machine import Deadlines, FromNode, Log, Machine, Tick, ToNode
from ray._control.messages import Alive, AreYouAlive, Leave, NodeEntry, NodeHello, Nodes, Resources
from ray._control.node_records import DisconnectNode, Node, NodeCame, NodeFreed, NodeLost

ASK_S: Final = 2.0
"""How often nodes are asked whether they live. Only with more than one node; a question is 20 bytes."""

UNANSWERED_MAX: Final = 4
"""A node that has left so many questions in a row unanswered is lost, after 8 to 10 seconds. Questions are counted, not
seconds, so that a head which was stopped for a while does not take everybody for lost."""

LOST_REMEMBERED: Final = 1000
"""Lost nodes that can still be listed; older ones are forgotten."""


class NodeTable(Machine):
    """See the module's docstring.

    Args:
        head: The node that hosts the control service.
    """

    def __init__(self, *, head: int, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self.head = head
        self._nodes: dict[int, Node] = {}
        self._lost: dict[int, Node] = {}
        self._serial = 0
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {NodeLost: self._on_lost, Tick: self._on_tick}
        self._node_messages = {NodeHello: self._on_hello, Resources: self._on_resources, Alive: self._on_alive}

    # ------------------------------------------------------------------ queries

    def get(self, key: int) -> Node | None:
        """The node, if it lives."""
        return self._nodes.get(key)

    def find(self, key: int) -> Node | None:
        """The node, if it is remembered at all."""
        return self._nodes.get(key) or self._lost.get(key)

    def living(self) -> list[Node]:
        """Nodes that live, in the order in which they joined."""
        return list(self._nodes.values())

    def all(self) -> list[Node]:
        """Also those that were lost."""
        return [*self._nodes.values(), *self._lost.values()]

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
        if message.node != event.node or message.node in self._nodes:
            self._emit(Log(f"node {event.node:016x} introduced itself twice, or as another one; ignored"))
            return
        if message.node in self._lost:
            reason = f"it was taken to be lost: {self._lost[message.node].reason}"
            self._emit(ToNode(message.node, Leave(reason)))
            return
        new = Node(
            key=message.node,
            address=message.address,
            host=message.host,
            hostname=message.hostname,
            name=message.name,
            socket=message.socket,
            session_dir=message.session_dir,
            total=dict(message.resources),
            labels=message.labels,
            free=dict(message.resources),
            joined_at=now,
        )
        others = self.living()
        self._nodes[new.key] = new
        if others:
            self._emit(ToNode(new.key, Nodes([_entry(node) for node in others], [])))
            for node in others:
                self._emit(ToNode(node.key, Nodes([_entry(new)], [])))
            self._emit(Log(f"{new} has joined"))
            if "ask" not in self._deadlines:
                self._deadlines.set("ask", now + ASK_S)
        self._emit(NodeCame(new.key))

    def _on_lost(self, event: NodeLost, now: float) -> None:
        node = self._nodes.pop(event.node, None)
        if node is None:
            return
        self._require(node.key != self.head, "the head has lost itself")
        node.alive, node.reason = False, event.reason
        node.free, node.assumed = {}, []
        self._lost[node.key] = node
        if len(self._lost) > LOST_REMEMBERED:
            del self._lost[next(iter(self._lost))]
        self._emit(Log(f"{node} is lost: {event.reason}"))
        self._emit(ToNode(node.key, Leave(f"it was taken to be lost: {event.reason}")))
        self._emit(DisconnectNode(node.key))
        for other in self._nodes.values():
            self._emit(ToNode(other.key, Nodes([], [(node.key, f"{node} is lost: {event.reason}")])))

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

    def _on_tick(self, event: Tick, now: float) -> None:
        if not self._deadlines.due(now):
            return
        self._serial += 1
        for node in self.living():
            if node.key == self.head:
                continue
            if node.unanswered >= UNANSWERED_MAX:
                self._emit(NodeLost(node.key, f"it has not answered for {UNANSWERED_MAX * ASK_S:.0f} seconds"))
            else:
                node.unanswered += 1
                self._emit(ToNode(node.key, AreYouAlive(self._serial)))
        if not self.is_alone:
            self._deadlines.set("ask", now + ASK_S)

    def check_invariants(self) -> None:
        for node in self._nodes.values():
            self._require(node.alive and node.key not in self._lost, f"{node} is both there and lost")


def _entry(node: Node) -> NodeEntry:
    return NodeEntry(node.key, node.address, node.hostname)
