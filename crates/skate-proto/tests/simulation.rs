//! A handful of processes on a simulated network, driven by a random schedule.
//!
//! Each process runs the real machines. A link delivers in order; which link delivers next is the
//! schedule's choice, and what the node says is a link, too. Processes hold references, put values that
//! contain them (small ones, or blocks of shared memory), call tasks, generators and actors with them,
//! block, view values, have them spilled, cancel, lose memory, and die. Workers and hosts of actors are started as they are needed.
//!
//! The oracles are global and know nothing of tokens:
//!
//! - safety, after every step: an object that a living process holds is known to its living owner, and the
//!   block of its value has not been freed; no block is freed twice; a block that somebody views, or that a task which
//!   begins was told of, has not been freed;
//! - liveness, when everything has been delivered: whatever the driver waits for is there, and when
//!   everything has been dropped, nothing is left anywhere: no object, task, stream, actor or block.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use skate_proto::actors::{ActorState, Creation};
use skate_proto::executor::{Executor, Work, WorkKind};
use skate_proto::ids::TaskId;
use skate_proto::ids::{ActorId, FunctionId, LeaseId, NodeKey, ObjectId, ProcId, SegmentId};
use skate_proto::leases::{ClassId, ClassSpec, Death};
use skate_proto::location::Location;
use skate_proto::msg::{ActorSpec, CallDef, Msg, Returns, Slot};
use skate_proto::objects::WaiterId;
use skate_proto::owner::{Effect, Out, Owner, ToNode};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};
use skate_proto::spilling::Written;
use skate_proto::streams::Next;

const NODE: u64 = 100;
/// The sender of what the node says.
const MANAGER: ProcId = ProcId(99);
const DRIVER: ProcId = ProcId(1);
/// Processes that the schedule names; others come later.
const NAMED: u64 = 4;
const WORKERS_MAX: usize = 8;
const BACKPRESSURE: u32 = 1;
const WATCH: WaiterId = WaiterId(9);

#[derive(Debug)]
enum Packet {
    Core(Msg),
    Gone(ProcId),
    Granted(ClassId, LeaseId, ProcId),
    Actor(ActorId, ActorState),
    Written(Written),
}

struct Running {
    work: Work,
    sent: u32,
    blocked: bool,
}

struct Process {
    owner: Owner,
    executor: Executor,
    out: Out,
    held: Vec<ObjectId>,
    streams: Vec<TaskId>,
    handles: Vec<ObjectId>,
    /// Objects that it views, and the block that each view is on.
    views: Vec<(ObjectId, SegmentId)>,
    running: Option<Running>,
    /// Definitions: a function, one that is not repeated, a generator, one that is held back.
    defs: [u32; 4],
    alive: bool,
    host: bool,
}

impl Process {
    fn new(number: u64) -> Self {
        let mut owner = Owner::new(ProcId(number), NodeKey(NODE));
        let class = owner.class(ClassSpec {
            demand: vec![("CPU".into(), 10_000)],
            env: vec![],
            strategy: vec![],
            retriable: true,
        });
        let mut define = |returns, backpressure, retries| {
            let call = CallDef { returns, backpressure, ..call(None) };
            owner.define(call, Blob::new(b"f"), Some(class), retries)
        };
        let defs = [
            define(Returns::Count(1), 0, -1),
            define(Returns::Count(2), 0, 0),
            define(Returns::Streaming, 0, -1),
            define(Returns::Streaming, BACKPRESSURE, -1),
        ];
        Self {
            owner,
            executor: Executor::default(),
            out: Out::default(),
            held: Vec::new(),
            streams: Vec::new(),
            handles: Vec::new(),
            views: Vec::new(),
            running: None,
            defs,
            alive: true,
            host: false,
        }
    }
}

fn call(actor: Option<ActorId>) -> CallDef {
    CallDef {
        function: FunctionId(if actor.is_none() { [1; 16] } else { [0; 16] }),
        name: "f".into(),
        method: String::new(),
        group: String::new(),
        returns: Returns::Count(1),
        retry_exceptions: false,
        backpressure: 0,
        actor,
        recorded: true,
    }
}

struct Actor {
    spec: ActorSpec,
    host: Option<ProcId>,
    incarnation: u32,
    restarts_left: i32,
    state: ActorState,
    stopping: bool,
    subscribers: BTreeSet<ProcId>,
}

