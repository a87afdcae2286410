//! The executing side of a worker: what it was given, what runs, what it gives back.
//!
//! Work waits in one queue per concurrency group; plain tasks and calls without a group use the
//! unnamed one. The shell's threads take from the queues. References in a piece of work have one
//! local count each from its arrival until [`Executor::forget`] says which to release.
//!
//! Invariants: a task is queued or running, never both; a blocked worker has no plain task queued.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::describe::Unrun;
use crate::ids::{ActorId, FunctionId, ObjectId, ProcId, TaskId};
use crate::msg::{ActorSpec, CallDef, Done, Msg, Push, Returns, Slot};
use crate::owner::{Effect, Out};
use crate::payload::{Blob, ErrorCode, Payload, Value};

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum WorkKind {
    Task,
    CreateActor,
    Call,
}

/// One piece of work for a thread of this process.
#[derive(Clone, Debug)]
pub struct Work {
    pub kind: WorkKind,
    pub task: TaskId,
    /// Where the answer goes.
    pub owner: ProcId,
    pub def: Arc<CallDef>,
    /// The function or class itself.
    pub blob: Option<Blob>,
    pub attempt: u32,
    pub args: Payload,
    pub deps: Vec<(Slot, ObjectId, Value)>,
    pub gpu_ids: Vec<u32>,
    pub actor: Option<ActorLife>,
}

/// What a worker that becomes an actor must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorLife {
    pub actor: ActorId,
    pub incarnation: u32,
    pub max_concurrency: u32,
    pub is_async: bool,
    pub groups: Vec<(String, u32)>,
}

#[derive(Debug)]
pub(crate) struct Running {
    owner: ProcId,
    pub(crate) def: Arc<CallDef>,
    pub(crate) kind: WorkKind,
    pub(crate) attempt: u32,
    pub(crate) since_ns: u64,
    /// What was to be done is done; it stays known for its references.
    pub(crate) is_over: bool,
    cancelled: bool,
    /// Items that the consumer has taken, for back-pressure.
    items_taken: u32,
    consumer_gone: bool,
    /// Arguments that it was told the places of.
    deps: Box<[ObjectId]>,
}

/// Whom the shell must interrupt after a cancellation.
#[derive(Debug, PartialEq, Eq)]
pub enum CancelStep {
    Nothing,
    /// It had not started and is answered.
    Dequeued,
    /// It runs on some thread.
    Interrupt,
}

/// A definition of an owner, and the function that it names, if it names one.
#[derive(Debug)]
struct Known {
    def: Arc<CallDef>,
    blob: Option<Blob>,
}

#[derive(Debug, Default)]
pub struct Executor {
    defs: Map<(ProcId, u32), Known>,
    /// Functions, and how many of `defs` name them.
    functions: Map<FunctionId, (Blob, u32)>,
    queues: Map<String, VecDeque<Work>>,
    running: Map<TaskId, Running>,
    blocked: u32,
    /// Owners that were told that this worker is blocked.
    told_blocked: Vec<ProcId>,
    /// Arguments of work that is here, which have left (or may leave) the places that it was told of.
    evicted: BTreeSet<ObjectId>,
    pub is_actor: bool,
    pub is_async: bool,
    pub exiting: bool,
}

impl Executor {
    pub fn handle_define(&mut self, from: ProcId, id: u32, def: Arc<CallDef>, blob: Option<Blob>) {
        if let Some(blob) = blob {
            self.functions.entry(def.function).or_insert((blob, 0));
        }
        let blob = self.functions.get_mut(&def.function).map(|(blob, uses)| {
            *uses += 1;
            blob.clone()
        });
        if let Some(old) = self.defs.insert((from, id), Known { def, blob }) {
            self.unused(&old);
        }
    }

    /// Work that was taken on has its function with it.
    pub fn handle_forget(&mut self, from: ProcId, ids: &[u32]) {
        for id in ids {
            if let Some(known) = self.defs.remove(&(from, *id)) {
                self.unused(&known);
            }
        }
    }

    fn unused(&mut self, known: &Known) {
        if known.blob.is_none() {
            return;
        }
        if let Some((_, uses)) = self.functions.get_mut(&known.def.function) {
            *uses -= 1;
            if *uses == 0 {
                self.functions.remove(&known.def.function);
            }
        }
    }

    /// How many definitions and functions are known.
    #[must_use]
    pub fn known(&self) -> (usize, usize) {
        (self.defs.len(), self.functions.len())
    }

