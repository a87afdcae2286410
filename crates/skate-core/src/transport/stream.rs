//! Connections that carry bytes instead of frames, and that a thread waits on: in clear, or within TLS.
//!
//! In clear a stream is its socket, and whoever has bytes in a file gives them to the kernel ([`AsFd`]). Within TLS
//! bytes have to pass through this process, by [`Stream::write_all`] and [`Stream::take`].
//!
//! One thread at a time reads and writes; any may [`Stream::shut`] it, which ends the wait of that one. Once
//! [`Stream::set_patience`] was called a peer that does nothing for so long makes a read or write fail with
//! [`io::ErrorKind::WouldBlock`]. What TLS refuses is an error of kind [`io::ErrorKind::InvalidData`] that says why.
//!
//! Invariant: what was decrypted and not asked for yet is in `unread`, and nowhere else. The socket is silent about it,
//! so who waits for the socket asks [`Stream::has_unread`] first.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};

use skate_proto::handshake::{BINDING_LEN, is_refusal};

use super::tls::{Channel, NodeTls, TlsError};

/// One read takes at most this much from the socket: four whole records.
const RECORDS_BYTES: usize = 64 << 10;
/// What TLS adds to a record that is wanted.
const RECORD_OVERHEAD: usize = 64;

/// A connection for bytes. See the module's documentation.
pub struct Stream {
    fd: OwnedFd,
    channel: OnceLock<Arc<Channel>>,
    unread: Mutex<Unread>,
}

#[derive(Default)]
struct Unread {
    /// Room for what comes from the socket; nothing is kept in it.
    records: Vec<u8>,
    plain: Vec<u8>,
    /// How much of `plain` was taken.
    taken: usize,
}

impl Unread {
    fn is_empty(&self) -> bool {
        self.taken == self.plain.len()
    }
}

/// What became of one read.
#[derive(Default)]
struct Received {
    ended: bool,
    established: bool,
}

impl Stream {
    /// In clear, until [`Self::secure`] is called.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, channel: OnceLock::new(), unread: Mutex::default() }
    }

    /// One whose handshake is over.
    pub(super) fn proven(fd: OwnedFd, channel: Option<Arc<Channel>>) -> Self {
        Self { fd, channel: channel.map_or_else(OnceLock::new, OnceLock::from), unread: Mutex::default() }
    }

    /// Begins TLS on a connection that this process has made, after `preface`, which travels in clear. Gives the value
    /// that the handshake within has to be bound to; `None` if the peer refuses, in clear, which is to be read then.
    pub fn secure(&self, tls: &NodeTls, preface: &[u8]) -> io::Result<Option<[u8; BINDING_LEN]>> {
        let channel = tls.get().and_then(|cluster| cluster.connect()).map_err(insecure)?;
        self.write_all(&[preface, &channel.opening()].concat())?;
        if is_refusal(self.peek()?) {
            return Ok(None);
        }
        let first = self.channel.set(Arc::new(channel));
        assert!(first.is_ok(), "a connection is secured once");
        let channel = self.channel.wait();
        let mut unread = self.unread.lock();
        while !self.receive(channel, &mut unread, RECORDS_BYTES)?.established {}
        channel.binding().map(Some).map_err(insecure)
    }

    #[must_use]
    pub fn is_secured(&self) -> bool {
        self.channel.get().is_some()
    }

    /// Whether the peer has said something that was not read, although the socket has nothing.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        !self.unread.lock().is_empty()
    }

    /// From now on reads and writes wait, at most so long for the peer to do anything.
    pub fn set_patience(&self, silence: Duration) -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.fd)?;
        rustix::fs::fcntl_setfl(&self.fd, flags & !rustix::fs::OFlags::NONBLOCK)?;
        sockopt::set_socket_timeout(&self.fd, Timeout::Recv, Some(silence))?;
        sockopt::set_socket_timeout(&self.fd, Timeout::Send, Some(silence))?;
        Ok(())
    }

    /// Ends both directions, also for a thread that waits.
    pub fn shut(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    pub fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let part = [IoSlice::new(bytes)];
            // What a channel has not taken is offered again as the first, which is what it wants.
            let sent = match self.channel.get() {
                None => self.send_in_clear(&part),
                Some(channel) => channel.send(&part, |records| self.send_in_clear(records)),
            };
            match sent {
                Ok(len) => bytes = &bytes[len..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub fn read_exact(&self, mut room: &mut [u8]) -> io::Result<()> {
        let Some(channel) = self.channel.get() else {
            while !room.is_empty() {
                let len = self.receive_in_clear(room)?;
                room = &mut room[len..];
            }
            return Ok(());
        };
        let mut unread = self.unread.lock();
        while !room.is_empty() {
            self.fill(channel, &mut unread, room.len())?;
            let Unread { plain, taken, .. } = &mut *unread;
            let len = room.len().min(plain.len() - *taken);
            room[..len].copy_from_slice(&plain[*taken..*taken + len]);
            *taken += len;
            room = &mut room[len..];
        }
        Ok(())
    }

    /// Gives `with` what there is, at least a byte and at most `most`; waits for it if need be. Tells how much it was.
    ///
    /// # Panics
    /// If the stream is in clear: nobody needs to see those bytes.
    pub fn take(&self, most: usize, with: impl FnOnce(&[u8])) -> io::Result<usize> {
        let channel = self.channel.get().expect("only what is secured is taken so");
        let mut unread = self.unread.lock();
        self.fill(channel, &mut unread, most)?;
        let Unread { plain, taken, .. } = &mut *unread;
        let len = most.min(plain.len() - *taken);
        with(&plain[*taken..*taken + len]);
        *taken += len;
        Ok(len)
    }

    /// Waits until something is unread.
    fn fill(&self, channel: &Channel, unread: &mut Unread, wanted: usize) -> io::Result<()> {
        while unread.is_empty() {
            unread.plain.clear();
            unread.taken = 0;
            if self.receive(channel, unread, wanted)?.ended && unread.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Reads once, and decrypts all of it. No more than is wanted is asked of the socket, so that a connection of which
    /// only requests are read needs little room.
    fn receive(&self, channel: &Channel, unread: &mut Unread, wanted: usize) -> io::Result<Received> {
        let Unread { records, plain, .. } = unread;
        records.resize((wanted + RECORD_OVERHEAD).min(RECORDS_BYTES), 0);
        let len = self.receive_in_clear(records)?;
        let (mut incoming, mut received) = (&records[..len], Received::default());
        loop {
            let before = plain.len();
            let taken = channel.take(&mut incoming, plain, |parts| self.send_in_clear(parts)).map_err(insecure)?;
            received.established |= taken.established;
            received.ended |= taken.ended;
            if taken.ended || (incoming.is_empty() && plain.len() == before) {
                return Ok(received);
            }
        }
    }

    /// Waits for bytes as they are on the wire. An end is an error: nobody here ends a conversation without a word.
    fn receive_in_clear(&self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.fd, &mut *room, RecvFlags::empty()) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((len, _)) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send_in_clear(&self, parts: &[IoSlice<'_>]) -> rustix::io::Result<usize> {
        rustix::net::sendmsg(&self.fd, parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
    }

    /// The first byte that will be read. Waits for it.
    fn peek(&self) -> io::Result<u8> {
        let mut first = [0];
        loop {
            match rustix::net::recv(&self.fd, &mut first, RecvFlags::PEEK) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(first[0]),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn insecure(error: TlsError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
