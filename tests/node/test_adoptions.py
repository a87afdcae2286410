"""Segments whose lessee has died, and their owners on other nodes: several whole nodes with one control service."""

from __future__ import annotations

import pytest

from ray import _protocol as p
from ray._control import members, messages, service
from ray._control.machine import ToNode
from ray._control.service import ControlService
from ray._node import peer_protocol
from ray._node.manager import CoreLeft, FrameCame
from tests.node.simulated import NODE, World, cpu

MIB = 1 << 20


class Trio:
    """A head, and two nodes that have joined it. The first of these has a segment whose lessee is about to die."""

    def __init__(self) -> None:
        self.head = World(auto=False)
        self.place, self.third = (World(auto=False, head=self.head) for _ in range(2))
        self.owner, self.other = self.head.driver(), self.third.driver()
        self.lessee = self.place.driver()
        self.place.send(self.lessee, p.SegmentRequest(4 * MIB), 1)
        self.adopted = p.SegmentAdopted(1, self.place.node.facts.node, self.lessee)

    def claim(self, world: World, member: int, *offsets: int) -> None:
        """A member that was asked says what it owns."""
        assert world.take(member, p.SegmentAdopted)[-1:] == [self.adopted]
        world.send(member, p.SegmentClaims(1, [(offset, 64) for offset in offsets], self.adopted.node))

    def free(self, world: World, member: int, *offsets: int) -> None:
        world.send(member, p.BlocksFreed(1, list(offsets), self.adopted.node))

    @property
    def is_kept(self) -> bool:
        assert self.place.node.segments.used == sum(self.place.segments.values())
        return 1 in self.place.segments


@pytest.fixture
def trio() -> Trio:
    return Trio()


def test_owners_on_all_nodes_keep_a_segment_until_they_free_their_last_block(trio):
    trio.place.leave(trio.lessee)
    trio.claim(trio.head, trio.owner, 0, 64)
    trio.claim(trio.third, trio.other, 128)
    trio.free(trio.head, trio.owner, 0, 64)
    assert trio.is_kept
    trio.free(trio.third, trio.other, 128)
    assert not trio.is_kept


def test_a_segment_is_kept_while_somebody_elsewhere_has_not_answered(trio):
    trio.place.leave(trio.lessee)
    trio.claim(trio.head, trio.owner)
    assert trio.is_kept
    trio.claim(trio.third, trio.other)
    assert not trio.is_kept


def test_segments_of_the_same_number_on_two_nodes_are_not_mixed_up(trio):
    lessee = trio.third.driver()
    trio.third.send(lessee, p.SegmentRequest(4 * MIB), 1)
    trio.third.leave(lessee)
    trio.place.leave(trio.lessee)
    for world, member in ((trio.head, trio.owner), (trio.third, trio.other)):
        asked = world.take(member, p.SegmentAdopted)
        assert {message.node for message in asked} == {w.node.facts.node for w in (trio.place, trio.third)}
    here = trio.third.node.facts.node
    trio.third.send(trio.other, p.SegmentClaims(1, [(0, 64)], here))
    trio.head.send(trio.owner, p.SegmentClaims(1, [(0, 64)], trio.adopted.node))
    trio.head.send(trio.owner, p.SegmentClaims(1, [], here))
    trio.third.send(trio.other, p.SegmentClaims(1, [], trio.adopted.node))
    trio.third.send(trio.other, p.BlocksFreed(1, [0], here))
    trio.head.advance(members.TELL_ALL_AFTER_S)  # the one lessee was asked about the segment of the other
    assert trio.third.segments == {}
    assert trio.is_kept


@pytest.mark.parametrize("answered", [False, True])
def test_members_elsewhere_that_end_keep_nothing(trio, answered):
    trio.place.leave(trio.lessee)
    trio.claim(trio.head, trio.owner)
    if answered:
        trio.claim(trio.third, trio.other, 0)
    trio.third.leave(trio.other)
    trio.head.advance(members.TELL_ALL_AFTER_S)
    assert not trio.is_kept


def test_members_of_a_lost_node_keep_nothing(trio):
    trio.place.leave(trio.lessee)
    trio.claim(trio.head, trio.owner)
    trio.head.feed(CoreLeft(trio.third.node.facts.node, "closed"))
    trio.head.advance(members.TELL_ALL_AFTER_S)
    assert not trio.is_kept


