"""The codec of the messages, and what the machines promise about themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ray import _protocol as p
from ray._control.machine import Deadlines, InvariantViolation
from tests.node.simulated import World

TABLE = """
64 LeaseDemand class_id demand count env strategy label retriable granted
65 LeaseReturn lease reusable node
66 Blocked
67 Unblocked
68 SegmentRequest min_bytes wish_bytes
69 SegmentMap segment
70 SegmentRelease segment discard
71 SegmentClaims segment blocks node more
72 BlocksFreed segment offsets node
73 ActorCreate actor spec place run env strategy name namespace max_restarts detached class_name owner label
74 ActorReady actor incarnation
75 ActorFailed actor incarnation error
76 ActorSubscribe actor
77 ActorRelease actor
78 ActorKill actor no_restart
79 ActorExit actor incarnation reason
80 PeerLost proc
81 Request op args
82 Retired
83 LeaseKept lease node
84 WhereIsNode node
85 Pull object node segment offset len prefetch
86 PullReleased object
87 Spill owner blocks
88 SpillReleased spill node
92 RegisterOpened bytes
93 EstateQuestion node given_up claimed
96 LeaseGranted class_id lease proc node pid gpu_ids
97 LeaseReclaim lease wanted node
98 WorkerDied proc lease cause exit_code intended oom retry
99 SegmentGranted segment size
100 SegmentDenied message kept why
101 SegmentMapped segment size lessee
102 SegmentTrim bytes
103 SegmentAdopted segment node lessee
104 ActorState actor state proc node incarnation cause_kind cause restarts_left pid
105 ActorInit actor incarnation spec gpu_ids namespace name
106 Reply ok body
107 LogLines name pid stream lines ip
108 Notice level text
109 LeaseFailed class_id reason code
110 ActorStop actor
111 Exit
112 Deaths dead
113 Pressure pressed
114 NodeAddress node address cause relayed
115 Pulled segment size offset
116 Describe what limit
117 Described what total rows
118 TaskEvents batch
119 SpillWanted bytes
120 Spilled owner blocks
124 EstateAnswer found absent
125 BlocksRetired blocks
"""


def test_the_wire_is_as_agreed():
    """A change of this table is a change of the protocol: the other side is written in another language."""
    lines = [
        " ".join([str(kind), message.__name__, *message.__struct_fields__])
        for message, kind in sorted(p.KINDS.items(), key=lambda item: item[1])
    ]
    assert lines == TABLE.strip().splitlines()


def test_bodies_are_arrays_in_the_order_of_the_fields():
    body = p.encode(p.LeaseGranted(3, 4, 1 << 63, 6, 7, [0, 1]))
    assert msgspec.msgpack.decode(body) == [3, 4, 1 << 63, 6, 7, [0, 1]]
    assert msgspec.msgpack.decode(p.encode(p.Exit())) == []


def test_a_newer_peer_s_further_fields_are_ignored_and_an_older_one_s_are_filled_in():
    longer = msgspec.msgpack.encode([1, {"CPU": 1}, 2, b"", b"", "f", True, -1, "new"])
    assert p.decode(64, longer) == p.LeaseDemand(1, {"CPU": 1}, 2, b"", b"", "f")
    assert p.decode(64, msgspec.msgpack.encode([1, {}, 2])) == p.LeaseDemand(1, {}, 2)


def test_what_is_not_a_message_is_refused():
    with pytest.raises(msgspec.ValidationError):
        p.decode(65, msgspec.msgpack.encode(["lease", True]))
    with pytest.raises(KeyError):
        p.decode(95, b"")


def test_a_violated_invariant_tells_the_story():
    world = World({"CPU": 1})
    driver = world.driver()
    world.node.leases.ledger.free["CPU"] -= 1
    with pytest.raises(InvariantViolation, match=r"CPU does not add up[\s\S]*LeaseDemand"):
        world.send(driver, p.LeaseDemand(1, {}, 1))


def test_deadlines_fire_in_order_once_and_can_be_moved():
    deadlines: Deadlines[str] = Deadlines()
    deadlines.set("a", 3.0)
    deadlines.set("b", 2.0)
    deadlines.set("c", 2.0)
    deadlines.set("a", 1.0)
    deadlines.clear("c")
    assert deadlines.next() == 1.0
    assert deadlines.due(2.0) == ["a", "b"]
    assert deadlines.due(9.0) == []
    for time in range(1000):
        deadlines.set("a", float(time))
    assert len(deadlines._heap) < 100


def test_a_history_gives_the_same_trace_under_any_hash_seed():
    script = f"""
import random, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tests.node.simulated import World, cpu, create
from ray import _protocol as p
world, rng = World({{"CPU": 3, "GPU": 1, "custom": 2}}, auto=False), random.Random(7)
drivers = [world.driver() for _ in range(5)]
for step in range(400):
    driver = rng.choice(drivers)
    match rng.randrange(6):
        case 0:
            demand = rng.choice([cpu(1), {{"GPU": 5000}}, {{"custom": 10000}}, {{}}])
            world.send(driver, p.LeaseDemand(rng.randrange(4), demand, rng.randrange(5)))
        case 1: world.send(driver, create(driver, step, max_restarts=1))
        case 2: world.settle()
        case 3: world.advance(rng.random())
        case 4:
            if world.running: world.die(rng.choice(sorted(world.running.values())))
        case 5: world.send(driver, p.SegmentRequest(1 << 22), step + 1)
for proc in sorted(world.inbox): print(proc, world.inbox[proc])
print(world.logs, world.node.leases.statistics(), world.node.pool.statistics())
"""
    traces = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert traces[0] == traces[1]
    assert len(traces[0]) > 10_000
