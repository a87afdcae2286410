from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

import pytest

from ray._node import logs
from ray._node.logs import LINE_BYTES_MAX, Line, LogFiles, LogStream
from ray._protocol import log_mark

if TYPE_CHECKING:
    from pathlib import Path


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_lines_are_handed_on_when_they_are_complete():
    stream = LogStream(0.0)
    assert stream.feed(b"on", 0.0) == []
    assert texts(stream.feed(b"e\ntwo\r\nthr", 0.0)) == ["one", "two"]
    assert texts(stream.end(0.0)) == ["thr"]
    assert stream.end(0.0) == []


def test_empty_lines_are_lines_and_broken_text_is_shown():
    assert texts(LogStream(0.0).feed(b"\n\xff\n", 0.0)) == ["", "\ufffd"]


def test_a_line_is_cut_and_its_rest_is_not_taken_for_another():
    stream = LogStream(0.0)
    first = stream.feed(b"x" * (LINE_BYTES_MAX + 1), 0.0)
    assert texts(first) == ["x" * LINE_BYTES_MAX + " [cut]"]
    assert stream.feed(b"y" * 100_000, 0.0) == []
    assert texts(stream.feed(b"y\nnext\n", 0.0)) == ["next"]


def test_the_memory_for_an_endless_line_is_bounded():
    stream = LogStream(0.0)
    for _ in range(100):
        stream.feed(b"z" * LINE_BYTES_MAX, 0.0)
    assert len(stream._partial) <= LINE_BYTES_MAX


def test_beyond_the_rate_lines_are_counted_and_the_count_is_told():
    stream = LogStream(0.0)
    line = b"x" * 1023 + b"\n"
    burst = logs.BURST_BYTES // len(line)
    assert len(stream.feed(line * (burst + 100), 0.0)) == burst
    assert stream.deadline == logs.DROP_NOTE_S
    assert "100 lines were left out" in stream.note(1.0)[0].text
    assert stream.note(1.0) == []
    assert len(stream.feed(line * 10_000, 2.0)) == pytest.approx(2 * logs.STREAM_BYTES_PER_S / len(line), abs=1)


@pytest.fixture
def files(tmp_path: Path):
    made = LogFiles(str(tmp_path))
    made.open()
    yield made
    made.close()


def drain(files: LogFiles) -> list[str]:
    """All lines until nothing is readable any more."""
    lines: list[str] = []
    while select.select([files._inotify], [], [], 0)[0]:
        for _, message in files.read_changed(0.0):
            lines += message.lines
    return lines


def test_a_backlog_is_read_to_its_end_without_another_write(files: LogFiles, tmp_path: Path):
    text = "".join(f"{number:01023d}\n" for number in range(3000))
    (tmp_path / "worker-00000000000000aa-12.out").write_text(text)
    lines = drain(files)
    assert [int(line) for line in lines] == list(range(3000))


def test_files_that_are_not_workers_are_not_read(files: LogFiles, tmp_path: Path):
    (tmp_path / "node.log").write_text("private\n")
    (tmp_path / "worker-x.out").write_text("private\n")
    assert drain(files) == []


def test_a_file_beyond_its_limit_is_emptied_and_goes_on(
    files: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "FILE_BYTES_MAX", 100)
    path = tmp_path / "worker-00000000000000aa-12.out"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"a" * 99 + b"\nb\n")
    assert drain(files) == ["a" * 99, "b"]
    assert path.stat().st_size == 0
    os.write(fd, b"c\n")
    os.close(fd)
    assert drain(files) == ["c"]


def test_the_tail_prefers_errors_and_keeps_both(files: LogFiles, tmp_path: Path):
    (tmp_path / "worker-00000000000000aa-12.out").write_text("".join(f"out {n}\n" for n in range(30)))
    (tmp_path / "worker-00000000000000aa-12.err").write_text("err 1\n\nerr 2")
    rest, tail = files.end(0xAA, 12, 0.0)
    assert tail[-2:] == ("err 1", "err 2")
    assert len(tail) == logs.TAIL_LINES
    assert tail[0] == "out 12"
    assert {message.stream for _, message in rest} == {1, 2}


def test_names_stay_until_the_worker_does_something_else(files: LogFiles, tmp_path: Path):
    path = tmp_path / "worker-00000000000000aa-12.out"
    files.set_label(0xAA, "f")
    files.set_label(0xAA, "")
    path.write_text("late\n")
    ((proc, message),) = list(files.read_changed(0.0))
    assert (proc, message.name, message.pid) == (0xAA, "f", 12)


def test_files_of_the_dead_are_kept_to_a_number_and_empty_ones_not_at_all(
    files: LogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "FILES_KEPT", 2)
    for pid in range(4):
        (tmp_path / f"worker-00000000000000aa-{pid}.out").write_text("x\n")
        (tmp_path / f"worker-00000000000000aa-{pid}.err").write_text("")
        files.end(0xAA, pid, 0.0)
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "worker-00000000000000aa-2.out",
        "worker-00000000000000aa-3.out",
    ]


def test_a_line_without_its_end_is_shown_after_a_while_and_its_end_is_not_an_empty_line():
    stream = LogStream(0.0)
    assert stream.feed(b"name? ", 1.0) == []
    assert stream.partial_due == 1.0 + logs.PARTIAL_S
    assert stream.due(1.1) == []
    assert texts(stream.due(2.0)) == ["name? "]
    assert stream.partial_due is None
    assert stream.feed(b"\n", 3.0) == []
    assert texts(stream.feed(b"\n", 3.0)) == [""]


def test_what_a_carriage_return_goes_back_over_is_not_shown():
    stream = LogStream(0.0)
    assert texts(stream.feed(b"\r10%\r20%\r100%\nnext\r\n", 0.0)) == ["100%", "next"]
    assert stream.feed(b"\r10%\r20%", 0.0) == []
    assert texts(stream.due(logs.PARTIAL_S)) == ["20%"]
    assert texts(stream.feed(b"\r30%\n", 1.0)) == ["30%"]


def test_marks_say_whose_the_lines_are_and_are_not_shown(files: LogFiles, tmp_path: Path):
    path = tmp_path / "worker-00000000000000aa-12.out"
    files.set_label(0xAA, "own")
    path.write_bytes(b"a\n" + log_mark("f") + b"b\n" + log_mark("g\x07\n") + b"c\nd\n" + log_mark("") + b"e\n")
    messages = [message for _, message in files.read_changed(0.0)]
    assert [(m.name, m.lines) for m in messages] == [("own", ["a"]), ("f", ["b"]), ("g", ["c", "d"]), ("own", ["e"])]
    assert files.end(0xAA, 12, 0.0)[1] == ("a", "b", "c", "d", "e")


def test_a_mark_in_what_is_not_shown_counts_all_the_same():
    stream = LogStream(0.0)
    stream.feed(b"x" * (LINE_BYTES_MAX + 1), 0.0)
    assert stream.feed(b"more" + log_mark("f") + b"still more", 0.0) == []
    assert stream.feed(b"\nnext\n", 0.0) == [Line("f", "next")]
    assert stream.feed(b"begun", 0.0) == stream.feed(log_mark("g"), 0.0) == []
    assert stream.due(1.0) == [Line("g", "begun")]


def test_a_mark_alone_is_no_line():
    stream = LogStream(0.0)
    assert stream.feed(log_mark("f"), 0.0) == []
    assert stream.due(1.0) == stream.end(2.0) == []
