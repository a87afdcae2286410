"""Cold requests that the manager of a node answers itself; all others are the control service's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ray._control.machine import Deadlines, ProcessLeft, Received, Tick
from ray._control.messages import AskFree, FreeIs
from ray._control.requests import LATER, RefusedError, Requests
from ray._node.events import FlushLogs, Labelled, ListFiles, ReadFile, ToControl
from ray._protocol import LOG_NAME_CHARS_MAX, ROLE_DRIVER, UNIT

if TYPE_CHECKING:
    from ray._node.manager import NodeManager

RECLAIM_S: Final = 0.05
"""How long ``available_resources`` waits for leases that nobody uses to come back."""

STORE: Final = "object_store_memory"

READ_BYTES_MAX: Final = 512 << 10
"""Of a file that somebody reads through the node, so much at a time; who wants more asks again."""

AREAS: Final = ("logs", "events")
"""Directories of a session whose files may be read."""


def _area(area: str) -> str:
    if area not in AREAS:
        text = f"a node has files of {AREAS}, not {area!r}"
        raise RefusedError(ValueError.__name__, text)
    return area


class RequestTable(Requests):
    """Answers requests about one node. Owns those that wait: all others are answered at once."""

    def __init__(self, manager: NodeManager) -> None:
        super().__init__()
        self._manager = manager
        self._waiting: dict[int, list[int]] = {}
        """Leases whose return an answer about available resources waits for, by ticket."""
        self._deadlines: Deadlines[int] = Deadlines()
        self._events = {Tick: self._on_tick, ProcessLeft: self._on_left}
        self._ops = {
            "node.why_lease": (("class_id", "owner"), self._why_lease),
            "node.why_actor": (("actor", "class_name"), self._why_actor),
            "node.demands": (("elsewhere",), self._demands),
            "worker.label": (("label",), self._worker_label),
            "why.process": (("proc",), self._why_process),
            "job.mine": ((), self._job_mine),
            "logs.flush": ((), self._flush_logs),
            "node.files": (("area",), self._files),
            "node.read": (("area", "name", "offset", "size"), self._read),
            "shutdown": (("reason",), self._shutdown),
        }
        if manager.validates:
            self._ops["test.lose_segments"] = ((), self._lose_segments)

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    # ------------------------------------------------------------------ what is free

    def ask_free(self, message: AskFree, now: float) -> None:
        """Answer once idle leases came back: an owner keeps a lease for a moment after its last task."""
        leases = self._manager.leases
        asked = leases.reclaim_all()
        for effect in leases.take_effects():
            self._emit(effect)
        if not asked:
            self._emit(ToControl(FreeIs(message.ticket, self._free())))
            return
        self._waiting[message.ticket] = asked
        self._deadlines.set(message.ticket, now + RECLAIM_S)

    def lease_ended(self) -> None:
        """A lease came back: some who wait may have waited for that one only."""
        for ticket, asked in list(self._waiting.items()):
            if not any(self._manager.leases.is_held(lease) for lease in asked):
                self._finish(ticket)

    def _on_tick(self, event: Tick, now: float) -> None:
        for ticket in self._deadlines.due(now):
            self._finish(ticket)

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self.lease_ended()

    def _finish(self, ticket: int) -> None:
        del self._waiting[ticket]
        self._deadlines.clear(ticket)
        self._emit(ToControl(FreeIs(ticket, self._free())))

    def _free(self) -> dict[str, int]:
        """What no lease holds; of shared memory, no more than is not lent to processes either."""
        free = self._manager.leases.ledger.available()
        store = self._manager.segments.statistics()
        lent = store["store_bytes_used"] - store["store_bytes_warm"] - store["store_bytes_idle"]
        room = (store["store_bytes_capacity"] - lent) * UNIT
        if STORE in free:
            free[STORE] = max(min(free[STORE], room), 0)
        return free

    # ------------------------------------------------------------------ reasons

    def _why_lease(self, event: Received, now: float, class_id: int, owner: int) -> str:
        return self._manager.leases.why(owner, class_id)

    def _why_actor(self, event: Received, now: float, actor: bytes, class_name: str) -> str:
        return f"{class_name} {self._manager.leases.why_actor(actor)}"

    def _demands(self, event: Received, now: float, elsewhere: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What waits for room on this node, and why, behind what waits `elsewhere`."""
        here = [
            {"label": want.label, "count": want.unmet, "demand": want.demand, "why": why}
            for want, why in self._manager.leases.pending()
        ]
        return [*elsewhere, *here]

    def _why_process(self, event: Received, now: float, proc: int) -> str:
        process = self._manager.processes.get(proc)
        if process is None:
            return "a process that has ended"
        what = "the driver" if process.role == ROLE_DRIVER else "a worker"
        return f"{what}, process {process.pid}"

    # ------------------------------------------------------------------ members and the node itself

    def _worker_label(self, event: Received, now: float, label: str) -> None:
        """An actor with a `__repr__` of its own shows it before its output."""
        if not isinstance(label, str):
            text = f"a label is a string, not {label!r}"
            raise RefusedError(TypeError.__name__, text)
        self._emit(Labelled(event.sender, label[:LOG_NAME_CHARS_MAX]))

    def _job_mine(self, event: Received, now: float) -> dict[str, Any]:
        """What the driver of the asking worker's job has said about it."""
        job = self._manager.jobs.get(self._manager.job_of(event.sender))
        if job is None:
            text = "the job of this process is not known here"
            raise RefusedError(ValueError.__name__, text)
        facts = self._manager.facts
        temp_dir, _, session_name = facts.session_dir.rpartition("/")
        here = {"session_name": session_name, "temp_dir": temp_dir, "node_ip_address": facts.host}
        return {**job.config, **here, "job_number": job.number}

    def _lose_segments(self, event: Received, now: float) -> int:
        lost = self._manager.segments.lose_adopted()
        for effect in self._manager.segments.take_effects():
            self._emit(effect)
        return lost

    def _flush_logs(self, event: Received, now: float) -> None:
        """The answer comes behind every line that workers of this node have written."""
        self._emit(FlushLogs())

    def _files(self, event: Received, now: float, area: str) -> Any:
        """Names and sizes of the node's files of one kind."""
        self._emit(ListFiles(event.sender, event.corr, _area(area)))
        return LATER

    def _read(self, event: Received, now: float, area: str, name: str, offset: int, size: int) -> Any:
        """A piece of such a file: a few hundred kilobytes, so that nobody else waits for long."""
        if not isinstance(name, str) or "/" in name or name.startswith("."):
            text = f"{name!r} is no name of a file"
            raise RefusedError(ValueError.__name__, text)
        size = min(max(int(size), 0), READ_BYTES_MAX)
        self._emit(ReadFile(event.sender, event.corr, _area(area), name, int(offset), size))
        return LATER

    def _shutdown(self, event: Received, now: float, reason: str | None) -> None:
        from ray._node.manager import Shutdown

        self._emit(Shutdown(reason or f"process {event.sender:016x} asked for it"))
