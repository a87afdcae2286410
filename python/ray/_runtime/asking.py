"""Asking a running cluster what it does, from inside of it or as a tool from outside.

Owns the connection of a process that is in no cluster, for as long as the questions take. Knows nothing of what is
asked.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from ray._core import Core
    from ray._runtime.tool import Tool

__all__ = ["Asker"]

MARGIN_S = 2.0  # how much longer than the cluster itself a question is waited for


class Asker:
    """Questions to one cluster; closed at the end of a `with` block.

    Args:
        address: "HOST:PORT", or "auto"; None: the cluster that this process is in, else as `ray status` finds one.
        timeout_s: How long all questions together may take.

    Raises:
        ConnectionError: If there is no cluster, or it cannot be joined; the text says why, and what to do.
        ValueError: If `address` is none, or the token that the environment names is none.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 30.0) -> None:
        from ray._runtime import session
        from ray._runtime.tool import Tool

        self.deadline = time.monotonic() + timeout_s
        self._tool: Tool | None = None
        if address is None and session.core is not None:
            self.core: Core = session.core
            return
        self._tool = Tool(address)
        self.core = self._tool.core

    @property
    def left_s(self) -> float:
        """How long the questions may still take."""
        return max(self.deadline - time.monotonic(), 0.0)

    @property
    def own_node(self) -> int:
        """The node that was started for these questions alone; 0 if they go through another."""
        return self._tool.own_node if self._tool is not None else 0

    def request(self, op: str, **arguments: Any) -> Any:
        """Asks something.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: As the cluster answered.
            TimeoutError: If it did not answer in time.
            ConnectionError: If it has ended meanwhile.
        """
        from ray._runtime import session

        return session.ask(self.core, op, self.left_s + MARGIN_S, arguments)

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
        if self._tool is not None:
            self._tool.close()

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
