"""The driver's side of a local node: starting it, and being the one with whom it ends.

A node that was started here lives until `NodeProcess.close`, or until this process ends, in whatever way.
It has a session of its own, so that Ctrl-C in the driver's terminal does not reach it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ray._node import descriptors, session
from ray._node.config import check
from ray._node.exits import signal_name
from ray._node.forkserver import interpreter_flags, package_root

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from ray._node.config import NodeConfig

START_S: Final = 30.0
"""A node that has not said anything by then is given up. It needs a twentieth of a second."""

LOG_TAIL_BYTES: Final = 4096
LOG_TAIL_LINES: Final = 10

_BOOT: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ray._node.__main__ import main; sys.exit(main())"


class NodeProcess:
    """A running local node.

    Attributes:
        pid: Its process.
        address: The path of its Unix socket.
        session_dir: Its directory; gone when the node has ended.
        tcp_address: Where other nodes reach it, "host:port"; empty if they do not.
    """

    def __init__(self, pid: int, config: NodeConfig, lifeline: int) -> None:
        self.pid = pid
        self.address = config.socket_path
        self.session_dir = config.session_dir
        self.tcp_address = ""
        self.node = config.node
        self.token = config.token
        self._lifeline = lifeline
        self._lifeline_inode = os.fstat(lifeline).st_ino if lifeline >= 0 else 0
        self._exit_status: int | None = None
        _alive[id(self)] = self

    def poll(self) -> int | None:
        """The exit status if the node has ended (negative for signals), else None."""
        if self._exit_status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self._exit_status = 0
            else:
                if pid:
                    self._exit_status = os.waitstatus_to_exitcode(status)
        return self._exit_status

    def close(self, timeout: float | None = 5.0) -> int:
        """Let the node end, with everything on it; returns its exit status. After `timeout` it is killed.

        Its workers die with it in either case. If it had crashed before, its directory stays, for the logs in it.
        """
        self._close_lifeline()
        if self.poll() is None and not self._wait(timeout):
            os.kill(self.pid, signal.SIGKILL)
            self._wait(None)
            session.remove(self.session_dir)
        # The node removes its directory itself. If it crashed, its logs are there until a later start sweeps them.
        status = self.poll()
        assert status is not None
        return status

    def log_tail(self) -> str:
        """The end of the node's own log; empty if it is gone."""
        return _tail(f"{self.session_dir}/logs/node.log")

    def describe_end(self, timeout: float = 1.0) -> tuple[str, str]:
        """How the node ended, as a sentence without its full stop, and the end of its log; empty if it still runs.

        Args:
            timeout: How long it may take to end: its connections close a little earlier.
        """
        if self.poll() is None and not self._wait(timeout):
            return "", ""
        status = self.poll()
        assert status is not None
        if status < 0:
            how = f"it was killed by {signal_name(-status)}"
        elif status == 128 + signal.SIGTERM:
            how = "somebody sent it SIGTERM"
        else:
            how = f"it exited with status {status}"
        lines = self.log_tail().splitlines()[-LOG_TAIL_LINES:]
        shown = "".join(f"\n    {line}" for line in lines)
        return how, f"The end of its log, {self.session_dir}/logs/node.log:{shown}" if lines else ""

    def _wait(self, timeout: float | None) -> bool:
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            poller = select.poll()
            poller.register(handle, select.POLLIN)
            return bool(poller.poll(None if timeout is None else timeout * 1000))
        finally:
            os.close(handle)

    def _close_lifeline(self) -> None:
        _alive.pop(id(self), None)
        if self._lifeline >= 0:
            # A program that closes all descriptors may have given the number to a file of its own since.
            with contextlib.suppress(OSError):
                if os.fstat(self._lifeline).st_ino == self._lifeline_inode:
                    os.close(self._lifeline)
            self._lifeline = -1


_alive: dict[int, NodeProcess] = {}


def _let_go_after_fork() -> None:
    """A child forked by the user's program would keep the pipe open after the driver's end."""
    for node in list(_alive.values()):
        node._close_lifeline()


os.register_at_fork(after_in_child=_let_go_after_fork)


