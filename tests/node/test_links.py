"""Links between node processes: `NodeCore` with a TCP port, and `discover`."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray import _core
from ray import _protocol as p

TOKEN = bytes(range(32))
HELLO = 200
"""A kind that the transport does not know: what it means is the receiver's affair."""


class Node:
    """A node process's transport without a node manager, and the events that it has seen."""

    def __init__(
        self, directory: Path, listen: str | None, token: bytes = TOKEN, *, tls: bool = False, relays: bool = False
    ) -> None:
        self.key = _core.random_id()
        session = hashlib.sha256(token).digest()[:16]
        path = str(directory / f"{self.key:x}.sock")
        self.core = _core.NodeCore(
            path=path, session=session, token=token, node=self.key, listen=listen, tls=tls, relays=relays
        )
        self.events: list[tuple[Any, ...]] = []

    def wait(self, kind: str, count: int = 1) -> list[tuple[Any, ...]]:
        """The events of one kind, once there are so many."""
        deadline = time.monotonic() + 20
        while True:
            found = [event[1:] for event in self.events if event[0] == kind]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"only {self.events}"
            self.events += self.core.poll(deadline - time.monotonic())

    @property
    def address(self) -> str:
        address = self.core.address()
        assert address is not None
        return address


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    made = [Node(tmp_path, "127.0.0.1:0") for _ in range(2)]
    yield made
    for node in made:
        node.core.close()


def test_frames_to_another_node_connect_by_themselves_and_both_sides_see_the_end(nodes):
    one, other = nodes
    one.core.set_node_address(other.key, other.address)
    one.core.send(other.key, HELLO, 1, b"first")
    one.core.send(other.key, HELLO, 2, b"second")
    assert other.wait("frame", 2) == [(one.key, HELLO, 1, b"first"), (one.key, HELLO, 2, b"second")]
    assert other.wait("joined") == [(one.key, p.ROLE_NODE, os.getpid())]
    other.core.send(one.key, HELLO, 3, b"back")
    assert one.wait("frame") == [(other.key, HELLO, 3, b"back")]
    one.core.disconnect(other.key)
    assert other.wait("left")[0][0] == one.key
    assert one.wait("left")[0][0] == other.key
    one.core.send(other.key, HELLO, 4, b"again")
    assert other.wait("frame", 3)[2] == (one.key, HELLO, 4, b"again")
    other.core.close()
    assert one.wait("left", 2)[1][0] == other.key


def test_a_forgotten_node_is_not_connected_to_and_the_cause_is_told(nodes):
    one, other = nodes
    one.core.forget_node(other.key, "it missed 5 heartbeats")
    one.core.send(other.key, HELLO, 1, b"")
    [(key, reason, ended)] = one.wait("left")
    assert not ended
    assert key == other.key
    assert "it missed 5 heartbeats" in reason
    one.core.set_node_address(other.key, other.address)
    one.core.send(other.key, HELLO, 2, b"")
    assert other.wait("frame")[0][2] == 2


def test_a_node_of_another_cluster_is_refused(nodes, tmp_path):
    stranger = Node(tmp_path, "127.0.0.1:0", token=bytes(32))
    try:
        stranger.core.set_node_address(nodes[0].key, nodes[0].address)
        stranger.core.send(nodes[0].key, HELLO, 1, b"")
        assert "another session" in stranger.wait("left")[0][1]
        assert nodes[0].core.poll(0.0) == []
    finally:
        stranger.core.close()


def test_where_a_node_listens(tmp_path):
    alone = Node(tmp_path, None)
    assert alone.core.address() is None
    alone.core.close()
    six = Node(tmp_path, "[::1]:0") if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() else None
    if six is not None:
        assert six.address.startswith("[::1]:")
        assert _core.discover(six.address, TOKEN, 20.0)[0] == six.key
        six.core.close()
    first = Node(tmp_path, "localhost:0")
    with pytest.raises(OSError, match=rf'cannot listen at "{first.address}"'):
        Node(tmp_path, first.address)
    address = first.address
    first.core.close()
    again = Node(tmp_path, address)
    assert again.address == address
    again.core.close()
    for malformed in ("somewhere", "127.0.0.1:port", ":"):
        with pytest.raises(OSError, match="cannot listen at"):
            Node(tmp_path, malformed)


