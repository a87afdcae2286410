//! Frames between processes: one reactor, one I/O thread, any number of senders.
//!
//! What is here and what is not: connections, who writes and who reads, and the handshake's shell. What
//! frames mean is the [`Handler`]'s.
//!
//! A process sends to a peer always on one connection, so frames to it keep their order, and receives on
//! any: when two processes call each other at the same moment there are two connections, one per
//! direction. Only nodes listen. Whoever wants a process that is not a node connects to its node and names
//! it, and the node passes the descriptor on; the handshake then runs end to end. The first frame to a
//! peer starts that; frames wait meanwhile.
//!
//! Our own node is reached on its Unix socket, another one by TCP, as are the processes on it. Who lives on
//! which node is told by [`Transport::route`]; where a node listens is asked for by
//! [`Handler::on_unknown_node`] and answered by [`Transport::set_address`] or [`Transport::forget_node`]. A
//! node connects to other nodes, and never to a process that is not one. Descriptors never leave the machine.
//!
//! A node that only connects outwards is sought at the head's address, with everybody on it. The head's reactor hands
//! such strangers out ([`Handler::on_stranger`]); the node, when told, calls back ([`Transport::call_back`]), and takes
//! what comes on that connection as if it had been connected to. See `reactor::calling`, and [`relay`](crate::relay).
//!
//! Connections between nodes are TLS if the cluster wants it ([`Config::tls`], which its members learn from their node):
//! after the preface, between the two processes, whichever node passes the descriptor on; see `tls`. It is nowhere else
//! than in a [`Socket`](socket::Socket), which encrypts what is sent, and in `reactor::secured`, which reads.
//!
//! Writing is described in `connection`, waiting in `drive`, forks in `fork`.
//!
//! Locks, in the order in which they may be taken: the reactor (for as long as a thread drives), peers,
//! a connection's buffer, then the leaves (routes, dirty list, commands, foreign descriptors, gate). Only the
//! first is held when the handler is called.

mod connection;
mod discover;
mod drive;
mod eagerness;
pub(crate) mod fork;
mod futex;
mod poller;
mod reactor;
mod routes;
mod slots;
mod socket;
mod stream;
mod thread;
pub(crate) mod tls;

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use parking_lot::{Mutex, RwLock};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use thiserror::Error;

use skate_proto::frame::{BODY_LEN_MAX, FLAG_FD, FrameError, Header};
use skate_proto::handshake::{Credentials, HandshakeError, Identity, Role};
use skate_proto::ids::ProcId;

use connection::{Connection, Sent};
use drive::Gate;
use fork::PrivateFd;
use poller::{Poller, Source};
use reactor::{Joining, Reactor};
use routes::{Routes, Way};

pub use connection::BACKLOG_BYTES_MAX;
pub use discover::{DiscoverError, Found, discover};
pub use drive::Driven;
pub(crate) use reactor::nonce;
pub use reactor::{Called, Stranger};
pub use socket::{Address, Listener};
pub use stream::Stream;
pub(crate) use thread::{block_signals, spawn_without_signals};
pub use tls::{NodeTls, TlsError};

/// Who a peer is.
pub type PeerInfo = Identity;

/// The frame with which a node passes a connection to the process it is for.
const PASS_CONN: u8 = 1;
/// The node answers within the handshake's own deadline, so this is hit only if it hangs.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A frame, as it lies in the read buffer.
#[derive(Copy, Clone, Debug)]
pub struct Frame<'a> {
    pub kind: u8,
    pub flags: u8,
    pub corr: u64,
    pub body: &'a [u8],
}

