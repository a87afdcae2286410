"""Log files of any node, read through it: which there are, and what is in them.

Owns nothing; a file is read in pieces, so that neither the node nor this process holds all of it. Marks with which a
worker says whose lines follow are removed, and serve to find those of one task: lines under its name.
"""

from __future__ import annotations

import fnmatch
import re
import time
from typing import TYPE_CHECKING, Any

from ray._protocol import LOG_MARK_BEGIN, LOG_MARK_END
from ray._runtime import rows
from ray._runtime.ids import NodeID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._runtime.asking import Asker

__all__ = ["Source", "find_source", "list_files", "read"]

MARK = re.compile(re.escape(LOG_MARK_BEGIN) + rb"([^\x07\n]*)" + re.escape(LOG_MARK_END))
PIECE_BYTES = 256 << 10  # read at a time
INTERVAL_S = 0.5  # how often a file that is followed is looked at
LINE_BYTES_MAX = 1 << 20  # a longer line is shown in pieces


class Source:
    """A log file.

    Attributes:
        node: The key of the node that has it.
        name: Its name there.
        task: Only the lines of tasks of this name; empty for all.
    """

    def __init__(self, node: int, name: str, task: str = "") -> None:
        self.node = node
        self.name = name
        self.task = task


def list_files(
    asker: Asker, *, node_id: str | None, node_ip: str | None, pattern: str | None
) -> list[tuple[dict[str, Any], list[str]]]:
    """Names of the log files of each living node, or of one.

    Raises:
        ValueError: If there is no such node.
    """
    found = []
    for node in _nodes(asker, node_id, node_ip):
        names = [row[0] for row in asker.at_node(node["node"], "node.files", "logs")]
        found.append((node, sorted(name for name in names if fnmatch.fnmatch(name, pattern or "*"))))
    return found


def _nodes(asker: Asker, node_id: str | None, node_ip: str | None) -> list[dict[str, Any]]:
    nodes = [node for node in asker.nodes() if node["Alive"]]
    if node_id is not None:
        # An id may be shortened, as people do who copy it from a table.
        nodes = [node for node in nodes if NodeID._from_key(node["node"]).hex().startswith(node_id.lower())]
    if node_ip is not None:
        nodes = [node for node in nodes if node["NodeManagerAddress"] == node_ip]
    if not nodes:
        message = f"no living node has the id {node_id!r}" if node_id else f"no living node has the address {node_ip!r}"
        message += "; log files are on their nodes, and a lost node's are in its own session directory"
        raise ValueError(message)
    return nodes


def find_source(
    asker: Asker,
    *,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    submission_id: str | None = None,
    suffix: str = "out",
    attempt_number: int = 0,
) -> Source:
    """The file that is meant.

    Raises:
        ValueError: If what is said names no file, or several.
    """
    if suffix not in ("out", "err"):
        message = f"suffix is 'out' or 'err', not {suffix!r}"
        raise ValueError(message)
    if actor_id is not None:
        return _of_actor(asker, actor_id, suffix)
    if task_id is not None:
        return _of_task(asker, task_id, attempt_number, suffix)
    if submission_id is not None:
        filename = f"job-driver-{submission_id}.log"
    if filename is None and pid is None:
        message = "say which log: a filename, a pid, an actor's or task's id, or a job's submission id"
        raise ValueError(message)
    pattern = filename if filename is not None else f"worker-*-{pid}.{suffix}"
    listed = list_files(asker, node_id=node_id, node_ip=node_ip, pattern=pattern)
    matches = [(node, name) for node, names in listed for name in names]
    if not matches:
        message = f"there is no log file {pattern} on {_places(listed)}; a worker that printed nothing leaves none"
        raise ValueError(message)
    if len(matches) > 1:
        places = ", ".join(f"{name} on node {NodeID._from_key(node['node']).hex()[:16]}" for node, name in matches[:10])
        message = f"{pattern} names {len(matches)} files: {places}. Say which node is meant, by its id or address"
        raise ValueError(message)
    node, name = matches[0]
    return Source(node["node"], name)


def _places(listed: list[tuple[dict[str, Any], list[str]]]) -> str:
    return ", ".join(f"node {NodeID._from_key(node['node']).hex()[:16]}" for node, _ in listed)


