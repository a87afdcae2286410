"""Conditions on nodes' labels: what users write, and how it travels in a demand (see `_control.strategy`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_labels", "check_selector", "encode_expressions", "encode_selector"]

Expression = tuple[str, tuple[str, ...]]


def check_labels(labels: Mapping[str, str] | None, caller: str) -> dict[str, str]:
    """The labels of a node.

    Raises:
        TypeError: If they are not texts by name.
        ValueError: If a name is one of Ray's own.
    """
    if labels is None:
        return {}
    if not isinstance(labels, Mapping) or not all(isinstance(x, str) for pair in labels.items() for x in pair):
        message = f"labels of {caller} must be a dictionary of texts, not {labels!r}"
        raise TypeError(message)
    own = [name for name in labels if name == "ray.io/node-id"]
    if own:
        message = f"the label {own[0]!r} is set by Ray itself"
        raise ValueError(message)
    return dict(labels)


def check_selector(name: str, value: Any) -> None:
    """Check the option `label_selector`.

    Raises:
        TypeError, ValueError: If it is no dictionary of labels to conditions.
    """
    if not isinstance(value, Mapping):
        message = f"option {name!r} must be a dictionary of labels to conditions, or None, not {value!r}"
        raise TypeError(message)
    for label, condition in value.items():
        if not isinstance(label, str) or not isinstance(condition, str):
            message = f"option {name!r} has {label!r}: {condition!r}; labels and conditions are strings"
            raise TypeError(message)
        if not label:
            message = f"option {name!r} has a label without a name"
            raise ValueError(message)
        _condition(name, label, condition)


def encode_selector(value: Mapping[str, str] | None) -> bytes:
    """A selector that was checked: b"", or msgpack of ["labels", hard, wished]."""
    if not value:
        return b""
    return _pack({label: _condition("label_selector", label, condition) for label, condition in value.items()}, {})


def encode_expressions(hard: Mapping[str, Any], soft: Mapping[str, Any]) -> bytes:
    """The same for expressions of `ray.util.scheduling_strategies`.

    Raises:
        TypeError: If a condition is none of these.
    """
    return _pack(_expressions(hard), _expressions(soft))


def _pack(hard: dict[str, Expression], wished: dict[str, Expression]) -> bytes:
    import msgspec

    return msgspec.msgpack.encode(["labels", hard, wished])


def _expressions(conditions: Mapping[str, Any]) -> dict[str, Expression]:
    from ray.util import scheduling_strategies as strategies

    found: dict[str, Expression] = {}
    for label, condition in conditions.items():
        match condition:
            case strategies.In():
                found[label] = ("in", tuple(condition.values))
            case strategies.NotIn():
                found[label] = ("not in", tuple(condition.values))
            case strategies.Exists():
                found[label] = ("exists", ())
            case strategies.DoesNotExist():
                found[label] = ("absent", ())
            case _:
                message = (
                    f"the condition on label {label!r} must be In, NotIn, Exists or DoesNotExist, not {condition!r}"
                )
                raise TypeError(message)
    return found


def _condition(option: str, label: str, text: str) -> Expression:
    """Reads "value", "!value", "in(a, b)" or "!in(a, b)"."""
    negated, rest = text.startswith("!"), text.removeprefix("!").strip()
    if rest.startswith("in(") and rest.endswith(")"):
        values = tuple(value.strip() for value in rest[3:-1].split(",") if value.strip())
    else:
        values = (rest,) if rest and not set("(),") & set(rest) else ()
    if not values:
        message = f"option {option!r} has {label!r}: {text!r}; conditions are 'a', '!a', 'in(a, b)' and '!in(a, b)'"
        raise ValueError(message)
    return ("not in" if negated else "in"), values
