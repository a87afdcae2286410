"""What every storage promises, on each of them: a file of SQLite and the real servers."""

from __future__ import annotations

import os
import time

import pytest

from ray._control import storage
from ray._control.storage import LeadershipLost, LimitExceeded, StorageUnreadable, Write
from ray._control.storage.interface import KEY_BYTES_MAX

from .servers import contents

DEADLINE_S = 20.0


def lead(opened, url: str, name: str = "a", ttl_s: float = 60) -> storage.Storage:
    leader = opened(url)
    assert leader.acquire(name, ttl_s) is not None
    return leader


def test_what_was_committed_is_there_for_whoever_opens_it_next(kind, opened):
    url = kind.url()
    leader = lead(opened, url)
    leader.commit([Write("actors", b"\0\xff", b"one"), Write("actors", b"", b""), Write("names", b"\0\xff", b"two")])
    leader.commit([Write("actors", b"\0\xff", b"three"), Write("names", b"missing", None)])
    leader.commit([Write("names", b"\0\xff", None)])
    assert contents(opened(url)) == {("actors", b"\0\xff"): b"three", ("actors", b""): b""}


def test_of_several_writes_to_a_record_in_one_batch_the_last_counts(kind, opened):
    leader = lead(opened, kind.url())
    leader.commit([Write("t", b"a", b"1"), Write("t", b"a", None), Write("t", b"b", None), Write("t", b"b", b"2")])
    assert contents(leader) == {("t", b"b"): b"2"}


def test_a_batch_may_be_larger_than_what_a_server_takes_at_once(kind, opened):
    url = kind.url()
    leader = lead(opened, url)
    leader.commit([Write("t", b"%d" % number, b"x") for number in range(1500)])
    batch = [Write("t", b"%d" % number, None) for number in range(1000)]
    batch += [Write("large", b"%d" % number, os.urandom(400_000)) for number in range(6)]
    leader.commit(batch)
    expected = {("t", b"%d" % number): b"x" for number in range(1000, 1500)}
    expected |= {(write.table, write.key): write.value for write in batch if write.value is not None}
    assert contents(opened(url)) == expected


def test_clusters_with_other_prefixes_see_and_disturb_nothing_of_each_other(kind, opened):
    base = kind.url(prefix="one")
    one, two = lead(opened, base), lead(opened, base.replace("prefix=one", "prefix=one.two"))
    one.commit([Write("t", b"k", b"1")])
    two.commit([Write("t", b"k", b"2")])
    assert (contents(one), contents(two)) == ({("t", b"k"): b"1"}, {("t", b"k"): b"2"})
    one.release()
    with pytest.raises(AssertionError):
        one.commit([Write("t", b"k", b"3")])
    two.commit([Write("t", b"k", None)])
    assert (contents(one), contents(two)) == ({("t", b"k"): b"1"}, {})


def test_only_one_holds_the_lease_and_a_released_one_is_free_at_once(kind, opened):
    url = kind.url()
    first, second = lead(opened, url), opened(url)
    assert second.acquire("b", 60) is None
    with pytest.raises(AssertionError, match="call `acquire` first"):
        second.commit([Write("t", b"k", b"v")])
    first.renew()
    assert second.acquire("b", 60) is None
    epoch = first.epoch
    first.release()
    first.release()
    assert second.acquire("b", 60) > epoch


def test_a_leader_that_was_replaced_can_neither_commit_nor_renew_nor_release(kind, opened):
    url = kind.url()
    former = lead(opened, url)
    former.commit([Write("t", b"k", b"1")])
    epoch = former.epoch
    successor = lead(opened, url)  # of the same name: the former life of the same head
    assert successor.epoch > epoch
    with pytest.raises(LeadershipLost, match=r"taken over by 'a' \(epoch \d+\)"):
        former.renew()
    with pytest.raises(LeadershipLost, match="Nothing of this commit was stored"):
        former.commit([Write("t", b"k", b"2")])
    former.release()
    assert opened(url).acquire("b", 60) is None
    successor.commit([Write("t", b"l", b"3")])
    assert contents(successor) == {("t", b"k"): b"1", ("t", b"l"): b"3"}


def test_a_commit_is_refused_even_if_no_renewal_said_that_another_leads(kind, opened):
    url = kind.url()
    former = lead(opened, url)
    lead(opened, url).release()
    with pytest.raises(LeadershipLost):
        former.commit([Write("t", b"k", b"2")])
    with pytest.raises(LeadershipLost):
        former.commit([Write("t", b"k", b"2")])
    assert contents(former) == {}


