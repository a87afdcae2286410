//! How an owner uses the workers that it was lent, and the queues of its actors.

mod bench;

use skate_proto::actors::{ActorState, Creation};
use skate_proto::ids::{ActorId, FunctionId, LeaseId, NodeKey, ObjectId, ProcId, TaskId};
use skate_proto::leases::{ClassId, ClassSpec, Death, IDLE_NS, PIPELINE_NS, TURN_NS};
use skate_proto::msg::{Done, Msg, Push, Returns, Slot};
use skate_proto::objects::WaiterId;
use skate_proto::owner::{Effect, Out, ToNode};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};
use skate_proto::streams::Next;
use skate_proto::tasks::{Refused, UNUSED_DEFINITIONS_MAX};

use bench::*;

#[test]
fn a_task_asks_for_a_worker_and_is_pushed_with_its_function_once() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let first = bench.submit(f);
    assert_eq!(bench.effects(), [Effect::Node(ToNode::LeaseDemand { class: bench.class, count: 1 })]);
    bench.lend(1, WORKER);
    let effects = bench.effects();
    assert!(
        matches!(&effects[0], Effect::Send { to: WORKER, msg: Msg::Define { blob: Some(_), .. }, .. }),
        "{effects:?}"
    );
    assert!(matches!(&effects[1], Effect::Send { to: WORKER, msg: Msg::Push(_), urgent: true }), "{effects:?}");
    bench.done(WORKER, first, 1000);
    assert!(bench.value(first).is_some());
    bench.effects();
    bench.submit(f);
    let effects = bench.effects();
    assert_eq!(effects.len(), 1, "the worker knows the function, and no lease is needed: {effects:?}");
}

#[test]
fn an_unmeasured_function_is_not_pipelined_and_a_short_one_is() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let tasks: Vec<TaskId> = (0..10).map(|_| bench.submit(f)).collect();
    bench.effects();
    bench.lend(1, WORKER);
    assert_eq!(bench.pushes(), [(WORKER, tasks[0])]);
    bench.done(WORKER, tasks[0], 10_000);
    assert_eq!(bench.pushes().len(), 9, "ten microseconds each: all fit into the pipeline");
}

#[test]
fn a_long_task_gets_a_worker_of_its_own() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let tasks: Vec<TaskId> = (0..4).map(|_| bench.submit(f)).collect();
    bench.lend(1, WORKER);
    bench.done(WORKER, tasks[0], PIPELINE_NS * 2);
    bench.effects();
    bench.lend(2, OTHER);
    assert_eq!(bench.pushes(), [(OTHER, tasks[2])]);
}

#[test]
fn an_idle_worker_steals_what_waits_behind_another() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let tasks: Vec<TaskId> = (0..5).map(|_| bench.submit(f)).collect();
    bench.lend(1, WORKER);
    bench.done(WORKER, tasks[0], 1000);
    bench.effects();
    // Four are in flight at the first; the second worker comes and finds the queue empty.
    bench.lend(2, OTHER);
    let effects = bench.effects();
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Send { to: WORKER, msg: Msg::Steal { max: 2 }, .. })),
        "{effects:?}"
    );
    bench.owner.handle_message(WORKER, Msg::Returned { tasks: tasks[3..].to_vec() }, bench.now, &mut bench.out);
    let pushes = bench.pushes();
    assert_eq!(pushes[0], (OTHER, tasks[3]), "the order is kept");
}

#[test]
fn a_blocked_worker_gives_back_what_it_has_not_started_and_gets_nothing() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let tasks: Vec<TaskId> = (0..4).map(|_| bench.submit(f)).collect();
    bench.lend(1, WORKER);
    bench.done(WORKER, tasks[0], 1000);
    bench.effects();
    bench.owner.handle_message(WORKER, Msg::Blocked { tasks: tasks[2..].to_vec() }, bench.now, &mut bench.out);
    let effects = bench.effects();
    assert!(
        effects.contains(&Effect::Node(ToNode::LeaseDemand { class: bench.class, count: 2 })) || effects.is_empty(),
        "{effects:?}"
    );
    bench.lend(2, OTHER);
    assert_eq!(bench.pushes(), [(OTHER, tasks[2]), (OTHER, tasks[3])]);
    bench.owner.handle_message(WORKER, Msg::Unblocked, bench.now, &mut bench.out);
    bench.effects();
    bench.done(WORKER, tasks[1], 1000);
    let more = bench.submit(f);
    assert_eq!(bench.pushes(), [(WORKER, more)], "it works again");
}

