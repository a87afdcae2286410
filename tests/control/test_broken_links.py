"""What becomes of messages when a connection between a node and its head breaks, or the head dies: nothing that only
one of them knows is lost. Cases that worlds of `tests/simulation` have found, made small.
"""

from __future__ import annotations

import msgspec
import pytest

from ray import _protocol as p
from ray._control import messages
from ray._control.machine import FromNode
from ray._control.nodes import ASK_S, RETURN_S
from ray._control.service import ControlService
from ray._node import unheard
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, NodeFacts, NodeManager
from ray._node.membership import HeadNode
from ray._node.unheard import Unheard
from ray._protocol import UNIT

HEAD, NODE, OTHER, DRIVER = 1, 2, 3, 20


def hello(node: int, **changes: object) -> messages.NodeHello:
    message = messages.NodeHello(node, "", "", "host", "", "", "", {"CPU": UNIT}, {})
    return msgspec.structs.replace(message, **changes)


class Head:
    """A head, one node with a driver, and what the head has said to that node."""

    def __init__(self) -> None:
        facts = NodeFacts(HEAD, {"CPU": UNIT}, (), 1 << 20)
        manager = NodeManager(facts, new_id=iter(range(100, 10_000)).__next__, validate=True)
        self.control = ControlService(head=HEAD, validate=True)
        self.head = HeadNode(manager, self.control)
        self.head.start(0.0)
        self.now = 1.0
        self.corr = 0
        self.said: list[p.Message] = []
        self.feed(CoreJoined(OTHER, p.ROLE_NODE, 0))
        self.hear(hello(OTHER), node=OTHER)
        self.connect()
        self.hear(hello(NODE))
        self.hear(messages.MemberJoined(DRIVER, p.ROLE_DRIVER, 5, 0))

    def feed(self, event: object) -> None:
        for effect in self.head.handle(event, self.now):
            if getattr(effect, "node", 0) == NODE and hasattr(effect, "message"):
                self.said.append(effect.message)

    def connect(self) -> None:
        self.feed(CoreJoined(NODE, p.ROLE_NODE, 0))

    def hear(self, message: p.Message, *, node: int = NODE) -> None:
        self.feed(FrameCame(node, messages.KINDS[type(message)], 0, p.encode(message)))

    def ask(self, key: bytes) -> None:
        """The driver puts a key, which is answered."""
        self.corr += 1
        request = p.Request("kv.put", msgspec.msgpack.encode((key, b"value", "", True)))
        self.hear(messages.MemberSaid(DRIVER, p.KINDS[p.Request], self.corr, p.encode(request)))

    def tell(self) -> None:
        """The other node has something for the driver, which looks like an answer."""
        self.corr += 1
        notice = p.encode(p.Notice("info", "text"))
        self.hear(messages.ToMember(DRIVER, p.KINDS[p.Notice], self.corr, notice), node=OTHER)

    def answers(self) -> list[int]:
        """The questions that were answered since it was last asked, in order."""
        said, self.said = self.said, []
        return [x.corr for x in said if isinstance(x, messages.Deliver)]

    def had(self) -> int:
        """How many messages of those that are repeated were said, since it was last asked for answers."""
        return sum(type(message) in messages.REPEATED for message in self.said)


def test_answers_that_a_broken_connection_has_lost_are_said_again_once_and_before_anything_else():
    world = Head()
    had = world.had()
    world.answers()
    for key in (b"a", b"b", b"c"):
        world.ask(key)
    assert world.answers() == [1, 2, 3]
    world.feed(CoreLeft(NODE, "it was reset", ended=False))
    world.connect()
    world.hear(hello(NODE, returns=True, head=HEAD, heard=had + 1))  # it has had the first answer
    kinds = [type(message) for message in world.said]
    assert kinds.index(messages.Deliver) < kinds.index(messages.Nodes)
    assert world.answers() == [2, 3]
    world.feed(CoreLeft(NODE, "it was reset", ended=False))
    world.connect()
    world.hear(hello(NODE, returns=True, head=HEAD, heard=had + 3))
    assert world.answers() == []


