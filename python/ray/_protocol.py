"""Messages between a node process and the cores of drivers and workers.

This module owns the meaning of message kinds 64 to 127 and nothing else: no socket, no state.
A message is a msgpack array whose fields stand in the order written here; the struct is chosen
by the frame's kind, so bodies carry no tag. Fields may be appended at the end with a default:
a decoder ignores what it does not know, and fills in what an older peer did not send.

Resources are ``dict[str, int]`` in units of 1/10000 ("CPU": 10000 is one CPU); memory is bytes
times 10000 alike, so that one rule holds for every name. Bytes are never decoded here unless the
docstring says that they are msgpack.

Everything that comes from a core is input from another process: it is decoded with types checked,
and a body that does not decode is an operating error of its sender.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

ROLE_NODE: Final = 1
ROLE_DRIVER: Final = 2
ROLE_WORKER: Final = 3
ROLE_TOOL: Final = 4

UNIT: Final = 10_000
"""How many wire units one whole resource has."""

ACTOR_PENDING: Final = 0
ACTOR_ALIVE: Final = 1
ACTOR_RESTARTING: Final = 2
ACTOR_DEAD: Final = 3

CAUSE_TEXT: Final = 0
"""`ActorState.cause` is UTF-8 text."""
CAUSE_INIT_ERROR: Final = 1
"""`ActorState.cause` is the error payload with which the actor's ``__init__`` failed."""
CAUSE_UNSCHEDULABLE: Final = 2
"""`ActorState.cause` is UTF-8 text: the actor asked for what no node will ever give it."""

FAILED_OTHER: Final = 0
FAILED_GROUP_REMOVED: Final = 1
"""The placement group that the demand was to run in is gone."""
FAILED_UNSCHEDULABLE: Final = 2
"""The demand is bound to a node that is gone, or that never has as much."""

RETRY_CHARGED: Final = 0
"""A repetition is one of the task's `max_retries`."""
RETRY_FREE: Final = 1
"""The node chose this worker among others of its owner: a repetition is not charged to `max_retries`."""
RETRY_NEVER: Final = 2
"""A repetition would come to the same end."""

DENIED_DISK_FULL: Final = 1
"""There is no room in the store, because there is none on the disk to which values should leave it."""
DENIED_TURN: Final = 2
"""Others need the room first: see `SegmentDenied`."""

STREAM_OUT: Final = 1
STREAM_ERR: Final = 2

LOG_MARK_BEGIN: Final = b"\x1b]1729;"
LOG_MARK_END: Final = b"\x07"
"""Around the name of the task that writes what follows in a worker's log file: an operating system command (ECMA-48)
that no terminal knows, so none shows it."""

LOG_NAME_CHARS_MAX: Final = 200
"""Characters of a name that are shown before a worker's lines."""


def log_mark(name: str) -> bytes:
    """The mark of what `name` prints; an empty name stands for the worker's own."""
    printable = "".join(char for char in name if char.isprintable())
    return LOG_MARK_BEGIN + printable[:LOG_NAME_CHARS_MAX].encode(errors="replace") + LOG_MARK_END


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages. `KINDS` says which kind a class travels as."""


# ---------------------------------------------------------------------------------------------
# From a core to its node


class LeaseDemand(Message, frozen=True):
    """An owner says how many further leases of one scheduling class it wants now.

    Replaces what the same owner said before about the same class; 0 withdraws. The node counts
    a lease against it at the moment of the grant. `env` is empty or msgpack ``{"env_vars": {..}}``;
    a worker serves one env for its whole life. `label` is what people are shown: a function's name.
    `retriable` says whether tasks of the class are repeated if their worker is ended for want of memory.
    `granted` is how many leases of the class have come to the owner, ever: those on their way are counted against
    `count` too. -1 if the owner does not say.
    """

    class_id: int
    demand: dict[str, int]
    count: int
    env: bytes = b""
    strategy: bytes = b""
    label: str = ""
    retriable: bool = True
    granted: int = -1


class LeaseReturn(Message, frozen=True):
    """The lease's owner gives the worker back; nothing of the owner runs on it any more.

    `reusable` False asks for the worker's end (max_calls reached, or a force-cancelled task). `node` is the one that
    lent the worker, as `LeaseGranted` said; 0: the receiver.
    """

    lease: int
    reusable: bool = True
    node: int = 0


class LeaseKept(Message, frozen=True):
    """Answers a `LeaseReclaim` of a lease that is in use: it comes back when that ends, nobody knows when.

    `node` as in `LeaseReturn`.
    """

    lease: int
    node: int = 0


class Blocked(Message, frozen=True):
    """A worker's main thread waits for values: the CPUs of its lease may serve others meanwhile."""


