"""After a restart of the head: what is for processes that have not come back yet waits for them."""

from __future__ import annotations

import msgspec
import pytest

from ray import _protocol as p
from ray._control import nodes
from ray._control.machine import Message, ToNode
from ray._control.messages import (
    Announced,
    DeathsElsewhere,
    Deliver,
    FromMember,
    GiveUpMember,
    MemberGone,
    MemberJoined,
    NodeHello,
    ToMember,
    ToOtherNode,
    WhoIs,
)
from ray._control.service import ControlService
from tests.node.simulated import cpu

HEAD, FIRST, SECOND = 1, 2, 3
DRIVER, WORKER, STRANGER = 20, 30, 31
GRANT = ToMember(DRIVER, p.KIND_PRESSURE, 0, b"body", 5)


def hello(node: int) -> NodeHello:
    return NodeHello(node, f"10.0.0.{node}:1", f"10.0.0.{node}", "host", "", "", "", cpu(1), {}, "3.11.7", returns=True)


class Restarted:
    """A control service that has just begun, after one that knew of two more nodes."""

    def __init__(self) -> None:
        self.control = ControlService(head=HEAD, durable=True, validate=True)
        self.now = 0.0
        self.sent: list[ToNode] = []
        records = [(nodes.TABLE, x.to_bytes(8, "big"), msgspec.msgpack.encode(hello(x))) for x in (FIRST, SECOND)]
        self.control.restore(records, 0.0)
        self.say(HEAD, msgspec.structs.replace(hello(HEAD), returns=False))

    def say(self, node: int, *said: Message) -> None:
        for message in said:
            self.sent += [x for x in self.control.handle(node, message, self.now) if isinstance(x, ToNode)]

    def pass_time(self, until: float) -> None:
        while (at := self.control.next_deadline()) is not None and at <= until:
            self.now = at
            self.sent += [x for x in self.control.tick(at) if isinstance(x, ToNode)]

    def take(self, kind: type) -> list[ToNode]:
        """What was said of this kind since the last time."""
        found = [x for x in self.sent if isinstance(x.message, kind)]
        self.sent = [x for x in self.sent if not isinstance(x.message, kind)]
        return found


@pytest.fixture
def service():
    return Restarted()


def test_a_grant_waits_for_its_owner(service):
    service.say(SECOND, hello(SECOND), MemberJoined(WORKER, p.ROLE_WORKER, 9, 0), Announced(), GRANT)
    service.say(SECOND, msgspec.structs.replace(GRANT, serial=6))
    service.say(FIRST, hello(FIRST), MemberJoined(DRIVER, p.ROLE_DRIVER, 8, 1))
    assert service.take(Deliver) == []  # not all is said: it could be for one who is announced right after
    service.say(FIRST, Announced())
    delivered = [Deliver((DRIVER,), GRANT.kind, 0, GRANT.body, SECOND, serial) for serial in (5, 6)]
    assert service.take(Deliver) == [ToNode(FIRST, message) for message in delivered]


def test_what_a_member_says_to_a_node_waits_for_that(service):
    service.say(SECOND, hello(SECOND), MemberJoined(WORKER, p.ROLE_WORKER, 9, 0), Announced())
    service.say(SECOND, ToOtherNode(FIRST, WORKER, p.KIND_LEASE_RETURN, 0, b"body", 3))
    assert service.take(FromMember) == []
    service.say(FIRST, hello(FIRST), Announced())
    told = FromMember(WORKER, p.KIND_LEASE_RETURN, 0, b"body", SECOND, 3)
    assert service.take(FromMember) == [ToNode(FIRST, told)]


def test_nobody_is_taken_for_dead_whose_node_has_not_come_back(service):
    service.say(FIRST, hello(FIRST), MemberJoined(DRIVER, p.ROLE_DRIVER, 8, 1), Announced(), WhoIs(DRIVER, WORKER))
    assert service.take(Deliver) == service.take(GiveUpMember) == []
    service.say(SECOND, hello(SECOND), MemberJoined(WORKER, p.ROLE_WORKER, 9, 1), Announced())
    [asked] = service.take(GiveUpMember)
    assert (asked.node, asked.message.proc) == (SECOND, WORKER)


def test_who_does_not_come_back_is_told_to_be_gone(service):
    service.say(FIRST, hello(FIRST), MemberJoined(DRIVER, p.ROLE_DRIVER, 8, 1), Announced())
    service.say(FIRST, WhoIs(DRIVER, WORKER), ToMember(STRANGER, p.KIND_PRESSURE, 0, b"", 1))
    service.pass_time(nodes.RETURN_S)
    [answer] = service.take(Deliver)
    died = p.decode(answer.message.kind, answer.message.body)
    assert (answer.node, answer.message.procs, died.proc) == (FIRST, (DRIVER,), WORKER)
    assert service.control.members.statistics()["held_for_returning_members"] == 0
    # Now that nobody is waited for, the answer comes at once.
    service.say(FIRST, WhoIs(DRIVER, STRANGER))
    assert len(service.take(Deliver)) == 1


def test_who_comes_back_later_hears_who_has_ended_meanwhile(service):
    service.say(SECOND, hello(SECOND), MemberJoined(WORKER, p.ROLE_WORKER, 9, 0), Announced())
    service.say(SECOND, MemberGone(WORKER, 9, "it was killed"))
    service.pass_time(1.0)
    assert service.take(DeathsElsewhere) == [ToNode(HEAD, DeathsElsewhere([(WORKER, "it was killed")]))]
    service.say(FIRST, hello(FIRST))
    assert service.take(DeathsElsewhere) == [ToNode(FIRST, DeathsElsewhere([(WORKER, "it was killed")]))]


def test_what_waits_for_one_who_ended_meanwhile_is_answered_at_once(service):
    service.say(FIRST, hello(FIRST), MemberJoined(DRIVER, p.ROLE_DRIVER, 8, 1), Announced(), WhoIs(DRIVER, WORKER))
    service.say(SECOND, hello(SECOND), Announced(), MemberGone(WORKER, 9, "it was killed"))
    [answer] = service.take(Deliver)
    assert p.decode(answer.message.kind, answer.message.body).cause == "it was killed"
