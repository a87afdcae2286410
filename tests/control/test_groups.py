"""Placement groups as the control service and its nodes see them, with messages that arrive at once."""

from __future__ import annotations

import msgspec
import pytest

from ray import _bundle_names as names
from ray import _protocol as p
from ray._control import groups as limits
from ray._control.group_placement import Wish, choose, demand_of, describe_impossible, gpu_demand, place_of
from ray._control.group_records import Group
from ray._control.node_records import Node
from ray._protocol import UNIT
from tests.node.cluster_world import ClusterWorld
from tests.node.simulated import NODE, actor_id, cpu, create, gpu


class Groups(ClusterWorld):
    """A cluster with one driver, and short words for what it asks."""

    def __init__(self, *resources: dict[str, float], durable: bool = False) -> None:
        super().__init__(*resources, durable=durable)
        self.me = self.driver()
        self.corr = 100
        self.serial = 0

    def tell(self, op: str, *arguments: object, proc: int = 0) -> int:
        self.corr += 1
        proc = proc or self.me
        self.node_of(proc).send(proc, p.Request(op, msgspec.msgpack.encode(arguments)), self.corr)
        self.collect()
        return self.corr

    def ask(self, op: str, *arguments: object) -> object:
        return self.head.reply(self.me, self.tell(op, *arguments))

    def has_answer(self, corr: int) -> bool:
        return corr in self.head.replies.get(self.me, {})

    def create(
        self,
        *bundles: dict[str, int],
        strategy: str = "PACK",
        name: str = "",
        detached: bool = False,
        selectors: list[dict[str, tuple[str, list[str]]]] | None = None,
        target: int = 0,
        proc: int = 0,
    ) -> bytes:
        group = self.new_id(proc or self.me)
        fields = (group, name, "space", list(bundles), strategy, detached, selectors or [], target, b"")
        corr = self.tell("group.create", *fields, proc=proc)
        self.node_of(proc or self.me).reply(proc or self.me, corr)
        return group

    def new_id(self, proc: int) -> bytes:
        self.serial += 1
        return proc.to_bytes(8, "big") + self.serial.to_bytes(6, "big") + bytes(4)

    def group(self, group: bytes) -> Group:
        found = self.control.groups.find(group)
        assert found is not None
        return found

    def where(self, group: bytes) -> list[int]:
        """Nodes of the bundles, by their number; -1 where there is none."""
        placed = self.group(group).placed
        return [placed.get(index, NODE - 1) - NODE for index in range(len(self.group(group).bundles))]

    def free(self, key: int = NODE) -> dict[str, int]:
        """What is free of what the node has of itself."""
        ledger = self.nodes[key].node.leases.ledger
        return {name: units for name, units in ledger.free.items() if names.split(name) is None}

    def demand(
        self, group: bytes, asked: dict[str, int], *, bundle: int = -1, class_id: int = 1, count: int = 1, proc: int = 0
    ) -> list[p.LeaseGranted]:
        strategy = msgspec.msgpack.encode(["group", group, bundle, "g"])
        demand = names.rewritten(asked, group.hex(), bundle)
        self.send(proc or self.me, p.LeaseDemand(class_id, demand, count, b"", strategy, "f"))
        return self.granted(proc)

    def granted(self, proc: int = 0) -> list[p.LeaseGranted]:
        proc = proc or self.me
        return self.node_of(proc).take(proc, p.LeaseGranted)  # type: ignore[return-value]

    def failed(self) -> list[p.LeaseFailed]:
        return self.head.take(self.me, p.LeaseFailed)  # type: ignore[return-value]


# --- placing ---------------------------------------------------------------------------------------------------------


def test_a_group_sets_resources_aside_and_gives_all_of_them_back():
    world = Groups({"CPU": 3})
    group = world.create(cpu(1), cpu(1))
    assert world.group(group).state == "created"
    assert world.free() == cpu(1)
    world.ask("group.remove", group)
    assert world.free() == cpu(3)
    assert world.head.node.leases.ledger.total == cpu(3)


def test_pack_takes_few_nodes_and_spread_takes_many():
    world = Groups({"CPU": 4}, {"CPU": 4}, {"CPU": 4})
    assert len(set(world.where(world.create(cpu(1), cpu(1), cpu(1))))) == 1
    assert len(set(world.where(world.create(cpu(1), cpu(1), cpu(1), strategy="SPREAD")))) == 3


