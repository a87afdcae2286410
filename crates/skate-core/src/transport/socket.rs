//! Sockets: addresses, listening, connecting, gathered writes, reads that may bring descriptors.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::fork::PrivateFd;

/// Connections that the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 4096;
/// Descriptors that may wait for their frames on one connection, and that one read may bring. A sender
/// attaches one to a frame, so more mean that it cannot count.
pub(super) const FDS_MAX: usize = 64;
/// Descriptors that the kernel delivers with one read: those of one `sendmsg`, of which we make one.
const FDS_PER_READ: usize = 8;

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

    pub fn bind_tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self { fd: listener.into() })
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

pub(super) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// A connected (or connecting) stream socket that never blocks.
#[derive(Debug)]
pub(super) struct Socket {
    fd: PrivateFd,
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
        Self { fd: PrivateFd::new(fd) }
    }

    pub(super) fn connect(address: &Address) -> io::Result<Connecting> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (fd, connected) = match address {
            Address::Unix(path) => {
                let address = SocketAddrUnix::new(path)?;
                let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                let connected = rustix::net::connect(&fd, &address);
                (fd, connected)
            }
            Address::Tcp(address) => {
                let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
                let connected = rustix::net::connect(&fd, address);
                (fd, connected)
            }
        };
        match connected {
            Ok(()) => Ok(Connecting::Done(Self::new(fd))),
            Err(Errno::INPROGRESS) => Ok(Connecting::InProgress(Self::new(fd))),
            Err(Errno::AGAIN) => Ok(Connecting::Full),
            Err(error) => Err(error.into()),
        }
    }

    /// Frames must not wait for each other's acknowledgements. Unix sockets do not know the option.
    pub(super) fn set_no_delay(&self) {
        let _ = sockopt::set_tcp_nodelay(&self.fd, true);
    }

    pub(super) fn take_error(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.fd)??)
    }

    /// Writes what fits. With a descriptor, it goes along if at least one byte does.
    pub(super) fn send(&self, parts: &[IoSlice<'_>], fd: Option<BorrowedFd<'_>>) -> rustix::io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let Some(fd) = fd else {
            return rustix::net::sendmsg(&self.fd, parts, &mut SendAncillaryBuffer::default(), flags);
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        let pushed = control.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(pushed, "the space is for one descriptor");
        rustix::net::sendmsg(&self.fd, parts, &mut control, flags)
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

    /// Reads bytes that have no descriptors, as all do before the handshake is over.
    pub(super) fn receive_plain(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        let (bytes, _) = rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT)?;
        Ok(bytes)
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