class Unblocked(Message, frozen=True):
    """The worker goes on. Its CPUs are taken again at once, even if that oversubscribes the node."""


class Retired(Message, frozen=True):
    """A worker takes no more tasks, by its own decision, and stays while others refer to values that it owns.

    Its lease ends here; its owner learned it from the worker.
    """


class SegmentRequest(Message, frozen=True):
    """A process needs shared memory. Answered under the same corr by `SegmentGranted` or `SegmentDenied`.

    `wish_bytes` is more, with room for what it may need later; it is met while the store has plenty. `min_bytes` 0
    under the corr of an earlier request withdraws that: nobody waits for it any more.
    """

    min_bytes: int
    wish_bytes: int = 0


class SegmentMap(Message, frozen=True):
    """A process met a location in a segment that it has not mapped. Answered by `SegmentMapped` or `SegmentDenied`."""

    segment: int


class SegmentRelease(Message, frozen=True):
    """The lessee returns a segment in which no block is allocated. It does not write to it any more.

    `discard`: blocks in it are retired (`BlocksRetired`), so it must not be used again.
    """

    segment: int
    discard: bool = False


class SegmentClaims(Message, frozen=True):
    """Answer to `SegmentAdopted`: the blocks in that segment which belong to objects that the sender owns.

    Sent after the sender has read everything that the dead lessee had sent it, so that a block whose
    location was still on its way is claimed too. A later answer replaces an earlier one.
    """

    segment: int
    blocks: list[tuple[int, int]]
    node: int = 0
    """Where the segment lies; 0 for the node that is told."""
    more: bool = False
    """A node's estates have these as well as what was said before."""


class BlocksFreed(Message, frozen=True):
    """Blocks of an adopted segment which the sender claimed and which nothing refers to any more. `node` as above."""

    segment: int
    offsets: list[int]
    node: int = 0


class RegisterOpened(Message, frozen=True):
    """A worker has a register of what it owns, of so many bytes; its descriptor comes along. Once at most."""

    bytes: int


class EstateQuestion(Message, frozen=True):
    """The sender holds objects whose owners have ended, workers of `node`, and claims them; others it has given up.

    What is given up counts before what is claimed. Each object that is claimed is answered once, by an `EstateAnswer`;
    from then on it is kept until the sender gives it up or ends.
    """

    node: int
    given_up: list[bytes]
    claimed: list[bytes]


class Pull(Message, frozen=True):
    """A process met a location on another node, and wants a copy here. Answered by `Pulled` or `SegmentDenied`.

    It holds the copy from the answer until `PullReleased`, or its end; until the answer it must hold a reference to the
    object. With `prefetch` it will ask again when it needs the copy: there is no answer (corr is 0), and no hold; all
    who wait for an answer come first.
    """

    object: bytes
    node: int
    segment: int
    offset: int
    len: int
    prefetch: bool = False


class PullReleased(Message, frozen=True):
    """The sender has no view on copies of this object any more, and waits for none."""

    object: bytes


class Spill(Message, frozen=True):
    """Values in segments of this node that may be spilled, after `SpillWanted`: nobody reads them, and their owner
    keeps their blocks until it has the answer, a `Spilled` with each of them.

    `owner` is the sender, or a process of another node for whom the sender allocated them. Blocks are (object, serial,
    segment, offset, length).
    """

    owner: int
    blocks: list[tuple[bytes, int, int, int, int]]


class SpillReleased(Message, frozen=True):
    """The sender owned this spilled value, and nobody needs it any more. `node` is where it lies, if not here; it is
    told then.
    """

    spill: int
    node: int = 0


