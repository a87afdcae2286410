"""Nodes that have lost each other while the head sees both: they get nothing from one another for a while."""

from __future__ import annotations

from ray import _protocol as p
from ray._control import messages
from ray._control.machine import ToNode
from ray._control.members import ENDS_BY_ITSELF_S, NodesApart
from ray._control.placement import APART_MAX, APART_S
from ray._control.service import ControlService
from ray._protocol import UNIT

HEAD, NEAR, FAR, OTHER = 1, 2, 3, 4
OWNER = 50


class Cluster:
    """A control service and the messages that its nodes get. Only some nodes have the resource "spot"."""

    def __init__(self) -> None:
        self.control = ControlService(head=HEAD, validate=True)
        self.now = 0.0
        self.sent: list[ToNode] = []
        self.workers = iter(range(100, 1000))
        for key in (HEAD, NEAR, FAR):
            self.join(key, {"CPU": 4 * UNIT, **({"spot": 4 * UNIT} if key == FAR else {})})
        self.tell(NEAR, messages.MemberJoined(OWNER, p.ROLE_DRIVER, 5, 0))

    def join(self, key: int, resources: dict[str, int]) -> None:
        self.tell(key, messages.NodeHello(key, f"h:{key}", "", f"host{key}", "", "", "", resources, {}))

    def tell(self, node: int, message: p.Message) -> None:
        self.sent += [x for x in self.control.handle(node, message, self.now) if isinstance(x, ToNode)]

    def wants(self, count: int, heard: int = 0) -> list[int]:
        """The owner wants leases; returns the nodes that were told to give some."""
        before = len(self.sent)
        overflow = messages.Overflow(OWNER, 9, count, heard, 1, {"spot": UNIT}, b"", b"", "f")
        self.tell(NEAR, overflow)
        return [x.node for x in self.sent[before:] if type(x.message) is messages.PlaceLeases]

    def loses_worker(self, node: int, after_s: float) -> None:
        """The owner loses its connection to a worker, which ends so much later."""
        worker = next(self.workers)
        self.tell(node, messages.MemberJoined(worker, p.ROLE_WORKER, worker, 1))
        self.tell(NEAR, messages.WhoIs(OWNER, worker))
        self.now += after_s
        self.tell(node, messages.MemberGone(worker, worker, "it ended", (), -9, intended=False))


def test_a_demand_does_not_go_again_where_its_owner_reaches_nobody():
    cluster = Cluster()
    assert cluster.wants(1) == [FAR]
    cluster.loses_worker(FAR, after_s=1.0)
    cluster.join(OTHER, {"CPU": 4 * UNIT, "spot": UNIT})
    assert cluster.wants(1, heard=1) == [OTHER]
    cluster.now += APART_S
    cluster.loses_worker(OTHER, after_s=1.0)
    assert cluster.wants(1, heard=2) == [FAR]


def test_where_there_is_no_choice_it_is_tried_again():
    cluster = Cluster()
    cluster.loses_worker(FAR, after_s=1.0)
    assert cluster.wants(1) == [FAR]


def test_a_worker_that_crashes_says_nothing_about_the_network():
    cluster = Cluster()
    cluster.join(OTHER, {"CPU": 4 * UNIT, "spot": UNIT})
    cluster.loses_worker(FAR, after_s=ENDS_BY_ITSELF_S / 2)
    assert FAR in cluster.wants(5)


def test_pairs_of_nodes_are_remembered_up_to_a_limit():
    placement = Cluster().control.placement
    for other in range(APART_MAX):
        placement.handle(NodesApart(FAR, 1000 + other), 0.0)
    assert len(placement._apart) == APART_MAX
    placement.handle(NodesApart(FAR, NEAR), APART_S)
    assert list(placement._apart) == [(FAR, NEAR), (NEAR, FAR)]
