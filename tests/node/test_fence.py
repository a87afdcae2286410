"""The fence: a node's actors that the head may start anew elsewhere do not run when it may have done so.

The rule is tested with both sides of it, the node and the head's table of nodes, joined by queues that lose nothing and
keep their order, as connections do, but may be late by any time: that is what every cut, suspension and loss comes to.
"""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray import _protocol as p
from ray._control import messages
from ray._control.machine import Effect, FromNode, Log, Tick, ToNode
from ray._control.node_records import NodeLost, NodeWentAway
from ray._control.nodes import ANNOUNCE_S, ASK_S, AWAY_S, PATIENCE_S, NodeTable
from ray._node import events
from ray._node.fence import ABSENT_S, ANSWERS_MAX, FENCE_S, Fence
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, NodeFacts, NodeManager
from ray._node.membership import Found, NotFound, WorkerNode
from ray._protocol import UNIT

HEAD, NODE = 1, 2


def hello(node: int) -> messages.NodeHello:
    return messages.NodeHello(node, "", "", "host", "", "", "", {"CPU": UNIT}, {})


def guarded(now: float = 0.0) -> Fence:
    """A fence that was armed just now, with one actor's worker behind it."""
    fence = Fence(validate=True)
    fence.greet(now)
    fence.handle(events.ActorGuarded(7, 70), now)
    return fence


def asked(fence: Fence, serial: int, heard: int, now: float) -> list[Effect]:
    return [x for x in fence.handle(events.Asked(serial, heard), now) if isinstance(x, Effect)]


def test_the_head_is_more_patient_than_the_fence_and_the_fence_than_a_steady_exchange():
    assert 2 * ASK_S + 1 < FENCE_S < PATIENCE_S


def test_workers_are_stopped_when_the_head_has_been_silent():
    fence = guarded()
    assert fence.next_deadline() == FENCE_S
    assert not fence.is_due(FENCE_S - 0.01)
    log, freeze = fence.handle(Tick(), FENCE_S)
    assert isinstance(log, Log)
    assert freeze == events.Freeze((70,))
    assert fence.is_closed
    assert fence.next_deadline() is None


def test_questions_alone_prolong_nothing():
    fence = guarded()
    for serial in range(1, 4):
        asked(fence, serial, 0, serial * ASK_S)
    assert fence.next_deadline() == FENCE_S


def test_an_answer_that_was_heard_prolongs_from_when_it_was_given():
    fence = guarded()
    asked(fence, 1, 0, 2.0)
    assert asked(fence, 2, 1, 5.5) == [events.Guard(2.0 + FENCE_S, (), ())]
    assert fence.next_deadline() == 2.0 + FENCE_S


def test_a_head_that_was_suspended_finds_its_actors_alive():
    fence = guarded()
    asked(fence, 1, 0, 2.0)
    fence.handle(Tick(), FENCE_S)
    # It wakes, and sends what is due: the answer that it has heard is too old to prove anything.
    assert asked(fence, 2, 1, 30.0) == [events.Guard(9.0, (), ())]
    assert fence.is_closed
    effects = asked(fence, 3, 2, 32.0)
    assert events.Thaw((70,)) in effects
    assert not fence.is_closed
    assert fence.next_deadline() == 30.0 + FENCE_S


def test_an_actor_that_is_placed_behind_a_closed_fence_is_stopped_at_once():
    fence = guarded()
    fence.handle(Tick(), FENCE_S)
    assert fence.handle(events.ActorGuarded(8, 80), 8.0)[-1] == events.Freeze((80,))


def test_workers_that_have_ended_are_not_signalled():
    fence = guarded()
    gone = events.WorkerGone(7, 70, "it ended", (), 0, intended=True, oom=False)
    assert fence.handle(gone, 1.0) == [events.Guard(FENCE_S, (), (70,))]
    assert fence.handle(Tick(), FENCE_S) == [events.Freeze(())]


def test_the_zygote_that_was_first_by_a_hair_is_corrected():
    fence = guarded()
    asked(fence, 1, 0, 2.0)
    asked(fence, 2, 1, 4.0)
    assert fence.handle(events.ZygoteFenced(), FENCE_S) == [events.Thaw((70,))]
    assert fence.handle(events.ZygoteFenced(), 2.0 + FENCE_S)[-1] == events.Freeze((70,))


def test_answers_that_nobody_confirms_do_not_pile_up():
    fence = guarded()
    for serial in range(1, 10 * ANSWERS_MAX):
        asked(fence, serial, 0, 1.0)  # its invariant bounds them
    asked(fence, 10_000, 1, 1.0)
    assert fence.next_deadline() == FENCE_S


# -- In a node --------------------------------------------------------------------------------


