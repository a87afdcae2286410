"""A short piece of `make soak`: many tasks and actors on several nodes, and memory that does not grow with them."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent.parent.parent / "bench" / "soak.py"

pytestmark = [pytest.mark.skate, pytest.mark.slow]


def test_nodes_do_not_grow_with_the_tasks_and_actors_that_have_ended(cluster_keeper):
    cluster_keeper.stop()
    command = [sys.executable, SOAK, "--tasks", "20000", "--actors", "200"]
    # Histories that have a limit are still filling up in so short a run.
    done = subprocess.run([*command, "--growth", "0.3"], capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("_growth") == 6
