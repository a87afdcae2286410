//! What a spill file holds: records, each a header of [`HEADER_LEN`] bytes and a value behind it.
//!
//! A header says whose the value is, how long, and the XXH3 of its bytes; and the XXH3 of itself, so that a length is
//! not believed that was never written. Records begin at multiples of [`ALIGN_BYTES`]. Which records a file has is
//! known to the node, so there is no index.

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

pub const HEADER_LEN: usize = 64;
pub const OBJECT_LEN: usize = 28;
/// What the places of records are multiples of.
pub const ALIGN_BYTES: u64 = 64;
const MAGIC: [u8; 8] = *b"SKSPILL\x01";

/// What comes before a value.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub object: [u8; OBJECT_LEN],
    pub len: u64,
    pub checksum: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no header where a spilled value should begin; the file was damaged, or written by somebody else")]
pub struct DamagedHeader;

impl Header {
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..36].copy_from_slice(&self.object);
        bytes[40..48].copy_from_slice(&self.len.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.checksum.to_le_bytes());
        let own = xxh3_64(&bytes[..56]);
        bytes[56..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, DamagedHeader> {
        let own = xxh3_64(&bytes[..56]);
        if bytes[..8] != MAGIC || bytes[56..] != own.to_le_bytes() {
            return Err(DamagedHeader);
        }
        let mut header = Self { object: [0; OBJECT_LEN], len: word(bytes, 40), checksum: word(bytes, 48) };
        header.object.copy_from_slice(&bytes[8..36]);
        Ok(header)
    }
}

/// How much of a file a value takes; the next one may begin behind it.
#[must_use]
pub fn record_bytes(len: u64) -> u64 {
    len.saturating_add(HEADER_LEN as u64).next_multiple_of(ALIGN_BYTES)
}

fn word(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_survive(object in any::<[u8; OBJECT_LEN]>(), len: u64, checksum: u64) {
            let header = Header { object, len, checksum };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn no_changed_byte_is_believed(len: u64, checksum: u64, at in 0..HEADER_LEN, flip in 1..=255_u8) {
            let mut bytes = Header { object: [7; OBJECT_LEN], len, checksum }.encode();
            bytes[at] ^= flip;
            prop_assert_eq!(Header::decode(&bytes), Err(DamagedHeader));
        }
    }
}
