"""Clusters over hosts: nodes and drivers as programs inside of them, told what to do from outside.

Each host has its own directory for sessions, so that nothing finds a node of another one by its files; the directory of
a test is shared, which is how a test sees what really happens while networks are cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from tests.core.helpers import is_alive, wait_until
from tests.hosts.netns import Host

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START_S = 40.0
ANSWER_S = 40.0
END_S = 10.0


class DriverError(Exception):
    """What a driver's code raised. The text begins with the class's name."""


class Program:
    """A Python program in a host, with pipes to its input and output."""

    def __init__(self, host: Host, file: str, *arguments: object, env: dict[str, str], errors: Path) -> None:
        self.host = host
        self.errors = errors
        with errors.open("a") as log:
            self.process = subprocess.Popen(
                host.argv(sys.executable, HERE / file, *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env},
                cwd=ROOT,
                start_new_session=True,
            )
        self._unread = b""

    def read_line(self, timeout_s: float) -> str:
        """The next line of its output.

        Raises:
            TimeoutError: If there is none in time.
            RuntimeError: If it ends without one; the text has what it wrote to its standard error.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            assert self.process.stdout is not None
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"no answer within {timeout_s} s; its errors:\n{self.errors.read_text()}")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError(f"the program has ended; its errors:\n{self.errors.read_text()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def write_line(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Let it end, or kill it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class NodeOnHost:
    """A running node.

    Attributes:
        id: Its id, in hexadecimal, as users see it.
        key: Its number.
        address: Where other nodes reach it; empty if only through the head.
        pid: Its process.
    """

    def __init__(self, program: Program, facts: dict[str, Any]) -> None:
        from ray._runtime.ids import NodeID

        self.program = program
        self.host = program.host
        self.key: int = facts["node"]
        self.id: str = NodeID._from_key(self.key).hex()
        self.pid: int = facts["pid"]
        self.address: str = facts["address"]
        self.port = int(self.address.rpartition(":")[2] or 0)
        # Kept open, because the directory goes with the node.
        self._log: TextIO = (Path(facts["session_dir"]) / "logs" / "node.log").open()

    def log(self) -> str:
        """What the node has written into its log, also after its end."""
        self._log.seek(0)
        return self._log.read()

    def is_alive(self) -> bool:
        return is_alive(self.pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait_until_gone(self, timeout_s: float = 30.0) -> None:
        """Wait until it has ended, and every process of its host with it, but for the program that started it."""
        wait_until(lambda: not self.is_alive(), timeout_s, f"the end of node {self.id[:8]}", interval_s=0.02)
        mine = self.program.process.pid
        others = lambda: [pid for pid in self.host.pids() if pid != mine and is_alive(pid)]  # noqa: E731
        wait_until(lambda: not others(), 10.0, "the end of what the node had started", interval_s=0.02)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        self.program.close()
        self._log.close()


class Driver:
    """A driver that does what it is told (`driver_program`)."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def begin(self, code: str) -> None:
        """Have it perform some code; `end` has the outcome."""
        self.program.write_line(json.dumps(code))

    def end(self, timeout_s: float = ANSWER_S) -> Any:
        """The value of what was begun.

        Raises:
            DriverError: If it raised an exception.
        """
        answer = json.loads(self.program.read_line(timeout_s))
        if "error" in answer:
            raise DriverError(f"{answer['error']}: {answer['text']}")
        return answer["value"]

    def __call__(self, code: str, timeout_s: float = ANSWER_S) -> Any:
        """Perform some code; returns the value of its last line, if that is an expression."""
        self.begin(code)
        return self.end(timeout_s)

    def nodes(self) -> dict[str, bool]:
        """The nodes that the cluster knows, and whether they live."""
        found: dict[str, bool] = self("{x['NodeID']: x['Alive'] for x in ray.nodes()}")
        return found

    def wait_for_loss(self, node: NodeOnHost, timeout_s: float) -> str:
        """Wait until the cluster takes a node for lost; returns why."""
        code = f"[x['DeathReasonMessage'] for x in ray.nodes() if x['NodeID'] == {node.id!r} and not x['Alive']]"
        (reason,) = wait_until(lambda: self(code), timeout_s, f"the loss of {node.host}", interval_s=0.05)
        assert isinstance(reason, str)
        return reason

    def close(self) -> None:
        self.program.close()


class HostCluster:
    """Nodes and drivers on some hosts.

    Args:
        hosts: Where they may be.
        directory: For files of the test.
        validate: Have the nodes' machines check their invariants after each event.
    """

    def __init__(self, hosts: list[Host], directory: Path, *, validate: bool = True) -> None:
        self.hosts = hosts
        self.directory = directory
        self.token = os.urandom(32).hex()
        self._validate = "1" if validate else "0"
        self.nodes: list[NodeOnHost] = []
        self.drivers: list[Driver] = []
        self._programs: list[Program] = []
        """Others."""
        # A socket's path must be short.
        self._sessions = Path(tempfile.mkdtemp(prefix="sk-", dir="/tmp"))

    @property
    def head(self) -> NodeOnHost:
        return self.nodes[0]

    def _program(self, host: Host, file: str, *arguments: object, **env: str) -> Program:
        sessions = self._sessions / str(host.index)
        sessions.mkdir(mode=0o700, exist_ok=True)
        errors = self.directory / f"errors-of-host-{host.index}"
        environment = {"RAY_TMPDIR": str(sessions), "RAY_AUTH_TOKEN": self.token, "RAY_VALIDATE": self._validate, **env}
        return Program(host, file, *arguments, env=environment, errors=errors)

    def add_node(self, host: Host, *, head_address: str = "", token: str = "", **arguments: object) -> NodeOnHost:
        """Start a node; the first one is the head.

        Args:
            host: Where.
            head_address: Where it reaches the head, if not at the head's own address.
            token: Another one than the cluster's.
            arguments: `num_cpus`, `resources`, `labels`, `name` and `outbound_only`.

        Raises:
            RuntimeError: If it does not start.
        """
        if self.nodes:
            arguments["head"] = [self.head.key, head_address or self.head.address]
        arguments["ip"] = host.ip
        env = {"RAY_AUTH_TOKEN": token} if token else {}
        program = self._program(host, "node_program.py", json.dumps(arguments), **env)
        try:
            node = NodeOnHost(program, json.loads(program.read_line(START_S)))
        except (RuntimeError, TimeoutError):
            program.close()
            raise
        self.nodes.append(node)
        return node

    def driver(self, host: Host, **env: str) -> Driver:
        """Start a driver of the cluster in a host."""
        driver = Driver(self._program(host, "driver_program.py", **env))
        self.drivers.append(driver)
        driver(f"ray.init({self.head.address!r}, logging_level='ERROR', log_to_driver=False) and None", START_S)
        return driver

    def run(self, host: Host, file: str, *arguments: object) -> Program:
        """Start a program of this directory in a host."""
        program = self._program(host, file, *arguments)
        self._programs.append(program)
        return program

    def delay(self, host: Host, address: str, delay_s: float) -> str:
        """Start a proxy in a host that leads to `address`, later; returns where it listens."""
        target, _, port = address.rpartition(":")
        program = self.run(host, "delay_program.py", host.ip, target, port, delay_s)
        return f"{host.ip}:{program.read_line(START_S)}"

    def close(self) -> None:
        """End everything, the head last."""
        for driver in self.drivers:
            driver.close()
        for node in reversed(self.nodes):
            node.close()
        for program in self._programs:
            program.close()
        shutil.rmtree(self._sessions, ignore_errors=True)
