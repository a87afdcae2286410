"""A stand-in for the worker's main module that never connects: it does what WORKER_DOES says."""

from __future__ import annotations

import os
import signal
import sys


def main(*, address: str, session: bytes, token: bytes, node: int, proc: int) -> None:
    match os.environ.get("WORKER_DOES", "sleep").split(" "):
        case ["sleep"]:
            signal.pause()
        case ["describe"]:
            _describe(address, proc)
        case ["random"]:
            import random

            print(random.random())
        case ["numpy"]:
            preloaded = "numpy" in sys.modules
            import numpy as np

            print(
                "numpy", preloaded, np.random.rand(), f"OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS')}"
            )
        case ["exit", code]:
            sys.exit(int(code))
        case ["raise"]:
            raise ValueError("as asked")
        case ["abort"]:
            os.abort()
        case ["atexit"]:
            import atexit

            atexit.register(print, "at exit", end="")
        case ["return"]:
            return


def _describe(address: str, proc: int) -> None:
    with open("/proc/self/cmdline", "rb") as file:
        title = file.read().rstrip(b"\0").decode()
    fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
    print(f"parent {os.getppid()} address={address} proc={proc} cwd={os.getcwd()} title={title}")
    print(f"threads={len(os.listdir('/proc/self/task'))} fds={[fd for fd in fds if _is_open(fd)]}")
    for name, value in os.environ.items():
        print(f"{name}={value}")


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # the one with which the directory was listed
        return False
    return True
