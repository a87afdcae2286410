"""Starting a node by hand: from what was asked for to a node that serves, and to what people are told.

A node that listens for others listens on the address that it announces and on no other, so that a cluster is open to
the one network that its user meant; where that address is not this machine's own (behind a translation), on all of
them. In either case nobody gets in without the token.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

import click
import msgspec

from ray._node.config import address_of
from ray._runtime import joining, nodes
from ray._runtime import token as tokens
from ray._runtime.ids import NodeID
from ray._runtime.resources import node_resources
from ray.scripts import words

if TYPE_CHECKING:
    from ray._node.launch import NodeProcess

__all__ = ["Announced", "Asked", "announce", "labels_of", "run"]

DEFAULT_PORT: Final = 6379

UNSPECIFIED: Final = ("0.0.0.0", "::")
"""All addresses of a machine: to listen on, and not to be reached by."""

TOKEN_NAME: Final = "token"
"""The file in a head's session directory that has the token, and goes with it."""


class Asked(msgspec.Struct, kw_only=True):
    """The options of `ray start`, as they were given."""

    head: bool = False
    address: str | None = None
    port: int | None = None
    node_ip_address: str | None = None
    num_cpus: int | None = None
    num_gpus: int | None = None
    resources: str | None = None
    memory: int | None = None
    object_store_memory: int | None = None
    labels: str | None = None
    labels_file: str | None = None
    node_name: str | None = None
    temp_dir: str | None = None
    object_spilling_directory: str | None = None
    token: str | None = None
    token_file: str | None = None
    state: str | None = None
    standby: bool = False
    block: bool = False
    tls: bool = False
    outbound_only: bool = False


class Announced(msgspec.Struct):
    """Which address a node announces, why that one, and what it listens on; nothing if it only connects outwards."""

    ip: str
    why: str
    listen: str


def run(asked: Asked) -> int:
    """Starts the node, and says so; with `--block`, stays until it ends. Returns the exit status.

    Raises:
        click.UsageError: If the options do not fit together.
        ValueError, ConnectionError, RuntimeError, OSError: If there can be no such node; the text says why.
    """
    if asked.head == (asked.address is not None):
        both = "not both" if asked.head else "and neither was given"
        message = f"'ray start' makes a new cluster with --head, or joins one with --address=HOST:PORT, {both}"
        raise click.UsageError(message)
    if asked.token is not None and asked.token_file is not None:
        message = "--token and --token-file say the same thing: give one of them"
        raise click.UsageError(message)
    if asked.standby and not (asked.head and asked.state):
        message = "--standby is for a head that shares its --state with the one that leads"
        raise click.UsageError(message)
    if asked.state and not asked.head and asked.state != os.environ.get("RAY_STATE"):
        message = "--state is for heads: other nodes keep nothing"
        raise click.UsageError(message)
    if asked.outbound_only and asked.head:
        message = "--outbound-only is for nodes that join: others reach them through the head, which must be reachable"
        raise click.UsageError(message)
    if asked.outbound_only and asked.port is not None:
        message = "--port is of no use with --outbound-only: such a node listens for nobody"
        raise click.UsageError(message)
    node, text = _start_head(asked) if asked.head else _start_joiner(asked)
    click.echo(text)
    if not asked.block:
        return 0
    from ray.scripts.staying import stay

    return stay(node)


def _start_head(asked: Asked) -> tuple[NodeProcess, str]:
    found = _given_token(asked) or tokens.locate() or _kept_token(asked.state)
    token, source = found or (os.urandom(tokens.TOKEN_BYTES), "")
    if found is None and asked.state:
        _keep_token(asked.state, token)
    port = DEFAULT_PORT if asked.port is None else asked.port
    announced = announce(asked.node_ip_address, None)
    try:
        node = _start(asked, token, None, announced, port)
    except RuntimeError as error:
        raise _explained(error, announced, port) from None
    try:
        path = f"{node.session_dir}/{TOKEN_NAME}"
        tokens.write_file(path, token)
    except OSError:
        node.close()
        raise
    return node, words.head_started(
        node,
        node_id=NodeID._from_key(node.node).hex(),
        why=announced.why,
        is_everywhere=announced.listen != announced.ip,
        token_file=path,
        token_source=source,
        any_port=asked.port == 0,
        tls=asked.tls or joining.wants_tls(),
    )


