"""Index the Python standard library on all cores.

Real input: every module of the standard library of the interpreter that runs this file, some
1,800 files and 30 MB. The program works as follows.

1. The driver reads all files into one array of bytes and puts it into the object store *once*.
2. Tasks get the array, which they see in place and do not copy, and the bounds of a few modules in
   it. They parse these with `ast` and return facts: definitions, imports, long functions.
3. Actors gather the facts. They are passed *references* to the results of the tasks, so facts go
   from the worker that found them to the actor that counts them, past the driver.
4. The driver merges what the actors have gathered and compares it with a serial run of the same
   functions. The exit status is not zero if the two differ.
"""

import argparse
import ast
import sys
import sysconfig
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ray

try:
    import numpy as np
except ImportError:
    raise SystemExit("This example needs numpy: pip install numpy") from None

BATCH_BYTES = 256 * 1024  # some 15 modules: about 0.1 s of parsing, far above the cost of a task
LONGEST_SHOWN = 5
IMPORTED_SHOWN = 8


# -- What is found in one module, and in many -------------------------------------------------


@dataclass(frozen=True)
class Module:
    """Where the text of a module lies in the corpus."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Facts:
    """What one module says about itself. An unparsable module has only a name and a size."""

    name: str
    size_bytes: int
    parsed: bool = False
    lines: int = 0
    classes: int = 0
    functions: tuple[tuple[int, str], ...] = ()  # (lines, qualified name)
    imports: tuple[str, ...] = ()


@dataclass
class Summary:
    """Facts of many modules. Adding is commutative, so the order of arrival does not matter."""

    modules: int = 0
    unparsed: int = 0
    size_bytes: int = 0
    lines: int = 0
    classes: int = 0
    functions: int = 0
    imported_by: Counter = field(default_factory=Counter)
    longest: list[tuple[int, str]] = field(default_factory=list)

    def add(self, facts):
        self.modules += 1
        self.unparsed += not facts.parsed
        self.size_bytes += facts.size_bytes
        self.lines += facts.lines
        self.classes += facts.classes
        self.functions += len(facts.functions)
        self.imported_by.update(facts.imports)
        self._keep_longest(facts.functions)

    def merge(self, other):
        for name in ("modules", "unparsed", "size_bytes", "lines", "classes", "functions"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.imported_by.update(other.imported_by)
        self._keep_longest(other.longest)

    def _keep_longest(self, functions):
        # Ties are broken by name, so that every order of arrival gives the same list.
        ranked = sorted([*self.longest, *functions], key=lambda f: (-f[0], f[1]))
        self.longest = ranked[:LONGEST_SHOWN]


def examine(name, source):
    """Parse one module and collect its facts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tests of the library contain dubious literals
            tree = ast.parse(source, filename=name)
    except (SyntaxError, ValueError):  # the library's own tests hold invalid files on purpose
        return Facts(name, len(source))

    classes, functions, imports = 0, [], set()
    pending = [(tree, name)]
    while pending:
        node, path = pending.pop()
        match node:
            case ast.ClassDef():
                classes += 1
                path = f"{path}.{node.name}"
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                path = f"{path}.{node.name}"
                functions.append((node.end_lineno - node.lineno + 1, path))
            case ast.Import():
                imports.update(alias.name.partition(".")[0] for alias in node.names)
            case ast.ImportFrom(level=0):
                imports.add(node.module.partition(".")[0])
        pending.extend((child, path) for child in ast.iter_child_nodes(node))

    return Facts(
        name=name,
        size_bytes=len(source),
        parsed=True,
        lines=source.count(b"\n"),
        classes=classes,
        functions=tuple(functions),
        imports=tuple(sorted(imports)),
    )


# -- The parallel program ---------------------------------------------------------------------


@ray.remote
def examine_batch(corpus, batch):
    """Examine some modules of the corpus. `corpus` is a view into shared memory."""
    return [examine(module.name, corpus[module.start : module.stop].tobytes()) for module in batch]


@ray.remote
class Gatherer:
    """Adds up the facts that are sent to it."""

    def __init__(self):
        self.summary = Summary()

    def add(self, batch_of_facts):
        for facts in batch_of_facts:
            self.summary.add(facts)
        return len(batch_of_facts)

    def result(self):
        return self.summary


