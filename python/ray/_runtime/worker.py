"""A worker's main loop: takes tasks from the core, runs user code, hands back results.

A worker starts as one thread that runs plain tasks. The first actor creation makes it an actor for the rest of its
life: then it goes on as it is (one call at a time), with more threads (`max_concurrency`, concurrency groups), or as
an asyncio loop (`ray._runtime.worker_async`).

Invariants: every task taken from the core is finished exactly once, by `finish`, `fail`, `fail_code` or
`finish_stream`, or the process leaves; only user code is ever interrupted by a cancellation, never the loop. Once
`ending` is set no user code is started, and the process leaves when what runs has ended. A fork of this process that
comes back from user code ends there, and touches nothing of the core.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import sys
import threading
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, NoReturn

from ray import _core
from ray._runtime import context, errors, forked, methods, output, special_methods, stacks
from ray._runtime import session as membership
from ray._runtime.calls import translated
from ray._runtime.ids import TaskID
from ray._runtime.options import DYNAMIC, STREAMING, UNIT
from ray._runtime.words import kind_of
from ray.actor import ActorExit
from ray.exceptions import ActorDiedError, AsyncioActorExit, TaskCancelledError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from types import FrameType

    from ray._core import Core, Task
    from ray._runtime.worker_threads import Lane

__all__ = ["Worker", "main", "prepare"]

TASK, ACTOR_CREATION, ACTOR_METHOD = 0, 1, 2

FUNCTIONS_MAX = 512  # functions kept unpickled; the one loaded first goes, and is loaded anew if it is called again

TELL_AGAIN_S = (
    0.01  # how long a thread that ends the process waits for the main one to notice, before it tells it again
)


class TaskInterrupt(KeyboardInterrupt):
    """Raised inside user code when its task is cancelled."""


class Leave(BaseException):
    """The process must end. Carries the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Loaded:
    """A function or class that was unpickled once."""

    __slots__ = ("calls", "cpus", "function", "group", "max_calls", "meta", "retry_exceptions")

    def __init__(self, function: Any, meta: dict[str, Any]) -> None:
        self.function = function
        self.meta = meta
        retry = meta.get("retry_exceptions", False)
        self.retry_exceptions = tuple(retry) if isinstance(retry, list | tuple) else retry
        self.max_calls = meta.get("max_calls", 0)
        self.cpus = cpus_of(meta)
        self.group = meta.get("group")  # with whether it captures what the task submits
        self.calls = 0


class Turn:
    """Where a thread's loop is, for when it is interrupted: nothing of it may be in local variables.

    Invariant: `over` says that `task` has ended, and that only the bookkeeping is left.
    """

    __slots__ = ("error", "over", "task")

    def __init__(self) -> None:
        self.task: Task | None = None
        self.over = False
        self.error: BaseException | None = None


