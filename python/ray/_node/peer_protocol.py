"""Messages between node processes about copies of objects: msgpack arrays, kinds 144 to 159.

A copy's *origin* is the block from which all copies come: the object's primary, at `segment` and `offset` of the
node that is spoken to (or that speaks, in `Located`). Object and origin together name what is copied: an object
that was lost and made again lies elsewhere, and copies of the two are never mixed.

Links keep the order of messages. What comes late, twice, or about what is not known any more is ignored.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec


class PeerMessage(msgspec.Struct, frozen=True, array_like=True):
    """Base of these messages. `PEER_KINDS` says which kind a class travels as."""


class Locate(PeerMessage, frozen=True):
    """A node is about to pull the block into its own segment `into`, and asks from where. Answered by `Located`.

    From now on it may be named to others as a source: of what has arrived, and later of all. `again` after a failure:
    then only finished copies are named, so that nobody waits for one who waits for him.
    """

    object: bytes
    segment: int
    offset: int
    into: int
    again: bool = False


class Located(PeerMessage, frozen=True):
    """Nodes from which to pull, best first, each with segment and offset there. The origin is among them."""

    object: bytes
    segment: int
    offset: int
    sources: list[tuple[int, int, int]]


class Copied(PeerMessage, frozen=True):
    """The pull is finished: the sender has a whole copy."""

    object: bytes
    segment: int
    offset: int


class Uncopied(PeerMessage, frozen=True):
    """The pull has ended without a copy. `refused` are nodes that said that they have not what they were named for."""

    object: bytes
    segment: int
    offset: int
    refused: list[int] = []


class Dropped(PeerMessage, frozen=True):
    """The sender's copy is gone: its memory was needed."""

    object: bytes
    segment: int
    offset: int


class SpillFreed(PeerMessage, frozen=True):
    """A value that the receiver has spilled is not needed any more, says its owner, a process of the sender's."""

    owner: int
    spill: int


KIND_LOCATE: Final = 144
KIND_LOCATED: Final = 145
KIND_COPIED: Final = 146
KIND_UNCOPIED: Final = 147
KIND_DROPPED: Final = 148
KIND_SPILL_FREED: Final = 149

PEER_MESSAGES: Final[dict[int, type[PeerMessage]]] = {
    KIND_LOCATE: Locate,
    KIND_LOCATED: Located,
    KIND_COPIED: Copied,
    KIND_UNCOPIED: Uncopied,
    KIND_DROPPED: Dropped,
    KIND_SPILL_FREED: SpillFreed,
}

PEER_KINDS: Final[dict[type[PeerMessage], int]] = {message: kind for kind, message in PEER_MESSAGES.items()}

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[int, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: PeerMessage) -> bytes:
    """The body of the frame that carries `message`; its kind is ``PEER_KINDS[type(message)]``."""
    return _encoder.encode(message)


def decode(kind: int, body: bytes) -> PeerMessage:
    """The message in a frame's body.

    Raises:
        KeyError: If no message has this kind.
        msgspec.MsgspecError: If the body is not such a message; the text says which field.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(PEER_MESSAGES[kind])
    message: PeerMessage = decoder.decode(body)
    return message
