"""The command `ray`: finds its sub-commands, and says in words what went wrong in them.

Invariants: a sub-command's module imports nothing but click at its top, so that `ray --help` loads nothing that
`import ray` does not; whatever can go wrong in operation ends with status 1 and a sentence; programming errors keep
their traces.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import click

__all__ = ["cli", "main"]

COMMANDS: Final = {
    "get": "ray.scripts.state_commands:get_command",
    "get-auth-token": "ray.scripts.auth_token:get_auth_token",
    "health-check": "ray.scripts.health_check:health_check",
    "list": "ray.scripts.state_commands:list_command",
    "logs": "ray.scripts.log_commands:logs",
    "memory": "ray.scripts.memory_command:memory",
    "stack": "ray.scripts.stack_command:stack",
    "start": "ray.scripts.start:start",
    "status": "ray.scripts.status:status",
    "stop": "ray.scripts.stop:stop",
    "summary": "ray.scripts.state_commands:summary",
    "timeline": "ray.scripts.timeline_command:timeline",
    "why": "ray.scripts.why_command:why",
}
"""Where each sub-command is."""


class Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; None if there is none."""
        where = COMMANDS.get(cmd_name)
        if where is None:
            return None
        module, _, name = where.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):  # some of these are RuntimeErrors
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Commands, invoke_without_command=True, no_args_is_help=False)
@click.option("--version", is_flag=True, help="Print the version, and exit.")
@click.pass_context
def cli(ctx: click.Context, version: bool) -> None:
    """Starts, joins, looks at and stops clusters."""
    if version:
        from ray._version import __version__

        click.echo(f"ray, version {__version__}")
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """The entry point."""
    cli(prog_name="ray")
