"""Errors: those of user code, and those about wrong use of the API."""

import builtins
import os
import sys
import threading

import pytest

import ray
from tests.core.helpers import Gate, Tally


class OwnError(Exception):
    """Defined by the user, with more state than a message."""

    def __init__(self, code, *, detail="none"):
        super().__init__(f"code {code}")
        self.code = code
        self.detail = detail

    def __reduce__(self):
        return _make_own_error, (self.code, self.detail)


def _make_own_error(code, detail):
    return OwnError(code, detail=detail)


@ray.remote
def fail(error):
    raise error


@ray.remote
def identity(value):
    return value


@pytest.mark.parametrize("error", [ValueError("v"), KeyError("k"), OSError(2, "o"), StopIteration(), AssertionError()])
def test_an_error_arrives_as_its_own_type(cluster, error):
    with pytest.raises(type(error)):
        ray.get(fail.remote(error))


def test_an_error_is_also_a_task_error(cluster):
    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(fail.remote(ValueError("both")))
    with pytest.raises(ray.exceptions.RayError):
        ray.get(fail.remote(ValueError("both")))


@ray.remote
class Raiser:
    def plainly(self, kind):
        raise kind("of the user")

    def items(self, kind):
        yield 1
        raise kind("of the user")


@ray.remote
class AsyncRaiser:
    async def plainly(self, kind):
        raise kind("of the user")

    async def items(self, kind):
        yield 1
        raise kind("of the user")


def raise_in_task(kind):
    return fail.remote(kind("of the user"))


def raise_in_dynamic_generator(kind):
    @ray.remote(num_returns="dynamic")
    def items():
        yield 1
        raise kind("of the user")

    return list(ray.get(items.remote()))[-1]


RAISERS = {
    "task": raise_in_task,
    "dynamic generator": raise_in_dynamic_generator,
    "method": lambda kind: Raiser.remote().plainly.remote(kind),
    "generator": lambda kind: list(Raiser.remote().items.options(num_returns="streaming").remote(kind))[-1],
    "async method": lambda kind: AsyncRaiser.remote().plainly.remote(kind),
    "async generator": lambda kind: list(AsyncRaiser.remote().items.options(num_returns="streaming").remote(kind))[-1],
}


@pytest.mark.parametrize("where", RAISERS)
@pytest.mark.parametrize("kind", [ConnectionError, MemoryError])
def test_a_builtin_error_of_user_code_is_not_taken_for_one_of_the_engine(cluster, kind, where):
    with pytest.raises(kind, match="of the user") as caught:
        ray.get(RAISERS[where](kind))
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert type(caught.value.cause) is kind
    assert "test_errors.py" in str(caught.value)


def test_the_cause_is_the_original_error(cluster):
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fail.remote(OwnError(5, detail="kept")))
    assert isinstance(caught.value.cause, OwnError)
    assert (caught.value.cause.code, caught.value.cause.detail) == (5, "kept")


def test_own_errors_can_be_caught_by_their_type(cluster):
    with pytest.raises(OwnError, match="code 6"):
        ray.get(fail.remote(OwnError(6)))


def test_the_message_contains_the_remote_traceback(cluster):
    @ray.remote
    def outer_function():
        def inner_function():
            raise ValueError("deep inside")

        inner_function()

    with pytest.raises(ValueError, match="deep inside") as caught:
        ray.get(outer_function.remote())
    for part in ("outer_function", "inner_function", "deep inside", "test_errors.py"):
        assert part in str(caught.value)


def test_the_message_says_where_it_happened(cluster):
    @ray.remote
    def where():
        raise ValueError(os.getpid())

    with pytest.raises(ValueError, match=r"pid=\d+"):
        ray.get(where.remote())


def test_an_error_that_cannot_be_pickled_arrives_as_text(cluster):
    @ray.remote
    def unpicklable():
        error = RuntimeError("holds a lock")
        error.lock = threading.Lock()
        raise error

    with pytest.raises(ray.exceptions.RayTaskError, match="holds a lock"):
        ray.get(unpicklable.remote())


@pytest.mark.skate  # on Ray there is no cause
def test_an_error_that_cannot_be_pickled_has_a_cause_that_says_why(cluster):
    @ray.remote
    def unpicklable():
        error = RuntimeError("holds a lock")
        error.lock = threading.Lock()
        raise error

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(unpicklable.remote())
    assert isinstance(caught.value.cause, ray.exceptions.RayError)
    assert "lock" in caught.value.cause.reason
    assert "cannot pickle" in str(caught.value)


