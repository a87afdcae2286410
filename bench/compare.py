"""Run a suite alternately under two interpreters and print a table of the ratios.

    python bench/compare.py --ours .venv/bin/python --theirs bench/.venv-ray/bin/python
    python bench/compare.py ... --suite startup --rounds 5 --record

Machines differ and are noisy, so only ratios from one run mean anything: the two interpreters take
turns (A, B, A, B, ...), each round gives one figure per row, and the table shows the median of the
rounds with the smallest and largest sample. Arguments after `--` are passed to the suite.

The original Ray runs its workers at nice 15 by default, which would be unfair to it on a busy
machine; it is started with RAY_worker_niceness=0.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT_OF_THEIRS = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}

# How many times better than Ray a row has to be: what must be reached over what Ray 2.60 did when
# the goals were set. For a row without a goal the ratio alone is shown.
GOALS = {
    "import": 330 / 60,
    "init": 3650 / 150,
    "cluster_pss": 793 / 90,
    "cluster_threads": 450 / 15,
    "idle_cpu": 5 / 0.3,
    "task_sync": 15_000 / 722,
    "tasks_async": 60_000 / 2_319,
    "actor_call_sync": 25_000 / 1_584,
    "actor_calls_async": 90_000 / 4_432,
    "async_actor_calls_async": 40_000 / 2_887,
    "actor_calls_n_to_n_with_object": 25_000 / 1_671,
    "put_small": 200_000 / 2_035,
    "get_stored": 300_000 / 12_274,
    "wait_1000_refs": 300 / 2.0,
    "wait_1000_ready_refs": 300 / 2.0,
    "get_10000_refs": 200 / 13,
    "actor_new_20": 50,
    "actor_new_100": 50,
    "actor_new_500": 50,
    "actor_new_20_pss": 59 / 5,
    "actor_new_100_pss": 59 / 5,
    "actor_new_500_pss": 59 / 5,
    "task_chain_hop": 1_700 / 80,
    "tasks_queued_drained": 583 / 30,
    "actor_restart": 1_017 / 30,
}
# Goals that are a share of another row of ours, measured in the same run.
GOALS_WITHIN_OURS = {"put_large": ("memcpy_warm", 0.8)}


@dataclass
class Side:
    """What one interpreter achieved, over all rounds."""

    name: str
    python: str
    environment: dict
    units: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)  # row -> one value per round
    samples: dict = field(default_factory=dict)  # row -> all samples of all rounds
    errors: dict = field(default_factory=dict)

    def run(self, suite, extra):
        command = [self.python, str(HERE / f"{suite}.py"), *extra]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE, check=False)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                self._take(json.loads(line))
        if done.returncode:
            print(f"{self.name}: {suite} ended with status {done.returncode}", file=sys.stderr)

    def version(self):
        script = "import ray; print(ray.__version__)"
        done = subprocess.run([self.python, "-c", script], capture_output=True, text=True, cwd=HERE, check=True)
        return done.stdout.strip()

    def median(self, row):
        return statistics.median(self.values[row]) if row in self.values else None

    def _take(self, line):
        row = line["name"]
        self.units[row] = line["unit"]
        if "error" in line:
            self.errors[row] = line["error"]
            return
        self.values.setdefault(row, []).append(line["value"])
        self.samples.setdefault(row, []).extend(line["samples"])


def compare(ours, theirs):
    """Return the lines of a Markdown table."""
    lines = [
        "| row | unit | ours | spread | Ray | spread | ratio | goal | reached |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row, unit in {**theirs.units, **ours.units}.items():
        mine, other = ours.median(row), theirs.median(row)
        ratio = ratio_of(mine, other, higher_is_better=unit.endswith("/s"))
        goal, reached = verdict(row, mine, ratio, ours)
        cells = [row, unit, number(mine), spread(ours, row), number(other), spread(theirs, row)]
        lines.append(f"| {' | '.join([*cells, '' if ratio is None else f'{ratio:.3g}x', goal, reached])} |")
    return lines


def ratio_of(mine, other, *, higher_is_better):
    if mine is None or other is None or mine <= 0 or other <= 0:
        return None
    return mine / other if higher_is_better else other / mine


def verdict(row, mine, ratio, ours):
    """Return (goal as text, "yes", "no" or "")."""
    if row in GOALS_WITHIN_OURS:
        reference, share = GOALS_WITHIN_OURS[row]
        limit = ours.median(reference)
        if mine is None or limit is None:
            return f"{share:.0%} of {reference}", ""
        return f"{share:.0%} of {reference}", "yes" if mine >= share * limit else f"no: {mine / limit:.0%}"
    if row not in GOALS:
        return "", ""
    return f"{GOALS[row]:.3g}x", "" if ratio is None else "yes" if ratio >= GOALS[row] else "no"


def number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(side, row):
    samples = side.samples.get(row)
    if not samples:
        return side.errors.get(row, "-").replace("|", "/")[:60]
    return f"{number(min(samples))} .. {number(max(samples))}"


def machine():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = next((line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({model or platform.machine()}), {memory:.0f} GiB, Linux {platform.release()}"


def cpu_lines():
    return Path("/proc/cpuinfo").read_text().splitlines()


def commit():
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def command_line(arguments):
    """Return the command to repeat this, without paths that mean something on one machine only."""
    parts = [f"--suite {arguments.suite}", f"--rounds {arguments.rounds}"]
    if arguments.extra:
        parts.append(f"-- {shlex.join(arguments.extra)}")
    return f"python bench/compare.py --ours PYTHON --theirs PYTHON {' '.join(parts)}"


def record(path, arguments, table, versions):
    title = f"## {datetime.date.today().isoformat()}: {arguments.suite}"
    about = [
        f"- commit: {commit()}",
        f"- versions: ours {versions[0]}, theirs {versions[1]}",
        f"- machine: {machine()}",
        f"- command: `{command_line(arguments)}`",
    ]
    with path.open("a") as results:
        results.write("\n".join(["", title, "", *about, "", *table, ""]))


def absolute(python):
    """Return an absolute path, unresolved: of a virtual environment's interpreter, the link is what counts."""
    return str(Path.cwd() / python)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Compare two installations of `ray`.", epilog="Arguments after -- go to the suite."
    )
    parser.add_argument("--ours", default=sys.executable, help="interpreter with Skate (default: this one)")
    parser.add_argument("--theirs", required=True, help="interpreter with the original Ray")
    parser.add_argument("--suite", choices=["core", "startup", "memory", "cluster"], default="core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the table to bench/RESULTS.md")
    parser.add_argument("extra", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    ours = Side("ours", absolute(arguments.ours), {})
    theirs = Side("theirs", absolute(arguments.theirs), ENVIRONMENT_OF_THEIRS)
    versions = ours.version(), theirs.version()
    for turn in range(arguments.rounds):
        for side in (ours, theirs):
            print(f"round {turn + 1} of {arguments.rounds}: {side.name}", file=sys.stderr, flush=True)
            side.run(arguments.suite, arguments.extra)
    table = compare(ours, theirs)
    print("\n".join(table))
    if arguments.record:
        record(HERE / "RESULTS.md", arguments, table, versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