class ActorCreate(Message, frozen=True):
    """The creator asks for an actor. Its id is fresh; `owner` is the process whose death ends it, unless detached.

    A node can host it if it *has* `place` in total; what it holds for its life is `run` (by default an actor
    asks for a node with one CPU and then holds none). A name should have been reserved by
    ``actor.reserve_name`` first, whose refusal the creator can raise at the call.
    """

    actor: bytes
    spec: bytes
    place: dict[str, int]
    run: dict[str, int]
    env: bytes
    strategy: bytes
    name: str
    namespace: str
    max_restarts: int
    detached: bool
    class_name: str
    owner: int
    label: str


class ActorReady(Message, frozen=True):
    """The actor's worker has run ``__init__``; calls may come."""

    actor: bytes
    incarnation: int


class ActorFailed(Message, frozen=True):
    """``__init__`` raised. `error` is a payload for callers. The actor is never restarted."""

    actor: bytes
    incarnation: int
    error: bytes


class ActorSubscribe(Message, frozen=True):
    """The sender wants an `ActorState` now and at each change. Asking twice is harmless."""

    actor: bytes


class ActorRelease(Message, frozen=True):
    """The owner says that no handle is left and no call is on its way. Ignored for detached actors."""

    actor: bytes


class ActorKill(Message, frozen=True):
    """`ray.kill`: the process is killed; it restarts only if `no_restart` is False and restarts are left."""

    actor: bytes
    no_restart: bool


class ActorExit(Message, frozen=True):
    """The actor's worker will end by intention (`exit_actor`, graceful stop): no restart."""

    actor: bytes
    incarnation: int
    reason: str


class PeerLost(Message, frozen=True):
    """The sender's connection to `proc` broke. The node answers with `WorkerDied` once it knows the cause.

    A worker that still lives then is killed: its peers have given it up already.
    """

    proc: int


class Request(Message, frozen=True):
    """A cold request: `op` names it, `args` is msgpack (array, map by argument name, or one value). See `requests`."""

    op: str
    args: bytes = b""


class WhereIsNode(Message, frozen=True):
    """The sender wants to connect to a process on `node`, another one. Answered by `NodeAddress`.

    It waits for 5 s, then gives the process up as lost, and asks again when it wants one there again. A question may
    come twice.
    """

    node: int


# ---------------------------------------------------------------------------------------------
# From the node to a core


class LeaseGranted(Message, frozen=True):
    """Worker `proc`, which lives on `node`, is yours until you return the lease or it dies.

    A lease's number is unique over all nodes. `gpu_ids` are the devices it may use.
    """

    class_id: int
    lease: int
    proc: int
    node: int
    pid: int
    gpu_ids: list[int]


class LeaseReclaim(Message, frozen=True):
    """Somebody else waits: return this lease as soon as it has no work in flight. Answered by `LeaseReturn` or
    `LeaseKept`. Sent once per lease, until `wanted` False takes it back, which is not answered.

    Who does not know of the lease returns it to `node`: the grant may have been lost with the head that passed it on.
    """

    lease: int
    wanted: bool
    node: int


class Pressure(Message, frozen=True):
    """Others wait for what this owner's leases hold: those without work go back at once, and are not kept for a next
    task, until `pressed` is False again. The owner has all leases of a node in mind, so one message does for all.
    """

    pressed: bool


class WorkerDied(Message, frozen=True):
    """A process has ended. To its lease's holder (with the lease), and to who asked with `PeerLost` (lease 0).

    `exit_code` is negative for signals. `cause` is a sentence for people, with the last log lines.
    `intended` tells an announced or requested end from a crash; `oom`, that memory was short. `retry` says what a
    repetition of the task that ran there costs, as one of the constants `RETRY_*`.
    """

    proc: int
    lease: int
    cause: str
    exit_code: int
    intended: bool
    oom: bool
    retry: int = RETRY_CHARGED


class Deaths(Message, frozen=True):
    """Processes that have ended, with a sentence on each. To every core, soon but not at once: whoever had to do
    with one of them knows already, by `WorkerDied` or by the loss of its connection; this is for the books.
    """

    dead: list[tuple[int, str]]


class SegmentGranted(Message, frozen=True):
    """A segment to allocate in, with its descriptor. `size` is at least what was asked."""

    segment: int
    size: int


