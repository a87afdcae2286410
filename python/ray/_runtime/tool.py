"""A tool's membership in a cluster: it asks and looks, and owns nothing; no job begins or ends with it.

What the command line stands on. Independent of this process's own membership (`session`), which it leaves as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime import joining, nodes, session

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Tool"]

REQUEST_S = 30.0  # how long the cluster may take for an answer
CLOSE_S = 5.0  # how long a node that was started for this tool may take to end


class Tool:
    """A connection to a cluster, through a node of this machine; closed at the end of a `with` block.

    Args:
        address: "HOST:PORT", or "auto"; None as in `ray.init`, but nothing is started.

    Raises:
        ConnectionError: If there is no cluster, or it cannot be joined; the text says why, and what to do.
        ValueError: If `address` is none, or the token that the environment names is none.
    """

    def __init__(self, address: str | None = None) -> None:
        from ray import _core

        self.place = joining.enter(joining.choose_running(address))
        try:
            self.core = nodes.join(_core, self.place.socket, self.place.token, self.place.node, _core.ROLE_TOOL)
        except BaseException:
            self._end_node()
            raise

    @property
    def address(self) -> str:
        """Where the cluster is joined."""
        return self.place.head_address

    @property
    def own_node(self) -> int:
        """The node that was started for this tool alone; 0 if it uses another."""
        return self.place.node if self.place.process is not None else 0

    def request(self, op: str, timeout_s: float | None = REQUEST_S, **arguments: Any) -> Any:
        """Asks the cluster something.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: As it answered.
            TimeoutError: If it did not.
            ConnectionError: If it has ended meanwhile.
        """
        return session.ask(self.core, op, timeout_s, arguments)

    def close(self) -> None:
        """Leaves."""
        self.core.close()
        self._end_node()

    def _end_node(self) -> None:
        if self.place.process is not None:
            self.place.process.close(CLOSE_S)

    def __enter__(self) -> Tool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
