//! The bodies of the fuzz targets, for a moment in each run of the tests.

use proptest::prelude::*;
use skate_core::node_wire;
use skate_core::parsers;
use skate_proto::frame::Header;
use skate_proto::ids::{NodeKey, ObjectId, ProcId, TaskId};
use skate_proto::msg::{Done, Msg};
use skate_proto::payload::{Payload, Value};

/// Streams that are frames for the most part.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let frame = (1_u8.., any::<u64>(), prop::collection::vec(any::<u8>(), 0..300)).prop_map(|(kind, corr, body)| {
        let mut bytes = Header { body_len: body.len() as u32, kind, flags: 0, corr }.encode().to_vec();
        bytes.extend(body);
        bytes
    });
    (any::<u8>(), prop::collection::vec(frame, 0..6), prop::collection::vec(any::<u8>(), 0..40)).prop_map(
        |(piece, frames, tail)| {
            let mut bytes = vec![piece];
            bytes.extend(frames.concat());
            bytes.extend(tail);
            bytes
        },
    )
}

/// A message, with a few bytes changed.
fn damaged_message() -> impl Strategy<Value = Vec<u8>> {
    let task = TaskId { node: NodeKey(1), proc: ProcId(2), seq: 3 };
    let object = ObjectId { task, index: 0 };
    let messages = vec![
        Msg::Done(Done {
            task,
            results: vec![Value::Inline(Payload::plain(b"result"))],
            retryable: false,
            run_ns: 5,
            items: 0,
        }),
        Msg::Returned { tasks: vec![task; 3] },
        Msg::Forget { ids: vec![1, 2] },
        Msg::Resolved { object, value: Value::Inline(Payload { data: Payload::plain(b"v").data, refs: vec![object] }) },
    ];
    let hits = prop::collection::vec((any::<usize>(), any::<u8>()), 0..4);
    (prop::sample::select(messages), hits).prop_map(|(msg, hits)| {
        let mut bytes = postcard::to_stdvec(&msg).unwrap();
        for (at, byte) in hits {
            let len = bytes.len();
            bytes[at % len] = byte;
        }
        bytes
    })
}

/// Msgpack as the node would send it: an array of a few values of the usual types.
fn array() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![
        any::<u64>().prop_map(|n| rmp_serde::to_vec(&n).unwrap()),
        any::<bool>().prop_map(|b| rmp_serde::to_vec(&b).unwrap()),
        ".{0,8}".prop_map(|s| rmp_serde::to_vec(&s).unwrap()),
        prop::collection::vec(any::<u8>(), 0..24).prop_map(|b| rmp_serde::to_vec(serde_bytes::Bytes::new(&b)).unwrap()),
        prop::collection::vec(any::<u32>(), 0..3).prop_map(|v| rmp_serde::to_vec(&v).unwrap()),
    ];
    (node_wire::LEASE_GRANTED..=node_wire::DEATHS, prop::collection::vec(value, 0..10)).prop_map(|(kind, values)| {
        let mut bytes = vec![kind, 0x90 | values.len() as u8];
        bytes.extend(values.concat());
        bytes
    })
}

proptest! {
    #[test]
    fn frames_do_not_depend_on_how_the_stream_is_cut(bytes in stream()) {
        parsers::frames(&bytes);
    }

    #[test]
    fn no_bytes_break_the_handshake(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        parsers::handshake(&bytes);
    }

    #[test]
    fn no_bytes_are_heard_by_either_end_of_tls(
        kind in 19_u8..26,
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        is_record: bool,
    ) {
        let header = [kind, 3, 3, (bytes.len() >> 8) as u8, bytes.len() as u8];
        parsers::records(&if is_record { [&header[..], &bytes].concat() } else { bytes });
    }

    #[test]
    fn no_bytes_break_the_decoding_of_messages(bytes in prop_oneof![damaged_message(), prop::collection::vec(any::<u8>(), 0..200)]) {
        parsers::message(&bytes);
    }

    #[test]
    fn no_bytes_break_the_decoding_of_what_the_node_says(bytes in prop_oneof![array(), prop::collection::vec(any::<u8>(), 0..200)]) {
        parsers::node_message(&bytes);
    }
}
