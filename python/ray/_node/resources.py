"""The resource ledger of one node: what there is, what is free, and which devices are whose.

Owns `total`, `free`, the shares of GPU devices, and the bundles of placement groups, whose resources have names of
their own in `total` and `free` (`_bundle_names`). It knows nothing of leases or workers.

Invariants: for every name, the amounts in allocations that were taken and not given back, plus `free`,
are `total`; a device's allocated shares plus its free share are one whole device; the free shares of all
devices add up to ``free["GPU"]``. What is free in any bundle of a group is the sum of what is free in each, and a
demand for any bundle is taken from one that has room for all of it. Only CPUs may become negative in `free`: a worker
that waited in `get` and goes on takes its CPUs back without asking.

Amounts are integers in units of 1/10000, so sums are exact.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._bundle_names import ANY, MARKER, base_of, name_in, offered, plain, rewritten, split, wanted_of_any
from ray._control.shown import ACCELERATOR, show, show_demand, show_part
from ray._protocol import UNIT

GPU: Final = "GPU"
CPU: Final = "CPU"


class Bundle(msgspec.Struct):
    """Resources that are set aside for a placement group. `devices` has the free share of each GPU of its own."""

    group: str
    name: str
    """What people call the group."""
    index: int
    amounts: dict[str, int]
    devices: dict[int, int]


class Allocation(msgspec.Struct):
    """What one lease holds. `shares` are (device id, units) pairs; whole devices have `UNIT` units.

    What is held in a bundle has the names of the bundle's resources, and its shares are of the bundle's devices.
    """

    amounts: dict[str, int]
    shares: tuple[tuple[int, int], ...] = ()
    cpu_lent: bool = False
    """The CPUs are given back for the time of a blocking wait."""
    bundle: Bundle | None = None

    @property
    def gpu_ids(self) -> list[int]:
        return [device for device, _ in self.shares]

    def holds(self, name: str) -> int:
        """Units of `name` that this allocation keeps from others now."""
        return 0 if self.cpu_lent and is_cpu(name) else self.amounts.get(name, 0)


def is_cpu(name: str) -> bool:
    """Whether a resource is CPUs, of the node or of a bundle."""
    return name.startswith(CPU) and base_of(name) == CPU


class Ledger:
    """See the module's docstring.

    Args:
        total: What the node has.
        gpu_ids: Ids of its devices. By default 0, 1, ... as many as ``total["GPU"]`` says.
    """

    def __init__(self, total: dict[str, int], gpu_ids: tuple[int, ...] | None = None) -> None:
        self.total = {name: units for name, units in total.items() if units > 0}
        self.free = dict(self.total)
        count = self.total.get(GPU, 0) // UNIT
        ids = tuple(range(count)) if gpu_ids is None else gpu_ids
        if self.total.get(GPU, 0) != UNIT * len(ids):
            msg = (
                f"GPU: {show(GPU, self.total.get(GPU, 0))} does not agree with {len(ids)} device ids: "
                "a node has whole devices, each with one id"
            )
            raise ValueError(msg)
        self.devices: dict[int, int] = dict.fromkeys(ids, UNIT)
        self.bundles: dict[str, dict[int, Bundle]] = {}
        """Bundles that are offered, by group and index."""

    def infeasible(self, demand: dict[str, int]) -> str | None:
        """Why this node can never meet the demand, as a sentence; None if it can when enough is free."""
        for name, units in demand.items():
            if units > self.total.get(name, 0):
                if split(name) is not None:
                    return f"needs {show_demand(demand)} in a placement group; this node has no such bundle of it"
                return f"needs {show_part(name, units)}; this node has {self._show_total(name)}"
        gpus = demand.get(GPU, 0)
        if gpus > UNIT and gpus % UNIT:
            return f"needs GPU: {show(GPU, gpus)}; above one device only whole numbers can be had"
        if self.bundles and (asked := wanted_of_any(demand)) is not None:
            bundles = self.bundles.get(asked[0], {}).values()
            if not any(_holds(bundle, asked[1]) for bundle in bundles):
                return f"needs {show_demand(demand)} in one bundle; no bundle of the group on this node has as much"
        return None

    def _show_total(self, name: str) -> str:
        total = self.total.get(name, 0)
        return "none" if not total and name.startswith(ACCELERATOR) else show(name, total)

    def lacking(self, demand: dict[str, int]) -> list[str]:
        """Names of which too little is free now. Empty means that `take` succeeds."""
        names = [name for name, units in demand.items() if units > 0 and units > self.free.get(name, 0)]
        gpus = demand.get(GPU, 0)
        if gpus > 0 and GPU not in names and choose_devices(self.devices, gpus) is None:
            names.append(GPU)
        if self.bundles and not names and (asked := _group_of(demand)) and self._choose_bundle(demand, asked) is None:
            names = [name for name in demand if split(name) is not None]
        return names

    def take(self, demand: dict[str, int]) -> Allocation:
        """Take the demand, which `lacking` has found to fit."""
        assert not self.lacking(demand), "taken without being free"
        amounts = {name: units for name, units in demand.items() if units > 0}
        bundle = None
        devices, gpus = self.devices, demand.get(GPU, 0)
        if self.bundles and (asked := _group_of(demand)):
            bundle = self._choose_bundle(demand, asked)
            assert bundle is not None, "taken without a bundle"
            wanted = plain(demand)
            amounts = rewritten(wanted, bundle.group, bundle.index)
            devices, gpus = bundle.devices, wanted.get(GPU, 0)
        shares = choose_devices(devices, gpus) if gpus > 0 else ()
        assert shares is not None, "taken without a free device"
        for name, units in amounts.items():
            self.free[name] -= units
        for device, units in shares:
            devices[device] -= units
        return Allocation(amounts, shares, bundle=bundle)

    def give(self, allocation: Allocation) -> None:
        """Give back all that the allocation still holds. It must not be used again."""
        for name, units in allocation.amounts.items():
            if not (allocation.cpu_lent and is_cpu(name)):
                self.free[name] += units
        devices = self.devices if allocation.bundle is None else allocation.bundle.devices
        for device, units in allocation.shares:
            devices[device] += units
        allocation.amounts = {}
        allocation.shares = ()

    def lend_cpu(self, allocation: Allocation) -> bool:
        """Give back the CPUs for a while. False if they were already, or if there are none."""
        cpus = [name for name in allocation.amounts if is_cpu(name)]
        if allocation.cpu_lent or not cpus:
            return False
        allocation.cpu_lent = True
        for name in cpus:
            self.free[name] += allocation.amounts[name]
        return True

    def retake_cpu(self, allocation: Allocation) -> None:
        """Take the CPUs again; what is free may become negative."""
        if allocation.cpu_lent:
            allocation.cpu_lent = False
            for name, units in allocation.amounts.items():
                if is_cpu(name):
                    self.free[name] -= units

    def available(self) -> dict[str, int]:
        """What is free, never negative."""
        return {name: max(units, 0) for name, units in self.free.items()}

    # ------------------------------------------------------------------ bundles

    def offer(self, bundle: Bundle) -> None:
        """What was taken for a bundle is there for whoever runs in it."""
        self.bundles.setdefault(bundle.group, {})[bundle.index] = bundle
        for name, units in offered(bundle.amounts, bundle.group, bundle.index).items():
            self.total[name] = self.total.get(name, 0) + units
            self.free[name] = self.free.get(name, 0) + units

    def withdraw(self, bundle: Bundle) -> None:
        """A bundle in which nothing runs is offered no longer."""
        for name, units in offered(bundle.amounts, bundle.group, bundle.index).items():
            self.total[name] -= units
            self.free[name] -= units
            if not self.total[name]:
                assert not self.free[name], f"{name} is not all free"
                del self.total[name], self.free[name]
        mates = self.bundles[bundle.group]
        del mates[bundle.index]
        if not mates:
            del self.bundles[bundle.group]

    def _choose_bundle(self, demand: dict[str, int], group: str) -> Bundle | None:
        """The bundle that a demand is taken from: of those with room for all of it the fullest."""
        wanted = plain(demand)
        index = max(parts[2] for name in demand if (parts := split(name)) is not None)
        best: tuple[int, int] | None = None
        for bundle in self.bundles.get(group, {}).values():
            if index not in (ANY, bundle.index):
                continue
            left = {name: self.free.get(name_in(name, group, bundle.index), 0) for name in wanted}
            if any(units > left[name] for name, units in wanted.items()):
                continue
            gpus = wanted.get(GPU, 0)
            if gpus and choose_devices(bundle.devices, gpus) is None:
                continue
            rank = (sum(left.values()), bundle.index)
            best = rank if best is None else min(best, rank)
        return self.bundles[group][best[1]] if best is not None else None


def _group_of(demand: dict[str, int]) -> str:
    """The placement group that a demand is in, in hex; empty if none."""
    for name in demand:
        if (parts := split(name)) is not None:
            return parts[1]
    return ""


def _holds(bundle: Bundle, amounts: dict[str, int]) -> bool:
    return all(units <= bundle.amounts.get(name, 0) for name, units in amounts.items() if name != MARKER)


def choose_devices(devices: dict[int, int], gpus: int) -> tuple[tuple[int, int], ...] | None:
    """Devices for so many units, by their free shares; None if there are none."""
    if gpus < UNIT:
        # Best fit: the fullest device with room, so that whole devices stay whole.
        fitting = [(share, device) for device, share in devices.items() if share >= gpus]
        return ((min(fitting)[1], gpus),) if fitting else None
    whole = [device for device, share in devices.items() if share == UNIT]
    count = gpus // UNIT
    return tuple((device, UNIT) for device in whole[:count]) if len(whole) >= count else None
