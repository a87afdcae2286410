"""What a cluster does, as rows: asked of its nodes and members, and read from its event logs.

Owns nothing. A row is a dictionary with the columns of `ray.util.state.common`. Who asks gets what could be had in
time, and is told what is missing: nodes and processes that have not answered, and rows beyond a limit.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from ray._bundle_names import plain, split
from ray._runtime import groups, history
from ray._runtime.ids import JobID, NodeID, WorkerID
from ray._runtime.options import from_fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ray._runtime.asking import Asker
    from ray._runtime.history import Attempt, Log

__all__ = ["Filter", "Listing", "matches", "tasks", "tasks_of_logs"]

Filter = tuple[str, str, Any]

ROWS_MAX = 10_000  # of one process, and of one list
ROLE_DRIVER = 2
KINDS = ("NORMAL_TASK", "ACTOR_CREATION_TASK", "ACTOR_TASK")
DRIVER_TASK = "f" * 40

ERRORS = {
    1: "TASK_EXECUTION_EXCEPTION",
    2: "WORKER_DIED",
    3: "ACTOR_DIED",
    4: "ACTOR_UNAVAILABLE",
    5: "TASK_CANCELLED",
    6: "OWNER_DIED",
    7: "OBJECT_LOST",
    8: "OUT_OF_MEMORY",
    9: "PENDING_CALLS_LIMIT_EXCEEDED",
    10: "TASK_UNSCHEDULABLE_ERROR",
}  # Ray's names of what `ErrorCode` says


class Listing:
    """Rows that were found.

    Attributes:
        rows: Those that match, up to the limit.
        total: How many there are at least, matching or not.
        silent: What has not answered, in words.
        is_cut: Whether there may be more that match.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.rows: list[dict[str, Any]] = []
        self.total = 0
        self.silent: list[str] = []
        self.is_cut = False

    def add(self, row: dict[str, Any], filters: list[Filter]) -> None:
        """Takes a row if it matches; beyond the limit it is only counted."""
        self.total += 1
        if matches(row, filters):
            if len(self.rows) < self.limit:
                self.rows.append(row)
            else:
                self.is_cut = True

    def warnings(self) -> list[str]:
        """What a reader should know."""
        found = [f"{what} has not answered; what it knows is missing here" for what in self.silent]
        if self.is_cut:
            found.append(f"there are more than the limit of {self.limit}; filter the list, or raise its limit")
        return found


def matches(row: dict[str, Any], filters: list[Filter]) -> bool:
    """Whether a row meets all conditions. Texts are compared without regard to case, as in Ray."""
    for key, predicate, value in filters:
        found = row.get(key)
        same = _same(found, value)
        if same != (predicate == "="):
            return False
    return True


def _same(found: Any, value: Any) -> bool:
    if isinstance(found, bool):
        return str(found).lower() == str(value).lower() or (value in ("1", "0") and found == (value == "1"))
    if found is None:
        return value is None or str(value).lower() in ("none", "null", "")
    if isinstance(found, int | float) and not isinstance(value, int | float):
        try:
            return found == float(value)
        except ValueError:
            return False
    return str(found).lower() == str(value).lower() if isinstance(found, str) else bool(found == value)


def node_id(key: int) -> str:
    """A node's id in hexadecimal."""
    return NodeID._from_key(key).hex()


def worker_id(proc: int) -> str:
    """A process's id in hexadecimal."""
    return WorkerID._from_key(proc).hex()


def job_id(number: int) -> str:
    """A job's id in hexadecimal."""
    return JobID.from_int(number).hex()


def _ms(ns: int) -> int | None:
    return ns // 1_000_000 if ns else None


# --- from nodes and members ----------------------------------------------------------------------------------------


class Member:
    """A process that has answered: who it is, and its rows."""

    def __init__(self, node: int, told: list[Any]) -> None:
        self.node = node
        self.proc, self.role, self.pid, self.job, self.total, self.packed = told

    @property
    def rows(self) -> list[Any]:
        """What it said."""
        rows: list[Any] = msgspec.msgpack.decode(self.packed)
        return rows


