"""Messages for those who may be coming back, after a restart of the head: kept until it is known who is there.

Owns nothing but these messages. Each is kept for one process or node, and comes out once, in the order in which they
went in among those who come back together.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray._control.machine import FromNode

HELD_MAX: Final = 100_000
"""Messages beyond it are taken as if nobody was coming back: as those for processes that are not known."""


class Held:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._held: dict[int, list[tuple[int, FromNode]]] = {}
        self._from: Counter[int] = Counter()
        self._serial = self._released = 0

    def __len__(self) -> int:
        return self._serial - self._released

    def has_from(self, node: int) -> bool:
        """Whether anything is kept that this node has said."""
        return self._from[node] > 0

    def hold(self, whom: int, event: FromNode) -> bool:
        """Keep it until `release` is told of this process or node. False if there is no room."""
        if self._serial - self._released >= HELD_MAX:
            return False
        self._serial += 1
        self._from[event.node] += 1
        self._held.setdefault(whom, []).append((self._serial, event))
        return True

    def release(self, whom: Iterable[int]) -> list[FromNode]:
        """What was kept for these, in order."""
        found = [entry for key in whom for entry in self._held.pop(key, ())]
        self._released += len(found)
        self._from.subtract(event.node for _, event in found)
        return [event for _, event in sorted(found, key=lambda entry: entry[0])]

    def release_all(self) -> list[FromNode]:
        """Everything that was kept, in order."""
        return self.release(list(self._held))
