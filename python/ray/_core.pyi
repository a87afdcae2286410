"""The native core: what a process does at native speed. A test compares this file with the module."""

from asyncio import Future as AsyncFuture
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar, final

from ray._runtime.ids import JobID, TaskID

R = TypeVar("R", covariant=True)
W = TypeVar("W")

ROLE_NODE: int
ROLE_DRIVER: int
ROLE_WORKER: int
ROLE_TOOL: int

# Codes of error payloads; see `Hooks.load_error`.
ERROR_TASK: int
ERROR_WORKER_CRASHED: int
ERROR_ACTOR_DIED: int
ERROR_ACTOR_UNAVAILABLE: int
ERROR_CANCELLED: int
ERROR_OWNER_DIED: int
ERROR_OBJECT_LOST: int
ERROR_OUT_OF_MEMORY: int
ERROR_PENDING_CALLS: int
ERROR_INFEASIBLE: int
ERROR_OTHER: int
ERROR_GROUP_REMOVED: int
ERROR_ACTOR_UNSCHEDULABLE: int

class CoreClosed(ConnectionError):
    """The core has lost its node, or was closed."""

class StoreFull(MemoryError):
    """The object store has no room for a value."""

class DiskFull(StoreFull):
    """Neither the object store nor the disk has room for a value."""

@final
class ObjectRef(Generic[R]):
    """A reference to a value, counted while this object lives."""

    def __init__(self, id: bytes) -> None: ...
    def binary(self) -> bytes: ...
    def hex(self) -> str: ...
    def is_nil(self) -> bool: ...
    def task_id_binary(self) -> bytes: ...
    def task_id(self) -> TaskID: ...
    def owner(self) -> int: ...
    def future(self) -> Future[R]: ...
    def as_future(self) -> AsyncFuture[R]: ...
    def __await__(self) -> Generator[Any, None, R]: ...
    @classmethod
    def nil(cls) -> ObjectRef[Any]: ...
    @classmethod
    def from_binary(cls, id: bytes) -> ObjectRef[Any]: ...
    @classmethod
    def from_hex(cls, hex: str) -> ObjectRef[Any]: ...
    @classmethod
    def from_random(cls) -> ObjectRef[Any]: ...
    @classmethod
    def size(cls) -> int: ...
    def job_id(self) -> JobID: ...
    def call_site(self) -> str: ...
    def owner_address(self) -> str: ...
    def tensor_transport(self) -> str | None: ...

def _rebuild_ref(id: bytes) -> ObjectRef[Any]: ...

@final
class Hooks:
    """What the core calls back into Python for. Functions are looked up once."""

    def __init__(
        self,
        *,
        # value -> (pickle stream, out-of-band buffers); ObjectRefs met meanwhile are collected by the core
        dump: Callable[[Any], tuple[bytes, list[Any]]],
        # (pickle stream, read-only buffers) -> value
        load: Callable[[Any, list[Any]], Any],
        # (code, body: bytes, buffers, ref id: bytes) -> exception to raise
        load_error: Callable[[int, bytes, list[Any], bytes], BaseException],
    ) -> None: ...

