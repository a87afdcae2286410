"""Placement groups on several nodes under arbitrary orders of events; messages are late, but in order.

Nodes come and die, links break, groups are created and removed, tasks take and give back what bundles offer, drivers
leave; and the head dies, with what was on its way to it and part of what it had said and written, and a next one begins
with the records. Every table checks its own invariants after each event. Whenever nothing is on its way, the control
service and the nodes believe the same of every bundle, and what was acknowledged is there: groups until they were asked
to be removed, removals for ever. In the end faults stop: what can be placed is placed, whoever waits is answered; and
when all is removed, every ledger is as it was in the beginning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from ray import _bundle_names as names
from ray import _protocol as p
from ray._control.group_placement import Wish, choose, place_of
from ray._control.group_records import STRATEGIES
from ray._protocol import UNIT
from tests.node.cluster_world import ClusterWorld
from tests.node.simulated import actor_id, cpu, create

if TYPE_CHECKING:
    from ray._control.service import ControlService

HEAD = {"CPU": 2.0}
HEAD_TOTAL = cpu(2)
NODES = [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 3.0}, {"CPU": 1.0, "GPU": 1.0}]
AMOUNTS = st.sampled_from([cpu(1), cpu(2), cpu(0.5), {"CPU": UNIT, "GPU": UNIT}, {"GPU": UNIT // 2}, cpu(8)])
NODES_MAX = 5
WHICH = st.integers(0, 3)
"""Which of the drivers that there are."""


class Groups(RuleBasedStateMachine):
    groups = Bundle("groups")

    def __init__(self) -> None:
        super().__init__()
        self.cluster = ClusterWorld(HEAD, *NODES[:2], instant=False, durable=True)
        self.totals = {key: dict(node.node.leases.ledger.total) for key, node in self.cluster.nodes.items()}
        self.held: dict[int, tuple[int, p.LeaseGranted]] = {}
        """Leases that owners have, with their owner."""
        self.bundles: dict[bytes, list[dict[str, int]]] = {}
        self.asked: dict[tuple[int, int], tuple[str, bytes]] = {}
        """What drivers have asked of which group, by driver and the number of the request."""
        self.acknowledged: dict[bytes, tuple[int, bool]] = {}
        """Groups that have come to be for sure, with their creators, and whether they are detached."""
        self.unwanted: dict[bytes, None] = {}
        """Groups that somebody has asked to remove."""
        self.removed: dict[bytes, None] = {}
        """Groups that are gone for sure."""
        self.drivers: list[int] = []
        self.serial = 0
        self.actors: list[bytes] = []
        self.cluster.deliver_all()

    @initialize()
    def drivers_are_there(self) -> None:
        for key in self.cluster.nodes:
            self.drivers.append(self.cluster.driver(key))
        self.cluster.deliver_all()

    # ---------------------------------------------------------- nodes and messages

    @precondition(lambda self: self.cluster.head_lives)
    @rule(resources=st.sampled_from(NODES))
    def node_comes(self, resources: dict[str, float]) -> None:
        if len(self.cluster.nodes) < NODES_MAX:
            key = self.cluster.add(resources)
            self.totals[key] = dict(self.cluster.nodes[key].node.leases.ledger.total)

    @rule(data=st.data())
    def node_dies(self, data: st.DataObject) -> None:
        others = [key for key in self.cluster.nodes if key != self.cluster.head_key]
        if others:
            self.cluster.kill(data.draw(st.sampled_from(others)))

    @precondition(lambda self: self.cluster.head_lives)
    @rule(data=st.data())
    def link_breaks(self, data: st.DataObject) -> None:
        linked = [key for key in self.cluster.nodes if key not in (self.cluster.head_key, *self.cluster.absent)]
        if linked:
            self.cluster.cut(data.draw(st.sampled_from(linked)))

    @precondition(lambda self: self.cluster.head_lives)
    @rule(data=st.data())
    def head_dies(self, data: st.DataObject) -> None:
        self.cluster.kill_head(lambda count: data.draw(st.integers(0, count)))

    @precondition(lambda self: not self.cluster.head_lives)
    @rule()
    def head_starts(self) -> None:
        self.cluster.start_head()
        self.totals[self.cluster.head_key] = dict(self.cluster.head.node.leases.ledger.total)

    @precondition(lambda self: self.cluster.head_lives and self.cluster.absent)
    @rule(data=st.data())
    def node_comes_back(self, data: st.DataObject) -> None:
        self.cluster.come_back(data.draw(st.sampled_from(sorted(self.cluster.absent))))

    @rule(data=st.data(), count=st.integers(1, 8))
    def some_messages_arrive(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            links = self.cluster.links()
            if links:
                self.cluster.deliver(*data.draw(st.sampled_from(links)))

    @rule()
    def all_messages_arrive(self) -> None:
        self.cluster.deliver_all()

    @rule(seconds=st.sampled_from([0.02, 0.2, 1.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.advance(seconds)

    # ---------------------------------------------------------- drivers and groups

    @precondition(lambda self: len(self.drivers) < 4 and self.cluster.nodes)
    @rule(data=st.data())
    def driver_joins(self, data: st.DataObject) -> None:
        self.drivers.append(self.cluster.driver(data.draw(st.sampled_from(sorted(self.cluster.nodes)))))

    @precondition(lambda self: len(self.drivers) > 2)
    @rule(which=WHICH)
    def driver_leaves(self, which: int) -> None:
        driver = self.drivers.pop(which % len(self.drivers))
        if self.lives(driver):
            self.cluster.node_of(driver).leave(driver)
            self.cluster.collect()

    @rule(
        target=groups,
        which=WHICH,
        bundles=st.lists(AMOUNTS, min_size=1, max_size=4),
        strategy=st.sampled_from(STRATEGIES),
        detached=st.booleans(),
    )
    def create_group(self, which: int, bundles: list[dict[str, int]], strategy: str, detached: bool) -> bytes:
        self.serial += 1
        driver = self.driver(which)
        group = driver.to_bytes(8, "big") + self.serial.to_bytes(6, "big") + bytes(4)
        self.bundles[group] = bundles
        self.tell(driver, "group.create", group, "", "", bundles, strategy, detached, [], 0, b"")
        if not self.lives(driver):
            self.unwanted[group] = None
        return group

    @rule(which=WHICH, group=consumes(groups))
    def remove_group(self, which: int, group: bytes) -> None:
        if not self.is_heard_of(_creator(group)):
            return
        self.unwanted[group] = None
        self.tell(self.driver(which), "group.remove", group)

    @rule(which=WHICH, group=groups, limit_s=st.sampled_from([None, 0.1, 5.0]))
    def wait_for_group(self, which: int, group: bytes, limit_s: float | None) -> None:
        if self.is_heard_of(_creator(group)):
            self.tell(self.driver(which), "group.wait", group, limit_s)

    # ---------------------------------------------------------- what runs

    @rule(which=WHICH, count=st.integers(0, 3), amount=st.sampled_from([cpu(1), cpu(2)]))
    def demand_outside(self, which: int, count: int, amount: dict[str, int]) -> None:
        self.send(self.driver(which), p.LeaseDemand(1 + amount["CPU"] // UNIT, amount, count, b"", b"", "f"))

    @rule(which=WHICH, group=groups, count=st.integers(0, 3), indexed=st.booleans(), idle=st.booleans())
    def demand_in_group(self, which: int, group: bytes, count: int, indexed: bool, idle: bool) -> None:
        amounts = {} if idle else self.bundles[group][0]
        index = 0 if indexed else names.ANY
        demand = names.rewritten(amounts, group.hex(), index)
        strategy = msgspec.msgpack.encode(["group", group, index, "g"])
        class_id = 100 + 4 * int.from_bytes(group[8:14], "big") + 2 * indexed + idle
        self.send(self.driver(which), p.LeaseDemand(class_id, demand, count, b"", strategy, "f"))

    @rule(which=WHICH, group=groups, restarts=st.integers(0, 1))
    def create_actor(self, which: int, group: bytes, restarts: int) -> None:
        self.serial += 1
        driver = self.driver(which)
        run = names.rewritten({}, group.hex())
        strategy = msgspec.msgpack.encode(["group", group, -1, "g"])
        self.actors.append(actor_id(driver, self.serial))
        self.send(driver, create(driver, self.serial, place=run, run=run, strategy=strategy, max_restarts=restarts))

    @rule(data=st.data(), blocks=st.booleans())
    def give_back(self, data: st.DataObject, blocks: bool) -> None:
        """A task ends; or it waits for another, and lends its CPUs meanwhile."""
        if not self.held:
            return
        lease = data.draw(st.sampled_from(sorted(self.held)))
        if blocks:
            self.send(self.held[lease][1].proc, p.Blocked())
        else:
            self.return_lease(lease)

    # ---------------------------------------------------------- what must be true

    def driver(self, which: int) -> int:
        return self.drivers[which % len(self.drivers)]

    def is_heard_of(self, creator: int) -> bool:
        """Of a process that has ended, or of which nothing was heard yet, groups that are not known will never be."""
        return not self.cluster.head_lives or self.control.members.get(creator) is not None

    def lives(self, proc: int) -> bool:
        return any(proc in node.inbox for node in self.cluster.nodes.values())

    def send(self, proc: int, message: p.Message) -> None:
        if self.lives(proc):
            self.cluster.send(proc, message)

    def tell(self, proc: int, op: str, group: bytes, *arguments: object) -> None:
        if self.lives(proc):
            corr = len(self.asked) + 1
            self.asked[proc, corr] = (op, group)
            node = self.cluster.node_of(proc)
            node.send(proc, p.Request(op, msgspec.msgpack.encode([group, *arguments])), corr)
            self.cluster.collect()

    def answer(self, proc: int, corr: int) -> p.Reply | None:
        replies = self.cluster.node_of(proc).replies.get(proc, {})
        return replies.get(corr)  # type: ignore[return-value]

    def return_lease(self, lease: int) -> None:
        owner, grant = self.held.pop(lease)
        self.send(owner, p.LeaseReturn(lease, True, grant.node))

    @invariant()
    def owners_take_what_they_are_given(self) -> None:
        for node in self.cluster.nodes.values():
            for proc in list(node.inbox):
                for grant in node.take(proc, p.LeaseGranted):
                    assert isinstance(grant, p.LeaseGranted)
                    assert grant.lease not in self.held, "granted twice"
                    self.held[grant.lease] = (proc, grant)

    @invariant()
    def what_is_acknowledged_is_noted(self) -> None:
        for (proc, corr), (op, group) in self.asked.items():
            if self.lives(proc) and (answer := self.answer(proc, corr)) is not None:
                if op == "group.create":
                    detached = self.control.groups.find(group)
                    self.acknowledged.setdefault(group, (proc, detached is not None and detached.detached))
                if op == "group.remove":
                    self.removed[group] = None
                assert answer.ok or group in self.unwanted or not self.lives(_creator(group)), "refused without a cause"

    @invariant()
    def what_was_acknowledged_is_there(self) -> None:
        if not self.is_quiet():
            return
        groups = self.control.groups
        for group, (creator, detached) in self.acknowledged.items():
            if group not in self.unwanted and (detached or self.lives(creator)):
                assert groups.get(group) is not None, f"an acknowledged group is lost: {groups.gone(group)}"
        for group in self.removed:
            assert groups.get(group) is None, "a group is there again that was removed"

    @property
    def control(self) -> ControlService:
        return self.cluster.control

    def is_quiet(self) -> bool:
        cluster = self.cluster
        return cluster.head_lives and not (cluster.absent or cluster.links() or cluster.control.is_returning)

    @invariant()
    def both_sides_agree_when_nothing_is_on_its_way(self) -> None:
        if not self.is_quiet():
            return
        placed = {
            (key, group.hex, index)
            for group in self.cluster.control.groups.all()
            for index, key in group.placed.items()
            if group.state != "removed"
        }
        offered = {
            (key, group, index)
            for key, node in self.cluster.nodes.items()
            for group, bundles in node.node.leases.ledger.bundles.items()
            for index in bundles
        }
        assert placed == offered

    def teardown(self) -> None:
        """Faults stop. What fits must come to be; and nothing may be left of what is removed."""
        cluster = self.cluster
        cluster.instant = True
        cluster.all_come_back()
        self.totals[cluster.head_key] = dict(HEAD_TOTAL)
        cluster.collect()
        for _ in range(3):
            for lease in list(self.held):
                self.return_lease(lease)
            self._withdraw_all()
            cluster.advance(30.0)
            self.owners_take_what_they_are_given()
        self.both_sides_agree_when_nothing_is_on_its_way()
        self._expect_the_rest_to_be_too_much()
        self._expect_answers()
        self._expect_nothing_left()

    def _withdraw_all(self) -> None:
        """Nobody wants any more leases."""
        for node in list(self.cluster.nodes.values()):
            for owner, class_id in list(node.node.leases._wants):
                if isinstance(class_id, int) and owner in node.inbox:
                    node.send(owner, p.LeaseDemand(class_id, {}, 0, b"", b"", ""))
        self.cluster.collect()

    def _expect_the_rest_to_be_too_much(self) -> None:
        """Of the groups that wait none fits beside those that are created, as far as a plan can be found."""
        control = self.cluster.control
        for group in control.groups.all():
            if group.state in ("created", "removed"):
                continue
            places = [
                place_of(control.nodes.get(key), dict(node.node.leases.ledger.free))  # type: ignore[arg-type]
                for key, node in self.cluster.nodes.items()
            ]
            wish = Wish(group.strategy, group.missing, group.selectors, group.placed)
            assert choose(places, wish) is None, f"{group} fits and is {group.state}: {group.why}"

    def _expect_answers(self) -> None:
        """Who waits without a limit is answered once the group is created, or gone; everybody else in any case."""
        for (proc, corr), (op, group) in self.asked.items():
            if not self.lives(proc) or self.answer(proc, corr) is not None:
                continue
            found = self.control.groups.get(group)
            state = found.state if found is not None else "gone"
            assert op == "group.wait", f"{op} is not answered"
            assert found is not None, "nobody says that the group is gone"
            assert found.state in ("pending", "preparing"), f"nobody says that the group is {state}"

    def _expect_nothing_left(self) -> None:
        cluster = self.cluster
        last = cluster.driver()
        for group in self.bundles:
            self.tell(last, "group.remove", group)
        for actor in self.actors:
            record = cluster.control.actors.get(actor)
            assert record is None or record.state == "dead", "an actor outlives its group"
        for node in list(cluster.nodes.values()):
            for proc in [proc for proc in node.inbox if proc not in node.pid_of]:
                node.leave(proc)
        cluster.collect()
        cluster.advance(5.0)
        groups = cluster.control.groups.statistics()
        assert groups == {"groups": 0, "groups_unplaced": 0, "group_waiters": 0}
        for key, node in cluster.nodes.items():
            leases = node.node.leases
            owners = [f"{lease.owner:x}" for lease in leases._leases.values()]
            assert leases.ledger.total == leases.ledger.free == self.totals[key], f"held by {owners}, on {key:x}"
            assert leases.statistics()["reservations"] == 0
            assert all(share == UNIT for share in leases.ledger.devices.values())
            assert cluster.control.nodes.get(key).total == self.totals[key]  # type: ignore[union-attr]


def _creator(group: bytes) -> int:
    return int.from_bytes(group[:8], "big")


TestGroups = Groups.TestCase
TestGroups.settings = settings(max_examples=80, stateful_step_count=50, deadline=None, report_multiple_bugs=False)
