"""`ray timeline`: what ran when, for Perfetto."""

from __future__ import annotations

import click

from ray.scripts import options


@click.command(name="timeline", short_help="Write what ran when, for Perfetto.")
@click.option("-o", "--output", metavar="FILE", help="Where to; by default a new file in the temporary directory.")
@options.timeout
@options.address
@options.history_from
def timeline(*, output: str | None, timeout: float, address: str | None, directory: str | None) -> None:
    """Writes a file with what ran when on which worker, to be opened in ui.perfetto.dev or chrome://tracing."""
    import os
    import tempfile

    from ray._runtime import history
    from ray._runtime import timeline as traces
    from ray.util.state.api import ask

    if directory is not None:
        events = traces.of_logs(history.logs_under(directory))
    else:
        with ask(address, timeout) as asker:
            events = traces.of_cluster(asker)
    if output is None:
        fd, output = tempfile.mkstemp(prefix="ray-timeline-", suffix=".json")
        os.close(fd)
    traces.save(events, output)
    count = sum(event["ph"] == "X" for event in events)
    click.echo(f"{count} tasks were written to {output}: open it in https://ui.perfetto.dev or chrome://tracing.")
