"""A stand-in for the native transport: the same events and frames over a real Unix socket, without authentication.

`NodeCore` has the interface of `ray._core.NodeCore`. `Peer` is the other side: a driver's or worker's core
as far as its node can see.
"""

from __future__ import annotations

import array
import collections
import contextlib
import fcntl
import os
import select
import socket
import struct

ROLE_NODE, ROLE_DRIVER, ROLE_WORKER = 1, 2, 3
HEADER = struct.Struct("<IBBHQ")
HELLO = struct.Struct("<QBI")


class ObjectRef:
    """Only its name is needed, by the package's front page."""


def random_id() -> int:
    return int.from_bytes(os.urandom(8), "little") or 1


def memfd(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class Channel:
    """Frames on one connection. Blocking writes; reads take what is there."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.buffer = b""
        self.fds: collections.deque[int] = collections.deque()
        self.closed = False

    def write(self, kind: int, corr: int, body: bytes, fd: int = -1) -> None:
        frame = HEADER.pack(len(body), kind, int(fd >= 0), 0, corr) + body
        try:
            if fd >= 0:
                sent = socket.send_fds(self.socket, [frame], [fd])
                frame = frame[sent:]
            self.socket.sendall(frame)
        except OSError:
            self.closed = True

    def read(self) -> list[tuple[int, int, bytes, int]]:
        """Frames as (kind, corr, body, fd or -1)."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(1 << 16, socket.CMSG_SPACE(64))
        except OSError:
            data, ancillary = b"", []
        for _, _, packed in ancillary:
            fds = array.array("i")
            fds.frombytes(packed)
            self.fds.extend(fds)
        self.closed = self.closed or not data
        self.buffer += data
        frames = []
        while len(self.buffer) >= HEADER.size:
            size, kind, flags, _, corr = HEADER.unpack_from(self.buffer)
            if len(self.buffer) < HEADER.size + size:
                break
            body = self.buffer[HEADER.size : HEADER.size + size]
            self.buffer = self.buffer[HEADER.size + size :]
            frames.append((kind, corr, body, self.fds.popleft() if flags & 1 else -1))
        return frames


class NodeCore:
    def __init__(
        self,
        *,
        path: str,
        session: bytes,
        token: bytes,
        node: int,
        listen: str | None = None,
        tls: bool = False,
        relays: bool = False,
    ) -> None:
        assert listen is None, "only the real one speaks with other nodes"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(128)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._channels: dict[int, Channel] = {}
        self._procs: dict[int, int] = {}
        self._by_proc: dict[int, Channel] = {}
        self._tokens: dict[int, int] = {}

    def address(self) -> str | None:
        return None

    def poll(self, timeout: float | None) -> list[tuple[object, ...]]:
        events: list[tuple[object, ...]] = []
        for fd, _ in self._epoll.poll(timeout):
            if fd == self._listener.fileno():
                connection, _ = self._listener.accept()
                self._channels[connection.fileno()] = Channel(connection)
                self._epoll.register(connection.fileno(), select.EPOLLIN)
            elif fd in self._tokens:
                events.append(("fd", self._tokens[fd]))
            elif fd in self._channels:
                events += self._read(fd)
        return events

    def _read(self, fd: int) -> list[tuple[object, ...]]:
        channel = self._channels[fd]
        events: list[tuple[object, ...]] = []
        for kind, corr, body, _ in channel.read():
            if kind == 0:
                proc, role, pid = HELLO.unpack(body)
                self._procs[fd], self._by_proc[proc] = proc, channel
                events.append(("joined", proc, role, pid))
            else:
                events.append(("frame", self._procs[fd], kind, corr, body))
        if channel.closed:
            proc = self._procs.pop(fd, 0)
            self._by_proc.pop(proc, None)
            del self._channels[fd]
            channel.socket.close()
            if proc:
                events.append(("left", proc, "closed", True))
        return events

    def send(self, proc: int, kind: int, corr: int, body: bytes) -> None:
        channel = self._by_proc.get(proc)
        if channel is not None:
            channel.write(kind, corr, body)

    def send_fd(self, proc: int, kind: int, corr: int, body: bytes, fd: int) -> None:
        channel = self._by_proc.get(proc)
        if channel is not None:
            channel.write(kind, corr, body, fd)

    def watch_fd(self, fd: int, token: int) -> None:
        self._tokens[fd] = token
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch_fd(self, token: int) -> None:
        for fd in [fd for fd, known in self._tokens.items() if known == token]:
            del self._tokens[fd]
            with contextlib.suppress(OSError):  # closed already
                self._epoll.unregister(fd)

    def disconnect(self, proc: int) -> None:
        channel = self._by_proc.get(proc)
        if channel is not None:
            channel.socket.shutdown(socket.SHUT_RDWR)

    def offer_segment(self, segment: int, fd: int, size: int, filled: int) -> None:
        """Nobody pulls from a stand-in."""

    def withdraw_segment(self, segment: int) -> bool:
        return True

    def close(self) -> None:
        self._listener.close()


class Peer:
    """A core as its node sees it."""

    def __init__(self, address: str, proc: int, role: int) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        self.proc = proc
        self.channel = Channel(connection)
        self.channel.write(0, 0, HELLO.pack(proc, role, os.getpid()))
        self._frames: collections.deque[tuple[int, int, bytes, int]] = collections.deque()

    def send(self, kind: int, body: bytes, corr: int = 0) -> None:
        self.channel.write(kind, corr, body)

    def receive(self, timeout: float = 10.0) -> tuple[int, int, bytes, int] | None:
        """The next frame; None when the connection has closed. Raises TimeoutError."""
        while not self._frames:
            if self.channel.closed:
                return None
            if not select.select([self.channel.socket], [], [], timeout)[0]:
                raise TimeoutError(f"nothing came within {timeout} seconds")
            self._frames.extend(self.channel.read())
        return self._frames.popleft()

    def close(self) -> None:
        self.channel.socket.close()
