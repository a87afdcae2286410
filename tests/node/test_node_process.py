"""Whole node processes on the real kernel: started, used, killed; only the native transport is a stand-in."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import pytest
from fake_core import ROLE_DRIVER, Peer

from ray import _protocol as p
from ray._node import session
from ray._node.config import NodeConfig
from ray._node.launch import NodeProcess, start_local_node
from tests.node.simulated import cpu, create

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

M = TypeVar("M", bound=p.Message)

STAND_INS = Path(__file__).parent / "stand_ins"
PACKAGE = Path(p.__file__).parent.parent
WAIT_S = 20.0


def config(**changes: object) -> NodeConfig:
    fields: dict[str, object] = {
        "session_dir": "",
        "session": b"s" * 16,
        "token": b"t" * 32,
        "node": 77,
        "resources": {"CPU": 20_000},
        "gpu_ids": [],
        "object_store_memory": 64 << 20,
        "sys_path": sys.path,
        "cwd": "/",
        "worker_module": "stand_in_worker",
    }
    return NodeConfig(**{**fields, **changes})  # type: ignore[arg-type]


class Driver(Peer):
    """A driver of a node under test."""

    def __init__(self, address: str, proc: int = 5) -> None:
        super().__init__(address, proc, ROLE_DRIVER)
        self.serial = 0

    def tell(self, message: p.Message, corr: int = 0) -> None:
        self.send(p.KINDS[type(message)], p.encode(message), corr)

    def wait(self, kind: type[M], condition: Callable[[M], bool] = lambda _: True) -> tuple[M, int]:
        """The next message of a kind that meets the condition, and its descriptor; others are dropped."""
        deadline = time.monotonic() + WAIT_S
        while (frame := self.receive(deadline - time.monotonic())) is not None:
            message = p.decode(frame[0], frame[2])
            if isinstance(message, kind) and condition(message):
                return message, frame[3]
        raise AssertionError(f"the node closed the connection before {kind.__name__} came")

    def actor(self, spec: str, **changes: object) -> bytes:
        self.serial += 1
        message = create(self.proc, self.serial, spec=spec.encode(), **changes)
        self.tell(message)
        return message.actor

    def state(self, state: int) -> p.ActorState:
        return self.wait(p.ActorState, lambda message: message.state == state)[0]


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    monkeypatch.setenv("RAY_TEST_FAKE_CORE", "1")
    monkeypatch.setenv("RAY_VALIDATE", "1")
    monkeypatch.setenv("PYTHONPATH", f"{STAND_INS}:{PACKAGE}")
    return base


@pytest.fixture
def node(surroundings: Path) -> Iterator[NodeProcess]:
    started = start_local_node(config())
    group = started.pid
    yield started
    assert started.close() == 0
    assert processes_of(group) == [], "a process is left"
    assert list(surroundings.iterdir()) == [], "a file is left"


@pytest.fixture
def driver(node: NodeProcess) -> Driver:
    return Driver(node.address)


def processes_of(session_id: int) -> list[int]:
    """Processes of the session that the node has made its own."""
    found = []
    for entry in (path.name for path in Path("/proc").iterdir()):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session_id and fields[0] != "Z":
                found.append(int(entry))
    return found


def wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], WAIT_S)[0], f"process {pid} lives on"
    os.close(handle)


def test_leases_come_with_living_workers(driver: Driver):
    driver.tell(p.LeaseDemand(1, cpu(1), 2, label="f"))
    grants = [driver.wait(p.LeaseGranted)[0] for _ in range(2)]
    assert len({grant.pid for grant in grants}) == 2
    for grant in grants:
        os.kill(grant.pid, 0)


def test_a_killed_worker_is_reported_with_its_signal_and_last_words(driver: Driver):
    driver.actor("print one;complain two;ready;exit 3")
    text = driver.state(p.ACTOR_DEAD).cause.decode()
    assert "exited with code 3" in text
    assert "one" in text
    assert "two" in text


def test_an_actor_is_back_soon_after_a_kill(driver: Driver):
    driver.actor("ready", max_restarts=-1)
    times = []
    for incarnation in range(1, 6):
        alive = driver.state(p.ACTOR_ALIVE)
        started = time.monotonic()
        os.kill(alive.pid, signal.SIGKILL)
        alive, _ = driver.wait(p.ActorState, lambda x: x.state == p.ACTOR_ALIVE)
        times.append(time.monotonic() - started)
        assert alive.incarnation == incarnation
        driver.tell(p.ActorSubscribe(alive.actor))
    print(f"restart: {min(times) * 1e3:.1f} ms at best, {sorted(times)[2] * 1e3:.1f} ms median")
    assert sorted(times)[2] < 0.5


def test_a_constructor_s_error_reaches_the_creator(driver: Driver):
    driver.actor("fail payload")
    dead = driver.state(p.ACTOR_DEAD)
    assert (dead.cause_kind, dead.cause) == (p.CAUSE_INIT_ERROR, b"payload")


def test_an_actor_that_is_released_stops_by_itself(driver: Driver):
    actor = driver.actor("ready")
    alive = driver.state(p.ACTOR_ALIVE)
    driver.tell(p.ActorRelease(actor))
    assert "no handle" in driver.state(p.ACTOR_DEAD).cause.decode()
    wait_for_end(alive.pid)


def test_lines_of_workers_come_to_the_driver(driver: Driver):
    driver.actor("print hello;print world;print-no-newline rest;complain oh;exit 0", label="Talker")
    out, _ = driver.wait(p.LogLines, lambda x: x.stream == p.STREAM_OUT)
    lines = list(out.lines)
    while "rest" not in lines:
        more, _ = driver.wait(p.LogLines, lambda x: x.stream == p.STREAM_OUT)
        lines += more.lines
    assert lines == ["hello", "world", "rest"]
    assert (out.name, out.ip) == ("Talker", "127.0.0.1")


def test_a_flood_of_lines_is_thinned_and_says_so(driver: Driver):
    driver.actor("flood 40;ready")
    noted: list[str] = []
    got = 0
    while not noted:
        lines, _ = driver.wait(p.LogLines)
        assert len(lines.lines) <= 200
        got += len(lines.lines)
        noted += [line for line in lines.lines if "left out here" in line]
    assert got < 40 * 1024


def test_variables_of_an_environment_reach_the_worker(driver: Driver):
    env = msgspec.msgpack.encode({"env_vars": {"FLAVOUR": "lemon"}})
    driver.actor("env FLAVOUR;ready", env=env)
    assert driver.wait(p.LogLines)[0].lines == ["lemon"]


def test_a_malformed_environment_is_a_clear_refusal(driver: Driver):
    driver.actor("ready", env=msgspec.msgpack.encode({"env_vars": {"A": 1}}))
    assert "environment is malformed" in driver.state(p.ACTOR_DEAD).cause.decode()


def test_workers_that_cannot_start_are_a_clear_refusal(driver: Driver):
    env = msgspec.msgpack.encode({"env_vars": {"STAND_IN": "fails"}})
    driver.tell(p.LeaseDemand(4, cpu(1), 1, env))
    failed, _ = driver.wait(p.LeaseFailed)
    assert "code 7" in failed.reason
    assert "kaput" in failed.reason


def test_segments_are_real_memory_that_is_sealed(node: NodeProcess, driver: Driver):
    driver.tell(p.SegmentRequest(1 << 20), 3)
    granted, fd = driver.wait(p.SegmentGranted)
    with mmap.mmap(fd, granted.size) as memory:
        memory[:5] = b"hello"
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fd, 0)
    os.close(fd)
    other = Driver(node.address, 6)
    other.tell(p.SegmentMap(granted.segment), 4)
    mapped, fd = other.wait(p.SegmentMapped)
    with mmap.mmap(fd, mapped.size, prot=mmap.PROT_READ) as memory:
        assert memory[:5] == b"hello"
    os.close(fd)
    other.close()


def test_a_killed_zygote_is_replaced_and_forks_go_on(node: NodeProcess, driver: Driver):
    driver.tell(p.LeaseDemand(1, cpu(1), 1))
    first, _ = driver.wait(p.LeaseGranted)
    (zygote,) = [pid for pid in processes_of(node.pid) if comm(pid) == "ray::zygote"]
    os.kill(zygote, signal.SIGKILL)
    driver.tell(p.LeaseDemand(2, {}, 3))
    for _ in range(3):
        driver.wait(p.LeaseGranted)
    os.kill(first.pid, 0)


def test_a_zygote_that_is_killed_again_and_again_still_serves(node: NodeProcess, driver: Driver):
    driver.tell(p.LeaseDemand(2, {}, 40))
    granted = 0
    while granted < 40:
        driver.wait(p.LeaseGranted)
        granted += 1
        if granted in (5, 15, 25):
            for pid in processes_of(node.pid):
                if comm(pid) == "ray::zygote":
                    os.kill(pid, signal.SIGKILL)


def test_a_driver_that_leaves_takes_its_work_with_it(node: NodeProcess, driver: Driver):
    other = Driver(node.address, 6)
    other.tell(p.LeaseDemand(1, cpu(1), 1))
    grant, _ = other.wait(p.LeaseGranted)
    other.close()
    driver.wait(p.Deaths, lambda x: any(proc == grant.proc for proc, _ in x.dead))
    wait_for_end(grant.pid)


def test_children_that_workers_leave_behind_end_with_the_node(surroundings: Path):
    node = start_local_node(config())
    driver = Driver(node.address)
    driver.actor("orphan;ready")
    alive = driver.state(p.ACTOR_ALIVE)
    (orphan,) = [int(x) for x in Path(f"/proc/{alive.pid}/task/{alive.pid}/children").read_text().split()]
    os.kill(alive.pid, signal.SIGKILL)
    driver.state(p.ACTOR_DEAD)
    assert Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1] == str(node.pid)
    node.close()
    wait_for_end(orphan)


def test_a_killed_node_takes_everything_with_it_but_its_logs(surroundings: Path):
    node = start_local_node(config())
    driver = Driver(node.address)
    driver.tell(p.LeaseDemand(1, {}, 5))
    pids = [driver.wait(p.LeaseGranted)[0].pid for _ in range(5)]
    os.kill(node.pid, signal.SIGKILL)
    for pid in pids:
        wait_for_end(pid)
    assert node.close() == -signal.SIGKILL
    (left,) = surroundings.iterdir()
    again = start_local_node(config())
    other = Driver(again.address)
    other.tell(p.Request("stats"), 1)
    other.wait(p.Reply)
    assert (left / "logs" / "node.log").exists()
    again.close()
    assert list(surroundings.iterdir()) == [left]


@pytest.mark.parametrize("how", ["SIGKILL", "exit", "fork"])
def test_nothing_is_left_of_a_driver_that_ends_without_goodbye(surroundings: Path, how: str):
    script = f"""
