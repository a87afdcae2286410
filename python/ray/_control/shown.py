"""Amounts of resources as people write them."""

from __future__ import annotations

from typing import Final

from ray._bundle_names import plain
from ray._protocol import UNIT

ACCELERATOR: Final = "accelerator_type:"
"""What the option `accelerator_type` demands a little of: the node's having it is what counts."""

_BYTES_NAMES: Final = ("memory", "object_store_memory")


def show(name: str, units: int) -> str:
    """An amount as people write it: "1", "0.5", "2.5 GiB"."""
    if name in _BYTES_NAMES:
        return show_bytes(units // UNIT)
    whole, part = divmod(units, UNIT)
    return str(whole) if part == 0 else f"{units / UNIT:.4f}".rstrip("0")


def show_bytes(count: int) -> str:
    """A number of bytes, in the largest unit that leaves something before the point."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def show_part(name: str, units: int) -> str:
    """One resource of a demand: "CPU: 1". The type of an accelerator has no amount that would tell anything."""
    kind = name.removeprefix(ACCELERATOR)
    return f"{name}: {show(name, units)}" if kind == name else f"an accelerator of type {kind}"


def show_demand(demand: dict[str, int]) -> str:
    """A demand as people write it: "CPU: 1, GPU: 0.5". What is asked of a bundle has its plain name."""
    parts = [show_part(name, units) for name, units in plain(demand).items() if units > 0]
    return ", ".join(parts) or "nothing"