struct World {
    processes: BTreeMap<ProcId, Process>,
    links: BTreeMap<(ProcId, ProcId), VecDeque<Packet>>,
    /// Leases: holder and worker; a worker serves one lease at a time.
    leases: BTreeMap<LeaseId, (ProcId, ProcId)>,
    demands: VecDeque<(ProcId, ClassId, u32)>,
    next_lease: u64,
    actors: BTreeMap<ActorId, Actor>,
    /// Blocks that are in use, with the owner of their object. Each has a segment of its own.
    blocks: BTreeMap<SegmentId, ProcId>,
    lost: BTreeSet<SegmentId>,
    next_segment: u64,
    doomed: Vec<ProcId>,
    now: u64,
}

fn pick<T: Copy>(from: &[T], choice: usize) -> Option<T> {
    from.get(choice % from.len().max(1)).copied()
}

fn some<T: Copy>(from: &[T], choice: usize) -> Vec<T> {
    from.iter().enumerate().filter(|(at, _)| (choice >> (at % 60)) & 1 == 1).map(|(_, item)| *item).take(3).collect()
}

impl World {
    fn new() -> Self {
        let processes = (1..=NAMED).map(|number| (ProcId(number), Process::new(number))).collect();
        Self {
            processes,
            links: BTreeMap::new(),
            leases: BTreeMap::new(),
            demands: VecDeque::new(),
            next_lease: 0,
            actors: BTreeMap::new(),
            blocks: BTreeMap::new(),
            lost: BTreeSet::new(),
            next_segment: 0,
            doomed: Vec::new(),
            now: 0,
        }
    }

    fn process(&mut self, id: ProcId) -> &mut Process {
        self.processes.get_mut(&id).unwrap()
    }

    fn is_alive(&self, id: ProcId) -> bool {
        self.processes.get(&id).is_some_and(|p| p.alive)
    }

    fn living(&self) -> Vec<ProcId> {
        self.processes.iter().filter(|(_, p)| p.alive).map(|(id, _)| *id).collect()
    }

    fn spawn(&mut self) -> ProcId {
        let number = self.processes.keys().last().unwrap().0.max(NODE) + 1;
        self.processes.insert(ProcId(number), Process::new(number));
        ProcId(number)
    }

    // ---- effects and messages ------------------------------------------------------------------

    /// One step of a process's machines, and its effects.
    fn step<R>(&mut self, me: ProcId, run: impl FnOnce(&mut Process, u64) -> R) -> R {
        let now = self.now;
        let result = run(self.process(me), now);
        self.perform(me);
        result
    }

