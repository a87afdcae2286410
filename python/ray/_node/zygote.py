"""The fork server: a process with the interpreter and a worker's modules loaded, and one thread.

A worker is a fork of it: milliseconds instead of a start, and memory shared until it is written. It
holds no state but modules; it may die at any time, and the node starts another.

A worker is forked twice, so that it becomes the child of the node (which is a subreaper): the node gets its
exit code, and the zygote's death harms no worker. The middle process ends at once. Only when the zygote
has reaped it, and so the worker has been adopted, does the worker go on to its main function.

It also watches over the node: workers that may run only until a certain time are stopped by it if the node, being
stopped itself, neither prolongs the time nor stops them (`_node.fence`).

It must stay single-threaded, because a fork copies only the thread that calls it: locks held by others
would stay locked for ever. That is checked before each fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

from ray._node import process, wire

if TYPE_CHECKING:
    from collections.abc import Callable

PRELOADABLE: Final = (
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "PIL",
    "requests",
    "yaml",
    "polars",
    "matplotlib",
    "networkx",
    "sympy",
)
"""Modules that may be imported before the fork on the hint that the driver has them. Whether one starts a
thread is checked anyway; those known to hold devices or run threads (torch, jax, grpc) are left out."""

_SINGLE_THREADED: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Set while preloading only: BLAS libraries start their threads at import."""

NO_ROOM_EXIT: Final = 70

FD_MAX: Final = 1 << 20
"""More descriptors than a process may have by default."""


