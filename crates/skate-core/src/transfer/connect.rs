//! Connections of a pulling node: made and proven by a thread that waits, kept for a while, used again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use skate_proto::handshake::{Connector, Credentials, HandshakeError, Identity, Step};
use skate_proto::ids::ProcId;

use super::{CONNECT_S_MAX, IDLE_CONNECTIONS_MAX, IDLE_S, Source};
use crate::transport::{Address, nonce};

#[derive(Debug, Error)]
#[non_exhaustive]
pub(super) enum ConnectError {
    #[error("it could not be connected to: {0}")]
    Connect(#[source] io::Error),
    #[error("it did not answer within {} s", CONNECT_S_MAX.as_secs())]
    Timeout,
    #[error("the handshake failed: {0}")]
    Handshake(#[from] HandshakeError),
    #[error("the connection broke in the handshake: {0}")]
    Broken(#[source] io::Error),
}

/// Connections that nobody uses just now, the one that was used last at the end.
#[derive(Default)]
pub(super) struct Idle {
    kept: Mutex<Vec<(Instant, ProcId, Arc<OwnedFd>)>>,
}

impl Idle {
    /// The one that was used last: it is the least likely to have been closed by its peer.
    pub(super) fn take(&self, peer: ProcId) -> Option<Arc<OwnedFd>> {
        let mut kept = self.kept.lock();
        let at = kept.iter().rposition(|(_, other, _)| *other == peer)?;
        Some(kept.remove(at).2)
    }

    pub(super) fn keep(&self, peer: ProcId, socket: Arc<OwnedFd>) {
        let mut kept = self.kept.lock();
        if kept.len() == IDLE_CONNECTIONS_MAX {
            kept.remove(0);
        }
        kept.push((Instant::now(), peer, socket));
    }

    /// Closes what nobody has used for [`IDLE_S`]. True if nothing is kept any more.
    pub(super) fn expire(&self) -> bool {
        let mut kept = self.kept.lock();
        kept.retain(|(since, ..)| since.elapsed() < IDLE_S);
        kept.is_empty()
    }

    pub(super) fn clear(&self) {
        self.kept.lock().clear();
    }
}

/// A socket for a source, not yet connected; so that who wants to end it can, before [`connect`] waits.
pub(super) fn socket_for(source: &Source) -> Result<OwnedFd, ConnectError> {
    let family = match source.address {
        Address::Unix(_) => AddressFamily::UNIX,
        Address::Tcp(address) if address.is_ipv4() => AddressFamily::INET,
        Address::Tcp(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(|e| ConnectError::Connect(e.into()))
}

/// Connects and proves the token, both ways.
pub(super) fn connect(
    socket: &OwnedFd,
    source: &Source,
    me: &Identity,
    credentials: &Credentials,
    silence: Duration,
) -> Result<(), ConnectError> {
    let system = |error: Errno| ConnectError::Connect(error.into());
    let begun = match &source.address {
        Address::Unix(path) => rustix::net::connect(socket, &SocketAddrUnix::new(path).map_err(system)?),
        Address::Tcp(address) => {
            let _ = sockopt::set_tcp_nodelay(socket, true);
            rustix::net::connect(socket, address)
        }
    };
    match begun {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => wait_connected(socket.as_fd())?,
        Err(error) => return Err(system(error)),
    }
    set_blocking(socket, CONNECT_S_MAX).map_err(ConnectError::Connect)?;
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => ConnectError::Timeout,
        _ => ConnectError::Broken(error),
    };
    let (mut machine, first) = Connector::new(me, credentials, source.node, nonce());
    write_all(socket, &first).map_err(broken)?;
    loop {
        let mut message = vec![0; machine.wants()];
        read_exact(socket, &mut message).map_err(broken)?;
        match machine.handle(&message)? {
            Step::Send(answer) => write_all(socket, &answer).map_err(broken)?,
            Step::Done { .. } => return set_blocking(socket, silence).map_err(ConnectError::Connect),
        }
    }
}

fn wait_connected(socket: BorrowedFd<'_>) -> Result<(), ConnectError> {
    let until = Instant::now() + CONNECT_S_MAX;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::OUT)], Some(&timeout)) {
            Ok(0) => return Err(ConnectError::Timeout),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(ConnectError::Connect(error.into())),
        }
    }
    let outcome = sockopt::socket_error(socket).and_then(|error| error);
    outcome.map_err(|error| ConnectError::Connect(error.into()))
}

/// From now on reads and writes wait, at most so long for the peer to do anything.
pub(super) fn set_blocking(socket: &OwnedFd, silence: Duration) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(socket)?;
    rustix::fs::fcntl_setfl(socket, flags & !rustix::fs::OFlags::NONBLOCK)?;
    sockopt::set_socket_timeout(socket, Timeout::Recv, Some(silence))?;
    sockopt::set_socket_timeout(socket, Timeout::Send, Some(silence))?;
    Ok(())
}

pub(super) fn read_exact(socket: &OwnedFd, mut room: &mut [u8]) -> io::Result<()> {
    while !room.is_empty() {
        match rustix::net::recv(socket, &mut *room, RecvFlags::empty()) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((len, _)) => room = &mut room[len..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

pub(super) fn write_all(socket: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
