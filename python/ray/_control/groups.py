"""Placement groups: which there are, where their bundles are, and who waits for them.

Owns each group from its creation to the memory of its removal, and its name. Places bundles in two phases: every node
of a plan sets aside all that it is to hold or nothing (`PrepareBundles`); when all have, it is offered to tasks and
actors (`CommitBundles`), and when one has not, all of it is given back. The only node of a cluster does both at once.
What runs in a group is not known here: its resources have names (`_bundle_names`), so it is placed like everything
else.

    pending -> preparing -> created -> removed
       ^___________|            |
       |________________________|      bundles were lost with their node: only these are placed anew

How a plan is made: of what nodes have free, as far as is known (`group_placement`). Where that is too little, one group
at a time *gathers*: it is planned by what nodes have at all, and they keep for it what becomes free, for `GATHER_S` at
the most. One at a time, because two that hold half of what each other lacks would wait for ever. The only node of a
cluster gathers for any number of groups: it sets a group aside as a whole, so none holds a half.

Groups are tried again when a node reports what is free or a node comes, and after a refusal when the node has had a
moment; nothing polls.

Invariants: a bundle has at most one node, and only living ones; a created group has all; nodes are asked about no more
than one attempt of a group at a time; at most one group gathers; a name belongs to one group that is not removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from ray._control.group_placement import Place, Wish, choose, demand_of, describe_impossible, place_of
from ray._control.group_records import (
    REMOVED_ERROR,
    DetachedActorOver,
    Group,
    GroupOver,
    GroupPlaced,
    JobOver,
    Waiter,
)
from ray._control.machine import (
    Deadlines,
    FromNode,
    Machine,
    Notify,
    ProcessLeft,
    Send,
    Tick,
    ToNode,
    earliest,
)
from ray._control.messages import (
    BundlesPrepared,
    BundlesRefused,
    CommitBundles,
    PrepareBundles,
    ReleaseBundles,
)
from ray._control.node_records import NodeCame, NodeFreed, NodeLost
from ray._control.waits import Waits
from ray._protocol import Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.node_records import Node
    from ray._control.nodes import NodeTable

GROUPS_MAX: Final = 100_000
"""Groups that are not removed; one more is refused, and says so to who waits for it."""

REMOVED_REMEMBERED: Final = 1000
"""Removed groups that can still be listed; of older ones only that they are gone is known."""

PLANS_AT_A_TIME_MAX: Final = 32
"""Groups that are planned anew in one go when something has changed."""

PLAN_PAUSE_S: Final = 0.005
"""How long others are served before the next ones are planned."""

GATHER_S: Final = 5.0
"""How long nodes keep what becomes free for one group that does not get all of it."""

SHY_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""How long a node that refused is left alone by the group, by the number of its refusals."""


