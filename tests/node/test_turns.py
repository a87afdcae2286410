"""Members that gather more copies together than their node has room for."""

from __future__ import annotations

import pytest

from ray import _protocol as p
from ray._node import segments, turns
from tests.node.simulated import World
from tests.node.test_pulls import MIB, Cluster

SIZE = 7 * MIB
"""Nine of them fit into a store."""


class Gathering:
    """Two members of node 1002 that each want six values, of node 1001 and of node 1003; nine are there."""

    def __init__(self) -> None:
        self.cluster = Cluster(3)
        world = self.cluster[1002]
        self.first, self.second = world.driver(), world.driver()
        self.wanted = {
            self.first: [self.cluster.put(1001, b"a%d" % number, SIZE) for number in range(6)],
            self.second: [self.cluster.put(1003, b"b%d" % number, SIZE) for number in range(6)],
        }
        for number in range(4):
            self.get(self.first, number)
        for number in range(5):
            self.get(self.second, number)

    @property
    def world(self) -> World:
        return self.cluster[1002]

    def ask(self, member: int, number: int) -> int:
        return self.cluster.ask(1002, member, self.wanted[member][number])

    def get(self, member: int, number: int) -> None:
        corr = self.ask(member, number)
        self.cluster.finish(1002)
        assert isinstance(self.reply(member, corr), p.Pulled)

    def reply(self, member: int, corr: int) -> p.Message | None:
        return self.cluster.reply(1002, member, corr)

    def release(self, member: int) -> None:
        for pull in self.wanted[member]:
            self.world.send(member, p.PullReleased(pull.object))
        self.cluster.settle()

    def waiting(self) -> int:
        return self.world.node.pulls.statistics()["members_waiting_for_a_turn"]


@pytest.fixture
def both() -> Gathering:
    return Gathering()


def is_sent_away(answer: p.Message | None) -> bool:
    return isinstance(answer, p.SegmentDenied) and answer.kept and answer.why == p.DENIED_TURN


def test_who_began_last_lets_go_and_has_its_turn_when_the_first_has_everything(both):
    third, fourth = both.ask(both.first, 4), both.ask(both.second, 5)
    both.cluster[1002].advance(segments.STALL_S)
    assert both.reply(both.first, third) is None
    assert is_sent_away(both.reply(both.second, fourth))
    both.release(both.second)
    again = both.ask(both.second, 5)
    both.cluster.finish(1002)
    assert isinstance(both.reply(both.first, third), p.Pulled)
    both.get(both.first, 5)
    assert both.reply(both.second, again) is None, "it holds nothing, and is asked for nothing"
    assert both.waiting() == 1
    both.cluster[1002].advance(turns.TURN_S)
    both.cluster.settle()
    both.cluster.finish(1002)
    assert isinstance(both.reply(both.second, again), p.Pulled)
    assert both.waiting() == 0


def test_what_a_process_makes_goes_before_all_that_is_gathered(both):
    corrs = {both.first: both.ask(both.first, 4), both.second: both.ask(both.second, 5)}
    maker = both.world.driver()
    both.world.send(maker, p.SegmentRequest(SIZE), 1)
    both.world.advance(segments.STALL_S)
    assert all(is_sent_away(both.reply(member, corr)) for member, corr in corrs.items())
    both.release(both.second)
    assert isinstance(both.world.replies[maker].pop(1), p.SegmentGranted)


def test_who_gathers_alone_is_not_sent_away(both):
    corr = both.ask(both.first, 4)
    both.world.advance(segments.STALL_S)
    assert both.reply(both.first, corr) is None
    assert both.waiting() == 0


def test_turns_come_even_if_others_never_have_everything(both):
    both.ask(both.first, 4)
    corr = both.ask(both.second, 5)
    both.world.advance(segments.STALL_S)
    assert is_sent_away(both.reply(both.second, corr))
    again = both.ask(both.second, 0)
    assert both.reply(both.second, again) is None, "although it is here"
    both.world.advance(turns.TURN_S_MAX)
    assert isinstance(both.reply(both.second, again), p.Pulled)


def test_who_leaves_or_gives_up_has_no_turn(both):
    both.ask(both.first, 4)
    both.ask(both.second, 5)
    both.world.advance(segments.STALL_S)
    again = both.ask(both.second, 5)
    both.release(both.second)
    both.cluster.finish(1002)
    both.world.advance(turns.TURN_S)
    assert both.reply(both.second, again) is None
    assert both.waiting() == 0
    both.ask(both.second, 5)
    assert len(both.cluster.running(1002)) == 1, "it is served like anybody"
