"""What the worker pool keeps."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from ray._protocol import RETRY_CHARGED

Kind: TypeAlias = "tuple[int, bytes]"
"""(job, env): what must agree between a ticket and a worker."""

STARTING: Final = ("forking", "joining")


class Worker(msgspec.Struct):
    """One worker process. `pid` is 0 until the zygote or the worker itself tells it."""

    proc: int
    kind: Kind
    state: str
    since: float
    pid: int = 0
    started: float = 0.0
    joined: bool = False
    reaped: bool = False
    exit_code: int = 0
    announced: str = ""
    """Why it ends, in its own words or in those of who wanted it to."""
    stopped: bool = False
    """This node killed it on purpose."""
    doubt: str = ""
    """Why it should be ending by itself, and that it did not; completes "because ..." if it is killed for that."""
    evicted: str = ""
    """This node killed it for want of memory: what is told of its end."""
    retry: int = RETRY_CHARGED
    """What that means for the task that it ran."""
    overdue: bool = False
    """It did not end by itself, and was killed."""
    failure: str = ""
    """Why it was given up before it joined."""


class Ended(msgspec.Struct, frozen=True):
    """A worker that was there, for people who look."""

    proc: int
    pid: int
    job: int
    cause: str
    exit_code: int
    intended: bool
    started: float
    at: float


class Ticket(msgspec.Struct, frozen=True):
    """Somebody waits for a worker."""

    id: int
    kind: Kind
    label: str
