"""Events and effects between the machines of one node, and between them and the shell.

An event among the effects of one machine is addressed to its siblings; `manager` passes it on.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.machine import Effect, Event
from ray._node.peer_protocol import PeerMessage  # noqa: TC001  (msgspec reads the annotation)
from ray._node.register import Record  # noqa: TC001  (msgspec reads the annotation)
from ray._protocol import RETRY_CHARGED, EstateQuestion, Message

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
    """Another node is reached at this address; "" if it is not. That of a `relayed` one is the head's."""

    node: int
    address: str
    relayed: bool = False


class CallBack(Effect, frozen=True):
    """Connect to another node, to take a connection that it holds for this one."""

    node: int
    ticket: int


class StrangerCame(Event, frozen=True):
    """Somebody on another machine wants a process that is not on this node. It is held for `CALL_BACK_S_MAX`."""

    ticket: int
    target: int


class RefuseStranger(Effect, frozen=True):
    """Nobody knows the process that it wants."""

    ticket: int


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


class Asked(Event, frozen=True):
    """The head asks whether this node lives, and is answered. `heard` is the last answer that had come there."""

    serial: int
    heard: int


# ------------------------------------------------------------------ the fence


class Welcomed(Event, frozen=True):
    """A head has heard this node's last greeting, and the node is part of its cluster."""


class HeadAbsent(Event, frozen=True):
    """A look for a head that began at `asked_at` found that nobody listens there: none runs."""

    asked_at: float


class ActorGuarded(Event, frozen=True):
    """A worker is about to become an actor that the head may start anew elsewhere if this node is lost."""

    proc: int
    pid: int


class Freeze(Effect, frozen=True):
    """Stop these workers where they are. The pids belong to children that were not reaped yet."""

    pids: tuple[int, ...]


class Thaw(Effect, frozen=True):
    """Let workers go on that were stopped."""

    pids: tuple[int, ...]


class Guard(Effect, frozen=True):
    """Have the zygote stop guarded workers if it hears of no later time before this one (of the monotonic clock)."""

    until: float
    added: tuple[int, ...]
    gone: tuple[int, ...]


class ZygoteFenced(Event, frozen=True):
    """The zygote has stopped the workers that it guards, because their time was over."""


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
    retry: int = RETRY_CHARGED
    """As in `WorkerDied`."""


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
    """Outcome of `ReadLogTail`, with how many descriptors the node itself has then.

    `oom_kill` says who counted that the kernel ended a process for want of memory just before; empty if nobody did.
    """

    proc: int
    lines: tuple[str, ...]
    node_usage: DescriptorUsage = DescriptorUsage()
    oom_kill: str = ""


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
    """Read the last lines of the worker's log; answered by `LogTail` before anything else happens.

    `unexplained`: it was killed by SIGKILL, and not by this node.
    """

    proc: int
    pid: int
    unexplained: bool = False


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

    With `to` 0 it is for the node itself: nothing is sent, and other nodes see of it what is pulled into it. A failure
    comes back as `SegmentFailed`; nothing was sent then.
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


class OwnersAsked(Event, frozen=True):
    """The control service has asked these members of other nodes for their blocks in an adopted segment.

    The list is complete: who is not in it has ended, or never was.
    """

    segment: int
    procs: tuple[int, ...]


class MayHaveMissed(Event, frozen=True):
    """What was said to these members of other nodes lately may have been lost with a link; they still live."""

    procs: tuple[int, ...]


class DropSegment(Effect, frozen=True):
    """Close the node's descriptor; the memory goes when the last mapping goes."""

    segment: int


# ------------------------------------------------------------------ estates <-> shell, segments, other nodes


class ReadRegister(Effect, frozen=True):
    """Read and close the register of a worker that has ended; `RegisterRead` comes before anything else happens."""

    proc: int


class RegisterRead(Event, frozen=True):
    """Outcome of `ReadRegister`; no records if there is no register, or nothing in it."""

    proc: int
    records: tuple[Record, ...]


class Departed(Event, frozen=True):
    """What the worker left is known: others may hear of its end."""

    gone: WorkerGone


