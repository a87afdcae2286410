//! How bytes get from a connection into a file.
//!
//! In clear, inside the kernel, through a pipe. Within TLS they are decrypted here, and written.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags};

use crate::transport::Stream;

/// What is moved at once: as much as a pipe may hold without privileges.
const PIPE_BYTES: usize = 1 << 20;

/// Whose fault it is that bytes were not moved.
pub(super) enum MoveError {
    Source(io::Error),
    Destination(io::Error),
}

pub(super) enum Sink {
    Pipe { reading: OwnedFd, writing: OwnedFd },
    Decrypting,
}

impl Sink {
    pub(super) fn of(stream: &Stream) -> io::Result<Self> {
        if stream.is_secured() {
            return Ok(Self::Decrypting);
        }
        let (reading, writing) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        // A smaller one only takes more turns.
        let _ = rustix::pipe::fcntl_setpipe_size(&writing, PIPE_BYTES);
        Ok(Self::Pipe { reading, writing })
    }

    /// Moves what is there, at least a byte and at most `len`, to the file's offset `at`.
    pub(super) fn move_bytes(&self, stream: &Stream, file: &OwnedFd, at: u64, len: u64) -> Result<u64, MoveError> {
        let most = len.min(PIPE_BYTES as u64) as usize;
        match self {
            Self::Pipe { reading, writing } => {
                let taken = splice_in(stream, writing, most)?;
                splice_out(reading, file, at, taken)?;
                Ok(taken as u64)
            }
            Self::Decrypting => {
                let mut written = Ok(());
                let taken =
                    stream.take(most, |bytes| written = write_at(file, at, bytes)).map_err(MoveError::Source)?;
                written?;
                Ok(taken as u64)
            }
        }
    }
}

/// Waits for bytes.
fn splice_in(stream: &Stream, pipe: &OwnedFd, most: usize) -> Result<usize, MoveError> {
    loop {
        match rustix::pipe::splice(stream.as_fd(), None, pipe.as_fd(), None, most, SpliceFlags::MOVE) {
            Ok(0) => return Err(MoveError::Source(io::ErrorKind::UnexpectedEof.into())),
            Ok(taken) => return Ok(taken),
            Err(Errno::INTR) => {}
            Err(error) => return Err(MoveError::Source(error.into())),
        }
    }
}

fn splice_out(pipe: &OwnedFd, file: &OwnedFd, mut at: u64, mut left: usize) -> Result<(), MoveError> {
    while left > 0 {
        match rustix::pipe::splice(pipe.as_fd(), None, file.as_fd(), Some(&mut at), left, SpliceFlags::MOVE) {
            Ok(0) => return Err(MoveError::Destination(io::ErrorKind::WriteZero.into())),
            Ok(written) => left -= written,
            Err(Errno::INTR) => {}
            Err(error) => return Err(MoveError::Destination(error.into())),
        }
    }
    Ok(())
}

fn write_at(file: &OwnedFd, mut at: u64, mut bytes: &[u8]) -> Result<(), MoveError> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(MoveError::Destination(io::ErrorKind::WriteZero.into())),
            Ok(written) => {
                at += written as u64;
                bytes = &bytes[written..];
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(MoveError::Destination(error.into())),
        }
    }
    Ok(())
}
