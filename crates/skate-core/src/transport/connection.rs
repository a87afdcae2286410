//! The sending half of a connection: what is not yet written, and who writes it.
//!
//! At most one thread writes at a time (`writing`), and it does so without holding the lock, so that a
//! thread that only appends never waits for a system call. A frame sent while the connection is idle is
//! written straight from the caller's memory; frames sent meanwhile are appended and leave together.
//!
//! Bytes leave in the order of appending: `front` is being written from `head` on, `back` is what was
//! appended since; when `front` is through, the two change places, so their memory is used for ever.
//!
//! Invariants, whenever the lock is free: `end - sent` bytes are unsent (`backlog`), and apart from a
//! direct write in progress they are `front[head..]` and `back`; `fds` are ordered by position, each the
//! position of the first byte of its frame; `armed` implies that the reactor will be told when the
//! socket can be written again, and will call [`Connection::flush`].

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use rustix::io::Errno;
use smallvec::SmallVec;

use skate_proto::frame::HEADER_LEN;
use skate_proto::ids::ProcId;

use super::socket::Socket;

/// While this much is unsent no frame is accepted: the peer has stopped reading, and the connection is
/// closed. Callers hold back long before, by asking for the backlog.
pub const BACKLOG_BYTES_MAX: usize = 64 << 20;
/// A thread that queues frames writes them itself when so many bytes have come together.
pub(super) const QUEUE_BYTES: usize = 64 << 10;
/// Larger buffers are given back when they have been written.
const BUFFER_KEPT_BYTES_MAX: usize = 1 << 20;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum State {
    /// Not yet connected: frames are kept.
    Waiting,
    Open,
    /// Frames are dropped.
    Closed,
}

/// What the caller must see to after a frame was sent.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Nothing.
    Settled,
    /// The connection was not on the dirty list, and must be put there.
    BecameDirty,
    /// The socket is full: the reactor must watch for room. The connection is marked as armed.
    Full,
    /// The limit was hit; the connection drops everything from now on and must be closed.
    Overflow,
    /// The peer can no longer be written to; likewise.
    Broken(Errno),
}

struct Out {
    state: State,
    writing: bool,
    armed: bool,
    dirty: bool,
    front: Vec<u8>,
    head: usize,
    back: Vec<u8>,
    fds: VecDeque<(u64, OwnedFd)>,
    /// Bytes given to the kernel, and bytes accepted, since the beginning.
    sent: u64,
    end: u64,
}

pub(super) struct Connection {
    pub(super) peer: ProcId,
    /// When somebody first wanted it.
    pub(super) since: Instant,
    opened: OnceLock<(Arc<Socket>, u64)>,
    out: Mutex<Out>,
    backlog: AtomicUsize,
}

impl Connection {
    /// A connection that keeps frames until it is opened.
    pub(super) fn new(peer: ProcId) -> Self {
        let out = Out {
            state: State::Waiting,
            writing: false,
            armed: false,
            dirty: false,
            front: Vec::new(),
            head: 0,
            back: Vec::new(),
            fds: VecDeque::new(),
            sent: 0,
            end: 0,
        };
        Self {
            peer,
            since: Instant::now(),
            opened: OnceLock::new(),
            out: Mutex::new(out),
            backlog: AtomicUsize::new(0),
        }
    }

    /// The socket and the reactor's name for it, once open.
    pub(super) fn opened(&self) -> Option<&(Arc<Socket>, u64)> {
        self.opened.get()
    }

    /// Whether descriptors can be sent on it; `None` while it is not known where it leads.
    pub(super) fn carries_descriptors(&self) -> Option<bool> {
        self.opened.get().map(|(socket, _)| !socket.is_tcp())
    }

    /// Called once, by the reactor, when the peer is proven. Frames that waited are written.
    pub(super) fn open(&self, socket: Arc<Socket>, token: u64) -> Sent {
        let mut out = self.out.lock();
        if out.state != State::Waiting {
            return Sent::Settled;
        }
        assert!(out.fds.is_empty() || !socket.is_tcp(), "no descriptor is sent to another machine");
        let first = self.opened.set((socket, token));
        assert!(first.is_ok(), "a connection is opened once");
        out.state = State::Open;
        self.write_buffered(&mut out)
    }

