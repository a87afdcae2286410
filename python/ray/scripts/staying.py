"""`ray start --block`: being the one with whom a node ends."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from ray._node.launch import NodeProcess

__all__ = ["stay"]

CLOSE_S: Final = 8.0
"""How long a node may take to end before it is killed: more than it allows itself (`SHUTDOWN_S`)."""

STOPPED: Final = 128 + signal.SIGTERM
"""The exit status of a node that `ray stop`, or somebody else, has ended."""


def stay(node: NodeProcess) -> int:
    """Waits until SIGTERM or Ctrl-C comes, then ends the node; or until the node has ended.

    Returns:
        The exit status of the command: 0 if somebody wanted the end, else 1.
    """
    click.echo("This command stays as long as the node does, and the node no longer: Ctrl-C ends both.")
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _heed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if not _ends_by_itself(node, reading):
            node.close(CLOSE_S)
            click.echo(f"Node process {node.pid} was stopped.")
            return 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)
    if node.poll() == STOPPED:
        click.echo(f"Node process {node.pid} was stopped.")
        return 0
    how, log = node.describe_end()
    reason = _last_words(node.log_tail())
    node.close()
    because = f", because {reason}" if reason else ""
    click.echo(f"Error: node process {node.pid} has ended by itself{because}: {how}. {log}".rstrip(), err=True)
    return 1


def _ends_by_itself(node: NodeProcess, signals: int) -> bool:
    """Waits; whether the node has ended before a signal came."""
    try:
        handle = os.pidfd_open(node.pid)  # its number is not given away before it was waited for, here
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.register(signals, select.POLLIN)
        return signals not in {fd for fd, _ in poller.poll()}
    finally:
        os.close(handle)


def _last_words(log: str) -> str:
    """What a node's log says about its end."""
    lines = [line for line in log.splitlines() if " ending: " in line]
    return lines[-1].partition(" ending: ")[2] if lines else ""


def _heed(number: int, frame: object) -> None:
    """The pipe has the signal; the handler is there because Python writes only for signals that have one."""
