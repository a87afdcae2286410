"""Records in an SQLite file: the default, for a head whose machine or volume survives.

WAL with `synchronous=FULL`: a commit is one append to the log and one fsync, and survives the loss of power. `NORMAL`
would be ten times as fast, survive the death of the process, and lose the last acknowledged commits with the power: no
choice for what was acknowledged. Group commit (`writer.py`) wins most of it back.

The lease is a row, and a lock on one byte of the file beside it (`….lease`): the byte whose offset is the row's random
token. The kernel lets go of it when the process ends, however it ends, so a successor on the same machine, or on the
one to which the volume was attached, need not wait for the time to pass. A process that is alive but suspended keeps
its byte, and is replaced when its time has passed; the next token is another byte. The time is CLOCK_BOOTTIME of the
one kernel under which both live: on a volume that two machines write at once, a network file system, SQLite's locks
promise nothing.

A process that is suspended within a transaction holds SQLite's own write lock, and nobody can take over before it
goes on or is killed; `acquire` says None meanwhile.

Options of the address: none but the common ones. Several clusters may share a file, by `?prefix=`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from ray._control.storage.interface import FORMAT_VERSION, Storage, StorageError, StorageUnavailable, StorageUnreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._control.storage.interface import Write
    from ray._control.storage.url import Address

APPLICATION_ID: Final = 0x536B_6174
"""In the header of our files ("Skat"), so that `file` and we tell them from others."""

LOCK_WAIT_S_MAX: Final = 2.0
"""For another process's transaction, which takes milliseconds, before `acquire` says None. A commit waits as long as
its address has patience."""

_SCHEMA: Final = (
    # An ordinary table: rows of a WITHOUT ROWID one lie inside the index, which large values would make deep.
    "CREATE TABLE records (cluster TEXT, name TEXT, key BLOB, value BLOB NOT NULL, PRIMARY KEY (cluster, name, key))",
    # `until` is seconds of CLOCK_BOOTTIME, and means nothing without the lock; `commits` counts within the epoch.
    "CREATE TABLE leaders (cluster TEXT PRIMARY KEY, epoch INTEGER NOT NULL, commits INTEGER NOT NULL,"
    " token TEXT NOT NULL, holder TEXT NOT NULL, until REAL NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT_VERSION}",
)

_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock of 64-bit Linux: type, whence, start, length, pid."""