def test_what_is_said_while_a_node_is_away_waits_and_does_not_overtake_what_is_said_again():
    world = Head()
    had = world.had()
    world.ask(b"a")
    world.answers()
    world.feed(CoreLeft(NODE, "it was reset", ended=False))
    world.tell()
    world.connect()
    world.tell()
    assert world.answers() == []
    world.hear(hello(NODE, returns=True, head=HEAD, heard=had))
    assert world.answers() == [1, 2, 3]


def test_a_node_that_had_another_head_is_told_nothing_of_it_again():
    world = Head()
    world.ask(b"a")
    world.answers()
    world.feed(CoreLeft(NODE, "it was reset", ended=False))
    world.connect()
    world.hear(hello(NODE, returns=True, head=HEAD + 7, heard=0))
    assert world.answers() == []


def test_answers_to_questions_say_what_need_not_be_kept():
    kept = Unheard()
    for serial in range(5):
        assert kept.keep(NODE, messages.JobGone(serial))
        kept.keep(NODE, messages.AreYouAlive(serial))  # is not counted
    kept.heard(NODE, 3)
    kept.heard(NODE, 2)  # an older answer
    assert kept.greeted(NODE, 4) == [messages.JobGone(4)]


def test_a_node_for_which_too_much_waits_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unheard, "UNHEARD_MAX", 10)
    world = Head()
    world.feed(CoreLeft(NODE, "it was reset", ended=False))
    for _ in range(11):
        world.tell()
    assert world.control.nodes.get(NODE) is None


def restarted(*nodes: int) -> ControlService:
    """The next control service, to which these nodes are known."""
    control = ControlService(head=HEAD, durable=True, validate=True)
    records = [("nodes", node.to_bytes(8, "big"), msgspec.msgpack.encode(hello(node))) for node in nodes]
    control.restore(records, 0.0)
    control.handle(HEAD, hello(HEAD), 0.0)
    return control


def deaths(effects: list[object]) -> dict[int, list[int]]:
    """Which processes each node was told to have ended."""
    told: dict[int, list[int]] = {}
    for effect in effects:
        message = getattr(effect, "message", None)
        if isinstance(message, messages.DeathsElsewhere):
            told.setdefault(effect.node, []).extend(proc for proc, _ in message.dead)  # type: ignore[attr-defined]
    return told


def test_a_node_hears_of_owners_who_ended_while_there_was_no_head():
    control = restarted(NODE, NODE + 1)
    control.handle(NODE, hello(NODE, returns=True), 0.1)
    said = control.handle(NODE, messages.Announced(0, (DRIVER, DRIVER + 1)), 0.1)
    assert not deaths(said)  # their node may still come
    control.handle(NODE + 1, hello(NODE + 1, returns=True), 0.2)
    control.handle(NODE + 1, messages.MemberJoined(DRIVER, p.ROLE_DRIVER, 5, 0), 0.2)
    said = control.handle(NODE + 1, messages.Announced(), 0.2)
    assert not deaths(said)
    assert deaths(control.tick(1.0)) == {NODE: [DRIVER + 1]}


def test_owners_whose_node_did_not_come_back_have_ended():
    control = restarted(NODE, NODE + 1)
    control.handle(NODE, hello(NODE, returns=True), 0.1)
    control.handle(NODE, messages.Announced(0, (DRIVER,)), 0.1)
    assert not deaths(control.tick(ASK_S))
    assert deaths(control.tick(RETURN_S)) == {NODE: [DRIVER]}


def test_a_report_from_before_a_bundle_was_heard_of_does_not_hide_it():
    control = ControlService(head=HEAD, validate=True)
    control.handle(HEAD, hello(HEAD), 0.0)
    node = control.nodes.get(HEAD)
    assert node is not None
    group = "0" * 36
    node.offer(group, 0, {"CPU": UNIT})
    control.nodes.handle(FromNode(HEAD, messages.Resources({"CPU": 0}, 0)), 0.1)
    assert node.room()[f"CPU_group_0_{group}"] == UNIT
    control.nodes.handle(FromNode(HEAD, messages.Resources({**node.free, f"CPU_group_0_{group}": 0}, 0)), 0.2)
    assert node.room()[f"CPU_group_0_{group}"] == 0
