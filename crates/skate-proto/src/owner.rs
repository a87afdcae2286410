//! What one process owns: its objects, the tasks that make them, the workers it was lent, and its
//! ends of actors' queues.
//!
//! This file holds the state, the effects and the way in for messages; the rules live in `objects`
//! (references), `spilling` (what leaves memory), `tasks` (dependencies, results, retries, cancellation), `leases`
//! (workers and pipelining), `actors` and `streams`. Every entry point takes an [`Out`] to write effects to; they
//! must be performed in order, and before the next entry point is called.

use std::collections::HashMap;

use crate::actors::{ActorClient, Creation};
use crate::describe::Unrun;
use crate::ids::{ActorId, LeaseId, NodeKey, ObjectId, ProcId, TaskId};
use crate::leases::{ClassId, Death, Leases};
use crate::location::Location;
use crate::msg::{ActorSpec, Msg};
use crate::objects::{Gone, Objects, WaiterId, owner_died};
use crate::payload::{Blob, Payload, Value};
use crate::spilling::Offered;
use crate::streams::Stream;
use crate::tasks::{Definitions, TaskEntry};

pub(crate) type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What must happen outside the machine.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send to another core. `urgent`: the receiver is idle until it arrives; otherwise it may be
    /// put together with what follows.
    Send { to: ProcId, msg: Msg, urgent: bool },
    /// Tell the node.
    Node(ToNode),
    /// Something that a local party waits for has happened; `failed`: the value is an exception.
    Notify { waiter: WaiterId, failed: bool },
    /// A task has failed, and the last reference to its result went without anyone having looked.
    Unread(Payload),
    /// An attempt has ended without an answer of a worker.
    Unrun(Unrun),
    /// A block is not needed any more.
    Free(Location),
    /// Copies of this object from other nodes are not read any more; see [`Objects::mark_copied`].
    ReleaseCopies(ObjectId),
}

/// Messages to the node manager; the shell encodes them.
#[derive(Debug, PartialEq, Eq)]
pub enum ToNode {
    LeaseDemand {
        class: ClassId,
        count: u32,
    },
    /// `node` is the one that lent the worker.
    LeaseReturn {
        lease: LeaseId,
        reusable: bool,
        node: NodeKey,
    },
    LeaseKept {
        lease: LeaseId,
        node: NodeKey,
    },
    ActorCreate {
        creation: Box<Creation>,
        spec: Box<ActorSpec>,
    },
    ActorSubscribe {
        actor: ActorId,
    },
    ActorRelease {
        actor: ActorId,
    },
    ActorKill {
        actor: ActorId,
        no_restart: bool,
    },
    PeerLost {
        proc: ProcId,
    },
    /// Blocks of this node that may be spilled; answered for each, to [`Owner::handle_written`] of `owner`.
    Spill {
        owner: ProcId,
        offered: Vec<Offered>,
    },
}

/// Effects in the order in which they must be performed.
#[derive(Debug, Default)]
pub struct Out {
    pub effects: Vec<Effect>,
}

impl Out {
    pub(crate) fn push(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(crate) fn send(&mut self, to: ProcId, msg: Msg) {
        // `AddBorrower` leaves at once, ahead of the message that hands the reference over: if this process is
        // killed in between, the owner has heard of the borrower, or the borrower has heard of nothing.
        let urgent = matches!(
            msg,
            Msg::Resolve { .. }
                | Msg::Resolved { .. }
                | Msg::AddBorrower { .. }
                | Msg::Cancel { .. }
                | Msg::CancelObject { .. }
                | Msg::Steal { .. }
                | Msg::Evict { .. }
                | Msg::Evicted { .. }
                | Msg::Spill { .. }
        );
        self.effects.push(Effect::Send { to, msg, urgent });
    }

    pub(crate) fn node(&mut self, msg: ToNode) {
        self.effects.push(Effect::Node(msg));
    }
}

/// Lineage is kept up to this many bytes of arguments; then the oldest is forgotten, and the loss of
/// what it made is final.
pub const LINEAGE_BYTES_MAX: usize = 64 << 20;

/// Lost nodes of which it is known why; the errors of values on others name the node alone.
pub const LOST_NODES_MAX: usize = 256;

#[derive(Debug)]
pub struct Owner {
    pub(crate) me: ProcId,
    pub(crate) node: NodeKey,
    pub objects: Objects,
    pub(crate) next_seq: u64,
    pub(crate) tasks: Map<TaskId, TaskEntry>,
    pub(crate) definitions: Definitions,
    /// Functions that a worker has, and in how many of the definitions that it knows.
    pub(crate) functions_at: Map<ProcId, Map<crate::ids::FunctionId, u32>>,
    pub(crate) leases: Leases,
    pub(crate) actors: Map<ActorId, ActorClient>,
    pub(crate) creations: Map<TaskId, (Creation, TaskEntry)>,
    pub(crate) streams: Map<TaskId, Stream>,
    pub(crate) lineage_bytes: usize,
    pub(crate) lineage_order: std::collections::VecDeque<TaskId>,
    /// Serials of spills, each used once.
    pub(crate) spills_begun: u64,
    pub(crate) task_oom_retries: i32,
    /// Objects whose value somebody else decides on, and what they wait for in words.
    pub(crate) promises: Map<ObjectId, String>,
    /// Why nodes were lost, for the errors of values that lay there.
    pub(crate) lost_nodes: std::collections::BTreeMap<NodeKey, Box<str>>,
}

impl Owner {
    #[must_use]
    pub fn new(me: ProcId, node: NodeKey) -> Self {
        Self {
            me,
            node,
            objects: Objects::new(me),
            next_seq: 0,
            tasks: Map::default(),
            definitions: Definitions::default(),
            functions_at: Map::default(),
            leases: Leases::default(),
            actors: Map::default(),
            creations: Map::default(),
            streams: Map::default(),
            lineage_bytes: 0,
            lineage_order: std::collections::VecDeque::new(),
            spills_begun: 0,
            task_oom_retries: -1,
            promises: Map::default(),
            lost_nodes: std::collections::BTreeMap::new(),
        }
    }

