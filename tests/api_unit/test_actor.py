"""Actor classes and handles, as callers see them."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import fake_core
import pytest

import ray
from ray._runtime import session
from ray.actor import ActorClassInheritanceException, ActorHandle
from tests.api_unit.conftest import join


class Base:
    def inherited(self) -> int:
        return 1


@ray.remote(concurrency_groups={"io": 2})
class Counter(Base):
    """Counts."""

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, n: int = 1) -> int:
        self.value += n
        return self.value

    @ray.method(num_returns=2, concurrency_group="io")
    def pair(self) -> tuple[int, int]:
        return 1, 2

    def numbers(self) -> Any:
        yield 1

    @staticmethod
    def static(x: int) -> int:
        return x

    @property
    def prop(self) -> int:
        return 1


@ray.remote
class Asynchronous:
    async def f(self) -> int:
        return 1


def test_creation_says_everything(core: fake_core.Core) -> None:
    handle = Counter.options(max_restarts=2, max_pending_calls=5).remote(3)
    created = core.created[0]
    assert created["args"] == (3,)
    assert created["place"] == {"CPU": 10_000}
    assert created["run"] == {}
    assert (created["max_restarts"], created["max_pending_calls"], created["max_concurrency"]) == (2, 5, 1)
    assert created["concurrency_groups"] == {"io": 2}
    assert not created["is_async"]
    assert repr(handle) == f"Actor(Counter, {created['actor'].hex()})"


def test_asynchronous_classes_are_noticed(core: fake_core.Core) -> None:
    Asynchronous.remote()
    assert core.created[0]["is_async"]
    assert core.created[0]["max_concurrency"] == 1000


def test_class_says_what_to_do_when_misused(core: fake_core.Core) -> None:
    with pytest.raises(TypeError, match=r"Counter.remote\(\)"):
        Counter()
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 3 were given"):
        Counter.remote(1, 2)
    with pytest.raises(ActorClassInheritanceException, match="plain class"):
        type("Child", (), {})

        class Child(Counter):  # type: ignore[misc, valid-type]
            pass

    assert Counter.__name__ == "Counter"
    assert Counter.__doc__ == "Counts."


def test_methods_are_checked_at_the_call(core: fake_core.Core) -> None:
    handle: Any = Counter.remote()
    with pytest.raises(AttributeError, match="Counter has no method 'nothing'"):
        _ = handle.nothing
    with pytest.raises(AttributeError):
        _ = handle.prop
    with pytest.raises(TypeError, match=r"add\(\) takes from 1 to 2 positional arguments but 4 were given"):
        handle.add.remote(1, 2, 3)
    with pytest.raises(TypeError, match=r"add.remote\(\)"):
        handle.add()
    with pytest.raises(ValueError, match="num_cpus"):
        handle.add.options(num_cpus=1)
    with pytest.raises(ValueError, match=r"no concurrency group 'gpu'; it has \['io'\]"):
        handle.add.options(concurrency_group="gpu")
    assert isinstance(handle.add.remote(1), ray.ObjectRef)
    assert handle.static.remote(1)
    assert handle.inherited.remote()
    assert handle.add is handle.add
    assert "add" in dir(handle)


def test_method_options_reach_the_core(core: fake_core.Core) -> None:
    handle: Any = Counter.options(max_task_retries=4).remote()
    assert len(handle.pair.remote()) == 2
    facts = core.submitted[-1][0].facts
    assert (facts["num_returns"], facts["concurrency_group"], facts["max_retries"]) == (2, "io", 4)
    assert facts["name"] == "Counter.pair"
    handle.pair.options(num_returns=1, name="mine", max_task_retries=0).remote()
    facts = core.submitted[-1][0].facts
    assert (facts["num_returns"], facts["name"], facts["max_retries"]) == (1, "mine", 0)
    assert isinstance(handle.numbers.remote(), ray.ObjectRefGenerator)


def test_special_methods(core: fake_core.Core) -> None:
    handle: Any = Counter.remote()
    handle.__ray_ready__.remote()
    handle.__ray_call__.remote(lambda self, k: self.value + k, 5)
    handle.__ray_terminate__.remote()
    assert [template.facts["method"] for template, _, _ in core.submitted] == [
        "__ray_ready__", "__ray_call__", "__ray_terminate__",
    ]  # fmt: skip
    with pytest.raises(TypeError):
        handle.__ray_ready__.remote(1)


def test_handles_travel_compare_and_hash(core: fake_core.Core) -> None:
    one: Any = Counter.remote()
    two = Counter.remote()
    again = pickle.loads(pickle.dumps(one))
    assert again == one != two
    assert len({one, two, again}) == 2
    assert again.add.remote(1)
    assert again._ray_methods is pickle.loads(pickle.dumps(two))._ray_methods
    method = pickle.loads(pickle.dumps(one.add))
    assert method.remote(1)
    assert one._actor_id.hex() in repr(one)


def test_dropped_handle_is_gone_at_once(core: fake_core.Core) -> None:
    """No cycle may hold the counted reference: the actor would live until the garbage collector comes by."""
    gc.disable()
    try:
        handle: Any = Counter.remote()
        handle.add.remote(1)
        handle.pair.options(num_returns=1).remote()
        core.submitted.clear()
        gone = weakref.ref(handle._ray_ref)
        del handle
        assert gone() is None
    finally:
        gc.enable()


def named_requests() -> dict[str, Any]:
    names: dict[tuple[str, str], dict[str, Any]] = {}

    def reserve(name: str, namespace: str, actor: bytes, meta: bytes) -> bytes:
        if (name, namespace) in names:
            raise RuntimeError("ValueError", f"{name} is taken")
        names[name, namespace] = {"actor": actor, "owner_node": 7, "meta": meta}
        return actor

    def by_name(name: str, namespace: str) -> dict[str, Any]:
        if (name, namespace) not in names:
            raise RuntimeError("ValueError", f"no {name}")
        return names[name, namespace]

    def list_named(namespace: str | None) -> list[dict[str, str]]:
        return [{"name": n, "namespace": s} for n, s in names if namespace in (None, s)]

    return {"actor.reserve_name": reserve, "actor.by_name": by_name, "actor.list_named": list_named}


def test_named_actors() -> None:
    core = join(named_requests())
    try:
        handle: Any = Counter.options(name="c").remote()
        assert ray.get_actor("c") == handle
        assert ray.get_actor("c").add.remote(1)
        assert Counter.options(name="c", get_if_exists=True).remote() == handle
        with pytest.raises(ray.exceptions.ActorAlreadyExistsError, match="get_if_exists"):
            Counter.options(name="c").remote()
        other = Counter.options(name="c", namespace="elsewhere", lifetime="detached").remote()
        assert other != handle
        assert core.created[-1]["detached"]
        assert ray.get_actor("c", namespace="elsewhere") == other
        with pytest.raises(ValueError, match="no actor 'x' in namespace 'here'"):
            ray.get_actor("x")
        with pytest.raises(ValueError, match="not empty"):
            ray.get_actor("")
        assert ray.util.list_named_actors() == ["c"]
        assert len(ray.util.list_named_actors(all_namespaces=True)) == 2
        ray.kill(handle)
        assert core.killed == [(handle._actor_id.binary(), True)]
    finally:
        session.detach()


def test_handle_of_another_cluster_is_refused(core: fake_core.Core) -> None:
    handle: Any = Counter.remote()
    handle.add.remote(1)
    session.detach()
    join()
    with pytest.raises(ray.exceptions.ActorHandleNotFoundError, match="shut down"):
        handle.add.remote(1)


def test_unknown_group_of_a_method_is_refused(core: fake_core.Core) -> None:
    class Wrong:
        @ray.method(concurrency_group="nope")
        def f(self) -> None: ...

    with pytest.raises(ValueError, match="'nope'"):
        ray.remote(Wrong).remote()


def test_exit_actor_outside_of_one() -> None:
    with pytest.raises(TypeError, match="outside of an actor"):
        ray.actor.exit_actor()


def test_handle_type() -> None:
    assert ActorHandle.__module__ == "ray.actor"
