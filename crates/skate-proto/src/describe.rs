//! What a process can say of its tasks and objects to whoever looks: rows, made of what the machines hold anyway.
//!
//! Nothing is kept for it, and nothing changes by it. A look is bounded: it visits [`SCAN_MAX`] entries at most, because
//! the machines stand still meanwhile, and gives as many rows as were asked for. Which rows is left open when there
//! are more; the total says so.

use std::sync::Arc;

use crate::executor::{Executor, WorkKind};
use crate::ids::{ActorId, NodeKey, ObjectId, ProcId, TaskId};
use crate::msg::CallDef;
use crate::owner::{Map, Owner};
use crate::payload::Value;
use crate::tasks::{Place, TaskEntry};

/// Entries of one table that a look visits, a millisecond or two; of those beyond only their number is told.
pub const SCAN_MAX: usize = 65_536;

/// Rows that there are, and how many there would be without the limit.
#[derive(Debug)]
pub struct Rows<T> {
    pub rows: Vec<T>,
    pub total: u64,
}

/// An unfinished task, as its owner or the worker that runs it sees it. Times are the core's; 0 is unknown.
#[derive(Debug)]
pub struct TaskRow {
    pub task: TaskId,
    pub attempt: u32,
    pub name: String,
    pub method: String,
    pub kind: WorkKind,
    /// In Ray's words.
    pub state: &'static str,
    pub actor: Option<ActorId>,
    pub parent: Option<TaskId>,
    pub submitted_ns: u64,
    /// Since when it is with its worker, or runs.
    pub since_ns: u64,
    /// Who runs it or will: process, node and pid (0: unknown).
    pub worker: Option<(ProcId, NodeKey, u32)>,
    /// Arguments that are not there.
    pub missing: u32,
}

/// An object that this process owns or borrows, and what counts it here.
#[derive(Debug)]
pub struct ObjectRow {
    pub id: ObjectId,
    /// Serialised; 0 while there is no value.
    pub bytes: u64,
    /// The value lies in shared memory.
    pub stored: bool,
    pub ready: bool,
    pub failed: bool,
    pub owned: bool,
    /// References of the program, and live views on the value.
    pub local: u32,
    /// Unfinished tasks of this process that were given it.
    pub in_tasks: u32,
    /// Values known here that contain it.
    pub in_objects: u32,
    /// Owner: other processes that hold it.
    pub borrowers: u32,
    /// Attempt of the task that makes it, while that is known.
    pub attempt: u32,
    /// State of that task; empty where there is none.
    pub task_state: &'static str,
}

const ARGUMENTS: &str = "PENDING_ARGS_AVAIL";
const WORKER: &str = "PENDING_NODE_ASSIGNMENT";
const ORDER: &str = "PENDING_ACTOR_TASK_ORDERING_OR_CONCURRENCY";
const GIVEN: &str = "SUBMITTED_TO_WORKER";
const RUNNING: &str = "RUNNING";
const WAITING: &str = "RUNNING_IN_RAY_GET";
const FINISHED: &str = "FINISHED";

fn state_of(entry: &TaskEntry) -> &'static str {
    match entry.place {
        Place::Finished => FINISHED,
        _ if entry.missing > 0 => ARGUMENTS,
        Place::Waiting | Place::Queued => WORKER,
        Place::Called => ORDER,
        Place::Pushed(_) | Place::Sent { .. } => GIVEN,
    }
}

impl Owner {
    /// Tasks of this process that have not ended.
    #[must_use]
    pub fn describe_tasks(&self, limit: usize) -> Rows<TaskRow> {
        let mut rows = Vec::new();
        let mut total = self.creations.len() as u64;
        for (task, (creation, entry)) in self.creations.iter().take(limit) {
            rows.push(TaskRow {
                task: *task,
                attempt: entry.attempt,
                name: creation.label.clone(),
                method: "__init__".into(),
                kind: WorkKind::CreateActor,
                state: if entry.missing > 0 { ARGUMENTS } else { WORKER },
                actor: Some(creation.actor),
                parent: entry.parent,
                submitted_ns: entry.submitted_ns,
                since_ns: 0,
                worker: None,
                missing: entry.missing,
            });
        }
        for (task, entry) in self.tasks.iter().take(SCAN_MAX) {
            if entry.place == Place::Finished {
                continue;
            }
            total += 1;
            if rows.len() < limit {
                rows.push(self.task_row(*task, entry));
            }
        }
        total += self.tasks.len().saturating_sub(SCAN_MAX) as u64;
        rows.sort_unstable_by_key(|row| row.task.seq);
        Rows { rows, total }
    }