#[test]
fn an_idle_lease_goes_back_after_a_while_and_at_once_when_asked() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    bench.done(WORKER, task, 1000);
    bench.effects();
    let due = bench.owner.poll_timeout().unwrap();
    assert_eq!(due, bench.now + IDLE_NS);
    bench.owner.handle_timeout(due - 1, &mut bench.out);
    assert!(bench.effects().is_empty(), "a spurious call does nothing");
    bench.owner.handle_timeout(due, &mut bench.out);
    assert_eq!(bench.effects(), [Effect::Node(ToNode::LeaseReturn { lease: LeaseId(1), reusable: true, node: NODE })]);
    bench.lend(2, WORKER);
    bench.owner.handle_lease_reclaim(LeaseId(2), true, NODE, bench.now, &mut bench.out);
    assert!(bench.effects().contains(&Effect::Node(ToNode::LeaseReturn {
        lease: LeaseId(2),
        reusable: true,
        node: NODE
    })));
}

#[test]
fn under_pressure_idle_leases_go_back_at_once() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let returned = |lease| Effect::Node(ToNode::LeaseReturn { lease: LeaseId(lease), reusable: true, node: NODE });
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    bench.lend(2, OTHER);
    bench.effects();
    bench.owner.handle_pressure(true, bench.now, &mut bench.out);
    assert_eq!(bench.effects(), [returned(2)], "the idle one");
    bench.done(WORKER, task, 5 * MS);
    assert_eq!(bench.effects(), [returned(1)], "and the other one when it is idle");
    bench.owner.handle_pressure(false, bench.now, &mut bench.out);
    let task = bench.submit(f);
    bench.lend(3, WORKER);
    bench.effects();
    bench.done(WORKER, task, 5 * MS);
    assert!(bench.effects().is_empty(), "it is kept for a next task again");
}

#[test]
fn a_lease_that_nobody_waits_for_any_more_stays() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    bench.owner.handle_lease_reclaim(LeaseId(1), true, NODE, bench.now, &mut bench.out);
    bench.owner.handle_lease_reclaim(LeaseId(1), false, NODE, bench.now, &mut bench.out);
    bench.effects();
    bench.now += TURN_NS;
    bench.done(WORKER, task, 5 * MS);
    assert!(bench.effects().is_empty(), "it is idle, and its owner's for a while");
}

#[test]
fn a_reclaimed_lease_with_work_is_kept_for_its_turn_and_then_returned() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let tasks: Vec<TaskId> = (0..3).map(|_| bench.submit(f)).collect();
    bench.lend(1, WORKER);
    bench.owner.handle_lease_reclaim(LeaseId(1), true, NODE, bench.now, &mut bench.out);
    assert!(
        bench.effects().contains(&Effect::Node(ToNode::LeaseKept { lease: LeaseId(1), node: NODE })),
        "the node looks elsewhere"
    );
    bench.done(WORKER, tasks[0], 5 * MS);
    assert_eq!(bench.pushes().len(), 1, "its turn is not over");
    bench.now += TURN_NS;
    bench.done(WORKER, tasks[1], 5 * MS);
    let effects = bench.effects();
    assert!(
        effects.contains(&Effect::Node(ToNode::LeaseReturn { lease: LeaseId(1), reusable: true, node: NODE })),
        "{effects:?}"
    );
    bench.lend(2, OTHER);
    assert_eq!(bench.pushes(), [(OTHER, tasks[2])], "what the node still owed serves the rest");
}

