//! What is said on a bulk connection besides bytes: two messages of fixed size.
//!
//! ```text
//! client                                   server
//!   Request (segment, offset, len)    -->
//!                                     <--  Answer (sending, len), then `len` bytes; or Answer (refused, 0)
//!   Request, or Taken                 -->
//! ```
//!
//! One range at a time. A next request says that the last range was taken out of the socket; `Taken` says it when
//! no other follows, so that the server knows when memory that it lent to the socket is its own again.

use skate_proto::ids::SegmentId;

pub const REQUEST_LEN: usize = 32;
pub const ANSWER_LEN: usize = 16;

const MAGIC: [u8; 4] = *b"SKBK";
const TAG_REQUEST: u8 = 1;
const TAG_TAKEN: u8 = 2;
const STATUS_SENDING: u8 = 0;

/// What a client says.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Range {
        segment: SegmentId,
        offset: u64,
        len: u64,
    },
    /// Every byte of the last range was read.
    Taken,
}

/// Why a server does not send a range.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Refusal {
    #[error("it does not have the segment any more")]
    UnknownSegment = 1,
    #[error("the segment is shorter than the range that was asked for")]
    OutOfBounds = 2,
}

impl Request {
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let (tag, segment, offset, len) = match *self {
            Self::Range { segment, offset, len } => (TAG_REQUEST, segment.0, offset, len),
            Self::Taken => (TAG_TAKEN, 0, 0, 0),
        };
        let mut out = [0; REQUEST_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = tag;
        out[8..16].copy_from_slice(&segment.to_le_bytes());
        out[16..24].copy_from_slice(&offset.to_le_bytes());
        out[24..].copy_from_slice(&len.to_le_bytes());
        out
    }

    /// `None` for what no client of this version says.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        if bytes[..4] != MAGIC || bytes[5..8] != [0; 3] {
            return None;
        }
        let (segment, offset, len) = (word(bytes, 8), word(bytes, 16), word(bytes, 24));
        match bytes[4] {
            TAG_REQUEST if len > 0 => Some(Self::Range { segment: SegmentId(segment), offset, len }),
            TAG_TAKEN if (segment, offset, len) == (0, 0, 0) => Some(Self::Taken),
            _ => None,
        }
    }
}

/// What a server says before the bytes, or instead of them.
pub type Answer = Result<u64, Refusal>;

#[must_use]
pub fn encode_answer(answer: Answer) -> [u8; ANSWER_LEN] {
    let mut out = [0; ANSWER_LEN];
    out[..4].copy_from_slice(&MAGIC);
    match answer {
        Ok(len) => out[8..].copy_from_slice(&len.to_le_bytes()),
        Err(refusal) => out[4] = refusal as u8,
    }
    out
}

/// `None` for what no server of this version says.
#[must_use]
pub fn decode_answer(bytes: &[u8; ANSWER_LEN]) -> Option<Answer> {
    if bytes[..4] != MAGIC || bytes[5..8] != [0; 3] {
        return None;
    }
    let len = word(bytes, 8);
    match (bytes[4], len) {
        (STATUS_SENDING, 1..) => Some(Ok(len)),
        (1, 0) => Some(Err(Refusal::UnknownSegment)),
        (2, 0) => Some(Err(Refusal::OutOfBounds)),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
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
        fn what_is_said_is_understood(segment: u64, offset: u64, len in 1_u64..) {
            for request in [Request::Range { segment: SegmentId(segment), offset, len }, Request::Taken] {
                prop_assert_eq!(Request::decode(&request.encode()), Some(request));
            }
            for answer in [Ok(len), Err(Refusal::UnknownSegment), Err(Refusal::OutOfBounds)] {
                prop_assert_eq!(decode_answer(&encode_answer(answer)), Some(answer));
            }
        }

        #[test]
        fn other_bytes_mean_nothing_or_what_they_would_be_written_as(request: [u8; REQUEST_LEN], answer: [u8; ANSWER_LEN]) {
            if let Some(read) = Request::decode(&request) {
                prop_assert_eq!(read.encode(), request);
            }
            if let Some(read) = decode_answer(&answer) {
                prop_assert_eq!(encode_answer(read), answer);
            }
        }
    }

    #[test]
    fn an_empty_range_and_a_garbled_message_are_refused() {
        let empty = Request::Range { segment: SegmentId(1), offset: 0, len: 0 };
        assert_eq!(Request::decode(&empty.encode()), None);
        let good = Request::Range { segment: SegmentId(1), offset: 2, len: 3 }.encode();
        for at in 0..8 {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert_eq!(Request::decode(&bad), None, "byte {at}");
        }
    }
}
