//! Identities. An object's id names its owner, so whoever holds a reference knows whom to ask.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A node of the cluster. The node process's own [`ProcId`] has the same number.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeKey(pub u64);

/// A process with a core: driver, worker or node. Random and never zero.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcId(pub u64);

/// A shared-memory segment of one node; from [`SegmentId::SPILLED`] on, one value that the node has spilled.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentId(pub u64);

impl SegmentId {
    /// A node numbers what it spills from here on. In which file the value is, and where, is known to the node alone,
    /// which may move it.
    pub const SPILLED: u64 = 1 << 63;

    #[must_use]
    pub fn is_spilled(self) -> bool {
        self.0 >= Self::SPILLED
    }
}

/// A worker lent by a node to an owner.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LeaseId(pub u64);

/// A pickled function or class, named by a hash of its bytes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FunctionId(pub [u8; 16]);

/// A task, named by the process that submitted it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TaskId {
    pub node: NodeKey,
    pub proc: ProcId,
    pub seq: u64,
}

/// One value of a task, or of a `put` (which draws a task number of its own).
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectId {
    pub task: TaskId,
    pub index: u32,
}

/// An actor, named by the process that created it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ActorId {
    pub proc: ProcId,
    pub seq: u64,
}

impl TaskId {
    pub const LEN: usize = 24;

    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&self.node.0.to_be_bytes());
        out[8..16].copy_from_slice(&self.proc.0.to_be_bytes());
        out[16..].copy_from_slice(&self.seq.to_be_bytes());
        out
    }

    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == Self::LEN).then(|| Self {
            node: NodeKey(word(bytes, 0)),
            proc: ProcId(word(bytes, 8)),
            seq: word(bytes, 16),
        })
    }
}

impl ObjectId {
    pub const LEN: usize = 28;
    /// The index of the pseudo-object that counts the handles of an actor.
    pub const ACTOR_INDEX: u32 = u32::MAX;

    #[must_use]
    pub fn owner(self) -> ProcId {
        self.task.proc
    }

    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..24].copy_from_slice(&self.task.to_bytes());
        out[24..].copy_from_slice(&self.index.to_be_bytes());
        out
    }

    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != Self::LEN {
            return None;
        }
        let task = TaskId::from_bytes(&bytes[..24])?;
        let index = u32::from_be_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        Some(Self { task, index })
    }
}

impl ActorId {
    pub const LEN: usize = 16;

    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&self.proc.0.to_be_bytes());
        out[8..].copy_from_slice(&self.seq.to_be_bytes());
        out
    }

    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == Self::LEN).then(|| Self { proc: ProcId(word(bytes, 0)), seq: word(bytes, 8) })
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(out)
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_bytes().iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_bytes().iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_bytes().iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