    fn perform(&mut self, me: ProcId) {
        loop {
            let effects = std::mem::take(&mut self.process(me).out.effects);
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                match effect {
                    Effect::Send { to, msg, .. } if to == me => self.receive(me, me, Packet::Core(msg)),
                    Effect::Send { to, msg, .. } => self.send(me, to, Packet::Core(msg)),
                    Effect::Node(msg) => self.manage(me, msg),
                    Effect::ReleaseCopies(id) => panic!("{id} was never copied"),
                    Effect::Free(location) => {
                        let known =
                            self.blocks.remove(&location.segment).is_some() || self.lost.remove(&location.segment);
                        assert!(known, "{me:?} frees a block that is not in use: {location:?}");
                    }
                    Effect::Notify { .. } | Effect::Unread(_) | Effect::Unrun(_) => {}
                }
            }
        }
    }

    fn send(&mut self, from: ProcId, to: ProcId, packet: Packet) {
        if self.is_alive(to) {
            self.links.entry((from, to)).or_default().push_back(packet);
        }
    }

    fn receive(&mut self, from: ProcId, to: ProcId, packet: Packet) {
        self.step(to, |process, now| {
            let Process { owner, executor, out, .. } = process;
            match packet {
                Packet::Gone(dead) => {
                    owner.handle_process_gone(dead, "killed", Death::Crashed, now, out);
                    let (counted, interrupted) = executor.handle_process_gone(dead);
                    owner.release_all(&counted, out);
                    for task in interrupted {
                        owner.cancel_children(task, now, out);
                    }
                }
                Packet::Granted(class, lease, worker) => {
                    owner.handle_lease_granted(class, lease, worker, NodeKey(NODE), 1, vec![], now, out)
                }
                Packet::Written(written) => owner.handle_written(NodeKey(NODE), written, out),
                Packet::Core(Msg::Evict { objects }) => {
                    owner.handle_evict(from, &objects, |object| executor.forget_place(object), out);
                }
                Packet::Actor(actor, state) => owner.handle_actor_state(actor, state, now, out),
                Packet::Core(Msg::Define { id, def, blob }) => executor.handle_define(from, id, def, blob),
                Packet::Core(Msg::Forget { ids }) => executor.handle_forget(from, &ids),
                Packet::Core(Msg::Push(push)) => {
                    let counted = Executor::counted(&push.args, &push.deps);
                    owner.objects.arrive(&counted);
                    if executor.handle_push(from, push, out).is_none() {
                        owner.release_all(&counted, out);
                    }
                }
                Packet::Core(Msg::Steal { max }) => {
                    let counted = executor.handle_steal(from, max, out);
                    owner.release_all(&counted, out);
                }
                Packet::Core(Msg::Cancel { task, recursive }) => {
                    let (_, counted) = executor.handle_cancel(task, out);
                    owner.release_all(&counted, out);
                    if recursive {
                        owner.cancel_children(task, now, out);
                    }
                }
                Packet::Core(Msg::ItemsTaken { task, taken }) => executor.handle_items_taken(task, taken),
                Packet::Core(other) => owner.handle_message(from, other, now, out),
            }
        });
    }

    fn deliver(&mut self, choice: usize) -> bool {
        let ready: Vec<_> = self.links.iter().filter(|(_, q)| !q.is_empty()).map(|(k, _)| *k).collect();
        let Some((from, to)) = pick(&ready, choice) else {
            return false;
        };
        let packet = self.links.get_mut(&(from, to)).unwrap().pop_front().unwrap();
        if self.is_alive(to) {
            self.receive(from, to, packet);
        }
        true
    }

    // ---- the node ------------------------------------------------------------------------------

    fn manage(&mut self, me: ProcId, msg: ToNode) {
        match msg {
            ToNode::LeaseKept { .. } => {}
            ToNode::LeaseDemand { class, count } => {
                self.demands.retain(|(p, c, _)| (*p, *c) != (me, class));
                if count > 0 {
                    self.demands.push_back((me, class, count));
                }
            }
            ToNode::LeaseReturn { lease, reusable, .. } => {
                if let Some((_, worker)) = self.leases.remove(&lease)
                    && !reusable
                {
                    self.doomed.push(worker);
                }
            }
            ToNode::ActorCreate { creation, spec } => {
                let actor = Actor {
                    spec: *spec,
                    host: None,
                    incarnation: 0,
                    restarts_left: creation.max_restarts,
                    state: ActorState::Pending,
                    stopping: false,
                    subscribers: BTreeSet::from([me]),
                };
                self.actors.insert(creation.actor, actor);
            }
            ToNode::ActorSubscribe { actor } => {
                let state = match self.actors.get_mut(&actor) {
                    Some(record) => {
                        record.subscribers.insert(me);
                        record.state.clone()
                    }
                    None => ActorState::Dead(Payload::error(ErrorCode::ActorDied, "unknown")),
                };
                self.send(MANAGER, me, Packet::Actor(actor, state));
            }
            ToNode::ActorRelease { actor } => {
                let Some(record) = self.actors.get_mut(&actor) else {
                    return;
                };
                record.stopping = true;
                if record.host.is_none() {
                    self.end_actor(actor);
                }
            }
            ToNode::Spill { owner, offered } => {
                assert_eq!(owner, me, "all processes are on one node");
                for offer in offered {
                    self.next_segment += 1;
                    let spill = SegmentId(SegmentId::SPILLED + self.next_segment);
                    // Every fourth is not written: there is enough room by then, or none on the disk.
                    let spill = (!self.next_segment.is_multiple_of(4)).then_some(spill);
                    if let Some(spill) = spill {
                        self.blocks.insert(spill, me);
                    }
                    let (object, serial, len) = (offer.object, offer.serial, offer.from.len);
                    self.send(MANAGER, me, Packet::Written(Written { object, serial, spill, len }));
                }
            }
            ToNode::ActorKill { .. } | ToNode::PeerLost { .. } => {}
        }
    }

    fn publish(&mut self, actor: ActorId, state: ActorState) {
        let record = self.actors.get_mut(&actor).unwrap();
        record.state = state.clone();
        for to in record.subscribers.clone() {
            self.send(MANAGER, to, Packet::Actor(actor, state.clone()));
        }
    }

    fn end_actor(&mut self, actor: ActorId) {
        let record = self.actors.get_mut(&actor).unwrap();
        if !matches!(record.state, ActorState::Dead(_)) {
            self.doomed.extend(record.host.take());
            self.publish(actor, ActorState::Dead(Payload::error(ErrorCode::ActorDied, "ended")));
        }
    }

    /// Starts the processes of actors that wait for one, and ends those that are done.
    fn tend_actors(&mut self) -> bool {
        let mut busy = false;
        let ids: Vec<ActorId> = self.actors.keys().copied().collect();
        for id in ids {
            let record = &self.actors[&id];
            let waits = record.host.is_none() && !matches!(record.state, ActorState::Dead(_));
            let idle = record.host.is_some_and(|host| {
                let host = &self.processes[&host];
                host.running.is_none() && !host.executor.has_any_work()
            });
            if waits {
                let host = self.spawn();
                let record = self.actors.get_mut(&id).unwrap();
                record.host = Some(host);
                let (spec, incarnation) = (record.spec.clone(), record.incarnation);
                self.step(host, |process, _| {
                    process.host = true;
                    process.owner.objects.arrive(&Executor::counted(&spec.args, &spec.deps));
                    let owner = spec.actor.proc;
                    process.executor.handle_actor_init(spec, incarnation, vec![], owner);
                });
                busy = true;
            } else if record.stopping && idle {
                self.end_actor(id);
                busy = true;
            }
        }
        busy | self.bury()
    }

    fn bury(&mut self) -> bool {
        let mut any = false;
        while let Some(victim) = self.doomed.pop() {
            if self.is_alive(victim) {
                self.kill(victim);
                any = true;
            }
        }
        any
    }

    /// Lends one worker to who has waited longest; true if it did.
    fn grant(&mut self) -> bool {
        for _ in 0..self.demands.len() {
            let (owner, class, count) = self.demands.pop_front().unwrap();
            if !self.is_alive(owner) {
                continue;
            }
            let busy: BTreeSet<ProcId> = self.leases.values().map(|(_, worker)| *worker).collect();
            let free = |(id, p): &(&ProcId, &Process)| {
                p.alive && !p.host && **id != owner && **id != DRIVER && !busy.contains(id)
            };
            let worker = self.processes.iter().find(free).map(|(id, _)| *id);
            let worker = match worker {
                Some(worker) => worker,
                None if busy.len() < WORKERS_MAX => self.spawn(),
                None => {
                    self.demands.push_back((owner, class, count));
                    continue;
                }
            };
            if count > 1 {
                self.demands.push_back((owner, class, count - 1));
            }
            self.next_lease += 1;
            let lease = LeaseId(self.next_lease);
            self.leases.insert(lease, (owner, worker));
            self.send(MANAGER, owner, Packet::Granted(class, lease, worker));
            return true;
        }
        false
    }

    fn kill(&mut self, victim: ProcId) {
        self.process(victim).alive = false;
        // What it had sent is delivered first: sockets outlive their writers.
        let links: Vec<_> = self.links.keys().filter(|(from, _)| *from == victim).copied().collect();
        for link in links {
            while let Some(packet) = self.links.get_mut(&link).and_then(VecDeque::pop_front) {
                if self.is_alive(link.1) {
                    self.receive(link.0, link.1, packet);
                }
            }
        }
        self.links.retain(|(from, to), _| *from != victim && *to != victim);
        // Workers that ran tasks of the dead are ended.
        self.doomed.extend(self.leases.values().filter(|(owner, _)| *owner == victim).map(|(_, worker)| *worker));
        self.leases.retain(|_, (owner, worker)| *owner != victim && *worker != victim);
        self.demands.retain(|(owner, ..)| *owner != victim);
        self.blocks.retain(|_, owner| *owner != victim);
        for other in self.living() {
            self.send(MANAGER, other, Packet::Gone(victim));
        }
        let ids: Vec<ActorId> = self.actors.keys().copied().collect();
        for id in ids {
            let record = self.actors.get_mut(&id).unwrap();
            let hosted = record.host == Some(victim);
            if id.proc == victim {
                if hosted {
                    record.host = None;
                }
                self.end_actor(id);
            } else if hosted {
                record.host = None;
                if record.stopping || record.restarts_left == 0 {
                    self.end_actor(id);
                } else {
                    record.restarts_left -= 1;
                    record.incarnation += 1;
                    self.publish(id, ActorState::Restarting);
                }
            }
        }
    }

    // ---- what programs do ----------------------------------------------------------------------

    fn value(&mut self, object_owner: ProcId, lessee: ProcId, refs: Vec<ObjectId>, choice: usize) -> Value {
        if !choice.is_multiple_of(3) || !self.is_alive(object_owner) {
            return Value::Inline(Payload { data: Blob::new(b"v"), refs });
        }
        self.next_segment += 1;
        let segment = SegmentId(self.next_segment);
        self.blocks.insert(segment, object_owner);
        Value::Stored { location: Location { node: NodeKey(NODE), segment, lessee, offset: 0, len: 64 }, refs }
    }

    fn put(&mut self, me: ProcId, choice: usize) {
        let refs = some(&self.process(me).held, choice);
        let value = self.value(me, me, refs, choice / 7);
        let process = self.process(me);
        let id = process.owner.put(value);
        process.held.push(id);
    }

    fn submit(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, now| {
            let mut refs = some(&process.held, choice);
            refs.extend(pick(&process.handles, choice).filter(|_| choice.is_multiple_of(2)));
            let deps: Vec<(Slot, ObjectId)> =
                process.held.get(choice % 7).map(|id| (Slot::Position(0), *id)).into_iter().collect();
            let parent = process.running.as_ref().map(|running| running.work.task);
            let def = choice / 3 % process.defs.len();
            let args = Payload { data: Blob::new(b"a"), refs };
            let task =
                process.owner.submit(process.defs[def], args, deps, None, parent, now, &mut process.out).unwrap();
            match def {
                0 => process.held.push(ObjectId { task, index: 0 }),
                1 => process.held.extend([ObjectId { task, index: 0 }, ObjectId { task, index: 1 }]),
                _ => process.streams.push(task),
            }
        });
    }

    fn stream(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, now| {
            let Some(task) = pick(&process.streams, choice) else {
                return;
            };
            if choice.is_multiple_of(5) {
                process.streams.retain(|other| *other != task);
                process.owner.stream_dropped(task, now, &mut process.out);
                process.owner.release(ObjectId { task, index: 0 }, &mut process.out);
            } else if let Next::Item(id) = process.owner.stream_next(task, &mut process.out) {
                process.held.push(id);
            }
        });
    }

    fn create_actor(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, now| {
            let (actor, handle) = process.owner.next_actor_id();
            process.owner.objects.retain(handle);
            let creation = Creation {
                actor,
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
                max_restarts: i32::try_from(choice % 3).unwrap(),
                max_pending_calls: -1,
                max_concurrency: 1,
                is_async: false,
                groups: vec![],
                detached: false,
                recorded: true,
            };
            let deps: Vec<(Slot, ObjectId)> =
                process.held.get(choice % 5).map(|id| (Slot::Position(0), *id)).into_iter().collect();
            let args = Payload { data: Blob::new(b"a"), refs: some(&process.held, choice) };
            process.owner.create_actor(creation, args, deps, now, &mut process.out);
            process.handles.push(handle);
        });
    }

    fn call(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, now| {
            let Some(handle) = pick(&process.handles, choice) else {
                return;
            };
            let actor = ActorId { proc: handle.task.proc, seq: handle.task.seq };
            let def = process.owner.define(
                call(Some(actor)),
                Blob::empty(),
                None,
                i32::try_from(choice / 2 % 2).unwrap() - 1,
            );
            let args = Payload { data: Blob::new(b"a"), refs: some(&process.held, choice / 4) };
            let deps: Vec<(Slot, ObjectId)> =
                process.held.get(choice % 7).map(|id| (Slot::Position(0), *id)).into_iter().collect();
            let task = process.owner.submit(def, args, deps, Some(handle), None, now, &mut process.out).unwrap();
            process.owner.undefine(def, &mut process.out);
            process.held.push(ObjectId { task, index: 0 });
        });
    }

    fn drop_one(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, _| {
            let of = if choice.is_multiple_of(4) && !process.handles.is_empty() || process.held.is_empty() {
                &mut process.handles
            } else {
                &mut process.held
            };
            if !of.is_empty() {
                let id = of.swap_remove(choice % of.len());
                process.owner.release(id, &mut process.out);
            }
        });
    }

    /// A reader opens a value and keeps what is inside.
    fn open(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, _| {
            let Some(id) = pick(&process.held, choice) else { return };
            if process.owner.objects.watch(id, WATCH, &mut process.out) {
                let inner: Vec<ObjectId> = process.owner.objects.value(id).unwrap().refs().to_vec();
                keep(process, &inner);
            }
        });
    }

    fn cancel(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, now| {
            let stream = pick(&process.streams, choice).map(|task| ObjectId { task, index: 0 });
            let id = if choice.is_multiple_of(2) { stream } else { None }.or_else(|| pick(&process.held, choice));
            let Some(id) = id else { return };
            let force = choice.is_multiple_of(7) && !process.owner.is_actor_call(id);
            process.owner.cancel(id, force, choice.is_multiple_of(3), now, &mut process.out);
        });
        self.bury();
    }

    /// A reader begins to view a value where it is, or ends to.
    fn view(&mut self, me: ProcId, choice: usize) {
        self.step(me, |process, _| {
            if choice.is_multiple_of(2) && !process.views.is_empty() {
                let (id, _) = process.views.swap_remove(choice % process.views.len());
                process.owner.objects.end_view(id);
                process.owner.release(id, &mut process.out);
            } else if let Some(id) = pick(&process.held, choice)
                && let Some(Value::Stored { location, .. }) = process.owner.objects.read(id).cloned()
                && !location.is_spilled()
            {
                process.owner.objects.retain_view(id);
                process.views.push((id, location.segment));
            }
        });
    }

    /// The node is short of memory, and asks a process.
    fn spill(&mut self, me: ProcId, choice: usize) {
        let bytes = if choice.is_multiple_of(3) { 1 } else { 256 };
        self.step(me, |process, _| process.owner.make_room(NodeKey(NODE), bytes, &mut process.out));
    }

    /// The memory of a stored value is lost, and a reader notices.
    fn lose(&mut self, me: ProcId, choice: usize) {
        let process = self.process(me);
        let stored: Vec<ObjectId> =
            process.held.iter().copied().filter(|id| process.owner.objects.location(*id).is_some()).collect();
        let Some(id) = pick(&stored, choice) else { return };
        let segment = process.owner.objects.location(id).unwrap().segment;
        if self.blocks.remove(&segment).is_some() {
            self.lost.insert(segment);
        }
        if self.lost.contains(&segment) {
            self.step(me, |process, now| {
                process.owner.report_missing(id, NodeKey(NODE), segment, now, &mut process.out)
            });
        }
    }

    /// A worker begins a task, goes on with it, or ends it and returns some of what it saw.
    fn work(&mut self, me: ProcId, choice: usize) -> bool {
        let Some(running) = &self.process(me).running else {
            let Some(work) = self.process(me).executor.take("", 0) else {
                return false;
            };
            for (_, id, value) in &work.deps {
                let Value::Stored { location, .. } = value else { continue };
                if !self.process(me).executor.knows_place(*id) {
                    continue; // it asks the owner
                }
                let there = self.blocks.contains_key(&location.segment) || self.lost.contains(&location.segment);
                assert!(there || !self.is_alive(id.owner()), "{me:?} is to read {id} where it was freed");
            }
            if work.kind == WorkKind::CreateActor {
                // Its references are kept until the process ends.
                self.process(me).executor.left(work.task);
                let actor = work.def.actor.unwrap();
                let record = &self.actors[&actor];
                if record.host == Some(me) {
                    let incarnation = record.incarnation;
                    self.publish(actor, ActorState::Alive { proc: me, node: NodeKey(NODE), incarnation });
                }
            } else {
                self.process(me).running = Some(Running { work, sent: 0, blocked: false });
            }
            return true;
        };
        if running.blocked {
            return false;
        }
        let (work, sent) = (running.work.clone(), running.sent);
        let cancelled = self.process(me).executor.is_cancelled(work.task);
        let streaming = work.def.returns == Returns::Streaming;
        if streaming && !cancelled && sent < 1 + u32::try_from(work.task.seq % 6).unwrap() {
            return self.yield_item(me, &work, sent);
        }
        self.process(me).running = None;
        // The task keeps some of the references, and returns others.
        let kept = some(&work.args.refs, choice);
        let given: Vec<ObjectId> = work.args.refs.iter().copied().filter(|id| !kept.contains(id)).collect();
        let count = match work.def.returns {
            Returns::Count(count) => count as usize,
            Returns::Streaming | Returns::Dynamic => 1,
        };
        let results: Vec<Value> = if cancelled {
            vec![Value::Inline(Payload::error(ErrorCode::Cancelled, "cancelled"))]
        } else {
            (0..count)
                .map(|at| self.value(work.owner, me, given.clone(), if streaming { 1 } else { choice + at }))
                .collect()
        };
        self.step(me, |process, _| {
            if !process.host {
                keep(process, &kept);
            }
            for value in &results {
                process.owner.objects.hand_over(value.refs(), work.owner, &mut process.out);
            }
            process.executor.answer(work.owner, work.task, results, false, 1000, sent, &mut process.out);
            process.owner.release_all(&Executor::counted(&work.args, &work.deps), &mut process.out);
        });
        true
    }

    fn yield_item(&mut self, me: ProcId, work: &Work, sent: u32) -> bool {
        let process = self.process(me);
        let taken = process.executor.items_taken(work.task).unwrap_or(0);
        if work.def.backpressure > 0 && sent >= taken + work.def.backpressure {
            return false;
        }
        process.running.as_mut().unwrap().sent += 1;
        let value = self.value(work.owner, me, work.args.refs.clone(), sent as usize);
        self.step(me, |process, _| {
            process.owner.objects.hand_over(value.refs(), work.owner, &mut process.out);
            let msg = Msg::Item { task: work.task, index: sent + 1, value };
            process.out.effects.push(Effect::Send { to: work.owner, msg, urgent: true });
        });
        true
    }

    /// The running task begins to wait for something, or ends to.
    fn block(&mut self, me: ProcId) -> bool {
        self.step(me, |process, _| {
            let Some(running) = &mut process.running else {
                return false;
            };
            running.blocked = !running.blocked;
            if running.blocked {
                let counted = process.executor.block(&mut process.out);
                process.owner.release_all(&counted, &mut process.out);
            } else {
                process.executor.unblock(&mut process.out);
            }
            true
        })
    }

    // ---- oracles -------------------------------------------------------------------------------

    fn check_safety(&self) {
        for (me, process) in self.processes.iter().filter(|(_, p)| p.alive) {
            for id in process.held.iter().chain(&process.handles) {
                assert!(process.owner.objects.is_known(*id), "{me:?} holds {id}, which it does not know");
                let owner = &self.processes[&id.owner()];
                assert!(
                    !owner.alive || owner.owner.objects.is_known(*id),
                    "{me:?} holds {id}, which its owner has freed"
                );
                if let (true, Some(location)) = (owner.alive, process.owner.objects.location(*id)) {
                    let there = self.blocks.contains_key(&location.segment) || self.lost.contains(&location.segment);
                    // A borrower may know the place of a value that was lost and made again since.
                    let current = owner.owner.objects.location(*id) == Some(location);
                    assert!(there || !current, "{me:?} holds {id}, whose block has been freed");
                }
            }
            for (id, segment) in process.views.iter().filter(|(id, _)| self.is_alive(id.owner())) {
                let there = self.blocks.contains_key(segment) || self.lost.contains(segment);
                assert!(there, "{me:?} views {id}, whose block has been freed");
            }
        }
    }

    /// Lets everything happen that can, until nothing does.
    fn settle(&mut self) {
        for _ in 0..100_000 {
            let mut busy = self.deliver(0);
            busy |= self.grant();
            busy |= self.tend_actors();
            for id in self.living() {
                if self.process(id).running.as_ref().is_some_and(|running| running.blocked) {
                    busy |= self.block(id);
                }
                if self.is_alive(id) {
                    busy |= self.work(id, 0);
                }
            }
            busy |= self.bury();
            self.check_safety();
            if !busy {
                // Leases that nobody uses go back after a while.
                self.now += 1_000_000_000;
                for id in self.living() {
                    self.step(id, |process, now| process.owner.handle_timeout(now, &mut process.out));
                }
                if !self.grant() && !self.tend_actors() && self.links.values().all(VecDeque::is_empty) {
                    return;
                }
            }
        }
        panic!("the world does not come to rest: demands {:?}", self.demands);
    }

    /// Takes what generators have made until they end.
    fn drain_streams(&mut self) {
        for me in self.living() {
            loop {
                let mut taken = false;
                for task in self.process(me).streams.clone() {
                    let next = self.step(me, |process, _| process.owner.stream_next(task, &mut process.out));
                    if let Next::Item(id) = next {
                        self.process(me).held.push(id);
                        taken = true;
                    }
                }
                self.settle();
                if !taken || !self.is_alive(me) {
                    break;
                }
            }
        }
    }

    fn drop_everything(&mut self) {
        for me in self.living() {
            self.step(me, |process, now| {
                for task in std::mem::take(&mut process.streams) {
                    process.owner.stream_dropped(task, now, &mut process.out);
                    process.owner.release(ObjectId { task, index: 0 }, &mut process.out);
                }
            });
            while !self.process(me).views.is_empty() {
                self.view(me, 0);
            }
            while !self.process(me).held.is_empty() || !self.process(me).handles.is_empty() {
                self.drop_one(me, 0);
            }
        }
        self.settle();
    }
}

