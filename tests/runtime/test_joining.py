"""Finding a cluster and being taken by it, as far as that needs no cluster."""

from __future__ import annotations

import sys

import pytest

from ray import _core
from ray._node.registry import Record
from ray._runtime import joining

TOKEN = b"t" * 32
OURS = sys.version_info.minor


def record(**changes: object) -> Record:
    fields: dict[str, object] = {
        "node": 7,
        "pid": 1,
        "is_head": True,
        "head_node": 7,
        "head_address": "127.1.2.3:6379",
        "address": "127.1.2.3:6379",
        "socket": "/d/node.sock",
        "session_dir": "/d",
        "token": TOKEN,
        "started": 1.0,
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def running(monkeypatch):
    """Which nodes run on this machine."""
    records: list[Record] = []
    monkeypatch.setattr("ray._node.registry.running", lambda: records)
    return records


def test_another_minor_version_of_python_is_refused_with_both_versions(monkeypatch):
    monkeypatch.setattr(_core, "discover", lambda *_: (7, 1, OURS + 1, False))
    with pytest.raises(ConnectionError, match=rf"runs Python 3\.{OURS + 1}, and this is Python 3\.{OURS}\."):
        joining.reach("127.0.0.1:6379", TOKEN)
    monkeypatch.setattr(_core, "discover", lambda *_: (7, 1, OURS, False))
    assert joining.reach("127.0.0.1:6379", TOKEN).node == 7


def test_a_driver_joins_a_node_of_its_machine_whatever_the_patch_level(running):
    running.append(record(python=f"3.{OURS}.99"))
    assert joining.enter("127.1.2.3:6379").node == 7
    running[:] = [record(python=f"3.{OURS + 1}.0")]
    with pytest.raises(ConnectionError, match=rf"Use Python 3\.{OURS + 1} here"):
        joining.enter("127.1.2.3:6379")


def test_localhost_finds_a_head_that_listens_at_another_address_of_this_machine(running):
    running += [record(node=8, is_head=False, address="127.1.2.3:1"), record()]
    for address in ("localhost:6379", "127.0.0.1:6379", "127.1.2.3:6379"):
        found = joining.find(address)
        assert found is not None
        assert found.node == 7
    assert joining.find("localhost:1") is None
    assert joining.find("192.0.2.77:6379") is None


def test_a_host_that_is_a_name_becomes_the_address_that_answers(monkeypatch):
    asked = []

    def discover(address: str, token: bytes, timeout_s: float, tls: bool | None) -> tuple[int, int, int, bool]:
        asked.append(address)
        if address.startswith("10.0.0.1"):
            raise ConnectionError("nobody there")
        return 7, 1, OURS, tls is True

    infos = [(2, 1, 6, "", (f"10.0.0.{last}", 6379)) for last in (1, 2, 3)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: infos)
    monkeypatch.setattr(_core, "discover", discover)
    assert joining.reach("head:6379", TOKEN).address == "10.0.0.2:6379"
    assert asked == ["10.0.0.1:6379", "10.0.0.2:6379"]


def test_of_several_addresses_the_one_that_answers_is_first_and_the_others_follow(monkeypatch):
    def discover(address: str, token: bytes, timeout_s: float, tls: bool | None) -> tuple[int, int, int, bool]:
        if address != "10.0.0.2:6379":
            raise ConnectionError("nobody there")
        return 7, 1, OURS, True

    monkeypatch.setattr(_core, "discover", discover)
    head = joining.reach("10.0.0.1:6379,10.0.0.2:6379,10.0.0.3:6380", TOKEN)
    assert (head.address, head.tls) == ("10.0.0.2:6379,10.0.0.1:6379,10.0.0.3:6380", True)
    assert joining.reach("10.0.0.2:6379", TOKEN).address == "10.0.0.2:6379"


def test_only_so_many_addresses_of_one_name_are_tried(monkeypatch):
    asked = []

    def discover(address: str, token: bytes, timeout_s: float, tls: bool | None) -> tuple[int, int, int, bool]:
        asked.append(timeout_s)
        raise ConnectionError(f"nobody at {address}")

    infos = [(2, 1, 6, "", (f"10.0.0.{last}", 6379)) for last in range(1, joining.CANDIDATES_MAX + 5)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: infos)
    monkeypatch.setattr(_core, "discover", discover)
    with pytest.raises(ConnectionError, match=r"nobody at 10\.0\.0\.1:6379"):
        joining.reach("head:6379", TOKEN)
    assert len(asked) == joining.CANDIDATES_MAX
    assert sum(asked) == pytest.approx(joining.DISCOVER_S)


def test_a_refusal_is_told_rather_than_that_another_address_does_not_answer(monkeypatch):
    def discover(address: str, token: bytes, timeout_s: float, tls: bool | None) -> tuple[int, int, int, bool]:
        if address.startswith("10.0.0.2"):
            raise PermissionError("the token is not this cluster's")
        raise ConnectionError("nobody there")

    infos = [(2, 1, 6, "", (f"10.0.0.{last}", 6379)) for last in (1, 2, 3)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: infos)
    monkeypatch.setattr(_core, "discover", discover)
    with pytest.raises(ConnectionError, match=r"the token is not this cluster's.*RAY_AUTH_TOKEN"):
        joining.reach("head:6379", TOKEN)


def test_this_machines_address_is_one_that_it_has():
    from ray.scripts.starting import announce

    announced = announce(None, None)
    assert announced.listen == announced.ip
    assert announce(None, "127.0.0.1:6379").ip == "127.0.0.1"


def test_an_address_that_is_not_this_machines_is_announced_and_all_are_listened_on():
    from ray.scripts.starting import announce

    announced = announce("198.51.100.7", None)  # reserved for documentation
    assert (announced.ip, announced.listen) == ("198.51.100.7", "0.0.0.0")
    assert "not an address of this machine" in announced.why
    assert announce("127.9.9.9", None).listen == "127.9.9.9"


def test_tls_is_learned_from_the_head_and_insisted_on_where_the_environment_says_so(monkeypatch):
    asked = []

    def discover(address: str, token: bytes, timeout_s: float, tls: bool | None) -> tuple[int, int, int, bool]:
        asked.append(tls)
        return 7, 1, OURS, True

    monkeypatch.setattr(_core, "discover", discover)
    monkeypatch.delenv(joining.TLS_VARIABLE, raising=False)
    assert joining.reach("127.0.0.1:6379", TOKEN).tls
    joining.reach("127.0.0.1:6379", TOKEN, needs_tls=True)
    monkeypatch.setenv(joining.TLS_VARIABLE, "1")
    joining.reach("127.0.0.1:6379", TOKEN)
    assert asked == [None, True, True]


def test_the_variable_for_tls_is_0_or_1(monkeypatch):
    for value, wanted in [("", False), ("0", False), ("1", True), ("true", True)]:
        monkeypatch.setenv(joining.TLS_VARIABLE, value)
        assert joining.wants_tls() is wanted
    monkeypatch.setenv(joining.TLS_VARIABLE, "yes please")
    with pytest.raises(ValueError, match="RAY_USE_TLS='yes please'"):
        joining.wants_tls()


def test_a_driver_that_wants_tls_enters_no_node_without(monkeypatch, running):
    monkeypatch.setenv(joining.TLS_VARIABLE, "1")
    running.append(record())
    with pytest.raises(ConnectionError, match="do not use TLS"):
        joining.enter("127.1.2.3:6379")
    running[:] = [record(tls=True)]
    assert joining.enter("127.1.2.3:6379").node == 7
