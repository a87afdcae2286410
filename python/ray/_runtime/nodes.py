"""Starting node processes: for this program alone, for a cluster that others join, or to join one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._node.launch import NodeProcess

__all__ = ["HeadFacts", "start"]

HEAD_RESOURCE = "node:__internal_head__"  # programs demand a little of it to be on the head node

# Modules that the zygote imports once when the program has them already: all known to be safe before a fork.
PRELOADS = ("numpy", "pandas", "pyarrow", "sklearn")


class HeadFacts:
    """The head of the cluster that a node joins.

    Attributes:
        node: Its key.
        address: Where it is reached, "host:port".
        tls: Whether the nodes of its cluster use TLS between them.
    """

    def __init__(self, node: int, address: str, *, tls: bool = False) -> None:
        self.node = node
        self.address = address
        self.tls = tls


def start(
    *,
    token: bytes,
    amounts: dict[str, int],
    ip: str,
    head: HeadFacts | None = None,
    listen: str = "",
    name: str = "",
    labels: dict[str, str] | None = None,
    env_vars: dict[str, str] | None = None,
    stays: bool = False,
    findable: bool = False,
    private: bool = False,
    client: bool = False,
    records: str = "",
    standby: bool = False,
    temp_dir: str = "",
    tls: bool = False,
    spilling_directory: str | None = None,
    system_config: dict[str, object] | None = None,
    outbound_only: bool = False,
) -> NodeProcess:
    """Starts a node and waits until it serves.

    Args:
        token: The cluster's: 32 bytes.
        amounts: What it has, in wire units; see `resources.node_resources`.
        ip: What it calls itself, and where other nodes reach it.
        head: Whom it joins; None for a head.
        listen: What it listens on for other nodes, "host:port"; empty for a cluster of one node.
        name: For people.
        labels: For label selectors.
        env_vars: Variables of all its workers.
        stays: Whether it stays when this process ends.
        findable: Whether drivers of this user find it on this machine.
        private: The same, but only by its address.
        client: Whether it is only there for a driver outside of the cluster.
        records: Where a head keeps what must outlive it, such as "sqlite:///path"; empty: nowhere.
        standby: Whether a head waits, before it serves, until no other one leads with these records.
        temp_dir: Where its session directory lies, instead of among this user's others.
        tls: Whether a head wants TLS between the nodes of its cluster; who joins does as its head.
        spilling_directory: Where it spills values to; None: as the environment says, or into the session directory.
        system_config: Ray's name for settings that are otherwise variables of the environment; those of spilling.
        outbound_only: Whether a node that joins connects outwards only, and is reached through its head.

    Raises:
        ValueError: If no node can be like that, or the environment wants a memory watch or spilling that makes no
            sense.
        RuntimeError: If it does not start, with its own words and the end of its log.
    """
    from ray import _core
    from ray._node import launch
    from ray._node.config import NodeConfig, read_memory_settings, session_of
    from ray._node.spill_settings import as_environment, read_spill_settings
    from ray._runtime.resources import gpu_ids

    nodes_dir = ""
    if temp_dir:
        from ray._node import registry

        nodes_dir = registry.directory()  # the node is found where all others are, wherever its directory lies
    cwd = current_directory()
    amounts = dict(amounts)
    if not client:
        amounts.setdefault(f"node:{ip}", 10_000)
        if head is None:
            amounts.setdefault(HEAD_RESOURCE, 10_000)
    config = NodeConfig(
        session_dir="",  # made by the launcher
        session=session_of(token),
        token=token,
        node=_core.random_id(),
        resources=amounts,
        gpu_ids=gpu_ids(amounts.get("GPU", 0) // 10_000),
        object_store_memory=amounts["object_store_memory"] // 10_000,
        sys_path=[entry or cwd for entry in sys.path],
        cwd=cwd,
        preload=[module for module in PRELOADS if module in sys.modules],
        env_vars=env_vars or {},
        labels=labels or {},
        hostname=os.uname().nodename,
        name=name,
        address=ip,
        listen="" if outbound_only else listen,
        outbound_only=outbound_only,
        tls=head.tls if head is not None else tls,
        findable=findable,
        private=private,
        nodes_dir=nodes_dir,
        client=client,
        records=records,
        standby=standby,
        head_node=head.node if head is not None else 0,
        head_address=head.address if head is not None else "",
        memory=read_memory_settings(os.environ),
        spilling=read_spill_settings(spilling_directory, {**os.environ, **as_environment(system_config or {})}),
    )
    return launch.start_local_node(config, stays=stays, temp_dir=temp_dir)


def current_directory() -> str:
    """Where this program runs.

    Raises:
        RuntimeError: If that directory is gone.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        message = (
            "The current directory of this program has been deleted, and workers are to run in it: change to one that "
            "exists (os.chdir) before ray.init()"
        )
        raise RuntimeError(message) from None


def join(core: Any, address: str, token: bytes, node: int, role: int = 0) -> Any:
    """A core of this process on a node of this machine.

    Args:
        core: The native module.
        address: The path of the node's socket.
        token: The cluster's.
        node: The node's key.
        role: What this process is; a driver by default.

    Raises:
        ValueError: If `RAY_task_oom_retries` is not a whole number.
    """
    from ray._node.config import session_of
    from ray._runtime import session

    return core.Core(
        address=address,
        session=session_of(token),
        token=token,
        node=node,
        proc=core.random_id(),
        role=role or core.ROLE_DRIVER,
        hooks=session.hooks(),
        task_oom_retries=session.task_oom_retries(),
    )
