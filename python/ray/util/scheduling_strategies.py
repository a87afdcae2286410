"""Where tasks and actors should run: values for the option `scheduling_strategy`."""

from __future__ import annotations

from typing import Any, TypeAlias

__all__ = [
    "DoesNotExist",
    "Exists",
    "In",
    "LabelMatchExpressionsT",
    "NodeAffinitySchedulingStrategy",
    "NodeLabelSchedulingStrategy",
    "NotIn",
    "PlacementGroupSchedulingStrategy",
    "SchedulingStrategyT",
]


class PlacementGroupSchedulingStrategy:
    """Runs in a bundle of a placement group.

    Attributes:
        placement_group: The group.
        placement_group_bundle_index: Which bundle; -1 for any.
        placement_group_capture_child_tasks: Whether what it submits runs in the group too.
    """

    def __init__(
        self,
        placement_group: Any,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks


class NodeAffinitySchedulingStrategy:
    """Runs on one node.

    Attributes:
        node_id: The node's id in hex.
        soft: Whether another node will do when that one is gone or cannot ever run it.
    """

    def __init__(
        self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False
    ) -> None:
        from ray._runtime.ids import NodeID

        NodeID.from_hex(node_id)  # raises ValueError for anything else
        self.node_id = node_id
        self.soft = soft
        self._spill_on_unavailable = _spill_on_unavailable
        self._fail_on_unavailable = _fail_on_unavailable


class _Labels:
    def __init__(self, values: tuple[Any, ...]) -> None:
        for value in values:
            if not isinstance(value, str):
                message = f"label values are strings, not {type(value).__name__}: {value!r}"
                raise ValueError(message)
        self.values = list(values)


class In(_Labels):
    """The label has one of these values."""

    def __init__(self, *values: str) -> None:
        super().__init__(values)


class NotIn(_Labels):
    """The label has none of these values."""

    def __init__(self, *values: str) -> None:
        super().__init__(values)


class Exists:
    """The node has the label."""


class DoesNotExist:
    """The node does not have the label."""


LabelMatchExpressionsT: TypeAlias = "dict[str, In | NotIn | Exists | DoesNotExist]"


class NodeLabelSchedulingStrategy:
    """Runs on a node whose labels match.

    Attributes:
        hard: What must match.
        soft: What should match.
    """

    def __init__(self, hard: LabelMatchExpressionsT, *, soft: LabelMatchExpressionsT | None = None) -> None:
        if not hard and not soft:
            message = "NodeLabelSchedulingStrategy needs `hard` or `soft`"
            raise ValueError(message)
        self.hard = hard
        self.soft = soft or {}


SchedulingStrategyT: TypeAlias = (
    "str | PlacementGroupSchedulingStrategy | NodeAffinitySchedulingStrategy | NodeLabelSchedulingStrategy | None"
)
