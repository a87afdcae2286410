"""What a tree of processes uses, read from /proc. Needs nothing but the standard library."""

import os
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def descendants(root):
    """Return the ids of all living processes below `root`, without `root`."""
    children = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            parent = parent_of(int(entry.name))
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found, pending = [], [root]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child)
    return sorted(found)


def parent_of(pid):
    """Return the parent of a living process; None for one that is gone or a zombie."""
    stat = _stat_fields(pid)
    return None if stat is None or stat[0] == "Z" else int(stat[1])


def thread_count(pid):
    stat = _stat_fields(pid)
    return 0 if stat is None else int(stat[17])


def cpu_seconds(pid):
    """Return the processor time that a process has used, in user and kernel mode."""
    stat = _stat_fields(pid)
    return 0.0 if stat is None else (int(stat[11]) + int(stat[12])) / TICKS_PER_SECOND


def memory(pid):
    """Return (PSS, its part that is shared memory) in bytes; zeros for a process that is gone.

    PSS counts a page shared by n processes as 1/n in each, so it may be summed over processes.
    """
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("Pss", 0), sizes.get("Pss_Shmem", 0)


def memory_of_all(pids):
    """Return the sums of `memory` over processes."""
    pairs = [memory(pid) for pid in pids]
    return sum(pss for pss, _ in pairs), sum(shared for _, shared in pairs)


def available_bytes():
    for line in (PROC / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _stat_fields(pid):
    # The command, in parentheses, may itself hold spaces and parentheses.
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
