"""Messages between node processes and the control service.

This module owns the meaning of message kinds 128 to 143, 192 to 199 and 208 to 215 (to the control service), and of
160 to 191 and 200 to 207 (from it). They travel between two node processes as msgpack arrays, like those of
`ray._protocol`; on the head node they are handed over as they are. All links are first in, first out, and everything
that concerns two nodes goes through the control service, so that what a node was told about a process always comes
before what follows from it.

The body of a member's own message is passed on as it came: who decodes it is who acts on it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ray._protocol import RETRY_CHARGED, Message


class NodeEntry(msgspec.Struct, frozen=True, array_like=True):
    """What every node knows of every other: where to reach it.

    A node that only connects outwards is `relayed`: its address is the head's, which passes connections on to it.
    """

    node: int
    address: str
    hostname: str
    relayed: bool = False


# ---------------------------------------------------------------------------------------------
# From a node to the control service


class NodeHello(Message, frozen=True):
    """A node joins: the first message on its connection. `address` is where other nodes reach it, "" if they cannot.

    It is "" as well for a node that is to be `relayed`, which only connects outwards and is reached through the head:
    that knows best where. `python` is the version of its interpreter, "3.11.7"; releases that did not say it yet are
    taken as they come. A `client` is only there for a program outside of the cluster.
    """

    node: int
    address: str
    host: str
    hostname: str
    name: str
    socket: str
    session_dir: str
    resources: dict[str, int]
    labels: dict[str, str]
    python: str = ""
    client: bool = False
    returns: bool = False
    """It has been part of the cluster and lost its head. What is on it follows, up to `Announced`."""
    head: int = 0
    heard: int = 0
    """The head that it had before it lost it, and how many of that one's messages (`REPEATED`) it has had."""
    relayed: bool = False


class ActorHosted(Message, frozen=True):
    """A node that returns has this actor on it; its worker has run ``__init__`` if it is `ready`."""

    actor: bytes
    incarnation: int
    proc: int
    pid: int
    ready: bool


class MemberSubscribes(Message, frozen=True):
    """A member of a node that returns wants to know of these actors' changes. What it knows already is not repeated."""

    proc: int
    actors: list[bytes]


class SegmentOrphaned(Message, frozen=True):
    """The lessee of this segment has died: members of other nodes are to be asked which blocks in it are theirs.

    Answered by `OwnersAsked`, before any of them answers. Said again when answers may have been lost.
    """

    segment: int
    lessee: int


class Announced(Message, frozen=True):
    """The node that returns has said all; what it had said before and does not know to be heard follows.

    `first` is how many of its messages were heard, as it knows. A control service that heard more leaves those out.
    `owners` are processes of other nodes for which leases are or wait there. Of those that have ended it is told.
    """

    first: int = 0
    owners: tuple[int, ...] = ()


class MemberJoined(Message, frozen=True):
    """A core has connected to the node. A new driver's `job` is 0: the control service numbers jobs (`JobChanged`)."""

    proc: int
    role: int
    pid: int
    job: int


class MemberGone(Message, frozen=True):
    """A member is gone for good; its resources are free. Comes once for each `MemberJoined`.

    `cause` is a sentence, `lines` what it logged last, `exit_code` negative for signals; `oom` and `retry` are as in
    `WorkerDied`.
    """

    proc: int
    pid: int
    cause: str
    lines: tuple[str, ...] = ()
    exit_code: int = 0
    intended: bool = True
    oom: bool = False
    retry: int = RETRY_CHARGED


class MemberSaid(Message, frozen=True):
    """A member's message that is for the control service, as it came."""

    proc: int
    kind: int
    corr: int
    body: bytes


class ToMember(Message, frozen=True):
    """A frame for a member of another node, if that is known. `serial`: see `_node.relay`."""

    proc: int
    kind: int
    corr: int
    body: bytes
    serial: int = 0


