"""`ray.Language`: which languages Ray knows. Skate runs the first."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

__all__ = ["Language"]


@functools.total_ordering
class Language:
    """A language of remote functions."""

    PYTHON: ClassVar[Language]
    JAVA: ClassVar[Language]
    CPP: ClassVar[Language]

    def __init__(self, value: int, name: str) -> None:
        self._value = value
        self._name = name

    def value(self) -> int:
        """Its number."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Language) and self._value == other._value

    def __lt__(self, other: Language) -> bool:
        return self._value < other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return self._name

    def __reduce__(self) -> tuple[Any, ...]:
        return Language, (self._value, self._name)


Language.PYTHON = Language(0, "PYTHON")
Language.JAVA = Language(1, "JAVA")
Language.CPP = Language(2, "CPP")
