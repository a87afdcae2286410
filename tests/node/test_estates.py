"""Estates: behaviours one by one on whole nodes, and any order of events against a simple account of claims."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from ray import _protocol as p
from ray._control import members
from ray._control.machine import ProcessJoined, ProcessLeft, Received, Send, Tick
from ray._node import estates, events
from ray._node.estate_questions import ASK_AGAIN_S, EstateQuestions
from ray._node.estates import GRACE_S, LINGER_S, Estates
from ray._node.manager import CoreLeft
from ray._node.register import Location, Record
from tests.node.simulated import NODE, World, cpu

MIB = 1 << 20


def worker(world: World, driver: int) -> int:
    """A worker of this driver's."""
    world.send(driver, p.LeaseDemand(7, cpu(0.1), 1))
    (granted,) = world.take(driver, p.LeaseGranted)
    assert isinstance(granted, p.LeaseGranted)
    return granted.proc


def object_id(world: World, owner: int, seq: int) -> bytes:
    return world.node.facts.node.to_bytes(8) + owner.to_bytes(8) + seq.to_bytes(8) + bytes(4)


def lend(world: World, proc: int, size: int = 4 * MIB, corr: int = 1) -> int:
    world.send(proc, p.SegmentRequest(size), corr)
    granted = world.replies[proc].pop(corr)
    assert isinstance(granted, p.SegmentGranted)
    return granted.segment


def write_down(world: World, proc: int, *records: Record) -> None:
    world.send(proc, p.RegisterOpened(1))
    world.registers[proc] = records


def ask(world: World, proc: int, *claimed: bytes, given_up: tuple[bytes, ...] = (), node: int = 0) -> None:
    world.send(proc, p.EstateQuestion(node or world.node.facts.node, list(given_up), list(claimed)))


def answers(world: World, proc: int) -> tuple[dict[bytes, tuple[list[int], bytes]], list[bytes]]:
    found: dict[bytes, tuple[list[int], bytes]] = {}
    absent: list[bytes] = []
    for answer in world.take(proc, p.EstateAnswer):
        assert isinstance(answer, p.EstateAnswer)
        found |= {key: (place, deed) for key, place, deed in answer.found}
        absent += answer.absent
    return found, absent


class Place:
    """A node with a driver and two workers, one of which is about to die with an object in each one's segment."""

    def __init__(self) -> None:
        self.world = World()
        self.driver = self.world.driver()
        self.owner, self.other = worker(self.world, self.driver), worker(self.world, self.driver)
        self.own, self.others = lend(self.world, self.owner), lend(self.world, self.other)
        write_down(
            self.world,
            self.owner,
            Record(1, 0, Location(NODE, self.own, self.owner, 64, 100), b""),
            Record(2, 0, Location(NODE, self.others, self.other, 128, 100), b""),
            Record(3, 0, None, b"deed"),
        )
        self.own_object, self.others_object, self.small = (object_id(self.world, self.owner, seq) for seq in (1, 2, 3))

    def die(self) -> None:
        self.world.die(self.owner)
        for proc in (self.driver, self.other):  # they own nothing in the dead one's segment
            self.world.send(proc, p.SegmentClaims(self.own, []))


@pytest.fixture
def place() -> Place:
    return Place()


def test_what_is_claimed_is_kept_until_it_is_given_up(place):
    place.die()
    ask(place.world, place.driver, place.own_object, place.others_object, place.small)
    found, absent = answers(place.world, place.driver)
    assert found == {
        place.own_object: ([NODE, place.own, place.owner, 64, 100], b""),
        place.others_object: ([NODE, place.others, place.other, 128, 100], b""),
        place.small: ([], b"deed"),
    }
    assert absent == []
    place.world.advance(10 * LINGER_S)
    assert place.own in place.world.segments
    assert place.world.take(place.other, p.BlocksRetired) == []
    ask(place.world, place.driver, given_up=(place.own_object, place.others_object, place.small))
    assert place.own in place.world.segments, "a reference may be on its way"
    place.world.advance(2 * LINGER_S)
    assert place.own not in place.world.segments
    assert place.world.take(place.other, p.BlocksRetired) == [p.BlocksRetired([(place.others, 128)])]
    assert place.world.node.estates.statistics()["estate_objects"] == 0


