"""What must hold, judged by what processes know themselves, and not by what the control service keeps.

`Oracle` is told what happens in the world, and checks safety after every step: nothing is granted beyond what a node
has; of an actor no two processes live that the control service takes to be connected, and no two run that no fence has
stopped; names are unique; incarnations never go back; what was acknowledged is known for good. `quiet` says what is
still taken when everything has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ray import _protocol as p
from tests.simulation.members import Member, Worker

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.nodes import SimulatedNode


class Use(msgspec.Struct):
    """What a worker holds of its node."""

    node: SimulatedNode
    owner: int
    proc: int
    lease: int
    demand: dict[str, int]


class Oracle:
    """See the module's docstring."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._uses: dict[int, Use] = {}
        """By process."""
        self._granted: dict[int, None] = {}
        """Every lease there was: a grant may be said again, when it is over long since."""
        self._by_lease: dict[int, Use] = {}
        self._used: dict[int, dict[str, int]] = {}
        """What is held on each node."""
        self._hosts: dict[bytes, dict[int, Worker]] = {}
        """Processes that have become an actor and live."""
        self._incarnations: dict[bytes, int] = {}
        self._keys: dict[bytes, bytes] = {}
        self._heard: dict[bytes, tuple[int, bool]] = {}
        """Of each actor the last incarnation of which somebody was told, and whether it was told to be dead."""
        self.acknowledged = 0

    # ------------------------------------------------------------------ what happens

    def granted(self, node: SimulatedNode, owner: int, grant: p.LeaseGranted) -> None:
        """A node lends a worker, or says so after a while without a head, when that may have ended."""
        driver = self._cluster.drivers[owner]
        if driver.alive and grant.lease not in self._granted:
            self._granted[grant.lease] = None
            if not self._cluster.lives(grant.proc):
                return  # it waited for a head, and the worker has ended meanwhile
            self._take(Use(node, owner, grant.proc, grant.lease, driver.work[grant.class_id].demand))

    def began(self, worker: Worker) -> None:
        """A process has become an actor."""
        assert worker.actor is not None
        actor = worker.actor.actor
        self._hosts.setdefault(actor, {})[worker.proc] = worker
        last = self._incarnations.get(actor, -1)
        assert worker.actor.incarnation > last, f"incarnation {worker.actor.incarnation} begins after {last}"
        self._incarnations[actor] = worker.actor.incarnation
        demand = self._cluster.created[actor].run
        self._take(Use(worker.node, 0, worker.proc, -worker.proc, demand))

    def _take(self, use: Use) -> None:
        assert use.proc not in self._uses, f"process {use.proc} is lent twice"
        self._uses[use.proc] = self._by_lease[use.lease] = use
        used = self._used.setdefault(use.node.key, {})
        for name, units in use.demand.items():
            used[name] = used.get(name, 0) + units
            total = use.node.place.resources.get(name, 0)
            if used[name] > total:
                self._drop_disowned()
            assert used[name] <= total, f"{use.node} has {total} of {name}, and {used[name]} are in use"

    def _drop_disowned(self) -> None:
        """What was lent to processes that count as lost, though they live, is free: the workers are being killed."""
        control = self._cluster.control
        for use in [use for use in self._uses.values() if use.owner]:
            if control is None or not control.members.node_of(use.owner):
                self.ended(use.proc)

    def returned(self, lease: int) -> None:
        use = self._by_lease.get(lease)
        if use is not None:
            self.ended(use.proc)

    def ended(self, proc: int) -> None:
        """A process was reaped, or serves nobody any more."""
        use = self._uses.pop(proc, None)
        if use is not None:
            del self._by_lease[use.lease]
            used = self._used[use.node.key]
            for name, units in use.demand.items():
                used[name] -= units

    def gone(self, member: Member) -> None:
        """A process does not live any more. What it was lent counts as free from now on: its node may know already."""
        if isinstance(member, Worker):
            if member.actor is not None:
                self._hosts.get(member.actor.actor, {}).pop(member.proc, None)
        else:
            for use in [use for use in self._uses.values() if use.owner == member.proc]:
                self.ended(use.proc)

    def node_ended(self, node: SimulatedNode) -> None:
        self._used.pop(node.key, None)
        for use in [use for use in self._uses.values() if use.node is node]:
            del self._uses[use.proc], self._by_lease[use.lease]

    def acknowledged_key(self, key: bytes, value: bytes) -> None:
        self.acknowledged += 1
        self._keys[key] = value

    def acknowledged_actor(self, state: p.ActorState) -> None:
        """Somebody was told of an actor's life: no later control service may know of an earlier one."""
        self.acknowledged += 1
        incarnation, dead = self._heard.get(state.actor, (-1, False))
        self._heard[state.actor] = max(incarnation, state.incarnation), dead or state.state == p.ACTOR_DEAD

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """Whatever is cheap enough to be asked after every step."""
        control = self._cluster.control
        if control is None:
            return
        for actor, hosts in self._hosts.items():
            believed = [proc for proc in hosts if control.members.node_of(proc)]
            assert len(believed) <= 1, f"actor {actor.hex()} lives in {len(believed)} processes: {believed}"
            running = [worker.proc for worker in hosts.values() if not worker.frozen]
            assert len(running) <= 1, f"actor {actor.hex()} runs in {len(running)} processes: {running}"
        names: dict[tuple[str, str], bytes] = {}
        for record in control.actors.actors():
            if record.name and record.state not in ("dead", "missing") and not (record.doom and record.doom.final):
                other = names.setdefault((record.namespace, record.name), record.id)
                assert other == record.id, f"{record.name} is the name of two actors"

    def check_lives(self, hosts: list[bytes]) -> None:
        """The same for a few actors only."""
        control = self._cluster.control
        for actor in hosts:
            believed = [proc for proc in self._hosts.get(actor, {}) if control and control.members.node_of(proc)]
            assert len(believed) <= 1, f"actor {actor.hex()} lives in {len(believed)} processes: {believed}"

    def check_records(self) -> None:
        """A control service knows everything that any one before has acknowledged."""
        control = self._cluster.control
        assert control is not None
        for key, value in self._keys.items():
            assert control.kv.get("", key) == value, f"the key {key!r} is lost"
        for actor, (incarnation, dead) in self._heard.items():
            record = control.actors.get(actor)
            assert record is not None, f"actor {actor.hex()} is forgotten"
            assert record.incarnation >= incarnation or record.state == "dead", f"actor {actor.hex()} is younger again"
            assert not dead or record.state == "dead", f"actor {actor.hex()} was dead, and is {record.state}"

    def quiet(self) -> list[str]:
        """What is still taken though nothing is wanted any more."""
        control = self._cluster.control
        assert control is not None
        out = [f"{use} is still held" for use in self._uses.values()]
        out += [f"{demand} is still placed" for demand in control.placement._demands.values()]
        out += [f"actor {x.id.hex()} is {x.state}" for x in control.actors.actors() if x.state != "dead"]
        for node in self._cluster.nodes.values():
            ledger = node.manager.leases.ledger
            if ledger.available() != ledger.total or node.manager.leases.statistics()["leases_wanted"]:
                held = list(node.manager.leases._leases.values())
                out.append(f"{node} has {ledger.available()} of {ledger.total}; there are {held}")
            seen = control.nodes.get(node.key)
            if seen is None or {name: x for name, x in seen.room().items() if x} != ledger.total:
                out.append(f"node {node.key:x} has all, and the control service thinks {seen and seen.room()}")
            elif seen.actors:
                out.append(f"node {node.key:x} is thought to have {seen.actors} actors")
        return out
