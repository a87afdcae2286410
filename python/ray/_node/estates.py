"""What workers of this node leave behind: objects that outlive their owner.

Owns, for every worker that has ended, what its register said of its objects (`register`), and which members of the
cluster claim which of them. Holds the blocks in which they lie, on this node and others, and gives them back. Does not
know which objects refer to which: who is told of an object claims what its value refers to as well
(`skate_proto::objects::estate`).

The life of a worker's end:

    opened     the register is read before anybody hears of the end, so that no question comes too early, and no block
               is given up in between
    claimed    each object as long as a process that asked for it lives and has not given it up
    lingering  without a claim for `LINGER_S`: the reference may be in a message, or in a process that has not heard of
               the end yet. Ends early, though not within `GRACE_S`, when the store needs room
    settled    the block is given back, and the object forgotten

That an object lingers is for its availability alone. A block that is given back is never written again, because nobody
knows who has it mapped: its lessee retires it, and an adopted segment is not recycled. Values that their owner had
spilled are held and given back like blocks (`spills`). Blocks of an estate are not spilled, since nobody knows who
reads them where they are: they count as used.

With its job an estate loses what nobody claims, and a worker that is stopped because its job is over leaves nothing.

Invariants: every claim is known by its object and by its process, which lives; an object without a claim has a
deadline; the blocks held are those of the objects that there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ray._control.machine import Deadlines, Machine, ProcessJoined, ProcessLeft, Received, Send, Tick
from ray._node.events import (
    BlocksHeld,
    BlockUnneeded,
    Departed,
    EstatesAsked,
    JobEnded,
    ReadRegister,
    RegisterRead,
    RoomShort,
    ToManager,
    WorkerGone,
)
from ray._node.register import Location  # noqa: TC001  (msgspec reads the annotation)
from ray._protocol import BlocksFreed, EstateAnswer, EstateQuestion, RegisterOpened, SegmentClaims

if TYPE_CHECKING:
    from collections.abc import Iterable

LINGER_S: Final = 5.0
"""How long an object is kept for references that nobody has claimed yet."""

GRACE_S: Final = 1.0
"""For so long it is kept even if the store needs room: longer than it takes until everybody has heard of a death."""

OBJECTS_MAX: Final = 1_000_000
"""Objects of all estates of a node; beyond it the end of a worker is the end of what it owned."""

DEEDS_BYTES_MAX: Final = 256 << 20
"""The same for what is held in this process's memory: the values of small objects."""

ANSWER_BYTES_MAX: Final = 1 << 20
"""What one answer carries; more are several."""

ENDED_JOBS_MAX: Final = 1000
"""Jobs whose end is remembered, for workers that are stopped because of it."""


class Item(msgspec.Struct):
    """An object of an estate, who claims it, and since when nobody does."""

    location: Location | None
    deed: bytes
    since: float
    claims: dict[int, None] = {}


class Estate(msgspec.Struct):
    """What one worker left, by the objects' ids."""

    job: int
    items: dict[bytes, Item] = {}