/// What becomes of frames and connections.
///
/// Called by one thread at a time, the one that drives, without any lock that a method of [`Transport`]
/// takes; all of those except `drive` and `shutdown` may be called from within. Must not block and must
/// not take the interpreter lock: everything waits for it.
pub trait Handler: Send + Sync + 'static {
    /// Called once by [`Transport::start`], after the node was joined and before any other method.
    fn on_started(&self, transport: &Arc<Transport>) {
        let _ = transport;
    }
    /// A frame came. `fd` is `None` although the flags promise one when this process can open no more.
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, fd: Option<OwnedFd>);
    /// Every socket that was ready in this turn has been read.
    fn on_batch_end(&self);
    /// A peer connected to this process and proved the token.
    fn on_joined(&self, peer: PeerInfo);
    /// The connection with a peer ended, or could not be made. Frames that were not yet written are lost.
    /// The next frame to it starts a new connection.
    fn on_closed(&self, peer: ProcId, reason: CloseReason);
    /// A peer connected to this process for bytes rather than frames ([`Role::Bulk`]) and proved the token. The
    /// stream is the handler's, and does not wait yet ([`Stream::set_patience`]); a process that expects none closes it.
    fn on_bulk(&self, peer: PeerInfo, stream: Stream) {
        let _ = (peer, stream);
    }
    /// Whether connections for processes that are not here are handed out, and those by which nodes call back for them.
    /// Otherwise they are refused.
    fn relays(&self) -> bool {
        false
    }
    /// Somebody on another machine wants a process that is not here. The connection is the handler's.
    fn on_stranger(&self, target: ProcId, stranger: Stranger) {
        let _ = (target, stranger);
    }
    /// A node calls back for the stranger with this ticket. The connection is the handler's.
    fn on_called_back(&self, ticket: u64, called: Called) {
        let _ = (ticket, called);
    }
    /// A process on this node is wanted, and nobody has said yet where the node listens. To be answered by
    /// [`Transport::set_address`] or [`Transport::forget_node`], now or later; asked once until then. Connections
    /// that have waited for as long as a handshake may take are given up ([`CloseReason::NodeUnknown`]).
    fn on_unknown_node(&self, node: ProcId) {
        let _ = node;
    }
    /// Something happened on a descriptor of [`Transport::register_fd`].
    fn on_fd_ready(&self, token: u64);
    /// Something that an administrator should know. At most one a second.
    fn on_warning(&self, text: &str) {
        // Standard error may be closed or full, which is no reason to panic.
        let _ = writeln!(io::stderr(), "skate: {text}");
    }
}

/// Why a connection ended.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CloseReason {
    #[error("the peer closed the connection; its process has probably ended")]
    Closed,
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
    #[error("the node could not be reached: {0}")]
    Connect(#[source] io::Error),
    /// Another node than our own.
    #[error("the node at {address} could not be reached: {source}")]
    Unreachable { address: Address, source: io::Error },
    /// Nobody answered [`Handler::on_unknown_node`].
    #[error("the address of the process's node was not learned within 5 s")]
    NodeUnknown,
    /// [`Transport::forget_node`] was called, with this cause.
    #[error("the process's node is gone: {0}")]
    NodeGone(String),
    #[error("the handshake failed: {0}")]
    Handshake(#[source] HandshakeError),
    #[error("the connection is not secure: {0}")]
    Tls(#[from] TlsError),
    #[error("the handshake was not finished within 5 s")]
    HandshakeTimeout,
    #[error("the peer broke the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("the peer broke the protocol: descriptors and the frames that carry them do not match")]
    Descriptors,
    #[error("the peer does not read: {} MiB wait for it", BACKLOG_BYTES_MAX >> 20)]
    Overflow,
    #[error("the peer connected anew")]
    Replaced,
    #[error("this process disconnected")]
    Disconnected,
    /// Told of the node, once, by whichever thread notices it.
    #[error(
        "the program has closed descriptors that it did not open, among them those of the cluster ({0}), as os.closerange does"
    )]
    DescriptorsClosed(#[source] io::Error),
}

/// Why a transport could not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    #[error("the system refuses {what}: {source}")]
    System { what: &'static str, source: io::Error },
    #[error("the node at {address} could not be joined: {reason}")]
    Join { address: Address, reason: CloseReason },
    #[error("the node at {address} did not answer within {} s", JOIN_TIMEOUT.as_secs())]
    JoinTimeout { address: Address },
}

/// What a process must know to start.
#[derive(Debug)]
pub struct Config {
    pub me: ProcId,
    pub role: Role,
    /// Minor version of this process's Python 3, or 0.
    pub python_minor: u8,
    pub session: [u8; 16],
    /// The cluster token.
    pub token: [u8; 32],
    pub node: ProcId,
    pub node_address: Address,
    /// Whether connections between nodes are TLS. For the node only: it tells its members.
    pub tls: bool,
    /// For the node only.
    pub listeners: Vec<Listener>,
    /// Without it frames are only read, and queued ones only written, while a thread drives.
    pub io_thread: bool,
}

/// When a frame is written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum SendMode {
    /// Now, by this thread, if the connection is idle.
    Now,
    /// Together with others: by the driver within [300 us](drive), or by the thread that fills 64 KiB.
    Queue,
}

