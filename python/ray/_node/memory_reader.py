"""What the kernel says about memory: the limits above this process, what is used of them, and by whom.

Owns descriptors of a few files under /proc and of the memory controller's. Knows neither workers nor what a number
means: `memory` decides. A file that is missing, not readable, or has gone with its control group is left out.

What counts as used is what Ray's documentation says. Of the machine: everything but `MemAvailable`. Of a control
group: its usage without its file cache, which the kernel takes back before it kills; shared memory, the object store
with it, is not in that part and counts. Against an explicit limit: what the node's processes hold for themselves, with
what several share in equal parts (PSS), and the pages of the object store, whoever has mapped them.

A process's own memory is its PSS without shared memory: about what its end gives back, since segments outlive the
process that leased them.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING, Final

from ray._node.events import MemoryRead, MemoryUse, ProcessUse

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

EXPLICIT: Final = "RAY_memory_limit_bytes"
"""The name of an explicit limit."""

EXACT_SHARE: Final = 0.8
"""Below this share of an explicit limit resident sizes do, which count what a fork shares with its parent twice."""

CACHE_SHARE: Final = 0.5
"""Below this share of a control group's limit it does not matter how much of its usage is file cache."""

OOM_LOOK_S: Final = 1.0
"""The kernel's counter is compared no more often than this while nobody has died."""

OOM_KILL_S: Final = 5.0
"""For so long after the kernel's counter went up, a SIGKILL that nobody here sent is taken to be what it counted."""

COMMAND_CHARS_MAX: Final = 80
"""Of a command line that is shown for a process of somebody else."""

STALLS: Final = (b"some 100000 1000000\0", b"some 200000 2000000\0")
"""Microseconds without progress for want of memory, and within how many: a tenth. The second is for those without
privileges, who may name windows of two seconds."""

_PAGE: Final = os.sysconf("SC_PAGESIZE")
_READ_BYTES: Final = 4096
_SECTOR: Final = 512

_MEMINFO_BYTES: Final = 128
"""The first three lines, which have what is needed; see proc_meminfo(5)."""


