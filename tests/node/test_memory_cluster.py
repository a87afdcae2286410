"""The memory watch beside other nodes: what it knows of work for owners elsewhere, what they hear, where they turn.

A few simulated nodes. The head has the drivers and mostly no CPU, so that all work is for owners of another node.
"""

from __future__ import annotations

from ray import _protocol as p
from ray._control import members, messages, placement
from ray._control.machine import Tick
from ray._node import events, memory, processes
from ray._node.config import MemorySettings
from ray._node.manager import CoreLeft
from tests.node.simulated import World, actor_id, cpu, create

MIB = 1 << 20
WATCH = MemorySettings(threshold=0.9, look_s_max=1.0)


class Cluster:
    """Nodes that share one clock."""

    def __init__(self, *cpus: int, head: int = 0) -> None:
        self.head = World({"CPU": head}, auto=False, memory=WATCH)
        self.nodes = [self.head, *(World({"CPU": count}, auto=False, memory=WATCH, head=self.head) for count in cpus)]
        self.advance(1.0)

    def settle(self) -> None:
        while any(world.forking or world.joinable or world.killed for world in self.nodes):
            for world in self.nodes:
                world.settle()

    def advance(self, seconds: float) -> None:
        """Time passes; what was begun comes to its end at once."""
        end = self.head.now + seconds
        self.settle()
        while True:
            deadline, world = min(
                ((world.head.next_deadline(), world) for world in self.nodes if world.head.next_deadline() is not None),
                key=lambda entry: entry[0],
                default=(None, None),
            )
            if deadline is None or deadline > end:
                break
            for each in self.nodes:
                each.now = max(deadline, each.now)
            world.feed(Tick())
            self.settle()
        for each in self.nodes:
            each.now = end

    def lend(self, driver: int, count: int, **changes: object) -> list[p.LeaseGranted]:
        """Leases that a driver of the head gets on other nodes."""
        self.head.send(driver, p.LeaseDemand(1, cpu(1), count, label="f", **changes))  # type: ignore[arg-type]
        self.advance(1.0)
        return self.head.take(driver, p.LeaseGranted)  # type: ignore[return-value]

    def fill(self, *grants: p.LeaseGranted, mebibytes: int = 600) -> None:
        for grant in grants:
            self.world_of(grant).memory_of[grant.pid] = mebibytes * MIB

    def world_of(self, grant: p.LeaseGranted) -> World:
        return next(world for world in self.nodes if world.node.facts.node == grant.node)

    def orders(self, kind: type[p.Message]) -> list[p.Message]:
        return [message for _, _, message in self.head.said if type(message) is kind]


def died(cluster: Cluster, driver: int) -> list[p.WorkerDied]:
    return cluster.head.take(driver, p.WorkerDied)  # type: ignore[return-value]


# -- What owners elsewhere hear -------------------------------------------------------------------


def test_an_owner_on_another_node_hears_that_memory_was_short_and_what_a_repetition_costs():
    cluster = Cluster(4)
    driver = cluster.head.driver()
    cluster.fill(*cluster.lend(driver, 2))
    cluster.advance(3.0)
    (told,) = died(cluster, driver)
    assert (told.oom, told.retry, told.intended) == (True, p.RETRY_FREE, False)
    assert told.lease
    for part in ("600.0 MiB", "task f", "n1 (127.0.0.1)", "without a charge"):
        assert part in told.cause


def test_that_tasks_must_not_be_repeated_is_known_on_other_nodes_too():
    cluster = Cluster(4)
    driver = cluster.head.driver()
    cluster.fill(*cluster.lend(driver, 2, retriable=False))
    cluster.advance(3.0)
    (told,) = died(cluster, driver)
    assert "its max_retries is 0" in told.cause


