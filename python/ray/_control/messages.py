"""Messages between node processes and the control service.

This module owns the meaning of message kinds 128 to 159 (to the control service) and 160 to 191 (from it). They travel
between two node processes as msgpack arrays, like those of `ray._protocol`; on the head node they are handed over as
they are. All links are first in, first out, and everything that concerns two nodes goes through the control service,
so that what a node was told about a process always comes before what follows from it.

The body of a member's own message is passed on as it came: who decodes it is who acts on it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ray._protocol import Message


class NodeEntry(msgspec.Struct, frozen=True, array_like=True):
    """What every node knows of every other: where to reach it."""

    node: int
    address: str
    hostname: str


class MemberEntry(msgspec.Struct, frozen=True, array_like=True):
    """A connected driver, worker or tool."""

    proc: int
    role: int
    pid: int
    job: int


# ---------------------------------------------------------------------------------------------
# From a node to the control service


class NodeHello(Message, frozen=True):
    """A node joins: the first message on its connection. `address` is where other nodes reach it, "" if they cannot."""

    node: int
    address: str
    host: str
    hostname: str
    name: str
    socket: str
    session_dir: str
    resources: dict[str, int]
    labels: dict[str, str]


class MemberJoined(Message, frozen=True):
    """A core has connected to the node. A driver's `job` is 0: the control service numbers jobs (`JobChanged`)."""

    proc: int
    role: int
    pid: int
    job: int


class MemberGone(Message, frozen=True):
    """A member is gone for good; its resources are free. Comes once for each `MemberJoined`.

    `cause` is a sentence, `lines` what it logged last, `exit_code` negative for signals.
    """

    proc: int
    pid: int
    cause: str
    lines: tuple[str, ...] = ()
    exit_code: int = 0
    intended: bool = True
    oom: bool = False


class MemberSaid(Message, frozen=True):
    """A member's message that is for the control service, as it came."""

    proc: int
    kind: int
    corr: int
    body: bytes


class ToMembers(Message, frozen=True):
    """A frame for members of other nodes. Those that are not known are left out."""

    procs: tuple[int, ...]
    kind: int
    corr: int
    body: bytes


class ToOtherNode(Message, frozen=True):
    """A member's message that is for the manager of another node, as it came."""

    node: int
    proc: int
    kind: int
    corr: int
    body: bytes


class ActorPlaced(Message, frozen=True):
    """A worker with the actor's resources is there."""

    actor: bytes
    incarnation: int
    proc: int
    pid: int
    gpu_ids: list[int]


class ActorUnplaceable(Message, frozen=True):
    """No worker for the actor can be started on this node."""

    actor: bytes
    incarnation: int
    reason: str


class ActorRefused(Message, frozen=True):
    """The actor does not fit here now: the view on which it was placed was old."""

    actor: bytes
    incarnation: int


class Overflow(Message, frozen=True):
    """Leases of one class that an owner wants and its own node cannot give now; 0 withdraws.

    `count` is meant absolutely, on top of the `heard` leases of this demand which the node knows to be placed
    elsewhere; `heard` -1 says that the demand is over.
    """

    owner: int
    class_id: int
    count: int
    heard: int
    job: int
    demand: dict[str, int]
    env: bytes
    strategy: bytes
    label: str


class LeasesRefused(Message, frozen=True):
    """Of the leases that were placed here this many do not fit now."""

    owner: int
    class_id: int
    count: int


class Resources(Message, frozen=True):
    """What is free on the node, with everything taken that was placed here up to `serial`."""

    free: dict[str, int]
    serial: int


class WhoIs(Message, frozen=True):
    """A member lost its connection to a process of another node. Answered to it by `WorkerDied` once that has ended."""

    asker: int
    proc: int


class NoticeRaised(Message, frozen=True):
    """People should know: the driver of a job, or of every job if it is 0."""

    job: int
    level: str
    text: str


class FreeIs(Message, frozen=True):
    """Answer to `AskFree`."""

    ticket: int
    free: dict[str, int]


class MemberRows(msgspec.Struct, frozen=True, array_like=True):
    """What one member has told; `rows` is a msgpack list. Process 0 is the node itself."""

    proc: int
    role: int
    pid: int
    job: int
    total: int
    rows: bytes


class StateIs(Message, frozen=True):
    """Answer to `AskState`. `silent` are the pids of members that have not answered in time."""

    ticket: int
    members: list[MemberRows]
    silent: list[int]


class Alive(Message, frozen=True):
    """Answer to `AreYouAlive`."""

    serial: int


# ---------------------------------------------------------------------------------------------
# From the control service to a node


class Nodes(Message, frozen=True):
    """Other nodes that have joined, and those that have gone, with why."""

    joined: list[NodeEntry]
    gone: list[tuple[int, str]]


class Deliver(Message, frozen=True):
    """A frame for members of the receiving node. Those that have gone meanwhile are left out."""

    procs: tuple[int, ...]
    kind: int
    corr: int
    body: bytes


