"""The rows of `ray.util.state`: one class for each kind, with its columns.

A column is a field made by `state_column`, which says whether lists can be filtered by it, whether only detailed lists
have it, and how people are shown it.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

__all__ = [
    "ActorState",
    "ClusterEventState",
    "Humanify",
    "JobState",
    "NodeState",
    "ObjectState",
    "PlacementGroupState",
    "RuntimeEnvState",
    "StateSchema",
    "TaskState",
    "WorkerState",
    "state_column",
]

TypeActorStatus: TypeAlias = Literal["DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING", "DEAD"]
TypeNodeStatus: TypeAlias = Literal["ALIVE", "DEAD"]
TypePlacementGroupStatus: TypeAlias = Literal["PENDING", "PREPARED", "CREATED", "REMOVED", "RESCHEDULING"]
TypeTaskType: TypeAlias = Literal["NORMAL_TASK", "ACTOR_CREATION_TASK", "ACTOR_TASK", "DRIVER_TASK"]
TypeReferenceType: TypeAlias = Literal[
    "ACTOR_HANDLE",
    "PINNED_IN_MEMORY",
    "LOCAL_REFERENCE",
    "USED_BY_PENDING_TASK",
    "CAPTURED_IN_OBJECT",
    "UNKNOWN_STATUS",
]
TypeWorkerType: TypeAlias = Literal["WORKER", "DRIVER", "SPILL_WORKER", "RESTORE_WORKER"]
TypeWorkerExitType: TypeAlias = Literal[
    "SYSTEM_ERROR", "INTENDED_SYSTEM_EXIT", "USER_ERROR", "INTENDED_USER_EXIT", "NODE_OUT_OF_MEMORY"
]


class Humanify:
    """Values as people like to read them."""

    @staticmethod
    def timestamp(x: float) -> str:
        """Milliseconds since 1970 as a date and time; nothing for a time that is not known."""
        if not x:
            return ""
        return datetime.datetime.fromtimestamp(x / 1000).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]

    @staticmethod
    def memory(x: int) -> str:
        """Bytes in the largest unit that fits."""
        amount = float(x)
        for unit in ("B", "KiB", "MiB"):
            if abs(amount) < 1024:
                return f"{amount:.3f} {unit}"
            amount /= 1024
        return f"{amount:.3f} GiB"

    @staticmethod
    def duration(x: int) -> str:
        """Milliseconds as hours, minutes and seconds."""
        return str(datetime.timedelta(milliseconds=x))

    @staticmethod
    def events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Changes of state with readable times."""
        return [
            {**event, "created_ms": Humanify.timestamp(event["created_ms"])} if "created_ms" in event else event
            for event in events
        ]

    @staticmethod
    def node_resources(resources: dict[str, Any]) -> dict[str, Any]:
        """Resources with readable amounts of memory."""
        return {name: Humanify.memory(x) if "memory" in name else x for name, x in resources.items()}


def state_column(*, filterable: bool, detail: bool = False, format_fn: Any = None, **kwargs: Any) -> Any:
    """A field that is a column.

    Args:
        filterable: Whether lists can be filtered by it.
        detail: Whether only detailed lists have it.
        format_fn: How people are shown it.
        **kwargs: For `dataclasses.field`.
    """
    metadata = {"filterable": filterable, "detail": detail, "format_fn": format_fn}
    return field(metadata={**kwargs.pop("metadata", {}), **metadata}, **kwargs)


