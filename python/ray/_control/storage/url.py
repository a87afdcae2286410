"""Addresses of storages: what a URL may say, and how it is shown without its secrets.

    sqlite:///var/lib/skate/state.db
    redis://:password@host:6379/0        rediss:// with TLS
    etcd://host1:2379,host2:2379         etcds:// with TLS
    postgresql://user:password@host:5432/database

Every kind takes `?prefix=` (the cluster's name on a shared server; for etcd the path may say it), `?patience_s=`
(see `patience.py`) and, those with passwords, `?password_file=`, which keeps the secret out of argument lists. Other
options belong to one backend, and its module describes them; an unknown one is an error, since a misspelt option
about durability must not pass.
"""

from __future__ import annotations

import math
import re
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from ray._control.storage.interface import LimitExceeded, StorageUnavailable
from ray._control.storage.patience import PATIENCE_S

PREFIX: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_COMMON: Final = ("prefix", "patience_s")
_TLS: Final = ("ca_file", "cert_file", "key_file")
OPTIONS: Final = {
    "sqlite": _COMMON,
    "redis": (*_COMMON, "password_file", "durability", "replicas"),
    "rediss": (*_COMMON, "password_file", "durability", "replicas", *_TLS),
    "etcd": (*_COMMON, "password_file"),
    "etcds": (*_COMMON, "password_file", *_TLS),
    "postgresql": (*_COMMON, "password_file", "sslmode", "sslrootcert", "sslcert", "sslkey"),
}
PORTS: Final = {"redis": 6379, "rediss": 6379, "etcd": 2379, "etcds": 2379, "postgresql": 5432}


class Address(msgspec.Struct, frozen=True):
    """A URL, taken apart. `shown` is what may be printed: the place alone."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    prefix: str
    patience_s: float
    options: dict[str, str]
    shown: str
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        """The place alone: an address ends up in messages and tracebacks."""
        return f"Address({self.shown!r})"


def parse(url: str) -> Address:
    """Take a URL apart.

    Raises:
        LimitExceeded: If it is not one that `open` understands; the message never has the URL's secrets.
        StorageUnavailable: If the password's file cannot be read.
    """
    parts = urlsplit(url)
    scheme = {"postgres": "postgresql"}.get(parts.scheme, parts.scheme)
    if scheme not in OPTIONS:
        msg = f"a storage is one of {', '.join(f'{name}://' for name in OPTIONS)}, not {parts.scheme!r}"
        raise LimitExceeded(msg)
    credentials, _, places = parts.netloc.rpartition("@")
    path = unquote(parts.path)
    shown = f"{scheme}://{places}{path}"
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(OPTIONS[scheme]))
    if unknown:
        msg = f"{shown}: there is no option {unknown[0]!r}; {scheme} has {', '.join(OPTIONS[scheme])}"
        raise LimitExceeded(msg)
    in_path = path.strip("/") if scheme.startswith("etcd") else ""
    if in_path and "prefix" in options:
        msg = f"{shown}: the path is the prefix; leave out ?prefix="
        raise LimitExceeded(msg)
    prefix = options.pop("prefix", in_path or "default")
    if not PREFIX.fullmatch(prefix):
        msg = f"{shown}: the prefix {prefix!r} does not match {PREFIX.pattern}"
        raise LimitExceeded(msg)
    user, _, password = credentials.partition(":")
    return Address(
        scheme=scheme,
        hosts=_hosts(scheme, places, path, shown),
        path=path,
        prefix=prefix,
        patience_s=_seconds(options.pop("patience_s", str(PATIENCE_S)), shown),
        options={name: value for name, value in options.items() if name != "password_file"},
        shown=shown if prefix in ("default", in_path) else f"{shown} ({prefix})",
        user=unquote(user),
        password=_password(options["password_file"], shown) if "password_file" in options else unquote(password),
    )


def _hosts(scheme: str, places: str, path: str, shown: str) -> tuple[tuple[str, int], ...]:
    if scheme == "sqlite":
        if places or not path.strip("/"):
            msg = f"{shown}: write the absolute path of a file behind three slashes, as in sqlite:///var/lib/skate/state.db"
            raise LimitExceeded(msg)
        return ()
    hosts = tuple(_host(place, PORTS[scheme], shown) for place in places.split(","))
    if len(hosts) > 1 and scheme.startswith("redis"):
        msg = f"{shown}: give one host. A proxy or service before a group of servers knows which is primary"
        raise LimitExceeded(msg)
    return hosts


def _host(place: str, port: int, shown: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:]+))(?::(\d{1,5}))?", place)
    if match is None or int(match.group(3) or port) > 0xFFFF:
        msg = f"{shown}: {place!r} is not a host, or a host and a port"
        raise LimitExceeded(msg)
    return match.group(1) or match.group(2), int(match.group(3) or port)


def _seconds(text: str, shown: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 3600:
        msg = f"{shown}: patience_s is a number of seconds up to 3600, not {text!r}"
        raise LimitExceeded(msg)
    return seconds


def _password(path: str, shown: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{shown}: the file with the password cannot be read: {error}"
        raise StorageUnavailable(msg) from error
