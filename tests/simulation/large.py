"""A very large cluster in virtual time, and what placing in it costs: ``make simulation``.

Every node is a whole `NodeManager`, and all messages pass the codec. Drivers on as many nodes create actors, then
queue tasks of a few classes, each of which needs a lease of its own; meanwhile nodes and workers are killed, as the
seed says. At last all leave, unless `--placements` ends it before. What nodes lend is checked at every grant; that
actors live once and that names are unique, every `CHECK_EVERY` steps.

Time in here is virtual; what is printed is processor time of one thread that does the work of all nodes and of the
head.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from typing import TYPE_CHECKING

from ray._protocol import ACTOR_ALIVE, UNIT
from tests.simulation.cluster import Cluster, Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.members import Driver, Work

CHECK_EVERY = 200_000

CPUS = 16

CLASSES = ({"CPU": UNIT}, {"CPU": UNIT // 2}, {"CPU": 2 * UNIT}, {"CPU": UNIT, "memory": 100 * UNIT})

TASK_S = 20.0
"""How long a task runs, in virtual time: a cluster of this size is full for a while."""

PATIENCE_S = 3600.0
"""Virtual seconds that one phase may take."""


class Large:
    """One run."""

    def __init__(
        self, seed: int, nodes: int, actors: int, tasks: int, drivers: int, faults: int, placements: int
    ) -> None:
        self.seed, self.nodes, self.actors, self.tasks, self.faults = seed, nodes, actors, tasks, faults
        self.placements = min(placements or tasks, tasks)
        self.cluster = Cluster(seed, validate=False, large=True)
        self.drivers: list[Driver] = []
        self.works: list[Work] = []
        self._drivers = drivers

    def run(self) -> None:
        print(f"seed {self.seed}: {self.nodes:,} nodes of {CPUS} CPUs, {self.actors:,} actors, {self.tasks:,} tasks")
        self._phase("nodes that have joined", lambda: self.nodes, self._join)
        self._phase("actors that are alive", lambda: self.actors, self._create)
        self._phase("tasks that were placed", self._placed, self._queue)
        if self.placements == self.tasks:
            self._phase("tasks that are done", lambda: self.tasks, lambda: self._all_done)
            self._phase("nodes that are free again", lambda: self.nodes, self._leave)

    def _phase(self, what: str, counted: Callable[[], int], act: Callable[[], Callable[[], bool]]) -> None:
        began, steps, at = time.process_time(), self.cluster.timeline.steps, self.cluster.timeline.now
        try:
            done = act()
            finished = self.cluster.run_until(done, PATIENCE_S, self._check)
            assert finished, f"not done after {PATIENCE_S:.0f} s"
        except Exception as error:
            story = "\n  ".join(self.cluster.timeline.story)
            print(f"The last events:\n  {story}\nTo see it again: SKATE_SIMULATION_SEED={self.seed} make simulation")
            raise AssertionError(what) from error
        seconds, count = time.process_time() - began, counted()
        steps = self.cluster.timeline.steps - steps
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{count:>10,} {what:<26} {seconds:8.1f} s {count / seconds:10,.0f} /s {seconds / count * 1e6:8.0f} us each"
            f" {steps:>12,} steps, peak {peak_mb:7,.0f} MB, {self.cluster.timeline.now - at:7.1f} s in there",
            flush=True,
        )

    def _check(self) -> None:
        if self.cluster.timeline.steps % CHECK_EVERY == 0:
            self.cluster.oracle.check()

    # ------------------------------------------------------------------ phases

    def _join(self) -> Callable[[], bool]:
        place = Place({"CPU": CPUS * UNIT, "memory": 64_000 * UNIT})
        head = self.cluster.start_head(Place({"CPU": 0}))
        for _ in range(self.nodes):
            self.cluster.start_node(place)
        control = head.control
        assert control is not None
        return lambda: sum(node.announced for node in control.nodes.all()) == self.nodes + 1

    def _create(self) -> Callable[[], bool]:
        nodes = [node for node in self.cluster.nodes.values() if not node.is_head]
        self.drivers = [self.cluster.start_driver(nodes[i * len(nodes) // self._drivers]) for i in range(self._drivers)]
        for i in range(self.actors):
            name = f"actor{i}" if i % 100 == 0 else ""
            self.drivers[i % len(self.drivers)].create(name=name, max_restarts=-1)
        return lambda: all(x.state == ACTOR_ALIVE for driver in self.drivers for x in driver.actors.values())

    def _queue(self) -> Callable[[], bool]:
        kinds = len(CLASSES) * len(self.drivers)
        for i in range(kinds):
            count = self.tasks // kinds + (i < self.tasks % kinds)
            driver = self.drivers[i // len(CLASSES)]
            self.works.append(driver.submit(CLASSES[i % len(CLASSES)], count, TASK_S, reuse=False))
        for _ in range(self.faults):
            self.cluster.timeline.after(self.cluster.draw(1.0, 4 * TASK_S), self._break)
        return lambda: self._placed() >= self.placements

    def _placed(self) -> int:
        return sum(work.granted for work in self.works)

    def _all_done(self) -> bool:
        return all(work.done == work.total for work in self.works)

    def _break(self) -> None:
        driven = {driver.node.key for driver in self.drivers}
        nodes = [x for x in self.cluster.nodes.values() if not x.is_head and x.key not in driven]
        node = self.cluster.random.choice(nodes)
        match self.cluster.random.choice(("kill_node", "kill_worker", "kill_worker")):
            case "kill_node":
                node.end("it was killed")
                self.cluster.start_node(node.place)
            case "kill_worker" if workers := node.workers():
                node.exits(self.cluster.random.choice(workers).pid, -9)

    def _leave(self) -> Callable[[], bool]:
        assert self.cluster.control is not None
        self.cluster.oracle.check()
        for driver in self.drivers:
            driver.node.driver_ends(driver)
        return lambda: not self.cluster.oracle.quiet()


def main() -> None:
    """Run it as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--actors", type=int, default=100_000)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--drivers", type=int, default=20)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--placements", type=int, default=0, help="stop when so many tasks were placed; 0: all")
    asked = parser.parse_args()
    # Nothing here makes cycles that must be found soon, and looking for them among millions of objects takes long.
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)
    seed = int(os.environ.get("SKATE_SIMULATION_SEED") or time.time_ns() % 1_000_000)
    Large(seed, asked.nodes, asked.actors, asked.tasks, asked.drivers, asked.faults, asked.placements).run()


if __name__ == "__main__":
    sys.exit(main())
