"""Kill a node in the middle of the work, and see that the answer is right.

A sum over many tasks runs on three nodes, beside an actor that may be restarted. In front of your eyes one node is
killed as a power cut would: its tasks run again elsewhere, its actor moves, and nothing in the program knows.

The exit status is not zero if the sum is wrong.
"""

import sys
import time

import ray
from ray.cluster_utils import Cluster

TASKS = 60
TASK_S = 0.2


@ray.remote(max_retries=-1)
def square(number):
    time.sleep(TASK_S)
    return number * number, ray.get_runtime_context().get_node_id()


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Guide:
    """Lives somewhere, and may have to move."""

    def where(self):
        return ray.get_runtime_context().get_node_id()


def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    victim = cluster.add_node(num_cpus=4, resources={"guide": 1})
    spare = cluster.add_node(num_cpus=2, resources={"guide": 1})
    ray.init(cluster.address)
    cluster.wait_for_nodes()
    names = {cluster.head_node.node_id: "head", victim.node_id: "victim", spare.node_id: "spare"}

    guide = Guide.options(resources={"guide": 1}).remote()
    before = names[ray.get(guide.where.remote())]
    started = time.perf_counter()
    waiting = [square.remote(number) for number in range(TASKS)]
    total, killed = 0, False
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=min(6, len(waiting)))
        values = ray.get(done)
        total += sum(value for value, _ in values)
        places = sorted(names[node] for _, node in values)
        print(
            f"{time.perf_counter() - started:5.2f} s  {TASKS - len(waiting):3d} of {TASKS} done, by {', '.join(places)}"
        )
        if not killed and len(waiting) <= 2 * TASKS // 3:
            killed = True
            cluster.remove_node(victim, allow_graceful=False)
            print(f"{time.perf_counter() - started:5.2f} s  >>> killed a node with all that ran on it <<<")
    expected = sum(number * number for number in range(TASKS))
    after = names[ray.get(guide.where.remote())]
    print(f"The sum is {total}, which is {'right' if total == expected else 'WRONG'}.")
    print(f"The actor lived on {before}, and lives on {after}.")
    ray.shutdown()
    cluster.shutdown()
    return 0 if total == expected and after != "victim" else 1


if __name__ == "__main__":
    sys.exit(main())
