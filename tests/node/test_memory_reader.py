"""What is read of the kernel's files: of made-up ones where a test needs another machine, of the real ones else."""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from ray._node import memory_reader
from ray._node.events import MemoryUse
from ray._node.memory_reader import EXPLICIT, MemoryReader

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


class Machine:
    """A /proc and a mount of control groups, as files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.proc = directory / "proc"
        self.mount = directory / "groups with a blank"
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        self.meminfo(total=8 * GIB, available=6 * GIB)

    def meminfo(self, *, total: int, available: int) -> None:
        fields = {"MemTotal": total, "MemFree": MIB, "MemAvailable": available, "Cached": 5 * MIB}
        (self.proc / "meminfo").write_text("".join(f"{key}: {size // KIB:>9} kB\n" for key, size in fields.items()))

    def in_group(self, path: str, *, unified: bool, root: str = "/") -> None:
        kind, options = ("cgroup2", "rw") if unified else ("cgroup", "rw,memory")
        point = str(self.mount).replace(" ", "\\040")
        (self.proc / "self" / "mountinfo").write_text(
            "22 1 0:5 / /elsewhere rw - tmpfs tmpfs rw\n"
            f"35 31 0:32 {root} {point} rw,relatime shared:4 - {kind} {kind} {options}\n"
        )
        entry = f"0::{path}" if unified else f"4:cpu,memory:{path}"
        (self.proc / "self" / "cgroup").write_text(f"9:name=systemd:/\n{entry}\n")

    def group(self, path: str, files: dict[str, object]) -> Path:
        directory = self.mount / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(f"{content}\n")
        return directory

    def unified(self, path: str, limit: object, used: int, *, inactive: int = 0, active: int = 0) -> Path:
        statistics = f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file {active}"
        return self.group(path, {"memory.max": limit, "memory.current": used, "memory.stat": statistics})

    def reader(self, **arguments: int) -> MemoryReader:
        return MemoryReader(proc=str(self.proc), **arguments)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def read():
    """Uses of what a reader sees; every reader is closed in the end."""
    readers = []

    def read_(reader: MemoryReader) -> tuple[MemoryUse, ...]:
        readers.append(reader)
        return reader.read({}, [], detailed=False).uses

    before = open_descriptors()
    yield read_
    for reader in dict.fromkeys(readers):
        reader.close()
    assert open_descriptors() == before


def test_what_the_kernel_can_take_back_is_not_used(machine, read):
    assert read(machine.reader()) == (MemoryUse("the machine", 8 * GIB, 2 * GIB),)


def test_every_limited_group_up_to_the_root_counts_without_its_file_cache(machine, read):
    machine.in_group("/pod/app", unified=True)
    machine.unified("/pod/app", GIB, 900 * MIB, inactive=300 * MIB, active=100 * MIB)
    machine.unified("/pod", 2 * GIB, GIB + 500 * MIB, inactive=400 * MIB)
    machine.unified("/", "max", 4 * GIB)
    assert read(machine.reader())[1:] == (
        MemoryUse("the control group /pod/app", GIB, 500 * MIB),
        MemoryUse("the control group /pod", 2 * GIB, GIB + 100 * MIB),
    )


def test_the_first_version_of_control_groups_has_other_names_and_no_word_for_no_limit(machine, read):
    machine.in_group("/docker/1", unified=False)
    statistics = "cache 5\ninactive_file 1\nactive_file 1\ntotal_inactive_file 104857600\ntotal_active_file 1048576"
    files = {"memory.limit_in_bytes": GIB, "memory.usage_in_bytes": 800 * MIB, "memory.stat": statistics}
    machine.group("/docker/1", files)
    machine.group("/docker", {**files, "memory.limit_in_bytes": 9223372036854771712})
    assert read(machine.reader())[1:] == (MemoryUse("the control group /docker/1", GIB, 699 * MIB),)


def test_in_a_container_the_path_is_seen_from_what_is_mounted(machine, read):
    machine.in_group("/docker/1/app", unified=True, root="/docker/1")
    machine.unified("/app", GIB, 100 * MIB)
    machine.unified("/", 2 * GIB, 200 * MIB)
    assert read(machine.reader())[1:] == (
        MemoryUse("the control group /app", GIB, 100 * MIB),
        MemoryUse("the control group /", 2 * GIB, 200 * MIB),
    )


def test_a_path_outside_of_what_is_mounted_falls_back_to_it(machine, read):
    machine.in_group("/../../elsewhere", unified=True)
    machine.unified("/", GIB, 100 * MIB)
    assert read(machine.reader())[1:] == (MemoryUse("the control group /", GIB, 100 * MIB),)


def test_limits_may_change_and_files_may_be_missing(machine, read):
    machine.in_group("/app", unified=True)
    group = machine.unified("/app", GIB, 100 * MIB)
    reader = machine.reader()
    assert len(read(reader)) == 2
    (group / "memory.max").write_text("536870912\n")
    assert read(reader)[1].limit == 512 * MIB
    (group / "memory.max").write_text("max\n")
    assert len(read(reader)) == 1
    (machine.proc / "meminfo").write_text("")
    assert read(reader) == ()


def test_a_kill_by_the_kernel_is_claimed_once_and_only_while_it_is_fresh(machine, read, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(memory_reader.time, "monotonic", lambda: now[0])
    machine.in_group("/app", unified=True)
    events = machine.unified("/app", GIB, 1) / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 3\n")
    reader = machine.reader()
    read(reader)
    assert reader.claim_oom_kill() == ""
    events.write_text("low 0\noom 5\noom_kill 5\n")
    assert reader.claim_oom_kill() == "control group /app"
    assert reader.claim_oom_kill() == "control group /app"
    assert reader.claim_oom_kill() == ""
    events.write_text("low 0\noom 6\noom_kill 6\n")
    now[0] += memory_reader.OOM_LOOK_S
    read(reader)
    now[0] += memory_reader.OOM_KILL_S + 1
    assert reader.claim_oom_kill() == "", "that was somebody else, long ago"


def test_without_a_group_the_machine_s_count_is_asked(machine, read):
    (machine.proc / "vmstat").write_text("pgfault 7\noom_kill 1\n")
    reader = machine.reader()
    read(reader)
    (machine.proc / "vmstat").write_text("pgfault 7\noom_kill 2\n")
    assert reader.claim_oom_kill() == "this machine"


def test_an_explicit_limit_counts_own_memory_and_each_shared_page_once(read):
    """Two processes that share a page have half of it each, and the store's pages count whoever maps them."""
    segment = os.memfd_create("segment")
    os.ftruncate(segment, 64 * MIB)
    with mmap.mmap(segment, 64 * MIB) as mapped:
        mapped[: 8 * MIB] = b"x" * (8 * MIB)
        reader = MemoryReader(limit_bytes=64 * MIB)
        own = bytearray(32 * MIB)
        seen = reader.read({os.getpid(): "me"}, [segment], detailed=True)
        reader.close()
    os.close(segment)
    (use,) = seen.uses
    listed = {process.pid: process for process in seen.processes}
    assert (use.name, use.limit) == (EXPLICIT, 64 * MIB)
    assert listed[0].bytes == 8 * MIB
    assert listed[os.getpid()].command == "me"
    assert listed[os.getpid()].bytes > len(own)
    assert abs(use.used - listed[os.getpid()].bytes - 8 * MIB) < 4 * MIB, "the mapped pages are not counted twice"


def test_processes_of_others_are_listed_by_what_they_run():
    reader = MemoryReader()
    waits = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "y" * 200]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        seen = reader.read({}, [], detailed=True)
        other.communicate()
    reader.close()
    (found,) = [process for process in seen.processes if process.pid == other.pid]
    assert found.bytes > MIB
    assert found.command.startswith(sys.executable)
    assert len(found.command) <= memory_reader.COMMAND_CHARS_MAX


def test_the_kernel_s_complaint_is_awaited_where_there_is_one():
    reader = MemoryReader()
    stalls = reader.watch_stalls()
    if stalls < 0:
        reader.close()
        pytest.skip("this kernel does not tell, or not us, when processes wait for memory")
    poller = select.poll()
    poller.register(stalls, select.POLLIN)
    if poller.poll(0):  # somebody on this machine did wait
        reader.take_stall()
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(stalls)
