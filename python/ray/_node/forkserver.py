"""The node's end of the zygote: starting it, asking it for forks, noticing its death.

Owns the zygote's process id, its socket and what was asked and not yet reported. The first zygote is a
fork of the node itself, made before the node's core has any thread; later ones are started anew.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from _socket import socketpair  # the socket module's classes cost 2 ms of a node's start, and are not used
from typing import TYPE_CHECKING, Final

from ray._node import wire

if TYPE_CHECKING:
    from _socket import socket

    from ray._control.machine import Event

RESTART_PAUSES_S: Final = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
"""How long after each of several losses in a row, without one fork between, the next zygote is started. After one more
loss forks fail instead of being repeated."""

NOTICE_AFTER_S: Final = 10.0
"""A zygote that has left a command unanswered for so long is mentioned: it is stopped, or the machine is overloaded."""

REPLACE_AFTER_S: Final = 20.0
"""After this time it is killed, and another takes its place: before the third try of a worker's start is over."""


class ForkServer:
    """A zygote that is there whenever it is needed.

    Invariants: what is in `_asked` was reported by no zygote, and its command is on its way or in `_unsent`; without a
    zygote there is nothing in `_asked`, or a time to start one.
    """

    def __init__(self, init: wire.Init) -> None:
        self._init = init
        self._unpacker = wire.Unpacker()
        self._asked: dict[int, None] = {}
        self._unsent = bytearray()
        """Commands that the socket had no room for; an environment may be larger than its buffer."""
        self._heard_at = 0.0
        """When the zygote last said something, or was first asked after that."""
        self._noticed = False
        self._losses = 0
        self._start_at: float | None = None
        self._unsafe: list[str] = []
        self._guard_until = 0.0
        self._guarded: dict[int, None] = {}
        """Workers that the zygote stops when their time is over."""
        self._socket: socket | None = None
        self._poller: select.epoll | None = None
        """Readable when the socket is, or can be written to while something is unsent."""
        self.pid = 0
        self.generation = 0
        """Counts the zygotes: when it changes, there is another descriptor to watch."""

    def fileno(self) -> int:
        """A descriptor that is readable when `read` should be called; -1 while there is no zygote."""
        return self._poller.fileno() if self._poller is not None else -1

    def next_deadline(self) -> float | None:
        """When `on_deadline` should be called next, in seconds of the monotonic clock."""
        if self._start_at is not None or not self._asked:
            return self._start_at
        return self._heard_at + (REPLACE_AFTER_S if self._noticed else NOTICE_AFTER_S)

    def on_deadline(self) -> list[Event]:
        """Do what is due: start a zygote after a pause, mention or replace one that does not answer."""
        from ray._node.events import ForkServerSilent

        deadline, now = self.next_deadline(), time.monotonic()
        if deadline is None or deadline > now:
            return []
        if self._start_at is not None:
            self.start_as_process()
        elif self._noticed:
            os.kill(self.pid, signal.SIGKILL)  # its socket will say so, also if it was stopped
            self._heard_at = now
        else:
            self._noticed = True
            return [ForkServerSilent(self.pid, NOTICE_AFTER_S, REPLACE_AFTER_S)]
        return []

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
        self._start_at = None
        self._heard_at = time.monotonic()
        self._noticed = False
        self._unpacker = wire.Unpacker()
        self._poller = select.epoll()
        self._poller.register(ours, select.EPOLLIN)
        ours.setblocking(False)
        fields = {name: getattr(self._init, name) for name in self._init.__struct_fields__}
        fields["preload"] = [name for name in self._init.preload if name not in self._unsafe]
        guard = wire.GuardCommand(self._guard_until, tuple(self._guarded), ())
        self._unsent[:0] = wire.pack(wire.Init(**fields)) + (wire.pack(guard) if self._guarded else b"")
        self._send()

    def fork(self, command: wire.ForkCommand) -> None:
        """Ask for a worker; the outcome comes with `read`.

        Raises:
            ValueError: If the command is too long, which only an environment can be.
        """
        packed = wire.pack(command)
        if not self._asked:
            self._heard_at = time.monotonic()
        self._asked[command.proc] = None
        self._unsent += packed
        if self._socket is not None:
            self._send()
        elif self._start_at is None:
            self.start_as_process()

    def guard(self, until: float, added: tuple[int, ...], gone: tuple[int, ...]) -> None:
        """Have the zygote, whichever there is, stop workers if it hears of no later time."""
        self._guard_until = until
        self._guarded.update(dict.fromkeys(added))
        for pid in gone:
            self._guarded.pop(pid, None)
        if self._socket is not None:  # else the next one hears it first of all
            self._unsent += wire.pack(wire.GuardCommand(until, added, gone))
            self._send()

    def _send(self) -> None:
        """Write what there is room for; the poller tells when there is more."""
        assert self._socket is not None
        assert self._poller is not None
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self._unsent.clear()  # it is dead: that is read from its socket, and the forks repeated
        self._poller.modify(self._socket, select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))

    def read(self) -> list[Event]:
        """Take what the zygote reports. On its death: what that means, with the next one started."""
        events: list[Event] = []
        if self._socket is not None and self._unsent:
            self._send()
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
        from ray._node.events import Forked, ForkFailed, ZygoteFenced

        self._heard_at = time.monotonic()
        self._noticed = False
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
            case "fenced":
                return [ZygoteFenced()]
            case _:
                pass
        return []

    def _lost(self) -> list[Event]:
        from ray._node.events import ForkFailed, ZygoteLost

        self._let_go()
        self.pid = 0
        asked, self._asked = list(self._asked), {}
        self._unsent.clear()
        self._losses += 1
        if self._losses > len(RESTART_PAUSES_S):
            # It dies before it can fork: repeating would go on for ever. The next demand tries again.
            text = f"the zygote died {self._losses} times in a row before it could fork; see the node's log"
            self._losses = 0
            return [ForkFailed(proc, text) for proc in asked]
        if pause := RESTART_PAUSES_S[self._losses - 1]:
            # What has killed it, such as a lack of memory, may be over then.
            self._start_at = time.monotonic() + pause
        else:
            self.start_as_process()
        return [ZygoteLost("its socket closed")]

    def _let_go(self) -> None:
        for end in (self._poller, self._socket):
            if end is not None:
                end.close()
        self._poller = self._socket = None

    def kill(self) -> None:
        """Kill the zygote and start no other."""
        self._let_go()
        self._start_at = None
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