def test_what_nobody_claims_is_given_back_after_a_while(place):
    place.die()
    place.world.advance(LINGER_S - 0.5)
    assert place.own in place.world.segments
    place.world.advance(1.0)
    assert place.own not in place.world.segments
    assert place.world.take(place.other, p.BlocksRetired) == [p.BlocksRetired([(place.others, 128)])]
    ask(place.world, place.driver, place.small)
    assert answers(place.world, place.driver) == ({}, [place.small])


def test_a_segment_that_is_given_back_with_retired_blocks_is_not_recycled(place):
    place.die()
    place.world.advance(2 * LINGER_S)
    place.world.send(place.other, p.SegmentRelease(place.others, discard=True))
    assert place.others not in place.world.segments
    assert place.world.node.segments.statistics()["segments_warm"] == 0


def test_a_lessee_that_dies_later_leaves_its_segment_to_the_estate(place):
    place.die()
    ask(place.world, place.driver, place.others_object)
    place.world.die(place.other)
    place.world.send(place.driver, p.SegmentClaims(place.others, []))
    place.world.advance(2 * LINGER_S)
    assert place.others in place.world.segments
    ask(place.world, place.driver, given_up=(place.others_object,))
    place.world.advance(2 * LINGER_S)
    assert place.others not in place.world.segments


def test_a_lessee_that_had_died_before_leaves_its_segment_to_the_estate(place):
    place.world.die(place.other)
    place.world.send(place.driver, p.SegmentClaims(place.others, []))
    place.world.send(place.owner, p.SegmentClaims(place.others, [(128, 100)]))
    place.world.die(place.owner)
    place.world.send(place.driver, p.SegmentClaims(place.own, []))
    assert {place.own, place.others} <= place.world.segments.keys()
    place.world.advance(2 * LINGER_S)
    assert not {place.own, place.others} & place.world.segments.keys()


def test_the_death_of_who_claims_ends_its_claims(place):
    place.die()
    ask(place.world, place.other, place.small)
    place.world.die(place.other)
    assert place.world.node.estates.statistics()["estate_claims"] == 0
    place.world.advance(2 * LINGER_S)
    assert place.world.node.estates.statistics()["estate_objects"] == 0


def test_the_end_of_a_job_ends_what_nobody_claims(place):
    second = place.world.driver()
    place.die()
    ask(place.world, second, place.small)
    place.world.leave(place.driver)
    assert place.world.node.estates.statistics()["estate_objects"] == 1
    ask(place.world, second, place.small)
    assert answers(place.world, second)[0] == {place.small: ([], b"deed")}


def test_when_room_is_wanted_nothing_lingers_longer_than_it_must(place):
    place.die()
    place.world.advance(GRACE_S / 2)
    place.world.send(place.driver, p.SegmentRequest(60 * MIB), 1)
    assert place.own in place.world.segments, "somebody may not have heard of the death yet"
    place.world.advance(GRACE_S / 2 + 0.1)
    assert place.own not in place.world.segments
    assert isinstance(place.world.replies[place.driver].pop(1), p.SegmentGranted)


def test_answers_are_cut_into_messages(place, monkeypatch):
    monkeypatch.setattr(estates, "ANSWER_BYTES_MAX", 1000)
    records = [Record(seq, 0, None, bytes(400)) for seq in range(10)]
    place.world.registers[place.owner] = tuple(records)
    place.die()
    keys = [object_id(place.world, place.owner, seq) for seq in range(10)]
    ask(place.world, place.driver, *keys)
    assert len([m for m in place.world.inbox[place.driver] if isinstance(m, p.EstateAnswer)]) == 5
    assert list(answers(place.world, place.driver)[0]) == keys


@pytest.mark.parametrize(("limit", "value"), [("OBJECTS_MAX", 2), ("DEEDS_BYTES_MAX", 3)])
def test_beyond_the_limits_of_a_node_objects_die_with_their_owner(place, monkeypatch, limit, value):
    monkeypatch.setattr(estates, limit, value)
    place.die()
    ask(place.world, place.driver, place.own_object, place.others_object, place.small)
    found, absent = answers(place.world, place.driver)
    assert list(found) == [place.own_object, place.others_object]
    assert absent == [place.small]


