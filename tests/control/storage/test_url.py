"""What an address may say, and that its secrets are never shown."""

from __future__ import annotations

import pytest

from ray._control import storage
from ray._control.storage import LimitExceeded, StorageUnavailable
from ray._control.storage.url import parse


@pytest.mark.parametrize(
    ("url", "hosts", "path", "prefix", "shown"),
    [
        ("sqlite:///var/lib/s.db", (), "/var/lib/s.db", "default", "sqlite:///var/lib/s.db"),
        ("redis://h", (("h", 6379),), "", "default", "redis://h"),
        ("rediss://u:p@h:1/2?prefix=c", (("h", 1),), "/2", "c", "rediss://h:1/2 (c)"),
        ("redis://[::1]:1", (("::1", 1),), "", "default", "redis://[::1]:1"),
        ("etcd://a:1,b,c:3/my.cluster", (("a", 1), ("b", 2379), ("c", 3)), "/my.cluster", "my.cluster", "etcd://a:1,b,c:3/my.cluster"),
        ("etcd://a?prefix=c", (("a", 2379),), "", "c", "etcd://a (c)"),
        ("postgres://u:p%40@h/d", (("h", 5432),), "/d", "default", "postgresql://h/d"),
    ],
)  # fmt: skip
def test_a_url_is_taken_apart(url, hosts, path, prefix, shown):
    address = parse(url)
    assert (address.hosts, address.path, address.prefix, address.shown) == (hosts, path, prefix, shown)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://h", "a storage is one of sqlite://, redis://.* not 'mysql'"),
        ("state.db", "a storage is one of sqlite://"),
        ("sqlite://state.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("redis://h?durabilty=server", "no option 'durabilty'; redis has prefix, patience_s"),
        ("redis://h?durability=maybe", "durability is `strict` or `server`"),
        ("redis://h?replicas=-1", "replicas is a number"),
        ("redis://h/zero", "the number of a database"),
        ("redis://a,b", "give one host"),
        ("redis://h:99999", "not a host, or a host and a port"),
        ("redis://h:p", "not a host, or a host and a port"),
        ("etcd://", "not a host, or a host and a port"),
        ("etcd://a/b?prefix=c", "the path is the prefix"),
        ("etcd://a/b/c", "the prefix 'b/c' does not match"),
        ("redis://h?prefix=a{b}", "the prefix 'a{b}' does not match"),
        ("redis://h?patience_s=never", "patience_s is a number of seconds"),
        ("redis://h?patience_s=nan", "patience_s is a number of seconds"),
        ("redis://h?patience_s=0", "patience_s is a number of seconds"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_can(url, sentence):
    if "redis" in url:
        pytest.importorskip("redis")
    with pytest.raises(LimitExceeded, match=sentence):
        storage.open(url)


def test_credentials_are_read_and_never_shown():
    address = parse("postgresql://us%3Aer:se%2Fcret@h/d?prefix=c")
    assert (address.user, address.password) == ("us:er", "se/cret")
    for text in (repr(address), str(address), f"{address}", address.shown):
        assert "cret" not in text
        assert "er:" not in text
    with pytest.raises(LimitExceeded) as caught:
        parse("postgresql://user:secret@h/d?option=1")
    assert "secret" not in str(caught.value)


def test_a_password_may_lie_in_a_file(tmp_path):
    file = tmp_path / "password"
    file.write_text("secret\n")
    assert parse(f"redis://:other@h?password_file={file}").password == "secret"
    with pytest.raises(StorageUnavailable, match="the file with the password cannot be read"):
        parse(f"redis://h?password_file={tmp_path}/nothing")
