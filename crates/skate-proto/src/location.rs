//! Where a stored value lies.

use serde::{Deserialize, Serialize};

use crate::ids::{ProcId, SegmentId};

/// A block of a segment, and the process that allocated it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    pub segment: SegmentId,
    pub lessee: ProcId,
    pub offset: u64,
    pub len: u64,
}
