"""Nodes that only connect outwards, without processes: who is called back for whom, and when nobody can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from ray import _protocol as p
from ray._control import messages, service, strategy
from ray._control.machine import Log, Multicast, Save, Tick, ToNode
from ray._control.members import ENDS_BY_ITSELF_S
from ray._control.node_records import NodeLost
from ray._control.placement import APART_S
from ray._control.service import ControlService
from ray._node import events
from ray._node.config import NodeConfig, check
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, NodeFacts, NodeManager
from ray._node.membership import STRANGERS_MAX, Durable, Found, HeadNode, Seek, WorkerNode
from ray._protocol import UNIT
from tests.node.simulated import cpu

if TYPE_CHECKING:
    from ray._control.machine import Effect

HEAD, OUT, OTHER = 1, 2, 3
HERE, THERE, UNKNOWN = 50, 51, 52
ADDRESS = "10.0.0.1:6379"


def facts(node: int, address: str, *, relayed: bool = False) -> NodeFacts:
    return NodeFacts(node, {"CPU": UNIT}, (), 64 << 20, hostname=f"host{node}", address=address, relayed=relayed)


def hello(node: int, *, returns: bool = False, relayed: bool = False) -> messages.NodeHello:
    said = facts(node, "" if relayed else f"10.0.0.{node}:1", relayed=relayed).hello()
    return messages.NodeHello(**{**{x: getattr(said, x) for x in said.__struct_fields__}, "returns": returns})


class Head:
    """A head's machines, what they want done, and nodes that say what a test says."""

    def __init__(self, records: list[Save] | None = None, address: str = ADDRESS) -> None:
        self.control = ControlService(head=HEAD, durable=True, validate=True)
        if records is not None:
            self.control.restore([(x.table, x.key, x.value) for x in records], 0.0)
        manager = NodeManager(facts(HEAD, address), new_id=iter(range(1000, 9999)).__next__, validate=True)
        self.node = HeadNode(manager, self.control)
        self.now = 0.0
        self.done: list[Effect] = self.node.start(0.0)
        self.commits = 0
        self._settle()

    def _settle(self) -> None:
        """All records are safe at once."""
        self.done += self.node.handle(Durable(1 << 40), self.now)

    def feed(self, event: object) -> list[Effect]:
        """What it wants done about an event."""
        before = len(self.done)
        self.done += self.node.handle(event, self.now)  # type: ignore[arg-type]
        self._settle()
        return self.done[before:]

    def says(self, node: int, message: p.Message) -> list[Effect]:
        return self.feed(FrameCame(node, messages.KINDS[type(message)], 0, p.encode(message)))

    def join(self, node: int, *, returns: bool = False, relayed: bool = False) -> None:
        self.feed(CoreJoined(node, p.ROLE_NODE, 7))
        self.says(node, hello(node, returns=returns, relayed=relayed))

    def stranger(self, ticket: int, target: int) -> list[Effect]:
        """Somebody wants a process; whom is that said to?"""
        said = self.feed(events.StrangerCame(ticket, target))
        return [x for x in said if isinstance(x, events.RefuseStranger) or is_call(x)]

    def records(self) -> list[Save]:
        return [record for x in self.done for record in getattr(x, "records", ())]


def is_call(effect: object) -> bool:
    return isinstance(effect, ToNode) and isinstance(effect.message, messages.CallBack)


def call(node: int, ticket: int) -> ToNode:
    return ToNode(node, messages.CallBack(ticket))


@pytest.fixture
def head() -> Head:
    """With a node that only connects outwards, another one, and a worker on each."""
    new = Head()
    new.join(OUT, relayed=True)
    new.join(OTHER)
    new.says(OUT, messages.MemberJoined(THERE, p.ROLE_WORKER, 5, 1))
    new.says(OTHER, messages.MemberJoined(HERE, p.ROLE_WORKER, 6, 1))
    return new


def entries(effects: list[Effect], to: int) -> dict[int, messages.NodeEntry]:
    """What a node was told of others."""
    said = [x.message for x in effects if isinstance(x, ToNode) and x.node == to]
    return {entry.node: entry for message in said if isinstance(message, messages.Nodes) for entry in message.joined}


def test_everybody_is_told_that_the_head_is_where_it_is_reached(head):
    entry = entries(head.done, OTHER)[OUT]
    assert (entry.address, entry.relayed) == (ADDRESS, True)
    assert not entries(head.done, OUT)[OTHER].relayed
    assert "only connects outwards" in str(head.control.nodes.get(OUT))


def test_the_node_of_whoever_is_wanted_is_told_to_call_back(head):
    assert head.stranger(1, THERE) == [call(OUT, 1)]
    assert head.stranger(2, OUT) == [call(OUT, 2)], "the node itself may be wanted"


@pytest.mark.parametrize("target", [UNKNOWN, HERE, OTHER, HEAD])
def test_who_is_nowhere_or_can_be_connected_to_is_refused(head, target):
    assert head.stranger(3, target) == [events.RefuseStranger(3)]