class _InterruptsHeld:
    """Within it Ctrl-C is noted, and raised at the end. Only the main thread is ever interrupted."""

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._noted: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exc: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._noted is not None:
                self._handler(*self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = (number, frame)


def start_local_node(config: NodeConfig, *, stays: bool = False, temp_dir: str = "") -> NodeProcess:
    """Start a node and wait until it serves. Whatever interrupts that, no node is left.

    Args:
        config: What it is.
        stays: Whether it stays when this process ends.
        temp_dir: Where its session directory is made, instead of among this user's others.

    Raises:
        ValueError: If the configuration cannot be met by any node.
        RuntimeError: If it does not start; the text has its own words, and the end of its log.
    """
    node, heard = None, -1
    try:
        try:
            with _InterruptsHeld():
                node, heard = _start(config, stays=stays, temp_dir=temp_dir)
            answer = _hear(heard)
        finally:
            if heard >= 0:
                os.close(heard)
        if not _is_ok(answer):
            tail = node.log_tail()
            raise RuntimeError(_start_error(answer.decode(errors="replace"), node.close(timeout=1.0), tail))
    except BaseException:
        if node is not None:
            node.close(timeout=1.0)
            session.remove(node.session_dir)
        raise
    node.tcp_address = answer[3:].strip().decode()
    return node


def _is_ok(answer: bytes) -> bool:
    return answer.startswith(b"ok ") and answer.endswith(b"\n")


def _start(config: NodeConfig, *, stays: bool, temp_dir: str) -> tuple[NodeProcess, int]:
    """Start a node; also returns the descriptor that its first words come from.

    Descriptors, the driver's pid and, if it is empty, the session directory of `config` are filled in here.

    Raises:
        ValueError: If the configuration cannot be met by any node.
        RuntimeError: If it does not start; the text has its own words, and the end of its log.
    """
    check(config)
    _fill_standard_descriptors()
    descriptors.raise_limit()
    if config.session_dir:
        directory, lock = config.session_dir, config.lock_fd
    else:
        directory, lock = session.create(temp_dir)
    alive, lifeline = os.pipe()
    heard, ready = os.pipe()
    told = os.memfd_create("ray-node-config", os.MFD_CLOEXEC)
    try:
        config = msgspec.structs.replace(
            config,
            session_dir=directory,
            lifeline_fd=-1 if stays else alive,
            ready_fd=ready,
            lock_fd=lock,
            driver_pid=0 if stays else os.getpid(),
        )
        os.write(told, msgspec.msgpack.encode(config))
        pid = _spawn(f"{directory}/logs/node.log", told, (alive, ready, *((lock,) if lock >= 0 else ())))
    except BaseException as error:
        os.close(heard)
        os.close(lifeline)
        session.remove(directory)
        if isinstance(error, OSError):
            msg = f"the local node could not be started: {error} (its log is to be {directory}/logs/node.log)"
            raise RuntimeError(msg) from None
        raise
    finally:
        for fd in (alive, ready, told, *((lock,) if lock >= 0 else ())):
            os.close(fd)
    if stays:
        os.close(lifeline)
    return NodeProcess(pid, config, -1 if stays else lifeline), heard


def _fill_standard_descriptors() -> None:
    """Open the null device where standard input, output or error is closed, as in a program that cron or a daemon runs.

    Else the pipes made here, or later the core's sockets, get the numbers 0 to 2: the node would lose them when it is
    given its own standard descriptors, and whatever prints here would write into them. They close on exec, so children
    of the program find these numbers as closed as before.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, unless a thread was faster
            if opened != number:
                os.close(opened)


def _spawn(log: str, config_fd: int, inherited: tuple[int, ...]) -> int:
    os.makedirs(os.path.dirname(log), mode=0o700, exist_ok=True)
    arguments = [sys.executable, *interpreter_flags(), "-c", _BOOT, package_root(), "--config-fd", str(config_fd)]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        # Duplicating onto itself clears close-on-exec in the child alone.
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in (config_fd, *inherited)),
    ]
    return os.posix_spawn(
        sys.executable,
        arguments,
        os.environ,
        file_actions=actions,
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE],
    )


def _hear(fd: int) -> bytes:
    """What the node says about its start: everything until it closes the pipe, or dies."""
    deadline = time.monotonic() + START_S
    answer = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poller.poll(left * 1000):
            data = os.read(fd, 65536)
            answer += data
            if not data or _is_ok(answer):
                return answer
    return answer or b"it said nothing for %d seconds" % START_S


def _start_error(answer: str, status: int, tail: str) -> str:
    what = answer.strip() or f"it ended with exit status {status} before it listened"
    log = f"\nThe end of its log:\n{tail}" if tail else ""
    return f"the local node could not be started: {what}{log}"


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return ""
    return data[-LOG_TAIL_BYTES:].decode(errors="replace")
