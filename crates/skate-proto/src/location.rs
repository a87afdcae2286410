//! Where a stored value lies.

use serde::{Deserialize, Serialize};

use crate::ids::{NodeKey, ProcId, SegmentId};

/// One block of a segment. The node is where the segment lies: nodes number their segments by themselves. The lessee
/// is the process that allocates in the segment and to which a block is given back.
///
/// A value that was spilled is located like a block: as the only one, at offset 0, of a segment on disk whose lessee is
/// the node itself. Nobody maps such a segment; readers have the value copied to memory.
///
/// A location comes from a peer and is therefore a claim: a mapping checks `offset` and `len` against
/// its own size before it makes a pointer of them.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    pub node: NodeKey,
    pub segment: SegmentId,
    pub lessee: ProcId,
    pub offset: u64,
    pub len: u64,
}

impl Location {
    /// The place of a value that its node has spilled.
    #[must_use]
    pub fn spilled(node: NodeKey, spill: SegmentId, len: u64) -> Self {
        Self { node, segment: spill, lessee: ProcId(node.0), offset: 0, len }
    }

    #[must_use]
    pub fn is_spilled(&self) -> bool {
        self.segment.is_spilled()
    }

    /// First byte behind the block, or `None` if a peer sent numbers that do not add up.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_end_beyond_the_number_range_is_none() {
        let at = |offset, len| Location { node: NodeKey(7), segment: SegmentId(1), lessee: ProcId(2), offset, len };
        assert_eq!(at(64, 10).end(), Some(74));
        assert_eq!(at(u64::MAX, 1).end(), None);
    }

    proptest! {
        #[test]
        fn locations_survive_the_wire(n: u64, s: u64, p: u64, offset: u64, len: u64) {
            let location = Location { node: NodeKey(n), segment: SegmentId(s), lessee: ProcId(p), offset, len };
            let bytes = postcard::to_stdvec(&location).unwrap();
            prop_assert_eq!(postcard::from_bytes::<Location>(&bytes).unwrap(), location);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(location) = postcard::from_bytes::<Location>(&bytes) {
                let _ = location.end();
            }
        }
    }
}
