"""Sums of rows: how many tasks, actors and objects there are in each state."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ActorSummaries",
    "ActorSummaryPerClass",
    "Link",
    "NestedTaskSummary",
    "ObjectSummaries",
    "ObjectSummaryPerKey",
    "StateSummary",
    "TaskSummaries",
    "TaskSummaryPerFuncOrClassName",
]


@dataclass(init=True)
class TaskSummaryPerFuncOrClassName:
    """Tasks of one function, or calls of one method."""

    func_or_class_name: str
    type: str
    state_counts: Any = field(default_factory=dict)


@dataclass
class Link:
    """What an entry of a nested summary stands for."""

    type: str
    id: str


@dataclass(init=True)
class NestedTaskSummary:
    """A task, or several that were submitted by the same one under the same name."""

    name: str
    key: str
    type: str
    timestamp: int | None = None
    state_counts: Any = field(default_factory=dict)
    children: list[NestedTaskSummary] = field(default_factory=list)
    link: Link | None = None


@dataclass
class TaskSummaries:
    """All tasks."""

    summary: dict[str, TaskSummaryPerFuncOrClassName] | list[NestedTaskSummary]
    total_tasks: int
    total_actor_tasks: int
    total_actor_scheduled: int
    summary_by: str = "func_name"

    @classmethod
    def to_summary_by_func_name(cls, *, tasks: list[dict[str, Any]]) -> TaskSummaries:
        """Counts by function or method.

        Args:
            tasks: Rows with a name, a type and a state; a row may have a `count` and stand for as many.
        """
        summary: dict[str, TaskSummaryPerFuncOrClassName] = {}
        totals: Counter[str] = Counter()
        for task in tasks:
            name, count = task["func_or_class_name"], task.get("count", 1)
            entry = summary.setdefault(name, TaskSummaryPerFuncOrClassName(name, task["type"]))
            entry.state_counts[task["state"]] = entry.state_counts.get(task["state"], 0) + count
            totals[task["type"]] += count
        return cls(summary, *_totals(totals))

    @classmethod
    def to_summary_by_lineage(cls, *, tasks: list[dict[str, Any]], actors: list[dict[str, Any]]) -> TaskSummaries:
        """Counts along who submitted whom.

        Args:
            tasks: Rows of tasks, with the ids of their parents.
            actors: Rows of actors, for the names of those whose methods are called.
        """
        by_id = {task["task_id"]: task for task in tasks}
        children: dict[str, list[dict[str, Any]]] = {}
        for task in by_id.values():
            parent = task.get("parent_task_id") or ""
            children.setdefault(parent if parent in by_id else "", []).append(task)
        names = {actor["actor_id"]: actor["class_name"] for actor in actors}

        totals = Counter(str(task["type"]) for task in by_id.values())
        return cls(_nest("", children, names), *_totals(totals), summary_by="lineage")


def _totals(by_type: Counter[str]) -> tuple[int, int, int]:
    return by_type["NORMAL_TASK"], by_type["ACTOR_TASK"], by_type["ACTOR_CREATION_TASK"]


def _nest(parent: str, children: dict[str, list[dict[str, Any]]], names: dict[str, str]) -> list[NestedTaskSummary]:
    """Without recursion: chains of tasks may be long."""
    top: list[NestedTaskSummary] = []
    work: list[tuple[str, list[NestedTaskSummary]]] = [(parent, top)]
    while work:
        key, out = work.pop()
        for task in children.get(key, ()):
            name = str(task["func_or_class_name"])
            actor = names.get(task.get("actor_id") or "")
            entry = NestedTaskSummary(
                name=f"{actor}: {name}" if actor and not name.startswith(actor) else name,
                key=task["task_id"],
                type=task["type"],
                timestamp=task.get("creation_time_ms") or task.get("start_time_ms"),
                state_counts={task["state"]: 1},
                link=Link("task", task["task_id"]),
            )
            out.append(entry)
            work.append((task["task_id"], entry.children))
    return top


@dataclass
class ActorSummaryPerClass:
    """Actors of one class."""

    class_name: str
    state_counts: dict[str, int] = field(default_factory=dict)


@dataclass
class ActorSummaries:
    """All actors."""

    summary: dict[str, ActorSummaryPerClass]
    total_actors: int
    summary_by: str = "class"

    @classmethod
    def to_summary(cls, *, actors: list[dict[str, Any]]) -> ActorSummaries:
        """Counts by class.

        Args:
            actors: Rows of actors.
        """
        summary: dict[str, ActorSummaryPerClass] = {}
        for actor in actors:
            entry = summary.setdefault(actor["class_name"], ActorSummaryPerClass(actor["class_name"]))
            entry.state_counts[actor["state"]] = entry.state_counts.get(actor["state"], 0) + 1
        return cls(summary, len(actors))


@dataclass
class ObjectSummaryPerKey:
    """Objects that were made at one place."""

    total_objects: int
    total_size_mb: float
    total_num_workers: int
    total_num_nodes: int
    task_state_counts: Any = field(default_factory=dict)
    task_attempt_number_counts: dict[str, int] = field(default_factory=dict)
    ref_type_counts: dict[str, int] = field(default_factory=dict)


@dataclass
class ObjectSummaries:
    """All objects."""

    summary: dict[str, ObjectSummaryPerKey]
    total_objects: int
    total_size_mb: float
    callsite_enabled: bool
    summary_by: str = "callsite"

    @classmethod
    def to_summary(cls, *, objects: list[dict[str, Any]]) -> ObjectSummaries:
        """Counts by where the objects were made.

        Args:
            objects: Rows of objects.
        """
        summary: dict[str, ObjectSummaryPerKey] = {}
        workers: dict[str, set[Any]] = {}
        nodes: dict[str, set[Any]] = {}
        total_bytes = 0
        for row in objects:
            key = row["call_site"]
            entry = summary.setdefault(key, ObjectSummaryPerKey(0, 0.0, 0, 0))
            size = max(row["object_size"], 0)
            total_bytes += size
            entry.total_objects += 1
            entry.total_size_mb += size / 1024**2
            for counts, value in (
                (entry.task_state_counts, row["task_status"]),
                (entry.task_attempt_number_counts, str(row["attempt_number"])),
                (entry.ref_type_counts, row["reference_type"]),
            ):
                counts[value] = counts.get(value, 0) + 1
            workers.setdefault(key, set()).add((row["ip"], row["pid"]))
            nodes.setdefault(key, set()).add(row["ip"])
            entry.total_num_workers, entry.total_num_nodes = len(workers[key]), len(nodes[key])
        enabled = any(key != "disabled" for key in summary)
        return cls(summary, len(objects), total_bytes / 1024**2, enabled)


@dataclass
class StateSummary:
    """Summaries by node; Ray's own has "cluster" as the only one."""

    node_id_to_summary: dict[str, TaskSummaries | ActorSummaries | ObjectSummaries]
