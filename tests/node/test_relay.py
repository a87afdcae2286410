"""What nodes say to each other by way of the head, when a next head passes it on once more."""

from __future__ import annotations

import pytest

from ray import _protocol as p
from ray._control.messages import Deliver, FromMember, Nodes, ToMember, ToOtherNode
from ray._node.events import FromControl
from tests.node.simulated import World

SOURCE = 99


@pytest.fixture
def node():
    return World(head=World({"CPU": 1}))


def pressure(node: World, driver: int, *serials: int, source: int = SOURCE) -> int:
    """How many of these messages come to a driver."""
    body = p.encode(p.Pressure(pressed=True))
    for serial in serials:
        node.feed(FromControl(Deliver((driver,), p.KIND_PRESSURE, 0, body, source, serial)))
    return len(node.take(driver, p.Pressure))


def test_a_member_gets_it_once(node):
    driver = node.driver()
    assert pressure(node, driver, 4, 5, 4, 5, 7, 6) == 3
    assert pressure(node, driver, 4, 5, source=98) == 2
    # The control service does not repeat itself.
    assert pressure(node, driver, 0, 0, source=0) == 2


def test_a_node_that_is_lost_is_forgotten(node):
    driver = node.driver()
    assert pressure(node, driver, 4) == 1
    node.feed(FromControl(Nodes([], [(SOURCE, "it was lost")])))
    assert node.node.relay._had == {}


def test_memory_that_is_given_back_twice_is_given_back_once(node):
    heard = []
    node.node.segments._messages[p.BlocksFreed] = lambda event, message, now: heard.append(message)
    for serial in (1, 2, 1):
        body = p.encode(p.BlocksFreed(7, [serial], node.node.facts.node))
        node.feed(FromControl(FromMember(5, p.KIND_BLOCKS_FREED, 0, body, SOURCE, serial)))
    assert [message.offsets for message in heard] == [[1], [2]]


def test_what_a_node_passes_on_is_numbered(node):
    relay = node.node.relay
    assert [relay.to_member(5, 6, 7, b"a"), relay.to_node(8, 5, 6, 7, b"b")] == [
        ToMember(5, 6, 7, b"a", 1),
        ToOtherNode(8, 5, 6, 7, b"b", 2),
    ]
