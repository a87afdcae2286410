"""Options that several commands which look at a cluster share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["address", "filters_of", "format_option", "history_from", "timeout"]

address = click.option(
    "--address", metavar="HOST:PORT", help="The cluster; by default RAY_ADDRESS, or that of this machine."
)
timeout = click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds that it may take.")
history_from = click.option(
    "--from",
    "directory",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="Read the event logs in this directory, of a cluster that may be gone, and ask nobody.",
)


def format_option(*choices: str, default: str) -> Callable[[Any], Any]:
    """How it is printed."""
    return click.option(
        "--format", "form", type=click.Choice(choices), default=default, show_default=True, help="How it is printed."
    )


def filters_of(texts: tuple[str, ...]) -> list[tuple[str, str, Any]]:
    """Conditions of the form "column=value" or "column!=value".

    Raises:
        click.BadParameter: If one is not of this form.
    """
    found = []
    for text in texts:
        key, separator, value = text.partition("!=")
        predicate = "!="
        if not separator:
            key, separator, value = text.partition("=")
            predicate = "="
        if not separator or not key.strip():
            message = f"{text!r} is no filter: it has the form COLUMN=VALUE or COLUMN!=VALUE"
            raise click.BadParameter(message, param_hint="--filter")
        found.append((key.strip().lower(), predicate, value.strip()))
    return found
