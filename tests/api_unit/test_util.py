"""Helpers of ray.util on the core of one process."""

from __future__ import annotations

from typing import Any

import fake_core
import pytest

import ray
from ray.util import ActorPool, as_completed, log_once, map_unordered
from ray.util import annotations as marks
from ray.util.queue import Empty, Full, Queue, _QueueActor


@ray.remote
def double(x: int) -> int:
    return 2 * x


class Handle:
    """Stands for an actor."""

    def __init__(self) -> None:
        self.double = double


def call(actor: Any, value: int) -> Any:
    return actor.double.remote(value)


def pool(count: int) -> Any:
    actors: Any = [Handle() for _ in range(count)]
    return ActorPool(actors)


def test_pool_keeps_order(core: fake_core.Core) -> None:
    assert list(pool(2).map(call, list(range(7)))) == [2 * x for x in range(7)]
    assert sorted(pool(2).map_unordered(call, list(range(7)))) == [2 * x for x in range(7)]


def test_pool_by_hand(core: fake_core.Core) -> None:
    workers = pool(1)
    assert workers.has_free()
    workers.submit(call, 1)
    workers.submit(call, 2)
    assert not workers.has_free()
    assert workers.pop_idle() is None
    assert workers.get_next() == 2
    assert workers.get_next_unordered() == 4
    assert not workers.has_next()
    with pytest.raises(StopIteration):
        workers.get_next()
    actor = workers.pop_idle()
    workers.push(actor)
    with pytest.raises(ValueError, match="already"):
        workers.push(actor)


def test_as_completed_and_map_unordered(core: fake_core.Core) -> None:
    refs = [double.remote(x) for x in range(25)]
    assert sorted(as_completed(refs)) == [2 * x for x in range(25)]
    assert sorted(map_unordered(double, range(25), backpressure_size=4)) == [2 * x for x in range(25)]
    with pytest.raises(ValueError, match="chunk_size"):
        list(as_completed(refs, chunk_size=0))


def test_log_once() -> None:
    assert log_once("key of this test")
    assert not log_once("key of this test")


def test_queue_actor() -> None:
    import asyncio

    async def use() -> None:
        queue = _QueueActor(2)
        assert await queue.put(1, None)
        assert await queue.put_batch([2])
        assert not await queue.put(3, 0)
        assert not await queue.put(3, 0.001)
        assert not await queue.put_batch([3])
        assert await queue.qsize() == 2
        assert await queue.get_batch(3) is None
        assert await queue.get(None) == (True, 1)
        assert await queue.get_batch(1) == [2]
        assert await queue.get(0) == (False, None)
        assert await queue.get(0.001) == (False, None)

    asyncio.run(use())


def test_queue_raises_what_its_actor_says(core: fake_core.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(maxsize=1)
    monkeypatch.setattr(ray, "get", lambda _ref: False)
    with pytest.raises(Full):
        queue.put_nowait(1)
    monkeypatch.setattr(ray, "get", lambda _ref: (False, None))
    with pytest.raises(Empty):
        queue.get_nowait()
    monkeypatch.setattr(ray, "get", lambda _ref: None)
    with pytest.raises(Empty):
        queue.get_nowait_batch(2)
    with pytest.raises(ValueError, match="negative"):
        queue.get(timeout=-1)
    with pytest.raises(TypeError):
        queue.put_nowait_batch("abc")


def test_annotations() -> None:
    @marks.PublicAPI
    def stable() -> int:
        return 1

    @marks.Deprecated(message="Use stable().", warning=True)
    def old() -> int:
        return 2

    assert stable() == 1
    assert stable._annotated_type is marks.AnnotationType.PUBLIC_API  # type: ignore[attr-defined]
    with pytest.warns(marks.RayDeprecationWarning, match="Use stable"):
        assert old() == 2
    with pytest.raises(ValueError, match="stability"):
        marks.PublicAPI(stability="x")


def test_resources_and_nodes() -> None:
    from ray._runtime import session
    from tests.api_unit.conftest import join

    node = {
        "NodeID": "00" * 28, "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerHostname": "h",
        "Resources": {"CPU": 20_000}, "Labels": {},
    }  # fmt: skip
    join({"nodes": [node], "cluster_resources": {"CPU": 20_000}, "available_resources": {"CPU": 0, "x": 5_000}})
    try:
        assert ray.cluster_resources() == {"CPU": 2.0}
        assert ray.available_resources() == {"x": 0.5}
        assert ray.nodes()[0]["Resources"] == {"CPU": 2.0}
        assert ray.nodes()[0]["alive"]
    finally:
        session.detach()


def test_node_ip_address_needs_no_network() -> None:
    assert ray.util.get_node_ip_address("127.0.0.1:1") == "127.0.0.1"
    assert ray.util.get_node_ip_address("nonsense") == "127.0.0.1"
