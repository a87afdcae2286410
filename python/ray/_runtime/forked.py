"""The end of a child that user code forked, when it comes back to the worker's loop.

The loop, the core and the connections are the parent's: the child has nothing to return to, and must leave them as they
are. So it ends like a child of `multiprocessing` does, without functions that were registered with `atexit`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from ray._runtime import errors

if TYPE_CHECKING:
    import asyncio

__all__ = ["end", "end_at_next_turn"]


def end(error: BaseException | None = None) -> NoReturn:
    """Ends this process: with 0 after user code has returned or yielded, else with 1, or as `sys.exit()` said."""
    code = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif error is not None:
        code = 1
        _say(str(error.code) if isinstance(error, SystemExit) else _traceback(error))
    _leave(code)


def _traceback(error: BaseException) -> str:
    return (
        f"process {os.getpid()}, forked by a task from process {os.getppid()}, ends with an exception:\n"
        f"Traceback (most recent call last):\n{errors.remote_traceback(error)}"
    )


def end_at_next_turn(loop: asyncio.AbstractEventLoop) -> None:
    """Ends this process when it comes back to its parent's event loop, before it runs anything else there."""
    ready = getattr(loop, "_ready", None)
    if ready is not None:  # where other calls and tasks of the parent wait for their turn
        ready.clear()
    with contextlib.suppress(RuntimeError):  # the loop was closed
        loop.call_soon(_end_at_await)


def _end_at_await() -> None:
    _say(
        f"process {os.getpid()}, forked by an asynchronous actor from process {os.getppid()}, ends where it came back "
        "to the event loop, which is its parent's. Call os._exit() before the next await."
    )
    _leave(1)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error may be closed, or None
        sys.stderr.write(f"{text}\n")


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
