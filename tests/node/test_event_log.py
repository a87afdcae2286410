"""The event log on real files: what is appended is read again, in bounded space, whatever the disk does."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import pytest

from ray._node import event_log, session
from ray._node.event_log import EventLog
from ray._runtime import history

NODE = 7


def batch(*tasks: int, text: str = "", actor: bytes = b"") -> bytes:
    """Records of tasks that took a millisecond each, as a core encodes them."""
    encoded = text.encode()
    definitions = struct.pack("<BB16s", 2 if actor else 0, bool(actor), actor)
    definitions += struct.pack("<H", 1) + b"f" + struct.pack("<H", 0)
    texts = struct.pack("<H", len(encoded)) + encoded if text else b""
    records = b"".join(
        struct.pack("<24sQQIHHBBxx", task_id(task), task * 10**9, 10**6, 0, 0, bool(text), 1 if text else 0, 1)
        for task in tasks
    )
    return struct.pack("<IIII", len(tasks), len(definitions), len(texts), 0) + definitions + texts + records


def task_id(number: int) -> bytes:
    return bytes(16) + number.to_bytes(8, "big")


def numbers(directory: Path) -> list[int]:
    """Tasks in a log, in the order in which they are read."""
    return [int.from_bytes(x.task[16:], "big") for x in history.attempts(history.Directory(str(directory)))]


@pytest.fixture
def log(tmp_path):
    log = EventLog(str(tmp_path / "events"), NODE)
    yield log
    log.close()


def test_nothing_is_written_before_the_first_record(log, tmp_path):
    assert list(tmp_path.iterdir()) == []
    assert log.append(1, 2, 3, batch(1)) == ""
    assert [path.name for path in (tmp_path / "events").iterdir()] == ["00000001.events"]


def test_what_was_appended_is_read_again_with_who_sent_it(log, tmp_path):
    log.append(11, 12, 13, batch(1, text="it broke", actor=b"a" * 16))
    log.append(21, 22, 23, batch(2, 3))
    found = list(history.attempts(history.Directory(str(tmp_path / "events"))))
    assert [(x.task, x.proc, x.pid, x.job, x.node) for x in found] == [
        (task_id(3), 21, 22, 23, NODE),
        (task_id(2), 21, 22, 23, NODE),
        (task_id(1), 11, 12, 13, NODE),
    ]
    last = found[-1]
    assert (last.outcome, last.text, last.start_ns, last.run_ns, last.ran) == (1, "it broke", 10**9, 10**6, True)
    assert last.of == history.Definition(2, b"a" * 16, "f", "")
    assert found[0].of.actor == b""


def test_one_task_is_found_among_others(log, tmp_path):
    for number in range(5):
        log.append(1, 2, 3, batch(2 * number, 2 * number + 1))
    found = list(history.attempts(history.Directory(str(tmp_path / "events")), task_id(7)))
    assert [x.task for x in found] == [task_id(7)]


def test_a_full_segment_is_followed_by_the_next_and_the_oldest_goes(log, tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "SEGMENT_BYTES_MAX", 400)
    monkeypatch.setattr(event_log, "SEGMENTS_MAX", 3)
    for number in range(40):
        log.append(1, 2, 3, batch(number))
    names = sorted(path.name for path in (tmp_path / "events").iterdir())
    assert len(names) == 3
    assert all(path.stat().st_size <= 400 for path in (tmp_path / "events").iterdir())
    found = numbers(tmp_path / "events")
    assert found == list(range(39, 39 - len(found), -1)), "the newest are there, the last first"
    assert len(found) < 40


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_segment_that_a_crash_has_cut_is_read_up_to_there(log, tmp_path, cut):
    log.append(1, 2, 3, batch(1))
    log.append(1, 2, 3, batch(2))
    path = tmp_path / "events" / "00000001.events"
    path.write_bytes(path.read_bytes()[:-cut])
    assert numbers(tmp_path / "events") == [1]


def test_a_garbled_block_ends_the_reading_of_its_segment(log, tmp_path):
    for number in (1, 2, 3):
        log.append(1, 2, 3, batch(number))
    path = tmp_path / "events" / "00000001.events"
    data = bytearray(path.read_bytes())
    size = (len(data) - history.HEADER.size) // 3
    data[history.HEADER.size + size + history.BLOCK.size + 5] ^= 0xFF
    path.write_bytes(data)
    assert numbers(tmp_path / "events") == [1]


def test_a_batch_that_keeps_to_no_format_is_skipped(log, tmp_path):
    log.append(1, 2, 3, batch(1))
    log.append(1, 2, 3, b"\xff" * 20)
    log.append(1, 2, 3, b"")
    log.append(1, 2, 3, batch(2))
    assert numbers(tmp_path / "events") == [2, 1]


def test_a_log_of_another_version_is_refused_by_name(log, tmp_path):
    log.append(1, 2, 3, batch(1))
    path = tmp_path / "events" / "00000001.events"
    data = bytearray(path.read_bytes())
    data[8] = 99
    path.write_bytes(data)
    with pytest.raises(ValueError, match="version 99"):
        numbers(tmp_path / "events")


@pytest.fixture
def small_files():
    """Makes every file of this process end at a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_batches_and_no_more_and_is_mentioned_once(log, tmp_path, small_files):
    log.append(1, 2, 3, batch(1))
    path = tmp_path / "events" / "00000001.events"
    small_files(path.stat().st_size + 20)
    assert "cannot be written" in log.append(1, 2, 3, batch(2))
    assert log.append(1, 2, 3, batch(3)) == ""
    small_files(1 << 30)
    assert "2 batches were lost" in log.append(1, 2, 3, batch(4))
    assert numbers(tmp_path / "events") == [4, 1]


def session_with_log(base: Path, number: int) -> Path:
    path = base / f"session_2026010{number}-000000_1_abc"
    (path / "logs").mkdir(parents=True)
    log = EventLog(f"{path}/events", NODE)
    log.append(1, 2, 3, batch(number))
    log.close()
    return path


def test_logs_of_the_last_sessions_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_EVENT_LOGS_KEPT", "2")
    for number in (1, 2, 3):
        path = session_with_log(tmp_path, number)
        event_log.keep(str(path))
        session.remove(str(path))
    assert [path.name for path in tmp_path.iterdir()] == ["history"]
    logs = history.logs_under(str(tmp_path / "history"))
    assert [int.from_bytes(x.task[16:], "big") for log in logs for x in history.attempts(log)] == [2, 3]


def test_no_log_is_kept_if_none_is_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_EVENT_LOGS_KEPT", "0")
    path = session_with_log(tmp_path, 1)
    event_log.keep(str(path))
    session.remove(str(path))
    assert list(tmp_path.iterdir()) == []


def test_where_no_log_is_the_reader_is_told_where_they_are(tmp_path):
    with pytest.raises(ValueError, match="directory 'history' beside"):
        history.logs_under(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
