"""The memory watch of one node: ends a worker before the kernel ends whatever it likes.

Owns when to look, whose end is being waited for, and how many leases there may be of a demand that has lost a worker.
Does not read anything itself (`memory_reader` does), and does not choose (`memory_victims` does).

Nothing is looked at while no worker is lent. While one is, the pause until the next look is half the time in which
`FILL_BYTES_PER_S` would use up what is left below the threshold, within bounds: a node that is far from its limit looks
once a second, one that is near it twenty times. The kernel's own complaint that processes wait for memory
(`MemoryStalled`) is a look between two, where there is such a thing.

Ending a worker makes room only once the process has gone and its pages are free, so one is ended at a time, and no
other before usage fell or a deadline passed. Its owner repeats the task when the node gives it a lease, and the node
does so slowly: the demand may have as many leases as survived, one more after a pause if what the worker had held has
room by then, and so on, with a pause that doubles at each further loss. Where none survived, one may start again once
nothing else runs here, or after `HOLD_S_MAX` at the latest. So an attempt that cannot succeed is not repeated in a hot
loop, and a demand that has room is soon as wide as before.

Invariants: at most one worker is being ended; there is a deadline while a worker is lent, is being ended, or a demand
may have no lease at all; every limit of leases is lifted at the first look that comes `FORGET_S` after the last loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ray._control.demands import Key  # noqa: TC001  (msgspec reads the annotation)
from ray._control.machine import Deadlines, Log, Machine, Notify, Tick
from ray._control.shown import show_bytes
from ray._node.events import (
    EvictWorker,
    LimitLeases,
    MemoryRead,
    MemoryStalled,
    MemoryUse,
    ReadMemory,
    WorkerGone,
    WorkerReady,
)
from ray._node.memory_victims import Tenant, cause_text, choose, describe, short_text, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray._node.config import MemorySettings

FILL_BYTES_PER_S: Final = 4 << 30
"""How fast memory is taken to fill at worst: two cores that touch new pages, at up to 2 GiB a second each."""

LOOK_S_MIN: Final = 0.05
"""The shortest pause between two looks, each of which costs a few tenths of a millisecond, the waking included."""

CALM_GROWTH: Final = 0.02
"""With less than this share of what is left used up since the last look, the next pause is twice as long as it would
be, so that a node which stays near its threshold looks ten times a second."""

HELPLESS_S: Final = 1.0
"""Above the threshold, with nobody to end, all processes are listed so often: that costs milliseconds."""

END_S: Final = 5.0
"""A worker that was to be ended and has not by then is not waited for any longer."""

SETTLE_S: Final = 1.0
"""From the end of a process until its memory must be free; another worker may be ended then."""

GIVEN_BACK: Final = 0.5
"""With this share of what it held free again, a worker's memory counts as back: others may have grown meanwhile."""

PAUSE_S: Final = 1.0
"""From a loss until the demand may have one more lease; doubles with each further loss of the same demand."""

PAUSE_S_MAX: Final = 60.0
"""Doubling ends here."""

HOLD_S_MAX: Final = 60.0
"""A demand without any lease may have one after this time even if there is no room."""

FORGET_S: Final = 150.0
"""After this time without a loss a demand is like any other; longer than every pause."""


class Eviction(msgspec.Struct):
    """A worker that is being ended, and what was used then."""

    proc: int
    pid: int
    bytes: int
    used: int
    at: float
    gone_at: float | None = None


class Losses(msgspec.Struct):
    """A demand that has lost workers, the last of which held `bytes`."""

    key: Key
    count: int
    bytes: int
    limit: int
    at: float
    until: float

    @property
    def pause_s(self) -> float:
        return min(PAUSE_S * 2.0 ** min(self.count - 1, 10), PAUSE_S_MAX)


