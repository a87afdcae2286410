"""Which cores are connected to this node, and how those ended that were.

Owns the list of connected processes, a bounded history of deaths, and who asked about whom. Every core
is told of every death, because any of them may own what the dead borrowed, or borrow what it owned.

Invariants: a process is connected or remembered as ended, not both; everyone who asked (`PeerLost`) is
answered exactly once per question.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.machine import (
    Deadlines,
    Event,
    Machine,
    Multicast,
    ProcessJoined,
    ProcessLeft,
    Received,
    Send,
    Tick,
)
from ray._control.messages import WhoIs
from ray._node.events import (
    Company,
    DescriptorsSeen,
    GivenUp,
    JobKnown,
    LookAtDescriptors,
    PeerGivenUp,
    PeerUnreachable,
    ToControl,
)
from ray._protocol import RETRY_CHARGED, ROLE_DRIVER, ROLE_WORKER, Deaths, PeerLost, WorkerDied

TELL_ALL_AFTER_S: Final = 0.1
"""How long the news of a death may wait for others, to reach everybody in one message: when hundreds of actors end
together, each of the living would else be told hundreds of times."""

TELL_ALL_AT: Final = 256
"""This many deaths do not wait for more."""

DEATHS_REMEMBERED: Final = 10_000
"""Who asks about an older death learns only that the process is unknown."""


class ProcessEnded(Event, frozen=True):
    """A process has ended. `holder` had leased it with `lease` (both 0 if nobody had)."""

    proc: int
    cause: str
    exit_code: int
    intended: bool
    oom: bool
    holder: int = 0
    lease: int = 0
    retry: int = RETRY_CHARGED


class DiedElsewhere(Event, frozen=True):
    """Processes of other nodes have ended."""

    dead: list[tuple[int, str]]


class Process(msgspec.Struct, frozen=True):
    """A connected core."""

    proc: int
    role: int
    pid: int
    job: int

    def __str__(self) -> str:
        return f"{'driver' if self.role == ROLE_DRIVER else 'worker'} (pid {self.pid})"


class ProcessTable(Machine):
    """See the module's docstring."""

    def __init__(self, *, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._connected: dict[int, Process] = {}
        self._deaths: dict[int, WorkerDied] = {}
        self._askers: dict[int, dict[int, None]] = {}
        """For each process whose end is awaited, who asked."""
        self._untold: list[tuple[int, str]] = []
        self._alone = True
        """There is no other node that could know more."""
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {
            ProcessJoined: self._on_joined,
            ProcessLeft: self._on_left,
            ProcessEnded: self._on_ended,
            DiedElsewhere: self._on_died_elsewhere,
            DescriptorsSeen: self._on_descriptors_seen,
            JobKnown: self._on_job_known,
            GivenUp: self._on_given_up,
            Company: self._on_company,
            Tick: self._on_tick,
        }
        self._messages = {PeerLost: self._on_peer_lost}

    def get(self, proc: int) -> Process | None:
        return self._connected.get(proc)

    def drivers(self, job: int = 0) -> list[int]:
        """The drivers of a job, or all of them."""
        return [
            process.proc
            for process in self._connected.values()
            if process.role == ROLE_DRIVER and job in (0, process.job)
        ]

    def all(self) -> list[Process]:
        """Every connected core, with what is known of it."""
        return list(self._connected.values())

    def connected(self) -> list[int]:
        """Every connected core."""
        return list(self._connected)

    def has_ended(self, proc: int) -> bool:
        """Whether its end is remembered."""
        return proc in self._deaths

    def statistics(self) -> dict[str, int]:
        return {"connected": len(self._connected), "deaths_remembered": len(self._deaths)}

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        self._connected[event.proc] = Process(event.proc, event.role, event.pid, event.job)

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._connected.pop(event.proc, None)
        for askers in self._askers.values():
            askers.pop(event.proc, None)

    def _on_ended(self, event: ProcessEnded, now: float) -> None:
        self._connected.pop(event.proc, None)
        died = WorkerDied(event.proc, 0, event.cause, event.exit_code, event.intended, event.oom, event.retry)
        self._remember(died)
        if event.holder:
            self._emit(Send(event.holder, msgspec.structs.replace(died, lease=event.lease)))
        for asker in self._askers.pop(event.proc, {}):
            if asker != event.holder:
                self._emit(Send(asker, died))
        self._tell_soon([(event.proc, event.cause)], now)

    def _remember(self, died: WorkerDied) -> None:
        self._deaths[died.proc] = died
        if len(self._deaths) > DEATHS_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]

    def _tell_soon(self, dead: list[tuple[int, str]], now: float) -> None:
        self._untold += dead
        if len(self._untold) >= TELL_ALL_AT:
            self._tell_all()
        elif "tell" not in self._deadlines:
            self._deadlines.set("tell", now + TELL_ALL_AFTER_S)

    def _on_died_elsewhere(self, event: DiedElsewhere, now: float) -> None:
        for proc, cause in event.dead:
            self._remember(_lost(proc, cause))
        self._tell_soon(event.dead, now)

    def _on_job_known(self, event: JobKnown, now: float) -> None:
        process = self._connected[event.proc]
        self._connected[event.proc] = msgspec.structs.replace(process, job=event.job)

    def _on_company(self, event: Company, now: float) -> None:
        self._alone = event.alone

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def _on_tick(self, event: Tick, now: float) -> None:
        if self._deadlines.due(now):
            self._tell_all()

    def _tell_all(self) -> None:
        dead, self._untold = self._untold, []
        self._deadlines.clear("tell")
        if self._connected:
            self._emit(Multicast(tuple(self._connected), Deaths(dead)))

    def _on_peer_lost(self, event: Received, message: PeerLost, now: float) -> None:
        asker, process = self._connected.get(event.sender), self._connected.get(message.proc)
        if asker is None or process is None:
            self._answer(event.sender, message.proc)
        else:
            self._emit(LookAtDescriptors(asker.proc, asker.pid, process.proc, process.pid))

    def _on_given_up(self, event: GivenUp, now: float) -> None:
        process = self._connected.get(event.proc)
        if process is not None and process.role == ROLE_WORKER:
            self._emit(PeerGivenUp(event.proc, event.by))

    def _answer(self, asker: int, proc: int) -> None:
        """What is known about a process that is not connected here."""
        if proc not in self._deaths and not self._alone:
            self._emit(ToControl(WhoIs(asker, proc)))
            return
        unknown = f"process {proc:016x} is not known here: it never joined, or ended long ago"
        self._emit(Send(asker, self._deaths.get(proc) or _lost(proc, unknown)))

    def _on_descriptors_seen(self, event: DescriptorsSeen, now: float) -> None:
        asker, process = self._connected.get(event.asker), self._connected.get(event.proc)
        if asker is None or process is None:
            return self._answer(event.asker, event.proc)
        usages = (f"the {asker}", event.asker_usage), (f"the {process}", event.usage), ("the node", event.node_usage)
        for poor, usage in usages:
            if usage.is_exhausted:
                cause = (
                    f"the {asker} cannot connect to the {process}, because {poor} has {usage}: raise its limit "
                    "(ulimit -n), or have it talk to fewer processes or close files"
                )
                self._emit(PeerUnreachable(asker.proc, process.proc, cause))
                self._emit(Send(asker.proc, _lost(process.proc, cause)))
                return None
        if process.role == ROLE_WORKER:
            self._askers.setdefault(process.proc, {})[asker.proc] = None
            self._emit(PeerGivenUp(process.proc, f"the {asker}"))
        else:
            # Drivers belong to the user and are not killed for a broken connection.
            cause = f"the connection to the {process} was lost, though it still runs"
            self._emit(Send(asker.proc, _lost(process.proc, cause)))
        return None

    def check_invariants(self) -> None:
        for proc in self._connected:
            self._require(proc not in self._deaths, f"process {proc} is both connected and dead")
        for proc, askers in self._askers.items():
            self._require(proc in self._connected, f"the end of {proc} is awaited after it came")
            for asker in askers:
                self._require(asker in self._connected, f"{asker} asked and has gone")


def _lost(proc: int, cause: str) -> WorkerDied:
    return WorkerDied(proc, 0, cause, 0, intended=False, oom=False)
