"""Messages between a node and its zygote: msgpack behind a length of four bytes, on a stream socket."""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec

FRAME_BYTES_MAX: Final = 16 << 20


class Init(msgspec.Struct, frozen=True):
    """The first message to a zygote. Everything but process ids and environments is in it."""

    node_pid: int
    address: str
    session: bytes
    token: bytes
    node: int
    log_dir: str
    worker_module: str
    sys_path: list[str]
    cwd: str
    env_vars: dict[str, str]
    preload: list[str]


class ForkCommand(msgspec.Struct, frozen=True, array_like=True, tag="fork"):
    """Make a worker. `sys_path` and `cwd` are of its job, if they differ from the zygote's."""

    proc: int
    env_vars: dict[str, str]
    sys_path: list[str] | None = None
    cwd: str | None = None


class GuardCommand(msgspec.Struct, frozen=True, array_like=True, tag="guard"):
    """Stop the guarded workers when this time of the monotonic clock has come and no later one was named."""

    until: float
    added: tuple[int, ...]
    gone: tuple[int, ...]


class Report(msgspec.Struct, frozen=True, array_like=True):
    """From the zygote. `what` is ready, forked (with the pid), failed or unsafe (with a text), or fenced."""

    what: str
    proc: int = 0
    pid: int = 0
    text: str = ""


def pack(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        msg = f"a message of {len(body)} bytes to the zygote; at most {FRAME_BYTES_MAX} are allowed"
        raise ValueError(msg)
    return len(body).to_bytes(4, "little") + body


class Unpacker:
    """Cuts a stream into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        bodies: list[bytes] = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if size > FRAME_BYTES_MAX:
                msg = f"a frame of {size} bytes on the zygote's socket"
                raise ValueError(msg)
            if len(self._buffer) < 4 + size:
                break
            bodies.append(bytes(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
        return bodies


def send_all(fd: int, data: bytes) -> None:
    """Write everything to a blocking descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def decode_init(body: bytes) -> Init:
    return msgspec.msgpack.decode(body, type=Init)


def decode_command(body: bytes) -> ForkCommand | GuardCommand:
    return msgspec.msgpack.decode(body, type=ForkCommand | GuardCommand)


def decode_report(body: bytes) -> Report:
    return msgspec.msgpack.decode(body, type=Report)


def decode_env(env: bytes) -> dict[str, str]:
    """The variables in a demand's environment.

    Raises:
        ValueError: If it is not of the agreed form.
    """
    if not env:
        return {}
    fields: dict[str, Any] = msgspec.msgpack.decode(env, type=dict[str, Any])
    return msgspec.convert(fields.get("env_vars") or {}, dict[str, str])
