"""Joining a cluster that runs already: finding it, and the node of this machine through which a driver takes part.

A driver always has a node on its own machine: its shared memory, its way to everybody else. Where none of the cluster
runs here, one without resources is started for the driver alone (a *client* node), and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from ray._runtime import token as tokens

if TYPE_CHECKING:
    from ray._node.launch import NodeProcess
    from ray._node.registry import Record
    from ray._runtime.nodes import HeadFacts

__all__ = [
    "Place", "choose", "choose_running", "discover", "enter", "find", "own_ip", "primary_ip", "reach",
    "wants_outbound_only", "wants_tls",
]  # fmt: skip

ADDRESS_VARIABLE = "RAY_ADDRESS"
TLS_VARIABLE = "RAY_USE_TLS"
OUTBOUND_VARIABLE = "RAY_OUTBOUND_ONLY"
DISCOVER_S = 10.0  # how long a head may take to answer
CANDIDATES_MAX = 8  # addresses of one host name that are tried; further ones are left out
ELSEWHERE = ("198.51.100.1", "2001:db8::1")  # reserved for documentation: any route to others leads there
CLIENT_STORE_BYTES = 256 << 20  # shared memory of a client node: its driver's large values, and copies of others'


class RefusedError(ConnectionError):
    """There is such a cluster, and it does not take this program."""


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


def wants_tls() -> bool:
    """Whether the environment asks for TLS between nodes: of a head that it has it, of others that they join no other.

    Raises:
        ValueError: If the variable is neither 0 nor 1.
    """
    return _is_set(TLS_VARIABLE)


def wants_outbound_only() -> bool:
    """Whether the environment asks that this machine only connects outwards, when it joins a cluster.

    Raises:
        ValueError: If the variable is neither 0 nor 1.
    """
    return _is_set(OUTBOUND_VARIABLE)


def _is_set(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value in ("", "0", "false"):
        return False
    if value in ("1", "true"):
        return True
    message = f"{variable}={value!r} is neither 0 nor 1"
    raise ValueError(message)


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


def choose_running(address: str | None) -> str:
    """The same for what needs a cluster that runs, and never starts one.

    Raises:
        TypeError, ValueError: If it is no address.
        ConnectionError: If none is found.
    """
    where = choose(address or "auto")
    if where == "local":
        message = f"{address or ADDRESS_VARIABLE} stands for no running cluster: give an address, as HOST:PORT"
        raise ConnectionError(message)
    return where


def check_address(address: str) -> str:
    """`address`, if it is of the form "host:port", or several of these with commas between them: of standbys, too.

    Raises:
        ValueError: If it is not.
    """
    for each in address.split(","):
        host, _, port = each.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            message = f"{each!r} is no address of a cluster: it has the form HOST:PORT, such as 10.0.0.1:6379"
            raise ValueError(message)
    return address


def _latest() -> Record | None:
    from ray._node import registry

    return next(iter(registry.public()), None)


def find(address: str) -> Record | None:
    """The node of this machine that belongs to the cluster which is joined at `address`; heads are preferred.

    "localhost:6379" also finds a head that listens at this port of another of this machine's addresses alone.
    """
    from ray._node import registry

    running = registry.running()
    records = [x for x in running if _is_any(x.head_address, address) or _is_any(x.address, address)]
    if not records and _is_loopback(address):
        port = address.rpartition(":")[2]
        records = [x for x in running if x.is_head and x.address.rpartition(":")[2] == port]
    records.sort(key=lambda record: not record.is_head)
    return records[0] if records else None


def _is_loopback(address: str) -> bool:
    return any(number == "::1" or number.startswith("127.") for number in _numbers(address.rpartition(":")[0]))


def _is_any(some: str, others: str) -> bool:
    """Whether two lists of addresses have one in common."""
    return any(is_same(one, other) for one in some.split(",") for other in others.split(","))


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
        _check_python(record.python, address)
        if wants_tls() and not record.tls:
            message = (
                f"the nodes of the cluster at {address} do not use TLS, which {TLS_VARIABLE} asks for: start its head "
                f"with --tls, or leave {TLS_VARIABLE} out here"
            )
            raise RefusedError(message)
        ip = record.address.rpartition(":")[0].strip("[]") or record.host or "127.0.0.1"
        return Place(record.node, record.socket, record.session_dir, record.token, record.head_address, ip)
    return _start_client(address)


def discover(address: str, token: bytes, timeout_s: float = DISCOVER_S, *, needs_tls: bool = False) -> HeadFacts:
    """The node that listens at `address`, which is a number.

    Whether there is TLS is learned from it. Nobody in the middle can pretend that there is none: a node of a cluster
    with TLS proves itself within TLS only.

    Args:
        address: "ip:port".
        token: The cluster's.
        timeout_s: How long it may take to answer.
        needs_tls: Refuse a cluster whose nodes do not use TLS.

    Raises:
        ConnectionError: If it does not answer, or is not of this version, or the token is not its cluster's.
    """
    from ray import _core
    from ray._runtime.nodes import HeadFacts

    try:
        node, _, minor, tls = _core.discover(address, token, timeout_s, needs_tls or None)
    except PermissionError as error:
        message = f"{error}. {TOKEN_REMEDY}"
        raise RefusedError(message) from None
    except (TimeoutError, OSError) as error:
        message = f"the cluster at {address} cannot be joined: {error}"
        raise ConnectionError(message) from None
    _check_python(f"3.{minor}", address)
    return HeadFacts(node, address, tls=tls)


def _check_python(theirs: str, address: str) -> None:
    """Refuses another minor version of Python, whose pickled functions this one could not run.

    Raises:
        ConnectionError: If it is another one.
    """
    ours = ".".join(map(str, sys.version_info[:3]))
    if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
        wanted = ".".join(theirs.split(".")[:2])
        message = (
            f"the cluster at {address} runs Python {theirs}, and this is Python {ours}: functions are exchanged as "
            f"code that only the same minor version can run. Use Python {wanted} here (its patch level may differ), or "
            "start the cluster with this Python"
        )
        raise RefusedError(message)


def reach(address: str, token: bytes, *, needs_tls: bool = False) -> HeadFacts:
    """The head at `address`, whose host may be a name; its own is a number, as the transport needs it.

    Of several addresses, with commas between them, the one that answers is the first of the result, and the others
    follow: that is where the next head may be found. With `needs_tls` a cluster whose nodes do not use TLS is refused;
    so it is if the environment asks for TLS.

    Raises:
        ConnectionError: If it does not answer, or is not of this version, or the token is not its cluster's.
    """
    needs_tls = needs_tls or wants_tls()
    candidates = [candidate for each in address.split(",") for candidate in _candidates(each)]
    several = "," in address
    first: ConnectionError | None = None
    for candidate in candidates:
        try:
            head = discover(candidate, token, DISCOVER_S / len(candidates), needs_tls=needs_tls)
            if several:
                head.address = ",".join([candidate, *(other for other in candidates if other != candidate)])
            return head
        except RefusedError:
            raise
        except ConnectionError as error:  # another of its addresses may be the one
            first = first or error
    assert first is not None  # there is at least one candidate
    raise first


def _candidates(address: str) -> list[str]:
    """What the host of an address stands for, with its port; the address itself if nobody knows."""
    import socket

    from ray._node.config import address_of

    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return [address]
    numbers = dict.fromkeys(str(info[4][0]) for info in found)
    return [address_of(number, int(port)) for number in numbers][:CANDIDATES_MAX]


TOKEN_REMEDY = (
    f"The head wrote its token where 'ray start --head' said, and 'ray get-auth-token' prints it there: pass it by "
    f"the environment variable {tokens.VARIABLE}, or in a file that {tokens.PATH_VARIABLE} names"
)


def own_ip(towards: str) -> str:
    """The address of this machine as the peer at `towards` ("host:port") sees it, before any translation."""
    import socket

    host, _, port = towards.partition(",")[0].rpartition(":")
    family, _, _, _, peer = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect(peer)
        return str(probe.getsockname()[0])


def primary_ip() -> str | None:
    """The address by which this machine reaches others; None if it has no way to any."""
    for elsewhere in ELSEWHERE:
        with contextlib.suppress(OSError):
            return own_ip(f"[{elsewhere}]:9")
    return None


def _start_client(address: str) -> Place:
    from ray._node.config import address_of
    from ray._runtime import nodes

    token = tokens.find()
    if token is None:
        message = f"no node of the cluster at {address} runs on this machine, and no token is known. {TOKEN_REMEDY}"
        raise ConnectionError(message)
    head = reach(address, token)
    ip = own_ip(head.address)
    process: NodeProcess = nodes.start(
        token=token,
        amounts={"object_store_memory": CLIENT_STORE_BYTES * 10_000},
        ip=ip,
        head=head,
        listen=address_of(ip, 0),
        name="client",
        client=True,
        outbound_only=wants_outbound_only(),
    )
    return Place(process.node, process.address, process.session_dir, token, address, ip, process)
