"""`ray why`: what something waits for."""

from __future__ import annotations

import click

from ray.scripts import options


@click.command(name="why", short_help="Say why an object, task or actor is not there yet.")
@click.argument("id")
@options.timeout
@options.address
def why(*, id: str, timeout: float, address: str | None) -> None:
    """Says why an object, a task or an actor is not there yet, or how it has ended: the chain down to the root.

    ID is in hexadecimal, as lists and messages show it.
    """
    from ray._runtime import reasons
    from ray.util.state.api import ask

    with ask(address, timeout) as asker:
        chain = reasons.explain(asker, id)
    for depth, (what, reason) in enumerate(chain):
        click.echo(f"{'  ' * depth}{what}: {reason}")
