"""What is tried again, how often, and what happens when it is not."""

import os
import signal

import pytest

import ray
from tests.core.helpers import Gate, Tally, is_alive, kill_self, wait_until


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path)


def test_a_task_whose_worker_is_killed_runs_again(cluster, tally):
    @ray.remote
    def die_once():
        if tally.add() == 1:
            kill_self()
        return "second try"

    assert ray.get(die_once.remote()) == "second try"
    assert tally.count() == 2


def test_a_task_runs_at_most_max_retries_times_again(cluster, tally):
    @ray.remote(max_retries=2)
    def always_die():
        tally.add()
        kill_self()

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(always_die.remote())
    assert tally.count() == 3


def test_without_retries_a_crash_is_an_error(cluster, tally):
    @ray.remote(max_retries=0)
    def die():
        tally.add()
        kill_self()

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(die.remote())
    assert tally.count() == 1


@pytest.mark.skate
def test_the_error_of_a_crash_says_how_the_worker_ended(cluster):
    @ray.remote(max_retries=0)
    def die():
        kill_self()

    with pytest.raises(ray.exceptions.WorkerCrashedError, match=r"(?i)SIGKILL|signal 9"):
        ray.get(die.remote())


def test_a_task_is_retried_for_ever_if_asked(cluster, tally):
    @ray.remote(max_retries=-1)
    def die_five_times():
        if tally.add() <= 5:
            os._exit(1)
        return "at last"

    assert ray.get(die_five_times.remote()) == "at last"


def test_options_can_change_the_number_of_retries(cluster, tally):
    @ray.remote(max_retries=5)
    def die():
        tally.add()
        kill_self()

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(die.options(max_retries=1).remote())
    assert tally.count() == 2


def test_errors_of_the_user_are_not_retried_by_default(cluster, tally):
    @ray.remote(max_retries=3)
    def fail():
        tally.add()
        raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        ray.get(fail.remote())
    assert tally.count() == 1


def test_errors_of_the_user_are_retried_if_asked(cluster, tally):
    @ray.remote(max_retries=3, retry_exceptions=True)
    def fail_twice():
        if tally.add() <= 2:
            raise ValueError("again")
        return "third try"

    assert ray.get(fail_twice.remote()) == "third try"


def test_the_last_error_arrives_when_retries_are_used_up(cluster, tally):
    @ray.remote(max_retries=2, retry_exceptions=True)
    def fail():
        raise ValueError(f"try {tally.add()}")

    with pytest.raises(ValueError, match="try 3"):
        ray.get(fail.remote())


def test_only_listed_errors_are_retried(cluster, tally):
    @ray.remote(max_retries=3, retry_exceptions=[KeyError])
    def fail(error):
        tally.add()
        raise error

    with pytest.raises(ValueError, match="not listed"):
        ray.get(fail.remote(ValueError("not listed")))
    assert tally.count() == 1
    with pytest.raises(KeyError):
        ray.get(fail.remote(KeyError("listed")))
    assert tally.count() == 1 + 4


def test_a_retried_task_gets_its_arguments_again(cluster, tally):
    data = ray.put(bytes(1_000_000))

    @ray.remote
    def die_once(blob, references):
        if tally.add() == 1:
            kill_self()
        return len(blob) + len(ray.get(references[0]))

    assert ray.get(die_once.remote(data, [data])) == 2_000_000


def test_other_tasks_of_a_killed_worker_run_elsewhere(cluster, tally):
    @ray.remote
    def work(number):
        if number == 7 and tally.add() == 1:
            kill_self()
        return number

    assert ray.get([work.remote(number) for number in range(60)]) == list(range(60))


def test_tasks_queued_behind_one_that_crashes_do_not_use_up_their_retries(cluster, tally):
    @ray.remote(max_retries=0)
    def work(number):
        if number == 0:
            kill_self()
        return number

    @ray.remote(max_retries=0)
    def quick(number):
        return number

    ray.get([quick.remote(i) for i in range(100)])
    crashing = work.remote(0)
    others = [quick.remote(number) for number in range(1, 30)]
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(crashing)
    assert ray.get(others) == list(range(1, 30))


@ray.remote
class Counter:
    def __init__(self):
        self.value = 0

    def increment(self):
        self.value += 1
        return self.value

    def process_id(self):
        return os.getpid()

    def restarted(self):
        return ray.get_runtime_context().was_current_actor_reconstructed

    def die(self):
        kill_self()


def eventually(call, timeout_s=20):
    """Get a call's result, trying again while the actor is away."""

    def attempt():
        try:
            return [ray.get(call())]
        except ray.exceptions.RayActorError as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                raise
            return None

    return wait_until(attempt, timeout_s, "an answer of the actor")[0]


def test_an_actor_that_may_not_restart_is_dead_after_a_crash(cluster):
    counter = Counter.remote()
    os.kill(ray.get(counter.process_id.remote()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.ActorDiedError):
        eventually(counter.increment.remote)


def test_an_actor_restarts_with_a_new_state(cluster):
    counter = Counter.options(max_restarts=1).remote()
    ray.get([counter.increment.remote() for _ in range(3)])
    os.kill(ray.get(counter.process_id.remote()), signal.SIGKILL)
    assert eventually(counter.restarted.remote) is True
    assert ray.get(counter.increment.remote()) == 1


def test_an_actor_restarts_at_most_max_restarts_times(cluster):
    counter = Counter.options(max_restarts=1).remote()
    for _ in range(2):
        pid = eventually(counter.process_id.remote)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid), what="end of the process")
    with pytest.raises(ray.exceptions.ActorDiedError):
        eventually(counter.process_id.remote)