/// What a sender leaves for the driver.
enum Command {
    Connect(Arc<Connection>),
    Close(Arc<Connection>, CloseReason),
    Disconnect(ProcId),
    NodeKnown(ProcId),
    NodeGone(ProcId),
    CallBack(ProcId, u64),
}

struct Peer {
    /// The one on which this process sends.
    connection: Arc<Connection>,
    /// Known once the peer is proven.
    info: Option<PeerInfo>,
}

/// A process whose I/O thread died of a bug would hang its peers and itself; it ends instead, and they
/// are told.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Descriptors of others that are watched.
#[derive(Default)]
struct Foreign {
    by_token: HashMap<u64, (u32, PrivateFd), RandomState>,
    tokens: HashMap<u32, u64, RandomState>,
    next_id: u32,
}

impl Foreign {
    fn token(&self, id: u32) -> Option<u64> {
        self.tokens.get(&id).copied()
    }
}

/// The connections of this process. See the module's documentation.
///
/// In a forked child every method does nothing; nor when the program has closed our descriptors, which the
/// handler is told ([`CloseReason::DescriptorsClosed`]) as soon as a thread drives.
pub struct Transport {
    me: PeerInfo,
    credentials: Credentials,
    node: ProcId,
    node_address: Address,
    handler: Arc<dyn Handler>,
    generation: u32,
    peers: RwLock<HashMap<ProcId, Peer, RandomState>>,
    routes: Mutex<Routes>,
    gate: Gate,
    reactor: Mutex<Option<Reactor>>,
    dirty: Mutex<Vec<Arc<Connection>>>,
    commands: Mutex<Vec<Command>>,
    foreign: Mutex<Foreign>,
    nodes_use_tls: AtomicBool,
    tls: Arc<NodeTls>,
    io_thread: Mutex<Option<JoinHandle<()>>>,
    /// The handler knows that the descriptors are gone.
    loss_told: AtomicBool,
}

impl Transport {
    /// Starts. A process other than the node is joined to its node when this returns.
    pub fn start(config: Config, handler: Arc<dyn Handler>) -> Result<Arc<Self>, StartError> {
        let system = |what| move |source| StartError::System { what, source };
        fork::install();
        let poller = Arc::new(Poller::new().map_err(system("an epoll instance"))?);
        let listeners = config.listeners.into_iter().map(Listener::into_private).collect();
        let reactor = Reactor::new(Arc::clone(&poller), listeners).map_err(system("to watch a listener"))?;
        let me =
            Identity { proc: config.me, role: config.role, pid: std::process::id(), python_minor: config.python_minor };
        let credentials = Credentials { session: config.session, token: config.token };
        let transport = Arc::new(Self {
            me,
            credentials: credentials.clone(),
            node: config.node,
            node_address: config.node_address,
            handler,
            generation: fork::generation(),
            peers: RwLock::default(),
            routes: Mutex::new(Routes::new(config.me, config.node)),
            gate: Gate::new(poller),
            reactor: Mutex::new(Some(reactor)),
            dirty: Mutex::default(),
            commands: Mutex::default(),
            foreign: Mutex::default(),
            nodes_use_tls: AtomicBool::new(config.tls),
            tls: Arc::new(NodeTls::new(credentials)),
            io_thread: Mutex::default(),
            loss_told: AtomicBool::new(false),
        });
        if let Err(error) = transport.join_node() {
            transport.shutdown();
            return Err(error);
        }
        transport.handler.on_started(&transport);
        if config.io_thread {
            let shared = Arc::clone(&transport);
            let run = move || {
                let _abort = AbortOnPanic;
                shared.run_io();
            };
            match spawn_without_signals("skate-io", run) {
                Ok(thread) => *transport.io_thread.lock() = Some(thread),
                Err(source) => {
                    transport.shutdown();
                    return Err(StartError::System { what: "a thread", source });
                }
            }
        }
        Ok(transport)
    }

