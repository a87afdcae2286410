"""Both ends of the messages between a core and its node: the kinds and fields in Rust and in Python agree.

The Rust file is read as text: its constants, the tuples that its functions encode, and the tuples that it decodes,
with their types. That the bytes agree as well is shown by `golden/wire.txt`, which a test of `skate-core` reads too.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec
import pytest

from ray import _protocol as p

ROOT = Path(__file__).parents[1]
RUST = re.sub(r"//[^\n]*", "", (ROOT / "crates/skate-core/src/node_wire.rs").read_text())
BY_NAME = {message.__name__: message for message in p.KINDS}

ENCODERS = {
    "segment": ["SegmentMap", "SegmentRelease"],
    "actor": ["ActorSubscribe", "ActorRelease"],
    "empty": ["Blocked", "Unblocked", "Retired"],
}
"""Rust functions that serve messages of other names."""

OTHER_NAMES = {"class": "class_id", "worker": "proc", "code": "exit_code", "left": "restarts_left"}
"""What Rust calls fields; in `actor_create` the owner is the process in the actor's id."""

TYPES = {
    "u8": int, "u32": int, "u64": int, "i32": int, "i64": int, "bool": bool, "String": str, "ByteBuf": bytes,
    "Vec<u32>": list[int], "Vec<String>": list[str],
    "Vec<(u64, String)>": list[tuple[int, str]], "SpilledBlocks": list[tuple[bytes, int, int, int]],
}  # fmt: skip


def camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.lower().split("_"))


def split(text: str) -> list[str]:
    """Parts between the commas that are in no bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def enclosed(text: str, start: int) -> str:
    """What is between the parenthesis at `start` and its partner."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return text[start + 1 : at]
    raise AssertionError("unbalanced")


def field(expression: str) -> str:
    """The field that an encoded expression stands for: `Bytes::new(&creation.actor.to_bytes())` is `actor`."""
    expression = re.sub(r"\b(Bytes::new|Demand)\((.*)\)$", r"\2", expression)
    expression = expression.replace(".to_bytes()", "").replace("&", "")
    if expression.endswith("actor.proc.0"):
        return "owner"
    name = expression.removesuffix(".0").rpartition(".")[2]
    return OTHER_NAMES.get(name, name)


def encoded() -> dict[str, list[str]]:
    found = {}
    for match in re.finditer(r"pub fn (\w+)\([^{]*?-> Vec<u8> \{(.*?)\n\}", RUST, re.DOTALL):
        name, body = match.groups()
        at = body.find("encode(&(")
        fields = [field(part) for part in split(enclosed(body, at + len("encode(&")))] if at >= 0 else []
        for message in ENCODERS.get(name, [camel(name)]):
            found[message] = fields
    return found


def decoded() -> dict[str, list[tuple[str, str]]]:
    """(field or "", Rust type) in order, by message."""
    found = {}
    body = RUST[RUST.index("pub fn decode(") : RUST.index("fn decode_actor_state")]
    arms = re.split(r"\n\s+([A-Z_]+) => ", body)
    for kind, arm in zip(arms[1::2], arms[2::2], strict=True):
        if named := re.search(r"let \(([^)]*)\): \(([^)]*)\)\s*=\s*get", arm):
            names, types = split(named.group(1)), split(named.group(2))
        elif "get::<(" in arm:
            names, types = [""], split(enclosed(arm, arm.index("get::<(") + len("get::<")))
        else:
            continue
        found[camel(kind)] = list(zip(names, types, strict=True))
    state = RUST[RUST.index("fn decode_actor_state") :]
    types = split(re.search(r"type Fields = \(([^)]*)\)", state).group(1))
    names = split(re.search(r"let \(([^)]*)\): Fields", state).group(1))
    found["ActorState"] = list(zip(names, types, strict=True))
    return found


def golden() -> list[tuple[int, str, bytes]]:
    lines = (ROOT / "tests/golden/wire.txt").read_text().splitlines()
    parts = [line.split(maxsplit=2) for line in lines if line and not line.startswith("#")]
    return [(int(kind), name, bytes.fromhex(body)) for kind, name, body in parts]


def test_kinds_agree():
    in_rust = {name: int(value) for name, value in re.findall(r"pub const (\w+): u8 = (\d+);", RUST)}
    assert in_rust.pop("CORE") not in p.KINDS.values()
    assert in_rust == {name.removeprefix("KIND_"): value for name, value in vars(p).items() if name.startswith("KIND_")}
    assert {camel(name): kind for name, kind in in_rust.items()} == {m.__name__: kind for m, kind in p.KINDS.items()}


def test_every_message_is_encoded_at_one_end_and_decoded_at_the_other():
    assert set(encoded()) == {message.__name__ for message in p.TO_NODE.values()}
    nothing_to_read = {"ActorStop", "Exit"}
    assert set(decoded()) | nothing_to_read == {message.__name__ for message in p.FROM_NODE.values()}


@pytest.mark.parametrize("name", sorted(encoded()))
def test_rust_sends_the_fields_that_python_reads(name):
    expected = list(BY_NAME[name].__struct_fields__)
    sent = encoded()[name]
    if name in ENCODERS["segment"]:
        assert sent == expected == ["segment"]
    else:
        assert sent == expected


@pytest.mark.parametrize("name", sorted(decoded()))
def test_rust_reads_the_fields_that_python_sends(name):
    message = BY_NAME[name]
    hints = typing.get_type_hints(message)
    fields = decoded()[name]
    assert len(fields) == len(message.__struct_fields__)
    for (rust, rust_type), python in zip(fields, message.__struct_fields__, strict=True):
        if rust:
            plain = rust.removeprefix("_")
            assert OTHER_NAMES.get(plain, plain) == python
        assert TYPES[rust_type] == hints[python], python


@pytest.mark.parametrize(("kind", "name", "body"), golden(), ids=lambda value: value if isinstance(value, str) else "")
def test_golden_bytes_are_read_and_written_alike(kind, name, body):
    message = p.decode(kind, body)
    assert type(message).__name__ == name
    assert p.KINDS[type(message)] == kind
    assert msgspec.msgpack.decode(p.encode(message)) == msgspec.msgpack.decode(body)


def test_golden_values():
    values = {name: p.decode(kind, body) for kind, name, body in golden()}
    assert values["LeaseDemand"] == p.LeaseDemand(7, {"CPU": 10_000}, 3, b"\x80", b"", "square", granted=2)
    assert values["SegmentClaims"] == p.SegmentClaims(5, [(0, 64), (4096, 256)], 6)
    assert values["ActorExit"] == p.ActorExit((11).to_bytes(8, "big") + (12).to_bytes(8, "big"), 2, "bye")
    assert values["LeaseGranted"] == p.LeaseGranted(7, 2**32 + 1, 2**64 - 1, 6, 1000, [0, 1])
    assert values["WorkerDied"] == p.WorkerDied(5, 0, "gone", -9, intended=False, oom=True, retry=p.RETRY_NEVER)
    assert values["ActorState"].restarts_left == -1
    assert values["Describe"] == p.Describe(p.DESCRIBE_TASKS, 100)
    assert values["Described"] == p.Described(p.DESCRIBE_TASKS, 3, b"\x91\xc0")