    /// Takes a task or call; the caller has counted its references.
    /// Returns the group whose queue it joined.
    pub fn handle_push(&mut self, from: ProcId, push: Push, out: &mut Out) -> Option<String> {
        let Some((def, blob)) = self.defs.get(&(from, push.def)).map(|known| (known.def.clone(), known.blob.clone()))
        else {
            let error = Payload::error(ErrorCode::Other, "The worker was sent a call that it does not know.");
            self.answer(from, push.task, vec![Value::Inline(error)], false, 0, 0, out);
            return None;
        };
        if (self.blocked > 0 || self.exiting) && !self.is_actor {
            out.push(Effect::Send { to: from, msg: Msg::Returned { tasks: vec![push.task] }, urgent: true });
            if self.exiting {
                // Its owner was lent this worker before the node knew that it ends: it must not push the same again.
                out.push(Effect::Send { to: from, msg: Msg::Leaving, urgent: true });
            }
            return None;
        }
        let kind = if def.actor.is_some() { WorkKind::Call } else { WorkKind::Task };
        let group = def.group.clone();
        let work = Work {
            kind,
            task: push.task,
            owner: from,
            def,
            blob,
            attempt: push.attempt,
            args: push.args,
            deps: push.deps,
            gpu_ids: push.gpu_ids,
            actor: None,
        };
        let known = self.queues.contains_key(&group);
        let group = if known { group } else { String::new() };
        self.queues.entry(group.clone()).or_default().push_back(work);
        Some(group)
    }

    /// This worker becomes an actor.
    pub fn handle_actor_init(&mut self, spec: ActorSpec, incarnation: u32, gpu_ids: Vec<u32>, owner: ProcId) {
        self.is_actor = true;
        self.is_async = spec.is_async;
        for (group, _) in &spec.groups {
            self.queues.entry(group.clone()).or_default();
        }
        let def = CallDef {
            function: spec.class,
            name: spec.name,
            method: "__init__".into(),
            group: String::new(),
            returns: Returns::Count(0),
            retry_exceptions: false,
            backpressure: 0,
            actor: Some(spec.actor),
            recorded: spec.recorded,
        };
        let life = ActorLife {
            actor: spec.actor,
            incarnation,
            max_concurrency: spec.max_concurrency,
            is_async: spec.is_async,
            groups: spec.groups,
        };
        let work = Work {
            kind: WorkKind::CreateActor,
            task: spec.task,
            owner,
            def: Arc::new(def),
            blob: Some(spec.blob),
            attempt: incarnation,
            args: spec.args,
            deps: spec.deps,
            gpu_ids,
            actor: Some(life),
        };
        self.queues.entry(String::new()).or_default().push_front(work);
    }

    #[must_use]
    pub fn has_work(&self, group: &str) -> bool {
        self.queues.get(group).is_some_and(|queue| !queue.is_empty())
    }

    #[must_use]
    pub fn has_any_work(&self) -> bool {
        self.queues.values().any(|queue| !queue.is_empty())
    }

    /// The next piece of work for a thread of `group`; it counts as running from now on.
    pub fn take(&mut self, group: &str, now_ns: u64) -> Option<Work> {
        let work = self.queues.get_mut(group)?.pop_front()?;
        let deps = work.deps.iter().map(|(_, id, _)| *id).collect();
        let running = Running {
            owner: work.owner,
            def: work.def.clone(),
            kind: work.kind,
            attempt: work.attempt,
            since_ns: now_ns,
            is_over: false,
            cancelled: false,
            items_taken: 0,
            consumer_gone: false,
            deps,
        };
        self.running.insert(work.task, running);
        Some(work)
    }

    /// Any group's work, for event loops, which run them all on one thread.
    pub fn take_any(&mut self, now_ns: u64) -> Option<Work> {
        let mut groups: Vec<&String> = self.queues.iter().filter(|(_, q)| !q.is_empty()).map(|(g, _)| g).collect();
        groups.sort_unstable();
        let group = groups.first().map(|g| (*g).clone())?;
        self.take(&group, now_ns)
    }

    /// A running task ended; sends its results (references handed over by the caller).
    #[expect(clippy::too_many_arguments, reason = "the fields of a `Done`, which only this function makes")]
    pub fn answer(
        &mut self,
        owner: ProcId,
        task: TaskId,
        results: Vec<Value>,
        retryable: bool,
        run_ns: u64,
        items: u32,
        out: &mut Out,
    ) {
        self.running.remove(&task);
        let urgent = !self.has_any_work();
        let done = Done { task, results, retryable, run_ns, items };
        out.push(Effect::Send { to: owner, msg: Msg::Done(done), urgent });
    }

