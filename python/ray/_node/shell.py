"""The node process: performs what its machines decide. Decides nothing itself.

One thread, one wait: `NodeCore.poll` returns frames and readable descriptors; everything that a node hears
of besides frames is a descriptor (the driver's life, signals, the zygote, the workers' logs). Without
events it sleeps until the machines' next deadline, or for ever.

Children are reaped on SIGCHLD with one loop for all of them: as a subreaper the node inherits whatever
its workers leave behind, and that must be reaped too. Because nobody else reaps, a pid in the tables
cannot have been given to another process, so signals by pid are safe and no descriptor per worker is needed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from ray._control import messages
from ray._control.machine import Effect, Event, Log, Multicast, Send, Tick, ToNode, earliest
from ray._node import descriptors, events, peer_protocol, process, register, registry, session, wire
from ray._node.event_log import EventLog, keep
from ray._node.files import Files
from ray._node.logs import LogFiles
from ray._node.manager import CoreJoined, CoreLeft, FrameCame, Shutdown
from ray._node.membership import Commit, Durable, Seek
from ray._node.memory_reader import MemoryReader
from ray._node.seeker import Seeker
from ray._node.spill_files import SPILLED
from ray._protocol import (
    DESCRIBE_NOTHING,
    KIND_REGISTER_OPENED,
    KINDS,
    ROLE_WORKER,
    Describe,
    Described,
    Message,
    Pulled,
    SegmentGranted,
    SegmentMapped,
    TaskEvents,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ray._control.storage.writer import StorageWriter
    from ray._node.config import NodeConfig
    from ray._node.forkserver import ForkServer
    from ray._node.membership import Membership

LIFELINE, SIGNALS, LOGS, DRIVER, SEEKER, RECORDS, STALLS, ZYGOTE = 1, 2, 3, 4, 5, 6, 7, 8
"""Tokens of watched descriptors. Zygotes count on from the last, one token for each."""

SHUTDOWN_S: Final = 3.0
"""How long killed processes may take to end before the node leaves without them."""

LAST_RECORDS_S: Final = 0.5
"""How long members of a node that ends may take to hand in their last records."""

SIGTERM_CAME: Final = "SIGTERM"
"""How `Shell.run` says that somebody else wanted the node's end."""

NO_SEGMENT: Final = -2
"""Where the descriptor of a segment would stand that is not there."""

LOG_BACKLOG_BYTES_MAX: Final = 8 << 20
"""Log lines for a driver that has this much unread are dropped rather than queued."""


class Core(Protocol):
    """What the shell needs of `ray._core.NodeCore`."""

    def poll(self, timeout: float | None) -> Sequence[tuple[object, ...]]: ...
    def send(self, proc: int, kind: int, corr: int, body: bytes) -> None: ...
    def send_fd(self, proc: int, kind: int, corr: int, body: bytes, fd: int) -> None: ...
    def watch_fd(self, fd: int, token: int) -> None: ...
    def unwatch_fd(self, token: int) -> None: ...
    def disconnect(self, proc: int) -> None: ...
    def address(self) -> str | None: ...
    def set_node_address(self, node: int, address: str, relayed: bool = False) -> None: ...
    def forget_node(self, node: int, cause: str) -> None: ...
    def call_back(self, node: int, ticket: int) -> None: ...
    def refuse_stranger(self, ticket: int) -> None: ...
    def offer_segment(self, segment: int, fd: int, size: int, filled: int) -> None: ...
    def withdraw_segment(self, segment: int) -> bool: ...
    def pull(
        self, ticket: int, sources: Sequence[tuple[int, str, int, int]], length: int, segment: int, fd: int, offset: int
    ) -> None: ...
    def cancel_pull(self, ticket: int) -> None: ...
    def write_spill(
        self,
        ticket: int,
        path: str,
        pieces: Sequence[tuple[bytes, int, str, int, int, int]],
        capacity_share: float,
    ) -> None: ...
    def read_spill(self, ticket: int, path: str, name: bytes, at: int, length: int, fd: int) -> None: ...
    def close(self) -> None: ...


