"""The writer between the head's thread and a storage: order, grouping, limits, errors and its end.

Most of it on a storage in memory whose commits wait to be let through; what is durable, and when, is tested on the real
ones in `test_crashes.py`.
"""

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from ray._control.storage import LeadershipLost, LimitExceeded, Storage, StorageWriter, Write, WriterFull
from ray._control.storage import writer as writer_module
from ray._node.descriptors import usage

from .servers import contents

DEADLINE_S = 20.0


class GatedStorage(Storage):
    """Keeps records in memory; each commit waits for one `let`, unless the gate is `open`."""

    def __init__(self) -> None:
        super().__init__("memory")
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.open = True
        self.groups: list[list[Write]] = []
        self.renewals = 0
        self.error: BaseException | None = None

    def _load(self):
        records = {(write.table, write.key): write.value for group in self.groups for write in group}
        return ((table, key, value) for (table, key), value in records.items() if value is not None)

    def _commit(self, epoch: int, number: int, writes: list[Write]) -> None:
        self.entered.release()
        if not self.open:
            assert self.gate.acquire(timeout=DEADLINE_S)
        if self.error is not None:
            raise self.error
        assert number == len(self.groups) + 1
        self.groups.append(writes)

    def _acquire(self, holder: str, ttl_s: float) -> int:
        return 1

    def _renew(self, epoch: int, holder: str, ttl_s: float) -> None:
        self.renewals += 1
        if self.error is not None:
            raise self.error

    def _release(self, epoch: int) -> None: ...

    def close(self) -> None: ...

    def wait_until_committing(self) -> None:
        assert self.entered.acquire(timeout=DEADLINE_S)


@pytest.fixture
def gated():
    """The storage, holding the lease for a long time; and no thread or descriptor more after the test."""
    threads, descriptors = threading.active_count(), usage(os.getpid())[0]
    gated = GatedStorage()
    gated.acquire("a", 3600)
    yield gated
    assert threading.active_count() == threads
    assert usage(os.getpid())[0] == descriptors


def one(number: int, size: int = 1) -> list[Write]:
    return [Write("t", b"%d" % number, b"x" * size)]