def test_the_holder_of_a_lease_hears_what_a_repetition_costs_before_everybody_hears_of_the_death(monkeypatch):
    for module in (members, processes):
        monkeypatch.setattr(module, "TELL_ALL_AT", 1)
    cluster = Cluster(4)
    driver = cluster.head.driver()
    cluster.fill(*cluster.lend(driver, 2))
    cluster.advance(3.0)
    news = [m for m in cluster.head.inbox[driver] if isinstance(m, p.WorkerDied | p.Deaths)]
    assert [type(message) for message in news] == [p.WorkerDied, p.Deaths]


def test_who_asks_about_a_process_that_was_ended_elsewhere_hears_the_same():
    cluster = Cluster(4)
    driver, other = cluster.head.driver(), cluster.head.driver()
    cluster.fill(*cluster.lend(driver, 2))
    cluster.advance(0.2)  # before everybody is told of the bare death
    (told,) = died(cluster, driver)
    cluster.head.send(other, p.PeerLost(told.proc))
    (answer,) = died(cluster, other)
    assert (answer.oom, answer.retry) == (True, p.RETRY_FREE)


def test_of_an_actor_it_is_known_whose_it_is_and_whether_it_may_start_again():
    cluster = Cluster(4)
    driver = cluster.head.driver()
    cluster.head.send(driver, create(driver, 1, max_restarts=1, label="Model"))
    cluster.advance(1.0)
    world = cluster.nodes[1]
    for restarts in (True, False):
        (tenant,) = world.node._tenants()
        assert (tenant.owner, tenant.retriable) == (driver, restarts)
        world.memory_of[tenant.pid] = 1000 * MIB
        cluster.advance(memory.HOLD_S_MAX + 10)
    assert list(world.node._tenants()) == []
    actor = cluster.head.control.actors.get(actor_id(driver, 1))
    assert (actor.state, actor.incarnation) == ("dead", 1)
    assert b"no restart left" in actor.cause


# -- Where their work goes ------------------------------------------------------------------------


def test_what_is_held_back_on_one_node_goes_to_another_that_has_room():
    cluster = Cluster(2, 2)
    driver, other = cluster.head.driver(), cluster.head.driver()
    blockers = cluster.lend(other, 4)
    first = blockers[0].node
    for grant in [x for x in blockers if x.node == first]:
        cluster.head.send(other, p.LeaseReturn(grant.lease, True, grant.node))
    grants = cluster.lend(driver, 2)
    assert {grant.node for grant in grants} == {first}
    cluster.fill(*grants)
    # The other node has room before the first one has memory again.
    for grant in [x for x in blockers if x.node != first]:
        cluster.head.send(other, p.LeaseReturn(grant.lease, True, grant.node))
    cluster.advance(0.2)
    (told,) = died(cluster, driver)
    assert told.proc in {grant.proc for grant in grants}
    (again,) = cluster.lend(driver, 1)
    assert again.node != first


def test_what_is_held_back_where_it_is_at_home_goes_to_another_node():
    cluster = Cluster(2, head=4)
    driver = cluster.head.driver()
    grants = cluster.lend(driver, 2)
    assert {grant.node for grant in grants} == {cluster.head.node.facts.node}
    cluster.fill(*grants)
    cluster.advance(0.2)
    assert len(died(cluster, driver)) == 1
    (again,) = cluster.lend(driver, 1)
    assert again.node == cluster.nodes[1].node.facts.node


def test_what_is_held_back_everywhere_stands_in_line_says_why_and_is_not_asked_for_again_and_again():
    cluster = Cluster(4)
    driver = cluster.head.driver()
    grants = cluster.lend(driver, 2)
    cluster.fill(*grants)
    cluster.advance(0.2)
    (told,) = died(cluster, driver)
    (survivor,) = [grant for grant in grants if grant.proc != told.proc]
    cluster.head.said.clear()
    assert cluster.lend(driver, 1) == []
    cluster.advance(30.0)
    assert cluster.head.take(driver, p.LeaseGranted) == []
    assert "memory was short" in cluster.head.request(driver, "why.lease", 1, driver)
    assert len(cluster.orders(messages.PlaceLeases)) <= 2 * 31 / placement.SHY_OF_MEMORY_S
    cluster.head.send(driver, p.LeaseReturn(survivor.lease, True, survivor.node))
    cluster.world_of(survivor).memory_of.clear()
    cluster.advance(memory.PAUSE_S_MAX)
    (again,) = cluster.head.take(driver, p.LeaseGranted)
    assert again.node == survivor.node
    assert cluster.head.node.leases.statistics()["leases_wanted"] == 0


