//! Workers on loan, and which task goes to which of them.
//!
//! Tasks with the same demand, environment and strategy form a *class*. The owner tells its node how
//! many more workers each class could use, and pushes to the workers that it was lent for as long as
//! it has tasks. Pipelining hides the round trip: a worker is given short tasks ahead, up to
//! [`PIPELINE_NS`] of estimated work; a task whose duration is unknown, or long, is only given to an
//! idle worker. It must never cost parallelism: whatever has been pushed and not started still counts
//! as demand, an idle worker steals from the others of its class, and a worker that blocks returns
//! what it has not started.
//!
//! Invariants: a queued task is in its class's queue once; a pushed one in one lease; a blocked lease
//! holds nothing but what runs; a lease that nobody uses goes back after [`IDLE_NS`], or at once when
//! the node asks for it.

use std::collections::VecDeque;

use crate::ids::{LeaseId, NodeKey, ProcId, TaskId};
use crate::msg::Msg;
use crate::owner::{Effect, Map, Out, Owner, ToNode};
use crate::payload::{ErrorCode, Payload};
use crate::tasks::{Definitions, Place};

#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub u32);

/// Estimated work that a worker is given ahead. A round trip takes about a tenth of it, so a worker
/// never runs dry; and a tenth of a human's notice, so that nothing waits long behind it.
pub const PIPELINE_NS: u64 = 2_000_000;
/// Largest number of tasks given ahead, however short.
pub const PIPELINE_TASKS_MAX: usize = 256;
/// What an unmeasured function is assumed to take.
const UNKNOWN_NS: u64 = 1_000_000_000;
/// How long a worker is kept for a next task. Long enough for a loop that does a little between two
/// calls, short enough that `available_resources` soon tells the truth.
pub const IDLE_NS: u64 = 300_000_000;
/// A lease that others wait for is kept this long while there is work, so that two busy owners
/// take turns rather than trade workers at each task.
pub const TURN_NS: u64 = 50_000_000;
/// Unused classes are looked for when there are so many, and then each time that their number doubles.
const CLASSES_SWEPT_AT_MIN: usize = 512;
/// Demand above this is not worth telling.
const DEMAND_MAX: u32 = 65_536;

/// What makes tasks interchangeable for a worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClassSpec {
    /// Resource names and amounts in ten-thousandths.
    pub demand: Vec<(String, i64)>,
    pub env: Vec<u8>,
    pub strategy: Vec<u8>,
    /// Whether a task may be repeated that lost its worker (`max_retries` is not 0). When memory is short the node
    /// ends workers whose tasks may be.
    pub retriable: bool,
}

/// How a process ended, as far as it matters for the task that ran on it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Death {
    /// Whatever is none of the others; a retry is charged to `max_retries`.
    Crashed,
    /// By the kernel, for want of memory; a retry is charged to `max_retries`.
    OutOfMemory,
    /// By the node's memory watch, which chose it among others of its owner: it is repeated when there is room, at the
    /// expense of `Owner::set_task_oom_retries` alone.
    Evicted,
    /// By the memory watch, beside nothing else of its owner whose end would have made room: another attempt would
    /// come to the same end.
    EvictedAlone,
}

#[derive(Debug)]
struct Class {
    spec: ClassSpec,
    queue: VecDeque<TaskId>,
    leases: Vec<LeaseId>,
    /// Leases that the node still owes us.
    requested: u32,
    /// Leases that came, ever.
    granted: u32,
    /// Tasks that were taken before the first one of the queue.
    passed_over: u32,
    /// Definitions that refer to it.
    definitions: u32,
}

#[derive(Debug)]
struct Lease {
    worker: ProcId,
    /// Where the worker lives, which is also who takes the lease back.
    node: NodeKey,
    pid: u32,
    class: ClassId,
    gpu_ids: Vec<u32>,
    /// In the order of pushing; the worker runs them in this order, so the first one runs.
    in_flight: VecDeque<TaskId>,
    /// Estimated time of what is in flight.
    load_ns: u64,
    blocked: bool,
    stealing: bool,
    reclaim: bool,
    granted_ns: u64,
    idle_since_ns: Option<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Numbers are never used again: the node may still grant what was asked for a former one.
    classes: Map<ClassId, Class>,
    next_class: u32,
    classes_swept_at: usize,
    by_spec: Map<ClassSpec, ClassId>,
    leases: Map<LeaseId, Lease>,
    /// Others wait for workers of this node: idle ones go back at once.
    pressed: bool,
    by_worker: Map<ProcId, LeaseId>,
}

