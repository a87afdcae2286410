"""One storage of each kind for all tests here, each test with clusters of its own on it."""

from __future__ import annotations

import os

import pytest

from ray._control import storage
from ray._node.descriptors import usage as descriptors_of

from . import servers


@pytest.fixture(scope="package")
def kinds():
    """A function that gives the storage of a name, started when it is first asked for."""
    started: dict[str, object] = {}

    def get(name: str):
        if isinstance(started.get(name), servers.NotInstalled):
            pytest.skip(str(started[name]))
        if name not in started:
            try:
                started[name] = servers.KINDS[name]()
            except servers.NotInstalled as missing:
                started[name] = missing
                pytest.skip(str(missing))
        return started[name]

    yield get
    for server in started.values():
        if not isinstance(server, servers.NotInstalled):
            server.stop()


@pytest.fixture(params=list(servers.KINDS))
def kind(request, kinds):
    """Each kind of storage in turn."""
    return kinds(request.param)


@pytest.fixture(params=servers.SERVERS)
def server(request, kinds):
    """Each kind that is a server; running, whatever the test before did to it."""
    server = kinds(request.param)
    yield server
    if server.process is None:
        server.start()


@pytest.fixture
def opened():
    """A function that opens a URL until the end of the test; after it as many descriptors are open as before."""
    before = descriptors()
    storages: list[storage.Storage] = []

    def open_storage(url: str) -> storage.Storage:
        storages.append(storage.open(url))
        return storages[-1]

    yield open_storage
    for each in storages:
        each.close()
    assert descriptors() <= before


def descriptors() -> int:
    return descriptors_of(os.getpid())[0]
