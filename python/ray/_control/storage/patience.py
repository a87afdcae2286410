"""How long a lost connection is tried again, and what is said when it does not come back.

Owns the retries of one backend. Knows neither what is asked of the server nor how it is connected.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

from ray._control.storage.interface import StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PATIENCE_S: Final = 20.0
"""For a request with all its retries; the option `patience_s` of an address. Longer than a server needs to restart or
to elect a leader. Beyond it the request fails with `StorageUnavailable`."""

CONNECT_S_MAX: Final = 3.0
REPLY_S_MAX: Final = 5.0
"""For one attempt: then the connection is given up, and the request is sent again over another."""

ATTEMPTS_MIN: Final = 3
"""Made even if the time is over: a process that was suspended for an hour has had no chance yet, and should learn
from the storage that it was replaced, not that its connection has gone."""

PAUSE_S_MIN: Final = 0.05
PAUSE_S_MAX: Final = 1.0
"""Between attempts, doubling. One writer per cluster needs no jitter."""


class ConnectionLost(Exception):
    """An attempt failed in a way that another attempt may not. The cause is chained."""


class Patience:
    """Repeats attempts that end with `ConnectionLost`, up to a deadline.

    Args:
        place: Where the server is, for the message; without credentials.
        patience_s: How long one request may take with its retries.
    """

    def __init__(self, place: str, patience_s: float = PATIENCE_S) -> None:
        self._place = place
        self._patience_s = patience_s

    @property
    def connect_s(self) -> float:
        return min(CONNECT_S_MAX, self._patience_s)

    @property
    def reply_s(self) -> float:
        return min(REPLY_S_MAX, self._patience_s)

    def run(self, attempt: Callable[[], T]) -> T:
        """What the attempt returns, once it succeeds. It must do no harm when repeated.

        Raises:
            StorageUnavailable: If it went on failing until the time was over.
        """
        began = time.monotonic()
        failures = 0
        while True:
            try:
                return attempt()
            except ConnectionLost as lost:
                failures += 1
                waited = time.monotonic() - began
                if waited >= self._patience_s and failures >= ATTEMPTS_MIN:
                    cause = lost.__cause__ or lost
                    msg = (
                        f"{self._place} could not be reached since {waited:.1f} s, in {failures} attempts; the last "
                        f"failed with {type(cause).__name__}: {cause}. What was acknowledged is stored. See that the "
                        f"server runs and that this machine reaches it, then start the head again"
                    )
                    raise StorageUnavailable(msg) from cause
            # A deadline between attempts, not a poll: nobody tells when a server can be reached again.
            time.sleep(min(PAUSE_S_MIN * 2 ** (failures - 1), PAUSE_S_MAX))
