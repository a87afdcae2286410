"""What error messages say: the cause, the place, and what to do next, once each."""

import os
import re
import threading

import pytest

import ray
from tests.core.helpers import Gate, run_driver, wait_until

pytestmark = pytest.mark.skate


@ray.remote
def take(value):
    return 1


@ray.remote
class Counter:
    def __init__(self, start=0):
        self.value = start

    def increment(self):
        self.value += 1
        return self.value


class FailsToUnpickle:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return fail_to_unpickle, (self.error,)


def fail_to_unpickle(error):
    raise error


def test_an_argument_that_cannot_be_unpickled_is_named_as_the_reason(cluster):
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(take.remote(FailsToUnpickle(KeyError("in unpickling"))))
    text = str(caught.value)
    assert "one of its arguments could not be unpickled" in text
    assert "in fail_to_unpickle" in text
    assert "KeyError: 'in unpickling'" in text
    assert "a task that makes" not in text
    assert "importable" not in text


def test_an_argument_of_an_actor_that_cannot_be_unpickled_is_named_as_the_reason(cluster):
    actor = Counter.remote(FailsToUnpickle(KeyError("in unpickling")))
    with pytest.raises(ray.exceptions.ActorDiedError, match="arguments could not be unpickled"):
        ray.get(actor.increment.remote())


def test_a_failed_task_that_makes_an_argument_is_not_taken_for_that(cluster):
    with pytest.raises(KeyError, match="a task's own") as caught:
        ray.get(take.remote(ray.remote(fail_to_unpickle).remote(KeyError("a task's own"))))
    assert "unpickled" not in str(caught.value)


@pytest.mark.parametrize(("error", "hint"), [(ModuleNotFoundError("m"), True), (AttributeError("a"), False)])
def test_the_hint_about_modules_is_for_modules(cluster, error, hint):
    with pytest.raises(ray.exceptions.RaySystemError) as caught:
        ray.get(ray.put(FailsToUnpickle(error)))
    assert ("importable" in str(caught.value)) is hint


