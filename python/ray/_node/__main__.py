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
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.storage.writer import StorageWriter
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

        _tell(config, ending.encode())
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

    # Nobody finds a head that does not lead: it listens only then.
    records, known = _lead(config) if config.records else (None, [])
    core = NodeCore(
        path=config.socket_path,
        session=config.session,
        token=config.token,
        node=config.node,
        listen=config.listen or None,
        tls=config.tls,
        relays=bool(config.listen) and not config.head_node,
    )
    return _serve(config, core, forks, signals, memfd, random_id, records, known)


def _serve(
    config: NodeConfig,
    core: Core,
    forks: ForkServer,
    signals: int,
    memfd: Callable[[str, int], int],
    random_id: Callable[[], int],
    records: StorageWriter | None,
    known: list[tuple[str, bytes, bytes]],
) -> str:
    import gc

    from ray._node import registry, session
    from ray._node.config import python_version
    from ray._node.manager import NodeFacts, NodeManager
    from ray._node.membership import HEADLESS_S, HeadNode, Membership, WorkerNode
    from ray._node.shell import Shell, log

    validate = os.environ.get("RAY_VALIDATE") == "1"
    manager = NodeManager(
        NodeFacts(
            node=config.node,
            resources=config.resources,
            gpu_ids=tuple(config.gpu_ids),
            object_store_memory=config.object_store_memory,
            spilling=config.spilling,
            hostname=config.hostname,
            host=config.address,
            address=_announced(config, core),
            socket=config.socket_path,
            name=config.name,
            session_dir=config.session_dir,
            labels=config.labels,
            memory=config.memory,
            python=python_version(),
            client=config.client,
            relayed=config.outbound_only,
        ),
        new_id=random_id,
        validate=validate,
    )
    node: Membership
    if config.head_node:
        core.set_node_address(config.head_node, config.head_address.split(",")[0])
        headless_s = float(os.environ.get(HEADLESS_VARIABLE) or HEADLESS_S)
        node = WorkerNode(manager, config.head_node, tuple(config.head_address.split(",")), headless_s)
    else:
        from ray._control.service import ControlService

        control = ControlService(head=config.node, durable=records is not None, validate=validate)
        if known:
            control.restore(known, time.monotonic())
        node = HeadNode(manager, control)
    shell = Shell(config, core, node, forks, signals, memfd, records)

    def ready() -> None:
        if config.findable:
            shell.remove_at_end(registry.write(config, manager.facts.address, os.getpid(), time.time()))
        _tell(config, f"ok {manager.facts.address}\n".encode())
        also = f" and {manager.facts.address}" if manager.facts.address else ""
        only = ", and connects to other nodes only outwards" if config.outbound_only else ""
        log(f"node {config.node:016x} listens on {config.socket_path}{also}{only}")
        removed = session.sweep(os.path.dirname(config.session_dir))
        if removed:
            log(f"removed what dead sessions had left: {', '.join(removed)}")
        gc.freeze()  # modules and classes stay for ever; the collector need not visit them

    return shell.run(ready)


LEASE_S: Final = 2.0
"""For how long a head leads without renewing; a standby takes over when it has not."""

LEAD_AGAIN_S: Final = 0.1
"""Pause between a standby's tries to lead."""


HEADLESS_VARIABLE: Final = "RAY_gcs_rpc_server_reconnect_timeout_s"


def _lead(config: NodeConfig) -> tuple[StorageWriter, list[tuple[str, bytes, bytes]]]:
    """Become the one head that writes these records; also returns what the one before has left.

    Raises:
        RuntimeError: If another head leads, and this one is no standby.
    """
    from ray._control import storage
    from ray._control.storage.writer import StorageWriter
    from ray._node.shell import log

    opened = storage.open(config.records)
    holder, waits = f"{config.hostname}:{config.listen}", False
    while opened.acquire(holder, LEASE_S) is None:
        if not config.standby:
            msg = f"another head leads with the records in {opened.place}; end it first, or be its standby"
            raise RuntimeError(msg)
        if not waits:
            waits = True
            log(f"standing by: another head leads with the records in {opened.place}")
            _tell(config, f"ok {config.address}:{config.listen.rpartition(':')[2]}\n".encode())
        time.sleep(LEAD_AGAIN_S)
    known = list(opened.load())
    log(f"leading with {len(known)} records in {opened.place}")
    return StorageWriter(opened), known


def _announced(config: NodeConfig, core: Core) -> str:
    """Where other nodes reach this one; empty if it listens for none."""
    from ray._node.config import address_of

    bound = core.address()
    return address_of(config.address, int(bound.rpartition(":")[2])) if bound else ""


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


_told = False


def _tell(config: NodeConfig, text: bytes) -> None:
    """Report the outcome of the start, once."""
    global _told
    if _told:
        return
    _told = True
    with contextlib.suppress(OSError):  # nobody listens
        os.write(config.ready_fd, text)
        os.close(config.ready_fd)


if __name__ == "__main__":
    sys.exit(main())
