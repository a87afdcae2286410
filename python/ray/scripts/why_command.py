"""`ray why`: what something waits for."""

from __future__ import annotations

import click

from ray.scripts import options


@click.command(name="why", short_help="Say what something waits for, or how it ended.")
@click.argument("id")
@options.format_option("table", "json", "yaml", default="table")
@options.timeout
@options.address
def why(*, id: str, form: str, timeout: float, address: str | None) -> None:
    """Says why an object, a task, an actor or a placement group is not there yet, or how it ended, down to the root.

    Of a node or a process it says whether it lives, and why not. ID is in hexadecimal, as lists and messages show it.
    """
    from ray._runtime import reasons
    from ray.scripts import printing
    from ray.util.state.api import ask

    with ask(address, timeout) as asker:
        chain = reasons.explain(asker, id)
    if form != "table":
        click.echo(printing.as_document([{"what": what, "why": reason} for what, reason in chain], form))
        return
    for depth, (what, reason) in enumerate(chain):
        click.echo(f"{'  ' * depth}{what}: {reason}")