class FromMember(Message, frozen=True):
    """A message of another node's member, for the receiving node's manager."""

    proc: int
    kind: int
    corr: int
    body: bytes


class PlaceActor(Message, frozen=True):
    """Start a worker for this incarnation. Answered by `ActorPlaced`, `ActorUnplaceable` or `ActorRefused`.

    With `queue` it waits on this node for what it lacks, instead of being refused.
    """

    actor: bytes
    incarnation: int
    job: int
    place: dict[str, int]
    run: dict[str, int]
    env: bytes
    strategy: bytes
    label: str
    serial: int
    queue: bool


class WithdrawActor(Message, frozen=True):
    """The actor is not to be placed any more. Has no effect once it was placed."""

    actor: bytes


class PlaceLeases(Message, frozen=True):
    """Lend workers to an owner. Grants go to the owner; what does not fit now is answered by `LeasesRefused`.

    With `queue` they wait on this node in its usual order, instead of being refused.
    """

    owner: int
    class_id: int
    count: int
    job: int
    demand: dict[str, int]
    env: bytes
    strategy: bytes
    label: str
    serial: int
    queue: bool


class WithdrawLeases(Message, frozen=True):
    """What waits here for this owner's class is not wanted any more."""

    owner: int
    class_id: int


class PlacedElsewhere(Message, frozen=True):
    """To the owner's node: this many leases of a demand are on their way from other nodes; negative: they are not."""

    owner: int
    class_id: int
    count: int


class Hopeless(Message, frozen=True):
    """To the owner's node: why no node can ever meet the demand; empty if one can again."""

    owner: int
    class_id: int
    reason: str


class StopMember(Message, frozen=True):
    """Kill this worker. `reason` completes "it was stopped because ...". Its `MemberGone` follows."""

    proc: int
    reason: str


class MemberExits(Message, frozen=True):
    """This worker is ending by intention; it is killed only if it does not get there."""

    proc: int
    reason: str


class MemberBroke(Message, frozen=True):
    """This member sent something that is no message; its connection is to be closed. `what` says what it did."""

    proc: int
    what: str


class JobChanged(Message, frozen=True):
    """There is such a job, and this is what its driver said about it."""

    job: int
    driver: int
    config: dict[str, Any]


class JobGone(Message, frozen=True):
    """The job's driver has gone."""

    job: int


class DeathsElsewhere(Message, frozen=True):
    """Members of other nodes that have ended, with a sentence on each."""

    dead: list[tuple[int, str]]


class GiveUpMember(Message, frozen=True):
    """A process of another node lost its connection to this worker, which has to end. `by` is that one in words."""

    proc: int
    by: str


class AskFree(Message, frozen=True):
    """Somebody wants to know what is free. Answered by `FreeIs` when leases that nobody uses have come back."""

    ticket: int


class AskState(Message, frozen=True):
    """Somebody wants to see `what` there is on the node and what its members own: see `ray._node.looks`.

    Answered by `StateIs` after `timeout_s` at the latest.
    """

    ticket: int
    what: str
    limit: int
    timeout_s: float


class AreYouAlive(Message, frozen=True):
    """To be answered at once by `Alive`."""

    serial: int


class Leave(Message, frozen=True):
    """The node is not part of the cluster any more and has to end, with everything on it."""

    reason: str


TO_CONTROL: Final[dict[int, type[Message]]] = {
    128: NodeHello,
    129: MemberJoined,
    130: MemberGone,
    131: MemberSaid,
    132: ToMembers,
    133: ToOtherNode,
    134: ActorPlaced,
    135: ActorUnplaceable,
    136: ActorRefused,
    137: Overflow,
    138: LeasesRefused,
    139: Resources,
    140: WhoIs,
    141: NoticeRaised,
    142: FreeIs,
    143: Alive,
    150: StateIs,
}

FROM_CONTROL: Final[dict[int, type[Message]]] = {
    160: Nodes,
    161: Deliver,
    162: FromMember,
    163: PlaceActor,
    164: WithdrawActor,
    165: PlaceLeases,
    166: WithdrawLeases,
    167: PlacedElsewhere,
    168: Hopeless,
    169: StopMember,
    170: MemberExits,
    171: MemberBroke,
    172: JobChanged,
    173: JobGone,
    174: DeathsElsewhere,
    175: GiveUpMember,
    176: AskFree,
    177: AreYouAlive,
    178: Leave,
    184: AskState,
}

KINDS: Final[dict[type[Message], int]] = {
    message: kind for table in (TO_CONTROL, FROM_CONTROL) for kind, message in table.items()
}

_decoders: dict[int, msgspec.msgpack.Decoder[Any]] = {}


def decode(kind: int, body: bytes) -> Message:
    """The message in a frame's body.

    Raises:
        KeyError: If no message has this kind.
        msgspec.MsgspecError: If the body is not such a message; the text says which field.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(TO_CONTROL.get(kind) or FROM_CONTROL[kind])
    message: Message = decoder.decode(body)
    return message
