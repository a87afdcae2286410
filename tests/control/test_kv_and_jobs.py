import pytest

from ray._control import jobs
from ray._control.kv import KeyValueStore
from tests.node.simulated import NODE, World


def test_keys_live_in_namespaces_and_overwriting_can_be_refused():
    store = KeyValueStore()
    assert store.put("a", b"k", b"1")
    assert not store.put("a", b"k", b"2", overwrite=False)
    assert store.get("a", b"k") == b"1"
    assert store.get("b", b"k") is None
    assert not store.put("a", b"k", b"22")
    assert store.bytes_used == 3
    store.put("a", b"kk", b"")
    assert store.keys("a", b"k") == [b"k", b"kk"]
    assert store.delete("a", b"k", prefix=True) == [b"k", b"kk"]
    assert store.bytes_used == 0


def test_a_full_store_says_so_and_stays_as_it_was():
    store = KeyValueStore(bytes_max=4)
    store.put("", b"k", b"123")
    with pytest.raises(ValueError, match="4 of 4 bytes"):
        store.put("", b"l", b"")
    assert store.get("", b"k") == b"123"


def test_keys_over_the_wire_take_arguments_by_place_or_name():
    world = World()
    driver = world.driver()
    assert world.request(driver, "kv.put", b"k", b"v") is True
    assert world.request(driver, "kv.get", b"k") == b"v"
    assert world.request(driver, "kv.del", b"k") == 1
    with pytest.raises(ValueError, match=r"no request .kv\.nonsense."):
        world.request(driver, "kv.nonsense")
    with pytest.raises(ValueError, match="arguments were given"):
        world.request(driver, "kv.get", 1, 2, 3)
    with pytest.raises((ValueError, RuntimeError)):
        world.request(driver, "kv.put", 7, 8)


def test_jobs_are_numbered_and_ended_ones_forgotten_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "JOBS_REMEMBERED", 2)
    world = World()
    for _ in range(5):
        world.leave(world.driver())
    last = world.driver()
    assert world.request(last, "job.config", {"namespace": "n", "log_to_driver": False}) == 6
    listed = world.request(last, "job.list")
    assert [(job["job"], job["state"]) for job in listed] == [(4, "FINISHED"), (5, "FINISHED"), (6, "RUNNING")]  # type: ignore[attr-defined]
    assert world.node.log_receivers(6) == []


def test_statistics_and_resources_are_plain_counts():
    world = World({"CPU": 2})
    driver = world.driver()
    stats = world.request(driver, "stats")
    assert stats["workers"] == 0  # type: ignore[index]
    assert world.request(driver, "cluster_resources") == {"CPU": 20000}
    (node,) = world.request(driver, "nodes")  # type: ignore[misc]
    assert node["node"] == NODE
    assert node["Alive"]
    world.request(driver, "shutdown")
    assert world.shutdown
