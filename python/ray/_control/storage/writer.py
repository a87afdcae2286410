"""The head's only thread must not wait for a disk or a network: this writes for it, in a thread of its own.

Owns the queue between the two, the thread, and the descriptor by which the head's loop hears of progress. Batches are
numbered as they come, stored in that order, and as many as wait are put into one commit (group commit): under load a
commit's fsync or round trip is shared by all that came during the one before. The thread also renews the lease, since
it has the storage to itself.

Invariants: batches `_durable + 1` to `_submitted` are in the queue or in the commit that runs, in this order; `_bytes`
is their size; after an error nothing is stored any more, and `_durable` stays.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from ray._control.storage.interface import StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray._control.storage.interface import Storage, Write

BATCHES_MAX: Final = 16_384
QUEUE_BYTES_MAX: Final = 256 << 20
"""Batches that were submitted and are not durable, and their bytes. At either `submit` raises `WriterFull` and
`has_room` is False: the head stops reading from its members, whose messages wait in their sockets, until the descriptor
tells of progress. A single batch is taken whenever nothing else waits, so none is too large for ever."""

GROUP_WRITES_MAX: Final = 4096
GROUP_BYTES_MAX: Final = 8 << 20
"""For one commit of several batches, so that the first of them does not wait long for the last, and never more than the
storage takes in one transaction; a batch that is larger is a commit of its own."""

RENEWALS_PER_TTL: Final = 3
"""The lease survives two renewals that fail or come late."""


class WriterFull(StorageError):
    """The queue is at its limit; nothing was taken. Submit again when the descriptor is readable."""


class Progress(NamedTuple):
    """How far the writer has come: every batch up to this number is durable; and what ended it, if something did."""

    durable_up_to: int
    error: StorageError | None


class StorageWriter:
    """Stores batches in the order in which they were submitted. Its methods are for one thread, and never wait.

    The storage must have the lease, and belongs to the writer until `close` has returned.

    Args:
        storage: Where to.
        batches_max: Batches that may wait.
        bytes_max: And their bytes.
        renew: Whether to renew the lease, `RENEWALS_PER_TTL` times in its duration.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        batches_max: int = BATCHES_MAX,
        bytes_max: int = QUEUE_BYTES_MAX,
        renew: bool = True,
    ) -> None:
        assert storage.epoch is not None, "a writer commits under a lease: call `acquire` first"
        self._storage = storage
        self._batches_max = batches_max
        self._bytes_max = bytes_max
        self._group_writes_max = min(GROUP_WRITES_MAX, storage.transaction_writes_max)
        self._group_bytes_max = min(GROUP_BYTES_MAX, storage.transaction_bytes_max)
        self._renew_every_s = storage.ttl_s / RENEWALS_PER_TTL if renew else None
        # Guards all that follows; held for the moving of references alone, never during a commit.
        self._changed = threading.Condition()
        self._waiting: deque[tuple[list[Write], int]] = deque()
        self._submitted = 0
        self._durable = 0
        self._bytes = 0
        self._error: StorageError | None = None
        self._closing = False
        self._closed = False
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that is readable when `completed` has something new to say."""
        return self._descriptor

    @property
    def lease_until(self) -> float:
        """When the lease ends, by the monotonic clock, unless it is renewed before: see `Storage.lease_until`."""
        return self._storage.lease_until

    def has_room(self) -> bool:
        """Whether one more batch would be taken now, unless its bytes are too many."""
        with self._changed:
            return self._submitted - self._durable < self._batches_max and self._bytes < self._bytes_max

    def submit(self, batch: Sequence[Write]) -> int:
        """Take a batch to be stored after all earlier ones; its number, from 1 on. An empty one is durable in its turn.

        Raises:
            LimitExceeded: If the batch can never be stored; nothing was taken, and all else goes on.
            WriterFull: If too much waits already; nothing was taken.
            StorageError: What ended the writer, if something did.
        """
        writes = self._storage.check(batch)
        size = sum(write.size for write in writes)
        with self._changed:
            if self._error is not None:
                raise type(self._error)(*self._error.args) from self._error
            assert not self._closing, "the writer was closed"
            unstored = self._submitted - self._durable
            if unstored >= self._batches_max or (unstored and self._bytes + size > self._bytes_max):
                msg = (
                    f"{self._storage.place} is slower than what it is given: {unstored} of {self._batches_max} batches "
                    f"with {self._bytes} of {self._bytes_max} bytes wait to be stored. Submit again when some are"
                )
                raise WriterFull(msg)
            self._submitted += 1
            self._bytes += size
            self._waiting.append((writes, size))
            self._changed.notify()
            return self._submitted

    def completed(self) -> Progress:
        """How far it has come; the descriptor is not readable again before there is more to say."""
        with self._changed:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._descriptor)
            return Progress(self._durable, self._error)

    def close(self) -> Progress:
        """Store what was submitted, end the thread and close the descriptor; how far it came.

        The one method that waits: for what is queued, as long as the storage's patience lasts. Leaves the storage open
        and the lease held. May be called twice.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        with self._changed:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)
            return Progress(self._durable, self._error)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        renew_at = self._next_renewal()
        try:
            while (group := self._next_group(renew_at)) is not None:
                if renew_at is not None and time.monotonic() >= renew_at:
                    self._storage.renew()
                    renew_at = self._next_renewal()
                if group:
                    self._storage.commit([write for writes, _ in group for write in writes])
                    self._report(group)
        except StorageError as error:
            self._fail(error)
        except BaseException as error:
            # A defect, and not of the storage. Whoever waits for the batches must hear of it before the thread ends.
            self._fail(StorageError(f"{self._storage.place}: the writer failed with {type(error).__name__}: {error}"))
            raise

    def _next_renewal(self) -> float | None:
        return None if self._renew_every_s is None else time.monotonic() + self._renew_every_s

    def _next_group(self, renew_at: float | None) -> list[tuple[list[Write], int]] | None:
        """Batches for one commit, when there are any; none of them when it is time to renew; None at the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                left = None if renew_at is None else renew_at - time.monotonic()
                if left is not None and left <= 0:
                    return []
                self._changed.wait(None if left is None else min(left, threading.TIMEOUT_MAX))
            if not self._waiting:
                return None
            group = [self._waiting.popleft()]
            writes, size = len(group[0][0]), group[0][1]
            while self._waiting:
                batch, more = self._waiting[0]
                if writes + len(batch) > self._group_writes_max or size + more > self._group_bytes_max:
                    break
                group.append(self._waiting.popleft())
                writes, size = writes + len(batch), size + more
            return group

    def _report(self, group: list[tuple[list[Write], int]]) -> None:
        with self._changed:
            self._durable += len(group)
            self._bytes -= sum(size for _, size in group)
            assert self._durable <= self._submitted
            assert self._bytes >= 0
            os.eventfd_write(self._descriptor, 1)

    def _fail(self, error: StorageError) -> None:
        with self._changed:
            self._error = error
            self._waiting.clear()  # they will never be stored, and their bytes are of use to others
            os.eventfd_write(self._descriptor, 1)
