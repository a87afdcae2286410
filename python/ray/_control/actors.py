"""Actors: which there are, in which life, and who wants to know.

Owns each actor from the reservation of its name to the memory of its death. Does not place it: it asks
for a worker (`PlaceActor`), and whoever manages nodes answers. Calls to actors never pass here.

    pending -> starting -> alive -> dead
       ^______________________|        restarting, as a new incarnation, while restarts are left

`pending` waits for a worker, `starting` runs ``__init__``. To subscribers, both are *pending* in the first
life and *restarting* in later ones. After a restart of the head what was not dead is `missing` until its node says that
it is there (`ActorHosted`), or until nodes have had their time to come back (`give_up_missing`).

Records: an actor is kept from its creation until it is forgotten, its life at each change, a name while it is taken.

Invariants: an actor has at most one worker, and a worker at most one actor; an incarnation begins only
after the process of the one before was reaped; incarnations count up from 0; a name belongs to at most
one actor that is not dead; the dead hold neither name nor specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ray._control import names
from ray._control import strategy as strategies
from ray._control.actor_records import (
    Actor,
    ActorWorkerExits,
    ActorWorkerGone,
    Life,
    PlaceActor,
    Placed,
    StopActorWorker,
    Unplaceable,
    WithdrawActor,
)
from ray._control.causes import NO_HANDLES, ActorDeath, death_text, init_failed_text
from ray._control.group_records import DetachedActorOver, GroupOver
from ray._control.machine import (
    FromNode,
    Machine,
    Multicast,
    ProcessJoined,
    ProcessLeft,
    Received,
    Save,
    Send,
    ToNode,
    digest,
)
from ray._control.messages import ActorHosted, MemberSubscribes, StopMember
from ray._protocol import (
    ACTOR_ALIVE,
    ACTOR_DEAD,
    ACTOR_PENDING,
    ACTOR_RESTARTING,
    CAUSE_INIT_ERROR,
    CAUSE_TEXT,
    ActorCreate,
    ActorExit,
    ActorFailed,
    ActorInit,
    ActorKill,
    ActorReady,
    ActorRelease,
    ActorState,
    ActorStop,
    ActorSubscribe,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ACTORS_TABLE: Final = "actors"
LIVES_TABLE: Final = "lives"
NAMES_TABLE: Final = "names"

DEAD_REMEMBERED: Final = 10_000
"""Dead actors that can still be asked about; of older ones only "unknown" is known."""


class ActorTable(Machine):
    """See the module's docstring.

    Args:
        job_of: The job of a connected process.
        node_of: The node of a connected process.
    """

    def __init__(self, *, job_of: Callable[[int], int], node_of: Callable[[int], int], validate: bool = False) -> None:
        super().__init__(validate=validate)
        self._job_of = job_of
        self._node_of = node_of
        self._actors: dict[bytes, Actor] = {}
        self._dead: dict[bytes, None] = {}
        self._by_proc: dict[int, Actor] = {}
        self._owned: dict[int, dict[bytes, Actor]] = {}
        """Actors that die with a process, for each such process."""
        self._subscribers: dict[bytes, dict[int, None]] = {}
        """Also of actors whose `ActorCreate` is still on its way: a handle can be faster."""
        self._connected: dict[int, None] = {}
        self._returning = False
        """Nodes have time to come back, and have not said all yet."""
        self._grouped: dict[bytes, dict[bytes, Actor]] = {}
        """Actors that are not dead, by the placement group that they are in."""
        self.names = names.NameTable()
        self._events = {
            ProcessJoined: self._on_joined,
            ProcessLeft: self._on_left,
            Placed: self._on_placed,
            Unplaceable: self._on_unplaceable,
            ActorWorkerGone: self._on_worker_gone,
            GroupOver: self._on_group_over,
        }
        self._messages = {
            ActorCreate: self._on_create,
            ActorReady: self._on_ready,
            ActorFailed: self._on_failed,
            ActorSubscribe: self._on_subscribe,
            ActorRelease: self._on_release,
            ActorKill: self._on_kill,
            ActorExit: self._on_exit,
        }
        self._node_messages = {ActorHosted: self._on_hosted, MemberSubscribes: self._on_member_subscribes}

    # ------------------------------------------------------------------ queries

    def reserve_name(self, proc: int, name: str, namespace: str, actor: bytes, meta: bytes) -> bytes:
        """Keep a name for an actor that `proc` is about to create.

        Raises:
            ValueError: If another actor has it; the text names the actor.
        """
        taken = self.names.get(name, namespace)
        if taken is not None and taken.actor != actor:
            other = self._actors.get(taken.actor)
            what = f"{other.class_name} " if other is not None else ""
            msg = (
                f"the actor name {name!r} in namespace {namespace!r} is taken by {what}actor {taken.actor.hex()}. "
                "Choose another name, get the existing actor with ray.get_actor, or pass get_if_exists=True"
            )
            raise ValueError(msg)
        if taken is None:
            self.names.reserve(name, namespace, actor, proc, meta)
            self._save_name(name, namespace)
        return actor

    def get(self, actor: bytes) -> Actor | None:
        return self._actors.get(actor)

    def wire_state(self, actor: Actor) -> int:
        """The state as subscribers know it."""
        if actor.state == "dead":
            return ACTOR_DEAD
        if actor.state == "alive":
            return ACTOR_ALIVE
        return ACTOR_PENDING if actor.incarnation == 0 else ACTOR_RESTARTING

    def owns_actors(self, proc: int) -> bool:
        """Whether an actor would die with this process."""
        return bool(self._owned.get(proc))

    def hosts(self, proc: int, actor: bytes) -> bool:
        """Whether the process is known to be the actor's."""
        hosted = self._by_proc.get(proc)
        return hosted is not None and hosted.id == actor

    def is_missing(self, actor: bytes, incarnation: int) -> bool:
        """Whether a process of this life may turn up."""
        known = self._actors.get(actor)
        return known is not None and known.state == "missing" and known.incarnation == incarnation

    def actors(self) -> list[Actor]:
        """All that are remembered, oldest first."""
        return list(self._actors.values())

    def statistics(self) -> dict[str, int]:
        counts = {"actors": len(self._actors), "actor_names": len(self.names)}
        for state in ("pending", "starting", "alive", "dead"):
            counts[f"actors_{state}"] = sum(x.state == state for x in self._actors.values())
        return counts

    # ------------------------------------------------------------------ creation

    def _on_create(self, event: Received, message: ActorCreate, now: float) -> None:
        if message.actor in self._actors:
            return  # ids are fresh; this is a repetition
        actor = Actor(
            id=message.actor,
            owner=message.owner,
            creator=event.sender,
            job=self._job_of(event.sender),
            class_name=message.class_name,
            name=message.name,
            namespace=message.namespace,
            detached=message.detached,
            max_restarts=message.max_restarts,
            label=message.label or message.class_name,
            place=message.place,
            run=message.run,
            env=message.env,
            strategy=message.strategy,
            spec=message.spec,
            owner_node=self._node_of(message.owner),
        )
        self._actors[actor.id] = actor
        # The creator is told of changes without asking: one message less for each new actor.
        self._subscribers.setdefault(actor.id, {})[event.sender] = None
        if actor.name:
            try:
                self.reserve_name(event.sender, actor.name, actor.namespace, actor.id, b"")
            except ValueError as error:
                self._die(actor, str(error))
                return
            self.names.settle(actor.name, actor.namespace)
            self._save_name(actor.name, actor.namespace)
        if not actor.detached and actor.owner not in self._connected:
            self._die(actor, f"its owner, process {actor.owner:016x}, had ended before it was created")
            return
        if not actor.detached:
            self._owned.setdefault(actor.owner, {})[actor.id] = actor
        self._save(actor)
        if group := strategies.parse(actor.strategy).group:
            self._grouped.setdefault(group, {})[actor.id] = actor
        self._place(actor)

    def _place(self, actor: Actor) -> None:
        actor.state = "pending"
        self._emit(
            PlaceActor(
                actor.id,
                actor.incarnation,
                actor.job,
                actor.place,
                actor.run,
                actor.env,
                actor.strategy,
                actor.label,
                actor.creator,
                actor.owner,
                actor.restarts_left != 0,
            )
        )

    def _on_placed(self, event: Placed, now: float) -> None:
        actor = self._actors.get(event.actor)
        waits = actor is not None and actor.state in ("pending", "missing")
        if actor is None or not waits or actor.incarnation != event.incarnation:
            self._emit(StopActorWorker(event.proc, "the actor that it was meant for is not wanted any more"))
            return
        self._require(event.proc not in self._by_proc, f"worker {event.proc} was placed twice")
        actor.state, actor.node, actor.proc, actor.pid = "starting", event.node, event.proc, event.pid
        self._by_proc[event.proc] = actor
        self._save_life(actor)
        init = ActorInit(actor.id, actor.incarnation, actor.spec, event.gpu_ids, actor.namespace, actor.name)
        self._emit(Send(event.proc, init))

    def _on_unplaceable(self, event: Unplaceable, now: float) -> None:
        actor = self._actors.get(event.actor)
        if actor is not None and actor.state == "pending" and actor.incarnation == event.incarnation:
            self._die(actor, f"{actor.class_name} could not be started: {event.reason}")

    def _on_ready(self, event: Received, message: ActorReady, now: float) -> None:
        actor = self._of(event.sender, message.actor, message.incarnation)
        if actor is not None and actor.state == "starting":
            actor.state = "alive"
            actor.cause_kind, actor.cause = CAUSE_TEXT, b""
            if actor.doom is None:
                self._publish(actor)

    def _on_failed(self, event: Received, message: ActorFailed, now: float) -> None:
        actor = self._of(event.sender, message.actor, message.incarnation)
        if actor is None or actor.state == "dead":
            return
        self._detach_worker(actor, init_failed_text(actor.class_name))
        self._die(actor, message.error, kind=CAUSE_INIT_ERROR)

    # ------------------------------------------------------------------ subscriptions

    def _on_subscribe(self, event: Received, message: ActorSubscribe, now: float) -> None:
        actor = self._actors.get(message.actor)
        if actor is not None:
            if actor.state != "dead":
                self._subscribers.setdefault(actor.id, {})[event.sender] = None
            self._emit(Send(event.sender, self._state(actor)))
            return
        if self._may_be_created(message.actor):
            self._subscribers.setdefault(message.actor, {})[event.sender] = None
            state, cause = ACTOR_PENDING, b""
        else:
            state = ACTOR_DEAD
            cause = b"the actor is not known: it ended long ago, or its creator died before creating it"
        self._emit(Send(event.sender, ActorState(message.actor, state, 0, 0, 0, CAUSE_TEXT, cause, 0, 0)))

    def _may_be_created(self, actor: bytes) -> bool:
        """Whether the creation of an actor that is not known may still be on its way."""
        return self._returning or int.from_bytes(actor[:8], "big") in self._connected

    def _publish(self, actor: Actor) -> None:
        subscribers = tuple(self._subscribers.get(actor.id, ()))
        if subscribers:
            self._emit(Multicast(subscribers, self._state(actor)))

    def _state(self, actor: Actor) -> ActorState:
        return ActorState(
            actor=actor.id,
            state=self.wire_state(actor),
            proc=actor.proc if actor.state == "alive" else 0,
            node=actor.node,
            incarnation=actor.incarnation,
            cause_kind=actor.cause_kind,
            cause=actor.cause,
            restarts_left=actor.restarts_left,
            pid=actor.pid,
        )

    # ------------------------------------------------------------------ ends

    def _on_kill(self, event: Received, message: ActorKill, now: float) -> None:
        actor = self._actors.get(message.actor)
        if actor is not None:
            self._end(actor, ActorDeath("it was killed by ray.kill", final=message.no_restart))

    def _on_release(self, event: Received, message: ActorRelease, now: float) -> None:
        actor = self._actors.get(message.actor)
        if actor is None or actor.detached or event.sender != actor.owner:
            return
        if actor.state == "alive":
            # Calls that were made are in the worker's queue already; it finishes them, then announces its end.
            if actor.doom is None or not actor.doom.final:
                actor.doom = ActorDeath(NO_HANDLES, final=True)
            self._free_name(actor)
            self._emit(Send(actor.proc, ActorStop(actor.id)))
        else:
            self._end(actor, ActorDeath(NO_HANDLES, final=True))

    def _on_exit(self, event: Received, message: ActorExit, now: float) -> None:
        actor = self._of(event.sender, message.actor, message.incarnation)
        if actor is not None and actor.state != "dead":
            if actor.doom is None:
                actor.doom = ActorDeath(message.reason or "it ended itself", final=True)
                self._free_name(actor)
            self._emit(ActorWorkerExits(actor.proc, actor.doom.reason))

    def _end(self, actor: Actor, death: ActorDeath) -> None:
        """Kill the actor's process if it has one; what follows is decided when that was reaped."""
        if actor.state == "dead":
            return
        if actor.proc:
            if actor.doom is None or not actor.doom.final:
                actor.doom = death
            if death.final:
                self._free_name(actor)
            self._emit(StopActorWorker(actor.proc, death.reason))
        elif death.final:
            self._emit(WithdrawActor(actor.id))
            self._die(actor, f"{actor.class_name} ended before it had a process: {death.reason}")

    def _on_group_over(self, event: GroupOver, now: float) -> None:
        """Its actors end with it, and are not restarted: there is nowhere for them to be."""
        for actor in list(self._grouped.get(event.group, {}).values()):
            self._end(actor, ActorDeath(event.reason, final=True))

    def _on_worker_gone(self, event: ActorWorkerGone, now: float) -> None:
        actor = self._by_proc.pop(event.proc, None)
        if actor is None:
            return
        doom, actor.doom = actor.doom, None
        actor.proc = 0
        final = doom is not None and doom.final
        restarts = not final and actor.restarts_left != 0
        text = death_text(actor, doom, event.cause, event.lines, restarts=restarts)
        if restarts:
            actor.incarnation += 1
            actor.cause_kind, actor.cause = CAUSE_TEXT, text.encode()
            self._save_life(actor)
            # Placing comes first: telling the subscribers can wait for the fork, not the other way round.
            self._place(actor)
            self._publish(actor)
        else:
            self._die(actor, text)

    def _die(self, actor: Actor, cause: str | bytes, *, kind: int = CAUSE_TEXT) -> None:
        actor.state = "dead"
        actor.doom = None
        if (group := strategies.parse(actor.strategy).group) in self._grouped:
            self._grouped[group].pop(actor.id, None)
            if not self._grouped[group]:
                del self._grouped[group]
        if actor.detached:
            self._emit(DetachedActorOver(actor.id))
        actor.cause_kind = kind
        actor.cause = cause.encode() if isinstance(cause, str) else cause
        actor.spec = actor.env = actor.strategy = b""
        self._free_name(actor)
        self._save(actor)
        self._emit(Save(LIVES_TABLE, actor.id, None))
        self._publish(actor)
        owned = self._owned.get(actor.owner, {})
        owned.pop(actor.id, None)
        if not owned:
            self._owned.pop(actor.owner, None)
        self._subscribers.pop(actor.id, None)
        self._dead[actor.id] = None
        if len(self._dead) > DEAD_REMEMBERED:
            oldest = next(iter(self._dead))
            del self._dead[oldest], self._actors[oldest]
            self._emit(Save(ACTORS_TABLE, oldest, None))

    def _free_name(self, actor: Actor) -> None:
        """An actor that will not live again is not found any more, and another one may have its name."""
        if actor.name:
            held = self.names.get(actor.name, actor.namespace)
            self.names.release(actor.name, actor.namespace, actor.id)
            if held is not None and held.actor == actor.id:
                self._save_name(actor.name, actor.namespace)

    def _detach_worker(self, actor: Actor, reason: str) -> None:
        """The actor is over before its process is."""
        del self._by_proc[actor.proc]
        self._emit(StopActorWorker(actor.proc, reason))
        actor.proc = 0

    def _of(self, proc: int, actor: bytes, incarnation: int) -> Actor | None:
        """The actor that a worker speaks of, if it is the one that the worker hosts."""
        hosted = self._by_proc.get(proc)
        right = hosted is not None and hosted.id == actor and hosted.incarnation == incarnation
        return hosted if right else None

    # ------------------------------------------------------------------ processes

    def _on_joined(self, event: ProcessJoined, now: float) -> None:
        self._connected[event.proc] = None

    def _on_left(self, event: ProcessLeft, now: float) -> None:
        self._connected.pop(event.proc, None)
        for name in self.names.release_reservations(event.proc):
            self._save_name(name.name, name.namespace)
        for actor, subscribers in list(self._subscribers.items()):
            subscribers.pop(event.proc, None)
            if actor not in self._actors and int.from_bytes(actor[:8], "big") == event.proc:
                self._never_created(actor)
            elif not subscribers:
                del self._subscribers[actor]
        reason = f"its owner, process {event.proc:016x}, has ended"
        for owned in list(self._owned.get(event.proc, {}).values()):
            self._end(owned, ActorDeath(reason, final=True))

    def _never_created(self, actor: bytes) -> None:
        subscribers = tuple(self._subscribers.pop(actor))
        cause = b"the process that was about to create the actor has ended"
        if subscribers:
            self._emit(Multicast(subscribers, ActorState(actor, ACTOR_DEAD, 0, 0, 0, CAUSE_TEXT, cause, 0, 0)))

    # ------------------------------------------------------------------ records, and the time after a restart

    def _save(self, actor: Actor) -> None:
        self._emit(Save(ACTORS_TABLE, actor.id, msgspec.msgpack.encode(actor)))

    def _save_life(self, actor: Actor) -> None:
        life = Life(actor.incarnation, actor.proc, actor.node)
        self._emit(Save(LIVES_TABLE, actor.id, msgspec.msgpack.encode(life)))

    def _save_name(self, name: str, namespace: str) -> None:
        held = self.names.get(name, namespace)
        value = msgspec.msgpack.encode(held) if held is not None else None
        self._emit(Save(NAMES_TABLE, digest(namespace, name), value))

    def restore(self, table: str, key: bytes, value: bytes) -> None:
        """Take over a record of the control service before. Actors must come before their lives."""
        if table == NAMES_TABLE:
            self.names.restore(msgspec.msgpack.decode(value, type=names.Name))
        elif table == ACTORS_TABLE:
            actor = msgspec.msgpack.decode(value, type=Actor)
            self._actors[actor.id] = actor
            if actor.state == "dead":
                self._dead[actor.id] = None
                return
            actor.state, actor.proc, actor.node, actor.doom = "missing", 0, 0, None
            if not actor.detached:
                self._owned.setdefault(actor.owner, {})[actor.id] = actor
        elif (known := self._actors.get(key)) is not None and known.state != "dead":
            life = msgspec.msgpack.decode(value, type=Life)
            known.incarnation, known.node = life.incarnation, life.node if life.proc else 0

    def _on_hosted(self, event: FromNode, message: ActorHosted, now: float) -> None:
        """A node that has come back has this actor on it."""
        if self.hosts(message.proc, message.actor):
            return  # it was away for a moment only
        if not self.is_missing(message.actor, message.incarnation):
            reason = "the actor ended, or was started on another node, while this one had no connection"
            self._emit(ToNode(event.node, StopMember(message.proc, reason)))
            return
        actor = self._actors[message.actor]
        actor.state = "alive" if message.ready else "starting"
        actor.node, actor.proc, actor.pid = event.node, message.proc, message.pid
        self._by_proc[message.proc] = actor
        self._save_life(actor)
        if message.ready:
            self._publish(actor)

    def _on_member_subscribes(self, event: FromNode, message: MemberSubscribes, now: float) -> None:
        for actor_id in message.actors:
            actor = self._actors.get(actor_id)
            if actor is None and self._may_be_created(actor_id):
                self._subscribers.setdefault(actor_id, {})[message.proc] = None
                continue
            if actor is None or actor.state == "dead":
                cause = actor.cause if actor is not None else b"the actor is not known: it ended long ago"
                kind = actor.cause_kind if actor is not None else CAUSE_TEXT
                self._emit(Send(message.proc, ActorState(actor_id, ACTOR_DEAD, 0, 0, 0, kind, cause, 0, 0)))
                continue
            self._subscribers.setdefault(actor_id, {})[message.proc] = None
            if actor.state == "alive":
                self._emit(Send(message.proc, self._state(actor)))

    def expect_return(self) -> None:
        """Nodes may come back and say of actors, and of their creators, what is not known yet."""
        self._returning = True

    def give_up_missing(self) -> None:
        """Nodes have had their time to come back: what did not come with them has ended, or was never placed."""
        self._returning = False
        for actor_id in [x for x in self._subscribers if x not in self._actors and not self._may_be_created(x)]:
            self._never_created(actor_id)
        for name in self.names.release_reservations_but(self._connected):
            self._save_name(name.name, name.namespace)
        for actor in list(self._actors.values()):
            if actor.state == "missing" and self._has_owner(actor):
                self._miss(actor)
        for actor in list(self._actors.values()):
            if actor.state != "dead" and not self._has_owner(actor):
                reason = f"its owner, process {actor.owner:016x}, has ended"
                self._end(actor, ActorDeath(reason, final=True))

    def _has_owner(self, actor: Actor) -> bool:
        return actor.detached or actor.owner in self._connected

    def _miss(self, actor: Actor) -> None:
        if not actor.node:
            self._place(actor)
            self._publish(actor)
            return
        cause = "its node did not come back after the head was restarted"
        restarts = actor.restarts_left != 0
        text = death_text(actor, None, cause, (), restarts=restarts)
        if restarts:
            actor.incarnation += 1
            actor.cause_kind, actor.cause = CAUSE_TEXT, text.encode()
            actor.node = 0
            self._save_life(actor)
            self._place(actor)
            self._publish(actor)
        else:
            self._die(actor, text)

    # ------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        hosting = {x.proc: x.id for x in self._actors.values() if x.proc}
        self._require(hosting == {proc: x.id for proc, x in self._by_proc.items()}, "workers are listed wrongly")
        for actor in self._actors.values():
            has_worker = actor.state in ("starting", "alive")
            self._require(has_worker == (actor.proc != 0), f"{actor.id.hex()} is {actor.state} wrongly")
            self._require(
                actor.max_restarts < 0 or actor.incarnation <= actor.max_restarts, f"{actor.id.hex()} lives too often"
            )
            if actor.state == "dead":
                self._require(not actor.spec, f"{actor.id.hex()} is dead and keeps its specification")
                self._require(actor.id in self._dead, f"{actor.id.hex()} is dead and not listed so")
            elif actor.name and actor.state != "missing" and not (actor.doom and actor.doom.final):
                taken = self.names.get(actor.name, actor.namespace)
                self._require(taken and taken.actor == actor.id, f"{actor.id.hex()} has lost its name")
            if not (actor.detached or actor.state in ("dead", "missing") or actor.doom or self._returning):
                self._require(actor.owner in self._connected, f"{actor.id.hex()} outlives its owner")
        for subscribers in self._subscribers.values():
            for proc in subscribers:
                self._require(proc in self._connected, f"{proc} has gone and is still told")