class TwoArguments(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def raise_two_arguments():
    raise TwoArguments(1, 2)


def test_an_error_that_cannot_be_restored_arrives_as_text(cluster):
    with pytest.raises(ray.exceptions.UnserializableException, match="1 and 2") as caught:
        ray.get(ray.remote(raise_two_arguments).remote())
    assert "in raise_two_arguments" in str(caught.value)


@pytest.mark.skate
def test_an_error_that_cannot_be_restored_is_a_task_error_too(cluster):
    reference = ray.remote(raise_two_arguments).remote()
    with pytest.raises(ray.exceptions.RayTaskError, match="missing 1 required positional argument"):
        ray.get(reference)
    with pytest.raises(ray.exceptions.UnserializableException, match="1 and 2"):
        ray.get(identity.remote(reference))


def test_a_task_error_that_user_code_makes_is_also_its_cause(cluster):
    @ray.remote
    def raise_made():
        raise ray.exceptions.RayTaskError("f", "the traceback", ValueError("v"))

    with pytest.raises(ValueError, match="the traceback") as caught:
        ray.get(raise_made.remote())
    assert isinstance(caught.value, ray.exceptions.RayTaskError)


def test_an_error_of_an_argument_passes_through_dependent_tasks(cluster):
    reference = fail.remote(ValueError("at the root"))
    for _ in range(3):
        reference = identity.remote(reference)
    with pytest.raises(ValueError, match="at the root"):
        ray.get(reference)


def test_an_error_in_a_nested_task_passes_through_its_parent(cluster):
    @ray.remote
    def parent():
        return ray.get(fail.remote(OwnError(9)))

    with pytest.raises(OwnError, match="code 9"):
        ray.get(parent.remote())


def test_a_parent_can_catch_the_error_of_its_child(cluster):
    @ray.remote
    def parent():
        try:
            ray.get(fail.remote(ValueError("caught")))
        except ValueError as error:
            return "caught" in str(error)

    assert ray.get(parent.remote())


def test_get_of_several_raises_the_first_failure(cluster):
    good, bad = identity.remote(1), fail.remote(ValueError("bad one"))
    with pytest.raises(ValueError, match="bad one"):
        ray.get([good, bad])
    assert ray.get(good) == 1


def test_an_error_can_be_got_twice(cluster):
    reference = fail.remote(ValueError("again"))
    for _ in range(2):
        with pytest.raises(ValueError, match="again"):
            ray.get(reference)


def test_an_error_as_a_value_is_not_raised(cluster):
    result = ray.get(identity.remote(ValueError("just a value")))
    assert isinstance(result, ValueError)


def test_chained_errors_keep_their_cause(cluster):
    @ray.remote
    def chained():
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as error:
            raise ValueError("consequence") from error

    with pytest.raises(ValueError, match="consequence") as caught:
        ray.get(chained.remote())
    assert "division by zero" in str(caught.value)


def test_unlimited_recursion_in_a_task_is_an_error(cluster):
    @ray.remote
    def recurse():
        def down():
            return down() + 1

        return down()

    with pytest.raises(RecursionError):
        ray.get(recurse.remote())
    assert ray.get(identity.remote(1)) == 1


def test_a_keyboard_interrupt_raised_in_a_task_does_not_end_the_driver(cluster):
    with pytest.raises(Exception):  # noqa: B017, PT011
        ray.get(fail.options(max_retries=0).remote(KeyboardInterrupt()))
    assert ray.get(identity.remote(1)) == 1


def test_a_keyboard_interrupt_of_a_task_is_shown_with_its_place(cluster):
    with pytest.raises(ray.exceptions.TaskCancelledError) as caught:
        ray.get(fail.remote(KeyboardInterrupt()), timeout=20)
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert "test_errors.py" in str(caught.value)
    assert "in fail" in str(caught.value)


def test_exit_in_a_task_is_an_error_of_that_task_only(cluster):
    @ray.remote(max_retries=0)
    def leave():
        sys.exit(1)

    with pytest.raises(ray.exceptions.RayError):
        ray.get(leave.remote())
    assert ray.get(identity.remote(1)) == 1


def test_a_remote_function_cannot_be_called_directly(cluster):
    with pytest.raises(TypeError, match=r"identity.*remote"):
        identity(1)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2), {}), ((1,), {"value": 2}), ((), {"other": 1})], ids=str
)
def test_wrong_arguments_fail_at_the_call(cluster, args, kwargs):
    with pytest.raises(TypeError, match=r"argument"):
        identity.remote(*args, **kwargs)


