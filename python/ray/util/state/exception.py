"""What the functions of `ray.util.state` raise."""

from __future__ import annotations

__all__ = ["DataSourceUnavailable", "RayStateApiException", "ServerUnavailable"]


class DataSourceUnavailable(Exception):
    """A node or process that was asked has not answered."""


class RayStateApiException(RuntimeError):
    """A question to the cluster was not answered, or not completely."""


class ServerUnavailable(RayStateApiException):
    """There is no cluster to ask."""