class GroupTable(Machine):
    """See the module's docstring.

    Args:
        nodes: The view of the cluster; what is committed is noted there.
        is_connected: Whether a process is a member.
    """

    def __init__(self, nodes: NodeTable, is_connected: Callable[[int], bool], *, validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._nodes = nodes
        self._is_connected = is_connected
        self._groups: dict[bytes, Group] = {}
        self._removed: dict[bytes, tuple[Group, str]] = {}
        self._names: dict[tuple[str, str], bytes] = {}
        self._unplaced: dict[bytes, Group] = {}
        """Groups that are pending, in the order in which they have their turn."""
        self._unplanned = 0
        """How many of them have not had their turn since something changed."""
        self._gathering: bytes = b""
        self._by_job: dict[int, dict[bytes, None]] = {}
        self._created: dict[int, int] = {}
        """The last group that each process has created, by its number there: what has a higher one is on its way."""
        self._early: dict[bytes, dict[Waiter, None]] = {}
        """Who waits for groups whose creation is on its way."""
        self._waits = Waits()
        self._deadlines: Deadlines[tuple[str, bytes, Waiter | None]] = Deadlines()
        self._events = {
            NodeCame: self._on_node_came,
            NodeFreed: self._on_node_freed,
            NodeLost: self._on_node_lost,
            ProcessLeft: self._on_process_left,
            JobOver: self._on_job_over,
            DetachedActorOver: self._on_actor_over,
            Tick: self._on_tick,
        }
        self._node_messages = {BundlesPrepared: self._on_prepared, BundlesRefused: self._on_refused}

    # ------------------------------------------------------------------ queries

    def get(self, group: bytes) -> Group | None:
        """The group, if it is not removed."""
        return self._groups.get(group)

    def find(self, group: bytes) -> Group | None:
        """The group, if it is remembered at all."""
        return self._groups.get(group) or self._removed.get(group, (None, ""))[0]

    def by_name(self, name: str, namespace: str) -> Group | None:
        found = self._names.get((namespace, name))
        return self._groups.get(found) if found is not None else None

    def all(self) -> list[Group]:
        """All that are remembered, removed ones last."""
        return [*self._groups.values(), *(group for group, _ in self._removed.values())]

    def gone(self, group: bytes) -> str:
        """Why there is no such group, as a sentence without its full stop; empty if there is, or will be."""
        if group in self._groups or self._is_on_its_way(group):
            return ""
        _, reason = self._removed.get(group, (None, ""))
        return reason or f"placement group {group.hex()} is not known: it was removed long ago, or never created"

    def why(self, group: bytes) -> str:
        """Why a group is not placed, as a sentence without its full stop; empty if it is."""
        record = self._groups.get(group)
        if record is None:
            return self.gone(group) or f"placement group {group.hex()} is about to be created"
        if record.state == "created":
            return ""
        again = "lost bundles with a node and is placed anew" if record.lost else "is not created yet"
        return f"{record} {again}: {record.why or 'its nodes have been asked'}"

    def next_deadline(self) -> float | None:
        return earliest(self._deadlines.next(), self._waits.next_deadline())

    def statistics(self) -> dict[str, int]:
        return {
            "groups": len(self._groups),
            "groups_unplaced": len(self._unplaced),
            "group_waiters": sum(len(group.waiters) for group in self._groups.values())
            + sum(len(waiters) for waiters in self._early.values()),
        }

    # ------------------------------------------------------------------ requests

    def create(self, group: Group, now: float) -> None:
        """A new group.

        Raises:
            ValueError: If its name is taken; the text names the group that has it.
        """
        if group.id in self._groups or group.id in self._removed:
            return  # ids are fresh; this is a repetition
        taken = self.by_name(group.name, group.namespace) if group.name else None
        if taken is not None:
            msg = (
                f"the name {group.name!r} in namespace {group.namespace!r} is taken by placement group "
                f"{taken.hex}. Choose another name, or get the existing group with ray.util.get_placement_group"
            )
            raise ValueError(msg)
        creator, number = _creator(group.id)
        if self._is_connected(creator):
            self._created[creator] = max(number, self._created.get(creator, 0))
        self._groups[group.id] = group
        group.waiters = self._early.pop(group.id, {})
        self._by_job.setdefault(group.job, {})[group.id] = None
        if group.name:
            self._names[group.namespace, group.name] = group.id
        if len(self._groups) > GROUPS_MAX:
            self._remove(group, f"{group} was refused: {GROUPS_MAX} groups are as many as there may be; remove some")
            return
        self._unplace(group)
        self._plan(group, now)

    def remove(self, group: bytes, now: float) -> None:
        """Give up a group, and everything that runs in it. Harmless if it is gone."""
        record = self._groups.get(group)
        if record is not None:
            self._remove(record, f"{record} was removed")
            self._gather_next(now)

    def wait(self, group: bytes, waiter: Waiter, timeout_s: float | None, now: float) -> None:
        """Answer when the group is created, or with False when the time has passed.

        Raises:
            ValueError: If there is no such group; the text says why.
        """
        record = self._groups.get(group)
        if record is None and (gone := self.gone(group)):
            raise ValueError(gone)
        if record is not None and record.state == "created":
            self._answer(waiter)
            return
        waiters = record.waiters if record is not None else self._early.setdefault(group, {})
        waiters[waiter] = None
        if timeout_s is not None:
            self._deadlines.set(("wait", group, waiter), now + max(timeout_s, 0.0))

    def _answer(self, waiter: Waiter, *, created: bool = True) -> None:
        self._emit(Send(waiter.proc, Reply(ok=True, body=msgspec.msgpack.encode(created)), waiter.corr))

    def _refuse_all(self, group: bytes, waiters: dict[Waiter, None], reason: str) -> None:
        for waiter in waiters:
            self._deadlines.clear(("wait", group, waiter))
            body = msgspec.msgpack.encode([REMOVED_ERROR, reason])
            self._emit(Send(waiter.proc, Reply(ok=False, body=body), waiter.corr))
        waiters.clear()

    def _is_on_its_way(self, group: bytes) -> bool:
        creator, number = _creator(group)
        return self._is_connected(creator) and number > self._created.get(creator, 0)

    # ------------------------------------------------------------------ planning

    def _plan(self, group: Group, now: float) -> None:
        """Ask nodes, if there are any that might do."""
        nodes = self._nodes.ready()
        wish = Wish(group.strategy, group.missing, group.selectors, group.placed, group.target)
        whole = [place_of(node, node.total) for node in nodes]
        possible = choose(whole, wish)
        if possible is None:
            self._set_why(group, describe_impossible(whole, wish), now, infeasible=True)
            return
        if self._nodes.is_alone:
            # What is free there is best known by itself. It waits with the group, and shares out fairly.
            self._ask(group, possible, now, queue=True)
            return
        group.shy = {node: until for node, until in group.shy.items() if until > now}
        free = [place_of(node, node.room()) for node in nodes if node.key not in group.shy]
        chosen = choose(free, wish)
        if chosen is not None:
            self._ask(group, chosen, now, queue=False)
            return
        self._set_why(group, f"{_many(nodes)} could hold it, and what it needs is in use now", now, infeasible=False)
        if not self._gathering and not group.shy:
            self._gathering, group.gathers = group.id, True
            self._deadlines.set(("gather", group.id, None), now + GATHER_S)
            self._ask(group, self._gather_plan(free, whole, wish) or possible, now, queue=True)

    def _gather_plan(self, free: list[Place], whole: list[Place], wish: Wish) -> dict[int, int] | None:
        """The plan by what nodes have at all, with those first that have most of it free."""
        room = {place.key: place.room for place in free}
        for place in whole:
            needs = demand_of(wish.bundles.values())
            has = [room.get(place.key, {}).get(name, 0) / max(units, 1) for name, units in needs.items()]
            place.used = 1.0 - min([*has, 1.0])
        return choose(whole, wish)

    def _ask(self, group: Group, chosen: dict[int, int], now: float, *, queue: bool) -> None:
        """First phase: every node sets aside what it is to hold."""
        group.state, group.asked = "preparing", chosen
        group.attempt += 1
        group.began_at = now
        del self._unplaced[group.id]
        keys = dict.fromkeys(chosen.values())
        # No message is on its way between the head and itself, so nothing can come between the two phases.
        group.one_phase = self._nodes.is_alone
        for key in keys:
            node = self._nodes.get(key)
            assert node is not None, "planned for a node that is lost"
            bundles = {index: group.bundles[index] for index, at in sorted(chosen.items()) if at == key}
            group.unanswered[key] = None
            # Of a node that is alone nobody asks what is free, and it does not say so.
            serial = node.serial if self._nodes.is_alone else node.assume(demand_of(bundles.values()))
            order = PrepareBundles(
                group.id, group.attempt, str(group), group.job, bundles, serial, queue, group.one_phase
            )
            self._emit(ToNode(key, order))

    def _on_prepared(self, event: FromNode, message: BundlesPrepared, now: float) -> None:
        group = self._groups.get(message.group)
        if group is None or group.attempt != message.attempt or event.node not in group.unanswered:
            return  # given up meanwhile, and the node was told
        del group.unanswered[event.node]
        if not group.unanswered:
            self._commit(group, now)

    def _commit(self, group: Group, now: float) -> None:
        """Second phase: what was set aside is offered. The only node of a cluster has done so already."""
        self._stop_gathering(group)
        if not group.one_phase:
            for key in dict.fromkeys(group.asked.values()):
                self._emit(ToNode(key, CommitBundles(group.id, group.attempt)))
        for index, key in sorted(group.asked.items()):
            node = self._nodes.get(key)
            assert node is not None, "a plan is given up when one of its nodes is lost"
            node.offer(group.hex, index, group.bundles[index])
        group.placed = {**group.placed, **group.asked}
        group.asked = {}
        group.state, group.lost, group.refusals = "created", False, 0
        group.ready_at = group.ready_at or now
        self._set_why(group, "", now, infeasible=False)
        for waiter in group.waiters:
            self._deadlines.clear(("wait", group.id, waiter))
            self._answer(waiter)
        group.waiters = {}
        self._emit(GroupPlaced(group.id))
        self._gather_next(now)

    def _on_refused(self, event: FromNode, message: BundlesRefused, now: float) -> None:
        group = self._groups.get(message.group)
        if group is None or group.attempt != message.attempt or event.node not in group.unanswered:
            return
        pause = SHY_S[min(group.refusals, len(SHY_S) - 1)]
        group.refusals += 1
        group.shy[event.node] = now + pause
        del group.unanswered[event.node]
        self._give_up_attempt(group, but=event.node)
        self._set_why(group, message.reason, now, infeasible=False)
        self._deadlines.set(("retry", group.id, None), now + pause)
        self._plan(group, now)
        self._gather_next(now)

    def _give_up_attempt(self, group: Group, *, but: int = 0) -> None:
        """Whoever set something aside, or still might, gives it back."""
        self._stop_gathering(group)
        reason = "its placement group is placed in another way"
        for key in dict.fromkeys(group.asked.values()):
            if key != but and self._nodes.get(key) is not None:
                self._emit(ToNode(key, ReleaseBundles(group.id, group.attempt, removed=False, reason=reason)))
        group.asked, group.unanswered = {}, {}
        self._unplace(group)

    def _unplace(self, group: Group) -> None:
        """It has its turn last, or first if it has lost bundles: what runs in it may wait for them."""
        group.state = "pending"
        if group.lost:
            self._unplaced = {group.id: group, **self._unplaced}
        else:
            self._unplaced[group.id] = group

    # ------------------------------------------------------------------ gathering

    def _stop_gathering(self, group: Group) -> None:
        if group.gathers:
            group.gathers = False
            self._gathering = b""
            self._deadlines.clear(("gather", group.id, None))

    def _gather_next(self, now: float) -> None:
        """Somebody else may gather."""
        if not self._gathering:
            self._plan_all(now)

    def _plan_all(self, now: float) -> None:
        """Something has changed for all that are not placed."""
        self._unplanned = len(self._unplaced)
        self._plan_some(now)

    def _plan_some(self, now: float) -> None:
        """Plan those that have their turn; the others follow when other events had theirs."""
        some = list(self._unplaced.values())[: min(self._unplanned, PLANS_AT_A_TIME_MAX)]
        self._unplanned -= len(some)
        for group in some:
            if group.id not in self._unplaced:
                continue  # it was planned because of another one
            self._plan(group, now)
            if group.id in self._unplaced and self._unplanned:
                self._unplaced[group.id] = self._unplaced.pop(group.id)
        self._unplanned = min(self._unplanned, len(self._unplaced))
        if self._unplanned:
            self._deadlines.set(("plan", b"", None), now + PLAN_PAUSE_S)

    # ------------------------------------------------------------------ nodes come and go

    def _on_node_came(self, event: NodeCame, now: float) -> None:
        for group in self._groups.values():
            # What waits on the only node there was may fit on the new one.
            if group.state == "preparing" and group.unanswered and not group.gathers:
                self._give_up_attempt(group)
        self._plan_all(now)

    def _on_node_freed(self, event: NodeFreed, now: float) -> None:
        gathering = self._groups.get(self._gathering)
        if gathering is not None and self._fits(gathering):
            # It began when less was free, and may be waiting for other nodes than those that have room now.
            self._give_up_attempt(gathering)
            self._plan(gathering, now)
        self._plan_all(now)

    def _fits(self, group: Group) -> bool:
        """Whether there is room for a group beside what is being kept for it."""
        places = [place_of(node, node.room()) for node in self._nodes.ready()]
        return (
            choose(places, Wish(group.strategy, group.missing, group.selectors, group.placed, group.target)) is not None
        )

    def _on_node_lost(self, event: NodeLost, now: float) -> None:
        for group in list(self._groups.values()):
            if group.asked and event.node in {*group.asked.values(), *group.placed.values()}:
                # Also where only bundles are lost that were placed before: the plan was made for what else was missing.
                self._give_up_attempt(group)
            if event.node not in group.placed.values():
                continue
            group.placed = {index: node for index, node in group.placed.items() if node != event.node}
            group.lost, group.refusals = True, 0
            if group.state == "created":
                self._unplace(group)
            self._set_why(group, f"it had bundles on a node that is lost ({event.reason})", now, infeasible=False)
        self._plan_all(now)

    # ------------------------------------------------------------------ ends

    def _remove(self, group: Group, reason: str) -> None:
        self._stop_gathering(group)
        for key in dict.fromkeys([*group.placed.values(), *group.asked.values()]):
            node = self._nodes.get(key)
            if node is not None:
                node.withdraw(group.hex)
                self._emit(ToNode(key, ReleaseBundles(group.id, 0, removed=True, reason=reason)))
        del self._groups[group.id]
        self._unplaced.pop(group.id, None)
        mates = self._by_job[group.job]
        del mates[group.id]
        if not mates:
            del self._by_job[group.job]
        if self._names.get((group.namespace, group.name)) == group.id:
            del self._names[group.namespace, group.name]
        self._deadlines.clear(("retry", group.id, None))
        self._end_wait(group)
        self._refuse_all(group.id, group.waiters, reason)
        group.state, group.asked, group.unanswered = "removed", {}, {}
        self._removed[group.id] = (group, reason)
        if len(self._removed) > REMOVED_REMEMBERED:
            del self._removed[next(iter(self._removed))]
        self._emit(GroupOver(group.id, reason))

    def _on_job_over(self, event: JobOver, now: float) -> None:
        for group in [self._groups[key] for key in self._by_job.get(event.job, {})]:
            if not group.detached and not group.actor:
                self._remove(group, f"{group} was removed, because the driver of its job has ended")
        self._gather_next(now)

    def _on_actor_over(self, event: DetachedActorOver, now: float) -> None:
        for group in [x for x in self._groups.values() if x.actor == event.actor]:
            self._remove(group, f"{group} was removed, because the actor that created it is dead")
        self._gather_next(now)

    def _on_process_left(self, event: ProcessLeft, now: float) -> None:
        self._created.pop(event.proc, None)
        for group, waiters in [*((x.id, x.waiters) for x in self._groups.values()), *self._early.items()]:
            for waiter in [waiter for waiter in waiters if waiter.proc == event.proc]:
                del waiters[waiter]
                self._deadlines.clear(("wait", group, waiter))
        for group in [group for group in self._early if _creator(group)[0] == event.proc]:
            reason = f"the process that was about to create placement group {group.hex()} has ended"
            self._refuse_all(group, self._early.pop(group), reason)
            self._emit(GroupOver(group, reason))

    # ------------------------------------------------------------------ time and people

    def _on_tick(self, event: Tick, now: float) -> None:
        for what, key, waiter in self._deadlines.due(now):
            group = self._groups.get(key)
            if what == "plan":
                self._plan_some(now)
            elif what == "wait" and waiter is not None:
                waiters = group.waiters if group is not None else self._early.get(key, {})
                del waiters[waiter]
                self._answer(waiter, created=False)
            elif group is not None and what == "retry" and group.id in self._unplaced:
                self._plan(group, now)
            elif group is not None and what == "gather":
                # Others have their turn, and this one gathers again when they have had it.
                self._give_up_attempt(group)
                group.shy = {node.key: now + SHY_S[-1] for node in self._nodes.living()}
                self._deadlines.set(("retry", group.id, None), now + SHY_S[-1])
                self._plan_all(now)
        self._tell_waits(now)

    def _set_why(self, group: Group, why: str, now: float, *, infeasible: bool) -> None:
        group.why = why
        if group.waits and (not why or infeasible != group.infeasible):
            self._end_wait(group)
        if why and not group.waits:
            group.waits, group.infeasible = True, infeasible
            self._waits.add(group, now, infeasible=infeasible)
            self._tell_waits(now)

    def _end_wait(self, group: Group) -> None:
        if group.waits:
            group.waits = False
            self._waits.remove(group)

    def _tell_waits(self, now: float) -> None:
        """Tell people about groups that wait for long, or for ever."""
        deadline = self._waits.next_deadline()
        if deadline is None or deadline > now:
            return
        for alike in self._waits.due(now, set()):
            group: Any = next(iter(alike.members.values()))
            who = f"P{str(group)[1:]}"
            if alike.infeasible:
                text = f"{who} cannot be placed: {group.why}. It goes on waiting; ask for less, or add nodes."
                self._emit(Notify(group.job, "warning", text))
            else:
                text = f"{who} has waited for {now - alike.moved_at:.0f} seconds: {group.why}."
                self._emit(Notify(group.job, "info", text))

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        gathering = [group.id for group in self._groups.values() if group.gathers]
        self._require(gathering == ([self._gathering] if self._gathering else []), "two groups gather")
        for group in self._groups.values():
            self._require((group.state == "pending") == (group.id in self._unplaced), f"{group} is listed wrongly")
            self._require((group.state == "preparing") == bool(group.asked), f"{group} has asked wrongly")
            self._require(group.state != "preparing" or group.unanswered, f"{group} is prepared and not committed")
            self._require(group.state != "created" or not group.missing, f"{group} is created and lacks bundles")
            self._require(group.state != "created" or not group.waiters, f"{group} is created and keeps waiters")
            self._require(not set(group.asked) & set(group.placed), f"{group} places a bundle twice")
            for key in [*group.asked.values(), *group.placed.values()]:
                self._require(self._nodes.get(key), f"{group} is on a node that is lost")
            if group.name:
                self._require(self._names.get((group.namespace, group.name)) == group.id, f"{group} lost its name")
        for node in self._nodes.living():
            held = {
                (group.hex, index)
                for group in self._groups.values()
                for index, key in group.placed.items()
                if key == node.key
            }
            there = {(group, index) for group, bundles in node.bundles.items() for index in bundles}
            self._require(held == there, f"{node} is believed to have other bundles than it has")


def _creator(group: bytes) -> tuple[int, int]:
    """The process that created a group, and the group's number there; its id says so."""
    return int.from_bytes(group[:8], "big"), int.from_bytes(group[8:14], "big")


def _many(nodes: list[Node]) -> str:
    return "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
