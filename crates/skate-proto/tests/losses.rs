//! Values that are lost with the memory in which they lie, and copies of them.

mod bench;

use skate_proto::actors::ActorState;
use skate_proto::ids::{NodeKey, ObjectId, SegmentId, TaskId};
use skate_proto::leases::PIPELINE_NS;
use skate_proto::location::Location;
use skate_proto::msg::{Done, Msg, Returns, Slot};
use skate_proto::owner::{Effect, LOST_NODES_MAX};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};

use bench::*;

#[test]
fn a_lost_value_is_made_again_and_a_put_one_is_reported() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    let location = Location { node: NODE, segment: SegmentId(5), lessee: WORKER, offset: 0, len: 1 << 20 };
    let stored = Value::Stored { location, refs: vec![] };
    let done = Done { task, results: vec![stored.clone()], retryable: false, run_ns: 1000, items: 0 };
    bench.owner.handle_message(WORKER, Msg::Done(done), bench.now, &mut bench.out);
    let object = ObjectId { task, index: 0 };
    bench.effects();
    bench.owner.handle_missing(object, location.node, location.segment, bench.now, &mut bench.out);
    assert!(bench.value(task).is_none());
    assert_eq!(bench.pushes(), [(WORKER, task)]);
    let put = bench.owner.put(stored);
    bench.owner.handle_missing(put, location.node, location.segment, bench.now, &mut bench.out);
    assert_eq!(bench.error(put.task), ErrorCode::ObjectLost);
}

#[test]
fn a_task_whose_argument_is_lost_before_it_is_pushed_waits_for_it_again() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let made = bench.submit(f);
    bench.lend(1, WORKER);
    stored(&mut bench, WORKER, made, 5);
    let object = ObjectId { task: made, index: 0 };
    let busy = bench.submit(f);
    let reader = bench.submit_with(f, vec![(Slot::Position(0), object)]);
    assert_eq!(bench.pushes().last(), Some(&(WORKER, busy)), "the reader is queued, its argument being there");
    bench.owner.handle_message(
        OTHER,
        Msg::Missing { object, node: NODE, segment: SegmentId(5) },
        bench.now,
        &mut bench.out,
    );
    bench.effects();
    // The reader comes before the task that makes its argument again, which must not stop it.
    bench.done(WORKER, busy, PIPELINE_NS * 2);
    assert_eq!(bench.pushes(), [(WORKER, made)]);
    stored(&mut bench, WORKER, made, 6);
    assert_eq!(bench.pushes(), [(WORKER, reader)]);
}

#[test]
fn a_call_whose_argument_is_lost_before_it_is_sent_waits_for_it_again() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let made = bench.submit(f);
    bench.lend(1, WORKER);
    stored(&mut bench, WORKER, made, 5);
    let object = ObjectId { task: made, index: 0 };
    let (actor, handle) = actor(&mut bench, -1);
    let method = bench.owner.define(call(Returns::Count(1), Some(actor)), Blob::empty(), None, 0);
    let deps = vec![(Slot::Position(0), object)];
    let task =
        bench.owner.submit(method, Payload::plain(b""), deps, Some(handle), None, bench.now, &mut bench.out).unwrap();
    bench.owner.report_missing(object, NODE, SegmentId(5), bench.now, &mut bench.out);
    bench.effects();
    bench.owner.handle_actor_state(
        actor,
        ActorState::Alive { proc: OTHER, node: NODE, incarnation: 0 },
        bench.now,
        &mut bench.out,
    );
    assert!(bench.pushes().is_empty());
    stored(&mut bench, WORKER, made, 6);
    assert_eq!(bench.pushes(), [(OTHER, task)]);
}

#[test]
fn copies_are_held_as_long_as_anything_counts_their_object() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    stored(&mut bench, WORKER, task, 5);
    let object = ObjectId { task, index: 0 };
    let copied = |bench: &mut Bench| bench.effects().contains(&Effect::ReleaseCopies(object));
    assert!(bench.owner.objects.mark_copied(object));
    bench.owner.objects.retain(object);
    bench.owner.release(object, &mut bench.out);
    bench.owner.handle_message(
        OTHER,
        Msg::Missing { object, node: NODE, segment: SegmentId(5) },
        bench.now,
        &mut bench.out,
    );
    assert!(!copied(&mut bench), "a view on the copy outlives the value that was copied");
    bench.owner.release(object, &mut bench.out);
    assert!(copied(&mut bench));
    assert!(!bench.owner.objects.mark_copied(object), "nobody counts it");
}

#[test]
fn a_loss_of_the_same_segment_number_on_another_node_is_none_of_the_value() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    stored(&mut bench, WORKER, task, 5);
    let object = ObjectId { task, index: 0 };
    let missing = Msg::Missing { object, node: NodeKey(77), segment: SegmentId(5) };
    bench.owner.handle_message(OTHER, missing, bench.now, &mut bench.out);
    assert!(bench.owner.objects.is_ready(object));
    assert_eq!(bench.owner.objects.blocks_in(NODE, SegmentId(5)), [(0, 64)]);
}

