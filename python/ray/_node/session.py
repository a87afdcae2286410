"""Session directories: one per node process, private, and removed even if nobody was left to do it.

A session directory lies in ``<base>/session_<time>_<pid>_<random>``, where base is ``$RAY_TMPDIR`` or
``<temporary directory>/ray-<uid>``. It holds the node's socket, a lock file and ``logs/``. The node holds
an flock on the lock file for as long as it lives, and nobody else does; so a directory whose lock is free
belongs to a node that crashed. Its logs are kept until a few younger ones have crashed; then the next node
that starts removes it. Spilled values are in ``spill/`` of it, which may be a link to a directory elsewhere; they are
removed at the first opportunity, since nobody can read them any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from typing import Final

LOCK_NAME: Final = "lock"
SPILL_NAME: Final = "spill"
SPILL_PREFIX: Final = "ray-spilled-"
"""How directories for spilled values begin that are not in the session directory; the session's name follows."""

SOCKET_NAME: Final = "node.sock"
SOCKET_PATH_BYTES_MAX: Final = 107
"""What fits into sockaddr_un, less the terminating zero."""

YOUNG_S: Final = 60.0
"""A directory without a lock file is left alone for this long: its maker may be about to create it."""

NAME_BYTES_MAX: Final = 50
"""What a session's name and the socket's in it add to the path of the base directory, at most."""

CRASHED_KEPT: Final = 3
"""Sessions whose node crashed keep their logs, until there are this many younger ones."""

SWEEP_MAX: Final = 100
"""Directories removed at one start; the rest waits for the next."""


def base_dir(temp_dir: str = "") -> str:
    """Where this user's sessions are; created with mode 0700 if need be.

    Args:
        temp_dir: Somewhere else instead.

    Raises:
        RuntimeError: If it cannot be made, or belongs to somebody else, who could then read and replace what is in it.
    """
    chosen = temp_dir or os.environ.get("RAY_TMPDIR")
    base = chosen or f"{_temporary()}/ray-{os.getuid()}"
    if not chosen and len(os.fsencode(base)) + NAME_BYTES_MAX > SOCKET_PATH_BYTES_MAX:
        base = f"/tmp/ray-{os.getuid()}"  # TMPDIR is too deep for a socket, as test runners' often are
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unusable(base, error, temp_dir) from None
    # A link that somebody else has put into a shared directory must not be followed; the user's own may.
    info = os.stat(base, follow_symlinks=bool(chosen))
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        remedy = "give another one" if temp_dir else "remove it, or set RAY_TMPDIR to a private directory"
        msg = f"{base} is not a directory of user {os.getuid()}: {remedy}"
        raise RuntimeError(msg)
    return base


def create(temp_dir: str = "") -> tuple[str, int]:
    """Make a session directory; returns it and the descriptor of its lock, which is held.

    The lock lives as long as a descriptor of it is open in some process: hand it to the node and close it here.

    Args:
        temp_dir: Where, instead of among this user's others.

    Raises:
        RuntimeError: If it cannot be made, or if the path is too long for a socket.
    """
    name = f"session_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}_{os.urandom(3).hex()}"
    path = f"{base_dir(temp_dir)}/{name}"
    if len(os.fsencode(f"{path}/{SOCKET_NAME}")) > SOCKET_PATH_BYTES_MAX:
        remedy = "Give a shorter directory" if temp_dir else "Set RAY_TMPDIR to a shorter directory"
        msg = f"{path} is too long: the path of a Unix socket in it may have {SOCKET_PATH_BYTES_MAX} bytes. {remedy}"
        raise RuntimeError(msg)
    lock = -1
    try:
        os.mkdir(path, mode=0o700)
        lock = os.open(f"{path}/{LOCK_NAME}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.mkdir(f"{path}/logs", mode=0o700)
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        remove(path)
        raise _unusable(path, error, temp_dir) from None
    return path, lock


def _unusable(path: str, error: OSError, temp_dir: str) -> RuntimeError:
    chosen = os.environ.get("RAY_TMPDIR")
    source = f"RAY_TMPDIR is {chosen!r}; set it" if chosen else "Set RAY_TMPDIR"
    if temp_dir:
        source = f"{temp_dir!r} was asked for; change that"
    return RuntimeError(
        f"the directory of the session, {path}, cannot be made: {error.strerror} ({error.filename or path}). {source} "
        "to a private directory that can be written to"
    )


def sweep(base: str) -> list[str]:
    """Remove the directories of sessions that have crashed, but for the last few; returns their names.

    A node that ends in order removes its own.
    """
    names = sorted(name for name in os.listdir(base) if name.startswith("session_"))
    stale = [name for name in names if _is_stale(f"{base}/{name}")]
    for name in stale:
        remove_spilled(f"{base}/{name}")
    removed = stale[:-CRASHED_KEPT][:SWEEP_MAX]
    for name in removed:
        remove(f"{base}/{name}")
    return removed


def make_spill_dir(path: str, elsewhere: str) -> None:
    """Make the directory for spilled values of a session, if it is not there; `elsewhere` is a directory to make it in,
    unless that is empty.
    """
    spill = f"{path}/{SPILL_NAME}"
    if os.path.isdir(spill):
        return
    if not elsewhere:
        os.mkdir(spill, mode=0o700)
        return
    target = os.path.join(os.path.abspath(elsewhere), f"{SPILL_PREFIX}{os.path.basename(path)}")
    os.makedirs(target, mode=0o700, exist_ok=True)
    # Made before anything is written there, so that whoever finds the session finds its values.
    os.symlink(target, spill)


def remove_spilled(path: str) -> None:
    """Delete what a session has spilled."""
    spill = f"{path}/{SPILL_NAME}"
    try:
        target = os.readlink(spill)
    except OSError:
        remove(spill)
        return
    # A link that is not ours is not followed.
    if os.path.basename(target) == f"{SPILL_PREFIX}{os.path.basename(path)}":
        remove(target)
    with contextlib.suppress(OSError):
        os.unlink(spill)


def remove(path: str) -> None:
    """Delete a directory with everything in it; links are deleted, not followed.

    What has gone already is fine. What somebody still writes into stays; a later sweep finds it.
    """
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove(entry.path)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _is_stale(path: str) -> bool:
    try:
        lock = os.open(f"{path}/{LOCK_NAME}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        try:
            return time.time() - os.stat(path).st_mtime > YOUNG_S
        except OSError:
            return False
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(lock)


def _temporary() -> str:
    """As `tempfile.gettempdir` chooses, without the cost of importing it."""
    for candidate in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        if candidate and os.access(candidate, os.W_OK | os.X_OK):
            return candidate
    return os.getcwd()
