"""Threaded actors: a lane of threads for each concurrency group.

Threads are made when a call comes and none is free, up to the group's limit; they stay. The main thread is one of the
default group, so that signals and code that needs the main thread work there.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from ray._runtime.worker import report_internal_error

if TYPE_CHECKING:
    from ray._runtime.worker import Worker

__all__ = ["Lane", "Lanes"]


def end_process(code: int) -> NoReturn:
    """Ends this process from any of its threads."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


class Lane:
    """Threads of one group.

    Invariant: while a call could be waiting, some thread is in `next_task`, or the lane has its full number.
    """

    def __init__(self, lanes: Lanes, worker: Worker, group: str, limit: int) -> None:
        self.group = group
        self._lanes = lanes
        self._worker = worker
        self._limit = limit
        self._idle: set[int] = set()
        self._count = 0

    def start_thread(self) -> None:
        """Adds a thread."""
        with self._lanes.lock:
            self._count += 1
            number = self._count
            self._lanes.threads += 1
        threading.Thread(target=self._run, name=f"ray-{self.group or 'calls'}-{number}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._worker.serve(self)
        except BaseException:
            report_internal_error()
            end_process(1)
        with self._lanes.lock:
            self._lanes.threads -= 1
            self._lanes.changed.notify_all()

    def enter(self) -> None:
        """Makes the calling thread one of the lane's, until it leaves."""
        with self._lanes.lock:
            self._count += 1
        self._worker.serve(self)

    # What the worker's loop says. The main thread may say the same twice, when a signal handler has raised meanwhile.

    def waits(self) -> None:
        """The calling thread is about to wait for a call."""
        with self._lanes.lock:
            self._idle.add(threading.get_ident())

    def starts(self) -> bool:
        """The calling thread has a call. Whether it may run."""
        thread = threading.get_ident()
        with self._lanes.lock:
            self._idle.discard(thread)
            starts = self._worker.ending is None
            if starts:
                self._lanes.running.add(thread)
            grow = starts and not self._idle and self._count < self._limit
        if grow:
            self.start_thread()
        return starts

    def ends(self) -> bool:
        """The calling thread's call is over. Whether others go on."""
        with self._lanes.lock:
            self._lanes.running.discard(threading.get_ident())
            self._lanes.changed.notify_all()
            return bool(self._lanes.running)


class Lanes:
    """All groups of a threaded actor.

    Invariant: once the worker is ending and nothing runs, nothing runs again.
    """

    def __init__(self, worker: Worker, max_concurrency: int, groups: dict[str, int]) -> None:
        self.lock = threading.Lock()  # guards what is here and in the lanes
        self.changed = threading.Condition(self.lock)
        self.running: set[int] = set()  # threads in a call
        self.threads = 0  # that have not left, but for the main one
        self._default = Lane(self, worker, "", max_concurrency)
        self._others = [Lane(self, worker, group, limit) for group, limit in groups.items()]
        self._worker = worker

    def run(self) -> None:
        """Serves until the core says that it is over, or a call has left; then lets what runs end."""
        for lane in self._others:
            lane.start_thread()
        self._default.enter()
        if self._worker.ending is not None:
            self._default.start_thread()  # to refuse what comes meanwhile
        while True:
            try:
                with self.lock:
                    self.changed.wait_for(self._is_over)
                return
            except BaseException as error:
                self._worker.stray(error)

    def _is_over(self) -> bool:
        # Without an end of its own the actor is over when nobody has a handle, and each thread leaves once its queue
        # is empty. With one, threads stay to refuse what comes.
        return not self.running and (self._worker.ending is not None or self.threads == 0)
