"""Asking a running cluster what it does, from inside of it or as a tool from outside.

Owns the connection of a process that is in no cluster, for as long as the question takes. A tool owns nothing in the
cluster, and no job begins or ends with it. Knows nothing of what is asked.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from types import TracebackType

    from ray._core import Core
    from ray._runtime.joining import Place

__all__ = ["Asker"]

CLOSE_S = 5.0  # how long a node that was started for this tool alone may take to end
MARGIN_S = 2.0  # how much longer than the cluster itself a question is waited for


class Asker:
    """Questions to one cluster; closed at the end of a `with` block.

    Args:
        address: "HOST:PORT", or "auto"; None: the cluster that this process is in, else as in `ray.init`.
        timeout_s: How long all questions together may take.

    Raises:
        ConnectionError: If there is no cluster, or it cannot be joined.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0) -> None:
        from ray._runtime import session

        self.deadline = time.monotonic() + timeout_s
        self._own: Core | None = None
        self._place: Place | None = None
        if address is None and session.core is not None:
            self.core: Core = session.core
            return
        self.core = self._own = self._join(address)

    def _join(self, address: str | None) -> Core:
        from ray import _core
        from ray._node.config import session_of
        from ray._runtime import joining, session

        chosen = joining.choose(address if address is not None else None)
        if chosen == "local":
            chosen = joining.choose("auto")
        place = self._place = joining.enter(chosen)
        try:
            return _core.Core(
                address=place.socket,
                session=session_of(place.token),
                token=place.token,
                node=place.node,
                proc=_core.random_id(),
                role=_core.ROLE_TOOL,
                hooks=session.hooks(),
            )
        except BaseException:
            self._end_node()
            raise

    @property
    def left_s(self) -> float:
        """How long the questions may still take."""
        return max(self.deadline - time.monotonic(), 0.0)

    @property
    def own_node(self) -> int:
        """The node that was started for this tool alone; 0 if it uses another."""
        return self._place.node if self._place is not None and self._place.process is not None else 0

    def request(self, op: str, **arguments: Any) -> Any:
        """Asks something.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: As the cluster answered.
            TimeoutError: If it did not answer in time.
            ConnectionError: If it has ended meanwhile.
        """
        from ray._runtime import session

        body = msgspec.msgpack.encode(arguments) if arguments else b""
        try:
            reply = self.core.request(op, body, self.left_s + MARGIN_S)
        except RuntimeError as error:
            raise session.refusal(error) from None
        return msgspec.msgpack.decode(reply) if reply else None

    def collect(self, what: str, limit: int) -> dict[str, Any]:
        """What nodes and their members say; see `ray._node.looks`."""
        result: dict[str, Any] = self.request("state.collect", what=what, limit=limit, timeout_s=max(self.left_s, 0.1))
        return result

    def at_node(self, node: int, ask: str, *arguments: Any) -> Any:
        """Asks one node, whichever that is."""
        return self.request("state.at", node=node, ask=ask, arguments=arguments)

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes but one that was started for this tool."""
        return [node for node in self.request("nodes") if node["node"] != self.own_node]

    def close(self) -> None:
        """Leaves, if it had joined."""
        if self._own is not None:
            self._own.close()
            self._own = None
        self._end_node()

    def _end_node(self) -> None:
        if self._place is not None and self._place.process is not None:
            self._place.process.close(CLOSE_S)
            self._place = None

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
