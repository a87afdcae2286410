"""`ray.timeline`."""

from __future__ import annotations

from typing import Any

__all__ = ["timeline"]

TIMEOUT_S = 300.0  # how long the logs of all nodes may take


def timeline(filename: str | None = None) -> list[dict[str, Any]] | None:
    """What ran when, as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

    A row is a worker, a slice an attempt of a task, with its ids. Ended tasks come from the event logs of the nodes
    that live, running ones from the workers themselves.

    Args:
        filename: Where to write the events, as JSON.

    Returns:
        The events, if no file was named.
    """
    from ray._runtime import session
    from ray._runtime import timeline as traces
    from ray._runtime.asking import Asker

    session.require()
    with Asker(timeout_s=TIMEOUT_S) as asker:
        events = traces.of_cluster(asker)
    if filename is None:
        return events
    traces.save(events, filename)
    return None
