"""Where the calling code runs: `ray.get_runtime_context()`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray._runtime import context, session

if TYPE_CHECKING:
    from ray._core import Task
    from ray._runtime.ids import ActorID, JobID, NodeID, PlacementGroupID, TaskID
    from ray.actor import ActorHandle

__all__ = ["RuntimeContext", "get_gpu_ids", "get_runtime_context"]


class RuntimeContext:
    """Facts about the process, task and actor that ask. Each is looked up when asked."""

    def __init__(self, worker: Any = None) -> None:
        pass

    def get(self) -> dict[str, Any]:
        """Ids of the job, node, task and actor, and the namespace, by name."""
        session.ensure()
        found: dict[str, Any] = {"job_id": self.job_id, "node_id": self.node_id, "namespace": self.namespace}
        if session.mode == session.WORKER_MODE:
            found["task_id"] = self.task_id
            found["actor_id"] = self.actor_id
        return found

    # --- ids -------------------------------------------------------------------------------------------------------

    @property
    def job_id(self) -> JobID:
        """The job; deprecated in favour of `get_job_id`."""
        from ray._runtime.ids import JobID

        session.ensure()
        return JobID.from_int(session.job_number)

    def get_job_id(self) -> str:
        """The job's id, in hex."""
        return self.job_id.hex()

    @property
    def node_id(self) -> NodeID:
        """The node; deprecated in favour of `get_node_id`."""
        from ray._runtime.ids import NodeID

        return NodeID._from_key(session.ensure().node)

    def get_node_id(self) -> str:
        """The id of the node that this process runs on, in hex."""
        return self.node_id.hex()

    def get_worker_id(self) -> str:
        """The id of this process, in hex; drivers have one too."""
        from ray._runtime.ids import WorkerID

        return WorkerID._from_key(session.ensure().proc).hex()

    @property
    def task_id(self) -> TaskID | None:
        """The current task, or None; deprecated in favour of `get_task_id`."""
        from ray._runtime.ids import TaskID

        found = _task_id()
        return None if found is None else TaskID(found)

    def get_task_id(self) -> str | None:
        """The id of the current task or actor call, in hex; None in a driver.

        In a thread that user code has started, it is the call that the process runs, else the one that made the actor.
        """
        found = _task_id()
        return None if found is None else found.hex()

    def get_task_name(self) -> str | None:
        """The name of the current task; None in a driver."""
        task = context.task.get()
        return None if task is None else task.name

    def get_task_function_name(self) -> str | None:
        """The current task's function with its module, or the actor's class and method; None in a driver."""
        task = context.task.get()
        if task is None:
            return None
        if context.actor is not None:
            cls = type(context.actor.instance)
            return f"{cls.__module__}.{cls.__qualname__}.{task.method or '__init__'}"
        function = self._loaded(task).function
        return f"{function.__module__}.{function.__qualname__}"

    @property
    def actor_id(self) -> ActorID | None:
        """The actor, or None; deprecated in favour of `get_actor_id`."""
        from ray._runtime.ids import ActorID

        return None if context.actor is None else ActorID(context.actor.id)

    def get_actor_id(self) -> str | None:
        """The id of the actor that this process is, in hex; None if it is none."""
        return None if context.actor is None else context.actor.id.hex()

    def get_actor_name(self) -> str | None:
        """The actor's name, "" if it has none; None if this process is not an actor."""
        if context.actor is None:
            return None
        name: str = context.actor.meta.get("options", {}).get("name") or ""
        return name

    @property
    def namespace(self) -> str:
        """Where named actors of this program live."""
        session.ensure()
        session.load_job()
        return session.namespace

    @property
    def gcs_address(self) -> str:
        """The cluster's address: "local"."""
        session.ensure()
        return "local"

    def get_session_name(self) -> str:
        """The session's name, which is also that of its directory."""
        session.ensure()
        session.load_job()
        return session.session_name

    def get_temp_dir(self) -> str:
        """The directory that holds the session's."""
        session.ensure()
        session.load_job()
        return session.temp_dir

    # --- the actor -------------------------------------------------------------------------------------------------

    @property
    def current_actor(self) -> ActorHandle[Any]:
        """A handle to the actor that this process is. The actor may keep it: it does not keep the actor alive.

        Raises:
            RuntimeError: If it is none.
        """
        from ray import _core
        from ray.actor import ActorHandle

        actor = context.actor
        if actor is None:
            message = "current_actor is only there inside of an actor"
            raise RuntimeError(message)
        return ActorHandle(_core.ActorHandleRef(actor.id, session.require().node, counted=False), actor.methods)

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor was restarted after a death.

        Raises:
            RuntimeError: If this process is not an actor.
        """
        if context.actor is None:
            message = "was_current_actor_reconstructed is only there inside of an actor"
            raise RuntimeError(message)
        return context.actor.incarnation > FIRST_INCARNATION

    def is_canceled(self) -> bool:
        """Whether the current task was cancelled. For code that cannot be interrupted, such as threaded actors.

        Raises:
            RuntimeError: Outside of a task.
        """
        task = context.task.get()
        if task is None:
            message = "is_canceled() is only there inside of a task"
            raise RuntimeError(message)
        return session.require().cancelled(task.id)

    # --- resources ---------------------------------------------------------------------------------------------------

    def get_assigned_resources(self) -> dict[str, float]:
        """What the current task, or this actor, holds, by name.

        Raises:
            RuntimeError: In a driver, which holds nothing.
        """
        from ray._runtime.options import from_fixed

        task = context.task.get()
        if context.actor is not None:
            held = context.actor.meta["resources"]
        elif task is not None:
            held = self._loaded(task).meta["resources"]
        else:
            message = "get_assigned_resources() is only there inside of a task or actor"
            raise RuntimeError(message)
        return {name: from_fixed(units) for name, units in held.items()}

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Devices that the current task, or this actor, holds, by the name of their resource."""
        return {"GPU": [str(gpu) for gpu in get_gpu_ids()]}

    def get_resource_ids(self) -> dict[str, list[str]]:
        """Deprecated; `get_accelerator_ids` is its name now."""
        return self.get_accelerator_ids()

    # --- environment -------------------------------------------------------------------------------------------------

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The environment of this process: the job's, and laid over it what the current task or actor asked for."""
        from ray._runtime import options
        from ray.runtime_env import RuntimeEnv

        session.ensure()
        session.load_job()
        return RuntimeEnv(**options.merge_envs(session.runtime_env, session.worker_env))

    def get_runtime_env_string(self) -> str:
        """The environment of this process, as JSON."""
        import json

        return json.dumps(self.runtime_env, sort_keys=True)

    def get_node_labels(self) -> dict[str, str]:
        """Labels of this node."""
        from ray._runtime import cluster

        node_id = self.get_node_id()
        return next(dict(node["Labels"]) for node in cluster.nodes() if node["NodeID"] == node_id)

    def get_placement_group_id(self) -> str | None:
        """The id of the placement group that the current task, or this actor, is in, in hex; None if it is in none."""
        group = session.current_group
        return None if group is None else group[0].id.hex()

    @property
    def current_placement_group_id(self) -> PlacementGroupID | None:
        """That id; deprecated in favour of `get_placement_group_id`."""
        group = session.current_group
        return None if group is None else group[0].id

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        """Whether what the current task, or this actor, submits runs in its placement group."""
        group = session.current_group
        return group is not None and group[1]

    @staticmethod
    def _loaded(task: Task) -> Any:
        assert context.worker is not None, "a task runs in a worker"
        return context.worker.functions[task.function_id]


def _task_id() -> bytes | None:
    task = context.task.get()
    if task is not None:
        return task.id
    worker = context.worker
    if worker is None:
        return None
    running = worker.running.get(worker.main_thread)
    return running if running is not None or worker.creation is None else worker.creation.id


FIRST_INCARNATION = 0

_context = RuntimeContext()


def get_runtime_context() -> RuntimeContext:
    """Facts about the process, task and actor that ask."""
    return _context


def get_gpu_ids() -> list[int] | list[str]:
    """GPUs that the current task, or this actor, may use; in a driver, those that are visible to it.

    Returns:
        Numbers, as they stand in `CUDA_VISIBLE_DEVICES`; strings where that holds UUIDs.
    """
    if context.actor is not None:
        return list(context.actor.gpu_ids)
    task = context.task.get()
    if task is not None:
        return list(task.gpu_ids)
    if session.mode == session.WORKER_MODE:
        return []
    visible = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    return [int(device) for device in visible] if all(device.isdigit() for device in visible) else visible
