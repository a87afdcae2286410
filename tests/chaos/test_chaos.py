"""A workload that checks its own answers, while its workers, actors and zygote are killed at random.

Several threads of the driver run small programs whose answers are known, over and over. Another kills a
random process every few hundredths of a second: at once, or after it has been stopped for a while. When
time is up nothing is killed any more, and then

- every program ends, with the right answer or with an error that its own rules allow;
- nothing is left: no object, task, stream or block in the driver, no lease, adopted segment, waiting
  request or busy worker at the node. (Processes, threads and descriptors are the fixture's.)

The seed decides what is started and what is killed, though not how the two meet. A failing run prints it:

    SKATE_CHAOS_SEED=7 SKATE_CHAOS_S=600 pytest tests/chaos
"""

import asyncio
import contextlib
import gc
import os
import random
import signal
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

import ray
from tests.core.helpers import is_alive, wait_until

SECONDS = float(os.environ.get("SKATE_CHAOS_S", "14"))
SEED = int(os.environ.get("SKATE_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
CONVERGES_WITHIN_S = 40.0
PROGRAMS_AT_A_TIME = 6

pytestmark = [pytest.mark.skate, pytest.mark.slow]


# -- Remote code ------------------------------------------------------------------------------


@ray.remote(max_retries=-1)
def square(number):
    return number * number


@ray.remote(max_retries=-1)
def nap(seconds, value):
    time.sleep(seconds)
    return value


@ray.remote(max_retries=-1)
def tree(depth, number):
    """Sum `number` over 2 ** depth leaves, by tasks that call tasks and wait for them."""
    if depth == 0:
        return number
    return sum(ray.get([tree.remote(depth - 1, number) for _ in range(2)]))


@ray.remote(max_retries=-1)
def fill(count, number):
    return np.full(count, number)


@ray.remote(max_retries=-1)
def add(*arrays):
    return sum(arrays)


@ray.remote(max_retries=-1)
def unwrap(references):
    """The sum of what the references in a list stand for; they stay references on their way here."""
    return sum(int(array.sum()) for array in ray.get(references))


@ray.remote(max_retries=-1)
def put_inside(count, number):
    return [ray.put(np.full(count, number))]


@ray.remote(max_retries=-1)
def numbers(count, size):
    for number in range(count):
        yield np.full(size, number)


@ray.remote(max_retries=-1, _generator_backpressure_num_objects=3)
def held_back_numbers(count, size):
    for number in range(count):
        yield np.full(size, number)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return os.getpid(), self.count

    def total(self, array):
        return int(array.sum())


@ray.remote(max_restarts=-1, max_task_retries=-1)
class AsyncEcho:
    async def echo(self, value):
        await asyncio.sleep(0.005)
        return value


# -- Programs ---------------------------------------------------------------------------------


def program_tasks(dice):
    values = [dice.randrange(1000) for _ in range(dice.randrange(1, 200))]
    assert ray.get([square.remote(value) for value in values]) == [value * value for value in values]


def program_naps(dice):
    seconds = dice.random() * 0.05
    references = [nap.remote(seconds, number) for number in range(dice.randrange(1, 12))]
    left, seen = references, 0
    while left:
        ready, left = ray.wait(left, num_returns=dice.randrange(1, len(left) + 1))
        seen += len(ready)
    assert seen == len(references)
    assert ray.get(references) == list(range(len(references)))


def program_chain(dice):
    reference, value = 3, 3
    for _ in range(dice.randrange(1, 5)):
        reference, value = square.remote(reference), value * value
    assert ray.get(reference) == value


def program_tree(dice):
    depth, number = dice.randrange(0, 4), dice.randrange(1, 100)
    assert ray.get(tree.remote(depth, number)) == number * 2**depth


def program_arrays(dice):
    count = dice.choice([10, 20_000, 200_000])
    a, b = fill.remote(count, 1), ray.put(np.full(count, 2))
    c = add.remote(a, b)
    d = add.remote(c, a)
    del a, b, c
    array = ray.get(d)
    assert array.shape == (count,)
    assert (array == 4).all()


def program_nested_references(dice):
    references = [fill.remote(30_000, number) for number in range(dice.randrange(1, 5))]
    assert ray.get(unwrap.remote(references)) == sum(30_000 * number for number in range(len(references)))


def program_values_of_workers(dice):
    """Who owns the arrays is the worker that put them: they outlive it."""
    for size in (10, 30_000):
        (reference,) = ray.get(put_inside.remote(size, 5))
        assert (ray.get(reference) == 5).all()


def program_stream(dice):
    function = dice.choice([numbers, held_back_numbers])
    count, size = dice.randrange(0, 30), dice.choice([10, 20_000])
    seen = 0
    for reference in function.remote(count, size):
        array = ray.get(reference)
        assert array.shape == (size,)
        assert (array == seen).all()
        seen += 1
    assert seen == count


def program_dropped_stream(dice):
    generator = numbers.remote(1000, 20_000)
    for _ in range(dice.randrange(0, 4)):
        next(generator)


def program_counter(dice):
    """Counts go up within one life; lives do not overlap, and no answer is missing."""
    counter = Counter.remote()
    answers = ray.get([counter.increment.remote() for _ in range(dice.randrange(1, 100))])
    lives, last = [], 0
    for pid, count in answers:
        if not lives or lives[-1] != pid:
            lives.append(pid)
            last = 0
        assert count > last, answers
        last = count
    assert len(set(lives)) == len(lives), answers


def program_actor_with_arrays(dice):
    counter = Counter.remote()
    arrays = [fill.remote(30_000, number) for number in range(4)]
    assert ray.get([counter.total.remote(array) for array in arrays]) == [30_000 * number for number in range(4)]


def program_async_actor(dice):
    actor = AsyncEcho.remote()
    count = dice.randrange(1, 50)
    assert ray.get([actor.echo.remote(number) for number in range(count)]) == list(range(count))


def program_killed_actor(dice):
    counter = Counter.remote()
    references = [counter.increment.remote() for _ in range(5)]
    ray.kill(counter)
    for reference in references:
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(reference)


def program_cancel(dice):
    references = [nap.remote(dice.choice([0.01, 30]), number) for number in range(6)]
    time.sleep(dice.random() * 0.05)
    for reference in references:
        ray.cancel(reference, force=dice.random() < 0.3)
    for number, reference in enumerate(references):
        with contextlib.suppress(ray.exceptions.TaskCancelledError):
            assert ray.get(reference) == number


PROGRAMS = [value for name, value in sorted(globals().items()) if name.startswith("program_")]


class Runner(threading.Thread):
    """Runs programs until it is told to stop, and keeps what went wrong."""

    def __init__(self, seed, over):
        super().__init__(name=f"programs-{seed}", daemon=True)
        self.dice = random.Random(seed)
        self.over = over
        self.program = ""
        self.count = 0
        self.error = ""

    def run(self):
        while not self.over.is_set() and not self.error:
            program = self.dice.choice(PROGRAMS)
            self.program = program.__name__
            try:
                program(self.dice)
            except BaseException:
                self.error = f"{self.program}:\n{traceback.format_exc()}"
            self.count += 1
        if not self.error:
            self.program = ""


# -- Kills ------------------------------------------------------------------------------------


def children_of(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


ZYGOTE_LIVES_S = 3.0  # the node gives up on a zygote that dies several times before it could fork


class Killer(threading.Thread):
    """Kills workers, hosts of actors and, seldom, the zygote: all children of the node."""

    def __init__(self, seed, node, over):
        super().__init__(name="killer", daemon=True)
        self.dice = random.Random(seed)
        self.node = node
        self.over = over
        self.kills = 0
        self.spare_zygote_until = 0.0

    def run(self):
        while not self.over.wait(self.dice.random() * 0.15):
            victims = children_of(self.node)
            if not victims:
                continue
            victim = self.dice.choice(victims)
            if is_zygote(victim):
                if time.monotonic() < self.spare_zygote_until:
                    continue
                self.spare_zygote_until = time.monotonic() + ZYGOTE_LIVES_S
            with contextlib.suppress(ProcessLookupError):
                if self.dice.random() < 0.3:
                    os.kill(victim, signal.SIGSTOP)
                    self.over.wait(self.dice.random() * 0.2)
                os.kill(victim, signal.SIGKILL)
                self.kills += 1


def is_zygote(pid):
    with contextlib.suppress(OSError):
        return b"zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def node_of_driver():
    (node,) = [pid for pid in children_of(os.getpid()) if b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return node


# -- What must be left: nothing ---------------------------------------------------------------

EMPTY_IN_THE_DRIVER = (
    "objects",
    "tasks",
    "streams",
    "leases",
    "actors",
    "watches",
    "lineage_bytes",
    "store_used_bytes",
)
EMPTY_AT_THE_NODE = (
    "tickets_waiting",
    "workers_forking",
    "workers_joining",
    "workers_busy",
    "workers_dying",
    "actors_pending",
    "actors_starting",
    "actors_alive",
    "segments_adopted",
    "segment_requests_waiting",
)


def leftovers():
    from ray._runtime import session

    gc.collect()
    driver = session.core.statistics()
    node = session.request("stats")
    left = {name: driver[name] for name in EMPTY_IN_THE_DRIVER if driver.get(name)}
    left.update({f"node: {name}": node[name] for name in EMPTY_AT_THE_NODE if node.get(name)})
    return left


@pytest.mark.timeout(SECONDS + 3 * CONVERGES_WITHIN_S)
def test_random_kills_cost_no_answer_and_leave_nothing(fresh_cluster):
    fresh_cluster(num_cpus=4, object_store_memory=1 << 30)
    node = node_of_driver()
    (log,) = Path(os.environ["TMPDIR"]).glob("ray-*/session_*/logs/node.log")
    with log.open() as node_log:
        _run_chaos(node, node_log)


def _run_chaos(node, node_log):
    over = threading.Event()
    runners = [Runner(SEED * 100 + number, over) for number in range(PROGRAMS_AT_A_TIME)]
    killer = Killer(SEED, node, over)
    try:
        for thread in [*runners, killer]:
            thread.start()
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and not any(runner.error for runner in runners):
            time.sleep(0.05)
    finally:
        over.set()
    killer.join()
    deadline = time.monotonic() + CONVERGES_WITHIN_S
    for runner in runners:
        runner.join(max(deadline - time.monotonic(), 0))
    replay = f"after {killer.kills} kills; replay with SKATE_CHAOS_SEED={SEED}"
    assert is_alive(node), f"the node has ended, {replay}\n{node_log.read()[-4000:]}"
    errors = [runner.error for runner in runners if runner.error]
    assert not errors, f"{replay}\n" + "\n".join(errors)
    hung = [runner for runner in runners if runner.is_alive()]
    assert not hung, f"{[runner.program for runner in hung]} did not end, {replay}\n{where(hung)}"
    try:
        wait_until(lambda: not leftovers(), CONVERGES_WITHIN_S, "an empty cluster")
    except TimeoutError:
        from ray._runtime import session

        objects = "\n".join(session.core._describe_objects())
        pytest.fail(f"left behind: {leftovers()}, {replay}\n{objects}\n{node_log.read()[-3000:]}", pytrace=False)
    assert ray.get([square.remote(number) for number in range(20)]) == [number**2 for number in range(20)]
    print(f"{sum(runner.count for runner in runners)} programs, {killer.kills} kills, seed {SEED}")


def where(threads):
    """What the threads wait for, for the report."""
    import sys

    frames = sys._current_frames()
    reports = []
    for thread in threads:
        frame = frames.get(thread.ident)
        if frame is None:
            continue
        reports.append("".join(traceback.format_stack(frame)[-3:]))
        while frame is not None:
            for name, value in frame.f_locals.items():
                for reference in value if isinstance(value, list) else [value]:
                    if isinstance(reference, ray.ObjectRef) and not ray.wait([reference], timeout=0)[0]:
                        reports.append(f"{name}: {ray.util.state.why(reference)}")
            frame = frame.f_back
    return "\n".join(reports)
