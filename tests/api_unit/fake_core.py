"""A core in one process, for tests of what lies above it.

It has the names of `ray._core`. Values go through the real hooks; tasks go through the real `Worker`, on a thread.
Actors are not started: `FakeWorkerCore` feeds a real `Worker` with calls that a test writes down.
"""

from __future__ import annotations

import itertools
import os
import queue
import struct
import threading
from typing import Any, Generic, TypeVar

R = TypeVar("R", covariant=True)

ROLE_NODE, ROLE_DRIVER, ROLE_WORKER = 1, 2, 3
(
    ERROR_TASK, ERROR_WORKER_CRASHED, ERROR_ACTOR_DIED, ERROR_ACTOR_UNAVAILABLE, ERROR_CANCELLED, ERROR_OWNER_DIED,
    ERROR_OBJECT_LOST, ERROR_OUT_OF_MEMORY, ERROR_PENDING_CALLS, ERROR_INFEASIBLE, ERROR_OTHER,
) = range(1, 12)  # fmt: skip

NODE = 7
STORE: dict[bytes, tuple[str, Any]] = {}
CHANGED = threading.Condition()
SERIAL = itertools.count(1)


def new_task_id() -> bytes:
    return struct.pack(">QQQ", NODE, 9, next(SERIAL))


class ObjectRef(Generic[R]):
    def __init__(self, id: bytes) -> None:
        self._id = id

    def binary(self) -> bytes:
        return self._id

    def hex(self) -> str:
        return self._id.hex()

    def is_nil(self) -> bool:
        return self._id == b"\xff" * 28

    def task_id_binary(self) -> bytes:
        return self._id[:24]

    def owner(self) -> int:
        return 9

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and self._id == other._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"ObjectRef({self.hex()})"

    def __await__(self) -> Any:
        from ray._runtime.futures import await_ref

        return await_ref(self)

    def future(self) -> Any:
        from ray._runtime.futures import future_of

        return future_of(self)

    def __reduce__(self) -> Any:
        return ObjectRef, (self._id,)


class Hooks:
    def __init__(self, *, dump: Any, load: Any, load_error: Any) -> None:
        self.dump, self.load, self.load_error = dump, load, load_error


def store(id: bytes, entry: tuple[str, Any]) -> None:
    with CHANGED:
        STORE[id] = entry
        CHANGED.notify_all()


