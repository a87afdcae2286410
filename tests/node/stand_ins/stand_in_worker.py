"""A stand-in for the worker's main module: joins its node and does what an actor's specification says."""

from __future__ import annotations

import os
import sys

from fake_core import ROLE_WORKER, Peer

from ray import _protocol as p


def main(*, address: str, session: bytes, token: bytes, node: int, proc: int) -> None:
    if os.environ.get("STAND_IN") == "fails":
        print("no such module: kaput", file=sys.stderr)
        sys.exit(7)
    peer = Peer(address, proc, ROLE_WORKER)
    while (frame := peer.receive(timeout=60)) is not None:
        message = p.decode(frame[0], frame[2])
        match message:
            case p.ActorInit():
                _be_actor(peer, message)
            case p.ActorStop():
                peer.send(p.KIND_ACTOR_EXIT, p.encode(p.ActorExit(message.actor, _incarnation, "asked to stop")))
                return
            case p.SegmentAdopted():
                peer.send(p.KIND_SEGMENT_CLAIMS, p.encode(p.SegmentClaims(message.segment, [], message.node)))
            case p.Describe():
                told = p.Described(message.what, 0, b"\x90")
                peer.send(p.KIND_DESCRIBED, p.encode(told), frame[1])
            case p.Exit():
                return


_incarnation = 0


def _be_actor(peer: Peer, init: p.ActorInit) -> None:
    global _incarnation
    _incarnation = init.incarnation
    for command in init.spec.decode().split(";"):
        match command.split(" ", 1):
            case ["print", text]:
                print(text)
            case ["print-no-newline", text]:
                print(text, end="", flush=True)
            case ["env", name]:
                print(os.environ.get(name))
            case ["flood", megabytes]:
                line = "x" * 1023
                for _ in range(int(megabytes) * 1024):
                    print(line)
            case ["complain", text]:
                print(text, file=sys.stderr)
            case ["random"]:
                import random

                print(random.random())
            case ["ready"]:
                peer.send(p.KIND_ACTOR_READY, p.encode(p.ActorReady(init.actor, init.incarnation)))
            case ["fail", text]:
                failed = p.ActorFailed(init.actor, init.incarnation, text.encode())
                peer.send(p.KIND_ACTOR_FAILED, p.encode(failed))
            case ["orphan"]:
                # Left behind on purpose, in a session of its own.
                os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ, setsid=True)
            case ["exit", code]:
                os._exit(int(code))
            case ["request-segment", size]:
                peer.send(p.KIND_SEGMENT_REQUEST, p.encode(p.SegmentRequest(int(size))), corr=1)
