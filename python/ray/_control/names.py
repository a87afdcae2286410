"""Names of actors, by namespace.

A name is *reserved* from the request until the actor is created, and *settled* until the actor is dead.
A reservation falls with the process that made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable


class Name(msgspec.Struct):
    """Whose name it is. `meta` is the creator's own note for who looks the actor up."""

    name: str
    namespace: str
    actor: bytes
    reserved_by: int
    meta: bytes
    settled: bool = False


class NameTable:
    """At most one holder per (namespace, name)."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], Name] = {}
        self._reserved: dict[int, dict[tuple[str, str], None]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def get(self, name: str, namespace: str) -> Name | None:
        return self._names.get((namespace, name))

    def listed(self, namespace: str | None) -> list[Name]:
        """Settled names, sorted; of all namespaces if None."""
        return [
            self._names[key] for key in sorted(self._names) if namespace in (None, key[0]) and self._names[key].settled
        ]

    def reserve(self, name: str, namespace: str, actor: bytes, proc: int, meta: bytes) -> None:
        """Take a free name, or do nothing if the actor has it already."""
        key = (namespace, name)
        if key not in self._names:
            self._names[key] = Name(name, namespace, actor, proc, meta)
            self._reserved.setdefault(proc, {})[key] = None

    def settle(self, name: str, namespace: str) -> None:
        """The actor was created: the name no longer depends on who reserved it."""
        held = self._names[namespace, name]
        held.settled = True
        self._drop_reservation(held)

    def release(self, name: str, namespace: str, actor: bytes) -> None:
        """The actor is dead. Harmless if the name is another's."""
        held = self._names.get((namespace, name))
        if held is not None and held.actor == actor:
            del self._names[namespace, name]
            self._drop_reservation(held)

    def release_reservations(self, proc: int) -> list[Name]:
        """The process has gone: what it reserved and did not create is free again. Returns what that was."""
        return [self._names.pop(key) for key in self._reserved.pop(proc, {})]

    def release_reservations_but(self, procs: Iterable[int]) -> list[Name]:
        """The same for all processes but these."""
        kept = dict.fromkeys(procs)
        return [name for proc in list(self._reserved) if proc not in kept for name in self.release_reservations(proc)]

    def restore(self, held: Name) -> None:
        """Take over a name as it was kept."""
        key = (held.namespace, held.name)
        self._names[key] = held
        if not held.settled:
            self._reserved.setdefault(held.reserved_by, {})[key] = None

    def _drop_reservation(self, held: Name) -> None:
        reserved = self._reserved.get(held.reserved_by)
        if reserved is not None:
            reserved.pop((held.namespace, held.name), None)
            if not reserved:
                del self._reserved[held.reserved_by]
