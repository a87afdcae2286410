//! How fast values leave memory and come back: `cargo run --release -p skate-core --example spill -- DIRECTORY [MIB]`.
//!
//! Writes files of 64 MiB from a segment, and reads them into new segments, one at a time. Compare with `dd` from
//! `/dev/zero` on the same directory, and with `examples/storecopy.rs`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use skate_core::spill::{Piece, Read, Source, Spiller, Write};
use skate_core::sys::create_segment;

const FILE_BYTES: u64 = 64 << 20;
const LEN: u64 = FILE_BYTES - 64;

fn main() {
    let directory = PathBuf::from(std::env::args().nth(1).expect("a directory to write to"));
    let mib: u64 = std::env::args().nth(2).map_or(1024, |text| text.parse().expect("a number of MiB"));
    let files = (mib << 20) / FILE_BYTES;
    let segment = Arc::new(create_segment("spilled", FILE_BYTES).expect("shared memory"));
    rustix::fs::fallocate(&*segment, rustix::fs::FallocateFlags::empty(), 0, FILE_BYTES).expect("shared memory");
    let ((tell_written, written), (tell_restored, restored)) = (channel(), channel());
    let spiller = Spiller::new(
        move |outcome| tell_written.send(outcome).expect("somebody listens"),
        move |outcome| tell_restored.send(outcome).expect("somebody listens"),
    );
    let path = |file: u64| directory.join(format!("skate-measured-{file}"));
    let start = Instant::now();
    for ticket in 0..files {
        let source = Source::Block { segment: Arc::clone(&segment), offset: 0 };
        let pieces = vec![Piece { object: [1; 28], source, len: LEN, at: 0 }];
        spiller.write(Write { ticket, path: path(ticket), pieces, capacity_share: 1.0 });
        written.recv().expect("an outcome").result.expect("written");
    }
    report("written", files, start);
    let start = Instant::now();
    for ticket in 0..files {
        let segment = create_segment("restored", FILE_BYTES).expect("shared memory");
        spiller.read(Read { ticket, path: path(ticket), object: [1; 28], at: 0, len: LEN, segment });
        restored.recv().expect("an outcome").result.expect("read");
    }
    report("read", files, start);
    (0..files).for_each(|file| std::fs::remove_file(path(file)).expect("removed"));
}

#[expect(clippy::print_stdout, reason = "a program that is run for what it prints")]
fn report(what: &str, files: u64, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    println!("{what}: {:.2} GB/s", (files * FILE_BYTES) as f64 / 1e9 / seconds);
}
