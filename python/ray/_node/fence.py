"""The fence of one node: until when it may run actors that the head may start anew elsewhere.

Owns the list of their workers, and a time. Does not know who the head is, nor whether it is reachable: it hears the
head's questions, each of which says which answer the head had heard before.

Why there are never two copies of an actor that both have effects. Let the node answer a question at R, and the head
hear the answer at G; G comes after R. From G on the head asks `UNANSWERED_MAX` times more, `ASK_S` apart, before it
takes the node for lost, so that it places nothing anew before G + 8 s. The node stops the workers at R + `FENCE_S`,
a second earlier. It counts from R only once a later question has told it that this answer arrived: with a link that is
cut in one direction it hears questions for ever, and its time is not prolonged. Clocks are never compared, only lengths
of time, and no clock is wrong by a second in eight.

A head may also be gone. While nobody listens where heads are found, nobody places anything, and the next one gives
nodes `RETURN_S` to come back before it does: so each refused look for a head (`HeadAbsent`) prolongs the time as an
answer does. When the head, or the next one, welcomes a node that has come back, the greeting counts as an answer that
was heard (`Welcomed`). A broken connection alone prolongs nothing: the head waits for the node's fence before it takes
the node for lost (`NodeTable`), unless nobody listens at the node's address either, whose process has then ended.

What the argument needs is that somebody of this machine acts on time. If the node itself is stopped or stuck, the
zygote does (`Guard`), which has the list too. If the whole machine is suspended nobody can, and its actors run on for a
moment when it wakes: only who receives their effects could refuse these, by the actor's incarnation.

Workers are stopped (SIGSTOP) and not killed, since silence does not say who is to blame: of a head that was suspended
itself nothing is lost, and they go on when it has proved that. A node that is told to leave kills them.

Invariants: workers run only while the fence is open; it is open only before the time that the head is known to keep.
"""

from __future__ import annotations

from typing import Final

from ray._control.machine import Log, Machine, Tick
from ray._control.nodes import PATIENCE_S, RETURN_S
from ray._node.events import (
    ActorGuarded,
    Asked,
    Freeze,
    Guard,
    HeadAbsent,
    Thaw,
    Welcomed,
    WorkerGone,
    ZygoteFenced,
)

FENCE_S: Final = PATIENCE_S - 1.0
"""How long after an answer that was heard workers may run. In steady state they are told 2 to 4 s after it, so a head
may be late by 3 s before anybody notices."""

ABSENT_S: Final = RETURN_S - 1.0
"""How long after a look at which nobody listened workers may run. Looks are taken ten times a second."""

ANSWERS_MAX: Final = 32
"""Answers of which it is not known whether they were heard; older ones prolong nothing."""


class Fence(Machine):
    """See the module's docstring.

    It stands open, and nothing is listed, until `greet` is called: the head's own node needs no fence.
    """

    def __init__(self, *, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._armed = False
        self._until = 0.0
        self._closed = False
        self._greeted_at: float | None = None
        """When the node introduced itself to a head that has not welcomed it yet."""
        self._answers: dict[int, float] = {}
        """When each question was answered, by its number."""
        self._workers: dict[int, int] = {}
        """Processes of actors that may be started anew elsewhere, with their pids."""
        self._events = {
            Asked: self._on_asked,
            HeadAbsent: self._on_absent,
            Welcomed: self._on_welcomed,
            ActorGuarded: self._on_guarded,
            WorkerGone: self._on_gone,
            ZygoteFenced: self._on_zygote_fenced,
            Tick: self._on_tick,
        }

    def greet(self, now: float) -> None:
        """The node introduces itself now, to its head or another one. For the first time there are no workers yet."""
        if not self._armed:
            self._armed = True
            self._until = now + FENCE_S
        self._greeted_at = now
        self._answers.clear()  # another head counts anew

    @property
    def is_closed(self) -> bool:
        """Whether the workers are stopped."""
        return self._closed

    def is_due(self, now: float) -> bool:
        """Whether the time is over and the workers still run."""
        return self._armed and not self._closed and now >= self._until

    def next_deadline(self) -> float | None:
        return self._until if self._armed and not self._closed else None

    def statistics(self) -> dict[str, int]:
        return {"actors_guarded": len(self._workers), "fence_closed": int(self._closed)}

    def _on_asked(self, event: Asked, now: float) -> None:
        self._answers[event.serial] = now
        if len(self._answers) > ANSWERS_MAX:
            del self._answers[next(iter(self._answers))]
        answered_at = self._answers.get(event.heard)
        if answered_at is not None:
            self._answers = {serial: at for serial, at in self._answers.items() if serial >= event.heard}
            self._prolong(answered_at + FENCE_S, now)

    def _on_welcomed(self, event: Welcomed, now: float) -> None:
        greeted_at, self._greeted_at = self._greeted_at, None
        if greeted_at is not None:
            self._prolong(greeted_at + FENCE_S, now)

    def _on_absent(self, event: HeadAbsent, now: float) -> None:
        self._prolong(event.asked_at + ABSENT_S, now)

    def _prolong(self, until: float, now: float) -> None:
        if not self._armed or until <= self._until:
            return
        self._until = until
        if self._workers:
            self._emit(Guard(until, (), ()))
        if self._closed and now < until:
            self._closed = False
            self._emit(Log(f"the head has lost nobody; {self._described()} go on"))
            self._emit(Thaw(tuple(self._workers.values())))

    def _on_guarded(self, event: ActorGuarded, now: float) -> None:
        if not self._armed:
            return
        self._workers[event.proc] = event.pid
        self._emit(Guard(self._until, (event.pid,), ()))
        if self._closed:
            self._emit(Freeze((event.pid,)))

    def _on_gone(self, event: WorkerGone, now: float) -> None:
        if (pid := self._workers.pop(event.proc, None)) is not None:
            self._emit(Guard(self._until, (), (pid,)))

    def _on_tick(self, event: Tick, now: float) -> None:
        if self.is_due(now):
            self._closed = True
            if self._workers:
                why = f"the head has not been heard for {FENCE_S:.0f} s, and may start them anew elsewhere"
                self._emit(Log(f"{self._described()} are stopped until it answers: {why}"))
            self._emit(Freeze(tuple(self._workers.values())))

    def _on_zygote_fenced(self, event: ZygoteFenced, now: float) -> None:
        # It came first by a hair, or this process was stopped meanwhile. What it stopped goes on if it may.
        if self.is_due(now):
            self._on_tick(Tick(), now)
        elif not self._closed:
            self._emit(Thaw(tuple(self._workers.values())))

    def _described(self) -> str:
        return f"{len(self._workers)} actors that can be restarted"

    def check_invariants(self) -> None:
        self._require(self._armed or not self._workers, "workers are listed behind no fence")
        self._require(len(self._answers) <= ANSWERS_MAX, "answers pile up")
