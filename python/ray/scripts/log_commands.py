"""`ray logs`: which log files there are on any node, and what is in them."""

from __future__ import annotations

import sys
from typing import Any

import click

from ray.scripts import options


class LogCommandGroup(click.Group):
    """`ray logs GLOB` is `ray logs cluster GLOB`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first argument, or `cluster`."""
        if not args or args[0] not in self.commands:
            args = ["cluster", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Also without a command, and with options only."""
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["cluster", *args]
        return super().parse_args(ctx, args)


@click.group(name="logs", cls=LogCommandGroup, short_help="List and show log files of any node.")
def logs() -> None:
    """Shows the log files of a cluster: of an actor, a task, a worker, a job, or any file by its name.

    Without a command, or with a pattern for names, lists the files of all nodes; a pattern that fits one file of one
    node shows it.
    """


def _shared(function: Any) -> Any:
    """Options of all of these commands."""
    for option in reversed(
        (
            click.option("-f", "--follow", is_flag=True, help="Go on with what is written next."),
            click.option("--tail", type=int, default=1000, show_default=True, help="Last lines; -1: all."),
            click.option("--interval", type=float, help="Seconds between looks when following."),
            options.timeout,
            options.address,
        )
    ):
        function = option(function)
    return function


def _node(function: Any) -> Any:
    function = click.option("-id", "--node-id", help="The node, or the beginning of its id.")(function)
    return click.option("-ip", "--node-ip", help="The node's address.")(function)


_err = click.option("--err", is_flag=True, help="Standard error instead of standard output.")


@logs.command(name="cluster", short_help="List log files, or show one.")
@click.argument("pattern", default="*", metavar="GLOB")
@_node
@_shared
@options.format_option("table", "json", "yaml", default="table")
@click.option("--encoding", default="utf-8", show_default=True, help="How to decode it.")
@click.option("--encoding-errors", default="replace", show_default=True, help="What to do where that fails.")
def cluster(*, pattern: str, node_id: str | None, node_ip: str | None, form: str, timeout: float, **how: Any) -> None:
    """Lists the log files whose names match GLOB, or shows the only one that does.

    With --format json or yaml it always lists, by the nodes' ids.
    """
    from ray._runtime import log_files, rows
    from ray.scripts import printing
    from ray.util.state.api import ask

    with ask(how["address"], timeout) as asker:
        listed = log_files.list_files(asker, node_id=node_id, node_ip=node_ip, pattern=pattern)
        if form != "table":
            click.echo(printing.as_document({rows.node_id(node["node"]): names for node, names in listed}, form))
            return
        files = [(node, name) for node, names in listed for name in names]
        if len(files) != 1 or pattern == "*":
            for node, names in listed:
                click.echo(f"Node {rows.node_id(node['node'])[:16]} ({node['NodeManagerAddress']})")
                for name in names:
                    click.echo(f"  {name}")
            return
    node, name = files[0]
    _show(timeout=timeout, node_id=rows.node_id(node["node"]), filename=name, **how)


@logs.command(name="actor", short_help="Show the log of an actor.")
@click.option("--id", "actor_id", help="The actor.")
@click.option("-pid", "--pid", type=int, help="The actor's process.")
@_node
@_err
@_shared
def actor(*, actor_id: str | None, pid: int | None, **how: Any) -> None:
    """Shows what an actor has printed."""
    if (actor_id is None) == (pid is None):
        message = "say which actor: by --id, or by --pid"
        raise click.UsageError(message)
    _show(actor_id=actor_id, pid=pid, **how)


@logs.command(name="worker", short_help="Show the log of a worker.")
@click.option("-pid", "--pid", type=int, required=True, help="The worker's process.")
@_node
@_err
@_shared
def worker(*, pid: int, **how: Any) -> None:
    """Shows what a worker has printed."""
    _show(pid=pid, **how)


@logs.command(name="task", short_help="Show the log of a task.")
@click.option("--id", "task_id", required=True, help="The task.")
@click.option("-a", "--attempt-number", type=int, default=0, show_default=True, help="Which attempt.")
@_err
@_shared
def task(*, task_id: str, attempt_number: int, **how: Any) -> None:
    """Shows what the worker that ran a task has printed under the task's name."""
    _show(task_id=task_id, attempt_number=attempt_number, **how)


@logs.command(name="job", short_help="Show the log of a submitted job.")
@click.option("--id", "submission_id", required=True, help="The job's submission id.")
@_shared
def job(*, submission_id: str, **how: Any) -> None:
    """Shows what the driver of a submitted job has printed."""
    _show(submission_id=submission_id, **how)


def _show(
    *,
    address: str | None,
    timeout: float,
    follow: bool,
    tail: int,
    interval: float | None,
    err: bool = False,
    encoding: str = "utf-8",
    encoding_errors: str = "replace",
    **which: Any,
) -> None:
    from ray.util.state.logs import get_log

    pieces = get_log(
        address=address,
        timeout=timeout,  # type: ignore[arg-type]
        follow=follow,
        tail=tail,
        suffix="err" if err else "out",
        encoding=encoding,
        errors=encoding_errors,
        _interval=interval,
        **which,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
