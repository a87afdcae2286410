"""Jobs: one per driver, numbered as drivers join.

Owns the numbers and what each driver said about its job. A job ends when its driver has gone; what dies
with it follows from ownership, in the tables that own it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ray._control.machine import Save

JOBS_REMEMBERED: Final = 1000
"""Ended jobs that can still be listed; older ones are forgotten."""


class Job(msgspec.Struct):
    """One driver's session. `config` is what the driver told by ``job.config``."""

    number: int
    driver: int
    pid: int
    started: float
    ended: float | None = None
    log_to_driver: bool = True
    namespace: str = ""
    config: dict[str, object] = msgspec.field(default_factory=dict)


TABLE: Final = "jobs"


class JobTable:
    """Jobs by number. At most `JOBS_REMEMBERED` ended ones are kept."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._by_driver: dict[int, int] = {}
        self._serial = 0

    def start(self, driver: int, pid: int, now: float) -> int:
        """A driver has joined; returns the number of its job, counted from 1."""
        self._serial += 1
        self._jobs[self._serial] = Job(self._serial, driver, pid, now)
        self._by_driver[driver] = self._serial
        return self._serial

    def end(self, driver: int, now: float) -> int:
        """The driver has gone; returns its job, or 0 if it had none."""
        number = self._by_driver.pop(driver, 0)
        if number:
            self._jobs[number].ended = now
            ended = [job.number for job in self._jobs.values() if job.ended is not None]
            for old in ended[:-JOBS_REMEMBERED]:
                del self._jobs[old]
        return number

    def record(self, number: int) -> Save:
        """The job as it is to be kept; ended ones are not."""
        job = self._jobs.get(number)
        kept = job is not None and job.ended is None
        return Save(TABLE, number.to_bytes(8, "big"), msgspec.msgpack.encode(job) if kept else None)

    def restore(self, value: bytes) -> None:
        """Take over a job as it was kept."""
        job = msgspec.msgpack.decode(value, type=Job)
        self._jobs[job.number] = job
        self._by_driver[job.driver] = job.number
        self._serial = max(self._serial, job.number)

    def get(self, number: int) -> Job | None:
        return self._jobs.get(number)

    def all(self) -> list[Job]:
        """Jobs that run, and ended ones that are remembered, oldest first."""
        return [self._jobs[number] for number in sorted(self._jobs)]

    def running(self) -> list[Job]:
        """Jobs whose driver is connected, oldest first."""
        return [self._jobs[number] for number in self._by_driver.values()]

    def configure(self, number: int, config: dict[str, object]) -> None:
        """Take over what a driver says about its job. Unknown keys are kept for who knows them."""
        job = self._jobs[number]
        job.config.update(config)
        job.log_to_driver = bool(job.config.get("log_to_driver", True))
        job.namespace = str(job.config.get("namespace", ""))

    def list(self) -> list[dict[str, object]]:
        """All jobs, oldest first, for people."""
        return [
            {
                "job": job.number,
                "driver_pid": job.pid,
                "state": "RUNNING" if job.ended is None else "FINISHED",
                "namespace": job.namespace,
            }
            for job in self._jobs.values()
        ]
