"""A connection between a storage and its server that can lose answers."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

CHUNK_BYTES = 1 << 16


class LossyProxy:
    """Passes bytes on until told to lose an answer: then the server has done what was asked, and the client does not
    learn it. Use it as a block; one connection is served at a time.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lose_after: int | None = None
        self.lost = 0
        self._ended = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> LossyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def lose_answer(self, number: int) -> None:
        """Of the answers that come from now on, lose this one (from 1 on) and the connection with it."""
        self._lose_after = number

    def _serve(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        while not self._ended:
            for ready in select.select([client, server], [], [], 0.05)[0]:
                try:
                    data = ready.recv(CHUNK_BYTES)
                except OSError:
                    return
                if not data:
                    return
                if ready is server and self._lose_after is not None:
                    self._lose_after -= 1
                    if self._lose_after == 0:
                        self._lose_after = None
                        self.lost += 1
                        return
                (server if ready is client else client).sendall(data)
