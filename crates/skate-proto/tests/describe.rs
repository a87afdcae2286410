//! What a process says of its tasks and objects to somebody who looks.

use std::sync::Arc;

use skate_proto::describe::ObjectRow;
use skate_proto::executor::{Executor, WorkKind};
use skate_proto::ids::{ActorId, FunctionId, LeaseId, NodeKey, ObjectId, ProcId, TaskId};
use skate_proto::leases::{ClassId, ClassSpec, Death};
use skate_proto::msg::{ActorSpec, CallDef, Push, Returns, Slot};
use skate_proto::owner::{Effect, Out, Owner};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};

const ME: ProcId = ProcId(1);
const WORKER: ProcId = ProcId(2);
const OTHER: ProcId = ProcId(3);
const NODE: NodeKey = NodeKey(8);

struct Bench {
    owner: Owner,
    out: Out,
    class: ClassId,
}

fn call(recorded: bool) -> CallDef {
    CallDef {
        function: FunctionId([7; 16]),
        name: "f".into(),
        method: String::new(),
        group: String::new(),
        returns: Returns::Count(1),
        retry_exceptions: false,
        backpressure: 0,
        actor: None,
        recorded,
    }
}

impl Bench {
    fn new() -> Self {
        let mut owner = Owner::new(ME, NodeKey(9));
        let class = owner.class(ClassSpec {
            demand: vec![("CPU".into(), 10_000)],
            env: vec![],
            strategy: vec![],
            retriable: true,
        });
        Self { owner, out: Out::default(), class }
    }

    fn submit(&mut self, deps: Vec<(Slot, ObjectId)>, retries: i32, recorded: bool, now: u64) -> TaskId {
        let def = self.owner.define(call(recorded), Blob::new(b"code"), Some(self.class), retries);
        self.owner.submit(def, Payload::plain(b"args"), deps, None, None, now, &mut self.out).unwrap()
    }

    fn put(&mut self, payload: Payload) -> ObjectId {
        self.owner.put(Value::Inline(payload))
    }

    fn lend(&mut self) {
        self.lend_as(5, WORKER);
    }

    fn lend_as(&mut self, lease: u64, worker: ProcId) {
        self.owner.handle_lease_granted(self.class, LeaseId(lease), worker, NODE, 77, vec![], 30, &mut self.out);
    }

    fn unrun(&mut self) -> Vec<(TaskId, u32, u8, u64)> {
        let told = |effect| match effect {
            Effect::Unrun(unrun) => Some((unrun.task, unrun.attempt, unrun.code, unrun.since_ns)),
            _ => None,
        };
        self.out.effects.drain(..).filter_map(told).collect()
    }

    fn object(&self, id: ObjectId) -> ObjectRow {
        self.owner.describe_objects(100).rows.into_iter().find(|row| row.id == id).expect("known")
    }
}

#[test]
fn a_task_is_told_in_the_state_that_it_is_in() {
    let mut bench = Bench::new();
    let first = bench.submit(vec![], 0, true, 10);
    let argument = ObjectId { task: first, index: 0 };
    let second = bench.submit(vec![(Slot::Position(0), argument)], 0, true, 20);
    let seen = |bench: &Bench| -> Vec<(TaskId, &'static str, u64, u64, u32)> {
        let rows = bench.owner.describe_tasks(100).rows;
        rows.iter().map(|row| (row.task, row.state, row.submitted_ns, row.since_ns, row.missing)).collect()
    };
    assert_eq!(seen(&bench), [(first, "PENDING_NODE_ASSIGNMENT", 10, 0, 0), (second, "PENDING_ARGS_AVAIL", 20, 0, 1)]);
    bench.lend();
    assert_eq!(seen(&bench)[0], (first, "SUBMITTED_TO_WORKER", 10, 30, 0));
    let row = &bench.owner.describe_tasks(100).rows[0];
    assert_eq!(row.worker, Some((WORKER, NODE, 77)));
    assert_eq!((row.name.as_str(), row.kind, row.attempt), ("f", WorkKind::Task, 0));
}

#[test]
fn there_are_as_many_rows_as_were_asked_for_and_the_total_says_how_many_there_would_be() {
    let mut bench = Bench::new();
    for _ in 0..10 {
        bench.submit(vec![], 0, true, 0);
    }
    let found = bench.owner.describe_tasks(3);
    assert_eq!((found.rows.len(), found.total), (3, 10));
    let found = bench.owner.describe_objects(3);
    assert_eq!((found.rows.len(), found.total), (3, 10));
}

#[test]
fn an_object_is_told_with_what_counts_it() {
    let mut bench = Bench::new();
    let inner = bench.put(Payload::plain(b"12345"));
    let outer = bench.put(Payload { data: Blob::new(b"outer"), refs: vec![inner] });
    bench.submit(vec![(Slot::Position(0), inner)], 0, true, 0);
    bench.owner.objects.hand_over(&[inner], OTHER, &mut bench.out);
    let row = bench.object(inner);
    assert_eq!((row.local, row.in_tasks, row.in_objects, row.borrowers), (1, 1, 1, 1));
    assert_eq!((row.bytes, row.ready, row.stored, row.owned, row.failed), (5, true, false, true, false));
    bench.owner.release(inner, &mut bench.out);
    assert_eq!(bench.object(inner).local, 0);
    let row = bench.object(outer);
    assert_eq!((row.local, row.in_tasks, row.in_objects, row.borrowers), (1, 0, 0, 0));
    // Looking has changed nothing: everything goes as it came.
    bench.owner.release(outer, &mut bench.out);
    assert!(bench.owner.objects.counts(outer).is_none());
    assert!(bench.owner.objects.counts(inner).is_some());
}

