"""Users on a machine: each with directories of its own, in which the command `ray` runs as people run it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from tests.core.helpers import is_alive, processes_with, wait_until

RAY = [sys.executable, "-m", "ray"]
MARK = "SKATE_TEST_USER"
COMMAND_S = 30
END_S = 5


class User:
    """Whoever has this home and this directory for sessions; the real user's are not touched."""

    def __init__(self, directory: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.home = directory / "home"
        self.base = directory / "ray"
        self.home.mkdir()
        self.base.mkdir(mode=0o700)
        foreign = ("RAY_", "SKATE_TEST_USER")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment |= {
            "HOME": str(self.home),
            "RAY_TMPDIR": str(self.base),
            "RAY_VALIDATE": "1",
            "PYTHONUNBUFFERED": "1",
            MARK: self.mark,
        }
        # Any address of 127/8 is this machine's, so each user has all ports to itself.
        self.ip = f"127.{os.urandom(1)[0]}.{os.urandom(1)[0]}.{1 + os.urandom(1)[0] % 250}"

    def ray(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RAY, *arguments],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def succeed(self, *arguments: str, **variables: str) -> str:
        done = self.ray(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fail(self, *arguments: str, **variables: str) -> str:
        """What the command says that is to fail."""
        done = self.ray(*arguments, **variables)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        return done.stderr

    def start_head(self, *arguments: str, **variables: str) -> str:
        """The address of a new head, on any port."""
        text = self.succeed("start", "--head", "--port=0", f"--node-ip-address={self.ip}", "--num-cpus=1", *arguments)
        return address_in(text)

    @contextlib.contextmanager
    def staying(self, *arguments: str):
        """`ray start --block`, once its node serves."""
        process = subprocess.Popen(
            [*RAY, "start", "--num-cpus=1", *arguments, "--block"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            process.text = ""
            for line in process.stdout:
                process.text += line
                if line.startswith("This command stays"):
                    break
            else:
                raise AssertionError(process.stderr.read())
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def run(self, program: str, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sessions(self) -> list[Path]:
        return sorted(self.base.glob("session_*"))

    def records(self) -> list[Path]:
        return sorted((self.base / "nodes").glob("*"))

    def expect_nothing(self) -> None:
        wait_until(lambda: not processes_with(MARK, self.mark), END_S, "the end of all processes")
        assert self.sessions() == []
        assert self.records() == []

    def clean_up(self) -> None:
        for pid in processes_with(MARK, self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_with(MARK, self.mark), what="the end of all processes")


def address_in(text: str) -> str:
    return re.search(r"^  address +(\S+)$", text, re.MULTILINE).group(1)


def token_file_in(text: str) -> Path:
    return Path(re.search(r"^  token +(\S+)$", text, re.MULTILINE).group(1))


def pid_in(text: str) -> int:
    return int(re.search(r"process (\d+)\.$", text, re.MULTILINE).group(1))


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def new_user():
    """A function that makes a user; afterwards nothing of any of them may be left."""
    users = []

    def make() -> User:
        # Not in pytest's directories: their paths are too long for a socket.
        users.append(User(Path(tempfile.mkdtemp(prefix="cli-", dir="/tmp"))))
        return users[-1]

    yield make
    try:
        for user in users:
            user.expect_nothing()
    finally:
        for user in users:
            user.clean_up()
            shutil.rmtree(user.base.parent)


@pytest.fixture
def user(new_user) -> User:
    return new_user()


__all__ = ["User", "address_in", "is_alive", "is_listening", "pid_in", "token_file_in"]
