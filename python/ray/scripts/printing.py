"""Rows as text: tables for people, JSON and YAML for programs. Without input or output.

YAML is written here because its subset of lists, mappings and JSON's scalars is small, and a library for it is not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CELL_CHARS_MAX", "as_document", "as_json", "as_table", "as_yaml"]

CELL_CHARS_MAX = 80  # of a cell in a table; the whole is in the other formats


def as_document(value: Any, form: str) -> str:
    """For programs: in the form "json" or "yaml"."""
    return as_json(value) if form == "json" else as_yaml(value)


def as_json(value: Any) -> str:
    """Indented JSON. What JSON has no word for is written as text."""
    return json.dumps(value, indent=4, default=str)


def as_yaml(value: Any) -> str:
    """A YAML document with the same content as `as_json`."""
    return "---\n" + "\n".join(_block(json.loads(json.dumps(value, default=str)))) + "\n..."


def _block(value: Any) -> list[str]:
    match value:
        case dict() if value:
            lines = []
            for key, item in value.items():
                lines += _entry(f"{_scalar(key)}:", item)
            return lines
        case list() if value:
            lines = []
            for item in value:
                inner = _block(item)
                lines += [f"- {inner[0]}", *[f"  {line}" for line in inner[1:]]]
            return lines
        case _:
            return [_scalar(value)]


def _entry(key: str, item: Any) -> list[str]:
    inner = _block(item)
    if isinstance(item, dict | list) and item:
        return [key, *[f"  {line}" for line in inner]]
    return [f"{key} {inner[0]}"]


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "none", "nan", "inf"))


def _scalar(value: Any) -> str:
    if isinstance(value, str) and value and value.lower() not in _WORDS and set(value) <= _PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)


def as_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows below the names of columns; columns in which nothing stands are left out, and long cells cut."""
    shown = [name for name in columns if any(row.get(name) not in (None, "", {}, []) for row in rows)]
    shown = shown or list(columns[:1])
    lines = [[name.upper() for name in shown]]
    lines += [[_cell(row.get(name)) for name in shown] for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(shown))]
    texts = ("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(text.rstrip() for text in texts)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case dict():
            text = ", ".join(f"{key}: {_cell(item)}" for key, item in value.items())
        case float():
            text = f"{value:g}"
        case _:
            text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= CELL_CHARS_MAX else text[: CELL_CHARS_MAX - 3] + "..."
