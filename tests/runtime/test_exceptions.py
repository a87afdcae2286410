"""What `ray.get` raises can be caught as Ray's error and as the user's, and says what happened."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

import ray
from ray import _core, exceptions
from ray._runtime import errors, serialization


class Awkward(Exception):
    """Cannot be unpickled: its constructor wants more than its args."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__("awkward")


class Locked(Exception):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class Final(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


def travel(error: BaseException) -> BaseException:
    stream, buffers = serialization.dump(errors.task_error(error, "f"))
    return serialization.load_error(_core.ERROR_TASK, stream, buffers, b"\0" * 28)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("k"), ZeroDivisionError(), SystemExit(3), StopIteration(5)]
)
def test_error_is_also_an_instance_of_what_was_raised(error: BaseException) -> None:
    arrived = travel(raised(error))
    assert isinstance(arrived, exceptions.RayTaskError)
    assert isinstance(arrived, type(error))
    assert type(arrived.cause) is type(error)
    assert f"RayTaskError({type(error).__name__})" in repr(arrived)
    assert "ray::f() (pid=" in str(arrived)
    again = pickle.loads(pickle.dumps(arrived))
    assert isinstance(again, type(error))
    assert str(again) == str(arrived)


def test_native_fields_of_the_cause_are_there() -> None:
    arrived: Any = travel(raised(FileNotFoundError(2, "gone", "/x")))
    assert (arrived.errno, arrived.filename) == (2, "/x")
    exit_error: Any = travel(raised(SystemExit(3)))
    assert exit_error.code == 3


def test_attributes_of_the_cause_are_there() -> None:
    error = ValueError("x")
    error.detail = 5  # type: ignore[attr-defined]
    arrived: Any = travel(raised(error))
    assert arrived.detail == 5
    with pytest.raises(AttributeError):
        _ = arrived.nothing


@pytest.mark.parametrize("error", [Awkward(1, 2), Locked()])
def test_exception_that_cannot_travel_arrives_as_text(error: Exception) -> None:
    arrived = travel(raised(error))
    assert isinstance(arrived, exceptions.RayTaskError)
    assert isinstance(arrived, exceptions.UnserializableException)
    assert type(error).__name__ in str(arrived)
    assert str(error) in str(arrived)


def test_class_that_cannot_be_combined_stays_a_task_error() -> None:
    arrived = travel(raised(Final("x")))
    assert type(arrived) is exceptions.RayTaskError
    assert isinstance(arrived.cause, Final)


def test_exception_and_ray_errors_need_no_second_class() -> None:
    assert type(travel(raised(Exception("x")))) is exceptions.RayTaskError
    cancelled = travel(raised(exceptions.TaskCancelledError()))
    assert isinstance(cancelled, exceptions.TaskCancelledError)


def test_error_of_an_error_names_the_first_cause() -> None:
    inner = travel(raised(ValueError("x")))
    outer = travel(raised(inner))
    assert isinstance(outer, ValueError)
    assert isinstance(outer.cause, ValueError)  # type: ignore[attr-defined]


def test_traceback_has_the_users_frames_only() -> None:
    def user_code() -> None:
        raise ValueError("x")

    try:
        user_code()
    except ValueError as error:
        text = errors.remote_traceback(error)
    assert "user_code" in text
    assert not text.startswith("Traceback")
    assert text.endswith("ValueError: x")


def test_chained_exceptions_are_shown() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        text = errors.remote_traceback(error)
    assert "KeyError: 'first'" in text
    assert "direct cause" in text


def test_codes_become_the_documented_classes() -> None:
    ref = bytes(range(28))
    cases = {
        _core.ERROR_WORKER_CRASHED: exceptions.WorkerCrashedError,
        _core.ERROR_ACTOR_DIED: exceptions.ActorDiedError,
        _core.ERROR_ACTOR_UNAVAILABLE: exceptions.ActorUnavailableError,
        _core.ERROR_CANCELLED: exceptions.TaskCancelledError,
        _core.ERROR_OWNER_DIED: exceptions.OwnerDiedError,
        _core.ERROR_OBJECT_LOST: exceptions.ObjectLostError,
        _core.ERROR_OUT_OF_MEMORY: exceptions.OutOfMemoryError,
        _core.ERROR_PENDING_CALLS: exceptions.PendingCallsLimitExceeded,
        _core.ERROR_INFEASIBLE: exceptions.TaskUnschedulableError,
        _core.ERROR_GROUP_REMOVED: exceptions.TaskPlacementGroupRemoved,
        _core.ERROR_ACTOR_UNSCHEDULABLE: exceptions.ActorUnschedulableError,
        _core.ERROR_OTHER: exceptions.RaySystemError,
    }
    for code, cls in cases.items():
        error = serialization.load_error(code, b"killed by signal 9", [], ref)
        assert type(error) is cls
        assert "killed by signal 9" in str(error)
    for code in cases:
        assert str(serialization.load_error(code, b"", [], ref)) or code in (
            _core.ERROR_OUT_OF_MEMORY, _core.ERROR_PENDING_CALLS, _core.ERROR_INFEASIBLE,
        )  # fmt: skip


def test_failed_init_is_an_actor_death_with_its_cause() -> None:
    stream, buffers = serialization.dump(errors.task_error(raised(ValueError("init")), "C.__init__"))
    error = serialization.load_error(_core.ERROR_ACTOR_DIED, stream, buffers, b"\0" * 28)
    assert isinstance(error, exceptions.ActorDiedError)
    assert error.actor_init_failed
    assert "ValueError: init" in str(error)
    assert pickle.loads(pickle.dumps(error)).actor_init_failed


def test_every_exception_pickles_and_prints() -> None:
    samples: dict[str, tuple[Any, ...]] = {
        "RayTaskError": ("f", "text", None),
        "RayActorError": (), "ActorDiedError": (), "ActorUnavailableError": ("x", b"\1" * 16), "RaySystemError": ("x",),
        "ObjectReconstructionFailedError": ("00",), "RpcError": ("x", 3), "CrossLanguageError": (),
    }  # fmt: skip
    for cls in exceptions.RAY_EXCEPTION_TYPES:
        args = samples.get(cls.__name__)
        if args is None:
            args = ("00ff", None, "") if issubclass(cls, exceptions.ObjectLostError) else ("text",)
            if issubclass(cls, exceptions.TaskCancelledError):
                args = ()
        error = cls(*args)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is cls
        assert str(again) == str(error)
        assert isinstance(exceptions.RayError.from_bytes(error.to_bytes()), cls)


def test_bases_that_programs_rely_on() -> None:
    assert issubclass(exceptions.GetTimeoutError, TimeoutError)
    assert issubclass(exceptions.ActorAlreadyExistsError, ValueError)
    assert issubclass(exceptions.ActorHandleNotFoundError, ValueError)
    assert issubclass(exceptions.ActorDiedError, exceptions.RayActorError)
    assert ray.exceptions is exceptions
