"""`list_logs` and `get_log` of `ray.util.state`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray._runtime import log_files
from ray.util.state.api import ask
from ray.util.state.common import DEFAULT_RPC_TIMEOUT, remove_ansi_escape_codes

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["get_log", "list_logs"]

_FOREVER_S = 3.0e9
"""Following a file has no end of its own."""


def list_logs(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    glob_filter: str | None = None,
    timeout: int = DEFAULT_RPC_TIMEOUT,
) -> dict[str, list[str]]:
    """Names of log files, by what they are of.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        node_id: Only those of this node.
        node_ip: Only those of the node with this address.
        glob_filter: Only names that match this pattern.
        timeout: Seconds that the answer may take.

    Returns:
        Under "worker_out" and "worker_err" those of workers, under "driver" those of jobs, others under "internal".

    Raises:
        ValueError: If there is no such node.
    """
    groups: dict[str, list[str]] = {}
    with ask(address, timeout) as asker:
        for _, names in log_files.list_files(asker, node_id=node_id, node_ip=node_ip, pattern=glob_filter):
            for name in names:
                groups.setdefault(_group(name), []).append(name)
    return groups


def _group(name: str) -> str:
    if name.startswith("worker-"):
        return "worker_err" if name.endswith(".err") else "worker_out"
    return "driver" if name.startswith("job-driver-") else "internal"


def get_log(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    follow: bool = False,
    tail: int = -1,
    timeout: int = DEFAULT_RPC_TIMEOUT,
    suffix: str = "out",
    encoding: str | None = "utf-8",
    errors: str | None = "strict",
    submission_id: str | None = None,
    attempt_number: int = 0,
    _interval: float | None = None,
    filter_ansi_code: bool = False,
) -> Generator[str, None, None]:
    """What is in a log file, in pieces.

    Args:
        address: The cluster; None: the one that this process is in, or that of this machine.
        node_id: The node that has it; needed where its name or pid says too little.
        node_ip: The same by the node's address.
        filename: Its name, as `list_logs` shows it.
        actor_id: The log of this actor's process.
        task_id: Lines of this task's worker that were printed under the task's name.
        pid: The log of the worker with this pid.
        follow: Whether to go on with what is written next, for ever.
        tail: Only so many lines from the end; -1 for all.
        timeout: Seconds that the answer may take, unless it is followed.
        suffix: "out" for standard output, "err" for standard error.
        encoding: How to decode it; None gives bytes.
        errors: What to do about what cannot be decoded.
        submission_id: The log of this job's driver.
        attempt_number: Which attempt of a task.
        _interval: Seconds between looks at a file that is followed.
        filter_ansi_code: Whether to leave out colours.

    Raises:
        ValueError: If that names no file, or several.
    """
    with ask(address, _FOREVER_S if follow else timeout) as asker:
        source = log_files.find_source(
            asker,
            node_id=node_id,
            node_ip=node_ip,
            filename=filename,
            actor_id=actor_id,
            task_id=task_id,
            pid=pid,
            submission_id=submission_id,
            suffix=suffix,
            attempt_number=attempt_number,
        )
        for piece in log_files.read(asker, source, tail=tail, follow=follow, interval_s=_interval):
            if encoding is None:
                yield piece  # type: ignore[misc]  # as Ray does
                continue
            text = piece.decode(encoding, errors or "strict")
            yield remove_ansi_escape_codes(text) if filter_ansi_code else text