#[test]
fn a_dead_worker_charges_only_the_task_that_ran() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let tasks: Vec<TaskId> = (0..4).map(|_| bench.submit(f)).collect();
    bench.lend(1, WORKER);
    bench.done(WORKER, tasks[0], 1000);
    bench.effects();
    bench.owner.handle_process_gone(WORKER, "killed by SIGKILL", Death::Crashed, bench.now, &mut bench.out);
    assert_eq!(bench.error(tasks[1]), ErrorCode::WorkerCrashed);
    bench.lend(2, OTHER);
    assert_eq!(bench.pushes(), [(OTHER, tasks[2]), (OTHER, tasks[3])]);
}

#[test]
fn a_task_is_repeated_as_often_as_allowed() {
    let mut bench = Bench::new();
    let f = bench.function(2);
    let task = bench.submit(f);
    for (life, worker) in [ProcId(11), ProcId(12), ProcId(13)].into_iter().enumerate() {
        assert!(bench.value(task).is_none());
        bench.lend(life as u64, worker);
        assert_eq!(bench.pushes(), [(worker, task)]);
        bench.owner.handle_process_gone(worker, "exit code 1", Death::Crashed, bench.now, &mut bench.out);
    }
    assert_eq!(bench.error(task), ErrorCode::WorkerCrashed);
}

#[test]
fn a_task_that_was_evicted_is_repeated_at_no_charge() {
    let mut bench = Bench::new();
    let f = bench.function(1);
    let task = bench.submit(f);
    for life in 11..20 {
        let worker = ProcId(life);
        bench.lend(life, worker);
        assert_eq!(bench.pushes(), [(worker, task)]);
        bench.owner.handle_process_gone(worker, "short of memory", Death::Evicted, bench.now, &mut bench.out);
    }
    for life in 21..23 {
        assert!(bench.value(task).is_none());
        bench.lend(life, ProcId(life));
        bench.owner.handle_process_gone(ProcId(life), "the kernel", Death::OutOfMemory, bench.now, &mut bench.out);
    }
    assert_eq!(bench.error(task), ErrorCode::OutOfMemory, "what the kernel does is charged to max_retries");
}

#[test]
fn evictions_have_a_limit_of_their_own() {
    let mut bench = Bench::new();
    bench.owner.set_task_oom_retries(2);
    let f = bench.function(5);
    let task = bench.submit(f);
    for life in 11..14 {
        assert!(bench.value(task).is_none());
        bench.lend(life, ProcId(life));
        bench.owner.handle_process_gone(ProcId(life), "short of memory", Death::Evicted, bench.now, &mut bench.out);
    }
    assert_eq!(bench.error(task), ErrorCode::OutOfMemory);
}

#[test]
fn a_task_that_was_evicted_alone_or_may_not_be_repeated_fails() {
    for (max_retries, death) in [(5, Death::EvictedAlone), (0, Death::Evicted), (0, Death::EvictedAlone)] {
        let mut bench = Bench::new();
        let f = bench.function(max_retries);
        let task = bench.submit(f);
        bench.lend(1, WORKER);
        bench.owner.handle_process_gone(WORKER, "short of memory", death, bench.now, &mut bench.out);
        assert_eq!(bench.error(task), ErrorCode::OutOfMemory);
    }
}

#[test]
fn a_dependent_task_waits_for_its_argument_and_inherits_its_exception() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let first = bench.submit(f);
    let second = bench.submit_with(f, vec![(Slot::Position(0), ObjectId { task: first, index: 0 })]);
    bench.lend(1, WORKER);
    assert_eq!(bench.pushes(), [(WORKER, first)]);
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    assert_eq!(bench.error(second), ErrorCode::WorkerCrashed);
}

#[test]
fn cancelling_a_queued_task_ends_it_and_a_pushed_one_is_told() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let (first, second) = (bench.submit(f), bench.submit(f));
    bench.lend(1, WORKER);
    bench.effects();
    bench.owner.cancel(ObjectId { task: second, index: 0 }, false, true, bench.now, &mut bench.out);
    assert_eq!(bench.error(second), ErrorCode::Cancelled);
    bench.effects();
    bench.owner.cancel(ObjectId { task: first, index: 0 }, false, true, bench.now, &mut bench.out);
    assert!(matches!(&bench.effects()[..], [Effect::Send { to: WORKER, msg: Msg::Cancel { .. }, .. }]));
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    assert_eq!(bench.error(first), ErrorCode::Cancelled, "and is not repeated");
}