def test_blocks_of_objects_beyond_the_limit_are_given_back_at_once(place, monkeypatch):
    monkeypatch.setattr(estates, "OBJECTS_MAX", 1)
    place.die()
    assert place.world.take(place.other, p.BlocksRetired) == [p.BlocksRetired([(place.others, 128)])]


# ---------------------------------------------------------------------- several nodes


class Pair:
    """A head with a driver, and another node on which a worker has died whom it had an object of."""

    def __init__(self) -> None:
        self.head = World()
        self.place = World(head=self.head)
        self.driver = self.head.driver()
        driver = self.place.driver()
        self.owner = worker(self.place, driver)
        write_down(self.place, self.owner, Record(1, 0, None, b"deed"))
        self.object = object_id(self.place, self.owner, 1)
        self.place.die(self.owner)

    def ask(self) -> None:
        ask(self.head, self.driver, self.object, node=self.place.node.facts.node)

    @property
    def open_questions(self) -> int:
        return self.head.node.estate_questions.statistics()["estate_questions"]


def test_members_of_other_nodes_are_answered_and_their_claims_end_with_them():
    pair = Pair()
    pair.ask()
    assert answers(pair.head, pair.driver) == ({pair.object: ([], b"deed")}, [])
    assert pair.open_questions == 0
    pair.place.advance(2 * LINGER_S)
    assert pair.place.node.estates.statistics()["estate_claims"] == 1
    pair.head.leave(pair.driver)
    pair.head.advance(members.TELL_ALL_AFTER_S)
    pair.place.advance(3 * LINGER_S)
    assert pair.place.node.estates.statistics()["estate_objects"] == 0


def test_a_question_to_a_node_that_was_away_is_answered_when_it_comes_back():
    pair = Pair()
    pair.place.cut()
    pair.ask()
    assert pair.open_questions == 1
    pair.place.come_back()
    assert answers(pair.head, pair.driver) == ({pair.object: ([], b"deed")}, [])
    assert pair.open_questions == 0


def test_a_question_that_was_lost_is_asked_again():
    machine = EstateQuestions(validate=True)
    question = p.EstateQuestion(7, [], [b"object"])
    machine.handle(events.PeerJoined(7, "10.0.0.7:1"), 0.0)
    assert machine.handle(events.AskedElsewhere(11, question), 0.0) == [events.ToManager(7, question, 11)]
    assert machine.next_deadline() == ASK_AGAIN_S
    assert machine.handle(Tick(), ASK_AGAIN_S) == [events.ToManager(7, question, 11)]
    assert machine.handle(events.AnswerPassed(11, [b"object"]), ASK_AGAIN_S) == []
    assert machine.next_deadline() is None


def test_a_question_to_a_node_that_is_lost_is_answered():
    pair = Pair()
    pair.place.cut()
    pair.ask()
    pair.head.feed(CoreLeft(pair.place.node.facts.node, "closed"))
    pair.head.advance(60.0)
    assert answers(pair.head, pair.driver) == ({}, [pair.object])
    assert pair.open_questions == 0
    pair.ask()
    assert answers(pair.head, pair.driver) == ({}, [pair.object]), "at once, for nobody knows such a node"


# ---------------------------------------------------------------------- any order of events

OWNERS = range(1, 5)
CLAIMANTS = range(11, 15)


@dataclass
class Book:
    """What one object should be: who claims it, and since when nobody does."""

    place: Location | None
    since: float
    claims: set[int] = field(default_factory=set)


