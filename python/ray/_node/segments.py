"""The segments of one node: shared memory lent to processes, within a capacity.

Owns which segment is lent to whom, and what waits for room; by `adoptions`, who owns what in those whose lessee has
died. The memory files themselves belong to the shell.

The life of a segment:

    lent -> warm -> recycled under a new id    returned empty: its pages are touched already, which is worth
                                               seven copies
    lent -> adopted -> dropped                 its lessee has died: every core of the cluster says which blocks it
                                               owns, and the segment goes when the last of these is freed or its owner
                                               dies

A recycled segment gets a new id, so that a late message about the old one finds nothing. An adopted one
is never recycled, because readers may still have views on it; the kernel keeps its pages for them.

Copies of what lies on other nodes have a segment each, lent to the node itself (`pulls` decides about them). One that
nobody holds is *idle*: a cache that counts as free, evicted oldest first when room is needed, and after `IDLE_S` in any
case, because the object may be gone.

What is lacking, for those who wait or to get below the high-water mark, is told to `spills`, which has values leave
memory; the segments that become empty by that are returned like any others.

Invariants: the sizes of all segments add up to `used`, which is at most `capacity`; warm segments are at
most an eighth of it; only copies are idle; who waits has a deadline; nothing that fits waits behind less than
`OVERTAKES` grants that overtook it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ray._control.machine import (
    Deadlines,
    Machine,
    Multicast,
    ProcessJoined,
    ProcessLeft,
    Received,
    Send,
    Tick,
)
from ray._control.shown import show_bytes
from ray._node.adoptions import Adoptions
from ray._node.events import (
    Company,
    CopyEvicted,
    CopyHeld,
    CopyIdle,
    DropSegment,
    GrantSegment,
    MayHaveMissed,
    OwnersAsked,
    RoomDenied,
    RoomGranted,
    RoomProgress,
    RoomReturned,
    RoomShort,
    RoomStalled,
    RoomUnwanted,
    RoomWanted,
    SegmentFailed,
    ShareSegment,
    ToControl,
)
from ray._protocol import (
    DENIED_DISK_FULL,
    ROLE_DRIVER,
    BlocksFreed,
    SegmentAdopted,
    SegmentClaims,
    SegmentDenied,
    SegmentMap,
    SegmentRelease,
    SegmentRequest,
    SegmentTrim,
)

if TYPE_CHECKING:
    from ray._control.machine import Effects, Event
    from ray._control.messages import SegmentOrphaned

MIN_SEGMENT_BYTES: Final = 1 << 20
"""Smaller requests are rounded up to this: a descriptor and a mapping each cost more than the memory."""

CLASS_BYTES_MAX: Final = 4 << 20
"""Up to here sizes are powers of two, so that what one process returns suits the next."""

LARGE_STEP_BYTES: Final = 64 << 10
"""Above, sizes are multiples of this."""

PAGE_BYTES: Final = 4 << 10
"""What any size is a multiple of, where rounding up further would refuse what the store can just hold."""

WARM_SHARE: Final = 8
"""Warm segments take at most one part in this many of the capacity."""

WAIT_S: Final = 10.0
"""How long a request waits for room before it is denied: counted from the last time that some was made."""

STALL_S: Final = 0.3
"""How long nobody is given room that somebody waits for, before those who gather copies take turns: see `turns`."""

_STALL: Final = (0, 0)
"""The key of that deadline; others are of processes, or of segments, which are numbered from 1 on."""

HIGH_WATER_SHARE: Final = 0.8
"""Of the capacity; when more is lent, values that nobody reads are spilled, before somebody has to wait for that."""

IDLE_S: Final = 10.0
"""How long a copy that nobody holds is kept for the next reader."""

WISH_SHARE: Final = 4
"""What a process wishes for beyond its need is at most one part in this many of what is free: segments become smaller
as the store fills, so that the room for later needs is not all in the hands of those who came first."""

OVERTAKES: Final = 16
"""Grants that may pass a waiting request which is too large for what is free."""


class Segment(msgspec.Struct):
    """A lent or adopted segment. `lessee` is 0 once adopted; `ticket` is what the node wanted it under, for a copy."""

    id: int
    size: int
    lessee: int
    ticket: int = 0

    @property
    def is_copy(self) -> bool:
        return self.ticket != 0


class Waiting(msgspec.Struct):
    """A request without room; for a copy, of the node's own, whose corr is the ticket."""

    proc: int
    corr: int
    need: int
    wish: int
    overtaken: int = 0
    is_copy: bool = False

    @property
    def least(self) -> int:
        """The smallest segment that serves."""
        return round_up(self.need, PAGE_BYTES)


