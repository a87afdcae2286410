"""Looks at a node: what there is on it, and what its members own and run.

Owns the questions whose answers are not complete. Members are asked themselves (`Describe`), because nobody else knows
their tasks and objects; they answer without their interpreter, so one that has not after `MEMBER_S` is stopped or
starved, and is named instead of waited for. Knows nothing of what the rows say.

Invariants: every question is answered exactly once, by its deadline at the latest; an answer has at most
`ROWS_BYTES_MAX` of rows, and what is left out still counts in the totals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from ray._control.machine import Deadlines, Log, Machine, ProcessLeft, Received, Send, Tick
from ray._control.messages import AskState, MemberRows, StateIs
from ray._node.events import KeepHistory, StateAsked, ToControl
from ray._protocol import (
    DESCRIBE_NOTHING,
    DESCRIBE_OBJECTS,
    DESCRIBE_STACKS,
    DESCRIBE_TASKS,
    ROLE_DRIVER,
    ROLE_WORKER,
    Describe,
    Described,
    TaskEvents,
)

if TYPE_CHECKING:
    from ray._node.manager import NodeManager

MEMBER_S: Final = 5.0
"""How long a member may take to say what it has."""

ROWS_BYTES_MAX: Final = 16 << 20
"""Rows of one answer; of members that answer later only the totals are told."""

BATCH_BYTES_MAX: Final = 1 << 20
"""Records that a member may send at once; no core of ours makes as many, and a larger batch is dropped."""

QUESTIONS_MAX: Final = 64
"""Questions that wait at a time; a further one is answered at once with nothing but all members as silent."""

ASKED: Final = {
    "nothing": DESCRIBE_NOTHING,
    "tasks": DESCRIBE_TASKS,
    "objects": DESCRIBE_OBJECTS,
    "stacks": DESCRIBE_STACKS,
}
"""What members are asked for; "workers" is known here."""


class _Question(msgspec.Struct):
    ticket: int
    awaited: dict[int, int]
    """Members that have not answered: their pids, by process."""
    members: list[MemberRows]
    bytes: int = 0


class LookTable(Machine):
    """See the module's docstring."""

    def __init__(self, manager: NodeManager) -> None:
        super().__init__(validate=manager.validates)
        self._manager = manager
        self._questions: dict[int, _Question] = {}
        self._serial = 0
        self._deadlines: Deadlines[int] = Deadlines()
        self._events = {StateAsked: self._on_asked, ProcessLeft: self._on_left, Tick: self._on_tick}
        self._messages = {Described: self._on_described, TaskEvents: self._on_task_events}

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    # ------------------------------------------------------------------ questions

    def _on_asked(self, event: StateAsked, now: float) -> None:
        asked = event.message
        assert isinstance(asked, AskState)
        what = ASKED.get(asked.what)
        if what is None:
            rows = self._workers(now)[: max(asked.limit, 0)] if asked.what == "workers" else []
            packed = msgspec.msgpack.encode(rows)
            self._answer(asked.ticket, [MemberRows(0, 0, 0, 0, len(rows), packed)], [])
            return
        roles = (ROLE_WORKER,) if what == DESCRIBE_STACKS else (ROLE_WORKER, ROLE_DRIVER)
        processes = self._manager.processes
        members = [process for key in processes.connected() if (process := processes.get(key)) is not None]
        awaited = {member.proc: member.pid for member in members if member.role in roles}
        if not awaited or len(self._questions) >= QUESTIONS_MAX:
            self._answer(asked.ticket, [], list(awaited.values()))
            return
        self._serial += 1
        self._questions[self._serial] = _Question(asked.ticket, awaited, [])
        self._deadlines.set(self._serial, now + min(asked.timeout_s, MEMBER_S))
        for proc in awaited:
            self._emit(Send(proc, Describe(what, asked.limit), self._serial))

    def _on_described(self, event: Received, message: Described, now: float) -> None:
        question = self._questions.get(event.corr)
        process = self._manager.processes.get(event.sender)
        if question is None or process is None or question.awaited.pop(event.sender, None) is None:
            return  # too late, or not asked
        question.bytes += len(message.rows)
        rows = message.rows if question.bytes <= ROWS_BYTES_MAX else b"\x90"
        question.members.append(MemberRows(process.proc, process.role, process.pid, process.job, message.total, rows))
        self._look(event.corr)

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        for serial, question in list(self._questions.items()):
            if question.awaited.pop(event.proc, None) is not None:
                self._look(serial)

    def _on_tick(self, event: Tick, now: float) -> None:
        for serial in self._deadlines.due(now):
            self._finish(serial)

    def _look(self, serial: int) -> None:
        if not self._questions[serial].awaited:
            self._deadlines.clear(serial)
            self._finish(serial)

    def _finish(self, serial: int) -> None:
        question = self._questions.pop(serial)
        self._answer(question.ticket, question.members, list(question.awaited.values()))

    def _answer(self, ticket: int, members: list[MemberRows], silent: list[int]) -> None:
        self._emit(ToControl(StateIs(ticket, members, silent)))

    # ------------------------------------------------------------------ what is known here

    def _workers(self, now: float) -> list[dict[str, Any]]:
        """Workers and drivers, with those that have ended behind them."""
        manager = self._manager
        rows: list[dict[str, Any]] = []
        labels = {lease.proc: lease.label for lease in manager.leases.held()}
        for worker in manager.pool.living():
            row = _row(worker.proc, ROLE_WORKER, worker.pid, worker.kind[0], now - worker.started)
            rows.append({**row, "state": worker.state, "label": labels.get(worker.proc, "")})
        for driver in manager.processes.drivers():
            process = manager.processes.get(driver)
            if process is not None:
                rows.append({**_row(driver, ROLE_DRIVER, process.pid, process.job, None), "state": "driver"})
        for ended in reversed(manager.pool.ended()):
            row = _row(ended.proc, ROLE_WORKER, ended.pid, ended.job, now - ended.started)
            end = {"ended_s": now - ended.at, "cause": ended.cause, "exit_code": ended.exit_code}
            rows.append({**row, **end, "state": "ended", "intended": ended.intended})
        return rows

    # ------------------------------------------------------------------ history

    def _on_task_events(self, event: Received, message: TaskEvents, now: float) -> None:
        process = self._manager.processes.get(event.sender)
        if process is not None and len(message.batch) > BATCH_BYTES_MAX:
            self._emit(Log(f"{process} sent a batch of {len(message.batch)} bytes of records; dropped"))
        elif process is not None:
            self._emit(KeepHistory(process.proc, process.pid, process.job, message.batch))

    def check_invariants(self) -> None:
        for serial, question in self._questions.items():
            self._require(question.awaited, f"question {serial} waits for nobody")
            self._require(serial in self._deadlines, f"question {serial} has no deadline")


def _row(proc: int, role: int, pid: int, job: int, age_s: float | None) -> dict[str, Any]:
    return {"proc": proc, "role": role, "pid": pid, "job": job, "age_s": age_s}