    /// This process, as its peers know it.
    #[must_use]
    pub fn me(&self) -> PeerInfo {
        self.me
    }

    /// What this process proves itself with, for connections that are made outside of the reactor.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Whether connections between the nodes of the cluster are TLS.
    #[must_use]
    pub fn nodes_use_tls(&self) -> bool {
        // Known before the first connection with another node is made or accepted, by the thread that does either.
        self.nodes_use_tls.load(Ordering::Relaxed)
    }

    /// What secures connections with other nodes that are made outside of the reactor; `None` if they are in clear.
    #[must_use]
    pub fn tls(&self) -> Option<Arc<NodeTls>> {
        self.nodes_use_tls().then(|| Arc::clone(&self.tls))
    }

    /// Sends a frame whose body is the concatenation of `body`, after all that were sent to `to` before.
    ///
    /// # Panics
    /// If the body is longer than a frame may be.
    pub fn send(&self, to: ProcId, kind: u8, corr: u64, body: &[&[u8]], mode: SendMode) {
        if self.is_void() {
            return;
        }
        let header = encode_header(kind, 0, corr, body);
        let Some(connection) = self.connection(to) else {
            return;
        };
        let sent = match mode {
            SendMode::Now => connection.send_now(&header, body, None),
            SendMode::Queue => connection.queue(&header, body),
        };
        self.see_to(&connection, sent);
    }

    /// Sends a frame and a copy of a descriptor.
    ///
    /// # Panics
    /// If the peer is on another machine: descriptors mean nothing there.
    pub fn send_fd(&self, to: ProcId, kind: u8, corr: u64, body: &[&[u8]], fd: BorrowedFd<'_>) {
        if self.is_void() {
            return;
        }
        let header = encode_header(kind, FLAG_FD, corr, body);
        let Some(connection) = self.connection(to) else {
            return;
        };
        let leaves = || matches!(self.routes.lock().way(to), Way::Node(_) | Way::Unknown(_));
        let carries = connection.carries_descriptors().unwrap_or_else(|| !leaves());
        assert!(carries, "a descriptor is sent to process {:#018x}, which is on another node", to.0);
        let sent = connection.send_now(&header, body, Some(fd));
        self.see_to(&connection, sent);
    }

    /// Tells that a process lives on a node. Of whom nothing is told lives on our own. It is forgotten when the
    /// connection with the process ends, unless its node was not found, so it is told again with what makes this
    /// process write to it again.
    pub fn route(&self, proc: ProcId, node: ProcId) {
        if !self.is_void() {
            self.routes.lock().set(proc, node);
        }
    }

    /// A process is dead: where it lived does not matter any more.
    pub fn drop_route(&self, proc: ProcId) {
        if !self.is_void() {
            self.routes.lock().drop_route(proc);
        }
    }

    /// Tells where another node listens. Connections that wait for it are made.
    pub fn set_address(&self, node: ProcId, address: Address) {
        if !self.is_void() {
            self.routes.lock().set_address(node, address);
            self.command(Command::NodeKnown(node));
        }
    }