@final
class Core:
    """One process's membership in a cluster: a driver's or a worker's."""

    def __init__(
        self,
        *,
        address: str,  # path of the node's Unix socket
        session: bytes,  # 16 bytes
        token: bytes,  # 32 bytes
        node: int,
        proc: int,
        role: int,
        hooks: Hooks,
        task_oom_retries: int = -1,
    ) -> None: ...
    @property
    def node(self) -> int: ...
    @property
    def proc(self) -> int: ...
    def is_open(self) -> bool: ...
    def abandon(self) -> None:
        """In a forked child: this process is in no cluster, and the parent's goes on."""
    def close(self) -> None: ...

    # values
    def put(self, value: Any) -> ObjectRef[Any]: ...
    def get(self, refs: Sequence[ObjectRef[Any]], timeout: float | None = None) -> list[Any]:
        """Values in order; raises the first error. TimeoutError when the deadline passes."""
    def get_one(self, reference: ObjectRef[R], timeout: float | None = None) -> R: ...
    def wait(self, refs: list[W], num_returns: int, timeout: float | None) -> tuple[list[W], list[W]] | None:
        """Ready ones and others; None when something in the list is not a reference. ValueError for duplicates."""
    def cancel(self, reference: ObjectRef[Any] | StreamRef, force: bool, recursive: bool) -> None: ...
    def why(self, reference: ObjectRef[Any]) -> list[tuple[str, str]]:
        """The chain of reasons why a value is not there yet: (what, reason), outermost first."""
    def why_id(self, id: bytes) -> list[tuple[str, str]]:
        """The same by an object's id, which need not be held here."""
    def _describe_objects(self) -> list[str]: ...
    def statistics(self) -> dict[str, int]: ...

    # actors
    def next_actor_id(self) -> bytes:
        """The id of an actor to be created; an `ActorHandleRef` of it must be made first."""
    def create_actor(
        self,
        actor: bytes,
        *,
        blob: bytes,  # function blob of the class, see Template
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        place: dict[str, int],
        run: dict[str, int],
        env: bytes,
        strategy: bytes,
        name: str,
        namespace: str,
        class_name: str,
        label: str,
        max_restarts: int,
        max_task_retries: int,
        max_pending_calls: int,
        max_concurrency: int,
        is_async: bool,
        concurrency_groups: dict[str, int],
        detached: bool,
        recorded: bool,  # whether history is kept of the creation
    ) -> None: ...
    def kill_actor(self, actor: bytes, no_restart: bool) -> None: ...
    def configure_calls(self, actor: bytes, *, max_pending: int, any_order: bool) -> None:
        """Before the first call of an actor: how many may be unfinished (negative: any number), and whether those whose
        arguments are there may overtake the others.
        """
    def actor_state(self, actor: bytes) -> int:
        """0 pending, 1 alive, 2 restarting, 3 dead, -1 never heard of."""

    # cold requests to the node; msgpack in, msgpack out. Raises RuntimeError(name, message) on refusal.
    def request(self, op: str, args: bytes, timeout: float | None = 30.0) -> bytes: ...
    def tell(self, op: str, args: bytes) -> None:
        """A request that is not answered. Comes after everything that this process has said before."""
    def promise(self, value: W, op: str, args: bytes, awaited: str) -> ObjectRef[W]:
        """A reference to `value` that is ready when the node has answered a request; if it refuses, to an exception.

        `value` holds no references. `awaited` says what the answer waits for: "it waits until ...".
        """
    def next_log(self) -> tuple[str, int, int, list[str], str] | tuple[str, str] | tuple[object] | None:
        """Blocks a logging thread: LogLines as (name, pid, stream, lines, ip), Notice as (level, text), a failed task's
        exception that nobody has looked at as (exception,), None at the end.
        """

    # executing side (workers)
    def next_task(self, group: str = "") -> Task | None:
        """Blocks until there is work for this thread; None means: leave."""
    def poll_task(self) -> Task | None:
        """For event loops: a task if one is queued."""
    def task_fd(self) -> int:
        """Readable while poll_task() may return something; for add_reader."""
    def tasks_over(self) -> bool: ...
    def actor_ready(self) -> None: ...
    def actor_failed(self, error: BaseException) -> None: ...
    def leave(self, *, answered: bool) -> None:
        """This worker will end by its own will: tasks that it has not started go back to their owners. `answered`
        says that all that it started has its answer.
        """
    def linger(self) -> None:
        """Waits, without taking tasks, until no other process refers to an object that this one owns."""
    def actor_exit(self, reason: str) -> None:
        """Announces an intended exit: pending calls get ActorDiedError, no restart."""
    def cancelled(self, task: bytes) -> bool: ...

@final
class ActorHandleRef:
    """Counts one handle of an actor, unless it is the actor's own; pickling hands it on like an ObjectRef."""

    def __init__(self, actor: bytes, owner_node: int, *, counted: bool = True) -> None: ...
    def binary(self) -> bytes: ...
    @property
    def owner_node(self) -> int: ...

