"""Messages that should not be repeated."""

from __future__ import annotations

import time

__all__ = ["disable_log_once_globally", "enable_periodic_logging", "log_once"]

PERIOD_S = 60.0

_logged: set[str] = set()
_disabled = False
_periodic = False
_last_cleared = 0.0


def log_once(key: str) -> bool:
    """True the first time that it is asked about `key` in this process, False afterwards."""
    global _last_cleared
    if _disabled:
        return False
    now = time.monotonic()
    if _periodic and now - _last_cleared > PERIOD_S:
        _logged.clear()
        _last_cleared = now
    if key in _logged:
        return False
    _logged.add(key)
    return True


def disable_log_once_globally() -> None:
    """Makes `log_once` say False always, in this process."""
    global _disabled
    _disabled = True


def enable_periodic_logging() -> None:
    """Makes `log_once` forget what it was asked once a minute."""
    global _disabled, _periodic
    _disabled = False
    _periodic = True
