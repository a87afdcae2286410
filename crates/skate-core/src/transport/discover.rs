//! Who listens at an address: what a node asks before it joins a cluster of which it knows nothing else.
//!
//! Beside the reactor, because there is no transport yet whose node would be known. The connection is closed as soon
//! as the other side has proved itself: that side has seen no proof of ours, so it has noticed nobody.
//!
//! Whether the cluster uses TLS is learned as well. Nobody can pretend that it does not: whoever answers in clear has
//! proved the token, and a node of a cluster with TLS never does so in clear. So a joiner that is told nothing asks in
//! clear, and again within TLS if that is refused.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use thiserror::Error;

use skate_proto::handshake::{
    ANSWER_LEN, Connector, Credentials, HandshakeError, Identity, PREFACE_LEN, Role, WHO_LISTENS, is_refusal,
};
use skate_proto::ids::ProcId;

use super::reactor::nonce;
use super::socket::{Address, Connecting, Socket};
use super::tls::{ClusterTls, TlsError};

/// Read at a time within TLS.
const RECORDS_BYTES: usize = 4096;

/// Why nobody was found.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiscoverError {
    #[error("{address:?} is not of the form host:port (an IPv6 address in brackets)")]
    NoAddress { address: String },
    #[error("the host of {address} is not known: {source}")]
    UnknownHost { address: String, source: io::Error },
    #[error(
        "no node could be reached at {address}: {source}; see that the node there runs, and that its port is let through"
    )]
    Unreachable { address: String, source: io::Error },
    #[error("{address} did not answer in time; see that it is a node's address, and that its port is let through")]
    Timeout { address: String },
    #[error("the node at {address} does not accept the token: the token is not this cluster's")]
    Token { address: String },
    #[error("the node at {address} cannot be joined: {reason}")]
    Refused { address: String, reason: HandshakeError },
    #[error("the connection with the node at {address} is not secure: {source}")]
    Tls { address: String, source: TlsError },
    #[error("what listens at {address} is not a Skate node: {what}")]
    NotANode { address: String, what: &'static str },
    /// A signal came; nothing is lost by beginning anew.
    #[error("interrupted")]
    Interrupted,
    #[error("the system refuses a random number: {0}")]
    System(#[source] io::Error),
}

/// Who listens at an address.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub node: Identity,
    /// Whether connections between the nodes of its cluster are TLS.
    pub tls: bool,
}

/// Asks the node that listens at `address` ("host:port") who it is. Waits until `deadline`.
///
/// A node of a cluster whose `tls` is another than the given one is refused; without one either is taken.
pub fn discover(
    address: &str,
    token: [u8; 32],
    python_minor: u8,
    tls: Option<bool>,
    deadline: Instant,
) -> Result<Found, DiscoverError> {
    let asked = Asked { address, deadline };
    let candidates = asked.resolve()?;
    let proc = ProcId(crate::sys::random_id().map_err(DiscoverError::System)?);
    let me = Identity { proc, role: Role::Tool, pid: std::process::id(), python_minor };
    let credentials = Credentials::of_cluster(token);
    let mut last = None;
    for (tried, candidate) in candidates.iter().enumerate() {
        // One that does not answer leaves time for the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let until = Instant::now() + left / (candidates.len() - tried) as u32;
        match asked.connect(*candidate, until) {
            Ok(socket) => return asked.ask(*candidate, socket, &me, &credentials, tls),
            Err(DiscoverError::Interrupted) => return Err(DiscoverError::Interrupted),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| asked.no_address()))
}

struct Asked<'a> {
    address: &'a str,
    deadline: Instant,
}