class SegmentDenied(Message, frozen=True):
    """No segment. The text names capacity, use and the largest holders.

    `kept`, after a `Pull`: the value is where it was, and only a copy cannot be had here now. Otherwise who wanted to
    read it tells its owner that it is lost.

    `why`: `DENIED_DISK_FULL`; or `DENIED_TURN` after a `Pull`, whose sender lets go of what it has gathered for the
    same purpose, and asks again; it is answered when it is its turn.
    """

    message: str
    kept: bool = False
    why: int = 0


class SegmentMapped(Message, frozen=True):
    """A segment to read, with its descriptor. `lessee` is 0 when the node has adopted it."""

    segment: int
    size: int
    lessee: int


class Pulled(Message, frozen=True):
    """A segment with a copy to read, with its descriptor. The block begins at `offset`."""

    segment: int
    size: int
    offset: int


class SegmentTrim(Message, frozen=True):
    """Memory is short by `bytes`: return empty segments."""

    bytes: int


class EstateAnswer(Message, frozen=True):
    """What an estate has of objects that were claimed, and what it does not have.

    For each: its id, where the value lies (node, segment, lessee, offset, length; nothing if it lies nowhere), and its
    deed, a payload in postcard: the references of a value that lies somewhere, else the value itself; b"" is none.
    """

    found: list[tuple[bytes, list[int], bytes]]
    absent: list[bytes]


class BlocksRetired(Message, frozen=True):
    """Blocks of the receiver's segments, as (segment, offset), that belonged to an owner that has died, and that nobody
    needs. They must not be written again: nobody knows who has them mapped.
    """

    blocks: list[tuple[int, int]]


class SpillWanted(Message, frozen=True):
    """Memory is short by `bytes`: return empty segments, let go of copies that nothing views, and offer so much of
    owned values by `Spill`. To every process; those that allocated for owners on other nodes tell these.
    """

    bytes: int


class Spilled(Message, frozen=True):
    """Answer to `Spill`, to who sent that: (object, serial, number, length) of each. From now on the value is to be had
    under that number, and its block may be freed; number 0: it was not written.
    """

    owner: int
    blocks: list[tuple[bytes, int, int, int]]


class SegmentAdopted(Message, frozen=True):
    """The segment's lessee has died. Every core answers with `SegmentClaims`; frees go to the node from now on.

    `node` is where the segment lies. Members of other nodes may be asked again when their answer can have been lost.
    """

    segment: int
    node: int
    lessee: int


class ActorState(Message, frozen=True):
    """What a subscriber should believe about an actor. Incarnations never decrease.

    `proc`, `node` and `pid` are meaningful while alive, `cause` when restarting or dead
    (`cause_kind` says how to read it). `restarts_left` is -1 when unlimited.
    """

    actor: bytes
    state: int
    proc: int
    node: int
    incarnation: int
    cause_kind: int
    cause: bytes
    restarts_left: int
    pid: int


class ActorInit(Message, frozen=True):
    """The receiving worker becomes this incarnation of the actor: run ``__init__`` as `spec` says."""

    actor: bytes
    incarnation: int
    spec: bytes
    gpu_ids: list[int]
    namespace: str
    name: str


class Reply(Message, frozen=True):
    """Answer to a `Request`. `body` is msgpack: the result, or ``[exception name, message]`` when not ok."""

    ok: bool
    body: bytes


class LogLines(Message, frozen=True):
    """Complete lines that a worker wrote, in order within one stream. To the drivers of its job."""

    name: str
    pid: int
    stream: int
    lines: list[str]
    ip: str = ""
    """What the worker's node calls itself."""


class Notice(Message, frozen=True):
    """Something a person should know now, such as a demand that no node can meet. To drivers."""

    level: str
    text: str


class LeaseFailed(Message, frozen=True):
    """No worker for this class can be had; the demand is dropped. The owner fails what waits for it.

    `code` says which error that is, as one of the constants `FAILED_*`.
    """

    class_id: int
    reason: str
    code: int = FAILED_OTHER


class ActorStop(Message, frozen=True):
    """Finish the queued calls, announce `ActorExit`, and end."""

    actor: bytes


class Exit(Message, frozen=True):
    """To an idle worker: end now, unless you own values or actors that others still refer to.

    A worker that stays simply does not answer; the node counts it as idle again after a while.
    """


