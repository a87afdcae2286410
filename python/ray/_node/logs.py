"""What workers print: cut into lines, kept within limits, and handed on.

`LogStream` is a machine for one worker's one stream: bytes in, lines out. `LogFiles` holds the files, and an
inotify descriptor on their directory, so that nothing is read unless something was written.

Limits, and what happens beyond them:
- a line is cut at `LINE_BYTES_MAX`;
- a stream that writes more than `STREAM_BYTES_PER_S` for long loses lines, and a line says how many;
- a file longer than `FILE_BYTES_MAX` is emptied once it has been read;
- files of ended workers are kept, the last `FILES_KEPT` of them; empty ones are deleted.

A worker marks in its output which task prints (`ray._runtime.output`). Marks are removed here and never shown.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import struct
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ray._protocol import LOG_MARK_BEGIN, LOG_MARK_END, STREAM_ERR, STREAM_OUT, LogLines

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_BYTES_MAX: Final = 16 << 10
BATCH_LINES: Final = 200
STREAM_BYTES_PER_S: Final = 4 << 20
BURST_BYTES: Final = 8 << 20
FILE_BYTES_MAX: Final = 64 << 20
FILES_KEPT: Final = 1000
TAIL_LINES: Final = 20
TAIL_BYTES: Final = 16 << 10
READ_BYTES: Final = 1 << 20
"""Read at a time; a worker that writes without pause gets no more attention than this per turn."""

DROP_NOTE_S: Final = 1.0
"""After this time without an accepted line, the number of lost ones is told anyway."""

PARTIAL_S: Final = 0.5
"""A line without its end, such as a progress bar or a prompt, is shown after this time as it is."""

_IN_MODIFY: Final = 0x2
_IN_ATTRIB: Final = 0x4
_EVENT: Final = struct.Struct("iIII")
_SUFFIXES: Final = {"out": STREAM_OUT, "err": STREAM_ERR}
_MARK: Final = re.compile(re.escape(LOG_MARK_BEGIN) + rb"([^\x07\n]*)" + re.escape(LOG_MARK_END))


class Line(NamedTuple):
    """A line of output, and the name of the task that printed it; empty: what the worker is called."""

    name: str
    text: str


class LogStream:
    """Lines of one stream, at a bounded rate (a token bucket, counted in bytes)."""

    def __init__(self, now: float) -> None:
        self._partial = b""
        self._name = ""
        self._cut = False
        self._tokens = float(BURST_BYTES)
        self._at = now
        self._dropped = 0
        self._begun = False
        self.partial_due: float | None = None
        self.deadline: float | None = None

    def feed(self, data: bytes, now: float) -> list[Line]:
        """Take what was written; returns the complete lines in it."""
        self._tokens = min(BURST_BYTES, self._tokens + (now - self._at) * STREAM_BYTES_PER_S)
        self._at = now
        *complete, rest = (self._partial + data).split(b"\n")
        lines: list[Line] = []
        for marked in complete:
            line = self._unmarked(marked)
            if self._cut:  # the rest of a line whose beginning was handed on already
                self._cut = False
                continue
            if self._begun:  # its beginning was shown; if nothing came since, this is only its end
                self._begun = False
                if not line:
                    continue
            self._take(line, lines, now)
        self._partial = rest
        if self._cut:
            self._unmarked(rest)
            self._partial = b""
        elif len(rest) > LINE_BYTES_MAX:
            self._take(self._unmarked(rest), lines, now)
            self._partial, self._cut = b"", True
        if not self._partial:
            self.partial_due = None
        elif self.partial_due is None or complete:
            self.partial_due = now + PARTIAL_S
        return lines

    def due(self, now: float) -> list[Line]:
        """What has waited long enough: a line without its end, and how many lines were lost."""
        lines: list[Line] = []
        if self.partial_due is not None and self.partial_due <= now:
            lines += self.begun(now)
        if self.deadline is not None and self.deadline <= now:
            lines += self.note(now)
        return lines

    def begun(self, now: float) -> list[Line]:
        """The line that has no end yet, as it is."""
        self.partial_due = None
        lines: list[Line] = []
        text, self._partial = self._unmarked(self._partial), b""
        if text:
            self._take(text, lines, now)
            self._begun = True
        return lines

    def end(self, now: float) -> list[Line]:
        """The writer has gone: what is left without a line end is a line too."""
        self._partial = self._unmarked(self._partial)
        lines = self.feed(b"\n", now) if self._partial else []
        return [*lines, *self.note(now)]

    def note(self, now: float) -> list[Line]:
        """How many lines were lost since the last note, as a line; empty if none."""
        self.deadline = None
        if not self._dropped:
            return []
        dropped, self._dropped = self._dropped, 0
        text = f"[{dropped} lines were left out here: more than {STREAM_BYTES_PER_S >> 20} MiB per second]"
        return [Line(self._name, text)]

    def _unmarked(self, text: bytes) -> bytes:
        """The text without its marks; what follows goes under the last of them."""
        if LOG_MARK_BEGIN not in text:
            return text
        for name in _MARK.findall(text):
            self._name = name.decode(errors="replace")
        return _MARK.sub(b"", text)

    def _take(self, line: bytes, lines: list[Line], now: float) -> None:
        if len(line) > self._tokens:
            self._dropped += 1
            self.deadline = self.deadline or now + DROP_NOTE_S
            return
        if self._dropped:
            lines += self.note(now)
        self._tokens -= len(line) + 1
        # What a carriage return goes back over would not be seen on a terminal either, and neither would our prefix.
        text = line[:LINE_BYTES_MAX].decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        lines.append(Line(self._name, f"{text} [cut]" if len(line) > LINE_BYTES_MAX else text))


class _File(msgspec.Struct):
    path: str
    proc: int
    pid: int
    stream: int
    lines: LogStream
    fd: int
    offset: int = 0


class LogFiles:
    """The log files of living workers. Not a machine: it reads files.

    Args:
        directory: Where they are.
        ip: What the node calls itself.
    """

    def __init__(self, directory: str, ip: str = "") -> None:
        self._directory = directory
        self._ip = ip
        self._files: dict[str, _File] = {}
        self._names: dict[int, str] = {}
        self._kept: deque[str] = deque()
        self._inotify = -1

    def open(self) -> int:
        """Begin to watch; returns the descriptor that becomes readable when a worker has written."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(self._directory), _IN_MODIFY | _IN_ATTRIB) < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"inotify on {self._directory}: {os.strerror(errno)}")
        self._inotify = fd
        return fd

    def set_label(self, proc: int, label: str) -> None:
        """What the worker does from now on. While it does nothing, late lines still belong to the last label."""
        if label:
            self._names[proc] = label

    def read_changed(self, now: float) -> Iterator[tuple[int, LogLines]]:
        """New lines, as (worker, message), of all files that changed since the last call."""
        names: dict[str, None] = {}
        while True:
            try:
                events = os.read(self._inotify, 65536)
            except BlockingIOError:
                break
            at = 0
            while at < len(events):
                size = _EVENT.unpack_from(events, at)[3]
                at += _EVENT.size
                names[events[at : at + size].rstrip(b"\0").decode()] = None
                at += size
        for name in names:
            file = self._file(name, now)
            if file is not None:
                yield from self._read(file, now)

    def flush_due(self, now: float) -> Iterator[tuple[int, LogLines]]:
        """Lines without an end that have waited for it, and notes about lost lines."""
        for file in self._files.values():
            if file.lines.partial_due is not None or file.lines.deadline is not None:
                yield from self._batches(file, file.lines.due(now))

    def flush_all(self, now: float) -> Iterator[tuple[int, LogLines]]:
        """Everything that was written, lines without an end as they are."""
        if self._inotify >= 0:
            yield from self.read_changed(now)
        for file in self._files.values():
            yield from self._batches(file, [*file.lines.begun(now), *file.lines.note(now)])

    def next_deadline(self) -> float | None:
        deadlines = [x.lines.deadline for x in self._files.values() if x.lines.deadline is not None]
        deadlines += [x.lines.partial_due for x in self._files.values() if x.lines.partial_due is not None]
        return min(deadlines, default=None)

    def end(self, proc: int, pid: int, now: float) -> tuple[list[tuple[int, LogLines]], tuple[str, ...]]:
        """The worker has ended: its remaining lines, and the last of all for whoever asks why."""
        rest: list[tuple[int, LogLines]] = []
        tail: list[str] = []
        for suffix in ("err", "out"):
            name = f"worker-{proc:016x}-{pid}.{suffix}"
            file = self._file(name, now)
            if file is None:
                continue
            while file.offset < os.fstat(file.fd).st_size:
                rest += self._read(file, now)
            rest += self._batches(file, file.lines.end(now))
            # Errors first: if there are enough of them, what was printed before matters less.
            room = TAIL_LINES - len(tail)
            tail = [*_last_lines(file, room), *tail] if room > 0 else tail
            self._close(name)
        self._names.pop(proc, None)
        return rest, tuple(tail)

    def close(self) -> None:
        for name in list(self._files):
            self._close(name)
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def _file(self, name: str, now: float) -> _File | None:
        file = self._files.get(name)
        if file is not None:
            return file
        stem, _, suffix = name.partition(".")
        parts = stem.split("-")
        if len(parts) != 3 or parts[0] != "worker" or suffix not in _SUFFIXES:
            return None
        path = f"{self._directory}/{name}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None  # deleted already
        file = _File(path, int(parts[1], 16), int(parts[2]), _SUFFIXES[suffix], LogStream(now), fd)
        self._files[name] = file
        return file

    def _read(self, file: _File, now: float) -> list[tuple[int, LogLines]]:
        data = os.pread(file.fd, READ_BYTES, file.offset)
        file.offset += len(data)
        if len(data) == READ_BYTES:
            # More is there: look again next turn, through an event of our own making.
            os.utime(file.fd)
        elif file.offset > FILE_BYTES_MAX:
            os.ftruncate(file.fd, 0)
            file.offset = 0
        return self._batches(file, file.lines.feed(data, now))

    def _batches(self, file: _File, lines: list[Line]) -> list[tuple[int, LogLines]]:
        batches = []
        for name, group in itertools.groupby(lines, key=lambda line: line.name):
            shown = name or self._names.get(file.proc, "")
            texts = [line.text for line in group]
            for at in range(0, len(texts), BATCH_LINES):
                message = LogLines(shown, file.pid, file.stream, texts[at : at + BATCH_LINES], self._ip)
                batches.append((file.proc, message))
        return batches

    def _close(self, name: str) -> None:
        file = self._files.pop(name)
        empty = os.fstat(file.fd).st_size == 0
        os.close(file.fd)
        self._kept.append(file.path)
        if empty or len(self._kept) > FILES_KEPT:
            doomed = self._kept.pop() if empty else self._kept.popleft()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(doomed)


def _last_lines(file: _File, count: int) -> list[str]:
    size = os.fstat(file.fd).st_size
    data = os.pread(file.fd, TAIL_BYTES, max(size - TAIL_BYTES, 0))
    lines = _MARK.sub(b"", data).decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]
