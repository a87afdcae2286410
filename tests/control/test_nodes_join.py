"""Which nodes the control service takes, and what it says of demands while there is only one."""

from __future__ import annotations

import msgspec
import pytest

from ray import _protocol as p
from ray._control.machine import ToNode
from ray._control.messages import Deliver, Leave, MemberJoined, MemberSaid, NodeHello
from ray._control.nodes import ANNOUNCE_S
from ray._control.service import ControlService
from tests.node.simulated import World, cpu

HEAD, NODE = 1, 2


def hello(node: int, python: str) -> NodeHello:
    return NodeHello(node, f"10.0.0.{node}:1", f"10.0.0.{node}", "host", "", "", "", cpu(1), {}, python)


def join(python: str, head: str = "3.11.7") -> tuple[ControlService, list[Leave]]:
    control = ControlService(head=HEAD, validate=True)
    control.handle(HEAD, hello(HEAD, head), 0.0)
    effects = control.handle(NODE, hello(NODE, python), 1.0)
    sent = [effect.message for effect in effects if isinstance(effect, ToNode) and effect.node == NODE]
    return control, [message for message in sent if isinstance(message, Leave)]


@pytest.mark.parametrize("python", ["3.11.7", "3.11.0", "3.11.21", ""])
def test_a_node_of_the_same_minor_version_joins_whatever_its_patch_level(python):
    control, refusals = join(python)
    assert refusals == []
    assert [node.key for node in control.nodes.living()] == [HEAD, NODE]


@pytest.mark.parametrize("python", ["3.12.7", "3.1.7", "4.11.7"])
def test_a_node_of_another_minor_version_is_told_to_leave_and_why(python):
    control, [refusal] = join(python)
    assert f"it runs Python {python} and the head 3.11.7" in refusal.reason
    assert refusal.reason.endswith("start it with Python 3.11")
    assert [node.key for node in control.nodes.living()] == [HEAD]
    assert control.nodes.find(NODE) is None


def test_a_node_that_is_alone_says_what_waits_on_it_and_why():
    world = World({"CPU": 1})
    driver = world.driver()
    assert world.request(driver, "demands") == []
    world.send(driver, p.LeaseDemand(7, cpu(1), 1, label="runs"))
    world.send(driver, p.LeaseDemand(8, cpu(1), 3, label="waits"))
    [demand] = world.request(driver, "demands")  # type: ignore[misc]
    assert (demand["label"], demand["count"], demand["demand"]) == ("waits", 3, cpu(1))
    assert "1 of 1 are in use by runs" in demand["why"]


def test_nodes_are_listed_once_they_may_be_given_work():
    control = ControlService(head=HEAD, validate=True)
    control.handle(HEAD, hello(HEAD, ""), 0.0)
    control.handle(HEAD, MemberJoined(7, p.ROLE_DRIVER, 70, 1), 0.0)
    request = p.encode(p.Request("nodes", msgspec.msgpack.encode([])))

    def listed(now: float) -> int:
        said = MemberSaid(7, p.KIND_REQUEST, 1, request)
        [answer] = [x.message for x in control.handle(HEAD, said, now) if isinstance(x, ToNode)]
        assert isinstance(answer, Deliver)
        reply = p.decode(answer.kind, answer.body)
        assert isinstance(reply, p.Reply)
        return len(msgspec.msgpack.decode(reply.body))

    control.handle(NODE, hello(NODE, ""), ANNOUNCE_S / 2)  # announced together with others that may follow
    assert listed(ANNOUNCE_S / 2) == 1
    control.tick(ANNOUNCE_S)
    assert listed(ANNOUNCE_S) == 2
