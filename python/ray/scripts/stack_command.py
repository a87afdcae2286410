"""`ray stack`: where every worker is in its program."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import click

from ray.scripts import options

PY_SPY_S = 10.0  # how long py-spy may take for one process


@click.command(name="stack", short_help="Show the stacks of all workers.")
@click.option("--node-id", help="Only of the node whose id begins so.")
@click.option("--pid", "pids", type=int, multiple=True, help="Only of this process; may be repeated.")
@click.option("--native", is_flag=True, help="Also frames of native code, by py-spy, which has to be installed.")
@options.format_option("table", "json", "yaml", default="table")
@options.timeout
@options.address
def stack(
    *, node_id: str | None, pids: tuple[int, ...], native: bool, form: str, timeout: float, address: str | None
) -> None:
    """Shows where all threads of all workers are, on all nodes, with the names of the tasks that they run.

    A worker that computes or waits in native code answers, too. With --native workers of this machine are looked at
    by py-spy, which shows native frames as well and needs the right to trace processes.
    """
    from ray._runtime import rows
    from ray.scripts import printing
    from ray.util.state.api import ask

    with ask(address, timeout) as asker:
        listing = rows.Listing(rows.ROWS_MAX)
        tasks = rows.collect(asker, "tasks", rows.ROWS_MAX, rows.Listing(rows.ROWS_MAX))
        stacks = rows.collect(asker, "stacks", rows.ROWS_MAX, listing)
        nodes = {node["node"]: node for node in asker.nodes()}
    names = {member.proc: [row[2] for row in member.rows if row[-1]] for member in tasks}
    shown = []
    for member in sorted(stacks, key=lambda member: (member.node, member.pid)):
        node = nodes.get(member.node)
        if node is None or (pids and member.pid not in pids):
            continue
        if node_id is not None and not rows.node_id(member.node).startswith(node_id):
            continue
        shown.append(
            {
                "pid": member.pid,
                "node_id": rows.node_id(member.node),
                "ip": node["NodeManagerAddress"],
                "runs": names.get(member.proc, []),
                "stack": (_by_py_spy(member.pid, node) if native else "") or _text(member.rows),
            }
        )
    for warning in listing.warnings():
        click.echo(f"Warning: {warning}.", err=True)
    if form != "table":
        click.echo(printing.as_document(shown, form))
        return
    for row in shown:
        where = f"{row['ip']} ({row['node_id'][:16]})"
        click.echo(f"--- process {row['pid']} on node {where}, runs {', '.join(row['runs']) or 'nothing'}")
        click.echo(row["stack"])
    if not shown:
        click.echo("No worker runs there.")


def _text(told: list[Any]) -> str:
    return str(told[0]).rstrip() + "\n" if told else "nothing was told\n"


def _by_py_spy(pid: int, node: dict[str, Any]) -> str:
    """The stacks of a process of this machine; empty where py-spy cannot be had or may not look."""
    import os

    program = shutil.which("py-spy")
    if program is None or node["NodeManagerHostname"] != os.uname().nodename:
        return ""
    try:
        done = subprocess.run(
            [program, "dump", "--native", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=PY_SPY_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
