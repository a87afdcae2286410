"""Spilling: when owners are asked, what is written where, and any order of events against an account of the disk."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ray import _protocol as p
from ray._node import events
from ray._node.peer_protocol import Locate, Located
from ray._node.spill_files import FILE_BYTES, SPILLED, record_bytes
from ray._node.spills import FULL_S
from tests.node.simulated import NODE, World

MIB = 1 << 20
STORE = 256 * MIB


class Bench:
    """A node whose store one driver has filled, and what that has offered."""

    def __init__(self, *, lent: int = 240 * MIB) -> None:
        self.world = World(store=STORE)
        self.driver = self.world.driver()
        self._names = itertools.count(1)
        self._corr = itertools.count(1)
        if lent:
            self.world.send(self.driver, p.SegmentRequest(lent), next(self._corr))

    def stats(self) -> dict[str, int]:
        return self.world.node.spills.statistics()

    def offer(self, *sizes: int, sender: int = 0, owner: int = 0) -> list[bytes]:
        names = [next(self._names).to_bytes(28, "big") for _ in sizes]
        blocks = [(name, serial, 1, 64, size) for serial, (name, size) in enumerate(zip(names, sizes, strict=True))]
        sender = sender or self.driver
        self.world.send(sender, p.Spill(owner or sender, blocks))
        return names

    def answers(self, proc: int = 0) -> dict[bytes, int]:
        """Numbers by object, of what was answered since the last look."""
        messages = self.world.take(proc or self.driver, p.Spilled)
        return {name: spill for message in messages for name, _, spill, _ in message.blocks}  # type: ignore[attr-defined]

    def write_all(self, kind: str = "") -> None:
        while self.world.spill_writes:
            self.world.finish_write(next(iter(self.world.spill_writes)), kind)

    def pull(self, name: bytes, spill: int, size: int) -> int:
        corr = next(self._corr)
        self.world.send(self.driver, p.Pull(name, NODE, spill, 0, size), corr)
        return corr


def test_owners_are_asked_once_for_each_rise_above_the_high_water_mark():
    bench = Bench(lent=200 * MIB)
    assert bench.world.take(bench.driver, p.SpillWanted) == []
    bench.world.send(bench.driver, p.SegmentRequest(16 * MIB), 7)
    asked = bench.world.take(bench.driver, p.SpillWanted)
    assert asked == [p.SpillWanted(16 * MIB)], "a sixteenth of the store, though less is too much"
    bench.world.advance(60)
    assert bench.world.take(bench.driver, p.SpillWanted) == []
    bench.world.send(bench.driver, p.SegmentRequest(8 * MIB), 8)
    assert len(bench.world.take(bench.driver, p.SpillWanted)) == 1


def test_who_waits_has_owners_asked_again_and_again_with_pauses():
    bench = Bench()
    bench.world.take(bench.driver, p.SpillWanted)
    bench.world.send(bench.driver, p.SegmentRequest(32 * MIB), 7)
    bench.world.advance(4)
    assert 4 <= len(bench.world.take(bench.driver, p.SpillWanted)) <= 12
    bench.world.send(bench.driver, p.SegmentRequest(0), 7)  # it does not wait any more
    bench.world.take(bench.driver, p.SpillWanted)
    bench.world.advance(60)
    assert bench.world.take(bench.driver, p.SpillWanted) == []
    assert 7 not in bench.world.replies[bench.driver]


def test_small_values_share_a_file_and_large_ones_have_their_own():
    bench = Bench()
    bench.world.send(bench.driver, p.SegmentRequest(256 * MIB), 7)
    names = bench.offer(*[200_000] * 50, 80 * MIB, *[200_000] * 50)
    assert sorted(len(write.pieces) for write in bench.world.spill_writes.values()) == [1, 100]
    bench.write_all()
    answers = bench.answers()
    assert sorted(answers) == sorted(names)
    assert all(spill > SPILLED for spill in answers.values())
    assert bench.stats()["spilled_values"] == 101


def test_what_is_offered_beyond_the_need_is_declined():
    bench = Bench()
    names = bench.offer(*[8 * MIB] * 10)  # 16 MiB are asked for at least
    declined = bench.answers()
    assert set(declined.values()) == {0}
    assert list(declined) == names[-len(declined) :]
    bench.write_all()
    assert len(bench.answers()) == 10 - len(declined)
    assert 2 <= 10 - len(declined) <= 5


def test_a_full_disk_is_told_once_and_tried_again_later():
    bench = Bench()
    (name,) = bench.offer(MIB)
    bench.write_all("full")
    assert bench.answers() == {name: 0}
    assert bench.offer(MIB)
    assert not bench.world.spill_writes
    notices = [log for log in bench.world.logs if log.startswith("notice") and "no: full" in log]
    assert len(notices) == 1
    bench.world.send(bench.driver, p.SegmentRequest(200 * MIB), 7)
    bench.world.advance(FULL_S + 0.1)
    assert bench.world.take(bench.driver, p.SpillWanted)
    bench.offer(MIB)
    assert bench.world.spill_writes
    bench.write_all("full")
    bench.world.advance(30)
    denied = bench.world.replies[bench.driver].pop(7)
    assert isinstance(denied, p.SegmentDenied)
    assert "could be spilled: no: full" in denied.message


def test_who_waits_is_denied_only_when_no_room_was_made_for_long():
    bench = Bench()
    bench.world.send(bench.driver, p.SegmentRequest(200 * MIB), 7)
    for _ in range(4):
        bench.world.advance(8)
        bench.offer(MIB)
        bench.write_all()
    assert 7 not in bench.world.replies[bench.driver]
    bench.world.advance(11)
    assert isinstance(bench.world.replies[bench.driver][7], p.SegmentDenied)


def test_a_value_is_read_into_a_segment_that_its_readers_share():
    bench = Bench()
    (name,) = bench.offer(MIB)
    bench.write_all()
    spill = bench.answers()[name]
    first, second = bench.pull(name, spill, MIB), bench.pull(name, spill, MIB)
    ((ticket, read),) = bench.world.spill_reads.items()
    bench.world.finish_read(ticket)
    pulled = [bench.world.replies[bench.driver].pop(corr) for corr in (first, second)]
    assert pulled == [p.Pulled(read.segment, MIB, 0)] * 2
    assert bench.stats()["restored_bytes_total"] == MIB


@pytest.mark.parametrize("kind", ["damaged", "io"])
def test_a_damaged_value_is_lost_and_another_failure_is_tried_again(kind):
    bench = Bench()
    (name,) = bench.offer(MIB)
    bench.write_all()
    corr = bench.pull(name, bench.answers()[name], MIB)
    (ticket,) = bench.world.spill_reads
    bench.world.finish_read(ticket, kind)
    if kind == "io":
        bench.world.advance(0.01)
        (ticket,) = bench.world.spill_reads
        bench.world.finish_read(ticket)
        assert isinstance(bench.world.replies[bench.driver].pop(corr), p.Pulled)
    else:
        assert bench.world.replies[bench.driver].pop(corr) == p.SegmentDenied(
            f"the value could not be copied from node {NODE:016x}: no: damaged"
        )
        assert not bench.world.disk


def test_a_reader_elsewhere_pulls_from_the_file():
    bench = Bench()
    first, second = bench.offer(MIB, 3 * MIB)
    bench.write_all()
    answers = bench.answers()
    node, now = bench.world.node, bench.world.now
    node.handle(events.PeerJoined(77, "10.0.0.7:1"), now)
    (file,) = bench.world.disk
    located = node.handle(events.FromPeer(77, Locate(second, answers[second], 0, into=5)), now)
    sources = [(NODE, file, record_bytes(MIB) + record_bytes(0))]
    assert located == [events.OfferSpill(file), events.ToPeer(77, Located(second, answers[second], 0, sources))]
    located = node.handle(events.FromPeer(77, Locate(first, 12345 + SPILLED, 0, into=6)), now)
    assert located == [events.ToPeer(77, Located(first, 12345 + SPILLED, 0, []))], "it was released"


def test_only_its_owner_releases_a_value():
    bench = Bench()
    (name,) = bench.offer(MIB)
    bench.write_all()
    spill = bench.answers()[name]
    bench.world.send(bench.world.driver(), p.SpillReleased(spill))
    assert bench.world.disk
    bench.world.send(bench.driver, p.SpillReleased(spill))
    assert not bench.world.disk


def test_an_owner_that_dies_while_its_values_are_written_leaves_no_file():
    bench = Bench()
    other = bench.world.driver()
    bench.offer(MIB, sender=other)
    bench.world.leave(other)
    bench.write_all()
    assert not bench.world.disk


def test_values_move_out_of_files_that_are_mostly_garbage():
    bench = Bench()
    bench.world.send(bench.driver, p.SegmentRequest(256 * MIB), 7)
    names = bench.offer(*[MIB] * 240)
    bench.write_all()
    answers = bench.answers()
    kept = names[::4]
    before = dict(bench.world.disk)
    for name in names:
        if name not in kept:
            bench.world.send(bench.driver, p.SpillReleased(answers[name]))
    bench.write_all()
    counts = bench.stats()
    assert counts["spill_live_bytes"] == 60 * record_bytes(MIB)
    assert counts["spill_file_bytes"] <= 1.2 * counts["spill_live_bytes"] + FILE_BYTES
    there = {stored for file in bench.world.disk.values() for stored in file.values()}
    assert {(name, MIB) for name in kept} <= there
    assert set(bench.world.disk) != set(before)


class AnyOrder(RuleBasedStateMachine):
    """Offers, outcomes, releases, readers and deaths in any order. The model knows which values must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.world = self.bench.world
        self.owners = [self.bench.driver, self.world.driver()]
        self.sizes: dict[bytes, int] = {}
        self.live: dict[bytes, tuple[int, int]] = {}
        """Number and owner of what was spilled and not released."""
        self.reads: dict[int, bytes] = {}

    def _hear(self) -> None:
        for owner in self.owners:
            for name, spill in self.bench.answers(owner).items():
                if spill:
                    self.live[name] = (spill, owner)

    @rule(count=st.integers(1, 40), size=st.integers(1, 12 * MIB), who=st.integers(0, 1))
    def offer(self, count, size, who):
        owner = self.owners[who % len(self.owners)]
        self.world.send(self.bench.driver, p.SegmentRequest(250 * MIB), 9999)
        for name in self.bench.offer(*[size] * count, sender=owner):
            self.sizes[name] = size
        self._hear()

    @rule(choice=st.integers(0, 9), kind=st.sampled_from(["", "", "", "", "io", "full"]))
    def write(self, choice, kind):
        if self.world.spill_writes:
            files = list(self.world.spill_writes)
            self.world.finish_write(files[choice % len(files)], kind)
            self._hear()

    @rule(choices=st.lists(st.integers(0, 1 << 16), max_size=30))
    def release(self, choices):
        for choice in choices:
            if self.live:
                name = list(self.live)[choice % len(self.live)]
                spill, owner = self.live.pop(name)
                self.world.send(owner, p.SpillReleased(spill))

    @rule(choice=st.integers(0, 1 << 16))
    def read(self, choice):
        if self.live:
            name = list(self.live)[choice % len(self.live)]
            self.bench.pull(name, self.live[name][0], self.sizes[name])

    @rule(choice=st.integers(0, 9), fails=st.booleans())
    def end_read(self, choice, fails):
        if self.world.spill_reads:
            tickets = list(self.world.spill_reads)
            self.world.finish_read(tickets[choice % len(tickets)], "io" if fails else "")

    @rule()
    def die(self):
        if len(self.owners) > 1:
            dead = self.owners.pop()
            self.world.leave(dead)
            self.live = {name: known for name, known in self.live.items() if known[1] != dead}
            self.owners.append(self.world.driver())

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds):
        self.world.advance(seconds)

    @invariant()
    def what_is_spilled_is_on_the_disk(self):
        there = {stored for file in self.world.disk.values() for stored in file.values()}
        for name in self.live:
            assert (name, self.sizes[name]) in there

    def teardown(self):
        self.world.advance(30)  # a disk that was full may have room again
        while self.world.spill_writes or self.world.spill_reads:
            self.bench.write_all()
            for ticket in list(self.world.spill_reads):
                self.world.finish_read(ticket)
            self._hear()
            self.world.advance(30)
        size = sum(record_bytes(length) for file in self.world.disk.values() for _, length in file.values())
        live = sum(record_bytes(self.sizes[name]) for name in self.live)
        assert size <= 1.2 * live + FILE_BYTES
        for spill, owner in self.live.values():
            self.world.send(owner, p.SpillReleased(spill))
        self.bench.write_all()
        assert not self.world.disk


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
