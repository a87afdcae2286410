"""Questions of this node's members that are answered when a placement group is created, or after a time of their own.

The control service hears each of them once, and may die before it answers. So the node notes what is asked and what is
answered, and says to the next control service, or to the same one after its link was broken, who still waits.

Owns these questions. Invariant: a question is here from when it was asked until its answer came or its asker ended.
"""

from __future__ import annotations

import msgspec

from ray._control.messages import GroupAwaited

OP = "group.wait"


class Asked(msgspec.Struct, frozen=True):
    """One question: for which group, and until when its asker waits; None for ever."""

    group: bytes
    until: float | None


class GroupQuestions:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._asked: dict[int, dict[int, Asked]] = {}
        """By asker, and by the number of its request."""

    def __len__(self) -> int:
        return sum(len(asked) for asked in self._asked.values())

    def ask(self, proc: int, corr: int, arguments: bytes, now: float) -> None:
        """A member asks. Arguments that are none are for the control service to refuse."""
        try:
            packed = msgspec.msgpack.decode(arguments)
            values = list(packed) if isinstance(packed, list) else [packed.get("group"), packed.get("limit_s")]
            group, limit_s = (*values, None, None)[:2]
            until = None if limit_s is None else now + float(limit_s)
        except (msgspec.MsgspecError, AttributeError, TypeError, ValueError):
            return
        if isinstance(group, bytes):
            self._asked.setdefault(proc, {})[corr] = Asked(group, until)

    def answered(self, proc: int, corr: int) -> None:
        """A member gets an answer, maybe to such a question."""
        asked = self._asked.get(proc)
        if asked is not None and asked.pop(corr, None) is not None and not asked:
            del self._asked[proc]

    def left(self, proc: int) -> None:
        """A member has gone."""
        self._asked.pop(proc, None)

    def announcement(self, now: float) -> list[GroupAwaited]:
        """Who still waits."""
        return [
            GroupAwaited(question.group, proc, corr, None if question.until is None else max(question.until - now, 0.0))
            for proc, asked in self._asked.items()
            for corr, question in asked.items()
        ]
