"""What the cluster is doing. `why` is what there is yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from ray._core import ObjectRef

__all__ = ["why"]


def why(ref: ObjectRef[Any]) -> str:
    """Why a reference's value is not there yet, down to the root.

    Args:
        ref: The reference.

    Returns:
        One line for each thing that waits, outermost first, each with its reason; or that the value is there.

    Raises:
        TypeError: If `ref` is not a reference.
    """
    from ray import _core
    from ray._runtime import session

    if type(ref) is not _core.ObjectRef:
        message = f"why() takes an ObjectRef, not {kind_of(ref)}"
        raise TypeError(message)
    chain = session.ensure().why(ref)
    if not chain:
        return f"{ref.hex()} is there."
    return "\n".join(f"{'  ' * depth}{what}: {reason}" for depth, (what, reason) in enumerate(chain))