#[test]
fn blocks_on_another_node_are_none_of_the_segment_of_the_same_number_here() {
    let mut bench = Bench::new();
    let location = Location { node: NodeKey(77), segment: SegmentId(5), lessee: WORKER, offset: 0, len: 64 };
    bench.owner.put(Value::Stored { location, refs: vec![] });
    assert_eq!(bench.owner.objects.blocks_in(NODE, SegmentId(5)), []);
    assert_eq!(bench.owner.objects.blocks_in(NodeKey(77), SegmentId(5)), [(0, 64)]);
}

/// A task with two results in two segments, and both results.
fn two_results(bench: &mut Bench, max_retries: i32) -> (TaskId, [ObjectId; 2]) {
    let def = bench.owner.define(call(Returns::Count(2), None), Blob::new(b"code"), Some(bench.class), max_retries);
    let task = bench.submit(def);
    bench.lend(1, WORKER);
    both_done(bench, task, 5);
    (task, [0, 1].map(|index| ObjectId { task, index }))
}

fn both_done(bench: &mut Bench, task: TaskId, segment: u64) {
    let at = |segment| Location { node: NODE, segment: SegmentId(segment), lessee: WORKER, offset: 0, len: 64 };
    let results = [segment, segment + 1].map(|segment| Value::Stored { location: at(segment), refs: vec![] }).into();
    let done = Done { task, results, retryable: false, run_ns: PIPELINE_NS * 2, items: 0 };
    bench.owner.handle_message(WORKER, Msg::Done(done), bench.now, &mut bench.out);
}

#[test]
fn all_results_that_a_lost_node_took_along_are_made_again_by_one_repetition() {
    let mut bench = Bench::new();
    let (task, results) = two_results(&mut bench, 1);
    bench.effects();
    bench.owner.handle_node_lost(NODE, "node n1 is lost: it was killed");
    bench.owner.report_missing(results[0], NODE, SegmentId(5), bench.now, &mut bench.out);
    assert_eq!(bench.pushes(), [(WORKER, task)]);
    assert!(!bench.owner.objects.is_ready(results[1]), "it lay there too");
    bench.owner.report_missing(results[1], NODE, SegmentId(6), bench.now, &mut bench.out);
    assert_eq!(bench.pushes(), [], "it is made already");
    both_done(&mut bench, task, 7);
    assert!(results.iter().all(|id| bench.owner.objects.location(*id).is_some()));
}

#[test]
fn a_result_that_is_lost_while_another_is_made_again_comes_with_it() {
    let mut bench = Bench::new();
    let (task, results) = two_results(&mut bench, 1);
    bench.owner.report_missing(results[0], NODE, SegmentId(5), bench.now, &mut bench.out);
    assert!(bench.owner.objects.is_ready(results[1]), "it lies in another segment");
    bench.owner.report_missing(results[1], NODE, SegmentId(6), bench.now, &mut bench.out);
    assert!(!bench.owner.objects.is_ready(results[1]), "and is waited for");
    both_done(&mut bench, task, 7);
    assert!(results.iter().all(|id| bench.owner.objects.location(*id).is_some()));
}

#[test]
fn what_nobody_can_make_again_fails_with_the_node_that_it_was_lost_with() {
    let mut bench = Bench::new();
    let location = Location { node: NODE, segment: SegmentId(5), lessee: WORKER, offset: 0, len: 64 };
    let text = |bench: &mut Bench| {
        let id = bench.owner.put(Value::Stored { location, refs: vec![] });
        bench.owner.report_missing(id, NODE, SegmentId(5), bench.now, &mut bench.out);
        let Some(Value::Inline(payload)) = bench.owner.objects.value(id) else { panic!("no value") };
        String::from_utf8_lossy(&payload.data).into_owned()
    };
    assert!(text(&mut bench).contains("its shared memory on node 0000000000000008"));
    bench.owner.handle_node_lost(NODE, "node n1 is lost: it was killed");
    assert!(text(&mut bench).contains("its node (node n1 is lost: it was killed)"));
}

#[test]
fn why_more_nodes_were_lost_than_are_remembered_is_forgotten_for_some_whose_values_still_fail() {
    let mut bench = Bench::new();
    let nodes = || (0..=LOST_NODES_MAX as u64).map(|n| NodeKey(100 + n));
    for node in nodes() {
        bench.owner.handle_node_lost(node, "the cause");
    }
    let mut explained = 0;
    for node in nodes() {
        let location = Location { node, segment: SegmentId(5), lessee: WORKER, offset: 0, len: 64 };
        let id = bench.owner.put(Value::Stored { location, refs: vec![] });
        bench.owner.report_missing(id, node, SegmentId(5), bench.now, &mut bench.out);
        let Some(Value::Inline(payload)) = bench.owner.objects.value(id) else { panic!("no value") };
        explained += usize::from(String::from_utf8_lossy(&payload.data).contains("the cause"));
    }
    assert_eq!(explained, LOST_NODES_MAX);
}
