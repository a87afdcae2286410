"""The event log of one node: every attempt of a task that has ended on it, in files of its session directory.

Batches of records come from the cores as they are (`skate-core`, `core/history.rs`) and are appended to a segment in
blocks. When a segment is full the next begins, and the oldest goes. Nothing is written before the first record, and
nothing is read here: readers read the files themselves, or through the node (`node.read`), so that no query costs the
node more than a read.

A segment, ``<number>.events`` with 8 digits, is `HEADER` (magic, version, node) and blocks: `BLOCK` (magic, bytes of
the batch, its CRC-32, process, pid, job) and the batch. All numbers are little-endian. A reader stops at the first
block that is cut or garbled, which a crash may leave at the end. `ray._runtime.history` reads them.

When a node ends its log is kept under ``<base>/history/<session>``, for the last few sessions; what a crash leaves
behind lies in the session directory.

Limits: `SEGMENT_BYTES_MAX` and `SEGMENTS_MAX`, together 256 MiB or some 4 million tasks, of which the oldest go;
`SESSIONS_KEPT`. What the disk has no room for is dropped and counted in the node's own log.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import struct
from typing import Final

MAGIC: Final = b"SKATEEVT"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQ")
"""Magic, version, zero, node."""

BLOCK_MAGIC: Final = b"BLCK"
BLOCK: Final = struct.Struct("<4sIIQII")
"""Magic, bytes of the batch, CRC-32 of it, process, pid, job."""

SEGMENT_BYTES_MAX: Final = 4 << 20
"""A query reads whole segments, the newest first; so they are small."""

SEGMENTS_MAX: Final = 64

SESSIONS_KEPT: Final = 3
"""Ended sessions whose logs are kept; RAY_EVENT_LOGS_KEPT is another number, and 0 keeps none."""

SUFFIX: Final = ".events"
HISTORY: Final = "history"


class EventLog:
    """Appends blocks. Not a machine: it writes files."""

    def __init__(self, directory: str, node: int) -> None:
        self._directory = directory
        self._node = node
        self._fd = -1
        self._number = 0
        self._size = 0
        self._dropped = 0

    def append(self, proc: int, pid: int, job: int, batch: bytes) -> str:
        """Write a batch; returns what should be told about it, mostly nothing."""
        block = BLOCK.pack(BLOCK_MAGIC, len(batch), binascii.crc32(batch), proc, pid, job) + batch
        try:
            if self._fd < 0 or self._size + len(block) > SEGMENT_BYTES_MAX:
                self._begin()
            written = os.write(self._fd, block)
            if written < len(block):
                raise OSError(28, os.strerror(28))  # what is left of it did not fit
        except OSError as error:
            # A block that was cut would hide those behind it.
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._size)
            self._dropped += 1
            first = self._dropped == 1
            text = f"the event log in {self._directory} cannot be written ({error}); history is lost until it can"
            return text if first else ""
        self._size += len(block)
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            return f"the event log can be written again; {dropped} batches were lost"
        return ""

    def close(self) -> None:
        """Nothing is written any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self) -> None:
        """Open the next segment, and remove the one that is too many."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        number = self._number + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._path(number), flags, 0o600)
        try:
            os.write(fd, HEADER.pack(MAGIC, VERSION, 0, self._node))
        except OSError:
            os.close(fd)
            os.unlink(self._path(number))
            raise
        self.close()
        self._fd, self._number, self._size = fd, number, HEADER.size
        if number > SEGMENTS_MAX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(number - SEGMENTS_MAX))

    def _path(self, number: int) -> str:
        return f"{self._directory}/{number:08d}{SUFFIX}"


def keep(session_dir: str) -> None:
    """Move the log of a session that ends to where it is kept, and remove what is too old there."""
    here = f"{session_dir}/events"
    if not os.path.isdir(here):
        return
    kept = os.environ.get("RAY_EVENT_LOGS_KEPT", "")
    count = int(kept) if kept.isdigit() else SESSIONS_KEPT
    base, _, name = session_dir.rpartition("/")
    history = f"{base}/{HISTORY}"
    if not count:
        return
    with contextlib.suppress(OSError):
        from ray._node import session

        os.makedirs(history, mode=0o700, exist_ok=True)
        os.rename(here, f"{history}/{name}")
        # Names begin with the time of the start, so they are in its order.
        for old in sorted(os.listdir(history))[:-count]:
            session.remove(f"{history}/{old}")
