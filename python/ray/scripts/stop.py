"""`ray stop`: ends the nodes of this user on this machine that `ray start` has started, heads last.

Those of other users, of other values of RAY_TMPDIR, of programs that called `ray.init` and of `ray.cluster_utils` are
left alone. Invariant: only a process that was seen to hold its session's lock is signalled (`registry.hold`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from ray._node.registry import Record

KILLED_S: Final = 10.0
"""How long a killed process may take to be gone; longer, and the kernel does not let go of it."""


@click.command(name="stop", short_help="Stop all nodes that you have started on this machine.")
@click.option("--force", "-f", is_flag=True, help="Kill the nodes, instead of letting them end in order.")
@click.option(
    "--grace-period",
    "-g",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Seconds that the nodes may take to end in order; heads, which come last, as long again.",
)
def stop(*, force: bool, grace_period: int) -> None:
    """Ends all nodes on this machine that 'ray start' has started for this user, with everything on them.

    Returns when they are gone. Clusters of other users, and those that programs have started for themselves, go on.
    """
    from ray._node import registry

    records = registry.public()
    if not records:
        click.echo("No node that 'ray start' has started runs here.")
        return
    stopped: list[Record] = []
    for group in ([x for x in records if not x.is_head], [x for x in records if x.is_head]):
        stopped += _end(group, KILLED_S if force else grace_period, force=force)
    if stopped:
        click.echo(f"Stopped {_counted(stopped)}.")
    left = [record for record in records if record not in stopped and registry.is_running(record)]
    if left:
        pids = ", ".join(str(record.pid) for record in left)
        message = (
            f"{_counted(left)} did not end within {grace_period} s (process {pids}): 'ray stop --force' kills. A node "
            "that was started in another container can only be stopped there"
        )
        raise click.ClickException(message)


def _counted(records: list[Record]) -> str:
    return "1 node" if len(records) == 1 else f"{len(records)} nodes"


def _end(records: list[Record], timeout_s: float, *, force: bool) -> list[Record]:
    """Ends nodes; returns those that have ended by that."""
    from ray._node import registry

    held = [(record, handle) for record in records if (handle := registry.hold(record)) is not None]
    below: list[int] = []
    try:
        if force:
            below = [handle for record, _ in held for handle in _children(record.pid)]
        for _, handle in held:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL if force else signal.SIGTERM)
        remaining = _wait([*(handle for _, handle in held), *below], timeout_s)
    finally:
        for handle in [*(handle for _, handle in held), *below]:
            os.close(handle)
    ended = [record for record, handle in held if handle not in remaining]
    if force:
        for record in ended:
            _clean_up(record)
    return ended


def _children(pid: int) -> list[int]:
    """Pidfds of a node's own processes, which die with it, and a moment later."""
    handles: list[int] = []
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        for child in file.read().split():
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(int(child)))
    return handles


def _wait(handles: list[int], timeout_s: float) -> set[int]:
    """Waits for the end of processes; returns those that have not ended by then."""
    deadline = time.monotonic() + timeout_s
    remaining = set(handles)
    poller = select.poll()
    for handle in handles:
        poller.register(handle, select.POLLIN)
    while remaining:
        for handle, _ in poller.poll(max(deadline - time.monotonic(), 0.0) * 1000):
            remaining.discard(handle)
            poller.unregister(handle)
        if time.monotonic() >= deadline:
            break
    return remaining


def _clean_up(record: Record) -> None:
    """A killed node has left its directory and its record."""
    from ray._node import registry, session

    session.remove(record.session_dir)
    registry.remove(record.path)