    /// Drops what is unsent and everything that follows.
    pub(super) fn close(&self) {
        self.fail(&mut self.out.lock());
        if let Some((socket, _)) = self.opened.get() {
            socket.shut();
        }
    }

    pub(super) fn is_armed(&self) -> bool {
        self.out.lock().armed
    }

    pub(super) fn backlog(&self) -> usize {
        self.backlog.load(Ordering::Relaxed)
    }

    /// Sends a frame now if the connection is idle, else after what was sent before.
    pub(super) fn send_now(&self, header: &[u8; HEADER_LEN], body: &[&[u8]], fd: Option<BorrowedFd<'_>>) -> Sent {
        let mut out = self.out.lock();
        let idle = out.state == State::Open && !out.writing && out.end == out.sent;
        if idle {
            return self.write_directly(&mut out, header, body, fd);
        }
        match self.append(&mut out, header, body, fd) {
            Sent::Settled if !out.armed => self.write_buffered(&mut out),
            other => other,
        }
    }

    /// Appends a frame; somebody writes it soon.
    pub(super) fn queue(&self, header: &[u8; HEADER_LEN], body: &[&[u8]]) -> Sent {
        let mut out = self.out.lock();
        match self.append(&mut out, header, body, None) {
            Sent::Settled => {}
            other => return other,
        }
        if out.state != State::Open || out.writing || out.armed {
            // Whoever opens it, writes, or is told that there is room, takes this frame along.
            return Sent::Settled;
        }
        if (out.end - out.sent) as usize >= QUEUE_BYTES {
            return self.write_buffered(&mut out);
        }
        if mem::replace(&mut out.dirty, true) { Sent::Settled } else { Sent::BecameDirty }
    }

    /// Writes what was appended. `room` tells that the reactor saw that the socket can be written again.
    pub(super) fn flush(&self, room: bool) -> Sent {
        let mut out = self.out.lock();
        out.dirty = false;
        if room {
            out.armed = false;
        }
        if out.armed { Sent::Settled } else { self.write_buffered(&mut out) }
    }

    fn append(&self, out: &mut Out, header: &[u8; HEADER_LEN], body: &[&[u8]], fd: Option<BorrowedFd<'_>>) -> Sent {
        if out.state == State::Closed {
            return Sent::Settled;
        }
        if (out.end - out.sent) as usize >= BACKLOG_BYTES_MAX {
            self.fail(out);
            return Sent::Overflow;
        }
        if let Some(fd) = fd {
            match fd.try_clone_to_owned() {
                Ok(fd) => out.fds.push_back((out.end, fd)),
                Err(error) => {
                    self.fail(out);
                    return Sent::Broken(Errno::from_io_error(&error).unwrap_or(Errno::MFILE));
                }
            }
        }
        out.back.extend_from_slice(header);
        body.iter().for_each(|part| out.back.extend_from_slice(part));
        out.end += frame_len(body);
        self.note_backlog(out);
        Sent::Settled
    }