class SqliteStorage(Storage):
    """See the module's docstring."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.shown)
        self._cluster = address.prefix
        self._patience_s = address.patience_s
        self._connection: sqlite3.Connection | None = None
        self._lease_fd = -1
        try:
            self._lease_fd = _open_private(address.path + ".lease")
            os.close(_open_private(address.path))
            self._connection = sqlite3.connect(
                address.path, timeout=address.patience_s, isolation_level=None, check_same_thread=False
            )
            self._prepare()
            _sync_directory(address.path)
        except OSError as error:
            self.close()
            msg = f"{self.place}: {error.strerror}: {error.filename}. The directory has to exist and be writable"
            raise StorageUnavailable(msg) from error
        except sqlite3.Error as error:
            self.close()
            raise self._translated(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lease_fd >= 0:
            os.close(self._lease_fd)  # the last descriptor of it: the lock goes
            self._lease_fd = -1

    # ------------------------------------------------------------------ records

    def _load(self) -> Iterator[tuple[str, bytes, bytes]]:
        with self._translating():
            yield from self._sql.execute("SELECT name, key, value FROM records WHERE cluster = ?", (self._cluster,))

    def _commit(self, epoch: int, number: int, writes: list[Write]) -> None:
        with self._transaction():
            leader = self._leader()
            if leader.token != self._token:
                raise self._lost(epoch, leader.holder, leader.epoch)
            if leader.commits >= number:
                return
            self._sql.executemany(
                "INSERT INTO records VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                ((self._cluster, write.table, write.key, write.value) for write in writes if write.value is not None),
            )
            self._sql.executemany(
                "DELETE FROM records WHERE cluster = ? AND name = ? AND key = ?",
                ((self._cluster, write.table, write.key) for write in writes if write.value is None),
            )
            self._sql.execute("UPDATE leaders SET commits = ? WHERE cluster = ?", (number, self._cluster))

    # ------------------------------------------------------------------ the lease

    def _acquire(self, holder: str, ttl_s: float) -> int | None:
        self._wait_for_locks(min(LOCK_WAIT_S_MAX, self._patience_s))
        try:
            return self._take(holder, ttl_s)
        except _Busy:
            return None
        except StorageError:
            _unlock(self._lease_fd)
            raise
        finally:
            self._wait_for_locks(self._patience_s)

    def _take(self, holder: str, ttl_s: float) -> int | None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        with self._transaction():
            self._check_file()
            leader = self._leader()
            if leader.holder not in ("", holder) and leader.until > now and _is_locked(self._lease_fd, leader.token):
                return None
            epoch = leader.epoch + 1
            _unlock(self._lease_fd)  # what is left of an earlier epoch
            _lock(self._lease_fd, self._token)
            self._sql.execute(
                "INSERT OR REPLACE INTO leaders VALUES (?, ?, 0, ?, ?, ?)",
                (self._cluster, epoch, self._token, holder, now + ttl_s),
            )
        return epoch

    def _renew(self, epoch: int, holder: str, ttl_s: float) -> None:
        # Without an fsync of its own, which an idle cluster would pay every few seconds: `until` means nothing after
        # a loss of power. NORMAL and not OFF, under which a checkpoint could tear the file.
        self._sql.execute("PRAGMA synchronous = NORMAL")
        try:
            with self._transaction():
                leader = self._leader()
                if leader.token != self._token:
                    raise self._lost(epoch, leader.holder, leader.epoch)
                until = time.clock_gettime(time.CLOCK_BOOTTIME) + ttl_s
                self._sql.execute("UPDATE leaders SET until = ? WHERE cluster = ?", (until, self._cluster))
        finally:
            self._sql.execute("PRAGMA synchronous = FULL")

    def _release(self, epoch: int) -> None:
        with self._transaction():
            self._sql.execute(
                "UPDATE leaders SET holder = '', until = 0 WHERE cluster = ? AND token = ?",
                (self._cluster, self._token),
            )

    def _wait_for_locks(self, seconds: float) -> None:
        self._sql.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    def _leader(self) -> _Leader:
        row = self._sql.execute(
            "SELECT epoch, commits, token, holder, until FROM leaders WHERE cluster = ?", (self._cluster,)
        ).fetchone()
        return _Leader(*row) if row is not None else _Leader()

    # ------------------------------------------------------------------ the file

    def _prepare(self) -> None:
        # Looked at before anything is written: switching to WAL changes the header of a file that may not be ours.
        self._sql.execute("PRAGMA trusted_schema = OFF")
        if self._sql.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            self._check_file()
            damage = self._sql.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise self._damaged(damage.splitlines()[-1])
        if self._sql.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            msg = f"{self.place}: its file system cannot have SQLite's write-ahead log. Choose a local disk"
            raise StorageUnavailable(msg)
        self._sql.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            if not self._sql.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                for statement in _SCHEMA:
                    self._sql.execute(statement)
            self._check_file()

    def _check_file(self) -> None:
        if self._sql.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            self._refuse_foreign("tables")
        self.check_format(self._sql.execute("PRAGMA user_version").fetchone()[0])

    @property
    def _sql(self) -> sqlite3.Connection:
        assert self._connection is not None, "the storage was closed"
        return self._connection

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Hold the write lock from the first read on; all or nothing."""
        with self._translating():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors; there is nothing left to roll back then.
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> StorageError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        if code == sqlite3.SQLITE_BUSY:
            return _Busy(
                f"{self.place}: another process has been writing for more than {self._patience_s:g} s; it may be "
                f"suspended. End it, then start the head again"
            )
        remedy = "Free space on its disk" if code == sqlite3.SQLITE_FULL else "Look at the disk and its permissions"
        return StorageUnavailable(
            f"{self.place} cannot be read or written: {error}. {remedy}, then start the head again"
        )

    def _damaged(self, how: str) -> StorageUnreadable:
        return StorageUnreadable(
            f"{self.place} is damaged, or no file of Skate's: {how}. Move it away, and restore it from a backup or "
            f"start a new cluster; nothing was changed"
        )


class _Leader(NamedTuple):
    """The row of a cluster; of a new one, as it begins."""

    epoch: int = 0
    commits: int = 0
    token: str = ""
    holder: str = ""
    until: float = 0.0


class _Busy(StorageUnavailable):
    """Another process holds SQLite's write lock."""


def _open_private(path: str) -> int:
    """A descriptor of the file, which is made for its owner alone if it is not there: values may be secrets."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _sync_directory(path: str) -> None:
    """The names of new files survive the loss of power, too."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _lock(fd: int, token: str) -> None:
    """Take the byte of a token, which is nobody else's, for as long as the descriptor is open.

    A lock of the open file description and not of the process: closing another descriptor of the file does not drop it,
    and two storages in one process exclude each other. A fork would share it.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _byte(token), 1, 0))


def _unlock(fd: int) -> None:
    """Let go of every byte that this descriptor has."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _is_locked(fd: int, token: str) -> bool:
    """Whether another has the byte. Our own locks do not count."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _byte(token), 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _byte(token: str) -> int:
    """An offset that the kernel takes."""
    return int(token, 16) >> 2