    /// A running task ended without an answer of its own.
    pub fn left(&mut self, task: TaskId) {
        self.running.remove(&task);
    }

    /// The owner wants the place of an object forgotten: work that has it as an argument asks anew where it is.
    pub fn forget_place(&mut self, object: ObjectId) {
        let mut evicted = std::mem::take(&mut self.evicted);
        evicted.insert(object);
        evicted.retain(|object| self.uses(*object));
        self.evicted = evicted;
    }

    /// Whether an argument is where the work that it came with says. What comes later with its right place may be
    /// asked for in vain, too.
    #[must_use]
    pub fn knows_place(&self, object: ObjectId) -> bool {
        !self.evicted.contains(&object)
    }

    /// Whether a piece of work here, queued or running, was told where this object is.
    fn uses(&self, object: ObjectId) -> bool {
        let queued = self.queues.values().flatten().any(|work| work.deps.iter().any(|(_, id, _)| *id == object));
        queued || self.running.values().any(|running| running.deps.contains(&object))
    }

    /// The references that a piece of work counts, to release when it is dropped.
    #[must_use]
    pub fn counted(args: &Payload, deps: &[(Slot, ObjectId, Value)]) -> Vec<ObjectId> {
        let mut ids = args.refs.clone();
        for (_, id, value) in deps {
            ids.extend_from_slice(value.refs());
            if matches!(value, Value::Stored { .. }) {
                ids.push(*id);
            }
        }
        ids
    }

    /// This worker's main thread begins to wait: plain tasks that have not started go back.
    /// Returns their counted references.
    pub fn block(&mut self, out: &mut Out) -> Vec<ObjectId> {
        self.blocked += 1;
        if self.blocked > 1 || self.is_actor {
            return Vec::new();
        }
        let mut by_owner: Vec<(ProcId, Vec<TaskId>)> = Vec::new();
        let mut counted = Vec::new();
        // The running task's owner learns that the worker is blocked even when nothing goes back.
        #[expect(clippy::iter_over_hash_type, reason = "what is collected is sorted below")]
        for running in self.running.values() {
            if !by_owner.iter().any(|(owner, _)| *owner == running.owner) {
                by_owner.push((running.owner, Vec::new()));
            }
        }
        let queue = self.queues.get_mut("").map(std::mem::take).unwrap_or_default();
        for work in queue {
            counted.extend(Self::counted(&work.args, &work.deps));
            if let Some((_, tasks)) = by_owner.iter_mut().find(|(owner, _)| *owner == work.owner) {
                tasks.push(work.task);
            } else {
                by_owner.push((work.owner, vec![work.task]));
            }
        }
        by_owner.sort_unstable_by_key(|(owner, _)| *owner);
        self.told_blocked = by_owner.iter().map(|(owner, _)| *owner).collect();
        for (to, tasks) in by_owner {
            out.push(Effect::Send { to, msg: Msg::Blocked { tasks }, urgent: true });
        }
        counted
    }

    /// This worker will end: what has not started goes back, and nothing more is taken.
    ///
    /// `answered`: all that was started has its answer, so what comes to this worker from now on never ran.
    pub fn leave(&mut self, answered: bool, out: &mut Out) -> Vec<ObjectId> {
        self.exiting = true;
        let mut counted = Vec::new();
        if !self.is_actor {
            for work in self.queues.get_mut("").map(std::mem::take).unwrap_or_default() {
                counted.extend(Self::counted(&work.args, &work.deps));
                out.push(Effect::Send { to: work.owner, msg: Msg::Returned { tasks: vec![work.task] }, urgent: true });
            }
        }
        if answered && !self.is_actor {
            let mut owners: Vec<ProcId> = self.defs.keys().map(|(from, _)| *from).collect();
            owners.sort_unstable();
            owners.dedup();
            for to in owners {
                out.push(Effect::Send { to, msg: Msg::Leaving, urgent: true });
            }
        }
        counted
    }

    pub fn unblock(&mut self, out: &mut Out) {
        self.blocked -= 1;
        if self.blocked > 0 || self.is_actor {
            return;
        }
        // Not those whose tasks run now: one whose task had only been queued waits to hear of it as well.
        for to in std::mem::take(&mut self.told_blocked) {
            out.push(Effect::Send { to, msg: Msg::Unblocked, urgent: false });
        }
    }

