"""Records in Redis or Valkey, which may be on other machines than the heads.

One hash has a cluster's records, one its fence, one key with a time to live is the lease; their names share a hash tag,
so that they lie in one slot of a cluster. Every change is a Lua script, which Redis runs alone and writes to its
append-only file as one transaction: fence and writes happen together or not at all.

What is needed of the server, or acknowledged commits are lost:

- `appendonly yes` and `appendfsync always`: Redis then answers a write after its fsync. With `everysec` the last
  second goes with the power. Both are looked at when the storage is opened and whenever the lease is taken.
- `maxmemory-policy noeviction` where there is a `maxmemory`: others drop records, or the lease; looked at as well.
- With replicas and automatic failover: `?replicas=N`, which waits (WAIT) until N replicas have received each commit.
  Replication is asynchronous, and a failover to a replica that did not take part loses commits and may bring back an
  older epoch; have as many as could be promoted, or use etcd or PostgreSQL.

Options: `durability=strict` (the default: refuse a server that is set otherwise, or does not say) or `server` (take it
as it is; its operator answers for it, as with hosted servers that forbid CONFIG); `replicas=N`; with rediss://
`ca_file`, `cert_file`, `key_file`. Sentinels and the cluster's redirections are not followed: give an address that
leads to the primary.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ray._control.storage.interface import (
    FORMAT_VERSION,
    LimitExceeded,
    Storage,
    StorageUnavailable,
)
from ray._control.storage.patience import ConnectionLost, Patience

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from redis.commands.core import Script

    from ray._control.storage.interface import Write
    from ray._control.storage.url import Address

T = TypeVar("T")

PAGE_RECORDS: Final = 1000
"""For one step of `load`; the server answers others between two."""

_PREPARE: Final = """
local format = redis.call('HGET', KEYS[1], 'format')
if not format and redis.call('EXISTS', KEYS[1], KEYS[2], KEYS[3]) == 0 then
  redis.call('HSET', KEYS[1], 'format', ARGV[1], 'epoch', 0, 'commits', 0, 'holder', '')
  format = ARGV[1]
