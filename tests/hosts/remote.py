"""Tasks and actors of the tests. They run in the hosts, and tell what they do by files, which all hosts share."""

import os
import threading
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.core.helpers import wait_until

WRITE_EVERY_S = 0.01


def on(node, remote, *, soft=True, **options):
    """The task or actor, to run on the node with this id, or if `soft` elsewhere when that is gone."""
    return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=soft), **options)


def node_id():
    return ray.get_runtime_context().get_node_id()


@ray.remote
class Writer:
    """Writes to a file all the time, whether anybody calls it or not: "TIME PID" for each effect that it has."""

    def __init__(self, path):
        self._path = Path(path)
        self._calls = 0
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self):
        with self._path.open("a", buffering=1) as file:
            while True:
                file.write(f"{time.monotonic():.4f} {os.getpid()}\n")
                time.sleep(WRITE_EVERY_S)

    def where(self):
        return node_id(), os.getpid()

    def call(self):
        self._calls += 1
        return self._calls


@ray.remote
class Plain:
    """An actor as others are."""

    def __init__(self, log=None):
        if log is not None:
            with Path(log).open("a") as file:
                file.write(f"{node_id()}\n")

    def where(self):
        return node_id()

    def echo(self, value):
        return value


@ray.remote
def square(number):
    return number * number


@ray.remote
def where():
    return node_id()


@ray.remote
def hold(log, gate):
    """Say where it runs, wait for a file, and return where it ran."""
    with Path(log).open("a") as file:
        file.write(f"{node_id()}\n")
    wait_until(Path(gate).exists, 120, "the gate's opening")
    return node_id()


@ray.remote
def ask(actor, value):
    """Call an actor from within a task."""
    return ray.get(actor.echo.remote(value))