def _start_joiner(asked: Asked) -> tuple[NodeProcess, str]:
    address = joining.choose_running(asked.address)
    record = joining.find(address)
    if record is not None:
        address = record.head_address
    found = _given_token(asked)
    token = found[0] if found is not None else record.token if record is not None else tokens.find()
    if token is None:
        message = (
            f"the cluster at {address} takes nobody without its token, and none was given. 'ray start --head' said "
            "where it is: copy that file here, and pass it by --token-file, or by the environment variable "
            f"{tokens.PATH_VARIABLE}"
        )
        raise ConnectionError(message)
    head = joining.reach(address, token, needs_tls=asked.tls)
    if asked.outbound_only or (asked.port is None and joining.wants_outbound_only()):
        ip = _number_of(asked.node_ip_address) if asked.node_ip_address else joining.own_ip(head.address)
        node = _start(asked, token, head, Announced(ip, "", ""), 0)
        return node, words.joined_outbound(
            node, node_id=NodeID._from_key(node.node).hex(), head_address=head.address, tls=head.tls
        )
    announced = announce(asked.node_ip_address, head.address)
    port = asked.port or 0
    try:
        node = _start(asked, token, head, announced, port)
    except RuntimeError as error:
        raise _explained(error, announced, port) from None
    return node, words.joined(
        node,
        node_id=NodeID._from_key(node.node).hex(),
        head_address=head.address,
        why=announced.why,
        is_everywhere=announced.listen != announced.ip,
        tls=head.tls,
    )


def _start(asked: Asked, token: bytes, head: nodes.HeadFacts | None, announced: Announced, port: int) -> NodeProcess:
    return nodes.start(
        token=token,
        amounts=_amounts(asked),
        ip=announced.ip,
        head=head,
        listen=address_of(announced.listen, port) if announced.listen else "",
        outbound_only=not announced.listen,
        name=asked.node_name or "",
        labels=labels_of(asked.labels, asked.labels_file),
        stays=not asked.block,
        records=(asked.state or "") if head is None else "",
        standby=asked.standby,
        findable=True,
        temp_dir=os.path.abspath(asked.temp_dir) if asked.temp_dir else "",
        tls=asked.tls or joining.wants_tls(),
        spilling_directory=asked.object_spilling_directory,
    )


def _amounts(asked: Asked) -> dict[str, int]:
    resources: dict[str, float] = {}
    if asked.resources:
        try:
            resources = msgspec.json.decode(asked.resources, type=dict[str, float])
        except msgspec.MsgspecError as error:
            message = f"""--resources is to be JSON such as '{{"special": 2}}', not {asked.resources!r}: {error}"""
            raise ValueError(message) from None
    return node_resources(
        asked.num_cpus, asked.num_gpus, resources, asked.object_store_memory, asked.memory, caller="ray start"
    )


def _given_token(asked: Asked) -> tuple[bytes, str] | None:
    """The token on the command line, and where it is from."""
    if asked.token is not None:
        return tokens.parse(asked.token, "--token"), "--token"
    if asked.token_file is not None:
        return tokens.read_file(asked.token_file), asked.token_file
    return None


SQLITE: Final = "sqlite://"


def _kept_token(state: str | None) -> tuple[bytes, str] | None:
    """The token of the head before, which lies beside its state."""
    if not state or not state.startswith(SQLITE):
        return None
    path = _token_path(state)
    return (tokens.read_file(path), path) if os.path.exists(path) else None


