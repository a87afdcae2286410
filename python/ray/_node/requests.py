"""Cold requests: what `Request.op` may name, and the answers.

Arguments are msgpack: an array in the order given here, a map by these names, or one value alone.
A refusal is a `Reply` that is not ok, with the exception's name and text. Amounts of resources are in wire
units here as everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from ray._control.machine import Deadlines, Machine, ProcessLeft, Received, Send, Tick
from ray._node.events import Labelled
from ray._protocol import LOG_NAME_CHARS_MAX, ROLE_DRIVER, UNIT, Reply, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.actor_records import Actor
    from ray._node.manager import NodeManager

RECLAIM_S: Final = 0.05
"""How long ``available_resources`` waits for leases that nobody uses to come back."""

STORE: Final = "object_store_memory"

_WIRE_STATES: Final = ("PENDING_CREATION", "ALIVE", "RESTARTING", "DEAD")


class RefusedError(Exception):
    """A request that cannot be met; `name` is the exception to raise at the caller."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class RequestTable(Machine):
    """Answers requests. Owns those that wait: all others are answered at once."""

    def __init__(self, manager: NodeManager) -> None:
        super().__init__()
        self._manager = manager
        self._waiting: dict[tuple[int, int], list[int]] = {}
        """Leases whose return an answer about available resources waits for."""
        self._deadlines: Deadlines[tuple[int, int]] = Deadlines()
        self._messages = {Request: self._on_request}
        self._events = {Tick: self._on_tick, ProcessLeft: self._on_left}
        self._ops: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
            "cluster_resources": ((), self._cluster_resources),
            "available_resources": ((), self._available_resources),
            "nodes": ((), self._nodes),
            "actor.reserve_name": (("name", "namespace", "actor", "meta"), self._reserve_name),
            "actor.by_name": (("name", "namespace"), self._by_name),
            "actor.list_named": (("namespace",), self._list_named),
            "actor.info": (("actor",), self._actor_info),
            "actor.list": ((), self._actor_list),
            "why.lease": (("class_id", "owner"), self._why_lease),
            "why.actor": (("actor",), self._why_actor),
            "worker.label": (("label",), self._worker_label),
            "why.process": (("proc",), self._why_process),
            "kv.put": (("key", "value", "namespace", "overwrite"), self._kv_put),
            "kv.get": (("key", "namespace"), self._kv_get),
            "kv.del": (("key", "namespace", "prefix"), self._kv_del),
            "kv.keys": (("prefix", "namespace"), self._kv_keys),
            "job.config": (("config",), self._job_config),
            "job.list": ((), self._job_list),
            "stats": ((), self._stats),
            "shutdown": (("reason",), self._shutdown),
        }
        if manager.validates:
            self._ops["test.lose_segments"] = ((), self._lose_segments)

    def next_deadline(self) -> float | None:
        return self._deadlines.next()

    def _on_request(self, event: Received, message: Request, now: float) -> None:
        try:
            known = self._ops.get(message.op)
            if known is None:
                msg = "ValueError"
                raise RefusedError(msg, f"this node knows no request {message.op!r}")
            names, operation = known
            result = operation(event, now, *_arguments(names, message.args))
        except RefusedError as error:
            self._refuse(event, error.name, str(error))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Arguments come from another process: whatever is wrong with them is its error, not ours.
            self._refuse(event, type(error).__name__, str(error))
        else:
            if result is not _LATER:
                self._answer(event.sender, event.corr, result)

    def _answer(self, to: int, corr: int, result: Any) -> None:
        self._emit(Send(to, Reply(ok=True, body=msgspec.msgpack.encode(result)), corr))

    def _refuse(self, event: Received, name: str, text: str) -> None:
        self._emit(Send(event.sender, Reply(ok=False, body=msgspec.msgpack.encode([name, text])), event.corr))

    # ------------------------------------------------------------------ resources and nodes

    def _cluster_resources(self, event: Received, now: float) -> dict[str, int]:
        return self._manager.leases.ledger.total

    def _available_resources(self, event: Received, now: float) -> Any:
        """What is free once idle leases came back: an owner keeps a lease for a moment after its last task."""
        leases = self._manager.leases
        asked = leases.reclaim_all()
        for effect in leases.take_effects():
            self._emit(effect)
        if not asked:
            return self._free()
        key = (event.sender, event.corr)
        self._waiting[key] = asked
        self._deadlines.set(key, now + RECLAIM_S)
        return _LATER

    def lease_ended(self) -> None:
        """A lease came back: some who wait may have waited for that one only."""
        for key, asked in list(self._waiting.items()):
            if not any(self._manager.leases.is_held(lease) for lease in asked):
                self._finish(key)

    def _on_tick(self, event: Tick, now: float) -> None:
        for key in self._deadlines.due(now):
            self._finish(key)

    def _finish(self, key: tuple[int, int]) -> None:
        del self._waiting[key]
        self._deadlines.clear(key)
        self._answer(*key, self._free())

    def _free(self) -> dict[str, int]:
        """What no lease holds; of shared memory, no more than is not lent to processes either."""
        free = self._manager.leases.ledger.available()
        store = self._manager.segments.statistics()
        lent = store["store_bytes_used"] - store["store_bytes_warm"] - store["store_bytes_idle"]
        room = (store["store_bytes_capacity"] - lent) * UNIT
        if STORE in free:
            free[STORE] = max(min(free[STORE], room), 0)
        return free

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        for key in [key for key in self._waiting if key[0] == event.proc]:
            del self._waiting[key]
            self._deadlines.clear(key)

    def _nodes(self, event: Received, now: float) -> list[dict[str, Any]]:
        facts = self._manager.facts
        node_id = f"{facts.node:016x}" + "0" * 40
        return [
            {
                "NodeID": node_id,
                "Alive": True,
                "NodeManagerAddress": facts.address,
                "NodeManagerHostname": facts.hostname,
                "Resources": self._manager.leases.ledger.total,
                "Labels": {"ray.io/node-id": node_id, **facts.labels},
                # One socket serves for both.
                "RayletSocketName": facts.socket,
                "ObjectStoreSocketName": facts.socket,
            }
        ]

    # ------------------------------------------------------------------ actors

    def _reserve_name(
        self, event: Received, now: float, name: str, namespace: str, actor: bytes, meta: bytes | None
    ) -> bytes:
        if not name:
            msg = "ValueError"
            raise RefusedError(msg, "an actor's name must not be empty")
        return self._manager.actors.reserve_name(event.sender, name, namespace, actor, meta or b"")

    def _by_name(self, event: Received, now: float, name: str, namespace: str | None) -> dict[str, Any]:
        actors = self._manager.actors
        held = actors.names.get(name, namespace or "")
        actor = actors.get(held.actor) if held is not None else None
        if held is None or actor is None:
            known = [x.name for x in actors.names.list(namespace or "")][:10]
            there = f"There are: {', '.join(known)}" if known else "No actor in it has a name"
            msg = "ValueError"
            raise RefusedError(
                msg,
                f"no actor is named {name!r} in namespace {namespace!r}. {there}. It may have died, never have been "
                "created, or be in another namespace",
            )
        return {"meta": held.meta, **self._describe(actor)}

    def _list_named(self, event: Received, now: float, namespace: str | None) -> list[dict[str, str]]:
        return [{"name": x.name, "namespace": x.namespace} for x in self._manager.actors.names.list(namespace)]

    def _actor_info(self, event: Received, now: float, actor: bytes) -> dict[str, Any]:
        record = self._manager.actors.get(actor)
        if record is None:
            msg = "ValueError"
            raise RefusedError(msg, f"actor {actor.hex()} is not known here, or ended long ago")
        return self._describe(record)

    def _actor_list(self, event: Received, now: float) -> list[dict[str, Any]]:
        return [self._describe(actor) for actor in self._manager.actors.actors()]

    def _describe(self, actor: Actor) -> dict[str, Any]:
        return {
            "actor": actor.id,
            "owner": actor.owner,
            "owner_node": self._manager.facts.node,
            "class_name": actor.class_name,
            "name": actor.name,
            "namespace": actor.namespace,
            "detached": actor.detached,
            "state": _WIRE_STATES[self._manager.actors.wire_state(actor)],
            "incarnation": actor.incarnation,
            "restarts_left": actor.restarts_left,
            "proc": actor.proc,
            "pid": actor.pid,
            "job": actor.job,
            "cause": actor.cause.decode(errors="replace") if actor.cause_kind == 0 else "__init__ raised",
        }

    def _worker_label(self, event: Received, now: float, label: str) -> None:
        """An actor with a `__repr__` of its own shows it before its output."""
        if not isinstance(label, str):
            text = f"a label is a string, not {label!r}"
            raise RefusedError(TypeError.__name__, text)
        self._emit(Labelled(event.sender, label[:LOG_NAME_CHARS_MAX]))

    # ------------------------------------------------------------------ reasons

    def _why_lease(self, event: Received, now: float, class_id: int, owner: int) -> str:
        return self._manager.leases.why(owner, class_id)

    def _why_actor(self, event: Received, now: float, actor: bytes) -> str:
        record = self._manager.actors.get(actor)
        if record is None:
            return "the actor is not known here: it ended long ago, or its creation is still on its way"
        match record.state:
            case "pending":
                return f"{record.class_name} {self._manager.leases.why_actor(actor)}"
            case "starting":
                life = f" (restart {record.incarnation})" if record.incarnation else ""
                return f"{record.class_name}.__init__ runs in process {record.pid}{life}"
            case "alive":
                return f"{record.class_name} is alive in process {record.pid}"
            case _:
                return self._describe(record)["cause"] or "dead"

    def _why_process(self, event: Received, now: float, proc: int) -> str:
        process = self._manager.processes.get(proc)
        if process is None:
            return "a process that has ended"
        what = "the driver" if process.role == ROLE_DRIVER else "a worker"
        return f"{what}, process {process.pid}"

    # ------------------------------------------------------------------ keys, jobs, the node itself

    def _kv_put(
        self, event: Received, now: float, key: bytes, value: bytes, namespace: str | None, overwrite: Any
    ) -> bool:
        return self._manager.kv.put(namespace or "", key, value, overwrite=overwrite in (None, True))

    def _kv_get(self, event: Received, now: float, key: bytes, namespace: str | None) -> bytes | None:
        return self._manager.kv.get(namespace or "", key)

    def _kv_del(self, event: Received, now: float, key: bytes, namespace: str | None, prefix: Any) -> int:
        return self._manager.kv.delete(namespace or "", key, prefix=bool(prefix))

    def _kv_keys(self, event: Received, now: float, prefix: bytes | None, namespace: str | None) -> list[bytes]:
        return self._manager.kv.keys(namespace or "", prefix or b"")

    def _job_config(self, event: Received, now: float, config: dict[str, object]) -> int:
        job = self._manager.job_of(event.sender)
        if not job:
            msg = "ValueError"
            raise RefusedError(msg, "only a driver has a job to configure")
        self._manager.jobs.configure(job, config)
        return job

    def _job_list(self, event: Received, now: float) -> list[dict[str, object]]:
        return self._manager.jobs.list()

    def _stats(self, event: Received, now: float) -> dict[str, int]:
        manager = self._manager
        counts: dict[str, int] = {"kv_bytes": manager.kv.bytes_used}
        for table in (manager.pool, manager.leases, manager.segments, manager.pulls, manager.spills, manager.actors, manager.processes):
            counts.update(table.statistics())
        return counts

    def _lose_segments(self, event: Received, now: float) -> int:
        lost = self._manager.segments.lose_adopted()
        for effect in self._manager.segments.take_effects():
            self._emit(effect)
        return lost

    def _shutdown(self, event: Received, now: float, reason: str | None) -> None:
        from ray._node.manager import Shutdown

        self._emit(Shutdown(reason or f"process {event.sender:016x} asked for it"))


_LATER: Final = object()
"""The answer comes later."""


def _arguments(names: tuple[str, ...], packed: bytes) -> list[Any]:
    """The arguments in order; what was left out is None.

    Raises:
        ValueError: If there are more arguments than names, or one that is not known.
    """
    value = msgspec.msgpack.decode(packed) if packed else []
    if isinstance(value, dict) and not (names == ("config",) and "config" not in value):
        unknown = [key for key in value if key not in names]
        if unknown:
            msg = f"unknown arguments {unknown}; there are {list(names)}"
            raise ValueError(msg)
        return [value.get(name) for name in names]
    if not isinstance(value, list):
        value = [value]
    if not names and value == [None]:
        value = []
    if len(value) > len(names):
        msg = f"{len(value)} arguments were given; there are {list(names)}"
        raise ValueError(msg)
    return [*value, *[None] * (len(names) - len(value))]
