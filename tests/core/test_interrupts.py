"""Ctrl-C in everything that waits, and event loops as notebooks have them."""

import asyncio
import os
import signal
import time

import pytest

import ray
from tests.core.helpers import Tally, run_driver, start_driver, wait_until, wait_until_idle

PROGRAM = """
    import asyncio, numpy, time
    import ray

    ray.init(num_cpus=1, object_store_memory=100 << 20)

    @ray.remote
    def sleep(seconds=50):
        time.sleep(seconds)

    @ray.remote
    def stream():
        time.sleep(50)
        yield 1

    @ray.remote
    class Actor:
        def sleep(self):
            time.sleep(50)

    @ray.remote(num_cpus=0)
    def seven():
        return 7

    async def wait_for(awaitable):
        return await awaitable

    async def iterate():
        async for item in stream.remote():
            pass

    ray.get(seven.remote())
    print("ready", flush=True)
    try:
        {wait}
    except KeyboardInterrupt:
        print("interrupted", ray.get(seven.remote()), flush=True)
"""


@pytest.mark.skate
@pytest.mark.parametrize(
    "wait",
    [
        "ray.get(sleep.remote())",
        "ray.get([sleep.remote() for _ in range(3)], timeout=40)",
        "ray.wait([sleep.remote()])",
        "ray.wait([stream.remote()])",
        "next(stream.remote())",
        "ray.get(Actor.remote().sleep.remote())",
        "ray.get(sleep.options(num_cpus=9).remote())",
        "held = ray.get(ray.put(numpy.ones(60 << 20, dtype=bool))); ray.put(bytes(60 << 20))",
        "held = ray.get(ray.put(numpy.ones(60 << 20, dtype=bool))); sleep.remote(bytes(60 << 20))",
        "sleep.remote().future().result()",
        "asyncio.run(wait_for(sleep.remote()))",
        "asyncio.run(iterate())",
        "[sleep.remote(0.0005) for _ in range(100_000)]; ray.get(sleep.remote())",
    ],
)
def test_an_interrupt_ends_the_wait_and_the_cluster_stays_usable(no_cluster, wait):
    with start_driver(PROGRAM.format(wait=wait)) as process:
        assert process.stdout.readline() == "ready\n"
        wait_until_idle(process.pid)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted 7\n"
        assert time.monotonic() - start < 5
        process.communicate(timeout=10)
        assert process.returncode == 0


@pytest.mark.skate
@pytest.mark.slow  # an interrupt for every few milliseconds of a start
def test_an_interrupted_start_leaves_no_cluster(no_cluster):
    status, output, errors = run_driver("""
        import os, signal, threading, time
        from pathlib import Path
        import ray

        begin = time.monotonic()
        ray.init(num_cpus=1)
        span = time.monotonic() - begin
        ray.shutdown()

        def children():
            return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

        def start_and_interrupt(after_s):
            timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                ray.init(num_cpus=1)
                timer.join()
            except KeyboardInterrupt:  # native code of imported modules may swallow it: then there is a cluster
                pass

        for step in range(30):
            start_and_interrupt(span * step / 20)
            assert ray.is_initialized() or not children(), step
            ray.shutdown()
            assert not children(), step
        assert threading.active_count() == 1, threading.enumerate()
        print("clean")
    """)
    assert (status, output) == (0, "clean\n"), errors


@pytest.mark.skate  # Ray's threads are silent, too, but its main one may abort
def test_daemon_threads_that_wait_end_silently_with_the_program(no_cluster):
    status, _, errors = run_driver("""
        import os, signal, sys, threading, time
        import ray

        ray.init(num_cpus=1)

        @ray.remote
        def sleep():
            time.sleep(50)

        @ray.remote
        def stream():
            yield sleep()

        reference = sleep.remote()
        waits = (
            lambda: ray.get(reference),
            lambda: ray.get([reference], timeout=50),
            lambda: ray.wait([reference]),
            lambda: next(stream.remote()),
        )
        inside = threading.Semaphore(0)

        def wait(function):
            inside.release()
            function()

        for function in waits:
            threading.Thread(target=wait, args=[function], daemon=True).start()
        for _ in waits:
            inside.acquire()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        ray.get(reference)
    """)
    assert status != 0
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_references_can_be_awaited_on_a_loop_that_runs_already(no_cluster):
    status, output, errors = run_driver("""
        import asyncio
        import ray

        ray.init(num_cpus=2)

        @ray.remote
        def double(x):
            return 2 * x

        @ray.remote
        class Actor:
            def method(self):
                return 5

        async def cells():
            print(await double.remote(1), ray.get(double.remote(2)))
            print(await asyncio.gather(*[double.remote(i) for i in range(3)]))
            actor = Actor.remote()
            print(await actor.method.remote())
            print(await asyncio.wrap_future(double.remote(4).future()))

        asyncio.run(cells())
        asyncio.run(cells())
    """)
    assert status == 0, errors
    assert output.splitlines() == ["2 4", "[0, 2, 4]", "5", "8"] * 2