import os, signal, sys, time
sys.path[:0] = {[str(STAND_INS), str(Path(__file__).parent)]!r}
import test_node_process as t
from ray import _protocol as p
node = t.start_local_node(t.config())
driver = t.Driver(node.address)
driver.tell(p.LeaseDemand(1, {{}}, 3))
for _ in range(3): driver.wait(p.LeaseGranted)
if {how!r} == "fork" and os.fork() == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.pause()  # a child that would keep the pipe open
print(node.pid, flush=True)
if {how!r} != "exit":
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        started = time.monotonic()
        if how != "exit":
            program.kill()
        wait_for_end(pid)
        assert time.monotonic() - started < 5
        os.killpg(program.pid, signal.SIGKILL) if how == "fork" else None
    assert processes_of(pid) == []
    assert list(surroundings.iterdir()) == []


def test_sigterm_ends_a_node_in_order(surroundings: Path):
    node = start_local_node(config())
    os.kill(node.pid, signal.SIGTERM)
    wait_for_end(node.pid)
    assert node.poll() == 128 + signal.SIGTERM
    assert list(surroundings.iterdir()) == []


def test_a_request_can_end_the_node(surroundings: Path):
    node = start_local_node(config())
    Driver(node.address).tell(p.Request("shutdown"), 1)
    wait_for_end(node.pid)
    assert node.poll() == 0