class ToOtherNode(Message, frozen=True):
    """A member's message that is for the manager of another node, as it came. `serial`: see `_node.relay`."""

    node: int
    proc: int
    kind: int
    corr: int
    body: bytes
    serial: int = 0


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
    """The actor does not fit here now: the view on which it was placed was old.

    Or it was ended here lately for want of memory, and `held_back` says so.
    """

    actor: bytes
    incarnation: int
    held_back: str = ""


class Overflow(Message, frozen=True):
    """Leases of one class that an owner wants and its own node cannot give now; 0 withdraws.

    `count` is meant absolutely, on top of the `heard` leases of this demand which the node knows to be placed
    elsewhere; `heard` -1 says that the demand is over. `retriable` is as in `LeaseDemand`.
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
    retriable: bool = True


class LeasesRefused(Message, frozen=True):
    """Of the leases that were placed here this many do not fit now.

    Or one like them was ended here lately for want of memory, and `held_back` says so.
    """

    owner: int
    class_id: int
    count: int
    held_back: str = ""


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
    """Answer to `AreYouAlive`. `heard` is how many of the head's messages (`REPEATED`) the node has had."""

    serial: int
    heard: int = 0


class BundlesPrepared(Message, frozen=True):
    """All bundles of this attempt are set aside on the node. Answer to `PrepareBundles`."""

    group: bytes
    attempt: int


class BundlesRefused(Message, frozen=True):
    """The bundles do not fit now, and nothing is set aside. Answer to `PrepareBundles`; `reason` is a sentence."""

    group: bytes
    attempt: int
    reason: str


class BundlesHeld(Message, frozen=True):
    """A node that returns holds what this attempt has set aside for a placement group; `offered`: that was committed.

    What was not stays set aside until the control service commits or releases it. What only waited is given up.
    """

    group: bytes
    attempt: int
    offered: bool


class GroupAwaited(Message, frozen=True):
    """A member of a node that returns waits for this group to be created: the answer to its request `corr`.

    `left_s` is for how long, at the most.
    """

    group: bytes
    proc: int
    corr: int
    left_s: float | None


# ---------------------------------------------------------------------------------------------
# From the control service to a node


class Nodes(Message, frozen=True):
    """Other nodes that have joined, and those that have gone, with why.

    `welcome` answers the greeting of a node that joins or comes back. `durable`: the control service comes back when it
    dies, so the node stays and waits for it. `whole`: there are no others, because the receiver may have missed that
    they went.
    """

    joined: list[NodeEntry]
    gone: list[tuple[int, str]]
    durable: bool = False
    whole: bool = False
    welcome: bool = False


class Heard(Message, frozen=True):
    """This many of the node's messages, counted from its first `NodeHello`, need not be said again.

    Those that say how things are just now (`NEWS`) are not counted.
    """

    count: int


class Deliver(Message, frozen=True):
    """A frame for members of the receiving node. Those that have gone meanwhile are left out.

    `source` and `serial`: the node that says it, and how that has numbered it (`ToMember`); 0 for the control service.
    """

    procs: tuple[int, ...]
    kind: int
    corr: int
    body: bytes
    source: int = 0
    serial: int = 0


class FromMember(Message, frozen=True):
    """A message of another node's member, for the receiving node's manager. `source` and `serial` as in `Deliver`."""

    proc: int
    kind: int
    corr: int
    body: bytes
    source: int = 0
    serial: int = 0


class PlaceActor(Message, frozen=True):
    """Start a worker for this incarnation. Answered by `ActorPlaced`, `ActorUnplaceable` or `ActorRefused`.

    With `queue` it waits on this node for what it lacks, instead of being refused. `owner` is the process whose actor
    it is, and `retriable` whether it may be restarted once more: the node asks both when memory runs short, and such an
    actor does not run on here when the head may have started it anew elsewhere (`_node.fence`).
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
    owner: int = 0
    retriable: bool = False


class WithdrawActor(Message, frozen=True):
    """The actor is not to be placed any more. Has no effect once it was placed."""

    actor: bytes


class PlaceLeases(Message, frozen=True):
    """Lend workers to an owner. Grants go to the owner; what does not fit now is answered by `LeasesRefused`.

    With `queue` they wait on this node in its usual order, instead of being refused. `retriable` is as in
    `LeaseDemand`.
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
    retriable: bool = True


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


