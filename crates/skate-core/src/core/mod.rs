//! A driver's or worker's membership in a cluster: joins the machines to the transport and the store.
//!
//! It decides nothing. One mutex guards the machines; effects are performed before it is released, so
//! what is sent to a process leaves in the order in which the machines decided it. The mutex is held
//! for microseconds and never while taking the interpreter lock; user threads and the I/O thread share
//! it. Nothing here knows Python.

mod calls;
mod copies;
mod executing;
mod history;
mod incoming;
mod logs;
mod looking;
mod objects;
mod requests;
mod spilling;
mod waiting;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::event::EventfdFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use skate_proto::executor::Executor;
use skate_proto::handshake::Role;
use skate_proto::ids::{ActorId, NodeKey, ObjectId, ProcId, SegmentId};
use skate_proto::msg::Msg;
use skate_proto::objects::WaiterId;
use skate_proto::owner::{Effect, Out, Owner, ToNode};
use skate_proto::payload::Value;

use crate::node_wire::{self, FromNode};
use crate::store::Store;
use crate::transport::fork::PrivateFd;
use crate::transport::{Address, Config, DiscoverError, SendMode, StartError, Transport};
use history::History;
use incoming::Shell;
use requests::Answer;
use waiting::Watch;

pub use logs::Log;
pub use objects::{Fetched, Got};
pub use waiting::Completions;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// Values up to this many serialised bytes live in their owner and travel in messages.
pub const INLINE_BYTES_MAX: usize = 100 * 1024;
/// Inline values of one answer together; those beyond go to shared memory like large ones, so that a message
/// stays a message.
pub const INLINE_ANSWER_BYTES_MAX: usize = 8 << 20;
const TIMER_TOKEN: u64 = u64::MAX;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Discover(#[from] DiscoverError),
    #[error("the cluster is gone: {0}")]
    Closed(String),
    #[error("timed out")]
    TimedOut,
    #[error("interrupted")]
    Interrupted,
    #[error("{0}")]
    StoreFull(String),
    #[error("{0}")]
    DiskFull(String),
    /// The node had no room for a copy of this object, and wants what was gathered with it let go, so that others can
    /// go on: [`Core::await_turn`] then, before all are asked for again.
    #[error("others need the room in the object store first")]
    NotYourTurn(ObjectId),
    #[error("{0}")]
    Store(String),
    /// The node does not have the segment any more.
    #[error("{0}")]
    SegmentGone(String),
    #[error("{0} calls of this process to the actor are unfinished already")]
    TooManyPendingCalls(u32),
}

struct State {
    owner: Owner,
    executor: Executor,
    out: Out,
    watches: Map<WaiterId, Watch>,
    next_watch: u64,
    answers: Map<u64, Answer>,
    /// Objects that get their value when the node has answered, by the question's number.
    promises: Map<u64, (ObjectId, Value)>,
    next_corr: u64,
    loopback: VecDeque<Msg>,
    /// What the node said about processes whose last words are still being read.
    deferred: Map<ProcId, Vec<FromNode>>,
    waiting_adoptions: Vec<FromNode>,
    /// Segments of dead lessees in which owned values lie, and how many: their node frees their blocks.
    adopted: Map<(NodeKey, SegmentId), usize>,
    /// Copies of values that lie on other nodes, by object.
    copies: copies::Copies,
    /// Owners on other nodes for whom this process has allocated values.
    served: BTreeMap<ProcId, NodeKey>,
    /// Threads that wait for room in the store.
    allocating: u32,
    /// The actor that this process is, and which of its lives.
    actor: Option<(ActorId, u32)>,
    closed: Option<String>,
    timer_armed: bool,
    task_event_set: bool,
    buffer: Vec<u8>,
    history: History,
}

