"""Placement groups when the head dies and a next one goes on with its records, and when the link of a node breaks."""

from __future__ import annotations

import msgspec
import pytest

from ray import _bundle_names as names
from ray import _protocol as p
from ray._control import messages
from ray._control.nodes import RETURN_S
from ray._control.service import HEARD_AFTER_S, RETURNED_S
from ray._protocol import UNIT
from tests.control.test_groups import Groups
from tests.node.simulated import NODE, actor_id, cpu, create

FIRST, SECOND = NODE + 1, NODE + 2


class Durable(Groups):
    """A head that keeps records and has no CPUs, two nodes with two CPUs each, and a driver on the first of these."""

    def __init__(self, head: float = 0.0) -> None:
        super().__init__({"CPU": head}, {"CPU": 2}, {"CPU": 2}, durable=True)
        self.me = self.driver(FIRST)

    def answer(self, corr: int) -> object:
        """The answer to a request of the driver; None if there is none yet."""
        reply = self.node_of(self.me).replies.get(self.me, {}).get(corr)
        return None if reply is None else (reply.ok, msgspec.msgpack.decode(reply.body))  # type: ignore[attr-defined]

    def restart(self, *, lost: int = 0, **how: object) -> None:
        """The head dies, and all nodes come back to the next one, but for one that is lost."""
        self.kill_head(**how)  # type: ignore[arg-type]
        if lost:
            self.kill(lost)
        self.all_come_back()
        self.advance(RETURN_S + 1 if lost else RETURNED_S)

    def mine(self, key: int) -> dict[str, int]:
        """What is free of what the node has of itself, without what is nothing."""
        return {name: units for name, units in self.free(key).items() if units}


@pytest.fixture
def world():
    return Durable()


def one_on_each(world: Durable, **options: object) -> bytes:
    return world.create(cpu(1), cpu(1), strategy="STRICT_SPREAD", **options)  # type: ignore[arg-type]


def test_a_created_group_is_where_it_was(world):
    group = one_on_each(world, name="g")
    assert world.group(group).state == "created"
    where, attempt = world.where(group), world.group(group).attempt
    for _ in range(3):
        world.restart()
        assert (world.group(group).state, world.where(group), world.group(group).attempt) == ("created", where, attempt)
        for key in (FIRST, SECOND):
            assert world.control.nodes.get(key).total == world.nodes[key].node.leases.ledger.total
            assert world.mine(key) == cpu(1)
    assert world.control.groups.by_name("g", "space").id == group
    with pytest.raises(ValueError, match="is taken by placement group"):
        world.create(cpu(1), name="g")
    world.tell("group.remove", group)
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(2), cpu(2)]


def test_what_runs_in_a_group_runs_on_and_more_can_begin(world):
    group = one_on_each(world)
    granted = world.demand(group, cpu(1), bundle=1)
    assert len(granted) == 1
    world.restart()
    assert world.granted() == []
    assert len(world.demand(group, cpu(1), bundle=0, class_id=2)) == 1
    world.send(world.me, p.LeaseReturn(granted[0].lease, True, granted[0].node))
    assert len(world.demand(group, cpu(1), bundle=1, class_id=3)) == 1


def test_a_group_is_usable_before_all_nodes_are_back(world):
    group = world.create(cpu(2), strategy="STRICT_PACK", target=SECOND)
    corr = world.tell("group.wait", group)
    assert world.answer(corr) == (True, True)
    world.kill_head()
    world.start_head()
    assert world.group(group).state == "returning"
    world.come_back(SECOND)
    assert world.group(group).state == "created"
    assert world.control.is_returning


def test_who_waits_for_a_group_is_answered_by_the_next_head(world):
    group = world.create(cpu(2), cpu(2), cpu(1))
    forever, for_a_while = world.tell("group.wait", group), world.tell("group.wait", group, 30.0)
    waiting = world.demand(group, cpu(1))
    assert waiting == []
    world.advance(10.0)
    world.restart()
    assert world.answer(forever) is world.answer(for_a_while) is None
    world.advance(20.0 - 1.0)
    assert world.answer(for_a_while) is None
    world.advance(1.0)
    assert world.answer(for_a_while) == (True, False)
    world.add({"CPU": 1})
    assert world.answer(forever) == (True, True)
    assert len(world.granted()) == 1
    assert [len(node.node._questions) for node in world.nodes.values()] == [0, 0, 0, 0]


