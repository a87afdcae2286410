"""What a process can tell the kernel about itself. Linux only; each function says what it needs."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

_ARG_START_FIELD: Final = 48
"""Of /proc/self/stat, counted from one; see proc_pid_stat(5)."""

_libc = ctypes.CDLL(None, use_errno=True)
_title_area: tuple[int, int] | None = None


def become_subreaper() -> None:
    """Orphans among the descendants become children of this process from now on."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """SIGKILL comes when the parent ends. Exits at once if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def set_title(title: str) -> None:
    """What ps and top show for this process. Cut to the room that the command line has; never fails."""
    global _title_area
    encoded = title.encode()
    _libc.prctl(_PR_SET_NAME, encoded[:15], 0, 0, 0)
    if _title_area is None:
        _title_area = _find_title_area()
    start, size = _title_area
    if size > 1:
        ctypes.memset(start, 0, size)
        ctypes.memmove(start, encoded, min(len(encoded), size - 1))


def task_count() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def children() -> list[int]:
    """Child processes, zombies included; empty where the kernel does not say."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _find_title_area() -> tuple[int, int]:
    """Where the command line lies in memory, as (address, bytes); forks have it at the same place."""
    try:
        # The name in field 2 may contain anything, so fields are counted behind its closing bracket.
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        start, end = (int(field) for field in fields[_ARG_START_FIELD - 3 : _ARG_START_FIELD - 1])
    except (OSError, ValueError):
        return (0, 0)
    return (start, end - start) if 0 < start < end else (0, 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl {option}: {os.strerror(errno)}")
