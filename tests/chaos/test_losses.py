"""Values whose shared memory is lost: made again from their lineage, or an error that says why not.

A worker that made values is killed, so that the node adopts its segments, and then the node is told to
lose them (a request that it knows only when it checks its invariants).
"""

import contextlib
import os
import signal

import numpy as np
import pytest

import ray
from tests.core.helpers import Tally, is_alive, wait_until

COUNT = 200_000  # numbers, of 8 bytes: too large for a message

pytestmark = pytest.mark.skate


@pytest.fixture
def lose(fresh_cluster, monkeypatch, tmp_path):
    """A cluster of two CPUs, and a function that kills the processes in a tally and loses their memory."""
    monkeypatch.setenv("RAY_VALIDATE", "1")
    fresh_cluster(num_cpus=2)
    from ray._runtime import session

    def kill_and_lose(tally):
        pids = {int(line) for line in tally.lines()}
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: session.request("stats")["segments_adopted"] >= len(pids), what="adoption")
        assert session.request("test.lose_segments") > 0

    return kill_and_lose


def maker(tally, **options):
    @ray.remote(**{"max_retries": 3, **options})
    def make(number, *_after):
        tally.add(os.getpid())
        return np.full(COUNT, number)

    return make


def test_a_lost_result_is_made_again_for_its_owner(lose, tmp_path):
    tally = Tally(tmp_path)
    reference = maker(tally).remote(7)
    ray.wait([reference])
    lose(tally)
    assert (ray.get(reference, timeout=20) == 7).all()
    assert tally.count() == 2


def test_a_lost_argument_is_made_again_for_the_task_that_reads_it(lose, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote
    def total(array):
        return int(array.sum())

    reference = maker(tally).remote(3)
    ray.wait([reference])
    lose(tally)
    assert ray.get(total.remote(reference), timeout=20) == 3 * COUNT
    assert tally.count() == 2


def test_a_lost_value_is_made_again_for_a_borrower(lose, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote
    def total(references):
        return int(ray.get(references[0]).sum())

    reference = maker(tally).remote(3)
    ray.wait([reference])
    lose(tally)
    assert ray.get(total.remote([reference]), timeout=20) == 3 * COUNT


def test_what_a_lost_value_was_made_of_is_made_again_too(lose, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote
    def double(array):
        tally.add(os.getpid())
        return array * 2

    second = double.remote(maker(tally).remote(4))
    ray.wait([second])
    lose(tally)
    assert (ray.get(second, timeout=20) == 8).all()
    assert tally.count() == 4


def test_the_constructor_of_a_restarted_actor_gets_a_lost_argument_again(lose, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(max_restarts=1, max_task_retries=1, num_cpus=0)
    class Holder:
        def __init__(self, array):
            self.total = int(array.sum())

        def read(self):
            return os.getpid(), self.total

    reference = maker(tally).remote(5)
    holder = Holder.remote(reference)
    pid, total = ray.get(holder.read.remote())
    assert total == 5 * COUNT
    lose(tally)
    with contextlib.suppress(ProcessLookupError):  # the maker's worker, ended by `lose`, may have become the actor
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what="end of the actor")
    again, total = ray.get(holder.read.remote(), timeout=20)
    assert (again != pid, total) == (True, 5 * COUNT)


def test_a_lost_value_that_must_not_be_made_again_is_an_error(lose, tmp_path):
    tally = Tally(tmp_path)
    reference = maker(tally, max_retries=0).remote(7)
    ray.wait([reference])
    lose(tally)
    with pytest.raises(ray.exceptions.ObjectLostError, match="max_retries"):
        ray.get(reference, timeout=20)
    assert tally.count() == 1


def test_a_view_outlives_the_loss(lose, tmp_path):
    tally = Tally(tmp_path)
    array = ray.get(maker(tally).remote(7))
    lose(tally)
    assert (array == 7).all()
