//! Two sockets and what is on its way between them.
//!
//! Sockets are watched for edges (`EPOLLET`), once for all: an end that has no room, or is not to be read because the
//! other one has none, costs nothing, whatever the kernel reports of it. So an end remembers what it was said to be,
//! `readable` and `writable`, until a call says otherwise; to try in vain does no harm.
//!
//! Back-pressure: of what was read from an end at most [`BUFFER_BYTES`] wait for the other, and nothing more is read
//! until they are gone. The rest waits in the kernel, whose window closes to the sender.
//!
//! An end that has said its last is told to the other when all of it was passed on, and may itself go on to hear. One
//! that broke is treated as one that ended: what it had said before arrives first, and what is meant for it is dropped.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use crate::transport::fork::PrivateFd;

/// What is read at once, and what may wait for an end without room.
pub(super) const BUFFER_BYTES: usize = 64 << 10;
/// What one direction passes on before others have their turn.
const TURN_BYTES: usize = 512 << 10;

/// One side of a pair.
pub(super) struct End {
    pub(super) socket: PrivateFd,
    /// What the other end has said and this one had no room for.
    unsent: Vec<u8>,
    /// How much of `unsent` has gone.
    sent: usize,
    readable: bool,
    writable: bool,
    /// The kernel has said that its end is there to be read: only reading until then will do.
    hung_up: bool,
    /// Nothing more comes from it.
    ended: bool,
    /// Nothing more can be sent to it.
    broken: bool,
    /// It was told that the other end has ended.
    told: bool,
}

impl End {
    pub(super) fn new(socket: PrivateFd, unsent: Vec<u8>) -> Self {
        let [hung_up, ended, broken, told] = [false; 4];
        Self { socket, unsent, sent: 0, readable: true, writable: true, hung_up, ended, broken, told }
    }

    /// Takes note of what epoll reports.
    fn note(&mut self, flags: EventFlags) {
        let gone = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        self.hung_up |= gone || flags.contains(EventFlags::RDHUP);
        self.readable |= self.hung_up || flags.contains(EventFlags::IN);
        self.writable |= gone || flags.contains(EventFlags::OUT);
    }

    fn send(&mut self, bytes: &[u8]) -> usize {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match retry_on_intr(|| rustix::net::send(&self.socket, bytes, flags)) {
            Ok(len) => {
                self.writable = len == bytes.len();
                len
            }
            Err(Errno::AGAIN) => {
                self.writable = false;
                0
            }
            Err(_) => {
                self.broken = true;
                bytes.len()
            }
        }
    }

    /// Sends what waits. True if nothing is left.
    fn flush(&mut self) -> bool {
        if self.unsent.is_empty() {
            return true;
        }
        if self.writable {
            let unsent = std::mem::take(&mut self.unsent);
            self.sent += self.send(&unsent[self.sent..]);
            self.unsent = unsent;
        }
        if self.sent < self.unsent.len() {
            return false;
        }
        // Its memory is not kept: most connections never need it.
        (self.unsent, self.sent) = (Vec::new(), 0);
        true
    }

    /// Sends, and keeps what there is no room for. True if all has gone.
    fn pass_on(&mut self, bytes: &[u8]) -> bool {
        if self.broken {
            return true; // nobody hears it
        }
        let sent = if self.writable { self.send(bytes) } else { 0 };
        self.unsent.extend_from_slice(&bytes[sent..]);
        self.unsent.is_empty()
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        let len = buffer.len();
        match retry_on_intr(|| rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT)) {
            Ok((0, _)) => {
                self.ended = true;
                0
            }
            Ok((received, _)) => {
                // Less than there was room for is all there was: what comes later is a new edge.
                self.readable = self.hung_up || received == len;
                received
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                0
            }
            Err(_) => {
                (self.ended, self.broken) = (true, true);
                0
            }
        }
    }

    fn tell_end(&mut self) {
        if !self.told {
            self.told = true;
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }
}

/// What became of a turn.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing can be done until the kernel reports something.
    Waits,
    /// There is more, but others have their turn first.
    Unfinished,
    /// Both ends have said their last, and heard of it.
    Over,
}

pub(super) struct Pair {
    pub(super) ends: [End; 2],
    /// Tells it from others that have had its place.
    pub(super) serial: u64,
    /// Something was passed on since somebody looked.
    pub(super) moved: bool,
    /// One end has ended, and somebody looks whether anything still moves.
    pub(super) is_watched: bool,
}

impl Pair {
    pub(super) fn new(ends: [End; 2], serial: u64) -> Self {
        Self { ends, serial, moved: false, is_watched: false }
    }

    pub(super) fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [&self.ends[0], &self.ends[1]].map(|end| end.socket.as_fd())
    }

    pub(super) fn note(&mut self, side: usize, flags: EventFlags) {
        self.ends[side].note(flags);
    }

    pub(super) fn is_half_open(&self) -> bool {
        self.ends.iter().any(|end| end.ended)
    }

    /// Passes on what can be, both ways. Also tells how many bytes were.
    pub(super) fn turn(&mut self, buffer: &mut [u8]) -> (Turn, usize) {
        let [one, other] = &mut self.ends;
        let (there, forth) = pass(one, other, buffer);
        let (back, come) = pass(other, one, buffer);
        self.moved |= forth + come > 0;
        let is_over = self.ends.iter().all(|end| end.ended && (end.told || end.broken));
        let turn = match (there, back) {
            _ if is_over => Turn::Over,
            (Turn::Unfinished, _) | (_, Turn::Unfinished) => Turn::Unfinished,
            _ => Turn::Waits,
        };
        (turn, forth + come)
    }
}

/// One direction. Never says that the pair is over, and does not count what nobody hears.
fn pass(from: &mut End, to: &mut End, buffer: &mut [u8]) -> (Turn, usize) {
    let (mut taken, mut passed) = (0, 0);
    loop {
        if to.broken {
            (to.unsent, to.sent) = (Vec::new(), 0);
        } else if !to.flush() {
            return (Turn::Waits, passed);
        }
        if from.ended {
            to.tell_end();
            return (Turn::Waits, passed);
        }
        if !from.readable {
            return (Turn::Waits, passed);
        }
        if taken >= TURN_BYTES {
            return (Turn::Unfinished, passed);
        }
        let len = from.receive(buffer);
        taken += len;
        passed += if to.broken { 0 } else { len };
        if len > 0 && !to.pass_on(&buffer[..len]) {
            return (Turn::Waits, passed);
        }
    }
}
