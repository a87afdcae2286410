"""`ray health-check`: whether the head of a cluster answers, for probes."""

from __future__ import annotations

import click


@click.command(name="health-check", short_help="Exit with status 0 if the cluster's head answers.")
@click.option("--address", metavar="HOST:PORT", help="The head; by default as for 'ray status'.")
def health_check(*, address: str | None) -> None:
    """Asks the head of a cluster who it is, which it answers by itself, and prints that."""
    from ray._runtime import joining
    from ray._runtime import token as tokens

    where = joining.choose_running(address)
    record = joining.find(where)
    where = record.head_address if record is not None else where
    token = record.token if record is not None else tokens.find()
    if token is None:
        message = f"no token of the cluster at {where} is known. {joining.TOKEN_REMEDY}"
        raise click.ClickException(message)
    head = joining.reach(where, token)
    click.echo(f"The head at {head.address} is alive: node {head.node:016x}.")
