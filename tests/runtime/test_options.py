"""Options are checked where they are written, and mean what Ray's documentation says."""

from __future__ import annotations

from typing import Any

import pytest

import ray
from ray._runtime import options as opts
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)


@ray.remote
def f() -> None: ...


@ray.remote
class C: ...


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"num_cpu": 1}, ValueError),
        ({"max_restarts": 1}, ValueError),  # an actor's
        ({"num_cpus": "1"}, TypeError),
        ({"num_cpus": -1}, ValueError),
        ({"num_cpus": float("nan")}, ValueError),
        ({"num_cpus": 0.00001}, ValueError),
        ({"num_gpus": 1.5}, ValueError),
        ({"num_returns": -3}, ValueError),
        ({"num_returns": "x"}, ValueError),
        ({"num_returns": 1.5}, TypeError),
        ({"num_returns": "streaming"}, ValueError),  # f does not yield
        ({"max_retries": -2}, ValueError),
        ({"_labels": "a"}, TypeError),
        ({"fallback_strategy": [{}]}, NotImplementedError),
        ({"max_calls": -1}, ValueError),
        ({"retry_exceptions": [1]}, ValueError),
        ({"retry_exceptions": None}, TypeError),
        ({"resources": {"CPU": 1}}, ValueError),
        ({"resources": {"x": -1}}, ValueError),
        ({"resources": {"x": "1"}}, TypeError),
        ({"resources": {1: 1}}, TypeError),
        ({"resources": 3}, TypeError),
        ({"memory": -1}, ValueError),
        ({"name": 3}, TypeError),
        ({"scheduling_strategy": "x"}, ValueError),
        ({"scheduling_strategy": 3}, TypeError),
        ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError),
        ({"runtime_env": {"pip": ["numpy"]}}, NotImplementedError),
        ({"runtime_env": {"nonsense": 1}}, ValueError),
        ({"placement_group": object()}, TypeError),
        ({"scheduling_strategy": PlacementGroupSchedulingStrategy("g")}, TypeError),
        ({"placement_group_bundle_index": -2}, ValueError),
        ({"placement_group_capture_child_tasks": 1}, TypeError),
        ({"label_selector": {"a": "in()"}}, ValueError),
    ],
)
def test_bad_task_option_is_refused_by_name(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as info:
        f.options(**option)
    name = next(iter(option))
    assert name in str(info.value) or "GPU" in str(info.value)
    with pytest.raises(error):
        ray.remote(**option)(f.__wrapped__)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"max_retries": 1}, ValueError),
        ({"max_concurrency": 0}, ValueError),
        ({"max_restarts": -2}, ValueError),
        ({"max_pending_calls": 0}, ValueError),
        ({"name": ""}, ValueError),
        ({"namespace": ""}, ValueError),
        ({"lifetime": "x"}, ValueError),
        ({"get_if_exists": True}, ValueError),
        ({"concurrency_groups": {"io": 0}}, ValueError),
        ({"concurrency_groups": 3}, TypeError),
        ({"enable_tensor_transport": True}, NotImplementedError),
    ],
)
def test_bad_actor_option_is_refused_by_name(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(option))):
        C.options(**option)


@pytest.mark.parametrize("count", [None, 0, 1])
def test_max_calls_is_no_option_of_a_call(count: int | None) -> None:
    with pytest.raises(ValueError, match="max_calls"):
        f.options(max_calls=count)


def test_unknown_option_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'num_cpu' is not an option of remote functions.*'num_cpus'"):
        f.options(num_cpu=1)


@pytest.mark.parametrize(
    ("options", "place", "run"),
    [
        ({}, {"CPU": 10_000}, {}),
        ({"memory": 1000}, {"CPU": 10_000, "memory": 10_000_000}, {"memory": 10_000_000}),
        ({"resources": {"x": 1}}, {"CPU": 10_000, "x": 10_000}, {"CPU": 10_000, "x": 10_000}),
        ({"num_cpus": 0}, {}, {}),
        ({"num_cpus": 0.5}, {"CPU": 5_000}, {"CPU": 5_000}),
        ({"num_gpus": 0.25}, {"CPU": 10_000, "GPU": 2_500}, {"CPU": 10_000, "GPU": 2_500}),
    ],
)
def test_demand_of_actors(options: dict[str, Any], place: dict[str, int], run: dict[str, int]) -> None:
    demand = opts.demand_of_actor(options)
    assert (demand.place, demand.run) == (place, run)


def test_demand_of_tasks() -> None:
    assert opts.demand_of_task({}) == {"CPU": 10_000}
    assert opts.demand_of_task({"num_cpus": 0, "accelerator_type": "A100"}) == {"accelerator_type:A100": 10}
    assert opts.demand_of_task({"num_cpus": None, "num_gpus": 2, "resources": {"x": 0.1}}) == {
        "CPU": 10_000,
        "GPU": 20_000,
        "x": 1_000,
    }


def test_returns_of_generators_default_to_streaming() -> None:
    assert opts.returns_of({}, generator=True) == opts.STREAMING
    assert opts.returns_of({"num_returns": 2}, generator=True) == 2
    assert opts.returns_of({"num_returns": "dynamic"}, generator=True) == opts.DYNAMIC
    assert opts.returns_of({"num_returns": None}, generator=False) == 1


def test_strategies_are_encoded() -> None:
    import msgspec

    node = ray.NodeID._from_key(77).hex()
    packed = opts.encode_strategy("s", NodeAffinitySchedulingStrategy(node, soft=True))
    assert msgspec.msgpack.decode(packed) == ["node", 77, True]
    assert opts.encode_strategy("s", "DEFAULT") == b""


def test_options_leave_the_original_alone_and_are_remembered() -> None:
    assert f.options(num_cpus=2) is f.options(num_cpus=2)
    assert f.options(num_cpus=2)._default_options == {"num_cpus": 2}
    assert f._default_options == {}
    assert f.options(num_cpus=2).options(max_retries=1)._default_options == {"num_cpus": 2, "max_retries": 1}


@pytest.mark.parametrize("target", [3, "x", f, C])
def test_remote_refuses_what_is_neither_function_nor_class(target: Any) -> None:
    with pytest.raises(TypeError):
        ray.remote(target)


def test_remote_needs_options_by_name() -> None:
    with pytest.raises(TypeError, match=r"@ray\.remote"):
        ray.remote()  # type: ignore[call-overload]


def test_method_refuses_unknown_options() -> None:
    with pytest.raises(ValueError, match="foo"):
        ray.method(foo=1)