def test_calls_are_retried_across_a_restart_if_asked(cluster):
    counter = Counter.options(max_restarts=-1, max_task_retries=-1).remote()
    pid = ray.get(counter.process_id.remote())
    os.kill(pid, signal.SIGKILL)
    assert ray.get(counter.process_id.remote()) != pid


def test_a_call_that_ran_when_the_actor_died_is_not_retried_by_default(cluster, tally):
    @ray.remote(max_restarts=1)
    class Fragile:
        def die_once(self):
            if tally.add() == 1:
                kill_self()
            return "ran"

        def ping(self):
            return "pong"

    fragile = Fragile.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(fragile.die_once.remote())
    assert eventually(fragile.ping.remote) == "pong"
    assert tally.count() == 1


def test_a_call_that_ran_when_the_actor_died_is_retried_if_asked(cluster, tally):
    @ray.remote(max_restarts=1, max_task_retries=1)
    class Fragile:
        def die_once(self):
            if tally.add() == 1:
                kill_self()
            return "ran"

    assert ray.get(Fragile.remote().die_once.remote()) == "ran"
    assert tally.count() == 2


def test_errors_of_methods_are_retried_if_asked(cluster, tally):
    @ray.remote(max_task_retries=3)
    class Flaky:
        @ray.method(retry_exceptions=[ValueError])
        def fail_twice(self):
            if tally.add() <= 2:
                raise ValueError
            return tally.count()

    assert ray.get(Flaky.remote().fail_twice.remote()) == 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_single_call_can_say_which_errors_are_retried(cluster, tally, asynchronous):
    class Flaky:
        def fail_twice(self, kind):
            if tally.add() <= 2:
                raise kind
            return tally.count()

    class AsyncFlaky(Flaky):
        async def fail_twice(self, kind):
            return super().fail_twice(kind)

    flaky = ray.remote(max_task_retries=3)(AsyncFlaky if asynchronous else Flaky).remote()
    assert ray.get(flaky.fail_twice.options(retry_exceptions=[KeyError, ValueError]).remote(ValueError)) == 3


def test_a_single_call_does_not_retry_other_errors(cluster, tally):
    @ray.remote(max_task_retries=3)
    class Flaky:
        def fail(self):
            tally.add()
            raise TypeError

    with pytest.raises(TypeError):
        ray.get(Flaky.remote().fail.options(retry_exceptions=[ValueError]).remote())
    assert tally.count() == 1


def test_an_actor_that_was_killed_on_purpose_does_not_restart(cluster):
    counter = Counter.options(max_restarts=-1).remote()
    pid = ray.get(counter.process_id.remote())
    ray.kill(counter)
    wait_until(lambda: not is_alive(pid), what="end of the actor")
    with pytest.raises(ray.exceptions.ActorDiedError):
        eventually(counter.process_id.remote)


def test_kill_may_leave_the_right_to_restart(cluster):
    counter = Counter.options(max_restarts=1).remote()
    pid = ray.get(counter.process_id.remote())
    ray.kill(counter, no_restart=False)

    def restarted():
        try:
            return ray.get(counter.process_id.remote()) != pid
        except ray.exceptions.RayActorError:
            return False

    wait_until(restarted, what="restart of the actor")


def test_a_restarted_actor_keeps_its_name_and_handles(cluster):
    counter = Counter.options(max_restarts=1, max_task_retries=-1, name="restarting").remote()
    (copy,) = ray.get(ray.put([counter]))
    pid = ray.get(counter.process_id.remote())
    os.kill(pid, signal.SIGKILL)
    new = ray.get(copy.process_id.remote())
    assert new != pid
    assert ray.get(ray.get_actor("restarting").process_id.remote()) == new


@pytest.mark.skate  # Ray retries in any order
def test_order_is_kept_across_a_restart(cluster):
    @ray.remote(max_restarts=-1, max_task_retries=-1)
    class Recorder:
        def __init__(self):
            self.seen = []

        def record(self, number):
            self.seen.append(number)
            return number

        def all(self):
            return self.seen

        def process_id(self):
            return os.getpid()

    recorder = Recorder.remote()
    os.kill(ray.get(recorder.process_id.remote()), signal.SIGKILL)
    ray.get([recorder.record.remote(number) for number in range(50)])
    seen = ray.get(recorder.all.remote())
    assert seen == sorted(seen)
    assert set(seen) == set(range(50))


def test_a_constructor_that_crashes_is_tried_again(cluster, tally):
    @ray.remote(max_restarts=2)
    class Late:
        def __init__(self):
            if tally.add() == 1:
                kill_self()

        def ping(self):
            return "pong"

    assert eventually(Late.remote().ping.remote) == "pong"


def test_a_result_that_was_lost_with_its_worker_was_already_delivered(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote(max_calls=1)
    def small_then_exit():
        gate.open()
        return 5

    reference = small_then_exit.remote()
    gate.wait()
    assert ray.get(reference) == 5
