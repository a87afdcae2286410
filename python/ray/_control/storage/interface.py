"""What every storage promises: records, atomic commits, and a lease that only one head can use.

`Storage` owns what is the same everywhere: limits, the epoch under which this process commits, the number of each
commit within it, and the rule that nothing follows a commit whose outcome is unknown. A backend owns its connection
and five operations. None of them reads what is inside a value.

Fencing. Each take-over of the lease gives a larger *epoch*. A commit carries its epoch and its number within the
epoch; the backend compares both with what is stored, in the same transaction as the writes. So a commit of a former
leader fails however late it comes, a commit that was sent twice because the answer to the first was lost is applied
once, and one that lingered in a dead connection cannot undo a later one. What is compared is not the epoch itself but a
random *token* stored with it: a server that was restored from a backup hands out the same epochs again, to others.

Invariants: `_epoch` is None or was handed out by the backend to this object and to no other; commits 1 to `_commits`
of it are durable, and at most one more may be; while `_fault` is set, nothing is written.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FORMAT_VERSION: Final = 1
"""Of what is stored: names, records, fence. A storage with a larger one is refused."""

TABLE_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""Names of tables; without a zero byte, which separates table and key where a backend has one name for both."""

KEY_BYTES_MAX: Final = 2048
"""PostgreSQL's index refuses entries of more than about 2,700 bytes, and table and prefix are part of them."""

VALUE_BYTES_MAX: Final = 64 << 20
"""As much as a message to the head can carry. Backends may have less: `Storage.value_bytes_max`."""

BATCH_WRITES_MAX: Final = 20_000
BATCH_BYTES_MAX: Final = 128 << 20
"""Keys and values of one commit together. A batch beyond either is refused with `LimitExceeded`, and nothing of it is
stored: it would hold up everybody's commits for seconds."""

HOLDER_CHARS_MAX: Final = 256
TTL_S_MAX: Final = 365 * 86400.0
"""For a head without standby, whose lease need not end."""


class Write(NamedTuple):
    """One record to be set, or to be deleted if the value is None. Deleting what is not there is no error."""

    table: str
    key: bytes
    value: bytes | None

    @property
    def size(self) -> int:
        """Bytes that count against limits."""
        return len(self.table) + len(self.key) + len(self.value or b"")


class StorageError(Exception):
    """Something about the storage that the head cannot go on with.

    StorageError
     ├── StorageUnavailable   cannot be reached, or cannot write; the commit may have been stored, or not
     ├── LeadershipLost       another head leads; nothing of the commit was stored
     ├── StorageUnreadable    what lies there is damaged, somebody else's, or of a newer format
     ├── LimitExceeded        (ValueError) the caller asks for too much; the storage goes on
     └── ExtraMissing         (ImportError) a package has to be installed
    """


class StorageUnavailable(StorageError):
    """The storage cannot be reached or cannot write, after all retries. The last commit may be stored, or not."""


class LeadershipLost(StorageError):
    """The lease was taken over. Whoever gets this must stop to act as the head, at once."""


class StorageUnreadable(StorageError):
    """Damaged, foreign or newer data; a person has to look."""


class LimitExceeded(StorageError, ValueError):
    """A batch, key or value is larger than its limit, or a name is not allowed."""


class ExtraMissing(StorageError, ImportError):
    """The package that speaks to this kind of server is not installed."""


