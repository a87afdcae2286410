//! Segments in this process's memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};
use thiserror::Error;

use skate_proto::ids::SegmentId;

use crate::transport::fork;

/// Why a segment could not be mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    #[error("segment {:#x} of {size} bytes could not be mapped: {source}", segment.0)]
    System { segment: SegmentId, size: u64, source: io::Error },
    #[error("segment {:#x} has {actual} bytes and {announced} were announced", segment.0)]
    Size { segment: SegmentId, announced: u64, actual: u64 },
    /// A segment that can shrink could take pages away under a reader, who would die of it.
    #[error("segment {:#x} is not sealed against shrinking", segment.0)]
    NotSealed { segment: SegmentId },
}

/// One segment, mapped as long as this lives.
///
/// Invariant: `base..base + len` is mapped for as long as the mapping lives in the process that made it;
/// the file behind it cannot shrink. In a forked child it is not mapped, and nothing here is to be used.
#[derive(Debug)]
pub struct Mapping {
    segment: SegmentId,
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    generation: u32,
}

// SAFETY: the mapping is shared memory in any case; whoever makes a reference of a pointer into it must
// know that nobody writes there, on whatever thread or process. This type only does arithmetic on `base`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(segment: SegmentId, size: u64, fd: &OwnedFd, writable: bool) -> Result<Self, MapError> {
        let system = |source: rustix::io::Errno| MapError::System { segment, size, source: source.into() };
        let actual = rustix::fs::fstat(fd).map_err(system)?.st_size as u64;
        let len = usize::try_from(size).map_err(|_| system(rustix::io::Errno::FBIG))?;
        if actual != size || len == 0 {
            return Err(MapError::Size { segment, announced: size, actual });
        }
        if !rustix::fs::fcntl_get_seals(fd).map_err(system)?.contains(SealFlags::SHRINK) {
            return Err(MapError::NotSealed { segment });
        }
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, fd.as_fd(), 0) };
        let base = NonNull::new(base.map_err(system)?.cast::<u8>()).ok_or_else(|| system(rustix::io::Errno::NOMEM))?;
        // A forked child of the user's program inherits the mapping: arrays that came from `ray.get` go
        // on to work there. The core itself refuses to be used in it.
        Ok(Self { segment, base, len, writable, generation: fork::generation() })
    }

    #[must_use]
    pub fn segment(&self) -> SegmentId {
        self.segment
    }

    /// Bytes of the segment.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len as u64
    }

    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where a block lies, or `None` if it is not inside the segment. Offset and length may come from
    /// anywhere. The pointer is good for reading `len` bytes as long as the mapping lives.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Option<*const u8> {
        self.pointer(offset, len).map(<*mut u8>::cast_const)
    }

    /// Like [`Self::slice`], for writing.
    pub(super) fn slice_mut(&self, offset: u64, len: u64) -> Option<*mut u8> {
        if self.writable { self.pointer(offset, len) } else { None }
    }

    fn pointer(&self, offset: u64, len: u64) -> Option<*mut u8> {
        if fork::forked_since(self.generation) || offset.checked_add(len)? > self.len as u64 {
            return None;
        }
        // SAFETY: `offset` is at most the length of the mapping, which is one allocated object.
        Some(unsafe { self.base.as_ptr().add(offset as usize) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a forked child the range is not ours and may be someone else's by now.
        if !fork::forked_since(self.generation) {
            // SAFETY: the range was mapped by `new`, and pointers into it are good only while this lives.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}
