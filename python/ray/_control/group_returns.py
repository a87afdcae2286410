"""What nodes are known to hold of placement groups, and have not said again since they came back.

A node that comes back, to its head or to the next one, says what it has set aside (`BundlesHeld`) and then that this
was all (`Announced`). Between these its word is compared with what was known: owns what is still awaited of each node.
Does not know groups beyond their ids, and decides nothing.

Invariants: what is awaited of a node is confirmed once or comes out of `settle`; a node that is lost is not awaited.
"""

from __future__ import annotations


class AwaitedBundles:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._awaited: dict[int, dict[tuple[bytes, int], list[int]]] = {}
        """Indexes of bundles, by node, group and attempt."""

    def expect(self, node: int, group: bytes, attempt: int, index: int) -> None:
        """A bundle was committed there."""
        self._awaited.setdefault(node, {}).setdefault((group, attempt), []).append(index)

    def confirm(self, node: int, group: bytes, attempt: int) -> list[int]:
        """The node holds what this attempt has set aside; which bundles of it are awaited. None of them if it should
        not.
        """
        return self._awaited.get(node, {}).pop((group, attempt), [])

    def settle(self, node: int) -> list[tuple[bytes, list[int]]]:
        """The node has said all: what it does not hold any more, by group."""
        return [(group, indexes) for (group, _), indexes in self._awaited.pop(node, {}).items()]

    def forget(self, node: int) -> None:
        """The node is lost."""
        self._awaited.pop(node, None)

    def forget_all(self) -> None:
        """Nobody is waited for any more."""
        self._awaited.clear()
