"""Which spill file has which value, and what of the files is garbage.

Owns the books of what lies on the disk: a *record* for each spilled value, named by a number that its owner and its
readers know, and a *file* that holds one large value or many small ones. A file is written once. What is released in
it is garbage, until the file has no value left, or what is left was moved to another file; nobody outside notices a
move, because nobody outside knows files.

Invariants: a record is in the file that it names, and that file counts its bytes as live; a file exists while it has
a record or somebody reads it; when no file can be moved, files take at most `GARBAGE_SHARE` times the live bytes and
`FILE_BYTES` more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

SPILLED: Final = 1 << 63
"""Spilled values and spill files are numbered from here on; segments lie below."""

HEADER_BYTES: Final = 64
"""What a record takes besides its value, and what the places of records are multiples of: as in `spill/format.rs`."""

FILE_BYTES: Final = 64 << 20
"""Values are put together up to this; a larger one has a file of its own. A disk reaches its full speed with less, and
what has to be read and written again to be rid of garbage is not more."""

GARBAGE_SHARE: Final = 1.2
"""Files take at most so many times the bytes that are alive in them, and one file more."""


def record_bytes(length: int) -> int:
    """How much of a file a value of so many bytes takes."""
    return -(-(length + HEADER_BYTES) // HEADER_BYTES) * HEADER_BYTES


class Record(msgspec.Struct):
    """A spilled value, in `file` at `at`, where its header begins."""

    spill: int
    object: bytes
    owner: int
    len: int
    file: int
    at: int

    @property
    def bytes(self) -> int:
        """What it takes of its file."""
        return record_bytes(self.len)


class File(msgspec.Struct):
    """A file on the disk. `readers` are jobs that have yet to open or read it."""

    size: int
    live: int = 0
    records: dict[int, None] = {}
    readers: int = 0
    is_moving: bool = False


class SpillFiles:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._files: dict[int, File] = {}
        self._by_owner: dict[int, dict[int, None]] = {}
        self._serial = SPILLED
        self.size = 0
        """Bytes of all files."""
        self.live = 0
        """Bytes of these that records take."""

    def __len__(self) -> int:
        return len(self._files)

    @property
    def count(self) -> int:
        """How many values are spilled."""
        return len(self._records)

    def next_number(self) -> int:
        """A number for a value or a file; never used again."""
        self._serial += 1
        return self._serial

    def get(self, spill: int) -> Record | None:
        return self._records.get(spill)

    def owned(self, owner: int) -> list[int]:
        return list(self._by_owner.get(owner, ()))

    def size_of(self, files: Iterable[int]) -> int:
        """Bytes of these files together."""
        return sum(self._files[file].size for file in dict.fromkeys(files))

    # ------------------------------------------------------------------ changes

    def add(self, number: int, size: int, records: Iterable[Record]) -> None:
        """A file was written, with these values in it."""
        file = self._files[number] = File(size)
        self.size += size
        for record in records:
            self._records[record.spill] = record
            self._by_owner.setdefault(record.owner, {})[record.spill] = None
            self._put(file, record)

    def release(self, spill: int) -> None:
        """The value is not needed any more."""
        record = self._records.pop(spill, None)
        if record is None:
            return
        owned = self._by_owner[record.owner]
        del owned[spill]
        if not owned:
            del self._by_owner[record.owner]
        self._take(record)

    def begin_reading(self, file: int) -> None:
        """The file stays until `end_reading`."""
        self._files[file].readers += 1

    def end_reading(self, file: int) -> None:
        self._files[file].readers -= 1

    def take_useless(self) -> list[int]:
        """Files that nobody needs any more, to be deleted."""
        useless = [number for number, file in self._files.items() if not file.records and not file.readers]
        for number in useless:
            self.size -= self._files.pop(number).size
        return useless

    # ------------------------------------------------------------------ garbage

    def begin_move(self) -> list[Record]:
        """Values to be written into one new file, so that theirs can go; none if there is not too much garbage."""
        if self.size <= GARBAGE_SHARE * self.live + FILE_BYTES:
            return []
        chosen: list[Record] = []
        room = FILE_BYTES
        by_garbage = sorted(self._files.items(), key=lambda item: item[1].live / item[1].size)
        for number, file in by_garbage:
            if file.is_moving or file.live >= file.size or not file.records:
                continue
            if chosen and file.live > room:
                break
            room -= file.live
            file.is_moving = True
            self.begin_reading(number)
            chosen.extend(self._records[spill] for spill in file.records)
        return chosen

    def end_move(self, moved: Iterable[tuple[Record, int, int]], number: int, size: int) -> None:
        """The values (each with the file from which it was taken, and its new place) lie in a new file, unless they
        were released meanwhile. `number` is 0 if the file could not be written.
        """
        moved = list(moved)
        if number:
            self._files[number] = File(size)
            self.size += size
            for record, _, at in moved:
                if record.spill in self._records:
                    self._take(record)
                    record.file, record.at = number, at
                    self._put(self._files[number], record)
        for origin in dict.fromkeys(origin for _, origin, _ in moved):
            self.end_reading(origin)
            self._files[origin].is_moving = False

    def _put(self, file: File, record: Record) -> None:
        file.records[record.spill] = None
        file.live += record.bytes
        self.live += record.bytes

    def _take(self, record: Record) -> None:
        file = self._files[record.file]
        del file.records[record.spill]
        file.live -= record.bytes
        self.live -= record.bytes

    def violation(self) -> str:
        """What is wrong with the state, if anything."""
        if self.size != sum(file.size for file in self._files.values()):
            return "the sizes of files do not add up"
        if self.live != sum(record.bytes for record in self._records.values()):
            return "the bytes of values do not add up"
        for number, file in self._files.items():
            held = [self._records[spill] for spill in file.records]
            if file.live != sum(record.bytes for record in held) or file.live > file.size:
                return f"file {number:x} counts its values wrongly: {file}"
            if any(record.file != number for record in held):
                return f"file {number:x} has a value that lies elsewhere"
            if not file.records and not file.readers:
                return f"file {number:x} is kept for nobody"
        if sum(len(owned) for owned in self._by_owner.values()) != len(self._records):
            return "values have lost their owners"
        return ""
