"""Keys and values that outlive the processes which wrote them, by namespace.

Owns the map and its size. Values are bytes that nobody here reads.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.machine import Save, digest

BYTES_MAX: Final = 256 << 20
"""Keys and values together; beyond it `put` raises."""


TABLE: Final = "kv"


def record(namespace: str, key: bytes, value: bytes | None) -> Save:
    """A value as it is to be kept; None: it was deleted."""
    kept = None if value is None else msgspec.msgpack.encode((namespace, key, value))
    return Save(TABLE, digest(namespace, key), kept)


class KeyValueStore:
    """A bounded map from (namespace, key) to value."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._spaces: dict[str, dict[bytes, bytes]] = {}
        self._bytes_max = bytes_max
        self.bytes_used = 0

    def restore(self, kept: bytes) -> None:
        """Take over what `record` made."""
        self.put(*msgspec.msgpack.decode(kept, type=tuple[str, bytes, bytes]))

    def put(self, namespace: str, key: bytes, value: bytes, *, overwrite: bool = True) -> bool:
        """Set a value; True if the key is new. An existing one stays as it is unless `overwrite`.

        Raises:
            ValueError: If the store would grow beyond its limit.
        """
        space = self._spaces.get(namespace, {})
        old = space.get(key)
        if old is not None and not overwrite:
            return False
        growth = len(value) - len(old) if old is not None else len(key) + len(value)
        if self.bytes_used + growth > self._bytes_max:
            msg = (
                f"the key-value store is full: {self.bytes_used} of {self._bytes_max} bytes are in use and "
                f"{growth} more were asked for. Delete keys, or put large values into the object store"
            )
            raise ValueError(msg)
        self._spaces.setdefault(namespace, {})[key] = value
        self.bytes_used += growth
        return old is None

    def get(self, namespace: str, key: bytes) -> bytes | None:
        return self._spaces.get(namespace, {}).get(key)

    def delete(self, namespace: str, key: bytes, *, prefix: bool = False) -> list[bytes]:
        """Delete one key, or all that begin with it; returns those that there were."""
        space = self._spaces.get(namespace, {})
        doomed = [name for name in space if name.startswith(key)] if prefix else [key] if key in space else []
        for name in doomed:
            self.bytes_used -= len(name) + len(space.pop(name))
        if not space:
            self._spaces.pop(namespace, None)
        return doomed

    def keys(self, namespace: str, prefix: bytes) -> list[bytes]:
        """Keys that begin with the prefix, sorted."""
        return sorted(name for name in self._spaces.get(namespace, {}) if name.startswith(prefix))
