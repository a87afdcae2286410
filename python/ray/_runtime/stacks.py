"""Lets workers write their stacks when somebody asks for them, whatever they are doing."""

from __future__ import annotations

__all__ = ["prepare"]


def prepare() -> None:
    """Once, in the zygote: its forks inherit the handlers. Where the stacks go is open only while they are written."""
    import faulthandler

    from ray import _core

    number, descriptor = _core.stack_target()
    faulthandler.register(number, file=descriptor, all_threads=True)
    _core.install_stack_handler()