def test_members_whose_node_was_away_are_asked_when_it_is_back(trio):
    trio.third.cut()
    trio.place.leave(trio.lessee)
    trio.claim(trio.head, trio.owner)
    assert trio.third.take(trio.other, p.SegmentAdopted) == []
    assert trio.is_kept
    trio.third.come_back()
    trio.claim(trio.third, trio.other, 0)
    trio.claim(trio.head, trio.owner)
    assert trio.is_kept
    trio.free(trio.third, trio.other, 0)
    assert not trio.is_kept


def test_what_was_freed_while_the_segment_s_node_was_away_is_asked_for_again(trio):
    trio.place.leave(trio.lessee)
    trio.claim(trio.third, trio.other)
    trio.claim(trio.head, trio.owner, 0, 64)
    trio.place.cut()
    trio.free(trio.head, trio.owner, 0)
    trio.place.come_back()
    trio.claim(trio.third, trio.other)
    trio.claim(trio.head, trio.owner, 64)
    assert trio.is_kept
    trio.free(trio.head, trio.owner, 64)
    assert not trio.is_kept


def test_who_ended_and_which_node_went_while_this_one_was_away_is_found_out(trio):
    trio.place.leave(trio.lessee)
    trio.claim(trio.head, trio.owner)
    trio.claim(trio.third, trio.other, 0)
    trio.place.cut()
    trio.head.feed(CoreLeft(trio.third.node.facts.node, "closed"))
    trio.head.advance(members.TELL_ALL_AFTER_S)
    assert trio.is_kept
    trio.place.come_back()
    trio.claim(trio.head, trio.owner)
    assert not trio.is_kept
    assert list(trio.place.node.nodes) == [NODE]


def test_a_restarted_head_asks_members_when_all_nodes_have_come_back():
    def hello(node: int, *, returns: bool) -> messages.NodeHello:
        return messages.NodeHello(node, "", "", "", "", "", "", cpu(1), {}, returns=returns)

    control = ControlService(head=1, durable=True, validate=True)
    before = ControlService(head=1, durable=True)
    saved = []
    for node in (1, 2, 3):
        saved += [x for x in before.handle(node, hello(node, returns=False), 0.0) if not isinstance(x, ToNode)]
    control.restore([(x.table, x.key, x.value) for x in saved if hasattr(x, "table")], 0.0)
    control.handle(1, hello(1, returns=False), 0.0)
    control.handle(2, hello(2, returns=True), 0.1)
    said = control.handle(2, messages.SegmentOrphaned(7, 5), 0.2)
    assert not [x for x in said if isinstance(x, ToNode) and isinstance(x.message, messages.OwnersAsked)]
    control.handle(3, hello(3, returns=True), 0.3)
    control.handle(3, messages.MemberJoined(30, p.ROLE_DRIVER, 1, 1), 0.3)
    for node in (2, 3):
        control.handle(node, messages.Announced(), 0.4)
    said = control.tick(0.4 + service.RETURNED_S)
    asked = [x for x in said if isinstance(x, ToNode) and isinstance(x.message, messages.OwnersAsked)]
    assert asked == [ToNode(2, messages.OwnersAsked(7, (1, 30, 3)))]
    delivered = [x.message for x in said if isinstance(x, ToNode) and isinstance(x.message, messages.Deliver)]
    assert [p.decode(x.kind, x.body) for x in delivered] == [p.SegmentAdopted(7, 2, 5)] * 2, (
        "to a node without members too"
    )


def test_a_node_that_joins_hears_which_nodes_were_lost(trio):
    lost = trio.third.node.facts.node
    trio.head.feed(CoreLeft(lost, "closed"))
    late = World(auto=False, head=trio.head)
    reader = late.driver()
    late.send(reader, p.Pull(b"x", lost, 1, 0, 64), 1)
    denied = late.replies[reader].pop(1)
    assert isinstance(denied, p.SegmentDenied)
    assert "has left the cluster" in denied.message
    assert not denied.kept


def test_nodes_speak_to_each_other_about_copies_and_a_malformed_word_costs_only_the_link(trio):
    reader = trio.third.driver()
    trio.third.send(reader, p.Pull(b"x", trio.adopted.node, 1, 0, 64), 1)
    (pull,) = trio.third.pulls.values()
    assert [source[0] for source in pull.sources] == [trio.adopted.node]
    assert trio.place.node.pulls.statistics()["blocks_copied_elsewhere"] == 1
    for world in (trio.place, trio.head):
        world.feed(FrameCame(trio.third.node.facts.node, peer_protocol.KIND_LOCATE, 0, b"\x93"))
        assert "sent a malformed message to this one" in world.logs[-1]
        assert trio.third.node.facts.node in world.disconnected
    assert not trio.place.shutdown
    assert trio.third.node.facts.node in trio.place.node.nodes
