"""What it means for a task or an actor to be in a placement group: which group, which bundle, and what it holds there.

A demand in a group is one for the resources that the group's bundles offer, under names of their own
(`ray._bundle_names`). It is rewritten once for each remote function and its options. Children of what runs in a group
that captures them are in the group too, unless they say otherwise.

Invariant: in a worker, `session.current_group` is that of the task that it runs, or of the actor that it is.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ray import _bundle_names as names
from ray._runtime import session
from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray._runtime.ids import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

__all__ = ["Home", "check_index", "create", "home_of", "make_id", "selector", "statistics_of", "to_wire"]


class Home(NamedTuple):
    """Where in a group something runs. `captures`: what it submits runs in the group, too."""

    group: PlacementGroup
    bundle: int
    captures: bool

    def rewritten(self, demand: dict[str, int]) -> dict[str, int]:
        """A demand as one for what the bundle offers."""
        return names.rewritten(demand, self.group.id.hex(), self.bundle)

    def strategy(self) -> bytes:
        """What the node is told about where it runs."""
        import msgspec

        return msgspec.msgpack.encode(["group", self.group.id.binary(), self.bundle, self.group._name])

    def meta(self) -> tuple[PlacementGroup, bool]:
        """What the worker has to know."""
        return self.group, self.captures

    def check(self, what: str, *demands: dict[str, int]) -> None:
        """Raises ValueError if the bundle, or every bundle, is too small for one of the demands."""
        specs = self.group.bundle_specs
        check_index(self.group, self.bundle)
        bundles = [to_wire(spec, "bundles") for spec in (specs if self.bundle == names.ANY else [specs[self.bundle]])]
        for demand in demands:
            if any(all(units <= bundle.get(name, 0) for name, units in demand.items()) for bundle in bundles):
                continue
            message = f"{what} does not fit into {self._described()}: it {_describe_lack(demand, bundles)}"
            raise ValueError(message)

    def _described(self) -> str:
        return f"bundle {self.bundle} of {self.group}" if self.bundle != names.ANY else f"any bundle of {self.group}"


def _describe_lack(demand: dict[str, int], bundles: list[dict[str, int]]) -> str:
    """What a demand needs and no bundle has, in words."""
    from ray._runtime.options import from_fixed

    for name, units in demand.items():
        most = max(bundle.get(name, 0) for bundle in bundles)
        if units > most:
            has = f"{name}: {from_fixed(most):g}" if most else "none"
            largest = "it" if len(bundles) == 1 else "the largest bundle"
            return f"needs {name}: {from_fixed(units):g}, {largest} has {has}. Ask for less, or for larger bundles"
    asked = ", ".join(f"{name}: {from_fixed(units):g}" for name, units in demand.items())
    return f"needs {asked}, and no bundle has all of it. Ask for less, or for larger bundles"


def check_index(group: PlacementGroup, index: int) -> None:
    """Raises ValueError if a group has no bundle of this index."""
    count = group.bundle_count
    if not -1 <= index < count:
        message = (
            f"{group} has no bundle {index}: it has {count}, with indexes from 0 to {count - 1}; -1 stands for any"
        )
        raise ValueError(message)


def home_of(options: Mapping[str, Any]) -> Home | None:
    """The group that options ask for, or the one of the task that runs here, if that captures its children.

    Raises:
        TypeError: If what is given as a group is none.
        ValueError: If the options contradict each other.
    """
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = options.get("scheduling_strategy")
    group = options.get("placement_group", "default")
    index = options.get("placement_group_bundle_index")
    captures = options.get("placement_group_capture_child_tasks")
    if isinstance(strategy, PlacementGroupSchedulingStrategy):
        if group != "default":
            message = "say the placement group once: as 'scheduling_strategy', or as 'placement_group', but not as both"
            raise ValueError(message)
        group = strategy.placement_group
        index = strategy.placement_group_bundle_index
        captures = strategy.placement_group_capture_child_tasks
    elif strategy is not None:
        if group not in (None, "default"):
            message = (
                "options 'placement_group' and 'scheduling_strategy' contradict each other: what is in a group runs "
                "where its bundles are. Leave one of them out."
            )
            raise ValueError(message)
        group = None
    inherited = session.current_group
    if captures is None:
        captures = inherited is not None and inherited[1]
    if isinstance(group, str):  # "default"
        group = inherited[0] if captures and inherited is not None else None
    if group is None or (isinstance(group, PlacementGroup) and group.is_empty):
        if index not in (None, -1):
            message = f"option 'placement_group_bundle_index' is {index!r}, but there is no placement group"
            raise ValueError(message)
        return None
    if not isinstance(group, PlacementGroup):
        message = f"option 'placement_group' must be a PlacementGroup, \"default\" or None, not {kind_of(group)}"
        raise TypeError(message)
    return Home(group, -1 if index is None else index, bool(captures))


# --- creation --------------------------------------------------------------------------------------------------------

_numbers: dict[int, itertools.count[int]] = {}
_order = threading.Lock()  # the numbers of groups must be told in order


def create(bundles: list[dict[str, int]], name: str, **fields: Any) -> PlacementGroupID:
    """Tells the cluster of a new group. Only where it has a name that may be taken the answer is waited for.

    Raises:
        RaySystemError: If the name is taken.
    """
    import msgspec

    from ray._runtime import context
    from ray.exceptions import RaySystemError

    core = session.ensure()
    session.load_job()
    actor = b"" if context.actor is None else context.actor.id
    with _order:
        group = make_id(core.proc)
        fields |= {"group": group.binary(), "name": name, "namespace": session.namespace, "bundles": bundles}
        fields["actor"] = actor
        if not name:
            core.tell("group.create", msgspec.msgpack.encode(fields))
            return group
        try:
            session.request("group.create", **fields)
        except ValueError as error:
            raise RaySystemError(str(error)) from None
    return group


def make_id(proc: int) -> PlacementGroupID:
    """A new id: the process that creates the group, its number there, and the job."""
    from ray._runtime.ids import JobID, PlacementGroupID

    number = next(_numbers.setdefault(proc, itertools.count(1)))
    job = JobID.from_int(session.job_number).binary()
    return PlacementGroupID(proc.to_bytes(8, "big") + number.to_bytes(6, "big") + job)


def to_wire(bundle: Mapping[str, Any], what: str) -> dict[str, int]:
    """A bundle in units of 1/10000, without what it has none of.

    Raises:
        TypeError, ValueError: If a name is no string, or an amount no number that a resource can have.
    """
    from ray._runtime.options import UNIT, check_text, to_fixed

    found: dict[str, int] = {}
    for name, amount in bundle.items():
        if not isinstance(name, str):
            message = f"{what} has the key {name!r}; resource names are strings"
            raise TypeError(message)
        check_text(what, name)
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            message = f"{what} asks for {amount!r} of {name!r}, which is not a number"
            raise TypeError(message)
        units = to_fixed(f"{what}[{name!r}]", amount)
        if name == "GPU" and units > UNIT and units % UNIT:
            message = f"{what} asks for {amount} of 'GPU'; above one device only whole numbers can be had"
            raise ValueError(message)
        if units:
            found[name] = units
    return found


def selector(labels: Mapping[str, str], what: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Labels that a node must have, as the node's strategies know them: an operator and values, by label.

    A value is one that the label must have ("a"), must not have ("!a"), or several of these ("in(a,b)", "!in(a,b)").

    Raises:
        TypeError: If `labels` is no dictionary of strings.
        ValueError: If a value is none of these forms.
    """
    if not isinstance(labels, dict):
        message = f"{what} must be a dictionary of labels, not {kind_of(labels)}"
        raise TypeError(message)
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for label, value in labels.items():
        if not isinstance(label, str) or not isinstance(value, str):
            message = f"{what} has {label!r}: {value!r}; labels and their values are strings"
            raise TypeError(message)
        negated = value.startswith("!")
        text = value[1:] if negated else value
        values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
        values = [each.strip() for each in values]
        if not label or any(not each or not set(each).isdisjoint("!(), ") for each in values):
            message = f"{what} has {label!r}: {value!r}, which is none of 'a', '!a', 'in(a,b)' and '!in(a,b)'"
            raise ValueError(message)
        found[label] = ("not in" if negated else "in", tuple(values))
    return found


_PROGRESS = {"CREATED": "FINISHED", "REMOVED": "REMOVED"}


def statistics_of(entry: dict[str, Any]) -> dict[str, Any]:
    """How the placing of a group went, under Ray's names, of what the control service says about it."""
    return {
        "end_to_end_creation_latency_ms": round(entry["created_s"] * 1e3, 3),
        "scheduling_latency_ms": round(entry["placing_s"] * 1e3, 3),
        "scheduling_attempt": entry["attempts"],
        "highest_retry_delay_ms": 0.0,
        "scheduling_state": "INFEASIBLE" if entry["infeasible"] else _PROGRESS.get(entry["state"], "QUEUED"),
    }
