"""What the cluster is doing: lists, counts, logs, and why something is not there yet.

Everything is asked of those who know it: the head of nodes, actors and jobs, each node of its workers and logs, each
process of its tasks and objects. Tasks that have ended are in the event logs of the nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from ray._core import Core, ObjectRef
    from ray._runtime.generators import ObjectRefGenerator
    from ray.util.state.api import (
        StateApiClient,
        get_actor,
        get_job,
        get_node,
        get_objects,
        get_placement_group,
        get_task,
        get_worker,
        list_actors,
        list_cluster_events,
        list_jobs,
        list_nodes,
        list_objects,
        list_placement_groups,
        list_runtime_envs,
        list_tasks,
        list_workers,
        summarize_actors,
        summarize_objects,
        summarize_tasks,
    )
    from ray.util.state.logs import get_log, list_logs

__all__ = [
    "StateApiClient",
    "get_actor",
    "get_job",
    "get_log",
    "get_node",
    "get_objects",
    "get_placement_group",
    "get_task",
    "get_worker",
    "list_actors",
    "list_cluster_events",
    "list_jobs",
    "list_logs",
    "list_nodes",
    "list_objects",
    "list_placement_groups",
    "list_runtime_envs",
    "list_tasks",
    "list_workers",
    "summarize_actors",
    "summarize_objects",
    "summarize_tasks",
    "why",
]

_LOGS = ("get_log", "list_logs")


def __getattr__(name: str) -> Any:
    # `why` is all that an error message needs; what lists are made of is loaded by whoever lists.
    import importlib

    if name in __all__:
        module = importlib.import_module("ray.util.state.logs" if name in _LOGS else "ray.util.state.api")
        value = globals()[name] = getattr(module, name)
        return value
    message = f"module 'ray.util.state' has no attribute {name!r}"
    raise AttributeError(message)


def why(ref: ObjectRef[Any] | ObjectRefGenerator[Any]) -> str:
    """Why a reference's value, or a generator's next one, is not there yet, down to the root.

    Args:
        ref: The reference or generator.

    Returns:
        One line for each thing that waits, outermost first, each with its reason; or that the value is there, and of
        which type if it is an exception.

    Raises:
        TypeError: If `ref` is neither a reference nor a generator.
    """
    from ray import _core
    from ray._runtime import session
    from ray._runtime.generators import ObjectRefGenerator

    if isinstance(ref, ObjectRefGenerator):
        if ref.next_ready():
            return f"the next value of generator {ref.task_id().hex()} is there"
        if ref.is_finished():
            return f"generator {ref.task_id().hex()} has ended"
        ref = ref.completed()
    if type(ref) is not _core.ObjectRef:
        message = f"why() takes an ObjectRef or an ObjectRefGenerator, not {kind_of(ref)}"
        raise TypeError(message)
    core = session.ensure()
    chain = core.why(ref)
    what, reason = chain[-1]
    if reason == _IS_EXCEPTION and len(chain) == 1:
        chain = [(what, f"{reason}, {_exception_of(core, ref)}")]
    return "\n".join(f"{'  ' * depth}{what}: {reason}" for depth, (what, reason) in enumerate(chain))


_IS_EXCEPTION = "it is there: an exception"
"""The core's words for a value that is an error."""


def _exception_of(core: Core, ref: ObjectRef[Any]) -> str:
    try:
        core.get_one(ref)
    except Exception as error:
        return type(error).__qualname__
    return "which is gone meanwhile"
