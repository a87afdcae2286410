//! Connections of a pulling node: made and proven by a thread that waits, kept for a while, used again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use skate_proto::handshake::{Connector, Credentials, HandshakeError, Identity, PREFACE_LEN, Step};
use skate_proto::ids::ProcId;

use super::{CONNECT_S_MAX, IDLE_CONNECTIONS_MAX, IDLE_S, Source};
use crate::transport::{Address, NodeTls, Stream, nonce};

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
    kept: Mutex<Vec<(Instant, ProcId, Arc<Stream>)>>,
}

impl Idle {
    /// The one that was used last: it is the least likely to have been closed by its peer.
    pub(super) fn take(&self, peer: ProcId) -> Option<Arc<Stream>> {
        let mut kept = self.kept.lock();
        let at = kept.iter().rposition(|(_, other, _)| *other == peer)?;
        Some(kept.remove(at).2)
    }

    pub(super) fn keep(&self, peer: ProcId, socket: Arc<Stream>) {
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

/// A socket for a source, not yet connected; so that who wants to end it can, before [`Dialer::connect`] waits.
pub(super) fn socket_for(source: &Source) -> Result<Stream, ConnectError> {
    let family = match source.address {
        Address::Unix(_) => AddressFamily::UNIX,
        Address::Tcp(address) if address.is_ipv4() => AddressFamily::INET,
        Address::Tcp(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None);
    socket.map(Stream::new).map_err(|error| ConnectError::Connect(error.into()))
}

/// What this process connects to other nodes with.
pub(super) struct Dialer {
    pub(super) me: Identity,
    pub(super) credentials: Credentials,
    /// `None` in a cluster whose nodes talk in clear.
    pub(super) tls: Option<Arc<NodeTls>>,
}

impl Dialer {
    /// Connects and proves the token, both ways.
    pub(super) fn connect(&self, stream: &Stream, source: &Source, silence: Duration) -> Result<(), ConnectError> {
        begin(stream, &source.address)?;
        stream.set_patience(CONNECT_S_MAX).map_err(ConnectError::Connect)?;
        let mut machine = self.greet(stream, source).map_err(broken)?;
        loop {
            let mut message = vec![0; machine.wants()];
            stream.read_exact(&mut message).map_err(broken)?;
            match machine.handle(&message)? {
                Step::Send(answer) => stream.write_all(&answer).map_err(broken)?,
                Step::Done { .. } => return stream.set_patience(silence).map_err(ConnectError::Connect),
            }
        }
    }

    /// Says whom we want and who we are. What stays on a machine is not encrypted.
    fn greet(&self, stream: &Stream, source: &Source) -> io::Result<Connector> {
        let (Address::Tcp(_), Some(tls)) = (&source.address, &self.tls) else {
            let (machine, first) = Connector::new(&self.me, &self.credentials, source.node, nonce());
            stream.write_all(&first)?;
            return Ok(machine);
        };
        let (mut machine, first) = Connector::over_tls(&self.me, &self.credentials, source.node, nonce());
        if let Some(binding) = stream.secure(tls, &first[..PREFACE_LEN])? {
            machine.bind(binding);
            stream.write_all(&machine.hello())?;
        }
        Ok(machine)
    }
}

fn broken(error: io::Error) -> ConnectError {
    match error.kind() {
        io::ErrorKind::WouldBlock => ConnectError::Timeout,
        _ => ConnectError::Broken(error),
    }
}

fn begin(stream: &Stream, address: &Address) -> Result<(), ConnectError> {
    let system = |error: Errno| ConnectError::Connect(error.into());
    let begun = match address {
        Address::Unix(path) => rustix::net::connect(stream, &SocketAddrUnix::new(path).map_err(system)?),
        Address::Tcp(address) => {
            let _ = sockopt::set_tcp_nodelay(stream, true);
            rustix::net::connect(stream, address)
        }
    };
    match begun {
        Ok(()) => Ok(()),
        Err(Errno::INPROGRESS) => wait_connected(stream.as_fd()),
        Err(error) => Err(system(error)),
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
