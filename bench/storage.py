"""How fast the head's state becomes durable: commits and records per second, and how long one commit takes.

    python bench/storage.py                 SQLite, and those servers whose programs are installed
    python bench/storage.py --only sqlite   one of them

A group is one commit of 64 records of 200 bytes, as the writer makes of what waits; `single` is a commit of one record;
`writer` is single records through `StorageWriter`, with many under way. Beside them, what the disk can do: an append of
4 KiB and its fdatasync, in the same directory.
"""

import argparse
import itertools
import os
import select
import sys
from pathlib import Path

import measure

sys.path.insert(0, str(Path(__file__).parents[1]))

from ray._control import storage
from ray._control.storage import StorageWriter, Write
from tests.control.storage import servers

GROUP = 64
VALUE = os.urandom(200)
RECORDS = 10_000  # keys that are written again and again, so that the storage does not grow
WINDOW = 2_000


def main():
    parser = argparse.ArgumentParser(description="Speed of the head's storages.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="comma-separated kinds")
    arguments = parser.parse_args()
    effort = measure.QUICK if arguments.quick else measure.FULL
    for name, kind in servers.KINDS.items():
        if name.startswith(tuple(arguments.only.split(","))):
            try:
                server = kind()
            except servers.NotInstalled as missing:
                measure.report_error(f"storage_{name}", "commits/s", str(missing))
                continue
            try:
                measure_one(name, server, effort)
            finally:
                server.stop()
    return 0


def measure_one(name, server, effort):
    if name == "sqlite":
        measure_disk(Path(server.directory), effort)
    leader = storage.open(server.url())
    leader.acquire("bench", 3600)
    keys = itertools.cycle([b"%d" % number for number in range(RECORDS)])

    def commit(records):
        leader.commit([Write("bench", next(keys), VALUE) for _ in range(records)])

    rates = measure.rates(lambda: commit(GROUP), 1, effort)
    measure.report(f"storage_{name}_groups", "commits/s", rates)
    measure.report(f"storage_{name}_group_records", "records/s", [GROUP * rate for rate in rates])
    measure.report(f"storage_{name}_single", "commits/s", measure.rates(lambda: commit(1), 1, effort))
    spread = [1e3 * measure.percentile(ordered, 0.5) for ordered in measure.latencies(lambda: commit(GROUP), effort)]
    measure.report(f"storage_{name}_group_takes", "ms", spread)
    writer = StorageWriter(leader)
    measure.report(f"storage_{name}_writer", "records/s", measure.rates(lambda: through(writer, keys), WINDOW, effort))
    writer.close()
    leader.close()


def through(writer, keys):
    """Submit a window of single records, and wait until they are durable."""
    for _ in range(WINDOW):
        last = writer.submit([Write("bench", next(keys), VALUE)])
    while (progress := writer.completed()).durable_up_to < last:
        if progress.error is not None:
            raise progress.error
        select.select([writer], [], [])


def measure_disk(directory, effort):
    with (directory / "disk").open("wb", buffering=0) as file:
        page = bytes(4096)

        def append():
            file.write(page)
            os.fdatasync(file.fileno())

        measure.report("storage_disk", "appends/s", measure.rates(append, 1, effort))


if __name__ == "__main__":
    sys.exit(main())