def collect(asker: Asker, what: str, limit: int, listing: Listing) -> list[Member]:
    """Asks all nodes and their members. Those that do not answer are noted in `listing`."""
    answer = asker.collect(what, min(limit, ROWS_MAX))
    members = []
    for node, told, silent in answer["nodes"]:
        members += [Member(node, each) for each in told]
        listing.silent += [f"process {pid} on node {node_id(node)[:16]}" for pid in silent]
    listing.silent += [f"node {node_id(node)[:16]}" for node in answer["silent"]]
    return members


def tasks(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """Attempts of tasks: those that have not ended, and after them the ended ones, the last first."""
    listing = Listing(limit)
    live, drivers = _live_tasks(asker, ROWS_MAX if filters else limit, listing)
    logs = [history.NodeLog(asker, node["node"]) for node in asker.nodes() if node["Alive"]]
    wanted = next((bytes.fromhex(value) for key, how, value in filters if (key, how) == ("task_id", "=")), b"")
    ended: list[dict[str, Any]] = []
    for attempt in _each(logs, wanted, asker, listing):
        live.pop((attempt.task, attempt.attempt), None)
        listing.total += 1
        if may_match(attempt, filters) and matches(row := row_of(attempt, drivers), filters):
            ended.append(row)
            if len(ended) >= limit:
                listing.is_cut = True
                break
    live_rows = list(live.values())
    for row in live_rows:
        listing.add(row, filters)
    room = limit - len(listing.rows)
    listing.is_cut = listing.is_cut or len(ended) > room
    listing.rows += ended[: max(room, 0)]
    return listing


def tasks_of_logs(logs: Iterable[Log], filters: list[Filter], limit: int) -> Listing:
    """Attempts in the event logs of a cluster that may be gone, the last first within each log."""
    listing = Listing(limit)
    for log in logs:
        for attempt in history.attempts(log):
            if may_match(attempt, filters):
                listing.add(row_of(attempt, {}), filters)
            else:
                listing.total += 1
            if listing.is_cut:
                return listing
    return listing


def _each(logs: Iterable[Log], task: bytes, asker: Asker, listing: Listing) -> Iterator[Attempt]:
    """All attempts, until time is up. What a node does not give is noted in `listing`."""
    for log in logs:
        try:
            for count, attempt in enumerate(history.attempts(log, task)):
                if count % 1024 == 0 and not asker.left_s:
                    listing.silent.append(f"the end of the event log of node {node_id(log.node)[:16]}")
                    return
                yield attempt
        except (ValueError, TimeoutError, RuntimeError):
            listing.silent.append(f"the event log of node {node_id(log.node)[:16]}")


def _live_tasks(
    asker: Asker, limit: int, listing: Listing
) -> tuple[dict[tuple[bytes, int], dict[str, Any]], dict[int, int]]:
    """Unfinished attempts by task and number, and the jobs of drivers by process.

    An owner knows all of its tasks, and a worker those that run in it: what it says counts.
    """
    members = collect(asker, "tasks", limit, listing)
    drivers = {member.proc: member.job for member in members if member.role == ROLE_DRIVER}
    rows: dict[tuple[bytes, int], dict[str, Any]] = {}
    for runs in (False, True):
        for member in members:
            if not runs:
                listing.is_cut = listing.is_cut or member.total > len(member.rows)
            for told in member.rows:
                if told[-1] != runs:
                    continue
                row = _live_row(member, told, drivers)
                known = rows.get((told[0], told[1]))
                if known is not None:
                    row = {
                        **row,
                        "creation_time_ms": known["creation_time_ms"],
                        "parent_task_id": known["parent_task_id"],
                    }
                rows[told[0], told[1]] = row
    return rows, drivers


def _live_row(member: Member, told: list[Any], drivers: dict[int, int]) -> dict[str, Any]:
    task, attempt, name, method, kind, state, actor, parent, submitted, since, worker, _, runs = told
    proc, node, pid = (member.proc, member.node, member.pid) if runs else worker
    return {
        "task_id": task.hex(),
        "attempt_number": attempt,
        "name": f"{name}.{method}" if kind == 1 else name,
        "state": state,
        "job_id": job_id(member.job),
        "actor_id": actor.hex() if actor else None,
        "type": KINDS[kind],
        "func_or_class_name": f"{name}.{method}" if kind == 1 else name,
        "parent_task_id": parent.hex() if parent else _parent_of(task, drivers),
        "node_id": node_id(node) if node else None,
        "worker_id": worker_id(proc) if proc else None,
        "worker_pid": pid or None,
        "error_type": None,
        "language": "PYTHON",
        "creation_time_ms": _ms(submitted),
        "start_time_ms": _ms(since) if runs else None,
        "events": _events(submitted=submitted, start=since if runs else 0),
    }


def _parent_of(task: bytes, drivers: dict[int, int]) -> str:
    """A driver's own task, for what a driver has submitted; empty where it is not known."""
    job = drivers.get(int.from_bytes(task[8:16], "big"))
    return DRIVER_TASK + job_id(job) if job is not None else ""


def _name_of(attempt: Attempt) -> str:
    of = attempt.of
    return f"{of.name}.{of.method}" if of.kind == 1 else of.name


def _state_of(attempt: Attempt) -> str:
    return "FAILED" if attempt.outcome else "FINISHED"


_CHEAP: dict[str, Callable[[Attempt], Any]] = {
    "func_or_class_name": _name_of,
    "name": _name_of,
    "state": _state_of,
    "type": lambda attempt: KINDS[attempt.of.kind],
}
"""Columns by which most attempts can be left out without a row being made of them: most of a query's time."""


def may_match(attempt: Attempt, filters: list[Filter]) -> bool:
    """Whether the attempt's row could meet all conditions."""
    for key, predicate, value in filters:
        column = _CHEAP.get(key)
        if column is not None and _same(column(attempt), value) != (predicate == "="):
            return False
    return True


def row_of(attempt: Attempt, drivers: dict[int, int]) -> dict[str, Any]:
    """An ended attempt."""
    of, name = attempt.of, _name_of(attempt)
    end = attempt.start_ns + attempt.run_ns
    failed = attempt.outcome != 0
    return {
        "task_id": attempt.task.hex(),
        "attempt_number": attempt.attempt,
        "name": name,
        "state": _state_of(attempt),
        "job_id": job_id(attempt.job),
        "actor_id": of.actor.hex() if of.actor else None,
        "type": KINDS[of.kind],
        "func_or_class_name": name,
        "parent_task_id": _parent_of(attempt.task, drivers),
        "node_id": node_id(attempt.node) if attempt.ran else None,
        "worker_id": worker_id(attempt.proc) if attempt.ran else None,
        "worker_pid": attempt.pid if attempt.ran else None,
        "error_type": ERRORS.get(attempt.outcome, "OTHER") if failed else None,
        "language": "PYTHON",
        "start_time_ms": _ms(attempt.start_ns),
        "end_time_ms": _ms(end),
        "error_message": attempt.text or None,
        "events": _events(start=attempt.start_ns, end=end, state=_state_of(attempt)),
    }


def _events(*, submitted: int = 0, start: int = 0, end: int = 0, state: str = "") -> list[dict[str, Any]]:
    times = (("PENDING_ARGS_AVAIL", submitted), ("RUNNING", start), (state, end))
    return [{"state": name, "created_ms": at / 1e6} for name, at in times if at]


def count_tasks(asker: Asker, listing: Listing) -> list[dict[str, Any]]:
    """Rows that stand for all tasks of one name, type and state, with their `count`."""
    live, _ = _live_tasks(asker, ROWS_MAX, listing)
    logs = [history.NodeLog(asker, node["node"]) for node in asker.nodes() if node["Alive"]]
    counts = _counted(_each(logs, b"", asker, listing), live)
    for row in live.values():
        counts[row["func_or_class_name"], row["type"], row["state"]] += 1
    listing.total = sum(counts.values())
    return _rows_of(counts)


def count_logs(logs: Iterable[Log]) -> list[dict[str, Any]]:
    """The same of event logs alone."""
    return _rows_of(_counted((attempt for log in logs for attempt in history.attempts(log)), {}))


Counts = Counter[tuple[str, str, str]]


def _counted(attempts: Iterable[Attempt], live: dict[tuple[bytes, int], dict[str, Any]]) -> Counts:
    """Attempts by name, type and state; those that have ended are taken from the live ones."""
    counts: Counts = Counter()
    for attempt in attempts:
        if live:
            live.pop((attempt.task, attempt.attempt), None)
        counts[_name_of(attempt), KINDS[attempt.of.kind], _state_of(attempt)] += 1
    return counts


def _rows_of(counts: Counts) -> list[dict[str, Any]]:
    return [
        {"func_or_class_name": name, "type": kind, "state": state, "count": count}
        for (name, kind, state), count in counts.items()
    ]


def objects(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """What each process holds of objects: one row for each process and object."""
    listing = Listing(limit)
    places = {node["node"]: str(node["NodeManagerAddress"]) for node in asker.nodes()}
    for member in collect(asker, "objects", ROWS_MAX if filters else limit, listing):
        listing.is_cut = listing.is_cut or member.total > len(member.rows)
        for told in member.rows:
            listing.add(_object_row(member, told, places.get(member.node, "")), filters)
    return listing


def _object_row(member: Member, told: list[Any], ip: str) -> dict[str, Any]:
    id, size, (stored, ready, failed, owned), counts, attempt, task_state = told
    local, in_tasks, in_objects, borrowers = counts
    status = "FAILED" if failed else "FINISHED" if ready else task_state or "NIL"
    return {
        "object_id": id.hex(),
        "object_size": size if ready else -1,
        "task_status": status,
        "attempt_number": attempt,
        "reference_type": _reference_type(id, local, in_tasks, in_objects),
        "call_site": "disabled",
        "type": "DRIVER" if member.role == ROLE_DRIVER else "WORKER",
        "pid": member.pid,
        "ip": ip,
        "node_id": node_id(member.node),
        "is_owner": owned,
        "is_stored": stored,
        "local_references": local,
        "task_references": in_tasks,
        "contained_references": in_objects,
        "borrowers": borrowers,
    }


def _reference_type(id: bytes, local: int, in_tasks: int, in_objects: int) -> str:
    if id.endswith(b"\xff\xff\xff\xff"):
        return "ACTOR_HANDLE"
    if in_tasks:
        return "USED_BY_PENDING_TASK"
    if local:
        return "LOCAL_REFERENCE"
    # What only borrowers keep has no word of its own in Ray.
    return "CAPTURED_IN_OBJECT" if in_objects else "BORROWED"


# --- from the control service ----------------------------------------------------------------------------------------


def _listed(found: Iterable[dict[str, Any]], filters: list[Filter], limit: int) -> Listing:
    listing = Listing(limit)
    for row in found:
        listing.add(row, filters)
    return listing


def _before(seconds: float | None) -> int | None:
    return None if seconds is None else int((time.time() - seconds) * 1000)


def nodes(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """Nodes, lost ones behind those that live."""
    return _listed(
        (
            {
                "node_id": node_id(node["node"]),
                "node_ip": node["NodeManagerAddress"],
                "is_head_node": bool(node["IsHead"]),
                "state": "ALIVE" if node["Alive"] else "DEAD",
                "state_message": node["Reason"] or None,
                "node_name": node["Name"] or node["NodeManagerAddress"],
                "resources_total": {
                    name: from_fixed(units)
                    for name, units in node["Resources"].items()
                    if units and split(name) is None  # what bundles offer is a part of the same
                },
                "labels": {"ray.io/node-id": node_id(node["node"]), **node["Labels"]},
                "start_time_ms": _before(node["AgeS"]),
                "end_time_ms": None,
            }
            for node in asker.nodes()
        ),
        filters,
        limit,
    )


def actors(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """Actors, also dead ones that are remembered."""
    return _listed((_actor_row(actor) for actor in asker.request("actor.list")), filters, limit)


def _actor_row(actor: dict[str, Any]) -> dict[str, Any]:
    required = {name: from_fixed(units) for name, units in plain(actor["run"]).items() if units}
    group = next((parts[1] for parts in map(split, actor["place"]) if parts is not None), None)
    cause = {"message": actor["cause"]} if actor["cause"] and actor["state"] in ("DEAD", "RESTARTING") else None
    return {
        "actor_id": actor["actor"].hex(),
        "class_name": actor["class_name"],
        "state": actor["state"],
        "job_id": job_id(actor["job"]),
        "name": actor["name"],
        "node_id": node_id(actor["node"]) if actor["node"] else None,
        "pid": actor["pid"] or None,
        "ray_namespace": actor["namespace"],
        "required_resources": required,
        "placement_group_id": group,
        "death_cause": cause,
        "is_detached": actor["detached"],
        "num_restarts": actor["incarnation"],
        "num_restarts_due_to_lineage_reconstruction": 0,
        "num_restarts_due_to_node_preemption": 0,
    }


def jobs(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """Jobs, ended ones included."""
    places = {node["node"]: str(node["NodeManagerAddress"]) for node in asker.nodes()}
    return _listed((_job_row(job, places) for job in asker.request("state.jobs")), filters, limit)


def _job_row(job: dict[str, Any], places: dict[int, str]) -> dict[str, Any]:
    number = job_id(job["job"])
    runs = job["ended_s"] is None
    driver = {"id": number, "node_ip_address": places.get(job["node"], ""), "pid": str(job["pid"])}
    return {
        "type": "DRIVER",
        "job_id": number,
        "submission_id": job["metadata"].get("job_submission_id"),
        "driver_info": driver,
        "status": "RUNNING" if runs else "SUCCEEDED",
        "entrypoint": job["entrypoint"],
        "start_time": _before(job["age_s"]),
        "end_time": _before(job["ended_s"]),
        "metadata": job["metadata"],
        "driver_node_id": node_id(job["node"]) if job["node"] else None,
    }


def placement_groups(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """Placement groups, also removed ones that are remembered."""
    return _listed((_group_row(group) for group in asker.request("group.list")), filters, limit)


def _group_row(group: dict[str, Any]) -> dict[str, Any]:
    bundles = [
        {
            "bundle_id": {"placement_group_id": group["group"].hex(), "bundle_index": index},
            "unit_resources": {name: from_fixed(units) for name, units in bundle.items()},
            "node_id": node_id(node) if node else None,
        }
        for index, (bundle, node) in enumerate(zip(group["bundles"], group["nodes"], strict=True))
    ]
    return {
        "placement_group_id": group["group"].hex(),
        "name": group["name"],
        "creator_job_id": job_id(group["job"]),
        "state": group["state"],
        "bundles": bundles,
        "is_detached": group["detached"],
        "stats": groups.statistics_of(group),
    }


def workers(asker: Asker, filters: list[Filter], limit: int) -> Listing:
    """Workers and drivers, those that have ended behind the others of their node."""
    listing = Listing(limit)
    places = {node["node"]: str(node["NodeManagerAddress"]) for node in asker.nodes()}
    for member in collect(asker, "workers", ROWS_MAX if filters else limit + 1, listing):
        for worker in member.rows:
            listing.add(_worker_row(worker, member.node, places.get(member.node, "")), filters)
    return listing


def _worker_row(worker: dict[str, Any], node: int, ip: str) -> dict[str, Any]:
    is_alive = worker["state"] != "ended"
    started = _before(worker["age_s"])
    return {
        "worker_id": worker_id(worker["proc"]),
        "is_alive": is_alive,
        "worker_type": "DRIVER" if worker["role"] == ROLE_DRIVER else "WORKER",
        "exit_type": None if is_alive else _exit_type(worker),
        "node_id": node_id(node),
        "ip": ip,
        "pid": worker["pid"],
        "exit_detail": worker.get("cause"),
        "worker_launch_time_ms": started,
        "worker_launched_time_ms": started,
        "start_time_ms": started,
        "end_time_ms": _before(worker.get("ended_s")),
        "state": worker["state"],
        "label": worker.get("label", ""),
    }


def _exit_type(worker: dict[str, Any]) -> str:
    if worker["intended"]:
        return "INTENDED_SYSTEM_EXIT"
    return "SYSTEM_ERROR" if worker["exit_code"] <= 0 else "USER_ERROR"


SOURCES: dict[str, Callable[[Asker, list[Filter], int], Listing]] = {
    "actors": actors,
    "jobs": jobs,
    "nodes": nodes,
    "objects": objects,
    "placement_groups": placement_groups,
    "tasks": tasks,
    "workers": workers,
}
"""What can be listed."""
