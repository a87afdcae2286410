"""The node's end of the zygote: starting it, asking it for forks, noticing its death.

Owns the zygote's process id, its socket and what was asked and not yet reported. The first zygote is a
fork of the node itself, made before the node's core has any thread; later ones are started anew.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from _socket import socketpair  # the socket module's classes cost 2 ms of a node's start, and are not used
from typing import TYPE_CHECKING, Final

from ray._node import wire

if TYPE_CHECKING:
    from _socket import socket

    from ray._control.machine import Event

LOSSES_MAX: Final = 3
"""Zygotes lost in a row, without one fork between, after which forks fail instead of being repeated."""


class ForkServer:
    """A zygote that is there whenever it is needed."""

    def __init__(self, init: wire.Init) -> None:
        self._init = init
        self._unpacker = wire.Unpacker()
        self._asked: dict[int, None] = {}
        self._losses = 0
        self._unsafe: list[str] = []
        self._socket: socket | None = None
        self.pid = 0
        self.generation = 0
        """Counts the zygotes: when it changes, there is another socket to watch."""

    def fileno(self) -> int:
        """The socket; -1 while there is no zygote."""
        return self._socket.fileno() if self._socket is not None else -1

    def start_as_fork(self) -> None:
        """Fork the first zygote. This process must have one thread, and keep no descriptor that it must not share."""
        ours, theirs = socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                from ray._node import zygote

                zygote.main(theirs.fileno())
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        self._adopt(pid, ours)

    def start_as_process(self) -> None:
        """Start a zygote with an interpreter of its own: this process has threads by now."""
        ours, theirs = socketpair()
        fd = theirs.fileno()
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *interpreter_flags(), "-c", _BOOT, package_root(), str(fd)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd)],  # to itself: clears close-on-exec in the child only
            setsigmask=[],
            setsigdef=[signal.SIGCHLD, signal.SIGTERM],
        )
        theirs.close()
        self._adopt(pid, ours)

    def _adopt(self, pid: int, ours: socket) -> None:
        self.pid = pid
        self.generation += 1
        self._socket = ours
        self._unpacker = wire.Unpacker()
        fields = {name: getattr(self._init, name) for name in self._init.__struct_fields__}
        fields["preload"] = [name for name in self._init.preload if name not in self._unsafe]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead already: its socket will say so
            ours.sendall(wire.pack(wire.Init(**fields)))
        ours.setblocking(False)

    def fork(self, command: wire.ForkCommand) -> None:
        """Ask for a worker; the outcome comes with `read`."""
        if self._socket is None:
            self.start_as_process()
        self._asked[command.proc] = None
        assert self._socket is not None
        packed = wire.pack(command)
        try:
            sent = self._socket.send(packed)
        except (BrokenPipeError, ConnectionResetError):
            return  # its end is noticed on the socket, and the fork repeated
        except BlockingIOError:
            sent = 0
        if sent < len(packed):
            # It has not read a few hundred commands: it is stopped or stuck. Its end sets things right.
            os.kill(self.pid, signal.SIGKILL)

    def read(self) -> list[Event]:
        """Take what the zygote reports. On its death: what that means, with the next one started."""
        events: list[Event] = []
        while self._socket is not None:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return events
            except ConnectionResetError:
                data = b""
            if not data:
                events += self._lost()
                break
            for body in self._unpacker.feed(data):
                events += self._reported(wire.decode_report(body))
        return events

    def _reported(self, report: wire.Report) -> list[Event]:
        from ray._node.events import Forked, ForkFailed

        match report.what:
            case "forked":
                self._losses = 0
                self._asked.pop(report.proc, None)
                return [Forked(report.proc, report.pid)]
            case "failed":
                self._asked.pop(report.proc, None)
                return [ForkFailed(report.proc, report.text)]
            case "unsafe":
                self._unsafe.append(report.text)
                self._losses = 0
            case _:
                pass
        return []

    def _lost(self) -> list[Event]:
        from ray._node.events import ForkFailed, ZygoteLost

        assert self._socket is not None
        self._socket.close()
        self._socket = None
        self.pid = 0
        asked, self._asked = list(self._asked), {}
        self._losses += 1
        if self._losses > LOSSES_MAX:
            # It dies before it can fork: repeating would go on for ever. The next demand tries again.
            self._losses = 0
            text = f"the zygote died {LOSSES_MAX + 1} times in a row before it could fork; see the node's log"
            return [ForkFailed(proc, text) for proc in asked]
        self.start_as_process()
        return [ZygoteLost("its socket closed")]

    def kill(self) -> None:
        """Kill the zygote and start no other."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = 0


def interpreter_flags() -> list[str]:
    """The flags with which this interpreter runs, as far as they matter to user code."""
    flags = sys.flags
    options = ["-P"]  # what is importable is said explicitly, and never the current directory by itself
    options += ["-O"] * flags.optimize
    options += ["-E"] if flags.ignore_environment else []
    options += ["-s"] if flags.no_user_site else []
    options += ["-S"] if flags.no_site else []
    options += ["-B"] if flags.dont_write_bytecode else []
    return options


_BOOT: Final = "import sys; sys.path.insert(0, sys.argv[1]); from ray._node.zygote import main; main(int(sys.argv[2]))"


def package_root() -> str:
    """The directory from which this very package was imported."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(wire.__file__))))
