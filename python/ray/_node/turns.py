"""Whose turn it is to gather values, when there is not room for what all gather at once.

A task's arguments are read one after the other, and each copy stays until all are there. Tasks that fit only one after
the other would so wait for each other for ever, each with a part of what it needs; and so would a task that has a
result to store, and those whose arguments fill the store. `segments` notices (`RoomStalled`). Then all but the one that
began first let go of what they have gathered (`DENIED_TURN`), and what they ask for again is *parked* here, until those
who gather have all that they wait for, or `TURN_S_MAX` has passed; then the next one has its turn.

Owns who waits for a turn, in order, and what they have asked for meanwhile. Which copies there are is `pulls`' to know.

Invariants: a member waits for at most one turn; a question is parked once, and answered when the member's turn comes
unless it is withdrawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ray._protocol import Pull

TURN_S: Final = 0.02
"""How long nothing must be missing to those who gather before the next one begins: a task asks for one argument after
the other."""

TURN_S_MAX: Final = 1.0
"""How long those who gather may take before the next one begins in any case."""


class Turns:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._parked: dict[int, dict[int, Pull]] = {}
        """By member, in order; questions by their corr."""

    def __contains__(self, member: int) -> bool:
        return member in self._parked

    def __len__(self) -> int:
        return len(self._parked)

    def wait(self, member: int) -> None:
        """The member has its next turn after all who wait already."""
        self._parked.setdefault(member, {})

    def park(self, member: int, corr: int, question: Pull) -> None:
        self._parked[member][corr] = question

    def withdraw(self, member: int, name: bytes) -> None:
        """The member does not want the object any more."""
        questions = self._parked.get(member, {})
        for corr in [corr for corr, question in questions.items() if question.object == name]:
            del questions[corr]

    def leave(self, member: int) -> None:
        self._parked.pop(member, None)

    def take_next(self) -> tuple[int, dict[int, Pull]]:
        """Whose turn it is now, and what it has asked for."""
        member = next(iter(self._parked))
        return member, self._parked.pop(member)
