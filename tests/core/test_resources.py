"""What tasks and actors demand, and what they get."""

import contextlib
import os
import threading

import pytest

import ray
from tests.core.helpers import Gate, is_alive, run_driver, start_driver, wait_until


def test_a_resource_limits_how_many_tasks_run(cluster, tmp_path):
    first, second, gate = Gate(tmp_path), Gate(tmp_path), Gate(tmp_path)

    @ray.remote(resources={"special": 2})
    def use(started):
        started.open()
        gate.wait()

    references = [use.remote(first)]
    first.wait()
    references.append(use.remote(second))
    assert ray.wait(references, timeout=0.1) == ([], references)
    assert not second.is_open()
    gate.open()
    ray.get(references)
    assert second.is_open()


def test_tasks_wait_for_cpus(cluster, tmp_path):
    gate, started = Gate(tmp_path), Gate(tmp_path)

    @ray.remote(num_cpus=4)
    def occupy():
        started.open()
        gate.wait()

    @ray.remote
    def small():
        return 1

    occupier = occupy.remote()
    started.wait()
    waiting = small.remote()
    assert ray.wait([waiting], timeout=0.1) == ([], [waiting])
    gate.open()
    assert ray.get([occupier, waiting]) == [None, 1]


def test_fractions_of_a_cpu_share_it(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=1)
    gates = [Gate(tmp_path) for _ in range(2)]

    @ray.remote(num_cpus=0.5)
    def meet(number):
        gates[number].open()
        gates[1 - number].wait()
        return number

    assert ray.get([meet.remote(0), meet.remote(1)]) == [0, 1]


def test_available_resources_shrink_and_grow(cluster, tmp_path):
    gate, started = Gate(tmp_path), Gate(tmp_path)

    @ray.remote(num_cpus=3, resources={"special": 0.5})
    def use():
        started.open()
        gate.wait()

    reference = use.remote()
    started.wait()
    wait_until(lambda: ray.available_resources().get("CPU") == 1, what="use of three CPUs")
    assert ray.available_resources()["special"] == 1.5
    gate.open()
    ray.get(reference)
    wait_until(lambda: ray.available_resources().get("CPU") == 4, what="return of the CPUs")


def test_available_object_store_memory_is_what_values_leave(fresh_cluster):
    size, total = 50_000_000, 200_000_000
    fresh_cluster(num_cpus=1, object_store_memory=total)

    def free():
        return ray.available_resources()["object_store_memory"]

    assert free() == pytest.approx(total, rel=0.05)
    reference = ray.put(bytes(size))
    wait_until(lambda: free() <= total - size, what="use of the object store")
    assert free() > total - 2 * size
    del reference
    wait_until(lambda: free() > total - size / 2, what="return of the memory")


def test_gpus_are_handed_out_by_id(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=2, num_gpus=2)
    gates = [Gate(tmp_path) for _ in range(2)]

    @ray.remote(num_gpus=1)
    def use(number):
        gates[number].open()
        gates[1 - number].wait()
        return [int(i) for i in ray.get_gpu_ids()], os.environ["CUDA_VISIBLE_DEVICES"]

    results = ray.get([use.remote(0), use.remote(1)])
    assert sorted(ids for ids, _ in results) == [[0], [1]]
    assert all(visible == str(ids[0]) for ids, visible in results)


def test_fractions_of_a_gpu_share_one(fresh_cluster):
    fresh_cluster(num_cpus=2, num_gpus=2)

    @ray.remote(num_gpus=0.5, num_cpus=0)
    class Half:
        def gpu(self):
            return [int(i) for i in ray.get_gpu_ids()]

    halves = [Half.remote() for _ in range(4)]
    assert sorted(ray.get([half.gpu.remote() for half in halves])) == [[0], [0], [1], [1]]


def test_a_task_without_gpus_sees_none(fresh_cluster):
    fresh_cluster(num_cpus=1, num_gpus=1)

    @ray.remote
    def ids():
        return ray.get_gpu_ids()

    assert ray.get(ids.remote()) == []


