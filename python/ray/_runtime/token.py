"""The cluster's token as users pass it on: 32 bytes, in hexadecimal in files and variables.

Looked for in `RAY_AUTH_TOKEN`, in the file that `RAY_AUTH_TOKEN_PATH` names, and in ``~/.ray/auth_token``.
"""

from __future__ import annotations

import os

__all__ = ["create_default", "find", "locate", "parse", "read_file", "write_file"]

VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
DEFAULT_PATH = "~/.ray/auth_token"
TOKEN_BYTES = 32


def parse(text: str, source: str) -> bytes:
    """The token in a text.

    Args:
        text: 64 hexadecimal digits.
        source: Where the text is from, for errors.

    Raises:
        ValueError: If it is not a token.
    """
    try:
        token = bytes.fromhex(text.strip())
    except ValueError:
        token = b""
    if len(token) != TOKEN_BYTES:
        message = f"{source} is not a cluster token: a token is {2 * TOKEN_BYTES} hexadecimal digits"
        raise ValueError(message)
    return token


def find() -> bytes | None:
    """The token that the environment names; None if it names none.

    Raises:
        ValueError: If what is there is not a token, or cannot be read.
    """
    found = locate()
    return found[0] if found is not None else None


def locate() -> tuple[bytes, str] | None:
    """The token that the environment names, and where it was found, in words; None if it names none.

    Raises:
        ValueError: If what is there is not a token, or cannot be read.
    """
    if text := os.environ.get(VARIABLE):
        source = f"the environment variable {VARIABLE}"
        return parse(text, source), source
    if path := os.environ.get(PATH_VARIABLE):
        return read_file(path), f"{path}, which the environment variable {PATH_VARIABLE} names"
    default = os.path.expanduser(DEFAULT_PATH)
    return (read_file(default), default) if os.path.exists(default) else None


def create_default() -> bytes:
    """Makes a token, and keeps it in ``~/.ray/auth_token`` for all clusters of this user.

    Raises:
        FileExistsError: If there is one.
        OSError: If it cannot be written.
    """
    path = os.path.expanduser(DEFAULT_PATH)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    token = os.urandom(TOKEN_BYTES)
    # Whole before it has its name: a command that runs beside this one reads all of it, or finds none.
    temporary = f"{path}.{os.getpid()}"
    write_file(temporary, token)
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    return token


def read_file(path: str) -> bytes:
    """The token in a file.

    Raises:
        ValueError: If it cannot be read, or is none.
    """
    try:
        with open(path, encoding="ascii") as file:
            return parse(file.read(), path)
    except (OSError, UnicodeDecodeError) as error:
        message = f"the token file {path} cannot be read: {error}"
        raise ValueError(message) from None


def write_file(path: str, token: bytes) -> None:
    """Writes a token where only this user can read it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(file, 0o600)  # the file may have been there with another mode
        os.write(file, token.hex().encode() + b"\n")
    finally:
        os.close(file)
