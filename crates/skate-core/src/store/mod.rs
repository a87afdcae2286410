//! The segments of one process: those it leased, in which it allocates, and those of others, which it
//! reads.
//!
//! Knows nothing of objects, references or messages: who needs a segment asks the node and then calls
//! [`Store::add_segment`]; who reads a [`Location`] asks for the descriptor and calls
//! [`Store::map_readonly`].
//!
//! Objects up to [`SHARED_OBJECT_BYTES_MAX`] share segments. A larger one has a segment of its
//! own, or at least an empty one of which it takes more than half; so no small block keeps gigabytes.
//! Segments that become empty are kept warm within [`Store::surplus`].
//!
//! Invariants: a segment is either leased or mapped for reading, never both; a leased one's allocator
//! covers exactly its mapping.

mod copy;
mod mapping;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use skate_proto::alloc::BlockAllocator;
use skate_proto::ids::{NodeKey, ProcId, SegmentId};
use skate_proto::location::Location;

use crate::transport::fork;

pub use mapping::{MapError, Mapping};
pub use skate_proto::alloc::NotABlock;

/// The first segment that a process wishes for; each further one is twice the last.
pub const SHARED_SEGMENT_BYTES_MIN: u64 = 4 << 20;
/// Larger segments are not shared by objects.
pub const SHARED_SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// A larger object gets a segment of its own.
pub const SHARED_OBJECT_BYTES_MAX: u64 = 4 << 20;
/// Own segments are hardly larger than their object: the store's capacity is for objects.
const OWN_SEGMENT_STEP_BYTES: u64 = 64 << 10;
/// Segments of others that stay mapped although nothing uses them: mapping anew costs a round trip to
/// the node and a fault per page, but their memory cannot be given back meanwhile.
const IDLE_MAPPINGS_MAX: usize = 16;

/// A block that this process may write until it publishes its location.
#[derive(Clone, Debug)]
pub struct Block {
    location: Location,
    mapping: Arc<Mapping>,
}

impl Block {
    #[must_use]
    pub fn location(&self) -> Location {
        self.location
    }

    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The block's first byte, for writing `location().len` bytes before it is published.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        let pointer = self.mapping.slice_mut(self.location.offset, self.location.len);
        // A block is made of a writable mapping and an offset that its allocator gave out; only in a
        // forked child is it not there.
        pointer.expect("a block lies in its segment, in the process that leased it")
    }
}

struct Leased {
    mapping: Arc<Mapping>,
    allocator: BlockAllocator,
    /// When it became empty, counted in frees; meaningless while it is not.
    emptied_at: u64,
}

#[derive(Default)]
struct State {
    /// The one that was used last is the last: it is the warmest, and tried first.
    leased: Vec<Leased>,
    read: HashMap<SegmentId, Arc<Mapping>, RandomState>,
    /// Order in which `read` was filled.
    read_order: Vec<SegmentId>,
    frees: u64,
    /// What the node has asked for and not got: segments that become empty are not kept meanwhile.
    owed_bytes: u64,
}

/// Figures of a store, in bytes where not said otherwise.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub leased_segments: usize,
    pub leased_bytes: u64,
    pub used_blocks: usize,
    pub used_bytes: u64,
    pub read_segments: usize,
    pub read_bytes: u64,
}

/// See the module's documentation. Any thread may call anything.
pub struct Store {
    me: ProcId,
    node: NodeKey,
    state: Mutex<State>,
}

impl Store {
    #[must_use]
    pub fn new(me: ProcId, node: NodeKey) -> Self {
        fork::install();
        Self { me, node, state: Mutex::default() }
    }

    /// Takes a block of `len` bytes. `None`: get a segment first, at best of [`Self::wish_bytes`].
    #[must_use]
    pub fn alloc(&self, len: u64) -> Option<Block> {
        let mut state = self.state.lock();
        let candidates = state.leased.iter_mut().enumerate().rev().filter(|(_, s)| may_hold(s, len));
        let (at, offset) = candidates.into_iter().find_map(|(at, s)| Some((at, s.allocator.alloc(len)?)))?;
        let last = state.leased.len() - 1;
        state.leased.swap(at, last);
        let mapping = Arc::clone(&state.leased[last].mapping);
        let location = Location { node: self.node, segment: mapping.segment(), lessee: self.me, offset, len };
        assert!(mapping.slice_mut(offset, len).is_some(), "a block lies in its segment");
        Some(Block { location, mapping })
    }

