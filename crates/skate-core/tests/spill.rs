//! Spill files on the real file system: what is written is read back, and what is not whole is not given out.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use skate_core::spill::format::{HEADER_LEN, OBJECT_LEN, record_bytes};
use skate_core::spill::{Outcome, Piece, Read, Source, SpillError, Spiller, Write};
use skate_core::sys::create_segment;

const SEGMENT_BYTES: u64 = 4 << 20;

struct Bench {
    directory: PathBuf,
    spiller: Spiller,
    written: Receiver<Outcome>,
    restored: Receiver<Outcome>,
    segment: Arc<OwnedFd>,
}

fn object(number: u8) -> [u8; OBJECT_LEN] {
    [number; OBJECT_LEN]
}

/// Bytes that differ at every place.
fn bytes(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at % 251) as u8 ^ (at >> 8) as u8).collect()
}

impl Bench {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("skate-spill-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        Self::at(directory)
    }

    fn at(directory: PathBuf) -> Self {
        let segment = create_segment("spilled", SEGMENT_BYTES).unwrap();
        File::from(segment.try_clone().unwrap()).write_all_at(&bytes(0, SEGMENT_BYTES), 0).unwrap();
        let ((tell_written, written), (tell_restored, restored)) = (channel(), channel());
        let spiller = Spiller::new(
            move |outcome| tell_written.send(outcome).unwrap(),
            move |outcome| tell_restored.send(outcome).unwrap(),
        );
        Self { directory, spiller, written, restored, segment: Arc::new(segment) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Blocks of the segment, (offset, length), as objects 0, 1 ...; returns where each begins in the file.
    fn write(&self, name: &str, blocks: &[(u64, u64)]) -> (Result<(), SpillError>, Vec<u64>) {
        let (mut at, mut places, mut pieces) = (0, Vec::new(), Vec::new());
        for (number, &(offset, len)) in blocks.iter().enumerate() {
            let source = Source::Block { segment: Arc::clone(&self.segment), offset };
            pieces.push(Piece { object: object(number as u8), source, len, at });
            places.push(at);
            at += record_bytes(len);
        }
        (self.write_pieces(name, pieces, 1.0), places)
    }

    fn write_pieces(&self, name: &str, pieces: Vec<Piece>, capacity_share: f64) -> Result<(), SpillError> {
        self.spiller.write(Write { ticket: 7, path: self.path(name), pieces, capacity_share });
        let outcome = self.written.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(outcome.ticket, 7);
        outcome.result
    }

    fn read(&self, name: &str, number: u8, at: u64, len: u64) -> Result<Vec<u8>, SpillError> {
        let segment = create_segment("restored", len).unwrap();
        let file = File::from(segment.try_clone().unwrap());
        self.spiller.read(Read { ticket: 8, path: self.path(name), object: object(number), at, len, segment });
        let outcome = self.restored.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(outcome.ticket, 8);
        outcome.result?;
        let mut read = vec![0; len as usize];
        file.read_exact_at(&mut read, 0).unwrap();
        Ok(read)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.spiller.shutdown();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn is_damaged<T>(result: Result<T, SpillError>) -> bool {
    matches!(result, Err(SpillError::Damaged(_)))
}

#[test]
fn values_of_any_size_share_a_file_and_come_back_whole() {
    let bench = Bench::new("whole");
    let blocks = [(0, 1), (64, 64), (4096, 300_001), (1 << 20, 3 << 20), (128, 262_144)];
    let (result, places) = bench.write("a", &blocks);
    result.unwrap();
    for (number, (&(offset, len), at)) in blocks.iter().zip(places).enumerate().rev() {
        assert!(bench.read("a", number as u8, at, len).unwrap() == bytes(offset, len), "value {number}");
    }
}

#[test]
fn a_record_moves_with_its_checksum() {
    let bench = Bench::new("move");
    let (result, places) = bench.write("a", &[(0, 5000), (8192, 700_000)]);
    result.unwrap();
    let source = Source::Record { path: bench.path("a"), at: places[1] };
    bench.write_pieces("b", vec![Piece { object: object(1), source, len: 700_000, at: 0 }], 1.0).unwrap();
    std::fs::remove_file(bench.path("a")).unwrap();
    assert!(bench.read("b", 1, 0, 700_000).unwrap() == bytes(8192, 700_000));
}

#[test]
fn damage_before_a_move_is_noticed_after_it() {
    let bench = Bench::new("move-damage");
    bench.write("a", &[(0, 5000)]).0.unwrap();
    flip(&bench.path("a"), HEADER_LEN as u64 + 4000);
    let source = Source::Record { path: bench.path("a"), at: 0 };
    bench.write_pieces("b", vec![Piece { object: object(0), source, len: 5000, at: 0 }], 1.0).unwrap();
    assert!(is_damaged(bench.read("b", 0, 0, 5000)));
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_flipped_bit_anywhere_is_damage() {
    let bench = Bench::new("flip");
    let len = 1000;
    for at in (0..record_bytes(len)).step_by(61).filter(|at| *at < HEADER_LEN as u64 + len) {
        let name = format!("{at}");
        bench.write(&name, &[(64, len)]).0.unwrap();
        flip(&bench.path(&name), at);
        assert!(is_damaged(bench.read(&name, 0, 0, len)), "byte {at}");
    }
}

#[test]
fn a_short_file_a_missing_one_and_another_value_are_damage() {
    let bench = Bench::new("short");
    bench.write("a", &[(0, 5000)]).0.unwrap();
    assert!(is_damaged(bench.read("a", 1, 0, 5000)), "of another object");
    assert!(is_damaged(bench.read("a", 0, 0, 4000)), "of another length");
    assert!(is_damaged(bench.read("a", 0, 64, 5000)), "at another place");
    File::options().write(true).open(bench.path("a")).unwrap().set_len(3000).unwrap();
    assert!(is_damaged(bench.read("a", 0, 0, 5000)));
    assert!(is_damaged(bench.read("b", 0, 0, 5000)));
}

#[test]
fn a_block_beyond_its_segment_leaves_no_file() {
    let bench = Bench::new("beyond");
    let (result, _) = bench.write("a", &[(0, 5000), (SEGMENT_BYTES - 100, 101)]);
    assert!(matches!(result, Err(SpillError::Io(text)) if text.contains("beyond its segment")));
    assert!(!bench.path("a").exists());
}

#[test]
fn a_file_that_exists_is_not_overwritten_by_the_next() {
    let bench = Bench::new("exists");
    bench.write("a", &[(0, 5000)]).0.unwrap();
    assert!(matches!(bench.write("a", &[(64, 5000)]).0, Err(SpillError::Io(_))));
    assert!(bench.read("a", 0, 0, 5000).unwrap() == bytes(0, 5000));
}

#[test]
fn nothing_is_written_to_a_disk_that_is_fuller_than_it_may_be() {
    let bench = Bench::new("share");
    let source = Source::Block { segment: Arc::clone(&bench.segment), offset: 0 };
    let result = bench.write_pieces("a", vec![Piece { object: object(0), source, len: 5000, at: 0 }], 0.0);
    assert!(matches!(result, Err(SpillError::Full(text)) if text.contains("nothing is spilled beyond 0 %")));
    assert!(!bench.path("a").exists());
}

/// A child of this test with a limit on the size of its files: to write beyond it fails as on a disk that fills up.
#[test]
fn a_file_that_cannot_grow_is_removed_and_reported_as_a_full_disk() {
    const CHILD: &str = "SKATE_SPILL_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let bench = Bench::new("limit");
        let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
        // SAFETY: a plain system call with a valid pointer, in a process that is only there for it.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
        let (result, _) = bench.write("a", &[(0, 300_000), (1 << 20, 3 << 20)]);
        assert!(matches!(result, Err(SpillError::Full(_))), "{result:?}");
        assert!(!bench.path("a").exists());
        bench.write("b", &[(0, 300_000)]).0.unwrap();
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_file_that_cannot_grow_is_removed_and_reported_as_a_full_disk"])
        .env(CHILD, "1")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn jobs_wait_in_order_and_each_is_told_of_once() {
    let bench = Bench::new("many");
    for ticket in 0..40 {
        let source = Source::Block { segment: Arc::clone(&bench.segment), offset: 64 * ticket };
        let pieces = vec![Piece { object: object(0), source, len: 200_000, at: 0 }];
        let path = bench.path(&format!("{ticket}"));
        bench.spiller.write(Write { ticket, path, pieces, capacity_share: 1.0 });
    }
    let mut tickets: Vec<u64> =
        (0..40).map(|_| bench.written.recv_timeout(Duration::from_secs(20)).unwrap().ticket).collect();
    tickets.sort_unstable();
    assert_eq!(tickets, (0..40).collect::<Vec<_>>());
    assert!(bench.read("39", 0, 0, 200_000).unwrap() == bytes(64 * 39, 200_000));
}
