//! Sockets: addresses, listening, connecting, gathered writes, reads that may bring descriptors.
//!
//! Within a machine they are Unix sockets, between machines TCP, which carries no descriptors. Both ends of a TCP
//! connection are set up alike, so a cut is noticed by either, whether it waits or writes. A TCP connection may be
//! secured: then what is sent is encrypted on its way, and what is received has to be given to its [`Channel`].

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::fork::PrivateFd;
use super::stream::Stream;
use super::tls::{Channel, Taken, TlsError};

/// Connections that the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 4096;
/// Descriptors that may wait for their frames on one connection, and that one read may bring. A sender
/// attaches one to a frame, so more mean that it cannot count.
pub(super) const FDS_MAX: usize = 64;
/// Descriptors that the kernel delivers with one read: those of one `sendmsg`, of which we make one.
const FDS_PER_READ: usize = 8;

/// A TCP connection on which nothing came for so long is probed, and so often, before it counts as cut: 9 s in all,
/// within which the kernel of a living machine answers, however busy its processes are.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(3);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_PROBES: u32 = 3;
/// What was written and is not acknowledged for so long ends the connection. The kernel's own patience is 15 minutes.
/// It also replaces the count of probes, so that both kinds of silence end alike.
const UNACKNOWLEDGED_MS_MAX: u32 = 10_000;

/// Where a node listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// A socket on which a node is connected to.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Listens on a new socket file, which only this user may connect to.
    pub fn bind_unix(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&fd, &address)?;
        rustix::fs::chmod(path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        rustix::net::listen(&fd, BACKLOG)?;
        Ok(Self { fd })
    }

    /// Listens on a TCP port; port 0 lets the system choose one.
    pub fn bind_tcp(address: SocketAddr) -> io::Result<Self> {
        let fd = tcp_socket(&address)?;
        // A node that is started again finds its port, although connections of the former one linger.
        sockopt::set_socket_reuseaddr(&fd, true)?;
        rustix::net::bind(&fd, &address)?;
        rustix::net::listen(&fd, BACKLOG)?;
        Ok(Self { fd })
    }

    /// Takes over a socket that listens already.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self { fd })
    }

    pub fn local_address(&self) -> io::Result<Address> {
        let address = rustix::net::getsockname(&self.fd)?;
        if let Ok(unix) = SocketAddrUnix::try_from(address.clone()) {
            let path = unix.path_bytes().unwrap_or_default();
            let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(path);
            return Ok(Address::Unix(path.into()));
        }
        let address = SocketAddr::try_from(address).map_err(|_| io::ErrorKind::Unsupported)?;
        Ok(Address::Tcp(address))
    }

    pub(super) fn into_private(self) -> PrivateFd {
        PrivateFd::new(self.fd)
    }
}

pub(super) fn accept(listener: &PrivateFd) -> rustix::io::Result<Socket> {
    let fd = rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    Ok(Socket::new(fd))
}

