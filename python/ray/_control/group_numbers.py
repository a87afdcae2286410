"""Which placement groups are still to come: a handle can be faster than the creation.

A group's id says which process creates it, and that numbers its groups in the order in which it says so. Owns the last
number that was heard of each process. Does not know groups themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class GroupNumbers:
    """See the module's docstring.

    Args:
        is_connected: Whether a process is a member.
    """

    def __init__(self, is_connected: Callable[[int], bool]) -> None:
        self._is_connected = is_connected
        self._last: dict[int, int] = {}

    def note(self, group: bytes) -> None:
        """The group was created."""
        creator, number = _parts(group)
        self._last[creator] = max(number, self._last.get(creator, 0))

    def are_to_come(self, group: bytes, *, returning: bool) -> bool:
        """Whether its creation may be on its way. While nodes are `returning`, creators may be that are not known."""
        creator, number = _parts(group)
        return (returning or self._is_connected(creator)) and number > self._last.get(creator, 0)

    def forget(self, creator: int) -> None:
        """The process has ended."""
        self._last.pop(creator, None)

    def forget_gone(self) -> None:
        """The same for all that are not connected."""
        for creator in [creator for creator in self._last if not self._is_connected(creator)]:
            del self._last[creator]


def creator_of(group: bytes) -> int:
    """The process that creates, or has created, a group."""
    return _parts(group)[0]


def _parts(group: bytes) -> tuple[int, int]:
    return int.from_bytes(group[:8], "big"), int.from_bytes(group[8:14], "big")
