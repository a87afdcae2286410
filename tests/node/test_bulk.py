"""`NodeCore` as the shell uses it for copies: two of them pull from each other over real sockets."""

from __future__ import annotations

import os
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ray._core import NodeCore, memfd

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def segment(content: bytes | int) -> Iterator[int]:
    size = content if isinstance(content, int) else len(content)
    fd = memfd("segment", size)
    try:
        if isinstance(content, bytes):
            os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


def node(path: Path, key: int) -> NodeCore:
    return NodeCore(path=str(path), session=b"s" * 16, token=b"t" * 32, node=key)


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def outcome(core: NodeCore) -> tuple[Any, ...]:
    events: list[tuple[Any, ...]] = []
    while not events:
        events = core.poll(20.0)
        assert events, "nothing came"
    (event,) = events
    return event


def test_a_block_is_pulled_from_the_first_node_that_has_it(tmp_path):
    content = os.urandom(300_000)
    with closing(node(tmp_path / "a", 1)) as a, closing(node(tmp_path / "b", 2)) as b, segment(content) as source:
        a.offer_segment(7, source, len(content), len(content))
        with segment(200_000) as destination:
            sources = [(1, str(tmp_path / "a"), 8, 0), (1, str(tmp_path / "a"), 7, 50_000)]
            b.pull(5, sources, 200_000, 9, destination, 0)
            kind, ticket, error, failures, count = outcome(b)
            assert (kind, ticket, error, count) == ("pulled", 5, "", 200_000)
            assert failures == [(1, True, "it refused: it does not have the segment any more")]
            assert os.pread(destination, 200_000, 0) == content[50_000:250_000]
            # The copy is a source itself, until it is withdrawn.
            with segment(200_000) as second:
                a.pull(6, [(2, str(tmp_path / "b"), 9, 0)], 200_000, 10, second, 0)
                assert outcome(a)[2] == ""
                assert os.pread(second, 200_000, 0) == content[50_000:250_000]
                b.withdraw_segment(9)
                a.pull(7, [(2, str(tmp_path / "b"), 9, 0)], 200_000, 10, second, 0)
                assert "does not have the segment" in outcome(a)[2]
        assert a.withdraw_segment(4), "nothing is offered under that number"


def test_a_pull_that_nobody_can_serve_ends_with_every_reason(tmp_path):
    with closing(node(tmp_path / "a", 1)) as a, segment(1000) as destination:
        a.pull(1, [(2, str(tmp_path / "none"), 1, 0), (3, "127.0.0.1:1", 1, 0)], 1000, 9, destination, 0)
        _, _, error, failures, _ = outcome(a)
        assert [(source, refused) for source, refused, _ in failures] == [(2, False), (3, False)]
        assert "No such file" in error
        assert "Connection refused" in error
        with pytest.raises(ValueError, match="neither ip:port nor the path"):
            a.pull(2, [(2, "nowhere", 1, 0)], 1000, 9, destination, 0)


def test_a_node_that_closes_ends_its_pulls_and_threads(tmp_path):
    before = threads()
    nodes = closing(node(tmp_path / "a", 1)), closing(node(tmp_path / "b", 2))
    with nodes[0] as a, nodes[1] as b, segment(b"x" * 1000) as source, segment(1000) as destination:
        a.offer_segment(1, source, 1000, 1000)
        b.pull(1, [(1, str(tmp_path / "a"), 1, 0)], 1000, 9, destination, 0)
        assert outcome(b)[2] == ""
        b.cancel_pull(1)
        assert len(threads() - before) > 2
    assert threads() == before
