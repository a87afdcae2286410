"""Where and when a node spills, as arguments and the environment want it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping


class SpillSettings(msgspec.Struct, frozen=True):
    """What a node was told about spilling; see `read_spill_settings`."""

    directory: str = ""
    """Where a directory with the session's name is made for spilled values; empty: in the session directory."""
    high_water_share: float = 0.8
    """How much of the store may be lent before values are spilled."""
    capacity_share: float = 0.95
    """How full the disk may be, by whatever, for something to be spilled to it."""
    enabled: bool = True


SYSTEM_CONFIG_KEYS: Final = frozenset(
    (
        "object_spilling_directory", "object_spilling_config", "object_spilling_threshold",
        "local_fs_capacity_threshold", "automatic_object_spilling_enabled",
    )
)  # fmt: skip
"""Keys of `_system_config` that say the same as the variable with their name behind ``RAY_``, and go before it."""

IGNORED_KEYS: Final = frozenset(("min_spilling_size", "max_fused_object_count", "max_io_workers"))
"""Keys with which Ray puts small values together and counts its writers; Skate does so by itself."""


def as_environment(system_config: Mapping[str, object]) -> dict[str, str]:
    """What `_system_config` says about spilling, as variables.

    Raises:
        NotImplementedError: If it has other keys; the text names them.
        TypeError: If it is no mapping.
    """
    if not isinstance(system_config, dict):
        msg = f"_system_config is to be a dict of settings by name, not {type(system_config).__name__}"
        raise TypeError(msg)
    unknown = sorted(map(repr, set(system_config) - SYSTEM_CONFIG_KEYS - IGNORED_KEYS))
    if unknown:
        msg = (
            f"_system_config has {', '.join(unknown)}: Skate knows {', '.join(sorted(SYSTEM_CONFIG_KEYS))} of it; "
            "leave the others out"
        )
        raise NotImplementedError(msg)
    known = {key: value for key, value in system_config.items() if key in SYSTEM_CONFIG_KEYS}
    if "object_spilling_config" in known:
        known.setdefault("object_spilling_directory", "")  # a variable of that name is not asked then
    return {
        f"RAY_{key}": msgspec.json.encode(value).decode() if isinstance(value, dict) else str(value)
        for key, value in known.items()
    }


def read_spill_settings(directory: str | None, environ: Mapping[str, str]) -> SpillSettings:
    """Spilling as an argument or else the environment wants it, in variables with Ray's names.

    `RAY_object_spilling_directory`: where spilled values go, if the argument does not say.
    `RAY_object_spilling_config`: the same in JSON, such as
    ``{"type": "filesystem", "params": {"directory_path": "/scratch"}}``.
    `RAY_object_spilling_threshold`: how much of the store may be lent before values are spilled; 0.8 by default.
    `RAY_local_fs_capacity_threshold`: how full the disk may be for something to be spilled to it; 0.95 by default.
    `RAY_automatic_object_spilling_enabled`: "0" or "false" for a store that never spills.

    Raises:
        ValueError: If one of them makes no sense, or the directory cannot be used; the text names it.
        NotImplementedError: If values are to be spilled to something that is no directory of this machine.
    """
    default = SpillSettings()
    source = "object_spilling_directory"
    if not directory:
        source = "RAY_object_spilling_directory"
        directory = environ.get(source, "")
    if not directory and (text := environ.get("RAY_object_spilling_config", "")):
        source = "RAY_object_spilling_config"
        directory = _directory_in(text)
    enabled = environ.get("RAY_automatic_object_spilling_enabled", "1").strip().lower() not in ("0", "false")
    return SpillSettings(
        _usable(directory, source) if directory and enabled else "",
        _share(environ, "RAY_object_spilling_threshold", default.high_water_share),
        _share(environ, "RAY_local_fs_capacity_threshold", default.capacity_share),
        enabled,
    )


def _directory_in(text: str) -> str:
    try:
        config: Any = msgspec.json.decode(text)
        kind, params = config["type"], config["params"]
        chosen = params["directory_path"] if kind == "filesystem" else params["uri"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        msg = (
            f"RAY_object_spilling_config={text!r} is to be JSON such as "
            """'{"type": "filesystem", "params": {"directory_path": "/scratch"}}'"""
        )
        raise ValueError(msg) from None
    return str(chosen[0] if isinstance(chosen, list) and chosen else chosen)


def _usable(directory: str, source: str) -> str:
    path = directory.removeprefix("file://")
    if "://" in path:
        msg = f"{source} is {directory!r}: Skate spills to directories of its nodes only, not to URLs yet"
        raise NotImplementedError(msg)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        msg = f"{source} is {directory!r}, which is no directory and cannot be made one: {error.strerror}"
        raise ValueError(msg) from None
    if not os.access(path, os.W_OK | os.X_OK):
        msg = f"{source} is {directory!r}, which this process may not write to"
        raise ValueError(msg)
    return os.path.abspath(path)


def _share(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        msg = f"{name}={text!r} is to be a share, above 0 and at most 1"
        raise ValueError(msg)
    return share