impl Leases {
    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn worker(&self, lease: LeaseId) -> Option<ProcId> {
        self.leases.get(&lease).map(|l| l.worker)
    }

    pub(crate) fn node(&self, lease: LeaseId) -> Option<NodeKey> {
        self.leases.get(&lease).map(|l| l.node)
    }

    pub(crate) fn pid(&self, lease: LeaseId) -> Option<u32> {
        self.leases.get(&lease).map(|l| l.pid)
    }

    pub(crate) fn class_count(&self) -> usize {
        self.classes.len()
    }

    /// How many tasks the worker runs before this one.
    pub(crate) fn tasks_before(&self, lease: LeaseId, task: TaskId) -> usize {
        self.leases.get(&lease).and_then(|l| l.in_flight.iter().position(|t| *t == task)).unwrap_or(0)
    }

    pub(crate) fn is_blocked(&self, lease: LeaseId) -> bool {
        self.leases.get(&lease).is_some_and(|l| l.blocked)
    }

    fn class(&mut self, id: ClassId) -> &mut Class {
        self.classes.get_mut(&id).expect("a class lives as long as its definitions and leases")
    }

    pub(crate) fn queue(&self, id: ClassId) -> &VecDeque<TaskId> {
        &self.classes[&id].queue
    }

    pub(crate) fn passed_over(&self, id: ClassId) -> u32 {
        self.classes[&id].passed_over
    }

    /// Takes a task out of a class's queue.
    pub(crate) fn take(&mut self, id: ClassId, at: usize) -> Option<TaskId> {
        let class = self.class(id);
        class.passed_over = if at == 0 { 0 } else { class.passed_over + 1 };
        class.queue.remove(at)
    }

    pub(crate) fn class_used(&mut self, id: ClassId) {
        self.class(id).definitions += 1;
    }

    pub(crate) fn class_unused(&mut self, id: ClassId) {
        self.class(id).definitions -= 1;
    }

    /// Forgets the classes that nothing refers to, once there are many.
    fn make_room_for_class(&mut self) {
        if self.classes.len() < self.classes_swept_at.max(CLASSES_SWEPT_AT_MIN) {
            return;
        }
        self.classes.retain(|_, c| c.definitions > 0 || !c.leases.is_empty() || !c.queue.is_empty() || c.requested > 0);
        let classes = &self.classes;
        self.by_spec.retain(|_, id| classes.contains_key(id));
        self.classes_swept_at = 2 * self.classes.len();
    }

    pub(crate) fn unqueue(&mut self, task: TaskId, definitions: &Definitions, def: u32) {
        if let Some(class) = definitions[def].class {
            self.class(class).queue.retain(|t| *t != task);
        }
    }

    pub(crate) fn task_left(&mut self, lease: LeaseId, task: TaskId) {
        let Some(lease) = self.leases.get_mut(&lease) else {
            return;
        };
        if let Some(at) = lease.in_flight.iter().position(|t| *t == task) {
            lease.in_flight.remove(at);
            lease.load_ns = if lease.in_flight.is_empty() {
                0
            } else {
                lease.load_ns - lease.load_ns / (lease.in_flight.len() as u64 + 1)
            };
        }
    }
}

impl Owner {
    /// The class of this demand; the number names it to the node. It may be gone when the next one is made,
    /// unless it is given to [`Self::define`] before.
    pub fn class(&mut self, spec: ClassSpec) -> ClassId {
        if let Some(id) = self.leases.by_spec.get(&spec) {
            return *id;
        }
        self.leases.make_room_for_class();
        let id = ClassId(self.leases.next_class);
        self.leases.next_class = id.0.checked_add(1).expect("fewer than 2^32 classes");
        let class = Class {
            spec: spec.clone(),
            queue: VecDeque::new(),
            leases: Vec::new(),
            requested: 0,
            granted: 0,
            passed_over: 0,
            definitions: 0,
        };
        self.leases.classes.insert(id, class);
        self.leases.by_spec.insert(spec, id);
        id
    }

