"""Actors that end themselves: from any place in them, and without harm to what else they run."""

import asyncio
import os
import sys
import threading

import pytest

import ray
from tests.core.helpers import Gate, is_alive, wait_until


@ray.remote
class Quitter:
    def process_id(self):
        return os.getpid()

    def quit_and_catch(self):
        try:
            ray.actor.exit_actor()
        except BaseException:
            return "survived"

    def quit_in_a_thread(self, gate):
        def quit_later():
            gate.wait()
            ray.actor.exit_actor()

        threading.Thread(target=quit_later).start()

    def quit_and_yield(self):
        yield 1
        try:
            ray.actor.exit_actor()
        except BaseException:
            yield 2


@ray.remote
class AsyncQuitter:
    async def process_id(self):
        return os.getpid()

    async def quit_and_catch(self):
        try:
            ray.actor.exit_actor()
        except BaseException:
            return "survived"

    async def quit_in_the_background(self, gate):
        async def quit_later():
            while not gate.is_open():
                await asyncio.sleep(0.005)
            ray.actor.exit_actor()

        self.task = asyncio.create_task(quit_later())

    async def quit_in_a_thread(self, gate):
        def quit_later():
            gate.wait()
            ray.actor.exit_actor()

        threading.Thread(target=quit_later).start()

    async def leave_in_the_background(self):
        async def leave():
            sys.exit(0)

        self.task = asyncio.create_task(leave())


def expect_end(actor, pid):
    wait_until(lambda: not is_alive(pid), what="end of the actor")
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.process_id.remote())


@pytest.mark.parametrize("kind", [Quitter, Quitter.options(max_concurrency=2), AsyncQuitter])
def test_an_exit_cannot_be_caught(cluster, kind):
    actor = kind.remote()
    pid = ray.get(actor.process_id.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.quit_and_catch.remote())
    expect_end(actor, pid)


def test_an_exit_in_a_generator_cannot_be_caught(cluster):
    actor = Quitter.remote()
    pid = ray.get(actor.process_id.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(list(actor.quit_and_yield.options(num_returns="streaming").remote()))
    expect_end(actor, pid)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Quitter, "quit_in_a_thread"),
        (Quitter.options(max_concurrency=2), "quit_in_a_thread"),
        (AsyncQuitter, "quit_in_a_thread"),
        (AsyncQuitter, "quit_in_the_background"),
    ],
)
def test_an_actor_can_be_ended_from_its_background(cluster, tmp_path, kind, method):
    actor, gate = kind.remote(), Gate(tmp_path)
    pid = ray.get(actor.process_id.remote())
    ray.get(getattr(actor, method).remote(gate))
    gate.open()
    expect_end(actor, pid)


@pytest.mark.skate  # on Ray such an actor answers nothing any more
def test_sys_exit_in_the_background_of_an_async_actor_ends_it(cluster):
    actor = AsyncQuitter.remote()
    pid = ray.get(actor.process_id.remote())
    actor.leave_in_the_background.remote()
    expect_end(actor, pid)


class Steps:
    """What a running call waits for, and an end by any way."""

    def __init__(self, started, gate):
        self.started, self.gate = started, gate

    def end(self, way):
        {
            "exit_actor": ray.actor.exit_actor,
            "sys.exit": lambda: sys.exit(0),
            "failure": lambda: sys.exit(3),
        }[way]()


class ThreadedSteps(Steps):
    def slow(self):
        self.started.open()
        self.gate.wait()
        return "slow"

    def quick(self):
        return "quick"


class AsyncSteps(Steps):
    async def slow(self):
        self.started.open()
        while not self.gate.is_open():
            await asyncio.sleep(0.005)
        return "slow"

    async def quick(self):
        return "quick"

    async def end(self, way):
        super().end(way)


class GroupedSteps(ThreadedSteps):
    @ray.method(concurrency_group="ending")
    def end(self, way):
        super().end(way)


KINDS = {
    "threaded": ray.remote(max_concurrency=2)(ThreadedSteps),
    "groups": ray.remote(concurrency_groups={"ending": 1})(GroupedSteps),
    "async": ray.remote(max_concurrency=2)(AsyncSteps),
}


@pytest.mark.parametrize("way", ["exit_actor", "sys.exit", "failure", "__ray_terminate__"])
@pytest.mark.parametrize("kind", KINDS)
def test_running_calls_end_and_waiting_ones_fail(cluster, tmp_path, kind, way):
    if kind == "async" and way in ("sys.exit", "failure") and "skate" not in ray.__version__:
        pytest.skip("on Ray such an actor answers nothing any more")
    if kind == "groups" and way == "__ray_terminate__":
        pytest.skip("it waits in the group of the slow call, which is a limit of one")
    started, gate = Gate(tmp_path), Gate(tmp_path)
    actor = KINDS[kind].remote(started, gate)
    slow = actor.slow.remote()
    started.wait()
    ends = actor.__ray_terminate__.remote() if way == "__ray_terminate__" else actor.end.remote(way)
    if way == "failure":  # the node finds out why when the process has ended
        assert ray.wait([ends], timeout=0.2) == ([], [ends])
    else:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(ends)
    late = actor.quick.remote()
    gate.open()
    assert ray.get(slow) == "slow"
    for reference in (ends, late):
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(reference)


@pytest.mark.skate  # on Ray the caller waits until the process has ended
@pytest.mark.parametrize("kind", ["threaded", "async"])
def test_a_running_call_that_waits_for_the_ending_actor_is_told(cluster, tmp_path, kind):
    class Dependent(ThreadedSteps):
        def ask_itself(self):
            self.started.open()
            self.gate.wait()
            me = ray.get_runtime_context().current_actor
            try:
                ray.get(me.quick.remote())
            except ray.exceptions.ActorDiedError:
                return "told"

    class AsyncDependent(AsyncSteps):
        async def ask_itself(self):
            await AsyncSteps.slow(self)
            me = ray.get_runtime_context().current_actor
            try:
                await me.quick.remote()
            except ray.exceptions.ActorDiedError:
                return "told"

    started, gate = Gate(tmp_path), Gate(tmp_path)
    actor = ray.remote(max_concurrency=3)(Dependent if kind == "threaded" else AsyncDependent).remote(started, gate)
    asking = actor.ask_itself.remote()
    started.wait()
    with pytest.raises(ray.exceptions.ActorDiedError, match="exit_actor"):
        ray.get(actor.end.remote("exit_actor"))
    gate.open()
    assert ray.get(asking) == "told"


@pytest.mark.parametrize("kind", KINDS)
def test_calls_end_although_the_last_handle_has_gone(cluster, tmp_path, kind):
    started, gate = Gate(tmp_path), Gate(tmp_path)
    actor = KINDS[kind].remote(started, gate)
    slow = actor.slow.remote()
    started.wait()
    del actor
    gate.open()
    assert ray.get(slow) == "slow"


def test_a_failing_exit_restarts_a_threaded_actor_when_its_calls_have_ended(cluster, tmp_path):
    started, gate = Gate(tmp_path), Gate(tmp_path)
    actor = KINDS["threaded"].options(max_restarts=1).remote(started, gate)
    slow = actor.slow.remote()
    started.wait()
    ends = actor.end.remote("failure")
    gate.open()
    assert ray.get(slow) == "slow"
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(ends)
    assert wait_until(lambda: attempt(actor.quick), what="the actor's restart") == "quick"


def attempt(method):
    try:
        return ray.get(method.remote())
    except ray.exceptions.ActorUnavailableError:
        return None