def _of_actor(asker: Asker, actor_id: str, suffix: str) -> Source:
    found = rows.actors(asker, [("actor_id", "=", actor_id)], 1).rows
    if not found:
        message = f"actor {actor_id} is not known, or ended long ago"
        raise ValueError(message)
    actor = found[0]
    if not actor["node_id"] or not actor["pid"]:
        message = f"actor {actor_id} has had no process: it is {actor['state']}"
        raise ValueError(message)
    return _of_process(asker, actor["node_id"], actor["pid"], suffix)


def _of_task(asker: Asker, task_id: str, attempt: int, suffix: str) -> Source:
    attempts = rows.tasks(asker, [("task_id", "=", task_id)], rows.ROWS_MAX).rows
    found = [row for row in attempts if row["attempt_number"] == attempt]
    if not found:
        numbers = sorted(row["attempt_number"] for row in attempts)
        known = f"; there are attempts {numbers}" if numbers else ""
        message = f"attempt {attempt} of task {task_id} is not known{known}"
        raise ValueError(message)
    task = found[0]
    if not task["node_id"] or not task["worker_pid"]:
        message = f"task {task_id} has not been run by a worker: it is {task['state']}"
        raise ValueError(message)
    source = _of_process(asker, task["node_id"], task["worker_pid"], suffix)
    if task["type"] == "NORMAL_TASK":
        source.task = task["name"]
    return source


def _of_process(asker: Asker, node_id: str, pid: int, suffix: str) -> Source:
    return find_source(asker, node_id=node_id, pid=pid, suffix=suffix)


def read(
    asker: Asker, source: Source, *, tail: int = -1, follow: bool = False, interval_s: float | None = None
) -> Iterator[bytes]:
    """Pieces of the file, each of whole lines but for the last.

    Args:
        asker: Through which it is read.
        source: The file.
        tail: Only so many lines from the end; negative for all.
        follow: Whether to wait for what is written next, for ever.
        interval_s: How often to look then.
    """
    at = _start_of_tail(asker, source, tail) if tail >= 0 else 0
    name = _name_before(asker, source, at) if source.task else ""
    rest = b""
    while True:
        begin, piece, size = asker.at_node(source.node, "node.read", "logs", source.name, at, PIECE_BYTES)
        if size < at:  # the node has emptied a file that had become too long
            at, rest = 0, b""
            continue
        at = begin + len(piece)
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            whole, newline, rest = whole + newline + rest, b"", b""
        text, name = _of_name(whole + newline, name, source.task)
        if text:
            yield text
        if piece:
            continue
        if not follow:
            text, _ = _of_name(rest, name, source.task)
            if text:
                yield text
            return
        time.sleep(interval_s or INTERVAL_S)


def _of_name(data: bytes, name: str, wanted: str) -> tuple[bytes, str]:
    """What was printed under the wanted name, without marks, and the name at the end."""
    if not wanted:
        return MARK.sub(b"", data), name
    parts = MARK.split(data)
    out = [parts[0]] if name == wanted else []
    for mark, text in zip(parts[1::2], parts[2::2], strict=True):
        name = mark.decode(errors="replace")
        if name == wanted:
            out.append(text)
    return b"".join(out), name


def _start_of_tail(asker: Asker, source: Source, lines: int) -> int:
    """Where the last lines of the file begin."""
    end: int | None = None
    wanted = lines
    while True:
        offset = -PIECE_BYTES if end is None else max(end - PIECE_BYTES, 0)
        size = PIECE_BYTES if end is None else min(PIECE_BYTES, end)
        begin, piece, total = asker.at_node(source.node, "node.read", "logs", source.name, offset, size)
        if end is None:
            if wanted == 0:
                return int(total)
            # The newline at the very end ends the last line rather than beginning another.
            wanted += int(piece.endswith(b"\n"))
        at = len(piece)
        while wanted > 0 and (at := piece.rfind(b"\n", 0, at)) >= 0:
            wanted -= 1
        if wanted <= 0:
            return int(begin) + at + 1
        if begin == 0:
            return 0
        end = int(begin)


def _name_before(asker: Asker, source: Source, at: int) -> str:
    """The name under which the text at a place was printed."""
    while at > 0:
        begin = max(at - PIECE_BYTES, 0)
        _, piece, _ = asker.at_node(source.node, "node.read", "logs", source.name, begin, at - begin)
        marks: list[bytes] = MARK.findall(piece)
        if marks:
            return marks[-1].decode(errors="replace")
        at = begin
    return ""
