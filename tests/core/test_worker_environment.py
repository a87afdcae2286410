"""Environment variables that the engine sets for libraries in its workers."""

import os

import pytest

import ray

THREADS = "OMP_NUM_THREADS"
DEVICES = "CUDA_VISIBLE_DEVICES"


@ray.remote
def variable(name):
    return os.environ.get(name)


@ray.remote
class Reader:
    def __init__(self, name):
        self.at_start = os.environ.get(name)

    def read(self):
        return self.at_start


@pytest.fixture
def undecided(monkeypatch):
    """Neither the number of threads nor devices are chosen by the environment of the tests."""
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.delenv(DEVICES, raising=False)
    return monkeypatch


def test_numerical_libraries_get_as_many_threads_as_a_task_has_cpus(undecided, fresh_cluster):
    fresh_cluster(num_cpus=4)
    cpus = [1, 3, 0.5, 0, 2.9, 1]
    limits = ray.get([variable.options(num_cpus=count).remote(THREADS) for count in cpus])
    assert limits == ["1", "3", "1", "1", "2", "1"]
    assert ray.get(variable.remote(THREADS)) == "1"


def test_actors_get_as_many_threads_as_cpus(undecided, fresh_cluster):
    fresh_cluster(num_cpus=4)
    for options, expected in (({}, "1"), ({"num_cpus": 0}, "1"), ({"num_cpus": 3}, "3")):
        assert ray.get(Reader.options(**options).remote(THREADS).read.remote()) == expected


def test_the_number_of_threads_is_known_to_what_a_function_imports(undecided, fresh_cluster, tmp_path):
    (tmp_path / "like_numpy.py").write_text(
        f"import os\nTHREADS = os.environ.get({THREADS!r})\ndef threads():\n    return THREADS\n"
    )
    undecided.syspath_prepend(tmp_path)
    import like_numpy

    fresh_cluster(num_cpus=2)
    assert ray.get(ray.remote(num_cpus=2)(like_numpy.threads).remote()) == "2"


def test_a_number_of_threads_that_the_user_chose_stays(undecided, fresh_cluster):
    undecided.setenv(THREADS, "7")
    fresh_cluster(num_cpus=2)
    assert ray.get(variable.options(num_cpus=2).remote(THREADS)) == "7"
    assert ray.get(Reader.remote(THREADS).read.remote()) == "7"
    chosen = variable.options(runtime_env={"env_vars": {THREADS: "5"}})
    assert ray.get(chosen.remote(THREADS)) == "5"


@pytest.mark.skate  # Ray forgets it after the task
def test_a_number_of_threads_that_a_task_chose_stays(undecided, fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote
    def choose():
        os.environ[THREADS] = "6"
        return os.getpid()

    @ray.remote(num_cpus=0.5)
    def look():
        return os.getpid(), os.environ[THREADS]

    ray.get(variable.remote(THREADS))
    pid = ray.get(choose.remote())
    assert ray.get(look.remote()) == (pid, "6")


def test_devices_stay_as_they_are_for_tasks_without_gpus(undecided, fresh_cluster):
    fresh_cluster(num_cpus=1, num_gpus=1)
    assert ray.get(variable.remote(DEVICES)) is None
    assert ray.get(Reader.remote(DEVICES).read.remote()) is None


@pytest.mark.parametrize("found", [None, "3,5"])
def test_a_worker_finds_its_devices_again_after_a_task_with_gpus(undecided, fresh_cluster, found):
    if found is not None:
        undecided.setenv(DEVICES, found)
    fresh_cluster(num_cpus=1, num_gpus=1)

    @ray.remote(max_calls=0)  # Ray's default for tasks with GPUs is 1, and every one of them has a new process
    def look():
        return os.getpid(), os.environ.get(DEVICES)

    used = ray.get(look.options(num_gpus=1).remote())
    free = ray.get(look.remote())
    assert used == (free[0], "0" if found is None else "3")
    assert free[1] == found


def test_a_task_with_gpus_has_a_process_of_its_own_unless_it_is_told_to_share(fresh_cluster):
    fresh_cluster(num_cpus=1, num_gpus=1)

    @ray.remote(num_gpus=1)
    def alone():
        return os.getpid()

    @ray.remote(num_gpus=1, max_calls=0)
    def shared():
        return os.getpid()

    assert len({ray.get(alone.remote()) for _ in range(3)}) == 3
    assert len({ray.get(shared.remote()) for _ in range(3)}) == 1


def test_devices_can_be_hidden_from_tasks_without_gpus(undecided, fresh_cluster):
    undecided.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    fresh_cluster(num_cpus=1, num_gpus=1)
    assert ray.get(variable.remote(DEVICES)) == ""