    /// The size of the segment to wish for when a block of `len` bytes could not be had. Any segment that holds the
    /// block serves, which is what a nearly full store has.
    #[must_use]
    pub fn wish_bytes(&self, len: u64) -> u64 {
        if len > SHARED_OBJECT_BYTES_MAX {
            return len.next_multiple_of(OWN_SEGMENT_STEP_BYTES);
        }
        let state = self.state.lock();
        let is_shared = |leased: &&Leased| leased.mapping.size() <= SHARED_SEGMENT_BYTES_MAX;
        let doublings = state.leased.iter().filter(is_shared).count().min(4);
        let fitting = len.next_power_of_two().max(SHARED_SEGMENT_BYTES_MIN << doublings);
        fitting.min(SHARED_SEGMENT_BYTES_MAX)
    }

    /// Takes over a segment that the node leased to this process.
    pub fn add_segment(&self, segment: SegmentId, size: u64, fd: &OwnedFd) -> Result<(), MapError> {
        let mapping = Arc::new(Mapping::new(segment, size, fd, true)?);
        let leased = Leased { mapping, allocator: BlockAllocator::new(size), emptied_at: 0 };
        let mut state = self.state.lock();
        assert!(find(&state, segment).is_none(), "a segment is leased once");
        state.leased.push(leased);
        Ok(())
    }

    /// Maps a segment of another process for reading, or returns its mapping if there is one already.
    pub fn map_readonly(&self, segment: SegmentId, size: u64, fd: &OwnedFd) -> Result<Arc<Mapping>, MapError> {
        if let Some(mapping) = self.mapping(segment) {
            return Ok(mapping);
        }
        let new = Arc::new(Mapping::new(segment, size, fd, false)?);
        let mut state = self.state.lock();
        if let Some(mapping) = state.read.get(&segment) {
            return Ok(Arc::clone(mapping));
        }
        state.read.insert(segment, Arc::clone(&new));
        state.read_order.push(segment);
        let idle = unmap_idle(&mut state, IDLE_MAPPINGS_MAX);
        drop(state);
        drop(idle);
        Ok(new)
    }

    /// The mapping of a segment that is leased or read.
    #[must_use]
    pub fn mapping(&self, segment: SegmentId) -> Option<Arc<Mapping>> {
        let state = self.state.lock();
        if let Some(mapping) = state.read.get(&segment) {
            return Some(Arc::clone(mapping));
        }
        find(&state, segment).map(|at| Arc::clone(&state.leased[at].mapping))
    }

    /// Forgets the mapping of a segment of another process; views on it keep it until they end.
    pub fn unmap(&self, segment: SegmentId) {
        let mut state = self.state.lock();
        state.read_order.retain(|&other| other != segment);
        let mapping = state.read.remove(&segment);
        drop(state);
        drop(mapping);
    }

    /// Forgets all mappings of other processes' segments that nothing uses.
    pub fn unmap_idle(&self) {
        let idle = unmap_idle(&mut self.state.lock(), 0);
        drop(idle);
    }

    /// Gives back a block of a segment that this process leased. Look at [`Self::surplus`] afterwards.
    pub fn free(&self, segment: SegmentId, offset: u64) -> Result<(), NotABlock> {
        let mut state = self.state.lock();
        let at = find(&state, segment).ok_or(NotABlock { offset })?;
        state.frees += 1;
        let now = state.frees;
        let leased = &mut state.leased[at];
        leased.allocator.free(offset)?;
        leased.emptied_at = now;
        let last = state.leased.len() - 1;
        state.leased.swap(at, last);
        Ok(())
    }

    /// Takes out empty segments that are not worth keeping warm, to be released to the node: the most
    /// recently emptied one is kept, and others up to a quarter of what is leased; unless the node asked for more.
    #[must_use]
    pub fn surplus(&self) -> Vec<SegmentId> {
        let mut state = self.state.lock();
        let (leased, empty, latest) = state.leased.iter().fold((0, 0, (0, 0)), |(all, empty, latest), s| {
            let size = s.mapping.size();
            if s.allocator.is_empty() {
                (all + size, empty + size, latest.max((s.emptied_at, size)))
            } else {
                (all + size, empty, latest)
            }
        });
        let allowed = latest.1.max(leased / 4);
        let want = empty.saturating_sub(allowed).max(state.owed_bytes.min(empty));
        let taken = take_empty(&mut state, want);
        state.owed_bytes = state.owed_bytes.saturating_sub(size_of(&taken));
        drop(state);
        taken.iter().map(|leased| leased.mapping.segment()).collect()
    }

