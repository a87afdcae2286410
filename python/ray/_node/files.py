"""Files of a session that members may look at through their node: logs, and the event log.

Names are checked by who asks (`requests`). Links are not followed, and only the areas' own files are read.
"""

from __future__ import annotations

import os
import stat
from typing import Final

import msgspec

from ray._protocol import Reply

FILES_MAX: Final = 10_000
"""Files of an area that are listed, the newest of them."""


class Files:
    """Lists and reads files under a session's directory; answers are `Reply` messages."""

    def __init__(self, session_dir: str) -> None:
        self._session_dir = session_dir

    def list(self, area: str) -> Reply:
        """(name, bytes, time of the last change in seconds since 1970), the oldest first."""
        rows: list[tuple[str, int, float]] = []
        try:
            for entry in os.scandir(f"{self._session_dir}/{area}"):
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed meanwhile
                if stat.S_ISREG(info.st_mode):
                    rows.append((entry.name, info.st_size, info.st_mtime))
        except FileNotFoundError:
            pass  # nothing was written yet
        except OSError as error:
            return _refusal(error)
        rows.sort(key=lambda row: (row[2], row[0]))
        return Reply(ok=True, body=msgspec.msgpack.encode(rows[-FILES_MAX:]))

    def read(self, area: str, name: str, offset: int, size: int) -> Reply:
        """[where the piece begins, the piece, how long the file is]."""
        try:
            fd = os.open(f"{self._session_dir}/{area}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            return _refusal(error)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                text = f"{name} is no file"
                return Reply(ok=False, body=msgspec.msgpack.encode(["ValueError", text]))
            begin = max(info.st_size + offset, 0) if offset < 0 else offset
            data = os.pread(fd, size, begin)
        except OSError as error:
            return _refusal(error)
        finally:
            os.close(fd)
        return Reply(ok=True, body=msgspec.msgpack.encode([begin, data, info.st_size]))


def _refusal(error: OSError) -> Reply:
    text = f"{os.path.basename(error.filename or '') or 'the file'} cannot be read: {error.strerror}"
    return Reply(ok=False, body=msgspec.msgpack.encode(["ValueError", text]))
