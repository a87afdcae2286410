"""`ray memory`: which process holds which objects, and why."""

from __future__ import annotations

from typing import Any

import click

from ray.scripts import options

UNITS = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}

GROUPS = {"NODE_ADDRESS": "ip", "STACK_TRACE": "call_site"}

SORTS = {"PID": "pid", "OBJECT_SIZE": "object_size", "REFERENCE_TYPE": "reference_type"}


@click.command(name="memory", short_help="Show the objects of all processes and what refers to them.")
@options.address
@click.option("--group-by", type=click.Choice(list(GROUPS)), default="NODE_ADDRESS", show_default=True)
@click.option("--sort-by", type=click.Choice(list(SORTS)), default="OBJECT_SIZE", show_default=True)
@click.option("--units", type=click.Choice(list(UNITS)), default="B", show_default=True)
@click.option("--no-format", is_flag=True, help="No table: one row in a line, columns separated by tabs.")
@click.option("--stats-only", is_flag=True, help="Only the totals.")
@click.option("-n", "--num-entries", type=click.IntRange(1), help="Rows of each group at most.")
@options.format_option("table", "json", "yaml", default="table")
@options.timeout
def memory(
    *,
    address: str | None,
    group_by: str,
    sort_by: str,
    units: str,
    no_format: bool,
    stats_only: bool,
    num_entries: int | None,
    form: str,
    timeout: float,
) -> None:
    """Shows which processes hold which objects, grouped by node or call site, and the totals of shared memory.

    The kinds of references: LOCAL_REFERENCE, of the program or a view on the value; USED_BY_PENDING_TASK;
    CAPTURED_IN_OBJECT, inside another value; ACTOR_HANDLE; BORROWED, held by other processes only. With --format json
    or yaml all rows come as they are, sizes in bytes.
    """
    from ray._runtime import rows
    from ray.scripts import printing
    from ray.util.state.api import ask

    with ask(address, timeout) as asker:
        found = rows.objects(asker, [], rows.ROWS_MAX)
        statistics = asker.request("cluster_resources"), asker.request("available_resources")
    for warning in found.warnings():
        click.echo(f"Warning: {warning}.", err=True)
    if form != "table":
        everything = {"objects": [] if stats_only else _sorted(found.rows, SORTS[sort_by])[:num_entries]}
        click.echo(printing.as_document({**everything, "shared_memory": shares(found.rows, *statistics)}, form))
        return
    if not stats_only:
        for line in describe(found.rows, GROUPS[group_by], SORTS[sort_by], units, num_entries, plain=no_format):
            click.echo(line)
    for line in totals(found.rows, *statistics, units=units):
        click.echo(line)


COLUMNS = ("ip", "pid", "type", "object_id", "object_size", "reference_type", "references", "task_status")


def describe(
    found: list[dict[str, Any]], group: str, sort: str, units: str, count: int | None, *, plain: bool
) -> list[str]:
    """The lines of the report.

    Args:
        found: Rows of objects.
        group: The column by which they are grouped.
        sort: The column by which a group is sorted; sizes from the largest on.
        units: Of sizes.
        count: Rows of a group at most.
        plain: Whether columns are separated by tabs instead of aligned.
    """
    from ray.scripts import printing

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(str(row[group]), []).append(row)
    lines = []
    for name, entries in sorted(groups.items()):
        lines += [f"--- {group} {name}: {_sums(entries, units)}", ""]
        shown = [_shown(row, units) for row in _sorted(entries, sort)[:count]]
        if plain:
            lines += ["\t".join(str(row[column]) for column in COLUMNS) for row in shown]
        else:
            lines.append(printing.as_table(shown, COLUMNS))
        if count is not None and len(entries) > count:
            lines.append(f"({len(entries) - count} more)")
        lines.append("")
    return lines


def _sorted(found: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    return sorted(found, key=lambda row: row[sort], reverse=sort == "object_size")


def _shown(row: dict[str, Any], units: str) -> dict[str, Any]:
    kinds = ("local", "task", "contained")
    counts = [(kind, row[f"{kind}_references"]) for kind in kinds] + [("borrowers", row["borrowers"])]
    references = ", ".join(f"{kind} {count}" for kind, count in counts if count)
    return {**row, "object_size": _size(row["object_size"], units), "references": references or "none"}


def _size(size: int, units: str) -> str:
    """In these units; "?" for a value that is not there."""
    if size < 0:
        return "?"
    return f"{size} B" if units == "B" else f"{size / UNITS[units]:.3f} {units}"


def _sums(found: list[dict[str, Any]], units: str) -> str:
    """How many objects there are of each kind of reference; sizes count once, at their owners."""
    counts: dict[str, int] = {}
    for row in found:
        counts[row["reference_type"]] = counts.get(row["reference_type"], 0) + 1
    owned = sum(max(row["object_size"], 0) for row in found if row["is_owner"])
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{len(found)} entries, {_size(owned, units)} owned; {kinds or 'nothing'}"


def shares(found: list[dict[str, Any]], total: dict[str, int], free: dict[str, int]) -> dict[str, int]:
    """How much shared memory there is, is lent to processes, and is in objects, in bytes."""
    store = "object_store_memory"
    capacity = total.get(store, 0) // 10_000
    return {
        "total": capacity,
        "lent": max(capacity - free.get(store, 0) // 10_000, 0),
        "in_objects": sum(row["object_size"] for row in found if row["is_owner"] and row["is_stored"]),
    }


def totals(found: list[dict[str, Any]], total: dict[str, int], free: dict[str, int], *, units: str) -> list[str]:
    """The lines about the whole cluster."""
    shown = {name: _size(size, units) for name, size in shares(found, total, free).items()}
    return [
        f"--- all nodes: {_sums(found, units)}",
        f"Shared memory: {shown['lent']} of {shown['total']} lent to processes, {shown['in_objects']} of it in objects",
    ]
