"""What the head has told other nodes and does not know to be heard.

Owns these messages, in order, and how many were heard before them. When the connection with a node breaks, a last part
of what was said may be lost, and nobody else could say it again: that a lease was returned, a worker granted, a request
answered. A node that greets again says how many messages it has had of this head, and is told the others first.

Only messages of `REPEATED` are counted. The others say how things are, and the control service says them anew to a node
that has come back.

Invariants: a node's messages are those that follow the ones that it has said to have heard; while it is `silent`
nothing is said to it, so that nothing overtakes what is to be repeated.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from ray._control.messages import REPEATED

if TYPE_CHECKING:
    from ray._protocol import Message

UNHEARD_MAX: Final = 100_000
"""Messages that are kept for one node. They are dropped when it answers a question, every two seconds; a node for which
there are more is lost."""


class _Kept(msgspec.Struct):
    messages: deque[Message]
    heard: int = 0
    silent: bool = False


class Unheard:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._nodes: dict[int, _Kept] = {}

    def keep(self, node: int, message: Message) -> bool:
        """A message is for a node. False if it must not be said now: the node has not greeted again."""
        kept = self._nodes.setdefault(node, _Kept(deque()))
        if type(message) in REPEATED:
            kept.messages.append(message)
        return not kept.silent

    def is_full(self, node: int) -> bool:
        """Whether there is more for a node than is kept."""
        return node in self._nodes and len(self._nodes[node].messages) > UNHEARD_MAX

    def lost_connection(self, node: int) -> None:
        """Nothing arrives there, until the node greets again."""
        if node in self._nodes:
            self._nodes[node].silent = True

    def heard(self, node: int, count: int) -> None:
        """The node has had so many messages."""
        kept = self._nodes.get(node)
        if kept is not None:
            for _ in range(min(count - kept.heard, len(kept.messages))):
                kept.messages.popleft()
            kept.heard = max(count, kept.heard)

    def greeted(self, node: int, count: int) -> list[Message]:
        """The node is there again and has had so many messages: these are the others."""
        self.heard(node, count)
        kept = self._nodes.get(node)
        if kept is None:
            return []
        kept.silent = False
        return list(kept.messages)

    def forget(self, node: int) -> None:
        """The node is not part of the cluster any more."""
        self._nodes.pop(node, None)
