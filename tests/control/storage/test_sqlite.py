"""The file: what is refused, what is private, and what a second process may and may not do to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ray._control.storage import StorageUnavailable, StorageUnreadable, Write
from ray._control.storage.url import parse

from .servers import contents, sqlite_of
from .test_contract import lead


@pytest.fixture
def url(kinds) -> str:
    return kinds("sqlite").url()


def test_a_file_that_is_no_database_is_refused_and_left_alone(url, opened):
    path = Path(parse(url).path)
    path.write_bytes(b"Dear diary, today I was not a database." * 100)
    before = path.read_bytes()
    with pytest.raises(StorageUnreadable, match="is damaged, or no file of Skate's: file is not a database"):
        opened(url)
    assert path.read_bytes() == before


def test_a_damaged_file_is_refused_with_what_to_do(url, opened):
    leader = lead(opened, url)
    leader.commit([Write("t", b"%d" % number, os.urandom(200)) for number in range(2000)])
    leader.close()
    path = Path(parse(url).path)
    data = bytearray(path.read_bytes())
    for page in range(2 * 4096, len(data), 4096):  # the header and the schema stay
        data[page : page + 64] = os.urandom(64)
    path.write_bytes(data)
    with pytest.raises(StorageUnreadable, match=r"is damaged.*restore it from a backup") as caught:
        opened(url)
    assert "nothing was changed" in str(caught.value)
    assert path.read_bytes() == data


def test_what_was_not_finished_when_the_power_went_is_not_there(url, opened):
    """A log that ends in the middle of a commit, as a disk may leave it."""
    leader = lead(opened, url)
    leader.commit([Write("t", b"whole", b"1")])
    path = Path(parse(url).path + "-wal")
    whole = path.stat().st_size
    leader.commit([Write("t", b"part", b"2" * 10_000), Write("t", b"whole", b"2")])
    torn = path.read_bytes()[: whole + (path.stat().st_size - whole) // 2]
    copy = parse(url).path + ".copy"
    Path(copy).write_bytes(Path(parse(url).path).read_bytes())
    Path(copy + "-wal").write_bytes(torn)
    assert contents(opened(f"sqlite://{copy}")) == {("t", b"whole"): b"1"}


def test_commits_reach_the_disk_and_renewals_do_not_wait_for_it(url, opened):
    leader = lead(opened, url)
    assert leader._sql.execute("PRAGMA synchronous").fetchone()[0] == 2
    leader.renew()
    assert leader._sql.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert leader._sql.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_nobody_else_may_read_the_files(url, opened):
    leader = lead(opened, url)
    leader.commit([Write("t", b"k", b"v")])
    files = list(Path(parse(url).path).parent.glob(Path(parse(url).path).name + "*"))
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_directory_that_does_not_exist_is_named(opened):
    with pytest.raises(StorageUnavailable, match=r"No such file or directory: /nowhere/state.db.lease"):
        opened("sqlite:///nowhere/state.db")


def test_a_disk_without_space_fails_the_commit_and_keeps_what_was_there(url, opened):
    leader = lead(opened, url)
    leader.commit([Write("t", b"k", b"1")])
    leader._sql.execute(f"PRAGMA max_page_count = {leader._sql.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(StorageUnavailable, match=r"is full\. Free space on its disk"):
        leader.commit([Write("t", b"k", b"2"), Write("t", b"l", bytes(100_000))])
    with pytest.raises(StorageUnavailable):
        leader.commit([Write("t", b"k", b"3")])
    assert contents(opened(url)) == {("t", b"k"): b"1"}


def test_while_another_process_writes_the_lease_is_not_to_be_had_and_a_commit_fails(url, opened):
    url += "?patience_s=0.05"
    leader, standby = lead(opened, url), opened(url)
    with sqlite_of(url) as other:
        other.execute("BEGIN IMMEDIATE")
        assert standby.acquire("b", 60) is None
        with pytest.raises(StorageUnavailable, match="another process has been writing"):
            leader.commit([Write("t", b"k", b"v")])
        other.execute("ROLLBACK")
    assert leader.acquire("a", 60) == 2
    leader.commit([Write("t", b"k", b"v")])


def test_a_storage_that_is_closed_lets_go_of_the_lease(url, opened):
    former, successor = lead(opened, url), opened(url)
    assert successor.acquire("b", 60) is None
    former.close()
    former.close()
    assert successor.acquire("b", 60) == 2


def test_clusters_in_one_file_have_leases_of_their_own(url, opened):
    one, two = lead(opened, url + "?prefix=one", "a"), lead(opened, url + "?prefix=two", "b")
    other = opened(url + "?prefix=one")
    assert other.acquire("c", 60) is None
    one.close()
    assert other.acquire("c", 60) == 2
    two.commit([Write("t", b"k", b"v")])


def test_a_storage_of_a_path_with_strange_characters(kinds, opened):
    directory = Path(kinds("sqlite").directory) / "a b?c"
    directory.mkdir()
    lead(opened, f"sqlite://{str(directory).replace(' ', '%20').replace('?', '%3F')}/x.db")
    assert (directory / "x.db").exists()