def test_pack_uses_another_node_when_one_is_not_enough_and_strict_pack_waits():
    world = Groups({"CPU": 2}, {"CPU": 2})
    strict = world.create(cpu(2), cpu(1), strategy="STRICT_PACK")
    assert world.group(strict).infeasible
    assert "3 together, which no single node has" in world.group(strict).why
    assert sorted(world.where(world.create(cpu(2), cpu(1)))) == [0, 1]


def test_strict_spread_never_puts_two_bundles_on_a_node():
    world = Groups({"CPU": 8}, {"CPU": 8})
    group = world.create(cpu(1), cpu(1), cpu(1), strategy="STRICT_SPREAD")
    assert world.group(group).state == "pending"
    assert "as many different nodes" in world.group(group).why
    world.add({"CPU": 1})
    assert sorted(world.where(group)) == [0, 1, 2]


def test_strict_spread_finds_the_one_matching_that_there_is():
    world = Groups({"CPU": 2, "GPU": 1}, {"CPU": 2}, {"CPU": 1})
    group = world.create(cpu(1), {**cpu(1), **gpu(1)}, cpu(2), strategy="STRICT_SPREAD")
    assert world.where(group) == [2, 0, 1]


def test_a_group_goes_where_labels_and_the_wished_node_say():
    world = Groups({"CPU": 4}, {"CPU": 4})
    other = NODE + 1
    assert world.where(world.create(cpu(1), strategy="STRICT_PACK", target=other)) == [1]
    hex_id = other.to_bytes(8, "big").hex().ljust(56, "0")
    there = {"ray.io/node-id": ("in", [hex_id])}
    assert world.where(world.create(cpu(1), cpu(1), selectors=[there, {}], strategy="STRICT_SPREAD")) == [1, 0]
    nowhere = world.create(cpu(1), selectors=[{"zone": ("in", ["a"])}])
    assert "asks for labels that none of 2 nodes has" in world.group(nowhere).why


def test_a_group_that_no_node_can_hold_waits_says_so_and_comes_to_be_with_a_node():
    world = Groups({"CPU": 1})
    group = world.create(cpu(4), name="big")
    (notice,) = world.head.take(world.me, p.Notice)
    assert isinstance(notice, p.Notice)
    assert "Placement group big cannot be placed: bundle 0 needs CPU: 4; the most that one node has is CPU: 1" in (
        notice.text
    )
    world.add({"CPU": 4})
    assert world.where(group) == [1]


