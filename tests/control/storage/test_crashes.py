"""Heads that die or are suspended at any moment, on every storage, and servers that die under them.

What lies in the storage must be what some number of whole batches leave, no fewer than were acknowledged.
"""

from __future__ import annotations

import random
import time

import pytest

from ray._control import storage
from ray._control.storage import LeadershipLost, StorageUnavailable, Write

from .children import DEADLINE_S, Child
from .servers import contents
from .writing_child import expected

KILLS = 3
SUSPENSIONS = 2

pytestmark = [pytest.mark.slow]  # starts processes, and waits for leases to end


def whole_batches(opened: storage.Storage) -> int:
    """How many batches are there; all of each, and nothing else."""
    found = contents(opened)
    count = int(found.get(("head", b"count"), b"0"))
    assert found == expected(count)
    return count


@pytest.mark.parametrize("seed", range(KILLS))
def test_all_that_was_acknowledged_is_there_after_kill_9_and_nothing_in_part(kind, opened, seed):
    url = kind.url()
    with Child(url, "freely") as child:
        least = random.Random(seed).randrange(1, 400)
        acknowledged = child.acknowledged(least)
        child.kill()
        said = [int(line) for line in child.rest() if line]
    successor = opened(url)
    # The same head comes back: it need not wait for its former lease.
    assert successor.acquire("child", 60) is not None
    assert whole_batches(successor) >= max([acknowledged, *said])


def test_another_head_need_not_wait_for_the_lease_of_one_that_died_on_this_machine(kinds, opened):
    url = kinds("sqlite").url()
    with Child(url, "stepwise", ttl_s=3600) as child:
        assert child.line() == "0"
        successor = opened(url)
        assert successor.acquire("standby", 60) is None
        child.kill()
        assert successor.acquire("standby", 60) == 2


def test_a_head_that_was_suspended_and_replaced_learns_it_at_its_next_commit(kind, opened):
    url = kind.url()
    with Child(url, "stepwise", ttl_s=kind.ttl_s) as child:
        assert [child.line(), child.step(), child.step()] == ["0", "1", "2"]
        child.suspend()
        successor = opened(url)
        take_over(successor)
        successor.commit([Write("head", b"count", b"3"), Write("left", b"3", b"3"), Write("right", b"3", b"3")])
        child.go_on()
        assert child.step() == "LeadershipLost"
        assert "taken over by 'standby' (epoch 2)" in child.line()
        successor.renew()
        assert whole_batches(successor) == 3


@pytest.mark.parametrize("seed", range(SUSPENSIONS))
def test_a_head_that_was_suspended_in_the_middle_of_commits_changes_nothing_after_it_was_replaced(server, opened, seed):
    url = server.url()
    with Child(url, "freely", ttl_s=server.ttl_s) as child:
        acknowledged = child.acknowledged(random.Random(seed).randrange(1, 200))
        child.suspend()
        successor = opened(url)
        take_over(successor)
        count = whole_batches(successor)
        assert count >= acknowledged
        child.go_on()
        said = child.rest()
        assert "LeadershipLost" in said
        assert max((int(line) for line in said if line.isdigit()), default=0) <= count
        assert whole_batches(successor) == count


def take_over(successor: storage.Storage) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while successor.acquire("standby", 60) is None:
        assert time.monotonic() < deadline, "the lease of a suspended head did not end"
        time.sleep(0.02)


def test_a_head_goes_on_when_its_server_was_killed_and_started_again(server, opened):
    url = server.url()
    with Child(url, "freely") as child:
        acknowledged = child.acknowledged(30)
        server.kill()
        server.start()
        # What was already on its way to us says nothing: it has to get further than it can be without the server.
        acknowledged = child.acknowledged(acknowledged + 2000)
        child.suspend()
        observer = opened(url)
        assert whole_batches(observer) >= acknowledged


def test_after_a_commit_without_an_answer_nothing_is_written_before_the_lease_is_taken_again(server, opened):
    url = server.url(patience_s=0.3)
    leader = opened(url)
    assert leader.acquire("a", 60) is not None
    leader.commit([Write("t", b"k", b"1")])
    server.kill()
    for value in (b"2", b"3"):
        with pytest.raises(StorageUnavailable, match=r"not be reached since \d+\.\d s, in \d+ attempts") as caught:
            leader.commit([Write("t", b"k", value)])
        assert leader.place in str(caught.value)
    with pytest.raises(StorageUnavailable):
        storage.open(url)
    server.start()
    with pytest.raises(StorageUnavailable):
        leader.commit([Write("t", b"k", b"4")])
    assert leader.acquire("a", 60) is not None
    assert contents(leader) == {("t", b"k"): b"1"}
    leader.commit([Write("t", b"k", b"5")])
    assert contents(leader) == {("t", b"k"): b"5"}


def test_a_server_that_was_emptied_or_restored_is_not_written_to_under_an_old_epoch(server, opened):
    url = server.url()
    leader = opened(url)
    first = leader.acquire("a", 60)
    server.empty()
    with pytest.raises(storage.StorageUnreadable, match="no longer knows this cluster"):
        leader.commit([Write("t", b"k", b"1")])
    other = opened(url)
    assert other.acquire("b", 60) == first  # the same number again
    with pytest.raises(storage.StorageError):
        leader.commit([Write("t", b"k", b"1")])
    fenced = opened(url)
    fenced._epoch, fenced._token = first, leader._token  # as if it had not heard of the loss
    fenced._fence = leader._fence if hasattr(leader, "_fence") else None
    with pytest.raises(LeadershipLost):
        fenced.commit([Write("t", b"k", b"1")])
    assert contents(other) == {}
