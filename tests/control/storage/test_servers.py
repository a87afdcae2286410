"""What is particular to servers: lost answers, settings that would lose commits, what is missing or refused."""

from __future__ import annotations

import sys

import pytest

from ray._control import storage
from ray._control.storage import ExtraMissing, LimitExceeded, StorageUnavailable, StorageUnreadable, Write

from . import servers
from .proxy import LossyProxy
from .servers import contents
from .test_contract import lead

SECRET = "hunter2"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_commit_whose_answer_is_lost_is_sent_again_and_applied_once(server, opened, number):
    with LossyProxy(server.port) as proxy:
        leader = lead(opened, server.url(port=proxy.port))
        leader.commit([Write("t", b"k", b"0")])
        proxy.lose_answer(number)
        for value in range(1, 8):  # the answer that is lost is that of one of them
            leader.commit([Write("t", b"k", b"%d" % value), Write("t", b"l%d" % value, b"")])
            assert contents(leader)["t", b"k"] == b"%d" % value
        assert proxy.lost == 1
        assert len(contents(leader)) == 8
        leader.close()


@pytest.mark.parametrize("number", range(1, 7))
def test_a_lease_is_taken_and_renewed_though_an_answer_is_lost(server, opened, number):
    with LossyProxy(server.port) as proxy:
        url = server.url(port=proxy.port)
        leader = opened(url)
        proxy.lose_answer(number)
        assert leader.acquire("a", 60) is not None
        for _ in range(number):
            leader.renew()
        assert proxy.lost == 1
        leader.commit([Write("t", b"k", b"v")])
        assert contents(leader) == {("t", b"k"): b"v"}
        leader.close()


def test_what_is_lost_while_everything_is_read_is_read_again(server, opened, monkeypatch):
    for name in ("etcd", "postgres", "redis"):
        monkeypatch.setattr(f"ray._control.storage.{name}.PAGE_RECORDS", 40)
    with LossyProxy(server.port) as proxy:
        leader = lead(opened, server.url(port=proxy.port))
        leader.commit([Write("t", b"%d" % number, b"x" * 200) for number in range(1000)])
        records = leader.load()
        found = [next(records)]
        proxy.lose_answer(3)
        found += records
        assert proxy.lost == 1
        assert {key for _, key, _ in found} == {b"%d" % number for number in range(1000)}
        assert len(found) == 1000
        leader.close()


def test_reading_from_redis_misses_nothing_when_it_was_started_again(kinds, opened, monkeypatch):
    """Then a cursor of its former life leads somewhere else."""
    server = kinds("redis")
    monkeypatch.setattr("ray._control.storage.redis.PAGE_RECORDS", 40)
    leader = lead(opened, server.url())
    leader.commit([Write("t", b"%d" % number, b"x" * 200) for number in range(1000)])
    records = leader.load()
    found = [next(records) for _ in range(500)]
    server.kill()
    server.start()
    found += records
    assert {key for _, key, _ in found} == {b"%d" % number for number in range(1000)}
    assert len(found) == 1000


@pytest.mark.parametrize(("name", "module"), [("redis", "redis"), ("postgresql", "asyncpg")])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, name, module):
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    for backend in ("redis", "postgres"):
        monkeypatch.delitem(sys.modules, f"ray._control.storage.{backend}", raising=False)
    with pytest.raises(ExtraMissing, match=rf"the package {module}, .* `pip install 'skate\[ha-{name[:5]}") as caught:
        storage.open(f"{name}://user:{SECRET}@localhost/0")
    assert SECRET not in str(caught.value)


def test_a_server_that_cannot_be_reached_is_named_with_how_long_it_was_tried_and_without_secrets(kinds):
    port = servers.free_port()
    for scheme, path in {"redis": "/0", "etcd": "", "postgresql": "/d"}.items():
        kinds({"postgresql": "postgres"}.get(scheme, scheme))  # only where its client is installed
        with pytest.raises(StorageUnavailable) as caught:
            storage.open(f"{scheme}://user:{SECRET}@127.0.0.1:{port}{path}?patience_s=0.1&prefix=p")
        text = str(caught.value)
        assert f"{scheme}://127.0.0.1:{port}{path} (p) could not be reached since" in text
        assert "ConnectionRefusedError" in text or "Connection refused" in text
        assert "See that the server runs" in text
        assert SECRET not in text
        assert "user" not in text


# ---------------------------------------------------------------------------------------- Redis


