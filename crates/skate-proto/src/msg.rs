//! Messages between cores.
//!
//! One frame kind carries them all; the body is postcard. References inside a message have been
//! handed over by its sender (see `objects`).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{ActorId, FunctionId, NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use crate::payload::{Blob, Payload, Value};
use crate::spilling::{Offered, Written};

/// How many values a call returns.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Returns {
    Count(u32),
    /// Items are handed out while the task runs.
    Streaming,
    /// Items as of a stream, and at the end one value that lists them.
    Dynamic,
}

/// What all calls through one remote function with the same options share.
///
/// It is sent once to each worker, before its first call there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CallDef {
    pub function: FunctionId,
    pub name: String,
    pub method: String,
    pub group: String,
    pub returns: Returns,
    pub retry_exceptions: bool,
    /// Largest number of items of a stream that the consumer has not taken; 0 is no limit.
    pub backpressure: u32,
    pub actor: Option<ActorId>,
    /// Whether history is kept of its calls.
    pub recorded: bool,
}

/// Where a top-level reference stood among the arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slot {
    Position(u32),
    Keyword(String),
    /// The object is the whole call: its arguments were too large for a message.
    Whole,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Push {
    pub task: TaskId,
    pub def: u32,
    pub attempt: u32,
    pub args: Payload,
    pub deps: Vec<(Slot, ObjectId, Value)>,
    pub gpu_ids: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    pub task: TaskId,
    pub results: Vec<Value>,
    /// The user's code raised something that the call's options allow to retry.
    pub retryable: bool,
    /// Time in user code, for the owner's pipelining.
    pub run_ns: u64,
    /// Streams: how many items there were in all.
    pub items: u32,
}

/// How an actor is made; opaque to the node, decoded by the worker that becomes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorSpec {
    pub actor: ActorId,
    /// Whether history is kept of its creation.
    pub recorded: bool,
    pub task: TaskId,
    pub class: FunctionId,
    pub blob: Blob,
    pub name: String,
    pub args: Payload,
    pub deps: Vec<(Slot, ObjectId, Value)>,
    pub max_concurrency: u32,
    pub is_async: bool,
    pub groups: Vec<(String, u32)>,
}

/// Why a value is not there, and what that waits for in turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    pub text: String,
    pub waits_for: WaitsFor,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitsFor {
    /// Nothing that could be asked about.
    Nothing,
    /// It is another process's: ask there.
    Owner,
    Object(ObjectId),
    /// A worker for this class of the owner's tasks: the node knows more.
    Lease(u32),
    Actor(ActorId),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Msg {
    /// Owner to worker: calls numbered `id` are described by `def`; the function itself comes
    /// along the first time.
    Define {
        id: u32,
        def: Arc<CallDef>,
        blob: Option<Blob>,
    },
    /// Owner to worker: no call refers to these definitions any more; their numbers may come again.
    Forget {
        ids: Vec<u32>,
    },
    /// Owner to worker: run this.
    Push(Push),
    /// Worker to owner: it ended.
    Done(Done),
    /// Worker to owner: these have not been started and will not be.
    Returned {
        tasks: Vec<TaskId>,
    },
    /// Worker to owner: the worker waits for something; push nothing until `Unblocked`.
    Blocked {
        tasks: Vec<TaskId>,
    },
    Unblocked,
    /// Owner to worker: return up to `max` tasks from the end of your queue.
    Steal {
        max: u32,
    },
    /// Owner to worker.
    Cancel {
        task: TaskId,
        recursive: bool,
    },
    /// Worker to owner: one item of a stream.
    Item {
        task: TaskId,
        index: u32,
        value: Value,
    },
    /// Owner to worker: the consumer has taken this many items.
    ItemsTaken {
        task: TaskId,
        taken: u32,
    },
    /// Holder to owner: `proc` has been handed this reference.
    AddBorrower {
        object: ObjectId,
        proc: ProcId,
    },
    /// Borrower to owner: hand-overs given back.
    Release {
        object: ObjectId,
        tokens: u32,
    },
    /// Borrower to owner: tell me the value when it is there.
    Resolve {
        object: ObjectId,
    },
    Resolved {
        object: ObjectId,
        value: Value,
    },
    /// Borrower to owner: the task that makes this object is not wanted any more.
    CancelObject {
        object: ObjectId,
        force: bool,
        recursive: bool,
    },
    /// Reader to owner: the block is not where it was said to be.
    Missing {
        object: ObjectId,
        node: NodeKey,
        segment: SegmentId,
    },
    /// Worker to owner: it ends by its own will, and has answered all that it started.
    Leaving,
    /// Anybody to owner: why is the value not there?
    Why {
        object: ObjectId,
        question: u64,
    },
    /// Owner to who asked.
    Because {
        question: u64,
        reason: Reason,
    },
    /// Owner to the process that allocated them.
    FreeBlocks {
        blocks: Vec<(SegmentId, u64)>,
    },
    /// A process that allocated values for owners on other nodes, to these: its node is short of memory.
    MakeRoom {
        node: NodeKey,
        bytes: u64,
    },
    /// Owner to borrower: forget where these values are, unless you need to know.
    Evict {
        objects: Vec<ObjectId>,
    },
    /// Borrower to owner; about each object that it was asked about.
    Evicted {
        forgotten: Vec<ObjectId>,
        kept: Vec<ObjectId>,
    },
    /// Owner to the process that allocated them on another node: have them spilled there.
    Spill {
        offered: Vec<Offered>,
    },
    /// The answer, which the node gave.
    Written {
        node: NodeKey,
        written: Vec<Written>,
    },
}

impl Msg {
    /// The object whose owner this message is for. Its id says on which node the owner lives.
    #[must_use]
    pub fn for_owner_of(&self) -> Option<ObjectId> {
        match self {
            Self::AddBorrower { object, .. }
            | Self::Release { object, .. }
            | Self::Resolve { object }
            | Self::CancelObject { object, .. }
            | Self::Missing { object, .. }
            | Self::Why { object, .. } => Some(*object),
            Self::Evicted { forgotten, kept } => forgotten.first().or_else(|| kept.first()).copied(),
            Self::Written { written, .. } => written.first().map(|each| each.object),
            _ => None,
        }
    }
}
