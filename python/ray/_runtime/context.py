"""What this thread, or this asyncio task, is working on."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._core import Task
    from ray._runtime.methods import ActorMethods
    from ray._runtime.worker import Worker

__all__ = ["ActorInfo", "actor", "task", "worker"]

task: ContextVar[Task | None] = ContextVar("ray_task", default=None)


class ActorInfo:
    """The actor that this process is."""

    __slots__ = ("gpu_ids", "id", "incarnation", "instance", "meta", "methods")

    def __init__(
        self, id: bytes, methods: ActorMethods, incarnation: int, gpu_ids: list[int], meta: dict[str, Any]
    ) -> None:
        self.id = id
        self.instance: Any = None  # until __init__ has returned
        self.methods = methods
        self.incarnation = incarnation
        self.gpu_ids = gpu_ids
        self.meta = meta


actor: ActorInfo | None = None
worker: Worker | None = None
