"""Ending tasks before they are done."""

import asyncio
import contextlib
import threading
import time

import pytest

import ray
from tests.core.helpers import Gate, Tally, sleep_in_steps, wait_until


@pytest.fixture
def started(tmp_path):
    return Gate(tmp_path)


@pytest.fixture
def never(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


def expect_cancelled(reference):
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError)) as caught:
        ray.get(reference, timeout=20)
    assert "ancel" in str(caught.value) or "KeyboardInterrupt" in str(caught.value)


def test_a_running_task_can_be_cancelled(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        sleep_in_steps()

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)


def loaded_until_cancelled(started):
    started.open()
    wait_until(ray.get_runtime_context().is_canceled, what="the cancellation")


class LoadedUntilCancelled:
    """A value that a task finishes loading when it has been cancelled."""

    def __init__(self, started):
        self.started = started

    def __reduce__(self):
        return loaded_until_cancelled, (self.started,)


@pytest.mark.skate
def test_a_cancellation_that_comes_while_the_arguments_are_loaded_is_not_lost(cluster, started):
    @ray.remote
    def sleep(value):
        sleep_in_steps()

    reference = sleep.remote(LoadedUntilCancelled(started))
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)


def test_a_computing_task_can_be_cancelled(cluster, started):
    @ray.remote
    def compute():
        started.open()
        while True:
            sum(range(1000))

    reference = compute.remote()
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)


def test_the_worker_of_a_cancelled_task_goes_on_working(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        sleep_in_steps()

    @ray.remote
    def ping():
        return "pong"

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)
    assert ray.get([ping.remote() for _ in range(20)]) == ["pong"] * 20


def test_a_queued_task_can_be_cancelled_and_never_runs(cluster, never, started, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(num_cpus=4)
    def occupy():
        started.open()
        never.wait()

    @ray.remote
    def queued():
        tally.add()

    occupier = occupy.remote()
    started.wait()
    reference = queued.remote()
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)
    never.open()
    ray.get(occupier)
    assert tally.count() == 0


@pytest.mark.skate  # on Ray a failed check may end the driver when the argument arrives
def test_a_task_that_waits_for_its_arguments_can_be_cancelled(cluster, never):
    @ray.remote
    def late():
        never.wait()

    @ray.remote
    def dependent(x):
        return x

    argument = late.remote()
    reference = dependent.remote(argument)
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)
    never.open()
    assert ray.get(argument) is None


def test_a_finished_task_is_not_affected(cluster):
    @ray.remote
    def done():
        return 5

    reference = done.remote()
    assert ray.get(reference) == 5
    ray.cancel(reference)
    assert ray.get(reference) == 5


def test_cancelling_twice_is_harmless(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        sleep_in_steps()

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference)
    ray.cancel(reference)
    expect_cancelled(reference)


def test_force_ends_a_task_that_ignores_interrupts(cluster, started):
    @ray.remote(max_retries=0)
    def stubborn():
        started.open()
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                sleep_in_steps()

    reference = stubborn.remote()
    started.wait()
    ray.cancel(reference, force=True)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        ray.get(reference, timeout=20)


def test_a_cancelled_task_is_not_retried(cluster, started, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote(max_retries=5)
    def sleep():
        tally.add()
        started.open()
        sleep_in_steps()

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference, force=True)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        ray.get(reference, timeout=20)
    assert tally.count() == 1


def test_children_of_a_cancelled_task_are_cancelled(cluster, started, tmp_path):
    ended = Gate(tmp_path)

    @ray.remote
    def child():
        try:
            started.open()
            sleep_in_steps()
        finally:
            ended.open()

    @ray.remote
    def parent():
        return ray.get(child.remote())

    reference = parent.remote()
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)
    ended.wait()


def test_children_go_on_when_asked_for(cluster, started, never, tmp_path):
    ended = Gate(tmp_path)

    @ray.remote
    def child():
        started.open()
        never.wait()
        ended.open()

    @ray.remote
    def parent():
        return ray.get(child.remote())

    reference = parent.remote()
    started.wait()
    ray.cancel(reference, recursive=False)
    expect_cancelled(reference)
    never.open()
    ended.wait()


def test_a_task_blocked_in_get_can_be_cancelled(cluster, started, never):
    @ray.remote
    def child():
        started.open()
        never.wait()

    @ray.remote
    def parent():
        ray.get(child.remote())

    reference = parent.remote()
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)


def test_the_result_of_cancelled_tasks_is_an_error_for_dependants(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        sleep_in_steps()

    @ray.remote
    def use(x):
        return x

    reference = sleep.remote()
    dependant = use.remote(reference)
    started.wait()
    ray.cancel(reference)
    expect_cancelled(dependant)


def test_a_call_of_an_async_actor_can_be_cancelled(cluster, started, tmp_path):
    ended = Gate(tmp_path)

    @ray.remote
    class Sleeper:
        async def sleep(self):
            started.open()
            try:
                await asyncio.sleep(50)
            except asyncio.CancelledError:
                ended.open()
                raise

        async def ping(self):
            return "pong"

    sleeper = Sleeper.remote()
    reference = sleeper.sleep.remote()
    started.wait()
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)
    ended.wait()
    assert ray.get(sleeper.ping.remote()) == "pong"


@pytest.mark.skate  # on Ray the call is run, and its result dropped
def test_a_queued_call_of_an_actor_can_be_cancelled(cluster, started, never, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote
    class Worker:
        def block(self):
            started.open()
            never.wait()

        def work(self):
            tally.add()

    worker = Worker.remote()
    blocked, queued = worker.block.remote(), worker.work.remote()
    started.wait()
    ray.cancel(queued)
    never.open()
    ray.get(blocked)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(queued, timeout=20)
    assert tally.count() == 0


def test_force_is_refused_for_actor_calls(cluster, started, never):
    @ray.remote
    class Worker:
        def block(self):
            started.open()
            never.wait()

    worker = Worker.remote()
    reference = worker.block.remote()
    started.wait()
    with pytest.raises(ValueError, match="force"):
        ray.cancel(reference, force=True)
    never.open()
    ray.get(reference)


def test_a_stream_can_be_cancelled(cluster):
    @ray.remote
    def endless():
        number = 0
        while True:
            yield number
            number += 1
            time.sleep(0.01)

    stream = endless.remote()
    assert ray.get(next(stream)) == 0
    ray.cancel(stream)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError, StopIteration)):
        while True:
            ray.get(next(stream), timeout=20)


def test_cancelling_frees_the_cpus(cluster, started):
    @ray.remote(num_cpus=4)
    def sleep():
        started.open()
        sleep_in_steps()

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference)
    expect_cancelled(reference)
    wait_until(lambda: ray.available_resources().get("CPU") == 4, what="return of the CPUs")


def test_a_get_in_one_thread_ends_when_another_cancels(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        sleep_in_steps()

    reference = sleep.remote()

    def cancel():
        started.wait()
        ray.cancel(reference)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    expect_cancelled(reference)
    canceller.join()


@pytest.mark.skate
def test_cancellation_always_arrives_as_task_cancelled_error(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        sleep_in_steps()

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)


@pytest.mark.skate  # Ray does not interrupt a system call
def test_a_sleeping_task_can_be_cancelled(cluster, started):
    @ray.remote
    def sleep():
        started.open()
        time.sleep(50)

    reference = sleep.remote()
    started.wait()
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference, timeout=20)
