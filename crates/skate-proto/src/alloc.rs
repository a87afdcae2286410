//! The blocks of one segment.
//!
//! A lessee allocates in its segment by itself, without asking anyone. The bookkeeping lies outside the
//! segment, in the lessee's own memory: other processes map the segment and could otherwise corrupt it,
//! and a header in front of each block would cost the alignment of the next.
//!
//! The method is two-level segregated fit (Masmano et al., TLSF, ECRTS 2004) with the free lists kept
//! out of band: free blocks are binned by the position of their highest bit and the three bits below it,
//! two bitmaps find the first bin that surely fits, and freed neighbours are joined at once. Allocation
//! and freeing take constant time.
//!
//! Which of the fitting blocks is taken matters more than usual: the first touch of a page costs several
//! times the copy into it. Each bin is a stack, so the block freed last is used first; a few entries of
//! the bin that *may* fit are tried before a larger block is cut, so a value of the same size gets the
//! pages of its predecessor; and cuts are taken from the low end, so that pages that were never touched
//! stay together at the high end.
//!
//! Invariants: blocks tile the segment without gap or overlap; no two free blocks touch; a block is in a
//! bin exactly if it is free; `used` is the sum of the used blocks.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use thiserror::Error;

/// Blocks start at multiples of this and their lengths are rounded up to it: a cache line, and what
/// numpy, Arrow and vector instructions like.
pub const UNIT_BYTES: u64 = 64;
/// Larger segments are not made: block positions are 32-bit counts of units.
pub const SEGMENT_BYTES_MAX: u64 = (u32::MAX as u64) * UNIT_BYTES;

/// Steps per power of two. Eight keep what rounding up may pass over below an eighth.
const STEP_BITS: u32 = 3;
const STEPS: u32 = 1 << STEP_BITS;
const BINS: usize = (32 * STEPS) as usize;
/// Entries of a bin that are looked at because they may fit, before a block that surely fits is cut.
const PROBES_MAX: u32 = 8;

const NONE: u32 = u32::MAX;

/// An offset at which no used block starts.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[error("no block in use starts at offset {offset} of this segment; it was freed before, or never given out")]
pub struct NotABlock {
    pub offset: u64,
}

#[derive(Copy, Clone, Debug)]
struct Block {
    offset: u32,
    len: u32,
    /// Neighbours by address.
    below: u32,
    above: u32,
    /// Neighbours in the bin; meaningless while the block is used.
    newer: u32,
    older: u32,
    used: bool,
}

/// Allocates in one segment. See the module's documentation.
#[derive(Debug)]
pub struct BlockAllocator {
    blocks: Vec<Block>,
    /// Entries of `blocks` that describe nothing.
    vacant: Vec<u32>,
    /// Used blocks by their offset in units.
    by_offset: HashMap<u32, u32, RandomState>,
    bins: Vec<u32>,
    /// Bit `n`: some bin of the power of two `n` is not empty.
    powers: u32,
    /// Bit `n` of entry `p`: bin `n` of power `p` is not empty.
    steps: [u8; 32],
    units: u32,
    used_units: u32,
}

impl BlockAllocator {
    /// # Panics
    /// If the segment has no whole unit, or more than [`SEGMENT_BYTES_MAX`] bytes.
    #[must_use]
    pub fn new(segment_bytes: u64) -> Self {
        assert!((UNIT_BYTES..=SEGMENT_BYTES_MAX).contains(&segment_bytes));
        let units = (segment_bytes / UNIT_BYTES) as u32;
        let mut new = Self {
            blocks: Vec::new(),
            vacant: Vec::new(),
            by_offset: HashMap::default(),
            bins: vec![NONE; BINS],
            powers: 0,
            steps: [0; 32],
            units,
            used_units: 0,
        };
        let whole = new.describe(Block {
            offset: 0,
            len: units,
            below: NONE,
            above: NONE,
            newer: NONE,
            older: NONE,
            used: false,
        });
        new.push_free(whole);
        new
    }

