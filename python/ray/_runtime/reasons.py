"""Why something is not there yet, by its id: an object, a task, or an actor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray._runtime import rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._core import Core
    from ray._runtime.asking import Asker

__all__ = ["explain"]

OBJECT_BYTES, TASK_BYTES, ACTOR_BYTES = 28, 24, 16
NO_TASK = "no task of its owner makes it"  # the core's words for what is over, or never was


def explain(asker: Asker, id: str) -> list[tuple[str, str]]:
    """The chain of reasons down to the root, as (what, why), outermost first.

    Raises:
        ValueError: If `id` is not the id of an object, a task or an actor in hexadecimal.
    """
    try:
        raw = bytes.fromhex(id)
    except ValueError:
        raw = b""
    if len(raw) == ACTOR_BYTES:
        return list(_of_actor(asker, raw))
    if len(raw) == TASK_BYTES:
        return _of_task(asker, raw)
    if len(raw) == OBJECT_BYTES:
        return _of_object(asker.core, raw)
    message = (
        f"{id!r} is no id: an object's has {2 * OBJECT_BYTES} hexadecimal digits, a task's {2 * TASK_BYTES}, "
        f"an actor's {2 * ACTOR_BYTES}"
    )
    raise ValueError(message)


def _of_object(core: Core, id: bytes) -> list[tuple[str, str]]:
    return core.why_id(id)


def _of_task(asker: Asker, id: bytes) -> list[tuple[str, str]]:
    chain = _of_object(asker.core, id + bytes(4))
    attempts = rows.tasks(asker, [("task_id", "=", id.hex())], rows.ROWS_MAX).rows
    ended = [row for row in attempts if row["state"] in ("FINISHED", "FAILED")]
    shown = [(f"task {id.hex()}", text) for text in map(_ended, sorted(ended, key=lambda row: row["attempt_number"]))]
    if ended and len(ended) == len(attempts):
        return shown
    return [*shown, *chain]


def _ended(row: dict[str, object]) -> str:
    where = f" in process {row['worker_pid']}" if row["worker_pid"] else ""
    what = f"attempt {row['attempt_number']} of {row['name']} has ended{where}: {row['state']}"
    error = f" ({row['error_type']})" if row["error_type"] else ""
    message = str(row["error_message"] or "").strip().rpartition("\n")[2]
    return what + error + (f": {message}" if message else "")


def _of_actor(asker: Asker, id: bytes) -> Iterator[tuple[str, str]]:
    yield f"actor {id.hex()}", str(asker.request("why.actor", actor=id))
    # While its creation waits for arguments only its owner knows of it.
    for row in rows.tasks(asker, [("actor_id", "=", id.hex())], rows.ROWS_MAX).rows:
        if row["type"] == "ACTOR_CREATION_TASK" and row["state"] == "PENDING_ARGS_AVAIL":
            yield f"task {row['task_id']}", "its creation waits for an argument"