class NodeAddress(Message, frozen=True):
    """Answers a `WhereIsNode`: where `node` listens, as ``ip:port`` (IPv6 in brackets).

    An empty `address` says that the node is gone, or that no such node is known, with the `cause` in words: whatever
    waits for a process there fails at once, and so does what comes later, until an address is sent after all. A node
    that is only starting is better answered late. Open connections are left alone. It may be sent unasked, when the end
    of a node is learned, or that it moved. The address of a `relayed` node, which connects outwards only, is the
    head's.
    """

    node: int
    address: str
    cause: str = ""
    relayed: bool = False


class Describe(Message, frozen=True):
    """Somebody wants to see: `what` is one of `DESCRIBE_*`, of which at most `limit` rows are told. Answered by
    `Described` under the same corr, without the interpreter's lock, behind all `TaskEvents`.
    """

    what: int
    limit: int


class Described(Message, frozen=True):
    """Answers `Describe`. `rows` is a msgpack list; there would be `total` without the limit.

    A task: id, attempt, name, method, kind (0 task, 1 creation, 2 call), state, actor or nil, parent or nil, when it
    was submitted and since when it is with its worker (nanoseconds since 1970, 0 unknown), its worker (process, node,
    pid; 0 unknown), missing arguments, and whether it runs in the sender. An object: id, bytes, (stored, ready, failed,
    owned), (references of the program, of unfinished tasks, of values, of other processes), attempt and state of its
    task. Stacks: one text.
    """

    what: int
    total: int
    rows: bytes


class TaskEvents(Message, frozen=True):
    """Attempts of tasks that have ended; the batch is described in `skate-core`'s `core/history.rs`."""

    batch: bytes


DESCRIBE_NOTHING: Final = 0
"""Nothing but that `TaskEvents` are sent first."""
DESCRIBE_TASKS: Final = 1
DESCRIBE_OBJECTS: Final = 2
DESCRIBE_STACKS: Final = 3

KIND_LEASE_DEMAND: Final = 64
KIND_LEASE_RETURN: Final = 65
KIND_BLOCKED: Final = 66
KIND_UNBLOCKED: Final = 67
KIND_SEGMENT_REQUEST: Final = 68
KIND_SEGMENT_MAP: Final = 69
KIND_SEGMENT_RELEASE: Final = 70
KIND_SEGMENT_CLAIMS: Final = 71
KIND_BLOCKS_FREED: Final = 72
KIND_ACTOR_CREATE: Final = 73
KIND_ACTOR_READY: Final = 74
KIND_ACTOR_FAILED: Final = 75
KIND_ACTOR_SUBSCRIBE: Final = 76
KIND_ACTOR_RELEASE: Final = 77
KIND_ACTOR_KILL: Final = 78
KIND_ACTOR_EXIT: Final = 79
KIND_PEER_LOST: Final = 80
KIND_REQUEST: Final = 81
KIND_RETIRED: Final = 82
KIND_LEASE_KEPT: Final = 83
KIND_WHERE_IS_NODE: Final = 84
KIND_PULL: Final = 85
KIND_PULL_RELEASED: Final = 86
KIND_SPILL: Final = 87
KIND_SPILL_RELEASED: Final = 88
KIND_REGISTER_OPENED: Final = 92
KIND_ESTATE_QUESTION: Final = 93
KIND_LEASE_GRANTED: Final = 96
KIND_LEASE_RECLAIM: Final = 97
KIND_WORKER_DIED: Final = 98
KIND_SEGMENT_GRANTED: Final = 99
KIND_SEGMENT_DENIED: Final = 100
KIND_SEGMENT_MAPPED: Final = 101
KIND_SEGMENT_TRIM: Final = 102
KIND_SEGMENT_ADOPTED: Final = 103
KIND_ACTOR_STATE: Final = 104
KIND_ACTOR_INIT: Final = 105
KIND_REPLY: Final = 106
KIND_LOG_LINES: Final = 107
KIND_NOTICE: Final = 108
KIND_LEASE_FAILED: Final = 109
KIND_ACTOR_STOP: Final = 110
KIND_EXIT: Final = 111
KIND_DEATHS: Final = 112
KIND_PRESSURE: Final = 113
KIND_NODE_ADDRESS: Final = 114
KIND_PULLED: Final = 115
KIND_DESCRIBE: Final = 116
KIND_DESCRIBED: Final = 117
KIND_TASK_EVENTS: Final = 118
KIND_SPILL_WANTED: Final = 119
KIND_SPILLED: Final = 120
KIND_ESTATE_ANSWER: Final = 124
KIND_BLOCKS_RETIRED: Final = 125