class LonelyNode:
    """A node whose head is the test."""

    def __init__(self) -> None:
        ids = iter(range(1000, 2000))
        facts = NodeFacts(NODE, {"CPU": 4 * UNIT}, (), 64 << 20)
        self.manager = NodeManager(facts, new_id=lambda: next(ids), validate=True)
        self.node = WorkerNode(self.manager, HEAD, ("head:1",))
        self.effects: list[Effect] = []
        self.pids = iter(range(1, 1000))
        self.take(self.node.start(0.0))
        self.said(messages.Nodes([messages.NodeEntry(HEAD, "", "head")], []), 0.0)

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.effects.append(effect)
            if isinstance(effect, events.Fork):
                pid = next(self.pids)
                self.feed(events.Forked(effect.proc, pid), 0.0)
                self.feed(CoreJoined(effect.proc, p.ROLE_WORKER, pid), 0.0)

    def feed(self, event: object, now: float) -> None:
        self.take(self.node.handle(event, now))  # type: ignore[arg-type]

    def said(self, message: p.Message, now: float) -> None:
        kind = messages.KINDS[type(message)]
        self.feed(FrameCame(HEAD, kind, 0, msgspec.msgpack.encode(message)), now)

    def place(self, serial: int, *, restarts: bool, now: float = 0.0) -> int:
        """Place an actor here; returns its worker's pid."""
        actor = serial.to_bytes(16, "big")
        self.said(messages.PlaceActor(actor, 0, 1, {}, {}, b"", b"", "Counter", serial, False, 0, restarts), now)
        placed = [x.message for x in self.effects if isinstance(x, ToNode) and type(x.message) is messages.ActorPlaced]
        return next(message.pid for message in placed if message.actor == actor)

    def frozen(self) -> set[int]:
        pids: set[int] = set()
        for effect in self.effects:
            if isinstance(effect, events.Freeze):
                pids |= set(effect.pids)
            if isinstance(effect, events.Thaw):
                pids -= set(effect.pids)
        return pids


def test_only_actors_with_another_life_are_stopped():
    node = LonelyNode()
    one, _ = node.place(1, restarts=True), node.place(2, restarts=False)
    assert node.node.next_deadline() is not None
    node.feed(Tick(), FENCE_S)
    assert node.frozen() == {one}


def test_what_comes_late_has_no_effect_before_the_fence_is_closed():
    """A node that was suspended finds everything at once: the order to start, and that it was lost."""
    node = LonelyNode()
    pid = node.place(1, restarts=True)
    (worker,) = [x.proc for x in node.effects if isinstance(x, events.Fork)]
    node.effects.clear()
    node.said(messages.Deliver((worker,), p.KIND_ACTOR_INIT, 0, b""), FENCE_S + 30)
    kinds = [type(effect) for effect in node.effects if not isinstance(effect, Log)]
    assert kinds.index(events.Freeze) < kinds.index(events.Pass)
    assert node.frozen() == {pid}


def test_every_question_is_answered_and_says_what_was_heard():
    table = NodeTable(head=HEAD, validate=True)
    for key in (HEAD, NODE):
        table.handle(FromNode(key, hello(key)), 0.0)
    table.handle(Tick(), ANNOUNCE_S)
    (first,) = table.handle(Tick(), ASK_S)
    assert first == ToNode(NODE, messages.AreYouAlive(1, 0))
    table.handle(FromNode(NODE, messages.Alive(1)), ASK_S)
    assert table.handle(Tick(), 2 * ASK_S) == [ToNode(NODE, messages.AreYouAlive(2, 1))]


def headless(*, at: float) -> tuple[LonelyNode, int]:
    """A node with an actor whose head, which keeps records, dies at this time; and the pid of the actor's worker."""
    node = LonelyNode()
    node.said(messages.Nodes([], [], durable=True), 0.0)
    pid = node.place(1, restarts=True)
    node.feed(CoreLeft(HEAD, "it has ended", ended=True), at)
    return node, pid


def test_while_no_head_listens_anywhere_actors_run_on():
    node, pid = headless(at=5.0)
    for tenth in range(300):
        now = 5.0 + tenth / 10
        node.feed(Tick(), now)
        node.feed(NotFound(("head:1",), "connection refused", refused=True), now)
        assert not node.frozen()
    node.feed(Tick(), now + ABSENT_S)
    assert node.frozen() == {pid}


def test_a_head_that_does_not_answer_may_live():
    node, pid = headless(at=5.0)
    for tenth in range(21):
        now = 5.0 + tenth / 10
        node.feed(Tick(), now)
        node.feed(NotFound(("head:1",), "timed out", refused=False), now)
    assert now >= FENCE_S
    assert node.frozen() == {pid}


def test_actors_go_on_when_a_head_welcomes_the_node_back_and_not_before():
    node, pid = headless(at=5.0)
    node.feed(Tick(), FENCE_S)
    node.feed(Found(HEAD, "head:1"), 20.0)
    node.said(messages.Nodes([messages.NodeEntry(9, "", "other")], []), 20.1)  # said before it heard the greeting
    assert node.frozen() == {pid}
    node.said(messages.Nodes([], [], welcome=True), 20.2)
    assert not node.frozen()
    assert node.manager.fence.next_deadline() == 20.0 + FENCE_S


