"""The node process: ``python -m ray._node --config-fd N``.

The order here is the order of what must not wait: the zygote is forked while this process has one thread
and little memory, and imports what workers need while the node itself loads its machines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._node.config import NodeConfig
    from ray._node.forkserver import ForkServer
    from ray._node.shell import Core


SIGTERM_STATUS: Final = 128 + 15
"""How a node ends that somebody has sent SIGTERM, as shells show it."""


def main() -> int:
    """Run a node until it ends. Returns the exit status; what went wrong is told to `ready_fd` and standard error."""
    if len(sys.argv) != 3 or sys.argv[1] != "--config-fd":
        print("usage: python -m ray._node --config-fd N (a descriptor to read the configuration from)")
        return 2
    from ray._node.config import read_config

    config = read_config(int(sys.argv[2]))
    try:
        ending = _run(config)
        from ray._node.shell import SIGTERM_CAME
    except BaseException as error:
        with contextlib.suppress(OSError):  # a log without room for it
            import traceback

            traceback.print_exc()
        _tell(config, _in_words(error).encode())
        return 1
    return SIGTERM_STATUS if ending == SIGTERM_CAME else 0


def _in_words(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    if (isinstance(error, OSError) and error.errno == errno.EMFILE) or f"(os error {errno.EMFILE})" in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        text += f". A process may have {limit} descriptors here, which are too few: raise the limit (ulimit -n)"
    return text


def _run(config: NodeConfig) -> str:
    import signal

    from ray._node import descriptors, wire
    from ray._node.forkserver import ForkServer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    descriptors.raise_limit()  # also the workers', who inherit it
    _keep_only(config.lifeline_fd, config.ready_fd, config.lock_fd)
    forks = ForkServer(
        wire.Init(
            node_pid=os.getpid(),
            address=config.socket_path,
            session=config.session,
            token=config.token,
            node=config.node,
            log_dir=f"{config.session_dir}/logs",
            worker_module=config.worker_module,
            sys_path=config.sys_path,
            cwd=config.cwd,
            env_vars=config.env_vars,
            preload=config.preload,
        )
    )
    forks.start_as_fork()
    signals = _catch_signals()

    from ray._core import NodeCore, memfd, random_id

    core = NodeCore(path=config.socket_path, session=config.session, token=config.token, node=config.node)
    return _serve(config, core, forks, signals, memfd, random_id)


def _serve(
    config: NodeConfig,
    core: Core,
    forks: ForkServer,
    signals: int,
    memfd: Callable[[str, int], int],
    random_id: Callable[[], int],
) -> str:
    import gc

    from ray._node import session
    from ray._node.manager import NodeFacts, NodeManager
    from ray._node.shell import Shell, log

    manager = NodeManager(
        NodeFacts(
            node=config.node,
            resources=config.resources,
            gpu_ids=tuple(config.gpu_ids),
            object_store_memory=config.object_store_memory,
            high_water_share=config.spilling_share,
            spills=config.spills,
            hostname=config.hostname,
            address=config.address,
            socket=config.socket_path,
            labels=config.labels,
        ),
        new_id=random_id,
        validate=os.environ.get("RAY_VALIDATE") == "1",
    )
    shell = Shell(config, core, manager, forks, signals, memfd)

    def ready() -> None:
        _tell(config, b"ok\n")
        log(f"node {config.node:016x} listens on {config.socket_path}")
        removed = session.sweep(os.path.dirname(config.session_dir))
        if removed:
            log(f"removed what dead sessions had left: {', '.join(removed)}")
        gc.freeze()  # modules and classes stay for ever; the collector need not visit them

    return shell.run(ready)


def _catch_signals() -> int:
    """From now on SIGTERM and SIGCHLD are bytes in a pipe; returns its reading end."""
    import signal

    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, _heed)
    return reading


def _heed(number: int, frame: object) -> None:
    """The pipe has the signal; the handler is there because Python writes only for signals that have one."""


def _keep_only(*fds: int) -> None:
    """Close what the driver happened to have open, such as listening sockets of servers in it."""
    at = 3
    for fd in sorted(fd for fd in fds if fd >= 0):
        os.closerange(at, fd)
        os.set_inheritable(fd, False)
        at = fd + 1
    os.closerange(at, 1 << 20)


def _tell(config: NodeConfig, text: bytes) -> None:
    """Report the outcome of the start, once."""
    try:
        os.write(config.ready_fd, text)
        os.close(config.ready_fd)
    except OSError:
        return  # it was told already, or nobody listens


if __name__ == "__main__":
    sys.exit(main())
