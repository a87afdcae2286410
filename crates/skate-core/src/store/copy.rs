//! Copies into blocks, by several threads when they are large.
//!
//! One thread does not use the memory's whole bandwidth, and the first touch of shared pages is work for
//! the kernel (allocating and clearing) that several threads share well.

use std::num::NonZero;
use std::sync::OnceLock;

/// Below this, starting a thread (some 30 us) costs more than it saves.
const PARALLEL_BYTES_MIN: usize = 8 << 20;
/// Beyond four threads the memory is the limit, not the cores.
const THREADS_MAX: usize = 4;

/// A destination that the caller owns.
#[derive(Copy, Clone)]
struct Destination(*mut u8);

// SAFETY: each thread gets destinations of its own, disjoint from all others.
unsafe impl Send for Destination {}

/// Copies every part to its destination.
///
/// # Safety
/// Each destination must be good for writing as many bytes as its part has; destinations must overlap
/// neither each other nor any part, and nobody else may use them meanwhile.
pub(super) unsafe fn copy(parts: &[(*mut u8, &[u8])]) {
    let total: usize = parts.iter().map(|(_, bytes)| bytes.len()).sum();
    let threads = if total < PARALLEL_BYTES_MIN { 1 } else { cores().min(THREADS_MAX) };
    if threads == 1 {
        for (to, bytes) in parts {
            // SAFETY: the caller's promise.
            unsafe { copy_one(Destination(*to), bytes) };
        }
        return;
    }
    let share = total.div_ceil(threads);
    std::thread::scope(|scope| {
        let mut shares = divide(parts, share).into_iter();
        let mine = shares.next().unwrap_or_default();
        let _blocked = crate::transport::block_signals();
        for theirs in shares {
            let work = move || {
                theirs.into_iter().for_each(|(to, bytes)| {
                    // SAFETY: the caller's promise; `divide` cuts parts into disjoint pieces.
                    unsafe { copy_one(to, bytes) }
                });
            };
            let builder = std::thread::Builder::new().name("skate-copy".to_owned());
            if let Err(refused) = builder.spawn_scoped(scope, work.clone()) {
                // No thread is to be had: this one does its work.
                drop(refused);
                work();
            }
        }
        for (to, bytes) in mine {
            // SAFETY: the caller's promise.
            unsafe { copy_one(to, bytes) };
        }
    });
}

/// # Safety
/// As for [`copy`].
unsafe fn copy_one(to: Destination, bytes: &[u8]) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0, bytes.len()) };
}

/// Cuts the parts into runs of about `share` bytes.
fn divide<'a>(parts: &[(*mut u8, &'a [u8])], share: usize) -> Vec<Vec<(Destination, &'a [u8])>> {
    let mut shares = vec![Vec::new()];
    let mut room = share;
    for &(to, bytes) in parts {
        let mut done = 0;
        while done < bytes.len() {
            if room == 0 {
                shares.push(Vec::new());
                room = share;
            }
            let len = room.min(bytes.len() - done);
            // There is always a last share.
            let last = shares.last_mut().expect("never empty");
            last.push((Destination(to.wrapping_add(done)), &bytes[done..done + len]));
            done += len;
            room -= len;
        }
    }
    shares
}

fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, NonZero::get))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_divided_without_gap_or_overlap() {
        let source: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        let mut target = vec![0u8; 1000];
        let base = target.as_mut_ptr();
        let cuts = [0, 1, 10, 11, 500, 1000];
        let parts: Vec<(*mut u8, &[u8])> =
            cuts.windows(2).map(|w| (base.wrapping_add(w[0]), &source[w[0]..w[1]])).collect();
        for share in [1, 7, 333, 5000] {
            let shares = divide(&parts, share);
            assert!(shares.iter().all(|s| s.iter().map(|(_, b)| b.len()).sum::<usize>() <= share));
            let joined: Vec<u8> = shares.iter().flatten().flat_map(|(_, b)| b.iter().copied()).collect();
            assert_eq!(joined, source);
        }
    }

    #[test]
    fn a_large_copy_by_several_threads_is_whole() {
        let source: Vec<u8> = (0..(PARALLEL_BYTES_MIN + 12_345)).map(|i| ((i * 31) >> 3) as u8).collect();
        let mut target = vec![0u8; source.len()];
        let (a, b) = source.split_at(100_001);
        let base = target.as_mut_ptr();
        // SAFETY: both destinations are inside `target` and disjoint.
        unsafe { copy(&[(base, a), (base.add(a.len()), b)]) };
        assert!(source == target);
    }
}
