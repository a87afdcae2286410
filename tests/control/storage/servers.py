"""Real storages for tests: a directory for SQLite, and servers that are started here, on loopback and in temporary
directories. Each can be asked for a cluster of its own (`url`), can be spoilt, and, if it is a server, killed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ray._control import storage
from ray._node.process import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping

START_LIMIT_S = 30.0
PATIENCE_S = 15.0


class NotInstalled(Exception):
    """Says what is missing."""


class Sqlite:
    """Files in one directory."""

    name = "sqlite"
    ttl_s = 0.3

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="skate-sqlite-"))

    def url(self, **options: object) -> str:
        """A new cluster in a new file."""
        return f"sqlite://{self.directory}/{uuid.uuid4().hex}.db" + query(options)

    def make_newer(self, url: str) -> None:
        with sqlite_of(url) as connection:
            connection.execute("PRAGMA user_version = 2")

    def make_foreign(self, url: str) -> None:
        with sqlite_of(url) as connection:
            connection.execute("CREATE TABLE recipes (name TEXT)")

    def stop(self) -> None:
        shutil.rmtree(self.directory)


class Server:
    """A process that keeps its data over `kill` and `start`."""

    name = ""
    program = ""
    kill_signal = signal.SIGKILL
    ttl_s = 0.3
    """The shortest lease that is worth waiting for."""

    needed: Mapping[str, object] = MappingProxyType({})
    """Options without which it cannot be opened."""

    user: int | None = None

    def __init__(self) -> None:
        self.binary = find_program(self.program)
        if self.binary is None:
            raise NotInstalled(f"{self.program} is not installed")
        self.check_client()
        self.directory = Path(tempfile.mkdtemp(prefix=f"skate-{self.name}-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.create()
        self.start()

    def check_client(self) -> None:
        """Raise NotInstalled if the client's package is missing."""

    def create(self) -> None:
        """Prepare the directory."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def base(self) -> str:
        raise NotImplementedError

    def url(self, *, port: int = 0, **options: object) -> str:
        """A new cluster on this server, or behind a proxy for it."""
        options = {"prefix": uuid.uuid4().hex, "patience_s": PATIENCE_S} | options
        base = self.base().replace(f":{self.port}", f":{port}") if port else self.base()
        return base + query(options)

    def start(self) -> None:
        parent = os.getpid()
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                user=self.user,
                preexec_fn=lambda: die_with_parent(parent),
            )
        deadline = time.monotonic() + START_LIMIT_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"{self.program} did not start:\n{(self.directory / 'log').read_text()[-4000:]}")
            time.sleep(0.02)
        storage.open(self.url(**self.needed)).close()  # it takes connections before it has recovered

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """As a crash would, at once."""
        if self.process is not None:
            self.process.send_signal(self.kill_signal)
            self.process.wait(START_LIMIT_S)
            self.process = None

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.directory)


class Redis(Server):
    name = "redis"
    program = "redis-server"
    settings = ("--appendonly", "yes", "--appendfsync", "always")

    def check_client(self) -> None:
        try:
            import redis  # noqa: F401
        except ImportError as error:
            raise NotInstalled("the package redis is not installed") from error

    def command(self) -> list[str]:
        place = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory))
        return [self.binary, *place, "--save", "", *self.settings]

    def base(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self):
        import redis

        return redis.Redis(port=self.port)

    def make_newer(self, url: str) -> None:
        with self.client() as client:
            client.hset(f"skate:{{{prefix_of(url)}}}:fence", "format", 2)

    def make_foreign(self, url: str) -> None:
        with self.client() as client:
            client.hset(f"skate:{{{prefix_of(url)}}}:records", "soup", "of the day")

    def empty(self) -> None:
        with self.client() as client:
            client.flushall()

    def lease_has_ended(self, opened) -> bool:
        return not opened._client.exists(opened._keys[2])


class Etcd(Server):
    name = "etcd"
    program = "etcd"
    ttl_s = 1.0  # it counts in seconds

    def command(self) -> list[str]:
        here = f"http://127.0.0.1:{self.port}"
        # Leases of a second, and no member that this one has to wait for.
        return [
            self.binary, "--data-dir", str(self.directory / "data"), "--listen-client-urls", here,
            "--advertise-client-urls", here, "--listen-peer-urls", "http://127.0.0.1:0",
            "--heartbeat-interval", "10", "--election-timeout", "100",
        ]  # fmt: skip

    def base(self) -> str:
        return f"etcd://127.0.0.1:{self.port}"

    def ask(self, url: str, path: str, body) -> None:
        from ray._control.storage.etcd_gateway import Gateway
        from ray._control.storage.patience import Patience
        from ray._control.storage.url import parse

        gateway = Gateway(parse(url), Patience("etcd"))
        gateway.ask(path, body)
        gateway.close()

    def put(self, url: str, name: str, value: bytes) -> None:
        from ray._control.storage.etcd_gateway import text64

        key = f"/skate/{prefix_of(url)}/{name}".encode()
        self.ask(url, "kv/put", {"key": text64(key), "value": text64(value)})

    def make_newer(self, url: str) -> None:
        self.put(url, "format", b"2")

    def make_foreign(self, url: str) -> None:
        self.put(url, "soup", b"of the day")

    def empty(self) -> None:
        from ray._control.storage.etcd_gateway import text64

        self.ask(self.url(), "kv/deleterange", {"key": text64(b"/"), "range_end": text64(b"0")})

    def lease_has_ended(self, opened) -> bool:
        return opened._get("leader") is None


class Postgres(Server):
    name = "postgres"
    program = "postgres"
    kill_signal = signal.SIGQUIT  # "immediate": no checkpoint, and its children are gone when it is

    def check_client(self) -> None:
        try:
            import asyncpg  # noqa: F401
        except ImportError as error:
            raise NotInstalled("the package asyncpg is not installed") from error

    def create(self) -> None:
        initdb = find_program("initdb", beside=self.binary)
        assert initdb is not None, "postgres is installed without initdb"
        if os.geteuid() == 0:
            self.user = unprivileged_user()
            os.chown(self.directory, self.user, -1)
            self.directory.parent.chmod(0o711)
        arguments = ["-D", self.directory / "data", "-A", "trust", "-U", "skate", "--no-sync", "-E", "UTF8"]
        subprocess.run(
            [initdb, *arguments], check=True, capture_output=True, user=self.user, cwd=self.directory, timeout=60
        )

    def command(self) -> list[str]:
        return [
            self.binary, "-D", str(self.directory / "data"), "-p", str(self.port), "-k", str(self.directory),
            "-c", "listen_addresses=127.0.0.1", *self.settings,
        ]  # fmt: skip

    settings: tuple[str, ...] = ()

    def base(self) -> str:
        return f"postgresql://skate@127.0.0.1:{self.port}/postgres"

    def execute(self, *statements: str) -> None:
        import asyncio

        import asyncpg

        async def run() -> None:
            connection = await asyncpg.connect(host="127.0.0.1", port=self.port, user="skate", database="postgres")
            for statement in statements:
                await connection.execute(statement)
            await connection.close()

        asyncio.run(run())

    def make_newer(self, url: str) -> None:
        self.execute(f"UPDATE skate_clusters SET format = 2 WHERE cluster = '{prefix_of(url)}'")

    def make_foreign(self, url: str) -> None:
        name = f"foreign_{uuid.uuid4().hex}"
        self.execute(f"CREATE SCHEMA {name}", f"CREATE TABLE {name}.skate_clusters (soup text)",
                     f"CREATE TABLE {name}.skate_records (soup text)",
                     f"ALTER ROLE skate SET search_path = {name}")  # fmt: skip

    def undo_foreign(self) -> None:
        self.execute("ALTER ROLE skate RESET search_path")

    def empty(self) -> None:
        self.execute("TRUNCATE skate_clusters, skate_records")

    def lease_has_ended(self, opened) -> bool:
        statement = "SELECT until < clock_timestamp() FROM skate_clusters WHERE cluster = $1"
        return opened._fetch(statement, opened._cluster)[0][0]


KINDS = {kind.name: kind for kind in (Sqlite, Redis, Etcd, Postgres)}
SERVERS = [name for name in KINDS if name != "sqlite"]


def find_program(name: str, beside: str | None = None) -> str | None:
    """In PATH, beside this interpreter, or where Debian hides it."""
    places = [Path(beside).resolve().parent] if beside else []
    places += [*os.environ.get("PATH", "").split(os.pathsep), Path(sys.executable).parent]
    places += [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/sbin")]
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


def unprivileged_user() -> int:
    """PostgreSQL refuses to run as root."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    return 65534


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def query(options: dict[str, object]) -> str:
    return "?" + "&".join(f"{name}={value}" for name, value in options.items()) if options else ""


def prefix_of(url: str) -> str:
    from ray._control.storage.url import parse

    return parse(url).prefix


def sqlite_of(url: str):
    """A connection to the file of a URL that is closed at the end of the block."""
    from contextlib import closing

    from ray._control.storage.url import parse

    return closing(sqlite3.connect(parse(url).path, isolation_level=None))


def contents(opened: storage.Storage) -> dict[tuple[str, bytes], bytes]:
    """All records; each may come only once."""
    records = list(opened.load())
    found = {(table, key): value for table, key, value in records}
    assert len(found) == len(records)
    return found
