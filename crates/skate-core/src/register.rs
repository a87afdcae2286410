//! The register of one process: what its node must know of its objects should it die, in memory that the node can read
//! then.
//!
//! The process makes the memory file itself and sends its node the descriptor; nothing is said when objects are entered
//! or removed. The other side is `python/ray/_node/register.py`, which reads it once, when the process has ended, and
//! trusts nothing in it.
//!
//! The layout, in little-endian words of eight bytes:
//!
//! ```text
//! page 0        MAGIC, number of slots that were ever used
//! SLOTS_MAX     slots of eight words: state and index << 32, task number, node, segment, lessee, offset, length,
//!               deed's offset in units and deed's length << 32
//! DEEDS_BYTES   blocks with deeds, allocated in units of 64 bytes
//! ```
//!
//! A slot's object is owned by this process, so its task number and index name it. The state is 0 for a slot that says
//! nothing; else bit 0 is set, bit 1 if there is a location, bit 2 if there is a deed. It is written last and cleared
//! first, and whatever else it speaks of does not change meanwhile. So the slots are right at each moment at which the
//! process may be killed.
//!
//! The file is sparse: what is not used takes no memory.
//!
//! Invariants: an object has one slot at most; a deed's block is used exactly while its slot is.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use foldhash::fast::RandomState;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use skate_proto::alloc::{BlockAllocator, UNIT_BYTES};
use skate_proto::ids::ObjectId;
use skate_proto::location::Location;

use crate::sys::create_segment;
use crate::transport::fork;

/// "RAYESTAT".
const MAGIC: u64 = u64::from_le_bytes(*b"RAYESTAT");
/// Objects of one process that are recorded; further ones die with it.
pub const SLOTS_MAX: u32 = 65_536;
/// Deeds of one process together; what has none for want of room dies with it.
pub const DEEDS_BYTES: u64 = 32 << 20;
const SLOT_BYTES: u64 = 64;
const SLOTS_AT: u64 = 4096;
const DEEDS_AT: u64 = SLOTS_AT + SLOTS_MAX as u64 * SLOT_BYTES;
pub const REGISTER_BYTES: u64 = DEEDS_AT + DEEDS_BYTES;
/// Memory of deeds that is kept although there are none.
const DEEDS_KEPT_BYTES: u64 = 1 << 20;

const USED: u64 = 1;
const HAS_LOCATION: u64 = 2;
const HAS_DEED: u64 = 4;

struct Entry {
    slot: u32,
    deed: Option<u64>,
}

/// See the module's documentation.
pub struct Register {
    base: NonNull<u8>,
    generation: u32,
    entries: HashMap<ObjectId, Entry, RandomState>,
    vacant: Vec<u32>,
    slots_used: u32,
    deeds: BlockAllocator,
    /// No page of the deeds above this one has been touched since they were last given back.
    deeds_end: u64,
}

// SAFETY: the mapping is this process's own and reached only through `&mut self`; where `base` lies does not depend on
// the thread.
unsafe impl Send for Register {}

