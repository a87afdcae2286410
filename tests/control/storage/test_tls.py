"""Servers that are reached by TLS: the certificate is checked, and the client shows its own where it is asked."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ray._control import storage
from ray._control.storage import StorageUnavailable, Write

from . import servers
from .servers import contents

pytestmark = [pytest.mark.slow]  # starts servers of its own


def openssl(directory, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A directory with an authority `ca`, and `pair` for the server and the client, all in PEM."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("certificates")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(directory, "req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    openssl(directory, "req", *new, "-keyout", "pair.key", "-out", "pair.csr", "-subj", "/CN=pair")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
    openssl(directory, "x509", "-req", "-in", "pair.csr", "-out", "pair.pem", *signed)
    return directory


class SecureRedis(servers.Redis):
    def command(self) -> list[str]:
        command = super().command()
        command[command.index("--port")] = "--tls-port"
        for name, file in {"cert": "pair.pem", "key": "pair.key", "ca-cert": "ca.pem"}.items():
            command += (f"--tls-{name}-file", str(self.certificates / file))
        return [*command, "--port", "0"]

    def base(self) -> str:
        return f"rediss://127.0.0.1:{self.port}/0"


class SecureEtcd(servers.Etcd):
    def command(self) -> list[str]:
        here = f"https://127.0.0.1:{self.port}"
        command = [here if argument.endswith(f":{self.port}") else argument for argument in super().command()]
        pair = ("--cert-file", str(self.certificates / "pair.pem"), "--key-file", str(self.certificates / "pair.key"))
        trusted = ("--trusted-ca-file", str(self.certificates / "ca.pem"), "--client-cert-auth")
        return [*command, *pair, *trusted]

    def base(self) -> str:
        return f"etcds://127.0.0.1:{self.port}"


@pytest.mark.parametrize("kind", [SecureRedis, SecureEtcd])
def test_a_server_is_trusted_by_its_certificate_and_asks_for_ours(certificates, kind):
    options = {
        "ca_file": certificates / "ca.pem",
        "cert_file": certificates / "pair.pem",
        "key_file": certificates / "pair.key",
    }
    secured = type(kind.__name__, (kind,), {"certificates": certificates, "needed": options})
    try:
        server = secured()
    except servers.NotInstalled as missing:
        pytest.skip(str(missing))
    try:
        opened = storage.open(server.url(**options))
        assert opened.acquire("a", 60) is not None
        opened.commit([Write("t", b"k", b"v")])
        assert contents(opened) == {("t", b"k"): b"v"}
        opened.close()
        without_authority = {name: value for name, value in options.items() if name != "ca_file"}
        without_pair = {"ca_file": options["ca_file"]}
        for missing in (without_authority, without_pair):
            with pytest.raises(StorageUnavailable, match=r"SSL|ssl|certificate"):
                storage.open(server.url(**missing, patience_s=0.1))
    finally:
        server.stop()


def test_certificates_that_cannot_be_read_are_named():
    with pytest.raises(StorageUnavailable, match=r"the certificates cannot be read: .*No such file"):
        storage.open("etcds://127.0.0.1?ca_file=/nowhere/ca.pem")