def test_the_first_question_of_another_head_confirms_nothing_that_its_predecessor_asked():
    fence = guarded()
    asked(fence, 1, 0, 2.0)
    fence.greet(3.0)
    asked(fence, 2, 1, 4.0)
    assert fence.next_deadline() == FENCE_S


def test_a_node_whose_connection_broke_is_lost_only_when_its_fence_is_closed():
    table = NodeTable(head=HEAD, validate=True)
    for key in (HEAD, NODE):
        table.handle(FromNode(key, hello(key)), 0.0)
    table.handle(Tick(), ASK_S)
    table.handle(FromNode(NODE, messages.Alive(1)), ASK_S)
    table.handle(NodeWentAway(NODE, "it broke"), ASK_S + 0.5)
    assert not any(isinstance(x, NodeLost) for x in table.handle(Tick(), ASK_S + PATIENCE_S - 0.01))
    (lost,) = [x for x in table.handle(Tick(), ASK_S + PATIENCE_S) if isinstance(x, NodeLost)]
    assert "did not come back" in lost.reason


def test_a_node_that_had_been_silent_before_its_connection_broke_has_a_moment_to_return():
    table = NodeTable(head=HEAD, validate=True)
    for key in (HEAD, NODE):
        table.handle(FromNode(key, hello(key)), 0.0)
    table.handle(NodeWentAway(NODE, "it broke"), 7.9)
    assert not any(isinstance(x, NodeLost) for x in table.handle(Tick(), 7.9 + AWAY_S - 0.01))
    assert any(isinstance(x, NodeLost) for x in table.handle(Tick(), 7.9 + AWAY_S))


# -- Both sides -------------------------------------------------------------------------------


class Pair:
    """A head's table of nodes and a node's fence, with a queue in each direction."""

    def __init__(self, join_late_s: float) -> None:
        self.now = 0.0
        self.table = NodeTable(head=HEAD, validate=True)
        self.table.handle(FromNode(HEAD, hello(HEAD)), 0.0)
        self.fence = guarded(0.0)
        self.up: deque[int] = deque()
        self.down: deque[messages.AreYouAlive] = deque()
        self.lost = False
        self.now += join_late_s
        self.head(FromNode(NODE, hello(NODE)))

    def head(self, event: object) -> None:
        for effect in self.table.handle(event, self.now):  # type: ignore[arg-type]
            if isinstance(effect, ToNode) and isinstance(effect.message, messages.AreYouAlive):
                self.down.append(effect.message)
            if isinstance(effect, NodeLost):
                self.lost = True

    def step(self, what: str) -> None:
        match what:
            case "up" if self.up:
                self.head(FromNode(NODE, messages.Alive(self.up.popleft())))
            case "down" if self.down and not self.fence.is_due(self.now):
                question = self.down.popleft()
                self.fence.handle(events.Asked(question.serial, question.heard), self.now)
                self.up.append(question.serial)
            case "tick":  # else the head is suspended
                deadline = self.table.next_deadline()
                if deadline is not None and deadline <= self.now:
                    self.head(Tick())
            case _:
                pass
        # The node, or its zygote, acts on time.
        if self.fence.is_due(self.now):
            self.fence.handle(Tick(), self.now)


Step = tuple[float, str]
ONE_STEP = st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0]), st.sampled_from(["up", "down", "tick"])).map(
    lambda step: [step]
)
SILENCE = st.integers(1, 6).map(lambda ticks: [(ASK_S, "tick")] * ticks)
EXCHANGE = st.tuples(st.sampled_from([0.0, 1.0, 1.9]), st.booleans()).map(
    lambda how: [(how[0], "down"), (0.0, "up"), (ASK_S - how[0], "tick"), *([(0.0, "down")] if how[1] else [])]
)
STEPS = st.lists(ONE_STEP | SILENCE | EXCHANGE, max_size=60).map(
    lambda parts: [step for part in parts for step in part]
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(STEPS, st.sampled_from([0.0, 1.0, 20.0]))
def test_no_node_is_taken_for_lost_while_its_fence_is_open(steps: list[Step], join_late_s: float):
    pair = Pair(join_late_s)
    for seconds, what in steps:
        # Time passes in small pieces, in which only the node's own deadlines are kept.
        pair.now += seconds
        pair.step("")
        pair.step(what)
        assert pair.fence.is_closed or not pair.lost
        if pair.lost:
            return


def test_a_steady_exchange_keeps_the_fence_open_and_silence_ends_it_first():
    pair = Pair(0.0)
    while pair.now < 60:
        pair.now += 0.5
        for what in ("tick", "down", "up"):
            pair.step(what)
        assert not pair.fence.is_closed
    closed_at = 0.0
    while not pair.lost:
        pair.now += 0.25
        pair.step("tick")
        if pair.fence.is_closed and not closed_at:
            closed_at = pair.now
    assert 60 < closed_at < pair.now <= 60 + PATIENCE_S + ASK_S
