"""Clusters for tests, and the proof that they leave nothing behind.

`cluster` is shared by the tests of a module; `fresh_cluster` is a function that starts one with
the arguments given and for one test only. When a cluster has been shut down, everything that this
process can leak (child processes, threads, descriptors, temporary directories, shared memory) is
compared with what there was before the cluster was started.

The same tests run on the original Ray, to prove that they describe its behaviour. There, tests
marked `skate` are skipped and leaks are not looked for.
"""

import contextlib
import gc
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

import pytest

# Their threads live as long as the process; started here, no test is blamed for them.
for _library in ("numpy", "pyarrow"):
    with contextlib.suppress(ImportError):
        __import__(_library)

# The engine, too, keeps one descriptor of this kind for the life of the process, once it has started.
_KEPT = os.eventfd(0)

SHARED_CLUSTER = {"num_cpus": 4, "resources": {"special": 2}}
TEST_TIMEOUT_S = 60
LEAK_DEADLINE_S = 5.0

# Processes of ours are recognised by this variable, also those that have a new parent.
MARK = "SKATE_TEST_RUN"


def pytest_configure(config):
    config.addinivalue_line("markers", "skate: behaviour of Skate that the original Ray does not have")
    config.addinivalue_line("markers", "slow: takes more than a second, for a reason stated in the test")
    os.environ[MARK] = uuid.uuid4().hex
    # A short path, since socket names are limited to 107 bytes; a private one, since leaks are
    # looked for in it.
    directory = tempfile.mkdtemp(prefix="skate-tests-")
    os.environ["TMPDIR"] = tempfile.tempdir = directory
    # Event logs of clusters that have ended are kept for people; here they would be leaks.
    os.environ["RAY_EVENT_LOGS_KEPT"] = "0"
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))


def pytest_collection_modifyitems(config, items):
    original = on_original_ray()
    for item in items:
        if original and item.get_closest_marker("skate"):
            item.add_marker(pytest.mark.skip(reason="behaviour of Skate only"))
        if config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S, method="signal"))


def on_original_ray():
    """Whether `ray` is the original. Where there is no `ray` yet, it is taken to be ours."""
    try:
        import ray
    except ImportError:
        return False
    return "skate" not in getattr(ray, "__version__", "skate")


class ClusterKeeper:
    """Starts and stops the one cluster that this process can have, and looks for leaks."""

    def __init__(self):
        self._before = None

    def start(self, **arguments):
        import ray

        self.stop()
        arguments.setdefault("include_dashboard", False)
        arguments.setdefault("logging_level", "ERROR")
        arguments.setdefault("log_to_driver", False)
        self._before = Belongings.now()
        return ray.init(**arguments)

    def stop(self):
        import ray

        ray.shutdown()
        if self._before is not None and not on_original_ray():
            before, self._before = self._before, None
            before.expect_nothing_more()


@pytest.fixture(scope="session")
def cluster_keeper():
    keeper = ClusterKeeper()
    if not on_original_ray():
        # What the first cluster of a process leaves for good (one descriptor that guards against forks, and
        # the directory of the user's sessions) is there before anything is measured.
        import ray

        ray.init(num_cpus=1, logging_level="ERROR", log_to_driver=False)
        ray.shutdown()
    yield keeper
    keeper.stop()


@pytest.fixture(scope="module")
def _end_of_module(cluster_keeper):
    yield
    cluster_keeper.stop()


@pytest.fixture
def cluster(cluster_keeper, _end_of_module):
    """A cluster of four CPUs and two units of "special", shared by the tests of a module."""
    import ray

    if not ray.is_initialized():
        cluster_keeper.start(**SHARED_CLUSTER)


@pytest.fixture
def fresh_cluster(cluster_keeper):
    """A function that starts a cluster for one test, after ending any other."""
    cluster_keeper.stop()
    yield cluster_keeper.start
    cluster_keeper.stop()


@pytest.fixture
def no_cluster(cluster_keeper):
    """No cluster at the start of the test, nor after it; what the test starts must not leak."""
    cluster_keeper.stop()
    before = Belongings.now()
    yield
    cluster_keeper.stop()
    if not on_original_ray():
        before.expect_nothing_more()


@pytest.fixture(scope="session")
def belongings():
    """The class that looks for leaks, for its own tests."""
    return Belongings


class Belongings:
    """Everything that this process holds and that could be left behind."""

    def __init__(self, kinds):
        self.kinds = kinds

    @classmethod
    def now(cls):
        gc.collect()
        return cls(
            {
                "process": marked_processes(os.environ[MARK]),
                "thread": own_threads(),
                "descriptor": own_descriptors(),
                "temporary file": names_in(tempfile.gettempdir(), ("ray", "skate")),
                "shared memory": names_in("/dev/shm", ("ray", "skate")),
            }
        )

    def expect_nothing_more(self, deadline_s=LEAK_DEADLINE_S):
        deadline = time.monotonic() + deadline_s
        while leaks := self._more_than_before():
            if time.monotonic() > deadline:
                pytest.fail("left behind by the cluster:\n  " + "\n  ".join(leaks), pytrace=False)
            time.sleep(0.01)

    def _more_than_before(self):
        now = Belongings.now()
        return [
            f"{kind}: {key} ({what})"
            for kind, found in now.kinds.items()
            for key, what in found.items()
            if key not in self.kinds[kind]
        ]


def marked_processes(mark):
    """Return {pid: command} of all other processes that inherited the mark in their environment."""
    needle = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def own_threads():
    found = {}
    for entry in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def own_descriptors():
    """Return {target: number}; targets such as `socket:[123]` are unique, unlike numbers."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if not target.startswith("/proc/"):  # the listing itself
                found[target] = entry.name
    return found


def names_in(directory, prefixes):
    """Return {path: directory} of files, and of directories with something in them: a user's sessions have one for
    all, which stays when the last of them has ended."""
    found = {}
    with contextlib.suppress(OSError):
        for path in Path(directory).iterdir():
            if path.name.startswith(prefixes):
                inside = list(path.iterdir()) if path.is_dir() else [path]
                found.update({str(entry): directory for entry in inside})
    return found