#[test]
fn a_stream_hands_out_items_in_order_while_the_task_runs() {
    let mut bench = Bench::new();
    let f = bench.owner.define(call(Returns::Streaming, None), Blob::new(b"g"), Some(bench.class), 0);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    bench.effects();
    assert_eq!(bench.owner.stream_next(task, &mut bench.out), Next::NotYet);
    assert!(!bench.owner.stream_watch(task, WaiterId(4)));
    let item = |index| Msg::Item { task, index, value: Value::Inline(Payload::plain(b"i")) };
    bench.owner.handle_message(WORKER, item(1), bench.now, &mut bench.out);
    assert_eq!(bench.effects(), [Effect::Notify { waiter: WaiterId(4), failed: false }]);
    bench.owner.handle_message(WORKER, item(1), bench.now, &mut bench.out);
    assert_eq!(bench.owner.stream_next(task, &mut bench.out), Next::Item(ObjectId { task, index: 1 }));
    assert_eq!(bench.owner.stream_next(task, &mut bench.out), Next::NotYet, "a doubled item counts once");
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    assert!(matches!(bench.owner.stream_next(task, &mut bench.out), Next::Item(_)), "the failure is the last item");
    assert_eq!(bench.owner.stream_next(task, &mut bench.out), Next::End);
}

#[test]
fn calls_wait_for_their_actor_and_leave_in_order() {
    let mut bench = Bench::new();
    let (actor, handle) = actor(&mut bench, -1);
    let effects = bench.effects();
    assert!(
        matches!(&effects[..], [Effect::Node(ToNode::ActorCreate { .. }), Effect::Node(ToNode::ActorSubscribe { .. })]),
        "{effects:?}"
    );
    let method = bench.owner.define(call(Returns::Count(1), Some(actor)), Blob::empty(), None, 0);
    let calls: Vec<TaskId> = (0..3)
        .map(|_| {
            bench
                .owner
                .submit(method, Payload::plain(b""), vec![], Some(handle), None, bench.now, &mut bench.out)
                .unwrap()
        })
        .collect();
    assert!(bench.pushes().is_empty());
    bench.owner.handle_actor_state(
        actor,
        ActorState::Alive { proc: WORKER, node: NODE, incarnation: 0 },
        bench.now,
        &mut bench.out,
    );
    assert_eq!(bench.pushes(), calls.iter().map(|task| (WORKER, *task)).collect::<Vec<_>>());
    // The last handle goes only after the last call.
    bench.owner.release(handle, &mut bench.out);
    assert!(bench.effects().is_empty());
    for task in calls {
        bench.done(WORKER, task, 1000);
    }
    assert!(bench.effects().contains(&Effect::Node(ToNode::ActorRelease { actor })));
}

#[test]
fn a_restart_repeats_allowed_calls_in_order_and_fails_the_others() {
    let mut bench = Bench::new();
    let (actor, handle) = actor(&mut bench, -1);
    let submit = |bench: &mut Bench, retries| {
        let method = bench.owner.define(call(Returns::Count(1), Some(actor)), Blob::empty(), None, retries);
        bench.owner.submit(method, Payload::plain(b""), vec![], Some(handle), None, bench.now, &mut bench.out).unwrap()
    };
    bench.owner.handle_actor_state(
        actor,
        ActorState::Alive { proc: WORKER, node: NODE, incarnation: 0 },
        bench.now,
        &mut bench.out,
    );
    let (again, once, last) = (submit(&mut bench, 1), submit(&mut bench, 0), submit(&mut bench, -1));
    bench.effects();
    bench.owner.handle_actor_state(actor, ActorState::Restarting, bench.now, &mut bench.out);
    assert_eq!(bench.error(once), ErrorCode::ActorUnavailable);
    bench.owner.handle_actor_state(
        actor,
        ActorState::Alive { proc: OTHER, node: NODE, incarnation: 1 },
        bench.now,
        &mut bench.out,
    );
    assert_eq!(bench.pushes(), [(OTHER, again), (OTHER, last)]);
    let dead = Payload::error(ErrorCode::ActorDied, "killed");
    bench.owner.handle_actor_state(actor, ActorState::Dead(dead), bench.now, &mut bench.out);
    assert_eq!(bench.error(last), ErrorCode::ActorDied);
    let late = submit(&mut bench, -1);
    assert_eq!(bench.error(late), ErrorCode::ActorDied);
}