    /// The same for a node that only connects outwards: the address is the head's. It may be away for a while, and not
    /// let those down who wait for a process there: connecting is tried again for `HEAD_S_MAX`.
    pub fn set_address_of_head(&self, node: ProcId, address: Address) {
        if !self.is_void() {
            self.routes.lock().set_address_of_head(node, address);
            self.command(Command::NodeKnown(node));
        }
    }

    /// Another node is dead, or nobody knows it: connections to it and to processes on it, now and later, end at once
    /// with this cause ([`CloseReason::NodeGone`]).
    pub fn forget_node(&self, node: ProcId, cause: &str) {
        if !self.is_void() {
            self.routes.lock().forget_node(node, cause);
            self.command(Command::NodeGone(node));
        }
    }

    /// Takes the connection that `via` holds under this ticket, by connecting to it. If that fails nothing is told: who
    /// wants something of this node hears it from `via`.
    pub fn call_back(&self, via: ProcId, ticket: u64) {
        if !self.is_void() {
            self.command(Command::CallBack(via, ticket));
        }
    }

    /// How many processes on other nodes, and how many other nodes, are known.
    #[must_use]
    pub fn known_routes(&self) -> (usize, usize) {
        self.routes.lock().len()
    }

    /// Waits until `done()`, driving the reactor meanwhile if no other thread does.
    ///
    /// `done` is evaluated before waiting and after every turn, and whenever [`Self::wake`] was called; it
    /// must be quick and must not call the transport. A deadline is met to the millisecond.
    ///
    /// # Panics
    /// If called by the handler.
    pub fn drive(&self, done: &dyn Fn() -> bool, deadline: Option<Instant>) -> Driven {
        if done() {
            return Driven::Done;
        }
        if self.is_foreign_process() {
            return Driven::Closed;
        }
        assert!(!Gate::is_driving(), "the handler must not wait");
        match self.drive_once(done, deadline) {
            Driven::Closed if self.gate.lost().is_some() => {
                self.tell_loss();
                if done() { Driven::Done } else { Driven::Closed }
            }
            outcome => outcome,
        }
    }

    fn drive_once(&self, done: &dyn Fn() -> bool, deadline: Option<Instant>) -> Driven {
        let turn = match self.gate.claim_for_user(done, deadline) {
            Ok(turn) => turn,
            Err(outcome) => return outcome,
        };
        let mut reactor = self.reactor.lock();
        let Some(reactor) = reactor.as_mut() else {
            return Driven::Closed;
        };
        loop {
            reactor.settle(self);
            turn.announce();
            let outcome = if done() {
                Some(Driven::Done)
            } else if self.gate.is_closing() {
                Some(Driven::Closed)
            } else if deadline.is_some_and(|at| at <= Instant::now()) {
                Some(Driven::TimedOut)
            } else {
                None
            };
            if let Some(outcome) = outcome {
                turn.withdraw();
                return outcome;
            }
            let waited = reactor.wait_eagerly(deadline, turn.is_pending());
            turn.withdraw();
            match waited {
                Ok(()) => reactor.dispatch(self),
                Err(Errno::INTR) => return Driven::Interrupted,
                Err(error) => {
                    self.gate.lose(error);
                    return Driven::Closed;
                }
            }
        }
    }

    /// Tells the handler, once, that the descriptors are gone and with them the node.
    fn tell_loss(&self) {
        if let Some(error) = self.gate.lost()
            && !self.loss_told.swap(true, Ordering::AcqRel)
        {
            fork::disown();
            let reason = CloseReason::DescriptorsClosed(error.into());
            self.handler.on_warning(&format!("this process leaves the cluster: {reason}"));
            self.handler.on_closed(self.node, reason);
        }
    }

    /// Makes every thread in [`Self::drive`] evaluate its `done()` again. Call it after what makes one
    /// true; it costs a fence and a load when no thread waits.
    #[inline]
    pub fn wake(&self) {
        if !self.is_void() {
            self.gate.wake();
        }
    }