class Worker:
    """State of this worker process. One per process."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.functions: dict[bytes, Loaded | BaseException] = {}
        # Tasks whose user code runs now, by thread. An entry is what a cancellation may interrupt.
        self.running: dict[int, bytes] = {}
        self._started: dict[int, bytes] = {}  # the last task whose user code was started, by thread
        self.main_thread = threading.get_ident()
        self.cpus = -1  # that the last task's class holds, in units
        self._thread_limit: str | None = None  # what this process has set OMP_NUM_THREADS to
        self.gpu_ids: list[int] | None = None
        self._devices = os.environ.get("CUDA_VISIBLE_DEVICES")  # what tasks without GPUs find
        # UUIDs of the visible devices, when they are named so: then ids are positions among them.
        visible = (self._devices or "").split(",")
        self._gpu_names = visible if not all(name.strip().isdigit() for name in visible if name) else []
        self.bound_methods: dict[str, Callable[..., Any]] = {}
        self.ending: Leave | None = None
        self._end_reason = ""
        self._quitters: set[bytes] = set()  # calls that asked for the end of their actor
        self._interrupt_came_early = False  # while no user code ran that it could have been for
        self._waits = False  # the main thread is about to wait for work, or waits
        self._heard = threading.Event()  # the main thread knows of the end
        self.loop: asyncio.AbstractEventLoop | None = None  # of an asynchronous actor
        self.notice_end: Callable[[], None] | None = None  # how such an actor's loop hears of the end
        self.defect: BaseException | None = None  # an exception of the engine's own, which ends this process
        self.is_fork = False
        os.register_at_fork(after_in_child=self._on_fork)
        self._env_known = False
        self.unanswered = False  # this process ends in the middle of a task
        # Exceptions that calls have named as retryable, by the hash of their pickle.
        self._chosen: dict[bytes, tuple[type[BaseException], ...]] = {}
        self.retires = False  # it ends when nobody needs what it owns
        self.creation: Task | None = None

    # --- loops ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until the core says that it is over. Returns the exit code."""
        try:
            self.serve()
            if self.creation is not None and context.actor is not None:
                self._become()
        except Leave as leave:
            return leave.code
        finally:
            self._heard.set()
        return 0 if self.ending is None else self.ending.code

    def serve(self, lane: Lane | None = None) -> None:
        """Takes and runs tasks until there are no more, or until this process has become an actor of a special kind.

        Whatever a signal handler of the user's raises, and wherever, no task is lost, and the loop goes on.

        Args:
            lane: What the calling thread belongs to in a threaded actor.
        """
        turn = Turn()
        while True:
            try:
                while True:  # the jump back is a place for signal handlers, too
                    try:
                        self._serve(lane, turn)
                        return
                    except Leave:
                        raise
                    except BaseException as error:
                        if error is self.defect:
                            raise
                        turn.error = error  # no more than this: what deals with it is interrupted in its turn
            except Leave:
                # A caller need not wait for other calls to end, which may be waiting for this one.
                if lane is not None and lane.ends() and turn.task is not None:
                    self.refuse(turn.task)
                if lane is None:
                    raise
                return
            except BaseException as error:
                if error is self.defect:
                    raise
                turn.error = error

    def _serve(self, lane: Lane | None, turn: Turn) -> None:
        thread = threading.get_ident()
        is_main = thread == self.main_thread
        next_task = self.core.next_task if lane is None else partial(self.core.next_task, lane.group)
        if turn.error is not None:
            if is_main:
                self._waits = False
            if turn.task is not None and self._started.get(thread) == turn.task.id:
                turn.over = True
                self.stray(turn.error, turn.task)
            else:
                self.stray(turn.error)  # a task that has not started gets its turn
            turn.error = None
        while True:
            if turn.over:
                if lane is not None:
                    lane.ends()
                if self.creation is not None and turn.task is self.creation and self._is_special(turn.task):
                    return
                turn.task = None  # nothing of it is kept while this thread waits for the next one
                turn.over = False
            if turn.task is None:
                if lane is not None:
                    lane.waits()
                if is_main:
                    # In this order: whoever sets `ending` looks at `_waits` afterwards.
                    self._waits = True
                    if self.ending is not None:
                        self._waits = False
                        return
                # A signal handler may run after any call, and what it raises would take the call's result along; after
                # a step of an iterator none runs before the result is stored.
                for turn.task in iter(next_task, None):
                    break
                if is_main:
                    self._waits = False
                if turn.task is None:
                    return
            if self.ending is None if lane is None else lane.starts():
                self.execute(turn.task)
            else:
                self.refuse(turn.task)
            turn.over = True

    def stray(self, error: BaseException, task: Task | None = None) -> None:
        """Deals with an exception that was raised while no user code of a task ran.

        It comes from a signal handler of the user's, which may have run at any point of the loop.

        Raises:
            BaseException: The exception itself, if it is the engine's own.
        """
        while True:
            try:
                self._deal_with(error, task)
                return
            except Leave:
                raise
            except BaseException as later:
                if later is self.defect:
                    raise
                error = later  # another signal came meanwhile

    def _deal_with(self, error: BaseException, task: Task | None) -> None:
        if self.is_fork:
            forked.end(error)
        if isinstance(error, SystemExit):
            self.end(exit_code(error), "sys.exit() was called")
            return
        if not errors.is_of_user(error):
            self.defect = error
            raise error
        errors.print_stray(error)
        if task is not None and not task.answered:
            self.failed(task, error, False)

    @staticmethod
    def _is_special(task: Task) -> bool:
        return task.is_async or task.max_concurrency > 1 or bool(task.concurrency_groups)

    def _become(self) -> None:
        task = self.creation
        assert task is not None
        if not self._is_special(task):
            return
        if task.is_async:
            from ray._runtime import worker_async

            worker_async.serve(self, task)
        else:
            from ray._runtime.worker_threads import Lanes

            Lanes(self, task.max_concurrency, task.concurrency_groups).run()

    # --- one task ------------------------------------------------------------------------------------------------

    def execute(self, task: Task) -> None:
        """Runs one task to its end in this thread."""
        kind = task.kind
        task.enter()
        token = context.task.set(task)
        try:
            if kind == ACTOR_METHOD:
                self._run_method(task)
            elif kind == TASK:
                self._run_task(task)
            else:
                self._create_actor(task)
        finally:
            context.task.reset(token)

    def _run_task(self, task: Task) -> None:
        if task.gpu_ids != self.gpu_ids:
            self.set_gpus(task.gpu_ids)
        loaded = self.load(task)
        if loaded is None:
            return
        if loaded.cpus != self.cpus:
            self.set_cpus(loaded.cpus)
        if loaded.group != membership.current_group:
            membership.set_group(loaded.group)
        arguments = self.arguments(task)
        if arguments is None:
            return
        self.call(task, loaded.function, arguments, loaded.retry_exceptions)
        if loaded.max_calls:
            loaded.calls += 1
            if loaded.calls >= loaded.max_calls:
                self.retires = True
                raise Leave(0)

    def _run_method(self, task: Task) -> None:
        arguments = self.arguments(task)
        if arguments is None:
            return
        name = task.method
        method = self.bound_methods.get(name)
        if method is None:
            method = self.bind(name)
        self.call(task, method, arguments, self.retries_of(task) if task.retry_exceptions else False)

    def call(self, task: Task, function: Callable[..., Any], arguments: Any, retry: Any) -> None:
        """Calls user code and sends what it returns or raises."""
        running, thread = self.running, threading.get_ident()
        args, kwargs = arguments
        try:
            running[thread] = self._started[thread] = task.id
            if self._interrupt_came_early and thread == self.main_thread:
                self._look_back(task)
            value = function(*args, **kwargs)
            if self.is_fork:
                forked.end()
            if task.num_returns != 1 or type(value) is GeneratorType:
                value = self.collect(task, value, retry)
            running.pop(thread, None)
            if self._quitters:
                self.check_quitter(task)
        except BaseException as error:
            running.pop(thread, None)
            self.failed(task, error, retry)
            return
        if value is _STREAMED:
            return
        try:
            task.finish(value)
        except Exception as error:  # not what num_returns promises, or it cannot be pickled
            self.failed(task, error, False)

    def collect(self, task: Task, value: Any, retry: Any) -> Any:
        """Turns what a generator yields into what the core takes."""
        wanted = task.num_returns
        if wanted == STREAMING:
            self._stream(task, value)
            return _STREAMED
        if wanted == DYNAMIC:
            return self._dynamic(task, value, retry)
        if not hasattr(value, "__next__"):
            return value
        if wanted == 0:
            for _ in value:  # called for what it does
                pass
        taken = list(itertools.islice(value, wanted))
        if wanted and len(taken) == wanted:
            self._expect_end(task, value)
        if self.is_fork:
            forked.end()
        if wanted != 1:
            return taken or None
        if not taken:
            message = f"{task.name} is declared with num_returns=1, but yielded nothing"
            raise ValueError(message)
        return taken[0]

    @staticmethod
    def _expect_end(task: Task, items: Iterator[Any]) -> None:
        """The values are there, so that what a generator does beyond them is reported, and is no failure; as in Ray."""
        what = f"{task.name} is declared with num_returns={task.num_returns}, and went on after so many values"
        try:
            next(items)
        except StopIteration:
            return
        except Exception as error:
            print(f"{what}, until it raised:\n{errors.remote_traceback(error)}", file=sys.stderr)
        else:
            print(
                f"{what}: what it yields beyond them is dropped. Leave num_returns out to get all of it as a stream.",
                file=sys.stderr,
            )

    def _stream(self, task: Task, value: Any) -> None:
        if not hasattr(value, "__iter__"):
            message = (
                f"{task.name} has num_returns='streaming' and must return something to iterate over, "
                f"not {kind_of(value)}"
            )
            raise TypeError(message)
        for item in value:
            if self.is_fork:
                forked.end()
            task.yield_item(item)
        if self.is_fork:
            forked.end()
        self.running.pop(threading.get_ident(), None)
        if self._quitters:
            self.check_quitter(task)
        task.finish_stream()

    def _dynamic(self, task: Task, value: Any, retry: Any) -> Any:
        """Sends the items, which are the caller's from then on; returns the list of their references."""
        from ray._runtime.generators import DynamicObjectRefGenerator

        if not hasattr(value, "__iter__"):
            message = (
                f"{task.name} has num_returns='dynamic' and must return something to iterate over, not {kind_of(value)}"
            )
            raise TypeError(message)
        count = 0
        try:
            for item in value:
                if self.is_fork:
                    forked.end()
                task.yield_item(item)
                count += 1
            if self.is_fork:
                forked.end()
        except Exception as error:
            if self.is_fork or self._is_retryable(task, error, retry) or self._quits(task, error):
                raise
            # What came before the exception counts; whoever reads on finds it in its place.
            task.yield_error(self.describe(task, translated(error)))
            count += 1
        return DynamicObjectRefGenerator([task.item(index) for index in range(1, count + 1)])

    @staticmethod
    def _is_retryable(task: Task, error: BaseException, retry: Any) -> bool:
        return task.retry_exceptions and (retry is True or (bool(retry) and isinstance(error, retry)))

    def failed(self, task: Task, error: BaseException, retry: Any) -> None:
        """Sends what user code raised; leaves the process when it asked for that."""
        if self.is_fork:
            forked.end(error)
        if isinstance(error, Leave) or task.answered:  # what comes after the answer is not of this task
            raise error
        if self._quits(task, error):
            self.end(0, EXIT_ACTOR)  # unless it was said before
            assert self.ending is not None
            raise self.ending
        if isinstance(error, SystemExit):
            self._exit(error)
        if isinstance(error, KeyboardInterrupt):
            if isinstance(error, TaskInterrupt) or self.core.cancelled(task.id):
                self.cancelled(task)
                return
            error, retry = _of_the_task(task, error), False
        retryable = self._is_retryable(task, error, retry)
        described = self.describe(task, translated(error))
        if task.num_returns == STREAMING and not retryable:
            end_stream(task, described)
        else:
            task.fail(described, retryable=retryable)

    def cancelled(self, task: Task, why: str = "") -> None:
        """Says that the task was cancelled while it ran."""
        if task.num_returns == STREAMING:
            end_stream(task, TaskCancelledError(TaskID(task.id), why or None))
        else:
            task.fail_code(_core.ERROR_CANCELLED, why)

    def describe(self, task: Task, error: BaseException) -> BaseException:
        """The error as its receiver sees it."""
        actor = context.actor
        if actor is None:
            return errors.task_error(error, task.name)
        return errors.task_error(error, task.name, actor=actor.instance, actor_id=actor.id.hex())

    # --- end of the process ----------------------------------------------------------------------------------------

    def end(self, code: int, reason: str) -> None:
        """Lets this process leave when what runs has ended; from now on nothing is started. Any thread may call it.

        Args:
            code: The exit code. 0 is an actor's intention: it is not started again.
            reason: For callers of an actor that ends on purpose.
        """
        if self.ending is None:
            self._end_reason = reason
            self.ending = Leave(code)
        if self.notice_end is not None:
            self.notice_end()
        elif threading.get_ident() != self.main_thread:
            # A signal that arrives just before a thread goes to sleep in native code does not keep it from sleeping:
            # so the main thread is told until it has heard.
            while self._waits and not self._heard.is_set():
                signal.pthread_kill(self.main_thread, signal.SIGINT)
                self._heard.wait(TELL_AGAIN_S)

    def exit_actor(self, reason: str) -> NoReturn:
        """Ends this actor and unwinds the call that wants it, or the thread, or the asyncio task.

        Raises:
            AsyncioActorExit: On the event loop, which a SystemExit would end at once.
            ActorExit: Elsewhere; where nothing catches it, it ends a thread silently.
        """
        task = context.task.get()
        if task is not None:
            self._quitters.add(task.id)
        if context.actor is not None and context.actor.instance is None:
            reason = f"{reason} in __init__"
        self.end(0, reason)
        if self.loop is not None and threading.get_ident() == self.main_thread:
            message = "exit_actor() was called: the actor ends when its running calls have ended"
            raise AsyncioActorExit(message)
        raise ActorExit(0)

    def _quits(self, task: Task, error: BaseException) -> bool:
        return isinstance(error, ActorExit | AsyncioActorExit) or task.id in self._quitters

    def check_quitter(self, task: Task) -> None:
        """Leaves when this call has asked for the end of its actor and caught what that raised."""
        if self.ending is not None and task.id in self._quitters:
            raise self.ending

    def refuse(self, task: Task) -> None:
        """Says that the task cannot run any more, since this actor ends on purpose.

        After a failure nothing is said: the node knows whether the actor is started again, and the caller, whether
        the call is repeated then.
        """
        actor = context.actor
        if actor is None or self.ending is None or self.ending.code != 0 or task.answered:
            return
        text = (
            f"actor {actor.methods.class_name} ({actor.id.hex()}, pid {os.getpid()}) has ended: {self._end_reason}. "
            "Calls that had not started by then are not run."
        )
        if task.num_returns == STREAMING:
            end_stream(task, ActorDiedError(text))
        else:
            task.fail_code(_core.ERROR_ACTOR_DIED, text)

    def announce(self) -> None:
        """Tells the node that the end of this process, which follows at once, is what the actor wants."""
        if context.actor is not None and self.ending is not None and self.ending.code == 0:
            self.core.actor_exit(self._end_reason)

    def _exit(self, error: SystemExit) -> NoReturn:
        self.unanswered = True
        self.end(exit_code(error), "the actor called sys.exit()")
        assert self.ending is not None
        raise self.ending

    def _on_fork(self) -> None:
        """In a child that user code forked."""
        self.is_fork = True
        if self.loop is not None:
            forked.end_at_next_turn(self.loop)

    # --- parts of a task -------------------------------------------------------------------------------------------

    def load(self, task: Task) -> Loaded | None:
        """The task's function; None after the task was failed because there is none."""
        loaded = self.functions.get(task.function_id)
        if loaded is None:
            if len(self.functions) >= FUNCTIONS_MAX:
                del self.functions[next(iter(self.functions))]
            loaded = self.functions[task.function_id] = self._load(task)
        if isinstance(loaded, BaseException):
            task.fail(loaded, retryable=False)
            return None
        return loaded

    def _load(self, task: Task) -> Loaded | BaseException:
        loaded = _load(task, self.set_cpus)
        if not self._env_known and isinstance(loaded, Loaded):
            # A worker serves one environment for its whole life: the first to come names it.
            self._env_known = True
            membership.worker_env = loaded.meta.get("runtime_env") or {}
        return loaded

    def arguments(self, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The call's arguments; None after the task was failed because one of them cannot be had."""
        try:
            return task.arguments()
        except KeyboardInterrupt:
            task.fail_code(_core.ERROR_CANCELLED, "")
        except BaseException as error:
            task.fail(errors.dependency_error(translated(error), task.name), retryable=False)
        return None

    def set_cpus(self, cpus: int) -> None:
        """Limits the threads of numerical libraries that are loaded from now on to the CPUs of the task's class.

        N workers on N cores would otherwise start a pool of N threads each. Libraries that are loaded already keep
        their pool. A number that the user has chosen, in the driver's environment, a `runtime_env` or a task, stays.
        """
        self.cpus = cpus
        if os.environ.get("OMP_NUM_THREADS") == self._thread_limit:
            self._thread_limit = os.environ["OMP_NUM_THREADS"] = str(max(1, cpus // UNIT))

    def set_gpus(self, gpu_ids: list[int]) -> None:
        """Makes the assigned devices, and no others, visible to what initialises CUDA from now on.

        A task without GPUs sees what this process found at its start, as in Ray, where the environment variable
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 hides all devices from it.
        """
        self.gpu_ids = gpu_ids
        names = self._gpu_names
        if gpu_ids or os.environ.get("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "").lower() in ("1", "true"):
            chosen = [names[gpu] if gpu < len(names) else str(gpu) for gpu in gpu_ids]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        elif self._devices is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = self._devices

    # --- actors ------------------------------------------------------------------------------------------------------

    def _create_actor(self, task: Task) -> None:
        self.set_gpus(task.gpu_ids)
        output.use_own_name()
        loaded = self.functions.get(task.function_id) or self._load(task)
        try:
            if isinstance(loaded, BaseException):
                raise loaded
            membership.set_group(loaded.group)
            cls = loaded.function
            described = methods.describe(cls, loaded.meta.get("options", {}))
            _set_title(f"ray::{cls.__name__}")
            context.actor = context.ActorInfo(task.actor, described, task.incarnation, task.gpu_ids, loaded.meta)
            try:
                args, kwargs = task.arguments()
            except Exception as error:
                self.core.actor_failed(errors.dependency_error(translated(error), f"{task.name}.__init__"))
                raise Leave(1) from None
            self.running[self.main_thread] = self._started[self.main_thread] = task.id
            instance = cls(*args, **kwargs)
            self.running.pop(self.main_thread, None)
        except BaseException as error:
            self.running.pop(self.main_thread, None)
            if self.is_fork:
                forked.end(error)
            self.check_quitter(task)
            if isinstance(error, Leave):
                raise
            if isinstance(error, SystemExit):
                self._exit(error)
            failure = self._creation_error(task, translated(error))
            print(f"{task.name} could not be created:\n{failure}", file=sys.stderr)  # perhaps nobody calls it
            self.core.actor_failed(failure)
            raise Leave(1) from None
        if self.is_fork:
            forked.end()
        self.check_quitter(task)
        context.actor.instance = instance
        plain: Any = object.__repr__
        if type(instance).__repr__ is not plain:
            label = errors.safe_repr(instance).split("\n")[0]
            with contextlib.suppress(Exception):  # the node may be gone; a prefix is no reason to fail
                membership.request("worker.label", label=label)
        self.creation = task
        task.forget_arguments()  # the creation is remembered as long as the actor lives
        self.core.actor_ready()

    @staticmethod
    def _creation_error(task: Task, error: BaseException) -> BaseException:
        from ray.exceptions import RayTaskError

        if isinstance(error, RayTaskError) and error.__traceback__ is None:  # the class could not be loaded
            return error
        return errors.task_error(error, f"{task.name}.__init__", actor_id=task.actor.hex())

    def bind(self, name: str) -> Callable[..., Any]:
        """A method of the actor, ready to be called."""
        actor = context.actor
        assert actor is not None, "a method came before the actor was created"
        special = special_methods.SPECIAL.get(name)
        method = getattr(actor.instance, name, None) if special is None else special.__get__(actor.instance)
        if method is None:
            method = special_methods.missing(actor.methods.class_name, name)
        self.bound_methods[name] = method
        return method

    def retries_of(self, task: Task) -> Any:
        """Which exceptions of a call count as retryable: True for all, or a tuple of classes."""
        blob = task.blob
        if blob is None:
            return True
        chosen = self._chosen.get(task.function_id)
        if chosen is None:
            if len(self._chosen) >= FUNCTIONS_MAX:
                self._chosen.clear()
            kinds = []
            for kind in pickle.loads(blob):
                with contextlib.suppress(Exception):  # a class that cannot be imported here is not raised here
                    kinds.append(pickle.loads(kind))
            chosen = self._chosen[task.function_id] = tuple(kinds)
        return chosen

    # --- cancellation ------------------------------------------------------------------------------------------------

    def on_interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        """SIGINT: the core has seen a cancellation of something that runs. Runs on the main thread.

        Or another thread wants the end of the process, and this one must not wait for work any longer.

        Only the main thread is interrupted. An exception sent into another thread might arrive after its call, where
        it would take the next one with it; threaded code asks `RuntimeContext.is_canceled()`.
        """
        if self.ending is not None and self._waits:
            self._waits = False
            self._heard.set()
            raise self.ending
        task_id = self.running.get(self.main_thread)
        if task_id is None:
            self._interrupt_came_early = True
        elif self.core.cancelled(task_id):
            del self.running[self.main_thread]  # once is enough
            raise TaskInterrupt

    def _look_back(self, task: Task) -> None:
        """A cancellation came while no user code ran: perhaps for this task, which was being prepared."""
        self._interrupt_came_early = False
        if self.core.cancelled(task.id):
            del self.running[self.main_thread]
            raise TaskInterrupt


_STREAMED: Any = object()


def _of_the_task(task: Task, error: KeyboardInterrupt) -> TaskCancelledError:
    """What an interrupt that nobody sent, but the task raised, is for its caller: where it was raised is told, too."""
    return TaskCancelledError(TaskID(task.id), "it raised KeyboardInterrupt").with_traceback(error.__traceback__)


EXIT_ACTOR = "the actor called exit_actor()"


def exit_code(error: SystemExit) -> int:
    """The process's exit code; what is no number is printed, as Python does."""
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1


def end_stream(task: Task, error: BaseException) -> None:
    """Ends a stream with an exception as its last item, as `ray.get` will raise it."""
    task.yield_error(error)
    task.finish_stream()


def cpus_of(meta: dict[str, Any]) -> int:
    """CPUs that a task, or an actor while it lives, holds, in units."""
    resources: dict[str, int] = meta.get("resources") or {}
    return resources.get("CPU", 0)


def _load(task: Task, set_cpus: Callable[[int], None]) -> Loaded | BaseException:
    """Unpickles the task's function, once the environment is as the libraries that it imports must find it."""
    blob = task.blob
    try:
        if blob is None:
            message = f"the code of {task.name} did not arrive with its first task"
            raise RuntimeError(message)
        function, meta = pickle.loads(blob)
        set_cpus(cpus_of(meta))
        return Loaded(pickle.loads(function), meta)
    except Exception as error:
        wrapped = RuntimeError(
            f"{task.name} could not be loaded in the worker: {type(error).__name__}: {error}. What it imports and "
            "refers to must be importable there."
        )
        wrapped.__cause__ = error
        return errors.task_error(wrapped, task.name)


def _set_title(title: str) -> None:
    """Names the main thread, as `top` shows it; 15 bytes is what the kernel keeps."""
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:
            file.write(title.encode()[:15])
    except OSError:
        return


# --- process ---------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Loads, in the zygote, what every worker would load: once, and shared by all. Starts no thread."""
    import ray._runtime.calls
    import ray._runtime.generators
    import ray.actor
    import ray.exceptions
    import ray.remote_function  # noqa: F401  (loaded for its own sake)
    from ray._runtime import serialization

    stacks.prepare()
    # The pickler class is made at its first use, and used by every worker.
    serialization.load(serialization.dump(prepare)[0], [])


def main(*, address: str, session: bytes, token: bytes, node: int, proc: int) -> None:
    """Runs this process as a worker until it is told to leave. Functions registered with `atexit` have run then.

    Args:
        address: Path of the node's socket.
        session: The session's 16 bytes.
        token: The cluster's token, 32 bytes.
        node: The node's key.
        proc: This process's key.

    Raises:
        SystemExit: With the exit code, when that is not 0.
    """
    import atexit

    output.install()
    if "RAY_WORKER_LOGGING_CONFIG" in os.environ:
        from ray._runtime import logging_config

        logging_config.apply_inherited()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until there is a worker to ask
    try:
        core = _core.Core(
            address=address,
            session=session,
            token=token,
            node=node,
            proc=proc,
            role=_core.ROLE_WORKER,
            hooks=membership.hooks(),
            task_oom_retries=membership.task_oom_retries(),
        )
        membership.attach(core, membership.WORKER_MODE)
        worker = context.worker = Worker(core)
        signal.signal(signal.SIGINT, worker.on_interrupt)
        code = worker.run()
        worker.announce()
        core.leave(answered=not worker.unanswered)
        if worker.retires:
            core.linger()
    except BaseException:
        report_internal_error()
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _farewell()
        atexit._run_exitfuncs()
    except BaseException:
        report_internal_error()
    finally:
        left = membership.detach()
        if left is not None:
            left.close()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    if code:
        raise SystemExit(code)


def _farewell() -> None:
    """Lets the actor clean up, if its class wants to."""
    actor = context.actor
    hook = None if actor is None else getattr(actor.instance, "__ray_shutdown__", None)
    if hook is not None:
        hook()


def report_internal_error() -> None:
    import traceback

    print(f"worker {os.getpid()} failed outside of user code; this is a defect of the engine:", file=sys.stderr)
    traceback.print_exc()
