"""Cold requests: what `Request.op` may name, and the answers. Here those of the control service.

Arguments are msgpack: an array in the order given here, a map by these names, or one value alone.
A refusal is a `Reply` that is not ok, with the exception's name and text. Amounts of resources are in wire
units here as everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from ray._control import kv
from ray._control.collecting import Collector
from ray._control.demands import ACTORS
from ray._control.group_placement import demand_of
from ray._control.group_requests import GroupRequests
from ray._control.machine import Deadlines, FromNode, Machine, ProcessLeft, Received, Send, Tick, ToNode, earliest
from ray._control.messages import AskFree, FreeIs, FromMember, JobChanged, StateIs
from ray._control.node_records import NodeLost
from ray._protocol import CAUSE_INIT_ERROR, KIND_REQUEST, Reply, Request, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.actor_records import Actor
    from ray._control.service import ControlService

FREE_S: Final = 1.0
"""How long ``available_resources`` waits for nodes to say what is free; then what they reported last counts."""

_WIRE_STATES: Final = ("PENDING_CREATION", "ALIVE", "RESTARTING", "DEAD")


AT_NODE: Final = ("node.files", "node.read")
"""What a member may ask any node for."""

NEVER_S: Final = 3600.0
"""Longer than any node may take."""


class RefusedError(Exception):
    """A request that cannot be met; `name` is the exception to raise at the caller."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


LATER: Final = object()
"""What an operation returns whose answer comes later."""


class Requests(Machine):
    """Answers requests by a table of operations. Subclasses fill `_ops`: (names of arguments, method)."""

    def __init__(self) -> None:
        super().__init__()
        self._ops: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {}
        self._messages = {Request: self._on_request}

    def knows(self, op: str) -> bool:
        return op in self._ops

    def _on_request(self, event: Received, message: Request, now: float) -> None:
        try:
            known = self._ops.get(message.op)
            if known is None:
                msg = "ValueError"
                raise RefusedError(msg, f"this cluster knows no request {message.op!r}")
            names, operation = known
            result = operation(event, now, *_arguments(names, message.args))
            self._act()
        except RefusedError as error:
            self._refuse(event, error.name, str(error))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Arguments come from another process: whatever is wrong with them is its error, not ours.
            self._refuse(event, type(error).__name__, str(error))
        else:
            if result is not LATER:
                self._answer(event.sender, event.corr, result)

    def _act(self) -> None:
        """Take over what other tables want done because of an operation; comes before its answer."""

    def _answer(self, to: int, corr: int, result: Any) -> None:
        if not corr:
            return  # it was told, and does not ask
        self._emit(Send(to, Reply(ok=True, body=msgspec.msgpack.encode(result)), corr))

    def _refuse(self, event: Received, name: str, text: str) -> None:
        self._emit(Send(event.sender, Reply(ok=False, body=msgspec.msgpack.encode([name, text])), event.corr))