def test_addresses_and_keys_are_checked_at_the_call(nodes):
    one, other = nodes
    with pytest.raises(ValueError, match='"localhost:1" is not of the form ip:port'):
        one.core.set_node_address(other.key, "localhost:1")
    for key in (0, one.key):
        with pytest.raises(ValueError, match="is not another node's key"):
            one.core.set_node_address(key, other.address)
        with pytest.raises(ValueError, match="is not another node's key"):
            one.core.forget_node(key, "")


def test_whoever_listens_is_discovered_and_does_not_notice(nodes):
    node = nodes[0]
    assert _core.discover(node.address, TOKEN, 20.0) == (node.key, os.getpid(), sys.version_info.minor, False)
    assert node.core.poll(0.0) == []
    with pytest.raises(PermissionError, match="the token is not this cluster's"):
        _core.discover(node.address, bytes(32), 20.0)


def test_discovering_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="is not of the form host:port"):
        _core.discover("somewhere", TOKEN, 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TimeoutError, match=f"{address} did not answer in time"):
            _core.discover(address, TOKEN, 0.05)
    with pytest.raises(ConnectionError, match=rf"no node could be reached at {address}: .*refused"):
        _core.discover(address, TOKEN, 20.0)


def test_a_signal_ends_the_wait_for_an_answer():
    def leave(signum: int, frame: object) -> None:
        raise InterruptedError("enough")

    former = signal.signal(signal.SIGALRM, leave)
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            # Again and again: the first may come before the wait begins.
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            with pytest.raises(InterruptedError, match="enough"):
                _core.discover(f"127.0.0.1:{silent.getsockname()[1]}", TOKEN, 20.0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_nodes_with_tls_find_each_other_and_refuse_those_without(tmp_path):
    secured = [Node(tmp_path, "127.0.0.1:0", tls=True) for _ in range(2)]
    plain = Node(tmp_path, "127.0.0.1:0")
    try:
        assert _core.discover(secured[0].address, TOKEN, 20.0) == (
            secured[0].key,
            os.getpid(),
            sys.version_info.minor,
            True,
        )
        secured[0].core.set_node_address(secured[1].key, secured[1].address)
        secured[0].core.send(secured[1].key, HELLO, 1, b"hello")
        assert secured[1].wait("frame") == [(secured[0].key, HELLO, 1, b"hello")]
        for one, other, words in [(plain, secured[0], "the cluster's nodes use TLS"), (secured[0], plain, "do not")]:
            one.core.set_node_address(other.key, other.address)
            one.core.send(other.key, HELLO, 1, b"hello")
            ((key, why, ended),) = one.wait("left")
            assert (key, ended) == (other.key, False)
            assert words in why
            wanted = one is secured[0]
            with pytest.raises(ConnectionError, match="--tls"):
                _core.discover(other.address, TOKEN, 20.0, wanted)
    finally:
        for node in (*secured, plain):
            node.core.close()


@pytest.mark.parametrize("tls", [False, True])
def test_a_node_that_listens_nowhere_is_reached_through_one_that_passes_on(tmp_path, tls):
    head = Node(tmp_path, "127.0.0.1:0", tls=tls, relays=True)
    behind, other = Node(tmp_path, None, tls=tls), Node(tmp_path, "127.0.0.1:0", tls=tls)
    try:
        behind.core.set_node_address(head.key, head.address)
        other.core.set_node_address(behind.key, head.address, relayed=True)
        other.core.send(behind.key, HELLO, 1, b"who is there")
        ((ticket, wanted),) = head.wait("stranger")
        assert wanted == behind.key
        assert head.core.relayed() == (1, 0, 0)
        behind.core.call_back(head.key, ticket)
        assert behind.wait("frame") == [(other.key, HELLO, 1, b"who is there")]
        behind.core.send(other.key, HELLO, 2, b"I am")
        assert other.wait("frame") == [(behind.key, HELLO, 2, b"I am")]
        waiting, pairs, passed_on = head.core.relayed()
        assert (waiting, pairs, passed_on > 0) == (0, 1, True)
        other.core.set_node_address(behind.key + 1, head.address, relayed=True)
        other.core.send(behind.key + 1, HELLO, 3, b"")
        head.core.refuse_stranger(head.wait("stranger", 2)[1][0])
        ((_, why, _),) = other.wait("left")
        assert "does not know process" in why
        with pytest.raises(ValueError, match="is not another node's key"):
            head.core.call_back(head.key, 1)
    finally:
        for node in (other, behind, head):
            node.core.close()