    /// Gives back up to `max` tasks from the end of the queue.
    pub fn handle_steal(&mut self, from: ProcId, max: u32, out: &mut Out) -> Vec<ObjectId> {
        let mut tasks = Vec::new();
        let mut counted = Vec::new();
        if let (false, Some(queue)) = (self.is_actor, self.queues.get_mut("")) {
            while tasks.len() < max as usize && queue.back().is_some_and(|work| work.owner == from) {
                let Some(work) = queue.pop_back() else { break };
                counted.extend(Self::counted(&work.args, &work.deps));
                tasks.push(work.task);
            }
        }
        tasks.reverse();
        out.push(Effect::Send { to: from, msg: Msg::Returned { tasks }, urgent: true });
        counted
    }

    pub fn handle_cancel(&mut self, task: TaskId, out: &mut Out) -> (CancelStep, Vec<ObjectId>) {
        #[expect(clippy::iter_over_hash_type, reason = "a task is in one queue")]
        for queue in self.queues.values_mut() {
            if let Some(at) = queue.iter().position(|w| w.task == task) {
                let Some(work) = queue.remove(at) else { continue };
                let error =
                    Payload::error(ErrorCode::Cancelled, &format!("Task {task} was cancelled before it started."));
                let counted = Self::counted(&work.args, &work.deps);
                if work.def.recorded {
                    let (code, text) = error.describe_error();
                    let (attempt, def) = (work.attempt, work.def);
                    out.push(Effect::Unrun(Unrun { task, attempt, def, code, text, since_ns: 0 }));
                }
                self.answer(work.owner, task, vec![Value::Inline(error)], false, 0, 0, out);
                return (CancelStep::Dequeued, counted);
            }
        }
        let Some(running) = self.running.get_mut(&task) else {
            return (CancelStep::Nothing, Vec::new());
        };
        running.cancelled = true;
        (CancelStep::Interrupt, Vec::new())
    }

    #[must_use]
    pub fn is_cancelled(&self, task: TaskId) -> bool {
        self.running.get(&task).is_some_and(|r| r.cancelled || r.consumer_gone)
    }

    pub fn handle_items_taken(&mut self, task: TaskId, taken: u32) {
        if let Some(running) = self.running.get_mut(&task) {
            running.items_taken = running.items_taken.max(taken);
        }
    }

    #[must_use]
    pub fn items_taken(&self, task: TaskId) -> Option<u32> {
        self.running.get(&task).map(|r| r.items_taken)
    }

    /// An owner ended: its queued work is dropped, its running work is not wanted any more.
    /// Returns counted references, and the tasks to interrupt.
    pub fn handle_process_gone(&mut self, proc: ProcId) -> (Vec<ObjectId>, Vec<TaskId>) {
        let mut counted = Vec::new();
        #[expect(clippy::iter_over_hash_type, reason = "what is collected is sorted below")]
        for queue in self.queues.values_mut() {
            queue.retain(|work| {
                let keep = work.owner != proc || work.kind == WorkKind::CreateActor;
                if !keep {
                    counted.extend(Self::counted(&work.args, &work.deps));
                }
                keep
            });
        }
        let mut ids: Vec<u32> = self.defs.keys().filter(|(from, _)| *from == proc).map(|(_, id)| *id).collect();
        ids.sort_unstable();
        self.handle_forget(proc, &ids);
        let mut tasks = Vec::new();
        #[expect(clippy::iter_over_hash_type, reason = "what is collected is sorted below")]
        for (task, running) in &mut self.running {
            if running.owner == proc && !self.is_actor {
                running.consumer_gone = true;
                tasks.push(*task);
            }
        }
        counted.sort_unstable();
        tasks.sort_unstable();
        (counted, tasks)
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = (TaskId, &Running)> {
        self.running.iter().map(|(task, running)| (*task, running))
    }

    /// `__init__` of the actor that this worker becomes has ended: its task, attempt and start, the first time.
    pub fn end_creation(&mut self) -> Option<(TaskId, Arc<CallDef>, u32, u64)> {
        let creates =
            |(_, running): &(&TaskId, &mut Running)| running.kind == WorkKind::CreateActor && !running.is_over;
        let (task, running) = self.running.iter_mut().find(creates)?;
        running.is_over = true;
        Some((*task, running.def.clone(), running.attempt, running.since_ns))
    }

    /// Whether the main thread of this worker waits in the middle of a task.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked > 0
    }

    #[must_use]
    pub fn running_count(&self) -> usize {
        self.running.len()
    }
}
