"""The resource ledger of one node: what there is, what is free, and which devices are whose.

Owns `total`, `free` and the shares of GPU devices. It knows nothing of leases or workers.

Invariants: for every name, the amounts in allocations that were taken and not given back, plus `free`,
are `total`; a device's allocated shares plus its free share are one whole device; the free shares of all
devices add up to ``free["GPU"]``. Only CPUs may become negative in `free`: a worker that waited in `get`
and goes on takes its CPUs back without asking.

Amounts are integers in units of 1/10000, so sums are exact.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.shown import ACCELERATOR, show, show_part
from ray._protocol import UNIT

GPU: Final = "GPU"
CPU: Final = "CPU"


class Allocation(msgspec.Struct):
    """What one lease holds. `shares` are (device id, units) pairs; whole devices have `UNIT` units."""

    amounts: dict[str, int]
    shares: tuple[tuple[int, int], ...] = ()
    cpu_lent: bool = False
    """The CPUs are given back for the time of a blocking wait."""

    @property
    def gpu_ids(self) -> list[int]:
        return [device for device, _ in self.shares]

    def holds(self, name: str) -> int:
        """Units of `name` that this allocation keeps from others now."""
        return 0 if name == CPU and self.cpu_lent else self.amounts.get(name, 0)


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

    def infeasible(self, demand: dict[str, int]) -> str | None:
        """Why this node can never meet the demand, as a sentence; None if it can when enough is free."""
        for name, units in demand.items():
            if units > self.total.get(name, 0):
                return f"needs {show_part(name, units)}; this node has {self._show_total(name)}"
        gpus = demand.get(GPU, 0)
        if gpus > UNIT and gpus % UNIT:
            return f"needs GPU: {show(GPU, gpus)}; above one device only whole numbers can be had"
        return None

    def _show_total(self, name: str) -> str:
        total = self.total.get(name, 0)
        return "none" if not total and name.startswith(ACCELERATOR) else show(name, total)

    def lacking(self, demand: dict[str, int]) -> list[str]:
        """Names of which too little is free now. Empty means that `take` succeeds."""
        names = [name for name, units in demand.items() if units > 0 and units > self.free.get(name, 0)]
        gpus = demand.get(GPU, 0)
        if gpus > 0 and GPU not in names and self._choose_devices(gpus) is None:
            names.append(GPU)
        return names

    def take(self, demand: dict[str, int]) -> Allocation:
        """Take the demand, which `lacking` has found to fit."""
        gpus = demand.get(GPU, 0)
        shares = self._choose_devices(gpus) if gpus > 0 else ()
        assert shares is not None, "taken without a free device"
        assert not self.lacking(demand), "taken without being free"
        allocation = Allocation({name: units for name, units in demand.items() if units > 0}, shares)
        for name, units in allocation.amounts.items():
            self.free[name] -= units
        for device, units in shares:
            self.devices[device] -= units
        return allocation

    def give(self, allocation: Allocation) -> None:
        """Give back all that the allocation still holds. It must not be used again."""
        for name, units in allocation.amounts.items():
            if not (name == CPU and allocation.cpu_lent):
                self.free[name] += units
        for device, units in allocation.shares:
            self.devices[device] += units
        allocation.amounts = {}
        allocation.shares = ()

    def lend_cpu(self, allocation: Allocation) -> bool:
        """Give back the CPUs for a while. False if they were already, or if there are none."""
        cpus = allocation.amounts.get(CPU, 0)
        if allocation.cpu_lent or cpus == 0:
            return False
        allocation.cpu_lent = True
        self.free[CPU] += cpus
        return True

    def retake_cpu(self, allocation: Allocation) -> None:
        """Take the CPUs again; what is free may become negative."""
        if allocation.cpu_lent:
            allocation.cpu_lent = False
            self.free[CPU] -= allocation.amounts[CPU]

    def available(self) -> dict[str, int]:
        """What is free, never negative."""
        return {name: max(units, 0) for name, units in self.free.items()}

    def _choose_devices(self, gpus: int) -> tuple[tuple[int, int], ...] | None:
        if gpus < UNIT:
            # Best fit: the fullest device with room, so that whole devices stay whole.
            fitting = [(share, device) for device, share in self.devices.items() if share >= gpus]
            return ((min(fitting)[1], gpus),) if fitting else None
        whole = [device for device, share in self.devices.items() if share == UNIT]
        count = gpus // UNIT
        return tuple((device, UNIT) for device in whole[:count]) if len(whole) >= count else None
