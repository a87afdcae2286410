"""Segments: behaviours one by one, and any order of events against a simple account of bytes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from ray import _protocol as p
from ray._node import segments
from ray._node.segments import segment_size
from tests.node.simulated import NODE, World, cpu

MIB = 1 << 20


def ask(world: World, proc: int, size: int, corr: int = 1, *, wish: int = 0) -> p.Message | None:
    world.send(proc, p.SegmentRequest(size, wish), corr)
    return world.replies.get(proc, {}).pop(corr, None)


def test_a_returned_segment_is_recycled_warm_under_a_new_id():
    world = World()
    driver = world.driver()
    first = ask(world, driver, 4 * MIB)
    assert first == p.SegmentGranted(1, 4 * MIB)
    world.send(driver, p.SegmentRelease(1))
    assert world.segments == {1: 4 * MIB}
    other = world.driver()
    assert ask(world, other, 3 * MIB + 1) == p.SegmentGranted(2, 4 * MIB)
    assert world.segments == {2: 4 * MIB}, "the same memory under another name"


def test_warm_segments_are_kept_to_an_eighth():
    world = World(store=64 * MIB)
    driver = world.driver()
    for corr in range(1, 5):
        ask(world, driver, 4 * MIB, corr)
    for segment in range(1, 5):
        world.send(driver, p.SegmentRelease(segment))
    assert list(world.segments) == [3, 4]


def test_warm_segments_make_room_before_anybody_waits():
    world = World(store=64 * MIB)
    driver = world.driver()
    ask(world, driver, 8 * MIB)
    world.send(driver, p.SegmentRelease(1))
    assert ask(world, driver, 64 * MIB) == p.SegmentGranted(2, 64 * MIB)
    assert world.segments == {2: 64 * MIB}


def test_who_finds_no_room_waits_while_holders_are_asked_to_trim():
    world = World(store=64 * MIB)
    driver, other = world.driver(), world.driver()
    ask(world, driver, 32 * MIB, 1)
    ask(world, driver, 32 * MIB, 2)
    assert ask(world, other, 4 * MIB) is None
    assert world.take(driver, p.SegmentTrim) == [p.SegmentTrim(4 * MIB)]
    world.send(driver, p.SegmentRelease(1))
    assert isinstance(world.replies[other].pop(1), p.SegmentGranted)


def test_waiting_ends_with_a_refusal_that_names_the_largest_holders():
    world = World(store=64 * MIB)
    driver, other = world.driver(), world.driver()
    ask(world, driver, 64 * MIB)
    assert ask(world, other, 4 * MIB) is None
    world.advance(segments.WAIT_S)
    denied = world.replies[other].pop(1)
    assert isinstance(denied, p.SegmentDenied)
    assert "64.0 MiB of 64.0 MiB" in denied.message
    assert f"driver (pid {90_000 + driver}): 64.0 MiB" in denied.message


def allocate(world: World, procs: list[int], need: int, total: int) -> int:
    """Each process puts small values of together `total` bytes, asking as a core does; returns how many get no room."""
    rooms = dict.fromkeys(procs, 0)
    had = dict.fromkeys(procs, 0)
    refused = 0
    for step in range(total // need):
        for proc in procs:
            if rooms[proc] < need:
                wish = min(4 * MIB << had[proc], 64 * MIB)
                granted = ask(world, proc, need, corr=step + 1, wish=wish)
                if not isinstance(granted, p.SegmentGranted):
                    refused += 1
                    continue
                rooms[proc], had[proc] = granted.size, had[proc] + 1
            rooms[proc] -= need
    return refused


def test_small_values_fill_the_store_although_segments_grow():
    world = World(store=100 * MIB)
    assert allocate(world, [world.driver()], 200 << 10, 97 * MIB) == 0
    assert len(world.segments) < 25, "each costs a descriptor and a mapping"


def test_processes_that_came_first_do_not_hold_the_room_of_the_others():
    world = World(store=512 * MIB)
    assert allocate(world, [world.driver() for _ in range(10)], 200 << 10, 40 * MIB) == 0


def test_a_refusal_names_what_was_needed_and_not_what_was_wished():
    world = World(store=64 * MIB)
    driver = world.driver()
    ask(world, driver, 64 * MIB - 4096)
    assert ask(world, driver, 200 << 10, wish=64 * MIB) is None
    world.advance(segments.WAIT_S)
    denied = world.replies[driver].pop(1)
    assert isinstance(denied, p.SegmentDenied)
    assert "200.0 KiB were asked for" in denied.message


def test_what_can_never_fit_is_refused_at_once():
    world = World(store=64 * MIB)
    denied = ask(world, world.driver(), 65 * MIB)
    assert isinstance(denied, p.SegmentDenied)
    assert "larger object_store_memory" in denied.message


def test_rounding_does_not_refuse_what_fits_exactly():
    world = World(store=40 * MIB)
    assert ask(world, world.driver(), 39 * MIB) == p.SegmentGranted(1, 39 * MIB)


def test_a_large_request_is_overtaken_a_few_times_and_then_waited_for():
    world = World(store=64 * MIB)
    driver, large, small = world.driver(), world.driver(), world.driver()
    ask(world, driver, 32 * MIB)
    assert ask(world, large, 64 * MIB) is None
    outcomes = []
    for corr in range(1, segments.OVERTAKES + 3):
        granted = ask(world, small, MIB, corr)
        outcomes.append(granted is not None)
        if granted is not None:
            world.send(small, p.SegmentRelease(granted.segment))  # type: ignore[attr-defined]
    assert outcomes == [True] * segments.OVERTAKES + [False] * 2


def test_memory_that_the_system_refuses_is_denied_and_not_counted():
    world = World()
    driver = world.driver()
    world.refuse_memory = True
    denied = ask(world, driver, 4 * MIB)
    assert isinstance(denied, p.SegmentDenied)
    assert "Cannot allocate memory" in denied.message
    assert world.node.segments.used == 0


def test_anybody_may_map_a_segment_until_it_is_gone():
    world = World()
    driver, reader = world.driver(), world.driver()
    ask(world, driver, 4 * MIB)
    world.send(reader, p.SegmentMap(1), 9)
    assert world.replies[reader].pop(9) == p.SegmentMapped(1, 4 * MIB, driver)
    world.send(reader, p.SegmentMap(5), 9)
    assert isinstance(world.replies[reader].pop(9), p.SegmentDenied)


def test_a_dead_lessee_s_segment_lives_until_its_last_block_is_freed():
    world = World({"CPU": 1})
    driver, other = world.driver(), world.driver()
    world.send(driver, p.LeaseDemand(1, cpu(1), 1))
    (grant,) = world.take(driver, p.LeaseGranted)
    ask(world, grant.proc, 4 * MIB)  # type: ignore[attr-defined]
    world.die(grant.proc)  # type: ignore[attr-defined]
    assert (
        world.take(driver, p.SegmentAdopted)
        == world.take(other, p.SegmentAdopted)
        == [
            p.SegmentAdopted(1, NODE, grant.proc)  # type: ignore[attr-defined]
        ]
    )
    world.send(driver, p.SegmentClaims(1, [(0, 64), (64, 64)]))
    world.send(driver, p.BlocksFreed(1, [0]))
    world.send(other, p.SegmentClaims(1, []))
    assert world.segments == {1: 4 * MIB}
    world.send(other, p.SegmentMap(1), 3)
    assert world.replies[other].pop(3) == p.SegmentMapped(1, 4 * MIB, 0)
    world.send(driver, p.BlocksFreed(1, [64], node=4242))
    assert world.segments == {1: 4 * MIB}, "that was a segment of another node"
    world.send(driver, p.BlocksFreed(1, [64]))
    assert world.segments == {}
    assert world.node.segments.used == 0


def test_claims_of_an_owner_fall_with_its_death():
    world = World()
    lessee, owner = world.driver(), world.driver()
    ask(world, lessee, 4 * MIB)
    world.leave(lessee)
    world.send(owner, p.SegmentClaims(1, [(0, 64)]))
    world.leave(owner)
    assert world.segments == {}


def test_who_dies_before_saying_what_it_owns_is_not_waited_for():
    world = World()
    lessee, silent = world.driver(), world.driver()
    ask(world, lessee, 4 * MIB)
    world.leave(lessee)
    assert world.segments
    world.leave(silent)
    assert world.segments == {}


def test_sizes_are_powers_of_two_up_to_the_limit():
    assert segment_size(1) == MIB
    assert segment_size(4 * MIB) == 4 * MIB
    assert segment_size(2 * MIB + 1) == 4 * MIB
    assert segment_size(4 * MIB + 1) == 4 * MIB + (64 << 10)
    assert segment_size(100 * MIB) == 100 * MIB


class Segments(RuleBasedStateMachine):
    """The books here: who was told that it has which segment, and who said that it owns what."""

    procs = Bundle("procs")
    CAPACITY = 32 * MIB

    def __init__(self) -> None:
        super().__init__()
        self.world = World(store=self.CAPACITY)
        self.lent: dict[int, tuple[int, int]] = {}
        self.asked: dict[tuple[int, int], int] = {}
        self.corr = 0

    @rule(target=procs)
    def joins(self) -> int:
        return self.world.driver()

    @rule(proc=procs)
    def leaves(self, proc: int) -> None:
        if proc in self.world.inbox:
            self.world.leave(proc)
            self.asked = {key: size for key, size in self.asked.items() if key[0] != proc}
            self.lent = {segment: held for segment, held in self.lent.items() if held[0] != proc}

    @rule(
        proc=procs,
        size=st.sampled_from([1, MIB, 3 * MIB, 4 * MIB, 9 * MIB, 31 * MIB, 32 * MIB, 33 * MIB]),
        wish=st.sampled_from([0, 4 * MIB, 64 * MIB]),
    )
    def asks(self, proc: int, size: int, wish: int) -> None:
        if proc in self.world.inbox:
            self.corr += 1
            self.asked[proc, self.corr] = size
            self.world.send(proc, p.SegmentRequest(size, wish), self.corr)

    @rule(data=st.data())
    def returns(self, data: st.DataObject) -> None:
        if self.lent:
            segment = data.draw(st.sampled_from(sorted(self.lent)))
            proc, _ = self.lent.pop(segment)
            self.world.send(proc, p.SegmentRelease(segment))

    @rule(proc=procs, segment=st.integers(1, 30), blocks=st.lists(st.tuples(st.integers(0, 3), st.just(1)), max_size=3))
    def claims(self, proc: int, segment: int, blocks: list[tuple[int, int]]) -> None:
        if proc in self.world.inbox:
            self.world.send(proc, p.SegmentClaims(segment, blocks))

    @rule(proc=procs, segment=st.integers(1, 30), offsets=st.lists(st.integers(0, 3), max_size=4))
    def frees(self, proc: int, segment: int, offsets: list[int]) -> None:
        if proc in self.world.inbox:
            self.world.send(proc, p.BlocksFreed(segment, offsets))

    @rule(seconds=st.sampled_from([0.1, 4.0, 10.0]), refuse=st.booleans())
    def time_passes(self, seconds: float, refuse: bool) -> None:
        self.world.refuse_memory = refuse
        self.world.advance(seconds)

    @invariant()
    def every_answer_was_asked_for_and_every_segment_is_somebodys(self) -> None:
        world = self.world
        for proc, replies in world.replies.items():
            for corr, reply in replies.items():
                size = self.asked.pop((proc, corr))
                if isinstance(reply, p.SegmentGranted):
                    assert reply.size >= size
                    assert reply.segment not in self.lent
                    self.lent[reply.segment] = (proc, reply.size)
            replies.clear()
        assert sum(size for _, size in self.lent.values()) <= sum(world.segments.values()) <= self.CAPACITY
        assert all(world.segments[segment] == size for segment, (_, size) in self.lent.items())

    def teardown(self) -> None:
        self.world.advance(segments.WAIT_S)
        self.every_answer_was_asked_for_and_every_segment_is_somebodys()
        assert self.asked == {}, "somebody waits for ever"
        for proc in list(self.world.inbox):
            self.world.leave(proc)
        assert self.world.node.segments.statistics()["segments"] == 0
        assert sum(self.world.segments.values()) <= self.CAPACITY // segments.WARM_SHARE


TestSegments = Segments.TestCase
TestSegments.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
