"""The functions of `ray.util.state`."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray._runtime import rows
from ray._runtime.asking import Asker
from ray.util.state.common import (
    DEFAULT_LIMIT,
    DEFAULT_RPC_TIMEOUT,
    RAY_MAX_LIMIT_FROM_API_SERVER,
    ActorState,
    GetApiOptions,
    JobState,
    ListApiOptions,
    NodeState,
    ObjectState,
    PlacementGroupState,
    RuntimeEnvState,
    StateResource,
    StateSchema,
    SummaryApiOptions,
    SummaryResource,
    TaskState,
    WorkerState,
    dict_to_state,
    resource_to_schema,
)
from ray.util.state.exception import RayStateApiException, ServerUnavailable
from ray.util.state.summaries import ActorSummaries, ObjectSummaries, TaskSummaries

if TYPE_CHECKING:
    from ray._core import ObjectRef
    from ray.util.state.common import Filter

__all__ = [
    "StateApiClient",
    "get_actor",
    "get_job",
    "get_node",
    "get_objects",
    "get_placement_group",
    "get_task",
    "get_worker",
    "list_actors",
    "list_cluster_events",
    "list_jobs",
    "list_nodes",
    "list_objects",
    "list_placement_groups",
    "list_runtime_envs",
    "list_tasks",
    "list_workers",
    "summarize_actors",
    "summarize_objects",
    "summarize_tasks",
]

_ID_COLUMNS = {
    StateResource.ACTORS: "actor_id",
    StateResource.JOBS: "job_id",
    StateResource.NODES: "node_id",
    StateResource.OBJECTS: "object_id",
    StateResource.PLACEMENT_GROUPS: "placement_group_id",
    StateResource.TASKS: "task_id",
    StateResource.WORKERS: "worker_id",
}


def ask(address: str | None, timeout: float) -> Asker:
    """A connection for questions.

    Raises:
        ServerUnavailable: If there is no cluster, or it cannot be joined.
    """
    try:
        return Asker(address, timeout_s=timeout)
    except ConnectionError as error:
        message = f"there is no cluster to ask: {error}"
        raise ServerUnavailable(message) from None


def check_filters(schema: type[StateSchema], filters: list[Filter] | None) -> list[Filter]:
    """The conditions of a list, if its rows can be filtered so.

    Raises:
        ValueError: If a column does not exist or cannot be filtered by, or a predicate is none.
    """
    allowed = schema.filterable_columns()
    for condition in filters or []:
        if len(condition) != 3:
            message = f"a filter is (column, predicate, value), not {condition!r}"
            raise ValueError(message)
        key, predicate, _ = condition
        if key not in allowed:
            message = f"lists of {schema.__name__} cannot be filtered by {key!r}; possible columns: {sorted(allowed)}"
            raise ValueError(message)
        if predicate not in ("=", "!="):
            message = f"the predicate of a filter is '=' or '!=', not {predicate!r}"
            raise ValueError(message)
    return list(filters or [])


class StateApiClient:
    """Questions to one cluster.

    Args:
        address: "HOST:PORT"; None: the cluster that this process is in, or the one of this machine.
        cookies: Not used: there is no server in between.
        headers: Not used either.
    """

    def __init__(
        self,
        address: str | None = None,
        cookies: dict[str, Any] | None = None,
        headers: dict[str, Any] | None = None,
    ) -> None:
        self._address = address

    def get_address(self) -> str:
        """Where the cluster is joined; empty if it was not named."""
        return self._address or ""

    def get_version(self) -> str:
        """The version of this package."""
        from ray._version import __version__

        return __version__

    def list(
        self,
        resource: StateResource,
        options: ListApiOptions,
        raise_on_missing_output: bool,
        _explain: bool = False,
    ) -> list[Any]:
        """Rows of a resource.

        Raises:
            RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
            ServerUnavailable: If there is no cluster.
            ValueError: If the options make no sense.
        """
        found = self.look(resource, options)
        _complain(found.silent, raise_on_missing_output, explain=_explain)
        if found.is_cut and _explain:
            warnings.warn(found.warnings()[-1], stacklevel=3)
        return [dict_to_state(row, resource) for row in found.rows]

    def look(self, resource: StateResource, options: ListApiOptions) -> rows.Listing:
        """Rows as dictionaries, with what is missing."""
        source = rows.SOURCES.get(resource.value)
        if source is None:
            message = f"{resource.value} are not kept yet, so there is no list of them"
            raise NotImplementedError(message)
        if not 0 < options.limit <= RAY_MAX_LIMIT_FROM_API_SERVER:
            message = f"limit is from 1 to {RAY_MAX_LIMIT_FROM_API_SERVER}, not {options.limit}"
            raise ValueError(message)
        filters = check_filters(resource_to_schema(resource), options.filters)
        with ask(self._address, options.timeout) as asker:
            try:
                return source(asker, filters, options.limit)
            except TimeoutError:
                message = f"the cluster has not answered within {options.timeout} s"
                raise RayStateApiException(message) from None

    def get(self, resource: StateResource, id: str, options: GetApiOptions | None, _explain: bool = False) -> Any:
        """One thing by its id; None if it is not known. A list for objects, and for tasks with several attempts."""
        options = options or GetApiOptions()
        listing = ListApiOptions(timeout=options.timeout, filters=[(_ID_COLUMNS[resource], "=", id)], detail=True)
        found = self.list(resource, listing, raise_on_missing_output=False, _explain=_explain)
        if resource is StateResource.OBJECTS:
            return found
        if resource is StateResource.TASKS and len(found) > 1:
            return sorted(found, key=lambda row: int(row.attempt_number))
        return found[0] if found else None

    def summary(
        self,
        resource: SummaryResource,
        *,
        options: SummaryApiOptions,
        raise_on_missing_output: bool,
        _explain: bool = False,
    ) -> dict[str, Any]:
        """Counts by name and state, under "cluster"."""
        with ask(self._address, options.timeout) as asker:
            listing = rows.Listing(RAY_MAX_LIMIT_FROM_API_SERVER)
            summary: TaskSummaries | ActorSummaries | ObjectSummaries
            if resource is SummaryResource.TASKS and options.summary_by == "lineage":
                listing = rows.tasks(asker, [], RAY_MAX_LIMIT_FROM_API_SERVER)
                actors = rows.actors(asker, [], RAY_MAX_LIMIT_FROM_API_SERVER).rows
                summary = TaskSummaries.to_summary_by_lineage(tasks=listing.rows, actors=actors)
            elif resource is SummaryResource.TASKS:
                summary = TaskSummaries.to_summary_by_func_name(tasks=rows.count_tasks(asker, listing))
            elif resource is SummaryResource.ACTORS:
                listing = rows.actors(asker, [], RAY_MAX_LIMIT_FROM_API_SERVER)
                summary = ActorSummaries.to_summary(actors=listing.rows)
            else:
                listing = rows.objects(asker, [], RAY_MAX_LIMIT_FROM_API_SERVER)
                summary = ObjectSummaries.to_summary(objects=listing.rows)
        _complain(listing.silent, raise_on_missing_output, explain=_explain)
        return {"cluster": asdict(summary)}


def _complain(silent: list[str], raise_on_missing_output: bool, *, explain: bool) -> None:
    if not silent:
        return
    text = f"these have not answered, and what they know is missing: {', '.join(silent)}"
    if raise_on_missing_output:
        message = f"{text}. Ask again, or with raise_on_missing_output=False for what there is"
        raise RayStateApiException(message)
    if explain:
        warnings.warn(text, stacklevel=4)


def _get(resource: StateResource, id: str, address: str | None, timeout: int, explain: bool) -> Any:
    return StateApiClient(address).get(resource, id, GetApiOptions(timeout), _explain=explain)


def _list(
    resource: StateResource,
    address: str | None,
    filters: list[Filter] | None,
    limit: int,
    timeout: int,
    detail: bool,
    raise_on_missing_output: bool,
    explain: bool,
) -> list[Any]:
    options = ListApiOptions(limit=limit, timeout=timeout, detail=detail, filters=filters)
    return StateApiClient(address).list(
        resource, options, raise_on_missing_output=raise_on_missing_output, _explain=explain
    )


def get_actor(
    id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> ActorState | None:
    """An actor by its id, in hexadecimal; None if it is not known.

    Args:
        id: The id.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
    """
    return _get(StateResource.ACTORS, id, address, timeout, _explain)  # type: ignore[no-any-return]


def get_job(
    id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> JobState | None:
    """A job by its id, in hexadecimal; None if it is not known.

    Args:
        id: The id.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
    """
    return _get(StateResource.JOBS, id, address, timeout, _explain)  # type: ignore[no-any-return]


def get_node(
    id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> NodeState | None:
    """A node by its id, in hexadecimal; None if it is not known.

    Args:
        id: The id.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
    """
    return _get(StateResource.NODES, id, address, timeout, _explain)  # type: ignore[no-any-return]


def get_objects(
    id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> list[ObjectState]:
    """What each process holds of an object, by its id, in hexadecimal; none if it is not known.

    Args:
        id: The id.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
    """
    return _get(StateResource.OBJECTS, id, address, timeout, _explain)  # type: ignore[no-any-return]


def get_placement_group(
    id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> PlacementGroupState | None:
    """A placement group by its id, in hexadecimal; None if it is not known.

    Args:
        id: The id.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
    """
    return _get(StateResource.PLACEMENT_GROUPS, id, address, timeout, _explain)  # type: ignore[no-any-return]


def get_worker(
    id: str, address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> WorkerState | None:
    """A process by its id, in hexadecimal; None if it is not known.

    Args:
        id: The id.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
    """
    return _get(StateResource.WORKERS, id, address, timeout, _explain)  # type: ignore[no-any-return]


def get_task(
    id: str | ObjectRef[Any], address: str | None = None, timeout: int = DEFAULT_RPC_TIMEOUT, _explain: bool = False
) -> TaskState | list[TaskState] | None:
    """A task by its id in hexadecimal, or by the reference to its result; None if it is not known.

    Args:
        id: The id or reference.
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.

    Returns:
        A list if it had several attempts, in their order.
    """
    name = id if isinstance(id, str) else id.task_id().hex()
    return _get(StateResource.TASKS, name, address, timeout, _explain)  # type: ignore[no-any-return]


def list_actors(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[ActorState]:
    """Actors, dead ones included as far as they are remembered.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(StateResource.ACTORS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_placement_groups(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[PlacementGroupState]:
    """Placement groups.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(
        StateResource.PLACEMENT_GROUPS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain
    )


def list_nodes(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[NodeState]:
    """Nodes, lost ones included.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(StateResource.NODES, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_jobs(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[JobState]:
    """Jobs, ended ones included.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(StateResource.JOBS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_workers(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[WorkerState]:
    """Workers and drivers, ended ones included as far as they are remembered.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(StateResource.WORKERS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_tasks(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[TaskState]:
    """Attempts of tasks: those that wait or run, and behind them the ended ones, the last first.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(StateResource.TASKS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_objects(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[ObjectState]:
    """What each process holds of objects, a row for each process and object.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        RayStateApiException: If something has not answered and `raise_on_missing_output` is true.
        ServerUnavailable: If there is no cluster.
        ValueError: If a filter or the limit is none.
    """
    return _list(StateResource.OBJECTS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain)


def list_runtime_envs(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[RuntimeEnvState]:
    """Not kept yet.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        NotImplementedError: Always.
    """
    return _list(
        StateResource.RUNTIME_ENVS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain
    )


def list_cluster_events(
    address: str | None = None,
    filters: list[Filter] | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    detail: bool = False,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> list[dict[str, Any]]:
    """Not kept yet.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        filters: Conditions that a row must meet: (column, "=" or "!=", value).
        limit: Rows at most.
        timeout: Seconds that the answer may take.
        detail: Whether the columns of detailed lists are wanted, too; they are there anyway.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Raises:
        NotImplementedError: Always.
    """
    return _list(
        StateResource.CLUSTER_EVENTS, address, filters, limit, timeout, detail, raise_on_missing_output, _explain
    )


def summarize_tasks(
    address: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> dict[str, Any]:
    """How many tasks there are, by function or method and state, from all that the event logs have.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Returns:
        The counts, under "cluster".
    """
    return StateApiClient(address).summary(
        SummaryResource.TASKS,
        options=SummaryApiOptions(timeout=timeout),
        raise_on_missing_output=raise_on_missing_output,
        _explain=_explain,
    )


def summarize_actors(
    address: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> dict[str, Any]:
    """How many actors there are, by class and state.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Returns:
        The counts, under "cluster".
    """
    return StateApiClient(address).summary(
        SummaryResource.ACTORS,
        options=SummaryApiOptions(timeout=timeout),
        raise_on_missing_output=raise_on_missing_output,
        _explain=_explain,
    )


def summarize_objects(
    address: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    raise_on_missing_output: bool = True,
    _explain: bool = False,
) -> dict[str, Any]:
    """How many objects there are, by where they were made.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        timeout: Seconds that the answer may take.
        raise_on_missing_output: Whether an incomplete answer is an error.

    Returns:
        The counts, under "cluster".
    """
    return StateApiClient(address).summary(
        SummaryResource.OBJECTS,
        options=SummaryApiOptions(timeout=timeout),
        raise_on_missing_output=raise_on_missing_output,
        _explain=_explain,
    )