class PrepareBundles(Message, frozen=True):
    """Set resources aside for bundles of a placement group, by index: for all of them or for none.

    Answered by `BundlesPrepared` or `BundlesRefused`, unless released before. With `queue` they wait here in the usual
    order for what they lack, instead of being refused. With `commit`, which is for the only node of a cluster, they are
    offered at once and no `CommitBundles` follows. Of one group there is one attempt at a time, each with a number of
    its own; `name` is what people call the group.
    """

    group: bytes
    attempt: int
    name: str
    job: int
    bundles: dict[int, dict[str, int]]
    serial: int
    queue: bool
    commit: bool


class CommitBundles(Message, frozen=True):
    """What was set aside by this attempt is offered from now on to whoever runs in the group."""

    group: bytes
    attempt: int


class ReleaseBundles(Message, frozen=True):
    """Give back what an attempt has set aside, or waits for; `attempt` 0 means whatever the group has here.

    Who runs there is stopped. With `removed` there will be no such group any more, and what waits for it fails;
    `reason` completes "... because".
    """

    group: bytes
    attempt: int
    removed: bool
    reason: str


class OwnersAsked(Message, frozen=True):
    """Answer to `SegmentOrphaned`: all members of other nodes, each of which has been sent `SegmentAdopted`, and these
    nodes, each of which answers by itself for the estates that it keeps.
    """

    segment: int
    procs: tuple[int, ...]


class MayHaveMissed(Message, frozen=True):
    """These members' node was away: what was said to them meanwhile, they have not heard. The node is one of them."""

    procs: tuple[int, ...]


class CallBack(Message, frozen=True):
    """To a node that only connects outwards: the head holds a connection for it, or for a member of it.

    The node takes it by connecting to the head and saying the ticket, within `CALL_BACK_S_MAX` of the relay.
    """

    ticket: int


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
    """To be answered at once by `Alive`. `heard` is the last question whose answer has come; 0 if none has."""

    serial: int
    heard: int = 0


class Leave(Message, frozen=True):
    """The node is not part of the cluster any more and has to end, with everything on it."""

    reason: str


TO_CONTROL: Final[dict[int, type[Message]]] = {
    128: NodeHello,
    129: MemberJoined,
    130: MemberGone,
    131: MemberSaid,
    132: ToMember,
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
    208: ActorHosted,
    209: MemberSubscribes,
    210: Announced,
    192: BundlesPrepared,
    193: BundlesRefused,
    194: BundlesHeld,
    195: GroupAwaited,
    211: SegmentOrphaned,
    212: StateIs,
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
    179: Heard,
    200: PrepareBundles,
    201: CommitBundles,
    202: ReleaseBundles,
    180: OwnersAsked,
    181: MayHaveMissed,
    182: CallBack,
}

NEWS: Final = frozenset(
    (
        NodeHello,
        Resources,
        Overflow,
        LeasesRefused,
        ActorRefused,
        FreeIs,
        Alive,
        BundlesPrepared,
        BundlesRefused,
        BundlesHeld,
        GroupAwaited,
        StateIs,
        ActorHosted,
        MemberSubscribes,
        Announced,
        SegmentOrphaned,
    )
)
"""Messages to the control service that need not be repeated to a new one: it hears of the state anew."""

REPEATED: Final = frozenset(
    (
        Deliver,
        FromMember,
        StopMember,
        MemberExits,
        MemberBroke,
        JobGone,
        DeathsElsewhere,
        GiveUpMember,
        AskFree,
        PrepareBundles,
        CommitBundles,
        ReleaseBundles,
        OwnersAsked,
    )
)
"""Messages of the control service that are said again to a node whose connection broke before it had them. The others
say how things are, and are said anew to who comes back; what had been placed there is placed anew."""

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
