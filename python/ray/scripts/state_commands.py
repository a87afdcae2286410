"""`ray list`, `ray get` and `ray summary`: what there is in a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ray.scripts import options

if TYPE_CHECKING:
    from ray.util.state.common import StateResource
    from ray.util.state.schemas import StateSchema

RESOURCES = ("actors", "jobs", "nodes", "objects", "placement-groups", "tasks", "workers")


def _resource(name: str) -> StateResource:
    from ray.util.state.common import StateResource

    return StateResource(name.replace("-", "_"))


@click.command(name="list", short_help="List nodes, actors, tasks, objects, workers, placement groups, jobs.")
@click.argument("resource", type=click.Choice(RESOURCES))
@options.format_option("default", "table", "json", "yaml", default="default")
@click.option("-f", "--filter", "filters", multiple=True, metavar="COLUMN=VALUE", help="Only such rows; also !=.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Rows at most.")
@click.option("--detail", is_flag=True, help="All columns, as YAML unless a format is given.")
@options.timeout
@options.address
@options.history_from
def list_command(
    *,
    resource: str,
    form: str,
    filters: tuple[str, ...],
    limit: int,
    detail: bool,
    timeout: float,
    address: str | None,
    directory: str | None,
) -> None:
    """Lists what there is: nodes, actors, tasks, objects, workers, placement groups or jobs.

    Tasks that have ended are behind those that wait or run, the last one first. With --from they come from the event
    logs of a cluster that may be gone.
    """
    from ray._runtime import history, rows
    from ray.util.state.api import StateApiClient, check_filters
    from ray.util.state.common import ListApiOptions, resource_to_schema

    kind = _resource(resource)
    schema = resource_to_schema(kind)
    conditions = options.filters_of(filters)
    if directory is None:
        asked = ListApiOptions(limit=limit, timeout=timeout, detail=detail, filters=conditions)  # type: ignore[arg-type]
        found = StateApiClient(address).look(kind, asked)
    elif resource == "tasks":
        found = rows.tasks_of_logs(history.logs_under(directory), check_filters(schema, conditions), limit)
    else:
        message = "only tasks are kept in event logs"
        raise click.BadParameter(message, param_hint="--from")
    for warning in found.warnings():
        click.echo(f"Warning: {warning}.", err=True)
    click.echo(show(found.rows, schema, form=form, detail=detail))
    if form in ("default", "table") and not detail:
        click.echo(f"\n{len(found.rows)} of {found.total} {resource}", err=True)


def show(found: list[dict[str, Any]], schema: type[StateSchema], *, form: str, detail: bool) -> str:
    """The rows as text."""
    from ray.scripts import printing

    columns = schema.list_columns(detail=detail)
    if form == "default":
        form = "yaml" if detail else "table"
    if form == "table":
        return printing.as_table([schema.humanify(row) for row in found], columns)
    plain = [{name: row.get(name) for name in columns} for row in found]
    if form == "json":
        return printing.as_json(plain)
    return printing.as_yaml([schema.humanify(row) for row in plain])


@click.command(name="get", short_help="Show one thing by its id.")
@click.argument("resource", type=click.Choice(RESOURCES))
@click.argument("id")
@options.format_option("yaml", "json", default="yaml")
@options.timeout
@options.address
def get_command(*, resource: str, id: str, form: str, timeout: float, address: str | None) -> None:
    """Shows everything about one node, actor, task, object, worker, placement group or job.

    ID is in hexadecimal, as the lists show it.
    """
    from ray.scripts import printing
    from ray.util.state.api import StateApiClient
    from ray.util.state.common import GetApiOptions

    found = StateApiClient(address).get(_resource(resource), id, GetApiOptions(timeout=timeout))  # type: ignore[arg-type]
    if not found:
        message = f"none of the {resource} has the id {id}, or it ended long ago"
        raise click.ClickException(message)
    several = found if isinstance(found, list) else [found]
    plain = [row.asdict() for row in several]
    value = plain if isinstance(found, list) else plain[0]
    click.echo(printing.as_document(value, form))


@click.group(name="summary", short_help="Count tasks, actors or objects by name and state.")
def summary() -> None:
    """Counts tasks, actors or objects by their names and states."""


@summary.command(name="tasks")
@options.format_option("table", "json", "yaml", default="table")
@options.timeout
@options.address
@options.history_from
def summary_tasks(*, form: str, timeout: float, address: str | None, directory: str | None) -> None:
    """Counts tasks by function and state: all that wait or run, and all that the event logs have."""
    from dataclasses import asdict

    if directory is None:
        _summarize("tasks", address, timeout, form)
        return
    from ray._runtime import history, rows
    from ray.util.state.summaries import TaskSummaries

    counted = rows.count_logs(history.logs_under(directory))
    _print("tasks", asdict(TaskSummaries.to_summary_by_func_name(tasks=counted)), form)


@summary.command(name="actors")
@options.format_option("table", "json", "yaml", default="table")
@options.timeout
@options.address
def summary_actors(*, form: str, timeout: float, address: str | None) -> None:
    """Counts actors by class and state."""
    _summarize("actors", address, timeout, form)


@summary.command(name="objects")
@options.format_option("table", "json", "yaml", default="table")
@options.timeout
@options.address
def summary_objects(*, form: str, timeout: float, address: str | None) -> None:
    """Counts objects, with their sizes, by what refers to them."""
    _summarize("objects", address, timeout, form)


def _summarize(resource: str, address: str | None, timeout: float, form: str) -> None:
    import warnings

    from ray.util.state.api import StateApiClient
    from ray.util.state.common import SummaryApiOptions, SummaryResource

    asked = SummaryApiOptions(timeout=timeout)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = StateApiClient(address).summary(
            SummaryResource(resource), options=asked, raise_on_missing_output=False, _explain=True
        )
    for warning in caught:
        click.echo(f"Warning: {warning.message}.", err=True)
    _print(resource, found["cluster"], form)


_TOTALS = {
    "tasks": ("total_tasks", "total_actor_tasks", "total_actor_scheduled"),
    "actors": ("total_actors",),
    "objects": ("total_objects", "total_size_mb"),
}


def _print(resource: str, found: dict[str, Any], form: str) -> None:
    from ray.scripts import printing

    if form != "table":
        click.echo(printing.as_document(found, form))
        return
    for name in _TOTALS[resource]:
        value = found[name]
        click.echo(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if found["summary"]:
        rows = [_flat(key, entry) for key, entry in found["summary"].items()]
        rows.sort(key=lambda row: str(row.get("func_or_class_name") or row.get("class_name") or row.get("callsite")))
        click.echo("\n" + printing.as_table(rows, list(rows[0])))


def _flat(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a summary as a row; what it counts stands in one cell."""
    named = entry if "class_name" in entry or "func_or_class_name" in entry else {"callsite": key, **entry}
    return {name: dict(sorted(value.items())) if isinstance(value, dict) else value for name, value in named.items()}
