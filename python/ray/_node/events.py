"""Events and effects between the machines of one node, and between them and the shell.

An event among the effects of one machine is addressed to its siblings; `manager` passes it on.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.machine import Effect, Event
from ray._protocol import Message  # noqa: TC001  (msgspec reads the annotation)

# ------------------------------------------------------------------ node <-> control service


class ToControl(Effect, frozen=True):
    """A message for the control service."""

    message: Message


class FromControl(Event, frozen=True):
    """A message of the control service."""

    message: Message


class Pass(Effect, frozen=True):
    """Send a frame to members of this node, as it is."""

    procs: tuple[int, ...]
    kind: int
    corr: int
    body: bytes


class Forward(Event, frozen=True):
    """The shell has a message for a member of this node or another."""

    proc: int
    message: Message
    corr: int = 0


class Company(Event, frozen=True):
    """The first other node has joined, or the last has gone (`alone`)."""

    alone: bool


class StateAsked(Event, frozen=True):
    """The control service passes on that somebody wants to see."""

    message: Message


class KeepHistory(Effect, frozen=True):
    """Append a batch of records of a member to the event log."""

    proc: int
    pid: int
    job: int
    batch: bytes


class ListFiles(Effect, frozen=True):
    """Answer a member's request with the names and sizes of the files of an area: "logs" or "events"."""

    to: int
    corr: int
    area: str


class ReadFile(Effect, frozen=True):
    """Answer a member's request with a piece of such a file; a negative `offset` counts from its end."""

    to: int
    corr: int
    area: str
    name: str
    offset: int
    size: int


class FlushLogs(Effect, frozen=True):
    """Forward what workers have written now, also lines that are not complete."""


class KnowNode(Effect, frozen=True):
    """Another node is reached at this address; "" if it is not."""

    node: int
    address: str


class ForgetNode(Effect, frozen=True):
    """Another node is lost: connections to it and its processes are hopeless. `cause` is a sentence."""

    node: int
    cause: str


class JobKnown(Event, frozen=True):
    """The control service has numbered the job of a driver of this node."""

    proc: int
    job: int


class GivenUp(Event, frozen=True):
    """A process of another node lost its connection to this member, which has to end. `by` is that one in words."""

    proc: int
    by: str


# ------------------------------------------------------------------ leases <-> workers


class WantWorker(Event, frozen=True):
    """Leases asks for a worker. Answered by `WorkerReady` or `WorkerUnavailable` with the same ticket."""

    ticket: int
    job: int
    env: bytes
    label: str
    actor: bool


class UnwantWorker(Event, frozen=True):
    """The ticket is withdrawn; no answer will be heeded."""

    ticket: int


class WorkerReady(Event, frozen=True):
    """A joined worker is reserved for the ticket."""

    ticket: int
    proc: int
    pid: int


class WorkerUnavailable(Event, frozen=True):
    """Workers of this kind cannot be started; the reason is a sentence for the user."""

    ticket: int
    reason: str


class FreeWorker(Event, frozen=True):
    """The worker has no work any more and may serve again."""

    proc: int


class StopWorker(Event, frozen=True):
    """The worker must end at once. `reason` completes "it was stopped because ..."."""

    proc: int
    reason: str


class WorkerRetired(Event, frozen=True):
    """The worker takes no more tasks, and ends when nobody needs what it owns."""

    proc: int


class ExitAnnounced(Event, frozen=True):
    """The worker said that it is about to end by intention."""

    proc: int
    reason: str


class WorkerGone(Event, frozen=True):
    """A worker's process has ended and was reaped. Comes once for each worker that had joined.

    `cause` is a sentence with the exit code or signal; `lines` are the last lines that it logged.
    """

    proc: int
    pid: int
    cause: str
    lines: tuple[str, ...]
    exit_code: int
    intended: bool
    oom: bool


class PeerGivenUp(Event, frozen=True):
    """Another process lost its connection to this worker; it must end, now or soon.

    `by` is that process in words, such as "the driver (pid 7)".
    """

    proc: int
    by: str


