"""What the functions of `ray.util.state` take and return, under the names by which Ray's users import it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any, TypeAlias

from ray.util.state.schemas import (
    ActorState,
    ClusterEventState,
    Humanify,
    JobState,
    NodeState,
    ObjectState,
    PlacementGroupState,
    RuntimeEnvState,
    StateSchema,
    TaskState,
    WorkerState,
    state_column,
)
from ray.util.state.summaries import (
    ActorSummaries,
    ActorSummaryPerClass,
    Link,
    NestedTaskSummary,
    ObjectSummaries,
    ObjectSummaryPerKey,
    StateSummary,
    TaskSummaries,
    TaskSummaryPerFuncOrClassName,
)

__all__ = [
    "AVAILABLE_STATES",
    "DEFAULT_DOWNLOAD_FILENAME",
    "DEFAULT_LIMIT",
    "DEFAULT_LOG_LIMIT",
    "DEFAULT_RPC_TIMEOUT",
    "DRIVER_TASK_ID_PREFIX",
    "RAY_MAX_LIMIT_FROM_API_SERVER",
    "RAY_MAX_LIMIT_FROM_DATA_SOURCE",
    "ActorState",
    "ActorSummaries",
    "ActorSummaryPerClass",
    "ClusterEventState",
    "GetApiOptions",
    "GetLogOptions",
    "Humanify",
    "JobState",
    "Link",
    "ListApiOptions",
    "ListApiResponse",
    "NestedTaskSummary",
    "NodeState",
    "ObjectState",
    "ObjectSummaries",
    "ObjectSummaryPerKey",
    "PlacementGroupState",
    "RuntimeEnvState",
    "StateResource",
    "StateSchema",
    "StateSummary",
    "SummaryApiOptions",
    "SummaryApiResponse",
    "SummaryResource",
    "SupportedFilterType",
    "TaskState",
    "TaskSummaries",
    "TaskSummaryPerFuncOrClassName",
    "WorkerState",
    "dict_to_state",
    "filter_fields",
    "remove_ansi_escape_codes",
    "resource_to_schema",
    "state_column",
]

DEFAULT_RPC_TIMEOUT = 30
DEFAULT_LIMIT = 100
DEFAULT_LOG_LIMIT = 1000
DEFAULT_DOWNLOAD_FILENAME = "file.txt"
RAY_MAX_LIMIT_FROM_API_SERVER = 10_000
RAY_MAX_LIMIT_FROM_DATA_SOURCE = 10_000
DRIVER_TASK_ID_PREFIX = "ffffffffffffffffffffffffffffffffffffffff"

SupportedFilterType: TypeAlias = str | bool | int | float
Filter: TypeAlias = tuple[str, str, SupportedFilterType]


@unique
class StateResource(Enum):
    """What can be listed."""

    ACTORS = "actors"
    JOBS = "jobs"
    PLACEMENT_GROUPS = "placement_groups"
    NODES = "nodes"
    WORKERS = "workers"
    TASKS = "tasks"
    OBJECTS = "objects"
    RUNTIME_ENVS = "runtime_envs"
    CLUSTER_EVENTS = "cluster_events"


@unique
class SummaryResource(Enum):
    """What can be summed up."""

    ACTORS = "actors"
    TASKS = "tasks"
    OBJECTS = "objects"


AVAILABLE_STATES = [
    StateResource.ACTORS,
    StateResource.JOBS,
    StateResource.PLACEMENT_GROUPS,
    StateResource.NODES,
    StateResource.WORKERS,
    StateResource.TASKS,
    StateResource.OBJECTS,
]


@dataclass
class ListApiOptions:
    """How to list."""

    limit: int = DEFAULT_LIMIT
    timeout: int = DEFAULT_RPC_TIMEOUT
    detail: bool = False
    filters: list[Filter] | None = field(default_factory=list)
    exclude_driver: bool = True
    server_timeout_multiplier: float = 0.8

    def has_conflicting_filters(self) -> bool:
        """Whether one column should equal two values."""
        wanted: dict[str, SupportedFilterType] = {}
        for key, predicate, value in self.filters or []:
            if predicate == "=" and wanted.setdefault(key, value) != value:
                return True
        return False


@dataclass
class GetApiOptions:
    """How to look at one thing."""

    timeout: int = DEFAULT_RPC_TIMEOUT
    server_timeout_multiplier: float = 0.8


@dataclass
class SummaryApiOptions:
    """How to sum up."""

    timeout: int = DEFAULT_RPC_TIMEOUT
    filters: list[Filter] | None = field(default_factory=list)
    summary_by: str | None = None


@dataclass
class GetLogOptions:
    """Which log, and how much of it."""

    timeout: int
    node_id: str | None = None
    node_ip: str | None = None
    media_type: str = "file"
    filename: str | None = None
    download_filename: str = DEFAULT_DOWNLOAD_FILENAME
    actor_id: str | None = None
    task_id: str | None = None
    attempt_number: int = 0
    pid: int | None = None
    lines: int = DEFAULT_LOG_LIMIT
    interval: float | None = None
    suffix: str = "out"
    submission_id: str | None = None


@dataclass
class ListApiResponse:
    """Rows, with how many there were."""

    total: int
    num_after_truncation: int
    num_filtered: int
    result: list[dict[str, Any]]
    partial_failure_warning: str | None = ""
    warnings: list[str] | None = None


@dataclass
class SummaryApiResponse:
    """A summary, with how many rows went into it."""

    total: int
    num_after_truncation: int
    num_filtered: int
    result: Any = None
    partial_failure_warning: str | None = ""
    warnings: list[str] | None = None


_SCHEMAS: dict[StateResource, type[StateSchema]] = {
    StateResource.ACTORS: ActorState,
    StateResource.JOBS: JobState,
    StateResource.PLACEMENT_GROUPS: PlacementGroupState,
    StateResource.NODES: NodeState,
    StateResource.WORKERS: WorkerState,
    StateResource.TASKS: TaskState,
    StateResource.OBJECTS: ObjectState,
    StateResource.RUNTIME_ENVS: RuntimeEnvState,
    StateResource.CLUSTER_EVENTS: ClusterEventState,
}


def resource_to_schema(resource: StateResource) -> type[StateSchema]:
    """The class of a resource's rows."""
    return _SCHEMAS[resource]


def dict_to_state(d: dict[str, Any], state_resource: StateResource) -> StateSchema:
    """A row of a dictionary; columns that it has and the class does not are left out, and missing ones are None."""
    schema: Any = resource_to_schema(state_resource)
    return schema(**{name: d.get(name) for name in schema.list_columns(detail=True)})  # type: ignore[no-any-return]


def filter_fields(data: dict[str, Any], state_dataclass: type[StateSchema], detail: bool) -> dict[str, Any]:
    """The columns of a list, detailed or not."""
    return {name: data.get(name) for name in state_dataclass.list_columns(detail=detail)}


_ANSI = re.compile(r"\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")


def remove_ansi_escape_codes(text: str) -> str:
    """The text without colours and movements of the cursor."""
    return _ANSI.sub("", text)
