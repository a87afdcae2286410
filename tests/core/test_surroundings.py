"""Programs in surroundings that are not those of a terminal: closed standard descriptors, few descriptors, a full or
missing directory for temporary files."""

import os
import re

import pytest

import ray
from tests.core.helpers import Gate, run_driver


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


@pytest.mark.skate
def test_a_low_limit_of_descriptors_is_raised_for_many_actors(no_cluster):
    status, output, errors = run_driver("""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        import ray
        ray.init(num_cpus=1, log_to_driver=False)

        @ray.remote
        class Counter:
            def one(self):
                return 1

        actors = [Counter.remote() for _ in range(40)]
        print(sum(ray.get([actor.one.remote() for actor in actors])))
    """)
    assert (status, output.split()) == (0, ["40"]), errors


@pytest.mark.skate
@pytest.mark.slow
def test_a_driver_without_descriptors_is_named_and_no_actor_is_killed_for_it(no_cluster):
    """Slow: a connection is tried for 5 s, since a lack of descriptors may pass."""
    status, output, errors = run_driver("""
        import os, resource, ray
        ray.init(num_cpus=1, log_to_driver=False)

        @ray.remote
        class Counter:
            def pid(self):
                return os.getpid()

        @ray.remote
        class Caller:
            def call(self, actor):
                return ray.get(actor.pid.remote())

        caller, actors = Caller.remote(), [Counter.remote() for _ in range(4)]
        ray.get(caller.call.remote(actors[0]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        files = []
        try:
            while True:
                files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try:
            ray.get(actors[1].pid.remote())
        except ray.exceptions.ActorDiedError as error:
            print(f"the driver (pid {os.getpid()}) has 6" in str(error), "ulimit -n" in str(error))
        for file in files:
            os.close(file)
        # The others were not called meanwhile, and all are there.
        print(len({ray.get(actor.pid.remote()) for actor in (actors[0], *actors[2:])}), end=" ")
        print(len(ray.get([caller.call.remote(actor) for actor in actors])))
    """)
    assert (status, output.split()) == (0, ["True", "True", "3", "4"]), (output, errors)


@pytest.mark.skate
def test_a_worker_that_lost_its_connection_and_goes_on_is_not_said_to_be_killed_by_somebody(cluster):
    @ray.remote(max_retries=0)
    def close_all(gate):
        os.closerange(3, 1000)
        gate.wait()

    with pytest.raises(ray.exceptions.WorkerCrashedError, match="its connection to the node was lost") as caught:
        ray.get(close_all.remote(Gate("/nowhere")))
    assert "kill -9" not in str(caught.value)


@pytest.mark.skate
def test_a_directory_for_sessions_that_cannot_be_made_is_named(no_cluster, tmp_path):
    (tmp_path / "file").touch()
    for wrong in ("file", "file/below"):
        path = str(tmp_path / wrong)
        status, _, errors = run_driver("import ray; ray.init()", env={"RAY_TMPDIR": path})
        assert status == 1
        assert re.search(f"RuntimeError: the directory of the session, {path}, .*RAY_TMPDIR", errors), errors


@pytest.mark.skate
def test_a_deleted_current_directory_is_named(no_cluster, tmp_path):
    status, _, errors = run_driver(f"""
        import os, ray
        os.mkdir({str(tmp_path / "gone")!r})
        os.chdir({str(tmp_path / "gone")!r})
        os.rmdir(os.getcwd())
        ray.init()
    """)
    assert status == 1
    assert "current directory of this program has been deleted" in errors


@pytest.mark.skate
def test_a_node_without_descriptors_to_start_with_says_so(no_cluster):
    status, _, errors = run_driver("""
        import resource, ray
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        ray.init()
    """)
    assert status == 1
    last = errors.partition("RuntimeError: ")[2]
    assert "could not be started" in last, errors
    assert "20 descriptors" in last, errors
    assert "ulimit -n" in last, errors


@pytest.mark.skate
def test_a_node_that_was_sent_a_signal_is_said_to_have_been(no_cluster):
    status, output, errors = run_driver("""
        import os, signal, ray
        from pathlib import Path
        ray.init(num_cpus=1, log_to_driver=False)

        @ray.remote
        def wait():
            signal.pause()

        waiting = wait.remote()
        (node,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(node), signal.SIGTERM)
        try:
            ray.get(waiting)
        except ray.exceptions.LocalRayletDiedError as error:
            print(error)
    """)
    assert status == 0, errors
    assert "somebody sent it SIGTERM" in output
    assert "node.log" not in output, "the directory of a node that ends in order is gone"
