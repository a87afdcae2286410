//! Bulk: blocks of shared memory between nodes.
//!
//! A node process offers its segments ([`Bulk::offer`]) and pulls blocks of other nodes into its own
//! ([`Bulk::pull`]). The bytes go from one memory file to the other without being seen by this process: the server
//! sends by `sendfile`, the client moves what arrives by `splice`, which neither maps the destination (so no page is
//! faulted in) nor clears pages that are about to be written. Measured on two cores over loopback, into memory that
//! was touched before: 3.1 to 5.6 GB/s, where `recv` into a mapping makes 2.2 and iperf3 2.0 to 3.0.
//!
//! Within TLS the bytes have to be seen: the server reads, encrypts and writes pieces that fit into a cache, the client
//! decrypts and writes them: 1.4 to 1.6 s of processors per GB, both ends together, where in clear it is 0.5 to 0.6
//! (`examples/bulk.rs`). Everything else is the same, also the rule about memory below, although what the socket
//! holds is a copy then: one rule is easier to keep.
//!
//! What is here: threads, sockets, ranges, and which source is asked next. What is not: which objects are pulled, by
//! whom they are wanted, and where they lie; that is `_node/pulls.py`.
//!
//! A block that is being pulled is offered from its first byte on: a request for what has not arrived waits for it,
//! holding no thread ([`offers`](self)). So copies are passed on while they come in, and a broadcast takes about as
//! long as its tree is wide, not as it is deep.
//!
//! Memory that is sent belongs to the socket, and on one machine to the *receiver's* socket, until the receiver has
//! read it. A segment may therefore be written anew only when [`Bulk::withdraw`] says that nothing of it is on its
//! way; receivers say when they have taken a range ([`wire`]).
//!
//! Connections prove the cluster token like all others ([`Role::Bulk`]); the reactor accepts them and hands them on.
//! Threads are started when there is something to do, and end when there has been nothing for a while.

mod client;
mod connect;
mod offers;
mod server;
mod sink;
pub mod wire;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use skate_proto::handshake::{Credentials, Identity, Role};
use skate_proto::ids::{ProcId, SegmentId};

use crate::transport::{Address, NodeTls, Stream};
use client::Client;
use connect::Dialer;
use offers::Offers;
use server::Server;

/// Threads that send. Requests beyond wait in order.
pub const SENDERS_MAX: usize = 8;
/// Connections of pulling nodes. With one more, the one that has been idle for longest is closed, or, if all are
/// busy, the new one: its client asks another source, or later.
pub const CONNECTIONS_MAX: usize = 256;
/// Threads that pull. Streams beyond wait in order.
pub const PULLERS_MAX: usize = 16;
/// Connections for one object; at most one for every two processors, since each keeps one busy here, and on a machine
/// with several nodes one at its source. (On two processors, two connections into memory that was touched before are a
/// third slower than one; into new memory, half as fast again.)
pub const STREAMS_MAX: usize = 4;
/// A further connection is worth its handshake and its thread from so many bytes on.
pub const STREAM_BYTES_MIN: u64 = 32 << 20;
/// What one request asks for. A source that dies costs the client no more than what is on its way; a stream pauses
/// for a round trip between two of them.
pub const RANGE_BYTES_MAX: u64 = 32 << 20;
/// A peer from which nothing came, or that took nothing, for so long is given up.
pub const SILENCE_S_MAX: Duration = Duration::from_secs(10);
/// Connecting and proving the token may take so long.
pub const CONNECT_S_MAX: Duration = Duration::from_secs(5);
/// Unused connections that a client keeps. With one more, the one that was unused for longest is closed.
pub const IDLE_CONNECTIONS_MAX: usize = 64;
/// How long a connection, or a thread, is kept for what may come.
pub const IDLE_S: Duration = Duration::from_secs(15);

/// A place from which a block can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub node: ProcId,
    pub address: Address,
    pub segment: SegmentId,
    pub offset: u64,
}

/// A block to be pulled.
#[derive(Debug)]
pub struct Pull {
    /// Names the pull; chosen by the caller, and free again after the [`Outcome`].
    pub ticket: u64,
    /// Asked in this order; the next one when one fails.
    pub sources: Vec<Source>,
    pub len: u64,
    /// The destination: a segment of this node of which nothing is there yet. What has arrived is offered; nothing any
    /// more if the pull fails.
    pub segment: SegmentId,
    pub fd: OwnedFd,
    pub offset: u64,
}

/// Why a source did not deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub node: ProcId,
    /// It answered that it does not have the block. Otherwise it may only not have been reached.
    pub refused: bool,
    pub error: String,
}

/// How a pull ended. Nothing is written to the destination any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub ticket: u64,
    /// Empty when every byte is there.
    pub error: String,
    /// Sources that failed, also those that another one stood in for.
    pub failures: Vec<Failure>,
    /// Bytes that arrived.
    pub bytes: u64,
}

/// The bulk server and client of one node. See the module's documentation.
pub struct Bulk {
    offers: Arc<Offers>,
    server: Arc<Server>,
    client: Arc<Client>,
}

impl Bulk {
    /// With `tls` connections with other machines are made within TLS ([`Transport::tls`](crate::transport::Transport::tls));
    /// `silence` is [`SILENCE_S_MAX`] but for tests. `tell` hears of the end of every pull, once, on any thread; it
    /// must not block.
    #[must_use]
    pub fn new(
        me: &Identity,
        credentials: &Credentials,
        tls: Option<Arc<NodeTls>>,
        silence: Duration,
        tell: impl Fn(Outcome) + Send + Sync + 'static,
    ) -> Self {
        let offers = Arc::new(Offers::default());
        let server = Arc::new(Server::new(Arc::clone(&offers), silence));
        let dialer = Dialer { me: Identity { role: Role::Bulk, ..*me }, credentials: credentials.clone(), tls };
        let (for_client, its_server) = (Arc::clone(&offers), Arc::clone(&server));
        let client = Client::new(dialer, silence, for_client, its_server, Box::new(tell));
        Self { offers, server, client: Arc::new(client) }
    }

    /// Takes over a connection whose peer has proved the token.
    pub fn accept(&self, stream: Stream) {
        self.server.accept(stream);
    }

    /// Sends blocks of this segment to whoever asks. Its first `filled` bytes are there; who asks for others waits until
    /// a pull has brought them.
    pub fn offer(&self, segment: SegmentId, fd: OwnedFd, size: u64, filled: u64) {
        self.offers.offer(segment, fd, size, filled.min(size));
    }

    /// Sends nothing more of a segment; what is being sent of it is cut off. True if nothing of it is on its way any
    /// more: only then may its memory be written anew.
    pub fn withdraw(&self, segment: SegmentId) -> bool {
        self.offers.withdraw(segment)
    }

    /// Begins to pull a block.
    pub fn pull(&self, pull: Pull) {
        self.client.pull(pull);
    }

    /// Ends a pull soon; its [`Outcome`] still comes, and is a success if it had been whole already.
    pub fn cancel(&self, ticket: u64) {
        self.client.cancel(ticket);
    }

    /// Ends all connections, pulls and threads. Nothing is told of pulls that it ends. May be repeated.
    pub fn shutdown(&self) {
        self.client.shutdown();
        self.server.shutdown();
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// An address as it is written: `ip:port`, or the path of a Unix socket.
#[must_use]
pub fn parse_address(text: &str) -> Option<Address> {
    if text.starts_with('/') {
        return Some(Address::Unix(PathBuf::from(text)));
    }
    text.parse::<SocketAddr>().ok().map(Address::Tcp)
}