    /// How often a task is repeated that the node's memory watch has ended, apart from its `max_retries`; any negative
    /// number is no limit. Tasks whose `max_retries` is 0 are not repeated at all.
    pub fn set_task_oom_retries(&mut self, count: i32) {
        self.task_oom_retries = count;
    }

    #[must_use]
    pub fn next_task_id(&mut self) -> TaskId {
        self.next_seq += 1;
        TaskId { node: self.node, proc: self.me, seq: self.next_seq }
    }

    /// A new object with a value; its references must be reachable by the caller now.
    pub fn put(&mut self, value: Value) -> ObjectId {
        let id = ObjectId { task: self.next_task_id(), index: 0 };
        for &inner in value.refs() {
            self.objects.retain(inner);
        }
        self.objects.create(id, Some(value), None);
        id
    }

    /// A new object without a value; `keep_promise` must follow, or nobody who waits for it goes on. `awaited` is what
    /// it waits for, in words.
    pub fn promise(&mut self, awaited: &str) -> ObjectId {
        let id = ObjectId { task: self.next_task_id(), index: 0 };
        self.objects.create(id, None, None);
        self.promises.insert(id, awaited.to_owned());
        id
    }

    /// What was promised is there, or will never be. References in the value must be reachable by the caller now.
    pub fn keep_promise(&mut self, id: ObjectId, kept: Result<Value, Payload>, now_ns: u64, out: &mut Out) {
        if self.promises.remove(&id).is_none() {
            return;
        }
        let value = kept.unwrap_or_else(Value::Inline);
        for &inner in value.refs() {
            self.objects.retain(inner);
        }
        self.fulfil(id, value, now_ns, out);
    }

    pub fn release(&mut self, id: ObjectId, out: &mut Out) {
        let mut gone = Gone::default();
        self.objects.release(id, &mut gone, out);
        self.settle(gone, out);
    }

    pub fn release_all(&mut self, ids: &[ObjectId], out: &mut Out) {
        let mut gone = Gone::default();
        for &id in ids {
            self.objects.release(id, &mut gone, out);
        }
        self.settle(gone, out);
    }