pub struct Core {
    me: ProcId,
    node: ProcId,
    role: Role,
    start: Instant,
    transport: OnceLock<Arc<Transport>>,
    /// This core, for threads that it starts.
    this: OnceLock<Weak<Self>>,
    store: Store,
    state: Mutex<State>,
    /// Taken under `state` as well as alone: nothing else may be locked while it is held.
    logs: Mutex<VecDeque<Log>>,
    logs_changed: Condvar,
    logs_dropped: AtomicU64,
    /// Closed with the core: references that a program keeps must keep no descriptor.
    descriptors: Mutex<Option<Descriptors>>,
    main_thread: AtomicU64,
    /// Whether a handler of the user's wants the wait to end; set once, before the first wait.
    signals: OnceLock<fn() -> bool>,
    /// A signal was sent to the main thread; see `interrupt`.
    interrupted: AtomicBool,
    closing: AtomicBool,
    /// Set once, with `State::closed`.
    ended: AtomicBool,
}

struct Descriptors {
    timer: PrivateFd,
    /// Readable while an event loop should poll for work.
    task_event: PrivateFd,
}

impl Core {
    pub fn start(
        address: Address,
        session: [u8; 16],
        token: [u8; 32],
        node: ProcId,
        me: ProcId,
        role: Role,
        python_minor: u8,
    ) -> Result<Arc<Self>, CoreError> {
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
                .map_err(|e| CoreError::Store(format!("no timer: {e}")))?;
        let task_event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| CoreError::Store(format!("no event descriptor: {e}")))?;
        let state = State {
            owner: Owner::new(me, NodeKey(node.0)),
            executor: Executor::default(),
            out: Out::default(),
            watches: Map::default(),
            next_watch: 0,
            answers: Map::default(),
            promises: Map::default(),
            next_corr: 0,
            loopback: VecDeque::new(),
            deferred: Map::default(),
            waiting_adoptions: Vec::new(),
            adopted: Map::default(),
            copies: copies::Copies::default(),
            served: BTreeMap::new(),
            allocating: 0,
            actor: None,
            closed: None,
            timer_armed: false,
            task_event_set: false,
            buffer: Vec::new(),
            history: History::new(),
        };
        let core = Arc::new(Self {
            me,
            node,
            role,
            start: Instant::now(),
            transport: OnceLock::new(),
            this: OnceLock::new(),
            store: Store::new(me, NodeKey(node.0)),
            state: Mutex::new(state),
            logs: Mutex::new(VecDeque::new()),
            logs_changed: Condvar::new(),
            logs_dropped: AtomicU64::new(0),
            descriptors: Mutex::new(Some(Descriptors {
                timer: PrivateFd::new(timer),
                task_event: PrivateFd::new(task_event),
            })),
            main_thread: AtomicU64::new(0),
            signals: OnceLock::new(),
            interrupted: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let _ = core.this.set(Arc::downgrade(&core));
        let config = Config {
            me,
            role,
            python_minor,
            session,
            token,
            node,
            node_address: address,
            tls: false,
            listeners: Vec::new(),
            io_thread: true,
        };
        let shell = Arc::new(Shell(Arc::downgrade(&core)));
        let transport = Transport::start(config, shell)?;
        if let Some(descriptors) = &*core.descriptors.lock() {
            transport
                .register_fd(TIMER_TOKEN, descriptors.timer.as_fd())
                .map_err(|e| CoreError::Store(format!("no timer: {e}")))?;
        }
        Ok(core)
    }

    fn transport(&self) -> &Arc<Transport> {
        self.transport.get().expect("set before the core is handed out")
    }

    pub fn me(&self) -> ProcId {
        self.me
    }

    pub fn node(&self) -> ProcId {
        self.node
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Leaves the cluster; everything that waits ends with `CoreError::Closed`.
    pub fn close(&self) {
        if self.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.flush_history();
        self.fail("ray.shutdown() was called");
        if let Some(transport) = self.transport.get() {
            transport.shutdown();
        }
        self.descriptors.lock().take();
        self.store.unmap_idle();
    }

    /// Whether this process is a forked child of the one that joined: then nothing here is its own, and a
    /// lock may have been copied while a thread that is not here held it.
    pub fn is_forked(&self) -> bool {
        self.transport.get().is_some_and(|transport| transport.is_foreign_process())
    }

    pub fn is_open(&self) -> bool {
        self.state.lock().closed.is_none()
    }

    fn fail(&self, why: &str) {
        let mut state = self.state.lock();
        if state.closed.is_none() {
            state.closed = Some(why.to_owned());
        }
        #[expect(clippy::iter_over_hash_type, reason = "whoever waits is woken, in whatever order")]
        for watch in state.watches.values() {
            match watch {
                Watch::Thread(waiter) => waiter.end(),
                Watch::Event(completions, token) => completions.add(*token),
            }
        }
        self.raise_task_event(&mut state);
        drop(state);
        self.ended.store(true, Ordering::Release);
        // Under the lock, so that no thread is between its look at the flag and its sleep.
        let logs = self.logs.lock();
        self.logs_changed.notify_all();
        drop(logs);
        if let Some(transport) = self.transport.get() {
            transport.wake();
        }
    }

    /// Runs one step of the machines and performs its effects.
    fn step<R>(&self, run: impl FnOnce(&mut State, u64) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.now_ns();
        let result = run(&mut state, now);
        self.perform(&mut state, now);
        result
    }

    fn perform(&self, state: &mut MutexGuard<'_, State>, now: u64) {
        let mut woken = false;
        loop {
            let mut effects = std::mem::take(&mut state.out.effects);
            if effects.is_empty() && state.loopback.is_empty() {
                break;
            }
            for effect in effects.drain(..) {
                match effect {
                    Effect::Send { to, msg, urgent } => self.send_core(state, to, msg, urgent),
                    Effect::Node(msg) => self.send_node(state, msg),
                    Effect::Notify { waiter, failed } => woken |= Self::notify(state, waiter, failed),
                    Effect::Free(location) => self.free(state, location),
                    Effect::ReleaseCopies(object) => self.release_copies(state, object),
                    Effect::Unread(error) if self.role == Role::Driver => self.add_log(Log::Unhandled(error)),
                    Effect::Unread(_) => {}
                    Effect::Unrun(unrun) => self.note_unrun(state, &unrun, now),
                }
            }
            // The vector's memory is used again; nothing was added to the new one unless by loopback.
            if state.out.effects.is_empty() {
                state.out.effects = effects;
            }
            if let Some(msg) = state.loopback.pop_front() {
                self.handle_core_message(state, self.me, msg, now);
            }
        }
        if !state.timer_armed
            && let Some(at) = state.owner.poll_timeout().into_iter().chain(state.history.poll_timeout()).min()
        {
            state.timer_armed = true;
            self.arm_timer(at.saturating_sub(now).max(1_000_000));
        }
        if woken {
            self.transport().wake();
        }
    }

    fn arm_timer(&self, after_ns: u64) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: (after_ns / 1_000_000_000) as i64, tv_nsec: (after_ns % 1_000_000_000) as i64 };
        if let Some(descriptors) = &*self.descriptors.lock() {
            let spec = Itimerspec { it_interval: zero, it_value: value };
            let _ = rustix::time::timerfd_settime(&descriptors.timer, TimerfdTimerFlags::empty(), &spec);
        }
    }