class Claiming(RuleBasedStateMachine):
    """Workers die, others claim what they left, give it up and die, and the store runs short."""

    objects: Bundle[bytes] = Bundle("objects")

    def __init__(self) -> None:
        super().__init__()
        self.machine = Estates(node=NODE, validate=True)
        self.now = 100.0
        self.books: dict[bytes, Book] = {}
        self.held: dict[tuple[int, int], int] = {}
        self.living = set(CLAIMANTS)
        self.dead: set[int] = set()
        self.linger_s = LINGER_S
        for proc in (*OWNERS, *CLAIMANTS):
            self.tell(ProcessJoined(proc, p.ROLE_WORKER, proc, 1))

    def tell(self, event: object) -> list[object]:
        effects = self.machine.handle(event, self.now)  # type: ignore[arg-type]
        for effect in effects:
            match effect:
                case events.BlocksHeld():
                    for offset in effect.offsets:
                        self.held[effect.segment, offset] = 1
                case events.BlockUnneeded():
                    assert self.held.pop((effect.segment, effect.offset)), "a block is given back once"
        return list(effects)

    @rule(
        target=objects,
        owner=st.sampled_from(OWNERS),
        slots=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4),
    )
    def owner_dies(self, owner: int, slots: list[tuple[bool, bool]]) -> bytes:
        first = NODE.to_bytes(8) + owner.to_bytes(8) + (0).to_bytes(8) + bytes(4)
        if owner in self.dead:
            return first
        self.dead.add(owner)
        records = [
            Record(
                seq,
                0,
                Location(NODE, owner, owner, seq * 64, 10) if stored else None,
                b"d" if deed or not stored else b"",
            )
            for seq, (stored, deed) in enumerate(slots)
        ]
        gone = events.WorkerGone(owner, owner, "killed", (), -9, intended=False, oom=False)
        assert self.tell(gone) == [events.ReadRegister(owner)]
        assert self.tell(events.RegisterRead(owner, tuple(records)))[-1] == events.Departed(gone)
        self.tell(ProcessLeft(owner))
        for record in records:
            key = NODE.to_bytes(8) + owner.to_bytes(8) + record.seq.to_bytes(8) + bytes(4)
            self.books[key] = Book(record.location, self.now)
        return first

    @rule(key=objects, proc=st.sampled_from(CLAIMANTS))
    def claim(self, key: bytes, proc: int) -> None:
        if proc not in self.living:
            return
        (said,) = self.tell(Received(proc, p.EstateQuestion(NODE, [], [key])))
        assert isinstance(said, Send)
        assert isinstance(said.message, p.EstateAnswer)
        book = self.books.get(key)
        if book is None:
            assert said.message == p.EstateAnswer([], [key])
        else:
            ((found, place, deed),) = said.message.found
            assert (found, place) == (key, list(book.place or ()))
            assert place or deed
            book.claims.add(proc)

    @rule(key=objects, proc=st.sampled_from(CLAIMANTS))
    def give_up(self, key: bytes, proc: int) -> None:
        if proc in self.living:
            self.tell(Received(proc, p.EstateQuestion(NODE, [key], [])))
            self.unclaimed(key, proc)

    @rule(proc=st.sampled_from(CLAIMANTS))
    def claimant_dies(self, proc: int) -> None:
        if proc in self.living:
            self.living.discard(proc)
            self.tell(ProcessLeft(proc))
            for key in list(self.books):
                self.unclaimed(key, proc)

    def unclaimed(self, key: bytes, proc: int) -> None:
        book = self.books.get(key)
        if book is not None and proc in book.claims:
            book.claims.discard(proc)
            book.since = self.now if not book.claims else book.since

    @rule(seconds=st.sampled_from([0.1, GRACE_S, LINGER_S, 3 * LINGER_S]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while (deadline := self.machine.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.tell(Tick())
            self.forget()
        self.now = end
        for book in self.books.values():
            assert book.claims or book.since > self.now - LINGER_S - GRACE_S, "it lingers too long"

    @rule(size=st.sampled_from([0, MIB]), waits=st.booleans())
    def room_is_short(self, size: int, waits: bool) -> None:
        waits = waits and size > 0
        self.linger_s = GRACE_S if waits else LINGER_S
        self.tell(events.RoomShort(size, waits=waits))
        self.forget()

    def forget(self) -> None:
        """What the machine does not have any more: nobody may have claimed it, and its time must have passed."""
        for key, book in list(self.books.items()):
            if self.machine._find(key) is None:
                assert not book.claims, "what is claimed is kept"
                assert book.since + self.linger_s <= self.now, "it might have been claimed yet"
                del self.books[key]

    @rule()
    def job_ends(self) -> None:
        self.tell(events.JobEnded(1))
        self.books = {key: book for key, book in self.books.items() if book.claims}

    @invariant()
    def blocks_are_held_for_what_is_there(self) -> None:
        there = {(book.place.segment, book.place.offset): 1 for book in self.books.values() if book.place is not None}
        assert self.held == there

    def teardown(self) -> None:
        for proc in CLAIMANTS:
            self.claimant_dies(proc)
        self.time_passes(3 * LINGER_S)
        assert not self.books
        assert not self.held
        assert self.machine.next_deadline() is None


TestClaiming = Claiming.TestCase
TestClaiming.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
