//! Writing a file, and reading a value back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use xxhash_rust::xxh3::Xxh3;

use super::format::{HEADER_LEN, Header};
use super::{Piece, Read, Source, SpillError, Write};

/// What is moved at once: it stays in the processor's second cache between the copy in, the checksum and the copy out.
const BUFFER_BYTES: usize = 256 << 10;

pub(super) fn write(job: &Write) -> Result<(), SpillError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let to = rustix::fs::open(&job.path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|error| writing(&job.path, error.into()))?;
    let result = write_pieces(job, &File::from(to));
    if result.is_err() {
        let _ = std::fs::remove_file(&job.path);
    }
    result
}

fn write_pieces(job: &Write, to: &File) -> Result<(), SpillError> {
    refuse_if_full(job, to)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    job.pieces.iter().try_for_each(|piece| write_piece(&job.path, to, piece, &mut buffer))
}

/// Spill files leave others some room on a disk that they share. What is in use is asked for each file, not for each
/// byte: a file may exceed the share by itself.
fn refuse_if_full(job: &Write, file: impl std::os::fd::AsFd) -> Result<(), SpillError> {
    let state = rustix::fs::fstatvfs(file).map_err(|error| writing(&job.path, error.into()))?;
    if state.f_blocks == 0 {
        return Ok(()); // a file system that does not say
    }
    let used = 1.0 - state.f_bavail as f64 / state.f_blocks as f64;
    if used <= job.capacity_share {
        return Ok(());
    }
    Err(SpillError::Full(format!(
        "{:.1} % of the file system of {} are in use, and nothing is spilled beyond {:.0} %",
        used * 100.0,
        job.path.display(),
        job.capacity_share * 100.0
    )))
}

fn write_piece(path: &Path, to: &File, piece: &Piece, buffer: &mut [u8]) -> Result<(), SpillError> {
    let header = match &piece.source {
        Source::Block { segment, offset } => {
            let mut hash = Xxh3::new();
            let read = |buffer: &mut [u8], at| read_block(segment, buffer, offset + at);
            move_bytes(piece.len, buffer, read, |bytes, at| {
                hash.update(bytes);
                write_all(path, to, bytes, piece.at + HEADER_LEN as u64 + at)
            })?;
            Header { object: piece.object, len: piece.len, checksum: hash.digest() }
        }
        Source::Record { path: old, at: old_at } => {
            let from = open(old)?;
            let header = read_header(&from, old, *old_at, &piece.object, piece.len)?;
            let read = |buffer: &mut [u8], at| read_file(&from, old, buffer, old_at + HEADER_LEN as u64 + at);
            move_bytes(piece.len, buffer, read, |bytes, at| {
                write_all(path, to, bytes, piece.at + HEADER_LEN as u64 + at)
            })?;
            header
        }
    };
    write_all(path, to, &header.encode(), piece.at)
}

pub(super) fn read(job: &Read) -> Result<(), SpillError> {
    let from = open(&job.path)?;
    let header = read_header(&from, &job.path, job.at, &job.object, job.len)?;
    let to = File::from(job.segment.try_clone().map_err(|error| SpillError::Io(format!("no descriptor: {error}")))?);
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; BUFFER_BYTES.min(usize::try_from(job.len).unwrap_or(BUFFER_BYTES))];
    let read = |buffer: &mut [u8], at| read_file(&from, &job.path, buffer, job.at + HEADER_LEN as u64 + at);
    move_bytes(job.len, &mut buffer, read, |bytes, at| {
        hash.update(bytes);
        to.write_all_at(bytes, at).map_err(|error| SpillError::Io(format!("shared memory cannot be written: {error}")))
    })?;
    if hash.digest() != header.checksum {
        let text = format!("the bytes of a spilled value in {} are not those that were written", job.path.display());
        return Err(SpillError::Damaged(text));
    }
    Ok(())
}

fn move_bytes(
    len: u64,
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), SpillError>,
    mut write: impl FnMut(&[u8], u64) -> Result<(), SpillError>,
) -> Result<(), SpillError> {
    let mut at = 0;
    while at < len {
        let now = (buffer.len() as u64).min(len - at) as usize;
        read(&mut buffer[..now], at)?;
        write(&buffer[..now], at)?;
        at += now as u64;
    }
    Ok(())
}

fn read_block(segment: impl std::os::fd::AsFd, buffer: &mut [u8], at: u64) -> Result<(), SpillError> {
    let (mut done, fd) = (0, segment.as_fd());
    while done < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[done..], at + done as u64) {
            Ok(0) => return Err(SpillError::Io("a block reaches beyond its segment".into())),
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(SpillError::Io(format!("shared memory cannot be read: {error}"))),
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<File, SpillError> {
    File::open(path).map_err(|error| reading(path, &error))
}

fn read_header(from: &File, path: &Path, at: u64, object: &[u8], len: u64) -> Result<Header, SpillError> {
    let mut bytes = [0; HEADER_LEN];
    read_file(from, path, &mut bytes, at)?;
    let header = Header::decode(&bytes)?;
    if header.object != object || header.len != len {
        let text = format!("another value is in {} where a spilled one should be", path.display());
        return Err(SpillError::Damaged(text));
    }
    Ok(header)
}

fn read_file(from: &File, path: &Path, buffer: &mut [u8], at: u64) -> Result<(), SpillError> {
    from.read_exact_at(buffer, at).map_err(|error| reading(path, &error))
}

fn write_all(path: &Path, to: &File, bytes: &[u8], at: u64) -> Result<(), SpillError> {
    to.write_all_at(bytes, at).map_err(|error| writing(path, error))
}

/// A file that is short or not there will not be there later either; a device that fails, or descriptors that are
/// lacking, may do.
fn reading(path: &Path, error: &io::Error) -> SpillError {
    let text = format!("{} cannot be read: {error}", path.display());
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound => SpillError::Damaged(text),
        _ => SpillError::Io(text),
    }
}

fn writing(path: &Path, error: io::Error) -> SpillError {
    let text = format!("{} cannot be written: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            SpillError::Full(text)
        }
        _ => SpillError::Io(text),
    }
}
