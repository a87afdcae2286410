"""What a failing task reports: the user's traceback as text, and the exception if it can travel."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from ray._runtime import session
from ray.exceptions import RaySystemError, RayTaskError

__all__ = ["dependency_error", "is_of_user", "print_stray", "remote_traceback", "safe_repr", "task_error"]

TEXT_CHARS_MAX = 1 << 20
"""Characters of a traceback that travel, half from its beginning and half from its end."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Frames of these files say nothing to users: the way from the worker's loop to their code, and from it into the core.
_OURS = (
    os.path.join(_PACKAGE, "_runtime") + os.sep,
    os.path.join(_PACKAGE, "actor.py"),
    os.path.join(_PACKAGE, "remote_function.py"),
)
_PICKLER = os.path.join("cloudpickle", "cloudpickle.py")


def task_error(
    error: BaseException, function_name: str, *, actor: Any = None, actor_id: str | None = None
) -> RayTaskError:
    """The error to send for an exception of user code.

    Args:
        error: What was raised.
        function_name: The function, or Class.method.
        actor: The actor's instance, when a method raised.
        actor_id: Its id in hex.
    """
    pid = os.getpid()
    ip = session.node_ip_address
    actor_repr = None if actor is None else safe_repr(actor)
    place = f"ray::{function_name}() (pid={pid}, ip={ip}"
    if actor_id is not None:
        place += f", actor_id={actor_id}" if actor is None else f", actor_id={actor_id}, repr={actor_repr}"
    text = f"{place})\n{remote_traceback(error)}"
    return RayTaskError(
        function_name, text, error, f"ray::{function_name}", pid, ip, actor_repr=actor_repr, actor_id=actor_id
    )


def dependency_error(error: BaseException, function_name: str) -> RayTaskError:
    """The error to send when an argument cannot be had: what its task raised, or why it cannot be unpickled here."""
    pid = os.getpid()
    place = f"ray::{function_name}() (pid={pid}, ip={session.node_ip_address})"
    # Those of other tasks are instances of two classes.
    unreadable = type(error) is RaySystemError and error.traceback_str
    what = "one of its arguments could not be unpickled" if unreadable else "a task that makes an argument of it failed"
    text = f"{place}\n  did not run, because {what}:\n{error}"
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    return RayTaskError(function_name, text, cause, f"ray::{function_name}", pid, session.node_ip_address)


def remote_traceback(error: BaseException) -> str:
    """The traceback as text, without the engine's own frames, causes and contexts included."""
    import traceback

    described = traceback.TracebackException.from_exception(error)
    _trim(described, set())
    lines = list(described.format(chain=True))
    heading = "Traceback (most recent call last):\n"
    if lines and lines[0] == heading:
        lines.pop(0)
    return shortened("".join(lines).rstrip("\n"))


def shortened(text: str) -> str:
    """The text without its middle, if it is longer than `TEXT_CHARS_MAX`."""
    left_out = len(text) - TEXT_CHARS_MAX
    if left_out <= 0:
        return text
    half = TEXT_CHARS_MAX // 2
    return f"{text[:half]} [{left_out:,} characters left out] {text[-half:]}"


def is_of_user(error: BaseException) -> bool:
    """Whether an exception that passed no user code of a task was raised by the user's code all the same.

    That is a signal handler, which Python runs on top of any frame. The engine's own exceptions have only its frames,
    and it raises no KeyboardInterrupt there, which the handler that Python itself has for SIGINT raises.
    """
    frame = error.__traceback__
    while frame is not None:
        if not frame.tb_frame.f_code.co_filename.startswith(_OURS):
            return True
        frame = frame.tb_next
    return isinstance(error, KeyboardInterrupt)


def print_stray(error: BaseException) -> None:
    """Prints an exception that belongs to no task."""
    text = (
        f"process {os.getpid()}: an exception came while no task ran, as by a signal handler. The worker goes on.\n"
        f"Traceback (most recent call last):\n{remote_traceback(error)}\n"
    )
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error may be closed, or None
        sys.stderr.write(text)
        sys.stderr.flush()


def _trim(described: Any, seen: set[int]) -> None:
    """Removes the engine's frames from a described exception and from those it is chained to."""
    if described is None or id(described) in seen:
        return
    seen.add(id(described))
    kept = [
        frame
        for frame in described.stack
        if not (frame.filename.startswith(_OURS) or frame.filename.endswith(_PICKLER))
    ]
    described.stack[:] = kept
    _trim(described.__cause__, seen)
    _trim(described.__context__, seen)
    for part in getattr(described, "exceptions", None) or ():
        _trim(part, seen)


def safe_repr(value: Any) -> str:
    """Its repr, or its class's name where that fails."""
    try:
        return shortened(repr(value))
    except Exception:  # user code
        return f"<{type(value).__qualname__}>"
