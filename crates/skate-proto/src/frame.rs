//! The frame format of every connection, and the assembly of frames out of a byte stream.
//!
//! A frame is a 16-byte header and a body:
//!
//! ```text
//! 0         4      5       6          8                16
//! | body_len | kind | flags | reserved | corr           | body ...
//! ```
//!
//! Numbers are little endian. A frame whose header carries [`FLAG_FD`] travels with one file descriptor.
//! Whatever breaks a rule below ends the connection: a peer that cannot count is not heard again.
//!
//! [`Assembler`] is what remains of a frame when a read ended in the middle of it. Frames that arrived
//! whole are handed out as slices of the read buffer and are never copied.

use thiserror::Error;

/// Bytes of a header.
pub const HEADER_LEN: usize = 16;
/// A larger body closes the connection. Large data travels in segments, not in frames.
pub const BODY_LEN_MAX: usize = 64 << 20;
/// One file descriptor comes with this frame.
pub const FLAG_FD: u8 = 1;
/// Flags that have a meaning; the others must be zero, so that they can be given one.
const FLAGS_KNOWN: u8 = FLAG_FD;

/// The part of a frame that is not its body.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub body_len: u32,
    pub kind: u8,
    pub flags: u8,
    pub corr: u64,
}

/// Why bytes are not a frame. Every one of these ends the connection.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    #[error("a frame of kind {kind} announces a body of {len} bytes, and {BODY_LEN_MAX} are allowed")]
    TooLong { kind: u8, len: u32 },
    #[error("a frame of kind {kind} has unknown flags {flags:#04x}")]
    UnknownFlags { kind: u8, flags: u8 },
    #[error("a frame of kind {kind} has {value:#06x} in its reserved field")]
    ReservedNotZero { kind: u8, value: u16 },
    #[error("a frame has kind 0, which means nothing")]
    NoKind,
}

impl Header {
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&self.body_len.to_le_bytes());
        out[4] = self.kind;
        out[5] = self.flags;
        out[8..].copy_from_slice(&self.corr.to_le_bytes());
        out
    }

    /// Reads and checks a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, kind, flags, r0, r1, corr @ ..] = *bytes;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let reserved = u16::from_le_bytes([r0, r1]);
        if kind == 0 {
            return Err(FrameError::NoKind);
        }
        if len as usize > BODY_LEN_MAX {
            return Err(FrameError::TooLong { kind, len });
        }
        if flags & !FLAGS_KNOWN != 0 {
            return Err(FrameError::UnknownFlags { kind, flags });
        }
        if reserved != 0 {
            return Err(FrameError::ReservedNotZero { kind, value: reserved });
        }
        Ok(Self { body_len: len, kind, flags, corr: u64::from_le_bytes(corr) })
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        HEADER_LEN + self.body_len as usize
    }

    #[must_use]
    pub fn carries_fd(&self) -> bool {
        self.flags & FLAG_FD != 0
    }
}

/// What the start of a buffer is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Split<'a> {
    /// A whole frame, and what follows it.
    Frame { header: Header, body: &'a [u8], rest: &'a [u8] },
    /// Not yet a frame: it is known to be at least `total` bytes long.
    Need { total: usize },
}

/// Takes the first frame off `buffer`.
#[inline]
pub fn split(buffer: &[u8]) -> Result<Split<'_>, FrameError> {
    let Some((head, after)) = buffer.split_first_chunk::<HEADER_LEN>() else {
        return Ok(Split::Need { total: HEADER_LEN });
    };
    let header = Header::decode(head)?;
    Ok(match after.split_at_checked(header.body_len as usize) {
        Some((body, rest)) => Split::Frame { header, body, rest },
        None => Split::Need { total: header.frame_len() },
    })
}

/// The unfinished last frame of a connection.
///
/// Invariants: `partial` never holds a whole frame between calls, and never more than one frame;
/// `filled <= partial.len() <= total`; when `filled >= HEADER_LEN`, `total` is that of a checked header.
///
/// Memory follows what arrived, not what a header announced: the buffer at most doubles per read, so a
/// peer that announces 64 MiB and sends nothing costs [`ROOM_FIRST`] bytes.
#[derive(Debug, Default)]
pub struct Assembler {
    partial: Vec<u8>,
    filled: usize,
    total: usize,
}

/// Room made at first for a frame that did not arrive whole.
const ROOM_FIRST: usize = 64 << 10;
/// A larger buffer is given back once its frame is complete.
const ROOM_KEPT_MAX: usize = 256 << 10;

impl Assembler {
    /// Whether no frame is unfinished.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Keeps the bytes left after the last whole frame of a read.
    ///
    /// # Panics
    /// If a frame is unfinished already.
    pub fn keep(&mut self, rest: &[u8]) -> Result<(), FrameError> {
        assert!(self.is_empty(), "only one frame can be unfinished");
        let total = match split(rest)? {
            Split::Need { total } => total,
            Split::Frame { .. } => unreachable!("the caller takes whole frames off first"),
        };
        self.partial.clear();
        self.partial.extend_from_slice(rest);
        self.filled = rest.len();
        self.total = total;
        Ok(())
    }

    /// Where the next bytes of the unfinished frame belong. The flag says whether the frame is known to
    /// end inside this room, so that bytes behind it may be read elsewhere in the same call.
    pub fn room(&mut self) -> (&mut [u8], bool) {
        debug_assert!(!self.is_empty() && self.filled < self.total);
        let grown = (self.filled * 2).max(ROOM_FIRST).min(self.total);
        if self.partial.len() < grown {
            self.partial.resize(grown, 0);
        }
        let end = self.partial.len().min(self.total);
        (&mut self.partial[self.filled..end], end == self.total && self.filled >= HEADER_LEN)
    }