    /// Messages of other cores to this process as an owner, borrower or caller.
    ///
    /// Those to an executing worker (`Define`, `Forget`, `Push`, `Steal`, `Cancel`, `ItemsTaken`) or to a lessee
    /// (`FreeBlocks`, `Spill`), and those that the executor has a say in (`Evict`), are the shell's.
    pub fn handle_message(&mut self, from: ProcId, msg: Msg, now_ns: u64, out: &mut Out) {
        let mut gone = Gone::default();
        match msg {
            Msg::Done(done) => self.handle_done(from, done, now_ns, out),
            Msg::Returned { tasks } => self.handle_returned(from, &tasks, false, now_ns, out),
            Msg::Blocked { tasks } => self.handle_returned(from, &tasks, true, now_ns, out),
            Msg::Unblocked => self.handle_unblocked(from, now_ns, out),
            Msg::Leaving => self.handle_leaving(from, now_ns, out),
            Msg::Item { task, index, value } => self.handle_item(from, task, index, value, out),
            Msg::AddBorrower { object, proc } => self.objects.handle_add_borrower(object, proc, &mut gone, out),
            Msg::Release { object, tokens } => self.objects.handle_release(from, object, tokens, &mut gone, out),
            Msg::Resolve { object } => self.objects.handle_resolve(from, object, out),
            Msg::Resolved { object, value } => {
                self.objects.arrive(value.refs());
                if object.owner() == from {
                    self.fulfil(object, value, now_ns, out);
                } else {
                    self.objects.discard(&value, &mut gone, out);
                }
            }
            Msg::CancelObject { object, force, recursive } => self.cancel(object, force, recursive, now_ns, out),
            Msg::Why { object, question } => {
                let reason = self.why(object, now_ns);
                out.push(Effect::Send { to: from, msg: Msg::Because { question, reason }, urgent: true });
            }
            Msg::Missing { object, node, segment } => self.handle_missing(object, node, segment, now_ns, out),
            Msg::MakeRoom { node, bytes } => self.make_room(node, bytes, out),
            Msg::Evicted { forgotten, kept } => self.handle_evicted(from, &forgotten, &kept, out),
            Msg::Written { node, written } => {
                for each in written {
                    self.handle_written(node, each, out);
                }
            }
            Msg::Define { .. }
            | Msg::Forget { .. }
            | Msg::Push(_)
            | Msg::Steal { .. }
            | Msg::Cancel { .. }
            | Msg::ItemsTaken { .. }
            | Msg::Because { .. }
            | Msg::Evict { .. }
            | Msg::Spill { .. }
            | Msg::FreeBlocks { .. } => {}
        }
        self.settle(gone, out);
    }

    /// A process of the cluster has ended.
    pub fn handle_process_gone(&mut self, proc: ProcId, cause: &str, death: Death, now_ns: u64, out: &mut Out) {
        self.functions_at.remove(&proc);
        for definition in self.definitions.iter_mut() {
            definition.known_at.retain(|p| *p != proc);
        }
        self.lose_worker(proc, cause, death, now_ns, out);
        let mut gone = Gone::default();
        let orphans = self.objects.handle_process_gone(proc, cause, &mut gone, out);
        self.settle(gone, out);
        self.spills_without(proc, out);
        for id in orphans {
            self.fulfil(id, owner_died(id, cause), now_ns, out);
        }
    }

    /// A node of the cluster is lost, with every value on it. That is noticed value by value, when one is read: until
    /// then nobody needs it, and what is read at once fails at once, by the reader's node.
    pub fn handle_node_lost(&mut self, node: NodeKey, cause: &str) {
        if self.lost_nodes.len() >= LOST_NODES_MAX {
            self.lost_nodes.pop_first();
        }
        self.lost_nodes.insert(node, cause.into());
    }

    /// A value has arrived or was made: readers, resolvers and dependent tasks go on.
    pub(crate) fn fulfil(&mut self, id: ObjectId, value: Value, now_ns: u64, out: &mut Out) {
        let mut gone = Gone::default();
        let dependents = self.objects.fulfil(id, value, &mut gone, out);
        self.settle(gone, out);
        for task in dependents {
            self.dependency_ready(task, now_ns, out);
        }
    }

    /// Follows up what vanished with swept objects.
    pub(crate) fn settle(&mut self, gone: Gone, out: &mut Out) {
        for task in gone.lineage {
            self.lineage_unneeded(task, out);
        }
        for handle in gone.actors {
            self.last_handle_gone(ActorId { proc: handle.task.proc, seq: handle.task.seq }, out);
        }
    }

    /// Whether nothing and nobody depends on this process: it owns no object, task or actor.
    #[must_use]
    pub fn is_bare(&self) -> bool {
        self.tasks.is_empty() && self.creations.is_empty() && self.objects.owned() == 0
    }

    /// Numbers for `statistics()`.
    #[must_use]
    pub fn statistics(&self) -> [(&'static str, u64); 9] {
        [
            ("objects", self.objects.len() as u64),
            ("tasks", self.tasks.len() as u64),
            ("leases", self.leases.len() as u64),
            ("actors", self.actors.len() as u64),
            ("streams", self.streams.len() as u64),
            ("lineage_bytes", self.lineage_bytes as u64),
            ("definitions", self.definitions.len() as u64),
            ("classes", self.leases.class_count() as u64),
            ("deaths_remembered", self.objects.deaths() as u64),
        ]
    }
}

/// A function or class as it is sent: the pickle and its name.
#[derive(Clone, Debug)]
pub struct FunctionBlob {
    pub id: crate::ids::FunctionId,
    pub blob: Blob,
}
