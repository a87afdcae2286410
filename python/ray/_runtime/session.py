"""This process's membership in a cluster.

`core` is the one global of the package: None outside of a cluster. Drivers set it by `ray.init`, workers by their main.
What was bound to a core (templates of remote functions, bridges to event loops) is registered here, and let go of when
the core is closed, so that the hot paths need not ask whether the core is still the same.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ray._core import Core
    from ray.util.placement_group import PlacementGroup

__all__ = ["attach", "core", "detach", "ensure", "on_close", "request", "set_group"]

SCRIPT_MODE = 0
WORKER_MODE = 1

core: Core | None = None
mode: int = SCRIPT_MODE
job_number: int = 1
namespace: str = ""
session_name: str = ""
temp_dir: str = ""
node_ip_address: str = "127.0.0.1"
runtime_env: dict[str, Any] = {}  # the job's
worker_env: dict[str, Any] = {}  # in a worker, what its tasks or its actor asked for on top of the job's
current_group: tuple[PlacementGroup, bool] | None = None  # of what runs in this worker, and whether it captures
default_actor_lifetime: str = "non_detached"
context: Any = None  # what `ray.init` returned

closing = False  # `shutdown` has begun, and the core is not detached yet
exiting = False  # the interpreter is past the end of the program

forked_from = 0  # in a forked child: the process that was in a cluster

lock = threading.RLock()  # guards the transition between inside and outside; never held while user code runs


def task_oom_retries() -> int:
    """How often a task is repeated that a node has ended for want of memory, apart from its `max_retries`.

    As in Ray the variable `RAY_task_oom_retries` says so; -1, the default, is no limit. Workers inherit the driver's.

    Raises:
        ValueError: If it is not a whole number.
    """
    text = os.environ.get("RAY_task_oom_retries", "-1")  # noqa: SIM112  (Ray's name)
    try:
        return max(min(int(text), 2**31 - 1), -1)
    except ValueError:
        msg = f"RAY_task_oom_retries={text!r} must be a whole number; -1 is no limit"
        raise ValueError(msg) from None


class Bound(Protocol):
    """Something that holds on to a core."""

    def unbind(self) -> None:
        """Forgets the core. Called with `core` already None; must not raise."""


_bound: weakref.WeakSet[Any] = weakref.WeakSet()


def on_close(bound: Bound) -> None:
    """Asks for `bound.unbind()` when this core is closed, if `bound` still lives then."""
    _bound.add(bound)


def set_group(group: tuple[PlacementGroup, bool] | None) -> None:
    """In a worker: the placement group of what runs from now on, and whether that captures what it submits."""
    global current_group
    captured = [known is not None and known[1] and known[0] for known in (current_group, group)]
    current_group = group
    if captured[0] != captured[1]:
        # Remote functions that were called before have been bound to where their calls ran.
        for each in [each for each in _bound if getattr(each, "is_placed", False)]:
            _bound.discard(each)
            each.unbind()


def ensure() -> Core:
    """The core, after starting a local cluster if this process is in none."""
    found = core
    if found is not None:
        return found
    _refuse_forked()
    from ray._runtime import local

    with lock:
        if core is None:
            local.init()
        assert core is not None
        return core


def require() -> Core:
    """The core.

    Raises:
        RaySystemError: If this process is in no cluster.
    """
    if core is None:
        from ray.exceptions import RaySystemError

        _refuse_forked()
        message = "Ray has not been started in this process. Call ray.init() first."
        raise RaySystemError(message)
    return core


def _refuse_forked() -> None:
    if forked_from:
        from ray.exceptions import RaySystemError

        message = (
            f"This process was forked from process {forked_from}, which is in a cluster; a fork is not part of it and "
            "cannot use its references and handles. Use tasks or actors instead of forks, hand values over as they "
            "are, or call ray.init() here for a cluster of this process's own."
        )
        raise RaySystemError(message)


def attach(new: Core, new_mode: int) -> None:
    """Makes `new` this process's core."""
    global core, mode, forked_from
    assert core is None, "a process is in one cluster at a time"
    core, mode, forked_from = new, new_mode, 0
    _watch_forks()


_forks_watched = False
_of_parent: list[Any] = []  # kept for ever, so that nothing of the parent's is torn down here


def _watch_forks() -> None:
    global _forks_watched
    if not _forks_watched:
        os.register_at_fork(after_in_child=_leave_to_parent)
        _forks_watched = True