class PeerUnreachable(Event, frozen=True):
    """One process cannot connect to another, which is well: `cause` is a sentence that says what is lacking where."""

    asker: int
    proc: int
    cause: str


EXHAUSTED_SHARE: Final = 0.95
"""A process with this share of its descriptors in use is taken to have had none left when a connection failed: by the
time that it is looked at it may have closed a few."""


class DescriptorUsage(msgspec.Struct, frozen=True):
    """How many descriptors a process has open, and may have; both 0 where the system does not say."""

    open: int = 0
    limit: int = 0

    @property
    def is_exhausted(self) -> bool:
        return self.limit > 0 and self.open >= self.limit * EXHAUSTED_SHARE

    def __str__(self) -> str:
        return f"{self.open} of {self.limit} descriptors open"


class LookAtDescriptors(Effect, frozen=True):
    """Count the descriptors of both, one of which has lost the other; answered by `DescriptorsSeen`."""

    asker: int
    asker_pid: int
    proc: int
    pid: int


class DescriptorsSeen(Event, frozen=True):
    """Outcome of `LookAtDescriptors`: of both processes, and of the node's, through which they connect."""

    asker: int
    proc: int
    asker_usage: DescriptorUsage
    usage: DescriptorUsage
    node_usage: DescriptorUsage


class JobEnded(Event, frozen=True):
    """A driver has gone; idle workers of its job are of no use any more."""

    job: int


# ------------------------------------------------------------------ shell -> workers


class Forked(Event, frozen=True):
    """The zygote has made the process."""

    proc: int
    pid: int


class ForkFailed(Event, frozen=True):
    """The zygote could not fork."""

    proc: int
    error: str


class ZygoteLost(Event, frozen=True):
    """The zygote died; forks that it was asked for and has not reported are void. A new one is being started."""

    cause: str


class ForkServerSilent(Event, frozen=True):
    """The zygote has left a command unanswered for `since_s`; after `replaced_s` another takes its place."""

    pid: int
    since_s: float
    replaced_s: float


class StartsDelayed(Event, frozen=True):
    """Workers tells leases that none can be started just now, and why; with an empty text, that they can again."""

    text: str


class WorkerLeft(Event, frozen=True):
    """The worker's connection to the node has closed; its process ends now or has ended."""

    proc: int
    reason: str


class ChildExited(Event, frozen=True):
    """A child was reaped. Negative codes are signals. Not every child is a worker."""

    pid: int
    exit_code: int


class LogTail(Event, frozen=True):
    """Outcome of `ReadLogTail`, with how many descriptors the node itself has then."""

    proc: int
    lines: tuple[str, ...]
    node_usage: DescriptorUsage = DescriptorUsage()


# ------------------------------------------------------------------ workers -> shell


class Fork(Effect, frozen=True):
    """Ask the zygote for a worker with this process id."""

    proc: int
    job: int
    env: bytes


class Kill(Effect, frozen=True):
    """Send SIGKILL. The pid belongs to a child that was not reaped yet."""

    pid: int


class ReadLogTail(Effect, frozen=True):
    """Read the last lines of the worker's log; answered by `LogTail` before anything else happens."""

    proc: int
    pid: int


class Labelled(Effect, frozen=True):
    """What the worker does from now on, for the names in log lines."""

    proc: int
    label: str


class Disconnect(Effect, frozen=True):
    """Close the connection of a process that has no business here."""

    proc: int


# ------------------------------------------------------------------ segments <-> shell


class GrantSegment(Effect, frozen=True):
    """Create the memory file (unless it is recycled from `recycled`), and send it as `SegmentGranted`.

    A failure comes back as `SegmentFailed`; nothing was sent then.
    """

    to: int
    corr: int
    segment: int
    size: int
    recycled: int = 0


class SegmentFailed(Event, frozen=True):
    """The system refused the memory file of a `GrantSegment`."""

    segment: int
    corr: int
    error: str


class ShareSegment(Effect, frozen=True):
    """Send an existing segment as `SegmentMapped`."""

    to: int
    corr: int
    segment: int
    size: int
    lessee: int


class DropSegment(Effect, frozen=True):
    """Close the node's descriptor; the memory goes when the last mapping goes."""

    segment: int
