"""What all nodes say to one question, as one answer.

Owns the questions that wait for nodes. Each is answered once: when all nodes have answered, or at its deadline, or when
those that are missing are lost; the answer names the nodes that are missing. Knows nothing of what the rows say: they
are passed on as they came.

Limits: `ANSWER_BYTES_MAX` of rows in an answer, beyond which only totals are told; `NODE_S` until a node counts as
silent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from ray._control.machine import Deadlines, ToNode
from ray._control.messages import AskState, MemberRows, StateIs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray._control.machine import Effect

NODE_S: Final = 8.0
"""How long a node may take: a little more than it gives its members."""

ANSWER_BYTES_MAX: Final = 32 << 20
"""Rows of one answer, half of what a frame may hold."""


class _Question(msgspec.Struct):
    asker: int
    corr: int
    awaited: dict[int, None]
    answers: list[tuple[int, list[MemberRows], list[int]]]
    bytes: int = 0


class Collector:
    """See the module's docstring.

    Args:
        emit: Takes effects.
        answer: Answers a member: (process, corr, result).
    """

    def __init__(self, emit: Callable[[Effect], None], answer: Callable[[int, int, Any], None]) -> None:
        self._emit = emit
        self._answer = answer
        self._questions: dict[int, _Question] = {}
        self._serial = 0
        self._deadlines: Deadlines[int] = Deadlines()

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def ask(
        self, asker: int, corr: int, nodes: Iterable[int], what: str, limit: int, timeout_s: float, now: float
    ) -> None:
        """Ask these nodes."""
        self._serial += 1
        ticket = self._serial
        self._questions[ticket] = _Question(asker, corr, dict.fromkeys(nodes), [])
        patience = min(timeout_s, NODE_S)
        self._deadlines.set(ticket, now + patience)
        for node in self._questions[ticket].awaited:
            self._emit(ToNode(node, AskState(ticket, what, limit, patience * 0.8)))
        self._look(ticket)

    def heard(self, node: int, told: StateIs) -> None:
        """A node has answered."""
        question = self._questions.get(told.ticket)
        if question is None or node not in question.awaited:
            return  # too late
        del question.awaited[node]
        members = []
        for member in told.members:
            question.bytes += len(member.rows)
            fits = question.bytes <= ANSWER_BYTES_MAX
            members.append(member if fits else msgspec.structs.replace(member, rows=b"\x90"))
        question.answers.append((node, members, told.silent))
        self._look(told.ticket)

    def node_lost(self, node: int) -> None:
        """A node will not answer any more; there is nothing to miss on it."""
        for ticket, question in list(self._questions.items()):
            if node in question.awaited:
                del question.awaited[node]
                self._look(ticket)

    def asker_left(self, proc: int) -> None:
        """Nobody wants the answer any more."""
        for ticket in [ticket for ticket, question in self._questions.items() if question.asker == proc]:
            del self._questions[ticket]
            self._deadlines.clear(ticket)

    def tick(self, now: float) -> None:
        """Deadlines may have passed."""
        for ticket in self._deadlines.due(now):
            self._finish(ticket)

    def _look(self, ticket: int) -> None:
        if not self._questions[ticket].awaited:
            self._deadlines.clear(ticket)
            self._finish(ticket)

    def _finish(self, ticket: int) -> None:
        question = self._questions.pop(ticket)
        result = {"nodes": question.answers, "silent": list(question.awaited)}
        self._answer(question.asker, question.corr, result)
