"""The worker pool of one node: which processes there are, and what each is good for.

Owns every worker from the decision to fork it to the reaping of its process. Knows nothing of resources
or owners: whoever wants a worker holds a ticket.

A worker serves one job and one environment (its *kind*) for its whole life. Its states:

    forking -> joining -> idle <-> busy        the usual life
    idle -> leaving -> idle or gone            asked to end; stays if it owns what others need
    busy -> retired -> gone                    takes no more tasks; stays while it owns what others need
    any -> dying -> gone                       killed, or its connection closed

Invariants: a ticket waits or has got exactly one worker; no ticket waits while a worker of its kind is
idle; at most `FORKS_MAX` processes are on their way at a time, and at most `WORKERS_MAX` exist; every
state that must end has a deadline.
"""

from __future__ import annotations

import signal
from collections import deque
from typing import TYPE_CHECKING, Final

from ray._control.machine import Deadlines, Log, Machine, Notify, ProcessJoined, Send, Tick
from ray._node.events import (
    ChildExited,
    Disconnect,
    EvictWorker,
    ExitAnnounced,
    Fork,
    Forked,
    ForkFailed,
    ForkServerSilent,
    FreeWorker,
    JobEnded,
    Kill,
    Labelled,
    LogTail,
    PeerGivenUp,
    ReadLogTail,
    StartsDelayed,
    StopWorker,
    UnwantWorker,
    WantWorker,
    WorkerGone,
    WorkerLeft,
    WorkerReady,
    WorkerRetired,
    WorkerUnavailable,
    ZygoteLost,
)
from ray._node.exits import describe_exit
from ray._node.worker_records import STARTING, Ended, Kind, Ticket, Worker
from ray._protocol import RETRY_CHARGED, ROLE_WORKER, Exit

if TYPE_CHECKING:
    from collections.abc import Callable

FORKS_MAX: Final = 16
"""Processes on their way from fork to join at a time; more would only slow each other down."""

WORKERS_MAX: Final = 4096
"""Processes that may exist at a time. Beyond it tickets wait until a worker ends or becomes idle."""

FORK_TRIES: Final = 3
"""Failures in a row after which the tickets of a kind are refused."""

KILLED_TRIES: Final = 20
"""The same where something outside killed them: that says little about whether the next one can start."""

FORK_DEADLINE_S: Final = 60.0
"""From the wish to fork until the zygote has answered. The shell replaces one that does not answer much earlier, which
is no failure of the worker; so this is for a zygote that answers others."""

START_DEADLINE_S: Final = 10.0
"""From the fork until the worker has joined; then it is killed and counts as a failure."""

IDLE_S: Final = 5.0
"""An idle worker above the limit is asked to end after this time. A burst of tasks without CPUs leaves tens of them,
each with megabytes of its own; forking one anew takes milliseconds, so that a program that pauses between bursts for
longer than this hardly notices."""

LEAVING_S: Final = 5.0
"""A worker that was asked to end and has not by then has a reason to stay."""

CLOSED_S: Final = 1.0
"""From the loss of a worker's connection to the kill: time for a process to finish ending by itself."""

ANNOUNCED_S: Final = 5.0
"""The same for a worker that announced its end: exit handlers run."""

REKILL_S: Final = 5.0
"""A killed process that is still there (in an uninterruptible wait) is mentioned and killed again."""


UNCLAIMED_EXITS: Final = 1024
"""Exits of children that no `Forked` has named yet; older ones are forgotten."""


ENDED_REMEMBERED: Final = 1000
"""Ended workers that can be listed; older ones are forgotten."""