fn keep(process: &mut Process, ids: &[ObjectId]) {
    for id in ids {
        process.owner.objects.retain(*id);
        if id.index == ObjectId::ACTOR_INDEX {
            process.handles.push(*id);
        } else {
            process.held.push(*id);
        }
    }
}

// ---- schedules -------------------------------------------------------------------------------------

type Act = fn(&mut World, ProcId, usize);

const ACTS: [(u32, Act); 14] = [
    (2, World::put),
    (4, World::submit),
    (3, World::drop_one),
    (2, World::open),
    (6, |world, me, choice| {
        world.work(me, choice);
    }),
    (3, World::stream),
    (1, World::create_actor),
    (2, World::call),
    (1, World::cancel),
    (1, World::lose),
    (2, World::view),
    (2, World::spill),
    (1, |world, me, _| {
        world.block(me);
    }),
    (1, |world, me, _| {
        if me != DRIVER {
            world.kill(me);
        }
    }),
];

#[derive(Clone, Debug)]
enum Step {
    /// What is done (an index of `ACTS`), by which process that lives, with which choices.
    Act(usize, usize, usize),
    Deliver(usize),
    Manage,
}

/// Schedules; each leaves out some kinds of acts entirely, so that the others meet more often.
fn steps(kills: bool) -> impl Strategy<Value = Vec<Step>> {
    any::<u16>().prop_flat_map(move |off| {
        let mut acts: Vec<usize> = Vec::new();
        for (at, (weight, _)) in ACTS.iter().enumerate() {
            let is_kill = at == ACTS.len() - 1;
            let on = if is_kill { kills } else { at < 5 || off >> at & 1 == 0 };
            acts.extend(std::iter::repeat_n(at, if on { *weight as usize } else { 0 }));
        }
        let step = prop_oneof![
            10 => (prop::sample::select(acts), any::<usize>(), any::<usize>()).prop_map(|(act, who, choice)| Step::Act(act, who, choice)),
            8 => any::<usize>().prop_map(Step::Deliver),
            2 => Just(Step::Manage),
        ];
        prop::collection::vec(step, 1..160)
    })
}

