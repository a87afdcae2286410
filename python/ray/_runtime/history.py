"""Reads event logs: which attempts of tasks have ended, on a running cluster or after it is gone.

Segments are read whole, the newest first, because whoever looks wants what was last, and stops when that is enough.
`ray._node.event_log` has their format, `skate-core`'s `core/history.rs` that of the batches in them. What is cut or
garbled ends a segment: a crash may leave such an end.
"""

from __future__ import annotations

import binascii
import os
import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._runtime.asking import Asker

__all__ = ["Attempt", "Directory", "Log", "NodeLog", "attempts", "logs_under"]

HEADER = struct.Struct("<8sIIQ")
MAGIC = b"SKATEEVT"
VERSION = 1
BLOCK = struct.Struct("<4sIIQII")
BLOCK_MAGIC = b"BLCK"
COUNTS = struct.Struct("<IIII")
DEFINITION = struct.Struct("<BB16s")
LENGTH = struct.Struct("<H")
RECORD = struct.Struct("<24sQQIHHBBxx")
SUFFIX = ".events"


class Definition(NamedTuple):
    """What all attempts of one call have in common."""

    kind: int
    actor: bytes
    name: str
    method: str


class Attempt(NamedTuple):
    """One attempt of a task, which has ended. `outcome` is 0, or the code of its exception; `text` says more.

    If it did not `ran`, the process is its owner: it never started, or died with its worker.
    """

    task: bytes
    start_ns: int
    run_ns: int
    attempt: int
    outcome: int
    ran: bool
    text: str
    of: Definition
    proc: int
    pid: int
    job: int
    node: int


class Log(Protocol):
    """The event log of one node."""

    node: int

    def segments(self) -> Iterator[bytes]:
        """The segments' bytes, the newest first."""


class Directory:
    """An event log in a directory of this machine.

    Args:
        path: The directory with the segments.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.node = 0
        self._names = sorted((name for name in os.listdir(path) if name.endswith(SUFFIX)), reverse=True)
        if not self._names:
            message = f"{path} has no event log: no file in it ends with {SUFFIX}"
            raise ValueError(message)

    def segments(self) -> Iterator[bytes]:
        """See `Log`."""
        for name in self._names:
            try:
                with open(f"{self.path}/{name}", "rb") as file:
                    yield file.read()
            except FileNotFoundError:
                return  # it was the oldest one, and has gone meanwhile


def logs_under(path: str) -> list[Directory]:
    """The event logs of a session, of a kept history, or of several of these in one directory.

    Raises:
        ValueError: If there is none.
    """
    if os.path.isdir(path):
        candidates = [path, f"{path}/events"]
        for name in sorted(os.listdir(path)):
            candidates += [f"{path}/{name}", f"{path}/{name}/events"]
        found = [candidate for candidate in candidates if os.path.isdir(candidate) and _has_segments(candidate)]
        if found:
            return [Directory(candidate) for candidate in found]
    message = (
        f"there is no event log under {path!r}. Those of the last clusters of this machine that have ended are in the "
        "directory 'history' beside the sessions' directories, those of crashed ones in theirs"
    )
    raise ValueError(message)


def _has_segments(path: str) -> bool:
    return any(name.endswith(SUFFIX) for name in os.listdir(path))


class NodeLog:
    """The event log of a node that lives, read through it."""

    def __init__(self, asker: Asker, node: int) -> None:
        self._asker = asker
        self.node = node

    def segments(self) -> Iterator[bytes]:
        """See `Log`."""
        files = self._asker.at_node(self.node, "node.files", "events")
        for name in sorted((row[0] for row in files if row[0].endswith(SUFFIX)), reverse=True):
            data = bytearray()
            while True:
                try:
                    _, piece, size = self._asker.at_node(self.node, "node.read", "events", name, len(data), 1 << 30)
                except ValueError:
                    return  # it was the oldest one, and has gone meanwhile
                data += piece
                if not piece or len(data) >= size:
                    break
            yield bytes(data)


def attempts(log: Log, task: bytes = b"") -> Iterator[Attempt]:
    """Attempts in a log, nearly from the newest on: batches are, and in each one the last record is the first here.

    Args:
        log: Where they are.
        task: Only those of this task.
    """
    for data in log.segments():
        for block in reversed(list(_blocks(data))):
            try:
                records = list(_records(*block, task))
            except (struct.error, IndexError):
                continue  # its sender has not kept to the format
            yield from reversed(records)


def _blocks(data: bytes) -> Iterator[tuple[bytes, int, int, int, int]]:
    if len(data) < HEADER.size:
        return
    magic, version, _, node = HEADER.unpack_from(data)
    if magic != MAGIC:
        return
    if version != VERSION:
        message = f"this event log is of version {version}, and only version {VERSION} can be read here"
        raise ValueError(message)
    at = HEADER.size
    while at + BLOCK.size <= len(data):
        magic, size, check, proc, pid, job = BLOCK.unpack_from(data, at)
        at += BLOCK.size
        batch = data[at : at + size]
        if magic != BLOCK_MAGIC or len(batch) < size or binascii.crc32(batch) != check:
            return
        yield batch, proc, pid, job, node
        at += size


def _records(batch: bytes, proc: int, pid: int, job: int, node: int, task: bytes) -> Iterator[Attempt]:
    if task and task not in batch:
        return
    count, definition_bytes, text_bytes, _ = COUNTS.unpack_from(batch)
    at = COUNTS.size
    definitions = list(_definitions(batch[at : at + definition_bytes]))
    at += definition_bytes
    texts = list(_texts(batch[at : at + text_bytes]))
    at += text_bytes
    for id, start, run, attempt, definition, text, outcome, ran in RECORD.iter_unpack(
        batch[at : at + count * RECORD.size]
    ):
        if not task or id == task:
            said = texts[text - 1] if text else ""
            of = definitions[definition]
            yield Attempt(id, start, run, attempt, outcome, bool(ran), said, of, proc, pid, job, node)


def _definitions(data: bytes) -> Iterator[Definition]:
    at = 0
    while at < len(data):
        kind, has_actor, actor = DEFINITION.unpack_from(data, at)
        name, at = _text(data, at + DEFINITION.size)
        method, at = _text(data, at)
        yield Definition(kind, actor if has_actor else b"", name, method)


def _texts(data: bytes) -> Iterator[str]:
    at = 0
    while at < len(data):
        text, at = _text(data, at)
        yield text


def _text(data: bytes, at: int) -> tuple[str, int]:
    (length,) = LENGTH.unpack_from(data, at)
    at += LENGTH.size
    return data[at : at + length].decode(errors="replace"), at + length
