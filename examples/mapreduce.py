"""Count the words of the standard library's source: map over files, shuffle by word, reduce: the classic three steps.

Each map task reads some files and splits its counts by a hash of the word, one part for each reducer; it returns the
parts as values of their own (`num_returns`), so that a reducer gets its parts alone, wherever they were made. Nothing
passes through the driver but the result.

The exit status is not zero if the counts differ from those of a serial run.
"""

import re
import sys
import sysconfig
import time
import zlib
from collections import Counter
from pathlib import Path

import ray

FILES_MAX = 600
MAPS = 16
REDUCES = 4
SHOWN = 5
WORD = re.compile(rb"[A-Za-z_]{3,}")


def count(paths):
    words = Counter()
    for path in paths:
        words.update(WORD.findall(Path(path).read_bytes()))
    return words


@ray.remote(num_returns=REDUCES)
def map_files(paths):
    """Count the words of some files, and split the counts by who reduces them."""
    parts = [{} for _ in range(REDUCES)]
    for word, number in count(paths).items():
        # Not hash(): it differs between processes.
        parts[zlib.crc32(word) % REDUCES][word] = number
    return parts


@ray.remote
def reduce_counts(*parts):
    """Add up the counts of the words that are this reducer's."""
    words = Counter()
    for part in parts:
        words.update(part)
    return words


def map_reduce(files):
    maps = [map_files.remote(files[start::MAPS]) for start in range(MAPS)]
    # The shuffle: reducer i takes part i of every map. It starts as soon as its parts are there.
    reduced = [reduce_counts.remote(*parts) for parts in zip(*maps, strict=True)]
    words = Counter()
    for part in ray.get(reduced):
        words.update(part)
    return words


def main():
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(str(path) for path in root.rglob("*.py") if "site-packages" not in path.parts)[:FILES_MAX]
    started = time.perf_counter()
    expected = count(files)
    serial_s = time.perf_counter() - started
    ray.init()
    ray.get(reduce_counts.remote())  # a first worker is there before time is taken
    started = time.perf_counter()
    words = map_reduce(files)
    took = time.perf_counter() - started
    print(f"{len(files)} files, {sum(words.values())} words, {len(words)} different ones.")
    print(f"{MAPS} maps and {REDUCES} reduces took {took:.2f} s; one process alone {serial_s:.2f} s.")
    for word, number in words.most_common(SHOWN):
        print(f"  {number:7d}  {word.decode()}")
    ray.shutdown()
    return 0 if words == expected else 1


if __name__ == "__main__":
    sys.exit(main())