def test_a_node_that_cannot_be_is_refused_before_it_starts(surroundings: Path):
    with pytest.raises(ValueError, match="does not agree with 0 device ids"):
        start_local_node(config(resources={"GPU": 10_000}))
    assert list(surroundings.iterdir()) == []


def test_a_node_that_cannot_start_says_why(surroundings: Path, tmp_path: Path):
    (tmp_path / "node.sock").mkdir()
    with pytest.raises(RuntimeError, match="Address already in use"):
        start_local_node(config(session_dir=str(tmp_path)))


def test_a_path_too_long_for_a_socket_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 90)))
    with pytest.raises(RuntimeError, match="RAY_TMPDIR"):
        start_local_node(config())


def test_an_idle_node_sleeps(node: NodeProcess, driver: Driver):
    driver.tell(p.LeaseDemand(1, cpu(1), 2))
    for _ in range(2):
        driver.wait(p.LeaseGranted)
    # A round trip, so that everything before is done; then the node's own account of its turns must not move.
    before = turns(node.pid, driver)
    with pytest.raises(TimeoutError):
        driver.receive(timeout=0.3)
    assert turns(node.pid, driver) - before <= 3, "the request itself, and nothing else"


def turns(pid: int, driver: Driver) -> int:
    driver.tell(p.Request("stats"), 9)
    driver.wait(p.Reply)
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("voluntary_ctxt_switches:")[1].split()[0])


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_old_crashed_sessions_are_swept_and_living_ones_are_not(surroundings: Path):
    living, lock = session.create()
    dead = []
    for second in range(session.CRASHED_KEPT + 2):
        path, dead_lock = session.create()
        os.close(dead_lock)
        dead.append(f"session_20200101-00000{second}_1_000000")
        Path(path).rename(surroundings / dead[-1])
    fresh = surroundings / "session_being_made"
    fresh.mkdir()
    (surroundings / "keep").mkdir()
    assert session.sweep(str(surroundings)) == dead[:2]
    left = {Path(living).name, "session_being_made", "keep", *dead[2:]}
    assert {x.name for x in surroundings.iterdir()} == left
    os.close(lock)


def test_removing_a_session_follows_no_links(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    doomed = tmp_path / "doomed"
    (doomed / "deep" / "er").mkdir(parents=True)
    (doomed / "link").symlink_to(precious)
    session.remove(str(doomed))
    assert not doomed.exists()
    assert (precious / "file").exists()


def test_a_full_disk_costs_log_lines_and_not_the_node():
    program = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2); from ray._node.shell import log; log('lost')"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