def test_who_has_gone_waits_no_longer(world):
    group = world.create(cpu(8))
    world.tell("group.wait", group)
    world.tell("group.wait", b"no group")
    world.node_of(world.me).leave(world.me)
    world.collect()
    assert len(world.nodes[FIRST].node._questions) == 0
    world.restart()
    assert world.control.groups.statistics()["group_waiters"] == 0


def test_a_group_that_was_asked_for_without_a_head_is_created_by_the_next(world):
    world.kill_head()
    group = world.new_id(world.me)
    created = world.tell("group.create", group, "", "", [cpu(1)], "PACK", False, [], 0, b"")
    waits = world.tell("group.wait", group)
    world.all_come_back()
    assert world.answer(created) == (True, None)
    assert world.answer(waits) == (True, True)


def test_what_was_acknowledged_was_written_before(world):
    world.instant = False
    group = world.new_id(world.me)
    corr = world.tell("group.create", group, "", "", [cpu(1)], "PACK", False, [], 0, b"")
    while world.answer(corr) is None:
        assert ("groups", group) not in world.records
        world.deliver(*next(link for link in world.links() if link[0] != "disk" or len(world.links()) == 1))
        if world.links() == [("disk", NODE)]:
            assert world.answer(corr) is None
            world.deliver("disk", NODE)
            break
    assert ("groups", group) in world.records


# --- in the middle of the two phases ---------------------------------------------------------------------------------


def prepare(world: Durable) -> bytes:
    """A group of which both nodes have set their share aside, and the head has not heard so."""
    world.instant = False
    group = world.new_id(world.me)
    bundles = [cpu(1), cpu(1)]
    world.tell("group.create", group, "", "", bundles, "STRICT_SPREAD", True, [], 0, b"")
    while any(world.nodes[key].node.leases.reservations.of(group, 1) == [] for key in (FIRST, SECOND)):
        world.deliver(*next(link for link in world.links() if link[0] != "up" or link[1] == FIRST))
    return group


def test_what_is_set_aside_and_was_not_committed_is_given_back(world):
    group = prepare(world)
    world.kill_head()
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(1), cpu(1)]
    world.instant = True
    world.start_head()
    world.come_back(FIRST)
    assert world.mine(FIRST) == cpu(2), "kept for an attempt that nobody makes"
    world.come_back(SECOND)
    world.advance(RETURNED_S)
    assert world.group(group).state == "created"
    assert world.group(group).attempt > 1
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(1), cpu(1)]


def test_what_was_committed_and_not_told_is_offered_by_the_next_head(world):
    group = prepare(world)
    while ("bundles", group) not in world.records:
        world.deliver(*next(link for link in world.links() if link[0] != "down"))
    world.kill_head(lambda count: 0)
    assert [world.nodes[key].node.leases.ledger.bundles for key in (FIRST, SECOND)] == [{}, {}]
    world.instant = True
    world.all_come_back()
    assert (world.group(group).state, world.group(group).attempt) == ("created", 1)
    assert all(group.hex() in world.nodes[key].node.leases.ledger.bundles for key in (FIRST, SECOND))


def test_what_a_node_has_said_about_attempts_is_not_said_again(world):
    """The next head may make an attempt of the same number, which must not seem to be answered."""
    prepare(world)
    world.kill_head()
    world.start_head()
    world.come_back(FIRST)
    assert world.up[FIRST]
    kinds = [messages.KINDS[kind] for kind in (messages.BundlesPrepared, messages.BundlesRefused)]
    assert not [kind for kind, _ in world.up[FIRST] if kind in kinds]