    fn send_core(&self, state: &mut State, to: ProcId, msg: Msg, urgent: bool) {
        if to == self.me {
            state.loopback.push_back(msg);
            return;
        }
        if state.owner.objects.is_dead(to) {
            return;
        }
        if let Some(object) = msg.for_owner_of() {
            self.route(object.owner(), object.task.node);
        }
        match &msg {
            Msg::Evict { objects } if !self.is_connected(to) => {
                // It has the reference of somebody else, and perhaps the place, too. Where it lives is not known, so
                // that a question might seem to go to somebody who has ended.
                return state.owner.handle_evicted(to, &[], objects, &mut state.out);
            }
            Msg::Spill { offered } => {
                if let Some(first) = offered.first() {
                    self.route(to, first.from.node);
                }
            }
            _ => {}
        }
        let mut buffer = std::mem::take(&mut state.buffer);
        buffer.clear();
        let buffer = postcard::to_extend(&msg, buffer).expect("plain data always encodes");
        let mode = if urgent { SendMode::Now } else { SendMode::Queue };
        self.transport().send(to, node_wire::CORE, 0, &[&buffer], mode);
        state.buffer = buffer;
    }

    /// Remembers where a process lives, if that is another node: it is connected to there.
    fn route(&self, proc: ProcId, node: NodeKey) {
        if node.0 != self.node.0 {
            self.transport().route(proc, ProcId(node.0));
        }
    }

