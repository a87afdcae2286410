//! Relay: connections to nodes that nobody can connect to, passed on by the head, which both sides can.
//!
//! Whoever wants a process of such a node connects to the head and names it in the preface. The head's reactor hands
//! that stranger out, the relay holds it under a ticket ([`Relay::hold`]), and whoever knows where the process lives has
//! its node call back. The connection that the node makes with this ticket is joined with the stranger's
//! ([`Relay::join`]): it is sent the preface, and from then on bytes are copied both ways, unread.
//!
//! What is here: tickets, pairs of sockets, and one thread for all of them ([`pairs`](self)). What is not: where a
//! process lives, and any meaning of the bytes: handshake, TLS and frames are between the two who talk.
//!
//! Invariants: a stranger is at one place: it waits under its ticket, is with the thread, or is closed; there are never
//! more than [`Limits::pairs`] waiting and joined together; a ticket is given out once and taken back once.

mod pair;
mod pairs;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use skate_proto::handshake::{HandshakeError, PREFACE_LEN};

use crate::sys::random_id;
use crate::transport::fork::PrivateFd;
use crate::transport::{Called, Stranger, spawn_without_signals};
use pairs::Pairs;

/// Connections that are passed on, or wait to be, at a time. More are refused, and told so. Each takes two descriptors,
/// and up to 128 KiB while its sides do not read.
pub const PAIRS_MAX: usize = 1024;
/// For so long a node may take to call back; then the stranger is refused. Less than a handshake may take, so that who
/// waits still hears why.
pub const CALL_BACK_S_MAX: Duration = Duration::from_secs(4);
/// A connection of which one side has ended is closed when nothing of the other has come for so long.
pub const HALF_OPEN_S_MAX: Duration = Duration::from_secs(10);

/// What the relay is bounded by; the constants of this module but for tests.
#[derive(Copy, Clone, Debug)]
pub struct Limits {
    pub pairs: usize,
    pub call_back: Duration,
    pub half_open: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { pairs: PAIRS_MAX, call_back: CALL_BACK_S_MAX, half_open: HALF_OPEN_S_MAX }
    }
}

/// What there is, and what has been.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Strangers for whom nobody has called back yet.
    pub waiting: usize,
    pub pairs: usize,
    /// Bytes passed on since the start.
    pub bytes: u64,
}

/// The connections that a head passes on. See the module's documentation.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    limits: Limits,
    state: Mutex<State>,
    /// Ends the thread's wait.
    kick: PrivateFd,
    bytes: AtomicU64,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, Stranger, RandomState>,
    /// When each ticket ends, in order; entries of those that were taken back are skipped.
    deadlines: VecDeque<(Instant, u64)>,
    /// What the thread is to do.
    orders: Vec<Order>,
    /// Joined, and not closed yet.
    pairs: usize,
    closing: bool,
}

enum Order {
    Join(Stranger, Called),
    Refuse(Stranger, HandshakeError),
}

impl Relay {
    /// Its thread starts with the first stranger.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let kick = PrivateFd::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Shared { limits, state: Mutex::default(), kick, bytes: AtomicU64::new(0) };
        Ok(Self { shared: Arc::new(shared), thread: Mutex::default() })
    }

    /// Keeps a stranger until it is called back for, and gives its ticket. Without one it was refused, because there are
    /// too many, or the system has no thread left for this.
    pub fn hold(&self, stranger: Stranger) -> Option<u64> {
        if self.start().is_err() {
            return None; // the connector sees its connection close without a word, and tries again
        }
        let ticket = random_id().ok()?;
        let mut state = self.shared.state.lock();
        if state.closing {
            return None;
        }
        if state.waiting.len() + state.pairs >= self.shared.limits.pairs {
            state.orders.push(Order::Refuse(stranger, HandshakeError::RelayFull));
            drop(state);
            self.shared.kick();
            return None;
        }
        let is_first = state.waiting.is_empty();
        state.waiting.insert(ticket, stranger);
        state.deadlines.push_back((Instant::now() + self.shared.limits.call_back, ticket));
        drop(state);
        if is_first {
            self.shared.kick(); // the thread may be asleep without a deadline
        }
        Some(ticket)
    }

    /// A node has called back: from now on its connection is the stranger's. Closed if there is no such ticket any more.
    pub fn join(&self, ticket: u64, called: Called) {
        let mut state = self.shared.state.lock();
        let Some(stranger) = state.waiting.remove(&ticket) else {
            return;
        };
        state.pairs += 1;
        state.orders.push(Order::Join(stranger, called));
        drop(state);
        self.shared.kick();
    }

    /// Nobody will call back for this stranger, for this reason, which it is told.
    pub fn refuse(&self, ticket: u64, why: HandshakeError) {
        let mut state = self.shared.state.lock();
        if let Some(stranger) = state.waiting.remove(&ticket) {
            state.orders.push(Order::Refuse(stranger, why));
            drop(state);
            self.shared.kick();
        }
    }

    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let state = self.shared.state.lock();
        let bytes = self.shared.bytes.load(Ordering::Relaxed);
        Statistics { waiting: state.waiting.len(), pairs: state.pairs, bytes }
    }

    /// Closes all connections and ends the thread. Later strangers are closed at once. May be repeated.
    pub fn shutdown(&self) {
        {
            let mut state = self.shared.state.lock();
            state.closing = true;
            state.waiting.clear();
            state.orders.clear();
        }
        self.shared.kick();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }

    fn start(&self) -> io::Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_none() && !self.shared.state.lock().closing {
            let pairs = Pairs::new(Arc::clone(&self.shared))?;
            *thread = Some(spawn_without_signals("skate-relay", move || pairs.run())?);
        }
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    fn kick(&self) {
        // The counter would overflow after 2^64 kicks: the thread is awake already.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }
}

impl State {
    /// Turns tickets whose time is over into refusals; the next one's end, if there is one.
    fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some(&(at, ticket)) = self.deadlines.front() {
            if at > now && self.waiting.contains_key(&ticket) {
                return Some(at);
            }
            self.deadlines.pop_front();
            if let Some(stranger) = self.waiting.remove(&ticket) {
                self.orders.push(Order::Refuse(stranger, HandshakeError::NotCalledBack));
            }
        }
        None
    }
}

/// What a refused stranger is told.
fn refusal(why: &HandshakeError) -> Vec<u8> {
    why.refusal().map_or_else(Vec::new, |bytes| bytes.to_vec())
}

const _: () = assert!(PREFACE_LEN <= pair::BUFFER_BYTES, "a preface is passed on at once");
