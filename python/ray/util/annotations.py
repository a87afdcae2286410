"""Marks for how stable an API is. They change nothing at run time, except that `Deprecated` can warn."""

from __future__ import annotations

import enum
import functools
import warnings
from typing import Any

__all__ = ["AnnotationType", "Deprecated", "DeveloperAPI", "PublicAPI", "RayDeprecationWarning"]


class AnnotationType(enum.Enum):
    """How stable an API is."""

    PUBLIC_API = "PublicAPI"
    DEVELOPER_API = "DeveloperAPI"
    DEPRECATED = "Deprecated"
    UNKNOWN = "Unknown"


class RayDeprecationWarning(DeprecationWarning):
    """Something deprecated was used. Shown by default, unlike its base class."""


def _mark(obj: Any, kind: AnnotationType, **details: Any) -> Any:
    obj._annotated = obj.__name__
    obj._annotated_type = kind
    for name, value in details.items():
        setattr(obj, f"_annotated_{name}", value)
    return obj


def PublicAPI(*args: Any, **kwargs: Any) -> Any:  # noqa: N802 (Ray's name)
    """Marks an API that users may rely on.

    Args:
        stability: "stable", "beta" or "alpha".
        api_group: A heading for the documentation.
    """
    if len(args) == 1 and not kwargs and callable(args[0]):
        return PublicAPI(stability="stable")(args[0])
    stability = kwargs.get("stability", "stable")
    if stability not in ("stable", "beta", "alpha"):
        message = f"stability is 'stable', 'beta' or 'alpha', not {stability!r}"
        raise ValueError(message)
    return lambda obj: _mark(
        obj, AnnotationType.PUBLIC_API, stability=stability, api_group=kwargs.get("api_group", "Others")
    )


def DeveloperAPI(*args: Any, **kwargs: Any) -> Any:  # noqa: N802 (Ray's name)
    """Marks an API for those who build libraries on Ray; it may change between minor releases."""
    if len(args) == 1 and not kwargs and callable(args[0]):
        return DeveloperAPI()(args[0])
    return lambda obj: _mark(obj, AnnotationType.DEVELOPER_API, api_group=kwargs.get("api_group", "Others"))


def Deprecated(*args: Any, **kwargs: Any) -> Any:  # noqa: N802 (Ray's name)
    """Marks an API that will go.

    Args:
        message: What to use in its place.
        warning: Whether calling it warns.
    """
    if len(args) == 1 and not kwargs and callable(args[0]):
        return Deprecated()(args[0])
    unknown = set(kwargs) - {"message", "warning"}
    if unknown:
        text = f"Deprecated takes 'message' and 'warning', not {sorted(unknown)}"
        raise ValueError(text)
    advice = kwargs.get("message", "It will be removed in a future release.")

    def mark(obj: Any) -> Any:
        if kwargs.get("warning") and not isinstance(obj, type):
            return _mark(_warning(obj, advice), AnnotationType.DEPRECATED)
        return _mark(obj, AnnotationType.DEPRECATED)

    return mark


def _warning(function: Any, advice: str) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{function.__qualname__} is deprecated. {advice}", RayDeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return wrapper
