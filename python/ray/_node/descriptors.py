"""File descriptors of processes: how many they may have, and how many they have."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Final

WANTED: Final = 1 << 16
"""Thousands of workers, with as many segments and connections."""


def raise_limit() -> None:
    """Raise this process's soft limit of descriptors towards its hard one; shells allow 1024 by default.

    A node has one for each process, connection and segment; a driver, one for each worker and actor that it calls;
    a worker inherits the node's limit, for it may talk to all the others. Programs that the user starts from a driver
    or worker inherit it too: nothing that works with the lower limit fails with this one, except a program that uses
    select(2) and opens more than 1024 descriptors, which would have failed at the 1025th. So nothing is restored for
    user code. A limit that cannot be raised stays: what then does not fit is refused with an error.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def usage(pid: int) -> tuple[int, int]:
    """(open descriptors, soft limit) of a process; (0, 0) if it is gone or somebody else's."""
    directory = f"/proc/{pid}/fd"
    try:
        # Kernels since 6.2 give the number as the size, which takes no descriptor to read.
        count = os.stat(directory).st_size or len(os.listdir(directory))
        return count, resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
    except (OSError, ValueError):
        return 0, 0
