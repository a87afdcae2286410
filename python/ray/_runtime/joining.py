"""Joining a cluster that runs already: finding it, and the node of this machine through which a driver takes part.

A driver always has a node on its own machine: its shared memory, its way to everybody else. Where none of the cluster
runs here, one without resources is started for the driver alone (a *client* node), and ends with it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from ray._runtime import token as tokens

if TYPE_CHECKING:
    from ray._node.launch import NodeProcess
    from ray._node.registry import Record

__all__ = ["Place", "choose", "find"]

ADDRESS_VARIABLE = "RAY_ADDRESS"
DISCOVER_S = 10.0  # how long a head may take to answer
CLIENT_STORE_BYTES = 256 << 20  # shared memory of a client node: its driver's large values, and copies of others'


class Place(msgspec.Struct):
    """A node of this machine to be a driver on.

    Attributes:
        node: Its key.
        socket: The path of its socket.
        session_dir: Its directory.
        token: The cluster's.
        head_address: Where the cluster is joined.
        ip: What the node calls itself.
        process: The node, if it was started for this driver and is to end with it.
    """

    node: int
    socket: str
    session_dir: str
    token: bytes
    head_address: str
    ip: str
    process: Any = None


def choose(address: str | None) -> str:
    """What `ray.init(address=...)` asks for: "local", or where a cluster is joined, as "host:port".

    Raises:
        TypeError, ValueError: If it is no address.
        ConnectionError: If a running cluster is asked for and none is found.
    """
    if address is not None and not isinstance(address, str):
        message = f"address must be a string or None, not {address!r}"
        raise TypeError(message)
    asked = address or None
    if asked in (None, "auto"):
        asked = os.environ.get(ADDRESS_VARIABLE) or asked
    if asked == "local":
        return "local"
    if asked in (None, "auto"):
        found = _latest()
        if found is not None:
            return found.head_address
        if asked is None:
            return "local"
        message = (
            "no running cluster was found on this machine: start one with 'ray start --head', or give its address "
            f"('HOST:PORT') here or in the environment variable {ADDRESS_VARIABLE}"
        )
        raise ConnectionError(message)
    return check_address(asked.removeprefix("ray://"))


def check_address(address: str) -> str:
    """`address`, if it is of the form "host:port".

    Raises:
        ValueError: If it is not.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        message = f"{address!r} is no address of a cluster: it has the form HOST:PORT, such as 10.0.0.1:6379"
        raise ValueError(message)
    return address


def _latest() -> Record | None:
    from ray._node import registry

    return next((record for record in registry.running() if not record.private), None)


def find(address: str) -> Record | None:
    """The node of this machine that belongs to the cluster which is joined at `address`; heads are preferred."""
    from ray._node import registry

    records = [x for x in registry.running() if is_same(x.head_address, address) or is_same(x.address, address)]
    records.sort(key=lambda record: not record.is_head)
    return records[0] if records else None


def is_same(one: str, other: str) -> bool:
    """Whether two addresses name one listener, as seen from this machine."""
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    if port != other_port or not port:
        return False
    return host == other_host or bool(_numbers(host) & _numbers(other_host))


def _numbers(host: str) -> set[str]:
    import socket

    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return set()


def enter(address: str) -> Place:
    """A node to be a driver on, in the cluster that is joined at `address`.

    Raises:
        ConnectionError: If there is no cluster, or it does not take this program.
        ValueError: If the token that the environment names is none.
    """
    record = find(address)
    if record is not None:
        ip = record.address.rpartition(":")[0] or "127.0.0.1"
        return Place(record.node, record.socket, record.session_dir, record.token, record.head_address, ip)
    return _start_client(address)


def discover(address: str, token: bytes) -> int:
    """The key of the node that listens at `address`.

    Raises:
        ConnectionError: If it does not answer, or is not of this version, or the token is not its cluster's.
    """
    from ray import _core

    try:
        node, _, _ = _core.discover(address, token, DISCOVER_S)
    except PermissionError as error:
        message = f"{error}. {TOKEN_REMEDY}"
        raise ConnectionError(message) from None
    except (TimeoutError, OSError) as error:
        message = f"the cluster at {address} cannot be joined: {error}"
        raise ConnectionError(message) from None
    return node


TOKEN_REMEDY = (
    f"The head wrote its token where 'ray start --head' said, and 'ray get-auth-token' prints it there: pass it by "
    f"the environment variable {tokens.VARIABLE}, or in a file that {tokens.PATH_VARIABLE} names"
)


def own_ip(towards: str) -> str:
    """The address of this machine as the peer at `towards` ("host:port") sees it, before any translation."""
    import socket

    host, _, port = towards.rpartition(":")
    family, _, _, _, peer = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect(peer)
        return str(probe.getsockname()[0])


def _start_client(address: str) -> Place:
    from ray._runtime import nodes

    token = tokens.find()
    if token is None:
        message = f"no node of the cluster at {address} runs on this machine, and no token is known. {TOKEN_REMEDY}"
        raise ConnectionError(message)
    head = nodes.HeadFacts(discover(address, token), address)
    ip = own_ip(address)
    process: NodeProcess = nodes.start(
        token=token,
        amounts={"object_store_memory": CLIENT_STORE_BYTES * 10_000},
        ip=ip,
        head=head,
        listen=f"{ip}:0",
        name="client",
        client=True,
    )
    return Place(process.node, process.address, process.session_dir, token, address, ip, process)