impl Register {
    /// An empty register, and the descriptor for the node; the process itself needs none.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let fd = create_segment("ray-register", REGISTER_BYTES)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let len = REGISTER_BYTES as usize;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, fd.as_fd(), 0) }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let new = Self {
            base,
            generation: fork::generation(),
            entries: HashMap::default(),
            vacant: Vec::new(),
            slots_used: 0,
            deeds: BlockAllocator::new(DEEDS_BYTES),
            deeds_end: 0,
        };
        new.word(0).store(MAGIC.to_le(), Ordering::Release);
        Ok((new, fd))
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Enters an object of this process, anew if it is there: false if there is no room for it. Where only the deed has
    /// no room, the location stands alone.
    pub fn enter(&mut self, object: ObjectId, location: Option<&Location>, deed: Option<&[u8]>) -> bool {
        if fork::forked_since(self.generation) {
            return false;
        }
        self.remove(object);
        let deed = deed.and_then(|bytes| Some((self.place_deed(bytes)?, bytes.len())));
        if location.is_none() && deed.is_none() {
            return false;
        }
        let Some(slot) = self.vacant.pop().or_else(|| self.next_slot()) else {
            if let Some((offset, _)) = deed {
                self.free_deed(offset);
            }
            return false;
        };
        let mut words = [0; 8];
        words[0] = USED | (u64::from(object.index) << 32);
        words[1] = object.task.seq;
        if let Some(at) = location {
            words[0] |= HAS_LOCATION;
            words[2..7].copy_from_slice(&[at.node.0, at.segment.0, at.lessee.0, at.offset, at.len]);
        }
        if let Some((offset, len)) = deed {
            words[0] |= HAS_DEED;
            words[7] = (offset / UNIT_BYTES) | ((len as u64) << 32);
        }
        let at = slot_at(slot);
        for (index, word) in words.iter().enumerate().skip(1) {
            self.word(at + 8 * index as u64).store(word.to_le(), Ordering::Relaxed);
        }
        // Pairs with the end of this process: whoever reads the slot then sees the words if it sees the state.
        self.word(at).store(words[0].to_le(), Ordering::Release);
        self.entries.insert(object, Entry { slot, deed: deed.map(|(offset, _)| offset) });
        true
    }

    /// The object is not needed, or its value will change. Harmless for one that is not there.
    pub fn remove(&mut self, object: ObjectId) {
        if fork::forked_since(self.generation) {
            return;
        }
        let Some(Entry { slot, deed }) = self.entries.remove(&object) else { return };
        self.word(slot_at(slot)).store(0, Ordering::Relaxed);
        // The slot is void before anything that it spoke of changes.
        fence(Ordering::SeqCst);
        self.vacant.push(slot);
        if let Some(offset) = deed {
            self.free_deed(offset);
        }
    }

    fn next_slot(&mut self) -> Option<u32> {
        if self.slots_used == SLOTS_MAX {
            return None;
        }
        self.slots_used += 1;
        self.word(8).store(u64::from(self.slots_used).to_le(), Ordering::Release);
        Some(self.slots_used - 1)
    }

    fn place_deed(&mut self, bytes: &[u8]) -> Option<u64> {
        let offset = self.deeds.alloc(bytes.len() as u64)?;
        let end = offset + (bytes.len() as u64).max(1);
        assert!(end <= DEEDS_BYTES, "a deed lies in the register");
        self.deeds_end = self.deeds_end.max(end);
        // SAFETY: `DEEDS_AT + end` is at most the mapping's length, which lives as long as this; no slot speaks of the
        // block, and the source is memory of this process outside of the mapping.
        unsafe {
            let to = self.base.as_ptr().add((DEEDS_AT + offset) as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Some(offset)
    }

    fn free_deed(&mut self, offset: u64) {
        self.deeds.free(offset).expect("a deed is freed once");
        if self.deeds.is_empty() && self.deeds_end > DEEDS_KEPT_BYTES {
            // SAFETY: the range is part of the mapping, and nothing in it is used.
            let _ = unsafe {
                let from = self.base.as_ptr().add(DEEDS_AT as usize);
                rustix::mm::madvise(from.cast(), DEEDS_BYTES as usize, Advice::LinuxRemove)
            };
            self.deeds_end = 0;
        }
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at + 8 <= DEEDS_AT && at.is_multiple_of(8), "words lie before the deeds");
        // SAFETY: the offset lies within the mapping and is aligned, as the mapping is; the word is only reached through
        // atomics in this process, and others only read it.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at as usize).cast()) }
    }
}

impl Drop for Register {
    fn drop(&mut self) {
        // In a forked child the range is not ours and may be someone else's by now.
        if !fork::forked_since(self.generation) {
            // SAFETY: the range was mapped by `create`, and nothing points into it beyond a call.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), REGISTER_BYTES as usize) };
        }
    }
}

