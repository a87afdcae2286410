//! The store on real memfds.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, ftruncate, memfd_create};

use skate_core::store::{MapError, SHARED_SEGMENT_BYTES_MAX, Store, copy_into};
use skate_proto::ids::{NodeKey, ProcId, SegmentId};

/// What the node does.
fn segment(size: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("skate-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn sealed(size: u64) -> OwnedFd {
    segment(size, SealFlags::SHRINK | SealFlags::GROW)
}

#[test]
fn a_reader_sees_what_the_lessee_wrote() {
    let (lessee, reader) = (Store::new(ProcId(1), NodeKey(1)), Store::new(ProcId(2), NodeKey(1)));
    assert!(lessee.alloc(100).is_none());
    let size = lessee.wish_bytes(100);
    let fd = sealed(size);
    lessee.add_segment(SegmentId(7), size, &fd).unwrap();
    let block = lessee.alloc(100).unwrap();
    copy_into(&block, &[(0, b"hello"), (64, b"world")]);
    let location = block.location();
    assert_eq!((location.segment, location.lessee, location.len), (SegmentId(7), ProcId(1), 100));
    let mapping = reader.map_readonly(SegmentId(7), size, &fd).unwrap();
    let pointer = mapping.slice(location.offset, location.len).unwrap();
    // SAFETY: the block was published by the test and nobody writes any more.
    let bytes = unsafe { std::slice::from_raw_parts(pointer, 100) };
    assert_eq!((&bytes[..5], &bytes[64..69]), (&b"hello"[..], &b"world"[..]));
    assert!(!mapping.is_writable());
    assert!(reader.mapping(SegmentId(7)).is_some() && lessee.mapping(SegmentId(7)).is_some());
}

#[test]
fn numbers_from_a_peer_never_make_a_pointer_outside_the_segment() {
    let store = Store::new(ProcId(1), NodeKey(1));
    let mapping = store.map_readonly(SegmentId(1), 4096, &sealed(4096)).unwrap();
    for (offset, len) in [(0, 4097), (4096, 1), (u64::MAX, 1), (1, u64::MAX), (5000, 0)] {
        assert_eq!(mapping.slice(offset, len), None);
    }
    assert!(mapping.slice(4096, 0).is_some() && mapping.slice(0, 4096).is_some());
}

#[test]
fn a_segment_of_another_size_or_that_could_shrink_is_not_mapped() {
    let store = Store::new(ProcId(1), NodeKey(1));
    let wrong = store.map_readonly(SegmentId(1), 8192, &sealed(4096));
    assert!(matches!(wrong, Err(MapError::Size { actual: 4096, announced: 8192, .. })));
    let loose = store.map_readonly(SegmentId(1), 4096, &segment(4096, SealFlags::GROW));
    assert!(matches!(loose, Err(MapError::NotSealed { .. })));
}

#[test]
fn blocks_are_given_back_and_used_again() {
    let store = Store::new(ProcId(1), NodeKey(1));
    let size = store.wish_bytes(1);
    store.add_segment(SegmentId(1), size, &sealed(size)).unwrap();
    let block = store.alloc(1000).unwrap().location();
    assert_eq!(store.statistics().used_bytes, 1024);
    store.free(block.segment, block.offset).unwrap();
    assert!(store.free(block.segment, block.offset).is_err());
    assert!(store.free(SegmentId(9), 0).is_err());
    assert_eq!(store.alloc(1000).unwrap().location(), block);
}

#[test]
fn segments_double_and_large_objects_have_their_own() {
    let store = Store::new(ProcId(1), NodeKey(1));
    let mut sizes = Vec::new();
    for n in 0..6 {
        let size = store.wish_bytes(10);
        store.add_segment(SegmentId(n), size, &sealed(size)).unwrap();
        sizes.push(size >> 20);
    }
    assert_eq!(sizes, [4, 8, 16, 32, 64, 64]);
    let large = SHARED_SEGMENT_BYTES_MAX * 3 + 5;
    assert!(store.alloc(large).is_none());
    let size = store.wish_bytes(large);
    assert!(size >= large && size < large + (4 << 20));
    store.add_segment(SegmentId(100), size, &sealed(size)).unwrap();
    let block = store.alloc(large).unwrap().location();
    assert_eq!(block.segment, SegmentId(100));
    store.free(block.segment, block.offset).unwrap();
    // A small object does not go where it would keep so much.
    assert_ne!(store.alloc(10).unwrap().location().segment, SegmentId(100));
    // The next of its size finds it warm, a much smaller one does not take it.
    assert!(store.alloc(large / 3).is_none_or(|b| b.location().segment != SegmentId(100)));
    assert_eq!(store.alloc(large).unwrap().location().segment, SegmentId(100));
}

#[test]
fn empty_segments_are_kept_warm_within_a_limit_and_given_up_on_request() {
    let store = Store::new(ProcId(1), NodeKey(1));
    let own = 100 << 20;
    let blocks: Vec<_> = (0..4)
        .map(|n| {
            store.add_segment(SegmentId(n), own, &sealed(own)).unwrap();
            store.alloc(own).unwrap().location()
        })
        .collect();
    store.free(blocks[2].segment, blocks[2].offset).unwrap();
    assert!(store.surplus().is_empty(), "one stays warm");
    store.free(blocks[0].segment, blocks[0].offset).unwrap();
    assert_eq!(store.surplus(), [SegmentId(2)], "the one that is empty longer goes");
    assert_eq!(store.take_empty(1), [SegmentId(0)]);
    assert_eq!(store.take_empty(1), []);
    assert_eq!(store.statistics().leased_segments, 2);
}

#[test]
fn mappings_that_nothing_uses_are_bounded() {
    let store = Store::new(ProcId(1), NodeKey(1));
    let held = store.map_readonly(SegmentId(0), 4096, &sealed(4096)).unwrap();
    for n in 1..100 {
        store.map_readonly(SegmentId(n), 4096, &sealed(4096)).unwrap();
    }
    assert!(store.statistics().read_segments < 20);
    assert!(store.mapping(SegmentId(0)).is_some() && store.mapping(SegmentId(99)).is_some());
    store.unmap_idle();
    assert_eq!(store.statistics().read_segments, 1);
    store.unmap(SegmentId(0));
    assert!(held.slice(0, 4096).is_some(), "a view keeps it");
}

#[test]
#[should_panic(expected = "a part lies in its block")]
fn a_part_outside_its_block_is_a_bug_of_the_caller() {
    let store = Store::new(ProcId(1), NodeKey(1));
    store.add_segment(SegmentId(1), 4096, &sealed(4096)).unwrap();
    copy_into(&store.alloc(100).unwrap(), &[(90, &[0; 11])]);
}

#[test]
fn threads_allocate_and_free_without_overlap() {
    let store = Store::new(ProcId(1), NodeKey(1));
    for n in 0..3 {
        let size = store.wish_bytes(1);
        store.add_segment(SegmentId(n), size, &sealed(size)).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let store = &store;
            scope.spawn(move || {
                let mut live = std::collections::VecDeque::new();
                for n in 0..5_000u64 {
                    let len = 64 + (n * 7919 + u64::from(thread) * 31) % 9_000;
                    let Some(block) = store.alloc(len) else {
                        continue;
                    };
                    let body = vec![thread; len as usize];
                    copy_into(&block, &[(0, &body)]);
                    live.push_back(block);
                    if live.len() > 50 {
                        let block = live.pop_front().unwrap();
                        let location = block.location();
                        let pointer = block.mapping().slice(location.offset, location.len).unwrap();
                        // SAFETY: the block is this thread's own until it is freed.
                        let bytes = unsafe { std::slice::from_raw_parts(pointer, location.len as usize) };
                        assert!(bytes.iter().all(|b| *b == thread));
                        store.free(location.segment, location.offset).unwrap();
                    }
                }
                for block in live {
                    store.free(block.location().segment, block.location().offset).unwrap();
                }
            });
        }
    });
    assert_eq!(store.statistics().used_bytes, 0);
}
