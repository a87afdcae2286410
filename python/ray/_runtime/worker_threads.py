"""Threaded actors: a lane of threads for each concurrency group.

Threads are made when a call comes and none is free, up to the group's limit; they stay. The main thread is one of the
default group, so that signals and code that needs the main thread work there.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from ray._runtime.worker import Leave, report_internal_error

if TYPE_CHECKING:
    from ray._runtime.worker import Worker

__all__ = ["Lanes"]


def end_process(code: int) -> NoReturn:
    """Ends this process from any of its threads."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


class _Lane:
    """Threads of one group.

    Invariant: while a call could be waiting, some thread is in `next_task`, or the lane has its full number.
    """

    def __init__(self, worker: Worker, group: str, limit: int, on_leave: threading.Event) -> None:
        self._worker = worker
        self._group = group
        self._limit = limit
        self._on_leave = on_leave
        self._lock = threading.Lock()
        self._idle = 0
        self._count = 0

    def start_thread(self) -> None:
        with self._lock:
            self._count += 1
            number = self._count
        name = f"ray-{self._group or 'calls'}-{number}"
        threading.Thread(target=self.run, name=name, daemon=True).start()

    def enter_as_thread(self) -> None:
        """Makes the calling thread one of the lane's."""
        with self._lock:
            self._count += 1
        self.run()

    def run(self) -> None:
        worker = self._worker
        next_task, group = worker.core.next_task, self._group
        try:
            while not self._on_leave.is_set():
                with self._lock:
                    self._idle += 1
                task = next_task(group)
                with self._lock:
                    self._idle -= 1
                    grow = task is not None and self._idle == 0 and self._count < self._limit
                if task is None:
                    return
                if grow:
                    self.start_thread()
                worker.execute(task)
                del task  # nothing of it is kept while this thread waits for the next one
        except Leave:
            self._on_leave.set()
        except BaseException:
            report_internal_error()
            end_process(1)


class Lanes:
    """All groups of a threaded actor."""

    def __init__(self, worker: Worker, max_concurrency: int, groups: dict[str, int]) -> None:
        self._leave = threading.Event()
        self._default = _Lane(worker, "", max_concurrency, self._leave)
        self._others = [_Lane(worker, group, limit, self._leave) for group, limit in groups.items()]
        self._worker = worker

    def run(self) -> None:
        """Serves until the core says that it is over, or a call has left."""
        for lane in self._others:
            lane.start_thread()
        self._default.enter_as_thread()
        if self._worker.leaving is not None:
            raise self._worker.leaving
