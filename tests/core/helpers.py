"""Waiting for conditions, gates between processes, and drivers that run as programs of their own.

This module is imported in workers too: it needs nothing but the standard library.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

DEADLINE_S = 20.0  # for conditions that are expected to hold within milliseconds
MARK = "SKATE_TEST_DRIVER"
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def wait_until(condition, timeout_s=DEADLINE_S, what="the condition", interval_s=0.005):
    """Call `condition` until it returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not hold within {timeout_s} s")
        time.sleep(interval_s)


class Gate:
    """Something that one process waits for and another opens; a file, so that nothing else is needed."""

    def __init__(self, directory):
        self.path = Path(directory) / f"gate-{uuid.uuid4().hex}"

    def open(self):
        self.path.touch()

    def is_open(self):
        return self.path.exists()

    def wait(self, timeout_s=DEADLINE_S):
        wait_until(self.path.exists, timeout_s, "the gate's opening")


class Tally:
    """Counts events across processes and their deaths: one line in a file for each."""

    def __init__(self, directory):
        self.path = Path(directory) / f"tally-{uuid.uuid4().hex}"

    def add(self, text="x"):
        """Add a line and return how many there are now."""
        with self.path.open("a") as file:
            file.write(f"{text}\n")
        return self.count()

    def count(self):
        return len(self.lines())

    def lines(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


def is_alive(pid):
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_idle(pid):
    """Wait until the main thread of a process sleeps and has used no CPU since the last look."""

    def used():
        state, *fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return state, fields[10:12]

    last = None

    def is_idle():
        nonlocal last
        before, last = last, used()
        return last[0] == "S" and last == before

    wait_until(is_idle, what="the process to be idle", interval_s=0.1)


def sleep_in_steps(seconds=50):
    """Sleep, but so that an interrupt is noticed also where sleeping itself is not interrupted."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)


def kill_self():
    """Die at once, as by the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(DEADLINE_S)


@contextlib.contextmanager
def start_driver(program, *, env=None):
    """Run a program text as a driver; yields the process, and kills it if it is still there."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def run_driver(program, *, timeout_s=50, env=None):
    """Run a program text as a driver to its end; return (status, output, errors), without colours."""
    with start_driver(program, env=env) as process:
        output, errors = process.communicate(timeout=timeout_s)
        return process.returncode, plain(output), plain(errors)


def plain(text):
    return _TERMINAL_CODE.sub("", text)


def processes_with(variable, value):
    """Return the processes whose environment has the variable, wherever in the tree they are now."""
    needle = f"{variable}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if needle in (entry / "environ").read_bytes() and is_alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


def descendants(pid):
    """The process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in descendants(int(child)))]


def listening(pid):
    """TCP ports on which a process, or one below it, listens."""
    sockets = set()
    for each in descendants(pid):
        for fd in Path(f"/proc/{each}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(str(fd.readlink()))
    lines = [x.split() for name in ("tcp", "tcp6") for x in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [x[1] for x in lines if x[3] == "0A" and f"socket:[{x[9]}]" in sockets]
