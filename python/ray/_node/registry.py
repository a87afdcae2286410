"""Which nodes run on this machine: one small file for each, by which drivers and further nodes find their cluster.

A file lies in ``<base>/nodes/`` (see `session.base_dir`), is only its user's to read, for it has the cluster's token,
and counts while its node holds the lock of its session directory, wherever that lies. Nodes that belong to one driver
have none. Other users, and other values of ``RAY_TMPDIR``, have another base, and so they never meet.

Invariant: a process is only signalled after it was seen to hold the lock, through a descriptor opened before: a number
that was given to another process meanwhile, or that means another one in another container, is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Final

import msgspec

from ray._node import session
from ray._node.config import python_version

if TYPE_CHECKING:
    from ray._node.config import NodeConfig

STALE_MAX: Final = 1000
"""Files of nodes that have ended which one look removes."""


class Record(msgspec.Struct, frozen=True):
    """A node of this machine. `head_address` is where its cluster is joined, `private` hides it from "auto".

    `address` is empty if it listens for no other machine, and `host` is what it calls itself.
    """

    node: int
    pid: int
    is_head: bool
    head_node: int
    head_address: str
    address: str
    socket: str
    session_dir: str
    token: bytes
    started: float
    private: bool = False
    driver_pid: int = 0
    python: str = ""
    """Version of its interpreter; empty if it was written by a release that did not say."""
    tls: bool = False
    """Whether the nodes of its cluster use TLS between them."""
    host: str = ""

    @property
    def path(self) -> str:
        """Its file, as far as this user's own directory has it."""
        return f"{directory()}/{self.node:016x}.json"


def directory() -> str:
    """Where the records of this user's nodes lie."""
    return f"{session.base_dir()}/nodes"


def write(config: NodeConfig, address: str, pid: int, started: float) -> str:
    """Make a running node findable; returns its file."""
    record = Record(
        node=config.node,
        pid=pid,
        is_head=not config.head_node,
        head_node=config.head_node or config.node,
        head_address=config.head_address or address,
        address=address,
        socket=config.socket_path,
        session_dir=config.session_dir,
        token=config.token,
        started=started,
        private=config.private,
        driver_pid=config.driver_pid,
        python=python_version(),
        tls=config.tls,
        host=config.address,
    )
    where = config.nodes_dir or f"{os.path.dirname(config.session_dir)}/nodes"
    os.makedirs(where, mode=0o700, exist_ok=True)
    path = f"{where}/{config.node:016x}.json"
    temporary = f"{path}.{os.getpid()}"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, msgspec.json.encode(record))
    finally:
        os.close(file)
    os.replace(temporary, path)  # whoever looks finds a whole record, or none
    return path


def remove(path: str) -> None:
    """The node ends."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))


def running() -> list[Record]:
    """Nodes of this user that run on this machine, the one that was started last first."""
    where = directory()
    try:
        names = os.listdir(where)
    except OSError:
        return []
    records: list[Record] = []
    stale = 0
    for name in names:
        path = f"{where}/{name}"
        record = _read(path)
        if record is not None and is_running(record):
            records.append(record)
        elif name.endswith(".json") and stale < STALE_MAX:
            stale += 1
            remove(path)
    return sorted(records, key=lambda record: -record.started)


def public() -> list[Record]:
    """Those among them that were started for whoever comes (`ray start`), and belong to no program."""
    return [record for record in running() if not record.private]


def hold(record: Record) -> int | None:
    """A pidfd of a node's process, to signal it and to wait for its end; None if it has ended, or cannot be told.

    Raises:
        OSError: If this process may have no more descriptors.
    """
    try:
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return None
    if _holds_lock(record):
        return handle
    os.close(handle)
    return None


def _holds_lock(record: Record) -> bool:
    """Whether that process has the lock file of that session open, as only its node has."""
    descriptors = f"/proc/{record.pid}/fd"
    try:
        lock = os.stat(f"{record.session_dir}/{session.LOCK_NAME}")
        numbers = os.listdir(descriptors)
    except OSError:
        return False
    for number in numbers:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"{descriptors}/{number}"), lock):
                return True
    return False


def _read(path: str) -> Record | None:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def is_running(record: Record) -> bool:
    """Whether the node lives: whether somebody holds the lock of its directory."""
    try:
        lock = os.open(f"{record.session_dir}/{session.LOCK_NAME}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(lock)
