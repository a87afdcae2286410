"""`ray start --head --state`: a head that is killed and started again goes on where it was."""

from __future__ import annotations

import os
import signal
import stat

import pytest

from ray._node import session as sessions
from tests.core.helpers import wait_until
from tests.scripts.conftest import is_listening, pid_in

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # each starts nodes and interpreters

COUNT = """
import ray
@ray.remote(num_cpus=1)
class Counter:
    count = 0
    def increment(self):
        self.count += 1
        return self.count
with ray.init(namespace="tests", log_to_driver=False):
    counter = Counter.options(name="counter", lifetime="detached", get_if_exists=True).remote()
    print(ray.get(counter.increment.remote()))
"""


def test_a_head_that_was_killed_goes_on_with_its_state(user, tmp_path):
    state = f"sqlite://{tmp_path}/state.db"
    head = ("start", "--head", "--port=6400", f"--node-ip-address={user.ip}", "--num-cpus=0", f"--state={state}")
    pid = pid_in(user.succeed(*head))
    assert stat.S_IMODE((tmp_path / "state.db.token").stat().st_mode) == 0o600
    user.succeed("start", f"--address={user.ip}:6400", "--num-cpus=1")
    assert user.run(COUNT) == "1"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_listening(f"{user.ip}:6400"), what="the end of the head")
    user.succeed(*head)
    assert user.run(COUNT) == "2", "the actor lives, and is found by its name"
    user.succeed("stop")
    for crashed in user.sessions():
        sessions.remove(str(crashed))
    user.expect_nothing()


def test_a_head_with_its_state_on_a_server_needs_a_token_that_outlives_it(user):
    error = user.fail("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--state=redis://127.0.0.1:1")
    assert "ray get-auth-token --generate" in error


def test_options_about_state_that_do_not_fit_together_are_refused(user):
    done = user.ray("start", "--head", "--standby")
    assert done.returncode == 2
    assert "--standby is for a head that shares its --state" in done.stderr
    done = user.ray("start", "--address=127.0.0.1:1", "--state=sqlite:///x")
    assert done.returncode == 2
    assert "--state is for heads" in done.stderr
