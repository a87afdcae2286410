"""The public API on a core of one process; see `fake_core`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1] / "python"))

import fake_core  # noqa: E402

sys.modules["ray._core"] = fake_core  # type: ignore[assignment]

import ray  # noqa: E402
from ray._runtime import context, session  # noqa: E402

ray._core = fake_core  # type: ignore[attr-defined]


def join(requests: dict[str, Any] | None = None) -> fake_core.Core:
    core = fake_core.Core(hooks=session.hooks(), requests=requests)
    session.attach(core, session.SCRIPT_MODE)  # type: ignore[arg-type]
    session.apply_job({"namespace": "here", "job_number": 1})
    return core


@pytest.fixture
def core() -> Iterator[fake_core.Core]:
    """This process in a cluster."""
    made = join()
    yield made
    left = session.detach()
    if left is not None:
        left.close()


@pytest.fixture
def worker_core() -> Iterator[fake_core.FakeWorkerCore]:
    """What a worker of a cluster sees."""
    made = fake_core.FakeWorkerCore(session.hooks())
    session.attach(made, session.WORKER_MODE)  # type: ignore[arg-type]
    session.apply_job({"namespace": "here"})
    yield made
    session.detach()
    context.actor = None
