"""What `remote.Writer`s did, from their file: who had effects, and when."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def lives(path: Path) -> list[tuple[int, float, float]]:
    """For each process that has written its pid, and when it did for the first and the last time; in order."""
    spans: dict[int, tuple[float, float]] = {}
    for line in path.read_text().splitlines():
        time, pid = line.split()
        first, _ = spans.get(int(pid), (float(time), 0.0))
        spans[int(pid)] = (first, float(time))
    return sorted(((pid, first, last) for pid, (first, last) in spans.items()), key=lambda life: life[1])


def expect_one_at_a_time(path: Path) -> None:
    """Fail if two processes have written in the same time."""
    for (one, _, last), (other, first, _) in itertools.pairwise(lives(path)):
        assert last < first, f"process {one} wrote until {last:.3f}, and {other} from {first:.3f}: two copies lived"


def has_written(path: Path, pid: int) -> bool:
    return path.exists() and f" {pid}\n" in path.read_text()