def test_a_group_that_waits_on_its_nodes_is_planned_anew(world):
    holding = world.create(cpu(2))
    group = world.create(cpu(2), cpu(2))  # it gathers: one node keeps what it has for it, the other lets it wait
    assert world.group(group).state == "preparing"
    world.restart()
    assert world.group(group).state == "preparing"
    world.tell("group.remove", holding)
    world.advance(10.0)
    assert world.group(group).state == "created"


# --- what has ended meanwhile ----------------------------------------------------------------------------------------


def test_a_group_that_was_removed_as_the_head_died_is_released(world):
    group = one_on_each(world)
    run = names.rewritten({}, group.hex())
    strategy = msgspec.msgpack.encode(["group", group, -1, "g"])
    world.send(world.me, create(world.me, 1, place=run, run=run, strategy=strategy, max_restarts=-1))
    world.instant = False
    world.tell("group.remove", group)
    while world.group(group).state != "removed" or world.head.commits:
        world.deliver(*next(link for link in world.links() if link[0] != "down"))
    world.kill_head(lambda count: 0)
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(1), cpu(1)]
    world.instant = True
    world.all_come_back()
    world.advance(RETURNED_S)
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(2), cpu(2)]
    assert world.group(group).state == "removed"
    actor = world.control.actors.get(actor_id(world.me, 1))
    assert (actor.state, b"was removed" in actor.cause) == ("dead", True)
    world.demand(group, cpu(1))
    assert [x.code for x in world.node_of(world.me).take(world.me, p.LeaseFailed)] == [p.FAILED_GROUP_REMOVED]


def test_a_creation_that_is_said_again_does_not_bring_a_group_back(world):
    """Another driver's node knows that its removal was heard; the creator's does not know that of the creation."""
    other = world.driver(SECOND)
    world.instant = False
    group = world.new_id(world.me)
    world.tell("group.create", group, "", "", [cpu(1)], "PACK", True, [], 0, b"")
    while world.control.groups.find(group) is None:
        world.deliver("up", FIRST)
    world.tell("group.remove", group, proc=other)
    while world.group(group).state != "removed" or world.head.commits:
        world.deliver(*next(link for link in world.links() if link[0] != "down"))
    world.advance(HEARD_AFTER_S)
    while world.down[SECOND]:
        world.deliver("down", SECOND)
    world.kill_head(lambda count: 0)
    world.instant = True
    world.all_come_back()
    world.advance(RETURNED_S)
    assert world.group(group).state == "removed"
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(2), cpu(2)]


def test_actors_of_before_the_restart_die_with_their_group(world):
    group = one_on_each(world)
    run = names.rewritten({}, group.hex())
    strategy = msgspec.msgpack.encode(["group", group, -1, "g"])
    world.send(world.me, create(world.me, 1, place=run, run=run, strategy=strategy, max_restarts=-1))
    world.restart()
    world.tell("group.remove", group)
    actor = world.control.actors.get(actor_id(world.me, 1))
    assert (actor.state, actor.incarnation) == ("dead", 0)


def test_what_was_never_created_is_known_to_be_so(world):
    never = world.new_id(world.me)
    world.create(cpu(1))
    world.restart()
    assert world.answer(world.tell("group.wait", never))[0] is False


def test_bundles_of_a_node_that_does_not_come_back_are_placed_anew(world):
    group = one_on_each(world)
    [kept] = [index for index, key in world.group(group).placed.items() if key == FIRST]
    world.kill_head()
    world.kill(SECOND)
    world.start_head()
    world.come_back(FIRST)
    world.add({"CPU": 2})
    assert world.demand(group, cpu(1), bundle=1 - kept) == []
    assert world.group(group).state == "returning"
    world.advance(RETURN_S)
    assert world.group(group).state == "created"
    assert sorted(world.where(group)) == [1, 3]
    assert len(world.granted()) == 1


def test_bundles_of_the_head_s_own_node_are_placed_anew():
    world = Durable(head=2)
    group = world.create(cpu(2), strategy="STRICT_PACK", target=NODE)
    assert world.where(group) == [0]
    world.restart()
    assert world.group(group).state == "created"
    assert world.group(group).placed[0] != NODE
    world.tell("group.remove", group)
    assert sum((world.mine(key) or cpu(0))["CPU"] for key in world.nodes) == 6 * UNIT


