"""Why something is not there yet, or is gone, by its id: an object, a task, an actor, a group, a node or a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime import rows
from ray._runtime.ids import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray._runtime.asking import Asker

__all__ = ["explain"]

OBJECT_BYTES, TASK_BYTES, GROUP_BYTES, ACTOR_BYTES = 28, 24, 18, 16

Chain = list[tuple[str, str]]


def explain(asker: Asker, id: str) -> Chain:
    """The chain of reasons down to the root, as (what, why), outermost first.

    Raises:
        ValueError: If `id` is no id in hexadecimal, or that of a node, process or group that is not known.
    """
    try:
        raw = bytes.fromhex(id)
    except ValueError:
        raw = b""
    if len(raw) == ACTOR_BYTES:
        return list(_of_actor(asker, raw))
    if len(raw) == GROUP_BYTES:
        return _of_group(asker, raw)
    if len(raw) == TASK_BYTES:
        return _of_task(asker, raw)
    if len(raw) == OBJECT_BYTES and not any(raw[KEY_BYTES:]):  # an object's id has its owner's there
        return _of_member(asker, raw.hex())
    if len(raw) == OBJECT_BYTES:
        return [*asker.core.why_id(raw), *_ended_attempts(asker, raw[:TASK_BYTES])[0]]
    message = (
        f"{id!r} is no id: the id of an object, a node or a process has {2 * OBJECT_BYTES} hexadecimal digits, a "
        f"task's {2 * TASK_BYTES}, a placement group's {2 * GROUP_BYTES}, an actor's {2 * ACTOR_BYTES}"
    )
    raise ValueError(message)


def _of_task(asker: Asker, id: bytes) -> Chain:
    shown, is_over = _ended_attempts(asker, id)
    return shown if is_over else [*shown, *asker.core.why_id(id + bytes(4))]


def _ended_attempts(asker: Asker, task: bytes) -> tuple[Chain, bool]:
    """The attempts of a task that have ended, in their order; whether there are some, and no others."""
    attempts = rows.tasks(asker, [("task_id", "=", task.hex())], rows.ROWS_MAX).rows
    ended = [row for row in attempts if row["state"] in ("FINISHED", "FAILED")]
    ended.sort(key=lambda row: row["attempt_number"])
    return [(f"task {task.hex()}", _ended(row)) for row in ended], 0 < len(ended) == len(attempts)


def _ended(row: dict[str, Any]) -> str:
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


def _of_group(asker: Asker, id: bytes) -> Chain:
    group = asker.request("group.get", group=id)
    text = str(group["state"])
    if text == "CREATED":
        text += ", on " + ", ".join(dict.fromkeys(f"node {rows.node_id(node)[:16]}" for node in group["nodes"]))
    elif group["why"]:
        text += f": {group['why']}"
    return [(f"placement group {id.hex()}", text)]


def _of_member(asker: Asker, id: str) -> Chain:
    """Of a node or a process: their ids look alike."""
    for node in rows.nodes(asker, [("node_id", "=", id)], 1).rows:
        how = "the head" if node["is_head_node"] else "a node"
        lost = f", lost: {node['state_message']}" if node["state"] == "DEAD" else ""
        return [(f"node {id}", f"{how} at {node['node_ip']}, {node['state']}{lost}")]
    for process in rows.workers(asker, [("worker_id", "=", id)], 1).rows:
        kind = process["worker_type"].lower()
        what = f"{kind} {id}"
        if not process["is_alive"]:
            return [(what, f"process {process['pid']} on {process['ip']} has ended: {process['exit_detail']}")]
        runs = f", lent for {process['label']}" if process["label"] else ""
        return [(what, f"process {process['pid']} on {process['ip']} is alive{runs}")]
    message = f"no node and no process of this cluster has the id {id}, or it ended long ago"
    raise ValueError(message)