def test_the_death_of_an_owner_is_said_once(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    class Owner:
        def process_id(self):
            return os.getpid()

        def make(self):
            return [wait_for.remote(gate)]

    @ray.remote(num_cpus=0)
    def wait_for(gate):
        gate.wait()

    owner = Owner.remote()
    (reference,) = ray.get(owner.make.remote())
    ray.kill(owner)
    with pytest.raises(ray.exceptions.OwnerDiedError) as caught:
        ray.get(reference, timeout=20)
    gate.open()
    text = str(caught.value)
    assert text.count("Object ") == 1
    assert ".." not in text


def test_a_refused_call_names_the_method_and_the_limit(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote(max_pending_calls=2)
    class Slow:
        def wait(self, gate):
            gate.wait()

    slow = Slow.remote()
    with pytest.raises(
        ray.exceptions.PendingCallsLimitExceeded, match=r"Slow\.wait\(\).*max_pending_calls of Slow is 2"
    ):
        for _ in range(4):
            slow.wait.remote(gate)
    gate.open()


def test_the_class_that_derives_from_an_actor_class_is_named(cluster):
    with pytest.raises(TypeError, match=r"Derived cannot inherit from the actor class Counter"):

        class Derived(Counter):
            pass


def test_articles_fit_their_nouns(cluster):
    handle = Counter.remote()
    for attempt in (
        lambda: ray.get(handle),
        lambda: ray.wait(handle),
        lambda: ray.cancel(handle),
        lambda: ray.kill(ray.put(1)),
        lambda: ray.remote(5),
        lambda: take.options(num_cpus=[]),
        lambda: take.options(name=5),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            attempt()
        assert not re.search(r"\ba [AEIOUaeiou]", str(caught.value)), str(caught.value)


def test_a_handle_lists_its_methods(cluster):
    names = dir(Counter.remote())
    assert names == ["__ray_call__", "__ray_ready__", "__ray_terminate__", "increment"]


@pytest.mark.parametrize("name", ["force", "recursive"])
def test_cancel_names_the_argument_that_is_no_boolean(cluster, name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, not 'yes'"):
        ray.cancel(ray.put(1), **{name: "yes"})


def short(amount):
    return "a number of 5000 digits" if amount == 10**5000 else f"{amount:.0e}"


HUGE = [1e300, 2**70, 10**30, float("nan"), float("inf"), 10**5000]


@pytest.mark.parametrize("option", ["num_cpus", "num_gpus", "memory", "object_store_memory"])
@pytest.mark.parametrize(
    "amount", [*HUGE, 1 << 60], ids=lambda amount: f"{amount:.0e}"[:9] if amount != 10**5000 else ""
)
def test_amounts_beyond_all_machines_are_refused_by_name(option, amount):
    for options in (take.options, Counter.options):
        with pytest.raises(ValueError, match=option):
            options(**{option: amount})


@pytest.mark.parametrize("amount", HUGE, ids=short)
def test_resources_beyond_all_machines_are_refused_by_name(amount):
    with pytest.raises(ValueError, match=r"resources\['a'\]"):
        take.options(resources={"a": amount})


@pytest.mark.parametrize(
    "arguments",
    [
        *({"num_cpus": amount} for amount in HUGE),
        *({"num_gpus": amount} for amount in HUGE),
        *({"resources": {"a": amount}} for amount in HUGE),
        *({"object_store_memory": amount} for amount in (1e18, *HUGE)),
        {"_memory": 2**70},
        {"resources": {"": 1}},
        {"namespace": "\ud800"},
    ],
    ids=lambda arguments: str(*arguments),
)
def test_init_refuses_by_name(no_cluster, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        ray.init(**arguments)
    assert not ray.is_initialized()


@pytest.mark.parametrize("number", [100_001, 10**9, 2**63, 10**5000], ids=["100001", "1e9", "2**63", "1e5000"])
def test_the_number_of_results_has_a_limit(cluster, number):
    for options in (take.options, Counter.remote().increment.options):
        with pytest.raises(ValueError, match=r"num_returns.*100000"):
            options(num_returns=number)


@pytest.mark.parametrize("option", ["max_retries", "_generator_backpressure_num_objects"])
def test_counts_have_a_limit(option):
    with pytest.raises(ValueError, match=rf"{option}.*2147483647"):
        take.options(**{option: 2**40})


def test_a_resource_needs_a_name():
    with pytest.raises(ValueError, match=r"resources.*empty"):
        take.options(resources={"": 1})


def test_a_name_must_be_text(cluster):
    for attempt in (
        lambda: Counter.options(name="\ud800"),
        lambda: ray.get_actor("\ud800"),
        lambda: ray.get_actor("x", namespace="\ud800"),
        lambda: take.options(resources={"\ud800": 1}),
    ):
        with pytest.raises(ValueError, match="surrogate"):
            attempt()


def test_a_timeout_that_is_no_number_is_named(cluster):
    with pytest.raises(ValueError, match="not a number"):
        ray.get(ray.put(1), timeout=float("nan"))
    with pytest.raises(ValueError, match="timeout is more than"):
        ray.get(ray.put(1), timeout=10**400)
    assert ray.get(ray.put(1), timeout=float("inf")) == 1


def test_groups_are_not_changed_where_an_actor_is_made(cluster):
    with pytest.raises(ValueError, match="concurrency_groups"):
        Counter.options(concurrency_groups={"io": 1})


def test_a_thread_of_an_actor_has_a_task_id(cluster):
    @ray.remote
    class Threaded:
        def __init__(self):
            self.ask = threading.Event()
            self.thread = threading.Thread(target=self.look)
            self.thread.start()
            self.id = None

        def look(self):
            self.ask.wait()
            self.id = ray.get_runtime_context().get_task_id()

        def during(self):
            found = []
            thread = threading.Thread(target=lambda: found.append(ray.get_runtime_context().get_task_id()))
            thread.start()
            thread.join()
            return found[0] == ray.get_runtime_context().get_task_id()

        def let_it_ask(self):
            self.ask.set()

        def asked(self):
            return self.id

    threaded = Threaded.remote()
    assert ray.get(threaded.during.remote())
    ray.get(threaded.let_it_ask.remote())
    assert len(wait_until(lambda: ray.get(threaded.asked.remote()))) == 48


def test_shutdown_in_an_actor_is_not_its_business(cluster):
    @ray.remote
    class Careless:
        def shut_down(self):
            ray.shutdown()
            return ray.get(ray.put("still here"))

    assert ray.get(Careless.remote().shut_down.remote()) == "still here"


def test_a_line_that_two_workers_print_is_shown_twice(no_cluster):
    status, output, errors = run_driver("""
        import ray
        from helpers import wait_until

        @ray.remote
        class Speaker:
            def speak(self):
                print("the same line")

        ray.init(num_cpus=2)
        speakers = [Speaker.remote() for _ in range(2)]
        ray.get([speaker.speak.remote() for speaker in speakers])
        ray.shutdown()
    """)
    assert status == 0, errors
    assert len(re.findall(r"\(Speaker pid=\d+\) the same line\n", output + errors)) == 2