    /// Takes a block of at least `len` bytes (of one unit, if `len` is 0) and returns its offset, or
    /// `None` if no free block is long enough.
    pub fn alloc(&mut self, len: u64) -> Option<u64> {
        let units = u32::try_from(len.div_ceil(UNIT_BYTES).max(1)).ok()?;
        let index = self.find(units)?;
        self.remove_free(index);
        self.cut(index, units);
        let block = &mut self.blocks[index as usize];
        assert!(!block.used && block.len == units, "a free block of the right length was chosen");
        block.used = true;
        let offset = block.offset;
        self.used_units += units;
        let before = self.by_offset.insert(offset, index);
        assert!(before.is_none(), "no two used blocks share an offset");
        Some(u64::from(offset) * UNIT_BYTES)
    }

    /// Gives a block back and returns its length in bytes.
    pub fn free(&mut self, offset: u64) -> Result<u64, NotABlock> {
        let wrong = NotABlock { offset };
        if !offset.is_multiple_of(UNIT_BYTES) {
            return Err(wrong);
        }
        let key = u32::try_from(offset / UNIT_BYTES).map_err(|_| wrong)?;
        let index = self.by_offset.remove(&key).ok_or(wrong)?;
        let block = &mut self.blocks[index as usize];
        assert!(block.used && block.offset == key, "the table of used blocks names used blocks");
        block.used = false;
        let len = block.len;
        self.used_units -= len;
        let index = self.join(index);
        self.push_free(index);
        Ok(u64::from(len) * UNIT_BYTES)
    }

