//! Actors from their callers' side: where the actor lives now, and the calls on their way to it.
//!
//! Calls go straight to the actor's process, in the order of submission; the connection keeps it. A
//! call whose arguments are not there holds back those behind it, unless the actor takes its calls in any
//! order, as asynchronous and threaded ones do. Which life of an actor is the current one is told by the
//! node (`ActorState`); until it says so, calls wait here.
//!
//! Invariants: a call is in one of `unready`, `queue` and `sent`; `sent` belongs to one incarnation; when the
//! actor is dead all are empty.

use std::collections::{BTreeSet, VecDeque};

use crate::ids::{ActorId, FunctionId, NodeKey, ObjectId, ProcId, TaskId};
use crate::msg::{ActorSpec, Msg, Slot};
use crate::owner::{Effect, Out, Owner, ToNode};
use crate::payload::{Blob, ErrorCode, Payload, Value};
use crate::tasks::{Place, Refused, TaskEntry};

/// Where an actor stands, as the node last said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActorState {
    Pending,
    Alive { proc: ProcId, node: NodeKey, incarnation: u32 },
    Restarting,
    Dead(Payload),
}

#[derive(Debug)]
pub struct ActorClient {
    pub(crate) state: ActorState,
    /// Calls that wait for arguments beside the queue.
    unready: BTreeSet<TaskId>,
    queue: VecDeque<TaskId>,
    sent: VecDeque<TaskId>,
    /// Largest number of unfinished calls; negative: no limit.
    max_pending: i32,
    any_order: bool,
    subscribed: bool,
    creation: Option<TaskId>,
    detached: bool,
    /// This process asked for the end of the current life: calls made since are for the next one.
    killed: bool,
}

impl ActorClient {
    fn new() -> Self {
        Self {
            state: ActorState::Pending,
            unready: BTreeSet::new(),
            queue: VecDeque::new(),
            sent: VecDeque::new(),
            max_pending: -1,
            any_order: false,
            subscribed: false,
            creation: None,
            detached: false,
            killed: false,
        }
    }
}

/// An actor to be made, as its owner describes it to the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    pub actor: ActorId,
    pub class: FunctionId,
    pub blob: Blob,
    pub place: Vec<(String, i64)>,
    pub run: Vec<(String, i64)>,
    pub env: Vec<u8>,
    pub strategy: Vec<u8>,
    pub name: String,
    pub namespace: String,
    pub class_name: String,
    pub label: String,
    pub max_restarts: i32,
    pub max_pending_calls: i32,
    pub max_concurrency: u32,
    pub is_async: bool,
    pub groups: Vec<(String, u32)>,
    pub detached: bool,
    /// Whether history is kept of its creation.
    pub recorded: bool,
}

impl Owner {
    /// A new actor's id, and the object that will count its handles.
    pub fn next_actor_id(&mut self) -> (ActorId, ObjectId) {
        let task = self.next_task_id();
        (ActorId { proc: self.me, seq: task.seq }, ObjectId { task, index: ObjectId::ACTOR_INDEX })
    }

    /// Counts a handle that came from the node (`get_actor`) or from pickled bytes. If no message handed
    /// it over, the owner is told now: should it have let go of the actor already, the actor is dead and
    /// the node says so.
    pub fn hold_handle(&mut self, handle: ObjectId, out: &mut Out) {
        let known = self.objects.is_known(handle);
        self.objects.retain(handle);
        if !known && !self.objects.is_owned(handle) {
            self.objects.adopt_token(handle);
            out.send(handle.owner(), Msg::AddBorrower { object: handle, proc: self.me });
        }
    }

    /// The node of an actor that is alive.
    pub(crate) fn home(&self, actor: ActorId) -> Option<NodeKey> {
        match self.actors.get(&actor)?.state {
            ActorState::Alive { node, .. } => Some(node),
            _ => None,
        }
    }

    /// Asks the node for an actor, once its arguments are there.
    pub fn create_actor(
        &mut self,
        creation: Creation,
        args: Payload,
        deps: Vec<(Slot, ObjectId)>,
        now_ns: u64,
        out: &mut Out,
    ) {
        let actor = creation.actor;
        let task = self.next_task_id();
        for &inner in &args.refs {
            self.objects.retain(inner);
        }
        let missing = self.watch_dependencies(task, &deps, out);
        let client = self.actors.entry(actor).or_insert_with(ActorClient::new);
        client.max_pending = creation.max_pending_calls;
        client.creation = Some(task);
        client.detached = creation.detached;
        let entry = TaskEntry {
            def: u32::MAX,
            args,
            deps,
            missing,
            retries_left: 0,
            attempt: 0,
            evictions: 0,
            place: Place::Waiting,
            actor: None,
            handle: None,
            parent: None,
            cancelled: false,
            stored_results: 0,
            submitted_ns: now_ns,
            pushed_ns: now_ns,
        };
        self.creations.insert(task, (creation, entry));
        if missing == 0 {
            self.start_creation(task, now_ns, out);
        }
    }