@pytest.fixture
def changed(kinds):
    """A Redis with one setting changed for the test."""
    server = kinds("redis")
    with server.client() as client:
        client.ping()  # connected before any test counts its descriptors
        undo = {}

        def change(name: str, value: str) -> servers.Redis:
            undo.setdefault(name, next(iter(client.config_get(name).values())))
            client.config_set(name, value)
            return server

        yield change
        for name, value in undo.items():
            client.config_set(name, value)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("appendfsync", "everysec", "appendfsync 'everysec'. Set `appendonly yes` and `appendfsync always`"),
        ("appendonly", "no", "appendonly is 'no'"),
    ],
)
def test_redis_that_would_lose_commits_is_refused_unless_its_operator_answers_for_it(
    changed, opened, name, value, sentence
):
    server = changed(name, value)
    with pytest.raises(StorageUnavailable, match=sentence):
        opened(server.url())
    leader = lead(opened, server.url(durability="server"))
    leader.commit([Write("t", b"k", b"v")])


def test_redis_that_may_evict_records_is_refused(changed, opened):
    changed("maxmemory-policy", "allkeys-lru")
    opened(changed("maxmemory", "0").url())  # evicts nothing without a limit
    server = changed("maxmemory", str(1 << 30))
    with pytest.raises(StorageUnavailable, match="may evict records"):
        opened(server.url())


def test_redis_without_memory_refuses_a_commit_and_keeps_nothing_of_it(changed, opened, kinds):
    url = kinds("redis").url()
    leader = lead(opened, url)
    leader.commit([Write("t", b"k", b"1")])
    changed("maxmemory", "1")
    with pytest.raises(StorageUnavailable, match=r"refused a request: .*maxmemory"):
        leader.commit([Write("t", b"k", None), Write("t", b"l", b"2")])
    changed("maxmemory", "0")
    assert contents(opened(url)) == {("t", b"k"): b"1"}


def test_redis_with_too_few_replicas_confirms_nothing(kinds, opened):
    leader = opened(kinds("redis").url(patience_s=0.6, replicas=1))
    with pytest.raises(StorageUnavailable, match="0 of the 1 replicas"):
        leader.acquire("a", 60)