def test_a_lease_ends_by_itself_and_its_holder_may_go_on_until_another_has_it(kind, opened):
    if kind.name == "sqlite":
        pytest.skip("the lock of a living process is tested with suspended ones, in test_crashes.py")
    url = kind.url()
    former, successor = lead(opened, url, ttl_s=kind.ttl_s), opened(url)
    wait_for(lambda: kind.lease_has_ended(successor))
    lapsed_at = time.monotonic()
    assert former.lease_until < lapsed_at
    former.commit([Write("t", b"k", b"1")])  # it has lapsed, and nobody else has led
    former.ttl_s = 60
    former.renew()
    assert successor.acquire("b", 60) is None
    assert former.lease_until > lapsed_at


@pytest.mark.parametrize("number", [1, 2])
def test_a_commit_that_arrives_twice_or_late_is_applied_once(kind, opened, number):
    """As after a lost answer, or from a connection that was given up while its bytes were on their way."""
    leader = lead(opened, kind.url())
    leader.commit([Write("t", b"k", b"1")])
    before = vars(leader).copy()
    leader.commit([Write("t", b"k", b"2")])
    if number == 2:
        leader.commit([Write("t", b"k", b"3")])
    expected = contents(leader)
    late = [Write("t", b"k", b"2")] if number == 1 else [Write("t", b"k", b"late")]
    if hasattr(leader, "_fence"):
        leader._fence = before["_fence"]  # what the request said when it was sent
    if number == 1 or kind.name in ("sqlite", "redis"):
        leader._commit(leader.epoch, 2, late)
    else:
        with pytest.raises(StorageUnreadable):
            leader._commit(leader.epoch, 2, late)
    assert contents(leader) == expected
    if not hasattr(leader, "_fence"):
        leader.commit([Write("t", b"k", b"4")])
        assert contents(leader) == {("t", b"k"): b"4"}


def test_limits_are_told_before_anything_is_stored(kind, opened, monkeypatch):
    leader = lead(opened, kind.url())
    good = Write("t", b"k", b"v")
    monkeypatch.setattr("ray._control.storage.interface.BATCH_WRITES_MAX", 3)
    monkeypatch.setattr("ray._control.storage.interface.BATCH_BYTES_MAX", 5_000)
    refused = {
        "name of a table": [good, Write("No", b"k", b"v")],
        "shorter key": [good, Write("t", b"k" * (KEY_BYTES_MAX + 1), b"v")],
        f"larger than the {leader.value_bytes_max}": [good, Write("t", b"k", bytes(leader.value_bytes_max + 1))],
        "Commit it in parts": [good] * 4,
        "5000 bytes": [good, Write("t", b"l", bytes(5_000))],
    }
    for sentence, batch in refused.items():
        with pytest.raises(LimitExceeded, match=sentence):
            leader.commit(batch)
    leader.commit([])
    assert contents(leader) == {}
    leader.commit([good, Write("t", b"k" * KEY_BYTES_MAX, b"v")])
    assert len(contents(leader)) == 2


@pytest.mark.parametrize(("name", "ttl_s"), [("", 1), ("x" * 300, 1), ("a\n", 1), ("a", 0), ("a", -1), ("a", 1e9)])
def test_a_lease_without_name_or_end_is_refused(kinds, opened, name, ttl_s):
    with pytest.raises(LimitExceeded, match="a lease needs"):
        opened(kinds("sqlite").url()).acquire(name, ttl_s)


def test_a_value_may_be_as_large_as_the_limit_says(kind, opened):
    leader = lead(opened, kind.url())
    value = os.urandom(min(leader.value_bytes_max, 4 << 20))
    leader.commit([Write("t", b"k" * KEY_BYTES_MAX, value)])
    assert contents(leader) == {("t", b"k" * KEY_BYTES_MAX): value}


def test_a_newer_format_is_refused_when_it_is_opened_and_when_the_lease_is_taken(kind, opened):
    url = kind.url()
    standby = opened(url)
    kind.make_newer(url)
    for attempt in (lambda: opened(url), lambda: standby.acquire("b", 60)):
        with pytest.raises(StorageUnreadable, match=r"newer Skate \(format 2; this one reads 1\)"):
            attempt()


def test_what_somebody_else_has_written_is_refused_and_left_as_it_is(kind, opened):
    url = kind.url()
    kind.make_foreign(url)
    try:
        for _ in range(2):
            with pytest.raises(StorageUnreadable, match="not written by Skate"):
                opened(url)
    finally:
        if hasattr(kind, "undo_foreign"):
            kind.undo_foreign()


def wait_for(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