class BlocksHeld(Event, frozen=True):
    """Blocks of this node's segments belong to estates of this node. So do spilled values, as a segment each."""

    segment: int
    offsets: tuple[int, ...]


class BlockUnneeded(Event, frozen=True):
    """A block of this node, or a spilled value, is needed by no estate any more. Somebody may still have it mapped."""

    segment: int
    offset: int


class EstatesAsked(Event, frozen=True):
    """Another node asks which blocks of one of its segments belong to estates of this node."""

    node: int
    segment: int


class ToManager(Effect, frozen=True):
    """A message for the manager of another node, in the order of what this one tells the control service.

    `proc` is the member of this node that says it; 0 if the node itself does.
    """

    node: int
    message: Message
    proc: int = 0


class AskedElsewhere(Event, frozen=True):
    """A member of this node claims, or gives up, what workers of another node have left."""

    proc: int
    question: EstateQuestion


class AnswerPassed(Event, frozen=True):
    """Another node has answered a member of this one about these objects."""

    proc: int
    objects: list[bytes]


# ------------------------------------------------------------------ pulls <-> segments


class RoomWanted(Event, frozen=True):
    """Pulls needs a segment for a copy of `size` bytes. Answered by `RoomGranted` or `RoomDenied` with the ticket; at
    once, unless it `waits`: what is copied only because it will be needed must not stand in the way of what is.
    """

    ticket: int
    node: int
    size: int
    waits: bool = True


class RoomUnwanted(Event, frozen=True):
    """The ticket is withdrawn; what was granted already comes back by `RoomReturned`."""

    ticket: int
    node: int


class RoomGranted(Event, frozen=True):
    """The segment is the node's own until it is returned or evicted. Its memory file is made before this is heard."""

    ticket: int
    segment: int
    size: int


class RoomDenied(Event, frozen=True):
    """There is no room, or the system refused the memory file; also after `RoomGranted`, which is void then."""

    ticket: int
    text: str
    disk_full: bool = False


class RoomReturned(Event, frozen=True):
    """The copy did not come about. Its memory is not used again: parts of it may be on their way to other nodes."""

    segment: int


class CopyIdle(Event, frozen=True):
    """Nobody on this node holds the copy in this segment: it is a cache, to be evicted when room is needed."""

    segment: int


class CopyHeld(Event, frozen=True):
    """Somebody holds the copy again. Heard before anything else is, so no eviction comes in between."""

    segment: int


class CopyEvicted(Event, frozen=True):
    """An idle copy's segment was needed for something else."""

    segment: int


# ------------------------------------------------------------------ segments <-> spills


class RoomShort(Event, frozen=True):
    """Segments tells spills and estates how many bytes should leave memory, at each change. `waits`: somebody waits for
    them, and what is kept on suspicion should go; otherwise only the high-water mark is exceeded.
    """

    bytes: int
    waits: bool


class RoomProgress(Event, frozen=True):
    """Spills tells segments that values have left memory, so room is about to be made; or, with a text, why not."""

    trouble: str
    disk_full: bool = False


class RoomStalled(Event, frozen=True):
    """Segments tells pulls that somebody waits for room, and nobody has been given any for a while. `others`: not only
    copies wait, but also values that a process makes.
    """

    others: bool


# ------------------------------------------------------------------ pulls <-> spills


class RestoreWanted(Event, frozen=True):
    """Pulls has a segment for a value that is on the disk of this node. Answered by `PullDone` with the ticket."""

    ticket: int
    spill: int
    object: bytes
    len: int
    segment: int


class LocateSpill(Event, frozen=True):
    """Another node is to pull a spilled value, from `sources`, of which this node itself is one: spills knows where the
    value is, and answers with `Located`.
    """

    node: int
    spill: int
    object: bytes
    sources: tuple[tuple[int, int, int], ...]


# ------------------------------------------------------------------ spills <-> shell


class SpillPiece(msgspec.Struct, frozen=True):
    """A value on its way into a spill file, at `at`: a block of a segment, or a record of another spill file."""

    object: bytes
    source: int
    offset: int
    len: int
    at: int


class WriteSpill(Effect, frozen=True):
    """Write a spill file. Answered by `SpillWritten`; the segments are read until then."""

    file: int
    pieces: tuple[SpillPiece, ...]