class StateSchema:
    """A row, whose attributes are also its items."""

    @classmethod
    def columns(cls) -> set[str]:
        """Every column."""
        return set(cls.list_columns(detail=True))

    @classmethod
    def list_columns(cls, detail: bool = True) -> list[str]:
        """Columns in their order, without those of detailed lists unless asked for."""
        return [x.name for x in _fields(cls) if detail or not x.metadata.get("detail", False)]

    @classmethod
    def filterable_columns(cls) -> set[str]:
        """Columns that lists can be filtered by."""
        return {x.name for x in _fields(cls) if x.metadata.get("filterable", False)}

    @classmethod
    def base_columns(cls) -> set[str]:
        """Columns of every list."""
        return set(cls.list_columns(detail=False))

    @classmethod
    def detail_columns(cls) -> set[str]:
        """Columns of detailed lists."""
        return set(cls.list_columns(detail=True))

    @classmethod
    def humanify(cls, state: dict[str, Any]) -> dict[str, Any]:
        """A row with its values as people like to read them."""
        shown = dict(state)
        for x in _fields(cls):
            format_fn = x.metadata.get("format_fn")
            if format_fn is not None and shown.get(x.name) is not None:
                shown[x.name] = format_fn(shown[x.name])
        return shown

    def asdict(self) -> dict[str, Any]:
        """The row as a dictionary."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def get(self, key: str, default: Any = None) -> Any:
        """A column, or `default` if there is none of that name."""
        return getattr(self, key, default)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)


def _fields(schema: Any) -> tuple[dataclasses.Field[Any], ...]:
    return fields(schema)


@dataclass
class ActorState(StateSchema):
    """An actor."""

    actor_id: str = state_column(filterable=True)
    class_name: str = state_column(filterable=True)
    state: TypeActorStatus = state_column(filterable=True)
    job_id: str = state_column(filterable=True)
    name: str | None = state_column(filterable=True)
    node_id: str | None = state_column(filterable=True)
    pid: int | None = state_column(filterable=True)
    ray_namespace: str | None = state_column(filterable=True)
    serialized_runtime_env: str | None = state_column(filterable=False, detail=True, default=None)
    required_resources: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    death_cause: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    is_detached: bool | None = state_column(filterable=False, detail=True, default=None)
    placement_group_id: str | None = state_column(filterable=True, detail=True, default=None)
    repr_name: str | None = state_column(filterable=True, detail=True, default=None)
    num_restarts: int = state_column(filterable=False, detail=True, default=None)
    num_restarts_due_to_lineage_reconstruction: int = state_column(filterable=False, detail=True, default=None)
    num_restarts_due_to_node_preemption: int = state_column(filterable=False, detail=True, default=None)
    call_site: str | None = state_column(filterable=False, detail=True, default=None)
    label_selector: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    fallback_strategy: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)


@dataclass
class PlacementGroupState(StateSchema):
    """A placement group."""

    placement_group_id: str = state_column(filterable=True)
    name: str = state_column(filterable=True)
    creator_job_id: str = state_column(filterable=True)
    state: TypePlacementGroupStatus = state_column(filterable=True)
    bundles: list[dict[str, Any]] | None = state_column(filterable=False, detail=True, default=None)
    is_detached: bool | None = state_column(filterable=True, detail=True, default=None)
    stats: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    topology_strategy: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    topology_assignments: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)


@dataclass
class NodeState(StateSchema):
    """A node."""

    node_id: str = state_column(filterable=True)
    node_ip: str = state_column(filterable=True)
    is_head_node: bool = state_column(filterable=True)
    state: TypeNodeStatus = state_column(filterable=True)
    state_message: str | None = state_column(filterable=False)
    node_name: str = state_column(filterable=True)
    resources_total: dict[str, Any] = state_column(filterable=False, format_fn=Humanify.node_resources)
    labels: dict[str, Any] = state_column(filterable=False)
    start_time_ms: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    end_time_ms: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)


@dataclass(kw_only=True)
class JobState(StateSchema):
    """A job: a driver's program."""

    type: str = state_column(filterable=True)
    job_id: str | None = state_column(filterable=True, default=None)
    submission_id: str | None = state_column(filterable=True, default=None)
    driver_info: dict[str, Any] | None = state_column(filterable=False, default=None)
    status: str = state_column(filterable=True)
    entrypoint: str = state_column(filterable=False)
    message: str | None = state_column(filterable=False, default=None)
    error_type: str | None = state_column(filterable=False, default=None)
    start_time: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    end_time: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    metadata: dict[str, str] | None = state_column(filterable=False, detail=True, default=None)
    runtime_env: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    driver_agent_http_address: str | None = state_column(filterable=False, detail=True, default=None)
    driver_node_id: str | None = state_column(filterable=False, detail=True, default=None)
    driver_exit_code: int | None = state_column(filterable=False, detail=True, default=None)

    @classmethod
    def schema_dict(cls) -> dict[str, Any]:
        """Columns with the names of their types."""
        return {x.name: x.type for x in _fields(cls)}