    pub(crate) fn start_creation(&mut self, task: TaskId, now_ns: u64, out: &mut Out) {
        let (creation, entry) = &self.creations[&task];
        let actor = creation.actor;
        let lost: Vec<ObjectId> =
            entry.deps.iter().map(|(_, id)| *id).filter(|id| !self.objects.is_ready(*id)).collect();
        if !lost.is_empty() {
            let mut missing = 0;
            for id in lost {
                missing += u32::from(self.watch_dependency(task, id, out));
            }
            if let Some((_, entry)) = self.creations.get_mut(&task) {
                entry.missing = missing;
            }
            return;
        }
        let mut deps = Vec::with_capacity(entry.deps.len());
        for (slot, id) in &entry.deps {
            match self.objects.read(*id) {
                Some(Value::Inline(payload)) if payload.is_error() => {
                    let error = payload.with_code(ErrorCode::ActorDied);
                    self.handle_actor_state(actor, ActorState::Dead(error), now_ns, out);
                    return;
                }
                Some(value) => deps.push((slot.clone(), *id, value.clone())),
                None => return,
            }
        }
        let spec = ActorSpec {
            recorded: creation.recorded,
            actor,
            task,
            class: creation.class,
            blob: creation.blob.clone(),
            name: creation.label.clone(),
            args: entry.args.clone(),
            deps,
            max_concurrency: creation.max_concurrency,
            is_async: creation.is_async,
            groups: creation.groups.clone(),
        };
        let creation = Box::new(creation.clone());
        out.node(ToNode::ActorCreate { creation, spec: Box::new(spec) });
        self.subscribe(actor, out);
    }

    fn subscribe(&mut self, actor: ActorId, out: &mut Out) {
        let client = self.actors.entry(actor).or_insert_with(ActorClient::new);
        if !client.subscribed {
            client.subscribed = true;
            out.node(ToNode::ActorSubscribe { actor });
        }
    }

    /// How an actor wants to be called: unfinished calls at most (negative: any number), and whether those whose
    /// arguments are there may overtake the others.
    pub fn configure_calls(&mut self, actor: ActorId, max_pending: i32, any_order: bool) {
        let client = self.actors.entry(actor).or_insert_with(ActorClient::new);
        client.max_pending = max_pending;
        client.any_order = any_order;
    }

    #[must_use]
    pub fn actor_state(&self, actor: ActorId) -> Option<&ActorState> {
        self.actors.get(&actor).map(|client| &client.state)
    }

