"""What a node has to schedule with, as it is asked for or found on this machine."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["gpu_ids", "memory_bytes", "node_resources"]

OBJECT_STORE_SHARE = 0.3  # of the memory that this process may use
OBJECT_STORE_BYTES_MIN = 64 * 1024 * 1024


def node_resources(
    num_cpus: int | None,
    num_gpus: int | None,
    resources: dict[str, float] | None,
    object_store_memory: int | None,
    memory: int | None,
    *,
    caller: str = "ray.init()",
) -> dict[str, int]:
    """What a node has, in wire units: what is given, and what the machine has of the rest.

    Args:
        num_cpus: CPUs; those that this process may run on by default.
        num_gpus: GPUs; those of `CUDA_VISIBLE_DEVICES`, else of the machine by default.
        resources: Further ones, by name.
        object_store_memory: Bytes of shared memory; 30 % of the memory by default.
        memory: Bytes of memory for tasks and actors that ask for some; what the object store leaves by default.
        caller: Who asks, for errors.

    Raises:
        TypeError, ValueError: If an amount is not one, or more than the machine has.
    """
    from ray._runtime import options

    options.check({"resources": resources}, {"resources": options.TASK["resources"]}, caller)
    store = object_store_memory
    if store is None:
        store = max(int(memory_bytes() * OBJECT_STORE_SHARE), OBJECT_STORE_BYTES_MIN)
    elif isinstance(store, bool) or not isinstance(store, int | float):
        message = f"object_store_memory must be a number of bytes, not {store!r}"
        raise TypeError(message)
    elif not store <= options.AMOUNT_MAX:
        message = (
            f"object_store_memory must be a number of bytes up to {options.AMOUNT_MAX}, not {options.shown(store)}"
        )
        raise ValueError(message)
    elif store < OBJECT_STORE_BYTES_MIN:
        message = f"object_store_memory must be at least {OBJECT_STORE_BYTES_MIN} bytes (64 MiB), not {store}"
        raise ValueError(message)
    elif store > memory_bytes():
        message = (
            f"object_store_memory is {store} bytes, but this machine, or the control group of this process, has "
            f"{memory_bytes()} bytes of memory, which tasks and actors need a part of; ask for less"
        )
        raise ValueError(message)
    if memory is not None:
        options.check({"_memory": memory}, {"_memory": options.TASK["memory"]}, caller)
    amounts: dict[str, float] = {
        "CPU": _count("num_cpus", num_cpus, available_cpus),
        "GPU": _count("num_gpus", num_gpus, available_gpus),
        "memory": max(memory_bytes() - int(store), 0) if memory is None else memory,
        "object_store_memory": int(store),
        **(resources or {}),
    }
    return {name: options.to_fixed(name, amount) for name, amount in amounts.items() if amount or name == "CPU"}


def _count(name: str, given: int | None, detect: Any) -> int:
    if given is None:
        return int(detect())
    from ray._runtime import options

    if isinstance(given, bool) or not isinstance(given, int | float):
        message = f"{name} must be a whole number, not {given!r}"
        raise TypeError(message)
    options.to_fixed(name, given)
    if given != int(given):
        message = f"{name} must be a whole number, not {given!r}"
        raise TypeError(message)
    return int(given)


def available_cpus() -> int:
    """CPUs that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def available_gpus() -> int:
    """GPUs that this process may use, without initialising any driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def gpu_ids(count: int) -> list[int]:
    """Which devices `count` GPUs are: the first visible ones. Positions, where those are not numbers but UUIDs."""
    visible = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    numbers = [int(device) for device in visible if device.isdigit()]
    return numbers[:count] if len(numbers) >= count else list(range(count))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limit = int(file.read())
        except (OSError, ValueError):  # absent, or "max"
            continue
        return min(total, limit)
    return total