end
return format or ''
"""

_ACQUIRE: Final = """
local held_by = redis.call('GET', KEYS[3])
if held_by and held_by ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'commits', 0, 'holder', ARGV[1], 'token', ARGV[3])
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
return redis.call('HINCRBY', KEYS[1], 'epoch', 1)
"""

# The fence is written first: a server without memory refuses the first write of a script, and never a later one. It is
# written even if the commit was applied before: WAIT speaks of what its own connection has written.
_COMMIT: Final = """
local fence = redis.call('HMGET', KEYS[1], 'token', 'commits', 'epoch', 'holder')
if fence[1] ~= ARGV[1] then return {fence[3] or '', fence[4] or ''} end
local applied = tonumber(fence[2]) >= tonumber(ARGV[2])
redis.call('HSET', KEYS[1], 'commits', applied and fence[2] or ARGV[2])
if applied then return {} end
local set_end = 3 + 2 * tonumber(ARGV[3])
for i = 4, set_end, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
for i = set_end + 1, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
return {}
"""

_RENEW: Final = """
local fence = redis.call('HMGET', KEYS[1], 'token', 'epoch', 'holder')
if fence[1] ~= ARGV[1] then return {fence[2] or '', fence[3] or ''} end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
return {}
"""

_RELEASE: Final = """
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('DEL', KEYS[3]) end
return {}
"""


class RedisStorage(Storage):
    """See the module's docstring."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.shown)
        self._strict = _durability(address)
        self._replicas = _replicas(address)
        self._patience = Patience(self.place, address.patience_s)
        self._client = _client(address, self._patience)
        tag = f"skate:{{{address.prefix}}}"
        self._keys = [f"{tag}:fence", f"{tag}:records", f"{tag}:lease"]
        self._prepare, self._take, self._store, self._extend, self._free = (
            self._client.register_script(text) for text in (_PREPARE, _ACQUIRE, _COMMIT, _RENEW, _RELEASE)
        )
        try:
            self._check_server()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._client.close()
        self._client.connection_pool.disconnect()

    # ------------------------------------------------------------------ records

    def _load(self) -> Iterator[tuple[str, bytes, bytes]]:
        # A scan may show a record twice while the hash is resized; and a server that was restarted in between does not
        # know what its former life's cursors meant, so the scan begins anew.
        seen: set[bytes] = set()
        cursor, server = 0, ""
        while True:
            answer = self._run(self._scan, cursor)
            if server not in ("", answer[0]):
                cursor, server = 0, ""
                continue
            server, cursor, page = answer
            for field, value in page.items():
                if field not in seen:
                    seen.add(field)
                    table, separator, key = field.partition(b"\0")
                    if not separator:
                        self._refuse_foreign(f"a record named {field!r}")
                    yield table.decode("ascii", "replace"), key, value
            if cursor == 0:
                return

    def _scan(self, cursor: int) -> tuple[str, int, dict[bytes, bytes]]:
        """(which life of the server, where to go on, records), asked over one connection."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.info("server")
        pipeline.hscan(self._keys[1], cursor, count=PAGE_RECORDS)
        info, (cursor, page) = pipeline.execute()
        return info["run_id"], int(cursor), page

    def _commit(self, epoch: int, number: int, writes: list[Write]) -> None:
        arguments: list[bytes | str | int] = [self._token, number, sum(write.value is not None for write in writes)]
        for write in writes:
            if write.value is not None:
                arguments += (_field(write), write.value)
        arguments += (_field(write) for write in writes if write.value is None)
        self._expect_leading(epoch, self._run(self._change, self._store, arguments))

    def _change(self, script: Script, arguments: list[Any]) -> Any:
        """Run a script, and see that as many replicas as were asked for have received what it changed."""
        if not self._replicas:
            return script(self._keys, arguments)
        # One pipeline, for WAIT speaks of what its own connection has written.
        pipeline = self._client.pipeline(transaction=False)
        script(self._keys, arguments, client=pipeline)
        pipeline.wait(self._replicas, round(500 * self._patience.reply_s))
        answer, received = pipeline.execute()
        if received < self._replicas:
            msg = f"{received} of the {self._replicas} replicas that were asked for have received the commit"
            raise ConnectionLost(msg)
        return answer

    # ------------------------------------------------------------------ the lease

    def _acquire(self, holder: str, ttl_s: float) -> int | None:
        self._check_server()  # the version and the settings may have changed since the storage was opened
        return int(self._run(self._change, self._take, [holder, _milliseconds(ttl_s), self._token])) or None

    def _renew(self, epoch: int, holder: str, ttl_s: float) -> None:
        self._expect_leading(epoch, self._run(self._extend, self._keys, [self._token, holder, _milliseconds(ttl_s)]))

    def _release(self, epoch: int) -> None:
        self._run(self._free, self._keys, [self._token])

    def _expect_leading(self, epoch: int, answer: list[bytes]) -> None:
        """An answer is empty, or the fence that was found instead of ours."""
        if answer and not answer[0]:
            raise self._emptied()
        if answer:
            raise self._lost(epoch, answer[1].decode(errors="replace"), int(answer[0]))

    # ------------------------------------------------------------------ the server

    def _check_server(self) -> None:
        found = self._run(self._prepare, self._keys, [FORMAT_VERSION])
        if not found.isdigit():
            self._refuse_foreign("keys of this prefix")
        self.check_format(int(found))
        if not self._strict:
            return
        settings = self._run(self._settings)
        if (settings.get("appendonly"), settings.get("appendfsync")) != ("yes", "always"):
            msg = (
                f"{self.place} would lose acknowledged commits with its power: appendonly is "
                f"{settings.get('appendonly')!r} and appendfsync {settings.get('appendfsync')!r}. Set `appendonly yes` "
                f"and `appendfsync always`, or accept the loss by ?durability=server in the address"
            )
            raise StorageUnavailable(msg)
        policy = settings.get("maxmemory-policy", "")
        if policy != "noeviction" and settings.get("maxmemory") != "0":
            msg = f"{self.place} may evict records: its maxmemory-policy is {policy!r}. Set it to `noeviction`"
            raise StorageUnavailable(msg)

    def _settings(self) -> dict[str, str]:
        try:
            found = {**self._client.config_get("append*"), **self._client.config_get("maxmemory*")}
        except redis.ResponseError as error:
            msg = (
                f"{self.place} does not say whether it keeps what it acknowledges ({error}). If its operator answers "
                f"for that, add ?durability=server to the address"
            )
            raise StorageUnavailable(msg) from error
        return {_text(name): _text(value) for name, value in found.items()}

    def _run(self, request: Callable[..., T], *arguments: Any) -> T:
        def attempt() -> T:
            try:
                return request(*arguments)
            except redis.AuthenticationError as error:
                raise self._refused(error) from error
            except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError) as error:
                # A former primary stays read-only: the name may lead to its successor when it is looked up again.
                self._client.connection_pool.disconnect()
                raise ConnectionLost from error
            except redis.ResponseError as error:
                if str(error).startswith("WRONGTYPE"):
                    self._refuse_foreign("keys of this prefix")
                raise self._refused(error) from error

        return self._patience.run(attempt)

    def _refused(self, error: redis.RedisError) -> StorageUnavailable:
        return StorageUnavailable(
            f"{self.place} refused a request: {error}. Look at its log, its memory and the user's rights, then start "
            f"the head again"
        )


def _client(address: Address, patience: Patience) -> redis.Redis:
    (host, port) = address.hosts[0]
    database = address.path.strip("/") or "0"
    if not database.isdigit():
        msg = f"{address.shown}: the path is the number of a database, not {database!r}"
        raise LimitExceeded(msg)
    tls: dict[str, Any] = {}
    if address.scheme == "rediss":
        names = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}
        tls = {names[name]: value for name, value in address.options.items() if name in names} | {"ssl": True}
    return redis.Redis(
        host=host,
        port=port,
        db=int(database),
        username=address.user or None,
        password=address.password or None,
        socket_connect_timeout=patience.connect_s,
        socket_timeout=patience.reply_s,
        socket_keepalive=True,
        max_connections=1,
        retry=Retry(NoBackoff(), 0),  # ours are bounded by time, and know that they may not apply a commit twice
        **tls,
    )


def _durability(address: Address) -> bool:
    wanted = address.options.get("durability", "strict")
    if wanted not in ("strict", "server"):
        msg = f"{address.shown}: durability is `strict` or `server`, not {wanted!r}"
        raise LimitExceeded(msg)
    return wanted == "strict"


def _replicas(address: Address) -> int:
    text = address.options.get("replicas", "0")
    with contextlib.suppress(ValueError):
        if 0 <= int(text) <= 100:
            return int(text)
    msg = f"{address.shown}: replicas is a number up to 100, not {text!r}"
    raise LimitExceeded(msg)


def _field(write: Write) -> bytes:
    return write.table.encode() + b"\0" + write.key


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
