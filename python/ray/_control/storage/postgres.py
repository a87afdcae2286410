"""Records in PostgreSQL, in the tables `skate_records` and `skate_clusters` of the database that the address names.

A commit is one statement, in which the fence's row is changed first and everything else depends on that row: one round
trip, and no transaction that a suspended head could leave open with the row locked. A statement that waited for another
looks at the row again once it has the lock, so what it compares is never stale.

Through asyncpg, in an event loop that belongs to this object and runs only within its methods: no package that blocks
has client-side deadlines as exact, is as fast and has as free a licence (psycopg is under the LGPL; pg8000 is pure
Python). Loading it costs 90 ms, in heads that use it.

What is needed of the server: `fsync` on, which is looked at; `synchronous_commit` is set for our own session. With
replicas that may be promoted, name them in `synchronous_standby_names`, or a failover loses what was not yet sent. The
user needs the right to create the two tables, or finds them created. Behind a pooler in transaction mode, it has to
keep prepared statements (PgBouncer: `max_prepared_statements`).

Options: several hosts, of which the one that takes writes is used; `sslmode`, `sslrootcert`, `sslcert`, `sslkey` as in
libpq.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlencode

import asyncpg

from ray._control.storage.interface import FORMAT_VERSION, LimitExceeded, Storage, StorageUnavailable
from ray._control.storage.patience import ConnectionLost, Patience

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._control.storage.interface import StorageError, Write
    from ray._control.storage.url import Address

T = TypeVar("T")

PAGE_RECORDS: Final = 500
"""For one step of `load`."""

_CREATION_LOCK: Final = 0x536B_6174
"""Two heads that create the tables at once would fail on each other, in spite of IF NOT EXISTS."""

_CREATE: Final = (
    f"SELECT pg_advisory_xact_lock({_CREATION_LOCK})",
    "CREATE TABLE IF NOT EXISTS skate_clusters (cluster text PRIMARY KEY, format integer NOT NULL,"
    " epoch bigint NOT NULL, commits bigint NOT NULL, token text NOT NULL, holder text NOT NULL,"
    " until timestamptz NOT NULL)",
    'CREATE TABLE IF NOT EXISTS skate_records (cluster text COLLATE "C", name text COLLATE "C", key bytea,'
    " value bytea NOT NULL, PRIMARY KEY (cluster, name, key))",
)

_CREATED: Final = "SELECT to_regclass('skate_clusters') IS NOT NULL AND to_regclass('skate_records') IS NOT NULL"

_FORMAT: Final = """
INSERT INTO skate_clusters (cluster, format, epoch, commits, token, holder, until)
VALUES ($1, $2, 0, 0, '', '', '-infinity') ON CONFLICT DO NOTHING
"""

_ACQUIRE: Final = """
UPDATE skate_clusters
SET epoch = epoch + 1, commits = 0, token = $4, holder = $2, until = clock_timestamp() + make_interval(secs => $3)
WHERE cluster = $1 AND format = $5 AND (holder IN ('', $2) OR until < clock_timestamp())
RETURNING epoch
"""

_COMMIT: Final = """
WITH fence AS (
  UPDATE skate_clusters SET commits = $3 WHERE cluster = $1 AND token = $2 AND commits = $3 - 1 RETURNING cluster
), deleted AS (
  DELETE FROM skate_records USING fence, unnest($7::text[], $8::bytea[]) AS gone (name, key)
  WHERE skate_records.cluster = fence.cluster AND skate_records.name = gone.name AND skate_records.key = gone.key
), written AS (
  INSERT INTO skate_records (cluster, name, key, value) SELECT fence.cluster, new.name, new.key, new.value
  FROM fence, unnest($4::text[], $5::bytea[], $6::bytea[]) AS new (name, key, value)
  ON CONFLICT (cluster, name, key) DO UPDATE SET value = excluded.value
)
SELECT count(*) FROM fence
"""

_RENEW: Final = """
UPDATE skate_clusters SET holder = $3, until = clock_timestamp() + make_interval(secs => $4)
WHERE cluster = $1 AND token = $2 RETURNING epoch
"""

_RELEASE: Final = "UPDATE skate_clusters SET holder = '' WHERE cluster = $1 AND token = $2"

_LEADER: Final = "SELECT epoch, commits, token, holder, format FROM skate_clusters WHERE cluster = $1"

_LOAD: Final = """
SELECT name, key, value FROM skate_records WHERE cluster = $1 AND (name, key) > ($2, $3) ORDER BY name, key LIMIT $4
"""

_LOST: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.TargetServerAttributeNotMatched,
)
"""After these another connection may do: of a server that starts, stops, is full for the moment or was replaced."""


class PostgresStorage(Storage):
    """See the module's docstring."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.shown)
        self._address = address
        self._cluster = address.prefix
        self._patience = Patience(self.place, address.patience_s)
        self._loop = asyncio.new_event_loop()
        self._connection: Any = None
        try:
            if self._fetch("SHOW fsync")[0][0] != "on":
                msg = f"{self.place} would lose acknowledged commits with its power: fsync is off. Set `fsync = on`"
                raise StorageUnavailable(msg)
            if self._fetch("SELECT to_regclass('skate_clusters') IS NULL OR to_regclass('skate_records') IS NULL")[0][
                0
            ]:
                self._run(*_CREATE)
            self._fetch(_FORMAT, self._cluster, FORMAT_VERSION)
            self.check_format(self._leader()["format"])
            self._fetch(_LOAD, self._cluster, "", b"", 0)  # fails on a table of other columns
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if not self._loop.is_closed():
            self._disconnect()
            self._loop.close()

    # ------------------------------------------------------------------ records

    def _load(self) -> Iterator[tuple[str, bytes, bytes]]:
        name, key = "", b""
        while page := self._fetch(_LOAD, self._cluster, name, key, PAGE_RECORDS):
            for name, key, value in page:
                yield name, key, value

    def _commit(self, epoch: int, number: int, writes: list[Write]) -> None:
        kept = [write for write in writes if write.value is not None]
        gone = [write for write in writes if write.value is None]
        [(applied,)] = self._fetch(
            _COMMIT,
            self._cluster,
            self._token,
            number,
            [write.table for write in kept],
            [write.key for write in kept],
            [write.value for write in kept],
            [write.table for write in gone],
            [write.key for write in gone],
        )
        if not applied:
            leader = self._leader()
            if leader["token"] != self._token:
                raise self._lost(epoch, leader["holder"], leader["epoch"])
            if leader["commits"] != number:
                self._refuse_foreign(f"a fence at commit {leader['commits']} where {number - 1} was expected")
            # The answer to a first attempt was lost, and this was the second.

    # ------------------------------------------------------------------ the lease

    def _acquire(self, holder: str, ttl_s: float) -> int | None:
        rows = self._fetch(_ACQUIRE, self._cluster, holder, ttl_s, self._token, FORMAT_VERSION)
        if rows:
            return int(rows[0][0])
        self.check_format(self._leader()["format"])
        return None

    def _renew(self, epoch: int, holder: str, ttl_s: float) -> None:
        if not self._fetch(_RENEW, self._cluster, self._token, holder, ttl_s):
            leader = self._leader()
            raise self._lost(epoch, leader["holder"], leader["epoch"])

    def _release(self, epoch: int) -> None:
        self._fetch(_RELEASE, self._cluster, self._token)

    def _leader(self) -> Any:
        rows = self._fetch(_LEADER, self._cluster)
        if not rows:
            raise self._emptied()
        return rows[0]

    # ------------------------------------------------------------------ the connection

    def _fetch(self, statement: str, *arguments: object) -> list[Any]:
        async def fetch(connection: Any) -> Any:
            return await connection.fetch(statement, *arguments, timeout=self._patience.reply_s)

        return list(self._ask(fetch))

    def _run(self, *statements: str) -> None:
        async def run(connection: Any) -> None:
            async with connection.transaction():
                for statement in statements:
                    await connection.execute(statement, timeout=self._patience.reply_s)

        self._ask(run)

    def _ask(self, request: Any) -> Any:
        async def connected() -> Any:
            if self._connection is None:
                self._connection = await self._connect()
            return await request(self._connection)

        def attempt() -> Any:
            try:
                return self._loop.run_until_complete(connected())
            except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.DatatypeMismatchError) as error:
                self._refuse_foreign(f"tables of our names with other columns ({error})")
            except ValueError as error:  # asyncpg's own, of what the address says
                msg = f"{self.place}: {error}"
                raise LimitExceeded(msg) from error
            except _LOST as error:
                self._disconnect()
                raise ConnectionLost from error
            except asyncpg.PostgresError as error:
                raise self._refused(error) from error
            except BaseException:
                self._disconnect()  # interrupted: its answer may still come, and must not be taken for the next one
                raise

        return self._patience.run(attempt)

    async def _connect(self) -> Any:
        address = self._address
        return await asyncpg.connect(
            dsn=f"postgresql:///?{urlencode(address.options)}",
            host=[host for host, _ in address.hosts],
            port=[port for _, port in address.hosts],
            user=address.user or None,
            password=address.password or None,
            database=address.path.strip("/") or None,
            timeout=self._patience.connect_s,
            target_session_attrs="read-write",
            server_settings={
                "application_name": "skate",
                "synchronous_commit": "on",
                "default_transaction_isolation": "read committed",
            },
        )

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*_LOST, asyncpg.PostgresError):
                self._loop.run_until_complete(_end(connection))

    def _refused(self, error: asyncpg.PostgresError) -> StorageError:
        return StorageUnavailable(
            f"{self.place} refused a request: {error}. Look at its log, its disk and the user's rights, then start "
            f"the head again"
        )


async def _end(connection: Any) -> None:
    """Close without waiting for the server's word, and give the transport its turn to let go of the socket."""
    connection.terminate()
    await asyncio.sleep(0)
