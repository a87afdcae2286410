"""Asks who listens at an address, in a thread: such a question may take seconds, and the node has one thread."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import TYPE_CHECKING, Final

from ray._node.membership import Found, NotFound

if TYPE_CHECKING:
    from ray._control.machine import Event

ASK_S: Final = 1.0
"""How long one address may take to answer."""


class Seeker:
    """Answers come as events, when the descriptor is readable. The thread is started by the first question.

    Args:
        token: The cluster's.
        tls: Whether its nodes use TLS: a head that does otherwise is none of this cluster's.
    """

    def __init__(self, token: bytes, *, tls: bool = False) -> None:
        self._token = token
        self._tls = tls
        self._asked: queue.SimpleQueue[tuple[str, ...] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        return self._reading

    def seek(self, addresses: tuple[str, ...]) -> None:
        """Ask at these addresses, one after another, until one answers."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="seeker", daemon=True)
            self._thread.start()
        self._asked.put(addresses)

    def read(self) -> list[Event]:
        """The answers that have come."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 4096)
        events: list[Event] = []
        while not self._answers.empty():
            events.append(self._answers.get())
        return events

    def close(self) -> None:
        """Let the thread end; it may still wait for an answer, and then ends with the process."""
        self._asked.put(None)

    def _run(self) -> None:
        while (addresses := self._asked.get()) is not None:
            self._answers.put(self._ask(addresses))
            with contextlib.suppress(OSError):  # full: there is a notice already
                os.write(self._writing, b"\0")

    def _ask(self, addresses: tuple[str, ...]) -> Event:
        from ray._core import discover

        whys: list[str] = []
        refused = True
        for address in addresses:
            try:
                node, _, _, _ = discover(address, self._token, ASK_S, self._tls)
            except ConnectionRefusedError as error:
                whys.append(str(error))
            except (OSError, ValueError) as error:
                whys.append(str(error))
                refused = refused and "refused" in str(error)
            else:
                return Found(node, address)
        return NotFound(addresses, "; ".join(whys), refused)