@final
class Template:
    """A remote function or actor method with its options, ready to be submitted."""

    def __init__(
        self,
        core: Core,
        *,
        blob: bytes,  # pickled function and its options; b"" for actor methods
        name: str,
        num_returns: int,  # -1 streaming, -2 dynamic
        max_retries: int,
        retry_exceptions: bool,  # True: the worker decides which (list in the blob)
        demand: dict[str, int] | None = None,
        env: bytes = b"",
        strategy: bytes = b"",
        actor: ActorHandleRef | None = None,
        method: str = "",
        concurrency_group: str = "",
        backpressure: int = -1,  # largest number of unconsumed items of a generator
        recorded: bool = True,  # whether history is kept of its calls
    ) -> None: ...
    def submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """ObjectRef for one return, list for several, None for none, StreamRef for streaming."""
    @staticmethod
    def function_id(blob: bytes) -> bytes: ...

@final
class StreamRef:
    """The consumer's end of a streaming generator; `ray.ObjectRefGenerator` wraps it."""

    def next(self, timeout: float | None = None) -> ObjectRef[Any] | None:
        """The next item's reference when it is there; None at the end; TimeoutError."""
    def ready(self) -> bool: ...
    def completed(self) -> ObjectRef[Any]: ...
    def task_id_binary(self) -> bytes: ...