    /// Watches a descriptor (a copy of it) for input, hang-up and errors.
    ///
    /// Edge-triggered, so that nobody spins on what nobody reads: the handler is told once when something
    /// comes, and must see to it that everything is read before it counts on being told again. A notice
    /// may still come right after `unregister_fd`.
    pub fn register_fd(&self, token: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.is_void() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let copy = PrivateFd::new(fd.try_clone_to_owned()?);
        self.unregister_fd(token);
        let mut foreign = self.foreign.lock();
        let id = foreign.next_id;
        foreign.next_id = id.wrapping_add(1);
        let add = |poller: &Poller| poller.add(&copy, Source::Foreign(id), EventFlags::IN | EventFlags::ET);
        self.gate.with_poller(add).unwrap_or_else(|| Err(io::ErrorKind::NotConnected.into()))?;
        foreign.tokens.insert(id, token);
        foreign.by_token.insert(token, (id, copy));
        Ok(())
    }

    pub fn unregister_fd(&self, token: u64) {
        if self.is_void() {
            return;
        }
        let mut foreign = self.foreign.lock();
        if let Some((id, fd)) = foreign.by_token.remove(&token) {
            foreign.tokens.remove(&id);
            self.gate.with_poller(|poller| poller.delete(fd.as_fd()));
        }
    }

    /// Ends the connections with a peer. The handler is told ([`CloseReason::Disconnected`]).
    pub fn disconnect(&self, peer: ProcId) {
        if !self.is_void() {
            self.command(Command::Disconnect(peer));
        }
    }

    /// Bytes that were sent to a peer and not yet written.
    #[must_use]
    pub fn backlog(&self, peer: ProcId) -> usize {
        self.peers.read().get(&peer).map_or(0, |peer| peer.connection.backlog())
    }

    /// Who a peer is, once it is connected.
    #[must_use]
    pub fn peer_info(&self, peer: ProcId) -> Option<PeerInfo> {
        self.peers.read().get(&peer)?.info
    }