class Shell:
    """See the module's docstring.

    Args:
        config: What the node was told.
        core: Its transport.
        node: Its decisions.
        forks: Its zygote.
        signals: A pipe that gets the number of each SIGCHLD and SIGTERM.
        memfd: Creates a sealed memory file: (name, bytes) -> descriptor.
        records: What keeps the control service's records; None if nothing does.
    """

    def __init__(
        self,
        config: NodeConfig,
        core: Core,
        node: Membership,
        forks: ForkServer,
        signals: int,
        memfd: Callable[[str, int], int],
        records: StorageWriter | None = None,
    ) -> None:
        self._config = config
        self._core = core
        self._node = node
        self._manager = node.manager
        self._forks = forks
        self._signals = signals
        self._memfd = memfd
        self._logs = LogFiles(f"{config.session_dir}/logs", config.address)
        self._logs_open = False
        self._history = EventLog(f"{config.session_dir}/events", config.node)
        self._files = Files(config.session_dir)
        self._memory: MemoryReader | None = None
        self._segments: dict[int, int] = {}
        self._registers: dict[int, int] = {}
        """What workers write down of their objects, by process."""
        self._jobs: dict[int, int] = {}
        self._queue: deque[Event] = deque()
        self._zygote_token = 0
        self._ending = ""
        self._keeps_logs = False
        """Nobody wanted the end, and nobody is told of it: all that says why is the node's log."""
        self._at_end = ""
        self._seeker = Seeker(config.token, tls=config.tls)
        self._records = records
        self._backlog: Callable[[int], int] | None = getattr(core, "backlog", None)
        self._perform: dict[type[Effect], Callable[..., None]] = {
            Send: self._send,
            Multicast: self._multicast,
            Log: lambda effect: log(effect.text),
            ToNode: self._send_to_node,
            events.FlushLogs: self._flush_logs,
            Shutdown: self._shutdown,
            Commit: self._commit,
            Seek: lambda effect: self._seeker.seek(effect.addresses),
            events.Pass: self._pass,
            events.KnowNode: self._know_node,
            events.ForgetNode: lambda effect: self._core.forget_node(effect.node, effect.cause),
            events.CallBack: lambda effect: self._core.call_back(effect.node, effect.ticket),
            events.RefuseStranger: lambda effect: self._core.refuse_stranger(effect.ticket),
            events.KeepHistory: self._keep_history,
            events.ListFiles: self._list_files,
            events.ReadFile: self._read_file,
            events.Fork: self._fork,
            events.Kill: self._kill,
            events.Freeze: lambda effect: self._signal(effect.pids, signal.SIGSTOP),
            events.Thaw: lambda effect: self._signal(effect.pids, signal.SIGCONT),
            events.Guard: lambda effect: self._forks.guard(effect.until, effect.added, effect.gone),
            events.ReadLogTail: self._read_log_tail,
            events.ReadMemory: self._read_memory,
            events.LookAtDescriptors: self._look_at_descriptors,
            events.Labelled: lambda effect: self._logs.set_label(effect.proc, effect.label),
            events.Disconnect: lambda effect: self._core.disconnect(effect.proc),
            events.GrantSegment: self._grant_segment,
            events.ShareSegment: self._share_segment,
            events.DropSegment: self._drop_segment,
            events.ReadRegister: self._read_register,
            events.StartPull: self._start_pull,
            events.CancelPull: lambda effect: self._core.cancel_pull(effect.ticket),
            events.ShareCopy: self._share_copy,
            events.ToPeer: self._tell_peer,
            events.WriteSpill: self._write_spill,
            events.ReadSpill: self._read_spill,
            events.OfferSpill: self._offer_spill,
            events.DeleteSpill: self._delete_spill,
        }
        self._offered_spills: set[int] = set()

    # ------------------------------------------------------------------ the loop

    def run(self, ready: Callable[[], None]) -> str:
        """Serve until something ends the node; then end everything on it.

        Args:
            ready: Called when nothing is left that could fail before the node serves.

        Returns:
            What ended it.
        """
        try:
            process.become_subreaper()
            process.set_title("ray::node")
            self._watch()
            for effect in self._node.start(time.monotonic()):
                self._perform[type(effect)](effect)
            told = False
            while not self._ending:
                if not told and self._node.joined:
                    told = True
                    ready()
                deadline = earliest(self._node.next_deadline(), self._logs.next_deadline(), self._forks.next_deadline())
                timeout = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                for event in self._core.poll(timeout):
                    self._heard(event)
                self._on_deadlines()
                self._work()
        finally:
            self._end()
        return self._ending

    def _watch(self) -> None:
        self._core.watch_fd(self._signals, SIGNALS)
        self._core.watch_fd(self._seeker.fileno(), SEEKER)
        if self._records is not None:
            self._core.watch_fd(self._records.fileno(), RECORDS)
        self._watch_zygote()
        if self._config.lifeline_fd >= 0:
            self._core.watch_fd(self._config.lifeline_fd, LIFELINE)
        if self._config.driver_pid:
            self._watch_driver(self._config.driver_pid)

    def _watch_driver(self, pid: int) -> None:
        """The pipe alone would not do: a forked child of the driver may keep it open."""
        try:
            self._driver = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ending = "the driver had ended before the node was ready"
        else:
            self._core.watch_fd(self._driver, DRIVER)

    @contextlib.contextmanager
    def _watching_zygote(self) -> Iterator[None]:
        """Around what may start another zygote."""
        generation = self._forks.generation
        yield
        if self._forks.generation != generation and self._forks.fileno() >= 0:
            self._watch_zygote()

    def _watch_zygote(self) -> None:
        # A token of its own for each zygote: an event about the one before may still be on its way.
        self._core.unwatch_fd(self._zygote_token)
        self._zygote_token = max(self._zygote_token + 1, ZYGOTE)
        self._core.watch_fd(self._forks.fileno(), self._zygote_token)

    def _heard(self, event: tuple[object, ...]) -> None:
        match event:
            case ("frame", int(proc), int(kind), int(corr), bytes(body)):
                self._queue.append(FrameCame(proc, kind, corr, body))
            case ("frame_fd", int(proc), int(kind), int(corr), bytes(body), int(fd)):
                self._take_register(proc, kind, fd)
                self._queue.append(FrameCame(proc, kind, corr, body))
            case ("joined", int(proc), int(role), int(pid)):
                self._queue.append(CoreJoined(proc, role, pid))
            case ("left", int(proc), str(reason), bool(ended)):
                self._queue.append(CoreLeft(proc, reason, ended))
            case ("fd", int(token)):
                self._on_fd(token)
            case ("stranger", int(ticket), int(target)):
                self._queue.append(events.StrangerCame(ticket, target))
            case ("pulled", int(ticket), str(error), list(failures), int(count)):
                self._queue.append(events.PullDone(ticket, error, tuple(failures), count))
            case ("written", int(file), str(kind), str(error)):
                self._queue.append(events.SpillWritten(file, kind, error))
            case ("restored", int(ticket), str(kind), str(error)):
                self._queue.append(events.SpillRead(ticket, kind, error))
            case _:
                log(f"the core reported something unknown: {event!r}")
        self._work()

    def _work(self) -> None:
        now = time.monotonic()
        while self._queue and not self._ending:
            for effect in self._node.handle(self._queue.popleft(), now):
                self._perform[type(effect)](effect)

    def _on_deadlines(self) -> None:
        now = time.monotonic()
        deadline = self._node.next_deadline()
        if deadline is not None and deadline <= now:
            self._queue.append(Tick())
        for proc, lines in self._logs.flush_due(now):
            self._forward(proc, lines)
        with self._watching_zygote():
            self._queue.extend(self._forks.on_deadline())

    def _on_fd(self, token: int) -> None:
        if token == SIGNALS:
            try:
                numbers = os.read(self._signals, 4096)
            except BlockingIOError:  # two wake-ups were taken together; the first has read all
                numbers = b""
            if signal.SIGTERM in numbers:
                self._ending = SIGTERM_CAME
            self._reap()
        elif token == LOGS:
            for proc, lines in self._logs.read_changed(time.monotonic()):
                self._forward(proc, lines)
        elif token == LIFELINE:
            if not os.read(self._config.lifeline_fd, 1):
                self._ending = "the driver let go"
        elif token == DRIVER:
            self._ending = "the driver has ended"
        elif token == SEEKER:
            self._queue.extend(self._seeker.read())
        elif token == RECORDS:
            self._on_records()
        elif token == STALLS:
            if self._memory is not None:
                self._memory.take_stall()
                self._queue.append(events.MemoryStalled())
        elif token == self._zygote_token:
            self._read_zygote()

    # ------------------------------------------------------------------ records

    def _commit(self, effect: Commit) -> None:
        from ray._control.storage.interface import StorageError, Write

        assert self._records is not None
        writes = [Write(record.table, record.key, record.value) for record in effect.records]
        try:
            number = self._records.submit(writes)
        except StorageError as error:
            # What was not kept must not be acknowledged, and the next head has to begin where this one is.
            self._ending = f"the control service's records cannot be kept: {error}"
            return
        assert number == effect.number, "commits are numbered alike"

    def _on_records(self) -> None:
        assert self._records is not None
        progress = self._records.completed()
        if progress.error is not None:
            self._ending = f"the control service's records cannot be kept: {progress.error}"
        else:
            self._queue.append(Durable(progress.durable_up_to))

    # ------------------------------------------------------------------ processes

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid != self._forks.pid:  # a zygote's end shows on its socket
                self._queue.append(events.ChildExited(pid, os.waitstatus_to_exitcode(status)))

    def _read_zygote(self) -> None:
        with self._watching_zygote():
            self._queue.extend(self._forks.read())

    def _fork(self, effect: events.Fork) -> None:
        if not self._logs_open:
            self._core.watch_fd(self._logs.open(), LOGS)
            self._logs_open = True
            self._open_memory()
        try:
            env_vars = wire.decode_env(effect.env)
        except ValueError as error:
            text = f"its runtime environment is malformed: {error}"
            self._queue.append(events.ForkFailed(effect.proc, text))
            return
        self._jobs[effect.proc] = effect.job
        job = self._manager.jobs.get(effect.job)
        sys_path, cwd = (job.config.get("sys_path"), job.config.get("cwd")) if job is not None else (None, None)
        command = wire.ForkCommand(
            effect.proc,
            env_vars,
            [str(path) for path in sys_path] if isinstance(sys_path, list) else None,
            cwd if isinstance(cwd, str) else None,
        )
        try:
            with self._watching_zygote():
                self._forks.fork(command)
        except ValueError as error:
            self._queue.append(events.ForkFailed(effect.proc, f"its runtime environment is too large: {error}"))

    def _kill(self, effect: events.Kill) -> None:
        try:
            os.kill(effect.pid, signal.SIGKILL)
        except ProcessLookupError:
            log(f"process {effect.pid} was to be killed and is not there")

    def _signal(self, pids: tuple[int, ...], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _read_log_tail(self, effect: events.ReadLogTail) -> None:
        rest, tail = self._logs.end(effect.proc, effect.pid, time.monotonic())
        for proc, lines in rest:
            self._forward(proc, lines)
        self._jobs.pop(effect.proc, None)
        usage = events.DescriptorUsage(*descriptors.usage(os.getpid()))
        oom_kill = self._memory.claim_oom_kill() if self._memory is not None and effect.unexplained else ""
        self._queue.appendleft(events.LogTail(effect.proc, tail, usage, oom_kill))

    def _look_at_descriptors(self, effect: events.LookAtDescriptors) -> None:
        seen = [events.DescriptorUsage(*descriptors.usage(pid)) for pid in (effect.asker_pid, effect.pid, os.getpid())]
        self._queue.appendleft(events.DescriptorsSeen(effect.asker, effect.proc, *seen))

    def _open_memory(self) -> None:
        """Before the first worker: the kernel's counts are compared with what they were."""
        self._memory = MemoryReader(limit_bytes=self._config.memory.limit_bytes)
        if self._config.memory.look_s_max > 0 and (stalls := self._memory.watch_stalls()) >= 0:
            self._core.watch_fd(stalls, STALLS)

    def _read_memory(self, effect: events.ReadMemory) -> None:
        if self._memory is not None:
            own = dict.fromkeys(self._manager.pool.pids(), "a worker without work")
            own |= {os.getpid(): "the node", self._forks.pid: "the fork server"}
            seen = self._memory.read(
                own, [*self._segments.values(), *self._registers.values()], detailed=effect.detailed
            )
            self._queue.appendleft(seen)

    def _forward(self, proc: int, lines: Message) -> None:
        for driver in self._manager.log_receivers(self._jobs.get(proc, 0)):
            is_here = self._manager.processes.get(driver) is not None
            hop = driver if is_here else self._node.head
            if self._backlog is not None and self._backlog(hop) >= LOG_BACKLOG_BYTES_MAX:
                continue
            if is_here:
                self._send(Send(driver, lines))
            else:
                for effect in self._node.handle(events.Forward(driver, lines), time.monotonic()):
                    self._perform[type(effect)](effect)

    # ------------------------------------------------------------------ files

    def _keep_history(self, effect: events.KeepHistory) -> None:
        text = self._history.append(effect.proc, effect.pid, effect.job, effect.batch)
        if text:
            log(text)

    def _list_files(self, effect: events.ListFiles) -> None:
        self._reply(effect.to, effect.corr, self._files.list(effect.area))

    def _read_file(self, effect: events.ReadFile) -> None:
        self._reply(effect.to, effect.corr, self._files.read(effect.area, effect.name, effect.offset, effect.size))

    def _reply(self, to: int, corr: int, reply: Message) -> None:
        """To a member of this node or another."""
        self._queue.appendleft(events.Forward(to, reply, corr))

    # ------------------------------------------------------------------ messages and segments

    def _send(self, effect: Send) -> None:
        self._core.send(effect.to, KINDS[type(effect.message)], effect.corr, encode(effect.message))

    def _send_to_node(self, effect: ToNode) -> None:
        self._core.send(effect.node, messages.KINDS[type(effect.message)], 0, encode(effect.message))

    def _pass(self, effect: events.Pass) -> None:
        for proc in effect.procs:
            self._core.send(proc, effect.kind, effect.corr, effect.body)

    def _know_node(self, effect: events.KnowNode) -> None:
        if effect.address:
            self._core.set_node_address(effect.node, effect.address, effect.relayed)

    def _multicast(self, effect: Multicast) -> None:
        kind, body = KINDS[type(effect.message)], encode(effect.message)
        for proc in effect.to:
            self._core.send(proc, kind, 0, body)

    def _send_with_fd(self, to: int, corr: int, message: Message, fd: int) -> None:
        self._core.send_fd(to, KINDS[type(message)], corr, encode(message), fd)

    def _grant_segment(self, effect: events.GrantSegment) -> None:
        try:
            fd = self._recycle(effect.recycled) if effect.recycled else -1
            if fd < 0:
                fd = self._memfd(f"ray-segment-{effect.segment}", effect.size)
            self._segments[effect.segment] = fd
            # A copy is offered before it is pulled, because other nodes may be told of it earlier than this one is told
            # from where to pull it.
            self._core.offer_segment(effect.segment, fd, effect.size, effect.size if effect.to else 0)
        except OSError as error:
            self._forget_segment(effect.segment)
            self._queue.append(events.SegmentFailed(effect.segment, effect.corr, str(error)))
            return
        if effect.to:
            self._send_with_fd(effect.to, effect.corr, SegmentGranted(effect.segment, effect.size), fd)

    def _recycle(self, segment: int) -> int:
        """The memory file of a segment that is not used any more, unless parts of it are on their way elsewhere."""
        if self._core.withdraw_segment(segment):
            return self._segments.pop(segment, -1)
        self._forget_segment(segment)
        return -1

    def _forget_segment(self, segment: int) -> None:
        fd = self._segments.pop(segment, -1)
        if fd >= 0:
            os.close(fd)

    def _share_segment(self, effect: events.ShareSegment) -> None:
        message = SegmentMapped(effect.segment, effect.size, effect.lessee)
        self._send_with_fd(effect.to, effect.corr, message, self._segments[effect.segment])

    def _drop_segment(self, effect: events.DropSegment) -> None:
        self._core.withdraw_segment(effect.segment)
        self._forget_segment(effect.segment)

    def _take_register(self, proc: int, kind: int, fd: int) -> None:
        """A descriptor came with a frame. Nothing but the register of a worker has one."""
        sender = self._manager.processes.get(proc)
        is_worker = sender is not None and sender.role == ROLE_WORKER
        if kind == KIND_REGISTER_OPENED and is_worker and proc not in self._registers:
            self._registers[proc] = fd
        else:
            os.close(fd)

    def _read_register(self, effect: events.ReadRegister) -> None:
        records: tuple[register.Record, ...] = ()
        fd = self._registers.pop(effect.proc, -1)
        if fd >= 0:
            try:
                records = register.read(lambda length, offset: os.pread(fd, length, offset))
            except OSError as error:
                log(f"the register of process {effect.proc:016x} cannot be read: {error}")
            finally:
                os.close(fd)
        self._queue.appendleft(events.RegisterRead(effect.proc, records))

    # ------------------------------------------------------------------ copies from other nodes

    def _start_pull(self, effect: events.StartPull) -> None:
        try:
            fd = self._segments[effect.segment]
            self._core.pull(effect.ticket, effect.sources, effect.len, effect.segment, fd, 0)
        except (OSError, ValueError) as error:
            self._queue.append(events.PullDone(effect.ticket, str(error)))

    def _share_copy(self, effect: events.ShareCopy) -> None:
        message = Pulled(effect.segment, effect.size, effect.offset)
        self._send_with_fd(effect.to, effect.corr, message, self._segments[effect.segment])

    def _tell_peer(self, effect: events.ToPeer) -> None:
        kind = peer_protocol.PEER_KINDS[type(effect.message)]
        self._core.send(effect.node, kind, 0, peer_protocol.encode(effect.message))

    # ------------------------------------------------------------------ spill files

    def _spill_path(self, file: int) -> str:
        return f"{self._config.session_dir}/{session.SPILL_NAME}/{file & (SPILLED - 1):08x}.spill"

    def _write_spill(self, effect: events.WriteSpill) -> None:
        pieces = [
            (piece.object, -1, self._spill_path(piece.source), piece.offset, piece.len, piece.at)
            if piece.source >= SPILLED
            else (piece.object, self._segments.get(piece.source, NO_SEGMENT), "", piece.offset, piece.len, piece.at)
            for piece in effect.pieces
        ]
        try:
            if any(fd == NO_SEGMENT for _, fd, *_ in pieces):
                msg = "a value was offered that lies in no segment of this node"
                raise ValueError(msg)
            session.make_spill_dir(self._config.session_dir, self._config.spilling.directory)
            path = self._spill_path(effect.file)
            # What only moves out of files with garbage makes room on a disk, however full that is.
            moves = all(piece.source >= SPILLED for piece in effect.pieces)
            share = 1.0 if moves else self._config.spilling.capacity_share
            self._core.write_spill(effect.file, path, pieces, share)
        except (OSError, ValueError) as error:
            self._queue.append(events.SpillWritten(effect.file, "io", str(error)))

    def _read_spill(self, effect: events.ReadSpill) -> None:
        try:
            path, fd = self._spill_path(effect.file), self._segments[effect.segment]
            self._core.read_spill(effect.ticket, path, effect.object, effect.at, effect.len, fd)
        except (OSError, ValueError) as error:
            self._queue.append(events.SpillRead(effect.ticket, "io", str(error)))

    def _offer_spill(self, effect: events.OfferSpill) -> None:
        if effect.file in self._offered_spills:
            return
        try:
            fd = os.open(self._spill_path(effect.file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            log(f"a spill file cannot be read for another node: {error}")
            return
        try:
            size = os.fstat(fd).st_size
            self._core.offer_segment(effect.file, fd, size, size)
            self._offered_spills.add(effect.file)
        finally:
            os.close(fd)

    def _delete_spill(self, effect: events.DeleteSpill) -> None:
        if effect.file in self._offered_spills:
            self._offered_spills.discard(effect.file)
            self._core.withdraw_segment(effect.file)
        try:
            os.unlink(self._spill_path(effect.file))
        except OSError as error:
            log(f"a spill file cannot be deleted: {error}")

    # ------------------------------------------------------------------ the end

    def remove_at_end(self, path: str) -> None:
        """A file that says that this node is there."""
        self._at_end = path

    def _flush_logs(self, effect: Effect) -> None:
        for proc, lines in self._logs.flush_all(time.monotonic()):
            self._forward(proc, lines)

    def _shutdown(self, effect: Shutdown) -> None:
        self._flush_logs(effect)
        self._ending = effect.reason
        self._keeps_logs = not effect.wanted and self._config.is_public

    def _gather_records(self) -> None:
        """Workers are about to be killed: what they have not told of the tasks that they ended is asked for."""
        processes = self._manager.processes
        asked = dict.fromkeys(processes.connected())
        question = encode(Describe(DESCRIBE_NOTHING, 0))
        for proc in asked:
            self._core.send(proc, KINDS[Describe], 0, question)
        deadline = time.monotonic() + LAST_RECORDS_S
        while asked and (left := deadline - time.monotonic()) > 0:
            for event in self._core.poll(left):
                match event:
                    case ("frame", int(proc), int(kind), int(corr), bytes(body)) if kind == KINDS[TaskEvents]:
                        for effect in self._node.handle(FrameCame(proc, kind, corr, body), time.monotonic()):
                            if isinstance(effect, events.KeepHistory):
                                self._keep_history(effect)
                    case ("frame", int(proc), kind, *_) if kind == KINDS[Described]:
                        asked.pop(proc, None)
                    case ("left", int(proc), _):
                        asked.pop(proc, None)

    def _end(self) -> None:
        """Kill and reap everything, remove the session directory. Bounded by `SHUTDOWN_S`."""
        log(f"ending: {self._ending or 'an error, see above'}")
        if self._at_end:
            registry.remove(self._at_end)
        if self._ending:
            self._gather_records()
        self._forks.kill()
        kill_children(self._manager.pool.pids(), self._signals, SHUTDOWN_S)
        self._seeker.close()
        if self._records is not None:
            self._records.close()
        self._core.close()
        for fd in (*self._segments.values(), *self._registers.values()):
            os.close(fd)
        self._logs.close()
        self._history.close()
        if self._memory is not None:
            self._memory.close()
        session.remove_spilled(self._config.session_dir)
        if self._ending:
            keep(self._config.session_dir)
        if self._ending and not self._keeps_logs:
            session.remove(self._config.session_dir)  # after a crash, the logs in it are all that is left to look at


def kill_children(known: list[int], wake_fd: int, timeout_s: float) -> None:
    """Kill all children and all who become children by that, until none is left or time is up.

    Args:
        known: Children that are known anyway, for kernels that do not list them.
        wake_fd: Readable after SIGCHLD.
        timeout_s: A process in an uninterruptible wait must not keep the node.
    """
    deadline = time.monotonic() + timeout_s
    poller = select.poll()
    poller.register(wake_fd, select.POLLIN)
    doomed = list(known)
    while True:
        for pid in dict.fromkeys([*doomed, *process.children()]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        doomed = []
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            log(f"processes {process.children()} did not end when killed; leaving them")
            return
        if poller.poll(left * 1000):
            os.read(wake_fd, 4096)


def log(text: str) -> None:
    """A line in the node's own log, which standard error is. Lost if there is no room: a full disk ends no node."""
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