    #[must_use]
    pub fn class_spec(&self, id: ClassId) -> &ClassSpec {
        &self.leases.classes[&id].spec
    }

    /// Leases of the class that came, ever: a demand tells them, so that the node knows which it has not seen yet.
    #[must_use]
    pub fn class_granted(&self, id: ClassId) -> u32 {
        self.leases.classes[&id].granted
    }

    /// What people are shown for this class: the name of the task that waits for longest.
    #[must_use]
    pub fn class_label(&self, id: ClassId) -> &str {
        let front = self.leases.classes[&id].queue.front().and_then(|task| self.tasks.get(task));
        front.map_or("", |entry| &self.definitions[entry.def].call.name)
    }

    pub(crate) fn enqueue(&mut self, task: TaskId, front: bool, now_ns: u64, out: &mut Out) {
        let entry = self.tasks.get_mut(&task).expect("an unfinished task");
        entry.place = Place::Queued;
        let class = self.definitions[entry.def].class.expect("a task has a class");
        let queue = &mut self.leases.class(class).queue;
        if front {
            queue.push_front(task);
        } else {
            queue.push_back(task);
        }
        self.pump(class, now_ns, out);
    }

    /// Pushes what can be pushed, and tells the node what else could be used.
    fn pump(&mut self, class: ClassId, now_ns: u64, out: &mut Out) {
        while let Some(&task) = self.leases.class(class).queue.front() {
            if !self.has_arguments(task) {
                self.leases.class(class).queue.pop_front();
                self.await_arguments(task, out);
                continue;
            }
            let Some(lease) = self.best_lease(class, task, now_ns) else {
                break;
            };
            let task = self.next_for(class, lease).expect("the queue is not empty");
            let estimate = self.estimate_ns(task);
            self.push(task, lease, estimate, now_ns, out);
        }
        if self.leases.class(class).queue.is_empty() {
            self.settle_idle(class, now_ns, out);
        }
        self.update_demand(class, out);
    }

    /// How long a task is taken to run.
    pub(crate) fn estimate_ns(&self, task: TaskId) -> u64 {
        self.definitions[self.tasks[&task].def].run_ns.unwrap_or(UNKNOWN_NS)
    }

