"""`ray.timeline`."""

from __future__ import annotations

from typing import Any

__all__ = ["timeline"]


def timeline(filename: str | None = None) -> list[dict[str, Any]] | None:
    """What ran when, as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

    A row is a worker, a slice an attempt of a task, with its ids. Ended tasks come from the event logs of the nodes
    that live, running ones from the workers themselves.

    Args:
        filename: Where to write the events, as JSON.

    Returns:
        The events, if no file was named.
    """
    import json

    from ray._runtime import session
    from ray._runtime import timeline as traces
    from ray._runtime.asking import Asker

    session.require()
    with Asker() as asker:
        events = traces.of_cluster(asker)
    if filename is None:
        return events
    with open(filename, "w") as file:
        json.dump(events, file)
    return None