impl Asked<'_> {
    fn resolve(&self) -> Result<Vec<SocketAddr>, DiscoverError> {
        match self.address.to_socket_addrs() {
            Ok(found) => Ok(found.collect()),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(self.no_address()),
            Err(source) => Err(DiscoverError::UnknownHost { address: self.address.to_owned(), source }),
        }
    }

    fn connect(&self, candidate: SocketAddr, until: Instant) -> Result<Socket, DiscoverError> {
        let socket = match Socket::connect(&Address::Tcp(candidate)) {
            Ok(Connecting::Done(socket)) => return Ok(socket),
            Ok(Connecting::InProgress(socket)) => socket,
            Ok(Connecting::Full) => return Err(self.unreachable(Errno::AGAIN.into())),
            Err(source) => return Err(self.unreachable(source)),
        };
        self.wait(&socket, PollFlags::OUT, until)?;
        socket.take_error().map_err(|source| self.unreachable(source))?;
        Ok(socket)
    }

    fn ask(
        &self,
        candidate: SocketAddr,
        socket: Socket,
        me: &Identity,
        credentials: &Credentials,
        tls: Option<bool>,
    ) -> Result<Found, DiscoverError> {
        if tls != Some(true) {
            let (mut connector, first) = Connector::new(me, credentials, WHO_LISTENS, nonce());
            self.say(&socket, &first)?;
            match self.judge(&mut connector, &self.answer(&socket)?) {
                Err(DiscoverError::Refused { reason: HandshakeError::TlsMissing, .. }) if tls.is_none() => {}
                outcome => return outcome.map(|node| Found { node, tls: false }),
            }
            drop(socket);
            let again = self.connect(candidate, self.deadline)?;
            return self.ask(candidate, again, me, credentials, Some(true));
        }
        let node = self.ask_secured(&socket, me, credentials)?;
        Ok(Found { node, tls: true })
    }

    fn ask_secured(
        &self,
        socket: &Socket,
        me: &Identity,
        credentials: &Credentials,
    ) -> Result<Identity, DiscoverError> {
        let (mut connector, first) = Connector::over_tls(me, credentials, WHO_LISTENS, nonce());
        let channel =
            ClusterTls::new(credentials).and_then(|tls| tls.connect()).map_err(|error| self.insecure(error))?;
        self.say(socket, &[&first[..PREFACE_LEN], &channel.opening()].concat())?;
        socket.secure(channel);
        self.wait(socket, PollFlags::IN, self.deadline)?;
        if matches!(socket.peek(), Ok(Some(first)) if is_refusal(first)) {
            return self.judge(&mut connector, &self.answer(socket)?);
        }
        let (mut records, mut plain) = ([0; RECORDS_BYTES], Vec::new());
        while plain.len() < ANSWER_LEN {
            let len = self.receive(socket, &mut records)?;
            let mut incoming = &records[..len];
            loop {
                let before = plain.len();
                let taken = socket.decrypt(&mut incoming, &mut plain).map_err(|error| self.insecure(error))?;
                if taken.established {
                    let channel = socket.channel().expect("it was secured above");
                    connector.bind(channel.binding().map_err(|error| self.insecure(error))?);
                    self.say(socket, &connector.hello())?;
                }
                if taken.ended {
                    return Err(self.not_a_node("it closed the connection without an answer"));
                }
                if incoming.is_empty() && plain.len() == before {
                    break;
                }
            }
        }
        self.judge(&mut connector, &plain[..ANSWER_LEN])
    }

    /// Writes what fits into the empty buffer of a new socket.
    fn say(&self, socket: &Socket, bytes: &[u8]) -> Result<(), DiscoverError> {
        match socket.send(&[IoSlice::new(bytes)], None) {
            Ok(len) if len == bytes.len() => Ok(()),
            Ok(_) => Err(self.unreachable(io::ErrorKind::WriteZero.into())),
            Err(error) => Err(self.unreachable(error.into())),
        }
    }

    /// Who it is that answered so.
    fn judge(&self, connector: &mut Connector, answer: &[u8]) -> Result<Identity, DiscoverError> {
        let address = || self.address.to_owned();
        match (connector.handle(answer), connector.peer()) {
            (Ok(_), Some(node)) => Ok(node),
            (Ok(_), None) => Err(self.not_a_node("it did not say who it is")),
            // A session follows from its token, so another session is another token.
            (Err(HandshakeError::WrongProof | HandshakeError::Session), _) => {
                Err(DiscoverError::Token { address: address() })
            }
            (Err(HandshakeError::Malformed(_) | HandshakeError::NotOurs), _) => {
                Err(self.not_a_node("its answer means nothing"))
            }
            (Err(HandshakeError::WrongTarget { .. }), _) => {
                Err(self.not_a_node("it is another process of the cluster"))
            }
            (Err(reason), _) => Err(DiscoverError::Refused { address: address(), reason }),
        }
    }

    /// An answer in clear.
    fn answer(&self, socket: &Socket) -> Result<[u8; ANSWER_LEN], DiscoverError> {
        let (mut answer, mut filled) = ([0; ANSWER_LEN], 0);
        while filled < ANSWER_LEN {
            filled += self.receive(socket, &mut answer[filled..])?;
        }
        Ok(answer)
    }

    /// Waits for bytes, and reads them. At least one.
    fn receive(&self, socket: &Socket, buffer: &mut [u8]) -> Result<usize, DiscoverError> {
        loop {
            match socket.receive_plain(buffer) {
                Ok(0) => return Err(self.not_a_node("it closed the connection without an answer")),
                Ok(len) => return Ok(len),
                Err(Errno::AGAIN) => self.wait(socket, PollFlags::IN, self.deadline)?,
                Err(Errno::INTR) => return Err(DiscoverError::Interrupted),
                Err(error) => return Err(self.unreachable(error.into())),
            }
        }
    }

    fn wait(&self, socket: &Socket, wanted: PollFlags, until: Instant) -> Result<(), DiscoverError> {
        let left = until.saturating_duration_since(Instant::now());
        // It fits: a deadline is at most a century away.
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(socket, wanted)], Some(&timeout)) {
            Ok(0) => Err(DiscoverError::Timeout { address: self.address.to_owned() }),
            Ok(_) => Ok(()),
            Err(Errno::INTR) => Err(DiscoverError::Interrupted),
            Err(error) => Err(self.unreachable(error.into())),
        }
    }

    fn no_address(&self) -> DiscoverError {
        DiscoverError::NoAddress { address: self.address.to_owned() }
    }

    fn unreachable(&self, source: io::Error) -> DiscoverError {
        DiscoverError::Unreachable { address: self.address.to_owned(), source }
    }

    fn insecure(&self, source: TlsError) -> DiscoverError {
        DiscoverError::Tls { address: self.address.to_owned(), source }
    }

    fn not_a_node(&self, what: &'static str) -> DiscoverError {
        DiscoverError::NotANode { address: self.address.to_owned(), what }
    }
}
