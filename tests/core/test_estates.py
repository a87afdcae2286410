"""Objects outlive their creator: its process is killed, and everybody who holds a reference goes on reading.

The killing is done with SIGKILL as soon as the reference has arrived, so that nothing is left to do for the dying.
"""

import gc
import os
import signal

import numpy as np
import pytest

import ray
from ray._runtime import session
from ray.exceptions import OwnerDiedError

from .helpers import Gate, is_alive, wait_until

pytestmark = pytest.mark.skate

LARGE = 300_000  # bytes, beyond what travels in messages
PUTS = 100


@ray.remote(num_cpus=0)
class Owner:
    """Puts what it is told to, and hands out references."""

    def process_id(self):
        return os.getpid()

    def put(self, *values):
        return [ray.put(value) for value in values]


@ray.remote(num_cpus=0)
class Reader:
    """Keeps references, and reads them when it is asked to."""

    def __init__(self):
        self.kept = None

    def process_id(self):
        return os.getpid()

    def keep(self, references):
        self.kept = references

    def read(self):
        return [summary(value) for value in ray.get(self.kept, timeout=20)]

    def forget(self):
        self.kept = None
        gc.collect()


def summary(value):
    return int(value.sum()) if isinstance(value, np.ndarray) else value


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def used_bytes():
    """What the store lends, apart from what it keeps warm."""
    now = session.request("stats")
    return now["store_bytes_used"] - now["store_bytes_warm"]


@pytest.fixture
def nothing_left(cluster):
    """After the test the node keeps nothing for anybody who has died, and its store is as it was."""
    ray.put(np.zeros(LARGE, np.uint8))  # the driver keeps a segment from now on
    before = used_bytes()
    yield
    gc.collect()

    def is_settled():
        now = session.request("stats")
        return now["estates"] == 0 and now["estate_claims"] == 0 and used_bytes() <= before

    wait_until(is_settled, what="end of all estates")


def test_a_large_value_outlives_its_creator_for_the_driver_and_an_actor(nothing_left):
    reader = Reader.remote()
    for trial in range(PUTS // 2):
        owner = Owner.remote()
        pid = ray.get(owner.process_id.remote())
        references = ray.get(owner.put.remote(np.full(LARGE, trial, np.uint8)))
        kept = reader.keep.remote(references)
        kill(pid)
        ray.get(kept)
        assert ray.get(references[0], timeout=20)[0] == trial
        assert ray.get(reader.read.remote(), timeout=20) == [LARGE * trial]


def test_a_small_value_outlives_its_creator_for_the_driver_and_an_actor(nothing_left):
    reader = Reader.remote()
    for trial in range(PUTS // 2):
        owner = Owner.remote()
        pid = ray.get(owner.process_id.remote())
        references = ray.get(owner.put.remote(f"trial {trial}"))
        kept = reader.keep.remote(references)
        kill(pid)
        ray.get(kept)
        assert ray.get(references[0], timeout=20) == f"trial {trial}"
        assert ray.get(reader.read.remote(), timeout=20) == [f"trial {trial}"]
