"""Records in etcd: a server of its own consensus, which fsyncs what it acknowledges and needs no settings for it.

Under `/skate/<prefix>/` lie `format`, `fence`, `leader`, and the records at `r/<table>`, a zero byte, `<key>`.
The key `leader` is attached to an etcd lease, and goes with it. `fence` says epoch, commits, pending pieces and token;
every change is a transaction that compares the whole value of `fence` with what this process knows, and replaces it. So
two heads cannot both change anything, and a request that arrives twice is applied once.

etcd takes 128 operations and 1.5 MiB in a transaction. A larger batch is cut into pieces, which are written to a
journal (`j/<piece>`) first; the one transaction that makes them *pending* in the fence is the commit, and then they are
applied, each in a transaction that lowers the number of pending ones. Whoever takes the lease applies what is pending,
and drops a journal that was not finished. A single value is at most `VALUE_BYTES_MAX`.

Compaction and defragmentation are the operator's (`--auto-compaction-retention`): each commit writes a new revision of
the fence, a hundred bytes.

Options: several hosts, tried in turn; with etcds:// `ca_file`, `cert_file`, `key_file`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import msgspec

from ray._control.storage.etcd_gateway import AnswerTooLarge, Gateway, data64, text64
from ray._control.storage.interface import FORMAT_VERSION, LeadershipLost, Storage, Write
from ray._control.storage.patience import Patience

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._control.storage.etcd_gateway import Json
    from ray._control.storage.url import Address

VALUE_BYTES_MAX: Final = 1 << 20
"""A larger value is refused with `LimitExceeded`: with its key it would not fit into one request."""

PIECE_BYTES_MAX: Final = 1 << 20
"""Of keys and values. With a single value's key and the fence it stays below etcd's 1.5 MiB."""

PIECE_WRITES_MAX: Final = 100
"""With the fence and the journal it stays below etcd's 128 operations."""

PAGE_RECORDS: Final = 500
"""For one step of `load`; half as many when the answer is too large, in the end one of `VALUE_BYTES_MAX`."""

TAKE_ATTEMPTS_MAX: Final = 8
"""To take the lease while its keys change underfoot; beyond it another was faster, and has it."""


class _Fence(NamedTuple):
    epoch: int
    commits: int
    pending: int
    token: str

    def __bytes__(self) -> bytes:
        """As it is stored."""
        return " ".join(map(str, self)).encode()

    @classmethod
    def parse(cls, text: bytes) -> _Fence | None:
        fields = text.split(b" ")
        if len(fields) != len(cls._fields) or not all(field.isdigit() for field in fields[:3]):
            return None
        return cls(int(fields[0]), int(fields[1]), int(fields[2]), fields[3].decode("ascii", "replace"))


