"""`ray.util.state.why`: the real reason why a value is not there, down to the root."""

import os

import pytest

import ray
from tests.core.helpers import Gate, wait_until

pytestmark = pytest.mark.skate


@pytest.fixture
def why(cluster):
    from ray.util.state import why

    return why


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


@ray.remote
def wait_at(gate, *rest):
    gate.wait(50)
    return os.getpid()


@ray.remote
class Waiter:
    def __init__(self, gate=None):
        if gate is not None:
            gate.wait(50)

    def wait_at(self, gate):
        gate.wait(50)

    def process(self):
        return os.getpid()


def until(why, reference, *parts):
    """Wait until the explanation has all the parts."""
    return wait_until(lambda: all(part in why(reference) for part in parts) and why(reference), what=str(parts))


def test_a_value_that_is_there(why):
    assert "is there" in why(ray.put(1))


def test_a_value_that_is_an_exception_names_its_type(why):
    @ray.remote
    def fail():
        raise LookupError("nothing")

    reference = fail.remote()
    ray.wait([reference])
    assert "is there: an exception, RayTaskError(LookupError)" in why(reference)
    ray.cancel(cancelled := wait_at.options(resources={"unobtainium": 1}).remote(None))
    assert "TaskCancelledError" in until(why, cancelled, "is there")


def test_a_generator_is_explained_as_its_next_value(why, gate):
    @ray.remote
    def one(gate):
        gate.wait(50)
        yield 1

    stream = one.remote(gate)
    until(why, stream, "one", "it runs")
    gate.open()
    until(why, stream, "next value", "is there")
    assert ray.get(next(stream)) == 1
    until(why, stream, "has ended")
    with pytest.raises(TypeError, match="ObjectRefGenerator"):
        why(3)


def test_a_timeout_tells_the_reason_and_the_reference_once(why, gate):
    reference = wait_at.remote(gate)
    until(why, reference, "it runs")
    with pytest.raises(ray.exceptions.GetTimeoutError, match="it runs") as caught:
        ray.get(reference, timeout=0.01)
    assert str(caught.value).count(reference.hex()) == 1


def test_a_task_that_runs_names_its_process(why, gate):
    reference = wait_at.remote(gate)
    text = until(why, reference, "wait_at", "it runs")
    gate.open()
    assert f"pid={ray.get(reference)} " in text


def test_a_task_that_waits_for_cpus_names_who_has_them(why, gate):
    running = [wait_at.options(name="hog").remote(gate) for _ in range(4)]
    for each in running:
        until(why, each, "it runs")
    reference = wait_at.remote(gate)
    until(why, reference, "waits for a worker", "CPU: 1", "4 of 4 are in use", "hog")
    gate.open()
    ray.get([*running, reference])


def test_a_task_that_waits_for_an_argument_goes_on_to_that(why, gate):
    first = wait_at.options(name="first").remote(gate)
    second = wait_at.options(name="second").remote(gate, first)
    third = wait_at.options(name="third").remote(gate, second)
    text = until(why, third, "it runs")
    lines = text.splitlines()
    assert "third waits for 1 of its arguments" in lines[0]
    assert "second waits for 1 of its arguments" in lines[1]
    assert "first was given to worker" in lines[2]


def test_a_task_that_waits_itself_says_so(why, gate):
    inner = wait_at.remote(gate)

    @ray.remote
    def outer(references):
        return ray.get(references)

    until(why, outer.remote([inner]), "waits in ray.get()")


def test_a_task_that_no_node_can_run_says_what_exists(why):
    reference = wait_at.options(num_cpus=50).remote(None)
    until(why, reference, "CPU: 50", "this node has 4")
    ray.cancel(reference)


def test_a_call_waits_for_the_actor_to_start(why, gate):
    actor = Waiter.remote(gate)
    until(why, actor.process.remote(), "queue of its actor", "Waiter.__init__ runs in process")


def test_a_call_waits_for_the_resources_of_the_actor(why):
    actor = Waiter.options(resources={"unobtainium": 1}).remote()
    until(why, actor.process.remote(), "queue of its actor", "unobtainium")


def test_a_call_that_runs_and_one_behind_it(why, gate):
    actor = Waiter.remote()
    process = ray.get(actor.process.remote())
    first, second = actor.wait_at.remote(gate), actor.process.remote()
    until(why, first, "Waiter.wait_at was sent to its actor", "it runs", f"alive in process {process}")
    until(why, second, "1 earlier calls of this process are not done")


def test_a_call_waits_for_a_restart(why, gate, tmp_path):
    second_life = Gate(tmp_path)
    born = Gate(tmp_path)

    @ray.remote(max_restarts=1)
    class Restarted:
        def __init__(self):
            if born.is_open():
                second_life.wait(50)
            born.open()

        def die(self):
            os._exit(1)

        def method(self):
            return 1

    actor = Restarted.remote()
    ray.get(actor.method.remote())
    actor.die.remote()
    reference = wait_until(lambda: _call_to_next_life(actor, why))
    until(why, reference, "Restarted.__init__ runs in process", "(restart 1)")
    second_life.open()
    assert ray.get(reference) == 1


def _call_to_next_life(actor, why):
    reference = actor.method.remote()
    return reference if "queue of its actor" in why(reference) else None


def test_a_call_behind_one_that_waits_for_its_argument_names_both(why, gate):
    late = wait_at.options(name="late").remote(gate)
    actor = Waiter.remote()
    ray.get(actor.process.remote())
    actor.wait_at.options(name="early").remote(late)
    text = until(why, actor.process.remote(), "it runs")
    assert "behind an earlier call, early, which waits for its argument" in text.splitlines()[0]
    assert "late was given to worker" in text.splitlines()[1]


def test_what_belongs_to_a_worker_is_explained_by_it(why, gate):
    @ray.remote
    def start_many():
        return [wait_at.options(name="theirs").remote(gate) for _ in range(6)], os.getpid()

    references, owner = ray.get(start_many.remote())
    text = until(why, references[-1], "theirs waits for a worker", "4 of 4 are in use by theirs")
    assert f"its owner is a worker, process {owner}" in text
    gate.open()
    ray.get(references)


def test_a_borrowed_reference_names_its_owner(why, gate):
    reference = wait_at.remote(gate)

    @ray.remote
    def explain(references):
        from ray.util.state import why

        return why(references[0])

    text = ray.get(explain.remote([reference]))
    assert "wait_at was given to worker" in text
    assert f"its owner is the driver, process {os.getpid()}" in text


def test_a_timeout_says_what_is_missing(why, gate):
    reference = wait_at.options(name="late").remote(gate)
    until(why, reference, "it runs")
    with pytest.raises(ray.exceptions.GetTimeoutError, match="late was given to worker"):
        ray.get(reference, timeout=0.01)


def test_only_references_can_be_asked_about(why):
    with pytest.raises(TypeError, match="int"):
        why(1)


def test_a_type_of_accelerator_that_is_not_there_is_named_in_words(why):
    reference = wait_at.options(accelerator_type="V100").remote(None)
    text = until(why, reference, "an accelerator of type V100; this node has none")
    assert "0.001" not in text
    ray.cancel(reference)
