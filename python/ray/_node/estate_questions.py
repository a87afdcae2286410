"""Questions of this node's members about what workers of other nodes have left.

Owns which of them are not answered yet. The answers come from the estates of those nodes (`estates`), by way of the
control service, and pass through to who asked. A question or its answer may be lost with a link, and its node with all
that was on it: so who asks is answered in any case, here if need be.

What a member gives up is passed on and not repeated: should it be lost with a link, the object is kept until the member
ends.

Invariants: who waits for an answer is a member of this node; what is asked of a node that is not known is answered at
once.
"""

from __future__ import annotations

from typing import Final

from ray._control.machine import Deadlines, Machine, ProcessLeft, Send, Tick
from ray._node.events import AnswerPassed, AskedElsewhere, PeerJoined, PeerLeft, ToManager
from ray._protocol import EstateAnswer, EstateQuestion

ASK_AGAIN_S: Final = 5.0
"""After so long without an answer a question was lost, or its answer."""


class EstateQuestions(Machine):
    """See the module's docstring."""

    def __init__(self, *, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._open: dict[int, dict[int, dict[bytes, None]]] = {}
        """By node and process, the objects that were claimed; for every node that there is."""
        self._deadlines: Deadlines[int] = Deadlines()
        self._events = {
            AskedElsewhere: self._on_asked,
            AnswerPassed: self._on_answer_passed,
            PeerJoined: self._on_peer_joined,
            PeerLeft: self._on_peer_left,
            ProcessLeft: self._on_left,
            Tick: self._on_tick,
        }

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        counts = (len(keys) for by_proc in self._open.values() for keys in by_proc.values())
        return {"estate_questions": sum(counts)}

    def _on_peer_joined(self, event: PeerJoined, now: float) -> None:
        self._open.setdefault(event.node, {})

    def _on_peer_left(self, event: PeerLeft, now: float) -> None:
        self._deadlines.clear(event.node)
        for proc, keys in self._open.pop(event.node, {}).items():
            self._emit(Send(proc, EstateAnswer([], list(keys))))

    def _on_asked(self, event: AskedElsewhere, now: float) -> None:
        question = event.question
        by_proc = self._open.get(question.node)
        if by_proc is None:
            if question.claimed:
                self._emit(Send(event.proc, EstateAnswer([], question.claimed)))
            return
        self._forget(question.node, event.proc, question.given_up)
        if question.claimed:
            by_proc.setdefault(event.proc, {}).update(dict.fromkeys(question.claimed))
            if question.node not in self._deadlines:
                self._deadlines.set(question.node, now + ASK_AGAIN_S)
        self._emit(ToManager(question.node, question, event.proc))

    def _on_answer_passed(self, event: AnswerPassed, now: float) -> None:
        for node in list(self._open):
            self._forget(node, event.proc, event.objects)

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        for node, by_proc in self._open.items():
            if by_proc.pop(event.proc, None) is not None and not by_proc:
                self._deadlines.clear(node)

    def _forget(self, node: int, proc: int, keys: list[bytes]) -> None:
        by_proc = self._open[node]
        asked = by_proc.get(proc, {})
        for key in keys:
            asked.pop(key, None)
        if not asked:
            by_proc.pop(proc, None)
        if not by_proc:
            self._deadlines.clear(node)

    def _on_tick(self, event: Tick, now: float) -> None:
        for node in self._deadlines.due(now):
            for proc, keys in self._open[node].items():
                self._emit(ToManager(node, EstateQuestion(node, [], list(keys)), proc))
            self._deadlines.set(node, now + ASK_AGAIN_S)

    def check_invariants(self) -> None:
        for node, by_proc in self._open.items():
            self._require(bool(by_proc) == (node in self._deadlines), f"what is asked of {node} may never be answered")
            self._require(all(by_proc.values()), f"somebody waits for nothing of {node}")
