"""Small clusters of real machines in virtual time, with their validators on, under everything that can go wrong."""

from __future__ import annotations

import os

import pytest

from ray._protocol import ACTOR_ALIVE, UNIT
from tests.simulation.adversary import Adversary
from tests.simulation.cluster import Cluster, Place

SEEDS = [int(os.environ["SKATE_SIMULATION_SEED"])] if "SKATE_SIMULATION_SEED" in os.environ else list(range(1, 13))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_small_world_is_safe_under_faults_and_comes_to_rest_after_them(seed):
    Adversary(seed).run()


def test_an_actor_of_a_node_that_is_cut_off_is_stopped_there_before_it_runs_elsewhere():
    cluster = Cluster(1)
    head = cluster.start_head(Place({"CPU": UNIT}))
    for _ in range(2):
        cluster.start_node(Place({"CPU": UNIT}))
    check = cluster.oracle.check
    cluster.run_until(lambda: False, 0.5, check)
    driver = cluster.start_driver(head)
    wanted = [driver.create(place={"CPU": UNIT}, max_restarts=-1) for _ in range(12)]
    assert cluster.run_until(lambda: all(x.state == ACTOR_ALIVE for x in wanted), 5.0, check)
    cut = next(node for node in cluster.nodes.values() if not node.is_head)
    stranded = [x for x in wanted if cluster.members[x.proc].node is cut]
    assert stranded
    cluster.cut(cut, 25.0)
    assert cluster.run_until(
        lambda: all(x.incarnation > 0 and x.state == ACTOR_ALIVE for x in stranded), 20.0, check
    ), "they were not started anew"
    assert cluster.run_until(lambda: not cut.alive, 40.0, check), "it was not told to leave"