#[test]
fn the_limit_of_pending_calls_refuses_at_the_call() {
    let mut bench = Bench::new();
    let (actor, handle) = actor(&mut bench, 2);
    let method = bench.owner.define(call(Returns::Count(1), Some(actor)), Blob::empty(), None, 0);
    let submit = |bench: &mut Bench| {
        bench.owner.submit(method, Payload::plain(b""), vec![], Some(handle), None, bench.now, &mut bench.out)
    };
    assert!(submit(&mut bench).is_ok());
    assert!(submit(&mut bench).is_ok());
    assert_eq!(submit(&mut bench), Err(Refused::TooManyPendingCalls(2)));
}

fn item(bench: &mut Bench, from: ProcId, task: TaskId, index: u32) {
    let msg = Msg::Item { task, index, value: Value::Inline(Payload::plain(b"i")) };
    bench.owner.handle_message(from, msg, bench.now, &mut bench.out);
}

#[test]
fn a_stream_that_is_made_again_is_not_held_back_by_items_that_were_taken_before() {
    let mut bench = Bench::new();
    let mut streaming = call(Returns::Streaming, None);
    streaming.backpressure = 2;
    let f = bench.owner.define(streaming, Blob::new(b"g"), Some(bench.class), -1);
    let task = bench.submit(f);
    bench.lend(1, WORKER);
    for index in 1..=3 {
        item(&mut bench, WORKER, task, index);
        assert!(matches!(bench.owner.stream_next(task, &mut bench.out), Next::Item(_)));
    }
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    bench.lend(2, OTHER);
    bench.effects();
    item(&mut bench, OTHER, task, 1);
    let taken = Effect::Send { to: OTHER, msg: Msg::ItemsTaken { task, taken: 3 }, urgent: true };
    assert_eq!(bench.effects(), [taken], "the consumer waits for item 4, and will not say so again");
    for index in 2..=4 {
        item(&mut bench, OTHER, task, index);
    }
    assert_eq!(bench.owner.stream_next(task, &mut bench.out), Next::Item(ObjectId { task, index: 4 }));
}

#[test]
fn equal_definitions_are_one_and_keep_their_measured_time() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    bench.owner.undefine(f, &mut bench.out);
    assert_eq!(bench.function(3), f);
    assert_ne!(bench.function(4), f);
}

#[test]
fn unused_definitions_are_forgotten_and_so_are_their_functions_at_workers() {
    let mut bench = Bench::new();
    let mut executor = skate_proto::executor::Executor::default();
    bench.lend(1, WORKER);
    let mut last = None;
    for number in 0..2 * UNUSED_DEFINITIONS_MAX as u32 + 10 {
        let mut call = call(Returns::Count(1), None);
        call.function = FunctionId([u8::try_from(number % 256).unwrap() ^ u8::try_from(number / 256).unwrap(); 16]);
        call.name = format!("f{number}");
        let f = bench.owner.define(call, Blob::new(&number.to_le_bytes()), Some(bench.class), 0);
        let task = bench.submit(f);
        bench.owner.undefine(f, &mut bench.out);
        bench.done(WORKER, task, 1000);
        for effect in bench.effects() {
            match effect {
                Effect::Send { msg: Msg::Define { id, def, blob }, .. } => executor.handle_define(ME, id, def, blob),
                Effect::Send { msg: Msg::Forget { ids }, .. } => executor.handle_forget(ME, &ids),
                Effect::Send { msg: Msg::Push(push), .. } => {
                    executor.handle_push(ME, push, &mut Out::default());
                    assert!(executor.take("", 0).unwrap().blob.is_some(), "work comes with its function");
                }
                _ => {}
            }
        }
        bench.owner.release(ObjectId { task, index: 0 }, &mut bench.out);
        last = Some(f);
    }
    let count = |bench: &Bench, name| bench.owner.statistics().into_iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!(count(&bench, "definitions"), UNUSED_DEFINITIONS_MAX as u64);
    assert_eq!(executor.known().0, UNUSED_DEFINITIONS_MAX);
    assert!(executor.known().1 <= 256, "{:?}", executor.known());
    assert!(last.unwrap() <= UNUSED_DEFINITIONS_MAX as u32 + 1, "numbers come again");
}

