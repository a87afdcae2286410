"""How the manager of a node and the control service hear of each other: within one process, or over a link.

`HeadNode` hosts the control service, and hands messages over as they are. `WorkerNode` sends them to the head and
receives its answers as frames. To a shell both look alike: events go in, and effects come out. Still without input or
output.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from ray._control import messages
from ray._control.machine import Effect, Event, Log, Tick, ToNode, earliest
from ray._control.node_records import DisconnectNode
from ray._node import events
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, Shutdown
from ray._protocol import ROLE_NODE

if TYPE_CHECKING:
    from ray._control.service import ControlService
    from ray._node.manager import NodeManager
    from ray._protocol import Message

Membership: TypeAlias = "HeadNode | WorkerNode"


class HeadNode:
    """The node that hosts the control service.

    Args:
        manager: Its own manager.
        control: The control service.
    """

    def __init__(self, manager: NodeManager, control: ControlService) -> None:
        self.manager = manager
        self.control = control
        self._key = self.head = manager.facts.node
        self._links: dict[int, None] = {}
        """Nodes that are connected, also those that have not introduced themselves yet."""
        self._heard: deque[Event] = deque()
        self._out: list[Effect] = []
        self.joined = False

    def start(self, now: float) -> list[Effect]:
        """Join the own cluster."""
        self.joined = True
        self._to_control(self._key, self.manager.facts.hello(), now)
        return self._run(now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case CoreJoined(role=role, proc=proc) if role == ROLE_NODE:
                self._links[proc] = None
            case CoreLeft(proc=proc, reason=reason) if proc in self._links:
                del self._links[proc]
                self._perform(self.control.node_left(proc, reason, now))
            case FrameCame(proc=proc) if proc in self._links:
                self._on_node_frame(event, now)
            case Tick():
                self._perform(self.control.tick(now))
                self._heard.append(event)
            case _:
                self._heard.append(event)
        return self._run(now)

    def next_deadline(self) -> float | None:
        return earliest(self.manager.next_deadline(), self.control.next_deadline())

    def _run(self, now: float) -> list[Effect]:
        # What the manager decides on one event is performed before what the control service makes of it.
        while self._heard:
            for effect in self.manager.handle(self._heard.popleft(), now):
                if isinstance(effect, events.ToControl):
                    self._to_control(self._key, effect.message, now)
                else:
                    self._out.append(effect)
        out, self._out = self._out, []
        return out

    def _to_control(self, node: int, message: Message, now: float) -> None:
        self._perform(self.control.handle(node, message, now))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case ToNode(node=node, message=message) if node == self._key:
                    self._heard.append(events.FromControl(message))
                case ToNode(node=node) if node not in self._links:
                    pass  # its loss was noticed, or follows
                case DisconnectNode(node=node):
                    self._links.pop(node, None)
                    self._out.append(events.Disconnect(node))
                case _:
                    self._out.append(effect)

    def _on_node_frame(self, frame: FrameCame, now: float) -> None:
        try:
            message = messages.decode(frame.kind, frame.body) if frame.kind in messages.TO_CONTROL else None
        except msgspec.MsgspecError as error:
            message = None
            self._out.append(Log(f"node {frame.proc:016x} sent a malformed message: {error}"))
        if message is None:
            self._out.append(Log(f"node {frame.proc:016x} does not speak the protocol (kind {frame.kind})"))
            self._out.append(events.Disconnect(frame.proc))
        else:
            self._to_control(frame.proc, message, now)


class WorkerNode:
    """A node whose control service is on another one.

    Args:
        manager: Its manager.
        head: The node that hosts the control service.
    """

    def __init__(self, manager: NodeManager, head: int) -> None:
        self.manager = manager
        self.head = head
        self.joined = False
        """The head has answered: there are other nodes, at least itself."""

    def start(self, now: float) -> list[Effect]:
        """Introduce the node."""
        return [ToNode(self.head, self.manager.facts.hello())]

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case FrameCame(proc=proc, kind=kind, body=body) if proc == self.head:
                if kind not in messages.FROM_CONTROL:
                    return [Log(f"the head sent a message of unknown kind {kind}; ignored")]
                self.joined = True
                event = events.FromControl(messages.decode(kind, body))
            case CoreLeft(proc=proc, reason=reason) if proc == self.head:
                return [Shutdown(f"the connection to the head was lost ({reason})", wanted=False)]
            case CoreJoined(role=role) if role == ROLE_NODE:
                return []
        return [
            ToNode(self.head, effect.message) if isinstance(effect, events.ToControl) else effect
            for effect in self.manager.handle(event, now)
        ]

    def next_deadline(self) -> float | None:
        return self.manager.next_deadline()
