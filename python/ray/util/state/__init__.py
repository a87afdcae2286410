"""What the cluster is doing. `why` is what there is yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from ray._core import Core, ObjectRef
    from ray._runtime.generators import ObjectRefGenerator

__all__ = ["why"]


def why(ref: ObjectRef[Any] | ObjectRefGenerator[Any]) -> str:
    """Why a reference's value, or a generator's next one, is not there yet, down to the root.

    Args:
        ref: The reference or generator.

    Returns:
        One line for each thing that waits, outermost first, each with its reason; or that the value is there, and of
        which type if it is an exception.

    Raises:
        TypeError: If `ref` is neither a reference nor a generator.
    """
    from ray import _core
    from ray._runtime import session
    from ray._runtime.generators import ObjectRefGenerator

    if isinstance(ref, ObjectRefGenerator):
        if ref.next_ready():
            return f"the next value of generator {ref.task_id().hex()} is there"
        if ref.is_finished():
            return f"generator {ref.task_id().hex()} has ended"
        ref = ref.completed()
    if type(ref) is not _core.ObjectRef:
        message = f"why() takes an ObjectRef or an ObjectRefGenerator, not {kind_of(ref)}"
        raise TypeError(message)
    core = session.ensure()
    chain = core.why(ref)
    what, reason = chain[-1]
    if reason == _IS_EXCEPTION and len(chain) == 1:
        chain = [(what, f"{reason}, {_exception_of(core, ref)}")]
    return "\n".join(f"{'  ' * depth}{what}: {reason}" for depth, (what, reason) in enumerate(chain))


_IS_EXCEPTION = "it is there: an exception"
"""The core's words for a value that is an error."""


def _exception_of(core: Core, ref: ObjectRef[Any]) -> str:
    try:
        core.get_one(ref)
    except Exception as error:
        return type(error).__qualname__
    return "which is gone meanwhile"
