"""Options of tasks, actors and methods: what exists, what is valid, and what it means to the scheduler.

Checked where the user writes them, so that an error names the option and the line. Demands are fixed-point numbers in
units of 1/10000 of a resource, which is also the smallest amount that can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from ray._runtime.groups import Home
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

__all__ = [
    "ACTOR",
    "METHOD",
    "TASK",
    "ActorDemand",
    "check",
    "check_text",
    "demand_of_actor",
    "demand_of_task",
    "home_of",
    "shown",
]

UNIT = 10_000  # fixed-point units of one CPU, one GPU, one byte

STREAMING = -1
DYNAMIC = -2

AMOUNT_MAX = (2**63 - 1) // UNIT  # of one resource; amounts are counted in 64 bits, and no machine has as much
COUNT_MAX = 2**31 - 1  # of retries, restarts, concurrent calls
RETURNS_MAX = 100_000  # results of one call, each with an entry in its owner; streams have no limit

DEFAULT_MAX_RETRIES = 3
ASYNC_MAX_CONCURRENCY = 1000

Check = Callable[[str, Any], None]


# --- checks of single options --------------------------------------------------------------------------------------


def _type_error(name: str, wanted: str, value: Any) -> TypeError:
    return TypeError(f"option {name!r} must be {wanted}, but {shown(value)} is {kind_of(value)}")


def shown(value: Any) -> str:
    """Its repr, for messages."""
    try:
        return repr(value)
    except ValueError:  # Python prints no number of thousands of digits
        return f"a number of {value.bit_length()} bits"


def check_text(name: str, value: str) -> None:
    """Raises ValueError when a string cannot be sent as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"{name!r} cannot be {value!r}: it has half of a surrogate pair at {error.start}, which is no text"
        raise ValueError(message) from None


def _quantity(name: str, value: Any) -> None:
    if not isinstance(value, int | float):
        raise _type_error(name, "a number or None", value)
    to_fixed(name, value)


def _integer(least: int, meaning: str, allowed_negative: int | None = None) -> Check:
    def check_integer(name: str, value: Any) -> None:
        if not isinstance(value, int):
            raise _type_error(name, f"{meaning} or None", value)
        if value < least and value != allowed_negative:
            message = f"option {name!r} must be {meaning}, not {shown(value)}"
            raise ValueError(message)
        if value > COUNT_MAX:
            message = f"option {name!r} must be {COUNT_MAX} at most, not {shown(value)}"
            raise ValueError(message)

    return check_integer