def wait_for(writer: StorageWriter, durable_up_to: int, *, or_error: bool = False) -> None:
    """Until that much is durable, woken by the descriptor alone."""
    deadline = time.monotonic() + DEADLINE_S
    while (progress := writer.completed()).durable_up_to < durable_up_to:
        if progress.error is not None:
            assert or_error, progress.error
            return
        ready = select.select([writer], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"{progress} in {DEADLINE_S} s"


def test_batches_are_numbered_and_become_durable_in_their_order(gated):
    writer = StorageWriter(gated)
    assert writer.completed() == (0, None)
    assert [writer.submit(one(number)) for number in range(1, 101)] == list(range(1, 101))
    wait_for(writer, 100)
    assert [write.key for group in gated.groups for write in group] == [b"%d" % number for number in range(1, 101)]
    assert writer.close() == (100, None)


def test_the_descriptor_is_readable_once_for_what_is_new(gated):
    writer = StorageWriter(gated)
    assert select.select([writer], [], [], 0)[0] == []
    writer.submit(one(1))
    assert select.select([writer], [], [], DEADLINE_S)[0] == [writer]
    assert writer.completed() == (1, None)
    assert select.select([writer], [], [], 0)[0] == []
    writer.close()


def test_what_waits_during_a_commit_is_one_commit_after_it(gated):
    gated.open = False
    writer = StorageWriter(gated)
    writer.submit(one(1))
    gated.wait_until_committing()
    for number in range(2, 66):
        writer.submit(one(number))
    assert writer.completed() == (0, None)
    gated.gate.release(2)
    wait_for(writer, 65)
    assert [len(group) for group in gated.groups] == [1, 64]
    writer.close()


@pytest.mark.parametrize(("limit", "value"), [("GROUP_WRITES_MAX", 8), ("GROUP_BYTES_MAX", 8 * 102)])
def test_a_group_has_a_limit_and_a_larger_batch_is_a_commit_of_its_own(gated, monkeypatch, limit, value):
    monkeypatch.setattr(writer_module, limit, value)
    gated.open = False
    writer = StorageWriter(gated)
    writer.submit(one(0, 100))
    gated.wait_until_committing()
    for number in range(1, 10):
        writer.submit(one(number, 100))
    writer.submit([Write("t", b"%d" % number, b"x" * 100) for number in range(10, 20)])
    gated.open = True
    gated.gate.release()
    wait_for(writer, 11)
    assert [len(group) for group in gated.groups] == [1, 8, 1, 10]
    writer.close()


def test_a_group_is_never_more_than_a_storage_takes_in_one_transaction(gated):
    gated.transaction_writes_max = 5
    gated.open = False
    writer = StorageWriter(gated)
    for number in range(11):
        writer.submit(one(number))
        if number == 0:
            gated.wait_until_committing()
    gated.gate.release(3)
    assert writer.close() == (11, None)
    assert [len(group) for group in gated.groups] == [1, 5, 5]


def test_a_full_queue_says_so_takes_nothing_and_has_room_again_when_told(gated):
    gated.open = False
    writer = StorageWriter(gated, batches_max=3)
    assert writer.has_room()
    for number in range(1, 4):
        writer.submit(one(number))
    assert not writer.has_room()
    with pytest.raises(WriterFull, match="memory is slower than what it is given: 3 of 3 batches"):
        writer.submit(one(4))
    gated.open = True
    gated.gate.release()
    wait_for(writer, 3)
    assert writer.has_room()
    assert writer.submit(one(5)) == 4
    assert writer.close() == (4, None)
    assert contents(gated).keys() == {("t", b"%d" % number) for number in (1, 2, 3, 5)}


def test_the_queue_counts_bytes_too_but_takes_any_batch_when_it_is_empty(gated):
    gated.open = False
    writer = StorageWriter(gated, bytes_max=1000)
    assert writer.submit(one(1, 2000)) == 1
    assert not writer.has_room()
    with pytest.raises(WriterFull, match="2002 of 1000 bytes"):
        writer.submit(one(2))
    gated.open = True
    gated.gate.release()
    wait_for(writer, 1)
    gated.open = False
    assert [writer.submit(one(number, 400)) for number in (2, 3)] == [2, 3]
    with pytest.raises(WriterFull, match="804 of 1000 bytes"):
        writer.submit(one(4, 400))
    gated.gate.release(2)
    assert writer.close() == (3, None)


def test_a_batch_that_can_never_be_stored_is_refused_at_once_and_harms_no_other(gated):
    writer = StorageWriter(gated)
    with pytest.raises(LimitExceeded, match="name of a table"):
        writer.submit([Write("Wrong", b"k", b"v")])
    assert writer.submit([]) == 1
    assert writer.submit(one(1)) == 2
    wait_for(writer, 2)
    assert writer.close() == (2, None)


def test_an_error_ends_it_and_is_told_to_every_later_batch(gated):
    gated.open = False
    writer = StorageWriter(gated)
    writer.submit(one(1))
    gated.gate.release()
    wait_for(writer, 1)
    gated.error = LeadershipLost("another leads")
    writer.submit(one(2))
    writer.submit(one(3))
    gated.gate.release()
    wait_for(writer, 3, or_error=True)
    assert writer.completed() == (1, gated.error)
    with pytest.raises(LeadershipLost, match="another leads"):
        writer.submit(one(4))
    assert writer.close() == (1, gated.error)
    assert len(gated.groups) == 1


def test_a_defect_of_a_storage_is_told_too(gated, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it is also printed
    gated.error = ZeroDivisionError("division by zero")
    writer = StorageWriter(gated)
    writer.submit(one(1))
    wait_for(writer, 1, or_error=True)
    assert "the writer failed with ZeroDivisionError" in str(writer.close().error)


def test_closing_stores_what_was_submitted_and_can_be_repeated(gated):
    gated.open = False
    writer = StorageWriter(gated)
    for number in range(10):
        writer.submit(one(number))
    gated.gate.release(10)
    assert writer.close() == (10, None)
    assert writer.close() == writer.completed() == (10, None)
    assert len(contents(gated)) == 10
    with pytest.raises(AssertionError, match="was closed"):
        writer.submit(one(11))


def test_the_lease_is_renewed_while_nothing_is_written_and_its_loss_is_told(gated):
    gated.acquire("a", 0.03)
    writer = StorageWriter(gated)
    deadline = time.monotonic() + DEADLINE_S
    until = writer.lease_until
    while gated.renewals < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert writer.lease_until > until
    gated.error = LeadershipLost("another leads")
    wait_for(writer, 1, or_error=True)
    assert writer.close() == (0, gated.error)


def test_the_lease_is_renewed_while_much_is_written(kind, opened):
    """Where it is real: a head that never rests keeps its lease past its duration."""
    leader = opened(kind.url())
    leader.acquire("a", 1)
    writer = StorageWriter(leader)
    until, number = leader.lease_until, 0
    while writer.lease_until <= until:
        number = writer.submit(one(number))
        wait_for(writer, number)
    assert writer.close() == (number, None)
