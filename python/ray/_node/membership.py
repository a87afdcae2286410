"""How the manager of a node and the control service hear of each other: within one process, or over a link.

`HeadNode` hosts the control service, and hands messages over as they are. What that wants to be kept it passes on as
`Commit`, and holds back what is said afterwards until `Durable` comes: nothing is acknowledged that could be lost.
It is also the port of nodes that only connect outwards: who wants one of them, or a process there, comes to the head as
a stranger, and the head has that node call back.

`WorkerNode` sends messages to the head and receives its answers as frames. When the link breaks it looks for the head,
or for the next one, at the same addresses, says what is on it, and repeats what was not heard (`Heard`). The head that
had lost it repeats what the node has not heard (`unheard`). Meanwhile everything on the node goes on; what needs the
control service waits.

To a shell both look alike: events go in, and effects come out. Still without input or output.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from ray._control import messages
from ray._control.machine import Effect, Event, Log, Save, Tick, ToNode, earliest
from ray._control.node_records import DisconnectNode
from ray._node import events, peer_protocol
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, Shutdown
from ray._node.unheard import UNHEARD_MAX, Unheard
from ray._protocol import ROLE_NODE

if TYPE_CHECKING:
    from ray._control.service import ControlService
    from ray._node.manager import NodeManager
    from ray._protocol import Message

Membership: TypeAlias = "HeadNode | WorkerNode"

SEEK_AGAIN_S: Final = 0.1
"""Pause between looks for a head."""

HEADLESS_S: Final = 60.0
"""How long a node waits for a head that keeps records; `RAY_gcs_rpc_server_reconnect_timeout_s` is another time. Then
it ends, with everything on it."""

BLIP_S: Final = 2.0
"""The same for a head that keeps none: only the link can have broken."""

STRANGERS_MAX: Final = 1024
"""Strangers that wait for a node which has not come back to a new head yet; more are refused. As many as are held."""

KEPT_MAX: Final = 100_000
"""Messages that a node keeps until the control service has heard them; beyond it the node ends."""


class Commit(Effect, frozen=True):
    """Make these records safe, all or none; then tell with `Durable`. Commits are numbered from 1."""

    number: int
    records: tuple[Save, ...]


class Durable(Event, frozen=True):
    """All commits up to this number are safe."""

    number: int


class Seek(Effect, frozen=True):
    """Ask who listens at these addresses, one after another. Answered by `Found` or `NotFound`."""

    addresses: tuple[str, ...]


class Found(Event, frozen=True):
    """A node of the cluster listens at that address."""

    node: int
    address: str


class NotFound(Event, frozen=True):
    """Nobody of the cluster does. `refused`: there is a host, and no process that listens."""

    addresses: tuple[str, ...]
    why: str
    refused: bool


def hear_peer(frame: FrameCame) -> tuple[list[Event], list[Effect]]:
    """What another node says to this one as a peer; who does not speak the protocol loses this link, and no more."""
    try:
        return [events.FromPeer(frame.proc, peer_protocol.decode(frame.kind, frame.body))], []
    except msgspec.MsgspecError as error:
        text = f"node {frame.proc:016x} sent a malformed message to this one: {error}; closing the link"
        return [], [Log(text), events.Disconnect(frame.proc)]


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
        self._sought: dict[str, int] = {}
        """Nodes that went away, by the address at which they are looked for."""
        self._unheard = Unheard()
        self._full: dict[int, None] = {}
        """Nodes for which more waits than is kept."""
        self._heard: deque[Event] = deque()
        self._records: list[Save] = []
        self._commits = 0
        self._gate: deque[tuple[int, Effect]] = deque()
        """What is to be said once a commit is safe, in order."""
        self._out: list[Effect] = []
        self._strangers: dict[int, int] = {}
        """Whom strangers want, by ticket, as long as nodes may still come back on which that could be."""
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
            case CoreLeft(proc=proc) if proc in self._links:
                self._on_link_lost(event, now)
            case FrameCame(proc=proc) if proc in self._links:
                self._on_node_frame(event, now)
            case Durable(number=number):
                while self._gate and self._gate[0][0] <= number:
                    self._say(self._gate.popleft()[1])
            case NotFound():
                self._on_not_found(event, now)
            case Found(address=address):
                self._sought.pop(address, None)  # it lives, and will connect
            case events.StrangerCame(ticket=ticket, target=target):
                self._strangers[ticket] = target
            case Tick():
                self._perform(self.control.tick(now))
                self._heard.append(event)
            case _:
                self._heard.append(event)
        return self._run(now)

    def next_deadline(self) -> float | None:
        return earliest(self.manager.next_deadline(), self.control.next_deadline())

    def _run(self, now: float) -> list[Effect]:
        if self._strangers:
            self._see_to_strangers()
        # What the manager decides on one event is performed before what the control service makes of it.
        while self._heard or self._full:
            while self._full:
                node, _ = self._full.popitem()
                why = f"more than {UNHEARD_MAX} messages wait for it"
                self._perform(self.control.node_left(node, why, now, ended=True))
            if not self._heard:
                break
            for effect in self.manager.handle(self._heard.popleft(), now):
                if isinstance(effect, events.ToControl):
                    self._to_control(self._key, effect.message, now)
                elif isinstance(effect, events.KnowNode) and self._is_relayed(effect.node):
                    pass  # its address is this node's own, which would seek it at itself
                elif isinstance(effect, events.ToPeer) and effect.node not in self._links:
                    # It is away. The head makes no connections to nodes: who comes back greets on one of its own.
                    self._heard.append(events.LinkLost(effect.node))
                else:
                    self._out.append(effect)
        if self._records:
            self._commits += 1
            self._out.append(Commit(self._commits, tuple(self._records)))
            self._records.clear()
        out, self._out = self._out, []
        return out

    def _to_control(self, node: int, message: Message, now: float) -> None:
        self._perform(self.control.handle(node, message, now))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Save():
                    self._records.append(effect)
                case Log():
                    self._out.append(effect)
                case ToNode(message=messages.AreYouAlive()):
                    self._say(effect)
                case _ if self._records:
                    self._gate.append((self._commits + 1, effect))
                case _ if self._gate:
                    self._gate.append((self._gate[-1][0], effect))
                case _:
                    self._say(effect)

    def _say(self, effect: Effect) -> None:
        match effect:
            case ToNode(node=node, message=message) if node == self._key:
                self._heard.append(events.FromControl(message))
            case ToNode(node=node, message=message) if self.control.nodes.get(node) is not None:
                may_speak = self._unheard.keep(node, message)
                if self._unheard.is_full(node):
                    self._full[node] = None
                if may_speak and node in self._links:
                    self._out.append(effect)
            case ToNode(node=node) if node not in self._links:
                pass  # it is lost
            case DisconnectNode(node=node):
                self._unheard.forget(node)
                self._links.pop(node, None)
                self._out.append(events.Disconnect(node))
            case _:
                self._out.append(effect)

    def _on_link_lost(self, left: CoreLeft, now: float) -> None:
        del self._links[left.proc]
        self._unheard.lost_connection(left.proc)
        self._heard.append(events.LinkLost(left.proc))
        node = self.control.nodes.get(left.proc)
        if node is not None and node.address and not node.relayed and not left.ended:
            # A process that was killed may leave like a broken link; but then nobody listens at its address.
            self._sought[node.address] = node.key
            self._out.append(Seek((node.address,)))
        self._perform(self.control.node_left(left.proc, left.reason, now, ended=left.ended))

    def _on_not_found(self, event: NotFound, now: float) -> None:
        node = self.control.nodes.get(self._sought.pop(event.addresses[0], 0))
        if node is not None and node.away and event.refused:
            self._perform(self.control.node_left(node.key, event.why, now, ended=True))

    def _see_to_strangers(self) -> None:
        """Have those called back for whose node is here, and refuse those who cannot be waited for."""
        for ticket, target in list(self._strangers.items()):
            node = self.control.node_to_call_back(target)
            if node and node in self._links:
                # Nothing that is to be kept first is behind it, and it must not wait.
                self._out.append(ToNode(node, messages.CallBack(ticket)))
            elif self.control.is_returning and len(self._strangers) <= STRANGERS_MAX:
                continue
            else:
                self._out.append(events.RefuseStranger(ticket))
            del self._strangers[ticket]

    def _is_relayed(self, node: int) -> bool:
        known = self.control.nodes.get(node)
        return known is not None and known.relayed

    def _on_node_frame(self, frame: FrameCame, now: float) -> None:
        if frame.kind in peer_protocol.PEER_MESSAGES:
            heard, wrong = hear_peer(frame)
            self._heard.extend(heard)
            self._out.extend(wrong)
            return
        try:
            message = messages.decode(frame.kind, frame.body) if frame.kind in messages.TO_CONTROL else None
        except msgspec.MsgspecError as error:
            message = None
            self._out.append(Log(f"node {frame.proc:016x} sent a malformed message: {error}"))
        if message is None:
            self._out.append(Log(f"node {frame.proc:016x} does not speak the protocol (kind {frame.kind})"))
            self._out.append(events.Disconnect(frame.proc))
        else:
            match message:
                case messages.Alive(heard=count):
                    self._unheard.heard(frame.proc, count)
                case messages.NodeHello(returns=True, head=head, heard=count) if head == self._key:
                    for unheard in self._unheard.greeted(frame.proc, count):
                        self._out.append(ToNode(frame.proc, unheard))
            self._to_control(frame.proc, message, now)


class WorkerNode:
    """A node whose control service is on another one.

    Args:
        manager: Its manager.
        head: The node that hosts the control service.
        addresses: Where that, or the next one, is found.
        headless_s: How long to wait for a head that keeps records.
    """

    def __init__(
        self, manager: NodeManager, head: int, addresses: tuple[str, ...], headless_s: float = HEADLESS_S
    ) -> None:
        self.manager = manager
        manager.remembers = True
        self.head = head
        self.joined = False
        """The head has answered: there are other nodes, at least itself."""
        self._addresses = addresses
        self._headless_s = headless_s
        self._durable = False
        self._seeking = False
        self._seek_at: float | None = None
        self._sought_at = 0.0
        """When the last look for a head began."""
        self._give_up_at = 0.0
        self._lost_why = ""
        self._kept: deque[Message] = deque()
        """What was said and not heard, in order."""
        self._kept_from = 0
        """How much of what was ever said was heard."""
        self._had = 0
        """How many messages of `REPEATED` this head has said."""
        self._links: dict[int, None] = {}
        """Other nodes that are connected, for what nodes say to each other. Their loss is the head's to notice."""

    def start(self, now: float) -> list[Effect]:
        """Introduce the node."""
        self.manager.fence.greet(now)
        return [ToNode(self.head, self.manager.facts.hello())]

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case FrameCame(kind=kind) if kind in peer_protocol.PEER_MESSAGES and self._is_node(event.proc):
                heard, wrong = hear_peer(event)
                return [*wrong, *(effect for said in heard for effect in self._manage(said, now))]
            case FrameCame(proc=proc, kind=kind, body=body) if proc == self.head:
                if kind not in messages.FROM_CONTROL:
                    return [Log(f"the head sent a message of unknown kind {kind}; ignored")]
                return self._on_control(messages.decode(kind, body), now)
            case CoreLeft(proc=proc) if proc == self.head:
                self._links.pop(proc, None)
                return [*self._manage(events.LinkLost(proc), now), *self._on_head_lost(event, now)]
            case CoreJoined(proc=proc, role=role) if role == ROLE_NODE:
                self._links[proc] = None
                return []
            case CoreLeft(proc=proc) if self._is_node(proc):
                self._links.pop(proc, None)
                return self._manage(events.LinkLost(proc), now)
            case Found(node=node, address=address) if self._seeking:
                return self._on_found(node, address, now)
            case NotFound() if self._seeking:
                return self._on_not_found(event, now)
            case Found() | NotFound():
                return []
            case Tick() if self._seek_at is not None and self._seek_at <= now:
                self._seek_at, self._sought_at = None, now
                return [Seek(self._addresses), *self._manage(event, now)]
        return self._manage(event, now)

    def next_deadline(self) -> float | None:
        return earliest(self._seek_at, self.manager.next_deadline())

    def _is_node(self, proc: int) -> bool:
        """Whether that is another node: one that has connected to this one, or that this one may have connected to."""
        return proc in self._links or proc in self.manager.nodes

    # ------------------------------------------------------------------ with a head

    def _manage(self, event: Event, now: float) -> list[Effect]:
        out: list[Effect] = []
        for effect in self.manager.handle(event, now):
            if isinstance(effect, events.ToControl):
                self._tell(effect.message, out)
            else:
                out.append(effect)
        return out

    def _tell(self, message: Message, out: list[Effect]) -> None:
        if isinstance(message, messages.Alive):
            message = msgspec.structs.replace(message, heard=self._had)
        if type(message) not in messages.NEWS:
            self._kept.append(message)
            if len(self._kept) > KEPT_MAX:
                out.append(Shutdown(f"more than {KEPT_MAX} messages wait for the head. {self._lost_why}", wanted=False))
        if not self._seeking:
            out.append(ToNode(self.head, message))

    def _on_control(self, message: Message, now: float) -> list[Effect]:
        self.joined = True
        self._had += type(message) in messages.REPEATED
        match message:
            case messages.CallBack(ticket=ticket):
                return [events.CallBack(self.head, ticket)]
            case messages.Heard(count=count):
                for _ in range(min(count - self._kept_from, len(self._kept))):
                    self._kept.popleft()
                self._kept_from = max(count, self._kept_from)
                return []
            case messages.Nodes(durable=durable):
                self._durable = durable
        return self._manage(events.FromControl(message), now)

    # ------------------------------------------------------------------ without one

    def _on_head_lost(self, left: CoreLeft, now: float) -> list[Effect]:
        why = f"the connection to the head was lost ({left.reason})"
        if self._seeking or not self.joined or (left.ended and not self._durable):
            return [Shutdown(why, wanted=False)] if not self._seeking else []
        self._seeking, self._lost_why, self._sought_at = True, why, now
        patience_s = self._headless_s if self._durable else BLIP_S
        self._give_up_at = now + patience_s
        return [Log(f"{why}; looking for it for {patience_s:.0f} s"), Seek(self._addresses)]

    def _on_not_found(self, event: NotFound, now: float) -> list[Effect]:
        if now >= self._give_up_at:
            return [Shutdown(f"{self._lost_why}, and no head was found: {event.why}", wanted=False)]
        self._seek_at = now + SEEK_AGAIN_S
        return self._manage(events.HeadAbsent(self._sought_at), now) if event.refused else []

    def _on_found(self, node: int, address: str, now: float) -> list[Effect]:
        """Say what is here, and then again what was not heard."""
        hello = msgspec.structs.replace(self.manager.facts.hello(), returns=True, head=self.head, heard=self._had)
        if node != self.head:
            self._had = 0
        self.head, self._seeking = node, False
        self.manager.fence.greet(now)
        said = list(self._kept)
        out: list[Effect] = []
        out.append(events.KnowNode(node, address))
        out.append(Log(f"a head was found at {address}: node {node:016x}"))
        out += [ToNode(node, message) for message in (hello, *self.manager.announcement(now))]
        out.append(ToNode(node, messages.Announced(self._kept_from, self.manager.owners_elsewhere())))
        out += [ToNode(node, message) for message in said]
        for effect in self.manager.say_demands_again(now):
            if isinstance(effect, events.ToControl):
                self._tell(effect.message, out)
            else:
                out.append(effect)
        return out