    fn send_node(&self, state: &State, msg: ToNode) {
        let (kind, body) = match msg {
            ToNode::LeaseDemand { class, count } => {
                let (spec, label) = (state.owner.class_spec(class), state.owner.class_label(class));
                let granted = state.owner.class_granted(class);
                (node_wire::LEASE_DEMAND, node_wire::lease_demand(class.0, count, spec, label, granted))
            }
            ToNode::LeaseReturn { lease, reusable, node } => {
                (node_wire::LEASE_RETURN, node_wire::lease_return(lease, reusable, node))
            }
            ToNode::LeaseKept { lease, node } => (node_wire::LEASE_KEPT, node_wire::lease_kept(lease, node)),
            ToNode::ActorCreate { creation, spec } => {
                (node_wire::ACTOR_CREATE, node_wire::actor_create(&creation, &spec))
            }
            ToNode::ActorSubscribe { actor } => (node_wire::ACTOR_SUBSCRIBE, node_wire::actor(actor)),
            ToNode::ActorRelease { actor } => (node_wire::ACTOR_RELEASE, node_wire::actor(actor)),
            ToNode::ActorKill { actor, no_restart } => {
                (node_wire::ACTOR_KILL, node_wire::actor_kill(actor, no_restart))
            }
            ToNode::Spill { owner, offered } => (node_wire::SPILL, node_wire::spill(owner, &offered)),
            ToNode::PeerLost { proc } => (node_wire::PEER_LOST, node_wire::peer_lost(proc)),
        };
        self.tell_node(kind, 0, &body);
    }

    fn tell_node(&self, kind: u8, corr: u64, body: &[u8]) {
        if let Some(transport) = self.transport.get() {
            transport.send(self.node, kind, corr, &[body], SendMode::Now);
        }
    }

    pub fn describe_objects(&self) -> Vec<String> {
        self.state.lock().owner.objects.describe()
    }

    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        let state = self.state.lock();
        let mut all: Vec<_> = state.owner.statistics().to_vec();
        all.push(("watches", state.watches.len() as u64));
        all.push(("answers", (state.answers.len() + state.promises.len()) as u64));
        all.push(("deferred", (state.deferred.len() + state.waiting_adoptions.len()) as u64));
        all.push(("copied_objects", state.copies.len() as u64));
        all.push(("spilling", state.owner.spilling() as u64));
        all.push(("adopted_segments", state.adopted.len() as u64));
        let (definitions, functions) = state.executor.known();
        all.push(("known_definitions", definitions as u64));
        all.push(("known_functions", functions as u64));
        let store = self.store.statistics();
        let (routes, nodes) = self.transport.get().map_or((0, 0), |transport| transport.known_routes());
        all.push(("routes", routes as u64));
        all.push(("nodes_known", nodes as u64));
        all.push(("store_segments", store.leased_segments as u64));
        all.push(("store_segment_bytes", store.leased_bytes));
        all.push(("store_used_blocks", store.used_blocks as u64));
        all.push(("store_used_bytes", store.used_bytes));
        all
    }
}
