"""Durable state of the control service: what it acknowledged is here when it comes back, on this machine or another.

A *record* is (table, key) -> value, bytes that nobody here reads. A head opens a storage, takes its lease, loads
everything, and from then on hands every change to a `StorageWriter` before it lets the effects out:

    storage = open("sqlite:///var/lib/skate/state.db")
    epoch = storage.acquire("head-0", ttl_s=10)            # None: another head leads; ask again later
    for table, key, value in storage.load(): ...           # the machines rebuild themselves
    writer = StorageWriter(storage)                        # commits, and renews the lease, in a thread of its own
    sequence = writer.submit([Write("actors", b"id", b"record"), Write("names", b"old", None)])
    ...                                                    # writer.fileno() becomes readable
    writer.completed()                                     # Progress(durable_up_to=sequence, error=None)

The promises are those of `Storage`: a batch is atomic, durable when it is acknowledged, and refused with
`LeadershipLost` once another head has taken the lease, however long this one was suspended. The storages are a file of
SQLite (`sqlite`), and servers that outlive the head's machine: Redis or Valkey (`redis`), etcd (`etcd`), PostgreSQL
(`postgres`). Each is imported when it is used, and says in its docstring what it needs of the server.

Invariant: knows neither the records' meaning nor the head; nothing here decides what is stored.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from ray._control.storage.interface import (
    BATCH_BYTES_MAX,
    BATCH_WRITES_MAX,
    ExtraMissing,
    LeadershipLost,
    LimitExceeded,
    Storage,
    StorageError,
    StorageUnavailable,
    StorageUnreadable,
    Write,
)
from ray._control.storage.url import parse
from ray._control.storage.writer import Progress, StorageWriter, WriterFull

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.storage.url import Address

__all__ = [
    "BATCH_BYTES_MAX",
    "BATCH_WRITES_MAX",
    "ExtraMissing",
    "LeadershipLost",
    "LimitExceeded",
    "Progress",
    "Storage",
    "StorageError",
    "StorageUnavailable",
    "StorageUnreadable",
    "StorageWriter",
    "Write",
    "WriterFull",
    "open",
]

_BACKENDS: Final = {
    "sqlite": ("ray._control.storage.sqlite", "SqliteStorage"),
    "redis": ("ray._control.storage.redis", "RedisStorage"),
    "rediss": ("ray._control.storage.redis", "RedisStorage"),
    "etcd": ("ray._control.storage.etcd", "EtcdStorage"),
    "etcds": ("ray._control.storage.etcd", "EtcdStorage"),
    "postgresql": ("ray._control.storage.postgres", "PostgresStorage"),
}
_EXTRAS: Final = {"redis": "ha-redis", "asyncpg": "ha-postgres"}


def open(url: str) -> Storage:  # noqa: A001  (as in `dbm.open`: read with the module's name)
    """Connect to a storage, prepare it for a new cluster, and see that this version may write there.

    Args:
        url: Where it is: `sqlite:///path`, `redis://host`, `etcd://host`, `postgresql://host/database`; see `url`.

    Raises:
        LimitExceeded: If the URL cannot be understood.
        ExtraMissing: If the package that speaks to such a server is not installed.
        StorageUnavailable: If it cannot be reached, refuses us, or is set to lose what it acknowledged.
        StorageUnreadable: If what lies there is damaged, not ours, or of a newer version.
    """
    address = parse(url)
    module, name = _BACKENDS[address.scheme]
    try:
        backend: Callable[[Address], Storage] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        msg = (
            f"{address.shown} needs the package {error.name}, which is not installed. Install it with "
            f"`pip install 'skate[{_EXTRAS[error.name]}]'`"
        )
        raise ExtraMissing(msg) from error
    return backend(address)
