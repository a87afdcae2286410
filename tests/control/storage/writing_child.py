"""A head that writes until it is killed: what it says was acknowledged is what the tests look for.

Run as a program: URL, holder, ttl_s, and how: `freely`, by a writer with many batches under way, or `stepwise`, one
commit for each line that comes in. Prints the number of each batch that is durable; in the end, the error's name.

Batch `n` sets the record `count` and one each of the tables `left` and `right` to n, and deletes what batch n - 20 left
in `left`. So what lies in the storage says which batches are there, and whether any is there in part.
"""

from __future__ import annotations

import itertools
import os
import select
import sys

from ray._control import storage
from ray._control.storage import Write

WINDOW = 50
"""Batches under way."""

KEPT = 20


def batch(number: int) -> list[Write]:
    text = b"%d" % number
    writes = [Write("head", b"count", text), Write("left", text, text), Write("right", b"%d" % (number % 7), text)]
    if number > KEPT:
        writes.append(Write("left", b"%d" % (number - KEPT), None))
    return writes


def expected(count: int) -> dict[tuple[str, bytes], bytes]:
    """What lies there after so many batches."""
    found: dict[tuple[str, bytes], bytes] = {}
    for number in range(1, count + 1):
        for table, key, value in batch(number):
            if value is None:
                del found[table, key]
            else:
                found[table, key] = value
    return found


def say(text: object) -> None:
    os.write(1, b"%s\n" % str(text).encode())


def freely(opened: storage.Storage) -> None:
    writer = storage.StorageWriter(opened)
    for number in itertools.count(1):
        writer.submit(batch(number))
        while True:
            if select.select([writer], [], [], 0)[0] or number - writer.completed().durable_up_to >= WINDOW:
                select.select([writer], [], [])
                progress = writer.completed()
                say(progress.durable_up_to)
                if progress.error is not None:
                    raise progress.error
            else:
                break


def stepwise(opened: storage.Storage) -> None:
    for number in itertools.count(1):
        if not os.read(0, 1):
            return
        opened.commit(batch(number))
        say(number)


def main() -> None:
    url, holder, ttl_s, how = sys.argv[1:]
    opened = storage.open(url)
    try:
        if opened.acquire(holder, float(ttl_s)) is None:
            raise RuntimeError("another leads")
        say(0)
        {"freely": freely, "stepwise": stepwise}[how](opened)
    except storage.StorageError as error:
        say(type(error).__name__)
        say(error)


if __name__ == "__main__":
    main()