fn slot_at(slot: u32) -> u64 {
    SLOTS_AT + u64::from(slot) * SLOT_BYTES
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use skate_proto::ids::{NodeKey, ProcId, SegmentId, TaskId};

    use super::*;

    fn object(seq: u64) -> ObjectId {
        ObjectId { task: TaskId { node: NodeKey(1), proc: ProcId(2), seq }, index: 3 }
    }

    fn place(offset: u64) -> Location {
        Location { node: NodeKey(1), segment: SegmentId(4), lessee: ProcId(2), offset, len: 100_000 }
    }

    /// What a node would read: task number, offset of the location, deed.
    fn read(fd: &OwnedFd) -> Vec<(u64, Option<u64>, Option<Vec<u8>>)> {
        let file = std::fs::File::from(fd.try_clone().unwrap());
        let word = |at: u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!(word(0), MAGIC);
        let mut found = Vec::new();
        for slot in 0..word(8) {
            let at = SLOTS_AT + slot * SLOT_BYTES;
            let state = word(at);
            if state & USED == 0 {
                continue;
            }
            assert_eq!(state >> 32, 3);
            let location = (state & HAS_LOCATION != 0).then(|| word(at + 40));
            let deed = (state & HAS_DEED != 0).then(|| {
                let (from, len) = (word(at + 56) & u64::from(u32::MAX), word(at + 56) >> 32);
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, DEEDS_AT + from * UNIT_BYTES).unwrap();
                bytes
            });
            found.push((word(at + 8), location, deed));
        }
        found.sort();
        found
    }

    #[test]
    fn beyond_the_last_slot_objects_are_not_recorded() {
        let (mut register, fd) = Register::create().unwrap();
        for seq in 0..u64::from(SLOTS_MAX) {
            assert!(register.enter(object(seq), Some(&place(0)), None));
        }
        assert!(!register.enter(object(1 << 40), Some(&place(0)), Some(b"deed")));
        register.remove(object(7));
        assert!(register.enter(object(1 << 40), Some(&place(0)), Some(b"deed")));
        assert_eq!(read(&fd).len(), SLOTS_MAX as usize);
        assert_eq!(register.deeds.used_blocks(), 1, "the deed that found no slot was freed");
    }

    #[test]
    fn without_room_for_a_deed_the_location_stands_alone() {
        let (mut register, fd) = Register::create().unwrap();
        let deed = vec![5; 1 << 20];
        for seq in 0..32 {
            assert!(register.enter(object(seq), None, Some(&deed)));
        }
        assert!(!register.enter(object(32), None, Some(b"x")));
        assert!(register.enter(object(33), Some(&place(64)), Some(b"x")));
        assert_eq!(read(&fd).last(), Some(&(33, Some(64), None)));
    }

    #[test]
    fn memory_of_deeds_is_given_back_when_there_are_none() {
        let (mut register, fd) = Register::create().unwrap();
        let blocks = || rustix::fs::fstat(&fd).unwrap().st_blocks as u64 * 512;
        for seq in 0..16 {
            register.enter(object(seq), None, Some(&[9; 1 << 20]));
        }
        assert!(blocks() >= 16 << 20);
        (0..16).for_each(|seq| register.remove(object(seq)));
        assert!(blocks() < 1 << 20, "{} bytes are kept", blocks());
        register.enter(object(1), None, Some(b"again"));
        assert_eq!(read(&fd), [(1, None, Some(b"again".to_vec()))]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_node_reads_what_was_entered_and_not_removed(
            steps in proptest::collection::vec((any::<bool>(), 0_u64..12, 0_usize..300, any::<bool>()), 1..120),
        ) {
            let (mut register, fd) = Register::create().unwrap();
            let mut expected = std::collections::BTreeMap::new();
            for (enters, seq, len, is_stored) in steps {
                if enters {
                    let deed = (len > 0).then(|| vec![seq as u8; len]);
                    let location = is_stored.then(|| place(len as u64 * 64));
                    let is_there = register.enter(object(seq), location.as_ref(), deed.as_deref());
                    prop_assert_eq!(is_there, location.is_some() || deed.is_some());
                    expected.remove(&seq);
                    if is_there {
                        expected.insert(seq, (location.map(|at| at.offset), deed));
                    }
                } else {
                    register.remove(object(seq));
                    expected.remove(&seq);
                }
                let oracle: Vec<_> = expected.iter().map(|(seq, (at, deed))| (*seq, *at, deed.clone())).collect();
                prop_assert_eq!(read(&fd), oracle);
                prop_assert_eq!(register.len(), expected.len());
            }
        }
    }
}