@final
class Task:
    """One piece of work handed to this worker."""

    kind: int  # 0 task, 1 actor creation, 2 actor method
    owner: int
    backpressure: int  # -1: no limit
    id: bytes  # 24 bytes
    function_id: bytes  # 16 bytes
    blob: bytes | None  # the first time this worker sees function_id
    name: str
    method: str
    actor: bytes  # 16 bytes or empty
    concurrency_group: str
    num_returns: int
    attempt: int
    gpu_ids: list[int]
    retry_exceptions: bool
    incarnation: int
    max_concurrency: int
    is_async: bool
    concurrency_groups: dict[str, int]
    answered: bool  # results or an error were sent
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, with top-level references replaced by their values.

        Raises what a failed dependency raised.
        """
    def forget_arguments(self) -> None:
        """Gives back the references that came with the task; `finish` and `fail` imply it."""
    def enter(self) -> None:
        """This thread now runs the task (parent of what it submits)."""
    def finish(self, value: Any) -> None:
        """Sends the result; TypeError when it does not match num_returns or cannot be pickled."""
    def fail(self, error: BaseException, *, retryable: bool) -> None:
        """Sends an exception (dumped with the hook), as code ERROR_TASK."""
    def fail_code(self, code: int, message: str) -> None: ...
    def yield_item(self, value: Any) -> None:
        """One item of a streaming generator; blocks while back-pressure holds."""
    def item(self, index: int) -> ObjectRef[Any]:
        """A reference to an item that was sent, counted from 1."""
    def yield_error(self, error: BaseException) -> None:
        """The exception that ends a stream, as its last item."""
    def finish_stream(self) -> None: ...

@final
class Completions:
    """Finished references as events, for event loops and futures."""

    def __init__(self, core: Core) -> None: ...
    def fileno(self) -> int: ...
    def watch(self, reference: ObjectRef[Any], token: int) -> None: ...
    def watch_stream(self, stream: StreamRef, token: int) -> None: ...
    def drain(self) -> list[int]: ...
    def wait(self, timeout: float | None = None) -> list[int]: ...
    def close(self) -> None:
        """Forgets everything; a `wait()` of another thread ends with the token 2**64 - 1."""

@final
class NodeCore:
    """The node process's transport: frames as events."""

    def __init__(
        self,
        *,
        path: str,
        session: bytes,
        token: bytes,
        node: int,
        listen: str | None = None,  # "host:port" for other nodes; port 0: any; IPv6 in brackets
        tls: bool = False,  # whether nodes of the cluster use TLS between them; members learn it from this one
        relays: bool = False,  # whether to pass on connections to nodes that only connect outwards, as a head does
    ) -> None: ...
    def poll(self, timeout: float | None) -> list[tuple[Any, ...]]:
        """Waits for events, at most `timeout` seconds. Each is one of
        ("frame", proc, kind, corr, body), ("frame_fd", proc, kind, corr, body, fd) with a descriptor that is the
        caller's to close, ("joined", proc, role, pid), ("left", proc, reason, ended), ("fd", token),
        ("pulled", ticket, error or "", [(node, refused, error) of each source that failed], bytes),
        ("stranger", ticket, proc) with `relays`: somebody on another machine wants a process that is not here; its
        connection is held for a few seconds, for a node that calls back.
        ("written", ticket, kind of failure or "", error), ("restored", ticket, kind of failure or "", error).
        `ended`: the peer closed the connection, as the end of its process does; otherwise it broke.
        """
    def address(self) -> str | None:
        """Where it listens for other nodes, as bound ("ip:port"); None without `listen`."""
    def set_node_address(self, node: int, address: str, relayed: bool = False) -> None:
        """Another node listens at `address` ("ip:port"): frames to its key connect there by themselves.

        With `relayed` that is the head, and they wait while it is away.
        """
    def forget_node(self, node: int, cause: str) -> None:
        """Frames to this node fail at once from now on ("left", with the cause), unless a connection is open."""
    def call_back(self, node: int, ticket: int) -> None:
        """Takes the connection that another node holds under this ticket, by connecting to it."""
    def refuse_stranger(self, ticket: int) -> None:
        """Nobody knows the process that this stranger wants: it is told so."""
    def relayed(self) -> tuple[int, int, int]:
        """Connections that wait for a node to call back, those that are passed on, and bytes passed on so far."""
    def send(self, proc: int, kind: int, corr: int, body: bytes) -> None: ...
    def send_fd(self, proc: int, kind: int, corr: int, body: bytes, fd: int) -> None:
        """To a process on this machine only."""
    def watch_fd(self, fd: int, token: int) -> None: ...
    def unwatch_fd(self, token: int) -> None: ...
    def backlog(self, proc: int) -> int:
        """Bytes that wait to be read by a process."""
    def disconnect(self, proc: int) -> None: ...
    def offer_segment(self, segment: int, fd: int, size: int, filled: int) -> None:
        """Sends blocks of this segment to other nodes that ask; what is not `filled` comes by a pull."""
    def withdraw_segment(self, segment: int) -> bool:
        """Sends no more of a segment; True if nothing of it is on its way, so that its memory may be used anew."""
    def pull(
        self,
        ticket: int,
        sources: Sequence[tuple[int, str, int, int]],  # node, ip:port or path, segment, offset; asked in order
        length: int,
        segment: int,  # of this node; offered as far as it is filled
        fd: int,
        offset: int,
    ) -> None:
        """Begins to pull a block; its end is an event of `poll`. ValueError for an address that is none."""
    def cancel_pull(self, ticket: int) -> None:
        """Ends a pull soon; its event still comes."""
    def write_spill(
        self,
        ticket: int,
        path: str,
        pieces: Sequence[tuple[bytes, int, str, int, int, int]],
        capacity_share: float,
    ) -> None:
        """Begins to write a spill file of pieces (object, segment's descriptor or -1, path of another spill file,
        offset, length, place in the file); its end is an event of `poll`.
        """
    def read_spill(self, ticket: int, path: str, name: bytes, at: int, length: int, fd: int) -> None:
        """Begins to read a spilled value into the start of a segment; its end is an event of `poll`."""
    def close(self) -> None: ...

def discover(address: str, token: bytes, timeout_s: float, tls: bool | None = None) -> tuple[int, int, int, bool]:
    """(key, pid, minor version of Python 3, uses TLS) of the node that listens at `address`, "host:port".

    It has proved that it knows the token, and has not noticed that it was asked. The cluster's session is the first
    16 bytes of the token's SHA-256. With `tls`, a node of a cluster of the other kind is refused.

    Raises:
        ValueError: If `address` is not of this form.
        TimeoutError: If nobody answered.
        PermissionError: If the token is not the cluster's.
        ConnectionError: If nobody listens there, or no Skate node, or one of another version.
    """

def random_id() -> int: ...
def memfd(name: str, size: int) -> int: ...
def stack_target() -> tuple[int, int]:
    """What asks a worker for its stacks, and where they go: signal and descriptor for `faulthandler.register`."""

def install_stack_handler() -> None:
    """Puts the core's handler in front of the one that was just registered: it tells the end of a dump."""
