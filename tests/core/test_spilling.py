"""Values that leave a store which is too small for them, and come back: through the public API, on one node.

Stores are as small as they may be (64 MiB), so that little data is too much. What the node counts (`stats`) tells
whether something was really spilled.
"""

import gc
import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import ray
from ray._runtime import session
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from tests.core.helpers import Gate, run_driver, wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # a store of 64 MiB is filled several times

MIB = 1 << 20
STORE = 64 * MIB


def stats():
    return session.request("stats")


def block(seed, mib=4):
    return np.random.default_rng(seed).integers(0, 1 << 62, size=mib * MIB // 8)


def spill_files(directory):
    return list(Path(directory).rglob("*.spill"))


@pytest.fixture
def small(fresh_cluster):
    return fresh_cluster(num_cpus=2, object_store_memory=STORE)


def test_more_than_the_store_holds_can_be_put_and_read(small):
    refs = [ray.put(block(seed)) for seed in range(48)]  # three times the store
    assert stats()["spilled_values"] >= 32
    for seed, ref in enumerate(refs):
        assert (ray.get(ref) == block(seed)).all()
    for seed in reversed(range(48)):
        assert (ray.get(refs[seed]) == block(seed)).all()


def test_small_values_share_files_and_files_go_with_their_values(small):
    session_dir = small.address_info["session_dir"]
    refs = [ray.put(np.full(25_000, number)) for number in range(800)]  # 160 MiB in pieces of 200 KiB
    counts = stats()
    assert counts["spilled_values"] > 400
    assert counts["spill_files"] * 10 <= counts["spilled_values"]
    assert len(spill_files(session_dir)) == counts["spill_files"]
    assert all((ray.get(ref) == number).all() for number, ref in enumerate(refs))
    refs.clear()
    wait_until(lambda: not stats()["spill_files"], what="the end of the files")
    assert not spill_files(session_dir)


def test_garbage_is_bounded(small):
    refs = [ray.put(np.full(25_000, number)) for number in range(2400)]  # 480 MiB
    del refs[::2], refs[::2]  # three of four, all over the files

    def is_compact():
        counts = stats()
        return (
            counts["spill_file_bytes"] <= 1.2 * counts["spill_live_bytes"] + 64 * MIB
            and not counts["spill_files_being_written"]
        )

    wait_until(is_compact, what="the removal of garbage")
    assert stats()["spill_live_bytes"] < 120 * MIB
    numbers = list(range(2400))
    del numbers[::2], numbers[::2]
    assert all((ray.get(ref) == number).all() for number, ref in zip(numbers, refs, strict=True))


def test_views_keep_their_bytes_and_their_values_stay(small):
    kept = [ray.get(ray.put(block(seed))) for seed in range(8)]  # half of the store
    others = [ray.put(block(100 + seed)) for seed in range(24)]
    assert all((view == block(seed)).all() for seed, view in enumerate(kept))
    assert all((ray.get(ref) == block(100 + seed)).all() for seed, ref in enumerate(others))
    assert all((view == block(seed)).all() for seed, view in enumerate(kept))


def test_a_store_full_of_views_refuses_and_says_why(small):
    kept = []
    with pytest.raises(ObjectStoreFullError, match=r"in use.*Largest holders") as caught:
        while len(kept) < 40:
            kept.append(ray.get(ray.put(block(len(kept)))))
    assert "driver" in str(caught.value)
    assert len(kept) >= 12
    kept.clear()
    gc.collect()
    assert (ray.get(ray.put(block(1))) == block(1)).all()


def test_arguments_and_results_of_tasks_are_spilled_and_restored(small):
    @ray.remote
    def make(seed):
        return block(seed)

    @ray.remote
    def add(left, right):
        return left + right

    made = [make.remote(seed) for seed in range(40)]
    sums = [add.remote(made[at], made[-1 - at]) for at in range(40)]
    for at, ref in enumerate(sums):
        assert (ray.get(ref) == block(at) + block(39 - at)).all()
    assert stats()["spilled_bytes_total"] > STORE


def test_what_an_actor_holds_without_viewing_it_can_leave(small):
    @ray.remote
    class Keeper:
        def __init__(self):
            self.refs = []

        def keep(self, refs):
            self.refs += refs
            return int(ray.get(refs[0])[0])  # so it knows the place

        def check(self, at):
            return int(ray.get(self.refs[at]).sum())

    keeper = Keeper.remote()
    for seed in range(40):
        assert ray.get(keeper.keep.remote([ray.put(block(seed))])) == block(seed)[0]
    assert stats()["spilled_values"] > 20
    for seed in range(40):
        assert ray.get(keeper.check.remote(seed)) == block(seed).sum()


def test_an_argument_of_a_running_task_stays_until_it_was_read(small, tmp_path):
    @ray.remote(max_retries=0)
    def late(value, gate):
        gate.wait()
        return int(value.sum())

    gate = Gate(tmp_path)
    argument = ray.put(block(7))
    refs = [late.remote(argument, gate) for _ in range(4)]  # two run, two wait for a worker
    others = [ray.put(block(100 + seed)) for seed in range(24)]
    gate.open()
    assert ray.get(refs) == [block(7).sum()] * 4
    del others


def test_tasks_whose_arguments_do_not_fit_together_take_turns(fresh_cluster):
    """Each needs half of the store, and four run at a time."""
    fresh_cluster(num_cpus=4, object_store_memory=STORE)

    @ray.remote
    def make(seed):
        return block(seed)

    @ray.remote
    def first_of(*parts):
        return sum(int(part[0]) for part in parts)

    made = [make.remote(seed) for seed in range(32)]
    firsts = [int(block(seed)[0]) for seed in range(32)]
    chosen = [[(7 * task + 3 * at) % 32 for at in range(9)] for task in range(16)]
    refs = [first_of.remote(*(made[at] for at in places)) for places in chosen]
    assert ray.get(refs) == [sum(firsts[at] for at in places) for places in chosen]


def test_a_sort_of_three_times_the_store(small):
    """Partition and merge: blocks of random numbers, split by range, and each range put together and sorted."""
    blocks, ranges = 24, 24
    size = 3 * STORE // blocks // 8
    edges = np.linspace(0, 1 << 62, ranges + 1)[1:-1]

    @ray.remote
    def generate(seed):
        return np.random.default_rng(seed).integers(0, 1 << 62, size=size)

    @ray.remote(num_returns=ranges)
    def partition(values):
        values = np.sort(values)
        return tuple(np.split(values, np.searchsorted(values, edges)))

    @ray.remote
    def merge(*parts):
        return np.sort(np.concatenate(parts))

    parts = [partition.remote(generate.remote(seed)) for seed in range(blocks)]
    merged = [merge.remote(*(part[at] for part in parts)) for at in range(ranges)]
    del parts
    before, count, total = -1, 0, 0
    for ref in merged:
        values = ray.get(ref)
        assert before <= values[0]
        assert (np.diff(values) >= 0).all()
        before, count, total = int(values[-1]), count + len(values), total + int(values.sum(dtype=np.uint64))
        del values
    assert count == blocks * size
    wanted = sum(
        int(np.random.default_rng(seed).integers(0, 1 << 62, size=size).sum(dtype=np.uint64)) for seed in range(blocks)
    )
    assert total % (1 << 64) == wanted % (1 << 64)
    assert stats()["spilled_bytes_total"] > STORE


def test_many_readers_of_one_value_restore_it_together(small):
    refs = [ray.put(block(seed)) for seed in range(24)]
    wait_until(lambda: stats()["spilled_values"], what="a spill")
    before = stats()["restored_bytes_total"]
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(ray.get(refs[0])[0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [block(0)[0]] * 6
    assert stats()["restored_bytes_total"] - before < 5 * MIB


def test_what_a_dead_owner_has_spilled_is_deleted(small):
    @ray.remote
    class Owner:
        def __init__(self):
            self.refs = [ray.put(block(seed)) for seed in range(24)]

        def pid(self):
            return os.getpid()

    owner = Owner.remote()
    pid = ray.get(owner.pid.remote())
    wait_until(lambda: stats()["spilled_values"] >= 8, what="a spill")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not stats()["spilled_values"] and not stats()["spill_files"], what="the end of the files")


def test_values_survive_the_death_of_the_worker_that_made_them(small):
    @ray.remote
    class Maker:
        def make(self, seed):
            return block(seed)

        def pid(self):
            return os.getpid()

    maker = Maker.remote()
    refs = [maker.make.remote(seed) for seed in range(12)]
    ray.wait(refs, num_returns=12)
    os.kill(ray.get(maker.pid.remote()), signal.SIGKILL)
    others = [ray.put(block(100 + seed)) for seed in range(24)]
    assert all((ray.get(ref) == block(seed)).all() for seed, ref in enumerate(refs))
    assert all((ray.get(ref) == block(100 + seed)).all() for seed, ref in enumerate(others))


def test_a_damaged_file_is_noticed_and_the_value_made_again(small):
    @ray.remote
    def make(seed):
        return block(seed)

    made = [make.remote(seed) for seed in range(24)]
    ray.wait(made, num_returns=24)
    wait_until(lambda: stats()["spilled_values"] >= 4, what="a spill")
    for path in spill_files(small.address_info["session_dir"]):
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"damage")
    assert all((ray.get(ref) == block(seed)).all() for seed, ref in enumerate(made))


def test_ctrl_c_ends_the_wait_of_a_put(small):
    kept = [ray.get(ray.put(block(seed))) for seed in range(12)]
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while len(kept) < 40:
            kept.append(ray.get(ray.put(block(0))))
    timer.join()
    kept.clear()
    gc.collect()
    assert (ray.get(ray.put(block(3))) == block(3)).all()


@pytest.mark.parametrize("way", ["argument", "system_config"])
def test_spilled_values_go_to_the_directory_that_was_chosen_and_leave_it(fresh_cluster, tmp_path, way):
    config = json.dumps({"type": "filesystem", "params": {"directory_path": str(tmp_path)}})
    said = {
        "argument": {"object_spilling_directory": str(tmp_path)},
        "system_config": {"_system_config": {"object_spilling_config": config}},
    }[way]
    fresh_cluster(num_cpus=1, object_store_memory=STORE, **said)
    refs = [ray.put(block(seed)) for seed in range(24)]
    # Between two looks another file may come.
    wait_until(lambda: len(spill_files(tmp_path)) == stats()["spill_files"] > 0, what="files in the directory")
    assert (ray.get(refs[0]) == block(0)).all()
    ray.shutdown()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_memory_goes_on(fresh_cluster, monkeypatch):
    monkeypatch.setenv("RAY_local_fs_capacity_threshold", "0.000001")
    fresh_cluster(num_cpus=1, object_store_memory=STORE)
    refs = []
    with pytest.raises(OutOfDiskError, match=r"% of the file system of .* are in use"):
        while len(refs) < 40:
            refs.append(ray.put(block(len(refs))))
    assert len(refs) >= 12
    assert all((ray.get(ref) == block(seed)).all() for seed, ref in enumerate(refs))
    assert not stats()["spill_files"]


def test_spilling_can_be_switched_off(fresh_cluster, monkeypatch):
    monkeypatch.setenv("RAY_automatic_object_spilling_enabled", "0")
    fresh_cluster(num_cpus=1, object_store_memory=STORE)
    refs = []
    with pytest.raises(ObjectStoreFullError, match="switched off"):
        while len(refs) < 40:
            refs.append(ray.put(block(len(refs))))
    assert not stats()["spilled_bytes_total"]


def test_what_a_killed_session_has_spilled_is_removed_by_the_next(tmp_path):
    """Its logs are kept; gigabytes are not."""
    elsewhere = tmp_path / "spilled"
    base = Path(tempfile.mkdtemp())  # a short path, for a socket
    environment = {"RAY_TMPDIR": str(base)}
    program = f"""
        import os, signal, numpy as np, ray
        from ray._runtime import local, session
        ray.init(num_cpus=1, object_store_memory={STORE}, object_spilling_directory={str(elsewhere)!r})
        refs = [ray.put(np.zeros({MIB // 2})) for _ in range(24)]
        assert session.request("stats")["spill_files"]
        os.kill(local._node.pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_driver(program, env=environment)
    assert spill_files(elsewhere)
    run_driver("import ray; ray.init(num_cpus=1); ray.shutdown()", env=environment)
    assert not list(elsewhere.iterdir())
    shutil.rmtree(base)