    /// Records that `len` bytes were put into [`Self::room`].
    pub fn advance(&mut self, len: usize) -> Result<(), FrameError> {
        self.filled += len;
        assert!(self.filled <= self.total, "more bytes than there was room for");
        if self.total == HEADER_LEN && self.filled == HEADER_LEN {
            match split(&self.partial[..self.filled])? {
                Split::Need { total } => self.total = total,
                Split::Frame { .. } => {}
            }
        }
        Ok(())
    }

    /// The frame, once its last byte is there. [`Self::clear`] must follow.
    #[must_use]
    pub fn finished(&self) -> Option<(Header, &[u8])> {
        match split(&self.partial[..self.filled]) {
            Ok(Split::Frame { header, body, rest: [] }) => Some((header, body)),
            _ => None,
        }
    }

    /// Forgets the frame.
    pub fn clear(&mut self) {
        self.filled = 0;
        self.total = 0;
        if self.partial.capacity() > ROOM_KEPT_MAX {
            self.partial = Vec::new();
        } else {
            self.partial.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, corr: u64, body: &[u8]) -> Vec<u8> {
        let header = Header { body_len: body.len() as u32, kind, flags: 0, corr };
        [&header.encode()[..], body].concat()
    }

    /// Reads `stream` as a connection would, in pieces of the given sizes.
    fn read_in_pieces(stream: &[u8], pieces: &[usize]) -> Result<Vec<(u8, u64, Vec<u8>)>, FrameError> {
        let mut out = Vec::new();
        let mut assembler = Assembler::default();
        let mut stream = stream;
        let mut pieces = pieces.iter().copied().cycle();
        while !stream.is_empty() {
            let mut len = pieces.next().unwrap_or(1).clamp(1, stream.len());
            let mut behind: &[u8];
            if assembler.is_empty() {
                (behind, stream) = stream.split_at(len);
            } else {
                let (room, complete) = assembler.room();
                let first = room.len().min(len);
                room[..first].copy_from_slice(&stream[..first]);
                if !complete {
                    len = first;
                }
                behind = &stream[first..len.max(first)];
                stream = &stream[len.max(first)..];
                assembler.advance(first)?;
                if let Some((header, body)) = assembler.finished() {
                    out.push((header.kind, header.corr, body.to_vec()));
                    assembler.clear();
                }
            }
            while !behind.is_empty() {
                match split(behind)? {
                    Split::Frame { header, body, rest } => {
                        out.push((header.kind, header.corr, body.to_vec()));
                        behind = rest;
                    }
                    Split::Need { .. } => {
                        assembler.keep(behind)?;
                        break;
                    }
                }
            }
        }
        Ok(out)
    }

    #[test]
    fn a_body_above_the_cap_is_refused_from_its_header() {
        let header = Header { body_len: BODY_LEN_MAX as u32 + 1, kind: 9, flags: 0, corr: 0 };
        assert_eq!(split(&header.encode()), Err(FrameError::TooLong { kind: 9, len: BODY_LEN_MAX as u32 + 1 }));
    }

    #[test]
    fn unknown_flags_and_reserved_bits_are_refused() {
        let mut bytes = frame(3, 1, b"");
        bytes[5] = 0x80;
        assert_eq!(split(&bytes), Err(FrameError::UnknownFlags { kind: 3, flags: 0x80 }));
        bytes[5] = FLAG_FD;
        bytes[7] = 1;
        assert_eq!(split(&bytes), Err(FrameError::ReservedNotZero { kind: 3, value: 0x100 }));
        bytes[4] = 0;
        assert_eq!(split(&bytes), Err(FrameError::NoKind));
    }

    #[test]
    fn memory_follows_what_arrived_and_not_what_was_announced() {
        let header = Header { body_len: BODY_LEN_MAX as u32, kind: 1, flags: 0, corr: 0 };
        let mut assembler = Assembler::default();
        assembler.keep(&header.encode()).unwrap();
        assert_eq!(assembler.room().0.len(), ROOM_FIRST - HEADER_LEN);
        assert!(!assembler.room().1);
    }

    proptest! {
        #[test]
        fn headers_round_trip(body_len in 0..=BODY_LEN_MAX as u32, kind in 1u8.., fd: bool, corr: u64) {
            let header = Header { body_len, kind, flags: u8::from(fd), corr };
            prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }

        #[test]
        fn frames_are_the_same_however_the_stream_is_cut(
            frames in prop::collection::vec((1u8.., any::<u64>(), prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            pieces in prop::collection::vec(1usize..400, 1..10),
        ) {
            let stream: Vec<u8> = frames.iter().flat_map(|(k, c, b)| frame(*k, *c, b)).collect();
            prop_assert_eq!(read_in_pieces(&stream, &pieces).unwrap(), frames);
        }

        #[test]
        fn long_frames_are_assembled_in_growing_room(len in 60_000usize..400_000, piece in 1_000usize..300_000) {
            let body: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let stream = [frame(7, 1, &body), frame(8, 2, b"after")].concat();
            let out = read_in_pieces(&stream, &[piece]).unwrap();
            prop_assert_eq!(out.len(), 2);
            prop_assert_eq!(&out[0].2, &body);
            prop_assert_eq!(&out[1].2, b"after");
        }

        #[test]
        fn garbage_never_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            pieces in prop::collection::vec(1usize..400, 1..10),
        ) {
            let _ = read_in_pieces(&bytes, &pieces);
        }
    }
}