    fn task_row(&self, task: TaskId, entry: &TaskEntry) -> TaskRow {
        let call: &CallDef = self.definition(entry.def);
        let worker = match entry.place {
            Place::Pushed(lease) => self
                .leases
                .worker(lease)
                .zip(self.leases.node(lease))
                .map(|(proc, node)| (proc, node, self.leases.pid(lease).unwrap_or(0))),
            Place::Sent { proc, .. } => entry.actor.and_then(|actor| self.home(actor)).map(|node| (proc, node, 0)),
            _ => None,
        };
        TaskRow {
            task,
            attempt: entry.attempt,
            name: call.name.clone(),
            method: call.method.clone(),
            kind: if entry.actor.is_some() { WorkKind::Call } else { WorkKind::Task },
            state: state_of(entry),
            actor: entry.actor,
            parent: entry.parent,
            submitted_ns: entry.submitted_ns,
            since_ns: entry.pushed_ns,
            worker,
            missing: entry.missing,
        }
    }

    /// Objects that this process knows, with what counts them.
    #[must_use]
    pub fn describe_objects(&self, limit: usize) -> Rows<ObjectRow> {
        let mut in_tasks: Map<ObjectId, u32> = Map::default();
        let mut in_objects: Map<ObjectId, u32> = Map::default();
        let tasks = self.tasks.values().take(SCAN_MAX).chain(self.creations.values().map(|(_, entry)| entry));
        for entry in tasks {
            let deps = entry.deps.iter().map(|(_, id)| id);
            for id in entry.args.refs.iter().chain(deps).chain(&entry.handle) {
                *in_tasks.entry(*id).or_default() += 1;
            }
        }
        let entries = self.objects.entries();
        for entry in entries.values().take(SCAN_MAX) {
            for id in entry.value.iter().flat_map(Value::refs) {
                *in_objects.entry(*id).or_default() += 1;
            }
        }
        let mut rows: Vec<ObjectRow> = entries
            .iter()
            .take(limit)
            .map(|(id, entry)| {
                let (tasks, objects) = (in_tasks.get(id).copied(), in_objects.get(id).copied());
                let (tasks, objects) = (tasks.unwrap_or(0), objects.unwrap_or(0));
                let maker = self.tasks.get(&id.task);
                ObjectRow {
                    id: *id,
                    bytes: match &entry.value {
                        Some(Value::Inline(payload)) => payload.data.len() as u64,
                        Some(Value::Stored { location, .. }) => location.len,
                        None => 0,
                    },
                    stored: matches!(entry.value, Some(Value::Stored { .. })),
                    ready: entry.value.is_some(),
                    failed: entry.value.as_ref().is_some_and(Value::is_error),
                    owned: self.objects.is_owned(*id),
                    local: entry.local.saturating_sub(tasks + objects),
                    in_tasks: tasks,
                    in_objects: objects,
                    borrowers: u32::try_from(entry.borrowers.len()).unwrap_or(u32::MAX),
                    attempt: maker.map_or(0, |entry| entry.attempt),
                    task_state: maker.map_or("", state_of),
                }
            })
            .collect();
        rows.sort_unstable_by_key(|row| row.id);
        Rows { rows, total: entries.len() as u64 }
    }
}

impl Executor {
    /// What runs here now.
    #[must_use]
    pub fn describe_running(&self, limit: usize) -> Rows<TaskRow> {
        let state = if self.is_blocked() && !self.is_actor { WAITING } else { RUNNING };
        let mut rows: Vec<TaskRow> = self
            .running()
            .filter(|(_, running)| !running.is_over)
            .take(limit)
            .map(|(task, running)| TaskRow {
                task,
                attempt: running.attempt,
                name: running.def.name.clone(),
                method: running.def.method.clone(),
                kind: running.kind,
                state,
                actor: running.def.actor,
                parent: None,
                submitted_ns: 0,
                since_ns: running.since_ns,
                worker: None,
                missing: 0,
            })
            .collect();
        rows.sort_unstable_by_key(|row| row.since_ns);
        let total = self.running().filter(|(_, running)| !running.is_over).count() as u64;
        Rows { rows, total }
    }
}

/// An attempt of a task that has ended without an answer of the worker's own making: it never ran, or its worker died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unrun {
    pub task: TaskId,
    pub attempt: u32,
    pub def: Arc<CallDef>,
    /// The error that stands for it.
    pub code: u8,
    pub text: String,
    /// When it was given to its worker; 0 if it was not.
    pub since_ns: u64,
}