    fn write_directly(
        &self,
        out: &mut MutexGuard<'_, Out>,
        header: &[u8; HEADER_LEN],
        body: &[&[u8]],
        fd: Option<BorrowedFd<'_>>,
    ) -> Sent {
        let (socket, _) = self.opened.get().expect("an open connection has a socket");
        let len = frame_len(body);
        out.end += len;
        out.writing = true;
        let result = MutexGuard::unlocked(out, || {
            let mut parts: SmallVec<[IoSlice<'_>; 8]> = SmallVec::new();
            parts.push(IoSlice::new(header));
            parts.extend(body.iter().map(|part| IoSlice::new(part)));
            retry_interrupted(|| socket.send(&parts, fd))
        });
        out.writing = false;
        if out.state == State::Closed {
            return Sent::Settled;
        }
        let written = match result {
            Ok(written) => written,
            Err(Errno::AGAIN) => 0,
            Err(error) => {
                self.fail(out);
                return Sent::Broken(error);
            }
        };
        out.sent += written as u64;
        if written as u64 == len {
            // Others may have appended while this thread wrote; it is the writer, so it writes theirs.
            return if out.back.is_empty() { Sent::Settled } else { self.write_buffered(out) };
        }
        if written == 0
            && let Some(fd) = fd
        {
            match fd.try_clone_to_owned() {
                Ok(fd) => {
                    let position = out.sent;
                    out.fds.push_front((position, fd));
                }
                Err(error) => {
                    self.fail(out);
                    return Sent::Broken(Errno::from_io_error(&error).unwrap_or(Errno::MFILE));
                }
            }
        }
        // Nothing else was unsent, so `front` is free for the rest of this frame.
        out.front.clear();
        out.head = 0;
        let mut skip = written;
        for part in std::iter::once(&header[..]).chain(body.iter().copied()) {
            let from = skip.min(part.len());
            out.front.extend_from_slice(&part[from..]);
            skip -= from;
        }
        self.note_backlog(out);
        out.armed = true;
        Sent::Full
    }

    /// Writes `front` and `back` until they are through or the socket is full.
    fn write_buffered(&self, out: &mut MutexGuard<'_, Out>) -> Sent {
        if out.writing || out.state != State::Open {
            return Sent::Settled;
        }
        let (socket, _) = self.opened.get().expect("an open connection has a socket");
        out.writing = true;
        let result = loop {
            if out.head == out.front.len() && !turn_over(out) {
                break Sent::Settled;
            }
            let (fd, chunk) = next_chunk(out);
            let (front, head) = (mem::take(&mut out.front), out.head);
            let result = MutexGuard::unlocked(out, || {
                let parts = [IoSlice::new(&front[head..head + chunk])];
                retry_interrupted(|| socket.send(&parts, fd.as_ref().map(AsFd::as_fd)))
            });
            if out.state == State::Closed {
                break Sent::Settled;
            }
            out.front = front;
            let written = match result {
                Ok(written) => written,
                Err(Errno::AGAIN) => 0,
                Err(error) => {
                    self.fail(out);
                    break Sent::Broken(error);
                }
            };
            if written == 0
                && let Some(fd) = fd
            {
                let position = out.sent;
                out.fds.push_front((position, fd));
            }
            out.head += written;
            out.sent += written as u64;
            if written < chunk {
                out.armed = true;
                break Sent::Full;
            }
        };
        out.writing = false;
        self.note_backlog(out);
        result
    }

    /// The socket is broken or the limit is hit: from now on frames are dropped.
    fn fail(&self, out: &mut Out) {
        out.state = State::Closed;
        out.front = Vec::new();
        out.back = Vec::new();
        out.head = 0;
        out.fds.clear();
        out.sent = out.end;
        self.note_backlog(out);
    }

    fn note_backlog(&self, out: &Out) {
        self.backlog.store((out.end - out.sent) as usize, Ordering::Relaxed);
    }
}

fn frame_len(body: &[&[u8]]) -> u64 {
    (HEADER_LEN + body.iter().map(|part| part.len()).sum::<usize>()) as u64
}

/// Makes what was appended the next to be written. False if there is nothing.
fn turn_over(out: &mut Out) -> bool {
    out.head = 0;
    if out.front.capacity() > BUFFER_KEPT_BYTES_MAX {
        out.front = Vec::new();
    }
    out.front.clear();
    let Out { front, back, .. } = out;
    mem::swap(front, back);
    !out.front.is_empty()
}

/// The descriptor that goes with the next byte, and how many bytes may be written with it: a descriptor
/// must arrive with the first byte of its frame.
fn next_chunk(out: &mut Out) -> (Option<OwnedFd>, usize) {
    let unsent = out.front.len() - out.head;
    let is_next = out.fds.front().is_some_and(|(position, _)| *position == out.sent);
    let fd = if is_next { out.fds.pop_front().map(|(_, fd)| fd) } else { None };
    let limit = match out.fds.front() {
        Some((position, _)) => unsent.min((*position - out.sent) as usize),
        None => unsent,
    };
    (fd, limit)
}

fn retry_interrupted<R>(mut call: impl FnMut() -> rustix::io::Result<R>) -> rustix::io::Result<R> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skate_proto::frame::{FLAG_FD, Header, Split, split};

    fn header(body_len: usize, corr: u64, fd: bool) -> [u8; HEADER_LEN] {
        Header { body_len: body_len as u32, kind: 5, flags: if fd { FLAG_FD } else { 0 }, corr }.encode()
    }

