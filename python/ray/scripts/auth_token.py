"""`ray get-auth-token`: the one command that prints a token."""

from __future__ import annotations

import click


@click.command(name="get-auth-token", short_help="Print the token that lets others join.")
@click.option("--generate", is_flag=True, help="Make one in ~/.ray/auth_token if there is none yet.")
@click.option("--address", metavar="HOST:PORT", help="Of the cluster of this machine that is joined there.")
def get_auth_token(*, generate: bool, address: str | None) -> None:
    """Prints the token of the cluster that runs on this machine; without one, the token that a new cluster would have.

    The latter is that of RAY_AUTH_TOKEN, of the file that RAY_AUTH_TOKEN_PATH names, or of ~/.ray/auth_token. Standard
    error says which it is.
    """
    token, source = _find(address, generate=generate)
    click.echo(f"The token of {source}:", err=True)
    click.echo(token.hex())


def _find(address: str | None, *, generate: bool) -> tuple[bytes, str]:
    from ray._node import registry
    from ray._runtime import joining
    from ray._runtime import token as tokens

    if address is not None:
        record = joining.find(joining.check_address(address))
        if record is None:
            message = f"no node of the cluster at {address} runs on this machine: ask on one of its own"
            raise click.ClickException(message)
        return record.token, f"the cluster at {record.head_address}"
    running = registry.public()
    if running:
        return running[0].token, f"the cluster at {running[0].head_address}"
    found = tokens.locate()
    if found is not None:
        return found
    if generate:
        return tokens.create_default(), f"{tokens.DEFAULT_PATH}, which was made now"
    message = (
        "no cluster runs on this machine, and no token was made: 'ray start --head' makes one for its cluster, "
        "'ray get-auth-token --generate' one for all clusters of this user"
    )
    raise click.ClickException(message)