class WorkerPool(Machine):
    """See the module's docstring.

    Args:
        new_id: Draws process ids: random in production, numbers in tests.
        idle_limit: Idle workers kept for ever; those above it end after `IDLE_S`.
    """

    def __init__(self, *, new_id: Callable[[], int], idle_limit: int, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._new_id = new_id
        self._idle_limit = idle_limit
        self._workers: dict[int, Worker] = {}
        self._by_pid: dict[int, Worker] = {}
        self._idle: dict[Kind, dict[int, Worker]] = {}
        """Most recently used last; it is taken first, for its caches are warm and the others may end."""
        self._tickets: dict[int, Ticket] = {}
        self._starting: dict[Kind, int] = {}
        self._failures: dict[Kind, int] = {}
        self._unclaimed: deque[tuple[int, int, float]] = deque(maxlen=UNCLAIMED_EXITS)
        self._ended: deque[Ended] = deque(maxlen=ENDED_REMEMBERED)
        self._deadlines: Deadlines[int] = Deadlines()
        self._delayed = ""
        """Why no worker can be started just now; empty if one can."""
        self._events = {
            WantWorker: self._on_want,
            UnwantWorker: self._on_unwant,
            FreeWorker: self._on_free,
            StopWorker: self._on_stop,
            EvictWorker: self._on_evict,
            WorkerRetired: self._on_retired,
            ExitAnnounced: self._on_announced,
            PeerGivenUp: self._on_given_up,
            JobEnded: self._on_job_ended,
            Forked: self._on_forked,
            ForkFailed: self._on_fork_failed,
            ZygoteLost: self._on_zygote_lost,
            ForkServerSilent: self._on_fork_server_silent,
            ProcessJoined: self._on_joined,
            WorkerLeft: self._on_left,
            ChildExited: self._on_exited,
            LogTail: self._on_log_tail,
            Tick: self._on_tick,
        }

    # ------------------------------------------------------------------ queries

    def job_of(self, proc: int) -> int:
        """The job that a worker serves; 0 if it is none of ours."""
        worker = self._workers.get(proc)
        return worker.kind[0] if worker is not None else 0

    def living(self) -> list[Worker]:
        """Every worker, to be looked at."""
        return list(self._workers.values())

    def ended(self) -> list[Ended]:
        """Those that were there, as far as they are remembered, oldest first."""
        return list(self._ended)

    def pids(self) -> list[int]:
        """Every process that was forked and not reaped."""
        return list(self._by_pid)

    def expects(self, proc: int) -> bool:
        """Whether a worker with this id is on its way."""
        worker = self._workers.get(proc)
        return worker is not None and not worker.joined and worker.state in STARTING

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def statistics(self) -> dict[str, int]:
        """Counts for people and tests."""
        counts = {"workers": len(self._workers), "tickets_waiting": len(self._tickets)}
        for state in ("forking", "joining", "idle", "busy", "leaving", "retired", "dying"):
            counts[f"workers_{state}"] = sum(x.state == state for x in self._workers.values())
        return counts

    # ------------------------------------------------------------------ tickets

    def _on_want(self, event: WantWorker, now: float) -> None:
        kind = (event.job, event.env)
        idle = self._idle.get(kind)
        if idle:
            self._assign(event.ticket, self._take_idle(kind, next(reversed(idle))), now)
            return
        self._tickets[event.ticket] = Ticket(event.ticket, kind, event.label)
        self._start_forks(now)

    def _on_unwant(self, event: UnwantWorker, now: float) -> None:
        # A process on its way is left alone: it will be idle, and is likely to be wanted soon.
        self._tickets.pop(event.ticket, None)

    def _assign(self, ticket: int, worker: Worker, now: float) -> None:
        self._set_state(worker, "busy", now)
        self._emit(WorkerReady(ticket, worker.proc, worker.pid))

    def _on_free(self, event: FreeWorker, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and worker.state == "busy":
            self._emit(Labelled(worker.proc, ""))
            self._make_idle(worker, now)

    def _make_idle(self, worker: Worker, now: float) -> None:
        """Give the worker to the first ticket of its kind, or keep it."""
        for ticket in self._tickets.values():
            if ticket.kind == worker.kind:
                del self._tickets[ticket.id]
                self._assign(ticket.id, worker, now)
                return
        self._set_state(worker, "idle", now, deadline=now + IDLE_S)
        self._idle.setdefault(worker.kind, {})[worker.proc] = worker
        self._start_forks(now)  # at the limit of processes, an idle one can make room

    def _take_idle(self, kind: Kind, proc: int) -> Worker:
        idle = self._idle[kind]
        worker = idle.pop(proc)
        if not idle:
            del self._idle[kind]
        return worker

    # ------------------------------------------------------------------ starting

    def _start_forks(self, now: float) -> None:
        """Fork for tickets that no process on its way will serve, in the order of the tickets."""
        coming = dict(self._starting)
        total = sum(coming.values())
        for ticket in self._tickets.values():
            if coming.get(ticket.kind, 0) > 0:
                coming[ticket.kind] -= 1
                continue
            if total >= FORKS_MAX:
                return
            if len(self._workers) >= WORKERS_MAX:
                self._make_room(now)
                return
            total += 1
            self._fork(ticket.kind, now)

    def _fork(self, kind: Kind, now: float) -> None:
        proc = self._new_id()
        self._require(proc not in self._workers, f"process id {proc} drawn twice")
        worker = Worker(proc, kind, "forking", now, started=now)
        self._workers[proc] = worker
        self._starting[kind] = self._starting.get(kind, 0) + 1
        self._deadlines.set(proc, now + FORK_DEADLINE_S)
        self._emit(Fork(proc, *kind))

    def _make_room(self, now: float) -> None:
        """At `WORKERS_MAX`: ask the worker that has been idle for longest to end."""
        idle = [worker for kind in self._idle.values() for worker in kind.values()]
        if idle and not any(x.state == "leaving" for x in self._workers.values()):
            self._ask_to_leave(min(idle, key=lambda worker: worker.since), now)

    def _on_forked(self, event: Forked, now: float) -> None:
        self._starts_again()
        worker = self._workers.get(event.proc)
        exit_code = self._claim_exit(event.pid, now)
        if worker is None:
            # Given up while the zygote was at it. Should it join before the kill, it is turned away.
            if exit_code is None:
                self._emit(Kill(event.pid))
            return
        if not worker.pid:
            self._set_pid(worker, event.pid)
        if exit_code is not None:
            self._exited(worker, exit_code, now)
        elif worker.state == "forking":
            self._set_state(worker, "joining", now, deadline=now + START_DEADLINE_S)
        elif worker.state == "dying":
            self._emit(Kill(event.pid))

    def _claim_exit(self, pid: int, now: float) -> int | None:
        """The exit code of a child that was reaped before the zygote's report came."""
        for entry in self._unclaimed:
            # An old entry is of another process, whose number has come round again.
            if entry[0] == pid and now - entry[2] < START_DEADLINE_S:
                self._unclaimed.remove(entry)
                return entry[1]
        return None

    def _on_fork_failed(self, event: ForkFailed, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and worker.state in ("forking", "dying") and not worker.pid:
            worker.failure = worker.failure or f"the fork failed: {event.error}"
            self._forget(worker)
            self._count_failure(worker, now)

    def _on_zygote_lost(self, event: ZygoteLost, now: float) -> None:
        """Forks without a known process are repeated under new ids; it is nobody's failure."""
        self._starts_again()
        for worker in [x for x in self._workers.values() if not x.pid]:
            self._forget(worker)
        self._start_forks(now)

    def _on_fork_server_silent(self, event: ForkServerSilent, now: float) -> None:
        self._delayed = (
            f"the fork server (pid {event.pid}), which starts workers, has not answered for {event.since_s:.0f} "
            f"seconds: it is stopped, or the machine is overloaded. It is replaced after {event.replaced_s:.0f} seconds"
        )
        self._emit(StartsDelayed(self._delayed))
        self._emit(Notify(0, "warning", f"{len(self._tickets)} tasks or actors wait for workers, and {self._delayed}."))

    def _starts_again(self) -> None:
        if self._delayed:
            self._delayed = ""
            self._emit(StartsDelayed(""))

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        if event.role != ROLE_WORKER:
            return
        worker = self._workers.get(event.proc)
        if worker is None or worker.joined or worker.state not in ("forking", "joining"):
            self._emit(Disconnect(event.proc))
            return
        if not worker.pid:
            self._set_pid(worker, event.pid)
        worker.joined = True
        self._failures.pop(worker.kind, None)
        self._make_idle(worker, now)
        self._start_forks(now)

    # ------------------------------------------------------------------ ending

    def _on_stop(self, event: StopWorker, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and not worker.stopped and not worker.reaped:
            worker.stopped = True
            worker.announced = worker.announced or event.reason
            self._kill(worker, now)

    def _on_evict(self, event: EvictWorker, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and worker.state != "dying":
            worker.evicted, worker.retry = event.cause, event.retry
            self._kill(worker, now)

    def _on_retired(self, event: WorkerRetired, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and worker.joined and worker.state != "dying":
            self._unlist(worker)  # its owner may have returned it before it heard
            worker.announced = "it had reached its max_calls"
            self._set_state(worker, "retired", now)

    def _on_announced(self, event: ExitAnnounced, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and worker.state != "dying":
            worker.announced = event.reason
            self._unlist(worker)
            self._set_state(worker, "dying", now, deadline=now + ANNOUNCED_S)

    def _on_left(self, event: WorkerLeft, now: float) -> None:
        # Whose program has closed all of its descriptors is given up by its peers, too; this says more.
        lost = f"its connection to the node was lost ({event.reason}), as when a program closes all descriptors"
        self._expect_end(self._workers.get(event.proc), lost, now)

    def _on_given_up(self, event: PeerGivenUp, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is not None and worker.state != "dying":
            self._expect_end(worker, f"its connection with {event.by} was lost", now)

    def _expect_end(self, worker: Worker | None, lost: str, now: float) -> None:
        """The process should be ending by itself; if it is not, it is killed before long."""
        if worker is None or worker.reaped or worker.overdue:
            return
        grace = ANNOUNCED_S if worker.state == "leaving" else CLOSED_S
        worker.doubt = f"{lost}, and it had not ended by itself {grace:.0f} s later"
        if worker.state == "dying":
            return
        self._unlist(worker)
        self._set_state(worker, "dying", now, deadline=now + grace)

    def _on_job_ended(self, event: JobEnded, now: float) -> None:
        """Workers of the job that nobody uses or waits for end. (Its detached actors go on, and may wait.)"""
        wanted = [ticket.kind for ticket in self._tickets.values()]
        for worker in list(self._workers.values()):
            unused = worker.state in ("idle", "retired") or (worker.state in STARTING and worker.kind not in wanted)
            if worker.kind[0] == event.job and unused:
                worker.stopped, worker.announced = True, "its job has ended"
                self._kill(worker, now)

    def _ask_to_leave(self, worker: Worker, now: float) -> None:
        self._unlist(worker)
        self._set_state(worker, "leaving", now, deadline=now + LEAVING_S)
        self._emit(Send(worker.proc, Exit()))

    def _kill(self, worker: Worker, now: float) -> None:
        self._unlist(worker)
        self._set_state(worker, "dying", now, deadline=now + REKILL_S)
        if worker.pid:
            self._emit(Kill(worker.pid))

    def _unlist(self, worker: Worker) -> None:
        """Take it out of the lists from which it could be given to somebody."""
        if worker.state == "idle":
            self._take_idle(worker.kind, worker.proc)

    def _on_exited(self, event: ChildExited, now: float) -> None:
        worker = self._by_pid.get(event.pid)
        if worker is None:
            self._unclaimed.append((event.pid, event.exit_code, now))
        else:
            self._exited(worker, event.exit_code, now)

    def _exited(self, worker: Worker, exit_code: int, now: float) -> None:
        worker.reaped = True
        worker.exit_code = exit_code
        self._unlist(worker)
        self._set_state(worker, "dying", now)
        del self._by_pid[worker.pid]
        ours = worker.stopped or worker.overdue or bool(worker.evicted)
        self._emit(ReadLogTail(worker.proc, worker.pid, exit_code == -signal.SIGKILL and not ours))

    def _on_log_tail(self, event: LogTail, now: float) -> None:
        worker = self._workers.get(event.proc)
        if worker is None or not worker.reaped:
            return
        self._forget(worker)
        killed = worker.doubt if worker.overdue and worker.exit_code == -signal.SIGKILL else ""
        # It may have come to another end in the moment before the kill.
        evicted = worker.evicted if worker.exit_code == -signal.SIGKILL and not worker.stopped else ""
        cause = evicted or describe_exit(
            worker.pid,
            worker.exit_code,
            worker.announced,
            stopped=worker.stopped,
            killed=killed,
            oom_kill=event.oom_kill,
        )
        intended = bool(worker.announced) and not evicted
        ended = Ended(worker.proc, worker.pid, worker.kind[0], cause, worker.exit_code, intended, worker.started, now)
        self._ended.append(ended)
        if worker.joined:
            intended = bool(worker.announced) and not evicted
            oom, retry = bool(evicted or event.oom_kill), worker.retry if evicted else RETRY_CHARGED
            self._emit(WorkerGone(worker.proc, worker.pid, cause, event.lines, worker.exit_code, intended, oom, retry))
            self._start_forks(now)
        else:
            tail = "".join(f"\n  {line}" for line in event.lines)
            usage = event.node_usage
            poor = f"; the node has {usage}: raise its limit (ulimit -n)" if usage.is_exhausted else ""
            worker.failure = worker.failure or f"{cause} before it had joined{poor}{tail}"
            self._count_failure(worker, now)

    def _count_failure(self, worker: Worker, now: float) -> None:
        """A worker of this kind did not come to be; refuse the kind's tickets after several in a row."""
        failures = self._failures.get(worker.kind, 0) + 1
        tries = KILLED_TRIES if worker.exit_code == -signal.SIGKILL and not worker.stopped else FORK_TRIES
        self._emit(Log(f"worker start failed ({failures} of {tries}): {worker.failure}"))
        if failures >= tries:
            self._failures.pop(worker.kind, None)
            reason = f"workers cannot be started ({failures} tries in a row); the last one: {worker.failure}"
            for ticket in [x for x in self._tickets.values() if x.kind == worker.kind]:
                del self._tickets[ticket.id]
                self._emit(WorkerUnavailable(ticket.id, reason))
        elif any(ticket.kind == worker.kind for ticket in self._tickets.values()):
            self._failures[worker.kind] = failures
        else:
            self._failures.pop(worker.kind, None)
        self._start_forks(now)

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.proc]
        self._set_state(worker, "gone", worker.since)

    # ------------------------------------------------------------------ time

    def _on_tick(self, event: Tick, now: float) -> None:
        for proc in self._deadlines.due(now):
            worker = self._workers.get(proc)
            if worker is None or proc in self._deadlines:
                continue  # an earlier one of this round has changed it
            match worker.state:
                case "forking":
                    worker.failure = f"it had not been forked after {FORK_DEADLINE_S:.0f} seconds"
                    self._kill(worker, now)
                case "joining":
                    worker.failure = f"it had not joined after {START_DEADLINE_S:.0f} seconds"
                    self._kill(worker, now)
                case "idle":
                    if sum(len(kind) for kind in self._idle.values()) > self._idle_limit:
                        self._ask_to_leave(worker, now)
                case "leaving":
                    self._make_idle(worker, now)
                case "dying":
                    self._kill_again(worker, now)

    def _kill_again(self, worker: Worker, now: float) -> None:
        if not worker.pid:
            # The zygote never reported it. Forget it; if it joins late it is turned away.
            self._forget(worker)
            self._count_failure(worker, now)
            return
        self._emit(Log(f"worker process {worker.pid} has not ended by itself; killing it"))
        worker.overdue = True
        self._emit(Kill(worker.pid))
        self._deadlines.set(worker.proc, now + REKILL_S)

    def _set_pid(self, worker: Worker, pid: int) -> None:
        worker.pid = pid
        self._by_pid[pid] = worker

    def _set_state(self, worker: Worker, state: str, now: float, *, deadline: float | None = None) -> None:
        was_starting, starts = worker.state in STARTING, state in STARTING
        if was_starting and not starts:
            self._starting[worker.kind] -= 1
            if not self._starting[worker.kind]:
                del self._starting[worker.kind]
        worker.state, worker.since = state, now
        if deadline is None:
            self._deadlines.clear(worker.proc)
        else:
            self._deadlines.set(worker.proc, deadline)

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        starting: dict[Kind, int] = {}
        for worker in self._workers.values():
            if worker.state in STARTING:
                starting[worker.kind] = starting.get(worker.kind, 0) + 1
            idle = worker.proc in self._idle.get(worker.kind, {})
            self._require(idle == (worker.state == "idle"), f"{worker} is listed wrongly")
            ends = worker.state in ("forking", "joining", "leaving") or (worker.state == "dying" and not worker.reaped)
            self._require(not ends or worker.proc in self._deadlines, f"{worker} has no deadline")
            self._require(worker.state != "busy" or worker.joined, f"{worker} works without having joined")
        self._require(starting == self._starting, "starting workers miscounted")
        self._require(len(self._workers) <= WORKERS_MAX, "too many workers")
        for ticket in self._tickets.values():
            self._require(not self._idle.get(ticket.kind), f"{ticket} waits beside an idle worker")
