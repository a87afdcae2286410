"""What a node process is told at its start, through an inherited descriptor."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import TYPE_CHECKING, Final

import msgspec

from ray._node.spill_settings import SpillSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNIT: Final = 10_000
"""As in `ray._protocol`, which is not imported here because a driver would pay for it at its start."""


class MemorySettings(msgspec.Struct, frozen=True):
    """What the memory watch was told; see `read_memory_settings`."""

    threshold: float = 0.95
    """Share of the limit in use beyond which a worker is ended."""
    look_s_max: float = 1.0
    """The longest pause between two looks; 0 for no watch."""
    limit_bytes: int = 0
    """An explicit limit for the node's own processes; 0 for the limits of the machine and of the cgroups."""


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
    hostname: str = "localhost"
    name: str = ""
    address: str = "127.0.0.1"
    """Where other nodes reach this one, without the port."""
    listen: str = ""
    """What to listen on for other nodes, "host:port"; port 0 is any. Empty for a cluster of one node."""
    outbound_only: bool = False
    """The node joins a head and listens for nobody: the head passes on to it who wants it."""
    tls: bool = False
    """Whether nodes of the cluster use TLS between them; the same for all, and learned by members from their node."""
    findable: bool = False
    """Whether drivers and further nodes of this user may find it on this machine; `private`: only by its address."""
    private: bool = False
    nodes_dir: str = ""
    """Where the record lies by which it is found; beside the session directory if empty."""
    client: bool = False
    """The node is only there for a driver outside of the cluster: it has no resources."""
    head_node: int = 0
    """The node that hosts the control service; 0 if it is this one."""
    head_address: str = ""
    """Where it is reached; several addresses, separated by commas, where its standbys are."""
    records: str = ""
    """Where a head keeps its records: an address as `_control.storage.open` takes it. Empty: it keeps none."""
    standby: bool = False
    """Whether a head waits while another one leads."""
    worker_module: str = "ray._runtime.worker"
    lifeline_fd: int = -1
    """Its end means that the driver has gone, and the node goes too."""
    ready_fd: int = -1
    """Gets "ok", the address for other nodes and a newline once the node serves, or the text of what went wrong."""
    lock_fd: int = -1
    """The session's lock, held for as long as it is open."""
    driver_pid: int = 0
    """The process to die with; 0 for a node that stands alone."""
    memory: MemorySettings = MemorySettings()
    spilling: SpillSettings = SpillSettings()

    @property
    def socket_path(self) -> str:
        return f"{self.session_dir}/node.sock"

    @property
    def is_public(self) -> bool:
        """Whether it was started for whoever comes, and belongs to no program."""
        return self.findable and not self.private


def session_of(token: bytes) -> bytes:
    """The session id of a cluster, which its processes compare before anything else: so the token is all to know."""
    return hashlib.sha256(token).digest()[:16]


def address_of(host: str, port: int) -> str:
    """A host and a port in one text, "host:port", with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def python_version() -> str:
    """Of this interpreter: "3.11.7"."""
    return ".".join(map(str, sys.version_info[:3]))


def read_config(fd: int) -> NodeConfig:
    """Read the configuration from the start of a file, and close it."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return msgspec.msgpack.decode(file.read(), type=NodeConfig)


def read_memory_settings(environ: Mapping[str, str]) -> MemorySettings:
    """The memory watch as the environment wants it, in variables with Ray's names but for the last.

    `RAY_memory_usage_threshold`: the share of the limit in use beyond which a worker is ended, 0.95 by default.
    `RAY_memory_monitor_refresh_ms`: the longest pause between two looks while workers are lent, 1000 by default; near
    the limit the node looks more often by itself. 0 switches the watch off.
    `RAY_memory_limit_bytes`: a limit for what the node, its workers and its object store use together, instead of the
    machine's and the cgroups' limits for everything on them.

    Raises:
        ValueError: If one of them is no number, or none that makes sense.
    """
    default = MemorySettings()
    threshold = _number(environ, "RAY_memory_usage_threshold", default.threshold)
    if not 0 < threshold <= 1:
        msg = f"RAY_memory_usage_threshold is {threshold:g}; it is a share of the limit, above 0 and at most 1"
        raise ValueError(msg)
    refresh_ms = _number(environ, "RAY_memory_monitor_refresh_ms", default.look_s_max * 1000)
    limit = _number(environ, "RAY_memory_limit_bytes", 0)
    for name, value in (("RAY_memory_monitor_refresh_ms", refresh_ms), ("RAY_memory_limit_bytes", limit)):
        if not 0 <= value < 1 << 62:
            msg = f"{name} is {value:g}; it must not be negative, and not beyond reason"
            raise ValueError(msg)
    return MemorySettings(threshold, refresh_ms / 1000, int(limit))


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    if text is None or not text.strip():
        return default
    try:
        return float(text)
    except ValueError:
        msg = f"{name}={text!r} is not a number"
        raise ValueError(msg) from None


def check(config: NodeConfig) -> None:
    """Raise `ValueError` for what a user may have asked and no node can be."""
    gpus = config.resources.get("GPU", 0)
    if gpus != _UNIT * len(config.gpu_ids):
        msg = (
            f"GPU: {gpus / _UNIT:g} does not agree with {len(config.gpu_ids)} device ids: a node has whole devices, "
            "each with one id"
        )
        raise ValueError(msg)
    if config.outbound_only and (config.listen or not config.head_node):
        msg = "a node that only connects outwards listens for nobody, and joins a head that passes connections on to it"
        raise ValueError(msg)
    if config.object_store_memory <= 0:
        msg = f"object_store_memory is {config.object_store_memory} bytes; it must be positive"
        raise ValueError(msg)
    for name, units in config.resources.items():
        if units < 0:
            msg = f"{name}: {units / _UNIT:g} is negative"
            raise ValueError(msg)
