//! Tasks with large arguments on several nodes.

mod bench;

use skate_proto::ids::{LeaseId, NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use skate_proto::leases::PIPELINE_NS;
use skate_proto::locality::{NEAR_BYTES_MIN, PASSED_OVER_MAX};
use skate_proto::location::Location;
use skate_proto::msg::Slot;
use skate_proto::payload::Value;

use bench::*;

const HERE: NodeKey = NodeKey(20);
const THERE: NodeKey = NodeKey(21);
const AT_HERE: ProcId = ProcId(30);
const AT_THERE: ProcId = ProcId(31);

fn large(bench: &mut Bench, node: NodeKey, len: u64) -> ObjectId {
    let location = Location { node, segment: SegmentId(1), lessee: ProcId(40), offset: 0, len };
    bench.owner.put(Value::Stored { location, refs: vec![] })
}

fn submit_near(bench: &mut Bench, def: u32, node: NodeKey) -> TaskId {
    let object = large(bench, node, NEAR_BYTES_MIN);
    bench.submit_with(def, vec![(Slot::Position(0), object)])
}

fn lend(bench: &mut Bench, lease: u64, worker: ProcId, node: NodeKey) {
    let (class, now) = (bench.class, bench.now);
    bench.owner.handle_lease_granted(class, LeaseId(lease), worker, node, 42, vec![], now, &mut bench.out);
}

#[test]
fn a_worker_is_given_the_task_whose_arguments_are_on_its_node() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let [here, there] = [HERE, THERE].map(|node| submit_near(&mut bench, f, node));
    bench.effects();
    lend(&mut bench, 1, AT_THERE, THERE);
    lend(&mut bench, 2, AT_HERE, HERE);
    assert_eq!(bench.pushes(), [(AT_THERE, there), (AT_HERE, here)]);
}

#[test]
fn of_workers_that_are_free_the_one_near_the_arguments_is_taken() {
    for node in [HERE, THERE] {
        let mut bench = Bench::new();
        let f = bench.function(0);
        lend(&mut bench, 1, AT_THERE, THERE);
        lend(&mut bench, 2, AT_HERE, HERE);
        bench.effects();
        let task = submit_near(&mut bench, f, node);
        assert_eq!(bench.pushes(), [(if node == HERE { AT_HERE } else { AT_THERE }, task)]);
    }
}

#[test]
fn nothing_waits_for_a_worker_nearby_while_another_one_is_free() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    lend(&mut bench, 1, AT_HERE, HERE);
    bench.effects();
    let tasks = [HERE, THERE].map(|node| submit_near(&mut bench, f, node));
    assert_eq!(bench.pushes(), [(AT_HERE, tasks[0])]);
    bench.done(AT_HERE, tasks[0], PIPELINE_NS * 2);
    assert_eq!(bench.pushes(), [(AT_HERE, tasks[1])]);
}

#[test]
fn small_arguments_and_those_that_are_spread_out_do_not_change_the_order() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let small = large(&mut bench, THERE, NEAR_BYTES_MIN - 1);
    let first = bench.submit_with(f, vec![(Slot::Position(0), small)]);
    submit_near(&mut bench, f, HERE);
    bench.effects();
    lend(&mut bench, 1, AT_HERE, HERE);
    assert_eq!(bench.pushes(), [(AT_HERE, first)]);
}

#[test]
fn most_bytes_decide() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let parts = [(HERE, 3), (THERE, 2), (THERE, 2)].map(|(node, n)| large(&mut bench, node, n * NEAR_BYTES_MIN));
    lend(&mut bench, 1, AT_HERE, HERE);
    lend(&mut bench, 2, AT_THERE, THERE);
    bench.effects();
    let deps = parts.into_iter().zip(0..).map(|(part, at)| (Slot::Position(at), part)).collect();
    let task = bench.submit_with(f, deps);
    assert_eq!(bench.pushes(), [(AT_THERE, task)]);
}

#[test]
fn a_task_is_passed_over_a_limited_number_of_times() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let first = submit_near(&mut bench, f, THERE);
    for _ in 0..2 * PASSED_OVER_MAX {
        submit_near(&mut bench, f, HERE);
    }
    bench.effects();
    lend(&mut bench, 1, AT_HERE, HERE);
    let mut before = 0;
    loop {
        let [(_, task)] = bench.pushes()[..] else { panic!("one at a time") };
        if task == first {
            break;
        }
        before += 1;
        bench.done(AT_HERE, task, PIPELINE_NS * 2);
    }
    assert_eq!(before, PASSED_OVER_MAX);
}
