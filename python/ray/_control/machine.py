"""What every state machine of a node shares: the handling of events, effects of general use, deadlines.

A machine takes an event and `now` (seconds of a monotonic clock) and returns effects, in the order in
which they must be performed. It holds no socket, clock, thread, file or random source. Anything that
takes time is an effect whose outcome comes back as an event.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import msgspec

from ray._protocol import Message  # noqa: TC001  (msgspec reads the annotation)

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")


class Event(msgspec.Struct, frozen=True):
    """Something that happened, told to a machine."""


class Effect(msgspec.Struct, frozen=True):
    """Something that a machine wants done."""


class Received(Event, frozen=True):
    """A core sent a message. `corr` goes back with the answer, if the message has one."""

    sender: int
    message: Message
    corr: int = 0


class FromNode(Event, frozen=True):
    """A node sent a message to the control service."""

    node: int
    message: Message


class ProcessJoined(Event, frozen=True):
    """A core has proved the token and is connected. `job` is 0 while unknown."""

    proc: int
    role: int
    pid: int
    job: int


class ProcessLeft(Event, frozen=True):
    """A core is gone for good: its process has ended, or it lost its place in the cluster.

    What it owned has no owner any more. Comes exactly once for every `ProcessJoined`.
    """

    proc: int


class Tick(Event, frozen=True):
    """A deadline may have passed. A spurious tick is harmless."""


class Send(Effect, frozen=True):
    """Send a message to one core. Lost silently if the core is gone; its `ProcessLeft` follows anyway."""

    to: int
    message: Message
    corr: int = 0


class Multicast(Effect, frozen=True):
    """Send one message to several cores; it is encoded once."""

    to: tuple[int, ...]
    message: Message


class ToNode(Effect, frozen=True):
    """The control service sends a message to a node. Lost silently if the node is gone; its loss follows anyway."""

    node: int
    message: Message


class Save(Effect, frozen=True):
    """Keep a record for the next control service, or delete it (None). What is said after it waits until it is safe."""

    table: str
    key: bytes
    value: bytes | None


def digest(*parts: object) -> bytes:
    """A key for a record that is found by its value: of one length, whatever the parts are."""
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()[:16]


class Notify(Effect, frozen=True):
    """Tell the people behind a job something; job 0 means every driver."""

    job: int
    level: str
    text: str


class Log(Effect, frozen=True):
    """A line for the node's own log."""

    text: str


Effects: TypeAlias = "list[Effect | Event]"
"""What a machine returns. Events among effects are meant for another machine of the same node."""


class InvariantViolation(AssertionError):
    """A machine contradicts itself: a programming error. The text tells the last events."""


class Machine:
    """Dispatch by the event's type, and by the message's type for what a core sent.

    Subclasses fill `_events`, `_messages` (from cores) and `_node_messages` (from nodes), call `_emit`, and may
    override `check_invariants`.
    """

    STORY_EVENTS = 48
    """Last events kept for the text of an `InvariantViolation`; kept only while validating."""

    def __init__(self, *, validate: bool = False) -> None:
        self._validate = validate
        self._out: Effects = []
        self._story: deque[str] = deque(maxlen=self.STORY_EVENTS)
        self._events: dict[type[Event], Callable[[Any, float], None]] = {}
        self._messages: dict[type[Message], Callable[[Received, Any, float], None]] = {}
        self._node_messages: dict[type[Message], Callable[[FromNode, Any, float], None]] = {}

    def handle(self, event: Event, now: float) -> Effects:
        """Take one event; effects are to be performed in order."""
        if self._validate:
            self._story.append(f"{now:.3f} {event!r}")
        if type(event) is Received:
            self._messages[type(event.message)](event, event.message, now)
        elif type(event) is FromNode:
            self._node_messages[type(event.message)](event, event.message, now)
        else:
            self._events[type(event)](event, now)
        if self._validate:
            self.check_invariants()
        return self.take_effects()

    def take_effects(self) -> Effects:
        """Effects of methods called outside `handle`, which only queries that must act do."""
        out, self._out = self._out, []
        return out

    def takes(self, event: Event) -> bool:
        """Whether this machine has a handler for such an event."""
        if type(event) is Received:
            return type(event.message) in self._messages
        if type(event) is FromNode:
            return type(event.message) in self._node_messages
        return type(event) in self._events

    def next_deadline(self) -> float | None:
        """When `Tick` should come next, at the latest; None if nothing waits for time to pass."""
        return None

    def check_invariants(self) -> None:
        """Raise `InvariantViolation` if the state contradicts itself. Run after each event in tests."""

    def _emit(self, effect: Effect | Event) -> None:
        self._out.append(effect)

    def _require(self, condition: object, text: str) -> None:
        if not condition:
            story = "\n  ".join(self._story)
            msg = f"{type(self).__name__}: {text}. The last events:\n  {story}"
            raise InvariantViolation(msg)


class Deadlines(Generic[K]):
    """One deadline per key; setting a key again replaces it. Cost O(log n) each."""

    def __init__(self) -> None:
        self._at: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._serial = 0

    def set(self, key: K, at: float) -> None:
        # The serial number makes equal times fire in the order in which they were set, and spares
        # keys from being comparable.
        self._serial += 1
        self._at[key] = (at, self._serial)
        heapq.heappush(self._heap, (at, self._serial, key))
        if len(self._heap) > 2 * len(self._at) + 64:  # stale entries are dropped before they pile up
            self._heap = [(when, serial, k) for k, (when, serial) in self._at.items()]
            heapq.heapify(self._heap)

    def clear(self, key: K) -> None:
        self._at.pop(key, None)

    def __contains__(self, key: K) -> bool:
        return key in self._at

    def get(self, key: K) -> float | None:
        return self._at[key][0] if key in self._at else None

    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap:
            at, serial, key = self._heap[0]
            if self._at.get(key) == (at, serial):
                return at
            heapq.heappop(self._heap)
        return None

    def due(self, now: float) -> list[K]:
        """Keys whose deadline has passed, earliest first; they are cleared."""
        keys: list[K] = []
        while (at := self.next()) is not None and at <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at[key]
            keys.append(key)
        return keys


def earliest(*deadlines: float | None) -> float | None:
    """The smallest deadline that is set."""
    set_ones = [deadline for deadline in deadlines if deadline is not None]
    return min(set_ones) if set_ones else None