@pytest.mark.parametrize("wrong", [3, "text", None, [1]])
def test_only_functions_and_classes_can_be_remote(cluster, wrong):
    with pytest.raises((TypeError, AssertionError), match=r"(?i)function|class|remote"):
        ray.remote(wrong)


def test_ray_remote_takes_no_positional_options(cluster):
    with pytest.raises((TypeError, AssertionError), match="remote"):
        ray.remote(lambda: None, 2)


def test_cancel_refuses_what_is_not_a_reference(cluster):
    with pytest.raises((TypeError, ValueError), match=r"(?i)objectref|ref"):
        ray.cancel("text")


def test_exception_types_form_one_tree():
    tree = ray.exceptions
    for name in (
        "RayTaskError",
        "RayActorError",
        "ActorDiedError",
        "ActorUnavailableError",
        "WorkerCrashedError",
        "GetTimeoutError",
        "TaskCancelledError",
        "ObjectLostError",
        "OwnerDiedError",
        "ObjectStoreFullError",
        "ObjectReconstructionFailedError",
        "NodeDiedError",
        "OutOfMemoryError",
        "RuntimeEnvSetupError",
        "PendingCallsLimitExceeded",
        "TaskUnschedulableError",
        "ActorUnschedulableError",
        "RaySystemError",
    ):
        assert issubclass(getattr(tree, name), tree.RayError), name
    assert issubclass(tree.GetTimeoutError, builtins.TimeoutError)
    assert issubclass(tree.ActorDiedError, tree.RayActorError)
    assert issubclass(tree.OwnerDiedError, tree.ObjectLostError)


def test_a_group_of_errors_can_be_taken_apart(cluster):
    @ray.remote
    def fail():
        raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])

    caught = []
    try:
        ray.get(fail.remote())
    except* ValueError as group:
        caught += [str(error) for error in group.exceptions]
    except* KeyError as group:
        caught += [type(error) for error in group.exceptions]
    assert caught == ["one", KeyError]
    with pytest.raises(ray.exceptions.RayTaskError) as error:
        ray.get(fail.remote())
    assert isinstance(error.value, ExceptionGroup)


def test_the_first_error_ends_the_wait_for_all(cluster, tmp_path):
    never = Gate(tmp_path)

    @ray.remote
    def hang():
        never.wait()

    @ray.remote
    def fail_late(_):
        raise KeyError("late")

    hanging = hang.remote()
    try:
        with pytest.raises(ValueError, match="early"):
            ray.get([hanging, fail.remote(ValueError("early"))])
        with pytest.raises(ValueError, match="early"):  # it is there already
            failed = fail.remote(ValueError("early"))
            ray.wait([failed])
            ray.get([hanging, failed])
        with pytest.raises(KeyError):  # with all of them there, the first in the list
            both = [fail_late.remote(1), fail.remote(ValueError("early"))]
            ray.wait(both, num_returns=2)
            ray.get(both)
    finally:
        never.open()


class Heavy(Exception):
    def __init__(self, size):
        super().__init__("heavy")
        self.load = bytes(size)

    def __reduce__(self):
        return Heavy, (len(self.load),), {"load": self.load}


@pytest.mark.skate  # the original sends exceptions of any size
def test_an_exception_larger_than_a_message_arrives_as_its_text_and_harms_no_worker(cluster, tmp_path):
    tally = Tally(tmp_path)

    @ray.remote
    def fail_with(make):
        tally.add(str(os.getpid()))
        raise make()

    for make in (lambda: Heavy(80 << 20), lambda: ValueError("y" * (70 << 20))):
        with pytest.raises(ray.exceptions.UnserializableException, match="MiB when pickled") as caught:
            ray.get(fail_with.remote(make))
        assert len(str(caught.value)) < 4 << 20
    assert tally.count() == 2, "no worker died, and nothing was repeated"

    @ray.remote
    class Actor:
        def fail(self):
            raise Heavy(80 << 20)

        def live(self):
            return True

    actor = Actor.remote()
    with pytest.raises(ray.exceptions.UnserializableException, match="heavy"):
        ray.get(actor.fail.remote())
    assert ray.get(actor.live.remote())
