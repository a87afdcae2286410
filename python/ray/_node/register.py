"""What a worker wrote down of its objects, read after its end.

Knows the layout of a register; the other side, which writes it and explains it, is `crates/skate-core/src/register.rs`.
Does not know what the records are for.

The memory was another process's, so nothing in it is trusted: whatever is out of bounds is left out, and there are at
most `SLOTS_MAX` records and `DEEDS_BYTES` of deeds, whatever the slots say.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

MAGIC: Final = b"RAYESTAT"
SLOTS_MAX: Final = 65_536
"""Objects of one process that are recorded; further ones die with it."""
DEEDS_BYTES: Final = 32 << 20
"""What one process can write down beside the locations of its objects, which is the values of the small ones."""

_PAGE_BYTES: Final = 4096
_SLOT: Final = struct.Struct("<IIQQQQQQII")
_DEEDS_AT: Final = _PAGE_BYTES + SLOTS_MAX * _SLOT.size
_UNIT_BYTES: Final = 64
_USED, _HAS_LOCATION, _HAS_DEED = 1, 2, 4
_NUMBER_MAX: Final = (1 << 63) - 1
"""No length or offset is larger; so sums of two are numbers that every decoder takes."""


class Location(NamedTuple):
    """Where a value lies, as `skate_proto::location` has it."""

    node: int
    segment: int
    lessee: int
    offset: int
    len: int


class Record(msgspec.Struct, frozen=True):
    """An object: the number of its task and its index, where its value lies, and the deed, b"" if there is none."""

    seq: int
    index: int
    location: Location | None
    deed: bytes


def read(pread: Callable[[int, int], bytes]) -> tuple[Record, ...]:
    """The records of a register.

    Args:
        pread: Reads (length, offset) of its memory file; fewer bytes if the file ends there.
    """
    head = pread(_PAGE_BYTES, 0)
    if head[:8] != MAGIC or len(head) < 16:
        return ()
    slots = min(int.from_bytes(head[8:16], "little"), SLOTS_MAX)
    table = pread(slots * _SLOT.size, _PAGE_BYTES)
    records: dict[tuple[int, int], Record] = {}
    left = DEEDS_BYTES
    for state, index, seq, *place, deed_at, deed_len in _SLOT.iter_unpack(table[: len(table) // 64 * 64]):
        if not state & _USED or (seq, index) in records:
            continue
        location = Location(*place) if state & _HAS_LOCATION else None
        if location is not None and max(location.offset, location.len) > _NUMBER_MAX:
            continue
        deed = b""
        if state & _HAS_DEED:
            if deed_len > left or deed_at * _UNIT_BYTES + deed_len > DEEDS_BYTES:
                continue
            left -= deed_len
            deed = pread(deed_len, _DEEDS_AT + deed_at * _UNIT_BYTES)
            if len(deed) < deed_len:
                continue
        if location is not None or deed:
            records[seq, index] = Record(seq, index, location, deed)
    return tuple(records.values())