def test_groups_of_a_driver_that_does_not_come_back_end_unless_they_are_detached(world):
    other = world.driver(SECOND)
    bound, free = world.create(cpu(1), proc=other), world.create(cpu(1), proc=other, detached=True)
    world.kill_head()
    world.nodes[SECOND].leave(other)
    world.all_come_back()
    world.advance(RETURNED_S)
    assert (world.group(bound).state, world.group(free).state) == ("removed", "created")


def test_nobody_is_told_that_a_group_is_gone_whose_creator_may_come_back(world):
    """The creation is said again, after others have asked."""
    creator = world.driver(SECOND)
    world.kill_head()
    group = world.new_id(creator)
    world.tell("group.create", group, "", "", [cpu(1)], "PACK", False, [], 0, b"", proc=creator)
    never = world.new_id(creator + (1 << 20))
    corr, hopeless = world.tell("group.wait", group), world.tell("group.wait", never)
    world.start_head()
    world.come_back(FIRST)
    assert world.answer(corr) is world.answer(hopeless) is None
    world.come_back(SECOND)
    assert world.answer(corr) == (True, True)
    world.advance(RETURN_S)
    assert world.answer(hopeless)[0] is False


def test_what_a_driver_on_the_head_had_is_free_again(world):
    owner = world.driver()
    world.send(owner, p.LeaseDemand(1, cpu(2), 2, b"", b"", "f"))
    assert [world.mine(key) for key in (FIRST, SECOND)] == [{}, {}]
    world.restart()
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(2), cpu(2)]


# --- broken links ----------------------------------------------------------------------------------------------------


def test_what_a_node_missed_while_its_link_was_broken_is_said_again(world):
    group = prepare(world)
    while world.group(group).state != "created":
        world.deliver(*next(link for link in world.links() if link[0] != "down"))
    world.cut(FIRST)
    world.instant = True
    world.collect()
    assert group.hex() in world.nodes[FIRST].node.leases.ledger.bundles
    world.instant = False
    world.tell("group.remove", group)
    while world.group(group).state != "removed":
        world.deliver(*next(link for link in world.links() if link[0] != "down"))
    world.cut(SECOND)
    world.instant = True
    world.collect()
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(2), cpu(2)]


def test_a_group_whose_nodes_were_asked_in_vain_is_planned_anew(world):
    world.instant = False
    group = world.new_id(world.me)
    world.tell("group.create", group, "", "", [cpu(1), cpu(1)], "STRICT_SPREAD", True, [], 0, b"")
    while ("groups", group) not in world.records:
        world.deliver(*next(link for link in world.links() if link[0] != "down"))
    assert world.group(group).state == "preparing"
    world.cut(FIRST)
    world.instant = True
    world.collect()
    world.advance(1.0)
    assert world.group(group).state == "created"
    assert [world.mine(key) for key in (FIRST, SECOND)] == [cpu(1), cpu(1)]


# --- demands that are bound to nodes ---------------------------------------------------------------------------------


def bound(world: Durable, node: int) -> None:
    strategy = msgspec.msgpack.encode(["node", node, False])
    world.send(world.me, p.LeaseDemand(7, cpu(1), 1, b"", strategy, "f"))


def test_what_is_bound_to_a_node_that_may_come_back_waits_for_it(world):
    world.kill_head()
    bound(world, SECOND)
    world.start_head()
    world.come_back(FIRST)
    assert world.node_of(world.me).take(world.me, p.LeaseFailed) == []
    world.come_back(SECOND)
    assert [x.node for x in world.granted()] == [SECOND]


def test_what_is_bound_to_a_node_that_does_not_come_back_fails_then(world):
    world.kill_head()
    bound(world, SECOND)
    world.kill(SECOND)
    world.start_head()
    world.come_back(FIRST)
    assert world.node_of(world.me).take(world.me, p.LeaseFailed) == []
    world.advance(RETURN_S)
    assert [x.code for x in world.node_of(world.me).take(world.me, p.LeaseFailed)] == [p.FAILED_UNSCHEDULABLE]