    /// The peers that are connected, in the order of their ids.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerInfo> {
        let mut peers: Vec<PeerInfo> = self.peers.read().values().filter_map(|peer| peer.info).collect();
        peers.sort_by_key(|peer| peer.proc);
        peers
    }

    /// Writes what can be written without waiting, closes everything and ends the I/O thread. Threads in
    /// `drive` return [`Driven::Closed`]; the handler is not told. May be repeated.
    ///
    /// Called by the handler, it only makes everyone stop, and must be called again from outside.
    pub fn shutdown(&self) {
        if self.is_void() {
            return;
        }
        if Gate::is_driving() {
            return self.gate.close();
        }
        let mut io_thread = self.io_thread.lock();
        self.gate.close();
        if self.gate.lost().is_some() {
            return; // that thread may never come back
        }
        if let Some(thread) = io_thread.take() {
            // It does not panic: `AbortOnPanic`.
            let _ = thread.join();
        }
        if let Some(mut reactor) = self.reactor.lock().take() {
            reactor.finish(self);
        }
        self.peers.write().clear();
        self.dirty.lock().clear();
        self.commands.lock().clear();
        *self.foreign.lock() = Foreign::default();
        drop(self.gate.take_poller());
    }

    /// Whether this process is a forked child of the one that started the transport.
    pub fn is_foreign_process(&self) -> bool {
        fork::forked_since(self.generation)
    }

    /// Whether the descriptors are another process's, or nobody's: then no method may use their numbers.
    fn is_void(&self) -> bool {
        self.is_foreign_process() || self.gate.lost().is_some()
    }

    fn run_io(&self) {
        while let Some(turn) = self.gate.claim_for_io() {
            let mut reactor = self.reactor.lock();
            let Some(reactor) = reactor.as_mut() else {
                return;
            };
            loop {
                reactor.settle(self);
                let wanted = turn.announce();
                if wanted || self.gate.is_closing() {
                    turn.withdraw();
                    break;
                }
                let waited = reactor.wait(None, turn.is_pending());
                turn.withdraw();
                match waited {
                    Ok(()) => reactor.dispatch(self),
                    Err(Errno::INTR) => {}
                    Err(error) => {
                        self.gate.lose(error);
                        return self.tell_loss();
                    }
                }
            }
        }
    }

    /// Connects to the node and waits for it, before anyone else can drive.
    fn join_node(&self) -> Result<(), StartError> {
        if self.node == self.me.proc {
            return Ok(());
        }
        let mut reactor = self.reactor.lock();
        let Some(reactor) = reactor.as_mut() else {
            return Ok(());
        };
        reactor.joining = Some(Joining::Pending);
        self.connection(self.node);
        let until = Instant::now() + JOIN_TIMEOUT;
        loop {
            reactor.settle(self);
            match reactor.joining.take() {
                Some(Joining::Joined) => return Ok(()),
                Some(Joining::Failed(reason)) => {
                    return Err(StartError::Join { address: self.node_address.clone(), reason });
                }
                other => reactor.joining = other,
            }
            if Instant::now() >= until {
                return Err(StartError::JoinTimeout { address: self.node_address.clone() });
            }
            // A signal only ends the wait early.
            if reactor.wait(Some(until), false).is_ok() {
                reactor.dispatch(self);
            }
        }
    }

    /// The connection on which this process sends to `to`, made if there is none.
    fn connection(&self, to: ProcId) -> Option<Arc<Connection>> {
        if let Some(peer) = self.peers.read().get(&to) {
            return Some(Arc::clone(&peer.connection));
        }
        if self.gate.is_closing() {
            return None;
        }
        let new = {
            let mut peers = self.peers.write();
            if let Some(peer) = peers.get(&to) {
                return Some(Arc::clone(&peer.connection));
            }
            let connection = Arc::new(Connection::new(to));
            peers.insert(to, Peer { connection: Arc::clone(&connection), info: None });
            connection
        };
        self.command(Command::Connect(Arc::clone(&new)));
        Some(new)
    }

    fn command(&self, command: Command) {
        self.commands.lock().push(command);
        self.gate.notify_driver();
    }

    /// Does what the outcome of sending asks for.
    fn see_to(&self, connection: &Arc<Connection>, sent: Sent) {
        match sent {
            Sent::Settled => {}
            Sent::BecameDirty => {
                self.dirty.lock().push(Arc::clone(connection));
                self.gate.notify_driver();
            }
            Sent::Full => {
                if let Some((socket, token)) = connection.opened() {
                    let flags = EventFlags::IN | EventFlags::OUT;
                    // It fails only when the connection was closed meanwhile.
                    let _ = self.gate.with_poller(|p| p.modify(&**socket, Source::decode(*token), flags));
                }
            }
            // Sockets of ours are open for as long as they are used, unless the program has closed them.
            Sent::Broken(error @ (Errno::BADF | Errno::NOTSOCK)) => self.gate.lose(error),
            Sent::Broken(error) => {
                let reason = CloseReason::Io(error.into());
                self.command(Command::Close(Arc::clone(connection), reason));
            }
            Sent::Overflow => {
                self.command(Command::Close(Arc::clone(connection), CloseReason::Overflow));
            }
        }
    }

    fn is_current(&self, connection: &Arc<Connection>) -> bool {
        self.peers.read().get(&connection.peer).is_some_and(|p| Arc::ptr_eq(&p.connection, connection))
    }

    /// A peer connected. If this process sends to it already, it keeps that connection for sending.
    fn note_joined(&self, info: PeerInfo, connection: Arc<Connection>) {
        let mut peers = self.peers.write();
        let peer = peers.entry(info.proc).or_insert(Peer { connection, info: None });
        peer.info = Some(info);
    }
}

fn encode_header(kind: u8, flags: u8, corr: u64, body: &[&[u8]]) -> [u8; skate_proto::frame::HEADER_LEN] {
    let len: usize = body.iter().map(|part| part.len()).sum();
    assert!(len <= BODY_LEN_MAX, "a body of {len} bytes is longer than a frame may be ({BODY_LEN_MAX})");
    debug_assert!(kind != 0);
    Header { body_len: len as u32, kind, flags, corr }.encode()
}