class Estates(Machine):
    """See the module's docstring.

    Args:
        node: This node.
    """

    def __init__(self, *, node: int, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._node = node
        self._jobs: dict[int, int] = {}
        """The job of each member of this node."""
        self._registered: dict[int, None] = {}
        """Members that say that they have opened a register; it is read in any case."""
        self._ending: dict[int, WorkerGone] = {}
        """Workers whose register is being read."""
        self._estates: dict[int, Estate] = {}
        self._objects = 0
        self._deeds_bytes = 0
        self._claims: dict[int, dict[bytes, None]] = {}
        """Objects by the process that claims them."""
        self._blocks: dict[tuple[int, int], dict[int, int]] = {}
        """For each segment, by node and number, how many objects lie at which offset."""
        self._ended_jobs: dict[int, None] = {}
        self._linger_s = LINGER_S
        """`GRACE_S` while somebody waits for room in the store."""
        self._deadlines: Deadlines[int] = Deadlines()
        self._events = {
            ProcessJoined: self._on_joined,
            ProcessLeft: self._on_left,
            WorkerGone: self._on_worker_gone,
            RegisterRead: self._on_register_read,
            JobEnded: self._on_job_ended,
            EstatesAsked: self._on_estates_asked,
            RoomShort: self._on_room_short,
            Tick: self._on_tick,
        }
        self._messages = {RegisterOpened: self._on_register_opened, EstateQuestion: self._on_question}

    # ------------------------------------------------------------------ queries

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        return {
            "registers": len(self._registered),
            "estates": len(self._estates),
            "estate_objects": self._objects,
            "estate_deeds_bytes": self._deeds_bytes,
            "estate_claims": sum(len(claimed) for claimed in self._claims.values()),
        }

    # ------------------------------------------------------------------ processes come and go

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        self._jobs[event.proc] = event.job

    def _on_register_opened(self, event: Received, message: RegisterOpened, now: float) -> None:
        if event.sender in self._jobs:
            self._registered[event.sender] = None

    def _on_worker_gone(self, event: WorkerGone, now: float) -> None:
        self._registered.pop(event.proc, None)
        self._ending[event.proc] = event
        self._emit(ReadRegister(event.proc))

    def _on_register_read(self, event: RegisterRead, now: float) -> None:
        gone = self._ending.pop(event.proc)
        job = self._jobs.get(event.proc, 0)
        estate = Estate(job)
        owner = self._node.to_bytes(8) + event.proc.to_bytes(8)
        for record in event.records:
            if not self._has_room(len(record.deed)):
                self._give_back([record.location])
                continue
            item = Item(record.location, record.deed, now)
            estate.items[owner + record.seq.to_bytes(8) + record.index.to_bytes(4)] = item
            self._objects += 1
            self._deeds_bytes += len(item.deed)
        if estate.items:
            self._estates[event.proc] = estate
            self._hold(item.location for item in estate.items.values())
            if gone.intended and job in self._ended_jobs:
                self._settle(event.proc, list(estate.items))
            else:
                self._deadlines.set(event.proc, now + self._linger_s)
        self._emit(Departed(gone))

    def _has_room(self, deed_bytes: int) -> bool:
        return self._objects < OBJECTS_MAX and self._deeds_bytes + deed_bytes <= DEEDS_BYTES_MAX

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        """A member of this node or another has ended, and claims nothing any more."""
        self._jobs.pop(event.proc, None)
        self._registered.pop(event.proc, None)
        for key in self._claims.pop(event.proc, {}):
            owner = owner_of(key)
            item = self._estates[owner].items[key]
            del item.claims[event.proc]
            self._unclaimed(owner, item, now)

    def _on_job_ended(self, event: JobEnded, now: float) -> None:
        self._ended_jobs[event.job] = None
        if len(self._ended_jobs) > ENDED_JOBS_MAX:
            del self._ended_jobs[next(iter(self._ended_jobs))]
        for owner in [owner for owner, estate in self._estates.items() if estate.job == event.job]:
            self._settle(owner, [key for key, item in self._estates[owner].items.items() if not item.claims])

    # ------------------------------------------------------------------ questions

    def _on_question(self, event: Received, message: EstateQuestion, now: float) -> None:
        for key in message.given_up:
            self._give_up(event.sender, key, now)
        found: list[tuple[bytes, list[int], bytes]] = []
        absent: list[bytes] = []
        size = 0
        for key in message.claimed:
            item = self._find(key)
            if item is None:
                absent.append(key)
                continue
            self._claim(event.sender, key, item)
            found.append((key, list(item.location or ()), item.deed))
            size += len(item.deed) + 128
            if size >= ANSWER_BYTES_MAX:
                self._emit(Send(event.sender, EstateAnswer(found, [])))
                found, size = [], 0
        if found or absent:
            self._emit(Send(event.sender, EstateAnswer(found, absent)))

    def _find(self, key: bytes) -> Item | None:
        estate = self._estates.get(owner_of(key))
        return estate.items.get(key) if estate is not None else None

    def _claim(self, proc: int, key: bytes, item: Item) -> None:
        item.claims = {**item.claims, proc: None}
        self._claims.setdefault(proc, {})[key] = None

    def _give_up(self, proc: int, key: bytes, now: float) -> None:
        claimed = self._claims.get(proc, {})
        if key not in claimed:
            return  # it was never there, or was said before
        del claimed[key]
        if not claimed:
            del self._claims[proc]
        item = self._find(key)
        assert item is not None, "what is claimed is there"
        del item.claims[proc]
        self._unclaimed(owner_of(key), item, now)

    def _unclaimed(self, owner: int, item: Item, now: float) -> None:
        if not item.claims:
            item.since = now
            if owner not in self._deadlines:
                self._deadlines.set(owner, now + self._linger_s)

    # ------------------------------------------------------------------ what is over

    def _on_tick(self, event: Tick, now: float) -> None:
        for owner in self._deadlines.due(now):
            self._settle_unclaimed(owner, now)

    def _on_room_short(self, event: RoomShort, now: float) -> None:
        before, self._linger_s = self._linger_s, GRACE_S if event.waits else LINGER_S
        if self._linger_s < before:
            for owner in list(self._estates):
                if owner in self._deadlines:
                    self._settle_unclaimed(owner, now)

    def _settle_unclaimed(self, owner: int, now: float) -> None:
        linger_s = self._linger_s
        items = self._estates[owner].items
        self._settle(owner, [key for key, item in items.items() if not item.claims and item.since + linger_s <= now])
        if (since := min((item.since for item in items.values() if not item.claims), default=None)) is not None:
            # All of an estate is looked at, so not at once for each that is given up by itself.
            at_once = now if linger_s < LINGER_S else now + GRACE_S
            self._deadlines.set(owner, max(since + linger_s, at_once))

    def _settle(self, owner: int, keys: list[bytes]) -> None:
        """Forget objects that nobody claims."""
        items = self._estates[owner].items
        gone = [items.pop(key) for key in keys]
        self._objects -= len(gone)
        self._deeds_bytes -= sum(len(item.deed) for item in gone)
        self._release(item.location for item in gone)
        if not items:
            del self._estates[owner]
            self._deadlines.clear(owner)

    # ------------------------------------------------------------------ blocks

    def _hold(self, locations: Iterable[Location | None]) -> None:
        """Before anybody hears that their owner, whose claims they were, is dead."""
        added: dict[tuple[int, int], dict[int, int]] = {}
        for at in locations:
            if at is not None:
                place = (at.node, at.segment)
                offsets = self._blocks.setdefault(place, {})
                offsets[at.offset] = offsets.get(at.offset, 0) + 1
                added.setdefault(place, {})[at.offset] = at.len
        for (node, segment), blocks in added.items():
            if node == self._node:
                self._emit(BlocksHeld(segment, tuple(blocks)))
            else:
                self._emit(ToManager(node, SegmentClaims(segment, list(blocks.items()), node, more=True)))

    def _release(self, locations: Iterable[Location | None]) -> None:
        unneeded: list[Location | None] = []
        for at in locations:
            if at is None:
                continue
            offsets = self._blocks[at.node, at.segment]
            offsets[at.offset] -= 1
            if not offsets[at.offset]:
                del offsets[at.offset]
                unneeded.append(at)
            if not offsets:
                del self._blocks[at.node, at.segment]
        self._give_back(unneeded)

    def _give_back(self, locations: Iterable[Location | None]) -> None:
        elsewhere: dict[tuple[int, int], list[int]] = {}
        for at in locations:
            if at is None:
                continue
            if at.node == self._node:
                self._emit(BlockUnneeded(at.segment, at.offset))
            else:
                elsewhere.setdefault((at.node, at.segment), []).append(at.offset)
        for (node, segment), offsets in elsewhere.items():
            self._emit(ToManager(node, BlocksFreed(segment, offsets, node)))

    def _on_estates_asked(self, event: EstatesAsked, now: float) -> None:
        """The lessee of another node's segment has died: what of it is held here?"""
        offsets = self._blocks.get((event.node, event.segment), {})
        self._emit(ToManager(event.node, SegmentClaims(event.segment, [(offset, 0) for offset in offsets], event.node)))

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        objects = deeds_bytes = 0
        blocks: dict[tuple[int, int], dict[int, int]] = {}
        for owner, estate in self._estates.items():
            self._require(estate.items, f"the estate of {owner} is empty")
            for key, item in estate.items.items():
                self._require(owner_of(key) == owner, f"{key.hex()} is not an object of {owner}")
                objects += 1
                deeds_bytes += len(item.deed)
                self._require(item.claims or owner in self._deadlines, f"{key.hex()} may be kept for ever")
                for proc in item.claims:
                    self._require(key in self._claims.get(proc, {}), f"a claim of {proc} is not known by its process")
                if item.location is not None:
                    offsets = blocks.setdefault((item.location.node, item.location.segment), {})
                    offsets[item.location.offset] = offsets.get(item.location.offset, 0) + 1
        for proc, claimed in self._claims.items():
            for key in claimed:
                found = self._find(key)
                self._require(found is not None and proc in found.claims, f"{proc} claims what is not there")
        self._require(blocks == self._blocks, "the blocks held are not those of the objects")
        self._require((objects, deeds_bytes) == (self._objects, self._deeds_bytes), "counts do not add up")
        self._require(objects <= OBJECTS_MAX and deeds_bytes <= DEEDS_BYTES_MAX, "more is kept than there may be")


def owner_of(key: bytes) -> int:
    """The process that created an object, which its id names."""
    return int.from_bytes(key[8:16])
