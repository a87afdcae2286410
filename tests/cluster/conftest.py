"""Clusters of several node processes on this machine."""

import pytest


@pytest.fixture
def start_cluster(cluster_keeper, belongings):
    """A function that starts a head and further nodes, given as dictionaries of arguments, and makes this process a
    driver; `options` are the cluster's. Nothing of it is left after the test.
    """
    import ray
    from ray.cluster_utils import Cluster

    cluster_keeper.stop()
    before = belongings.now()
    started = []

    def start(*nodes, head=None, **options):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **(head or {})}, **options)
        started.append(cluster)
        added = [cluster.add_node(**node) for node in nodes]
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        cluster.wait_for_nodes()
        return cluster, added

    yield start
    ray.shutdown()
    for cluster in started:
        cluster.shutdown()
    before.expect_nothing_more()