def _leave_to_parent() -> None:
    """In a forked child of the user's program: the cluster stays the parent's, and this process is in none."""
    global core, context, mode, forked_from, lock, worker_env, current_group
    lock = threading.RLock()  # another thread of the parent may have held it
    if core is None:
        return
    _of_parent.append((core, context))
    core.abandon()
    core, context, mode, worker_env, current_group = None, None, SCRIPT_MODE, {}, None
    forked_from = os.getppid()
    for each in list(_bound):
        if not getattr(each, "lost_by_forks", False):
            each.unbind()
    _bound.clear()


def detach() -> Core | None:
    """Forgets the core and unbinds everything from it. Returns it, for closing; None if there was none."""
    global core, context, namespace, session_name, runtime_env, default_actor_lifetime, mode, closing
    with lock:
        old, core, closing = core, None, False
        context, namespace, session_name, runtime_env = None, "", "", {}
        default_actor_lifetime, mode = "non_detached", SCRIPT_MODE
        bound = list(_bound)
        _bound.clear()
    for each in bound:
        each.unbind()
    return old


def request(op: str, timeout_s: float | None = 30.0, **arguments: Any) -> Any:
    """Asks the node something that is not on any hot path.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: As the node answered.
        TimeoutError: If it did not.
    """
    from ray._core import CoreClosed

    try:
        return ask(ensure(), op, timeout_s, arguments)
    except CoreClosed as error:
        raise gone(error) from None


def ask(through: Core, op: str, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
    """Asks the cluster of a core something.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: As the node answered.
        TimeoutError: If it did not.
        CoreClosed: If its node cannot be reached any more.
    """
    import msgspec

    body = msgspec.msgpack.encode(arguments) if arguments else b""
    try:
        reply = through.request(op, body, timeout_s)
    except RuntimeError as error:
        raise _refusal(error) from None
    return msgspec.msgpack.decode(reply) if reply else None


_REFUSALS: dict[str, type[Exception]] = {"ValueError": ValueError, "KeyError": KeyError, "TypeError": TypeError,
                                         "NotImplementedError": NotImplementedError}  # fmt: skip


def _refusal(error: RuntimeError) -> Exception:
    if len(error.args) == 2:
        name, message = error.args
        return _REFUSALS.get(name, RuntimeError)(message)
    return error


def gone(error: ConnectionError) -> BaseException:
    """Ray's exception for what the core says when its node cannot be reached any more.

    When the interpreter exits, daemon threads end without a word wherever they are, and so do those that wait here.
    """
    from ray.exceptions import LocalRayletDiedError, RaySystemError

    if exiting and threading.current_thread().daemon:
        return SystemExit()
    if core is None or closing:
        return RaySystemError("ray.shutdown() was called meanwhile")
    from ray._runtime import local

    what = str(error).removeprefix("the cluster is gone: ")
    log = ""
    if "the peer closed" in what or "the connection broke" in what:  # the end of the process says more
        how, log = local.describe_node_end()
        what = f"the node's manager process has ended: {how}" if how else what
    return LocalRayletDiedError(
        f"This cluster is gone, with every task, actor and object in it: {what}. Call ray.shutdown() and ray.init() to "
        f"go on with a new cluster; values have to be made again. {log}".rstrip()
    )


def hooks() -> Any:
    """The callbacks that every core needs."""
    from ray import _core
    from ray._runtime import serialization

    return _core.Hooks(dump=serialization.dump, load=serialization.load, load_error=serialization.load_error)


def apply_job(job: dict[str, Any]) -> None:
    """Takes over what the driver decided for the whole job."""
    global job_number, namespace, session_name, temp_dir, node_ip_address, runtime_env, default_actor_lifetime
    namespace = job.get("namespace", "")
    session_name = job.get("session_name", "")
    temp_dir = job.get("temp_dir", "")
    node_ip_address = job.get("node_ip_address", "127.0.0.1")
    runtime_env = job.get("runtime_env") or {}
    default_actor_lifetime = job.get("default_actor_lifetime", "non_detached")
    job_number = job.get("job_number", 1)


def publish_job(job: dict[str, Any], **here: Any) -> None:
    """In a driver, tells the cluster what it decided for the whole job; `here` is what holds on this node only."""
    number = request("job.config", config=job)
    apply_job({**job, **here, "job_number": number})


def load_job() -> None:
    """In a worker, asks the node once for what the driver decided for the whole job."""
    if mode == WORKER_MODE and not namespace:
        apply_job(request("job.mine"))
