"""Leases of one node: who may use which worker, and with which resources.

Owns demands, leases and the resource ledger. An owner of this node is served here first, and what is left over is
told to the control service (`Overflow`), which has other nodes serve it; so demands of owners of other nodes, *guests*,
come from there (`LeasesPlaced`), as do actors. Does not know how workers come to be: it asks for one
(`WantWorker`), and the worker pool answers. An actor is a lease that ends with its worker.

A lease is *starting* from the moment its resources are taken until a worker is there, and then *held* until it is
returned, its owner dies or its worker dies. Placement groups wait here for the resources of their bundles like all
others do, and a demand in a group is one for the resources that its bundles offer (`bundles`).

Invariants:
- what leases and bundles hold and what is free add up to what the node has;
- a demand's starting leases are no more than its count;
- what cannot be met here now is known to the control service, as soon as there are other nodes;
- what it has placed here is started at once, or refused, unless it is to queue;
- nothing that fits waits, except behind a demand that was passed over too often (`fairness`);
- a worker serves at most one lease; no lease is granted to a process that has gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ray._control import messages
from ray._control import strategy as strategies
from ray._control.demands import ACTORS, GROUPS, Key
from ray._control.group_placement import demand_of
from ray._control.machine import (
    Deadlines,
    Log,
    Machine,
    Notify,
    ProcessJoined,
    ProcessLeft,
    Received,
    Send,
    Tick,
    earliest,
)
from ray._control.shown import show_demand
from ray._control.waits import Waits
from ray._node import fairness, lease_words
from ray._node.bundles import Reservations
from ray._node.events import (
    Company,
    FreeWorker,
    JobKnown,
    Labelled,
    LimitLeases,
    PeerUnreachable,
    StartsDelayed,
    StopWorker,
    ToControl,
    UnwantWorker,
    WantWorker,
    WorkerGone,
    WorkerReady,
    WorkerRetired,
    WorkerUnavailable,
)
from ray._node.lease_records import (
    LEASE_BASE_MASK,
    STARTING_PER_DEMAND_MAX,
    ActorDemand,
    ActorPlaced,
    ActorUnplaceable,
    ActorWithdrawn,
    BundlesCommitted,
    BundlesReleased,
    BundlesWanted,
    Elsewhere,
    GuestWithdrawn,
    Lease,
    LeasesPlaced,
    NowHopeless,
    ToldElsewhere,
    Want,
    guest,
    overflow,
    refusal,
)
from ray._node.resources import is_cpu
from ray._protocol import (
    ACTOR_DEAD,
    CAUSE_TEXT,
    ActorState,
    Blocked,
    LeaseDemand,
    LeaseFailed,
    LeaseGranted,
    LeaseKept,
    LeaseReclaim,
    LeaseReturn,
    Pressure,
    Retired,
    Unblocked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray._node.resources import Ledger

DEMANDS_PER_OWNER_MAX: Final = 10_000
"""Scheduling classes that one owner may ask for at a time; further demands are refused with `LeaseFailed`."""

CALM_S: Final = 0.1
"""After this time without anyone waiting, owners may keep idle leases again: classes that alternate do not cause two
messages each time."""


REPORT_S: Final = 0.01
"""What is free is told to the control service no more often than this, unless it is why something was refused."""


class LeaseTable(Machine):
    """See the module's docstring.

    Args:
        node: This node's key, for grants.
        ledger: The node's resources; from now on changed only by this table.
        new_id: Draws a random number, from which leases are numbered: their numbers are unique over all nodes.
    """

    def __init__(self, *, node: int, ledger: Ledger, new_id: Callable[[], int], validate: bool = False) -> None:
        super().__init__(validate=validate)
        self.ledger = ledger
        self.reservations = Reservations(ledger)
        self._node = node
        self._jobs: dict[int, int] = {}
        """Connected cores and guests, and their jobs: only they may own leases."""
        self._wants: dict[Key, Want] = {}
        self._turns: dict[int, dict[Key, Want]] = {}
        """The same demands by owner, in the order in which owners and classes have their turn."""
        self._leases: dict[int, Lease] = {}
        self._by_proc: dict[int, Lease] = {}
        self._granted: dict[Key, int] = {}
        """Leases that owners of this node got, ever, by class; of classes for which any was granted."""
        self._pressed: dict[int, None] = {}
        """Owners that were told that others wait."""
        self._kept = 0
        """How many leases were asked back and are in use."""
        self._serial = new_id() & LEASE_BASE_MASK
        self._alone = True
        """There is no other node."""
        self._placed_serial = 0
        """The last order of the control service that was followed."""
        self._reported: tuple[dict[str, int], int] = ({}, 0)
        self._report_at = 0.0
        self._limits: dict[Key, LimitLeases] = {}
        """Demands of which there may be so many leases, for want of memory."""
        self._starts_delayed = ""
        """Why the worker pool cannot start workers just now."""
        self._waits = Waits()
        self._deadlines: Deadlines[str] = Deadlines()
        self._events = {
            ProcessJoined: self._on_joined,
            ProcessLeft: self._on_left,
            WorkerReady: self._on_worker_ready,
            WorkerUnavailable: self._on_worker_unavailable,
            WorkerGone: self._on_worker_gone,
            PeerUnreachable: self._on_unreachable,
            StartsDelayed: self._on_starts_delayed,
            LimitLeases: self._on_limit,
            ActorDemand: self._on_actor_demand,
            ActorWithdrawn: self._on_actor_withdrawn,
            LeasesPlaced: self._on_leases_placed,
            GuestWithdrawn: self._on_guest_withdrawn,
            Elsewhere: self._on_elsewhere,
            NowHopeless: self._on_hopeless,
            BundlesWanted: self._on_bundles_wanted,
            BundlesCommitted: self._on_bundles_committed,
            BundlesReleased: self._on_bundles_released,
            ToldElsewhere: self._on_told_elsewhere,
            Company: self._on_company,
            JobKnown: self._on_job_known,
            Tick: self._on_tick,
        }
        self._messages = {
            LeaseDemand: self._on_demand,
            LeaseReturn: self._on_return,
            LeaseKept: self._on_kept,
            Blocked: self._on_blocked,
            Unblocked: self._on_unblocked,
            Retired: self._on_retired,
        }

    # ------------------------------------------------------------------ queries

    def holder(self, proc: int) -> tuple[int, int]:
        """(owner, lease) of the lease that a worker serves; (0, 0) if none, or if it is an actor."""
        lease = self._by_proc.get(proc)
        return (lease.owner, lease.id) if lease is not None and lease.owner != ACTORS else (0, 0)

    def held(self) -> Iterator[Lease]:
        """Leases with a worker, in the order in which they were asked for."""
        return (lease for lease in self._leases.values() if lease.held)

    def why(self, owner: int, class_id: int) -> str:
        """Why the owner's demand for this class is not met, as a sentence."""
        return self._why((owner, class_id))

    def why_actor(self, actor: bytes) -> str:
        """Why an actor has no worker yet, as a sentence."""
        return self._why((ACTORS, actor))

    def pending(self) -> list[tuple[Want, str]]:
        """What waits for room on this node and was not told to the control service, and why."""
        wants = [want for want in self._wants.values() if want.unmet and not want.placed_only]
        return [(want, self._why(want.key)) for want in wants]

    def statistics(self) -> dict[str, int]:
        """Counts for people and tests."""
        held = sum(lease.held for lease in self._leases.values())
        return {
            "leases": held,
            "leases_starting": len(self._leases) - held,
            "demands_waiting": len(self._wants),
            "leases_wanted": sum(want.unmet for want in self._wants.values()),
            "reservations": len(self.reservations),
        }

    def next_deadline(self) -> float | None:
        return earliest(self._deadlines.next(), self._waits.next_deadline())

    def owners(self) -> list[int]:
        """Who holds leases, or waits for some."""
        return list(dict.fromkeys([*(lease.owner for lease in self._leases.values()), *self._turns]))

    def reclaim_all(self) -> list[int]:
        """Ask for every lease that is not known to be in use for good; the ids that were asked for, in order."""
        leases = [lease for lease in self._leases.values() if lease.held and lease.owner != ACTORS]
        return [lease.id for lease in leases if self._reclaim(lease) or lease.reclaimed]

    def is_held(self, lease: int) -> bool:
        return lease in self._leases

    # ------------------------------------------------------------------ demands

    def _on_demand(self, event: Received, message: LeaseDemand, now: float) -> None:
        key = (event.sender, message.class_id)
        if event.sender not in self._jobs:
            return  # it has gone meanwhile
        want = self._wants.get(key)
        # What was granted and had not come to the owner when it spoke is part of what it speaks of.
        coming = self._granted.get(key, 0) - message.granted if message.granted >= 0 else 0
        count = max(message.count - coming, 0)
        if want is None and count > 0:
            if len(self._turns.get(event.sender, ())) >= DEMANDS_PER_OWNER_MAX:
                reason = f"more than {DEMANDS_PER_OWNER_MAX} kinds of tasks wait in one process"
                self._emit(Send(event.sender, LeaseFailed(message.class_id, reason)))
                return
            want = self._add(
                Want(
                    key=key,
                    job=self._jobs[event.sender],
                    demand={name: units for name, units in message.demand.items() if units > 0},
                    count=count,
                    env=message.env,
                    strategy=message.strategy,
                    label=message.label,
                    place={},
                    retriable=message.retriable,
                ),
                now,
            )
        elif want is not None:
            want.count = count
            self._cancel_surplus(want)
        self._schedule(now)

    def _on_actor_demand(self, event: ActorDemand, now: float) -> None:
        order = event.message
        key = (ACTORS, order.actor)
        self._require(key not in self._wants, f"actor {order.actor.hex()} is being placed already")
        self._placed_serial = max(self._placed_serial, order.serial)
        want = Want(
            key=key,
            job=order.job,
            demand={name: units for name, units in order.run.items() if units > 0},
            count=1,
            env=order.env,
            strategy=order.strategy,
            label=order.label,
            place=order.place,
            lives_for=order.owner,
            retriable=order.retriable,
            incarnation=order.incarnation,
            guest=True,
            queues=order.queue,
        )
        self._add(want, now)
        self._schedule(now)

    def _on_actor_withdrawn(self, event: ActorWithdrawn, now: float) -> None:
        self._drop((ACTORS, event.actor), now)

    def _drop(self, key: Key, now: float) -> None:
        """Give a demand up."""
        want = self._wants.get(key)
        if want is not None:
            want.count = want.here = 0
            self._cancel_surplus(want)
            self._schedule(now)

    def _add(self, want: Want, now: float) -> Want:
        want.how = strategies.parse(want.strategy)
        want.placed_only = not want.guest and want.needs_view(self._node, self.ledger, alone=self._alone)
        self._wants[want.key] = want
        self._turns.setdefault(want.owner, {})[want.key] = want
        self._hold_back(want.key)
        # Of guests that must not wait here, and of those that do beside other nodes, the control service tells people.
        want.waits = not want.guest or (self._alone and want.queues)
        if want.waits:
            self._begin_wait(want, now)
        return want

    def _begin_wait(self, want: Want, now: float) -> None:
        infeasible = self._infeasible(want) is not None
        self._waits.add(want, now, infeasible=infeasible)
        if infeasible:
            self._tell_waits(now)

    def _remove(self, want: Want) -> None:
        del self._wants[want.key]
        if want.waits:
            self._waits.remove(want)
        if want.told >= 0:
            self._emit(ToControl(overflow(want, 0, -1)))
        turn = self._turns[want.owner]
        del turn[want.key]
        if not turn:
            del self._turns[want.owner]

    def _cancel_surplus(self, want: Want) -> None:
        """Give up starting leases beyond the count, newest first; forget a demand for nothing."""
        surplus = want.starting - want.count
        if surplus > 0:
            starting = [x for x in self._leases.values() if x.key == want.key and not x.held]
            for lease in starting[-surplus:]:
                self._emit(UnwantWorker(lease.id))
                self._end(lease)
                want.starting -= 1
        if want.count == 0:
            self._remove(want)

    def _infeasible(self, want: Want) -> str | None:
        if want.hopeless:
            return want.hopeless
        if not self._alone or want.placed_only:
            return None  # others may have it; the control service says so if they do not
        return self.ledger.infeasible(want.place) or self.ledger.infeasible(want.demand)

    def _tell_waits(self, now: float) -> None:
        """Tell people about demands that wait for long, or for ever."""
        deadline = self._waits.next_deadline()
        if deadline is None or deadline > now:
            return
        working = {lease.key for lease in self._leases.values() if lease.held}
        for group in self._waits.due(now, working):
            want = next(iter(group.members.values()))
            if group.infeasible:
                total = self.ledger.total if self._alone else None
                text = lease_words.infeasible(group, want, self._infeasible(want) or "", total)
                self._emit(Notify(want.job, "warning", text))
            else:
                self._emit(Notify(want.job, "info", lease_words.stalled(group, want, self._why(want.key), now)))

    # ------------------------------------------------------------------ granting

    def _schedule(self, now: float) -> None:
        """Take resources for all that fits, and ask for leases back on behalf of what does not."""
        if self._turns:
            self._share_out(now)
        else:
            self._relax(now)
        self._report(now)

    def _share_out(self, now: float) -> None:
        blocked = fairness.share_out(self._turns, self.ledger, self._start)
        if GROUPS in self._turns and self._finish_reservations():
            blocked = fairness.share_out(self._turns, self.ledger, self._start)
        if self._refuse_what_waits():
            # One that was refused may have held what was passed over so often, and others need it too.
            blocked = fairness.share_out(self._turns, self.ledger, self._start)
        blocked = [want for want in blocked if want.key in self._wants and want.unmet > 0]
        if not any(want.passed_over >= want.patience for want in blocked):
            self._deadlines.clear("hold")
        elif "hold" not in self._deadlines:
            self._deadlines.set("hold", now + fairness.HOLD_S)
        self._deadlines.clear("reclaim")
        if blocked:
            victims, again_at = fairness.choose_reclaims(
                blocked, self._ended_by_owners(), self._wants, self.ledger, now
            )
            self._press(blocked)
            self._withdraw_reclaims(blocked)
            for lease in victims:
                self._reclaim(lease)
            if again_at is not None:
                self._deadlines.set("reclaim", again_at)
        else:
            self._relax(now)

    def _press(self, blocked: list[Want]) -> None:
        """Tell who holds what is lacking that idle leases are wanted back."""
        self._deadlines.clear("calm")
        lacking = {name for want in blocked[: fairness.WAITERS_SERVED] for name in self.ledger.lacking(want.demand)}
        for lease in self._ended_by_owners():
            if lease.owner not in self._pressed and any(lease.allocation.holds(name) for name in lacking):
                self._pressed[lease.owner] = None
                self._emit(Send(lease.owner, Pressure(True)))

    def _relax(self, now: float) -> None:
        """Nobody waits any more."""
        self._withdraw_reclaims([])
        if self._pressed and "calm" not in self._deadlines:
            self._deadlines.set("calm", now + CALM_S)

    def _ended_by_owners(self) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.owner != ACTORS]

    def _start(self, want: Want) -> None:
        if want.bundles is not None:
            want.count = 0
            self.reservations.reserve(want.bundles)
            self._emit(ToControl(messages.BundlesPrepared(want.bundles.group, want.bundles.attempt)))
            return
        self._serial += 1
        lease = Lease(
            self._serial,
            want.key,
            want.label,
            self.ledger.take(want.demand),
            want.job,
            lives_for=want.lives_for,
            retriable=want.retriable,
        )
        self._leases[lease.id] = lease
        want.starting += 1
        want.here = max(want.here - 1, 0)
        self._hold_back(want.key)
        self._emit(WantWorker(lease.id, want.job, want.env, want.label, want.owner == ACTORS))

    # ------------------------------------------------------------------ other nodes

    def _on_leases_placed(self, event: LeasesPlaced, now: float) -> None:
        order = event.message
        key = (order.owner, order.class_id)
        self._placed_serial = max(self._placed_serial, order.serial)
        want = self._wants.get(key)
        if want is not None and not want.guest:
            # It was announced as being elsewhere, and elsewhere is here.
            count = min(order.count, want.elsewhere)
            want.elsewhere -= count
            want.here += count
            want.queues = order.queue
        elif order.count > 0:
            self._jobs[order.owner] = order.job
            if want is None:
                want = self._add(guest(order), now)
            want.count += order.count
            want.queues = order.queue or (want.queues and want.unmet > order.count)
        self._schedule(now)

    def _refuse_what_waits(self) -> bool:
        """What was placed here and does not fit must not wait here, unless it is to queue. True if there was any."""
        any_refused = False
        for want in list(self._wants.values()):
            if want.queues or not (want.guest or want.here):
                continue
            refused = want.unmet if want.guest else want.here
            if want.starting >= STARTING_PER_DEMAND_MAX or not refused:
                continue  # it has resources, and goes on when the first of them have workers
            any_refused = True
            self._report_now()
            self._emit(ToControl(refusal(want, refused, self._why(want.key) if want.bundles is not None else "")))
            if want.guest:
                want.count -= refused
                self._cancel_surplus(want)
            else:
                want.here = 0
                want.heard -= refused
                want.told_heard -= refused
                want.told += refused
        return any_refused

    def _on_guest_withdrawn(self, event: GuestWithdrawn, now: float) -> None:
        key = (event.message.owner, event.message.class_id)
        want = self._wants.get(key)
        if want is not None and want.guest and want.queues:
            # One lease stood in line. What was placed here beside it is refused if it does not fit.
            want.count = max(want.count - 1, want.starting)
            want.queues = False
            self._cancel_surplus(want)
            self._schedule(now)

    def _on_elsewhere(self, event: Elsewhere, now: float) -> None:
        told = event.message
        want = self._wants.get((told.owner, told.class_id))
        if want is None or want.guest:
            return
        want.elsewhere = max(want.elsewhere + told.count, 0)
        want.heard += told.count
        # The control service has counted this already.
        want.told_heard += told.count
        want.told = max(want.told - told.count, 0)
        self._schedule(now)

    def _on_told_elsewhere(self, event: ToldElsewhere, now: float) -> None:
        assert isinstance(event.message, LeaseGranted | LeaseFailed)
        key = (event.owner, event.message.class_id)
        if isinstance(event.message, LeaseGranted) and event.owner in self._jobs:
            self._granted[key] = self._granted.get(key, 0) + 1
        want = self._wants.get(key)
        if want is None or want.guest:
            return
        if isinstance(event.message, LeaseFailed):
            want.count = want.elsewhere = 0
        else:
            want.elsewhere = max(want.elsewhere - 1, 0)
            want.count = max(want.count - 1, 0)
            self._waits.moved(want, now)
        self._cancel_surplus(want)
        self._schedule(now)

    def _on_hopeless(self, event: NowHopeless, now: float) -> None:
        want = self._wants.get((event.message.owner, event.message.class_id))
        if want is not None and want.waits:
            self._waits.remove(want)
            want.hopeless = event.message.reason
            self._begin_wait(want, now)

    def _on_company(self, event: Company, now: float) -> None:
        self._alone = event.alone
        for want in list(self._wants.values()):
            if want.guest:
                # An actor that queues on the only node may find room on another one.
                if not event.alone and want.owner in (ACTORS, GROUPS) and want.unmet:
                    want.queues = False
                continue
            if not event.alone:
                want.queues = False  # nor is what was placed here, while there was no other node, bound to wait here
            want.placed_only = want.needs_view(self._node, self.ledger, alone=self._alone)
            self._waits.remove(want)
            want.hopeless = ""
            self._begin_wait(want, now)
        self._schedule(now)

    def say_again(self, now: float) -> None:
        """A new control service knows of nothing: what the one before had placed may come, and is not counted on."""
        for want in self._wants.values():
            if not want.guest:
                want.elsewhere = want.here = want.heard = want.told_heard = 0
                want.told = -1
        self._placed_serial, self._reported, self._report_at = 0, ({}, 0), now
        self._schedule(now)

    def _on_job_known(self, event: JobKnown, now: float) -> None:
        self._jobs[event.proc] = event.job

    def _report(self, now: float) -> None:
        """Tell the control service what is wanted and what is free, as far as it does not know."""
        for want in self._wants.values():
            if want.guest or (self._alone and not want.placed_only):
                continue
            count = max(want.unmet - want.here, 0)
            if (count, want.heard) != (want.told, want.told_heard) and (count or want.told >= 0):
                want.told, want.told_heard = count, want.heard
                self._emit(ToControl(overflow(want, count, want.heard)))
        if self._alone or (self.ledger.available(), self._placed_serial) == self._reported:
            self._deadlines.clear("report")
        elif now >= self._report_at:
            self._report_at = now + REPORT_S
            self._report_now()
        elif "report" not in self._deadlines:
            self._deadlines.set("report", self._report_at)

    def _report_now(self) -> None:
        self._deadlines.clear("report")
        self._reported = (self.ledger.available(), self._placed_serial)
        self._emit(ToControl(messages.Resources(*self._reported)))

    # ------------------------------------------------------------------ placement groups

    def _on_bundles_wanted(self, event: BundlesWanted, now: float) -> None:
        order = event.message
        self._require((GROUPS, order.group) not in self._wants, f"group {order.group.hex()} is being prepared already")
        self._placed_serial = max(self._placed_serial, order.serial)
        want = Want(
            key=(GROUPS, order.group),
            job=order.job,
            demand=demand_of(order.bundles.values()),
            count=1,
            env=b"",
            strategy=b"",
            label=order.name,
            place={},
            guest=True,
            queues=order.queue,
            bundles=order,
        )
        self._add(want, now)
        self._schedule(now)

    def _finish_reservations(self) -> bool:
        """Forget the demands of groups that have got what they asked for. True if something is offered now."""
        offers = False
        for want in [want for want in self._turns[GROUPS].values() if not want.count]:
            self._remove(want)
            assert want.bundles is not None
            if want.bundles.commit:
                offers |= self.reservations.commit(want.bundles.group, want.bundles.attempt)
        return offers

    def _on_bundles_committed(self, event: BundlesCommitted, now: float) -> None:
        if self.reservations.commit(event.message.group, event.message.attempt):
            self._schedule(now)

    def _on_bundles_released(self, event: BundlesReleased, now: float) -> None:
        order = event.message
        waiting = self._wants.get((GROUPS, order.group))
        if waiting is not None and waiting.bundles is not None and order.attempt in (0, waiting.bundles.attempt):
            self._remove(waiting)
        if order.removed:
            self._fail_group(order.group, order.reason)
        for reservation in self.reservations.of(order.group, order.attempt):
            for lease in [x for x in self._leases.values() if reservation.has(x.allocation)]:
                self._stop_lease(lease, order.reason)
            self.reservations.release(reservation)
        self._schedule(now)

    def _fail_group(self, group: bytes, reason: str) -> None:
        """What waits to run in a group that is gone is given up. Of actors the control service knows it already."""
        for want in [want for want in self._wants.values() if want.how.group == group]:
            if not want.guest:
                self._emit(Send(want.owner, LeaseFailed(want.class_id, reason, group_removed=True)))
            want.count = want.here = want.elsewhere = 0
            self._cancel_surplus(want)

    def _stop_lease(self, lease: Lease, reason: str) -> None:
        """A lease ends with its worker, or before it has one."""
        if lease.held:
            self._emit(StopWorker(lease.proc, reason))
        else:
            self._emit(UnwantWorker(lease.id))
            self._wants[lease.key].starting -= 1
        self._end(lease)

    # ------------------------------------------------------------------ workers come

    def _on_worker_ready(self, event: WorkerReady, now: float) -> None:
        lease = self._leases.get(event.ticket)
        if lease is None or lease.held:  # withdrawn while the answer was on its way
            self._emit(FreeWorker(event.proc))
            return
        lease.proc, lease.pid, lease.since = event.proc, event.pid, now
        self._by_proc[event.proc] = lease
        want = self._wants[lease.key]
        saturated = want.unmet > 0 and not want.may_start
        want.starting -= 1
        want.count -= 1
        if want.waits:
            self._waits.moved(want, now)
        gpu_ids = lease.allocation.gpu_ids
        if lease.label:
            self._emit(Labelled(event.proc, lease.label))
        owner, name = lease.key
        if isinstance(name, bytes):
            self._emit(ActorPlaced(name, want.incarnation, event.proc, event.pid, gpu_ids, want.retriable))
        else:
            if not want.guest:
                self._granted[lease.key] = self._granted.get(lease.key, 0) + 1
            self._emit(Send(owner, LeaseGranted(name, lease.id, event.proc, self._node, event.pid, gpu_ids)))
        if want.count == 0:
            self._remove(want)
        elif saturated:
            self._schedule(now)

    def _on_starts_delayed(self, event: StartsDelayed, now: float) -> None:
        self._starts_delayed = event.text

    def _on_worker_unavailable(self, event: WorkerUnavailable, now: float) -> None:
        lease = self._leases.get(event.ticket)
        if lease is None or lease.held:
            return
        want = self._wants[lease.key]
        self._end(lease)
        want.starting -= 1
        owner, name = lease.key
        if isinstance(name, bytes):
            self._emit(ActorUnplaceable(name, want.incarnation, event.reason))
        else:
            self._emit(Send(owner, LeaseFailed(name, event.reason)))
        want.count = want.here = want.elsewhere = 0
        self._cancel_surplus(want)
        self._schedule(now)

    # ------------------------------------------------------------------ ends of leases

    def _on_return(self, event: Received, message: LeaseReturn, now: float) -> None:
        lease = self._leases.get(message.lease)
        if lease is None:
            return  # its worker died while the message was on its way
        if lease.owner != event.sender or not lease.held:
            self._emit(Log(f"process {event.sender:016x} returned lease {message.lease}, which is not its own"))
            return
        self._end(lease)
        if message.reusable:
            self._emit(FreeWorker(lease.proc))
        else:
            self._emit(StopWorker(lease.proc, "its owner did not want it to be used again"))
        self._schedule(now)

    def _on_retired(self, event: Received, message: Retired, now: float) -> None:
        lease = self._by_proc.get(event.sender)
        self._emit(WorkerRetired(event.sender))
        if lease is not None:
            self._end(lease)
            self._schedule(now)

    def _on_kept(self, event: Received, message: LeaseKept, now: float) -> None:
        lease = self._leases.get(message.lease)
        if lease is not None and lease.owner == event.sender and lease.reclaimed and not lease.kept:
            lease.kept = True
            self._kept += 1
            self._schedule(now)

    def _withdraw_reclaims(self, blocked: list[Want]) -> None:
        """What is in use, and not needed any more by those who wait, may stay so."""
        if not self._kept:
            return
        for lease in fairness.needless_reclaims(blocked, self._ended_by_owners(), self.ledger):
            lease.reclaimed = lease.kept = False
            self._kept -= 1
            self._emit(Send(lease.owner, LeaseReclaim(lease.id, wanted=False, node=self._node)))

    def _on_worker_gone(self, event: WorkerGone, now: float) -> None:
        lease = self._by_proc.get(event.proc)
        if lease is not None:
            self._end(lease)
            self._schedule(now)

    def _on_unreachable(self, event: PeerUnreachable, now: float) -> None:
        """A lease that its owner cannot use ends. An actor is not harmed by one who cannot call it; to that one alone
        it is as if it were dead.
        """
        lease = self._by_proc.get(event.proc)
        if lease is None:
            return
        owner, name = lease.key
        if isinstance(name, bytes):
            text = f"actor {lease.label or name.hex()} cannot be reached, though it lives: {event.cause}"
            cause = text.encode()
            state = ActorState(name, ACTOR_DEAD, 0, self._node, 0, CAUSE_TEXT, cause, 0, lease.pid)
            self._emit(Send(event.asker, state))
        elif owner == event.asker:
            self._end(lease)
            self._emit(StopWorker(event.proc, event.cause))
            self._schedule(now)

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        self._jobs[event.proc] = event.job

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._jobs.pop(event.proc, None)
        self._pressed.pop(event.proc, None)
        for lease in [x for x in self._leases.values() if x.owner == event.proc]:
            self._stop_lease(lease, "the process that it worked for has ended")
        for want in list(self._turns.get(event.proc, {}).values()):
            want.told = -1  # the control service hears of the owner's end itself
            self._remove(want)
        for key in [key for key in self._limits if key[0] == event.proc]:
            del self._limits[key]
        for key in [key for key in self._granted if key[0] == event.proc]:
            del self._granted[key]
        self._schedule(now)

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.id]
        self._kept -= lease.kept
        if lease.held:
            del self._by_proc[lease.proc]
        self.ledger.give(lease.allocation)
        self._hold_back(lease.key)

    def _on_limit(self, event: LimitLeases, now: float) -> None:
        key = (event.owner, event.name)
        if event.limit is None:
            self._limits.pop(key, None)
        elif event.owner == ACTORS or event.owner in self._jobs:
            self._limits[key] = event
        self._hold_back(key)
        self._schedule(now)

    def _hold_back(self, key: Key) -> None:
        """Note at a demand whether there may be another lease of it, whenever its limit or their number has changed."""
        want = self._wants.get(key)
        if want is None:
            return
        limited = self._limits.get(key)
        want.held_back = ""
        if limited is not None and limited.limit is not None:
            leases = sum(lease.key == key for lease in self._leases.values())
            want.held_back = limited.reason if leases >= limited.limit else ""

    # ------------------------------------------------------------------ CPUs lent while waiting

    def _on_blocked(self, event: Received, message: Blocked, now: float) -> None:
        lease = self._by_proc.get(event.sender)
        if lease is not None and self.ledger.lend_cpu(lease.allocation):
            self._schedule(now)

    def _on_unblocked(self, event: Received, message: Unblocked, now: float) -> None:
        lease = self._by_proc.get(event.sender)
        if lease is not None:
            self.ledger.retake_cpu(lease.allocation)

    # ------------------------------------------------------------------ time

    def _on_tick(self, event: Tick, now: float) -> None:
        for key in self._deadlines.due(now):
            if key == "hold":
                # Waiting for room has taken too long: others go on, and the demand must be passed over
                # more often before it holds them up again.
                for want in self._wants.values():
                    fairness.give_up_hold(want)
            elif key == "calm":
                for owner in self._pressed:
                    self._emit(Send(owner, Pressure(False)))
                self._pressed.clear()
        self._schedule(now)
        self._tell_waits(now)

    def _reclaim(self, lease: Lease) -> bool:
        if lease.reclaimed:
            return False
        lease.reclaimed = True
        self._emit(Send(lease.owner, LeaseReclaim(lease.id, wanted=True, node=self._node)))
        return True

    # ------------------------------------------------------------------ reasons

    def _why(self, key: Key) -> str:
        want = self._wants.get(key)
        if want is None:
            return "nothing of this kind waits for a worker"
        if reason := self._infeasible(want):
            return reason
        if want.unmet == 0:
            delayed = f", but {self._starts_delayed}" if self._starts_delayed else ""
            return f"has its resources; its worker process is being started{delayed}"
        if want.held_back:
            return f"waits: {want.held_back}"
        lacking = self.ledger.lacking(want.demand)
        if not lacking:
            return f"needs {show_demand(want.demand)}; waits its turn behind a larger demand that waited longer"
        holders = [lease for lease in self._leases.values() if lease.allocation.holds(lacking[0]) > 0]
        users = [f"{x.label or 'unnamed'} (pid {x.pid})" for x in holders]
        return lease_words.lacking(want, lacking[0], self.ledger, [*users, *self.reservations.users(lacking[0])])

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        ledger = self.ledger
        for name, total in ledger.total.items():
            held = sum(lease.allocation.holds(name) for lease in self._leases.values())
            held += self.reservations.holds(name)
            self._require(held + ledger.free[name] == total, f"{name} does not add up")
            self._require(is_cpu(name) or ledger.free[name] >= 0, f"{name} is oversubscribed")
        self._require(all(want.count for want in self._turns.get(GROUPS, {}).values()), "a group waits for nothing")
        waiting = {key: want for key, want in self._wants.items() if want.waits}
        self._require(self._waits.members() == waiting, "a demand waits in no group, or in another's")
        for key, want in self._wants.items():
            starting = sum(x.key == key and not x.held for x in self._leases.values())
            self._require(starting == want.starting, f"starting leases of {key} miscounted")
            self._require(0 <= want.starting <= want.count, f"{key} has more leases starting than wanted")
            self._require(self._turns[want.owner][key] is want, f"{key} has no turn")
            self._require(want.owner in (ACTORS, GROUPS) or want.owner in self._jobs, f"{key} is wanted by the dead")
        self._require(self._kept == sum(lease.kept for lease in self._leases.values()), "kept leases miscounted")
        for key, limited in self._limits.items():
            self._require(key[0] == ACTORS or key[0] in self._jobs, f"{key} of the dead is limited")
            if (limited_want := self._wants.get(key)) is not None:
                leases = sum(lease.key == key for lease in self._leases.values())
                held_back = limited.limit is not None and leases >= limited.limit
                self._require(bool(limited_want.held_back) == held_back, f"{key} is held back wrongly")
        for lease in self._leases.values():
            self._require(lease.reclaimed or not lease.kept, f"lease {lease.id} is kept from nobody")
            self._require(lease.owner == ACTORS or lease.owner in self._jobs, f"lease {lease.id} of the dead")
            self._require(lease.held or lease.key in self._wants, f"lease {lease.id} starts unwanted")
        self._require(
            {x.proc: x.id for x in self._leases.values() if x.held}
            == {proc: x.id for proc, x in self._by_proc.items()},
            "a worker serves two leases",
        )
        self._require(not fairness.overlooked(self._turns, ledger), "something that fits waits")