def _keep_token(state: str, token: bytes) -> None:
    """Lay the token beside the state, for the next head: nodes that come back know no other.

    Raises:
        ValueError: If the state is on a server, where a token must not lie.
    """
    if not state.startswith(SQLITE):
        message = (
            "a head whose state is on a server needs a token that outlives it, or the nodes of its cluster cannot come "
            "back to the next one: make one with 'ray get-auth-token --generate', and give it to every head and node "
            f"by {tokens.PATH_VARIABLE} or --token-file"
        )
        raise ValueError(message)
    tokens.write_file(_token_path(state), token)


def _token_path(state: str) -> str:
    return state.removeprefix(SQLITE).partition("?")[0] + ".token"


def labels_of(text: str | None, file: str | None) -> dict[str, str]:
    """Labels from "k=v,k=v" and from a file with a mapping; the text has the last word.

    Raises:
        ValueError: If they are not of that form, or the file cannot be read.
    """
    labels = _labels_in(file) if file else {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not key:
            message = f"--labels has {part.strip()!r}: labels are written KEY=VALUE, with commas between them"
            raise ValueError(message)
        labels[key] = value
    return labels


def _labels_in(file: str) -> dict[str, str]:
    try:
        with open(file, "rb") as opened:
            content = opened.read()
    except OSError as error:
        message = f"--labels-file {file} cannot be read: {error.strerror}"
        raise ValueError(message) from None
    try:
        return msgspec.json.decode(content, type=dict[str, str])
    except msgspec.MsgspecError:
        pass  # YAML, then
    try:
        return msgspec.yaml.decode(content, type=dict[str, str])
    except ImportError:
        message = f"--labels-file {file} is no JSON; for YAML, install pyyaml"
    except msgspec.MsgspecError as error:
        message = f"--labels-file {file} is to be a mapping of texts to texts, in JSON or YAML: {error}"
    raise ValueError(message)


# --- addresses -----------------------------------------------------------------------------------------------------


def announce(asked: str | None, head_address: str | None) -> Announced:
    """Where a node is to be reached.

    Args:
        asked: What the user wants.
        head_address: The head that is joined; None for a head.

    Raises:
        ValueError: If the name that the user gave is not known, or is nobody's address.
    """
    if asked is not None:
        ip = _number_of(asked)
        if ip in UNSPECIFIED:
            message = (
                f"--node-ip-address {asked} leads nowhere: give the address by which other machines reach this one"
            )
            raise ValueError(message)
        if is_own(ip):
            return Announced(ip, "It was given by --node-ip-address.", ip)
        why = "It was given by --node-ip-address, and is not an address of this machine itself."
        return Announced(ip, why, UNSPECIFIED[":" in ip])
    if head_address is not None:
        ip = joining.own_ip(head_address)
        return Announced(ip, "By it this machine reaches the head; --node-ip-address announces another.", ip)
    primary = joining.primary_ip()
    if primary is not None:
        why = "By it this machine reaches others; --node-ip-address announces another."
        return Announced(primary, why, primary)
    why = "This machine has no route to others, so none can join; --node-ip-address announces another."
    return Announced("127.0.0.1", why, "127.0.0.1")


def _number_of(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        message = f"--node-ip-address {host} is no address, nor the name of one: {error.strerror}"
        raise ValueError(message) from None


def is_own(ip: str) -> bool:
    """Whether this machine can listen on that address."""
    try:
        with _socket_for(ip, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True


def _socket_for(ip: str, kind: socket.SocketKind) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)


def _explained(error: RuntimeError, announced: Announced, port: int) -> Exception:
    """What to tell of a node that did not start: a port that is taken is the usual cause."""
    if not port or not _is_taken(announced.listen, port):
        return error
    address = address_of(announced.ip, port)
    record = joining.find(address)
    whose = f"your own node (process {record.pid}; 'ray stop' ends it)" if record is not None else "another program"
    return ConnectionError(
        f"port {port} of {announced.ip} is taken by {whose}: choose another with --port, or let the system do so with "
        "--port=0"
    )


def _is_taken(ip: str, port: int) -> bool:
    import errno

    try:
        with _socket_for(ip, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((ip, port))
            probe.listen(1)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
