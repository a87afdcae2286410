"""Clusters of several nodes on one machine, for tests of programs that will run on many.

Example:
    >>> from ray.cluster_utils import Cluster
    >>> cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    >>> node = cluster.add_node(num_cpus=2)
    >>> context = cluster.connect()
    >>> ray.cluster_resources()["CPU"]
    3.0
    >>> ray.shutdown()
    >>> cluster.shutdown()
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._node.launch import NodeProcess
    from ray._runtime.local import RayContext

__all__ = ["Cluster"]

HOST = "127.0.0.1"
LOOK_AGAIN_S = 0.01

_ARGUMENTS = (
    "num_cpus", "num_gpus", "resources", "object_store_memory", "memory", "labels", "node_name", "node_ip_address",
    "env_vars", "object_spilling_directory", "outbound_only",
)  # fmt: skip
_IGNORED = ("include_dashboard", "dashboard_port", "redis_port", "port", "num_redis_shards", "dashboard_host")


class Node:
    """A node of a `Cluster`: a process of its own on this machine.

    Attributes:
        node_id: Its id, in hexadecimal.
        node_ip_address: What it calls itself.
        address: Where other nodes reach it, "host:port"; empty if only through the head.
        session_dir: Its directory, with its logs.
        pid: Its process.
    """

    def __init__(self, process: NodeProcess, ip: str) -> None:
        from ray._runtime.ids import NodeID

        self._process = process
        self.node_id = NodeID._from_key(process.node).hex()
        self.unique_id = self.node_id
        self.node_ip_address = ip
        self.address = process.tcp_address
        self.session_dir = process.session_dir
        self.raylet_socket_name = process.address
        self.pid = process.pid

    def kill(self) -> None:
        """Ends the process as a crash would; what that leaves in files is removed."""
        from ray._node import registry, session

        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.kill(self.pid, signal.SIGKILL)
        self._process.close()
        session.remove(self.session_dir)
        registry.running()  # which forgets those that do not run

    def stop(self) -> None:
        """Lets the process end in order."""
        self._process.close()

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def __repr__(self) -> str:
        return f"Node({self.node_id[:16]}, {self.address}, pid {self.pid})"


class Cluster:
    """Several nodes on this machine.

    Args:
        initialize_head: Start a head at once.
        connect: Make this process a driver of the cluster, too.
        head_node_args: Arguments of `add_node` for the head.
        shutdown_at_exit: End all nodes when this process ends in order. (They end with it in any case.)
        tls: Whether the nodes use TLS between them; by default what the environment variable `RAY_USE_TLS` says.
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        shutdown_at_exit: bool = True,
        *,
        tls: bool | None = None,
    ) -> None:
        self.head_node: Node | None = None
        self.worker_nodes: set[Node] = set()
        self.connected = False
        self._token = os.urandom(32)
        self._tls = tls
        if connect and not initialize_head:
            message = "Cluster(connect=True) needs initialize_head=True: there is nothing to connect to yet"
            raise RuntimeError(message)
        if shutdown_at_exit:
            atexit.register(self.shutdown)
        if initialize_head:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()

    @property
    def address(self) -> str:
        """Where the cluster is joined, "host:port"; empty without a head."""
        return self.head_node.address if self.head_node is not None else ""

    @property
    def gcs_address(self) -> str:
        """The same: one port serves for everything."""
        return self.address

    def connect(self, namespace: str | None = None) -> RayContext:
        """Makes this process a driver of the cluster."""
        import ray

        if self.head_node is None:
            message = "the cluster has no head yet: call add_node() first"
            raise RuntimeError(message)
        context = ray.init(self.address, namespace=namespace, ignore_reinit_error=True)
        self.connected = True
        return context

    def add_node(self, wait: bool = True, **node_args: Any) -> Node:
        """Starts a node; the first one is the head.

        Args:
            wait: Return only when the node is part of the cluster; a node that cannot be is an error at once.
            node_args: `num_cpus`, `num_gpus`, `resources`, `memory`, `object_store_memory`, `labels`, `node_name`,
                `node_ip_address`, `env_vars` and `object_spilling_directory`, as in `ray.init`; by default one CPU and
                150 MB of object store.
                With `outbound_only=True` a node listens for nobody and is reached through the head, as with
                `ray start --outbound-only`.

        Raises:
            TypeError: If an argument is unknown.
            ValueError: If the head is to connect outwards only.
            RuntimeError: If the node does not start.
        """
        from ray._runtime import joining, nodes
        from ray._runtime.labels import check_labels
        from ray._runtime.resources import node_resources

        unknown = sorted(name for name in node_args if name not in (*_ARGUMENTS, *_IGNORED) and name[0] != "_")
        if unknown:
            message = f"Cluster.add_node() has no argument {', '.join(map(repr, unknown))}"
            raise TypeError(message)
        amounts = node_resources(
            node_args.get("num_cpus", 1),
            node_args.get("num_gpus", 0),
            node_args.get("resources"),
            node_args.get("object_store_memory", 150 << 20),
            node_args.get("memory"),
            caller="Cluster.add_node()",
        )
        head = self.head_node
        tls = joining.wants_tls() if self._tls is None else self._tls
        ip = node_args.get("node_ip_address") or HOST
        process = nodes.start(
            token=self._token,
            amounts=amounts,
            ip=ip,
            head=nodes.HeadFacts(head._process.node, head.address, tls=tls) if head is not None else None,
            listen=f"{ip}:0",
            name=node_args.get("node_name") or "",
            labels=check_labels(node_args.get("labels"), "Cluster.add_node()"),
            env_vars=node_args.get("env_vars"),
            spilling_directory=node_args.get("object_spilling_directory"),
            findable=True,
            private=True,
            tls=tls,
            outbound_only=bool(node_args.get("outbound_only")),
        )
        node = Node(process, ip)
        if head is None:
            self.head_node = node
        else:
            self.worker_nodes.add(node)
        return node

    def remove_node(self, node: Node, allow_graceful: bool = True) -> None:
        """Ends a node, with everything on it.

        Args:
            node: One that `add_node` has returned.
            allow_graceful: Let it end in order; otherwise it is killed.

        Raises:
            ValueError: If it is none of this cluster's, or the head beside other nodes.
        """
        if node is self.head_node:
            if self.worker_nodes:
                message = "the head can only be removed last, by Cluster.shutdown()"
                raise ValueError(message)
            self.head_node = None
        elif node in self.worker_nodes:
            self.worker_nodes.remove(node)
        else:
            message = f"{node} is no node of this cluster"
            raise ValueError(message)
        if allow_graceful:
            node.stop()
        else:
            node.kill()

    def list_all_nodes(self) -> list[Node]:
        """All nodes that were added and not removed, the head first."""
        return [*([self.head_node] if self.head_node is not None else []), *self.worker_nodes]

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Waits until the cluster knows of exactly the nodes that were added and not removed. Needs a driver.

        Raises:
            TimeoutError: If it does not within `timeout` seconds.
        """
        import ray

        expected = {node.node_id for node in self.list_all_nodes()}
        deadline = time.monotonic() + timeout
        while True:
            living = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if living == expected:
                return
            if time.monotonic() > deadline:
                message = (
                    f"after {timeout} s the cluster has {len(living)} nodes instead of {len(expected)}: "
                    f"{len(expected - living)} are missing, {len(living - expected)} have not gone"
                )
                raise TimeoutError(message)
            time.sleep(LOOK_AGAIN_S)

    def remaining_processes_alive(self) -> bool:
        """Whether every node that was added and not removed still runs."""
        return all(node.is_alive() for node in self.list_all_nodes())

    def shutdown(self) -> None:
        """Ends all nodes, the head last."""
        atexit.unregister(self.shutdown)
        for node in list(self.worker_nodes):
            self.remove_node(node)
        if self.head_node is not None:
            self.remove_node(self.head_node)