#[test]
fn a_definition_in_use_is_never_forgotten() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let task = bench.submit(f);
    bench.owner.undefine(f, &mut bench.out);
    for number in 0..2 * UNUSED_DEFINITIONS_MAX {
        let mut call = call(Returns::Count(1), None);
        call.name = format!("g{number}");
        let g = bench.owner.define(call, Blob::new(b"g"), Some(bench.class), 0);
        bench.owner.undefine(g, &mut bench.out);
    }
    bench.effects();
    bench.lend(1, WORKER);
    assert_eq!(bench.pushes(), [(WORKER, task)]);
}

#[test]
fn classes_that_nothing_uses_are_forgotten() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    for number in 0..3000 {
        let spec =
            ClassSpec { demand: vec![], env: vec![], strategy: format!("{number}").into_bytes(), retriable: true };
        let class = bench.owner.class(spec);
        let mut call = call(Returns::Count(1), None);
        call.name = format!("g{number}");
        let g = bench.owner.define(call, Blob::new(b"g"), Some(class), 0);
        bench.owner.undefine(g, &mut bench.out);
    }
    let count = bench.owner.statistics().into_iter().find(|(n, _)| *n == "classes").unwrap().1;
    assert!(count < 1500, "{count}");
    bench.submit(f);
    // A grant for a class that is gone goes back.
    bench.effects();
    bench.owner.handle_lease_granted(ClassId(5), LeaseId(77), OTHER, NODE, 1, vec![], bench.now, &mut bench.out);
    assert_eq!(bench.effects(), [Effect::Node(ToNode::LeaseReturn { lease: LeaseId(77), reusable: true, node: NODE })]);
}

#[test]
fn a_lease_that_is_granted_twice_is_one() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let [first, second] = [bench.submit(f), bench.submit(f)];
    bench.effects();
    bench.lend(1, WORKER);
    bench.lend(1, WORKER);
    assert_eq!(bench.pushes(), [(WORKER, first)]);
    // What runs there is still known: its worker's end is its own.
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    assert_eq!(bench.error(first), ErrorCode::WorkerCrashed);
    assert!(bench.value(second).is_none());
}

#[test]
fn a_lease_of_which_nothing_was_heard_goes_back_when_it_is_wanted() {
    let mut bench = Bench::new();
    bench.owner.handle_lease_reclaim(LeaseId(7), false, NODE, bench.now, &mut bench.out);
    assert_eq!(bench.effects(), []);
    bench.owner.handle_lease_reclaim(LeaseId(7), true, NODE, bench.now, &mut bench.out);
    assert_eq!(bench.effects(), [Effect::Node(ToNode::LeaseReturn { lease: LeaseId(7), reusable: true, node: NODE })]);
}

#[test]
fn a_worker_that_is_known_to_have_ended_is_given_nothing() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let task = bench.submit(f);
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    bench.effects();
    bench.lend(1, WORKER);
    // Nobody would be told of its end again: another one is asked for.
    assert_eq!(bench.effects(), [Effect::Node(ToNode::LeaseDemand { class: bench.class, count: 1 })]);
    bench.lend(2, OTHER);
    assert_eq!(bench.pushes(), [(OTHER, task)]);
}

