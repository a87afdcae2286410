"""Copies on this node of values that lie on other nodes, or on its own disk.

Owns which blocks are pulled, in which order and at most how many at a time; which members wait for a copy and which
hold one; and, by `directory`, who else has copies of the blocks that lie here. Does not move bytes: that is the
shell's, by the core's bulk client.

The life of a copy:

    unknown    its node has not been heard of yet, which may be a moment after it joined
    waiting    for admission: `PULLS_MAX`, `IN_FLIGHT_BYTES_MAX`; gets before prefetches, each in order
    room       for a segment of its size
    locating   for the answer of the origin's node: from whom to pull
    pulling    bytes are under way; others may pull what has arrived from here
    pausing    after a failure, until the next attempt
    ending     nobody wants it any more, but its segment is still written
    here       whole: held by members, or idle, a cache until room is needed

A copy is named by its object and its origin, because an object that was lost and made again is another block. Each
has a segment of its own, rounded up to pages: a descriptor here and a mapping in each reader, which for the smallest
copies (100 KiB) costs about as much as moving them; in return a copy goes when its readers go, whatever else is read.

What this node itself has spilled is copied back in the same way, but for two steps: there is nobody to ask where it
is (`RestoreWanted` instead of `locating`), and who does not want it any more waits for its end.

When copies that are gathered together do not fit together, members take turns: see `turns`.

A member holds a reference to the object until it has its answer, so the origin is not freed under a pull.

Invariants: a copy is wanted, held, here, or ending; the members that want or hold it know it; bytes in flight are
those of copies between `room` and `here`; what waits for admission does so behind what came before it, and only while
something is in flight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from ray._control.machine import Deadlines, Event, Machine, ProcessLeft, Received, Send, Tick
from ray._node.directory import Directory
from ray._node.events import (
    CancelPull,
    CopyEvicted,
    CopyHeld,
    CopyIdle,
    FromPeer,
    LinkLost,
    LocateSpill,
    PeerJoined,
    PeerLeft,
    PullDone,
    RestoreWanted,
    RoomDenied,
    RoomGranted,
    RoomReturned,
    RoomStalled,
    RoomUnwanted,
    RoomWanted,
    ShareCopy,
    StartPull,
    ToPeer,
)
from ray._node.peer_protocol import Copied, Dropped, Locate, Located, PeerMessage, Uncopied
from ray._node.spill_files import SPILLED
from ray._node.turns import TURN_S, TURN_S_MAX, Turns
from ray._protocol import DENIED_DISK_FULL, DENIED_TURN, Pull, PullReleased, SegmentDenied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray._control.machine import Effects

PULLS_MAX: Final = 16
"""Pulls at a time, which is how many threads the bulk client has. More wait in order."""

IN_FLIGHT_BYTES_MAX: Final = 1 << 30
"""Bytes that are being pulled. More wait in order; a larger block is pulled alone."""

PAUSES_S: Final = (0.0, 0.2, 1.0)
"""Before each further attempt, after all sources failed. Then the value counts as lost."""

UNKNOWN_NODE_S: Final = 10.0
"""How long a node that nobody has told us of may take to be introduced before its values count as lost."""

DEAD_REMEMBERED: Final = 10_000
"""Nodes that have left, of which nothing is waited for. Of older ones it is waited for `UNKNOWN_NODE_S`."""

Key: TypeAlias = "tuple[bytes, int, int, int]"
"""Object, and the origin: node, segment, offset."""

_TURN: Final[Key] = (b"", 0, 0, 0)
"""The key of the deadline of a turn."""

_IN_FLIGHT: Final = ("room", "locating", "pulling", "pausing", "ending")


class Copy(msgspec.Struct):
    """See the module's docstring. `segment` is this node's, and 0 before `locating`."""

    key: Key
    len: int
    ticket: int
    state: str = "waiting"
    segment: int = 0
    size: int = 0
    failures: int = 0
    wants: dict[tuple[int, int], None] = {}
    """Who waits: member and corr; corr 0 for a prefetch."""
    holders: dict[int, None] = {}

    @property
    def is_got(self) -> bool:
        """Whether somebody waits for it, rather than only thinks to need it."""
        return any(corr for _, corr in self.wants)


class PullTable(Machine):
    """See the module's docstring.

    Args:
        node: This node.
    """

    def __init__(self, *, node: int, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self.directory = Directory(node)
        self._node = node
        self._serial = 0
        self._copies: dict[Key, Copy] = {}
        self._tickets: dict[int, Copy] = {}
        """Copies that are not here yet."""
        self._by_segment: dict[int, Copy] = {}
        """Copies that are here."""
        self._by_member: dict[int, dict[Key, None]] = {}
        self._gets: dict[Key, None] = {}
        self._prefetches: dict[Key, None] = {}
        self._in_flight = 0
        self._running = 0
        self._finished = self._failed = 0
        """Attempts, ever since the node started."""
        self._peers: dict[int, str] = {}
        self._dead: dict[int, None] = {}
        self._turns = Turns()
        self._deadlines: Deadlines[Key] = Deadlines()
        self._events = {
            ProcessLeft: self._on_left,
            RoomGranted: self._on_room_granted,
            RoomDenied: self._on_room_denied,
            RoomStalled: self._on_room_stalled,
            PullDone: self._on_pull_done,
            CopyEvicted: self._on_evicted,
            PeerJoined: self._on_peer_joined,
            PeerLeft: self._on_peer_left,
            LinkLost: self._on_link_lost,
            FromPeer: self._on_from_peer,
            Tick: self._on_tick,
        }
        self._messages = {Pull: self._on_pull, PullReleased: self._on_released}
        self._peer_messages: dict[type[PeerMessage], Callable[[int, Any, float], None]] = {
            Locate: self._on_locate,
            Located: self._on_located,
            Copied: lambda node, message, now: self.directory.copied(node, message),
            Uncopied: lambda node, message, now: self.directory.ended(node, message, message.refused),
            Dropped: lambda node, message, now: self.directory.ended(node, message, []),
        }

    def takes(self, event: Event) -> bool:
        if type(event) is FromPeer:
            return type(event.message) in self._peer_messages
        return super().takes(event)

    # ------------------------------------------------------------------ queries

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        return {
            "copies": len(self._by_segment),
            "copy_bytes": sum(copy.size for copy in self._by_segment.values()),
            "pulls_running": self._running,
            "pulls_waiting": len(self._gets) + len(self._prefetches),
            "pull_bytes_in_flight": self._in_flight,
            "members_waiting_for_a_turn": len(self._turns),
            "pulls_finished": self._finished,
            "pulls_failed": self._failed,
            "blocks_copied_elsewhere": len(self.directory),
        }

    # ------------------------------------------------------------------ members

    def _on_pull(self, event: Received, message: Pull, now: float) -> None:
        key = (message.object, message.node, message.segment, message.offset)
        corr = 0 if message.prefetch else event.corr
        if event.sender in self._turns:
            if corr:
                self._turns.park(event.sender, corr, message)
            return
        copy = self._copies.get(key)
        if copy is not None and copy.state == "here":
            if corr:
                self._share(copy, event.sender, corr)
            return
        is_spilled = message.segment >= SPILLED
        if (message.node == self._node and not is_spilled) or message.len <= 0:
            text = (
                "the value lies on this node, and needs no copy" if message.len > 0 else "an empty block was asked for"
            )
            self._deny(event.sender, corr, text, kept=True)
            return
        if copy is None:
            self._serial += 1
            copy = self._copies[key] = Copy(key, message.len, self._serial)
            self._tickets[copy.ticket] = copy
        copy.wants[event.sender, corr] = None
        self._by_member.setdefault(event.sender, {})[key] = None
        if copy.state == "waiting":
            self._enqueue(copy, now)
            self._admit()

    def _on_released(self, event: Received, message: PullReleased, now: float) -> None:
        self._turns.withdraw(event.sender, message.object)
        for key in [key for key in self._by_member.get(event.sender, {}) if key[0] == message.object]:
            self._let_go(self._copies[key], event.sender)
        self._admit()

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._turns.leave(event.proc)
        for key in list(self._by_member.get(event.proc, {})):
            self._let_go(self._copies[key], event.proc)
        self._admit()

    def _let_go(self, copy: Copy, member: int) -> None:
        """The member neither holds the copy nor waits for it any more."""
        self._forget_member(copy, member)
        for want in [want for want in copy.wants if want[0] == member]:
            del copy.wants[want]
        if copy.holders.pop(member, 0) is None and not copy.holders:
            self._emit(CopyIdle(copy.segment))
        if copy.state not in ("here", "ending") and not copy.wants:
            self._abandon(copy)

    def _forget_member(self, copy: Copy, member: int) -> None:
        known = self._by_member[member]
        del known[copy.key]
        if not known:
            del self._by_member[member]

    def _abandon(self, copy: Copy) -> None:
        """Nobody wants it any more."""
        match copy.state:
            case "pulling":
                copy.state = "ending"
                if copy.key[1] != self._node:
                    self._emit(CancelPull(copy.ticket))  # from the disk it is here as soon as it is cancelled
                return
            case "room":
                self._emit(RoomUnwanted(copy.ticket, self._node))
            case "locating" | "pausing":
                self._tell_origin(copy, Uncopied(*_block(copy)))
        self._remove(copy)

    def _share(self, copy: Copy, member: int, corr: int) -> None:
        if not copy.holders:
            self._emit(CopyHeld(copy.segment))
        copy.holders[member] = None
        self._by_member.setdefault(member, {})[copy.key] = None
        self._emit(ShareCopy(member, corr, copy.segment, copy.size, 0))

    def _deny(self, member: int, corr: int, text: str, *, kept: bool, why: int = 0) -> None:
        if corr:
            self._emit(Send(member, SegmentDenied(text, kept, why), corr))

    # ------------------------------------------------------------------ turns

    def handle(self, event: Event, now: float) -> Effects:
        effects = super().handle(event, now)
        if not self._turns:
            self._deadlines.clear(_TURN)
        elif not any(copy.is_got for copy in self._tickets.values()):
            if (at := self._deadlines.get(_TURN)) is None or at > now + TURN_S:
                self._deadlines.set(_TURN, now + TURN_S)
        elif _TURN not in self._deadlines:
            self._deadlines.set(_TURN, now + TURN_S_MAX)
        return effects

    def _on_room_stalled(self, event: RoomStalled, now: float) -> None:
        """Members are known in the order in which they began to have something to do with copies. What a process makes
        is needed to end something, and goes before what only begins.
        """
        gathering = [member for member in self._by_member if any(self._waiting_for(member))]
        for member in gathering[0 if event.others else 1 :]:
            self._turns.wait(member)
            for copy in list(self._waiting_for(member)):
                self._send_away(copy, member)
        self._admit()

    def _waiting_for(self, member: int) -> Iterable[Copy]:
        for key in self._by_member[member]:
            copy = self._copies[key]
            if any(proc == member and corr for proc, corr in copy.wants):
                yield copy

    def _send_away(self, copy: Copy, member: int) -> None:
        """It lets go of what it has, and asks again."""
        for want in [want for want in copy.wants if want[0] == member]:
            del copy.wants[want]
            self._deny(member, want[1], "others need the room first", kept=True, why=DENIED_TURN)
        self._forget_member(copy, member)
        if copy.state != "ending" and not copy.wants:
            self._abandon(copy)

    def _next_turn(self, now: float) -> None:
        member, parked = self._turns.take_next()
        for corr, question in parked.items():
            self._on_pull(Received(member, question, corr), question, now)

    # ------------------------------------------------------------------ admission

    def _enqueue(self, copy: Copy, now: float) -> None:
        node = copy.key[1]
        if node in self._dead:
            self._lose(copy, _gone_text(node))
        elif node != self._node and node not in self._peers:
            copy.state = "unknown"
            self._deadlines.set(copy.key, now + UNKNOWN_NODE_S)
        elif copy.is_got:
            self._prefetches.pop(copy.key, None)
            self._gets[copy.key] = None
        else:
            self._prefetches[copy.key] = None

    def _admit(self) -> None:
        """Begin what may begin, strictly in order, so that a large block is not overtaken for ever."""
        while self._running < PULLS_MAX:
            queue = self._gets or self._prefetches
            if not queue:
                return
            copy = self._copies[next(iter(queue))]
            if self._in_flight and self._in_flight + copy.len > IN_FLIGHT_BYTES_MAX:
                return
            del queue[copy.key]
            self._in_flight += copy.len
            self._running += 1
            copy.state = "room"
            self._emit(RoomWanted(copy.ticket, self._node, copy.len, waits=copy.is_got))

    def _remove(self, copy: Copy) -> None:
        """Forget a copy that did not come about."""
        if copy.state in _IN_FLIGHT:
            self._in_flight -= copy.len
            self._running -= 1
        if copy.segment:
            self._emit(RoomReturned(copy.segment))
        self._gets.pop(copy.key, None)
        self._prefetches.pop(copy.key, None)
        self._deadlines.clear(copy.key)
        del self._tickets[copy.ticket]
        del self._copies[copy.key]

    def _lose(self, copy: Copy, text: str, *, kept: bool = False, why: int = 0) -> None:
        """Whoever waits is told that there will be no copy."""
        for member, corr in copy.wants:
            self._deny(member, corr, text, kept=kept, why=why)
        for member in dict.fromkeys(member for member, _ in copy.wants):
            self._forget_member(copy, member)
        self._remove(copy)

    # ------------------------------------------------------------------ a pull

    def _on_room_granted(self, event: RoomGranted, now: float) -> None:
        copy = self._tickets.get(event.ticket)
        if copy is None:
            self._emit(RoomReturned(event.segment))  # the grant crossed the withdrawal
            return
        copy.segment, copy.size = event.segment, event.size
        self._locate(copy)

    def _on_room_denied(self, event: RoomDenied, now: float) -> None:
        copy = self._tickets.get(event.ticket)
        if copy is None:
            return
        if copy.state == "locating":
            self._tell_origin(copy, Uncopied(*_block(copy)))
        copy.segment = 0
        where = "on the disk" if copy.key[1] == self._node else "of another node"
        why = DENIED_DISK_FULL if event.disk_full else 0
        self._lose(copy, f"a value {where} could not be copied to memory: {event.text}", kept=True, why=why)
        self._admit()

    def _locate(self, copy: Copy) -> None:
        name, node, segment, _ = copy.key
        if node == self._node:
            copy.state = "pulling"
            self._emit(RestoreWanted(copy.ticket, segment, name, copy.len, copy.segment))
            return
        copy.state = "locating"
        self._tell_origin(copy, Locate(*_block(copy), into=copy.segment, again=copy.failures > 0))

    def _on_located(self, node: int, message: Located, now: float) -> None:
        copy = self._copies.get((message.object, node, message.segment, message.offset))
        if copy is None or copy.state != "locating":
            return  # nobody wants it any more, which the origin was told
        sources = [
            (source, self._peers[source], segment, offset)
            for source, segment, offset in message.sources
            if source in self._peers
        ]
        copy.state = "pulling"
        self._emit(StartPull(copy.ticket, tuple(sources), copy.len, copy.segment))

    def _on_pull_done(self, event: PullDone, now: float) -> None:
        copy = self._tickets[event.ticket]
        if not event.error:
            self._finish(copy)
        else:
            self._failed += 1
            refused = [node for node, did_refuse, _ in event.failures if did_refuse]
            self._tell_origin(copy, Uncopied(*_block(copy), refused=refused))
            if not copy.wants:
                self._remove(copy)
            elif copy.state == "ending" and (copy.key[1] == self._node or copy.key[1] in self._peers):
                copy.failures = max(copy.failures, 1)
                self._locate(copy)  # wanted again while its end was under way
            else:
                self._fail(copy, event.error, refused, now)
        self._admit()

    def _finish(self, copy: Copy) -> None:
        self._in_flight -= copy.len
        self._running -= 1
        self._finished += 1
        copy.state = "here"
        del self._tickets[copy.ticket]
        self._by_segment[copy.segment] = copy
        self._tell_origin(copy, Copied(*_block(copy)))
        wants, copy.wants = copy.wants, {}
        for member in dict.fromkeys(member for member, _ in wants):
            self._forget_member(copy, member)
        for member, corr in wants:
            if corr:
                copy.holders[member] = None
                self._by_member.setdefault(member, {})[copy.key] = None
                self._emit(ShareCopy(member, corr, copy.segment, copy.size, 0))
        if not copy.holders:
            self._emit(CopyIdle(copy.segment))

    def _fail(self, copy: Copy, error: str, refused: list[int], now: float) -> None:
        node = copy.key[1]
        if node in self._dead:
            self._lose(copy, f"{_gone_text(node)}, and no copy could be had: {error}")
        elif self._is_lost(copy, refused) or copy.failures == len(PAUSES_S):
            self._lose(copy, f"the value could not be copied from node {node:016x}: {error}")
        else:
            copy.state = "pausing"
            self._deadlines.set(copy.key, now + PAUSES_S[copy.failures])
            copy.failures += 1

    def _is_lost(self, copy: Copy, refused: list[int]) -> bool:
        """Whether the origin does not have it. A node that has spilled a value may have moved it to another file since
        it said where it was.
        """
        _, node, segment, _ = copy.key
        return node in refused and (node == self._node or segment < SPILLED)

    def _on_tick(self, event: Tick, now: float) -> None:
        for key in self._deadlines.due(now):
            if key == _TURN:
                self._next_turn(now)
                continue
            copy = self._copies[key]
            if copy.state == "pausing":
                self._locate(copy)
            else:
                text = f"nobody has told this node of node {key[1]:016x}, where the value lies, within "
                self._lose(copy, f"{text}{UNKNOWN_NODE_S:.0f} s")
        self._admit()

    def _on_evicted(self, event: CopyEvicted, now: float) -> None:
        copy = self._by_segment.pop(event.segment)
        del self._copies[copy.key]
        self._tell_origin(copy, Dropped(*_block(copy)))

    # ------------------------------------------------------------------ other nodes

    def _tell_origin(self, copy: Copy, message: PeerMessage) -> None:
        if copy.key[1] in self._peers:
            self._emit(ToPeer(copy.key[1], message))

    def _on_peer_joined(self, event: PeerJoined, now: float) -> None:
        self._peers[event.node] = event.address
        for copy in [x for x in self._tickets.values() if x.state == "unknown" and x.key[1] == event.node]:
            self._deadlines.clear(copy.key)
            copy.state = "waiting"
            self._enqueue(copy, now)
        self._admit()

    def _on_peer_left(self, event: PeerLeft, now: float) -> None:
        """What is pulled goes on from copies, if it can; what has not begun is lost."""
        self._peers.pop(event.node, None)
        self._dead[event.node] = None
        if len(self._dead) > DEAD_REMEMBERED:
            del self._dead[next(iter(self._dead))]
        self.directory.peer_left(event.node)
        begun = ("pulling", "ending")
        for copy in [x for x in self._tickets.values() if x.key[1] == event.node and x.state not in begun]:
            if copy.state == "room":
                self._emit(RoomUnwanted(copy.ticket, self._node))
            self._lose(copy, _gone_text(event.node))
        self._admit()

    def _on_link_lost(self, event: LinkLost, now: float) -> None:
        """What was said last may not have come: neither what this node asked, nor what the other one copied."""
        self.directory.peer_left(event.node)
        for copy in [x for x in self._tickets.values() if x.key[1] == event.node and x.state == "locating"]:
            self._fail(copy, "the connection to it was lost", [], now)
        self._admit()

    def _on_from_peer(self, event: FromPeer, now: float) -> None:
        if event.node in self._dead:
            return  # it does not know yet that it was given up
        self._peer_messages[type(event.message)](event.node, event.message, now)

    def _on_locate(self, node: int, message: Locate, now: float) -> None:
        sources = self.directory.locate(node, message)
        if message.segment >= SPILLED:
            self._emit(LocateSpill(node, message.segment, message.object, tuple(sources)))
            return
        self._emit(ToPeer(node, Located(message.object, message.segment, message.offset, sources)))

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        flying = [copy for copy in self._copies.values() if copy.state in _IN_FLIGHT]
        self._require(sum(copy.len for copy in flying) == self._in_flight, "bytes in flight do not add up")
        self._require(len(flying) == self._running <= PULLS_MAX, "pulls do not add up")
        self._require(self._in_flight <= IN_FLIGHT_BYTES_MAX or len(flying) == 1, "too much is in flight")
        self._require(flying or not (self._gets or self._prefetches), "something waits for nothing")
        self._require(len(self._tickets) + len(self._by_segment) == len(self._copies), "copies are lost")
        for copy in self._copies.values():
            here, queued = copy.state == "here", copy.key in self._gets or copy.key in self._prefetches
            self._require(queued == (copy.state == "waiting"), f"{copy} is not where it waits")
            self._require((self._by_segment.get(copy.segment) is copy) == here, f"{copy} is not where it lies")
            self._require(here or copy.state == "ending" or copy.wants, f"{copy} is wanted by nobody")
            self._require(not (copy.wants if here else copy.holders), f"{copy} is held and wanted")
            timed = copy.state in ("pausing", "unknown")
            self._require((copy.key in self._deadlines) == timed, f"{copy} may wait for ever")
            for member in (*copy.holders, *(member for member, _ in copy.wants)):
                self._require(copy.key in self._by_member.get(member, {}), f"{copy} is unknown to {member}")
        for member, keys in self._by_member.items():
            for key in keys:
                copy = self._copies[key]
                self._require(
                    member in copy.holders or any(member == want for want, _ in copy.wants),
                    f"{member} has nothing to do with {copy}",
                )
        for member in self._by_member:
            is_gathering = any(self._waiting_for(member))
            self._require(not (is_gathering and member in self._turns), f"{member} gathers, and waits for its turn")
        self._require(not (wrong := self.directory.violation()), wrong)


def _block(copy: Copy) -> tuple[bytes, int, int]:
    """How the origin's node names what is copied."""
    return copy.key[0], copy.key[2], copy.key[3]


def _gone_text(node: int) -> str:
    return f"node {node:016x}, where the value lies, has left the cluster"