def index_in_parallel(corpus, batches, gatherer_count, progress):
    corpus_reference = ray.put(corpus)
    gatherers = [Gatherer.options(num_cpus=0).remote() for _ in range(gatherer_count)]

    gathered = []
    for number, batch in enumerate(batches):
        facts = examine_batch.remote(corpus_reference, batch)
        gathered.append(gatherers[number % gatherer_count].add.remote(facts))

    while gathered:
        done, gathered = ray.wait(gathered, num_returns=1)
        progress.advance(sum(ray.get(done)))

    whole = Summary()
    for part in ray.get([gatherer.result.remote() for gatherer in gatherers]):
        whole.merge(part)
    return whole


def index_serially(corpus, batches, progress):
    whole = Summary()
    for batch in batches:
        for module in batch:
            whole.add(examine(module.name, corpus[module.start : module.stop].tobytes()))
        progress.advance(len(batch))
    return whole


# -- Input and output -------------------------------------------------------------------------


def read_corpus(root, limit):
    """Read every module below `root`; return their text as one array, and who is where."""
    paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts][:limit]
    texts, modules, position = [], [], 0
    for path in paths:
        text = path.read_bytes()
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        modules.append(Module(name, position, position + len(text)))
        texts.append(text)
        position += len(text)
    return np.frombuffer(b"".join(texts), dtype=np.uint8), modules


def split_into_batches(modules, batch_bytes):
    """Cut the list of modules into batches of roughly equal size in bytes."""
    batches, size = [[]], 0
    for module in modules:
        if size >= batch_bytes:
            batches.append([])
            size = 0
        batches[-1].append(module)
        size += module.stop - module.start
    return batches


class Progress:
    """A bar on a terminal; elsewhere one line at the start and one at the end."""

    WIDTH = 40

    def __init__(self, title, total):
        self.title, self.total, self.done = title, total, 0
        self.started = time.perf_counter()
        self.shown = 0.0
        self.live = sys.stdout.isatty()
        if not self.live:
            print(f"{title}: {total} modules ...", flush=True)

    def advance(self, count):
        self.done += count
        now = time.perf_counter()
        if self.live and (now - self.shown > 0.05 or self.done == self.total):
            self.shown = now
            filled = self.WIDTH * self.done // self.total
            bar = "█" * filled + "·" * (self.WIDTH - filled)
            print(f"\r{self.title:<10} {bar} {self.done:5}/{self.total} {self.seconds:6.1f} s", end="", flush=True)

    @property
    def seconds(self):
        return time.perf_counter() - self.started

    def finish(self):
        seconds = self.seconds
        print("\n" if self.live else f"{self.title}: done in {seconds:.1f} s\n", end="", flush=True)
        return seconds


def print_report(summary):
    print(f"\n{summary.modules:,} modules, {summary.size_bytes / 1e6:.1f} MB, {summary.lines:,} lines")
    print(f"{summary.functions:,} functions and methods, {summary.classes:,} classes")
    print(f"{summary.unparsed} files are not valid Python, mostly on purpose")

    print("\nlongest functions")
    for lines, name in summary.longest:
        print(f"  {lines:5} lines  {name}")

    print("\nmost imported modules")
    ranked = sorted(summary.imported_by.items(), key=lambda item: (-item[1], item[0]))
    for name, importers in ranked[:IMPORTED_SHOWN]:
        print(f"  {importers:5} times  {name}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Index the Python standard library on all cores.")
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("stdlib")), help="tree to index")
    parser.add_argument("--limit", type=int, default=None, help="index only the first N files")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    corpus, modules = read_corpus(arguments.root, arguments.limit)
    if not modules:
        print(f"no Python files below {arguments.root}", file=sys.stderr)
        return 2
    batches = split_into_batches(modules, BATCH_BYTES)

    ray.init()
    cores = max(1, int(ray.cluster_resources()["CPU"]))
    print(f"{len(modules):,} modules ({corpus.nbytes / 1e6:.1f} MB) in {len(batches)} tasks on {cores} cores")

    progress = Progress("parallel", len(modules))
    parallel = index_in_parallel(corpus, batches, gatherer_count=min(cores, 4), progress=progress)
    parallel_s = progress.finish()
    ray.shutdown()

    progress = Progress("serial", len(modules))
    serial = index_serially(corpus, batches, progress)
    serial_s = progress.finish()

    print_report(parallel)
    print(f"\nserial {serial_s:.1f} s, parallel {parallel_s:.1f} s: {serial_s / parallel_s:.2f} times as fast")
    if parallel != serial:
        print("THE TWO RESULTS DIFFER", file=sys.stderr)
        return 1
    print("both results are equal")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
