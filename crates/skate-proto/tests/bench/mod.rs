//! An owner on a bench: what it decides is taken from it, and its workers are played.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use skate_proto::actors::Creation;
use skate_proto::ids::{ActorId, FunctionId, LeaseId, NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use skate_proto::leases::{ClassId, ClassSpec, PIPELINE_NS};
use skate_proto::location::Location;
use skate_proto::msg::{CallDef, Done, Msg, Returns, Slot};
use skate_proto::owner::{Effect, Out, Owner};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};

pub const ME: ProcId = ProcId(1);
pub const WORKER: ProcId = ProcId(2);
pub const OTHER: ProcId = ProcId(3);
/// Where the workers live: another node than the owner's, so that a mix-up shows.
pub const NODE: NodeKey = NodeKey(8);
pub const MS: u64 = 1_000_000;

pub struct Bench {
    pub owner: Owner,
    pub out: Out,
    pub class: ClassId,
    pub now: u64,
}

pub fn call(returns: Returns, actor: Option<ActorId>) -> CallDef {
    CallDef {
        function: FunctionId([7; 16]),
        name: "f".into(),
        method: String::new(),
        group: String::new(),
        returns,
        retry_exceptions: false,
        backpressure: 0,
        actor,
        recorded: true,
    }
}

impl Bench {
    pub fn new() -> Self {
        let mut owner = Owner::new(ME, NodeKey(9));
        let class = owner.class(ClassSpec {
            demand: vec![("CPU".into(), 10_000)],
            env: vec![],
            strategy: vec![],
            retriable: true,
        });
        Self { owner, out: Out::default(), class, now: 1_000_000_000 }
    }

    pub fn function(&mut self, max_retries: i32) -> u32 {
        self.owner.define(call(Returns::Count(1), None), Blob::new(b"code"), Some(self.class), max_retries)
    }

    pub fn submit(&mut self, def: u32) -> TaskId {
        self.submit_with(def, vec![])
    }

    pub fn submit_with(&mut self, def: u32, deps: Vec<(Slot, ObjectId)>) -> TaskId {
        self.owner.submit(def, Payload::plain(b"args"), deps, None, None, self.now, &mut self.out).unwrap()
    }

    pub fn lend(&mut self, lease: u64, worker: ProcId) {
        self.owner.handle_lease_granted(self.class, LeaseId(lease), worker, NODE, 42, vec![], self.now, &mut self.out);
    }

    pub fn done(&mut self, worker: ProcId, task: TaskId, run_ns: u64) {
        let done =
            Done { task, results: vec![Value::Inline(Payload::plain(b"r"))], retryable: false, run_ns, items: 0 };
        self.owner.handle_message(worker, Msg::Done(done), self.now, &mut self.out);
    }

    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.out.effects)
    }

    pub fn pushes(&mut self) -> Vec<(ProcId, TaskId)> {
        self.effects()
            .into_iter()
            .filter_map(|effect| match effect {
                Effect::Send { to, msg: Msg::Push(push), .. } => Some((to, push.task)),
                _ => None,
            })
            .collect()
    }

    pub fn value(&self, task: TaskId) -> Option<&Value> {
        self.owner.objects.value(ObjectId { task, index: 0 })
    }

    pub fn error(&self, task: TaskId) -> ErrorCode {
        let Some(Value::Inline(payload)) = self.value(task) else { panic!("no value") };
        assert!(payload.is_error());
        [
            ErrorCode::WorkerCrashed,
            ErrorCode::OutOfMemory,
            ErrorCode::Cancelled,
            ErrorCode::ActorDied,
            ErrorCode::ActorUnavailable,
            ErrorCode::ObjectLost,
            ErrorCode::OwnerDied,
        ]
        .into_iter()
        .find(|code| *code as u8 == payload.data[1])
        .unwrap()
    }
}

pub fn actor(bench: &mut Bench, max_pending_calls: i32) -> (ActorId, ObjectId) {
    let (actor, handle) = bench.owner.next_actor_id();
    bench.owner.hold_handle(handle, &mut bench.out);
    let creation = Creation {
        actor,
        class: FunctionId([8; 16]),
        blob: Blob::new(b"class"),
        place: vec![],
        run: vec![],
        env: vec![],
        strategy: vec![],
        name: String::new(),
        namespace: String::new(),
        class_name: "A".into(),
        label: "A".into(),
        max_restarts: 1,
        max_pending_calls,
        max_concurrency: 1,
        is_async: false,
        groups: vec![],
        detached: false,
        recorded: true,
    };
    bench.owner.create_actor(creation, Payload::plain(b""), vec![], bench.now, &mut bench.out);
    (actor, handle)
}

pub fn stored(bench: &mut Bench, worker: ProcId, task: TaskId, segment: u64) {
    let location = Location { node: NODE, segment: SegmentId(segment), lessee: worker, offset: 0, len: 64 };
    let results = vec![Value::Stored { location, refs: vec![] }];
    let done = Done { task, results, retryable: false, run_ns: PIPELINE_NS * 2, items: 0 };
    bench.owner.handle_message(worker, Msg::Done(done), bench.now, &mut bench.out);
}
