//! Spill files: values that left memory, on disks of one node.
//!
//! A node process has files written ([`Spiller::write`]), has values read back into segments ([`Spiller::read`]), and
//! is told of the end of each. What is here: threads, the format, checksums. What is not: which values leave memory,
//! which file has which, and when a file is of no use any more; that is `_node/spills.py`.
//!
//! A file is written once, by one job, from its start to its end, and never again; it holds one large value or many
//! small ones, each behind a header ([`format`]). What the machine decides later (a file with much garbage is written
//! anew without it) is another file.
//!
//! Files live as long as their session, so nothing is synchronised to the device: after a crash of the machine nobody
//! would read them. Pages are written by copying through a small buffer that stays in the processor's cache, which
//! costs less than the checksum; nothing is mapped, so no page of a segment is faulted in, nor cleared before it is
//! written.
//!
//! Invariants: a job is told of once; a file of a job that failed is gone before that; the bytes of a value are given
//! out only if they are those that were written.

pub mod format;
mod jobs;
mod pool;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use format::{DamagedHeader, OBJECT_LEN};
use pool::Pool;

/// Files that are written at a time. Further ones wait in order.
pub const WRITERS_MAX: usize = 2;
/// Values that are read at a time. Further ones wait in order.
pub const READERS_MAX: usize = 4;

/// From where a value goes into a file.
#[derive(Debug)]
pub enum Source {
    /// A block of a segment.
    Block { segment: Arc<OwnedFd>, offset: u64 },
    /// A record of another file, which is taken over with its header and checksum.
    Record { path: PathBuf, at: u64 },
}

/// A value on its way into a file.
#[derive(Debug)]
pub struct Piece {
    pub object: [u8; OBJECT_LEN],
    pub source: Source,
    pub len: u64,
    /// Where its header begins in the file: see [`format::record_bytes`].
    pub at: u64,
}

/// A file to be written.
#[derive(Debug)]
pub struct Write {
    /// Names the job; chosen by the caller, and free again after the [`Outcome`].
    pub ticket: u64,
    pub path: PathBuf,
    /// In order of their places, without overlap.
    pub pieces: Vec<Piece>,
    /// The share of the file system, in use by anybody, beyond which nothing is written.
    pub capacity_share: f64,
}

/// A value to be read back.
#[derive(Debug)]
pub struct Read {
    pub ticket: u64,
    pub path: PathBuf,
    pub object: [u8; OBJECT_LEN],
    pub at: u64,
    pub len: u64,
    /// The segment that the value is written to, from its first byte on.
    pub segment: OwnedFd,
}

/// How a job ended. Nothing is written by it any more.
#[derive(Debug)]
pub struct Outcome {
    pub ticket: u64,
    pub result: Result<(), SpillError>,
}

#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SpillError {
    /// There is no room for the file, or it would take more than the share that spill files may fill.
    #[error("{0}")]
    Full(String),
    /// The file is not there, or is not what was written.
    #[error("{0}")]
    Damaged(String),
    #[error("{0}")]
    Io(String),
}

impl From<DamagedHeader> for SpillError {
    fn from(error: DamagedHeader) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// The threads of one node that write and read spill files. They are started when there is something to do, and end
/// when there has been nothing for a while.
pub struct Spiller {
    writers: Pool<Write>,
    readers: Pool<Read>,
}

impl Spiller {
    /// `written` and `restored` hear of the end of every job, once, on any thread; they must not block.
    #[must_use]
    pub fn new(
        written: impl Fn(Outcome) + Send + Sync + 'static,
        restored: impl Fn(Outcome) + Send + Sync + 'static,
    ) -> Self {
        let write = move |job: Write| written(Outcome { ticket: job.ticket, result: jobs::write(&job) });
        let read = move |job: Read| restored(Outcome { ticket: job.ticket, result: jobs::read(&job) });
        Self {
            writers: Pool::new("skate-spill", WRITERS_MAX, write),
            readers: Pool::new("skate-restore", READERS_MAX, read),
        }
    }

    pub fn write(&self, job: Write) {
        self.writers.add(job);
    }

    pub fn read(&self, job: Read) {
        self.readers.add(job);
    }

    /// Ends all threads, each after the job that it is at. Nothing is told of those that had not begun. May be repeated.
    pub fn shutdown(&self) {
        self.writers.shutdown();
        self.readers.shutdown();
    }
}

impl Drop for Spiller {
    fn drop(&mut self) {
        self.shutdown();
    }
}