class MemoryReader:
    """See the module's docstring.

    Args:
        limit_bytes: An explicit limit, which takes the place of all others; 0 if there is none.
        proc: Where /proc is, for tests.
    """

    def __init__(self, *, limit_bytes: int = 0, proc: str = "/proc") -> None:
        self._limit_bytes = limit_bytes
        self._proc = proc
        self._meminfo = _open(f"{proc}/meminfo")
        self._groups = [] if limit_bytes else _groups_above(proc)
        self._oom = _OomCounter(proc, self._groups)
        self._stalls: select.epoll | None = None
        self._stall_fds: list[int] = []

    def close(self) -> None:
        """Close every descriptor. Nothing may be read any more."""
        if self._stalls is not None:
            self._stalls.close()
        for fd in (*self._stall_fds, self._meminfo):
            if fd >= 0:
                os.close(fd)
        for group in self._groups:
            group.close()
        self._oom.close()

    # ------------------------------------------------------------------ use

    def read(self, own: Mapping[int, str], segments: Collection[int], *, detailed: bool) -> MemoryRead:
        """What is used of each limit.

        Args:
            own: The node's own processes (itself, its zygote, its workers) and what they are.
            segments: Descriptors of the object store's segments.
            detailed: Also say what each process of this machine has.
        """
        self._oom.look()
        # The limits last: what ended while the processes were looked at must not count as used, or another pays for it.
        processes = self._list(own, segments) if detailed else ()
        if self._limit_bytes:
            used = sum(x.bytes for x in processes[: len(own) + 1]) if detailed else self._used_by(own, segments)
            return MemoryRead((MemoryUse(EXPLICIT, self._limit_bytes, used),), processes)
        uses = (self._read_machine(), *(group.read() for group in self._groups))
        return MemoryRead(tuple(use for use in uses if use is not None), processes)

    def _read_machine(self) -> MemoryUse | None:
        fields = _fields(_reread(self._meminfo, _MEMINFO_BYTES))
        total, available = fields.get(b"MemTotal:", 0) << 10, fields.get(b"MemAvailable:", -1) << 10
        return MemoryUse("the machine", total, total - available) if total and available >= 0 else None

    def _used_by(self, own: Mapping[int, str], segments: Collection[int]) -> int:
        shared = _pages_of(segments)
        used = shared + sum(self._resident(pid)[1] for pid in own)
        return used if used <= self._limit_bytes * EXACT_SHARE else shared + sum(self._private(pid) for pid in own)

    # ------------------------------------------------------------------ processes

    def _list(self, own: Mapping[int, str], segments: Collection[int]) -> tuple[ProcessUse, ...]:
        """What each process has: first the object store, then ours by what their end would give back, then others by
        what is resident.
        """
        found = [ProcessUse(0, _pages_of(segments), "the object store, in shared memory")]
        found.extend(ProcessUse(pid, self._private(pid), what) for pid, what in own.items())
        others = {int(name) for name in os.listdir(self._proc) if name.isdigit()}.difference(own)
        sizes = ((pid, self._resident(pid)[0]) for pid in sorted(others))
        found.extend(ProcessUse(pid, resident, self._command(pid)) for pid, resident in sizes if resident)
        return tuple(found)

    def _private(self, pid: int) -> int:
        """Its own memory; by a cruder measure where the kernel does not say; 0 if the process has gone."""
        fields = _fields(_slurp(f"{self._proc}/{pid}/smaps_rollup"))
        if b"Pss:" not in fields:
            return self._resident(pid)[1]
        return (fields[b"Pss:"] - fields.get(b"Pss_Shmem:", 0)) << 10

    def _resident(self, pid: int) -> tuple[int, int]:
        """(all that is in memory, that without what comes from files and shared memory), in bytes."""
        words = _slurp(f"{self._proc}/{pid}/statm").split()
        if len(words) < 3:
            return 0, 0
        resident, shared = int(words[1]), int(words[2])
        return resident * _PAGE, max(resident - shared, 0) * _PAGE

    def _command(self, pid: int) -> str:
        line = _slurp(f"{self._proc}/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        printable = "".join(char if char.isprintable() else "?" for char in line)
        return printable if len(printable) <= COMMAND_CHARS_MAX else printable[: COMMAND_CHARS_MAX - 3] + "..."

    # ------------------------------------------------------------------ what the kernel did, and how it feels

    def claim_oom_kill(self) -> str:
        """Whether the kernel has lately ended one more process of ours for want of memory than was claimed before.

        Returns:
            What says so, for people; empty if nothing does.
        """
        return self._oom.claim()

    def watch_stalls(self) -> int:
        """A descriptor that becomes readable when processes wait for memory; -1 where the kernel has no such thing.

        A look at the usage costs microseconds but must be timed; this comes by itself when time was short.
        """
        paths = [f"{self._proc}/pressure/memory", *(f"{x.path}/memory.pressure" for x in self._groups[:1] if x.unified)]
        for path in paths:
            for trigger in STALLS:
                fd = _open(path, os.O_RDWR | os.O_NONBLOCK)
                try:
                    if fd >= 0:
                        os.write(fd, trigger)
                        self._stall_fds.append(fd)
                        break
                except OSError:
                    os.close(fd)
        if not self._stall_fds:
            return -1
        # Triggers show as exceptional conditions, and those who wait for us know readable descriptors only.
        self._stalls = select.epoll()
        for fd in self._stall_fds:
            self._stalls.register(fd, select.EPOLLPRI | select.EPOLLET)
        return self._stalls.fileno()

    def take_stall(self) -> None:
        """The descriptor was readable, and is not any more. (Being asked takes an event off a trigger, so that nothing
        may be found here: the wake-up itself is the news.)
        """
        if self._stalls is not None:
            self._stalls.poll(0)


class _Group:
    """A control group at or above this process's, with its memory controller's files."""

    def __init__(self, path: str, name: str, *, unified: bool) -> None:
        self.path = path
        self.name = name
        self.unified = unified
        files = ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        self._limit, self._usage = (_open(f"{path}/{file}") for file in files)
        self._statistics = _open(f"{path}/memory.stat")

    def close(self) -> None:
        for fd in (self._limit, self._usage, self._statistics):
            if fd >= 0:
                os.close(fd)

    def read(self) -> MemoryUse | None:
        """None if it has no limit. In the first version of control groups that is a number beyond any memory."""
        limit, used = _number(_reread(self._limit)), _number(_reread(self._usage))
        if limit is None or used is None or not 0 < limit < 1 << 60:
            return None
        if used > limit * CACHE_SHARE:
            fields = _fields(_reread(self._statistics))
            prefix = b"" if self.unified else b"total_"
            used -= fields.get(prefix + b"inactive_file", 0) + fields.get(prefix + b"active_file", 0)
        return MemoryUse(f"the control group {self.name}", limit, max(used, 0))


class _OomCounter:
    """The kernel's count of processes that it ended for want of memory, as near to ours as it counts."""

    def __init__(self, proc: str, groups: Sequence[_Group]) -> None:
        candidates = [
            *((f"{x.path}/{'memory.events' if x.unified else 'memory.oom_control'}", x.name) for x in groups[:1]),
            (f"{proc}/vmstat", ""),
        ]
        self._fd, self._seen, self.name = -1, 0, ""
        for path, name in candidates:
            self._fd, self.name = _open(path), name
            count = self._count()
            if count is not None:
                self._seen = count
                break
            self.close()
        self._unclaimed = 0
        self._rose_at = self._looked_at = 0.0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _count(self) -> int | None:
        return _fields(_reread(self._fd, 1 << 16)).get(b"oom_kill")

    def look(self) -> None:
        """So that what rose long before a death is known to be older."""
        if time.monotonic() >= self._looked_at + OOM_LOOK_S:
            self._compare()

    def _compare(self) -> None:
        self._looked_at = time.monotonic()
        count = self._count()
        if count is not None and count > self._seen:
            self._unclaimed, self._rose_at = self._unclaimed + count - self._seen, self._looked_at
            self._seen = count

    def claim(self) -> str:
        self._compare()
        if time.monotonic() > self._rose_at + OOM_KILL_S:
            self._unclaimed = 0
        if not self._unclaimed:
            return ""
        self._unclaimed -= 1
        return f"control group {self.name}" if self.name else "this machine"


def _pages_of(segments: Collection[int]) -> int:
    """Bytes of shared memory that were touched; only these take room."""
    return sum(os.fstat(fd).st_blocks * _SECTOR for fd in segments)


def _groups_above(proc: str) -> list[_Group]:
    """The control groups of this process that the memory controller knows, from its own up to the visible root."""
    memberships = [line.split(":", 2) for line in _slurp(f"{proc}/self/cgroup").decode(errors="replace").splitlines()]
    for mount in _slurp(f"{proc}/self/mountinfo").decode(errors="replace").splitlines():
        before, _, after = mount.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        unified = kind[0] == "cgroup2"
        if not unified and "memory" not in kind[2].split(","):
            continue
        for _, controllers, path in (entry for entry in memberships if len(entry) == 3):
            if (controllers == "") if unified else ("memory" in controllers.split(",")):
                groups = _chain(_unescape(fields[4]), _below(path, _unescape(fields[3])), unified=unified)
                # Both versions may be mounted, and the controller belongs to one of them.
                if groups:
                    return groups
    return []


def _below(path: str, root: str) -> str:
    """A group's path below what is mounted: in a container that may be a part of the whole."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path.strip("/")


def _chain(mount: str, below: str, *, unified: bool) -> list[_Group]:
    if ".." in below.split("/") or not os.path.isdir(f"{mount}/{below}"):
        below = ""  # outside of what is visible here: what is mounted holds us, too
    parts = below.split("/") if below else []
    names = ["/" + "/".join(parts[:length]) for length in range(len(parts), -1, -1)]
    # Where both versions are mounted, the controller belongs to one; in the second, it may be off further down.
    known = [name for name in names if os.path.exists(f"{mount}{name.rstrip('/')}/memory.stat")]
    return [_Group(mount + name.rstrip("/"), name, unified=unified) for name in known]


def _unescape(path: str) -> str:
    """Blanks in mount points are written in octal; see proc_pid_mountinfo(5)."""
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _open(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor, or -1."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return -1


def _reread(fd: int, size: int = _READ_BYTES) -> bytes:
    """The start of a file as it is now; empty if there is none."""
    if fd < 0:
        return b""
    try:
        return os.pread(fd, size, 0)
    except OSError:
        return b""


def _slurp(path: str) -> bytes:
    """A whole small file; empty if there is none."""
    fd = _open(path)
    if fd < 0:
        return b""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    os.close(fd)
    return b"".join(parts)


def _fields(text: bytes) -> dict[bytes, int]:
    """The numbers by the word before them, line by line."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _number(text: bytes) -> int | None:
    """None for what is no number, such as the word `max`."""
    word = text.strip()
    return int(word) if word.isdigit() else None