    pub(crate) fn admit_call(&mut self, actor: ActorId) -> Result<(), Refused> {
        let Some(client) = self.actors.get(&actor) else {
            return Ok(());
        };
        match u32::try_from(client.max_pending) {
            Ok(limit)
                if limit > 0 && client.unready.len() + client.queue.len() + client.sent.len() >= limit as usize =>
            {
                Err(Refused::TooManyPendingCalls(limit))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn enqueue_call(&mut self, actor: ActorId, task: TaskId, now_ns: u64, out: &mut Out) {
        let client = self.actors.entry(actor).or_insert_with(ActorClient::new);
        if let ActorState::Dead(error) = &client.state {
            let error = error.clone();
            self.finish_with(task, &error, now_ns, out);
            return;
        }
        if client.any_order && self.tasks.get(&task).is_some_and(|entry| entry.missing > 0) {
            client.unready.insert(task);
        } else {
            client.queue.push_back(task);
        }
        if !self.is_unborn(actor) {
            self.subscribe(actor, out);
        }
        self.flush_calls(actor, now_ns, out);
    }

    /// All arguments of a call are there.
    pub(crate) fn call_ready(&mut self, actor: ActorId, task: TaskId, now_ns: u64, out: &mut Out) {
        if let Some(client) = self.actors.get_mut(&actor)
            && client.unready.remove(&task)
        {
            client.queue.push_back(task);
        }
        self.flush_calls(actor, now_ns, out);
    }

    /// Asks the node to end the actor's current life. Calls made from now on wait for what becomes of it.
    pub fn kill_actor(&mut self, actor: ActorId, no_restart: bool, out: &mut Out) {
        let client = self.actors.entry(actor).or_insert_with(ActorClient::new);
        client.killed = !matches!(client.state, ActorState::Dead(_));
        self.subscribe(actor, out);
        out.node(ToNode::ActorKill { actor, no_restart });
    }

    /// Sends what can be sent, in order.
    pub(crate) fn flush_calls(&mut self, actor: ActorId, now_ns: u64, out: &mut Out) {
        loop {
            let Some(client) = self.actors.get(&actor) else { return };
            let ActorState::Alive { proc, incarnation, .. } = client.state else {
                return;
            };
            if client.killed {
                return;
            }
            let Some(&task) = client.queue.front() else { return };
            let any_order = client.any_order;
            if !self.has_arguments(task) {
                if self.tasks.get(&task).is_some_and(|entry| entry.missing == 0) {
                    self.await_arguments(task, out); // one was lost
                }
                if any_order && let Some(client) = self.actors.get_mut(&actor) {
                    client.queue.pop_front();
                    client.unready.insert(task);
                    continue;
                }
                return;
            }
            let failed = self.failed_dependency(task);
            let client = self.actors.get_mut(&actor).expect("just seen");
            client.queue.pop_front();
            if let Some(error) = failed {
                self.finish_with(task, &error, now_ns, out);
                continue;
            }
            let urgent = client.sent.is_empty();
            client.sent.push_back(task);
            let Some(entry) = self.tasks.get_mut(&task) else {
                continue;
            };
            entry.place = Place::Sent { proc, incarnation };
            entry.pushed_ns = now_ns;
            let msg = self.push_message(task, proc, &[], out);
            out.push(Effect::Send { to: proc, msg, urgent });
        }
    }

    /// How many earlier calls of this process the actor has and has not answered.
    pub(crate) fn calls_before(&self, actor: ActorId, task: TaskId) -> usize {
        self.actors.get(&actor).and_then(|client| client.sent.iter().position(|t| *t == task)).unwrap_or(0)
    }

    /// The call that holds back this one: its name, and the argument that it waits for.
    pub(crate) fn call_in_front(&self, actor: ActorId, task: TaskId) -> Option<(&str, ObjectId)> {
        let first = *self.actors.get(&actor)?.queue.front()?;
        let entry = self.tasks.get(&first).filter(|entry| first != task && entry.missing > 0)?;
        let missing = entry.deps.iter().map(|(_, id)| *id).find(|id| !self.objects.is_ready(*id))?;
        Some((&self.definitions[entry.def].call.name, missing))
    }

    pub(crate) fn call_left(&mut self, actor: ActorId, task: TaskId) {
        let Some(client) = self.actors.get_mut(&actor) else {
            return;
        };
        if let Some(at) = client.sent.iter().position(|t| *t == task) {
            client.sent.remove(at);
        } else if !client.unready.remove(&task) {
            client.queue.retain(|t| *t != task);
        }
    }

    pub(crate) fn requeue_call(&mut self, actor: ActorId, task: TaskId, now_ns: u64, out: &mut Out) {
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.place = Place::Called;
        }
        self.enqueue_call(actor, task, now_ns, out);
    }

    /// The node tells where the actor lives now.
    pub fn handle_actor_state(&mut self, actor: ActorId, state: ActorState, now_ns: u64, out: &mut Out) {
        // Of an actor whose last handle is gone nobody here wants to know.
        let Some(client) = self.actors.get_mut(&actor) else {
            return;
        };
        if matches!(client.state, ActorState::Dead(_)) {
            return;
        }
        let same_life = matches!((&client.state, &state), (ActorState::Alive { incarnation: a, .. }, ActorState::Alive { incarnation: b, .. }) if a == b);
        // Only the end of a life says that the kill has been done: its beginning may have been under way.
        let next_life = matches!((&client.state, &state), (ActorState::Alive { incarnation: a, .. }, ActorState::Alive { incarnation: b, .. }) if a < b);
        client.killed &= !next_life && !matches!(state, ActorState::Restarting | ActorState::Dead(_));
        client.state = state.clone();
        if !same_life {
            let sent = std::mem::take(&mut client.sent);
            self.calls_interrupted(actor, sent, &state, now_ns, out);
        }
        match state {
            ActorState::Alive { proc, .. } => {
                self.forget_creation_without_restarts(actor, proc, out);
                self.flush_calls(actor, now_ns, out);
            }
            ActorState::Dead(error) => {
                if let Some(client) = self.actors.get_mut(&actor) {
                    let (unready, queue) = (std::mem::take(&mut client.unready), std::mem::take(&mut client.queue));
                    for task in unready.into_iter().chain(queue) {
                        self.finish_with(task, &error, now_ns, out);
                    }
                }
                self.forget_creation(actor, out);
                if actor.proc == self.me && !self.objects.is_known(self.handle_object(actor)) {
                    self.actors.remove(&actor);
                }
            }
            ActorState::Pending | ActorState::Restarting => {}
        }
    }

    /// The process that had been sent these calls is gone.
    fn calls_interrupted(
        &mut self,
        actor: ActorId,
        sent: VecDeque<TaskId>,
        state: &ActorState,
        now_ns: u64,
        out: &mut Out,
    ) {
        let mut again = Vec::new();
        for task in sent {
            let Some(entry) = self.tasks.get_mut(&task) else {
                continue;
            };
            if entry.cancelled {
                let error = Payload::error(ErrorCode::Cancelled, &format!("Task {task} was cancelled."));
                self.finish_with(task, &error, now_ns, out);
            } else if let ActorState::Dead(error) = state {
                let error = error.clone();
                self.finish_with(task, &error, now_ns, out);
            } else if entry.retries_left != 0 {
                if entry.retries_left > 0 {
                    entry.retries_left -= 1;
                }
                entry.place = Place::Called;
                let error = Payload::error(ErrorCode::ActorUnavailable, "The actor died; the call is repeated.");
                self.note_unrun(task, &error, out);
                if let Some(entry) = self.tasks.get_mut(&task) {
                    entry.attempt += 1;
                    entry.pushed_ns = 0;
                }
                again.push(task);
            } else {
                let name = self.definitions[entry.def].call.name.clone();
                let text = format!(
                    "The actor died while it may have been running {name}, and is being restarted; the call is not repeated \
                     because max_task_retries is 0 or used up. Later calls reach the restarted actor."
                );
                self.finish_with(task, &Payload::error(ErrorCode::ActorUnavailable, &text), now_ns, out);
            }
        }
        if let Some(client) = self.actors.get_mut(&actor) {
            for task in again.into_iter().rev() {
                client.queue.push_front(task);
            }
        }
    }

    /// The constructor has run and will not run again: its arguments are not needed any more.
    ///
    /// A specification travels through the node to a worker that is not known yet, so its references were
    /// handed over to nobody: this process's counts protected them. What the worker keeps is handed over
    /// now, before those go.
    fn forget_creation_without_restarts(&mut self, actor: ActorId, proc: ProcId, out: &mut Out) {
        let creation = self.actors.get(&actor).and_then(|client| client.creation);
        let Some((creation, entry)) = creation.and_then(|task| self.creations.get(&task)) else {
            return;
        };
        if creation.max_restarts != 0 {
            return;
        }
        let mut ids = entry.args.refs.clone();
        for (_, id) in &entry.deps {
            if let Some(value) = self.objects.value(*id) {
                ids.extend_from_slice(value.refs());
                if matches!(value, Value::Stored { .. }) {
                    ids.push(*id);
                }
            }
        }
        self.objects.hand_over(&ids, proc, out);
        self.forget_creation(actor, out);
    }

    fn forget_creation(&mut self, actor: ActorId, out: &mut Out) {
        let Some(task) = self.actors.get_mut(&actor).and_then(|client| client.creation.take()) else {
            return;
        };
        let Some((_, entry)) = self.creations.remove(&task) else {
            return;
        };
        let ids: Vec<ObjectId> = entry.args.refs.iter().copied().chain(entry.deps.iter().map(|(_, id)| *id)).collect();
        self.release_all(&ids, out);
    }

    /// No handle is left here, and so no call. What made an actor of our own is kept until it is dead.
    pub(crate) fn last_handle_gone(&mut self, actor: ActorId, out: &mut Out) {
        let Some(client) = self.actors.get(&actor) else { return };
        if actor.proc != self.me || matches!(client.state, ActorState::Dead(_)) {
            // The last handle may have been that of a call which fails because the actor is dead.
            self.forget_creation(actor, out);
            self.actors.remove(&actor);
        } else if !client.detached {
            if self.is_unborn(actor) {
                // It waits for arguments, and the node has not heard of it: it will not be made.
                self.forget_creation(actor, out);
                self.actors.remove(&actor);
            } else {
                out.node(ToNode::ActorRelease { actor });
            }
        }
    }

    /// Whether an actor of our own still waits for its arguments, so that the node does not know it.
    fn is_unborn(&self, actor: ActorId) -> bool {
        let creation = self.actors.get(&actor).and_then(|client| client.creation);
        creation.is_some_and(|creation| self.creations.get(&creation).is_some_and(|(_, entry)| entry.missing > 0))
    }

    /// The object that counts the handles of an actor of our own.
    fn handle_object(&self, actor: ActorId) -> ObjectId {
        ObjectId { task: TaskId { node: self.node, proc: actor.proc, seq: actor.seq }, index: ObjectId::ACTOR_INDEX }
    }
}
