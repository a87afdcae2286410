"""Which nodes run on this machine: one small file for each, by which drivers and further nodes find their cluster.

A file lies in ``<base>/nodes/`` (see `session.base_dir`), is only its user's to read, for it has the cluster's token,
and counts while its node holds the lock of its session directory. Nodes that belong to one driver have none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Final

import msgspec

from ray._node import session

if TYPE_CHECKING:
    from ray._node.config import NodeConfig

STALE_MAX: Final = 1000
"""Files of nodes that have ended which one look removes."""


class Record(msgspec.Struct, frozen=True):
    """A node of this machine. `head_address` is where its cluster is joined, `private` hides it from "auto"."""

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
    )
    directory = f"{os.path.dirname(config.session_dir)}/nodes"
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = f"{directory}/{config.node:016x}.json"
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
    directory = f"{session.base_dir()}/nodes"
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    records: list[Record] = []
    stale = 0
    for name in names:
        path = f"{directory}/{name}"
        record = _read(path)
        if record is not None and _is_locked(record.session_dir):
            records.append(record)
        elif name.endswith(".json") and stale < STALE_MAX:
            stale += 1
            remove(path)
    return sorted(records, key=lambda record: -record.started)


def _read(path: str) -> Record | None:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def _is_locked(session_dir: str) -> bool:
    """Whether a node lives in that directory."""
    try:
        lock = os.open(f"{session_dir}/{session.LOCK_NAME}", os.O_RDWR | os.O_CLOEXEC)
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
