//! Measures copies into blocks, warm and cold, beside a plain copy.
//!
//! `cargo run --release -p skate-core --example storecopy`

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::time::Instant;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use skate_core::store::{Store, copy_into};
use skate_proto::ids::{NodeKey, ProcId, SegmentId};

fn rate(bytes: usize, repeat: usize, mut act: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..repeat {
        let begin = Instant::now();
        act();
        best = best.min(begin.elapsed().as_secs_f64());
    }
    bytes as f64 / best / 1e9
}

fn lease(store: &Store, segment: u64, size: u64) {
    let fd = memfd_create("skate", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    store.add_segment(SegmentId(segment), size, &fd).unwrap();
}

fn main() {
    for mib in [1usize, 4, 16, 64, 256] {
        let len = mib << 20;
        let source = vec![3u8; len];
        let mut plain = vec![1u8; len];
        let memcpy = rate(len, 10, || plain.copy_from_slice(&source));
        let cold = rate(len, 3, || {
            let store = Store::new(ProcId(1), NodeKey(1));
            lease(&store, 1, store.wish_bytes(len as u64).max(len as u64));
            copy_into(&store.alloc(len as u64).unwrap(), &[(0, &source)]);
        });
        let store = Store::new(ProcId(1), NodeKey(1));
        lease(&store, 1, store.wish_bytes(len as u64));
        let warm = rate(len, 10, || {
            let block = store.alloc(len as u64).unwrap();
            copy_into(&block, &[(0, &source)]);
            store.free(block.location().segment, block.location().offset).unwrap();
        });
        println!("{mib:4} MiB: memcpy {memcpy:5.2} GB/s, warm block {warm:5.2}, cold block {cold:5.2}");
    }
    let store = Store::new(ProcId(1), NodeKey(1));
    lease(&store, 1, 64 << 20);
    let begin = Instant::now();
    let rounds = 1_000_000u64;
    for n in 0..rounds {
        let block = store.alloc(100_000 + n % 1000).unwrap();
        store.free(block.location().segment, block.location().offset).unwrap();
    }
    println!("alloc and free: {:.0} ns", begin.elapsed().as_nanos() as f64 / rounds as f64);
}