def test_fractions_of_gpus_share_devices_within_a_group():
    assert gpu_demand([5000, 5000]) == UNIT
    assert gpu_demand([7000, 7000]) == 2 * UNIT
    assert gpu_demand([UNIT, 5000, 5000, 2500]) == 3 * UNIT
    world = Groups({"GPU": 3})
    group = world.create(gpu(1), gpu(0.5), gpu(0.5))
    bundles = world.head.node.leases.ledger.bundles[group.hex()]
    assert [dict(bundle.devices) for bundle in bundles.values()] == [{0: UNIT}, {1: UNIT // 2}, {1: UNIT // 2}]
    assert world.free() == {"GPU": UNIT}


def test_choosing_is_a_function_of_what_is_free():
    def node(key: int, free: dict[str, int]) -> Node:
        return Node(key, "", "", "", "", "", "", free, {}, free, 0.0)

    places = [place_of(node(key, cpu(amount)), cpu(amount)) for key, amount in ((1, 1), (2, 3), (3, 2))]
    wish = Wish("PACK", {0: cpu(2), 1: cpu(1), 2: cpu(2)}, (), {})
    assert choose(places, wish) == {0: 2, 1: 2, 2: 3}
    assert choose(places, Wish("STRICT_PACK", {0: cpu(2), 1: cpu(2)}, (), {})) is None
    assert choose(places, Wish("PACK", {0: cpu(2)}, (), {1: 3})) == {0: 3}, "where the group is already"
    assert "3 nodes cannot hold" in describe_impossible(places, Wish("PACK", dict.fromkeys(range(4), cpu(2)), (), {}))
    assert demand_of([cpu(1), {**cpu(2), "x": 5}]) == {"CPU": 3 * UNIT, "x": 5}


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_group_waits_for_room_and_is_created_when_a_lease_comes_back():
    world = Groups({"CPU": 2})
    world.send(world.me, p.LeaseDemand(1, cpu(1), 2, b"", b"", "f"))
    first, second = world.granted()
    group = world.create(cpu(2))
    waiting = world.tell("group.wait", group, None)
    assert p.Pressure(True) in world.head.inbox[world.me], "idle leases are asked for"
    world.send(world.me, p.LeaseReturn(first.lease, True))
    assert not world.has_answer(waiting)
    world.send(world.me, p.LeaseReturn(second.lease, True))
    assert world.head.reply(world.me, waiting) is True
    assert world.free() == cpu(0)


def test_what_a_group_lacks_on_several_nodes_is_kept_for_it_until_all_is_there():
    world = Groups({"CPU": 1}, {"CPU": 1})
    world.send(world.me, p.LeaseDemand(1, cpu(1), 2, b"", b"", "f"))
    leases = world.granted()
    assert {lease.node - NODE for lease in leases} == {0, 1}
    group = world.create(cpu(1), cpu(1))
    for lease in leases:
        world.send(world.me, p.LeaseReturn(lease.lease, True, lease.node))
        world.advance(0.05)
    assert sorted(world.where(group)) == [0, 1]


def test_two_groups_that_need_the_same_nodes_are_created_one_after_the_other():
    world = Groups({"CPU": 2}, {"CPU": 2})
    blocking = world.create(cpu(2), cpu(2))
    waiting = [world.create(cpu(2), cpu(2)), world.create(cpu(2), cpu(2))]
    world.ask("group.remove", blocking)
    world.advance(60)
    states = [world.group(group).state for group in waiting]
    assert states.count("created") == 1, states
    world.ask("group.remove", waiting[states.index("created")])
    world.advance(60)
    assert world.group(waiting[1 - states.index("created")]).state == "created"


def test_what_a_group_keeps_in_vain_is_let_go():
    world = Groups({"CPU": 2}, {"CPU": 2})
    holder = world.create(cpu(2), strategy="STRICT_PACK", target=NODE + 1)
    group = world.create(cpu(2), cpu(2))
    assert world.free() == cpu(0), "the head keeps its CPUs for the group"
    world.send(world.me, p.LeaseDemand(1, cpu(1), 1, b"", b"", "f"))
    assert world.granted() == []
    world.advance(limits.GATHER_S + 1)
    (lease,) = world.granted()
    world.send(world.me, p.LeaseReturn(lease.lease, True))
    world.ask("group.remove", holder)
    world.advance(60)
    assert world.group(group).state == "created"


def test_waiting_has_a_limit():
    world = Groups({"CPU": 1})
    group = world.create(cpu(4))
    waiting = world.tell("group.wait", group, 0.5)
    world.advance(0.4)
    assert not world.has_answer(waiting)
    world.advance(0.2)
    assert world.head.reply(world.me, waiting) is False
    assert world.control.groups.statistics()["group_waiters"] == 0


def test_a_group_whose_creation_is_on_its_way_is_waited_for():
    world = Groups({"CPU": 1}, {"CPU": 1})
    other = world.driver(NODE + 1)
    group = world.new_id(other)
    waiting = world.tell("group.wait", group, None)
    assert not world.has_answer(waiting)
    assert world.demand(group, cpu(1)) == []
    fields = (group, "", "space", [cpu(1)], "PACK", False, [], 0, b"")
    world.tell("group.create", *fields, proc=other)
    assert world.head.reply(world.me, waiting) is True
    assert len(world.granted()) == 1


def test_a_group_that_is_never_created_is_not_waited_for_for_ever():
    world = Groups({"CPU": 1}, {"CPU": 1})
    other = world.driver(NODE + 1)
    group = world.new_id(other)
    waiting = world.tell("group.wait", group, None)
    world.demand(group, cpu(1))
    world.node_of(other).leave(other)
    world.collect()
    with pytest.raises(RuntimeError, match="about to create placement group"):
        world.head.reply(world.me, waiting)
    assert [failed.code for failed in world.failed()] == [p.FAILED_GROUP_REMOVED]


def test_groups_that_are_too_many_to_plan_at_once_have_their_turn(monkeypatch):
    monkeypatch.setattr(limits, "PLANS_AT_A_TIME_MAX", 2)
    world = Groups({"x": 1}, {"CPU": 8}, {"CPU": 8})
    blocking = world.create(cpu(8), cpu(8))
    large = [world.create(cpu(7), cpu(7), strategy="STRICT_SPREAD") for _ in range(7)]
    small = world.create(cpu(1))
    assert world.group(small).state == "pending"
    world.ask("group.remove", blocking)
    world.advance(1.0)
    assert [world.group(group).state for group in large].count("created") == 1
    assert world.group(small).state == "created", "it is behind six that have no room"


# --- what runs in it -------------------------------------------------------------------------------------------------


def test_a_task_in_any_bundle_gets_no_more_than_one_bundle_has():
    world = Groups({"CPU": 4})
    group = world.create(cpu(1), cpu(1))
    assert world.demand(group, cpu(2)) == [], "two bundles with one CPU are not one with two"
    assert world.demand(group, cpu(0.6), class_id=2, count=3) != []
    ledger = world.head.node.leases.ledger
    held = [ledger.total[name] - ledger.free[name] for name in (names.name_in("CPU", group.hex(), i) for i in (0, 1))]
    assert held == [6000, 6000]


def test_a_task_in_one_bundle_is_there_and_nowhere_else():
    world = Groups({"CPU": 1}, {"CPU": 1})
    group = world.create(cpu(1), cpu(1), strategy="STRICT_SPREAD")
    for index in (0, 1):
        (lease,) = world.demand(group, cpu(1), bundle=index, class_id=10 + index)
        assert lease.node - NODE == world.where(group)[index]


def test_tasks_without_resources_run_in_a_full_bundle():
    world = Groups({"CPU": 1})
    group = world.create(cpu(1))
    assert len(world.demand(group, cpu(1))) == 1
    assert len(world.demand(group, {}, class_id=2, count=5)) == 5


def test_gpus_in_a_bundle_are_the_bundles_own():
    world = Groups({"GPU": 3})
    first, second = world.create(gpu(1)), world.create(gpu(2))
    (one,) = world.demand(second, gpu(2))
    (two,) = world.demand(first, gpu(1), class_id=2)
    assert (two.gpu_ids, one.gpu_ids) == ([0], [1, 2])


def test_a_worker_that_waits_lends_the_cpu_of_its_bundle():
    world = Groups({"CPU": 1})
    group = world.create(cpu(1))
    (lease,) = world.demand(group, cpu(1), count=2)
    world.send(lease.proc, p.Blocked())
    (child,) = world.granted()
    assert world.free() == cpu(0), "it is lent within the bundle only"
    world.send(lease.proc, p.Unblocked())
    world.send(world.me, p.LeaseReturn(child.lease, True))
    world.send(world.me, p.LeaseReturn(lease.lease, True))
    world.ask("group.remove", group)
    assert world.free() == cpu(1)


def test_removal_finds_a_cpu_of_its_bundle_lent():
    world = Groups({"CPU": 1})
    group = world.create(cpu(1))
    (lease,) = world.demand(group, cpu(1), count=2)
    world.send(lease.proc, p.Blocked())
    (child,) = world.granted()
    world.send(lease.proc, p.Unblocked())
    world.send(child.proc, p.Blocked())
    world.ask("group.remove", group)
    assert world.head.node.leases.ledger.free == cpu(1)


def test_a_demand_waits_for_its_group_to_be_created():
    world = Groups({"CPU": 1})
    blocking = world.create(cpu(1))
    group = world.create(cpu(1))
    assert world.demand(group, cpu(1)) == []
    world.ask("group.remove", blocking)
    assert len(world.granted()) == 1


def test_removal_stops_what_runs_and_fails_what_waits():
    world = Groups({"CPU": 2}, {"CPU": 2})
    group = world.create(cpu(2), cpu(2), name="train")
    leases = world.demand(group, cpu(1), count=4)
    assert {lease.node - NODE for lease in leases} == {0, 1}
    world.demand(group, cpu(2), class_id=2)
    world.ask("group.remove", group)
    world.advance(1.0)
    assert world.head.running == world.nodes[NODE + 1].running == {}
    failed = world.failed()
    assert {(each.class_id, each.code) for each in failed} == {(2, p.FAILED_GROUP_REMOVED)}
    assert failed[0].reason == "placement group train was removed"
    told = [message for message in world.head.inbox[world.me] if isinstance(message, p.Deaths)]
    causes = dict(death for message in told for death in message.dead)
    assert set(causes) == {lease.proc for lease in leases}
    assert all("placement group train was removed" in cause for cause in causes.values())
    world.demand(group, cpu(1), class_id=3)
    assert [failed.code for failed in world.failed()] == [p.FAILED_GROUP_REMOVED]


def test_actors_die_with_their_group_for_good():
    world = Groups({"CPU": 2})
    group = world.create(cpu(1), name="train")
    strategy = msgspec.msgpack.encode(["group", group, -1, "train"])
    run = names.rewritten(cpu(1), group.hex())
    for serial in (1, 2):
        order = create(world.me, serial, place=run, run=run, strategy=strategy, max_restarts=-1)
        world.send(world.me, order)
    running, waiting = (world.control.actors.get(actor_id(world.me, serial)) for serial in (1, 2))
    assert running is not None
    assert waiting is not None
    assert (running.state, waiting.state) == ("starting", "pending")
    world.ask("group.remove", group)
    assert (running.state, waiting.state) == ("dead", "dead")
    assert b"placement group train was removed" in running.cause
    assert b"placement group train was removed" in waiting.cause
    assert running.incarnation == 0, "it is not restarted only to find that there is no group"
    assert world.control.actors._grouped == {}


# --- nodes die -------------------------------------------------------------------------------------------------------


def test_only_the_bundles_of_a_lost_node_are_placed_anew():
    world = Groups({"CPU": 1}, {"CPU": 1})
    group = world.create(cpu(1), cpu(1), strategy="STRICT_SPREAD")
    lost, kept = (0, 1) if world.where(group)[0] == 1 else (1, 0)
    (lease,) = world.demand(group, cpu(1), bundle=kept)
    world.kill(NODE + 1)
    (row,) = world.ask("group.list", group)  # type: ignore[misc]
    assert row["state"] == "RESCHEDULING"
    assert world.where(group)[kept] == 0
    assert world.demand(group, cpu(1), bundle=lost, class_id=2) == [], "it waits for its bundle"
    world.add({"CPU": 1})
    assert world.where(group)[lost] == 2
    (second,) = world.granted()
    assert second.node == NODE + 2
    assert lease.proc in world.head.running.values(), "what ran on the other node goes on"


def test_an_actor_is_restarted_in_its_bundle_where_that_is_placed_anew():
    world = Groups({"CPU": 1}, {"CPU": 1})
    group = world.create(cpu(1), strategy="STRICT_PACK", target=NODE + 1)
    run = names.rewritten(cpu(1), group.hex(), 0)
    strategy = msgspec.msgpack.encode(["group", group, 0, ""])
    world.send(world.me, create(world.me, 1, place=run, run=run, strategy=strategy, max_restarts=1))
    actor = world.control.actors.get(actor_id(world.me, 1))
    assert actor is not None
    assert actor.node == NODE + 1
    world.kill(NODE + 1)
    assert (actor.node, actor.incarnation, actor.state) == (NODE, 1, "starting")


def test_a_node_that_dies_while_it_is_asked_takes_nothing_along():
    world = Groups({"CPU": 1}, {"CPU": 1})
    world.instant = False
    group = world.new_id(world.me)
    fields = (group, "", "space", [cpu(1), cpu(1)], "PACK", False, [], 0, b"")
    world.tell("group.create", *fields)
    assert world.group(group).state == "preparing"
    assert world.free() == cpu(0), "the head has set its part aside"
    world.kill(NODE + 1)
    world.instant = True
    world.collect()
    assert world.free() == cpu(1)
    assert world.group(group).state == "pending"


def test_a_group_that_loses_more_while_it_is_placed_anew_gets_all_of_it():
    world = Groups({"x": 1}, {"CPU": 1}, {"CPU": 1}, {"CPU": 1})
    group = world.create(cpu(1), cpu(1), strategy="STRICT_SPREAD")
    first, second = (NODE + number for number in world.where(group))
    world.instant = False
    world.kill(first)
    world.deliver("up", first)
    assert world.group(group).state == "preparing", "the spare node is asked"
    world.kill(second)
    world.deliver("up", second)
    assert world.group(group).missing.keys() == {0, 1}
    world.instant = True
    world.collect()
    assert world.group(group).state == "pending"
    world.add({"CPU": 1})
    assert world.group(group).state == "created"


def test_nodes_that_are_lost_together_leave_nothing_set_aside():
    world = Groups({"CPU": 2}, {"CPU": 1, "x": 1}, {"CPU": 1, "x": 1})
    drivers = [world.driver(NODE + 1), world.driver(NODE + 2)]
    blocking = world.create({"x": UNIT}, {"x": UNIT}, proc=drivers[0])
    waiting = world.create({"x": UNIT}, cpu(2))
    assert (world.group(blocking).state, world.group(waiting).state) == ("created", "preparing")
    world.instant = False
    world.advance(
        20.0
    )  # no answer comes from either: the loss of one lets the group go to the other, which is lost too
    world.instant = True
    world.collect()
    world.advance(limits.GATHER_S + 1)
    assert list(world.nodes) == [NODE]
    world.ask("group.remove", waiting)
    assert world.free() == cpu(2)


# --- ends and names --------------------------------------------------------------------------------------------------


def test_groups_end_with_their_job_unless_they_are_detached():
    world = Groups({"CPU": 3})
    other = world.driver()
    mine, detached = world.create(cpu(1), proc=other), world.create(cpu(1), proc=other, detached=True)
    world.head.leave(other)
    assert (world.group(mine).state, world.group(detached).state) == ("removed", "created")
    assert world.free() == cpu(2)


def test_a_group_of_a_detached_actor_ends_with_the_actor():
    world = Groups({"CPU": 3})
    other = world.driver()
    world.send(other, create(other, 1, run={}, place={}, detached=True))
    actor = world.control.actors.get(actor_id(other, 1))
    assert actor is not None
    group = world.new_id(actor.proc)
    fields = (group, "", "space", [cpu(1)], "PACK", False, [], 0, actor.id)
    world.tell("group.create", *fields, proc=actor.proc)
    world.head.leave(other)
    assert world.group(group).state == "created"
    world.send(world.me, p.ActorKill(actor.id, no_restart=True))
    assert world.group(group).state == "removed"


def test_a_name_belongs_to_one_group_of_a_namespace_until_it_is_removed():
    world = Groups({"CPU": 3})
    group = world.create(cpu(1), name="a")
    with pytest.raises(ValueError, match="taken by placement group"):
        world.create(cpu(1), name="a")
    assert world.ask("group.by_name", "a", "space")["group"] == group  # type: ignore[index]
    with pytest.raises(ValueError, match="There are: a"):
        world.ask("group.by_name", "b", "space")
    world.ask("group.remove", group)
    with pytest.raises(ValueError, match="No placement group has a name"):
        world.ask("group.by_name", "a", "space")
    world.create(cpu(1), name="a")


def test_too_many_groups_are_refused(monkeypatch):
    monkeypatch.setattr(limits, "GROUPS_MAX", 2)
    world = Groups({"CPU": 3})
    groups = [world.create(cpu(1)) for _ in range(3)]
    assert [world.group(group).state for group in groups] == ["created", "created", "removed"]
    with pytest.raises(RuntimeError, match="2 groups are as many as there may be"):
        world.ask("group.wait", groups[2], None)


def test_removed_groups_are_forgotten_after_a_while(monkeypatch):
    monkeypatch.setattr(limits, "REMOVED_REMEMBERED", 1)
    world = Groups({"CPU": 3})
    groups = [world.create(cpu(1)) for _ in range(2)]
    for group in groups:
        world.ask("group.remove", group)
    assert [row["group"] for row in world.ask("group.list", None)] == [groups[1]]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="removed long ago"):
        world.ask("group.wait", groups[0], None)


def test_reasons_speak_of_groups_and_bundles():
    world = Groups({"CPU": 2})
    group = world.create(cpu(1), name="train")
    strategy = msgspec.msgpack.encode(["group", group, 0, "train"])
    demand = names.rewritten(cpu(1), group.hex(), 0)
    world.send(world.me, p.LeaseDemand(1, demand, 2, b"", strategy, "f"))
    why = world.ask("why.lease", 1, world.me)
    assert str(why).startswith("needs CPU: 1 in bundle 0 of placement group train; 1 of 1 are in use by f (pid")
    world.send(world.me, p.LeaseDemand(2, cpu(2), 1, b"", b"", "g"))
    assert world.ask("why.lease", 2, world.me) == "needs CPU: 2; 1 of 2 are in use by placement group train"
    waiting = world.create(cpu(2), name="later")
    strategy = msgspec.msgpack.encode(["group", waiting, -1, "later"])
    world.send(world.me, p.LeaseDemand(3, names.rewritten(cpu(1), waiting.hex()), 1, b"", strategy, "h"))
    why = str(world.ask("why.lease", 3, world.me))
    assert "needs CPU: 1 in placement group later, which is not on this node" in why
    assert "placement group later is not created yet" in why
    assert "_group_" not in why