def test_nobody_is_called_back_who_is_away_or_lost_and_one_that_is_back_is(head):
    head.feed(CoreLeft(OUT, "it broke", ended=False))
    assert head.stranger(1, THERE) == [events.RefuseStranger(1)]
    head.join(OUT, returns=True, relayed=True)
    assert head.stranger(2, THERE) == [call(OUT, 2)]
    head.feed(CoreLeft(OUT, "closed", ended=True))
    assert head.stranger(3, THERE) == [events.RefuseStranger(3)]


def test_a_head_neither_seeks_nor_connects_to_it(head):
    assert not [x for x in head.done if isinstance(x, events.KnowNode) and x.node == OUT], "that would be itself"
    assert [x.address for x in head.done if isinstance(x, events.KnowNode) and x.node == OTHER]
    assert not [x for x in head.feed(CoreLeft(OUT, "it broke", ended=False)) if isinstance(x, Seek)]
    assert [x for x in head.feed(CoreLeft(OTHER, "it broke", ended=False)) if isinstance(x, Seek)]


def test_a_call_does_not_wait_for_records(head):
    before = head.node.handle(FrameCame(*member_said(OTHER, HERE)), head.now)
    assert not [x for x in before if isinstance(x, ToNode)], "its answer is held back"
    assert call(OUT, 9) in head.node.handle(events.StrangerCame(9, THERE), head.now)


def member_said(node: int, member: int) -> tuple[int, int, int, bytes]:
    """A member has a key kept, which is a record."""
    request = p.Request("kv.put", msgspec.msgpack.encode([b"key", b"value", b"", True]))
    said = messages.MemberSaid(member, p.KINDS[p.Request], 4, p.encode(request))
    return node, messages.KINDS[messages.MemberSaid], 0, p.encode(said)


def returned(head: Head, address: str = ADDRESS) -> Head:
    """The next head, to which nobody has come back yet."""
    return Head(head.records(), address)


def test_who_is_wanted_of_a_new_head_is_waited_for_until_all_have_had_their_time(head):
    new = returned(head)
    assert new.stranger(1, THERE) == []
    assert new.stranger(2, UNKNOWN) == []
    new.join(OUT, returns=True, relayed=True)
    came = new.says(OUT, messages.MemberJoined(THERE, p.ROLE_WORKER, 5, 1))
    assert [x for x in came if is_call(x)] == [call(OUT, 1)]
    new.says(OUT, messages.Announced())
    new.now = service.RETURN_S
    assert events.RefuseStranger(2) in new.feed(Tick())
    assert new.stranger(3, UNKNOWN) == [events.RefuseStranger(3)]


def test_no_more_strangers_wait_for_nodes_than_are_held(head):
    new = returned(head)
    for ticket in range(STRANGERS_MAX):
        assert new.stranger(ticket, THERE) == []
    refused = new.stranger(STRANGERS_MAX, THERE)
    assert refused
    assert all(isinstance(x, events.RefuseStranger) for x in refused)


def test_who_is_asked_about_while_nodes_may_come_back_is_answered_when_they_have(head):
    """Connections through the dead head have broken: those who were at their ends live."""
    new = returned(head)
    new.join(OTHER, returns=True)
    new.says(OTHER, messages.MemberJoined(HERE, p.ROLE_WORKER, 6, 1))
    asked = [x for x in new.says(OTHER, messages.WhoIs(HERE, THERE)) if isinstance(x, ToNode)]
    assert asked == [], "it may be on a node that comes back, and is not taken for dead"
    new.join(OUT, returns=True, relayed=True)
    new.says(OUT, messages.MemberJoined(THERE, p.ROLE_WORKER, 5, 1))
    new.says(OTHER, messages.Announced())
    told = [x for x in new.says(OUT, messages.Announced()) if isinstance(x, ToNode)]
    assert [(x.node, type(x.message)) for x in told if type(x.message) is messages.GiveUpMember] == [
        (OUT, messages.GiveUpMember)
    ]
    assert not [x for x in told if isinstance(x.message, messages.Deliver)], "nobody hears of a death"


@pytest.mark.parametrize("comes", [True, False])
def test_work_for_a_node_that_may_come_back_waits_until_it_has_had_its_time(head, comes):
    new = returned(head)
    new.join(OTHER, returns=True)
    new.says(OTHER, messages.MemberJoined(HERE, p.ROLE_DRIVER, 6, 1))
    bound = msgspec.msgpack.encode([strategy.NODE, OUT, False])
    wanted = new.says(OTHER, messages.Overflow(HERE, 9, 1, 0, 1, {"CPU": UNIT}, b"", bound, "f"))
    assert not [x for x in wanted if isinstance(x, ToNode) and isinstance(x.message, messages.Deliver)]
    new.says(OTHER, messages.Announced())
    if comes:
        new.join(OUT, returns=True, relayed=True)
        new.says(OUT, messages.Announced())
        given = [x for x in new.done if isinstance(x, ToNode) and isinstance(x.message, messages.PlaceLeases)]
        assert [x.node for x in given] == [OUT]
        return
    new.now = service.RETURN_S
    (failed,) = [
        x.message for x in new.feed(Tick()) if isinstance(x, ToNode) and isinstance(x.message, messages.Deliver)
    ]
    told = p.decode(failed.kind, failed.body)
    assert isinstance(told, p.LeaseFailed)
    assert "there is no such node" in told.reason


