"""Hosts as network namespaces, joined by a bridge in a namespace of its own.

Owns namespaces whose names begin with `PREFIX`, and everything in them. Refuses to touch the machine's own interfaces,
routes and packet filters: each command runs inside of a namespace, and pairs of interfaces are made inside of them.

A name says which process made it (pid and start). What a test run left that was killed itself is removed by the next
one (`sweep`), with the processes that are still in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

PREFIX = "skate"
HUB = "hub"
LINK = "eth0"
NETWORK = "10.213.7"  # seen inside of the namespaces only
REMOVE_S = 5.0
"""How long killed processes may take to end before their namespace is reported as left behind."""


class Unavailable(Exception):
    """This machine cannot have such hosts; the text says why."""


def command(*argv: object, check: bool = True) -> str:
    """Run a command of the system; returns its output."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def require(*programs: str) -> None:
    """Raises `Unavailable` if a program of the system is missing."""
    for program in programs:
        if shutil.which(program) is None:
            raise Unavailable(f"there is no program {program!r} on this machine")


def probe() -> None:
    """Raises `Unavailable` if this machine cannot have hosts."""
    if os.geteuid():
        raise Unavailable("network namespaces need root")
    require("ip")
    try:
        Net(1).remove()
    except RuntimeError as error:
        raise Unavailable(f"this machine makes no network namespaces with bridges: {error}") from None


def names() -> list[str]:
    """All namespaces of ours, whoever made them."""
    listed = [line.split()[0] for line in command("ip", "netns", "list").splitlines() if line.strip()]
    return [name for name in listed if name.startswith(f"{PREFIX}-")]


def sweep() -> list[str]:
    """Remove what runs have left that do not run any more; returns the names."""
    left = [name for name in names() if not _runs(*name.split("-")[1:3])]
    for name in left:
        _remove(name)
    return left


def _started(pid: int) -> str:
    """What tells a process from a later one with the same pid; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _runs(pid: str, started: str) -> bool:
    return pid.isdigit() and _started(int(pid)) == started


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in command("ip", "netns", "pids", namespace, check=False).split()]


def _remove(namespace: str) -> None:
    """Kill what runs in a namespace, and delete it."""
    deadline = time.monotonic() + REMOVE_S
    while pids := _pids(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # not every one is a child of this process
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {pids} of {namespace} do not end when killed")
        time.sleep(0.01)
    command("ip", "netns", "delete", namespace)


class Host:
    """A namespace with one network interface, whose cable ends at the bridge."""

    def __init__(self, net: Net, index: int) -> None:
        self.net = net
        self.index = index
        self.namespace = f"{net.name}-{index}"
        self.ip = f"{NETWORK}.{index + 1}"
        self.port = f"port{index}"
        """The bridge's end of its cable."""

    def __repr__(self) -> str:
        return f"Host({self.index}, {self.ip})"

    # -- programs

    def argv(self, *argv: object) -> list[str]:
        """The command that runs `argv` in this host; it becomes that program, with the same pid."""
        return ["ip", "netns", "exec", self.namespace, *(str(word) for word in argv)]

    def run(self, *argv: object, check: bool = True) -> str:
        """Run a program to its end; returns its output."""
        return command(*self.argv(*argv), check=check)

    def pids(self) -> list[int]:
        """Every process in this host."""
        return _pids(self.namespace)

    # -- its cable

    def cut(self) -> None:
        """Pull the cable out of the bridge. Nobody is told: packets are lost in both directions."""
        command("ip", "-n", self.net.hub, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Plug it in again."""
        command("ip", "-n", self.net.hub, "link", "set", self.port, "up")

    def rate(self, bits_per_s: int) -> None:
        """Limit both directions, with a buffer of 50 ms."""
        for namespace, device in ((self.namespace, LINK), (self.net.hub, self.port)):
            command(
                "ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", device, "root", "tbf",
                "rate", bits_per_s, "burst", max(bits_per_s // 800, 3200), "latency", "50ms",
            )  # fmt: skip

    # -- its packet filter

    def _filter(self, *rule: object) -> None:
        self.run("iptables", "-w", "-A", *rule)

    def drop(self, probability: float) -> None:
        """Lose packets that come in and go out, each with this probability."""
        for chain in ("INPUT", "OUTPUT"):
            self._filter(chain, "-m", "statistic", "--mode", "random", "--probability", probability, "-j", "DROP")

    def block(self, other: Host) -> None:
        """Lose everything from and to one other host."""
        self._filter("INPUT", "-s", other.ip, "-j", "DROP")
        self._filter("OUTPUT", "-d", other.ip, "-j", "DROP")

    def shut_in(self) -> None:
        """Lose every packet with which another host begins a connection to this one."""
        self._filter("INPUT", "-i", LINK, "-p", "tcp", "--syn", "-j", "DROP")
        self._filter("INPUT", "-i", LINK, "!", "-p", "tcp", "-j", "DROP")

    def reset(self, port: int, *, told: str = "both") -> None:
        """Reset every connection with this port on either side, as soon as it carries a packet.

        Args:
            port: A TCP port of this host's or of its peers'.
            told: Who hears of it: "both" ends, only the "peer", or only this host's "own" end.
        """
        for side in ("--sport", "--dport"):
            # What refuses a packet tells its sender.
            if told != "own":
                self._filter("INPUT", "-p", "tcp", side, port, "-j", "REJECT", "--reject-with", "tcp-reset")
            if told != "peer":
                self._filter("OUTPUT", "-p", "tcp", side, port, "-j", "REJECT", "--reject-with", "tcp-reset")

    def heal(self) -> None:
        """Let every packet through again."""
        self.run("iptables", "-w", "-F")


class Net:
    """Hosts on one bridge.

    Args:
        count: How many hosts.
    """

    def __init__(self, count: int) -> None:
        self.name = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-{uuid.uuid4().hex[:6]}"
        self.hub = f"{self.name}-{HUB}"
        self.hosts: list[Host] = []
        try:
            self._add_namespace(self.hub)
            command("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
            command("ip", "-n", self.hub, "link", "set", "bridge", "up")
            for index in range(count):
                self._add_host(Host(self, index))
        except RuntimeError:
            self.remove()
            raise

    def _add_namespace(self, name: str) -> None:
        command("ip", "netns", "add", name)
        command("ip", "-n", name, "link", "set", "lo", "up")

    def _add_host(self, host: Host) -> None:
        self._add_namespace(host.namespace)
        self.hosts.append(host)
        command(
            "ip", "-n", host.namespace, "link", "add", LINK, "type", "veth", "peer", "name", host.port,
            "netns", self.hub,
        )  # fmt: skip
        command("ip", "-n", self.hub, "link", "set", host.port, "master", "bridge", "up")
        command("ip", "-n", host.namespace, "address", "add", f"{host.ip}/24", "dev", LINK)
        command("ip", "-n", host.namespace, "link", "set", LINK, "up")

    def remove(self) -> None:
        """Kill everything in the hosts, and remove them.

        Raises:
            RuntimeError: If something is left.
        """
        for name in [name for name in names() if name.startswith(f"{self.name}-")]:
            _remove(name)
        left = [name for name in names() if name.startswith(f"{self.name}-")]
        if left:
            raise RuntimeError(f"namespaces were left behind: {left}")
