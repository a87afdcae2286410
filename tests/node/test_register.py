"""What a dead worker wrote down: read as it was meant, and without harm whatever it is."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from ray._node import register
from ray._node.register import DEEDS_BYTES, SLOTS_MAX, Location, Record

PAGE = 4096
DEEDS_AT = PAGE + SLOTS_MAX * 64
USED, LOCATION, DEED = 1, 2, 4


def slot(
    state: int,
    seq: int = 1,
    place: tuple[int, ...] = (9, 8, 7, 64, 100),
    deed: tuple[int, int] = (0, 0),
    index: int = 0,
) -> bytes:
    return struct.pack("<IIQQQQQQII", state, index, seq, *place, *deed)


def image(*slots: bytes, deeds: bytes = b"", count: int | None = None) -> bytes:
    """A register's memory, up to the last byte that says something."""
    head = b"RAYESTAT" + struct.pack("<Q", len(slots) if count is None else count)
    return head.ljust(PAGE, b"\0") + b"".join(slots).ljust(SLOTS_MAX * 64, b"\0") + deeds


def read(memory: bytes) -> tuple[Record, ...]:
    return register.read(lambda length, offset: memory[offset : offset + length])


def test_locations_and_deeds_are_read():
    memory = image(
        slot(USED | LOCATION, 1),
        slot(USED | DEED, 2, deed=(1, 5), index=3),
        slot(USED | LOCATION | DEED, 3, deed=(0, 2)),
        deeds=b"xy".ljust(64, b"\0") + b"hello",
    )
    at = Location(9, 8, 7, 64, 100)
    assert read(memory) == (Record(1, 0, at, b""), Record(2, 3, None, b"hello"), Record(3, 0, at, b"xy"))


def test_slots_without_a_state_say_nothing():
    assert read(image(slot(0, 1), slot(LOCATION, 2), slot(USED, 3))) == ()


def test_of_an_object_that_is_there_twice_the_first_counts():
    assert [
        record.deed
        for record in read(image(slot(USED | DEED, deed=(0, 1)), slot(USED | DEED, deed=(0, 2)), deeds=b"ab"))
    ] == [b"a"]


def test_what_lies_outside_is_left_out():
    beyond = slot(USED | DEED, 1, deed=(DEEDS_BYTES // 64, 1))
    cut = slot(USED | DEED, 2, deed=(0, 8))
    large = slot(USED | LOCATION, 3, place=(9, 8, 7, 1 << 63, 1))
    good = slot(USED | DEED, 4, deed=(0, 4))
    assert [record.seq for record in read(image(beyond, cut, large, good, deeds=b"four"))] == [4]


def test_deeds_that_overlap_cost_no_more_than_there_is_room_for():
    whole = [slot(USED | DEED, seq, deed=(0, DEEDS_BYTES // 4)) for seq in range(16)]
    assert [record.seq for record in read(image(*whole, deeds=bytes(DEEDS_BYTES)))] == [0, 1, 2, 3]


def test_a_number_of_slots_that_cannot_be_is_not_believed():
    records = read(image(slot(USED | LOCATION), count=1 << 40))
    assert [record.seq for record in records] == [1]
    assert read(b"") == read(b"RAYESTAT") == read(b"NOTESTAT" + bytes(PAGE)) == ()


@given(st.binary(max_size=640), st.binary(max_size=200), st.integers(0, 20))
def test_garbage_is_read_within_bounds(table, deeds, count):
    memory = image(table, deeds=deeds, count=count)
    records = read(memory)
    assert len(records) <= len(table) / 64 + 1
    assert sum(len(record.deed) for record in records) <= DEEDS_BYTES
    for record in records:
        assert record.location is not None or record.deed
