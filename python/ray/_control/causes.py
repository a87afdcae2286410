"""Words for why an actor died: what, where, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from ray._control.actor_records import Actor

NO_HANDLES: Final = "no handle to it was left"


class ActorDeath(msgspec.Struct, frozen=True):
    """A decided end. `reason` completes "because ..."; `final` forbids a restart."""

    reason: str
    final: bool


def init_failed_text(class_name: str) -> str:
    return f"{class_name}.__init__ failed"


def death_text(actor: Actor, doom: ActorDeath | None, cause: str, lines: tuple[str, ...], *, restarts: bool) -> str:
    """Why the actor's process ended and what that means, for people.

    Args:
        actor: As it was when its process ended.
        doom: What was decided before; None for a crash.
        cause: How the process ended.
        lines: The last that it logged; shown for crashes.
        restarts: Whether it comes back.
    """
    named = f" {actor.name!r}" if actor.name else ""
    subject = f"actor {actor.class_name}{named} ({actor.id.hex()}, pid {actor.pid})"
    if doom is not None:
        text = f"{subject} has ended: {doom.reason}"
        return f"{text}. It is being restarted." if restarts else f"{text}."
    text = f"{subject} died{' in __init__' if actor.state == 'starting' else ''}: {cause}"
    if lines:
        shown = "".join(f"\n    {line}" for line in lines)
        text = f"{text}. Its last log lines:{shown}\n"
    else:
        text = f"{text}. It logged nothing. "
    if restarts:
        left = "without limit" if actor.restarts_left < 0 else f"{actor.restarts_left - 1} more times after this"
        return f"{text}It is being restarted ({left})."
    if actor.max_restarts == 0:
        return f"{text}It is not restarted; to have that, set max_restarts in @ray.remote or .options()."
    return f"{text}It is not restarted: all {actor.max_restarts} restarts (max_restarts) were used."