def test_redis_of_another_password_is_refused_at_once(changed):
    url = changed("requirepass", SECRET).url().replace("redis://", f"redis://:{SECRET[:-1]}@")
    with pytest.raises(StorageUnavailable, match="refused a request") as caught:
        storage.open(url)
    assert SECRET[:-1] not in str(caught.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._control.storage.patience.time.sleep", lambda _: pytest.fail("it was tried again"))
        with pytest.raises(StorageUnavailable):
            storage.open(url)
    right = url.replace(SECRET[:-1], SECRET)
    storage.open(right).close()


# ---------------------------------------------------------------------------------------- etcd


def test_etcd_is_asked_at_its_other_hosts_when_one_does_not_answer(kinds, opened):
    server = kinds("etcd")
    url = server.url().replace("127.0.0.1", f"127.0.0.1:{servers.free_port()},127.0.0.1")
    leader = lead(opened, url)
    leader.commit([Write("t", b"k", b"v")])
    assert contents(leader) == {("t", b"k"): b"v"}


def test_etcd_with_passwords_gets_another_token_when_its_own_has_ended(kinds):
    server = kinds("etcd")
    url = server.url()
    plain = url.replace("etcd://", f"etcd://root:{SECRET}@")
    for path, body in (
        ("auth/user/add", {"name": "root", "password": SECRET}),
        ("auth/role/add", {"name": "root"}),
        ("auth/user/grant", {"user": "root", "role": "root"}),
        ("auth/enable", {}),
    ):
        server.ask(url, path, body)
    try:
        with pytest.raises(StorageUnavailable, match="refused a request"):
            storage.open(url)
        with pytest.raises(StorageUnavailable, match="authentication failed") as caught:
            storage.open(plain.replace(SECRET, SECRET[:-1]))
        assert SECRET[:-1] not in str(caught.value)
        leader = storage.open(plain)
        assert leader.acquire("a", 60) is not None
        leader._gateway._token = "ended"
        leader.commit([Write("t", b"k", b"v")])
        assert contents(leader) == {("t", b"k"): b"v"}
        leader.close()
    finally:
        server.ask(plain, "auth/disable", {})
        for path, body in (("auth/user/delete", {"name": "root"}), ("auth/role/delete", {"role": "root"})):
            server.ask(url, path, body)


@pytest.mark.parametrize("applied", [0, 1, 2])
def test_a_large_batch_on_etcd_is_completed_by_the_successor_once_it_was_committed(kinds, opened, applied):
    url = kinds("etcd").url()
    leader = lead(opened, url)
    leader.commit([Write("t", b"%d" % number, b"old") for number in range(250)])
    batch = [Write("t", b"%d" % number, b"new" if number % 2 else None) for number in range(250)]
    die_after(leader, applied, lambda: leader.commit(batch))
    successor = lead(opened, url)
    assert contents(successor) == {("t", b"%d" % number): b"new" for number in range(1, 250, 2)}
    assert journal(successor) == []


def test_a_large_batch_on_etcd_that_was_not_committed_leaves_nothing(kinds, opened):
    url = kinds("etcd").url()
    leader = lead(opened, url)
    batch = [Write("t", b"%d" % number, b"new") for number in range(250)]
    advance, calls = leader._advance, []

    def stop_before_the_commit(after, operations):
        calls.append(after)
        if after.pending:
            raise Killed
        advance(after, operations)

    leader._advance = stop_before_the_commit
    with pytest.raises(Killed):
        leader.commit(batch)
    assert len(journal(leader)) == 3
    successor = lead(opened, url)
    assert contents(successor) == {}
    assert journal(successor) == []


class Killed(Exception):
    """Stands for the end of the process."""


def die_after(leader, applied: int, commit) -> None:
    """End in the middle of a batch of three pieces that is committed, when so many of them are applied."""
    advance = leader._advance

    def dying(after, operations):
        if leader._fence.pending == 3 - applied:
            raise Killed
        advance(after, operations)

    leader._advance = dying
    with pytest.raises(Killed):
        commit()


def journal(leader) -> list[object]:
    from ray._control.storage.etcd_gateway import text64

    body = {"key": text64(leader._root + b"j/"), "range_end": text64(leader._root + b"j0")}
    return leader._gateway.ask("kv/range", body).get("kvs", [])


def test_a_page_of_etcd_that_is_too_large_is_asked_for_in_parts(kinds, opened, monkeypatch):
    leader = lead(opened, kinds("etcd").url())
    leader.commit([Write("t", b"%d" % number, bytes(10_000)) for number in range(100)])
    monkeypatch.setattr("ray._control.storage.etcd_gateway.ANSWER_BYTES_MAX", 50_000)
    assert len(contents(leader)) == 100


def test_a_server_that_does_not_speak_the_gateway_is_refused_at_once(kinds, monkeypatch):
    monkeypatch.setattr("ray._control.storage.etcd.Gateway.ask", _ask_for_nonsense)
    with pytest.raises(StorageUnavailable, match="404 Not Found, which is no answer of etcd's JSON gateway"):
        storage.open(kinds("etcd").url())


def _ask_for_nonsense(gateway, path, body):
    return gateway._patience.run(lambda: gateway._attempt("nonsense", body))


# ---------------------------------------------------------------------------------------- PostgreSQL


def test_postgres_without_fsync_is_refused(kinds):
    server = kinds("postgres")
    server.execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
    try:
        with pytest.raises(StorageUnavailable, match="fsync is off"):
            _open_until_refused(server)
    finally:
        server.execute("ALTER SYSTEM RESET fsync", "SELECT pg_reload_conf()")
        _open_until_accepted(server)


def _open_until_refused(server) -> None:
    from .test_contract import wait_for

    wait_for(lambda: storage.open(server.url()).close())  # the setting is read again a moment later


def _open_until_accepted(server) -> None:
    from .test_contract import wait_for

    def accepted() -> bool:
        try:
            storage.open(server.url()).close()
        except StorageUnavailable:
            return False
        return True

    wait_for(accepted)


def test_postgres_commits_are_synchronous_even_where_the_default_is_not(kinds, opened):
    server = kinds("postgres")
    server.execute("ALTER ROLE skate SET synchronous_commit = off")
    try:
        assert opened(server.url())._fetch("SHOW synchronous_commit")[0][0] == "on"
    finally:
        server.execute("ALTER ROLE skate RESET synchronous_commit")


def test_postgres_without_the_database_is_refused_at_once_with_its_word(kinds):
    url = kinds("postgres").url().replace("/postgres", "/nowhere")
    with pytest.raises(StorageUnavailable, match='refused a request: database "nowhere" does not exist'):
        storage.open(url)


def test_an_option_that_asyncpg_refuses_is_the_callers_error(kinds):
    with pytest.raises(LimitExceeded, match="sslmode"):
        storage.open(kinds("postgres").url(sslmode="perhaps"))


def test_two_heads_may_create_the_tables_at_once(kinds):
    import threading

    server = kinds("postgres")
    server.execute("DROP TABLE IF EXISTS skate_clusters, skate_records")
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            storage.open(server.url()).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_damage_to_the_records_of_a_server_is_told(server, opened):
    if server.name == "postgres":
        pytest.skip("its columns have types: nothing else can be in them")
    url = server.url()
    leader = lead(opened, url)
    leader.commit([Write("t", b"k", b"v")])
    if server.name == "redis":
        with server.client() as client:
            client.hset(leader._keys[1], "no-separator", "x")
    else:
        server.put(url, "r/no-separator", b"x")
    with pytest.raises(StorageUnreadable, match="no-separator"):
        contents(leader)
