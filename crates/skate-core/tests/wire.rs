//! Bodies of messages to and from the node, byte for byte; `tests/test_wire.py` reads the same bytes in Python.

use std::collections::BTreeMap;

use skate_core::node_wire as wire;
use skate_proto::ids::{ActorId, LeaseId, NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use skate_proto::leases::ClassSpec;
use skate_proto::location::Location;
use skate_proto::spilling::Offered;

const GOLDEN: &str = include_str!("../../../tests/golden/wire.txt");
const OBJECT: ObjectId = ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 }, index: 4 };
const LOCATION: Location =
    Location { node: NodeKey(6), segment: SegmentId(5), lessee: ProcId(2), offset: 64, len: 200_000 };
const ACTOR: ActorId = ActorId { proc: ProcId(11), seq: 12 };

/// The bodies by name, with the kinds that they travel as.
fn golden() -> BTreeMap<&'static str, (u8, Vec<u8>)> {
    let line = |line: &'static str| {
        let mut words = line.split_whitespace();
        let kind = words.next()?.parse().ok()?;
        let name = words.next()?;
        Some((name, (kind, words.map(|word| u8::from_str_radix(word, 16).expect("two digits")).collect())))
    };
    GOLDEN.lines().filter(|text| !text.starts_with('#')).filter_map(line).collect()
}

#[test]
fn what_is_sent_to_the_node_is_as_agreed() {
    let spec =
        ClassSpec { demand: vec![("CPU".into(), 10_000)], env: vec![0x80], strategy: Vec::new(), retriable: true };
    let golden = golden();
    for (name, kind, body) in [
        ("LeaseDemand", wire::LEASE_DEMAND, wire::lease_demand(7, 3, &spec, "square", 2)),
        ("LeaseReturn", wire::LEASE_RETURN, wire::lease_return(LeaseId(9), true, NodeKey(6))),
        ("LeaseKept", wire::LEASE_KEPT, wire::lease_kept(LeaseId(9), NodeKey(6))),
        ("WhereIsNode", wire::WHERE_IS_NODE, wire::where_is_node(NodeKey(6))),
        ("Blocked", wire::BLOCKED, wire::empty()),
        ("SegmentRequest", wire::SEGMENT_REQUEST, wire::segment_request(200_000, 4 << 20)),
        ("SegmentRelease", wire::SEGMENT_RELEASE, wire::segment_release(SegmentId(5), true)),
        (
            "SegmentClaims",
            wire::SEGMENT_CLAIMS,
            wire::segment_claims(SegmentId(5), &[(0, 64), (4096, 256)], NodeKey(6)),
        ),
        ("BlocksFreed", wire::BLOCKS_FREED, wire::blocks_freed(SegmentId(5), &[64, 4096], NodeKey(6))),
        ("Pull", wire::PULL, wire::pull(OBJECT, &LOCATION, true)),
        ("RegisterOpened", wire::REGISTER_OPENED, wire::register_opened(37_752_832)),
        ("EstateQuestion", wire::ESTATE_QUESTION, wire::estate_question(NodeKey(6), &[OBJECT], &[OBJECT])),
        ("PullReleased", wire::PULL_RELEASED, wire::pull_released(OBJECT)),
        ("Spill", wire::SPILL, wire::spill(ProcId(2), &[Offered { object: OBJECT, serial: 7, from: LOCATION }])),
        ("SpillReleased", wire::SPILL_RELEASED, wire::spill_released(SegmentId(SegmentId::SPILLED + 1), 6)),
        ("ActorKill", wire::ACTOR_KILL, wire::actor_kill(ACTOR, true)),
        ("ActorExit", wire::ACTOR_EXIT, wire::actor_exit(ACTOR, 2, "bye")),
        ("Described", wire::DESCRIBED, wire::described(1, 3, &[0x91, 0xc0])),
        ("TaskEvents", wire::TASK_EVENTS, wire::task_events(&[0, 1])),
        ("Request", wire::REQUEST, wire::request("kv.get", &[0x91, 0xc0])),
    ] {
        assert_eq!(golden[name], (kind, body), "{name}");
    }
}

