"""Where workers are, whatever they are doing: `ray stack` and what is behind it."""

import os
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import ray
from tests.core.helpers import Gate, wait_until

pytestmark = pytest.mark.skate


def stacks(*arguments):
    """What the command prints, by pid: (what runs, the stacks)."""
    from ray.scripts.stack_command import stack

    done = CliRunner().invoke(stack, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    parts = re.split(r"^--- process (\d+) on node [^,]*, runs (.*)$", done.output, flags=re.MULTILINE)
    return {int(pid): (runs, text) for pid, runs, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}


def stack_of(pid, *parts):
    """The process's entry, once it has all the parts."""

    def found():
        entry = stacks("--pid", pid).get(pid)
        return entry if entry is not None and all(part in "".join(entry) for part in parts) else None

    return wait_until(found, what=f"{parts} in the stack of {pid}", interval_s=0.05)


class Told:
    """A worker's pid, told before it gets busy."""

    def __init__(self, directory):
        self.path = directory / "pid"

    def tell(self):
        temporary = self.path.with_suffix(".new")
        temporary.write_text(str(os.getpid()))
        temporary.rename(self.path)

    def wait(self):
        return int(wait_until(lambda: self.path.exists() and self.path.read_text(), what="the worker's pid"))


def test_a_busy_loop_is_seen_with_its_task_and_goes_on(cluster, tmp_path):
    told, gate = Told(tmp_path), Gate(tmp_path)

    @ray.remote
    def spin(told, path):
        told.tell()
        turns = 0
        while not path.exists():
            turns += 1
        return turns

    reference = spin.options(name="spinning").remote(told, gate.path)
    pid = told.wait()
    runs, text = stack_of(pid, "in spin")
    assert runs == "spinning"
    assert "most recent call first" in text
    assert stack_of(pid, "in spin")  # and again
    gate.open()
    assert ray.get(reference) > 0


def test_a_call_that_blocks_in_native_code_with_the_interpreter_is_seen(cluster, tmp_path):
    told = Told(tmp_path)

    @ray.remote(max_retries=0)
    def block(told, path):
        import ctypes

        told.tell()
        # PyDLL keeps the interpreter's lock: no Python runs in this process until the pipe is written to.
        libc = ctypes.PyDLL(None)
        fifo = os.open(path, os.O_RDWR)
        buffer = ctypes.create_string_buffer(1)
        return libc.read(fifo, buffer, 1)

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reference = block.remote(told, str(fifo))
    pid = told.wait()
    runs, _ = stack_of(pid, "in block")
    assert runs == "block"
    fifo.write_bytes(b"x")
    assert ray.get(reference) == 1


def test_all_threads_of_an_actor_are_seen(cluster, tmp_path):
    @ray.remote(max_concurrency=3)
    class Server:
        def wait_here(self, gate):
            gate.wait(50)

        def process(self):
            return os.getpid()

    gate = Gate(tmp_path)
    server = Server.remote()
    pid = ray.get(server.process.remote())
    calls = [server.wait_here.remote(gate) for _ in range(2)]
    wait_until(lambda: stacks("--pid", pid)[pid][1].count("in wait_here") == 2, what="both threads", interval_s=0.05)
    assert stacks("--pid", pid)[pid][0] == "Server.wait_here, Server.wait_here"
    gate.open()
    ray.get(calls)


def test_a_dump_leaves_no_descriptor_and_ends_no_wait(cluster):
    @ray.remote
    class Sleeper:
        def descriptors(self):
            return sorted(path.name for path in Path("/proc/self/fd").iterdir())

        def sleep(self):
            begin = time.monotonic()
            time.sleep(0.5)
            return time.monotonic() - begin

    sleeper = Sleeper.remote()
    before = ray.get(sleeper.descriptors.remote())
    reference = sleeper.sleep.remote()
    while not ray.wait([reference], timeout=0)[0]:
        stacks()
    assert ray.get(reference) >= 0.5
    assert ray.get(sleeper.descriptors.remote()) == before


def test_the_signal_alone_writes_nothing(cluster):
    from ray import _core

    @ray.remote
    class Target:
        def process(self):
            return os.getpid()

    target = Target.remote()
    pid = ray.get(target.process.remote())
    for _ in range(3):
        os.kill(pid, _core.stack_target()[0])
    assert ray.get(target.process.remote()) == pid
    assert "most recent call first" in stack_of(pid)[1]


def test_a_program_that_uses_the_descriptor_is_left_alone(cluster, tmp_path):
    @ray.remote
    class Greedy:
        def take(self, path):
            from ray import _core

            self.file = Path(path).open("w")  # noqa: SIM115 (it stays open)
            os.dup2(self.file.fileno(), _core.stack_target()[1])
            return os.getpid()

        def free(self):
            from ray import _core

            os.close(_core.stack_target()[1])

    greedy = Greedy.remote()
    pid = ray.get(greedy.take.remote(str(tmp_path / "file")))
    assert "the program uses descriptor" in stacks("--pid", pid)[pid][1]
    assert (tmp_path / "file").read_text() == ""
    ray.get(greedy.free.remote())
    assert "most recent call first" in stack_of(pid)[1]
