"""Who lets a cluster work and breaks it: a seed draws the cluster, the work, which faults there are, and when.

Some faults are left out of each world entirely: a swarm of different worlds finds more than one that has everything in
it. First *safety*: faults come, and nothing wrong may happen, whatever becomes of the work. Then *liveness*: they end,
what was lost is replaced, and everything that was asked for must be done in time. At last all leave, and nothing may be
held any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ray._protocol import UNIT
from tests.simulation.cluster import Cluster, Place

if TYPE_CHECKING:
    from tests.simulation.members import Driver
    from tests.simulation.nodes import SimulatedNode

FAULTS = ("kill_worker", "kill_node", "reset_link", "cut_link", "kill_head", "kill_driver", "init_fails", "join_fails")

STRATEGIES = ("default", "spread", "node", "labels")

FAULTS_S = 15.0
"""Virtual seconds in which things go wrong."""

CONVERGE_S = 240.0
"""Virtual seconds after the last fault within which everything must be done: a few times the longest patience of any
part, which is a minute."""

LEAVE_S = 120.0
"""The same for the end, when all leave."""

RECORDS_EVERY = 64
"""Steps between two looks at everything that was acknowledged."""


class Options(msgspec.Struct, frozen=True):
    """What a seed has drawn for a world."""

    nodes: int
    drivers: int
    faults: tuple[str, ...]
    pause_s: float
    """Between two faults, on average."""
    link_s: float
    strategies: tuple[str, ...]
    names: int
    work_pause_s: float


class Adversary:
    """One world, from its beginning to its end."""

    def __init__(self, seed: int, *, validate: bool = True) -> None:
        self.seed = seed
        draw = Cluster(seed).random
        self.options = Options(
            nodes=draw.randint(2, 6),
            drivers=draw.randint(1, 3),
            faults=tuple(fault for fault in FAULTS if draw.random() < 0.5),
            pause_s=draw.choice((0.3, 1.0, 3.0)),
            link_s=draw.choice((0.0002, 0.002, 0.03)),
            strategies=tuple(x for x in STRATEGIES if x == "default" or draw.random() < 0.5),
            names=draw.randint(0, 3),
            work_pause_s=draw.choice((0.1, 0.4)),
        )
        chances = {fault: 0.2 for fault in ("init_fails", "join_fails") if fault in self.options.faults}
        self.cluster = Cluster(seed, validate=validate, chances=chances, link_s=self.options.link_s)
        self._random = self.cluster.random
        self._driver_serial = 0
        self._key_serial = 0
        self._actor_cpus = 0
        """CPUs that actors hold in all. They are few, so that tasks find room beside them."""
        self._working = True
        self._faulty = True

    def run(self) -> str:
        """The whole of it; returns a trace of what came out, which a seed determines.

        Raises:
            AssertionError: If something is wrong. The text has the options, the last events, and how to see it again.
        """
        try:
            self._begin()
            self._go(FAULTS_S)
            self._end_faults()
            self._converge()
            self._leave()
        except Exception as error:
            story = "\n  ".join(self.cluster.timeline.story)
            msg = (
                f"{type(error).__name__}: {error}\n{self.options}\nThe last events:\n  {story}\nTo see it again:\n"
                f"  SKATE_SIMULATION_SEED={self.seed} python -m pytest tests/simulation -k small"
            )
            raise AssertionError(msg) from error
        cluster = self.cluster
        return f"{cluster.timeline.steps} {cluster.timeline.now:.6f} {cluster.oracle.acknowledged} {cluster.new_id()}"

    # ------------------------------------------------------------------ the course of it

    def _begin(self) -> None:
        self.cluster.start_head(self._place())
        for _ in range(self.options.nodes):
            self.cluster.start_node(self._place())
        self._go(0.5)
        for _ in range(self.options.drivers):
            self._start_driver()
        timeline = self.cluster.timeline
        timeline.after(0.0, self._work)
        timeline.after(self.options.pause_s, self._break)

    def _place(self) -> Place:
        resources = {"CPU": self._random.randint(2, 4) * UNIT, "memory": 1000 * UNIT}
        if self._random.random() < 0.3:
            resources["GPU"] = 2 * UNIT
        return Place(resources, {"zone": self._random.choice(("east", "west"))})

    def _go(self, seconds: float) -> None:
        self.cluster.run_until(lambda: False, seconds, self._check)

    def _check(self) -> None:
        self.cluster.oracle.check()
        if self.cluster.control is not None and self.cluster.timeline.steps % RECORDS_EVERY == 0:
            self.cluster.oracle.check_records()

    def _end_faults(self) -> None:
        self.cluster.timeline.note("the faults end")
        self._working = self._faulty = False
        self.cluster.calm_down()
        self.cluster.heal()
        if self.cluster.control is None:
            self._restart_head()
        self._go(12.0)  # until it is known who was lost
        for place in self.cluster.lost_places:
            self.cluster.start_node(place)
        self.cluster.lost_places.clear()

    def _converge(self) -> None:
        done = self.cluster.run_until(lambda: not self._pending(), CONVERGE_S, self._check)
        assert done, f"not done {CONVERGE_S:.0f} s after the last fault: " + "; ".join(self._pending())
        self.cluster.oracle.check_records()

    def _pending(self) -> list[str]:
        if self.cluster.control is None or self.cluster.control.is_returning:
            return ["the head is not ready"]
        return [text for driver in self._living_drivers() for text in driver.pending()]

    def _leave(self) -> None:
        """Everybody goes, and what is detached is killed."""
        self.cluster.timeline.note("all leave")
        assert self.cluster.control is not None
        for driver in self._living_drivers():
            driver.node.driver_ends(driver)
        last = self._start_driver()
        for record in self.cluster.control.actors.actors():
            if record.detached:
                last.kill(record.id, no_restart=True)
        empty = self.cluster.run_until(lambda: not self.cluster.oracle.quiet(), LEAVE_S, self._check)
        assert empty, f"not free {LEAVE_S:.0f} s after all have left: " + "; ".join(self.cluster.oracle.quiet())

    # ------------------------------------------------------------------ work

    def _living_drivers(self) -> list[Driver]:
        return [driver for driver in self.cluster.drivers.values() if driver.alive]

    def _start_driver(self) -> Driver:
        return self.cluster.start_driver(self._random.choice(list(self.cluster.nodes.values())))

    def _work(self) -> None:
        if not self._working:
            return
        self.cluster.timeline.after(self.cluster.draw(0, 2 * self.options.work_pause_s), self._work)
        drivers = self._living_drivers()
        if not self.cluster.nodes:
            return
        if len(drivers) < self.options.drivers:
            drivers.append(self._start_driver())
        driver = self._random.choice(drivers)
        match self._random.randrange(8):
            case 0 | 1 | 2:
                self._submit(driver)
            case 3 | 4:
                self._create(driver)
            case 5:
                self._kill(driver)
            case 6:
                self._key_serial += 1
                driver.put_key(b"key%d" % self._key_serial, b"value%d" % self._key_serial)
            case 7 if driver.actors:
                driver.release(self._random.choice(list(driver.actors)))

    def _strategy(self) -> bytes:
        packed: list[object]
        match self._random.choice(self.options.strategies):
            case "spread":
                packed = ["spread"]
            case "node":
                node = self._random.choice(list(self.cluster.nodes))
                packed = ["node", node, self._random.random() < 0.5]
            case "labels":
                zone = {"zone": ("in", (self._random.choice(("east", "west")),))}
                packed = ["labels", {}, zone]
            case _:
                return b""
        return msgspec.msgpack.encode(packed)

    def _submit(self, driver: Driver) -> None:
        demand = self._random.choice(({"CPU": UNIT}, {"CPU": UNIT}, {"CPU": UNIT // 2}, {"CPU": 2 * UNIT}, {}))
        driver.submit(
            demand,
            self._random.choice((1, 3, 10, 30)),
            self._random.choice((0.001, 0.05, 0.5)),
            strategy=self._strategy(),
            reuse=self._random.random() < 0.7,
        )

    def _create(self, driver: Driver) -> None:
        run: dict[str, int] = {}
        # What is bound to a node would wait for ever if actors had the room there.
        if "node" not in self.options.strategies and self._actor_cpus < 2 and self._random.random() < 0.3:
            self._actor_cpus += 1
            run = {"CPU": UNIT}
        taken = self.options.names and self._random.random() < 0.5
        driver.create(
            name=f"name{self._random.randrange(self.options.names)}" if taken else "",
            run=run,
            strategy=self._strategy(),
            max_restarts=self._random.choice((0, 1, 3, -1)),
            detached=self._random.random() < 0.3,
        )

    def _kill(self, driver: Driver) -> None:
        if driver.actors:
            actor = self._random.choice(list(driver.actors))
            driver.kill(actor, no_restart=self._random.random() < 0.5)

    # ------------------------------------------------------------------ faults

    def _break(self) -> None:
        if not self._faulty:
            return
        self.cluster.timeline.after(self.cluster.draw(0, 2 * self.options.pause_s), self._break)
        faults = [fault for fault in self.options.faults if fault not in ("init_fails", "join_fails")]
        if not faults or not self.cluster.nodes:
            return
        fault = self._random.choice(faults)
        node = self._random.choice(list(self.cluster.nodes.values()))
        self.cluster.timeline.note(f"fault {fault} at {node}")
        match fault:
            case "kill_worker" if workers := node.workers():
                node.exits(self._random.choice(workers).pid, self._random.choice((-9, -11, 1)))
            case "kill_node" if not node.is_head:
                node.end("it was killed")
                self.cluster.timeline.after(self.cluster.draw(0.1, 5.0), self._replace, node)
            case "reset_link":
                for link in list(node.links.values()):
                    link.reset("it was reset")
            case "cut_link" if not node.is_head:
                self.cluster.cut(node, self._random.choice((0.05, 1.0, 6.0, 20.0)))
            case "kill_head" if self.cluster.control is not None:
                self._kill_head()
            case "kill_driver" if drivers := self._living_drivers():
                driver = self._random.choice(drivers)
                driver.node.driver_ends(driver)

    def _replace(self, node: SimulatedNode) -> None:
        if self.cluster.control is not None and node.place in self.cluster.lost_places:
            self.cluster.lost_places.remove(node.place)
            self.cluster.start_node(node.place)

    def _kill_head(self) -> None:
        head = self.cluster.head
        assert head is not None
        head.end("it was killed")
        self.cluster.timeline.after(self.cluster.draw(0.05, 3.0), self._restart_head)

    def _restart_head(self) -> None:
        if self.cluster.control is None:
            assert self.cluster.head is not None
            place = self.cluster.head.place
            self.cluster.lost_places.remove(place)
            self.cluster.start_head(place)
            self.cluster.oracle.check_records()
