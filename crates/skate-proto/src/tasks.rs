//! Tasks from their owner's side: dependencies, results, retries, cancellation, lineage.
//!
//! A task waits for its top-level arguments, then in its class for a worker (see `leases`) or in its
//! actor's queue (see `actors`). While it is unfinished it counts its arguments' references. It is
//! kept after its end only as *lineage*, when a result lies in shared memory and could be lost.
//!
//! A definition lives as long as templates and tasks use it. Equal ones are one. [`UNUSED_DEFINITIONS_MAX`]
//! that nobody uses are kept, because programs make the same one again and again
//! (`f.options(...).remote()`); then the oldest is forgotten, here and by the workers that know it, and a
//! later equal one starts without a measured run time.
//!
//! Invariants: each unfinished task is in exactly one place; each of its results gets exactly one
//! value; its arguments are released once; a task's definition is not forgotten before the task.

use std::collections::VecDeque;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::describe::Unrun;
use crate::ids::{ActorId, LeaseId, NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use crate::leases::ClassId;
use crate::msg::{CallDef, Done, Msg, Push, Reason, Returns, Slot, WaitsFor};
use crate::objects::Gone;
use crate::owner::{Effect, LINEAGE_BYTES_MAX, Map, Out, Owner, ToNode};
use crate::payload::{Blob, ErrorCode, Payload, Value};
use crate::streams::Stream;

/// Definitions that are remembered although nothing uses them.
pub const UNUSED_DEFINITIONS_MAX: usize = 256;

/// Remote functions with their options. A number is used again when its definition was forgotten.
#[derive(Debug, Default)]
pub(crate) struct Definitions {
    slots: Vec<Definition>,
    vacant: Vec<u32>,
    by_content: Map<(Arc<CallDef>, Option<ClassId>, i32), u32>,
    /// Those that came to be unused, oldest first; some may be in use again.
    unused: VecDeque<u32>,
}

impl Definitions {
    pub(crate) fn len(&self) -> usize {
        self.by_content.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Definition> {
        self.slots.iter_mut()
    }
}

impl std::ops::Index<u32> for Definitions {
    type Output = Definition;
    fn index(&self, number: u32) -> &Definition {
        &self.slots[number as usize]
    }
}

impl std::ops::IndexMut<u32> for Definitions {
    fn index_mut(&mut self, number: u32) -> &mut Definition {
        &mut self.slots[number as usize]
    }
}

/// A remote function with its options, as its owner knows it.
#[derive(Debug)]
pub struct Definition {
    /// Templates and tasks that refer to it.
    users: u32,
    /// Whether it stands in `unused`.
    listed: bool,
    pub(crate) call: Arc<CallDef>,
    pub(crate) blob: Blob,
    pub(crate) class: Option<ClassId>,
    pub(crate) max_retries: i32,
    /// Moving average of run times; `None` until the first result.
    pub(crate) run_ns: Option<u64>,
    pub(crate) known_at: SmallVec<[ProcId; 4]>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// For arguments.
    Waiting,
    /// In its class, for a worker.
    Queued,
    Pushed(LeaseId),
    /// In the queue of its actor, not sent.
    Called,
    /// Sent to this life of its actor.
    Sent {
        proc: ProcId,
        incarnation: u32,
    },
    /// Finished, kept as lineage.
    Finished,
}

#[derive(Debug)]
pub(crate) struct TaskEntry {
    pub(crate) def: u32,
    pub(crate) args: Payload,
    pub(crate) deps: Vec<(Slot, ObjectId)>,
    pub(crate) missing: u32,
    pub(crate) retries_left: i32,
    pub(crate) attempt: u32,
    /// Attempts that the memory watch has ended.
    pub(crate) evictions: u32,
    pub(crate) place: Place,
    pub(crate) actor: Option<ActorId>,
    pub(crate) handle: Option<ObjectId>,
    pub(crate) parent: Option<TaskId>,
    pub(crate) cancelled: bool,
    pub(crate) stored_results: u32,
    pub(crate) submitted_ns: u64,
    pub(crate) pushed_ns: u64,
}

/// A call was not accepted.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// The actor has this many unfinished calls of this process already.
    TooManyPendingCalls(u32),
}

impl Owner {
    /// Registers a use of a remote function; the number names it in `submit`, until [`Self::undefine`].
    pub fn define(&mut self, call: CallDef, blob: Blob, class: Option<ClassId>, max_retries: i32) -> u32 {
        let call = Arc::new(call);
        let key = (call.clone(), class, max_retries);
        if let Some(&number) = self.definitions.by_content.get(&key) {
            self.definitions[number].users += 1;
            return number;
        }
        if let Some(class) = class {
            self.leases.class_used(class);
        }
        let new = Definition {
            users: 1,
            listed: false,
            call,
            blob,
            class,
            max_retries,
            run_ns: None,
            known_at: SmallVec::new(),
        };
        let number = match self.definitions.vacant.pop() {
            Some(number) => {
                self.definitions[number] = new;
                number
            }
            None => {
                self.definitions.slots.push(new);
                u32::try_from(self.definitions.slots.len() - 1).expect("fewer than 2^32 definitions")
            }
        };
        self.definitions.by_content.insert(key, number);
        number
    }

    /// One use less.
    pub fn undefine(&mut self, number: u32, out: &mut Out) {
        let definition = &mut self.definitions[number];
        assert!(definition.users > 0, "a definition was dropped more often than used");
        definition.users -= 1;
        if definition.users > 0 || definition.listed {
            return;
        }
        definition.listed = true;
        self.definitions.unused.push_back(number);
        while self.definitions.unused.len() > UNUSED_DEFINITIONS_MAX {
            let Some(oldest) = self.definitions.unused.pop_front() else {
                return;
            };
            self.definitions[oldest].listed = false;
            if self.definitions[oldest].users == 0 {
                self.forget_definition(oldest, out);
            }
        }
    }

    fn forget_definition(&mut self, number: u32, out: &mut Out) {
        let vacant = Definition {
            users: 0,
            listed: false,
            call: self.definitions[number].call.clone(),
            blob: Blob::empty(),
            class: None,
            max_retries: 0,
            run_ns: None,
            known_at: SmallVec::new(),
        };
        let old = std::mem::replace(&mut self.definitions[number], vacant);
        self.definitions.by_content.remove(&(old.call.clone(), old.class, old.max_retries));
        self.definitions.vacant.push(number);
        for proc in old.known_at {
            if let Some(known) = self.functions_at.get_mut(&proc) {
                if let Some(count) = known.get_mut(&old.call.function) {
                    *count -= 1;
                    if *count == 0 {
                        known.remove(&old.call.function);
                    }
                }
                if known.is_empty() {
                    self.functions_at.remove(&proc);
                }
            }
            out.push(Effect::Send { to: proc, msg: Msg::Forget { ids: vec![number] }, urgent: false });
        }
        if let Some(class) = old.class {
            self.leases.class_unused(class);
        }
    }

    #[must_use]
    pub fn definition(&self, number: u32) -> &CallDef {
        &self.definitions[number].call
    }

    /// Takes a call. Its results (`ObjectId { task, index }`) have one local count each.
    #[expect(clippy::too_many_arguments, reason = "the parts of a call; on the hot path")]
    pub fn submit(
        &mut self,
        def: u32,
        args: Payload,
        deps: Vec<(Slot, ObjectId)>,
        handle: Option<ObjectId>,
        parent: Option<TaskId>,
        now_ns: u64,
        out: &mut Out,
    ) -> Result<TaskId, Refused> {
        let actor = self.definitions[def].call.actor;
        if let Some(actor) = actor {
            self.admit_call(actor)?;
        }
        let definition = &self.definitions[def];
        let returns = definition.call.returns;
        let retries_left = definition.max_retries;
        let task = self.next_task_id();
        for &inner in &args.refs {
            self.objects.retain(inner);
        }
        if let Some(handle) = handle {
            self.objects.retain(handle);
        }
        match returns {
            Returns::Count(count) => {
                (0..count).for_each(|index| self.objects.create(ObjectId { task, index }, None, None))
            }
            Returns::Streaming | Returns::Dynamic => {
                self.objects.create(ObjectId { task, index: 0 }, None, None);
                self.streams.insert(task, Stream::default());
            }
        }
        let missing = self.watch_dependencies(task, &deps, out);
        let place = if actor.is_some() { Place::Called } else { Place::Waiting };
        let entry = TaskEntry {
            def,
            args,
            deps,
            missing,
            retries_left,
            attempt: 0,
            evictions: 0,
            place,
            actor,
            handle,
            parent,
            cancelled: false,
            stored_results: 0,
            submitted_ns: now_ns,
            pushed_ns: 0,
        };
        self.definitions[def].users += 1;
        self.tasks.insert(task, entry);
        if let Some(actor) = actor {
            self.enqueue_call(actor, task, now_ns, out);
        } else if missing == 0 {
            self.start(task, now_ns, out);
        }
        Ok(task)
    }

    /// Counts the dependencies and registers for those that are not ready.
    pub(crate) fn watch_dependencies(&mut self, task: TaskId, deps: &[(Slot, ObjectId)], out: &mut Out) -> u32 {
        let mut missing = 0;
        for &(_, id) in deps {
            self.objects.retain(id);
            missing += u32::from(self.watch_dependency(task, id, out));
        }
        missing
    }

    pub(crate) fn watch_dependency(&mut self, task: TaskId, id: ObjectId, out: &mut Out) -> bool {
        let owned = self.objects.is_owned(id);
        self.objects.doom(id);
        let Some(entry) = self.objects.entry(id) else {
            return false;
        };
        if entry.value.is_some() {
            return false;
        }
        entry.dependents.push(task);
        if !owned {
            self.objects.resolve(id, out);
        }
        true
    }

    pub(crate) fn dependency_ready(&mut self, task: TaskId, now_ns: u64, out: &mut Out) {
        if let Some((_, entry)) = self.creations.get_mut(&task) {
            entry.missing -= 1;
            if entry.missing == 0 {
                self.start_creation(task, now_ns, out);
            }
            return;
        }
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        entry.missing = entry.missing.saturating_sub(1);
        if entry.missing > 0 {
            return;
        }
        if let Some(actor) = entry.actor {
            self.call_ready(actor, task, now_ns, out);
        } else if entry.place == Place::Waiting {
            self.start(task, now_ns, out);
        }
    }

    /// All arguments are there: runs the task, or fails it with the first argument's exception.
    fn start(&mut self, task: TaskId, now_ns: u64, out: &mut Out) {
        if let Some(error) = self.failed_dependency(task) {
            self.finish_with(task, &error, now_ns, out);
            return;
        }
        self.enqueue(task, false, now_ns, out);
    }

    /// Whether the values of all arguments are there, as they were when it was started: one may have been
    /// lost since.
    pub(crate) fn has_arguments(&self, task: TaskId) -> bool {
        self.tasks.get(&task).is_none_or(|entry| entry.deps.iter().all(|(_, id)| self.objects.is_ready(*id)))
    }

    /// Waits anew for arguments that were lost.
    pub(crate) fn await_arguments(&mut self, task: TaskId, out: &mut Out) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.actor.is_none() {
            entry.place = Place::Waiting;
        }
        let deps: Vec<ObjectId> = entry.deps.iter().map(|(_, id)| *id).collect();
        let mut missing = 0;
        for id in deps {
            missing += u32::from(self.watch_dependency(task, id, out));
        }
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.missing = missing;
        }
    }

    pub(crate) fn failed_dependency(&mut self, task: TaskId) -> Option<Payload> {
        let Self { tasks, objects, .. } = self;
        let entry = tasks.get(&task)?;
        entry.deps.iter().find_map(|(_, id)| match objects.read(*id) {
            Some(Value::Inline(payload)) if payload.is_error() => Some(payload.clone()),
            _ => None,
        })
    }

    /// The message that runs a task at `to`, after what that worker must know first.
    pub(crate) fn push_message(&mut self, task: TaskId, to: ProcId, gpu_ids: &[u32], out: &mut Out) -> Msg {
        let entry = &self.tasks[&task];
        let def = entry.def;
        let args = entry.args.clone();
        let attempt = entry.attempt;
        let dep_ids: SmallVec<[(Slot, ObjectId); 2]> = entry.deps.iter().cloned().collect();
        self.introduce(def, to, out);
        self.objects.hand_over(&args.refs, to, out);
        let mut deps = Vec::with_capacity(dep_ids.len());
        for (slot, id) in dep_ids {
            self.objects.touch(id);
            let value = self.objects.value(id).cloned().expect("a started task has all its arguments");
            self.objects.hand_over(value.refs(), to, out);
            // The reader of a stored argument holds the object itself, which keeps the block.
            if matches!(value, Value::Stored { .. }) {
                self.objects.hand_over(&[id], to, out);
            }
            deps.push((slot, id, value));
        }
        Msg::Push(Push { task, def, attempt, args, deps, gpu_ids: gpu_ids.to_vec() })
    }

    fn introduce(&mut self, def: u32, to: ProcId, out: &mut Out) {
        let definition = &mut self.definitions[def];
        if definition.known_at.contains(&to) {
            return;
        }
        definition.known_at.push(to);
        let function = definition.call.function;
        let blob = if definition.blob.is_empty() {
            None
        } else {
            // The worker keeps a function for as long as it knows a definition with it, and counts alike.
            let known = self.functions_at.entry(to).or_default().entry(function).or_insert(0);
            *known += 1;
            (*known == 1).then(|| definition.blob.clone())
        };
        out.send(to, Msg::Define { id: def, def: definition.call.clone(), blob });
    }

    pub(crate) fn handle_done(&mut self, from: ProcId, done: Done, now_ns: u64, out: &mut Out) {
        for value in &done.results {
            self.objects.arrive(value.refs());
        }
        let place = self.tasks.get(&done.task).map(|entry| entry.place);
        let expected = match place {
            Some(Place::Pushed(lease)) => self.leases.worker(lease) == Some(from),
            Some(Place::Sent { proc, .. }) => proc == from,
            _ => false,
        };
        if !expected {
            // The answer of a worker that was given up: what it made is not wanted.
            let mut gone = Gone::default();
            for value in &done.results {
                self.objects.discard(value, &mut gone, out);
            }
            self.settle(gone, out);
            self.forget_in_flight(from, done.task, now_ns, out);
            return;
        }
        let entry = &self.tasks[&done.task];
        let retry = done.retryable && entry.retries_left != 0 && !entry.cancelled;
        let (def, actor) = (entry.def, entry.actor);
        let average = &mut self.definitions[def].run_ns;
        *average = Some(average.map_or(done.run_ns, |old| (old * 7 + done.run_ns) / 8));
        let lease = match place {
            Some(Place::Pushed(lease)) => Some(lease),
            _ => None,
        };
        if let Some(lease) = lease {
            self.leases.task_left(lease, done.task);
        }
        if let Some(actor) = actor {
            self.call_left(actor, done.task);
        }
        if retry {
            let mut gone = Gone::default();
            for value in &done.results {
                self.objects.discard(value, &mut gone, out);
            }
            self.settle(gone, out);
            self.retry(done.task, now_ns, out);
        } else {
            self.complete(done.task, done.results, done.items, now_ns, out);
        }
        if let Some(lease) = lease {
            self.pump_lease(lease, now_ns, out);
        }
    }

    /// Another attempt; the caller has checked that one is left and taken the task from its place.
    pub(crate) fn retry(&mut self, task: TaskId, now_ns: u64, out: &mut Out) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.retries_left > 0 {
            entry.retries_left -= 1;
        }
        self.attempt_again(task, now_ns, out);
    }

    /// Another attempt, whoever is charged for it.
    pub(crate) fn attempt_again(&mut self, task: TaskId, now_ns: u64, out: &mut Out) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        entry.attempt += 1;
        entry.pushed_ns = 0;
        match entry.actor {
            Some(actor) => self.requeue_call(actor, task, now_ns, out),
            None => self.enqueue(task, true, now_ns, out),
        }
    }

    /// Gives every result its value and lets go of the arguments.
    fn complete(&mut self, task: TaskId, mut results: Vec<Value>, items: u32, now_ns: u64, out: &mut Out) {
        let returns = self.definitions[self.tasks[&task].def].call.returns;
        if returns == Returns::Streaming {
            // A worker sends the user's exception as the last item; this is an error of another kind.
            if let Some(Value::Inline(error)) = results.first().filter(|value| value.is_error()) {
                let error = error.clone();
                self.break_stream(task, &error, out);
            }
            self.finish_stream(task, items, out);
        }
        let expected = match returns {
            Returns::Count(count) => count as usize,
            Returns::Streaming | Returns::Dynamic => 1,
        };
        // One error stands for all results.
        if results.len() == 1 && expected > 1 && results[0].is_error() {
            for _ in 1..expected {
                let error = results[0].clone();
                for &inner in error.refs() {
                    self.objects.retain(inner);
                }
                results.push(error);
            }
        }
        while results.len() < expected {
            results.push(Value::Inline(Payload::error(
                ErrorCode::Other,
                "The worker answered with fewer values than the call returns.",
            )));
        }
        let can_repeat = {
            let entry = self.tasks.get_mut(&task).expect("checked by the caller");
            entry.place = Place::Finished;
            // Items cannot be made again yet, and a list of items that are gone would be no help.
            entry.actor.is_none() && entry.retries_left != 0 && returns != Returns::Dynamic
        };
        let mut stored = 0;
        for (index, value) in results.into_iter().enumerate() {
            let id = ObjectId { task, index: u32::try_from(index).unwrap_or(u32::MAX) };
            let is_stored = matches!(value, Value::Stored { .. });
            if is_stored
                && can_repeat
                && let Some(entry) = self.objects.entry(id)
                && entry.lineage.is_none()
            {
                entry.lineage = Some(task);
                stored += 1;
            }
            self.fulfil(id, value, now_ns, out);
        }
        if returns == Returns::Dynamic {
            self.close_dynamic(task, out);
        }
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        entry.stored_results += stored;
        if entry.stored_results > 0 {
            self.lineage_bytes += entry.args.data.len() + 256;
            self.lineage_order.push_back(task);
            self.trim_lineage(out);
        } else {
            self.drop_task(task, out);
        }
    }

    /// The same exception for every result, and the end of the task.
    pub(crate) fn finish_with(&mut self, task: TaskId, error: &Payload, now_ns: u64, out: &mut Out) {
        let Some(entry) = self.tasks.get(&task) else { return };
        if entry.place == Place::Finished {
            return;
        }
        for &inner in &error.refs {
            self.objects.retain(inner);
        }
        self.note_unrun(task, error, out);
        self.complete(task, vec![Value::Inline(error.clone())], u32::MAX, now_ns, out);
    }

    /// An attempt ended here and not by an answer: who keeps history hears of it.
    pub(crate) fn note_unrun(&self, task: TaskId, error: &Payload, out: &mut Out) {
        let Some(entry) = self.tasks.get(&task) else { return };
        let def = self.definitions[entry.def].call.clone();
        if def.recorded {
            let (attempt, since_ns) = (entry.attempt, entry.pushed_ns);
            let (code, text) = error.describe_error();
            out.push(Effect::Unrun(Unrun { task, attempt, def, code, text, since_ns }));
        }
    }

    fn drop_task(&mut self, task: TaskId, out: &mut Out) {
        let Some(entry) = self.tasks.remove(&task) else { return };
        let mut gone = Gone::default();
        for &inner in &entry.args.refs {
            self.objects.release(inner, &mut gone, out);
        }
        for &(_, id) in &entry.deps {
            self.objects.release(id, &mut gone, out);
        }
        if let Some(handle) = entry.handle {
            self.objects.release(handle, &mut gone, out);
        }
        self.settle(gone, out);
        self.undefine(entry.def, out);
    }

    pub(crate) fn lineage_unneeded(&mut self, task: TaskId, out: &mut Out) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        entry.stored_results = entry.stored_results.saturating_sub(1);
        if entry.stored_results == 0 && entry.place == Place::Finished {
            self.lineage_bytes = self.lineage_bytes.saturating_sub(entry.args.data.len() + 256);
            self.drop_task(task, out);
            // The order may keep a few names of tasks that are gone; bounded by what is alive.
            if self.lineage_order.len() > 2 * self.tasks.len() + 64 {
                let tasks = &self.tasks;
                self.lineage_order.retain(|t| tasks.get(t).is_some_and(|e| e.place == Place::Finished));
            }
        }
    }

    fn trim_lineage(&mut self, out: &mut Out) {
        while self.lineage_bytes > LINEAGE_BYTES_MAX {
            let Some(oldest) = self.lineage_order.pop_front() else {
                return;
            };
            if let Some(entry) = self.tasks.get(&oldest)
                && entry.place == Place::Finished
            {
                self.lineage_bytes = self.lineage_bytes.saturating_sub(entry.args.data.len() + 256);
                self.drop_task(oldest, out);
            }
        }
    }

    /// A reader of this process did not find the segment of a stored value. The owner is told; who waits for
    /// the object from now on waits for its answer, which is the value at another place, or an error.
    pub fn report_missing(&mut self, object: ObjectId, node: NodeKey, segment: SegmentId, now_ns: u64, out: &mut Out) {
        if object.owner() == self.me {
            self.handle_missing(object, node, segment, now_ns, out);
            return;
        }
        if self.objects.location(object).is_some_and(|at| (at.node, at.segment) == (node, segment)) {
            let mut gone = Gone::default();
            self.objects.forget_value(object, &mut gone, out);
            self.settle(gone, out);
        }
        out.send(object.owner(), Msg::Missing { object, node, segment });
    }

    /// A stored value is not where it was: it is made again if its task is known.
    pub fn handle_missing(&mut self, object: ObjectId, node: NodeKey, segment: SegmentId, now_ns: u64, out: &mut Out) {
        if self.objects.location(object).is_none_or(|at| (at.node, at.segment) != (node, segment)) {
            return;
        }
        let mut gone = Gone::default();
        self.objects.forget_value(object, &mut gone, out);
        self.settle(gone, out);
        let lineage = self.objects.entry(object).and_then(|entry| entry.lineage);
        if lineage.is_some_and(|task| self.tasks.get(&task).is_some_and(|entry| entry.place != Place::Finished)) {
            return; // it comes with another result of the same task, which is being made again already
        }
        let can = lineage.is_some_and(|task| {
            self.tasks.get(&task).is_some_and(|e| e.place == Place::Finished && e.retries_left != 0)
        });
        let (Some(task), true) = (lineage, can) else {
            let place = match self.lost_nodes.get(&node) {
                Some(cause) => format!("its node ({cause})"),
                None => format!("its shared memory on node {:016x}", node.0),
            };
            let text = format!(
                "Object {object} was lost with {place}, and there is no task that could make it again (it was put, is \
                 the result of an actor's method, its lineage exceeded the budget, or max_retries is used up)."
            );
            self.fulfil(object, Value::Inline(Payload::error(ErrorCode::ObjectLost, &text)), now_ns, out);
            return;
        };
        self.forget_results_beside(task, node, segment, out);
        let entry = self.tasks.get_mut(&task).expect("checked above");
        self.lineage_bytes = self.lineage_bytes.saturating_sub(entry.args.data.len() + 256);
        if entry.retries_left > 0 {
            entry.retries_left -= 1;
        }
        entry.attempt += 1;
        self.await_arguments(task, out);
        if self.tasks.get(&task).is_some_and(|entry| entry.missing == 0) {
            self.start(task, now_ns, out);
        }
    }

    /// Other results of a task that were lost together with one: making them again costs one repetition, not one each.
    fn forget_results_beside(&mut self, task: TaskId, node: NodeKey, segment: SegmentId, out: &mut Out) {
        let Returns::Count(count) = self.definitions[self.tasks[&task].def].call.returns else { return };
        for index in 0..count {
            let id = ObjectId { task, index };
            let is_lost = |at: crate::location::Location| {
                at.node == node && (at.segment == segment || self.lost_nodes.contains_key(&node))
            };
            if self.objects.location(id).is_some_and(is_lost) {
                let mut gone = Gone::default();
                self.objects.forget_value(id, &mut gone, out);
                self.settle(gone, out);
            }
        }
    }

    /// Stops the task that makes `object`; its results become `TaskCancelledError`.
    ///
    /// `force` ends the worker process; `recursive` includes the tasks that it submitted.
    pub fn cancel(&mut self, object: ObjectId, force: bool, recursive: bool, now_ns: u64, out: &mut Out) {
        if object.owner() != self.me {
            out.send(object.owner(), Msg::CancelObject { object, force, recursive });
            return;
        }
        let task = object.task;
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.place == Place::Finished {
            return;
        }
        entry.cancelled = true;
        let text = format!("Task {task} was cancelled.");
        let error = Payload::error(ErrorCode::Cancelled, &text);
        match entry.place {
            Place::Waiting | Place::Finished => self.finish_with(task, &error, now_ns, out),
            Place::Queued => {
                let class = self.definitions[entry.def].class;
                self.leases.unqueue(task, &self.definitions, entry.def);
                self.finish_with(task, &error, now_ns, out);
                if let Some(class) = class {
                    self.update_demand(class, out);
                }
            }
            Place::Called => {
                let actor = entry.actor.expect("a call has an actor");
                self.call_left(actor, task);
                self.finish_with(task, &error, now_ns, out);
                self.flush_calls(actor, now_ns, out);
            }
            Place::Pushed(lease) => {
                let (Some(worker), Some(node)) = (self.leases.worker(lease), self.leases.node(lease)) else {
                    return;
                };
                if force {
                    // The node kills the worker; what else it had is given to others.
                    self.finish_with(task, &error, now_ns, out);
                    self.leases.task_left(lease, task);
                    out.node(ToNode::LeaseReturn { lease, reusable: false, node });
                    self.give_up_lease(lease, now_ns, out);
                } else {
                    out.send(worker, Msg::Cancel { task, recursive });
                }
            }
            Place::Sent { proc, .. } => out.send(proc, Msg::Cancel { task, recursive }),
        }
    }

    /// Whether an object is the result of a call to an actor, as far as this process knows.
    #[must_use]
    pub fn is_actor_call(&self, object: ObjectId) -> bool {
        self.tasks.get(&object.task).is_some_and(|entry| entry.actor.is_some())
    }

    /// Cancels what `parent`, which runs in this process, has submitted.
    pub fn cancel_children(&mut self, parent: TaskId, now_ns: u64, out: &mut Out) {
        let mut children: Vec<TaskId> =
            self.tasks.iter().filter(|(_, e)| e.parent == Some(parent)).map(|(id, _)| *id).collect();
        children.sort_unstable();
        for task in children {
            self.cancel(ObjectId { task, index: 0 }, false, true, now_ns, out);
        }
    }

    /// Why an object has no value yet: one sentence, and the object to ask about next.
    #[must_use]
    pub fn why(&self, id: ObjectId, now_ns: u64) -> Reason {
        let because = |text: String, waits_for| Reason { text, waits_for };
        if let Some(value) = self.objects.value(id) {
            let what = if value.is_error() { "it is there: an exception" } else { "it is there" };
            return because(what.into(), WaitsFor::Nothing);
        }
        if id.owner() != self.me {
            return because("it belongs to another process".into(), WaitsFor::Owner);
        }
        if let Some(awaited) = self.promises.get(&id) {
            return because(format!("it waits until {awaited}"), WaitsFor::Nothing);
        }
        let Some(entry) = self.tasks.get(&id.task) else {
            return because("no task of its owner makes it".into(), WaitsFor::Nothing);
        };
        let definition = &self.definitions[entry.def];
        let name = &definition.call.name;
        let attempt = if entry.attempt > 0 { format!(" (attempt {})", entry.attempt + 1) } else { String::new() };
        let ends = if entry.cancelled { "; it is being cancelled" } else { "" };
        if entry.missing > 0 {
            let dep = entry.deps.iter().map(|(_, id)| *id).find(|id| !self.objects.is_ready(*id));
            let text = format!("{name}{attempt} waits for {} of its arguments", entry.missing);
            return because(text, dep.map_or(WaitsFor::Nothing, WaitsFor::Object));
        }
        let seconds = now_ns.saturating_sub(entry.pushed_ns) as f64 / 1e9;
        match entry.place {
            Place::Waiting | Place::Queued => because(
                format!("{name}{attempt} waits for a worker"),
                definition.class.map_or(WaitsFor::Nothing, |class| WaitsFor::Lease(class.0)),
            ),
            Place::Called => match entry.actor.and_then(|actor| self.call_in_front(actor, id.task)) {
                Some((first, missing)) => because(
                    format!("{name}{attempt} waits behind an earlier call, {first}, which waits for its argument"),
                    WaitsFor::Object(missing),
                ),
                None => because(
                    format!("{name}{attempt} waits in the queue of its actor"),
                    entry.actor.map_or(WaitsFor::Nothing, WaitsFor::Actor),
                ),
            },
            Place::Pushed(lease) => {
                let pid = self.leases.pid(lease).unwrap_or(0);
                let streams = definition.call.returns == Returns::Streaming && definition.call.backpressure > 0;
                let there = match self.leases.tasks_before(lease, id.task) {
                    0 if self.leases.is_blocked(lease) && streams => {
                        "it waits until its consumer takes an item, or in ray.get() or ray.wait()".into()
                    }
                    0 if self.leases.is_blocked(lease) => "it runs, and waits in ray.get() or ray.wait() itself".into(),
                    0 => "it runs".into(),
                    before => format!("{before} other tasks come first"),
                };
                because(
                    format!("{name}{attempt} was given to worker pid={pid} {seconds:.1} s ago, where {there}{ends}"),
                    WaitsFor::Nothing,
                )
            }
            Place::Sent { .. } => {
                let before = entry.actor.map_or(0, |actor| self.calls_before(actor, id.task));
                let there = match before {
                    0 => "it runs, or waits for calls of others".into(),
                    _ => format!("{before} earlier calls of this process are not done"),
                };
                because(
                    format!("{name}{attempt} was sent to its actor {seconds:.1} s ago, where {there}{ends}"),
                    entry.actor.map_or(WaitsFor::Nothing, WaitsFor::Actor),
                )
            }
            Place::Finished => because("its task has ended".into(), WaitsFor::Nothing),
        }
    }
}
