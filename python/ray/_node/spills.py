"""Values that leave memory for disk, and come back.

Owns when owners are asked for values to spill, what is being written, moved and read, and, by `spill_files`, where on
the disk it lies. Which values leave is their owners' to choose, since they know who reads what; how much room is
lacking, `segments` knows. The bytes are moved by the shell.

The life of a spilled value:

    offered    by its owner (or by the process that allocated it, for an owner on another node), after `SpillWanted`
    writing    with others, as a file of up to `FILE_BYTES`; what is offered beyond the need is declined
    spilled    its owner knows its number, has freed its block, and says when nobody needs it any more
    released   garbage in its file, until all of that is garbage or what is alive was moved to a new file

Reading is a pull (`pulls`) whose source is a file: into a segment that the node leases to itself, shared by readers,
evicted when nobody holds it. The value on disk stays, so that a copy in memory costs nothing to lose again.

Owners are asked when more is in use than the high-water mark, once for each rise; and while somebody waits for room,
again and again, with pauses that grow to `PAUSE_S_MAX`, because a value that is viewed now may not be viewed then.

A disk that is full ends the writing for `FULL_S`; people are told once, and whoever waits for room in vain is told why.

Invariants: what is offered is answered once; bytes being written are those of jobs; files are written by at most
`WRITES_MAX` jobs at a time; disk use is bounded as `spill_files` says.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from ray._control.machine import (
    Deadlines,
    Log,
    Machine,
    Multicast,
    Notify,
    ProcessJoined,
    ProcessLeft,
    Received,
    Send,
    Tick,
)
from ray._control.shown import show_bytes
from ray._node.events import (
    DeleteSpill,
    FromPeer,
    LocateSpill,
    OfferSpill,
    PullDone,
    ReadSpill,
    RestoreWanted,
    RoomProgress,
    RoomShort,
    SpillPiece,
    SpillRead,
    SpillWritten,
    ToPeer,
    WriteSpill,
)
from ray._node.peer_protocol import Located, SpillFreed
from ray._node.spill_files import FILE_BYTES, Record, SpillFiles, record_bytes
from ray._protocol import Spill, Spilled, SpillReleased, SpillWanted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray._control.machine import Event

WRITES_MAX: Final = 2
"""Files that are written at a time. More wait in order."""

SHORT_SHARE: Final = 16
"""At least one part in this many of the store is asked for at once, so that small values are put together and a
workload that fills the store asks rarely; but no more than `FILE_BYTES`."""

SETTLE_S: Final = 0.02
"""How long after a file was written its owners may take to free what it holds, before they are asked for more."""

PAUSE_S_MIN: Final = 0.05
PAUSE_S_MAX: Final = 1.0
"""Between two questions while somebody waits for room; each pause is twice the last while nothing comes of it."""

FULL_S: Final = 5.0
"""How long nothing is written after a disk was full."""


class Block(msgspec.Struct, frozen=True):
    """A value as it was offered."""

    object: bytes
    serial: int
    segment: int
    offset: int
    len: int


class Job(msgspec.Struct):
    """A file that is to be written: of offered blocks, or of records that move from other files."""

    number: int
    size: int
    sender: int = 0
    owner: int = 0
    blocks: list[Block] = []
    moving: list[tuple[Record, int, int]] = []
    """Record, file from which it is taken, and place in the new one."""
    is_void: bool = False
    """The owner has died."""


class SpillTable(Machine):
    """See the module's docstring.

    Args:
        node: This node.
        capacity: Bytes of its store.
        enabled: Whether anything may be spilled at all.
    """

    def __init__(self, *, node: int, capacity: int, enabled: bool = True, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self.files = SpillFiles()
        self._node = node
        self._enabled = enabled
        self._capacity = capacity
        self._least = min(FILE_BYTES, capacity // SHORT_SHARE)
        self._members: dict[int, None] = {}
        self._short = RoomShort(0, waits=False)
        self._asked_bytes = 0
        """What was asked for since there was enough."""
        self._budget = 0
        """What may still be accepted of what is offered."""
        self._pause_s = PAUSE_S_MIN
        self._jobs: dict[int, Job] = {}
        """By the number of the file; those beyond `WRITES_MAX` wait."""
        self._waiting: deque[int] = deque()
        self._reading: dict[int, tuple[int, int]] = {}
        """Value and file, by the ticket of the pull."""
        self._full_text = ""
        self._spilled_bytes = 0
        self._restored_bytes = 0
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {
            ProcessJoined: self._on_joined,
            ProcessLeft: self._on_left,
            RoomShort: self._on_room_short,
            SpillWritten: self._on_written,
            RestoreWanted: self._on_restore_wanted,
            SpillRead: self._on_read,
            LocateSpill: self._on_locate,
            FromPeer: self._on_from_peer,
            Tick: self._on_tick,
        }
        self._messages = {Spill: self._on_offered, SpillReleased: self._on_released}

    def takes(self, event: Event) -> bool:
        if type(event) is FromPeer:
            return type(event.message) is SpillFreed
        return super().takes(event)

    # ------------------------------------------------------------------ queries

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        return {
            "spilled_values": self.files.count,
            "spill_files": len(self.files),
            "spill_file_bytes": self.files.size,
            "spill_live_bytes": self.files.live,
            "spill_files_being_written": len(self._jobs),
            "spill_reads_running": len(self._reading),
            "spilled_bytes_total": self._spilled_bytes,
            "restored_bytes_total": self._restored_bytes,
        }

    # ------------------------------------------------------------------ when to ask

    def _on_room_short(self, event: RoomShort, now: float) -> None:
        before, self._short = self._short, event
        if not event.bytes:
            self._asked_bytes = 0
            self._pause_s = PAUSE_S_MIN
            self._deadlines.clear("ask")
        elif event.waits and not before.waits:
            self._ask(now)
        elif not event.waits:
            self._deadlines.clear("ask")
            if event.bytes > self._asked_bytes:
                self._ask(now)

    def _ask(self, now: float) -> None:
        """Ask owners for values, unless what they gave is still on its way out."""
        if not self._enabled or "full" in self._deadlines or any(job.blocks for job in self._jobs.values()):
            return
        self._asked_bytes = max(self._short.bytes, self._asked_bytes)
        # What nothing came of may have been needed; more is asked for then, so that something else is offered.
        fruitless = round(self._pause_s / PAUSE_S_MIN)
        self._budget = min(max(self._short.bytes, self._least) * fruitless, self._capacity)
        if self._members:
            self._emit(Multicast(tuple(self._members), SpillWanted(self._budget)))
        if self._short.waits:
            self._deadlines.set("ask", now + self._pause_s)
            self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    def _on_tick(self, event: Tick, now: float) -> None:
        for key in self._deadlines.due(now):
            if key == "full":
                self._tidy()
            if self._short.bytes:
                self._ask(now)

    # ------------------------------------------------------------------ writing

    def _on_offered(self, event: Received, message: Spill, now: float) -> None:
        accepted: list[Block] = []
        declined: list[Block] = []
        for item in message.blocks:
            block = Block(*item)
            is_wanted = self._short.bytes and self._budget > 0 and "full" not in self._deadlines and block.len > 0
            (accepted if is_wanted else declined).append(block)
            if is_wanted:
                self._budget -= block.len
        self._answer(event.sender, message.owner, [(block, 0) for block in declined])
        for batch in _batches(accepted):
            size = sum(record_bytes(block.len) for block in batch)
            self._start(Job(self.files.next_number(), size, event.sender, message.owner, blocks=batch))

    def _answer(self, to: int, owner: int, blocks: Iterable[tuple[Block, int]]) -> None:
        answers = [(block.object, block.serial, spill, block.len) for block, spill in blocks]
        if answers:
            self._emit(Send(to, Spilled(owner, answers)))

    def _start(self, job: Job) -> None:
        self._jobs[job.number] = job
        self._waiting.append(job.number)
        self._write_next()

    def _write_next(self) -> None:
        while self._waiting and len(self._jobs) - len(self._waiting) < WRITES_MAX:
            job = self._jobs[self._waiting.popleft()]
            pieces = []
            at = 0
            for block in job.blocks:
                pieces.append(SpillPiece(block.object, block.segment, block.offset, block.len, at))
                at += record_bytes(block.len)
            pieces.extend(
                SpillPiece(record.object, origin, record.at, record.len, place) for record, origin, place in job.moving
            )
            self._emit(WriteSpill(job.number, tuple(pieces)))

    def _on_written(self, event: SpillWritten, now: float) -> None:
        job = self._jobs.pop(event.file)
        if job.moving:
            self.files.end_move(job.moving, 0 if event.kind else job.number, job.size)
        elif event.kind:
            self._answer(job.sender, job.owner, [(block, 0) for block in job.blocks])
        else:
            self._keep(job)
        if event.kind:
            self._failed(event, now)
        self._write_next()
        self._tidy()
        if not job.blocks or any(other.blocks for other in self._jobs.values()) or not self._short.bytes:
            return
        if not event.kind:
            self._pause_s = PAUSE_S_MIN
            self._deadlines.set("ask", now + SETTLE_S)
        elif self._short.waits and "ask" not in self._deadlines:
            self._deadlines.set("ask", now + self._pause_s)

    def _keep(self, job: Job) -> None:
        """A file of offered values was written."""
        records: list[Record] = []
        at = 0
        for block in job.blocks:
            spill = self.files.next_number()
            records.append(Record(spill, block.object, job.owner, block.len, job.number, at))
            at += record_bytes(block.len)
        self.files.add(job.number, job.size, records)
        self._spilled_bytes += sum(block.len for block in job.blocks)
        if self._full_text:
            self._full_text = ""
        if job.is_void or job.sender not in self._members:
            for record in records:
                self.files.release(record.spill)
            return
        numbered = zip(job.blocks, (record.spill for record in records), strict=True)
        self._answer(job.sender, job.owner, numbered)
        self._emit(RoomProgress(""))

    def _failed(self, event: SpillWritten, now: float) -> None:
        self._emit(Log(f"spilling: {event.error}"))
        if event.kind != "full":
            self._emit(RoomProgress(event.error))
            return
        if not self._full_text:
            text = (
                f"Nothing more can be spilled: {event.error}. {show_bytes(self.files.size)} are spilled on this node. "
                "Free space on that disk, or start with another object_spilling_directory"
            )
            self._emit(Notify(0, "warning", text))
        self._full_text = event.error
        self._deadlines.set("full", now + FULL_S)
        self._emit(RoomProgress(event.error, disk_full=True))

    # ------------------------------------------------------------------ what is not needed any more

    def _on_released(self, event: Received, message: SpillReleased, now: float) -> None:
        if message.node not in (0, self._node):
            self._emit(ToPeer(message.node, SpillFreed(event.sender, message.spill)))
        else:
            self._release(event.sender, message.spill)

    def _on_from_peer(self, event: FromPeer, now: float) -> None:
        assert isinstance(event.message, SpillFreed)
        self._release(event.message.owner, event.message.spill)

    def _release(self, owner: int, spill: int) -> None:
        record = self.files.get(spill)
        if record is not None and record.owner == owner:
            self.files.release(spill)
            self._tidy()

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        self._members[event.proc] = None

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._members.pop(event.proc, None)
        for spill in self.files.owned(event.proc):
            self.files.release(spill)
        for job in self._jobs.values():
            job.is_void = job.is_void or job.owner == event.proc
        self._tidy()

    def _tidy(self) -> None:
        """Delete files without values, and move values out of files that are mostly garbage."""
        for number in self.files.take_useless():
            self._emit(DeleteSpill(number))
        if "full" in self._deadlines or any(job.moving for job in self._jobs.values()):
            return
        records = self.files.begin_move()
        if not records:
            return
        at = 0
        moving: list[tuple[Record, int, int]] = []
        for record in records:
            moving.append((record, record.file, at))
            at += record.bytes
        self._start(Job(self.files.next_number(), at, moving=moving))

    # ------------------------------------------------------------------ reading

    def _on_restore_wanted(self, event: RestoreWanted, now: float) -> None:
        record = self.files.get(event.spill)
        if record is None or record.object != event.object or record.len != event.len:
            text = "the value is not on the disk of this node any more"
            self._emit(PullDone(event.ticket, text, ((self._node, True, text),)))
            return
        self._reading[event.ticket] = (record.spill, record.file)
        self.files.begin_reading(record.file)
        self._emit(ReadSpill(event.ticket, record.file, record.object, record.at, record.len, event.segment))

    def _on_read(self, event: SpillRead, now: float) -> None:
        spill, file = self._reading.pop(event.ticket)
        self.files.end_reading(file)
        record = self.files.get(spill)
        if event.kind == "damaged":
            # Whoever reads it hears that it is lost, and its owner after him, who does not name it again.
            self._emit(Log(f"restoring: {event.error}"))
            self.files.release(spill)
            self._emit(PullDone(event.ticket, event.error, ((self._node, True, event.error),)))
        else:
            if not event.kind and record is not None:
                self._restored_bytes += record.len
            self._emit(PullDone(event.ticket, event.error))
        self._tidy()

    def _on_locate(self, event: LocateSpill, now: float) -> None:
        """Another node is to pull a value: from the file itself."""
        sources: list[tuple[int, int, int]] = []
        for node, segment, offset in event.sources:
            if node != self._node:
                sources.append((node, segment, offset))
            elif (record := self.files.get(event.spill)) is not None and record.object == event.object:
                self._emit(OfferSpill(record.file))
                sources.append((node, record.file, record.at + record_bytes(0)))
        self._emit(ToPeer(event.node, Located(event.object, event.spill, 0, sources)))

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        self._require(not (wrong := self.files.violation()), wrong)
        self._require(len(self._jobs) - len(self._waiting) <= WRITES_MAX, "too many files are written")
        self._require(not self._waiting or len(self._jobs) > WRITES_MAX, "a file waits for nothing")
        can_move = "full" not in self._deadlines and not any(job.moving for job in self._jobs.values())
        self._require(not (can_move and self._has_garbage()), "there is too much garbage")
        waits = self._short.waits and self._enabled and not any(job.blocks for job in self._jobs.values())
        timed = "ask" in self._deadlines or "full" in self._deadlines
        self._require(not waits or timed, "nobody is asked for what somebody waits for")

    def _has_garbage(self) -> bool:
        from ray._node.spill_files import GARBAGE_SHARE

        return self.files.size > GARBAGE_SHARE * self.files.live + FILE_BYTES + self._pinned_bytes()

    def _pinned_bytes(self) -> int:
        """Files that are only kept for those who read them."""
        return self.files.size_of(file for _, file in self._reading.values())


def _batches(blocks: list[Block]) -> Iterable[list[Block]]:
    """Blocks as files: in order, up to `FILE_BYTES` each, and larger ones alone."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        needed = record_bytes(block.len)
        if needed > FILE_BYTES:
            yield [block]
            continue
        if batch and size + needed > FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += needed
    if batch:
        yield batch
