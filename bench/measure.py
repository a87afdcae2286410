"""Repetition of measurements, and the lines in which they are reported.

A suite prints one JSON object per row: `{"name", "unit", "value", "samples"}`, where `value` is
the median of the samples. A row that could not be measured has `"error"` instead of a value.
Units that end in `/s` are better when larger; all others when smaller.
"""

import json
import statistics
import time
import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How long to measure: this many samples of about this duration each, after a warm-up."""

    samples: int
    sample_s: float
    warm_up_s: float


FULL = Effort(samples=5, sample_s=1.0, warm_up_s=0.5)
QUICK = Effort(samples=3, sample_s=0.25, warm_up_s=0.1)


def report(name, unit, samples):
    print(json.dumps({"name": name, "unit": unit, "value": statistics.median(samples), "samples": samples}), flush=True)


def report_error(name, unit, error):
    if isinstance(error, BaseException):
        error = traceback.format_exception_only(error)[-1].strip()
    print(json.dumps({"name": name, "unit": unit, "error": error}), flush=True)


def rates(step, units_per_step, effort):
    """Call `step` again and again; return units per second, one figure per sample."""
    _repeat_for(step, effort.warm_up_s)
    return [units_per_step * steps / seconds for steps, seconds in _samples(step, effort)]


def latencies(step, effort):
    """Return, for each sample, the sorted seconds that single calls of `step` took."""
    _repeat_for(step, effort.warm_up_s)
    collected = []
    for _ in range(effort.samples):
        durations = []
        deadline = time.perf_counter() + effort.sample_s
        while (started := time.perf_counter()) < deadline:
            step()
            durations.append(time.perf_counter() - started)
        collected.append(sorted(durations))
    return collected


def percentile(ordered, fraction):
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def _samples(step, effort):
    for _ in range(effort.samples):
        yield _repeat_for(step, effort.sample_s)


def _repeat_for(step, seconds):
    """Call `step` at least once, until the time is over; return (calls, seconds taken)."""
    calls, started = 0, time.perf_counter()
    while True:
        step()
        calls += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return calls, elapsed
