"""What workers print, printed by the driver.

`Folder` decides and is told the time; `Printer` reads from the core and writes. A line is shown at once. The same line
from other processes within a few seconds is counted and shown as one line when the time is over. A process that
prints the same line again is not folded: that is output, not an echo of another worker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ray._core import Core

__all__ = ["Folder", "Output", "Printer"]

FOLD_S = 5.0  # how long lines are taken for one
UNHANDLED_MAX = 10  # unhandled errors shown within FOLD_S; further ones are counted
KEYS_MAX = 10_000  # lines remembered at a time; beyond it lines are shown unfolded

_COLOURS = (36, 35, 32, 34, 33)  # cyan, magenta, green, blue, yellow: chosen by process
_RESET = "\033[0m"
_STDERR = 2


class Output(NamedTuple):
    """A line to print."""

    stream: int
    name: str
    pid: int
    text: str
    repeats: int  # 0, or how many other processes printed it too; one is shown like any line
    ip: str = ""  # of its node; empty if that is the driver's


class _Seen:
    __slots__ = ("deadline", "ip", "name", "pid", "processes", "repeats")

    def __init__(self, name: str, pid: int, ip: str, deadline: float) -> None:
        self.name = name
        self.pid = pid
        self.ip = ip
        self.processes = {(pid, ip)}  # machines count their processes alike
        self.repeats = 0
        self.deadline = deadline


class Folder:
    """Folds equal lines of several processes.

    Invariant: a line is in `_seen` from its first appearance until its deadline; `_seen` is ordered by deadline.
    """

    def __init__(self, fold_s: float = FOLD_S) -> None:
        self._fold_s = fold_s
        self._seen: dict[tuple[int, str], _Seen] = {}

    def handle(self, name: str, pid: int, stream: int, lines: list[str], now: float, ip: str = "") -> list[Output]:
        """New lines of one process; returns what to print now."""
        out = self.flush(now)
        for line in lines:
            key = (stream, line)
            seen = self._seen.get(key)
            if seen is not None and (pid, ip) not in seen.processes:
                seen.processes.add((pid, ip))
                seen.repeats += 1
                seen.name, seen.pid, seen.ip = name, pid, ip
                continue
            if seen is None and line.strip() and len(self._seen) < KEYS_MAX:
                self._seen[key] = _Seen(name, pid, ip, now + self._fold_s)
            out.append(Output(stream, name, pid, line, 0, ip))
        return out

    def flush(self, now: float) -> list[Output]:
        """Returns the folded lines whose time is over."""
        out = []
        while self._seen:
            key, seen = next(iter(self._seen.items()))
            if seen.deadline > now:
                break
            del self._seen[key]
            if seen.repeats:
                out.append(Output(key[0], seen.name, seen.pid, key[1], seen.repeats, seen.ip))
        return out

    def deadline(self) -> float | None:
        """When to call `flush` next; None when nothing waits to be printed."""
        return next((seen.deadline for seen in self._seen.values() if seen.repeats), None)


def format_line(output: Output, *, colour: bool) -> str:
    """One line with its prefix."""
    place = f", ip={output.ip}" if output.ip else ""
    prefix = f"({output.name} pid={output.pid}{place})"
    suffix = f" [repeated {output.repeats}x across cluster]" if output.repeats > 1 else ""
    if colour:
        prefix = f"\033[{_COLOURS[output.pid % len(_COLOURS)]}m{prefix}{_RESET}"
        suffix = f"\033[32m{suffix}{_RESET}" if suffix else ""
    return f"{prefix} {output.text}{suffix}\n"


class UnhandledErrors:
    """Failures of tasks whose results were dropped unread: the first few of a while are shown, the others counted."""

    def __init__(self) -> None:
        self._until = 0.0
        self._shown = 0
        self._left_out = 0

    def handle(self, text: str, now: float) -> list[str]:
        """What to print now about one more failure."""
        if now < self._until and self._shown >= UNHANDLED_MAX:
            self._left_out += 1
            return []
        out = []
        if now >= self._until:
            out = self.flush()
            self._until, self._shown = now + FOLD_S, 0
        self._shown += 1
        return [*out, f"Unhandled error (RAY_IGNORE_UNHANDLED_ERRORS=1 silences these): {text}\n"]

    def flush(self) -> list[str]:
        """How many were left out."""
        count, self._left_out = self._left_out, 0
        return [f"{count} further unhandled errors were left out here.\n"] if count else []


class Printer:
    """Two daemon threads: one reads from the core, one waits for deadlines and exists only after something folded."""

    def __init__(self, core: Core) -> None:
        fold = os.environ.get("RAY_DEDUP_LOGS", "1") != "0"
        self._folder = Folder() if fold else None
        self._core = core
        ignored = os.environ.get("RAY_IGNORE_UNHANDLED_ERRORS", "") not in ("", "0")
        self._unhandled = None if ignored else UnhandledErrors()
        self._changed = threading.Condition()
        self._closed = False
        self._timer: threading.Thread | None = None
        self._reader = threading.Thread(target=self._read, name="ray-logs", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Prints what is left. The core is closed already, which ends the reader."""
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=1.0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._folder is not None:
                _write(self._folder.flush(float("inf")))
        if self._unhandled is not None:
            _complain(self._unhandled.flush())

    def _read(self) -> None:
        while True:
            try:
                event = self._core.next_log()
            except Exception:  # the core was closed under it
                return
            if event is None:
                return
            if len(event) == 1:
                self._error(event[0])
            elif len(event) == 2:
                _notice(*event)
            else:
                self._lines(*event)

    def _lines(self, name: str, pid: int, stream: int, lines: list[str], ip: str) -> None:
        from ray._runtime import session

        ip = "" if ip == session.node_ip_address else ip
        if self._folder is None:
            _write([Output(stream, name, pid, line, 0, ip) for line in lines])
            return
        with self._changed:
            _write(self._folder.handle(name, pid, stream, lines, time.monotonic(), ip))
            if self._folder.deadline() is None:
                return
            if self._timer is None:
                self._timer = threading.Thread(target=self._wait_for_deadlines, name="ray-logs-fold", daemon=True)
                self._timer.start()
            self._changed.notify_all()

    def _error(self, error: object) -> None:
        from ray.exceptions import TaskCancelledError

        if self._unhandled is not None and not isinstance(error, TaskCancelledError):
            _complain(self._unhandled.handle(str(error), time.monotonic()))

    def _wait_for_deadlines(self) -> None:
        assert self._folder is not None
        with self._changed:
            while not self._closed:
                deadline = self._folder.deadline()
                if deadline is None:
                    self._changed.wait()
                    continue
                now = time.monotonic()
                if deadline > now:
                    self._changed.wait(deadline - now)
                    continue
                _write(self._folder.flush(now))


def _write(outputs: list[Output]) -> None:
    for stream in {output.stream for output in outputs}:
        target: Any = sys.stderr if stream == _STDERR else sys.stdout
        if target is None:
            continue
        colour = _is_terminal(target)
        text = "".join(format_line(output, colour=colour) for output in outputs if output.stream == stream)
        try:
            target.write(text)
            target.flush()
        except (OSError, ValueError):  # closed, or a broken pipe: the program's output is its own business
            return


def _is_terminal(target: Any) -> bool:
    try:
        return bool(target.isatty())
    except (AttributeError, ValueError):
        return False


def _notice(level: str, text: str) -> None:
    _complain([f"(skate) {level}: {text}\n"])


def _complain(texts: list[str]) -> None:
    if texts and sys.stderr is not None:
        try:
            sys.stderr.write("".join(texts))
            sys.stderr.flush()
        except (OSError, ValueError):
            return
