"""One answer out of those of all nodes."""

from __future__ import annotations

from typing import Any

from ray._control import collecting
from ray._control.collecting import Collector
from ray._control.machine import Effect, ToNode
from ray._control.messages import AskState, MemberRows, StateIs


class Head:
    """A collector with what it has sent and answered."""

    def __init__(self) -> None:
        self.sent: list[Effect] = []
        self.answers: list[tuple[int, int, Any]] = []
        self.collector = Collector(self.sent.append, lambda to, corr, result: self.answers.append((to, corr, result)))

    def ask(self, *nodes: int, timeout_s: float = 30.0) -> int:
        self.collector.ask(1, 9, nodes, "tasks", 10, timeout_s, now=100.0)
        asked = self.sent[-1]
        assert isinstance(asked, ToNode)
        assert isinstance(asked.message, AskState)
        return asked.message.ticket


def rows(proc: int, size: int = 1) -> MemberRows:
    return MemberRows(proc, 3, 40 + proc, 1, 1, bytes(size))


def test_nodes_are_asked_at_once_and_given_less_time_than_the_head_has():
    head = Head()
    ticket = head.ask(5, 6, timeout_s=2.0)
    assert head.sent == [ToNode(node, AskState(ticket, "tasks", 10, 1.6)) for node in (5, 6)]


def test_the_answer_comes_with_the_last_node():
    head = Head()
    ticket = head.ask(5, 6)
    head.collector.heard(6, StateIs(ticket, [rows(1)], []))
    assert head.answers == []
    head.collector.heard(5, StateIs(ticket, [rows(2)], [44]))
    assert head.answers == [(1, 9, {"nodes": [(6, [rows(1)], []), (5, [rows(2)], [44])], "silent": []})]
    assert head.collector.next_deadline() is None


def test_a_silent_node_is_named_at_the_deadline_and_its_late_answer_is_dropped():
    head = Head()
    ticket = head.ask(5, 6)
    head.collector.heard(5, StateIs(ticket, [], []))
    deadline = head.collector.next_deadline()
    assert deadline == 100.0 + collecting.NODE_S
    head.collector.tick(deadline)
    assert head.answers == [(1, 9, {"nodes": [(5, [], [])], "silent": [6]})]
    head.collector.heard(6, StateIs(ticket, [rows(1)], []))
    head.collector.tick(deadline + 100)
    assert len(head.answers) == 1


def test_a_node_answers_once():
    head = Head()
    ticket = head.ask(5, 6)
    head.collector.heard(5, StateIs(ticket, [rows(1)], []))
    head.collector.heard(5, StateIs(ticket, [rows(2)], []))
    assert head.answers == []


def test_a_lost_node_is_not_waited_for():
    head = Head()
    ticket = head.ask(5, 6)
    head.collector.heard(5, StateIs(ticket, [], []))
    head.collector.node_lost(6)
    assert head.answers == [(1, 9, {"nodes": [(5, [], [])], "silent": []})]


def test_nothing_is_answered_to_who_has_gone():
    head = Head()
    ticket = head.ask(5)
    head.collector.asker_left(1)
    head.collector.heard(5, StateIs(ticket, [], []))
    assert head.answers == []
    assert head.collector.next_deadline() is None


def test_an_answer_has_no_more_rows_than_a_frame_can_hold(monkeypatch):
    monkeypatch.setattr(collecting, "ANSWER_BYTES_MAX", 10)
    head = Head()
    ticket = head.ask(5, 6)
    head.collector.heard(5, StateIs(ticket, [rows(1, 10)], []))
    head.collector.heard(6, StateIs(ticket, [rows(2, 10)], []))
    ((_, first, _), (_, second, _)) = head.answers[0][2]["nodes"]
    assert [(x.total, x.rows) for x in (*first, *second)] == [(1, bytes(10)), (1, b"\x90")]
