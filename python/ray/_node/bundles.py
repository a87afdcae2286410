"""What a node has set aside for placement groups.

Owns reservations: resources that were taken from the ledger for bundles, first only set aside, then offered under the
names of the bundles. Which demands get resources first is the lease table's to decide, which calls this.

Invariants: a reservation holds what its bundles have together, and whole GPUs where fractions share them; a bundle is
offered from `commit` to `release`; nothing runs in a bundle that is released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ray._control.group_placement import demand_of, pack_fractions
from ray._node.resources import GPU, Allocation, Bundle
from ray._protocol import UNIT

if TYPE_CHECKING:
    from ray._control import messages
    from ray._node.resources import Ledger


class Reservation(msgspec.Struct):
    """What one attempt to place a group has got here."""

    group: bytes
    attempt: int
    name: str
    allocation: Allocation
    bundles: list[Bundle]
    offered: bool = False

    def has(self, allocation: Allocation) -> bool:
        """Whether an allocation is in one of these bundles."""
        return any(allocation.bundle is bundle for bundle in self.bundles)


class Reservations:
    """See the module's docstring.

    Args:
        ledger: The node's resources.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._held: dict[bytes, dict[int, Reservation]] = {}
        """By group and attempt."""

    def __len__(self) -> int:
        return sum(len(attempts) for attempts in self._held.values())

    def reserve(self, order: messages.PrepareBundles) -> None:
        """Take what the bundles of an order need, which `Ledger.lacking` has found to be free."""
        allocation = self._ledger.take(demand_of(order.bundles.values()))
        devices = _divide([bundle.get(GPU, 0) for bundle in order.bundles.values()], allocation)
        bundles = [
            Bundle(order.group.hex(), order.name, index, amounts, shares)
            for (index, amounts), shares in zip(order.bundles.items(), devices, strict=True)
        ]
        attempts = self._held.setdefault(order.group, {})
        assert order.attempt not in attempts, "reserved twice"
        attempts[order.attempt] = Reservation(order.group, order.attempt, order.name, allocation, bundles)

    def commit(self, group: bytes, attempt: int) -> bool:
        """Offer what was set aside. False if nothing was."""
        reservation = self._held.get(group, {}).get(attempt)
        if reservation is None or reservation.offered:
            return False
        reservation.offered = True
        for bundle in reservation.bundles:
            self._ledger.offer(bundle)
        return True

    def of(self, group: bytes, attempt: int) -> list[Reservation]:
        """What a group has here by one attempt, or by all if it is 0."""
        return [x for x in self._held.get(group, {}).values() if attempt in (0, x.attempt)]

    def release(self, reservation: Reservation) -> None:
        """Give everything back. Nothing may run in its bundles any more."""
        attempts = self._held[reservation.group]
        del attempts[reservation.attempt]
        if not attempts:
            del self._held[reservation.group]
        if reservation.offered:
            for bundle in reservation.bundles:
                self._ledger.withdraw(bundle)
        self._ledger.give(reservation.allocation)

    def held(self) -> list[Reservation]:
        """All that is set aside, oldest first within a group."""
        return self._all()

    def holds(self, name: str) -> int:
        """Units of a resource that are set aside."""
        return sum(x.allocation.holds(name) for x in self._all())

    def users(self, name: str) -> list[str]:
        """Groups for which some of a resource is set aside, in words."""
        return list(dict.fromkeys(x.name for x in self._all() if x.allocation.holds(name) > 0))

    def _all(self) -> list[Reservation]:
        return [reservation for attempts in self._held.values() for reservation in attempts.values()]


def _divide(gpus: list[int], allocation: Allocation) -> list[dict[int, int]]:
    """Which device, and how much of it, is each bundle's."""
    shares: list[dict[int, int]] = [{} for _ in gpus]
    devices = iter([device for device, _ in allocation.shares])
    if sum(gpus) <= UNIT:
        device = next(devices, None)
        for at, units in enumerate(gpus):
            if units:
                assert device is not None, "a bundle's device is not there"
                shares[at][device] = units
        return shares
    for at, units in enumerate(gpus):
        for _ in range(units // UNIT):
            shares[at][next(devices)] = UNIT
    for together in pack_fractions([units % UNIT for units in gpus]):
        device = next(devices)
        for at in together:
            shares[at][device] = gpus[at] % UNIT
    return shares