fn run(steps: &[Step]) -> World {
    let mut world = World::new();
    for step in steps {
        world.now += 1000;
        match *step {
            Step::Act(act, who, choice) => {
                let me = pick(&world.living(), who).unwrap();
                ACTS[act].1(&mut world, me, choice);
                world.bury();
            }
            Step::Deliver(choice) => {
                world.deliver(choice);
            }
            Step::Manage => {
                world.grant();
                world.tend_actors();
            }
        }
        world.check_safety();
    }
    world
}

fn finish(mut world: World) {
    world.settle();
    world.drain_streams();
    for me in world.living() {
        for id in world.process(me).held.clone() {
            world.step(me, |process, _| process.owner.objects.watch(id, WATCH, &mut process.out));
        }
    }
    world.settle();
    for me in world.living() {
        let process = &world.processes[&me];
        for id in &process.held {
            assert!(
                process.owner.objects.is_ready(*id),
                "{me:?} waits for ever for {id}: {:?}",
                process.owner.why(*id, world.now)
            );
        }
        for task in &process.streams {
            assert!(process.owner.stream_ready(*task), "{me:?} waits for ever for the next item of {task}");
        }
    }
    world.drop_everything();
    for (id, process) in world.processes.iter().filter(|(_, p)| p.alive) {
        assert!(!process.host, "{id:?} is the process of an actor that nobody can reach");
        assert_eq!(process.owner.objects.len(), 0, "{id:?} kept objects: {:?}", process.owner.objects);
        let left: Vec<_> =
            process.owner.statistics().into_iter().filter(|(name, count)| *count > 0 && EMPTY.contains(name)).collect();
        assert_eq!(left, [], "{id:?} is not empty");
        assert_eq!(process.executor.running_count(), 0, "{id:?} runs something");
        assert_eq!(process.owner.spilling(), 0, "{id:?} waits for ever for a spill");
    }
    assert!(world.blocks.is_empty(), "blocks were never freed: {:?}", world.blocks);
    assert!(world.leases.is_empty(), "leases never went back: {:?}", world.leases);
}

const EMPTY: [&str; 6] = ["objects", "tasks", "leases", "actors", "streams", "lineage_bytes"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn referenced_objects_live_and_unreferenced_ones_vanish(steps in steps(false)) {
        finish(run(&steps));
    }

    #[test]
    fn deaths_free_what_the_dead_held_and_end_every_wait(steps in steps(true)) {
        finish(run(&steps));
    }
}

#[test]
fn a_single_task_runs_on_a_lent_worker() {
    let mut world = World::new();
    world.submit(DRIVER, 0);
    world.settle();
    let process = &world.processes[&DRIVER];
    assert!(process.owner.objects.is_ready(process.held[0]));
    assert!(world.leases.is_empty(), "an idle lease goes back");
}
