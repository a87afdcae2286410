"""What ran when, as Chrome trace events: Perfetto and chrome://tracing load them.

A process of the trace is a node, a thread is a worker, and a slice is an attempt of a task. Slices of a worker that
overlap, as an asynchronous actor's calls do, get rows of their own, because viewers nest what overlaps.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray._runtime import history, rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray._runtime.asking import Asker
    from ray._runtime.history import Log

__all__ = ["of_cluster", "of_logs", "save"]

ATTEMPTS_MAX = 1_000_000  # slices; viewers hardly take more, and the oldest are left out


def of_cluster(asker: Asker) -> list[dict[str, Any]]:
    """Everything that has ended, and what runs now."""
    live, _ = rows._live_tasks(asker, rows.ROWS_MAX, rows.Listing(rows.ROWS_MAX))
    nodes = asker.nodes()
    names = {node["node"]: str(node["NodeManagerAddress"]) for node in nodes}
    logs = [history.NodeLog(asker, node["node"]) for node in nodes if node["Alive"]]
    return _events(logs, names, [row for row in live.values() if row["start_time_ms"]])


def of_logs(logs: Iterable[Log]) -> list[dict[str, Any]]:
    """Everything that ended, of a cluster that may be gone."""
    return _events(logs, {}, [])


def save(events: list[dict[str, Any]], path: str) -> None:
    """Writes the events as JSON, with the fast encoder: there may be a million."""
    import msgspec

    text = msgspec.json.encode(events)
    with open(path, "wb") as file:
        file.write(text)


class _Slice:
    __slots__ = ("arguments", "category", "end_ns", "name", "start_ns")

    def __init__(self, name: str, category: str, start_ns: int, end_ns: int, arguments: dict[str, Any]) -> None:
        self.name = name
        self.category = category
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.arguments = arguments


def _events(logs: Iterable[Log], names: dict[int, str], running: list[dict[str, Any]]) -> list[dict[str, Any]]:
    workers: dict[tuple[str, str], list[_Slice]] = {}
    places: dict[str, str] = {}
    count = 0
    for log in logs:
        for attempt in history.attempts(log):
            if not attempt.ran:
                continue
            count += 1
            if count > ATTEMPTS_MAX:
                break
            row = rows.row_of(attempt, {})
            places.setdefault(row["node_id"], names.get(attempt.node, row["node_id"][:16]))
            workers.setdefault((row["node_id"], row["worker_id"]), []).append(_slice_of(row, attempt))
    now = time.time_ns()
    for row in running:
        start = int(row["start_time_ms"] * 1_000_000)
        place = next((names[key] for key in names if rows.node_id(key) == row["node_id"]), row["node_id"][:16])
        places.setdefault(row["node_id"], place)
        piece = _Slice(row["name"], "task:running", start, max(now, start), _arguments(row))
        workers.setdefault((row["node_id"], row["worker_id"]), []).append(piece)
    return list(_traced(workers, places))


def _slice_of(row: dict[str, Any], attempt: history.Attempt) -> _Slice:
    end = attempt.start_ns + attempt.run_ns
    return _Slice(row["name"], "task:execute", attempt.start_ns, end, _arguments(row))


def _arguments(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("task_id", "attempt_number", "state", "job_id", "actor_id", "worker_pid", "error_type")
    return {key: row[key] for key in keys if row.get(key) is not None}


def _traced(workers: dict[tuple[str, str], list[_Slice]], places: dict[str, str]) -> Iterable[dict[str, Any]]:
    numbers = {node: number for number, node in enumerate(places)}
    for node, number in numbers.items():
        name = {"name": f"Node {places[node]}"}
        yield {"ph": "M", "name": "process_name", "pid": number, "args": name}
    thread = 0
    for (node, worker), slices in sorted(workers.items()):
        slices.sort(key=lambda piece: (piece.start_ns, -piece.end_ns))
        lanes: list[int] = []
        """When each row of this worker is free again."""
        first = thread
        for piece in slices:
            lane = next((lane for lane, free_at in enumerate(lanes) if free_at <= piece.start_ns), len(lanes))
            if lane == len(lanes):
                lanes.append(0)
            lanes[lane] = piece.end_ns
            yield {
                "ph": "X",
                "cat": piece.category,
                "name": piece.name,
                "pid": numbers[node],
                "tid": first + lane,
                "ts": piece.start_ns / 1000,
                "dur": (piece.end_ns - piece.start_ns) / 1000,
                "args": piece.arguments,
            }
        for lane in range(len(lanes)):
            name = {"name": f"worker:{worker[:16]}" + (f" ({lane + 1})" if lane else "")}
            yield {"ph": "M", "name": "thread_name", "pid": numbers[node], "tid": first + lane, "args": name}
        thread += len(lanes)