TO_NODE: Final[dict[int, type[Message]]] = {
    KIND_LEASE_DEMAND: LeaseDemand,
    KIND_LEASE_RETURN: LeaseReturn,
    KIND_BLOCKED: Blocked,
    KIND_UNBLOCKED: Unblocked,
    KIND_SEGMENT_REQUEST: SegmentRequest,
    KIND_SEGMENT_MAP: SegmentMap,
    KIND_SEGMENT_RELEASE: SegmentRelease,
    KIND_SEGMENT_CLAIMS: SegmentClaims,
    KIND_BLOCKS_FREED: BlocksFreed,
    KIND_ACTOR_CREATE: ActorCreate,
    KIND_ACTOR_READY: ActorReady,
    KIND_ACTOR_FAILED: ActorFailed,
    KIND_ACTOR_SUBSCRIBE: ActorSubscribe,
    KIND_ACTOR_RELEASE: ActorRelease,
    KIND_ACTOR_KILL: ActorKill,
    KIND_ACTOR_EXIT: ActorExit,
    KIND_PEER_LOST: PeerLost,
    KIND_REQUEST: Request,
    KIND_RETIRED: Retired,
    KIND_LEASE_KEPT: LeaseKept,
    KIND_WHERE_IS_NODE: WhereIsNode,
    KIND_DESCRIBED: Described,
    KIND_TASK_EVENTS: TaskEvents,
    KIND_PULL: Pull,
    KIND_PULL_RELEASED: PullReleased,
    KIND_SPILL: Spill,
    KIND_SPILL_RELEASED: SpillReleased,
    KIND_REGISTER_OPENED: RegisterOpened,
    KIND_ESTATE_QUESTION: EstateQuestion,
}

FROM_NODE: Final[dict[int, type[Message]]] = {
    KIND_LEASE_GRANTED: LeaseGranted,
    KIND_LEASE_RECLAIM: LeaseReclaim,
    KIND_WORKER_DIED: WorkerDied,
    KIND_SEGMENT_GRANTED: SegmentGranted,
    KIND_SEGMENT_DENIED: SegmentDenied,
    KIND_SEGMENT_MAPPED: SegmentMapped,
    KIND_SEGMENT_TRIM: SegmentTrim,
    KIND_SEGMENT_ADOPTED: SegmentAdopted,
    KIND_ACTOR_STATE: ActorState,
    KIND_ACTOR_INIT: ActorInit,
    KIND_REPLY: Reply,
    KIND_LOG_LINES: LogLines,
    KIND_NOTICE: Notice,
    KIND_LEASE_FAILED: LeaseFailed,
    KIND_ACTOR_STOP: ActorStop,
    KIND_EXIT: Exit,
    KIND_DEATHS: Deaths,
    KIND_PRESSURE: Pressure,
    KIND_NODE_ADDRESS: NodeAddress,
    KIND_PULLED: Pulled,
    KIND_DESCRIBE: Describe,
    KIND_SPILL_WANTED: SpillWanted,
    KIND_SPILLED: Spilled,
    KIND_ESTATE_ANSWER: EstateAnswer,
    KIND_BLOCKS_RETIRED: BlocksRetired,
}

KINDS: Final[dict[type[Message], int]] = {
    message: kind for table in (TO_NODE, FROM_NODE) for kind, message in table.items()
}

FOR_CONTROL: Final = frozenset(range(KIND_ACTOR_CREATE, KIND_ACTOR_EXIT + 1))
"""Kinds of messages from cores that their node passes on to the control service unread."""

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[int, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: Message) -> bytes:
    """The body of the frame that carries `message`; its kind is ``KINDS[type(message)]``."""
    return _encoder.encode(message)


def decode(kind: int, body: bytes) -> Message:
    """The message in a frame's body.

    Raises:
        KeyError: If no message has this kind.
        msgspec.MsgspecError: If the body is not such a message; the text says which field.
    """
    # Decoders are made at first use: building all of them costs more than a node's first lease.
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(TO_NODE.get(kind) or FROM_NODE[kind])
    message: Message = decoder.decode(body)
    return message
