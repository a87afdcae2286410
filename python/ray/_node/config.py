"""What a node process is told at its start, through an inherited descriptor."""

from __future__ import annotations

import os
from typing import Final

import msgspec

_UNIT: Final = 10_000
"""As in `ray._protocol`, which is not imported here because a driver would pay for it at its start."""


class NodeConfig(msgspec.Struct, frozen=True):
    """Everything that a node needs to know. Descriptors are inherited ones, -1 if there is none.

    `resources` are in wire units. `gpu_ids` are device ids, as many as ``resources["GPU"]`` says.
    """

    session_dir: str
    session: bytes
    token: bytes
    node: int
    resources: dict[str, int]
    gpu_ids: list[int]
    object_store_memory: int
    sys_path: list[str] = []
    cwd: str = "/"
    preload: list[str] = []
    env_vars: dict[str, str] = {}
    labels: dict[str, str] = {}
    spilling_directory: str = ""
    """Where spilled values go, in a directory of the session's name; by default into the session directory."""
    spilling_share: float = 0.8
    """How much of the store may be lent before values are spilled."""
    spill_capacity_share: float = 0.95
    """How full the disk may be, by whatever, for something to be spilled to it."""
    spills: bool = True
    hostname: str = "localhost"
    address: str = "127.0.0.1"
    worker_module: str = "ray._runtime.worker"
    lifeline_fd: int = -1
    """Its end means that the driver has gone, and the node goes too."""
    ready_fd: int = -1
    """Gets b"ok\\n" once the node listens, or the text of what went wrong."""
    lock_fd: int = -1
    """The session's lock, held for as long as it is open."""
    driver_pid: int = 0
    """The process to die with; 0 for a node that stands alone."""

    @property
    def spill_dir(self) -> str:
        if not self.spilling_directory:
            return f"{self.session_dir}/spill"
        return f"{self.spilling_directory}/ray-spilled-{os.path.basename(self.session_dir)}"

    @property
    def socket_path(self) -> str:
        return f"{self.session_dir}/node.sock"


def read_config(fd: int) -> NodeConfig:
    """Read the configuration from the start of a file, and close it."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return msgspec.msgpack.decode(file.read(), type=NodeConfig)


def check(config: NodeConfig) -> None:
    """Raise `ValueError` for what a user may have asked and no node can be."""
    gpus = config.resources.get("GPU", 0)
    if gpus != _UNIT * len(config.gpu_ids):
        msg = (
            f"GPU: {gpus / _UNIT:g} does not agree with {len(config.gpu_ids)} device ids: a node has whole devices, "
            "each with one id"
        )
        raise ValueError(msg)
    if config.object_store_memory <= 0:
        msg = f"object_store_memory is {config.object_store_memory} bytes; it must be positive"
        raise ValueError(msg)
    for name, units in config.resources.items():
        if units < 0:
            msg = f"{name}: {units / _UNIT:g} is negative"
            raise ValueError(msg)
