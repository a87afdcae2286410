"""Actors: processes with state."""

import os

import pytest

import ray
from tests.core.helpers import Gate, Tally, is_alive, wait_until


@ray.remote
class Counter:
    def __init__(self, start=0, *, step=1):
        self.value = start
        self.step = step

    def increment(self):
        self.value += self.step
        return self.value

    def get(self):
        return self.value

    def process_id(self):
        return os.getpid()

    def fail(self):
        raise ValueError("on purpose")


def test_an_actor_keeps_its_state(cluster):
    counter = Counter.remote(5, step=2)
    assert ray.get([counter.increment.remote() for _ in range(3)]) == [7, 9, 11]


def test_calls_of_one_caller_run_in_order(cluster):
    @ray.remote
    class Recorder:
        def __init__(self):
            self.seen = []

        def record(self, number):
            self.seen.append(number)

        def all(self):
            return self.seen

    recorder = Recorder.remote()
    for number in range(500):
        recorder.record.remote(number)
    assert ray.get(recorder.all.remote()) == list(range(500))


def test_calls_run_in_order_although_the_argument_of_an_early_one_is_late(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()
        return "first"

    @ray.remote
    class Recorder:
        def __init__(self):
            self.seen = []

        def record(self, value):
            self.seen.append(value)
            return list(self.seen)

    recorder = Recorder.remote()
    recorder.record.remote(late.remote())
    last = recorder.record.remote("second")
    gate.open()
    assert ray.get(last) == ["first", "second"]


def test_each_actor_has_a_process_of_its_own(cluster):
    actors = [Counter.remote() for _ in range(3)]
    pids = ray.get([actor.process_id.remote() for actor in actors])
    assert len({*pids, os.getpid()}) == 4


def test_all_calls_of_an_actor_run_in_one_process(cluster):
    counter = Counter.remote()
    assert len(set(ray.get([counter.process_id.remote() for _ in range(20)]))) == 1


def test_references_are_arguments_of_constructors_and_methods(cluster):
    @ray.remote
    class Adder:
        def __init__(self, base):
            self.base = base

        def add(self, x, *, y=0):
            return self.base + x + y

    adder = Adder.remote(ray.put(1))
    assert ray.get(adder.add.remote(ray.put(2), y=ray.put(3))) == 6


def test_an_error_in_a_method_reaches_the_caller_and_the_actor_lives_on(cluster):
    counter = Counter.remote(1)
    with pytest.raises(ValueError, match="on purpose"):
        ray.get(counter.fail.remote())
    assert ray.get(counter.get.remote()) == 1


def test_a_constructor_that_fails_makes_every_call_fail_with_its_cause(cluster):
    @ray.remote
    class Broken:
        def __init__(self):
            raise RuntimeError("cannot be built")

        def ping(self):
            return 1

    broken = Broken.remote()
    for _ in range(2):
        with pytest.raises(ray.exceptions.ActorDiedError, match="cannot be built"):
            ray.get(broken.ping.remote())


def test_handles_can_be_passed_to_tasks(cluster):
    @ray.remote
    def increment(counter):
        return ray.get(counter.increment.remote())

    counter = Counter.remote()
    ray.get([increment.remote(counter) for _ in range(5)])
    assert ray.get(counter.get.remote()) == 5


def test_handles_can_be_passed_to_actors_and_stored_in_objects(cluster):
    @ray.remote
    class User:
        def __init__(self, counters):
            self.counters = counters

        def use(self):
            return ray.get([counter.increment.remote() for counter in self.counters])

    counter = Counter.remote()
    user = User.remote([counter])
    assert ray.get(user.use.remote()) == [1]
    (back,) = ray.get(ray.put([counter]))
    assert ray.get(back.increment.remote()) == 2


def test_an_actor_can_hand_out_a_handle_to_itself(cluster):
    @ray.remote
    class Self:
        def me(self):
            return ray.get_runtime_context().current_actor

        def ping(self):
            return "pong"

    first = Self.remote()
    assert ray.get(ray.get(first.me.remote()).ping.remote()) == "pong"


def test_an_actor_can_create_actors(cluster):
    @ray.remote
    class Parent:
        def __init__(self):
            self.child = Counter.remote(10)

        def use_child(self):
            return ray.get(self.child.increment.remote())

    assert ray.get(Parent.remote().use_child.remote()) == 11


def test_a_task_can_create_an_actor_and_return_it(cluster):
    @ray.remote
    def create():
        counter = Counter.remote(3)
        ray.get(counter.get.remote())
        return counter

    counter = ray.get(create.remote())
    assert ray.get(counter.increment.remote()) == 4


def test_an_actor_ends_when_its_last_handle_goes(cluster):
    counter = Counter.remote()
    pid = ray.get(counter.process_id.remote())
    del counter
    wait_until(lambda: not is_alive(pid), what="end of the actor")


def test_calls_made_before_the_last_handle_went_are_still_run(cluster):
    result = Counter.remote(4).increment.remote()
    assert ray.get(result) == 5


def test_an_actor_lives_while_an_object_holds_its_handle(cluster):
    counter = Counter.remote()
    pid = ray.get(counter.process_id.remote())
    holder = ray.put([counter])
    del counter
    (back,) = ray.get(holder)
    assert ray.get(back.process_id.remote()) == pid


def test_kill_ends_an_actor(cluster):
    counter = Counter.remote()
    pid = ray.get(counter.process_id.remote())
    ray.kill(counter)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(counter.get.remote())
    wait_until(lambda: not is_alive(pid), what="end of the actor")


def test_kill_fails_the_call_that_runs(cluster, tmp_path):
    started = Gate(tmp_path)

    @ray.remote
    class Sleeper:
        def sleep(self):
            started.open()
            Gate(tmp_path).wait()

    sleeper = Sleeper.remote()
    running, waiting = sleeper.sleep.remote(), sleeper.sleep.remote()
    started.wait()
    ray.kill(sleeper)
    for reference in (running, waiting):
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(reference)


def test_kill_of_something_else_is_refused(cluster):
    with pytest.raises((ValueError, TypeError), match=r"(?i)actor"):
        ray.kill("counter")


def test_exit_actor_ends_the_actor_from_inside(cluster):
    @ray.remote
    class Quitter:
        def quit(self):
            ray.actor.exit_actor()

        def process_id(self):
            return os.getpid()

    quitter = Quitter.remote()
    pid = ray.get(quitter.process_id.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(quitter.quit.remote())
    wait_until(lambda: not is_alive(pid), what="end of the actor")


def test_terminate_lets_earlier_calls_end(cluster):
    counter = Counter.remote()
    earlier = [counter.increment.remote() for _ in range(5)]
    counter.__ray_terminate__.remote()
    assert ray.get(earlier) == [1, 2, 3, 4, 5]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(counter.increment.remote())


def test_ready_waits_for_the_constructor(cluster):
    assert ray.get(Counter.remote().__ray_ready__.remote())


def test_ray_call_runs_a_function_on_the_actor(cluster):
    counter = Counter.remote(20)
    assert ray.get(counter.__ray_call__.remote(lambda self, x: self.value + x, 3)) == 23


def test_methods_with_several_results(cluster):
    @ray.remote
    class Pairs:
        @ray.method(num_returns=2)
        def pair(self):
            return 1, 2

        def triple(self):
            return 1, 2, 3

    pairs = Pairs.remote()
    assert ray.get(list(pairs.pair.remote())) == [1, 2]
    assert ray.get(list(pairs.triple.options(num_returns=3).remote())) == [1, 2, 3]


def test_inherited_and_overridden_methods(cluster):
    class Base:
        def __init__(self, x):
            self.x = x

        def inherited(self):
            return self.x

        def overridden(self):
            return "base"

    @ray.remote
    class Derived(Base):
        def __init__(self, x):
            super().__init__(x + 1)

        def overridden(self):
            return super().overridden() + " and derived"

    derived = Derived.remote(1)
    assert ray.get([derived.inherited.remote(), derived.overridden.remote()]) == [2, "base and derived"]


def test_static_and_class_methods(cluster):
    @ray.remote
    class Tools:
        name = "tools"

        @staticmethod
        def double(x):
            return 2 * x

        @classmethod
        def which(cls):
            return cls.name

    tools = Tools.remote()
    assert ray.get([tools.double.remote(4), tools.which.remote()]) == [8, "tools"]


def test_ray_remote_can_be_called_on_a_class(cluster):
    class Plain:
        def ping(self):
            return "pong"

    assert ray.get(ray.remote(Plain).remote().ping.remote()) == "pong"
    assert ray.get(ray.remote(num_cpus=1)(Plain).remote().ping.remote()) == "pong"
    assert Plain().ping() == "pong"


def test_methods_can_be_private_and_special(cluster):
    @ray.remote
    class Container:
        def _hidden(self):
            return "hidden"

        def __len__(self):
            return 3

    container = Container.remote()
    assert ray.get([container._hidden.remote(), container.__len__.remote()]) == ["hidden", 3]


def test_a_handle_shows_its_class_and_id(cluster):
    counter = Counter.remote()
    assert "Counter" in repr(counter)
    assert counter._actor_id.hex() in repr(counter)


def test_equal_handles_have_equal_hashes(cluster):
    counter = Counter.remote()
    (back,) = ray.get(ray.put([counter]))
    assert back == counter
    assert hash(back) == hash(counter)


def test_a_class_cannot_be_called_directly(cluster):
    with pytest.raises(TypeError, match=r"remote"):
        Counter()


def test_a_method_cannot_be_called_directly(cluster):
    counter = Counter.remote()
    with pytest.raises(TypeError, match=r"remote"):
        counter.get()


def test_a_missing_method_is_named(cluster):
    counter = Counter.remote()
    with pytest.raises(AttributeError, match="decrement"):
        counter.decrement.remote()


@pytest.mark.parametrize("arguments", [{"start": 1, "sstep": 2}, {"begin": 1}])
def test_wrong_arguments_of_a_constructor_fail_at_the_call(cluster, arguments):
    with pytest.raises(TypeError, match=r"sstep|begin"):
        Counter.remote(**arguments)


def test_wrong_arguments_of_a_method_fail_at_the_call(cluster):
    counter = Counter.remote()
    with pytest.raises(TypeError, match="argument"):
        counter.increment.remote(1)


def test_max_pending_calls_limits_the_queue(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote(max_pending_calls=3)
    class Slow:
        def wait(self):
            gate.wait()

    slow = Slow.remote()
    with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
        for _ in range(10):
            slow.wait.remote()
    gate.open()


def test_environment_variables_of_an_actor(cluster):
    @ray.remote(runtime_env={"env_vars": {"COLOUR": "red"}})
    class Painter:
        def colour(self):
            return os.environ["COLOUR"]

    assert ray.get(Painter.remote().colour.remote()) == "red"


def test_actor_options_override_the_decorator(cluster):
    @ray.remote(num_cpus=1)
    class Worker:
        def resources(self):
            return ray.get_runtime_context().get_assigned_resources()

    worker = Worker.options(num_cpus=2, resources={"special": 1}).remote()
    assert ray.get(worker.resources.remote()) == {"CPU": 2, "special": 1}


def test_an_actor_holds_its_resources_until_it_ends(cluster):
    holder = Counter.options(num_cpus=1, resources={"special": 2}).remote()
    ray.get(holder.get.remote())
    wait_until(lambda: ray.available_resources().get("special", 0) == 0, what="use of special")
    ray.kill(holder)
    wait_until(lambda: ray.available_resources().get("special", 0) == 2, what="return of special")


def test_more_actors_than_cpus_can_live_at_once(cluster):
    counters = [Counter.remote(number) for number in range(8)]
    assert ray.get([counter.get.remote() for counter in counters]) == list(range(8))


def test_generator_arguments_are_evaluated_by_the_caller(cluster):
    counter = Counter.remote(*(n for n in [3]))
    assert ray.get(counter.get.remote()) == 3


def test_calls_from_many_callers_all_arrive(cluster):
    @ray.remote
    def call(counter, times):
        ray.get([counter.increment.remote() for _ in range(times)])

    counter = Counter.remote()
    ray.get([call.remote(counter, 50) for _ in range(4)])
    assert ray.get(counter.get.remote()) == 200


def test_large_arguments_and_results_of_methods(cluster):
    @ray.remote
    class Echo:
        def echo(self, value):
            return value

    data = os.urandom(3_000_000)
    assert ray.get(Echo.remote().echo.remote(data)) == data


def test_the_destructor_runs_when_an_actor_ends_gracefully(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote
    class Leaver:
        def ping(self):
            return 1

        def __del__(self):
            tally.add()

        def __ray_shutdown__(self):
            tally.add()

    leaver = Leaver.remote()
    ray.get(leaver.ping.remote())
    leaver.__ray_terminate__.remote()
    wait_until(tally.count, what="a last word of the actor")


class Echo:
    def __init__(self, value=None):
        self.value = value

    def echo(self, value):
        return value

    def keep_own_handle(self):
        self.me = ray.get_runtime_context().current_actor
        return os.getpid()

    def call_own_handle(self):
        return self.me.echo.remote("from myself")


@pytest.mark.parametrize(
    "options", [{"max_concurrency": 2}, {"allow_out_of_order_execution": True}, {"concurrency_groups": {"io": 1}}]
)
def test_calls_may_overtake_those_that_wait_for_arguments(cluster, tmp_path, options):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()
        return "late"

    actor = ray.remote(**options)(Echo).remote()
    first = actor.echo.remote(late.remote())
    assert ray.get(actor.echo.remote("second"), timeout=20) == "second"
    gate.open()
    assert ray.get(first) == "late"


def test_calls_that_wait_for_arguments_beside_the_queue_fail_with_their_actor(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()

    actor = ray.remote(Echo).options(max_concurrency=2).remote()
    ray.get(actor.__ray_ready__.remote())
    waiting, cancelled = actor.echo.remote(late.remote()), actor.echo.remote(late.remote())
    ray.cancel(cancelled)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(cancelled, timeout=20)
    ray.kill(actor)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(waiting, timeout=20)
    gate.open()


def test_an_actor_whose_argument_failed_is_dead(cluster):
    @ray.remote
    def fail():
        raise KeyError("missing part")

    actor = ray.remote(Echo).remote(fail.remote())
    with pytest.raises(ray.exceptions.ActorDiedError, match="missing part"):
        ray.get(actor.echo.remote(1))


def test_an_actor_that_keeps_its_own_handle_ends_with_the_last_other_one(cluster):
    actor = ray.remote(Echo).remote()
    pid = ray.get(actor.keep_own_handle.remote())
    assert ray.get(ray.get(actor.call_own_handle.remote())) == "from myself"
    assert is_alive(pid)
    del actor
    wait_until(lambda: not is_alive(pid))


@ray.remote
class WithAttributes:
    LIMIT = 5

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def name(cls):
        return cls.__name__

    def limit(self):
        return type(self).LIMIT


def test_attributes_of_the_class_are_reached_through_what_the_decorator_makes(cluster):
    assert WithAttributes.LIMIT == 5
    assert WithAttributes.double(4) == 8
    assert WithAttributes.name() == "WithAttributes"
    assert WithAttributes.options(num_cpus=0).LIMIT == 5
    assert ray.get(WithAttributes.remote().limit.remote()) == 5
    with pytest.raises(AttributeError, match="absent"):
        WithAttributes.absent  # noqa: B018
    with pytest.raises(TypeError, match=r"limit.*remote"):
        WithAttributes.remote().limit()


def test_an_actor_class_still_travels(cluster):
    @ray.remote
    def use(cls):
        return cls.LIMIT, ray.get(cls.remote().limit.remote())

    assert ray.get(use.remote(WithAttributes)) == (5, 5)


def test_a_method_can_be_marked_without_options(cluster):
    @ray.remote
    class Marked:
        @ray.method
        def double(self, x):
            return 2 * x

        @ray.method(num_returns=2)
        def both(self, x):
            return x, self.double(x)

    marked = Marked.remote()
    assert ray.get(marked.double.remote(2)) == 4
    assert ray.get(marked.both.remote(2)) == [2, 4]
    with pytest.raises((TypeError, AssertionError)):
        ray.method(2)


def test_handles_have_a_type_for_annotations():
    assert ray.actor.ActorProxy[Counter]