#[test]
fn a_dead_actor_without_handles_is_forgotten() {
    let mut bench = Bench::new();
    let (mine, handle) = actor(&mut bench, -1);
    bench.owner.handle_actor_state(
        mine,
        ActorState::Alive { proc: WORKER, node: NODE, incarnation: 0 },
        bench.now,
        &mut bench.out,
    );
    bench.owner.release(handle, &mut bench.out);
    assert!(bench.effects().contains(&Effect::Node(ToNode::ActorRelease { actor: mine })));
    let dead = ActorState::Dead(Payload::error(ErrorCode::ActorDied, "no handles"));
    bench.owner.handle_actor_state(mine, dead.clone(), bench.now, &mut bench.out);
    assert_eq!(bench.owner.actor_state(mine), None);
    // One of another process, whose handle came in a message.
    let theirs = ActorId { proc: OTHER, seq: 4 };
    let handle = ObjectId { task: TaskId { node: NODE, proc: OTHER, seq: 4 }, index: ObjectId::ACTOR_INDEX };
    bench.owner.objects.arrive(&[handle]);
    let method = bench.owner.define(call(Returns::Count(1), Some(theirs)), Blob::empty(), None, 0);
    let task =
        bench.owner.submit(method, Payload::plain(b""), vec![], Some(handle), None, bench.now, &mut bench.out).unwrap();
    bench.owner.handle_actor_state(theirs, dead.clone(), bench.now, &mut bench.out);
    assert_eq!(bench.error(task), ErrorCode::ActorDied);
    bench.owner.release(handle, &mut bench.out);
    assert_eq!(bench.owner.actor_state(theirs), None);
    bench.owner.handle_actor_state(theirs, dead, bench.now, &mut bench.out);
    assert_eq!(bench.owner.actor_state(theirs), None, "nobody here wants to know");
}

#[test]
fn what_a_leaving_worker_has_not_answered_runs_elsewhere_and_is_not_charged() {
    let mut bench = Bench::new();
    let def = bench.function(0);
    let first = bench.submit(def);
    bench.lend(1, WORKER);
    bench.done(WORKER, first, 1_000);
    let tasks: Vec<TaskId> = (0..3).map(|_| bench.submit(def)).collect();
    bench.pushes();
    bench.owner.handle_message(WORKER, Msg::Leaving, bench.now, &mut bench.out);
    bench.owner.handle_process_gone(WORKER, "it left", Death::Crashed, bench.now, &mut bench.out);
    assert!(tasks.iter().all(|task| bench.value(*task).is_none()));
    bench.lend(2, OTHER);
    let pushes = bench.pushes();
    assert_eq!(pushes, tasks.iter().map(|task| (OTHER, *task)).collect::<Vec<_>>());
}

#[test]
fn dynamic_returns_are_counted_by_the_value_that_lists_them() {
    let mut bench = Bench::new();
    let def = bench.owner.define(call(Returns::Dynamic, None), Blob::new(b"code"), Some(bench.class), 0);
    let task = bench.submit(def);
    bench.lend(1, WORKER);
    let items: Vec<ObjectId> = (1..=2).map(|index| ObjectId { task, index }).collect();
    for item in &items {
        let value = Value::Inline(Payload::plain(b"item"));
        bench.owner.handle_message(WORKER, Msg::Item { task, index: item.index, value }, bench.now, &mut bench.out);
    }
    let list = Payload { refs: items.clone(), ..Payload::plain(b"list") };
    let done = Done { task, results: vec![Value::Inline(list)], retryable: false, run_ns: 1, items: 2 };
    bench.owner.handle_message(WORKER, Msg::Done(done), bench.now, &mut bench.out);
    assert!(items.iter().all(|item| bench.owner.objects.is_ready(*item)));
    bench.owner.release(ObjectId { task, index: 0 }, &mut bench.out);
    assert!(items.iter().all(|item| !bench.owner.objects.is_known(*item)));
}

