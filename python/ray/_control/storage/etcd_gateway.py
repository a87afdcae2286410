"""Requests to etcd's JSON gateway, by the standard library's HTTP client.

Six kinds of requests in all, on one connection at a time: not worth a package, of which one (one publisher, a wheel of
Rust) is kept and the others pull gRPC. The gateway is part of every etcd since 3.3 and speaks the same messages.

Owns the connection, the choice among endpoints, and the token of a user who gave a password. Knows nothing of what the
keys mean.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ray._control.storage.interface import StorageUnavailable
from ray._control.storage.patience import ConnectionLost

if TYPE_CHECKING:
    from ray._control.storage.patience import Patience
    from ray._control.storage.url import Address

_RETRIED: Final = {4, 10, 14}
"""Codes of gRPC that may pass: deadline exceeded, aborted, unavailable (no leader, stopping)."""

_UNAUTHENTICATED: Final = 16

_NOT_FOUND: Final = 5

ANSWER_BYTES_MAX: Final = 64 << 20
"""A larger answer is not read to its end; `AnswerTooLarge` says to ask for less."""

Json: TypeAlias = "dict[str, Any]"


class AnswerTooLarge(Exception):
    """The answer is beyond `ANSWER_BYTES_MAX`."""


class Gateway:
    """See the module's docstring."""

    def __init__(self, address: Address, patience: Patience) -> None:
        self._address = address
        self._patience = patience
        self._tls = _tls(address) if address.scheme == "etcds" else None
        self._connection: http.client.HTTPConnection | None = None
        self._endpoint = 0
        self._token = ""

    def ask(self, path: str, body: Json) -> Json:
        """The answer to a request, which is repeated while endpoints fail: it must do no harm when it arrives twice.

        What is not found answers with nothing.

        Raises:
            AnswerTooLarge: If the answer is beyond its limit.
            StorageUnavailable: If no endpoint has answered in time, or the answer was a refusal.
        """
        return self._patience.run(lambda: self._attempt(path, body))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _attempt(self, path: str, body: Json) -> Json:
        if self._address.user and not self._token:
            credentials = {"name": self._address.user, "password": self._address.password}
            self._token = self._post("auth/authenticate", credentials)["token"]
        return self._post(path, body)

    def _post(self, path: str, body: Json) -> Json:
        try:
            if self._connection is None:
                self._connection = self._connect()
            headers = {"Content-Type": "application/json"} | ({"Authorization": self._token} if self._token else {})
            self._connection.request("POST", f"/v3/{path}", json.dumps(body), headers)
            response = self._connection.getresponse()
            text = response.read(ANSWER_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            self._give_up_endpoint()
            raise ConnectionLost from error
        if len(text) > ANSWER_BYTES_MAX:
            self.close()  # what is left must not be taken for the next answer
            raise AnswerTooLarge
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {"message": f"{response.status} {response.reason}, which is no answer of etcd's JSON gateway"}
        if response.status == http.client.OK and isinstance(answer, dict) and not {"error", "message"} & set(answer):
            return answer
        return self._without(answer if isinstance(answer, dict) else {"message": text[:100].decode(errors="replace")})

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address.hosts[self._endpoint]
        connect_s = self._patience.connect_s
        connection = http.client.HTTPConnection(host, port, timeout=connect_s)
        if self._tls is not None:
            connection = http.client.HTTPSConnection(host, port, timeout=connect_s, context=self._tls)
        connection.connect()
        connection.sock.settimeout(self._patience.reply_s)
        return connection

    def _give_up_endpoint(self) -> None:
        self.close()
        self._endpoint = (self._endpoint + 1) % len(self._address.hosts)

    def _without(self, answer: Json) -> Json:
        """What to do with an error instead of an answer."""
        error = answer.get("error")  # a text, or of a stream an object
        detail: Json = error if isinstance(error, dict) else answer
        code = detail.get("code", detail.get("grpc_code"))
        message = detail.get("message") or error
        if code == _NOT_FOUND:
            return {}
        if code in _RETRIED:
            self._give_up_endpoint()
            raise ConnectionLost(message)
        if code == _UNAUTHENTICATED and self._token:
            self._token = ""  # they expire; the next attempt gets another
            raise ConnectionLost(message)
        msg = (
            f"{self._address.shown} refused a request: {message}. Look at its log, its space (`etcdctl alarm list`) "
            f"and the user's rights, then start the head again"
        )
        raise StorageUnavailable(msg)


def text64(data: bytes) -> str:
    """Bytes as the gateway wants them."""
    return base64.b64encode(data).decode()


def data64(text: str) -> bytes:
    """Bytes as the gateway gives them."""
    return base64.b64decode(text)


def _tls(address: Address) -> ssl.SSLContext:
    options = address.options
    try:
        context = ssl.create_default_context(cafile=options.get("ca_file"))
        if "cert_file" in options:
            context.load_cert_chain(options["cert_file"], options.get("key_file"))
    except OSError as error:
        msg = f"{address.shown}: the certificates cannot be read: {error}"
        raise StorageUnavailable(msg) from error
    return context
