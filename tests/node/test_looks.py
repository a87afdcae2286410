"""Questions about a node's members: who is asked, what is answered when, and what is said of those who stay silent."""

from __future__ import annotations

import msgspec
import pytest

from ray import _protocol as p
from ray._node import events, looks
from tests.node.simulated import NODE, World, cpu, create

ROWS = msgspec.msgpack.encode([["row"]])


def ask(world: World, asker: int, what: str, limit: int = 100, timeout_s: float = 30.0, corr: int = 77) -> None:
    arguments = {"what": what, "limit": limit, "timeout_s": timeout_s}
    world.send(asker, p.Request("state.collect", msgspec.msgpack.encode(arguments)), corr)


def asked(world: World, proc: int) -> tuple[int, p.Describe] | None:
    """The question that a member was sent last, with its number."""
    found = [(corr, m) for corr, m in world.replies.get(proc, {}).items() if isinstance(m, p.Describe)]
    return found[-1] if found else None


def tell(world: World, proc: int, total: int = 1, rows: bytes = ROWS) -> None:
    question = asked(world, proc)
    assert question is not None
    world.send(proc, p.Described(question[1].what, total, rows), question[0])


def answer(world: World, asker: int, corr: int = 77) -> dict[str, object] | None:
    if corr not in world.replies.get(asker, {}):
        return None
    return world.reply(asker, corr)  # type: ignore[return-value]


def leased(world: World, driver: int) -> int:
    """A worker of the driver's."""
    world.send(driver, p.LeaseDemand(1, cpu(1), 1, b"", b"", "f"))
    (grant,) = world.take(driver, p.LeaseGranted)
    assert isinstance(grant, p.LeaseGranted)
    return grant.proc


def test_the_answer_comes_when_all_members_have_answered():
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    ask(world, driver, "tasks", limit=7)
    for proc in (driver, worker):
        question = asked(world, proc)
        assert question is not None
        assert question[1] == p.Describe(p.DESCRIBE_TASKS, 7)
    tell(world, driver)
    assert answer(world, driver) is None
    tell(world, worker, total=5)
    found = answer(world, driver)
    assert found is not None
    assert found["silent"] == []
    ((node, members, silent),) = found["nodes"]
    assert (node, silent) == (NODE, [])
    assert members == [
        [driver, p.ROLE_DRIVER, 90_000 + driver, 1, 1, ROWS],
        [worker, p.ROLE_WORKER, world.pid_of[worker], 1, 5, ROWS],
    ]


def test_members_that_stay_silent_are_named_at_the_deadline():
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    ask(world, driver, "objects")
    tell(world, driver)
    world.advance(looks.MEMBER_S - 0.1)
    assert answer(world, driver) is None
    world.advance(0.2)
    found = answer(world, driver)
    assert found is not None
    ((_, members, silent),) = found["nodes"]
    assert [member[0] for member in members] == [driver]
    assert silent == [world.pid_of[worker]]
    tell(world, worker)  # too late, and without effect
    assert answer(world, driver) is None


def test_a_member_that_ends_is_not_waited_for():
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    ask(world, driver, "tasks")
    tell(world, driver)
    world.die(worker)
    found = answer(world, driver)
    assert found is not None
    ((_, members, silent),) = found["nodes"]
    assert ([member[0] for member in members], silent) == ([driver], [])


def test_stacks_are_asked_of_workers_only():
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    ask(world, driver, "stacks")
    assert asked(world, driver) is None
    tell(world, worker)
    assert answer(world, driver) is not None


def test_a_member_that_answers_what_it_was_not_asked_changes_nothing():
    world = World()
    driver = world.driver()
    ask(world, driver, "tasks")
    world.send(driver, p.Described(p.DESCRIBE_TASKS, 1, ROWS), 12345)
    assert answer(world, driver) is None
    tell(world, driver)
    assert answer(world, driver) is not None


def test_rows_beyond_the_limit_of_an_answer_are_left_out_and_still_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(looks, "ROWS_BYTES_MAX", len(ROWS))
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    ask(world, driver, "tasks")
    tell(world, driver, total=1)
    tell(world, worker, total=9)
    found = answer(world, driver)
    assert found is not None
    ((_, members, _),) = found["nodes"]
    assert [(member[4], member[5]) for member in members] == [(1, ROWS), (9, b"\x90")]


def test_too_many_questions_are_answered_at_once_with_everybody_as_silent():
    world = World()
    driver = world.driver()
    for corr in range(1, looks.QUESTIONS_MAX + 1):
        ask(world, driver, "tasks", corr=1000 + corr)
    ask(world, driver, "tasks", corr=5000)
    found = answer(world, driver, 5000)
    assert found is not None
    ((_, members, silent),) = found["nodes"]
    assert (members, silent) == ([], [90_000 + driver])


def test_workers_are_listed_with_what_they_were_lent_for_and_ended_ones_with_why():
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    world.send(driver, create(driver, 1, label="Counter"))
    actor = next(proc for proc, box in world.inbox.items() if any(isinstance(m, p.ActorInit) for m in box))
    pid = world.pid_of[worker]
    world.advance(3.0)
    world.die(worker, -9)
    world.advance(2.0)
    ask(world, driver, "workers")
    found = answer(world, driver)
    assert found is not None
    ((_, members, _),) = found["nodes"]
    rows = msgspec.msgpack.decode(members[0][5])
    shown = {row["proc"]: row for row in rows}
    assert (shown[actor]["state"], shown[actor]["label"]) == ("busy", "Counter")
    assert shown[driver]["state"] == "driver"
    ended = shown[worker]
    assert (ended["state"], ended["pid"], ended["exit_code"], ended["intended"]) == ("ended", pid, -9, False)
    assert "SIGKILL" in ended["cause"]
    assert (round(ended["age_s"]), round(ended["ended_s"])) == (5, 2)


def test_records_are_kept_with_who_sent_them():
    world = World()
    driver = world.driver()
    worker = leased(world, driver)
    world.send(worker, p.TaskEvents(b"batch"))
    assert world.history == [events.KeepHistory(worker, world.pid_of[worker], 1, b"batch")]
    world.send(worker, p.TaskEvents(bytes(looks.BATCH_BYTES_MAX + 1)))
    assert len(world.history) == 1
    assert "dropped" in world.logs[-1]


@pytest.mark.parametrize("name", ["../lock", "/etc/passwd", ".hidden"])
def test_only_names_within_an_area_can_be_read(name):
    world = World()
    driver = world.driver()
    with pytest.raises(ValueError, match="no name of a file"):
        world.request(driver, "state.at", NODE, "node.read", ["logs", name, 0, 10])
    with pytest.raises(ValueError, match="has files of"):
        world.request(driver, "state.at", NODE, "node.files", ["secrets"])
    assert world.files_asked == []


def test_a_node_is_asked_for_pieces_of_bounded_size_and_for_nothing_else():
    world = World()
    driver = world.driver()
    arguments = {"node": NODE, "ask": "node.read", "arguments": ["logs", "a.out", -5, 1 << 40]}
    world.send(driver, p.Request("state.at", msgspec.msgpack.encode(arguments)), 9)
    (effect,) = world.files_asked
    assert isinstance(effect, events.ReadFile)
    assert (effect.to, effect.corr, effect.offset, effect.size) == (driver, 9, -5, 512 << 10)
    with pytest.raises(ValueError, match="is not asked for 'shutdown'"):
        world.request(driver, "state.at", NODE, "shutdown", ["now"])
    with pytest.raises(ValueError, match="is not known"):
        world.request(driver, "state.at", 5, "node.files", ["logs"])
