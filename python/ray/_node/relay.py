"""What nodes say to each other by way of the head arrives at most once.

A node that has lost its head repeats to the next one what was maybe not heard (`membership`). The one before may have
passed it on the moment it died; and twice is worse than late: a lease would seem to be granted again after it was given
back, and memory would be freed that is in use again. So a node numbers what it has passed on, and who receives it
leaves out what it has had. Links and heads keep the order of messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray._control.messages import Deliver, FromMember, ToMember, ToOtherNode

if TYPE_CHECKING:
    from collections.abc import Iterable


class Relay:
    """See the module's docstring. Remembers one number for each node that has said something."""

    def __init__(self) -> None:
        self._said = 0
        self._had: dict[int, int] = {}

    def to_member(self, proc: int, kind: int, corr: int, body: bytes) -> ToMember:
        """A frame for a member of another node."""
        self._said += 1
        return ToMember(proc, kind, corr, body, self._said)

    def to_node(self, node: int, proc: int, kind: int, corr: int, body: bytes) -> ToOtherNode:
        """What a member says to the manager of another node."""
        self._said += 1
        return ToOtherNode(node, proc, kind, corr, body, self._said)

    def is_repeated(self, message: Deliver | FromMember) -> bool:
        """Whether this was received before; to be asked once for each that arrives."""
        if not message.serial:
            return False  # the control service's own words
        if message.serial <= self._had.get(message.source, 0):
            return True
        self._had[message.source] = message.serial
        return False

    def forget(self, nodes: Iterable[int]) -> None:
        """These nodes are lost, and say nothing more."""
        for node in nodes:
            self._had.pop(node, None)