    /// Takes out empty segments of together at least `want_bytes`, if there are so many, to be released to
    /// the node. What is lacking is found by [`Self::surplus`] later.
    #[must_use]
    pub fn take_empty(&self, want_bytes: u64) -> Vec<SegmentId> {
        let mut state = self.state.lock();
        let taken = take_empty(&mut state, want_bytes);
        state.owed_bytes = want_bytes.saturating_sub(size_of(&taken));
        drop(state);
        taken.iter().map(|leased| leased.mapping.segment()).collect()
    }

    /// How many blocks were freed so far: who waits for room looks again when there are more.
    #[must_use]
    pub fn frees(&self) -> u64 {
        self.state.lock().frees
    }

    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let state = self.state.lock();
        Statistics {
            leased_segments: state.leased.len(),
            leased_bytes: state.leased.iter().map(|s| s.mapping.size()).sum(),
            used_blocks: state.leased.iter().map(|s| s.allocator.used_blocks()).sum(),
            used_bytes: state.leased.iter().map(|s| s.allocator.used_bytes()).sum(),
            read_segments: state.read.len(),
            read_bytes: state.read_order.iter().filter_map(|id| state.read.get(id)).map(|m| m.size()).sum(),
        }
    }
}

/// Copies parts into a block of which nothing was published yet, each to its offset in the block; by
/// several threads when they are large.
///
/// # Panics
/// If a part does not lie in the block, or if two parts overlap in it.
pub fn copy_into(block: &Block, parts: &[(u64, &[u8])]) {
    let base = block.as_mut_ptr();
    let mut end = 0;
    let placed: Vec<(*mut u8, &[u8])> = parts
        .iter()
        .map(|&(at, bytes)| {
            assert!(at >= end, "parts are in order and do not overlap");
            end = at.checked_add(bytes.len() as u64).expect("offsets are inside a block");
            assert!(end <= block.location.len, "a part lies in its block");
            (base.wrapping_add(at as usize), bytes)
        })
        .collect();
    // SAFETY: `as_mut_ptr` gives `location.len` writable bytes, checked against every part above, and the
    // parts do not overlap. The block is not published, so no reader of it exists, and the sources, being
    // Rust slices that may be read, do not lie in it.
    unsafe { copy::copy(&placed) };
}

/// Whether a block of `len` bytes may be put into a segment, by the rule of the module's documentation.
fn may_hold(leased: &Leased, len: u64) -> bool {
    let size = leased.mapping.size();
    if len <= SHARED_OBJECT_BYTES_MAX {
        return size <= SHARED_SEGMENT_BYTES_MAX;
    }
    leased.allocator.is_empty() && len <= size && size / 2 <= len
}

fn find(state: &State, segment: SegmentId) -> Option<usize> {
    state.leased.iter().rposition(|leased| leased.mapping.segment() == segment)
}

fn size_of(segments: &[Leased]) -> u64 {
    segments.iter().map(|leased| leased.mapping.size()).sum()
}

/// Takes out the segments that have been empty longest. They are dropped by the caller, after the lock:
/// unmapping gigabytes takes a while.
fn take_empty(state: &mut State, want_bytes: u64) -> Vec<Leased> {
    let mut taken = Vec::new();
    let mut bytes = 0;
    while bytes < want_bytes {
        let empty = state.leased.iter().enumerate().filter(|(_, s)| s.allocator.is_empty());
        let Some((at, _)) = empty.min_by_key(|(_, s)| s.emptied_at) else {
            break;
        };
        let leased = state.leased.remove(at);
        bytes += leased.mapping.size();
        taken.push(leased);
    }
    taken
}

/// Takes out the oldest unused mappings until at most `keep` are left, to be dropped after the lock.
fn unmap_idle(state: &mut State, keep: usize) -> Vec<Arc<Mapping>> {
    let State { read, read_order, .. } = state;
    let is_idle = |segment: &SegmentId| read.get(segment).is_some_and(|m| Arc::strong_count(m) == 1);
    let idle: Vec<SegmentId> = read_order.iter().copied().filter(is_idle).collect();
    let gone = &idle[..idle.len().saturating_sub(keep)];
    read_order.retain(|segment| !gone.contains(segment));
    gone.iter().filter_map(|segment| read.remove(segment)).collect()
}
