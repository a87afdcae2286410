"""`ray stop`: what it ends, and what it leaves alone."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from tests.core.helpers import is_alive, processes_with
from tests.scripts.conftest import MARK, address_in, is_listening, pid_in

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # each starts nodes and interpreters

CLUSTERS = """
import sys, ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True)
cluster.add_node()
ray.init("local", num_cpus=1, log_to_driver=False)
print("ready", flush=True)
sys.stdin.readline()
print(cluster.remaining_processes_alive(), ray.get(ray.put("alive")))
ray.shutdown()
cluster.shutdown()
"""


def test_without_nodes_there_is_nothing_to_stop(user):
    assert user.succeed("stop") == "No node that 'ray start' has started runs here.\n"


def test_clusters_of_programs_and_of_other_users_go_on(user, new_user):
    other = new_user()
    theirs = other.start_head()
    user.start_head()
    program = subprocess.Popen(
        [sys.executable, "-c", CLUSTERS],
        env=user.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout.readline() == "ready\n"
        assert user.succeed("stop") == "Stopped 1 node.\n"
        output, _ = program.communicate("go\n", timeout=20)
    finally:
        if program.poll() is None:
            program.kill()
            program.communicate()
    assert output == "True alive\n"
    assert is_listening(theirs)
    assert other.succeed("stop") == "Stopped 1 node.\n"


def test_a_node_that_does_not_end_is_named_and_then_killed_by_force(user):
    text = user.succeed("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1")
    user.succeed("start", f"--address={address_in(text)}", "--num-cpus=1")
    pid = pid_in(text)
    os.kill(pid, signal.SIGSTOP)
    said = user.fail("stop", "--grace-period=1")
    assert f"1 node did not end within 1 s (process {pid})" in said
    assert "--force" in said
    assert is_alive(pid)
    assert user.succeed("stop", "--force") == "Stopped 1 node.\n"
    assert processes_with(MARK, user.mark) == []
    user.expect_nothing()


def test_a_process_that_is_not_the_node_is_left_alone(user):
    """A record whose number means another process: given away anew, or of another container's."""
    user.start_head()
    [file] = user.records()
    record = msgspec.json.decode(file.read_bytes())
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    session = user.base / "session_of_another_container"
    session.mkdir()
    try:
        with (session / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            changed = {**record, "pid": stranger.pid, "session_dir": str(session), "node": 5}
            (file.parent / "0000000000000005.json").write_bytes(msgspec.json.encode(changed))
            done = user.ray("stop", "--force")
            assert (done.returncode, done.stdout) == (1, "Stopped 1 node.\n")
            assert f"1 node did not end within 16 s (process {stranger.pid})" in done.stderr
            assert "another container" in done.stderr
            assert stranger.poll() is None
    finally:
        stranger.communicate(b"\n", timeout=20)
        (session / "lock").unlink()
        session.rmdir()
        assert "No node" in user.succeed("stop")  # which removes the record of what is gone