    /// Length in bytes of the used block at `offset`, as it was rounded up.
    #[must_use]
    pub fn block_bytes(&self, offset: u64) -> Option<u64> {
        let key = u32::try_from(offset / UNIT_BYTES).ok().filter(|_| offset.is_multiple_of(UNIT_BYTES))?;
        let index = *self.by_offset.get(&key)?;
        Some(u64::from(self.blocks[index as usize].len) * UNIT_BYTES)
    }

    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        u64::from(self.units) * UNIT_BYTES
    }

    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.used_units) * UNIT_BYTES
    }

    #[must_use]
    pub fn used_blocks(&self) -> usize {
        self.by_offset.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_offset.is_empty()
    }

    /// A free block that holds `units`: one that may fit and was freed recently, else the first of a bin
    /// that surely fits, else (the segment is nearly full) any of the bin that may fit.
    fn find(&self, units: u32) -> Option<u32> {
        let may_fit = bin_of(units);
        if let Some(index) = self.probe(may_fit, units, PROBES_MAX) {
            return Some(index);
        }
        match self.first_bin_from(may_fit + 1) {
            Some(bin) => Some(self.bins[bin]),
            None => self.probe(may_fit, units, u32::MAX),
        }
    }

    fn probe(&self, bin: usize, units: u32, probes: u32) -> Option<u32> {
        let mut index = self.bins[bin];
        for _ in 0..probes {
            if index == NONE {
                return None;
            }
            let block = &self.blocks[index as usize];
            if block.len >= units {
                return Some(index);
            }
            index = block.older;
        }
        None
    }

    fn first_bin_from(&self, bin: usize) -> Option<usize> {
        if bin >= BINS {
            return None;
        }
        let (power, step) = (bin as u32 / STEPS, bin as u32 % STEPS);
        let here = self.steps[power as usize] & (u8::MAX << step);
        if here != 0 {
            return Some((power * STEPS + here.trailing_zeros()) as usize);
        }
        let above = if power == 31 { 0 } else { self.powers & (u32::MAX << (power + 1)) };
        (above != 0).then(|| {
            let power = above.trailing_zeros();
            (power * STEPS + self.steps[power as usize].trailing_zeros()) as usize
        })
    }

    /// Leaves the low `units` of a block that is in no bin, and makes a free block of the rest.
    fn cut(&mut self, index: u32, units: u32) {
        let Block { offset, len, above, .. } = self.blocks[index as usize];
        assert!(len >= units);
        if len == units {
            return;
        }
        let rest = self.describe(Block {
            offset: offset + units,
            len: len - units,
            below: index,
            above,
            newer: NONE,
            older: NONE,
            used: false,
        });
        if above != NONE {
            self.blocks[above as usize].below = rest;
        }
        let block = &mut self.blocks[index as usize];
        block.len = units;
        block.above = rest;
        self.push_free(rest);
    }

    /// Joins a block that is in no bin with its free neighbours, and returns the joined one.
    fn join(&mut self, index: u32) -> u32 {
        let Block { below, above, .. } = self.blocks[index as usize];
        if above != NONE && !self.blocks[above as usize].used {
            self.remove_free(above);
            self.absorb(index, above);
        }
        if below != NONE && !self.blocks[below as usize].used {
            self.remove_free(below);
            self.absorb(below, index);
            return below;
        }
        index
    }

    fn absorb(&mut self, low: u32, high: u32) {
        let Block { offset, len, above, .. } = self.blocks[high as usize];
        let block = &mut self.blocks[low as usize];
        assert_eq!(block.offset + block.len, offset, "joined blocks touch");
        block.len += len;
        block.above = above;
        if above != NONE {
            self.blocks[above as usize].below = low;
        }
        self.vacant.push(high);
    }

    fn push_free(&mut self, index: u32) {
        let bin = bin_of(self.blocks[index as usize].len);
        let older = self.bins[bin];
        let block = &mut self.blocks[index as usize];
        block.newer = NONE;
        block.older = older;
        if older != NONE {
            self.blocks[older as usize].newer = index;
        }
        self.bins[bin] = index;
        let (power, step) = (bin as u32 / STEPS, bin as u32 % STEPS);
        self.steps[power as usize] |= 1 << step;
        self.powers |= 1 << power;
    }

    fn remove_free(&mut self, index: u32) {
        let Block { len, newer, older, used, .. } = self.blocks[index as usize];
        assert!(!used, "only free blocks are in bins");
        if older != NONE {
            self.blocks[older as usize].newer = newer;
        }
        if newer != NONE {
            self.blocks[newer as usize].older = older;
            return;
        }
        let bin = bin_of(len);
        assert_eq!(self.bins[bin], index, "the newest block heads its bin");
        self.bins[bin] = older;
        if older == NONE {
            let (power, step) = (bin as u32 / STEPS, bin as u32 % STEPS);
            self.steps[power as usize] &= !(1 << step);
            if self.steps[power as usize] == 0 {
                self.powers &= !(1 << power);
            }
        }
    }

    fn describe(&mut self, block: Block) -> u32 {
        match self.vacant.pop() {
            Some(index) => {
                self.blocks[index as usize] = block;
                index
            }
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as u32
            }
        }
    }

    /// Checks every invariant of the module's documentation, in time linear in the number of blocks.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check_invariants(&self) {
        let is_first = |b: &(usize, &Block)| b.1.offset == 0 && !self.vacant.contains(&(b.0 as u32));
        let mut at = self.blocks.iter().enumerate().find(is_first).map_or(NONE, |(i, _)| i as u32);
        let (mut below, mut end, mut used, mut used_count, mut free_count) = (NONE, 0, 0, 0, 0);
        let mut free_before = false;
        while at != NONE {
            let block = &self.blocks[at as usize];
            assert_eq!((block.offset, block.below), (end, below), "blocks tile the segment");
            assert!(block.len > 0);
            if block.used {
                used += block.len;
                used_count += 1;
                assert_eq!(self.by_offset.get(&block.offset), Some(&at));
            } else {
                assert!(!free_before, "free neighbours are joined");
                free_count += 1;
            }
            free_before = !block.used;
            end += block.len;
            below = at;
            at = block.above;
        }
        assert_eq!(end, self.units, "blocks tile the segment");
        assert_eq!((used, used_count), (self.used_units, self.by_offset.len()));
        assert_eq!(self.binned(), free_count, "exactly the free blocks are in bins");
        assert_eq!(self.blocks.len(), used_count + free_count + self.vacant.len());
    }

    fn binned(&self) -> usize {
        let mut count = 0;
        for (bin, &first) in self.bins.iter().enumerate() {
            let marked = self.steps[bin / STEPS as usize] & (1 << (bin % STEPS as usize)) != 0;
            assert_eq!(marked, first != NONE, "the bitmap names the bins that are not empty");
            let mut index = first;
            while index != NONE {
                let block = &self.blocks[index as usize];
                assert!(!block.used && bin_of(block.len) == bin);
                count += 1;
                index = block.older;
            }
        }
        count
    }
}

