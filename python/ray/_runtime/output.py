"""A worker's output, marked with the names of the tasks that print it.

One worker runs tasks of many names, and several threads of it may print. So the lines themselves say whose they are:
where the name changes within a stream, a mark is written before the next bytes. The node reads and removes the marks
(`ray._node.logs`). A terminal shows nothing of them, should somebody look at the file itself.

What does not come through `sys.stdout` and `sys.stderr`, such as the output of subprocesses, goes with the last name.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from ray._protocol import log_mark
from ray._runtime import context

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["install", "use_own_name"]


class MarkedOutput(io.FileIO):
    """The descriptor of a standard stream. Writes a mark where the name of the writing task changes."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "wb", closefd=False)
        self.marked = ""

    def write(self, data: ReadableBuffer, /) -> int:
        task = context.task.get(None)
        name = "" if task is None or context.actor is not None else task.name
        if name and name != self.marked:
            self.mark(name)
        return super().write(data)

    def mark(self, name: str) -> None:
        self.marked = name
        os.write(self.fileno(), log_mark(name))


def _marked(stream: TextIO) -> tuple[TextIO, MarkedOutput]:
    stream.flush()
    raw = MarkedOutput(stream.fileno())
    text = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, newline="\n", line_buffering=True
    )
    text.mode = "w"  # type: ignore[misc]
    return text, raw


_streams: list[MarkedOutput] = []


def install() -> None:
    """Puts marking streams in the place of `sys.stdout` and `sys.stderr`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:
            text, raw = _marked(stream)
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)
            _streams.append(raw)


def use_own_name() -> None:
    """From now on this process is an actor, whose name the node knows."""
    for raw in _streams:
        if raw.marked:
            raw.mark("")