#[test]
fn an_actor_that_nobody_can_reach_any_more_when_its_arguments_come_is_not_made() {
    let mut bench = Bench::new();
    let f = bench.function(3);
    let made = bench.submit(f);
    let (id, handle) = bench.owner.next_actor_id();
    bench.owner.objects.retain(handle);
    let creation = Creation {
        actor: id,
        class: FunctionId([2; 16]),
        blob: Blob::new(b"c"),
        place: vec![],
        run: vec![],
        env: vec![],
        strategy: vec![],
        name: String::new(),
        namespace: String::new(),
        class_name: "C".into(),
        label: "C".into(),
        max_restarts: 0,
        max_pending_calls: -1,
        max_concurrency: 1,
        is_async: false,
        groups: vec![],
        detached: false,
        recorded: true,
    };
    let deps = vec![(Slot::Position(0), ObjectId { task: made, index: 0 })];
    bench.owner.create_actor(creation, Payload::plain(b""), deps, bench.now, &mut bench.out);
    bench.owner.release(handle, &mut bench.out);
    bench.lend(1, WORKER);
    bench.done(WORKER, made, 1000);
    let effects = bench.effects();
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Node(ToNode::ActorCreate { .. }))), "{effects:?}");
    bench.owner.release(ObjectId { task: made, index: 0 }, &mut bench.out);
    assert!(bench.owner.is_bare());
}

#[test]
fn whoever_was_told_that_a_worker_is_blocked_is_told_when_it_is_not() {
    let mut executor = skate_proto::executor::Executor::default();
    let mut out = Out::default();
    for (owner, seq) in [(ME, 1), (OTHER, 2)] {
        executor.handle_define(owner, 0, std::sync::Arc::new(call(Returns::Count(1), None)), Some(Blob::new(b"f")));
        let task = TaskId { node: NODE, proc: owner, seq };
        let push = Push { task, def: 0, attempt: 0, args: Payload::plain(b""), deps: vec![], gpu_ids: vec![] };
        executor.handle_push(owner, push, &mut out);
    }
    executor.take("", 0).unwrap();
    executor.block(&mut out);
    out.effects.clear();
    executor.unblock(&mut out);
    let told: Vec<ProcId> =
        out.effects.iter().map(|effect| if let Effect::Send { to, .. } = effect { *to } else { panic!() }).collect();
    assert_eq!(told, [ME, OTHER]);
}

#[test]
fn what_a_process_gives_back_after_its_end_was_heard_of_keeps_nothing() {
    let mut bench = Bench::new();
    let object = bench.owner.put(Value::Inline(Payload::plain(b"v")));
    bench.owner.objects.hand_over(&[object], WORKER, &mut bench.out);
    bench.owner.handle_process_gone(WORKER, "killed", Death::Crashed, bench.now, &mut bench.out);
    bench.owner.handle_message(WORKER, Msg::Release { object, tokens: 1 }, bench.now, &mut bench.out);
    bench.owner.release(object, &mut bench.out);
    assert!(bench.owner.objects.is_empty());
}

#[test]
fn a_push_to_a_worker_that_ends_comes_back_and_is_not_pushed_there_again() {
    let mut executor = skate_proto::executor::Executor::default();
    let mut out = Out::default();
    executor.handle_define(ME, 0, std::sync::Arc::new(call(Returns::Count(1), None)), Some(Blob::new(b"f")));
    executor.leave(true, &mut out);
    out.effects.clear();
    let task = TaskId { node: NodeKey(1), proc: ME, seq: 1 };
    let push = Push { task, def: 0, attempt: 0, args: Payload::plain(b""), deps: vec![], gpu_ids: vec![] };
    assert_eq!(executor.handle_push(ME, push, &mut out), None);
    let sent: Vec<Msg> = out
        .effects
        .drain(..)
        .filter_map(|effect| match effect {
            Effect::Send { to: ME, msg, .. } => Some(msg),
            _ => None,
        })
        .collect();
    assert_eq!(sent, [Msg::Returned { tasks: vec![task] }, Msg::Leaving]);
}

#[test]
fn what_was_cancelled_is_not_asked_for_any_more() {
    let mut bench = Bench::new();
    let f = bench.function(0);
    let task = bench.submit(f);
    bench.effects();
    bench.owner.cancel(ObjectId { task, index: 0 }, false, false, bench.now, &mut bench.out);
    let class = bench.class;
    assert!(bench.effects().contains(&Effect::Node(ToNode::LeaseDemand { class, count: 0 })));
}