/// The bin of a free block. Every block in a later bin is longer than every block in this one.
fn bin_of(units: u32) -> usize {
    debug_assert!(units > 0);
    let power = units.ilog2();
    let step = if power >= STEP_BITS {
        (units >> (power - STEP_BITS)) & (STEPS - 1)
    } else {
        (units << (STEP_BITS - power)) & (STEPS - 1)
    };
    (power * STEPS + step) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bins_are_ordered_by_length() {
        let mut last = 0;
        for units in 1..100_000 {
            let bin = bin_of(units);
            assert!(bin >= last);
            last = bin;
        }
        assert!(bin_of(u32::MAX) < BINS);
    }

    #[test]
    fn a_value_of_the_same_size_gets_the_pages_of_its_predecessor() {
        let mut segment = BlockAllocator::new(1 << 20);
        let first = segment.alloc(1000 * UNIT_BYTES).unwrap();
        let _fence = segment.alloc(1).unwrap();
        segment.free(first).unwrap();
        assert_eq!(segment.alloc(1000 * UNIT_BYTES), Some(first));
    }

    #[test]
    fn the_block_freed_last_is_used_first() {
        let mut segment = BlockAllocator::new(1 << 20);
        let blocks: Vec<u64> = (0..8).map(|_| segment.alloc(4096).unwrap()).collect();
        segment.free(blocks[1]).unwrap();
        segment.free(blocks[5]).unwrap();
        segment.free(blocks[3]).unwrap();
        assert_eq!(segment.alloc(4096), Some(blocks[3]));
        assert_eq!(segment.alloc(4096), Some(blocks[5]));
    }

    #[test]
    fn a_segment_can_be_filled_to_its_last_unit() {
        let mut segment = BlockAllocator::new(1000 * UNIT_BYTES);
        let whole = segment.alloc(1000 * UNIT_BYTES).unwrap();
        assert_eq!(segment.alloc(1), None);
        segment.free(whole).unwrap();
        for _ in 0..1000 {
            segment.alloc(1).unwrap();
        }
        assert_eq!(segment.alloc(1), None);
        segment.check_invariants();
    }

    #[test]
    fn a_block_is_freed_once() {
        let mut segment = BlockAllocator::new(4096);
        let block = segment.alloc(100).unwrap();
        assert_eq!(segment.free(block + 1), Err(NotABlock { offset: block + 1 }));
        assert_eq!(segment.free(u64::MAX), Err(NotABlock { offset: u64::MAX }));
        assert_eq!(segment.free(block), Ok(128));
        assert_eq!(segment.free(block), Err(NotABlock { offset: block }));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Alloc(u64),
        Free(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0u64..20_000).prop_map(Step::Alloc),
            1 => (0u64..400_000).prop_map(Step::Alloc),
            4 => any::<usize>().prop_map(Step::Free),
        ]
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_and_frees_join_to_the_whole(
            steps in prop::collection::vec(step(), 0..300),
            units in 1u64..20_000,
        ) {
            let mut segment = BlockAllocator::new(units * UNIT_BYTES);
            let mut live: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Alloc(len) => {
                        if let Some(offset) = segment.alloc(len) {
                            prop_assert_eq!(offset % UNIT_BYTES, 0);
                            prop_assert!(offset + len <= units * UNIT_BYTES);
                            for &(o, l) in &live {
                                prop_assert!(offset + len.max(1) <= o || o + l.max(1) <= offset);
                            }
                            live.push((offset, len));
                        }
                    }
                    Step::Free(n) if !live.is_empty() => {
                        let (offset, len) = live.swap_remove(n % live.len());
                        let freed = segment.free(offset).unwrap();
                        prop_assert!(freed >= len && freed < len.max(1) + UNIT_BYTES);
                    }
                    Step::Free(_) => {}
                }
                segment.check_invariants();
            }
            for (offset, _) in live {
                segment.free(offset).unwrap();
            }
            segment.check_invariants();
            prop_assert!(segment.is_empty());
            prop_assert_eq!(segment.alloc(units * UNIT_BYTES), Some(0));
        }

        #[test]
        fn what_fits_is_found(lens in prop::collection::vec(1u64..5_000, 1..60)) {
            let total: u64 = lens.iter().map(|l| l.div_ceil(UNIT_BYTES)).sum();
            let mut segment = BlockAllocator::new(total * UNIT_BYTES);
            for len in lens {
                prop_assert!(segment.alloc(len).is_some());
            }
            prop_assert_eq!(segment.used_bytes(), segment.capacity_bytes());
        }
    }
}