class EtcdStorage(Storage):
    """See the module's docstring."""

    transaction_writes_max = PIECE_WRITES_MAX
    transaction_bytes_max = PIECE_BYTES_MAX

    def __init__(self, address: Address) -> None:
        super().__init__(address.shown, VALUE_BYTES_MAX)
        self._gateway = Gateway(address, Patience(self.place, address.patience_s))
        self._root = f"/skate/{address.prefix}/".encode()
        self._lease_id = ""
        self._fence = _Fence(0, 0, 0, "")
        try:
            self._check_format()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._gateway.close()

    # ------------------------------------------------------------------ records

    def _load(self) -> Iterator[tuple[str, bytes, bytes]]:
        first, end, revision, limit = self._root + b"r/", self._root + b"r0", "0", PAGE_RECORDS  # "0" follows "/"
        while True:
            body = {"key": text64(first), "range_end": text64(end), "limit": limit, "revision": revision}
            try:
                answer = self._gateway.ask("kv/range", body)
            except AnswerTooLarge:
                assert limit > 1, "a single record is beyond the limit of an answer"
                limit //= 2
                continue
            revision = answer["header"]["revision"]  # all pages are of one moment
            for item in answer.get("kvs", ()):
                name = data64(item["key"])
                table, separator, key = name[len(self._root) + 2 :].partition(b"\0")
                if not separator:
                    self._refuse_foreign(f"a record named {name!r}")
                yield table.decode("ascii", "replace"), key, data64(item.get("value", ""))
            if not answer.get("more"):
                return
            first = name + b"\0"

    def _commit(self, epoch: int, number: int, writes: list[Write]) -> None:
        pieces = _cut(writes)
        if len(pieces) == 1:
            self._advance(self._fence._replace(commits=number), [self._operation(write) for write in writes])
            return
        # Named by how many are left when they come to be applied.
        for left, piece in zip(range(len(pieces), 0, -1), pieces, strict=True):
            self._advance(self._fence, [_put(self._journal(left), msgspec.msgpack.encode(piece))])
        self._advance(self._fence._replace(commits=number, pending=len(pieces)), [])
        self._apply_pending()

    def _apply_pending(self) -> None:
        while left := self._fence.pending:
            key = self._journal(left)
            [item] = self._gateway.ask("kv/range", {"key": text64(key)}).get("kvs") or [None]
            if item is None:
                self._refuse_contradiction(f"piece {left} of its journal is missing")
            piece = msgspec.msgpack.decode(data64(item["value"]), type=list[Write])
            operations = [*map(self._operation, piece), _delete(key)]
            self._advance(self._fence._replace(pending=left - 1), operations)

    def _journal(self, left: int) -> bytes:
        return self._root + b"j/%d" % left

    def _operation(self, write: Write) -> Json:
        key = self._root + b"r/" + write.table.encode() + b"\0" + write.key
        return _delete(key) if write.value is None else _put(key, write.value)

    # ------------------------------------------------------------------ the lease

    def _acquire(self, holder: str, ttl_s: float) -> int | None:
        self._check_format()  # a newer version may have written since the storage was opened
        for _ in range(TAKE_ATTEMPTS_MAX):
            leader, fence = self._get("leader"), self._get("fence")
            if leader is not None and data64(leader["value"]) != holder.encode():
                return None
            if self._take(holder, ttl_s, leader, fence):
                try:
                    self._apply_pending()
                    self._advance(self._fence, [_delete(self._root + b"j/", self._root + b"j0")])
                except LeadershipLost:
                    return None  # to somebody of the same name, just now
                return self._fence.epoch
        return None

    def _take(self, holder: str, ttl_s: float, leader: Json | None, fence: Json | None) -> bool:
        stored = _Fence.parse(data64(fence["value"])) if fence is not None else _Fence(0, 0, 0, "")
        if stored is None:
            self._refuse_foreign("a fence")
        self._fence = _Fence(stored.epoch + 1, 0, stored.pending, self._token)
        self._lease_id = self._grant(ttl_s)
        compared = [self._unchanged("leader", leader), self._unchanged("fence", fence)]
        answer = self._transaction(compared, [self._leader(holder), _put(self._root + b"fence", bytes(self._fence))])
        if answer.get("succeeded") or self._stored_fence() == self._fence:  # the answer to a first attempt was lost
            return True
        self._revoke()
        return False

    def _renew(self, epoch: int, holder: str, ttl_s: float) -> None:
        answer = self._gateway.ask("lease/keepalive", {"ID": self._lease_id})
        if int(answer.get("result", {}).get("TTL", 0)) <= 0:
            self._lease_id = self._grant(ttl_s)
        self._advance(self._fence, [self._leader(holder)])

    def _release(self, epoch: int) -> None:
        self._transaction([self._ours()], [_delete(self._root + b"leader")])
        self._revoke()

    def _grant(self, ttl_s: float) -> str:
        return str(self._gateway.ask("lease/grant", {"TTL": math.ceil(ttl_s)})["ID"])

    def _revoke(self) -> None:
        # Deletes what is attached to it, which after a take-over under the same name is nothing.
        if self._lease_id:
            self._gateway.ask("lease/revoke", {"ID": self._lease_id})
            self._lease_id = ""

    def _leader(self, holder: str) -> Json:
        operation = _put(self._root + b"leader", holder.encode())
        operation["request_put"]["lease"] = self._lease_id
        return operation

    # ------------------------------------------------------------------ transactions

    def _advance(self, after: _Fence, operations: list[Json]) -> None:
        """Do all of it and write the new fence, if the stored one is what we know; else nothing."""
        changes = operations if after == self._fence else [_put(self._root + b"fence", bytes(after)), *operations]
        answer = self._transaction([self._ours()], changes)
        if not answer.get("succeeded"):
            stored = self._stored_fence()
            if stored is None:
                raise self._emptied()
            if stored.token != self._token:
                leader = self._get("leader")
                by = data64(leader["value"]).decode(errors="replace") if leader is not None else "a head that has gone"
                raise self._lost(self._fence.epoch, by, stored.epoch)
            if stored != after:
                self._refuse_contradiction(f"its fence says {stored}, and ours {self._fence}")
            # The answer to a first attempt was lost, and this was the second.
        self._fence = after

    def _ours(self) -> Json:
        key = self._root + b"fence"
        return {"key": text64(key), "target": "VALUE", "result": "EQUAL", "value": text64(bytes(self._fence))}

    def _unchanged(self, name: str, item: Json | None) -> Json:
        revision = item["mod_revision"] if item is not None else "0"  # of a key that does not exist
        key = text64(self._root + name.encode())
        return {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": revision}

    def _transaction(self, compared: list[Json], operations: list[Json]) -> Json:
        return self._gateway.ask("kv/txn", {"compare": compared, "success": operations, "failure": []})

    def _get(self, name: str) -> Json | None:
        items: list[Any] = self._gateway.ask("kv/range", {"key": text64(self._root + name.encode())}).get("kvs", [])
        return items[0] if items else None

    def _stored_fence(self) -> _Fence | None:
        item = self._get("fence")
        return None if item is None else _Fence.parse(data64(item["value"]))

    def _check_format(self) -> None:
        item = self._get("format")
        if item is None:
            anything = {"key": text64(self._root), "range_end": text64(self._root[:-1] + b"0"), "limit": 1}
            if self._gateway.ask("kv/range", anything).get("kvs") and self._get("format") is None:
                self._refuse_foreign("keys of this prefix")
            format_key = self._root + b"format"
            self._transaction([self._unchanged("format", None)], [_put(format_key, b"%d" % FORMAT_VERSION)])
            item = self._get("format")
        found = data64(item["value"]) if item is not None else b""
        if not found.isdigit():
            self._refuse_foreign("keys of this prefix")
        self.check_format(int(found))

    def _refuse_contradiction(self, what: str) -> NoReturn:
        self._refuse_foreign(f"keys that contradict each other ({what})")


def _cut(writes: list[Write]) -> list[list[Write]]:
    pieces: list[list[Write]] = []
    size = 0
    for write in writes:
        if not pieces or len(pieces[-1]) == PIECE_WRITES_MAX or size + write.size > PIECE_BYTES_MAX:
            pieces.append([])
            size = 0
        pieces[-1].append(write)
        size += write.size
    return pieces


def _put(key: bytes, value: bytes) -> Json:
    return {"request_put": {"key": text64(key), "value": text64(value)}}


def _delete(key: bytes, end: bytes | None = None) -> Json:
    """Of one key, or of all from it to before the end."""
    return {"request_delete_range": {"key": text64(key)} | ({"range_end": text64(end)} if end is not None else {})}