class Core:
    def __init__(self, *, hooks: Hooks, requests: dict[str, Any] | None = None, **facts: Any) -> None:
        self.hooks = hooks
        self.node, self.proc = facts.get("node", NODE), facts.get("proc", 9)
        self._open = True
        self.requests = requests or {}
        self.asked: list[tuple[str, Any]] = []
        self.submitted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.created: list[dict[str, Any]] = []
        self.killed: list[tuple[bytes, bool]] = []
        self.cancels: list[tuple[bytes, bool, bool]] = []
        self.limits: list[tuple[bytes, int]] = []
        self.execute = True
        self._work: queue.Queue[Any] = queue.Queue()
        self.logs: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def is_open(self) -> bool:
        return self._open

    def close(self) -> None:
        self._open = False
        self._work.put(None)
        self.logs.put(None)

    def _run(self) -> None:
        from ray._runtime.worker import Leave, Worker

        worker = Worker(self)
        while (task := self._work.get()) is not None:
            try:
                worker.execute(task)
            except Leave:
                worker = Worker(self)

    def put(self, value: Any) -> ObjectRef[Any]:
        stream, buffers = self.hooks.dump(value)
        ref = ObjectRef(new_task_id() + b"\0\0\0\0")
        store(ref.binary(), ("value", (stream, [memoryview(b).toreadonly() for b in buffers])))
        return ref

    def get(self, refs: Any, timeout: float | None = None) -> list[Any]:
        for ref in refs:
            if not isinstance(ref, ObjectRef):
                raise TypeError("not a ref")
        with CHANGED:
            if not CHANGED.wait_for(lambda: all(ref.binary() in STORE for ref in refs), timeout):
                raise TimeoutError
        return [self._load(ref) for ref in refs]

    def get_one(self, reference: ObjectRef[Any], timeout: float | None = None) -> Any:
        return self.get([reference], timeout)[0]

    def limit_pending_calls(self, actor: bytes, limit: int) -> None:
        self.limits.append((actor, limit))

    def _load(self, ref: ObjectRef[Any]) -> Any:
        kind, content = STORE[ref.binary()]
        if kind == "value":
            return self.hooks.load(*content)
        code, body, buffers = content
        raise self.hooks.load_error(code, body, buffers, ref.binary())

    def wait(self, refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]] | None:
        if not all(type(ref) is ObjectRef for ref in refs):
            return None
        if len({ref.binary() for ref in refs}) < len(refs):
            message = "ray.wait() was given the same reference twice"
            raise ValueError(message)
        with CHANGED:
            CHANGED.wait_for(lambda: sum(ref.binary() in STORE for ref in refs) >= num_returns, timeout)
            ready = [ref for ref in refs if ref.binary() in STORE][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def cancel(self, reference: Any, force: bool, recursive: bool) -> None:
        ref = reference.completed() if isinstance(reference, StreamRef) else reference
        self.cancels.append((ref.binary(), force, recursive))

    def why(self, ref: ObjectRef[Any]) -> list[tuple[str, str]]:
        return [] if ref.binary() in STORE else [("task f", "needs GPU: 1; no node has one")]

    def cancelled(self, task_id: bytes) -> bool:
        return any(id[:24] == task_id for id, _, _ in self.cancels)

    def next_actor_id(self) -> bytes:
        return struct.pack(">QQ", 9, next(SERIAL))

    def create_actor(self, actor: bytes, **facts: Any) -> None:
        self.created.append({"actor": actor, **facts})

    def kill_actor(self, actor: bytes, no_restart: bool) -> None:
        self.killed.append((actor, no_restart))

    def request(self, op: str, args: bytes, timeout: float | None = 30.0) -> bytes:
        import msgspec

        arguments = msgspec.msgpack.decode(args) if args else {}
        self.asked.append((op, arguments))
        answer = self.requests.get(op)
        return msgspec.msgpack.encode(answer(**arguments) if callable(answer) else answer)

    def next_log(self) -> Any:
        return self.logs.get()


class ActorHandleRef:
    def __init__(self, actor: bytes, owner_node: int) -> None:
        self._actor, self._node = actor, owner_node

    def binary(self) -> bytes:
        return self._actor

    def __reduce__(self) -> Any:
        return ActorHandleRef, (self._actor, self._node)


class Template:
    def __init__(self, core: Core, **facts: Any) -> None:
        self.core = core
        self.facts = facts

    def submit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        core = self.core
        core.submitted.append((self, args, kwargs))
        task = Task(core, self.facts, core.hooks.dump((args, kwargs)))
        if core.execute and not self.facts.get("actor"):
            core._work.put(task)
        return task.results()


class Task:
    """A call, and where its outcome goes."""

    def __init__(self, core: Any, facts: dict[str, Any], packed: Any, kind: int = 0, **more: Any) -> None:
        self._core = core
        self._packed = packed
        self.kind = kind
        self.id = new_task_id()
        self.blob: bytes | None = facts.get("blob", b"")
        self.function_id = struct.pack(">QQ", 0, hash(self.blob) & 0xFFFFFFFF)
        self.name = facts.get("name", "")
        self.method = facts.get("method", "")
        self.actor = facts.get("actor_id", b"")
        self.concurrency_group = facts.get("concurrency_group", "")
        self.num_returns = facts.get("num_returns", 1)
        self.attempt = 0
        self.gpu_ids: list[int] = facts.get("gpu_ids", [])
        self.retry_exceptions = facts.get("retry_exceptions", False)
        self.incarnation = facts.get("incarnation", 0)
        self.max_concurrency = facts.get("max_concurrency", 1)
        self.is_async = facts.get("is_async", False)
        self.concurrency_groups = facts.get("concurrency_groups", {})
        self.backpressure = -1
        self.outcome: Any = None
        self.stream: StreamRef | None = None
        self.error: BaseException | None = None

    def refs(self, count: int) -> list[ObjectRef[Any]]:
        return [ObjectRef(self.id + struct.pack(">I", index)) for index in range(count)]

    def results(self) -> Any:
        if self.num_returns == -1:
            self.stream = StreamRef(self)
            return self.stream
        refs = self.refs(1 if self.num_returns == -2 else self.num_returns)
        if not refs:
            return None
        return refs[0] if len(refs) == 1 else refs

    def arguments(self) -> Any:
        args, kwargs = self._core.hooks.load(*self._packed)
        resolve = lambda value: self._core.get([value])[0] if isinstance(value, ObjectRef) else value  # noqa: E731
        return tuple(map(resolve, args)), {key: resolve(value) for key, value in kwargs.items()}

    def enter(self) -> None:
        pass

    def finish(self, value: Any) -> None:
        assert self.outcome is None, "finished twice"
        if self.num_returns in (1, -2):
            values = [value]
        elif self.num_returns == 0:
            values = []
        else:
            values = list(value)
            if len(values) != self.num_returns:
                raise ValueError(f"the task returned {len(values)} values, but num_returns is {self.num_returns}")
        packed = [self._core.hooks.dump(each) for each in values]
        self.outcome = ("value", values)
        for ref, each in zip(self.refs(len(values)), packed, strict=True):
            store(ref.binary(), ("value", each))

    def fail(self, error: BaseException, *, retryable: bool) -> None:
        stream, buffers = self._core.hooks.dump(error)
        self._failed(ERROR_TASK, stream, buffers)
        self.outcome = ("error", error, retryable)

    def fail_code(self, code: int, message: str) -> None:
        self._failed(code, message.encode(), [])
        self.outcome = ("code", code, message)

    def _failed(self, code: int, body: bytes, buffers: list[Any]) -> None:
        assert self.outcome is None, "finished twice"
        if self.stream is not None:
            self.stream.items.append(("error", (code, body, buffers)))
            self.stream.end(("error", (code, body, buffers)))
            return
        for ref in self.refs(max(self.num_returns, 1)):
            store(ref.binary(), ("error", (code, body, buffers)))

    def yield_item(self, value: Any) -> None:
        if self.stream is None:
            self.stream = StreamRef(self)
        self.stream.items.append(("value", self._core.hooks.dump(value)))
        self.stream.publish()

    def yield_error(self, error: BaseException) -> None:
        if self.stream is None:
            self.stream = StreamRef(self)
        self.error = error
        stream, buffers = self._core.hooks.dump(error)
        self.stream.items.append(("error", (ERROR_TASK, stream, buffers)))
        self.stream.publish()

    def finish_stream(self) -> None:
        assert self.outcome is None, "finished twice"
        self.outcome = ("stream", None)
        if self.stream is not None:
            self.stream.end(("value", self._core.hooks.dump(None)))


class StreamRef:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.items: list[tuple[str, Any]] = []
        self.ended = False
        self.taken = 0

    def _ref(self, index: int) -> ObjectRef[Any]:
        return ObjectRef(self.task.id + struct.pack(">I", index + 1))

    def publish(self) -> None:
        for index, item in enumerate(self.items):
            store(self._ref(index).binary(), item)

    def end(self, outcome: tuple[str, Any]) -> None:
        self.publish()
        with CHANGED:
            self.ended = True
        store(self.completed().binary(), outcome)

    def next(self, timeout: float | None = None) -> ObjectRef[Any] | None:
        with CHANGED:
            if not CHANGED.wait_for(self.ready, timeout):
                raise TimeoutError
            if self.taken >= len(self.items):
                return None
            self.taken += 1
        return self._ref(self.taken - 1)

    def ready(self) -> bool:
        return self.ended or self.taken < len(self.items)

    def completed(self) -> ObjectRef[Any]:
        return ObjectRef(self.task.id + b"\0\0\0\0")

    def task_id_binary(self) -> bytes:
        return self.task.id


class Completions:
    def __init__(self, core: Core) -> None:
        self._read, self._write = os.pipe()
        self._ready: list[int] = []
        self._closed = False

    def fileno(self) -> int:
        return self._read

    def watch(self, reference: ObjectRef[Any], token: int) -> None:
        self._watch(lambda: reference.binary() in STORE, token)

    def watch_stream(self, stream: StreamRef, token: int) -> None:
        self._watch(stream.ready, token)

    def _watch(self, ready: Any, token: int) -> None:
        def run() -> None:
            with CHANGED:
                CHANGED.wait_for(lambda: ready() or self._closed)
                if self._closed:
                    return
                self._ready.append(token)
                os.write(self._write, b"x")

        threading.Thread(target=run, daemon=True).start()

    def drain(self) -> list[int]:
        with CHANGED:
            found, self._ready = self._ready, []
            if found:
                os.read(self._read, len(found))
        return found

    def wait(self, timeout: float | None = None) -> list[int]:
        import select

        select.select([self._read], [], [], timeout)
        if self._closed:
            raise RuntimeError("closed")
        return self.drain()

    def close(self) -> None:
        with CHANGED:
            if not self._closed:
                self._closed = True
                os.write(self._write, b"x")
                CHANGED.notify_all()


def random_id() -> int:
    return int.from_bytes(os.urandom(8), "big") or 1


class FakeWorkerCore:
    """What a worker sees of its core: a list of calls to make, then the end."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.node, self.proc = NODE, 11
        self._queues: dict[str, queue.Queue[Any]] = {}
        self._lock = threading.Lock()
        self._pipe = os.pipe()
        self.over = False
        self.ready = False
        self.failure: Any = None
        self.exit_reason: str | None = None
        self.cancelled_ids: set[bytes] = set()

    def queue_of(self, group: str) -> queue.Queue[Any]:
        with self._lock:
            return self._queues.setdefault(group, queue.Queue())

    def add(self, task: Task) -> Task:
        self.queue_of(task.concurrency_group).put(task)
        os.write(self._pipe[1], b"x")
        return task

    def finish(self) -> None:
        """No more calls are to come."""
        self.over = True
        for group in ("", *self._queues):
            for _ in range(50):
                self.queue_of(group).put(None)
        os.write(self._pipe[1], b"x")

    def is_open(self) -> bool:
        return True

    def next_task(self, group: str = "") -> Task | None:
        return self.queue_of(group).get()

    def poll_task(self) -> Task | None:
        for group in list(self._queues):
            try:
                task = self.queue_of(group).get_nowait()
            except queue.Empty:
                continue
            if task is not None:
                return task
        return None

    def tasks_over(self) -> bool:
        return self.over

    def task_fd(self) -> int:
        return self._pipe[0]

    def actor_ready(self) -> None:
        self.ready = True

    def actor_failed(self, error: Any) -> None:
        self.failure = error

    def actor_exit(self, reason: str) -> None:
        self.exit_reason = reason

    def cancelled(self, task_id: bytes) -> bool:
        return task_id in self.cancelled_ids

    def put(self, value: Any) -> ObjectRef[Any]:
        ref = ObjectRef(new_task_id() + b"\0\0\0\0")
        store(ref.binary(), ("value", self.hooks.dump(value)))
        return ref

    def get(self, refs: Any, timeout: float | None = None) -> list[Any]:
        return [self.hooks.load(*STORE[ref.binary()][1]) for ref in refs]

    def close(self) -> None:
        pass
