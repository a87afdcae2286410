"""What strangers do to a port: `strangers_program.py HOST PORT HOW COUNT`.

Prints a line when they have all been there, and waits for the end of its input. `garbage` sends random bytes, `half`
begins and says no more, `silent` says nothing, `scan` connects and leaves, `reset` leaves without a goodbye.
Connections of `half` and `silent` stay open until the end.
"""

import contextlib
import os
import socket
import struct
import sys


def visit(address, how):
    stranger = socket.create_connection(address, timeout=10)
    if how == "garbage":
        with contextlib.suppress(OSError):
            stranger.sendall(os.urandom(4096))
            while stranger.recv(4096):
                pass
    elif how == "half":
        stranger.sendall(b"\0")
    elif how == "reset":
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how in ("half", "silent"):
        return stranger
    stranger.close()
    return None


def main(host, port, how, count):
    kept = [visit((host, int(port)), how) for _ in range(int(count))]
    print("done", flush=True)
    sys.stdin.read()
    for stranger in kept:
        if stranger is not None:
            stranger.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
