"""A demand for workers, as placement and the notices for people know it."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from ray._control.strategy import Strategy  # noqa: TC001  (msgspec reads the annotation)

Key: TypeAlias = "tuple[int, int | bytes]"
"""(owner, class id) of a demand for leases; (`ACTORS`, actor id) of an actor's; (`GROUPS`, group id)."""

ACTORS: Final = 0
"""Stands for the control service as an owner: process ids are never zero."""

GROUPS: Final = -1
"""Stands for all placement groups as an owner, of what they wait for on a node."""


class Demand(msgspec.Struct):
    """What waits for a node, or is on its way to one.

    `home` is the owner's node, or that of the actor's creator (0 if it is gone). `count` leases are not placed.
    """

    key: Key
    home: int
    job: int
    demand: dict[str, int]
    place: dict[str, int]
    env: bytes
    packed: bytes
    strategy: Strategy
    label: str
    since: float
    incarnation: int = 0
    lives_for: int = 0
    """The process that owns the actor; for leases the key says it."""
    retriable: bool = True
    """Whether its tasks are repeated, or the actor is restarted, if a node ends the worker for want of memory."""
    count: int = 0
    placed: int = 0
    """Leases that were given to nodes and not refused, ever."""
    out: dict[int, int] = {}
    """Of these, those that were not granted yet, by node; of other nodes than `home`."""
    queued: dict[int, None] = {}
    """Nodes on which it stands in line."""
    given: dict[int, int] = {}
    """Leases that each node was asked for; only of demands that are to be spread."""
    shy: dict[int, float] = {}
    """Nodes that refused, and until when they are left alone."""
    held_back: dict[int, str] = {}
    """Nodes that refused for want of memory, and what they said. Only to be told to people."""
    for_group: bool = False
    """It waits for its placement group to be created, or to be whole again."""
    waits: bool = False
    """Whether people are told when this takes long."""
    hopeless: str = ""
    """Why no node can ever meet it; empty if one can."""

    @property
    def owner(self) -> int:
        return self.key[0]

    @property
    def unmet(self) -> int:
        return self.count

    @property
    def is_actor(self) -> bool:
        return self.key[0] == ACTORS

    @property
    def actor(self) -> bytes:
        assert isinstance(self.key[1], bytes)
        return self.key[1]

    @property
    def class_id(self) -> int:
        assert isinstance(self.key[1], int)
        return self.key[1]
