"""Actors with coroutine methods: calls interleave at every await."""

import asyncio
import contextvars

import pytest

import ray
from tests.core.helpers import Gate, wait_until


@ray.remote
class Meeting:
    """Calls of `join` end when as many have come as were expected."""

    def __init__(self, expected):
        self.expected = expected
        self.present = 0
        self.most_present = 0
        self.complete = asyncio.Event()

    async def join(self):
        self.present += 1
        self.most_present = max(self.most_present, self.present)
        if self.present == self.expected:
            self.complete.set()
        await self.complete.wait()
        self.present -= 1
        return self.expected

    async def most(self):
        return self.most_present


def test_a_coroutine_method_returns_its_value(cluster):
    @ray.remote
    class Adder:
        async def add(self, a, b=1):
            await asyncio.sleep(0)
            return a + b

    adder = Adder.remote()
    assert ray.get([adder.add.remote(1), adder.add.remote(1, b=5)]) == [2, 6]


def test_calls_interleave(cluster):
    meeting = Meeting.remote(20)
    assert ray.get([meeting.join.remote() for _ in range(20)]) == [20] * 20


def test_a_thousand_calls_may_be_under_way_unless_limited(cluster):
    meeting = Meeting.remote(300)
    assert len(ray.get([meeting.join.remote() for _ in range(300)])) == 300


def test_max_concurrency_limits_the_calls_under_way(cluster):
    meeting = Meeting.options(max_concurrency=5).remote(5)
    ray.get([meeting.join.remote() for _ in range(20)])
    assert ray.get(meeting.most.remote()) == 5


def test_plain_methods_of_an_async_actor_run_too(cluster):
    @ray.remote
    class Mixed:
        def __init__(self):
            self.value = 1

        async def change(self):
            self.value = 2

        def read(self):
            return self.value

    mixed = Mixed.remote()
    ray.get(mixed.change.remote())
    assert ray.get(mixed.read.remote()) == 2


def test_errors_in_coroutines_reach_the_caller(cluster):
    @ray.remote
    class Failing:
        async def fail(self):
            await asyncio.sleep(0)
            raise LookupError("async")

    with pytest.raises(LookupError, match="async"):
        ray.get(Failing.remote().fail.remote())


def test_references_can_be_awaited_in_an_actor(cluster):
    @ray.remote
    def square(x):
        return x * x

    @ray.remote
    class Summer:
        async def total(self, count):
            return sum(await asyncio.gather(*[square.remote(i) for i in range(count)]))

    assert ray.get(Summer.remote().total.remote(5)) == 30


def test_an_actor_can_await_a_call_of_itself(cluster):
    @ray.remote
    class Recursive:
        async def down(self, depth):
            if depth == 0:
                return "bottom"
            me = ray.get_runtime_context().current_actor
            return await me.down.remote(depth - 1)

    assert ray.get(Recursive.remote().down.remote(5)) == "bottom"


def test_a_call_can_be_released_by_a_later_one(cluster):
    @ray.remote
    class Signal:
        def __init__(self):
            self.event = asyncio.Event()

        async def wait(self):
            await self.event.wait()
            return "released"

        async def send(self):
            self.event.set()

    signal = Signal.remote()
    waiting = signal.wait.remote()
    assert ray.wait([waiting], timeout=0.05) == ([], [waiting])
    signal.send.remote()
    assert ray.get(waiting) == "released"


def test_async_generators_stream_their_items(cluster):
    @ray.remote
    class Streamer:
        async def count(self, n):
            for i in range(n):
                await asyncio.sleep(0)
                yield i

    references = Streamer.remote().count.options(num_returns="streaming").remote(4)
    assert [ray.get(reference) for reference in references] == [0, 1, 2, 3]


def test_background_work_goes_on_between_calls(cluster):
    @ray.remote
    class Ticker:
        def __init__(self):
            self.ticks = 0
            self.task = None

        async def start(self):
            self.task = asyncio.get_running_loop().create_task(self.tick())

        async def tick(self):
            while True:
                self.ticks += 1
                await asyncio.sleep(0.001)

        async def read(self):
            return self.ticks

    ticker = Ticker.remote()
    ray.get(ticker.start.remote())
    wait_until(lambda: ray.get(ticker.read.remote()) > 5, what="ticks in the background")


def test_concurrency_groups_have_limits_of_their_own(cluster, tmp_path):
    gate, started = Gate(tmp_path), [Gate(tmp_path) for _ in range(2)]

    @ray.remote(concurrency_groups={"io": 2, "compute": 1})
    class Grouped:
        @ray.method(concurrency_group="io")
        async def io(self, number):
            started[number].open()
            while not gate.is_open():
                await asyncio.sleep(0.005)
            return "io"

        @ray.method(concurrency_group="compute")
        async def compute(self):
            return "compute"

        async def default(self):
            return "default"

    grouped = Grouped.remote()
    blocked = [grouped.io.remote(number) for number in range(2)]
    for one in started:
        one.wait()
    assert ray.get([grouped.compute.remote(), grouped.default.remote()]) == ["compute", "default"]
    assert ray.get(grouped.default.options(concurrency_group="compute").remote()) == "default"
    gate.open()
    assert ray.get(blocked) == ["io", "io"]


def test_an_async_actor_can_exit(cluster):
    @ray.remote
    class Quitter:
        async def quit(self):
            ray.actor.exit_actor()

    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(Quitter.remote().quit.remote())


def test_local_state_of_coroutines_is_not_mixed_up(cluster):
    @ray.remote
    class Contexts:
        def __init__(self):
            self.variable = contextvars.ContextVar("variable")

        async def remember(self, value):
            self.variable.set(value)
            await asyncio.sleep(0.01)
            return self.variable.get()

    contexts = Contexts.remote()
    assert ray.get([contexts.remember.remote(i) for i in range(10)]) == list(range(10))


def test_order_cannot_be_promised_by_an_async_actor(cluster):
    class Waits:
        async def wait(self):
            pass

    with pytest.raises(ValueError, match="allow_out_of_order_execution=False"):
        ray.remote(Waits).options(allow_out_of_order_execution=False).remote()