class Storage(ABC):
    """Durable records of one cluster, and its leader lease. Made by `open`.

    Not for two threads at once, and not to be carried over a fork: open it after the last one. Every method but
    `close` may wait for a disk or a network, for `patience_s` of its address and little more.

    Args:
        place: Where it is, for messages; without credentials.
        value_bytes_max: What one value may have here.
    """

    transaction_writes_max: int = BATCH_WRITES_MAX
    transaction_bytes_max: int = BATCH_BYTES_MAX
    """What it stores in a single transaction. It stores a larger batch as well, at the cost of more than one."""

    def __init__(self, place: str, value_bytes_max: int = VALUE_BYTES_MAX) -> None:
        self.place = place
        self.value_bytes_max = value_bytes_max
        self.lease_until = 0.0
        """When the lease ends by this process's monotonic clock, if it is not renewed; counted from before it was asked
        for, so the storage ends it later. A leader stops by itself when this has passed: what it does beside commits
        (granting, killing) nobody can fence."""
        self.ttl_s = 0.0
        self._holder = ""
        self._token = ""
        self._epoch: int | None = None
        self._commits = 0
        self._fault: StorageError | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch under which this object commits; None without the lease."""
        return self._epoch

    # ------------------------------------------------------------------ records

    def load(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Every record as (table, key, value), each once, in any order.

        Complete and consistent for the holder of the lease, since nobody else can write: acquire first. Others may
        look, and see a cluster in motion.

        Raises:
            StorageUnavailable: If the storage cannot be read.
            StorageUnreadable: If what lies there is damaged.
        """
        return self._load()

    def commit(self, batch: Sequence[Write]) -> None:
        """Store a batch: all of it or nothing, durable when this returns. Of several writes to a record the last wins.

        Durable means that it survives the loss of power of the machine that stores it, as far as its disks do what
        they are told; `open` refuses servers that are set to lose acknowledged writes.

        Raises:
            LimitExceeded: If the batch is too large; nothing is stored, and the storage can be used on.
            LeadershipLost: If the lease is another's; nothing is stored.
            StorageUnavailable: If it could not be confirmed in time. It may have been stored. Every further commit
                fails alike, until `acquire` has given a new epoch and `load` has shown what is there.
        """
        epoch = self._leading()
        writes = self.check(batch)
        if not writes:
            return
        # Until it is known to be stored, nothing may follow: the next batch would carry the same number.
        self._fault = StorageUnavailable(
            f"{self.place}: the last commit was interrupted, and may have been stored or not. Acquire the lease again, "
            f"and load"
        )
        try:
            self._commit(epoch, self._commits + 1, writes)
        except StorageError as error:
            self._fault = error
            raise
        self._fault = None
        self._commits += 1

    def check(self, batch: Sequence[Write]) -> list[Write]:
        """What of a batch is to be written: the last write of each record. Reads limits alone, so any thread may call.

        Raises:
            LimitExceeded: If the batch, a key, a value or the name of a table is beyond its limit.
        """
        last: dict[tuple[str, bytes], Write] = {}
        size = 0
        for write in batch:
            if not TABLE_NAME.fullmatch(write.table):
                msg = f"{write.table!r} cannot be the name of a table: it has to match {TABLE_NAME.pattern}"
                raise LimitExceeded(msg)
            if len(write.key) > KEY_BYTES_MAX:
                msg = (
                    f"a key of {len(write.key)} bytes in table {write.table!r} is longer than the {KEY_BYTES_MAX} that "
                    f"the storage of the control service takes. Use a shorter key, such as a hash of this one"
                )
                raise LimitExceeded(msg)
            if write.value is not None and len(write.value) > self.value_bytes_max:
                msg = (
                    f"a value of {len(write.value)} bytes in table {write.table!r} is larger than the "
                    f"{self.value_bytes_max} that {self.place} takes. Put large values into the object store or a file"
                )
                raise LimitExceeded(msg)
            size += write.size
            last[write.table, write.key] = write
        if len(batch) > BATCH_WRITES_MAX or size > BATCH_BYTES_MAX:
            msg = (
                f"a batch of {len(batch)} records with {size} bytes is more than the {BATCH_WRITES_MAX} records and "
                f"{BATCH_BYTES_MAX} bytes that are stored at once. Commit it in parts"
            )
            raise LimitExceeded(msg)
        return list(last.values())

    # ------------------------------------------------------------------ the lease

    def acquire(self, holder: str, ttl_s: float) -> int | None:
        """Take the lease if it is free; a new and larger epoch, or None if another holds it.

        A holder that comes back under the same name gets the lease at once, and fences its former life. So a name
        belongs to a place (a pod, a host), and two living processes under one name end each other.

        Args:
            holder: Who asks; shown to whoever looks for the leader.
            ttl_s: How long it holds without `renew`, by the server's clock, which may round it up to whole seconds; a
                jump of that clock may end it early, and the fence holds all the same. In SQLite it ends, too, as soon
                as the process ends.

        Raises:
            LimitExceeded: If the name is empty or too long, or the time out of range.
            StorageUnavailable: If the storage cannot be reached.
            StorageUnreadable: If a newer version has written here since it was opened.
        """
        if not 0 < len(holder) <= HOLDER_CHARS_MAX or not holder.isprintable() or not 0 < ttl_s <= TTL_S_MAX:
            msg = (
                f"a lease needs a holder's name of 1 to {HOLDER_CHARS_MAX} printable characters, and more than 0 "
                f"and at most {TTL_S_MAX:.0f} seconds; {holder!r} and {ttl_s!r} were given"
            )
            raise LimitExceeded(msg)
        asked_at = time.monotonic()
        self._epoch = None
        self._holder = holder
        self._token = os.urandom(8).hex()
        self._epoch = self._acquire(holder, ttl_s)
        if self._epoch is not None:
            self._commits, self._fault = 0, None
            self.ttl_s, self.lease_until = ttl_s, asked_at + ttl_s
        return self._epoch

    def renew(self) -> None:
        """Hold the lease for another `ttl_s` from now. One that has lapsed is taken again if nobody else had it.

        Raises:
            LeadershipLost: If somebody else had it.
            StorageUnavailable: If the storage cannot be reached.
        """
        epoch = self._leading()
        asked_at = time.monotonic()
        try:
            self._renew(epoch, self._holder, self.ttl_s)
        except LeadershipLost as error:
            self._fault = error
            raise
        self.lease_until = asked_at + self.ttl_s

    def release(self) -> None:
        """Give the lease up, so that another may have it at once. Harmless if it is not held any more.

        Raises:
            StorageUnavailable: If the storage cannot be reached; the lease then ends by itself.
        """
        if self._epoch is not None:
            epoch, self._epoch = self._epoch, None
            self._release(epoch)

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and files. A lease is kept until it ends: `release` first. May be called twice."""

    # ------------------------------------------------------------------ what a backend does

    @abstractmethod
    def _load(self) -> Iterator[tuple[str, bytes, bytes]]: ...

    @abstractmethod
    def _commit(self, epoch: int, number: int, writes: list[Write]) -> None:
        """Store if the token is ours and `number` follows the last one; nothing to do if it is the last one."""

    @abstractmethod
    def _acquire(self, holder: str, ttl_s: float) -> int | None:
        """Take the lease and store `_token` with a new epoch. When repeated, the lease is the holder's already."""

    @abstractmethod
    def _renew(self, epoch: int, holder: str, ttl_s: float) -> None: ...

    @abstractmethod
    def _release(self, epoch: int) -> None:
        """Free the lease if the token is still ours, else do nothing."""

    def _leading(self) -> int:
        """The epoch, if commits may be made under it."""
        if self._fault is not None:
            raise type(self._fault)(*self._fault.args) from self._fault
        assert self._epoch is not None, "only the holder of the lease commits and renews: call `acquire` first"
        return self._epoch

    # ------------------------------------------------------------------ sentences

    def _lost(self, epoch: int, by: str, by_epoch: int) -> LeadershipLost:
        return LeadershipLost(
            f"{self.place}: the lease of {self._holder!r} (epoch {epoch}) was taken over by {by!r} (epoch {by_epoch}). "
            f"Nothing of this commit was stored. This head must end; its members find the new one"
        )

    def _emptied(self) -> StorageUnreadable:
        return StorageUnreadable(
            f"{self.place} no longer knows this cluster: its data was removed, or the server came back without it. "
            f"Restore it from a backup, or start a new cluster under another prefix"
        )

    def _refuse_foreign(self, what: str) -> NoReturn:
        msg = f"{self.place} holds {what}, not written by Skate. Choose another place or prefix; nothing was changed"
        raise StorageUnreadable(msg)

    def check_format(self, found: int) -> None:
        """Refuse what a newer version has written.

        Raises:
            StorageUnreadable: If the number is not ours.
        """
        if found > FORMAT_VERSION:
            msg = (
                f"{self.place} was written by a newer Skate (format {found}; this one reads {FORMAT_VERSION}). "
                f"Start the head with that version or a later one; nothing was changed"
            )
            raise StorageUnreadable(msg)
        if found < 1:
            self._refuse_foreign(f"data with the format number {found}")