@dataclass
class WorkerState(StateSchema):
    """A process: a worker or a driver."""

    worker_id: str = state_column(filterable=True)
    is_alive: bool = state_column(filterable=True)
    worker_type: TypeWorkerType = state_column(filterable=True)
    exit_type: TypeWorkerExitType | None = state_column(filterable=True)
    node_id: str = state_column(filterable=True)
    ip: str = state_column(filterable=True)
    pid: int = state_column(filterable=True)
    exit_detail: str | None = state_column(filterable=False, detail=True, default=None)
    worker_launch_time_ms: int | None = state_column(
        filterable=False, detail=True, default=None, format_fn=Humanify.timestamp
    )
    worker_launched_time_ms: int | None = state_column(
        filterable=False, detail=True, default=None, format_fn=Humanify.timestamp
    )
    start_time_ms: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    end_time_ms: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    debugger_port: int | None = state_column(filterable=True, detail=True, default=None)
    num_paused_threads: int | None = state_column(filterable=True, detail=True, default=None)


@dataclass
class ClusterEventState(StateSchema):
    """Something that happened to the cluster."""

    severity: str = state_column(filterable=True)
    time: str = state_column(filterable=False)
    source_type: str = state_column(filterable=True)
    message: str = state_column(filterable=False)
    event_id: str = state_column(filterable=True)
    custom_fields: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)


@dataclass
class TaskState(StateSchema):
    """An attempt of a task: waiting, running, or ended."""

    task_id: str = state_column(filterable=True)
    attempt_number: int = state_column(filterable=True)
    name: str = state_column(filterable=True)
    state: Any = state_column(filterable=True)
    job_id: str = state_column(filterable=True)
    actor_id: str | None = state_column(filterable=True)
    type: TypeTaskType = state_column(filterable=True)
    func_or_class_name: str = state_column(filterable=True)
    parent_task_id: str = state_column(filterable=True)
    node_id: str | None = state_column(filterable=True)
    worker_id: str | None = state_column(filterable=True)
    worker_pid: int | None = state_column(filterable=True)
    error_type: str | None = state_column(filterable=True)
    language: str | None = state_column(filterable=True, detail=True, default=None)
    required_resources: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    runtime_env_info: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    placement_group_id: str | None = state_column(filterable=True, detail=True, default=None)
    events: list[dict[str, Any]] | None = state_column(
        filterable=False, detail=True, default=None, format_fn=Humanify.events
    )
    profiling_data: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    creation_time_ms: int | None = state_column(
        filterable=False, detail=True, default=None, format_fn=Humanify.timestamp
    )
    start_time_ms: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    end_time_ms: int | None = state_column(filterable=False, detail=True, default=None, format_fn=Humanify.timestamp)
    task_log_info: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    error_message: str | None = state_column(filterable=False, detail=True, default=None)
    is_debugger_paused: bool | None = state_column(filterable=True, detail=True, default=None)
    call_site: str | None = state_column(filterable=False, detail=True, default=None)
    label_selector: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)
    fallback_strategy: dict[str, Any] | None = state_column(filterable=False, detail=True, default=None)


@dataclass
class ObjectState(StateSchema):
    """A process's hold on an object: its owner's or a borrower's."""

    object_id: str = state_column(filterable=True)
    object_size: int = state_column(filterable=True, format_fn=Humanify.memory)
    task_status: Any = state_column(filterable=True)
    attempt_number: int = state_column(filterable=True)
    reference_type: TypeReferenceType = state_column(filterable=True)
    call_site: str = state_column(filterable=True)
    type: TypeWorkerType = state_column(filterable=True)
    pid: int = state_column(filterable=True)
    ip: str = state_column(filterable=True)


@dataclass
class RuntimeEnvState(StateSchema):
    """An environment that a node has made."""

    runtime_env: dict[str, Any] = state_column(filterable=True)
    success: bool = state_column(filterable=True)
    creation_time_ms: float | None = state_column(filterable=False, format_fn=Humanify.timestamp)
    node_id: str = state_column(filterable=True)
    ref_cnt: int | None = state_column(filterable=False, detail=True, default=None)
    error: str | None = state_column(filterable=True, detail=True, default=None)