def test_what_was_counted_when_it_came_is_not_counted_again(head):
    new = returned(head)
    new.join(OTHER, returns=True)
    new.says(OTHER, messages.Announced())
    new.says(OTHER, messages.MemberJoined(HERE, p.ROLE_WORKER, 6, 1))
    new.says(OTHER, messages.WhoIs(HERE, THERE))
    new.now = service.RETURN_S
    new.feed(Tick())
    new.now += 1
    new.feed(Tick())
    heard = [x.message.count for x in new.done if isinstance(x, ToNode) and isinstance(x.message, messages.Heard)]
    assert heard[-1] == 2


def test_a_head_elsewhere_tells_everybody_where_it_is_reached_now(head):
    new = returned(head, "10.0.0.9:6379")
    new.join(OTHER, returns=True)
    new.join(OUT, returns=True, relayed=True)
    new.says(OUT, messages.Announced())
    assert entries(new.done, OTHER)[OUT].address == "10.0.0.9:6379"


def test_members_that_knew_its_former_place_hear_of_the_new_one():
    manager = NodeManager(facts(OTHER, "h:1"), new_id=iter(range(1000, 9999)).__next__, validate=True)
    manager.handle(CoreJoined(HERE, p.ROLE_DRIVER, 5), 0.0)

    def told(address: str) -> list[object]:
        entry = messages.NodeEntry(OUT, address, "host", relayed=True)
        done = manager.handle(events.FromControl(messages.Nodes([entry], [])), 0.0)
        assert events.KnowNode(OUT, address, relayed=True) in done
        return [x for x in done if isinstance(x, Multicast)]

    assert told("a:1") == []
    assert told("a:1") == []
    assert told("b:1") == [Multicast((HERE,), p.NodeAddress(OUT, "b:1", relayed=True))]
    asked = FrameCame(HERE, p.KIND_WHERE_IS_NODE, 0, p.encode(p.WhereIsNode(OUT)))
    (answer,) = [x.message for x in manager.handle(asked, 0.0) if hasattr(x, "message")]
    assert answer == p.NodeAddress(OUT, "b:1", relayed=True)


def test_a_node_calls_back_the_head_that_it_has_now():
    manager = NodeManager(facts(OUT, "", relayed=True), new_id=iter(range(1000, 9999)).__next__, validate=True)
    node = WorkerNode(manager, HEAD, ("head:1", "next:1"))
    (greeting,) = node.start(0.0)
    assert isinstance(greeting, ToNode)
    assert isinstance(greeting.message, messages.NodeHello)
    assert (greeting.message.relayed, greeting.message.address) == (True, "")

    def heard(head: int, message: p.Message) -> list[Effect]:
        return node.handle(FrameCame(head, messages.KINDS[type(message)], 0, p.encode(message)), 1.0)

    heard(HEAD, messages.Nodes([], [], durable=True, welcome=True))
    assert heard(HEAD, messages.CallBack(7)) == [events.CallBack(HEAD, 7)]
    node.handle(CoreLeft(HEAD, "closed"), 2.0)
    done = node.handle(Found(9, "next:1"), 3.0)
    (again,) = [x.message for x in done if isinstance(x, ToNode) and isinstance(x.message, messages.NodeHello)]
    assert (again.relayed, again.returns) == (True, True)
    assert heard(9, messages.CallBack(8)) == [events.CallBack(9, 8)]


@pytest.mark.parametrize(("lost_on", "kept_apart"), [(OTHER, True), (OUT, False)])
def test_an_end_of_what_the_head_passes_on_keeps_no_nodes_apart(head, lost_on, kept_apart):
    asker, member, node = (THERE, HERE, OTHER) if lost_on == OTHER else (HERE, THERE, OUT)
    head.says(OUT if lost_on == OTHER else OTHER, messages.WhoIs(asker, member))
    head.now += ENDS_BY_ITSELF_S + 1
    head.says(node, messages.MemberGone(member, 5, "it ended", (), -9, intended=False))
    apart = head.control.placement._apart
    assert bool(apart) == kept_apart
    assert all(until <= head.now + APART_S for until in apart.values())


def test_such_a_node_joins_and_listens_for_nobody():
    config = NodeConfig("/d", b"", b"", OUT, cpu(1), [], 1 << 20, outbound_only=True, head_node=HEAD)
    check(config)
    for wrong in ({"listen": "h:1"}, {"head_node": 0}):
        with pytest.raises(ValueError, match="listens for nobody"):
            check(msgspec.structs.replace(config, **wrong))


def test_a_loss_is_told_as_of_others(head):
    head.feed(CoreLeft(OUT, "closed", ended=True))
    assert [x for x in head.done if isinstance(x, Log) and "only connects outwards" in x.text]
    assert not [x for x in head.done if isinstance(x, NodeLost)]
    assert head.control.nodes.get(OUT) is None