def test_several_gpus_for_one_actor(fresh_cluster):
    fresh_cluster(num_cpus=1, num_gpus=3)

    @ray.remote(num_gpus=2)
    class Two:
        def visible(self):
            return os.environ["CUDA_VISIBLE_DEVICES"]

    visible = ray.get(Two.remote().visible.remote()).split(",")
    assert len(set(visible)) == 2
    assert set(visible) <= {"0", "1", "2"}


def test_what_no_node_has_waits_and_can_be_cancelled(cluster):
    @ray.remote(resources={"unobtainium": 1})
    def impossible():
        return 1

    reference = impossible.remote()
    assert ray.wait([reference], timeout=0.2) == ([], [reference])
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)


def test_an_impossible_task_does_not_hold_up_others(cluster):
    @ray.remote
    def f():
        return 1

    waiting = f.options(num_cpus=100).remote()
    assert ray.get([f.remote() for _ in range(20)]) == [1] * 20
    ray.cancel(waiting)


@pytest.mark.skate  # Ray warns after a minute or so
def test_what_no_node_has_is_warned_about_with_what_exists(no_cluster):
    with start_driver("""
        import ray
        ray.init(num_cpus=1, resources={"special": 1})

        @ray.remote(resources={"unobtainium": 1})
        def impossible():
            pass

        ray.get(impossible.remote())
    """) as process:
        seen = []

        def read():
            for line in process.stderr:
                seen.append(line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: any("unobtainium" in line for line in seen), what="a warning")
        process.kill()
        reader.join()


@pytest.mark.skate
def test_why_says_what_a_task_waits_for(cluster):
    import ray.util.state

    @ray.remote(resources={"unobtainium": 1})
    def impossible():
        pass

    reference = impossible.remote()
    assert "unobtainium" in str(ray.util.state.why(reference))
    ray.cancel(reference)


def test_actors_beyond_the_resources_wait_their_turn(cluster):
    @ray.remote(num_cpus=0, resources={"special": 1})
    class User:
        def ping(self):
            return 1

    users = [User.remote() for _ in range(3)]
    assert ray.get([users[0].ping.remote(), users[1].ping.remote()]) == [1, 1]
    waiting = users[2].ping.remote()
    assert ray.wait([waiting], timeout=0.1) == ([], [waiting])
    ray.kill(users[0])
    assert ray.get(waiting, timeout=20) == 1


def test_many_waiting_tasks_of_different_demands_all_run(cluster):
    @ray.remote
    def f(i):
        return i

    references = [
        f.options(num_cpus=1 + i % 4, resources={"special": 0.5 * (i % 5)} if i % 5 else None).remote(i)
        for i in range(60)
    ]
    assert ray.get(references) == list(range(60))


def test_accelerators_can_be_demanded_only_where_they_are(cluster):
    @ray.remote(num_gpus=1)
    def f():
        return 1

    reference = f.remote()
    assert ray.wait([reference], timeout=0.1) == ([], [reference])
    with contextlib.suppress(Exception):
        ray.cancel(reference)


def test_a_zero_cpu_cluster_runs_what_needs_none(no_cluster):
    status, output, errors = run_driver("""
        import ray
        ray.init(num_cpus=0)
        print(ray.get(ray.remote(num_cpus=0)(lambda: "ran").remote()))
    """)
    assert (status, output.splitlines()[-1]) == (0, "ran"), errors


@pytest.mark.slow  # idle workers stay for some seconds
def test_workers_of_a_burst_end_before_long(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=1)
    gate = Gate(tmp_path)

    @ray.remote(num_cpus=0)
    def wait():
        gate.wait()
        return os.getpid()

    references = [wait.remote() for _ in range(6)]
    gate.open()
    pids = set(ray.get(references))
    wait_until(lambda: sum(map(is_alive, pids)) <= 1, what="the end of idle workers")
