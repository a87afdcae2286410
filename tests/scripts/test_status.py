"""`ray status`, `ray health-check`, and the command as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.core.helpers import wait_until
from tests.scripts.conftest import address_in, token_file_in

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # each starts nodes and interpreters

WAITERS = """
import sys, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, resources={"special": 1})
class Holder:
    def is_there(self):
        return True

@ray.remote(num_cpus=0, resources={"special": 2})
def wait_for_room(): ...

@ray.remote(num_gpus=3)
class WantsGpus: ...

holder = Holder.remote()
ray.get(holder.is_there.remote())
waits, actor = [wait_for_room.remote() for _ in range(4)], WantsGpus.remote()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_without_a_cluster_it_says_what_to_do(user):
    assert "ray start --head" in user.fail("status")
    assert "ray start --head" in user.fail("health-check")
    assert "ray start --head" in user.fail("list", "nodes")
    assert "ray start --head" in user.fail("memory")
    assert "stands for no running cluster" in user.fail("status", RAY_ADDRESS="local")


@pytest.mark.parametrize("nodes", [1, 2])
def test_it_shows_what_is_used_and_what_waits_and_why(user, nodes):
    address = user.start_head('--resources={"special": 2}', "--node-name=first", "--labels=zone=a")
    for _ in range(nodes - 1):
        user.succeed("start", f"--address={address}", "--num-cpus=0", "--node-name=second")
    text = user.succeed("status")
    assert text.startswith(f"Cluster at {address}: {nodes} alive\n")
    assert "Pending demands\n  none\n" in text
    program = subprocess.Popen(
        [sys.executable, "-c", WAITERS], env=user.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout.readline() == "ready\n"

        def shown():
            text = user.succeed("status", "-v")
            lines = [line for line in text.splitlines() if "wait_for_room" in line or "WantsGpus" in line]
            return (text, lines) if len(lines) == 2 and "CPU                     1 of 1" in text else None

        text, lines = wait_until(shown, what="both demands in the report")
        assert f"Resources of first ({text.split('Nodes')[1].split()[0]})" in text
        assert text.count("special                 1 of 2") == 2  # of all, and of the one that has it
        assert "labels: zone=a" in text
        waits = next(line for line in lines if "wait_for_room" in line)
        assert waits.split()[0] == "4"
        assert "special: 2" in waits
        gpus = next(line for line in lines if "WantsGpus" in line)
        assert "needs GPU: 3; " in gpus
    finally:
        program.communicate("go\n", timeout=20)
        print(text)
    user.succeed("stop")


def test_a_machine_without_a_node_looks_with_the_token_and_leaves_no_trace(user, new_user):
    text = user.succeed("start", "--head", f"--node-ip-address={user.ip}", "--num-cpus=1")
    file, other = token_file_in(text), new_user()
    address = f"{user.ip}:6379"
    assert "no token is known" in other.fail("status", f"--address={address}")
    shown = other.succeed("status", f"--address={address}", RAY_AUTH_TOKEN_PATH=str(file))
    assert shown.startswith(f"Cluster at {address}: 1 alive\n")
    assert "client" not in shown
    other.expect_nothing()
    assert user.succeed("status").startswith(f"Cluster at {address}: 1 alive\n")
    user.succeed("stop")


def test_a_node_that_was_lost_is_listed_with_why(user, new_user):
    text = user.succeed("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1")
    other = new_user()
    join = f"--address={address_in(text)}", f"--token-file={token_file_in(text)}", "--num-cpus=1"
    other.succeed("start", *join, "--node-name=gone")
    other.succeed("stop")
    shown = wait_until(lambda: "1 lost" in (now := user.succeed("status")) and now, what="the loss in the report")
    [line] = [line for line in shown.splitlines() if " gone " in line]
    assert "lost: its connection was lost" in line
    user.succeed("stop")


def test_health_check_asks_the_head(user):
    address = user.start_head()
    assert f"The head at {address} is alive" in user.succeed("health-check")
    assert f"The head at {address} is alive" in user.succeed("health-check", f"--address={address}")
    user.succeed("stop")
    assert "no token" in user.fail("health-check", f"--address={address}")
    assert "no node could be reached" in user.fail("health-check", f"--address={address}", RAY_AUTH_TOKEN="ab" * 32)


def test_the_version_is_that_of_the_package(user):
    import ray

    assert user.succeed("--version") == f"ray, version {ray.__version__}\n"


def test_asking_for_help_loads_nothing_but_the_package_and_click(user):
    program = """
import sys
import click, ray
before = set(sys.modules)
from ray.scripts.scripts import cli
for arguments in ([], ["--help"], ["start", "--help"], ["stop", "--help"], ["status", "--help"]):
    try:
        cli(arguments)
    except SystemExit as exit:
        assert not exit.code
print("LOADED", *sorted(name for name in set(sys.modules) - before if name.startswith(("ray", "msgspec", "asyncio"))))
"""
    loaded = user.run(program).splitlines()[-1].split()[1:]
    assert [name for name in loaded if not name.startswith("ray.scripts")] == []
    assert set(loaded) >= {"ray.scripts.start", "ray.scripts.stop"}
    assert "ray.scripts.starting" not in loaded


def test_an_unknown_command_is_refused(user):
    done = user.ray("begin")
    assert done.returncode == 2
    assert "No such command 'begin'" in done.stderr
