"""Scheduling strategies as they travel in demands, and which nodes they allow.

The bytes are made by `_runtime.options.encode_strategy`: empty for the default, else a msgpack array whose first
element is the kind. Bytes that are none of these come from a core of another version and count as the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from ray._control.node_records import Node

DEFAULT: Final = "default"
SPREAD: Final = "spread"
NODE: Final = "node"
LABELS: Final = "labels"
GROUP: Final = "group"


class Strategy(msgspec.Struct, frozen=True):
    """What one demand says about where it runs.

    `node` and `soft` belong to affinity, `hard` and `wished` to labels (expressions by label: an operator, one of
    in, not in, exists and absent, and values), `group`, `bundle` (-1: any) and `name` to placement groups.
    """

    kind: str = DEFAULT
    node: int = 0
    soft: bool = False
    hard: dict[str, tuple[str, tuple[str, ...]]] = {}
    wished: dict[str, tuple[str, tuple[str, ...]]] = {}
    group: bytes = b""
    bundle: int = -1
    name: str = ""

    @property
    def is_local_first(self) -> bool:
        """Whether the owner's own node may decide alone, without a view of the others."""
        return self.kind == DEFAULT

    def allows(self, node: Node) -> bool:
        """Whether the demand may run there at all. (A placement group's bundles are resources with names.)"""
        if self.kind == NODE:
            return self.soft or node.key == self.node
        return all(matches(node.labels.get(name), *test) for name, test in self.hard.items())

    def wishes(self, node: Node) -> bool:
        """Whether the node has all that would be liked."""
        if self.kind == NODE:
            return node.key == self.node
        return all(matches(node.labels.get(name), *test) for name, test in self.wished.items())

    def __str__(self) -> str:
        if self.kind == NODE:
            return f"node {self.node:016x}"
        if self.kind == GROUP:
            group = f"placement group {self.name or self.group.hex()}"
            return group if self.bundle < 0 else f"bundle {self.bundle} of {group}"
        parts = [_show(name, *test) for name, test in self.hard.items()]
        return f"nodes with {' and '.join(parts)}" if parts else "any node"


def parse(packed: bytes) -> Strategy:
    """The strategy in a demand."""
    if not packed:
        return _DEFAULT
    known = _parsed.get(packed)
    if known is None:
        if len(_parsed) >= _PARSED_MAX:
            _parsed.clear()
        known = _parsed[packed] = _parse(packed)
    return known


_DEFAULT: Final = Strategy()
_PARSED_MAX: Final = 10_000
"""Strategies that are remembered; then all are read anew, which costs a few microseconds each."""
_parsed: dict[bytes, Strategy] = {}


def _parse(packed: bytes) -> Strategy:
    try:
        fields: list[Any] = msgspec.msgpack.decode(packed, type=list[Any])
        match fields:
            case [kind] if kind == SPREAD:
                return Strategy(SPREAD)
            case [kind, node, soft] if kind == NODE:
                return Strategy(NODE, node=int(node), soft=bool(soft))
            case [kind, hard, wished] if kind == LABELS:
                return Strategy(LABELS, hard=_expressions(hard), wished=_expressions(wished))
            case [kind, group, bundle, name] if kind == GROUP:
                return Strategy(GROUP, group=bytes(group), bundle=int(bundle), name=str(name))
    except (msgspec.MsgspecError, TypeError, ValueError):
        pass
    return _DEFAULT


def _expressions(packed: object) -> dict[str, tuple[str, tuple[str, ...]]]:
    return msgspec.convert(packed, dict[str, tuple[str, tuple[str, ...]]])


def matches(value: str | None, operator: str, values: tuple[str, ...]) -> bool:
    match operator:
        case "in":
            return value in values
        case "not in":
            return value not in values
        case "exists":
            return value is not None
        case _:
            return value is None


def _show(name: str, operator: str, values: tuple[str, ...]) -> str:
    match operator:
        case "in":
            return f"{name} = {' or '.join(values)}"
        case "not in":
            return f"{name} other than {', '.join(values)}"
        case "exists":
            return f"the label {name}"
        case _:
            return f"no label {name}"
