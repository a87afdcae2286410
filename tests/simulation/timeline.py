"""Virtual time, and links whose two directions are queues, first in first out, with seeded delays.

Invariants: time never goes back; what is due at the same moment happens in the order in which it was planned, so that
a seed gives one history.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from ray._control.machine import Event

STORY_EVENTS = 60
"""Last things that happened, kept for the text of a failure."""

SILENCE_S = 9.0
"""A connection that is cut for so long counts as broken on both sides, as keep-alives find out."""


class Timeline:
    """What happens when."""

    def __init__(self) -> None:
        self.now = 100.0
        self.steps = 0
        self.story: deque[str] = deque(maxlen=STORY_EVENTS)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = 0

    def at(self, when: float, action: Callable[..., None], *arguments: object) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (max(when, self.now), self._serial, action, arguments))

    def after(self, seconds: float, action: Callable[..., None], *arguments: object) -> None:
        self.at(self.now + seconds, action, *arguments)

    def step(self) -> None:
        """The next thing happens. There always is one: nodes are asked whether they live, for ever."""
        self.now, _, action, arguments = heapq.heappop(self._heap)
        self.steps += 1
        action(*arguments)

    def next_at(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")

    def note(self, text: str) -> None:
        self.story.append(f"{self.now:10.4f} {text}")


class End(Protocol):
    """A node process, as a link knows it."""

    key: int

    def feed(self, event: Event) -> None: ...
    def link_left(self, link: Link, reason: str, *, ended: bool) -> None: ...


class Link:
    """One connection between a node and a head.

    It ends in one of three ways. `close`: one side ends it, and the other hears so behind everything that was sent.
    `reset`: both sides find it broken, at different times; what is on its way may be lost, a last part of it. `cut`:
    nothing arrives, until it heals, or both sides have waited `SILENCE_S`.
    """

    def __init__(self, timeline: Timeline, random: Random, delay_s: float, node: End, head: End) -> None:
        self.node, self.head = node, head
        self._timeline, self._random, self._delay_s = timeline, random, delay_s
        self._last = {node.key: timeline.now, head.key: timeline.now}
        """When the last thing arrives that is on its way to each."""
        self._open = {node.key: True, head.key: True}
        self._held: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._cuts = 0
        self.cut = False

    def other(self, end: End) -> End:
        return self.head if end is self.node else self.node

    def send(self, sender: End, event: Event) -> None:
        if self._open[sender.key]:
            to = self.other(sender)
            self._plan(to, self._arrive, to, event)

    def close(self, end: End) -> None:
        """One side has ended it."""
        if self._open[end.key]:
            self._open[end.key] = False
            to = self.other(end)
            self._plan(to, self._left, to, "the peer closed it", True)

    def leave(self, end: End, reason: str, *, ended: bool) -> None:
        """One side takes it to be over now."""
        if self._open[end.key]:
            self._open[end.key] = False
            end.link_left(self, reason, ended=ended)

    def reset(self, reason: str) -> None:
        for end in (self.node, self.head):
            self._timeline.after(self._delay(), self._left, end, reason, False)

    def cut_for(self, seconds: float) -> None:
        self._cuts += 1
        self.cut = True
        self._timeline.after(min(seconds, SILENCE_S), self._heal_or_break, self._cuts, seconds)

    def heal(self) -> None:
        self.cut = False
        while self._held and not self.cut:
            action, arguments = self._held.popleft()
            action(*arguments)

    def _heal_or_break(self, cut: int, seconds: float) -> None:
        if cut == self._cuts and self.cut:
            if seconds >= SILENCE_S:
                self._held.clear()
                self.reset("nothing came back for too long")
            else:
                self.heal()

    def _delay(self) -> float:
        return self._delay_s * (0.5 + self._random.random())

    def _plan(self, to: End, action: Callable[..., None], *arguments: object) -> None:
        at = max(self._timeline.now + self._delay(), self._last[to.key])
        self._last[to.key] = at
        self._timeline.at(at, self._happen, action, arguments)

    def _happen(self, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if self.cut or self._held:
            self._held.append((action, arguments))
        else:
            action(*arguments)

    def _arrive(self, to: End, event: Event) -> None:
        if self._open[to.key]:
            to.feed(event)

    def _left(self, end: End, reason: str, ended: bool) -> None:
        self.leave(end, reason, ended=ended)
