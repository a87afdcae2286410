"""Lines of workers: prefixed, and folded when several workers print the same."""

from __future__ import annotations

from ray._runtime import logs
from ray._runtime.logs import KEYS_MAX, Folder, Output, UnhandledErrors, format_line


def test_first_line_is_shown_at_once_and_echoes_are_counted() -> None:
    folder = Folder(fold_s=5)
    assert folder.handle("f", 1, 1, ["hello"], now=0) == [Output(1, "f", 1, "hello", 0)]
    assert folder.deadline() is None
    assert folder.handle("f", 2, 1, ["hello"], now=1) == []
    assert folder.handle("f", 3, 1, ["hello", "other"], now=2) == [Output(1, "f", 3, "other", 0)]
    assert folder.deadline() == 5
    assert folder.flush(now=5) == [Output(1, "f", 3, "hello", 2)]
    assert folder.deadline() is None
    assert folder.handle("f", 4, 1, ["hello"], now=6) == [Output(1, "f", 4, "hello", 0)]


def test_lines_of_other_nodes_name_them_and_equal_pids_there_are_other_processes() -> None:
    folder = Folder(fold_s=5)
    (there,) = folder.handle("f", 1, 1, ["hello"], now=0, ip="10.0.0.2")
    assert format_line(there, colour=False) == "(f pid=1, ip=10.0.0.2) hello\n"
    assert folder.handle("f", 1, 1, ["hello"], now=1, ip="10.0.0.3") == []
    assert folder.flush(now=5) == [Output(1, "f", 1, "hello", 1, "10.0.0.3")]


def test_process_that_repeats_itself_is_not_folded() -> None:
    folder = Folder(fold_s=5)
    assert len(folder.handle("f", 1, 1, ["a", "a", "a"], now=0)) == 3


def test_streams_are_apart_and_blank_lines_are_kept() -> None:
    folder = Folder(fold_s=5)
    folder.handle("f", 1, 1, ["x", ""], now=0)
    assert len(folder.handle("f", 2, 2, ["x"], now=0)) == 1
    assert len(folder.handle("f", 2, 1, [""], now=0)) == 1


def test_memory_is_bounded() -> None:
    folder = Folder(fold_s=5)
    folder.handle("f", 1, 1, [str(i) for i in range(KEYS_MAX + 100)], now=0)
    assert len(folder._seen) == KEYS_MAX
    folder.flush(now=6)
    assert not folder._seen


def test_colour_only_on_terminals() -> None:
    output = Output(1, "f", 7, "hello", 3)
    assert format_line(output, colour=False) == "(f pid=7) hello [repeated 3x across cluster]\n"
    assert "\033[" in format_line(output, colour=True)


def test_of_many_unhandled_errors_some_are_shown_and_the_others_counted():
    errors = UnhandledErrors()
    shown = [line for number in range(30) for line in errors.handle(f"error {number}", 0.0)]
    assert len(shown) == logs.UNHANDLED_MAX
    assert errors.handle("later", logs.FOLD_S)[0].startswith("20 further")
    assert errors.flush() == []


def test_line_of_one_other_process_is_shown_plainly() -> None:
    assert format_line(Output(1, "f", 7, "hello", 1), colour=False) == "(f pid=7) hello\n"