def test_a_cluster_can_be_started_and_ended_in_any_thread(no_cluster):
    status, output, errors = run_driver("""
        import threading
        import ray

        @ray.remote
        def double(x):
            return 2 * x

        def program():
            ray.init(num_cpus=1)
            print(ray.get(double.remote(1)))
            ray.shutdown()

        for _ in range(2):
            thread = threading.Thread(target=program)
            thread.start()
            thread.join()
        program()
    """)
    assert status == 0, errors
    assert output.split() == ["2", "2", "2"]


def raise_on_signal(tally):
    def handler(_signum, _frame):
        tally.add()
        raise TimeoutError("from the handler")

    signal.signal(signal.SIGUSR1, handler)
    return os.getpid()


@ray.remote(max_calls=0)
def handle_in_a_task(tally):
    return raise_on_signal(tally)


@ray.remote
class Handling:
    def handle(self, tally):
        return raise_on_signal(tally)

    def ping(self, number):
        return number


@ray.remote
class AsyncHandling:
    async def handle(self, tally):
        return raise_on_signal(tally)

    async def ping(self, number):
        await asyncio.sleep(0)
        return number


def answered(actor, number):
    """Whether a call comes back: with its value, or with what the handler has raised inside of it."""
    try:
        return ray.get(actor.ping.remote(number), timeout=20) == number
    except TimeoutError as error:
        return "from the handler" in str(error)


def handled(actor, tally, expected, *, calls):
    """Whether the handler has run so often. A call makes sure that Python looks for signals.

    An event loop does so by itself. While it handles a call nothing may raise: asyncio's code does not expect it.
    """
    assert not calls or answered(actor, expected)
    return tally.count() == expected


@pytest.mark.skate
@pytest.mark.parametrize("kind", [Handling, Handling.options(max_concurrency=2), AsyncHandling])
def test_a_signal_handler_that_raises_between_calls_does_not_end_the_actor(cluster, tmp_path, kind):
    tally = Tally(tmp_path)
    actor = kind.remote()
    pid = ray.get(actor.handle.remote(tally))
    for number in range(20):
        os.kill(pid, signal.SIGUSR1)
        calls = kind is not AsyncHandling
        wait_until(lambda n=number + 1, calls=calls: handled(actor, tally, n, calls=calls), what="the handler's run")
        assert answered(actor, number)  # which is after what the handler has raised
    assert ray.get([actor.ping.remote(number) for number in range(5)], timeout=20) == list(range(5))


@pytest.mark.skate
def test_a_signal_handler_that_raises_between_tasks_does_not_end_the_worker(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=1)
    tally = Tally(tmp_path)
    pid = ray.get(handle_in_a_task.remote(tally))
    os.kill(pid, signal.SIGUSR1)
    for _ in range(2):
        try:
            assert ray.get(handle_in_a_task.remote(tally), timeout=20) == pid
        except TimeoutError as error:  # it met the call itself
            assert "from the handler" in str(error)  # noqa: PT017
    assert tally.count() == 1


@pytest.mark.skate
@pytest.mark.slow  # many signals at many moments
def test_no_call_is_lost_to_a_signal_handler_that_raises(cluster, tmp_path):
    tally = Tally(tmp_path)
    actor = Handling.remote()
    pid = ray.get(actor.handle.remote(tally))
    outcomes = []
    for number in range(300):
        reference = actor.ping.remote(number)
        os.kill(pid, signal.SIGUSR1)
        try:
            outcomes.append(ray.get(reference, timeout=20) == number)
        except TimeoutError as error:  # it met the call itself
            outcomes.append("from the handler" in str(error))
    assert all(outcomes)
    assert answered(actor, 5)


@pytest.mark.skate
def test_what_a_signal_handler_raises_between_tasks_is_printed(no_cluster):
    status, _, errors = run_driver("""
        import os, signal
        import ray
        from helpers import Tally

        @ray.remote
        def handle(tally):
            def handler(_signum, _frame):
                tally.add()
                raise LookupError("from the handler")
            signal.signal(signal.SIGUSR1, handler)
            return os.getpid()

        ray.init(num_cpus=1)
        import tempfile
        tally = Tally(tempfile.mkdtemp())
        for _ in range(20):  # some of which are caught by a call
            os.kill(ray.get(handle.remote(tally)), signal.SIGUSR1)
            try:
                ray.get(handle.remote(tally))
            except LookupError:
                pass
        ray.shutdown()
    """)
    assert status == 0, errors
    assert "LookupError: from the handler" in errors
    assert "in handler" in errors
    assert "defect" not in errors


@pytest.mark.skate
@pytest.mark.parametrize("kind", [Handling, AsyncHandling])
def test_a_signal_handler_that_exits_ends_the_actor(cluster, kind):
    def exit_on_signal(_self):
        signal.signal(signal.SIGTERM, lambda *_: exit(0))
        return os.getpid()

    actor = kind.remote()
    os.kill(ray.get(actor.__ray_call__.remote(exit_on_signal)), signal.SIGTERM)

    def end():
        try:
            ray.get(actor.ping.remote(1), timeout=20)
        except ray.exceptions.ActorDiedError as error:
            return str(error)

    assert "sys.exit" in wait_until(end, what="the end of the actor")
