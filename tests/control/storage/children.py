"""Heads in processes of their own, to be killed and suspended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ray._node.process import die_with_parent

ROOT = Path(__file__).parents[3]
DEADLINE_S = 30.0


class Child:
    """A `writing_child`. Ends with the block in which it is used."""

    def __init__(self, url: str, how: str, *, holder: str = "child", ttl_s: float = 60.0) -> None:
        parent = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.control.storage.writing_child", url, holder, str(ttl_s), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            preexec_fn=lambda: die_with_parent(parent),
        )
        self._unread = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()

    def line(self) -> str:
        """The next line that it says; empty when it has ended."""
        return self.process.stdout.readline().decode().strip()

    def acknowledged(self, at_least: int) -> int:
        """Read until it has said so many."""
        said = -1
        while said < at_least:
            line = self.line()
            assert line.isdigit(), f"the child said {line!r}"
            said = int(line)
        return said

    def step(self) -> str:
        self.process.stdin.write(b".")
        self.process.stdin.flush()
        return self.line()

    def rest(self) -> list[str]:
        """All that it says until its end."""
        return self.process.stdout.read().decode().split("\n")

    def suspend(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE_S
        while self._state() != "T":
            assert time.monotonic() < deadline, "it was not suspended"
            time.sleep(0.005)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def _state(self) -> str:
        """Of all its threads, one letter if they agree."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        states = {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()}
        return "".join(sorted(states))