#[test]
fn what_comes_from_the_node_is_understood() {
    let golden = golden();
    for (name, meaning) in [
        (
            "LeaseGranted",
            "LeaseGranted { class: 7, lease: LeaseId(4294967297), worker: ProcId(18446744073709551615), node: NodeKey(6), pid: 1000, gpu_ids: [0, 1] }",
        ),
        ("WorkerDied", "WorkerDied { proc: ProcId(5), cause: \"gone\", death: EvictedAlone }"),
        ("SegmentGranted", "SegmentGranted { segment: SegmentId(5), size: 4194304 }"),
        ("SegmentDenied", "SegmentDenied { message: \"full\", kept: true, why: DiskFull }"),
        ("Pulled", "Pulled { segment: SegmentId(5), size: 4194304, offset: 64 }"),
        (
            "EstateAnswer",
            "EstateAnswer([(ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 }, index: 4 }, Some(Bequest { location: Some(Location { node: NodeKey(6), segment: SegmentId(5), lessee: ProcId(2), offset: 64, len: 200000 }), deed: Some(Payload { data: Blob(0 bytes), refs: [] }) })), (ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 }, index: 4 }, Some(Bequest { location: None, deed: Some(Payload { data: Blob(1 bytes), refs: [] }) })), (ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 }, index: 4 }, None)])",
        ),
        ("BlocksRetired", "BlocksRetired([(SegmentId(5), 64)])"),
        ("SegmentAdopted", "SegmentAdopted { segment: SegmentId(5), node: NodeKey(6), lessee: ProcId(11) }"),
        ("SpillWanted", "SpillWanted { bytes: 4194304 }"),
        (
            "Spilled",
            "Spilled { owner: ProcId(2), written: [Written { object: ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 }, index: 4 }, serial: 7, spill: Some(SegmentId(9223372036854775809)), len: 200000 }, Written { object: ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 }, index: 4 }, serial: 8, spill: None, len: 64 }] }",
        ),
        ("SegmentMapped", "SegmentMapped { segment: SegmentId(5), size: 4194304 }"),
        (
            "ActorState",
            "ActorState { actor: ActorId { proc: ProcId(11), seq: 12 }, state: Alive { proc: ProcId(5), node: NodeKey(6), incarnation: 2 } }",
        ),
        ("Reply", "Reply { ok: false, body: [192] }"),
        ("LogLines", "LogLines { name: \"f\", pid: 1000, stream: 2, lines: [\"hi\"], ip: \"::1\" }"),
        ("Notice", "Notice { level: \"warning\", text: \"hi\" }"),
        ("LeaseFailed", "LeaseFailed { class: 7, reason: \"no\", code: GroupRemoved }"),
        ("NodeAddress", "NodeAddress { node: NodeKey(6), address: \"10.0.0.6:7\", cause: \"\", relayed: true }"),
        ("Describe", "Describe { what: 1, limit: 100 }"),
        ("Exit", "Exit"),
        ("Deaths", "Deaths([(5, \"gone\"), (6, \"no\")])"),
    ] {
        let (kind, body) = &golden[name];
        let message = wire::decode(*kind, body).unwrap_or_else(|| panic!("{name} is not understood"));
        assert_eq!(format!("{message:?}"), meaning);
    }
}

#[test]
fn cut_and_garbled_bodies_are_refused() {
    for (name, (kind, body)) in golden() {
        let to_node = [wire::DESCRIBED, wire::TASK_EVENTS].contains(&kind);
        if kind < wire::LEASE_GRANTED || to_node || body.len() < 2 {
            continue;
        }
        for len in 0..body.len() {
            assert!(wire::decode(kind, &body[..len]).is_none(), "{name} cut to {len} bytes");
        }
        assert!(wire::decode(kind, &[0xc1; 16]).is_none(), "{name} garbled");
    }
    assert!(wire::decode(255, &[0x90]).is_none());
}