class MemoryWatch(Machine):
    """See the module's docstring.

    Args:
        settings: What the user wants of it.
        place: The node in words, such as "node host (10.0.0.1)".
        tenants: Asks for the workers that are lent now.
    """

    def __init__(
        self, *, settings: MemorySettings, place: str, tenants: Callable[[], Iterator[Tenant]], validate: bool = False
    ) -> None:
        super().__init__(validate=validate)
        self._settings = settings
        self._place = place
        self._tenants = tenants
        self._eviction: Eviction | None = None
        self._doomed: dict[int, None] = {}
        """Workers that were to be ended and have not yet, as one that waits for a disk: they are not chosen again."""
        self._losses: dict[Key, Losses] = {}
        self._helpless_until: float | None = None
        """While it is set, more than may be is used, and nobody is worth ending."""
        self._use = MemoryUse("", 0, 0)
        """The limit that was nearest at the last look."""
        self._blind = False
        """The kernel told nothing, and is not asked again."""
        self._looks = self._evictions = 0
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {
            WorkerReady: self._on_worker_ready,
            WorkerGone: self._on_worker_gone,
            MemoryStalled: self._on_stalled,
            MemoryRead: self._on_read,
            Tick: self._on_tick,
        }

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        """Counts for people and tests."""
        return {
            "memory_used": self._use.used,
            "memory_limit": self._use.limit,
            "memory_looks": self._looks,
            "memory_evictions": self._evictions,
        }

    # ------------------------------------------------------------------ when to look

    def _on_worker_ready(self, event: WorkerReady, now: float) -> None:
        """Somebody gets a worker."""
        if self._settings.look_s_max > 0 and not self._blind and "look" not in self._deadlines:
            self._look_at(now + min(LOOK_S_MIN, self._settings.look_s_max))

    def _on_worker_gone(self, event: WorkerGone, now: float) -> None:
        self._doomed.pop(event.proc, None)
        if self._eviction is not None and self._eviction.proc == event.proc:
            self._eviction.gone_at = now
            self._look_at(now)

    def _on_stalled(self, event: MemoryStalled, now: float) -> None:
        if "look" in self._deadlines:
            self._look_at(now)

    def _on_tick(self, event: Tick, now: float) -> None:
        if not self._deadlines.due(now):
            return
        if self._eviction is None and self._is_idle():
            self._rest(now)
        else:
            self._emit(ReadMemory())

    def _rest(self, now: float) -> None:
        """Nobody works. Who may have no worker may have one as soon as the pause is over."""
        for losses in [x for x in self._losses.values() if x.limit == 0 and x.until <= now]:
            self._widen(losses, now)
        held = [losses.until for losses in self._losses.values() if losses.limit == 0]
        if held:
            self._look_at(min(held))

    def _is_idle(self) -> bool:
        return next(self._tenants(), None) is None

    def _look_at(self, when: float) -> None:
        self._deadlines.set("look", when)

    # ------------------------------------------------------------------ what was seen

    def _on_read(self, event: MemoryRead, now: float) -> None:
        self._looks += 1
        if not event.uses:
            self._emit(Log("the kernel does not say how much memory is used: nothing is ended before it runs out"))
            self._blind = True
            return
        before = self._excess(self._use)
        self._use = max(event.uses, key=self._excess)
        excess = self._excess(self._use)
        calm = excess - before < CALM_GROWTH * -excess
        self._settle(self._use, excess, now)
        self._widen_all(excess, now)
        if excess <= 0:
            self._helpless_until = None
        elif self._eviction is None and (self._helpless_until is None or self._helpless_until <= now):
            if not event.processes:
                self._emit(ReadMemory(detailed=True))
                return
            self._evict(event, self._use, now)
        pause_s = self._pause_s(excess) * (2 if calm else 1)
        self._look_at(now + min(pause_s, self._settings.look_s_max))

    def _excess(self, use: MemoryUse) -> float:
        return use.used - use.limit * self._settings.threshold

    def _pause_s(self, excess: float) -> float:
        shortest = min(LOOK_S_MIN, self._settings.look_s_max)
        if self._eviction is not None:
            return shortest
        return max(min(-excess / FILL_BYTES_PER_S / 2, self._settings.look_s_max), shortest)

    def _settle(self, use: MemoryUse, excess: float, now: float) -> None:
        """Whether the worker that was ended is through."""
        eviction = self._eviction
        if eviction is None:
            return
        if eviction.gone_at is None:
            if now >= eviction.at + END_S:
                self._emit(Log(f"worker process {eviction.pid} was to be ended for want of memory and still has not"))
                self._eviction = None
        elif (
            excess <= 0 or use.used <= eviction.used - eviction.bytes * GIVEN_BACK or now >= eviction.gone_at + SETTLE_S
        ):
            self._eviction = None

    # ------------------------------------------------------------------ ending a worker

    def _evict(self, event: MemoryRead, use: MemoryUse, now: float) -> None:
        tenants = list(self._tenants())
        choice = [tenant for tenant in tenants if tenant.proc not in self._doomed]
        victim = choose(choice, {process.pid: process.bytes for process in event.processes}, use.limit)
        if victim is None:
            self._tell_helpless(event, use, tenants)
            self._helpless_until = now + HELPLESS_S
            return
        self._helpless_until = None
        tenant = victim.tenant
        self._eviction = Eviction(tenant.proc, tenant.pid, victim.bytes, use.used, now)
        self._doomed[tenant.proc] = None
        self._evictions += 1
        cause = cause_text(victim, use, self._settings.threshold, self._place, tenants, event.processes)
        survivors = sum(other.key == tenant.key for other in tenants) - 1
        self._narrow(tenant.key, victim.bytes, survivors, now)
        self._emit(Notify(tenant.job, "warning", short_text(victim, use, self._place)))
        self._emit(EvictWorker(tenant.proc, cause, victim.retry))

    def _tell_helpless(self, event: MemoryRead, use: MemoryUse, tenants: list[Tenant]) -> None:
        if self._helpless_until is None:
            text = (
                f"Memory is short on {self._place} ({describe(use)}), and no worker holds enough for its end to help. "
                f"{table(tenants, event.processes)}"
            )
            self._emit(Notify(0, "warning", text))

    # ------------------------------------------------------------------ leases of those who lost a worker

    def _narrow(self, key: Key, lost_bytes: int, survivors: int, now: float) -> None:
        losses = self._losses.get(key)
        count = losses.count + 1 if losses is not None and now < losses.at + FORGET_S else 1
        losses = self._losses[key] = Losses(key, count, lost_bytes, survivors, now, now)
        losses.until = now + losses.pause_s
        self._tell_limit(losses)

    def _widen_all(self, excess: float, now: float) -> None:
        nobody = bool(self._losses) and self._is_idle()
        for losses in list(self._losses.values()):
            if now >= losses.at + FORGET_S:
                del self._losses[losses.key]
                self._emit(LimitLeases(*losses.key, limit=None))
            elif now >= losses.until:
                room = excess + losses.bytes <= 0
                if room or (losses.limit == 0 and (nobody or now >= losses.at + HOLD_S_MAX)):
                    self._widen(losses, now)

    def _widen(self, losses: Losses, now: float) -> None:
        losses.limit += 1
        losses.until = now + losses.pause_s
        self._tell_limit(losses)

    def _tell_limit(self, losses: Losses) -> None:
        reason = (
            f"memory was short on {self._place}, and a worker of this kind that held {show_bytes(losses.bytes)} was "
            f"ended; there may be {losses.limit} at a time until there is room for one more"
        )
        self._emit(LimitLeases(*losses.key, limit=losses.limit, reason=reason))

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        awake = "look" in self._deadlines or any(isinstance(effect, ReadMemory) for effect in self._out)
        self._require(awake or self._eviction is None, "an end is waited for without a deadline")
        stuck = [losses for losses in self._losses.values() if losses.limit == 0]
        self._require(awake or not stuck, f"{stuck} may never have a worker again")