    fn pair() -> (Connection, Socket) {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        b.set_nonblocking(true).unwrap();
        let connection = Connection::new(ProcId(1));
        connection.open(Arc::new(Socket::new(a.into())), 0);
        (connection, Socket::new(b.into()))
    }

    fn read_all(socket: &Socket, fds: &mut VecDeque<Option<OwnedFd>>) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        while let Ok(n @ 1..) = socket.receive(&mut [std::io::IoSliceMut::new(&mut buffer)], fds) {
            all.extend_from_slice(&buffer[..n]);
        }
        all
    }

    fn corrs(mut bytes: &[u8]) -> Vec<u64> {
        let mut out = Vec::new();
        while let Split::Frame { header, rest, .. } = split(bytes).unwrap() {
            out.push(header.corr);
            bytes = rest;
        }
        assert!(bytes.is_empty());
        out
    }

    #[test]
    fn frames_keep_their_order_through_a_full_socket() {
        let (connection, peer) = pair();
        let body = vec![7; 10_000];
        let mut filled = false;
        for corr in 0..200 {
            match connection.send_now(&header(body.len(), corr, false), &[&body[..1], &body[1..]], None) {
                Sent::Full => filled = true,
                sent => assert_eq!(sent, Sent::Settled),
            }
        }
        assert!(filled && connection.backlog() > 0);
        let (mut all, mut fds) = (Vec::new(), VecDeque::new());
        while connection.backlog() > 0 {
            all.extend(read_all(&peer, &mut fds));
            connection.flush(true);
        }
        all.extend(read_all(&peer, &mut fds));
        assert_eq!(corrs(&all), (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn descriptors_arrive_with_their_frames_also_when_buffered() {
        let (connection, peer) = pair();
        let body = vec![7; 50_000];
        let file = std::fs::File::open("/dev/null").unwrap();
        for corr in 0..40 {
            let fd = (corr % 3 == 0).then(|| file.as_fd());
            connection.send_now(&header(body.len(), corr, fd.is_some()), &[&body], fd);
        }
        let (mut all, mut fds) = (Vec::new(), VecDeque::new());
        while connection.backlog() > 0 {
            all.extend(read_all(&peer, &mut fds));
            connection.flush(true);
        }
        all.extend(read_all(&peer, &mut fds));
        assert_eq!(corrs(&all).len(), 40);
        assert_eq!(fds.len(), 14);
    }

    #[test]
    fn a_peer_that_stops_reading_costs_a_bounded_buffer() {
        let (connection, _peer) = pair();
        let body = vec![0; 1 << 20];
        let outcome = (0..200).map(|_| connection.send_now(&header(body.len(), 0, false), &[&body], None));
        assert_eq!(outcome.filter(|sent| *sent == Sent::Overflow).count(), 1);
        assert_eq!(connection.backlog(), 0);
    }

    #[test]
    fn a_queued_frame_makes_dirty_once_and_leaves_before_a_later_one() {
        let (connection, peer) = pair();
        assert_eq!(connection.queue(&header(0, 1, false), &[]), Sent::BecameDirty);
        assert_eq!(connection.queue(&header(0, 2, false), &[]), Sent::Settled);
        assert_eq!(connection.send_now(&header(0, 3, false), &[], None), Sent::Settled);
        let mut fds = VecDeque::new();
        assert_eq!(corrs(&read_all(&peer, &mut fds)), [1, 2, 3]);
        connection.flush(false);
        assert_eq!(connection.queue(&header(0, 4, false), &[]), Sent::BecameDirty);
    }

    #[test]
    fn frames_sent_before_the_connection_is_open_wait_for_it() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        let connection = Connection::new(ProcId(1));
        assert_eq!(connection.send_now(&header(0, 1, false), &[], None), Sent::Settled);
        assert_eq!(connection.queue(&header(0, 2, false), &[]), Sent::Settled);
        connection.open(Arc::new(Socket::new(a.into())), 0);
        b.set_nonblocking(true).unwrap();
        assert_eq!(corrs(&read_all(&Socket::new(b.into()), &mut VecDeque::new())), [1, 2]);
    }
}
