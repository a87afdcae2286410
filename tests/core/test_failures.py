"""Real kills, stops and limits. Each ends in a retry or in the right exception, within a stated time."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

import ray
from tests.core.helpers import (
    MARK,
    Gate,
    Tally,
    is_alive,
    kill_self,
    plain,
    processes_with,
    run_driver,
    start_driver,
    wait_until,
    wait_until_idle,
)

GONE_WITHIN_S = 5.0

DRIVER = """
    import os, sys, time
    import ray

    ray.init(num_cpus=2)

    @ray.remote
    class Holder:
        def __init__(self):
            self.data = ray.put(bytes(5_000_000))
        def process_id(self):
            return os.getpid()

    @ray.remote
    def busy():
        while True:
            time.sleep(0.01)

    holders = [Holder.remote() for _ in range(2)]
    detached = Holder.options(name="detached", lifetime="detached").remote()
    pids = ray.get([actor.process_id.remote() for actor in [*holders, detached]])
    running = busy.options(num_cpus=1).remote()
    print("ready", *pids, flush=True)
    sys.stdin.readline()
"""


def wait_for_ready(process):
    for line in process.stdout:
        if line.startswith("ready"):
            return [int(word) if word.isdigit() else word for word in line.split()[1:]]
    raise AssertionError(process.stderr.read())


# -- The driver -------------------------------------------------------------------------------


@pytest.mark.skate  # on Ray some processes stay for half a minute
def test_everything_is_gone_soon_after_the_driver_was_killed(no_cluster):
    mark = uuid.uuid4().hex
    with start_driver(DRIVER, env={MARK: mark}) as process:
        wait_for_ready(process)
        assert len(processes_with(MARK, mark)) > 3
        process.kill()
        process.wait()
        wait_until(lambda: not processes_with(MARK, mark), GONE_WITHIN_S, "end of all processes")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.skate
def test_everything_is_gone_soon_after_the_driver_got_a_signal(no_cluster, number):
    mark = uuid.uuid4().hex
    with start_driver(DRIVER, env={MARK: mark}) as process:
        wait_for_ready(process)
        process.send_signal(number)
        process.wait(timeout=20)
        wait_until(lambda: not processes_with(MARK, mark), GONE_WITHIN_S, "end of all processes")


@pytest.mark.skate
def test_everything_is_gone_soon_after_the_driver_ended_without_shutdown(no_cluster):
    mark = uuid.uuid4().hex
    with start_driver(DRIVER, env={MARK: mark}) as process:
        wait_for_ready(process)
        process.communicate("end\n", timeout=20)
        wait_until(lambda: not processes_with(MARK, mark), GONE_WITHIN_S, "end of all processes")


@pytest.mark.skate
def test_a_killed_driver_leaves_no_files(no_cluster, tmp_path):
    directory = tmp_path / "t"
    directory.mkdir()
    mark = uuid.uuid4().hex
    with start_driver(DRIVER, env={MARK: mark, "TMPDIR": str(directory)}) as process:
        wait_for_ready(process)
        process.kill()
        process.wait()
        wait_until(lambda: not processes_with(MARK, mark), GONE_WITHIN_S, "end of all processes")
        wait_until(lambda: not list(directory.iterdir()), GONE_WITHIN_S, "removal of the session directory")


def test_an_interrupt_ends_a_get(no_cluster):
    with start_driver("""
        import time
        import ray

        ray.init(num_cpus=1)

        @ray.remote
        def long():
            time.sleep(50)

        @ray.remote
        def short():
            return "still works"

        reference = long.options(num_cpus=0).remote()
        print("ready", flush=True)
        try:
            ray.get(reference)
        except KeyboardInterrupt:
            print("interrupted", ray.get(short.remote()), flush=True)
    """) as process:
        wait_for_ready(process)
        wait_until_idle(process.pid)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=40)
    assert "interrupted still works" in output, errors


# -- Workers ----------------------------------------------------------------------------------


def test_an_exit_by_the_user_is_a_crash(cluster):
    @ray.remote(max_retries=0)
    def leave():
        os._exit(3)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(leave.remote())


def test_a_segmentation_fault_is_a_crash(cluster):
    @ray.remote(max_retries=0)
    def fault():
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(20)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(fault.remote())


def test_the_cluster_works_after_many_crashes(cluster):
    @ray.remote(max_retries=0)
    def die():
        kill_self()

    @ray.remote
    def ping():
        return "pong"

    for _ in range(3):
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(die.remote())
    assert ray.get([ping.remote() for _ in range(20)]) == ["pong"] * 20


def test_a_crash_gives_the_resources_back(cluster):
    @ray.remote(max_retries=0, resources={"special": 2})
    def die():
        kill_self()

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(die.remote())
    wait_until(lambda: ray.available_resources().get("special") == 2, what="return of special")


def test_a_stopped_worker_does_not_disturb_the_others(cluster, tmp_path):
    gate, started = Gate(tmp_path), Tally(tmp_path)

    @ray.remote
    def stop_me():
        started.add(os.getpid())
        gate.wait(50)
        return "resumed"

    @ray.remote
    def ping(i):
        return i

    reference = stop_me.remote()
    wait_until(started.count, what="start of the task")
    pid = int(started.lines()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        assert ray.get([ping.remote(i) for i in range(200)], timeout=30) == list(range(200))
        assert ray.wait([reference], timeout=0) == ([], [reference])
    finally:
        os.kill(pid, signal.SIGCONT)
    gate.open()
    assert ray.get(reference) == "resumed"


def test_a_stopped_actor_answers_when_it_goes_on(cluster):
    @ray.remote
    class Counter:
        def __init__(self):
            self.value = 0

        def increment(self):
            self.value += 1
            return self.value

        def process_id(self):
            return os.getpid()

    counter = Counter.remote()
    pid = ray.get(counter.process_id.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        references = [counter.increment.remote() for _ in range(500)]
        assert ray.wait(references, timeout=0.1)[0] == []
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ray.get(references) == list(range(1, 501))


@pytest.mark.skate
def test_a_stopped_worker_can_be_ended_by_force(cluster, tmp_path):
    started = Tally(tmp_path)

    @ray.remote(max_retries=0)
    def stop_me():
        started.add(os.getpid())
        time.sleep(50)

    reference = stop_me.remote()
    wait_until(started.count, what="start of the task")
    os.kill(int(started.lines()[0]), signal.SIGSTOP)
    ray.cancel(reference, force=True)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(reference, timeout=20)


def test_a_task_that_leaves_a_child_process_behind(cluster, tmp_path):
    @ray.remote
    def spawn():
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(50)"]).pid

    pid = ray.get(spawn.remote())
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_task_that_writes_much_output_does_not_hang(cluster):
    @ray.remote
    def chatter():
        for _ in range(20_000):
            print("x" * 100)
        return "done"

    assert ray.get(chatter.remote(), timeout=40) == "done"


# -- Owners and borrowers ---------------------------------------------------------------------


def test_the_death_of_an_owner_is_an_error_for_readers(cluster):
    @ray.remote
    class Owner:
        def make(self):
            self.reference = ray.put(np.zeros(1_000_000))
            return [self.reference]

        def process_id(self):
            return os.getpid()

    owner = Owner.remote()
    pid = ray.get(owner.process_id.remote())
    (reference,) = ray.get(owner.make.remote())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what="end of the owner")

    def lost():
        try:
            ray.get(reference, timeout=20)
        except ray.exceptions.OwnerDiedError:
            return True
        return False

    wait_until(lost, what="OwnerDiedError")


def test_a_reader_that_already_waits_learns_of_the_death_of_the_owner(cluster, tmp_path):
    never = Gate(tmp_path)

    @ray.remote
    class Owner:
        def start(self):
            return [wait_for_ever.options(num_cpus=0).remote()]

        def process_id(self):
            return os.getpid()

    @ray.remote(max_retries=0)
    def wait_for_ever():
        never.wait(50)

    @ray.remote(max_retries=0)
    def read(references, started):
        started.open()
        return ray.get(references[0])

    owner, started = Owner.remote(), Gate(tmp_path)
    pid = ray.get(owner.process_id.remote())
    references = ray.get(owner.start.remote())
    reader = read.remote(references, started)
    started.wait()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.OwnerDiedError):
        ray.get(reader, timeout=30)
    never.open()


def test_tasks_of_a_dead_owner_are_ended(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(max_retries=0)
    def busy():
        tally.add(os.getpid())
        time.sleep(50)

    @ray.remote
    class Owner:
        def start(self):
            self.reference = busy.options(num_cpus=0).remote()
            return os.getpid()

    owner = Owner.remote()
    pid = ray.get(owner.start.remote())
    wait_until(tally.count, what="start of the task")
    os.kill(pid, signal.SIGKILL)
    child = int(tally.lines()[0])
    wait_until(lambda: not is_alive(child), what="end of the worker whose owner died")


def test_actors_of_a_dead_owner_are_ended(cluster):
    @ray.remote
    class Child:
        def process_id(self):
            return os.getpid()

    @ray.remote
    class Parent:
        def __init__(self):
            self.child = Child.remote()

        def process_ids(self):
            return os.getpid(), ray.get(self.child.process_id.remote())

    parent = Parent.remote()
    pid, child = ray.get(parent.process_ids.remote())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(child), what="end of the actor whose owner died")


def test_a_dead_actor_says_why_it_is_dead(cluster):
    @ray.remote
    class Victim:
        def process_id(self):
            return os.getpid()

        def ping(self):
            return 1

    victim = Victim.remote()
    pid = ray.get(victim.process_id.remote())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what="end of the actor")

    def refused():
        with pytest.raises(ray.exceptions.RayActorError) as caught:
            ray.get(victim.ping.remote())
        return isinstance(caught.value, ray.exceptions.ActorDiedError) and caught.value

    assert re.search(r"(?i)victim|actor", str(wait_until(refused, what="ActorDiedError")))


@pytest.mark.skate
def test_a_dead_actor_names_the_signal(cluster):
    @ray.remote
    class Victim:
        def die(self):
            kill_self()

    with pytest.raises(ray.exceptions.ActorDiedError, match=r"(?i)SIGKILL|signal 9"):
        ray.get(Victim.remote().die.remote())


# -- The store --------------------------------------------------------------------------------


@pytest.mark.skate  # Ray writes what does not fit to a disk
def test_an_object_larger_than_the_store_is_refused(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=80_000_000)
    with pytest.raises(ray.exceptions.ObjectStoreFullError, match=r"\d"):
        ray.put(np.ones(100_000_000, dtype=np.uint8))
    assert ray.get(ray.put("small")) == "small"


@pytest.mark.skate
def test_a_result_larger_than_the_store_is_an_error(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=80_000_000)

    @ray.remote
    def make(size):
        return np.ones(size, dtype=np.uint8)

    with pytest.raises(ray.exceptions.ObjectStoreFullError):
        ray.get(make.remote(100_000_000), timeout=20)
    assert ray.get(make.remote(1_000_000)).nbytes == 1_000_000


@pytest.mark.skate
def test_a_full_store_is_an_error_until_room_is_made(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=80_000_000)
    held = []
    with pytest.raises(ray.exceptions.ObjectStoreFullError):
        for _ in range(20):
            held.append(ray.get(ray.put(np.ones(10_000_000, dtype=np.uint8))))  # views, which keep values in memory
    assert len(held) >= 5
    assert all(view[-1] == 1 for view in held)
    del held
    gc.collect()
    assert ray.get(ray.put(np.ones(10_000_000, dtype=np.uint8)))[-1] == 1


def test_an_object_that_was_lost_with_its_process_is_made_again(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(max_calls=1)
    def make():
        tally.add(os.getpid())
        return np.full(500_000, 7)

    reference = make.remote()
    ray.wait([reference], fetch_local=False)
    pid = int(tally.lines()[0])
    wait_until(lambda: not is_alive(pid), what="end of the worker")
    assert ray.get(reference)[0] == 7


# -- The cluster's own processes ----------------------------------------------------------------


@pytest.mark.skate
@pytest.mark.slow  # a limit on time for each process that is killed
def test_the_death_of_the_node_process_is_an_error_and_never_a_hang(no_cluster):
    with start_driver("""
        import os, signal, sys
        import ray

        context = ray.init(num_cpus=1)

        @ray.remote(max_retries=0)
        def long():
            import time
            time.sleep(50)

        reference = long.remote()
        ray.get(ray.remote(num_cpus=0)(lambda: 1).remote())
        print("ready", ray.nodes()[0].get("Pid", 0), context.address_info["session_dir"], flush=True)
        try:
            ray.get(reference, timeout=30)
        except ray.exceptions.GetTimeoutError:
            print("hung")
        except ray.exceptions.RayError as error:
            print("error:", type(error).__name__, error)
        for attempt in (lambda: long.remote(), lambda: ray.put(1), lambda: ray.wait([reference, ray.ObjectRef.nil()]),
                        lambda: ray.nodes()):
            try:
                attempt()
            except ray.exceptions.LocalRayletDiedError:
                print("gone")
        ray.shutdown()
        ray.init(num_cpus=1)
        print("again:", ray.get(ray.remote(lambda: 7).remote()))
    """) as process:
        node, directory = wait_for_ready(process)
        node = node or _node_process_of(process.pid)
        os.kill(node, signal.SIGKILL)
        output, errors = process.communicate(timeout=25)
    lines = output.splitlines()
    assert lines[0].startswith("error: LocalRayletDiedError"), plain(errors)
    assert "Call ray.shutdown() and ray.init()" in lines[0]
    assert "it was killed by SIGKILL" in lines[0]
    assert f"{directory}/logs/node.log" in lines[0]
    assert "listens on" in lines[1]
    assert lines[-1] == "again: 7"
    # What it said last is kept for whoever wants to know.
    assert "listens" in (Path(directory) / "logs" / "node.log").read_text()
    shutil.rmtree(directory)


def _node_process_of(driver):
    """Return the child of the driver that has the cluster below it."""
    children = [int(pid) for pid in Path(f"/proc/{driver}/task/{driver}/children").read_text().split()]
    assert children, "the driver has no child process"
    return children[0]


@pytest.mark.skate
def test_a_low_limit_of_descriptors_ends_in_an_error_or_in_success_but_never_hangs(no_cluster):
    _, output, errors = run_driver("""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        import ray
        ray.init(num_cpus=2)

        @ray.remote
        class Actor:
            def ping(self):
                return 1

        actors = []
        try:
            for _ in range(100):
                actors.append(Actor.remote())
            ray.get([actor.ping.remote() for actor in actors], timeout=30)
        except (ray.exceptions.RayError, OSError) as error:
            print("error:", type(error).__name__, error)
        else:
            print("all", len(actors))
    """)
    assert re.search(r"^(error: (?!GetTimeoutError)|all 100)", output, re.MULTILINE), plain(errors)


@pytest.mark.skate
def test_a_low_soft_limit_of_descriptors_is_raised(no_cluster):
    _, output, errors = run_driver("""
        import os, resource
        from pathlib import Path
        hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        import ray
        ray.init(num_cpus=1)

        @ray.remote
        def limit():
            return resource.getrlimit(resource.RLIMIT_NOFILE)

        print("worker", ray.get(limit.remote())[0] == hard)
        print("driver", resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard)
    """)
    assert "worker True" in output, plain(errors)
    assert "driver True" in output


@pytest.mark.skate
def test_strangers_and_garbage_on_the_socket_of_the_node_harm_nobody(fresh_cluster):
    import random
    import socket

    fresh_cluster(num_cpus=1)
    node = _node_process_of(os.getpid())
    (path,) = Path(os.environ["TMPDIR"]).glob("ray-*/session_*/node.sock")

    @ray.remote
    def ping():
        return "pong"

    assert ray.get(ping.remote(), timeout=20) == "pong"
    dice = random.Random(5)
    before = len(list(Path(f"/proc/{node}/fd").iterdir()))
    held = []
    for size in [0, 1, 7, 64, 200, 5000, 300_000]:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            stranger.settimeout(10)
            try:
                stranger.sendall(dice.randbytes(size))
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass  # closed while it was still sending
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(str(path))
        held.append(silent)
        assert ray.get(ping.remote(), timeout=20) == "pong"
    for silent in held:
        silent.close()
    wait_until(lambda: len(list(Path(f"/proc/{node}/fd").iterdir())) <= before, what="closing of the strangers")
    log = (path.parent / "logs" / "node.log").read_text()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 30, log
    assert ray.get([ping.remote() for _ in range(20)], timeout=20) == ["pong"] * 20