    /// The lease with least to do; of several the one on whose node the task's arguments are.
    fn best_lease(&self, class: ClassId, task: TaskId, now_ns: u64) -> Option<LeaseId> {
        let class = &self.leases.classes[&class];
        let (estimate_ns, near) = (self.estimate_ns(task), self.near(task));
        let mut best: Option<((usize, bool), LeaseId)> = None;
        for &id in &class.leases {
            let lease = &self.leases.leases[&id];
            let turn_over = lease.reclaim && now_ns >= lease.granted_ns + TURN_NS;
            if lease.blocked || turn_over {
                continue;
            }
            let count = lease.in_flight.len();
            let fits = count == 0 || (lease.load_ns + estimate_ns <= PIPELINE_NS && count < PIPELINE_TASKS_MAX);
            let cost = (count, near.is_some_and(|node| node != lease.node));
            if fits && best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, id));
                if cost == (0, false) {
                    break;
                }
            }
        }
        best.map(|(_, id)| id)
    }

    fn push(&mut self, task: TaskId, id: LeaseId, estimate_ns: u64, now_ns: u64, out: &mut Out) {
        let lease = self.leases.leases.get_mut(&id).expect("chosen from the table");
        let urgent = lease.in_flight.is_empty();
        lease.in_flight.push_back(task);
        lease.load_ns += estimate_ns;
        lease.idle_since_ns = None;
        let worker = lease.worker;
        let gpu_ids = lease.gpu_ids.clone();
        let entry = self.tasks.get_mut(&task).expect("an unfinished task");
        entry.place = Place::Pushed(id);
        entry.pushed_ns = now_ns;
        let msg = self.push_message(task, worker, &gpu_ids, out);
        out.push(Effect::Send { to: worker, msg, urgent });
    }

    /// Leases without work: they steal, or wait a while for more, or go back.
    fn settle_idle(&mut self, class: ClassId, now_ns: u64, out: &mut Out) {
        let mut give_back = Vec::new();
        let mut idle = Vec::new();
        for &id in &self.leases.classes[&class].leases {
            let lease = self.leases.leases.get_mut(&id).expect("listed");
            if !lease.in_flight.is_empty() || lease.blocked {
                continue;
            }
            if lease.reclaim {
                give_back.push(id);
            } else {
                lease.idle_since_ns.get_or_insert(now_ns);
                idle.push(id);
            }
        }
        for id in give_back {
            self.return_lease(id, out);
        }
        if idle.is_empty() {
            return;
        }
        let victims: Vec<LeaseId> = self.leases.classes[&class].leases.clone();
        for id in victims {
            let lease = self.leases.leases.get_mut(&id).expect("listed");
            if lease.in_flight.len() >= 2 && !lease.stealing && idle.pop().is_some() {
                lease.stealing = true;
                let max = u32::try_from(lease.in_flight.len() / 2).unwrap_or(u32::MAX);
                out.send(lease.worker, Msg::Steal { max });
            }
        }
        if self.leases.pressed {
            for id in idle {
                self.return_lease(id, out);
            }
        }
    }

    /// Others wait for workers of this node, or do so no longer.
    pub fn handle_pressure(&mut self, pressed: bool, now_ns: u64, out: &mut Out) {
        self.leases.pressed = pressed;
        if pressed {
            let mut classes: Vec<ClassId> = self.leases.leases.values().map(|lease| lease.class).collect();
            classes.sort_unstable();
            classes.dedup();
            for class in classes {
                self.pump(class, now_ns, out);
            }
        }
    }

    pub(crate) fn update_demand(&mut self, class_id: ClassId, out: &mut Out) {
        let class = &self.leases.classes[&class_id];
        let ahead: usize = class.leases.iter().map(|id| self.leases.leases[id].in_flight.len().saturating_sub(1)).sum();
        let idle = class.leases.iter().filter(|id| self.leases.leases[*id].idle_since_ns.is_some()).count();
        let want =
            u32::try_from((class.queue.len() + ahead).saturating_sub(idle)).unwrap_or(DEMAND_MAX).min(DEMAND_MAX);
        let class = self.leases.class(class_id);
        let tell = if want == 0 {
            class.requested > 0
        } else {
            class.requested == 0 || want >= class.requested.saturating_mul(2)
        };
        if tell {
            class.requested = want;
            out.node(ToNode::LeaseDemand { class: class_id, count: want });
        }
    }

    /// A node lends a worker.
    #[expect(clippy::too_many_arguments, reason = "the fields of the node's message")]
    pub fn handle_lease_granted(
        &mut self,
        class: ClassId,
        id: LeaseId,
        worker: ProcId,
        node: NodeKey,
        pid: u32,
        gpu_ids: Vec<u32>,
        now_ns: u64,
        out: &mut Out,
    ) {
        if !self.leases.classes.contains_key(&class) {
            out.node(ToNode::LeaseReturn { lease: id, reusable: true, node });
            return;
        }
        if self.leases.leases.contains_key(&id) {
            return; // said twice
        }
        let entry = self.leases.class(class);
        entry.requested = entry.requested.saturating_sub(1);
        entry.granted += 1;
        if self.objects.is_dead(worker) {
            // Whoever is known to have ended is not asked after again: what it was given would wait for ever.
            self.update_demand(class, out);
            return;
        }
        let lease = Lease {
            worker,
            node,
            pid,
            class,
            gpu_ids,
            in_flight: VecDeque::new(),
            load_ns: 0,
            blocked: false,
            stealing: false,
            reclaim: false,
            granted_ns: now_ns,
            idle_since_ns: None,
        };
        self.leases.leases.insert(id, lease);
        self.leases.by_worker.insert(worker, id);
        self.leases.class(class).leases.push(id);
        self.pump(class, now_ns, out);
    }

    /// No worker of this class can be had at all: what waits for one fails, under `code`. What runs goes on.
    pub fn handle_lease_failed(&mut self, class: ClassId, reason: &str, code: ErrorCode, now_ns: u64, out: &mut Out) {
        if !self.leases.classes.contains_key(&class) {
            return;
        }
        let entry = self.leases.class(class);
        entry.requested = 0;
        for task in std::mem::take(&mut entry.queue) {
            let text = format!("Task {task} could not be given a worker: {reason}");
            self.finish_with(task, &Payload::error(code, &text), now_ns, out);
        }
    }

    /// Others wait for what this lease holds, or do so no longer. What cannot come back at once is said to be in
    /// use: the node looks elsewhere meanwhile. What is not known here was returned, or its grant was lost on the way.
    pub fn handle_lease_reclaim(&mut self, id: LeaseId, wanted: bool, node: NodeKey, now_ns: u64, out: &mut Out) {
        let Some(lease) = self.leases.leases.get_mut(&id) else {
            if wanted {
                out.node(ToNode::LeaseReturn { lease: id, reusable: true, node });
            }
            return;
        };
        lease.reclaim = wanted;
        if wanted {
            self.pump_lease(id, now_ns, out);
            if self.leases.leases.contains_key(&id) {
                out.node(ToNode::LeaseKept { lease: id, node });
            }
        }
    }

    pub(crate) fn pump_lease(&mut self, id: LeaseId, now_ns: u64, out: &mut Out) {
        let Some(lease) = self.leases.leases.get(&id) else {
            return;
        };
        let class = lease.class;
        if lease.reclaim && lease.in_flight.is_empty() && !lease.blocked && now_ns >= lease.granted_ns + TURN_NS {
            self.return_lease(id, out);
        }
        self.pump(class, now_ns, out);
    }

    fn return_lease(&mut self, id: LeaseId, out: &mut Out) {
        if let Some(Lease { node, .. }) = self.remove_lease(id) {
            out.node(ToNode::LeaseReturn { lease: id, reusable: true, node });
        }
    }

    fn remove_lease(&mut self, id: LeaseId) -> Option<Lease> {
        let lease = self.leases.leases.remove(&id)?;
        self.leases.by_worker.remove(&lease.worker);
        self.leases.class(lease.class).leases.retain(|l| *l != id);
        Some(lease)
    }

    /// The worker gave back what it had not started; `blocked`: and wants nothing for now.
    pub(crate) fn handle_returned(
        &mut self,
        from: ProcId,
        tasks: &[TaskId],
        blocked: bool,
        now_ns: u64,
        out: &mut Out,
    ) {
        let Some(&id) = self.leases.by_worker.get(&from) else {
            return;
        };
        let lease = self.leases.leases.get_mut(&id).expect("indexed");
        lease.stealing = false;
        lease.blocked |= blocked;
        let class = lease.class;
        for &task in tasks.iter().rev() {
            let lease = self.leases.leases.get_mut(&id).expect("indexed");
            let before = lease.in_flight.len();
            lease.in_flight.retain(|t| *t != task);
            if lease.in_flight.len() == before {
                continue;
            }
            let Some(entry) = self.tasks.get_mut(&task) else {
                continue;
            };
            if entry.cancelled {
                let error = Payload::error(ErrorCode::Cancelled, &format!("Task {task} was cancelled."));
                self.finish_with(task, &error, now_ns, out);
                continue;
            }
            entry.place = Place::Queued;
            self.leases.class(class).queue.push_front(task);
        }
        self.recompute_load(id);
        self.pump(class, now_ns, out);
    }

    /// The worker will end: it is given nothing more, and what it was given and did not answer was not
    /// started. The node ends the lease with the process.
    pub(crate) fn handle_leaving(&mut self, from: ProcId, now_ns: u64, out: &mut Out) {
        if let Some(&id) = self.leases.by_worker.get(&from) {
            self.give_up_lease(id, now_ns, out);
        }
    }

    fn recompute_load(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.leases.get(&id) else {
            return;
        };
        let load = lease
            .in_flight
            .iter()
            .filter_map(|t| self.tasks.get(t))
            .map(|e| self.definitions[e.def].run_ns.unwrap_or(UNKNOWN_NS))
            .sum();
        if let Some(lease) = self.leases.leases.get_mut(&id) {
            lease.load_ns = load;
        }
    }

    pub(crate) fn handle_unblocked(&mut self, from: ProcId, now_ns: u64, out: &mut Out) {
        let Some(&id) = self.leases.by_worker.get(&from) else {
            return;
        };
        if let Some(lease) = self.leases.leases.get_mut(&id) {
            lease.blocked = false;
        }
        self.pump_lease(id, now_ns, out);
    }

    /// An answer for a task that had been given up: only the lease remembers it.
    pub(crate) fn forget_in_flight(&mut self, from: ProcId, task: TaskId, now_ns: u64, out: &mut Out) {
        if let Some(&id) = self.leases.by_worker.get(&from) {
            self.leases.task_left(id, task);
            self.pump_lease(id, now_ns, out);
        }
    }

    /// A worker process ended: what ran on it is repeated or fails, what waited there goes elsewhere.
    pub(crate) fn lose_worker(&mut self, worker: ProcId, cause: &str, death: Death, now_ns: u64, out: &mut Out) {
        let Some(&id) = self.leases.by_worker.get(&worker) else {
            return;
        };
        let Some(lease) = self.remove_lease(id) else { return };
        self.reassign(lease, Some((cause, death)), now_ns, out);
    }

    /// The lease is not ours any more, by our own wish; everything in flight goes elsewhere.
    pub(crate) fn give_up_lease(&mut self, id: LeaseId, now_ns: u64, out: &mut Out) {
        let Some(lease) = self.remove_lease(id) else { return };
        self.reassign(lease, None, now_ns, out);
    }

    fn reassign(&mut self, mut lease: Lease, death: Option<(&str, Death)>, now_ns: u64, out: &mut Out) {
        let ran = if death.is_some() { lease.in_flight.pop_front() } else { None };
        while let Some(task) = lease.in_flight.pop_back() {
            let Some(entry) = self.tasks.get_mut(&task) else {
                continue;
            };
            if entry.cancelled {
                let error = Payload::error(ErrorCode::Cancelled, &format!("Task {task} was cancelled."));
                self.finish_with(task, &error, now_ns, out);
            } else {
                entry.place = Place::Queued;
                self.leases.class(lease.class).queue.push_front(task);
            }
        }
        if let (Some(task), Some((cause, death))) = (ran, death) {
            self.task_lost_worker(task, cause, death, now_ns, out);
        }
        self.pump(lease.class, now_ns, out);
    }

    fn task_lost_worker(&mut self, task: TaskId, cause: &str, death: Death, now_ns: u64, out: &mut Out) {
        let oom_retries = self.task_oom_retries;
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        let definition = &self.definitions[entry.def];
        let (name, max_retries) = (&definition.call.name, definition.max_retries);
        if entry.cancelled {
            let error = Payload::error(ErrorCode::Cancelled, &format!("Task {task} was cancelled."));
            self.finish_with(task, &error, now_ns, out);
            return;
        }
        let code = if death == Death::Crashed { ErrorCode::WorkerCrashed } else { ErrorCode::OutOfMemory };
        let text = match death {
            Death::Evicted if max_retries != 0 => {
                if oom_retries < 0 || entry.evictions < oom_retries.unsigned_abs() {
                    entry.evictions += 1;
                    self.note_unrun(task, &Payload::error(code, cause), out);
                    self.attempt_again(task, now_ns, out);
                    return;
                }
                format!(
                    "{name} has failed for want of memory at attempt {}, and RAY_task_oom_retries={oom_retries} allows \
                     no more: {cause}.",
                    entry.attempt + 1
                )
            }
            Death::EvictedAlone | Death::Evicted => format!("{name} has failed for want of memory: {cause}."),
            Death::Crashed | Death::OutOfMemory if entry.retries_left != 0 => {
                self.note_unrun(task, &Payload::error(code, cause), out);
                self.retry(task, now_ns, out);
                return;
            }
            Death::Crashed | Death::OutOfMemory => format!(
                "The worker that ran {name} died: {cause}. It was attempt {}, and no retry is left \
                 (max_retries={max_retries}); raise max_retries if the task may be repeated.",
                entry.attempt + 1,
            ),
        };
        self.finish_with(task, &Payload::error(code, &text), now_ns, out);
    }

    /// When [`Owner::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        self.leases.leases.values().filter_map(|lease| lease.idle_since_ns.map(|since| since + IDLE_NS)).min()
    }

    pub fn handle_timeout(&mut self, now_ns: u64, out: &mut Out) {
        let mut due: Vec<LeaseId> = self
            .leases
            .leases
            .iter()
            .filter(|(_, l)| l.in_flight.is_empty() && l.idle_since_ns.is_some_and(|since| now_ns >= since + IDLE_NS))
            .map(|(id, _)| *id)
            .collect();
        due.sort_unstable();
        for id in due {
            let class = self.leases.leases[&id].class;
            self.return_lease(id, out);
            self.update_demand(class, out);
        }
    }
}
