"""The Ray Client's names. Skate does not have it: a program joins its cluster directly."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["ClientBuilder", "client"]


def _absent() -> NoReturn:
    message = "Skate does not have the Ray Client, and cannot join a remote cluster yet; ray.init() starts a local one"
    raise NotImplementedError(message)


class ClientBuilder:
    """Not available: making one raises NotImplementedError."""

    def __init__(self, address: str | None) -> None:
        _absent()

    def env(self, env: dict[str, Any]) -> ClientBuilder:
        """Not available."""
        _absent()

    def namespace(self, namespace: str) -> ClientBuilder:
        """Not available."""
        _absent()

    def connect(self) -> Any:
        """Not available."""
        _absent()


def client(address: str | None = None, _deprecation_warn_enabled: bool = True) -> ClientBuilder:
    """Not available: raises NotImplementedError."""
    return ClientBuilder(address)
