"""Words for how a process ended."""

from __future__ import annotations

import signal


def describe_exit(
    pid: int,
    exit_code: int,
    announced: str = "",
    *,
    stopped: bool = False,
    killed: str = "",
    oom_kill: str = "",
) -> str:
    """How a worker ended, as a sentence without its full stop.

    Args:
        pid: The process.
        exit_code: As reaped; negative for signals.
        announced: Why it ended on purpose, if it did.
        stopped: Whether this node killed it for that reason.
        killed: Why this node killed it, if nobody had wanted its end.
        oom_kill: Who counted that the kernel has just ended a process for want of memory.
    """
    if stopped:
        return f"the worker process (pid {pid}) was stopped because {announced}"
    if announced:
        return f"the worker process (pid {pid}) ended by intention: {announced}"
    if killed:
        return f"the worker process (pid {pid}) was killed by this node, because {killed}"
    if exit_code >= 0:
        return f"the worker process (pid {pid}) exited with code {exit_code}"
    if oom_kill:
        return (
            f"the worker process (pid {pid}) was killed by the kernel for want of memory: the kernel's count of such "
            f"kills in {oom_kill} went up just then. Memory was used up faster than this node could act, or by others: "
            "run fewer tasks at a time (num_cpus, memory), give more memory, or lower RAY_memory_usage_threshold"
        )
    return f"the worker process (pid {pid}) was killed by {signal_name(-exit_code)}{_hint(-exit_code)}"


def signal_name(number: int) -> str:
    """Like "SIGKILL (signal 9)"; real-time signals by number."""
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def _hint(number: int) -> str:
    match number:
        case signal.SIGKILL:
            return ", which this node did not send: somebody ran kill -9, or the kernel was out of memory (see dmesg)"
        case signal.SIGSEGV | signal.SIGBUS | signal.SIGILL | signal.SIGFPE | signal.SIGABRT:
            return ": native code in it crashed (the log shows where if faulthandler is on)"
        case _:
            return ""