class SpillWritten(Event, frozen=True):
    """Outcome of `WriteSpill`. `kind` is empty if all is written; otherwise there is no file, and it is "full" if the
    disk has no room, else "damaged" or "io".
    """

    file: int
    kind: str
    error: str


class ReadSpill(Effect, frozen=True):
    """Read a value of a spill file into the start of a segment. Answered by `SpillRead`."""

    ticket: int
    file: int
    object: bytes
    at: int
    len: int
    segment: int


class SpillRead(Event, frozen=True):
    """Outcome of `ReadSpill`, after which nothing is written to the segment any more. `kind` is empty if the value is
    there, "damaged" if it will never be, "io" if it may be another time.
    """

    ticket: int
    kind: str
    error: str


class OfferSpill(Effect, frozen=True):
    """Let other nodes pull from this spill file, as from a segment of its number. May come several times."""

    file: int


class DeleteSpill(Effect, frozen=True):
    """Delete a spill file."""

    file: int


# ------------------------------------------------------------------ pulls <-> shell


class StartPull(Effect, frozen=True):
    """Pull a block into a segment of this node, from the first of `sources` (node, address, segment, offset) that
    delivers. Answered by `PullDone` with the same ticket.
    """

    ticket: int
    sources: tuple[tuple[int, str, int, int], ...]
    len: int
    segment: int


class CancelPull(Effect, frozen=True):
    """End a pull soon. `PullDone` still comes."""

    ticket: int


class PullDone(Event, frozen=True):
    """A pull has ended, and nothing is written to its segment any more. `error` is empty when every byte is there.

    `failures` are the sources that did not deliver: node, whether it said that it does not have the block, and why.
    """

    ticket: int
    error: str
    failures: tuple[tuple[int, bool, str], ...] = ()
    bytes: int = 0


class ShareCopy(Effect, frozen=True):
    """Send a copy's segment as `Pulled`."""

    to: int
    corr: int
    segment: int
    size: int
    offset: int


# ------------------------------------------------------------------ other nodes


class PeerJoined(Event, frozen=True):
    """Another node can be reached, for blocks at `address` (ip:port). Comes again when the address changes."""

    node: int
    address: str


class LinkLost(Event, frozen=True):
    """The link to another node broke, with what was on its way; the next message makes another. The node may live."""

    node: int


class PeerLeft(Event, frozen=True):
    """Another node has left the cluster for good; its number is never used again."""

    node: int


class ToPeer(Effect, frozen=True):
    """Send a message to another node. Lost silently if it is gone; its `PeerLeft` follows anyway."""

    node: int
    message: PeerMessage


class FromPeer(Event, frozen=True):
    """Another node sent a message."""

    node: int
    message: PeerMessage


# ------------------------------------------------------------------ memory <-> shell, leases, workers


class MemoryUse(msgspec.Struct, frozen=True):
    """How much of one limit is used, in bytes. `name` says whose limit it is."""

    name: str
    limit: int
    used: int


class ProcessUse(msgspec.Struct, frozen=True):
    """What a process has in memory, in bytes, and what it is. The object store's shared memory has the pid 0."""

    pid: int
    bytes: int
    command: str


class ReadMemory(Effect, frozen=True):
    """Look at the use of memory; answered by `MemoryRead` before anything else happens."""

    detailed: bool = False


class MemoryRead(Event, frozen=True):
    """Outcome of `ReadMemory`: every limit above the node; if it was to be detailed, what each process has."""

    uses: tuple[MemoryUse, ...]
    processes: tuple[ProcessUse, ...] = ()


class MemoryStalled(Event, frozen=True):
    """The kernel says that processes wait for memory."""


class EvictWorker(Event, frozen=True):
    """Memory tells workers to end one at once. `cause` is what is told instead of how it ended; `retry` as in
    `WorkerDied`.
    """

    proc: int
    cause: str
    retry: int


class LimitLeases(Event, frozen=True):
    """Memory tells leases how many of one demand there may be at a time, or None for as many as fit.

    `owner` and `name` are a lease's key; `reason` completes "waits: ...".
    """

    owner: int
    name: int | bytes
    limit: int | None
    reason: str = ""
