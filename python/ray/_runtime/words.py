"""Words for messages."""

from __future__ import annotations

__all__ = ["a", "kind_of"]


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[:1].lower() in "aeiou" and noun[:1] else f"a {noun}"


def kind_of(value: object) -> str:
    """What a value is: its class's name with an article, or None."""
    return "None" if value is None else a(type(value).__name__)