def _string(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _type_error(name, "a string or None", value)
    if not value:
        message = f"option {name!r} cannot be an empty string"
        raise ValueError(message)
    check_text(name, value)


def _labels(name: str, value: Any) -> None:
    """Ray keeps them for its own lists of tasks; nothing reads them here."""
    if not isinstance(value, dict):
        raise _type_error(name, "a dictionary or None", value)


def _label_selector(name: str, value: Any) -> None:
    from ray._runtime import labels

    labels.check_selector(name, value)


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _type_error(name, "True, False or None", value)


def _resources(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _type_error(name, "a dictionary of resource names to amounts, or None", value)
    for key, amount in value.items():
        if not isinstance(key, str):
            message = f"option {name!r} has the key {key!r}; resource names are strings"
            raise TypeError(message)
        if not key:
            message = f"option {name!r} has an empty string as a key; resources have names"
            raise ValueError(message)
        check_text(name, key)
        option = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}.get(key)
        if option is not None:
            message = f"option {name!r} cannot hold {key!r}; use the option {option!r}"
            raise ValueError(message)
        if not isinstance(amount, int | float):
            message = f"option {name!r} asks for {amount!r} of {key!r}, which is not a number"
            raise TypeError(message)
        to_fixed(f"{name}[{key!r}]", amount)


def _num_returns(name: str, value: Any) -> None:
    if value in ("streaming", "dynamic"):
        return
    if not isinstance(value, int | str):
        raise _type_error(name, "a number, 'streaming', 'dynamic' or None", value)
    if isinstance(value, str) or not 0 <= value <= RETURNS_MAX:
        message = (
            f"option {name!r} must be from 0 to {RETURNS_MAX}, 'streaming' or 'dynamic', not {shown(value)}. "
            "Left out, it is 1, and 'streaming' for generators."
        )
        raise ValueError(message)


def _retry_exceptions(name: str, value: Any) -> None:
    if isinstance(value, bool):
        return
    if not isinstance(value, list | tuple):
        raise _type_error(name, "True, False, or a list of exception classes", value)
    for item in value:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            message = f"option {name!r} holds {item!r}, which is not an exception class"
            raise ValueError(message)


def _lifetime(name: str, value: Any) -> None:
    if value not in ("detached", "non_detached"):
        message = f"option {name!r} must be 'detached', 'non_detached' or None, not {value!r}"
        raise ValueError(message)


def _concurrency_groups(name: str, value: Any) -> None:
    groups_of(name, value)


def _max_pending_calls(name: str, value: Any) -> None:
    _integer(1, "a positive number, or -1 for no limit", -1)(name, value)


def _strategy(name: str, value: Any) -> None:
    encode_strategy(name, value)


def _runtime_env(name: str, value: Any) -> None:
    from ray.runtime_env import RuntimeEnv

    if not isinstance(value, dict):
        raise _type_error(name, "a dictionary, a RuntimeEnv or None", value)
    if not isinstance(value, RuntimeEnv):
        RuntimeEnv(**value)


def _placement_group(name: str, value: Any) -> None:
    from ray.util.placement_group import PlacementGroup

    if value != "default" and not isinstance(value, PlacementGroup):
        raise _type_error(name, 'a PlacementGroup, "default" or None', value)


def _bundle_index(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type_error(name, "the index of a bundle, or -1 for any", value)
    if value < -1:
        message = f"option {name!r} must be the index of a bundle, or -1 for any, not {value}"
        raise ValueError(message)


def _absent_option(what: str) -> Check:
    def refuse(name: str, value: Any) -> None:
        if value or not isinstance(value, bool | list | dict):
            _absent(what, name)

    return refuse


def _absent(what: str, name: str) -> None:
    message = f"Skate does not have {what} yet, so option {name!r} cannot be used"
    raise NotImplementedError(message)


_COMMON: dict[str, Check] = {
    "accelerator_type": _string,
    "enable_task_events": _boolean,
    "fallback_strategy": _absent_option("fallback strategies"),
    "label_selector": _label_selector,
    "memory": _quantity,
    "name": _string,
    "num_cpus": _quantity,
    "num_gpus": _quantity,
    "object_store_memory": _quantity,
    "placement_group": _placement_group,
    "placement_group_bundle_index": _bundle_index,
    "placement_group_capture_child_tasks": _boolean,
    "resources": _resources,
    "runtime_env": _runtime_env,
    "scheduling_strategy": _strategy,
    "_labels": _labels,
}

TASK: dict[str, Check] = {
    **_COMMON,
    "max_calls": _integer(0, "0 or more"),
    "max_retries": _integer(0, "0 or more, or -1 for no limit", -1),
    "num_returns": _num_returns,
    "retry_exceptions": _retry_exceptions,
    "_generator_backpressure_num_objects": _integer(1, "a positive number, or -1 for no limit", -1),
}

ACTOR: dict[str, Check] = {
    **_COMMON,
    "allow_out_of_order_execution": _boolean,
    "concurrency_groups": _concurrency_groups,
    "enable_tensor_transport": _absent_option("tensor transports"),
    "get_if_exists": _boolean,
    "lifetime": _lifetime,
    "max_concurrency": _integer(1, "a positive number"),
    "max_pending_calls": _max_pending_calls,
    "max_restarts": _integer(0, "0 or more, or -1 for no limit", -1),
    "max_task_retries": _integer(0, "0 or more, or -1 for no limit", -1),
    "namespace": _string,
}

METHOD: dict[str, Check] = {
    "concurrency_group": _string,
    "enable_task_events": _boolean,
    "max_task_retries": _integer(0, "0 or more, or -1 for no limit", -1),
    "name": _string,
    "num_returns": _num_returns,
    "retry_exceptions": _retry_exceptions,
    "tensor_transport": _absent_option("tensor transports"),
    "_generator_backpressure_num_objects": _integer(1, "a positive number, or -1 for no limit", -1),
}

_NONE_IS_AN_ERROR = frozenset(("enable_task_events", "get_if_exists", "retry_exceptions"))


def check(options: Mapping[str, Any], table: Mapping[str, Check], what: str) -> None:
    """Checks options against one of the tables above.

    Args:
        options: The options as the user wrote them.
        table: `TASK`, `ACTOR` or `METHOD`.
        what: For messages: "remote functions", "actors" or "actor methods".

    Raises:
        ValueError: If an option does not exist, or its value is out of range.
        TypeError: If its value is of the wrong type.
        NotImplementedError: If the option exists in Ray but not here yet.
    """
    for name, value in options.items():
        checker = table.get(name)
        if checker is None:
            valid = sorted(option for option in table if not option.startswith("_"))
            message = f"{name!r} is not an option of {what}. Valid ones are {valid}."
            raise ValueError(message)
        if value is not None:
            checker(name, value)
        elif name in _NONE_IS_AN_ERROR:
            message = f"option {name!r} cannot be None"
            raise TypeError(message)
    if options.get("get_if_exists") and not options.get("name"):
        message = "option 'get_if_exists' needs option 'name'"
        raise ValueError(message)
    gpus = options.get("num_gpus")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        message = f"option 'num_gpus' must be a whole number above 1, because a task cannot share two GPUs; got {gpus}"
        raise ValueError(message)


# --- meaning -------------------------------------------------------------------------------------------------------


def to_fixed(name: str, amount: float) -> int:
    """An amount in units of 1/10000.

    Raises:
        ValueError: If it is negative, not finite, larger than `AMOUNT_MAX`, or above zero but smaller than one unit.
    """
    if amount < 0:
        message = f"{name!r} cannot be negative, but is {shown(amount)}"
        raise ValueError(message)
    if amount != amount or amount == float("inf"):
        message = f"{name!r} must be finite, but is {amount}"
        raise ValueError(message)
    if amount > AMOUNT_MAX:
        message = f"{name!r} is {shown(amount)}, but the largest amount of a resource is {AMOUNT_MAX}"
        raise ValueError(message)
    units = round(amount * UNIT) if isinstance(amount, float) else amount * UNIT
    if units == 0 and amount > 0:
        message = f"{name!r} is {amount}, but the smallest amount of a resource is {1 / UNIT}"
        raise ValueError(message)
    return units


def from_fixed(units: int) -> float:
    """The inverse of `to_fixed`."""
    return units / UNIT


def demand_of_task(options: Mapping[str, Any]) -> dict[str, int]:
    """What a task holds while it runs. One CPU unless stated otherwise."""
    cpus = options.get("num_cpus")
    return _demand(options, 1 if cpus is None else cpus)


class ActorDemand:
    """What an actor needs to be placed, and what it holds while it lives."""

    __slots__ = ("place", "run")

    def __init__(self, place: dict[str, int], run: dict[str, int]) -> None:
        self.place = place
        self.run = run


def demand_of_actor(options: Mapping[str, Any]) -> ActorDemand:
    """One CPU to be placed and none to live, unless CPUs, GPUs or resources are stated: then both are the same."""
    stated = any(options.get(name) is not None for name in ("num_cpus", "num_gpus", "resources"))
    if not stated:
        return ActorDemand(_demand(options, 1), _demand(options, 0))
    cpus = options.get("num_cpus")
    demand = _demand(options, 1 if cpus is None else cpus)
    return ActorDemand(demand, demand)


def _demand(options: Mapping[str, Any], cpus: float) -> dict[str, int]:
    demand: dict[str, int] = {}
    amounts = {
        "CPU": cpus,
        "GPU": options.get("num_gpus"),
        "memory": options.get("memory"),
        "object_store_memory": options.get("object_store_memory"),
        **(options.get("resources") or {}),
    }
    accelerator = options.get("accelerator_type")
    if accelerator is not None:
        amounts[f"accelerator_type:{accelerator}"] = 0.001
    for name, amount in amounts.items():
        if amount:
            demand[name] = to_fixed(name, amount)
    return demand


def max_calls_of(options: dict[str, Any]) -> int:
    """After how many calls of a function its worker is replaced; 0 for never."""
    chosen = options.get("max_calls")
    if chosen is not None:
        return int(chosen)
    return 1 if options.get("num_gpus") else 0


def returns_of(options: Mapping[str, Any], *, generator: bool) -> int:
    """Number of results, `STREAMING` or `DYNAMIC`."""
    wanted = options.get("num_returns")
    if wanted is None:
        return STREAMING if generator else 1
    if wanted == "streaming":
        return STREAMING
    if wanted == "dynamic":
        return DYNAMIC
    return int(wanted)


def groups_of(name: str, value: Any) -> dict[str, int]:
    """Concurrency groups as names to sizes; accepts a dictionary, or a list of dictionaries with both.

    Raises:
        TypeError, ValueError: If it is neither.
    """
    if value is None:
        return {}
    if isinstance(value, list | tuple):
        try:
            value = {group["name"]: group["max_concurrency"] for group in value}
        except (TypeError, KeyError):
            message = f"option {name!r} as a list holds dictionaries with 'name' and 'max_concurrency', not {value!r}"
            raise TypeError(message) from None
    if not isinstance(value, Mapping):
        raise _type_error(name, "a dictionary of group names to sizes", value)
    positive = _integer(1, "a positive number")
    for group, size in value.items():
        if not isinstance(group, str) or not group:
            message = f"option {name!r} has the group {group!r}; group names are strings that are not empty"
            raise TypeError(message)
        positive(f"{name}[{group!r}]", size)
    return dict(value)


def encode_strategy(name: str, value: Any) -> bytes:
    """A scheduling strategy as `_control.strategy` reads it: b"", or msgpack of an array that begins with its kind.

    That of a placement group is made by `groups.Home`, once it is known which group and bundle are meant.

    Raises:
        TypeError, ValueError: If it is none of Ray's strategies.
    """
    if value in (None, "DEFAULT"):
        return b""
    import msgspec

    if value == "SPREAD":
        return msgspec.msgpack.encode(["spread"])
    if isinstance(value, str):
        message = f"option {name!r} must be 'DEFAULT', 'SPREAD' or a strategy object, not {value!r}"
        raise ValueError(message)
    from ray.util import scheduling_strategies as strategies

    if isinstance(value, strategies.NodeAffinitySchedulingStrategy):
        from ray._runtime.ids import NodeID

        node = NodeID.from_hex(value.node_id)
        return msgspec.msgpack.encode(["node", node._key(), value.soft])
    if isinstance(value, strategies.NodeLabelSchedulingStrategy):
        from ray._runtime import labels

        return labels.encode_expressions(value.hard, value.soft)
    if isinstance(value, strategies.PlacementGroupSchedulingStrategy):
        _check_group_strategy(name, value)
        return b""
    raise _type_error(name, "a string or a strategy of ray.util.scheduling_strategies", value)


def strategy_of(options: Mapping[str, Any]) -> bytes:
    """Where tasks or actors with these options may run, encoded.

    Raises:
        ValueError: If both a strategy and a label selector are given.
    """
    strategy, selector = options.get("scheduling_strategy"), options.get("label_selector")
    if not selector:
        return encode_strategy("scheduling_strategy", strategy)
    if strategy not in (None, "DEFAULT"):
        message = "options 'scheduling_strategy' and 'label_selector' cannot be given together; put labels into one"
        raise ValueError(message)
    from ray._runtime import labels

    return labels.encode_selector(selector)


def _check_group_strategy(name: str, strategy: PlacementGroupSchedulingStrategy) -> None:
    if strategy.placement_group is not None:
        _placement_group(f"{name}.placement_group", strategy.placement_group)
    _bundle_index(f"{name}.placement_group_bundle_index", strategy.placement_group_bundle_index)
    if strategy.placement_group_capture_child_tasks is not None:
        _boolean(f"{name}.placement_group_capture_child_tasks", strategy.placement_group_capture_child_tasks)


_GROUP_OPTIONS = ("placement_group", "placement_group_bundle_index", "placement_group_capture_child_tasks")


def home_of(options: Mapping[str, Any]) -> Home | None:
    """Where in a placement group a task or actor with these options runs; None if in none.

    Raises:
        TypeError, ValueError: If the options contradict each other.
    """
    from ray._runtime import session

    strategy = options.get("scheduling_strategy")
    stated = any(name in options for name in _GROUP_OPTIONS) or not (strategy is None or isinstance(strategy, str))
    if session.current_group is None and not stated:
        return None  # the usual case loads nothing
    from ray._runtime import groups

    return groups.home_of(options)


def inherited_env(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a child asks for on top of the job's environment: its own, laid over that of the task that calls it."""
    from ray._runtime import session

    return merge_envs(session.worker_env, value) if session.worker_env or value else {}


def merge_envs(under: Mapping[str, Any], over: Mapping[str, Any] | None) -> dict[str, Any]:
    """One environment laid over another: variables are merged, everything else is replaced."""
    merged = {**under, **(over or {})}
    variables = {**(under.get("env_vars") or {}), **((over or {}).get("env_vars") or {})}
    if variables:
        merged["env_vars"] = variables
    return merged


def encode_env(value: Mapping[str, Any] | None) -> bytes:
    """A runtime environment as the node reads it: b"", or msgpack of its parts."""
    if not value:
        return b""
    import msgspec

    variables = value.get("env_vars")
    return msgspec.msgpack.encode({"env_vars": dict(sorted(variables.items()))}) if variables else b""