class SegmentTable(Machine):
    """See the module's docstring.

    Args:
        node: This node.
        capacity: Bytes that all segments together may have.
        high_water_share: See `HIGH_WATER_SHARE`; 0 if nothing is spilled.
    """

    def __init__(
        self, *, node: int, capacity: int, high_water_share: float = HIGH_WATER_SHARE, validate: bool = False
    ) -> None:
        super().__init__(validate=validate)
        self._node = node
        self.capacity = capacity
        self._spills = high_water_share > 0
        self._high_water = int(capacity * high_water_share) if self._spills else capacity
        self._short = RoomShort(0, waits=False)
        self._trouble = ""
        """Why the last values that should have left memory did not."""
        self._disk_full = False
        self.used = 0
        self._serial = 0
        self._segments: dict[int, Segment] = {}
        self._adoptions = Adoptions()
        self._warm: dict[int, int] = {}
        """Size by former id, oldest first."""
        self._idle: dict[int, int] = {}
        """Size of copies that nobody holds, by id, idle for longest first."""
        self._queue: dict[tuple[int, int], Waiting] = {}
        self._processes: dict[int, str] = {}
        self._deadlines: Deadlines[tuple[int, int]] = Deadlines()
        self._events = {
            ProcessJoined: self._on_joined,
            ProcessLeft: self._on_left,
            SegmentFailed: self._on_failed,
            RoomWanted: self._on_room_wanted,
            RoomUnwanted: self._on_room_unwanted,
            RoomReturned: self._on_room_returned,
            CopyIdle: self._on_copy_idle,
            CopyHeld: self._on_copy_held,
            RoomProgress: self._on_progress,
            OwnersAsked: self._on_owners_asked,
            MayHaveMissed: self._on_may_have_missed,
            Company: self._on_company,
            Tick: self._on_tick,
        }
        self._messages = {
            SegmentRequest: self._on_request,
            SegmentMap: self._on_map,
            SegmentRelease: self._on_release,
            SegmentClaims: self._on_claims,
            BlocksFreed: self._on_freed,
        }

    def handle(self, event: Event, now: float) -> Effects:
        granted = self._serial
        effects = super().handle(event, now)
        if not self._queue:
            self._deadlines.clear(_STALL)
        elif self._serial != granted:
            self._deadlines.set(_STALL, now + STALL_S)
        short = self._shortage()
        if short != self._short:
            self._short = short
            effects.append(short)
        return effects

    def _shortage(self) -> RoomShort:
        in_use = self.used - sum(self._warm.values()) - sum(self._idle.values())
        wanted = sum(waiting.least for waiting in self._queue.values())
        lacking = in_use + wanted - (self.capacity if wanted else self._high_water)
        return RoomShort(min(max(lacking, 1 if wanted else 0), self.capacity), waits=bool(wanted))

    # ------------------------------------------------------------------ queries

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        return {
            "segments": len(self._segments),
            "segments_adopted": len(self._adoptions),
            "segments_warm": len(self._warm),
            "segment_requests_waiting": len(self._queue),
            "store_bytes_used": self.used,
            "store_bytes_warm": sum(self._warm.values()),
            "store_bytes_idle": sum(self._idle.values()),
            "store_bytes_capacity": self.capacity,
        }

    # ------------------------------------------------------------------ requests

    def _on_request(self, event: Received, message: SegmentRequest, now: float) -> None:
        need = max(message.min_bytes, 1)
        key = (event.sender, event.corr)
        if message.min_bytes <= 0:
            self._withdraw(key)
            return
        if event.sender not in self._processes or key in self._queue:
            return
        self._wait(Waiting(event.sender, event.corr, need, max(message.wish_bytes, need)), now)

    def _withdraw(self, key: tuple[int, int]) -> None:
        self._deadlines.clear(key)
        if self._queue.pop(key, None) is not None:
            self._grant_waiting()

    def _wait(self, waiting: Waiting, now: float) -> None:
        """Grant it now, or as soon as there is room, or refuse it."""
        if waiting.least > self.capacity:
            text = (
                f"{show_bytes(waiting.need)} were asked for, and this node's object store has "
                f"{show_bytes(self.capacity)}. Start with a larger object_store_memory, or store the value in parts"
            )
            self._deny(waiting, text)
            return
        key = (waiting.proc, waiting.corr)
        self._queue[key] = waiting
        self._grant_waiting()
        if key in self._queue:
            self._deadlines.set(key, now + WAIT_S)
            if _STALL not in self._deadlines:
                self._deadlines.set(_STALL, now + STALL_S)
            self._ask_to_trim(waiting.least)

    def _deny(self, waiting: Waiting, text: str, *, disk_full: bool = False) -> None:
        if waiting.is_copy:
            self._emit(RoomDenied(waiting.corr, text, disk_full))
        else:
            why = DENIED_DISK_FULL if disk_full else 0
            self._emit(Send(waiting.proc, SegmentDenied(text, why=why), waiting.corr))

    def _grant_waiting(self) -> None:
        """Grant in order of arrival what fits; what is too large now may be overtaken a few times."""
        passed: list[Waiting] = []
        for key, waiting in list(self._queue.items()):
            if not self._grant(waiting):
                if waiting.overtaken >= OVERTAKES:
                    return
                passed.append(waiting)
                continue
            del self._queue[key]
            self._deadlines.clear(key)
            for other in passed:
                other.overtaken += 1

    def _grant(self, waiting: Waiting) -> bool:
        free = self.capacity - self.used + sum(self._warm.values()) + sum(self._idle.values())
        if waiting.least > free:
            return False
        # A copy has just what it needs: nothing is ever added to it.
        size = waiting.least if waiting.is_copy else choose_size(waiting.need, waiting.wish, free)
        recycled = self._find_warm(size)
        while recycled is None and self.used + size > self.capacity:
            if self._warm:
                self._drop_warm(next(iter(self._warm)))
            else:
                self._evict(next(iter(self._idle)))
                recycled = self._find_warm(size)
        if recycled is None:
            self.used += size
        else:
            size = self._warm.pop(recycled)
        self._serial += 1
        ticket = waiting.corr if waiting.is_copy else 0
        self._segments[self._serial] = Segment(self._serial, size, waiting.proc, ticket)
        receiver = 0 if waiting.is_copy else waiting.proc
        self._emit(GrantSegment(receiver, waiting.corr, self._serial, size, recycled or 0))
        if waiting.is_copy:
            self._emit(RoomGranted(ticket, self._serial, size))
        return True

    def _find_warm(self, size: int) -> int | None:
        """The most recently returned segment that is large enough, and not wastefully larger."""
        for segment in reversed(self._warm):
            if size <= self._warm[segment] <= size + size // 4:
                return segment
        return None

    def _on_progress(self, event: RoomProgress, now: float) -> None:
        self._trouble, self._disk_full = event.trouble, event.disk_full
        if not event.trouble:
            self._wait_on(now)

    def _wait_on(self, now: float) -> None:
        """Room is being made: whoever waits may hope for longer."""
        for key in self._queue:
            self._deadlines.set(key, now + WAIT_S)
        if self._queue:
            self._deadlines.set(_STALL, now + STALL_S)

    def _ask_to_trim(self, wanted: int) -> None:
        lacking = self.used + wanted - self.capacity
        lessees = tuple(dict.fromkeys(x.lessee for x in self._segments.values() if x.lessee and not x.is_copy))
        if lessees:
            self._emit(Multicast(lessees, SegmentTrim(lacking)))

    def _on_tick(self, event: Tick, now: float) -> None:
        for key in self._deadlines.due(now):
            if key == _STALL:
                self._emit(RoomStalled(others=any(not waiting.is_copy for waiting in self._queue.values())))
            elif key[1] in self._idle and not key[0]:
                self._evict(key[1])
            else:
                waiting = self._queue.pop(key)
                self._deny(waiting, self._full_text(waiting.need), disk_full=self._disk_full)
        self._grant_waiting()
        self._trim_warm()

    def _full_text(self, need: int) -> str:
        by_lessee: dict[int, int] = {}
        copies = 0
        for segment in self._segments.values():
            if segment.is_copy:
                copies += segment.size
            else:
                by_lessee[segment.lessee] = by_lessee.get(segment.lessee, 0) + segment.size
        named = {self._processes.get(proc, "processes that have ended"): held for proc, held in by_lessee.items()}
        if copies:
            named["copies of values on other nodes or on disk"] = copies
        largest = sorted(named.items(), key=lambda item: -item[1])[:3]
        holders = ", ".join(f"{name}: {show_bytes(held)}" for name, held in largest)
        spilling = self._trouble or "the values in it are in use, or are being written by tasks"
        if not self._spills:
            spilling = "spilling is switched off (RAY_automatic_object_spilling_enabled)"
        return (
            f"the object store of this node is full: {show_bytes(need)} were asked for, segments with "
            f"{show_bytes(self.used)} of {show_bytes(self.capacity)} are allocated, and not enough became free within "
            f"{WAIT_S:.0f} seconds. "
            f"Nothing more could be spilled: {spilling}. Largest holders: {holders}. Drop references that are not "
            "needed (del, or let go of views on arrays), or start with a larger object_store_memory"
        )

    def _on_failed(self, event: SegmentFailed, now: float) -> None:
        segment = self._segments.pop(event.segment)
        self.used -= segment.size
        text = (
            f"the system refused {show_bytes(segment.size)} of shared memory: {event.error}. The store counts "
            f"{show_bytes(self.used)} of {show_bytes(self.capacity)} in use, so the machine itself is short of memory "
            "or descriptors"
        )
        self._deny(Waiting(segment.lessee, event.corr, segment.size, 0, is_copy=segment.is_copy), text)
        self._grant_waiting()

    def _on_map(self, event: Received, message: SegmentMap, now: float) -> None:
        segment = self._segments.get(message.segment)
        if segment is None:
            text = f"segment {message.segment} is gone: its blocks were freed, or their owner has died"
            self._emit(Send(event.sender, SegmentDenied(text), event.corr))
        else:
            self._emit(ShareSegment(event.sender, event.corr, segment.id, segment.size, segment.lessee))

    # ------------------------------------------------------------------ returns

    def _on_release(self, event: Received, message: SegmentRelease, now: float) -> None:
        segment = self._segments.get(message.segment)
        if segment is None or segment.lessee != event.sender or segment.is_copy:
            return  # a late or repeated return
        del self._segments[segment.id]
        self._warm[segment.id] = segment.size
        self._wait_on(now)
        self._grant_waiting()
        self._trim_warm()

    def _trim_warm(self) -> None:
        while self._warm and sum(self._warm.values()) > self.capacity // WARM_SHARE:
            self._drop_warm(next(iter(self._warm)))

    def _drop_warm(self, segment: int) -> None:
        self.used -= self._warm.pop(segment)
        self._emit(DropSegment(segment))

    # ------------------------------------------------------------------ copies

    def _on_room_wanted(self, event: RoomWanted, now: float) -> None:
        waiting = Waiting(event.node, event.ticket, max(event.size, 1), 0, is_copy=True)
        if event.waits:
            self._wait(waiting, now)
        elif self._queue or not self._grant(waiting):
            self._deny(waiting, "the object store of this node is full")

    def _on_room_unwanted(self, event: RoomUnwanted, now: float) -> None:
        self._withdraw((event.node, event.ticket))

    def _on_room_returned(self, event: RoomReturned, now: float) -> None:
        segment = self._segments.pop(event.segment, None)
        if segment is None:
            return  # the system had refused it
        self.used -= segment.size
        self._emit(DropSegment(event.segment))
        self._grant_waiting()

    def _on_copy_idle(self, event: CopyIdle, now: float) -> None:
        self._idle[event.segment] = self._segments[event.segment].size
        self._deadlines.set((0, event.segment), now + IDLE_S)
        self._grant_waiting()

    def _on_copy_held(self, event: CopyHeld, now: float) -> None:
        if self._idle.pop(event.segment, None) is not None:
            self._deadlines.clear((0, event.segment))

    def _evict(self, segment: int) -> None:
        del self._segments[segment]
        self._warm[segment] = self._idle.pop(segment)
        self._deadlines.clear((0, segment))
        self._emit(CopyEvicted(segment))

    # ------------------------------------------------------------------ the lessee's death

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        role = "driver" if event.role == ROLE_DRIVER else "worker"
        self._processes[event.proc] = f"{role} (pid {event.pid})"

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._processes.pop(event.proc, None)
        for key in [key for key in self._queue if key[0] == event.proc]:
            del self._queue[key]
            self._deadlines.clear(key)
        self._adoptions.forget_member(event.proc)
        for held in [x for x in self._segments.values() if x.lessee == event.proc]:
            self._adopt(held)
        self._drop_unneeded()

    def _adopt(self, segment: Segment) -> None:
        lessee, segment.lessee = segment.lessee, 0
        cores = tuple(self._processes)
        if cores:
            self._emit(Multicast(cores, SegmentAdopted(segment.id, self._node, lessee)))
        self._ask_elsewhere(self._adoptions.begin(segment.id, lessee, cores))

    def _ask_elsewhere(self, questions: list[SegmentOrphaned]) -> None:
        for question in questions:
            self._emit(ToControl(question))

    def ask_again(self) -> None:
        """What members of other nodes have said to this one may have been lost."""
        self._ask_elsewhere(self._adoptions.ask(self._adoptions))

    def _on_owners_asked(self, event: OwnersAsked, now: float) -> None:
        self._adoptions.asked(event.segment, event.procs)
        self._drop_unneeded(event.segment)

    def _on_may_have_missed(self, event: MayHaveMissed, now: float) -> None:
        self._ask_elsewhere(self._adoptions.ask(self._adoptions.concerning(event.procs)))

    def _on_company(self, event: Company, now: float) -> None:
        self._adoptions.set_alone(alone=event.alone)
        self._drop_unneeded()

    def _on_claims(self, event: Received, message: SegmentClaims, now: float) -> None:
        self._adoptions.claim(message.segment, event.sender, [offset for offset, _ in message.blocks])
        self._drop_unneeded(message.segment)

    def _on_freed(self, event: Received, message: BlocksFreed, now: float) -> None:
        self._adoptions.free(message.segment, event.sender, message.offsets)
        self._drop_unneeded(message.segment)

    def _drop_unneeded(self, segment: int | None = None) -> None:
        self._drop(self._adoptions.unneeded(segment))

    def _drop(self, segments: list[int]) -> None:
        for segment in segments:
            self.used -= self._segments.pop(segment).size
            self._emit(DropSegment(segment))
        self._grant_waiting()

    def lose_adopted(self) -> int:
        """For tests of what readers do then: drop every adopted segment, as if its memory were lost."""
        lost = self._adoptions.lose_all()
        self._drop(lost)
        return len(lost)

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        warm = sum(self._warm.values())
        lent = sum(segment.size for segment in self._segments.values())
        self._require(lent + warm == self.used, "sizes do not add up")
        self._require(self.used <= self.capacity, "more is lent than there is")
        self._require(warm <= self.capacity // WARM_SHARE, "too much is kept warm")
        for segment in self._segments.values():
            adopted = segment.id in self._adoptions
            self._require(adopted == (segment.lessee == 0), f"{segment} is adopted and lent")
            known = adopted or segment.is_copy or segment.lessee in self._processes
            self._require(known, f"{segment} is lent to the dead")
        for idle in self._idle:
            self._require((0, idle) in self._deadlines, f"copy {idle} may be kept for ever")
            self._require(idle in self._segments and self._segments[idle].is_copy, f"segment {idle} is no idle copy")
        for key, waiting in self._queue.items():
            self._require(key in self._deadlines, f"{waiting} may wait for ever")
            self._require(waiting.is_copy or key[0] in self._processes, f"{waiting} has died")
        self._require(not (wrong := self._adoptions.violation(self._processes)), wrong)
        held_up = False
        for waiting in self._queue.values():
            fits = self.used - warm - sum(self._idle.values()) + waiting.least <= self.capacity
            self._require(held_up or not fits, f"{waiting} fits and waits")
            held_up = held_up or waiting.overtaken >= OVERTAKES


def segment_size(min_bytes: int) -> int:
    """The size of segment that serves a request, so that returned ones can be used again."""
    if min_bytes <= CLASS_BYTES_MAX:
        return max(MIN_SEGMENT_BYTES, 1 << (max(min_bytes, 1) - 1).bit_length())
    return round_up(min_bytes, LARGE_STEP_BYTES)


def choose_size(need: int, wish: int, free: int) -> int:
    """The size of segment for a request that `free` bytes have room for, rounded up to pages.

    As much of the wish as leaves room for others, at least the usual size for the need, and if even that is too much,
    just the need.
    """
    usual = segment_size(need)
    size = max(segment_size(wish), usual)
    while size > usual and size > free // WISH_SHARE:
        size = max(segment_size(size // 2), usual)
    return size if size <= free else round_up(need, PAGE_BYTES)


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step
