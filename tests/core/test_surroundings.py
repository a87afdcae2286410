"""Programs in surroundings that are not those of a terminal: closed standard descriptors, few descriptors, a full or
missing directory for temporary files."""

import os

import pytest

import ray
from tests.core.helpers import run_driver


@pytest.mark.parametrize("closed", ["0", "1", "0, 1", "0, 1, 2"])
def test_a_program_without_standard_descriptors_has_a_cluster(no_cluster, tmp_path, closed):
    status, _, errors = run_driver(f"""
        import os
        for number in ({closed},):
            os.close(number)
        import pathlib, ray
        ray.init(num_cpus=1, log_to_driver=False)

        @ray.remote
        def double(x):
            return 2 * x

        pathlib.Path({str(tmp_path / "result")!r}).write_text(str(ray.get(double.remote(4))))
    """)
    assert status == 0, errors
    assert (tmp_path / "result").read_text() == "8"


@pytest.mark.skate
def test_a_task_that_closes_all_descriptors_fails_with_the_reason(cluster):
    @ray.remote(max_retries=0)
    def close_all():
        os.closerange(3, 1000)

    with pytest.raises(ray.exceptions.WorkerCrashedError, match=r"exited with code 1(?s:.*)the program has closed"):
        ray.get(close_all.remote())


@pytest.mark.skate
@pytest.mark.parametrize("when", ["before a call", "during a call"])
def test_a_driver_that_closes_all_descriptors_gets_an_exception(no_cluster, when):
    status, output, errors = run_driver(f"""
        import os, threading, ray
        ray.init(num_cpus=1, log_to_driver=False)

        @ray.remote
        class Waiter:
            def wait(self):
                threading.Event().wait()

        waiter = Waiter.remote()
        ray.get(waiter.__ray_ready__.remote())
        if {when!r} == "before a call":
            os.closerange(3, 1000)
        else:
            threading.Timer(0.2, os.closerange, (3, 1000)).start()
        try:
            ray.get(waiter.wait.remote())
        except ray.exceptions.LocalRayletDiedError as error:
            print(error, flush=True)
        os._exit(0)
    """)
    assert status == 0, errors
    assert "the program has closed descriptors" in output
    assert errors.count("\n") <= 1, errors