fn tcp_socket(address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

pub(super) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// A connected (or connecting) stream socket that never blocks.
#[derive(Debug)]
pub(super) struct Socket {
    fd: PrivateFd,
    is_tcp: bool,
    channel: OnceLock<Arc<Channel>>,
}

pub(super) enum Connecting {
    Done(Socket),
    /// Writable when decided; [`Socket::take_error`] then tells.
    InProgress(Socket),
    /// The listener's backlog is full (Unix sockets only): try again later.
    Full,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd) -> Self {
        let domain = sockopt::socket_domain(&fd);
        let is_tcp = matches!(domain, Ok(AddressFamily::INET | AddressFamily::INET6));
        Self { fd: PrivateFd::new(fd), is_tcp, channel: OnceLock::new() }
    }

    pub(super) fn connect(address: &Address) -> io::Result<Connecting> {
        let (socket, connected) = match address {
            Address::Unix(path) => {
                let address = SocketAddrUnix::new(path)?;
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = Self::new(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?);
                let connected = rustix::net::connect(&socket, &address);
                (socket, connected)
            }
            Address::Tcp(address) => {
                let socket = Self::new(tcp_socket(address)?);
                socket.tune();
                let connected = rustix::net::connect(&socket, address);
                (socket, connected)
            }
        };
        match connected {
            Ok(()) => Ok(Connecting::Done(socket)),
            Err(Errno::INPROGRESS) => Ok(Connecting::InProgress(socket)),
            Err(Errno::AGAIN) => Ok(Connecting::Full),
            Err(error) => Err(error.into()),
        }
    }

    /// The descriptor, for who takes the connection out of the transport.
    pub(super) fn into_fd(self) -> PrivateFd {
        self.fd
    }

    /// Whether it leads to another machine, as far as one can tell.
    pub(super) fn is_tcp(&self) -> bool {
        self.is_tcp
    }

    /// From now on everything is said within TLS.
    pub(super) fn secure(&self, channel: Channel) {
        assert!(self.is_tcp, "what stays on a machine is not encrypted");
        let first = self.channel.set(Arc::new(channel));
        assert!(first.is_ok(), "a connection is secured once");
    }

    pub(super) fn channel(&self) -> Option<&Channel> {
        self.channel.get().map(Arc::as_ref)
    }

    /// The same connection for a thread that waits. It leaves the care of [`PrivateFd`]: who takes it out of the
    /// transport sees to forks, too.
    pub(super) fn to_stream(&self) -> io::Result<Stream> {
        Ok(Stream::proven(self.fd.as_fd().try_clone_to_owned()?, self.channel.get().cloned()))
    }

    /// Decrypts what was received, as [`Channel::take`] says.
    pub(super) fn decrypt(&self, incoming: &mut &[u8], plain: &mut Vec<u8>) -> Result<Taken, TlsError> {
        let channel = self.channel.get().expect("only what is secured is decrypted");
        channel.take(incoming, plain, |parts| self.send_in_clear(parts))
    }

    /// Sets the options of a TCP connection: frames do not wait for each other's acknowledgements, and a cut is
    /// noticed. The kernel knows all of them; without them the connection would still serve.
    pub(super) fn tune(&self) {
        if self.is_tcp {
            let _ = sockopt::set_tcp_nodelay(&self.fd, true);
            let _ = sockopt::set_socket_keepalive(&self.fd, true);
            let _ = sockopt::set_tcp_keepidle(&self.fd, KEEPALIVE_IDLE);
            let _ = sockopt::set_tcp_keepintvl(&self.fd, KEEPALIVE_INTERVAL);
            let _ = sockopt::set_tcp_keepcnt(&self.fd, KEEPALIVE_PROBES);
            let _ = sockopt::set_tcp_user_timeout(&self.fd, UNACKNOWLEDGED_MS_MAX);
        }
    }

    pub(super) fn take_error(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.fd)??)
    }

    /// Writes what fits. With a descriptor, it goes along if at least one byte does. On a secured connection the bytes
    /// that were not written have to be offered again, before others.
    pub(super) fn send(&self, parts: &[IoSlice<'_>], fd: Option<BorrowedFd<'_>>) -> rustix::io::Result<usize> {
        let Some(fd) = fd else {
            return match self.channel.get() {
                None => self.send_in_clear(parts),
                Some(channel) => channel.send(parts, |records| self.send_in_clear(records)),
            };
        };
        assert!(self.channel.get().is_none(), "no descriptor leaves the machine");
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        let pushed = control.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(pushed, "the space is for one descriptor");
        rustix::net::sendmsg(&self.fd, parts, &mut control, flags)
    }

    /// Writes as it is, for what is said before TLS, and for its records.
    pub(super) fn send_in_clear(&self, parts: &[IoSlice<'_>]) -> rustix::io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.fd, parts, &mut SendAncillaryBuffer::default(), flags)
    }

    /// Reads once. Descriptors that came along are appended to `fds`; `None` stands for one that was sent
    /// when this process could open no more.
    pub(super) fn receive(
        &self,
        parts: &mut [IoSliceMut<'_>],
        fds: &mut VecDeque<Option<OwnedFd>>,
    ) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_READ))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = rustix::net::recvmsg(&self.fd, parts, &mut control, flags)?;
        let before = fds.len();
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = item {
                fds.extend(received.map(Some));
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) && fds.len() == before {
            // One read brings the descriptors of one write, and our writes have one.
            fds.push_back(None);
        }
        Ok(message.bytes)
    }

    /// Reads bytes that have no descriptors, as all do before the handshake is over, and records do.
    pub(super) fn receive_plain(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        let (bytes, _) = rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT)?;
        Ok(bytes)
    }

    /// The first byte that will be read.
    pub(super) fn peek(&self) -> rustix::io::Result<Option<u8>> {
        let mut first = [0];
        let (len, _) = rustix::net::recv(&self.fd, &mut first, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
        Ok((len > 0).then_some(first[0]))
    }

    /// Ends both directions, also for copies of the descriptor that are in use on other threads.
    pub(super) fn shut(&self) {
        if self.fd.is_owned() {
            let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
        }
    }

    /// Ends the direction from us to the peer.
    pub(super) fn shut_write(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