class ControlRequests(Requests):
    """Requests about the whole cluster. Owns those that wait for nodes; all others are answered at once."""

    def __init__(self, service: ControlService) -> None:
        super().__init__()
        self._service = service
        self._tickets: dict[int, tuple[int, int, dict[int, None], dict[str, int]]] = {}
        """(asker, corr, nodes that have not answered, sum of what the others have free) by ticket."""
        self._serial = 0
        self._deadlines: Deadlines[int] = Deadlines()
        self._events = {Tick: self._on_tick, ProcessLeft: self._on_left, NodeLost: self._on_node_lost}
        self._collector = Collector(self._emit, self._answer)
        self._node_messages = {FreeIs: self._on_free_is, StateIs: self._on_state_is}
        self._ops = {
            "cluster_resources": ((), self._cluster_resources),
            "available_resources": ((), self._available_resources),
            "nodes": ((), self._nodes),
            "demands": ((), self._demands),
            "actor.reserve_name": (("name", "namespace", "actor", "meta"), self._reserve_name),
            "actor.by_name": (("name", "namespace"), self._by_name),
            "actor.list_named": (("namespace",), self._list_named),
            "actor.info": (("actor",), self._actor_info),
            "actor.list": ((), self._actor_list),
            "why.lease": (("class_id", "owner"), self._why_lease),
            "control.why_lease": (("class_id", "owner", "local"), self._why_lease_elsewhere),
            "why.actor": (("actor",), self._why_actor),
            "why.process": (("proc",), self._why_process),
            "kv.put": (("key", "value", "namespace", "overwrite"), self._kv_put),
            "kv.get": (("key", "namespace"), self._kv_get),
            "kv.del": (("key", "namespace", "prefix"), self._kv_del),
            "kv.keys": (("prefix", "namespace"), self._kv_keys),
            "job.config": (("config",), self._job_config),
            "job.list": ((), self._job_list),
            "state.collect": (("what", "limit", "timeout_s"), self._collect),
            "state.at": (("node", "ask", "arguments"), self._at_node),
            "state.jobs": ((), self._job_states),
            "stats": (("counts",), self._stats),
            **GroupRequests(service, LATER, RefusedError).ops,
        }

    def next_deadline(self) -> float | None:
        return earliest(self._deadlines.next(), self._collector.next_deadline())

    def _act(self) -> None:
        self._out.extend(self._service.groups.take_effects())

    def _forward(self, node: int, event: Received, op: str, *arguments: Any) -> Any:
        """Let the manager of a node answer."""
        body = encode(Request(op, msgspec.msgpack.encode(arguments)))
        self._emit(ToNode(node, FromMember(event.sender, KIND_REQUEST, event.corr, body)))
        return LATER

    # ------------------------------------------------------------------ looks at all nodes

    def _collect(self, event: Received, now: float, what: str, limit: int, timeout_s: float | None) -> Any:
        """What nodes and members say themselves; see `ray._node.looks`."""
        nodes = [node.key for node in self._service.nodes.living()]
        self._collector.ask(event.sender, event.corr, nodes, what, int(limit), float(timeout_s or NEVER_S), now)
        return LATER

    def _on_state_is(self, event: FromNode, message: StateIs, now: float) -> None:
        self._collector.heard(event.node, message)

    def _at_node(self, event: Received, now: float, node: int, ask: str, arguments: list[Any]) -> Any:
        """A request that one node answers, whichever that is."""
        if ask not in AT_NODE:
            text = f"a node is not asked for {ask!r} by others; there are {AT_NODE}"
            raise RefusedError(ValueError.__name__, text)
        if self._service.nodes.get(node) is None:
            known = self._service.nodes.find(node)
            text = f"{known} is lost: {known.reason}" if known is not None else f"node {node:016x} is not known"
            raise RefusedError(ValueError.__name__, text)
        return self._forward(node, event, ask, *arguments)

    def _job_states(self, event: Received, now: float) -> list[dict[str, Any]]:
        """Jobs with where their drivers are or were, and since when, in seconds before now."""
        return [
            {
                "job": job.number,
                "driver": job.driver,
                "pid": job.pid,
                "node": self._service.members.node_of(job.driver),
                "age_s": now - job.started,
                "ended_s": None if job.ended is None else now - job.ended,
                "namespace": job.namespace,
                "entrypoint": str(job.config.get("entrypoint", "")),
                "metadata": job.config.get("metadata") or {},
            }
            for job in self._service.jobs.all()
        ]

    # ------------------------------------------------------------------ resources and nodes

    def _cluster_resources(self, event: Received, now: float) -> dict[str, int]:
        return self._service.nodes.total()

    def _available_resources(self, event: Received, now: float) -> Any:
        """What is free once idle leases came back: an owner keeps a lease for a moment after its last task."""
        self._serial += 1
        nodes = {node.key: None for node in self._service.nodes.living()}
        self._tickets[self._serial] = (event.sender, event.corr, nodes, {})
        self._deadlines.set(self._serial, now + FREE_S)
        for node in nodes:
            self._emit(ToNode(node, AskFree(self._serial)))
        return LATER

    def _on_free_is(self, event: FromNode, message: FreeIs, now: float) -> None:
        entry = self._tickets.get(message.ticket)
        if entry is not None and event.node in entry[2]:
            self._add_free(message.ticket, event.node, message.free)

    def _add_free(self, ticket: int, node: int, free: dict[str, int]) -> None:
        asker, corr, awaited, total = self._tickets[ticket]
        del awaited[node]
        for name, units in free.items():
            total[name] = total.get(name, 0) + units
        if not awaited:
            del self._tickets[ticket]
            self._deadlines.clear(ticket)
            self._answer(asker, corr, total)

    def _on_tick(self, event: Tick, now: float) -> None:
        self._collector.tick(now)
        for ticket in self._deadlines.due(now):
            for key in list(self._tickets[ticket][2]):
                node = self._service.nodes.get(key)
                free = node.room() if node is not None else {}
                self._add_free(ticket, key, {name: max(units, 0) for name, units in free.items()})

    def _on_node_lost(self, event: NodeLost, now: float) -> None:
        self._collector.node_lost(event.node)
        for ticket in [ticket for ticket, entry in self._tickets.items() if event.node in entry[2]]:
            self._add_free(ticket, event.node, {})

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._collector.asker_left(event.proc)
        for ticket in [ticket for ticket, entry in self._tickets.items() if entry[0] == event.proc]:
            del self._tickets[ticket]
            self._deadlines.clear(ticket)

    def _nodes(self, event: Received, now: float) -> list[dict[str, Any]]:
        nodes = self._service.nodes
        return [
            {
                "node": node.key,
                "Alive": node.alive,
                "Name": node.name,
                "NodeManagerAddress": node.host,
                "NodeManagerPort": int(node.address.rpartition(":")[2] or 0),
                "NodeManagerHostname": node.hostname,
                "Resources": node.total if node.alive else {},
                "Free": {name: max(units, 0) for name, units in node.room().items()},
                "Labels": node.labels,
                "Socket": node.socket,
                "SessionDir": node.session_dir,
                "IsHead": node.key == nodes.head,
                "IsClient": node.client,
                "IsOutboundOnly": node.relayed,
                "Reason": node.reason,
                "AgeS": now - node.joined_at,
            }
            for node in nodes.all()
            # Who sees a node expects it to be given work.
            if node.announced or not node.alive
        ]

    def _demands(self, event: Received, now: float) -> Any:
        """What waits for room on any node, and why. A placement group counts as one: it comes as a whole.

        A node without others keeps what else waits for itself.
        """
        waiting = [
            {"label": demand.label, "count": demand.count, "demand": demand.demand, "why": why}
            for demand, why in self._service.placement.pending()
        ] + [
            {"label": str(group), "count": 1, "demand": demand_of(group.missing.values()), "why": group.why}
            for group in self._service.groups.all()
            if group.state not in ("created", "removed")
        ]
        if not self._service.nodes.is_alone:
            return waiting
        return self._forward(self._service.nodes.head, event, "node.demands", waiting)

    # ------------------------------------------------------------------ actors

    def _reserve_name(
        self, event: Received, now: float, name: str, namespace: str, actor: bytes, meta: bytes | None
    ) -> bytes:
        if not name:
            msg = "ValueError"
            raise RefusedError(msg, "an actor's name must not be empty")
        actors = self._service.actors
        reserved = actors.reserve_name(event.sender, name, namespace, actor, meta or b"")
        for effect in actors.take_effects():  # the record, before the answer
            self._emit(effect)
        return reserved

    def _by_name(self, event: Received, now: float, name: str, namespace: str | None) -> dict[str, Any]:
        actors = self._service.actors
        held = actors.names.get(name, namespace or "")
        actor = actors.get(held.actor) if held is not None else None
        if held is None or actor is None:
            known = [x.name for x in actors.names.listed(namespace or "")][:10]
            there = f"There are: {', '.join(known)}" if known else "No actor in it has a name"
            msg = "ValueError"
            raise RefusedError(
                msg,
                f"no actor is named {name!r} in namespace {namespace!r}. {there}. It may have died, never have been "
                "created, or be in another namespace",
            )
        return {"meta": held.meta, **self._describe(actor)}

    def _list_named(self, event: Received, now: float, namespace: str | None) -> list[dict[str, str]]:
        return [{"name": x.name, "namespace": x.namespace} for x in self._service.actors.names.listed(namespace)]

    def _actor_info(self, event: Received, now: float, actor: bytes) -> dict[str, Any]:
        record = self._service.actors.get(actor)
        if record is None:
            msg = "ValueError"
            raise RefusedError(msg, f"actor {actor.hex()} is not known here, or ended long ago")
        return self._describe(record)

    def _actor_list(self, event: Received, now: float) -> list[dict[str, Any]]:
        return [self._describe(actor) for actor in self._service.actors.actors()]

    def _describe(self, actor: Actor) -> dict[str, Any]:
        job = self._service.jobs.get(actor.job)
        return {
            "actor": actor.id,
            "owner": actor.owner,
            "owner_node": actor.owner_node,
            "class_name": actor.class_name,
            "name": actor.name,
            "namespace": actor.namespace or (job.namespace if job is not None else ""),
            "detached": actor.detached,
            "state": _WIRE_STATES[self._service.actors.wire_state(actor)],
            "incarnation": actor.incarnation,
            "restarts_left": actor.restarts_left,
            "proc": actor.proc,
            "node": actor.node,
            "pid": actor.pid,
            "job": actor.job,
            "run": actor.run,
            "place": actor.place,
            "cause": "__init__ raised"
            if actor.cause_kind == CAUSE_INIT_ERROR
            else actor.cause.decode(errors="replace"),
        }

    # ------------------------------------------------------------------ reasons

    def _why_lease(self, event: Received, now: float, class_id: int, owner: int) -> Any:
        """Why the demand of an owner on another node is not met: its node knows."""
        node = self._service.members.node_of(owner)
        if not node:
            return "its owner has ended"
        return self._forward(node, event, "node.why_lease", class_id, owner)

    def _why_lease_elsewhere(self, event: Received, now: float, class_id: int, owner: int, local: str) -> str:
        elsewhere = self._service.placement.why((owner, class_id))
        # What no node has is the same reason everywhere.
        return f"{local}; elsewhere: {elsewhere}" if elsewhere and elsewhere != local else local

    def _why_actor(self, event: Received, now: float, actor: bytes) -> Any:
        record = self._service.actors.get(actor)
        if record is None:
            return "the actor is not known here: it ended long ago, or its creation is still on its way"
        match record.state:
            case "pending":
                node = self._service.placement.node_of_actor(actor)
                if node:
                    return self._forward(node, event, "node.why_actor", actor, record.class_name)
                waits = self._service.placement.why((ACTORS, actor))
                return f"{record.class_name} {waits or 'is about to be placed on a node'}"
            case "starting":
                life = f" (restart {record.incarnation})" if record.incarnation else ""
                return f"{record.class_name}.__init__ runs in process {record.pid}{life}{self._where(record)}"
            case "alive":
                return f"{record.class_name} is alive in process {record.pid}{self._where(record)}"
            case _:
                return self._describe(record)["cause"] or "dead"

    def _where(self, actor: Actor) -> str:
        node = self._service.nodes.find(actor.node)
        return f" on {node}" if node is not None and not self._service.nodes.is_alone else ""

    def _why_process(self, event: Received, now: float, proc: int) -> str:
        member = self._service.members.get(proc)
        if member is None:
            return "a process that has ended"
        return f"the {member} on {self._service.nodes.find(member.node)}"

    # ------------------------------------------------------------------ keys and jobs

    def _kv_put(
        self, event: Received, now: float, key: bytes, value: bytes, namespace: str | None, overwrite: Any
    ) -> bool:
        store, space = self._service.kv, namespace or ""
        is_new = store.put(space, key, value, overwrite=overwrite in (None, True))
        self._emit(kv.record(space, key, store.get(space, key)))
        return is_new

    def _kv_get(self, event: Received, now: float, key: bytes, namespace: str | None) -> bytes | None:
        return self._service.kv.get(namespace or "", key)

    def _kv_del(self, event: Received, now: float, key: bytes, namespace: str | None, prefix: Any) -> int:
        deleted = self._service.kv.delete(namespace or "", key, prefix=bool(prefix))
        for each in deleted:
            self._emit(kv.record(namespace or "", each, None))
        return len(deleted)

    def _kv_keys(self, event: Received, now: float, prefix: bytes | None, namespace: str | None) -> list[bytes]:
        return self._service.kv.keys(namespace or "", prefix or b"")

    def _job_config(self, event: Received, now: float, config: dict[str, Any]) -> int:
        member = self._service.members.get(event.sender)
        job = self._service.jobs.get(member.job) if member is not None else None
        if job is None or job.driver != event.sender:
            msg = "ValueError"
            raise RefusedError(msg, "only a driver has a job to configure")
        self._service.jobs.configure(job.number, config)
        self._emit(self._service.jobs.record(job.number))
        for node in self._service.nodes.living():
            self._emit(ToNode(node.key, JobChanged(job.number, job.driver, job.config)))
        return job.number

    def _job_list(self, event: Received, now: float) -> list[dict[str, object]]:
        return self._service.jobs.list()

    def _stats(self, event: Received, now: float, counts: dict[str, int]) -> dict[str, int]:
        """Counts of the asker's node, with those of the control service."""
        service = self._service
        counts = {"kv_bytes": service.kv.bytes_used, **counts}
        for table in (service.actors, service.members, service.nodes, service.groups, service.placement):
            counts.update(table.statistics())
        return counts


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
