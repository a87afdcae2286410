"""The zygote and the node's end of it, with real forks, kills and signals.

The test process plays the node: it is a subreaper, so workers become its children, as they become the node's.
"""

from __future__ import annotations

import os
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray._node import events, forkserver, process, wire
from ray._node.forkserver import ForkServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAND_INS = Path(__file__).parent / "stand_ins"
WAIT_S = 20.0


class Node:
    """A fork server with a loop that waits for what it reports."""

    def __init__(self, tmp_path: Path, **changes: object) -> None:
        fields: dict[str, object] = {
            "node_pid": os.getpid(),
            "address": "nowhere",
            "session": b"s" * 16,
            "token": b"t" * 32,
            "node": 7,
            "log_dir": str(tmp_path),
            "worker_module": "sleeping_worker",
            "sys_path": [str(STAND_INS), *sys.path],
            "cwd": str(tmp_path),
            "env_vars": {},
            "preload": [],
        }
        self.log_dir = tmp_path
        self.forks = ForkServer(wire.Init(**{**fields, **changes}))  # type: ignore[arg-type]
        self.pids: list[int] = []

    def fork(self, proc: int, **changes: object) -> None:
        self.forks.fork(wire.ForkCommand(proc, **{"env_vars": {}, **changes}))  # type: ignore[arg-type]

    def wait_for(self, count: int = 1, kind: type = events.Forked) -> list[events.Forked]:
        """Events until there are `count` of a kind."""
        found: list[events.Forked] = []
        deadline = time.monotonic() + WAIT_S
        while len(found) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"only {found} came"
            for event in self.step(left):
                if isinstance(event, events.Forked):
                    self.pids.append(event.pid)
                if isinstance(event, kind):
                    found.append(event)  # type: ignore[arg-type]
        return found

    def step(self, timeout: float = WAIT_S) -> list[object]:
        """Wait once for the zygote, or for a deadline of the fork server."""
        deadline = self.forks.next_deadline()
        if deadline is not None:
            timeout = min(timeout, max(deadline - time.monotonic(), 0.0))
        fd = self.forks.fileno()
        if select.select([fd] if fd >= 0 else [], [], [], timeout)[0]:
            return [*self.forks.read()]
        return [*self.forks.on_deadline()]

    def lose(self) -> None:
        """Kill the zygote, and notice it."""
        zygote = self.forks.pid
        os.kill(zygote, signal.SIGKILL)
        self.wait_for(1, events.ZygoteLost)
        os.waitpid(zygote, 0)

    def output(self, event: events.Forked, suffix: str = "out") -> str:
        """What the worker had printed when it had ended."""
        os.waitpid(event.pid, 0)
        self.pids.remove(event.pid)
        return (self.log_dir / f"worker-{event.proc:016x}-{event.pid}.{suffix}").read_text()

    def close(self) -> None:
        zygote = self.forks.pid
        self.forks.kill()
        if zygote:
            os.waitpid(zygote, 0)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def node_of(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    process.become_subreaper()
    nodes: list[Node] = []

    def make(**changes: object) -> Node:
        node = Node(tmp_path, **changes)
        nodes.append(node)
        node.forks.start_as_process()
        return node

    yield make
    for node in nodes:
        node.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_worker_is_a_child_of_the_node_with_what_it_was_told(node_of: Callable[..., Node]):
    node = node_of(env_vars={"FROM_NODE": "1"})
    node.fork(5, env_vars={"WORKER_DOES": "describe", "FROM_ENV": "2"})
    (forked,) = node.wait_for()
    said = node.output(forked)
    assert f"parent {os.getpid()}" in said
    assert "address=nowhere" in said
    assert "proc=5" in said
    assert "FROM_NODE=1" in said
    assert "FROM_ENV=2" in said
    assert f"cwd={node.log_dir}" in said
    assert "threads=1" in said
    assert "title=ray::idle" in said
    assert "fds=[0, 1, 2]" in said, "nothing of the zygote is left open"


def test_workers_differ_in_what_must_differ(node_of: Callable[..., Node]):
    node = node_of()
    said = []
    for proc in (1, 2):
        node.fork(proc, env_vars={"WORKER_DOES": "random"})
        said.append(node.output(node.wait_for()[0]))
    assert said[0] != said[1]


def test_exit_codes_signals_and_tracebacks_arrive(node_of: Callable[..., Node]):
    node = node_of()
    for proc, (does, code) in enumerate([("exit 3", 3), ("raise", 1), ("return", 0), ("abort", -6)], 1):
        node.fork(proc, env_vars={"WORKER_DOES": does})
        (forked,) = node.wait_for()
        _, status = os.waitpid(forked.pid, 0)
        node.pids.remove(forked.pid)
        assert os.waitstatus_to_exitcode(status) == code
        if does == "raise":
            errors = (node.log_dir / f"worker-{proc:016x}-{forked.pid}.err").read_text()
            assert "ValueError: as asked" in errors


def test_exit_handlers_run_and_buffers_are_written(node_of: Callable[..., Node]):
    node = node_of()
    node.fork(1, env_vars={"WORKER_DOES": "atexit"})
    assert "at exit" in node.output(node.wait_for()[0])


def test_a_killed_zygote_harms_no_worker_and_another_one_forks(node_of: Callable[..., Node]):
    node = node_of()
    node.fork(1)
    (first,) = node.wait_for()
    zygote = node.forks.pid
    os.kill(zygote, signal.SIGKILL)
    (lost,) = node.wait_for(1, events.ZygoteLost)
    os.waitpid(zygote, 0)
    assert lost is not None
    assert node.forks.pid not in (0, zygote)
    node.fork(2)
    node.wait_for()
    os.kill(first.pid, 0)
    assert os.waitpid(first.pid, os.WNOHANG) == (0, 0), "the first worker goes on"


def test_a_stopped_zygote_that_is_killed_reports_its_forks_as_void(node_of: Callable[..., Node]):
    node = node_of()
    node.fork(1)
    node.wait_for()
    zygote = node.forks.pid
    os.kill(zygote, signal.SIGSTOP)
    node.fork(2)
    os.kill(zygote, signal.SIGKILL)
    node.wait_for(1, events.ZygoteLost)
    os.waitpid(zygote, 0)


def test_a_worker_module_that_cannot_be_imported_is_the_reason_of_the_failure(node_of: Callable[..., Node]):
    node = node_of(worker_module="no_such_module_anywhere")
    node.fork(1)
    (failed,) = node.wait_for(1, events.ForkFailed)
    assert "no_such_module_anywhere" in failed.error  # type: ignore[attr-defined]
    assert "Traceback" in failed.error  # type: ignore[attr-defined]


def test_an_environment_may_be_larger_than_the_buffer_of_a_socket(node_of: Callable[..., Node]):
    node = node_of(env_vars={"FROM_NODE": "n" * 1_000_000})
    for proc in range(1, 4):
        node.fork(proc, env_vars={"WORKER_DOES": "describe", "FROM_ENV": "e" * 5_000_000})
    for forked in node.wait_for(3):
        said = node.output(forked)
        assert "FROM_ENV=" + "e" * 5_000_000 in said
        assert "FROM_NODE=" + "n" * 1_000_000 in said


def test_an_environment_without_bounds_is_refused_and_the_zygote_goes_on(node_of: Callable[..., Node]):
    node = node_of()
    with pytest.raises(ValueError, match="at most"):
        node.fork(1, env_vars={"FROM_ENV": "e" * (wire.FRAME_BYTES_MAX + 1)})
    node.fork(2)
    assert node.wait_for()[0].proc == 2


def test_a_bad_second_for_zygotes_is_survived(node_of: Callable[..., Node]):
    node = node_of()
    for _ in range(4):
        node.lose()
        node.fork(1)  # also while there is none
        assert not node.forks.pid or node.forks.fileno() >= 0
        while not node.forks.pid:
            node.step()
    node.wait_for()
    assert node.forks._losses == 0, "counting begins anew"


def test_a_zygote_that_does_not_answer_is_mentioned_and_then_replaced(
    node_of: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forkserver, "NOTICE_AFTER_S", 0.2)
    monkeypatch.setattr(forkserver, "REPLACE_AFTER_S", 0.4)
    node = node_of()
    node.fork(1)
    node.wait_for()
    assert node.forks.next_deadline() is None, "who was asked nothing may be silent"
    zygote = node.forks.pid
    os.kill(zygote, signal.SIGSTOP)
    node.fork(2)
    (silent,) = node.wait_for(1, events.ForkServerSilent)
    assert silent.pid == zygote
    node.wait_for(1, events.ZygoteLost)
    os.waitpid(zygote, 0)
    monkeypatch.setattr(forkserver, "REPLACE_AFTER_S", WAIT_S)
    node.fork(3)
    assert node.wait_for()[0].proc == 3


def test_a_zygote_that_dies_before_it_can_fork_is_not_restarted_for_ever(
    node_of: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forkserver, "RESTART_PAUSES_S", (0.0, 0.01, 0.02))
    node = node_of(worker_module="dying_module")
    node.fork(1)
    losses = 0
    failed: list[object] = []
    zygotes: list[int] = []
    while not failed:
        zygotes.append(node.forks.pid)
        for event in node.step():
            losses += isinstance(event, events.ZygoteLost)
            failed += [event] if isinstance(event, events.ForkFailed) else []
            if isinstance(event, events.ZygoteLost):
                node.fork(1)
    for zygote in set(zygotes) - {0}:
        os.waitpid(zygote, 0)
    assert losses == 3
    assert "times in a row" in failed[0].error  # type: ignore[attr-defined]


def test_a_preload_that_starts_a_thread_is_left_out_next_time(
    node_of: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
):
    # The list of allowed names is the zygote's; a module of ours takes the place of one on it.
    fake = STAND_INS / "preloads"
    node = node_of(preload=["networkx"], sys_path=[str(fake), str(STAND_INS), *sys.path])
    zygote = node.forks.pid
    node.wait_for(1, events.ZygoteLost)
    os.waitpid(zygote, 0)
    node.fork(1, env_vars={"WORKER_DOES": "describe"})
    assert "threads=1" in node.output(node.wait_for()[0])


def test_numpy_is_preloaded_without_threads_and_reseeded(node_of: Callable[..., Node]):
    pytest.importorskip("numpy")
    node = node_of(preload=["numpy"])
    said = []
    for proc in range(1, 4):
        node.fork(proc, env_vars={"WORKER_DOES": "numpy"})
        said.append(node.output(node.wait_for()[0]))
    assert "numpy True" in said[-1]
    assert "OPENBLAS_NUM_THREADS=None" in said[-1]
    assert said[-1] != said[-2]


def test_workers_die_with_the_node(tmp_path: Path):
    """Another process plays the node, forks its zygote from itself, and is killed."""
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(STAND_INS), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_zygote import Node, process
process.become_subreaper()
node = Node(Path({str(tmp_path)!r}))
node.forks.start_as_fork()
node.fork(1)
print(node.wait_for()[0].pid, node.forks.pid, flush=True)
signal.pause()
"""
    process.become_subreaper()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        handles = [os.pidfd_open(int(pid)) for pid in program.stdout.readline().split()]
        program.kill()
    for handle in handles:
        assert select.select([handle], [], [], WAIT_S)[0], "the worker or the zygote lives on"
        os.close(handle)
    # As the nearest subreaper this process has inherited both.
    for _ in handles:
        os.waitpid(-1, 0)


@pytest.mark.slow
def test_forks_are_quick(node_of: Callable[..., Node]):
    node = node_of()
    node.fork(1)
    node.wait_for()
    took = []
    for proc in range(2, 40):
        started = time.perf_counter()
        node.fork(proc)
        node.wait_for()
        took.append(time.perf_counter() - started)
    median = statistics.median(took)
    print(f"fork: median {median * 1e3:.2f} ms, worst {max(took) * 1e3:.2f} ms")
    assert median < 0.02, "five times what it should take"


def test_a_zygote_that_dies_before_it_was_told_anything_does_not_end_the_node(tmp_path: Path):
    from _socket import socketpair

    server = Node(tmp_path)
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    ours, theirs = socketpair()
    theirs.close()
    server.forks._adopt(pid, ours)  # nobody is there to read
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [type(event).__name__ for event in server.forks.read()] == ["ZygoteLost"]
    server.close()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_stopped(pid):  # the kernel stops it when it next returns to the program
        assert time.monotonic() < deadline, f"process {pid} runs on"
        time.sleep(0.005)


def test_guarded_workers_are_stopped_when_their_time_is_over_and_others_run_on(node_of: Callable[..., Node]):
    node = node_of()
    for proc in (1, 2, 3):
        node.fork(proc)
    guarded, gone, other = sorted(node.wait_for(3), key=lambda event: event.proc)
    node.forks.guard(time.monotonic() + 3600, (guarded.pid, gone.pid), ())
    node.forks.guard(time.monotonic(), (), (gone.pid,))
    node.wait_for(1, events.ZygoteFenced)
    wait_until_stopped(guarded.pid)
    assert not is_stopped(gone.pid)
    assert not is_stopped(other.pid)
    # It goes on serving, and a time that is prolonged later stops nobody.
    node.forks.guard(time.monotonic() + 3600, (other.pid,), ())
    node.fork(4)
    node.wait_for(1)
    assert not is_stopped(other.pid)


def test_the_zygote_that_takes_over_guards_the_same_workers(node_of: Callable[..., Node]):
    node = node_of()
    node.fork(1)
    (worker,) = node.wait_for()
    until = time.monotonic() + 2.0
    node.forks.guard(until, (worker.pid,), ())
    node.lose()
    assert not is_stopped(worker.pid)
    node.wait_for(1, events.ZygoteFenced)
    assert time.monotonic() >= until
    wait_until_stopped(worker.pid)