def test_an_actor_that_is_held_back_stands_in_line_once_however_often_room_is_reported():
    cluster = Cluster(4)
    driver = cluster.head.driver()
    grants = cluster.lend(driver, 1)
    cluster.fill(*grants, mebibytes=300)
    cluster.head.send(driver, create(driver, 1, max_restarts=1, run=cpu(1), label="Model"))
    cluster.advance(1.0)
    world = cluster.nodes[1]
    (tenant,) = [tenant for tenant in world.node._tenants() if tenant.is_actor]
    world.memory_of[tenant.pid] = 650 * MIB
    cluster.advance(0.5)
    actor = cluster.head.control.actors.get(actor_id(driver, 1))
    assert (actor.state, actor.incarnation) == ("pending", 1)
    assert "memory was short" in cluster.head.request(driver, "why.actor", actor.id)
    # Not enough for it is free, which its resources do not show.
    cluster.fill(*grants, mebibytes=500)
    for _ in range(20):
        cluster.head.send(driver, p.LeaseDemand(2, cpu(1), 1))
        cluster.advance(1.0)
        for grant in cluster.head.take(driver, p.LeaseGranted):
            cluster.head.send(driver, p.LeaseReturn(grant.lease, True, grant.node))
    assert actor.state == "pending"
    cluster.advance(memory.HOLD_S_MAX)
    assert actor.state == "starting"


# -- Lines, without any memory --------------------------------------------------------------------


def test_an_actor_in_line_on_the_last_node_is_not_placed_there_a_second_time():
    cluster = Cluster(1, head=1)
    drivers = [cluster.head.driver() for _ in range(2)]
    cluster.head.send(drivers[0], p.LeaseDemand(1, cpu(1), 2))
    cluster.advance(1.0)
    cluster.head.send(drivers[1], create(drivers[1], 1, run=cpu(1)))
    cluster.advance(1.0)
    demand = cluster.head.control.placement._demands[0, actor_id(drivers[1], 1)]
    other = cluster.nodes.pop()
    assert set(demand.queued) <= {world.node.facts.node for world in (cluster.head, other)}
    cluster.head.feed(CoreLeft(other.node.facts.node, "cut"))
    for grant in cluster.head.take(drivers[0], p.LeaseGranted):
        if grant.node == cluster.head.node.facts.node:
            cluster.head.send(drivers[0], p.LeaseReturn(grant.lease))
    cluster.head.send(drivers[0], p.LeaseDemand(1, cpu(1), 0))
    cluster.advance(1.0)
    assert cluster.head.control.actors.get(actor_id(drivers[1], 1)).state == "starting"


def test_leaving_the_line_refuses_what_was_placed_beside_it():
    """Else its owner would wait for ever for leases that nobody knows of."""
    cluster = Cluster(1)
    driver = cluster.head.driver()
    (grant,) = cluster.lend(driver, 1)
    world = cluster.world_of(grant)
    fields = (driver, 2)
    about = (1, cpu(1), b"", b"", "g", 0)
    cluster.head.said.clear()
    for message in (
        messages.PlaceLeases(*fields, 1, *about, True),
        messages.PlaceLeases(*fields, 2, *about, False),
        messages.WithdrawLeases(*fields),
    ):
        world.feed(events.FromControl(message))
    refused = [message for _, _, message in world.said if isinstance(message, messages.LeasesRefused)]
    assert sum(message.count for message in refused) == 2