class Zygote:
    """Serves forks on a connected stream socket until the other end closes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unpacker = wire.Unpacker()
        self._pending: list[bytes] = []
        self._main: Callable[..., None] | None = None
        self._broken = ""
        self._guarded: dict[int, None] = {}
        self._guard_until: float | None = None
        """When the guarded workers are to be stopped; None if they are, or there is none."""
        self._init = wire.decode_init(self._next_message())

    def prepare(self) -> None:
        """Load what every worker needs, and report readiness."""
        init = self._init
        process.die_with_parent(init.node_pid)
        process.set_title("ray::zygote")
        sys.path[:] = init.sys_path or sys.path
        with contextlib.suppress(OSError):  # a working directory that has gone is no reason to have no workers
            os.chdir(init.cwd)
        os.environ.update(init.env_vars)
        for stream in (sys.stdout, sys.stderr):
            # Files take the place of the terminal: lines must come out as they are printed.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
        try:
            __import__("cloudpickle")
            module = __import__(init.worker_module, fromlist=["main"])
            self._main = module.main
            getattr(module, "prepare", int)()
        except Exception:
            import traceback

            self._broken = f"the worker's module {init.worker_module} cannot be imported:\n{traceback.format_exc()}"
        self._settle()
        self._report(wire.Report("ready"))

    def serve(self) -> None:
        """Answer commands; between them, while hints are left, preload one module at a time."""
        preload = [name for name in self._init.preload if name in PRELOADABLE]
        while True:
            if preload and not self._pending and not self._is_readable(0):
                if self._guard_until is not None and self._guard_until <= time.monotonic():
                    self._stop_guarded()
                else:
                    self._preload(preload.pop(0))
                continue
            match wire.decode_command(self._next_message()):
                case wire.GuardCommand() as command:
                    self._guard(command)
                case wire.ForkCommand() as command:
                    self._fork(command)

    # ------------------------------------------------------------------ guarding

    def _guard(self, command: wire.GuardCommand) -> None:
        self._guarded.update(dict.fromkeys(command.added))
        for pid in command.gone:
            self._guarded.pop(pid, None)
        self._guard_until = command.until if self._guarded else None

    def _stop_guarded(self) -> None:
        """Their time is over. Nobody but the node reaps them, so their pids are theirs while it does not run."""
        self._guard_until = None
        for pid in self._guarded:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._report(wire.Report("fenced"))

    # ------------------------------------------------------------------ preparing

    def _settle(self) -> None:
        """Garbage now, not in every child; and what is left is never looked at again, so it stays shared."""
        gc.collect()
        gc.disable()
        gc.freeze()

    def _preload(self, name: str) -> None:
        saved = {key: os.environ.get(key) for key in _SINGLE_THREADED}
        os.environ.update(_SINGLE_THREADED)
        try:
            __import__(name)
        except Exception as error:  # a broken module is the user's affair, in the task that needs it
            print(f"preload of {name} failed: {error!r}", file=sys.stderr)
        finally:
            for key, value in saved.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        if process.task_count() > 1:
            # A thread cannot be unstarted. The node starts another zygote without this module.
            self._report(wire.Report("unsafe", text=name))
            os._exit(0)
        self._settle()

    # ------------------------------------------------------------------ forking

    def _fork(self, command: wire.ForkCommand) -> None:
        if self._main is None:
            self._report(wire.Report("failed", command.proc, text=self._broken))
            return
        threads = process.task_count()
        if threads != 1:
            text = f"the zygote has {threads} threads, which a fork would lose; some preloaded module started one"
            self._report(wire.Report("failed", command.proc, text=text))
            os._exit(1)
        try:
            pid = self._fork_twice(command)
        except OSError as error:
            self._report(wire.Report("failed", command.proc, text=str(error)))
        else:
            self._report(wire.Report("forked", command.proc, pid))

    def _fork_twice(self, command: wire.ForkCommand) -> int:
        """Fork the worker; returns its pid once the node has adopted it."""
        told, tell = os.pipe()
        adopted, adopt = os.pipe()
        try:
            middle = os.fork()
            if middle == 0:
                try:
                    pid = os.fork()
                    if pid == 0:
                        for fd in (told, tell, adopt, self._fd):
                            os.close(fd)
                        self._be_worker(command, adopted)  # does not return
                    os.write(tell, pid.to_bytes(4, "little"))
                    os._exit(0)
                except OSError as error:
                    os.write(tell, bytes(4) + str(error).encode())
                finally:
                    os._exit(NO_ROOM_EXIT)
            os.close(tell)
            tell = -1
            os.waitpid(middle, 0)
            answer = os.read(told, 4096)
        finally:
            # Closing `adopt` is what the worker waits for.
            for fd in (told, tell, adopted, adopt):
                if fd >= 0:
                    os.close(fd)
        pid = int.from_bytes(answer[:4], "little")
        if pid == 0:
            raise OSError(answer[4:].decode() or "the process between zygote and worker was killed")
        return pid

    def _be_worker(self, command: wire.ForkCommand, adopted: int) -> None:
        """From here on this is the worker's process."""
        code = 1
        try:
            self._settle_in(command, adopted)
            assert self._main is not None
            init = self._init
            self._main(
                address=init.address,
                session=init.session,
                token=init.token,
                node=init.node,
                proc=command.proc,
            )
            code = 0
        except SystemExit as error:
            code = _exit_code(error)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            _finish(code)

    def _settle_in(self, command: wire.ForkCommand, adopted: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._redirect_output(command.proc)
        if command.sys_path is not None:
            sys.path[:] = command.sys_path
        if command.cwd is not None:
            with contextlib.suppress(OSError):
                os.chdir(command.cwd)
        os.environ.update(command.env_vars)
        process.set_title("ray::idle")
        # The standard library's generators reseed themselves after a fork; numpy's global one does not.
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        os.read(adopted, 1)
        os.close(adopted)
        process.die_with_parent(self._init.node_pid)
        gc.enable()

    def _redirect_output(self, proc: int) -> None:
        stem = f"{self._init.log_dir}/worker-{proc:016x}-{os.getpid()}"
        for fd, suffix in ((1, "out"), (2, "err")):
            # Appending keeps order if the node empties a file that has become too long.
            file = os.open(f"{stem}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.dup2(file, fd, inheritable=True)
            os.close(file)

    # ------------------------------------------------------------------ socket

    def _next_message(self) -> bytes:
        while not self._pending:
            if self._guard_until is not None and not self._is_readable(self._guard_until - time.monotonic()):
                self._stop_guarded()
                continue
            data = os.read(self._fd, 65536)
            if not data:
                os._exit(0)  # the node has gone
            self._pending += self._unpacker.feed(data)
        return self._pending.pop(0)

    def _is_readable(self, timeout_s: float) -> bool:
        return bool(select.select([self._fd], [], [], max(timeout_s, 0.0))[0])

    def _report(self, report: wire.Report) -> None:
        try:
            wire.send_all(self._fd, wire.pack(report))
        except BrokenPipeError:
            os._exit(0)


def main(fd: int) -> None:
    """Be a zygote on this socket; does not return."""
    # Nothing else may reach the workers: among what the node has open are the session's lock and the pipes
    # whose ends mean life and death.
    os.closerange(3, fd)
    os.closerange(fd + 1, FD_MAX)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    zygote = Zygote(fd)
    zygote.prepare()
    zygote.serve()


def _exit_code(error: SystemExit) -> int:
    """As the interpreter reads it: None is success, a text is printed and means failure."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _finish(code: int) -> None:
    """End as an interpreter does, but without tearing down modules, which would copy every shared page."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