#[test]
fn every_attempt_that_a_worker_did_not_answer_is_noted_once() {
    let mut bench = Bench::new();
    let task = bench.submit(vec![], 1, true, 0);
    let quiet = bench.submit(vec![], 0, false, 0);
    bench.lend();
    bench.unrun();
    bench.owner.handle_process_gone(WORKER, "it was killed", Death::Crashed, 40, &mut bench.out);
    assert_eq!(bench.unrun(), [(task, 0, ErrorCode::WorkerCrashed as u8, 30)], "it is tried again");
    bench.owner.cancel(ObjectId { task, index: 0 }, false, false, 50, &mut bench.out);
    bench.owner.cancel(ObjectId { task: quiet, index: 0 }, false, false, 50, &mut bench.out);
    let noted = bench.unrun();
    assert_eq!(noted, [(task, 1, ErrorCode::Cancelled as u8, 0)]);
    assert_eq!(bench.owner.describe_tasks(10).total, 0);
}

#[test]
fn an_attempt_that_was_ended_for_want_of_memory_is_noted_and_free() {
    let mut bench = Bench::new();
    let task = bench.submit(vec![], 1, true, 0);
    bench.lend();
    bench.unrun();
    bench.owner.handle_process_gone(WORKER, "memory ran short", Death::Evicted, 40, &mut bench.out);
    assert_eq!(bench.unrun(), [(task, 0, ErrorCode::OutOfMemory as u8, 30)]);
    bench.lend_as(6, OTHER);
    bench.owner.handle_process_gone(OTHER, "it was killed", Death::Crashed, 60, &mut bench.out);
    assert_eq!(bench.unrun(), [(task, 1, ErrorCode::WorkerCrashed as u8, 30)], "its one retry is still there");
    assert_eq!(bench.owner.describe_tasks(10).rows[0].attempt, 2);
}

fn push(executor: &mut Executor, seq: u64, out: &mut Out) -> TaskId {
    let task = TaskId { node: NODE, proc: ME, seq };
    let push = Push { task, def: 1, attempt: 2, args: Payload::plain(b""), deps: vec![], gpu_ids: vec![] };
    executor.handle_push(ME, push, out);
    task
}

#[test]
fn a_worker_tells_what_runs_and_since_when() {
    let (mut executor, mut out) = (Executor::default(), Out::default());
    executor.handle_define(ME, 1, Arc::new(call(true)), Some(Blob::new(b"code")));
    let task = push(&mut executor, 1, &mut out);
    let waiting = push(&mut executor, 2, &mut out);
    assert_eq!(executor.describe_running(10).total, 0);
    executor.take("", 55).unwrap();
    let found = executor.describe_running(10);
    assert_eq!(found.total, 1);
    assert_eq!((found.rows[0].task, found.rows[0].since_ns, found.rows[0].attempt), (task, 55, 2));
    assert_eq!(found.rows[0].state, "RUNNING");
    executor.block(&mut out);
    assert_eq!(executor.describe_running(10).rows[0].state, "RUNNING_IN_RAY_GET");
    executor.unblock(&mut out);
    push(&mut executor, 3, &mut out);
    out.effects.clear();
    executor.handle_cancel(TaskId { seq: 3, ..waiting }, &mut out);
    let noted: Vec<_> = out.effects.iter().filter(|effect| matches!(effect, Effect::Unrun(_))).collect();
    assert_eq!(noted.len(), 1, "it was cancelled before it ran");
    executor.answer(ME, task, vec![], false, 0, 0, &mut out);
    assert_eq!(executor.describe_running(10).total, 0);
}

#[test]
fn an_actors_creation_runs_until_it_has_ended_and_is_told_to_have_ended_once() {
    let mut executor = Executor::default();
    let task = TaskId { node: NODE, proc: ME, seq: 4 };
    let spec = ActorSpec {
        actor: ActorId { proc: ME, seq: 3 },
        recorded: true,
        task,
        class: FunctionId([1; 16]),
        blob: Blob::new(b"class"),
        name: "Counter".into(),
        args: Payload::plain(b""),
        deps: vec![],
        max_concurrency: 1,
        is_async: false,
        groups: vec![],
    };
    executor.handle_actor_init(spec, 2, vec![], ME);
    executor.take("", 9).unwrap();
    let row = &executor.describe_running(10).rows[0];
    assert_eq!((row.name.as_str(), row.method.as_str(), row.attempt), ("Counter", "__init__", 2));
    let ended = executor.end_creation().unwrap();
    assert_eq!((ended.0, ended.2, ended.3), (task, 2, 9));
    assert!(executor.end_creation().is_none());
    assert_eq!(executor.describe_running(10).total, 0);
    assert_eq!(executor.running_count(), 1, "it stays known");
}

#[test]
fn only_texts_of_exceptions_are_told() {
    let long = "x".repeat(5000);
    assert_eq!(Payload::error(ErrorCode::OutOfMemory, &long).describe_error(), (8, long[..1024].to_owned()));
    let pickled = Payload::plain(&[skate_proto::payload::TAG_ERROR_PICKLE, 1, 0x80]);
    assert_eq!(pickled.describe_error(), (1, String::new()));
}
