//! A driver's or worker's membership in a cluster: joins the machines to the transport and the store.
//!
//! It decides nothing. One mutex guards the machines; effects are performed before it is released, so
//! what is sent to a process leaves in the order in which the machines decided it. The mutex is held
//! for microseconds and never while taking the interpreter lock; user threads and the I/O thread share
//! it. Nothing here knows Python.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::event::EventfdFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use skate_proto::actors::{ActorState, Creation};
use skate_proto::executor::{CancelStep, Executor, Work};
use skate_proto::handshake::Role;
use skate_proto::ids::{ActorId, NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use skate_proto::leases::{ClassId, ClassSpec};
use skate_proto::location::Location;
use skate_proto::msg::{CallDef, Msg, Slot};
use skate_proto::objects::WaiterId;
use skate_proto::owner::{Effect, Out, Owner, ToNode};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};
use skate_proto::streams::Next;
use skate_proto::tasks::Refused;

use crate::node_wire::{self, FromNode};
use crate::store::{Block, Mapping, Store};
use crate::transport::{
    Address, CloseReason, Config, Driven, Frame, Handler, PeerInfo, SendMode, StartError, Transport,
};

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// Values up to this many serialised bytes live in their owner and travel in messages.
pub const INLINE_BYTES_MAX: usize = 100 * 1024;
/// A wait shorter than this does not give the worker's CPUs back: telling the node costs as much.
pub const BLOCK_AFTER: Duration = Duration::from_micros(200);
/// How often a wait of the program's main thread looks for signals. One that comes while the thread is
/// busy with messages, or just before it goes to sleep, does not interrupt it.
pub const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(100);
/// How often a value may be gone from where its owner said it was before its reader gives up. Each time takes
/// another loss, or an answer that crossed the report of the last one.
const LOSSES_MAX: u32 = 16;
/// Log lines that the driver has not printed; beyond, the oldest are dropped and counted.
const LOG_LINES_MAX: usize = 10_000;
const TIMER_TOKEN: u64 = u64::MAX;
const NO_DESCRIPTOR: &str =
    "this process has as many descriptors open as it may (ulimit -n), and could not take one for shared memory";

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("the cluster is gone: {0}")]
    Closed(String),
    #[error("timed out")]
    TimedOut,
    #[error("interrupted")]
    Interrupted,
    #[error("{0}")]
    StoreFull(String),
    #[error("{0}")]
    Store(String),
    /// The node does not have the segment any more.
    #[error("{0}")]
    SegmentGone(String),
    #[error("{0} calls of this process to the actor are unfinished already")]
    TooManyPendingCalls(u32),
}

/// A node's answer to a request.
#[derive(Debug)]
enum Answer {
    Waiting,
    Reply {
        ok: bool,
        body: Vec<u8>,
    },
    Segment {
        segment: SegmentId,
        size: u64,
        fd: OwnedFd,
    },
    Denied(String),
    /// This process can open no more descriptors.
    NoDescriptor,
}

/// A thread that waits for a number of events.
#[derive(Debug)]
pub struct Waiter {
    missing: AtomicI64,
}

impl Waiter {
    fn is_done(&self) -> bool {
        self.missing.load(Ordering::Acquire) <= 0
    }
}

/// Finished objects as events on a descriptor, for event loops.
pub struct Completions {
    fd: OwnedFd,
    done: Mutex<Vec<u64>>,
}

impl Completions {
    pub fn new() -> std::io::Result<Arc<Self>> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { fd, done: Mutex::new(Vec::new()) }))
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn add(&self, token: u64) {
        let mut done = self.done.lock();
        done.push(token);
        // One wake-up drains everything: only the first one since the last drain writes.
        if done.len() == 1 {
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        }
    }

    pub fn drain(&self) -> Vec<u64> {
        let mut buffer = [0; 8];
        let mut done = self.done.lock();
        let _ = rustix::io::read(&self.fd, &mut buffer);
        std::mem::take(&mut *done)
    }
}

enum Watch {
    Thread(Arc<Waiter>),
    Event(Arc<Completions>, u64),
}

/// What a driver prints.
#[derive(Debug)]
pub enum Log {
    Lines { name: String, pid: u32, stream: u8, lines: Vec<String> },
    Notice { level: String, text: String },
}

struct State {
    owner: Owner,
    executor: Executor,
    out: Out,
    watches: Map<WaiterId, Watch>,
    next_watch: u64,
    answers: Map<u64, Answer>,
    next_corr: u64,
    loopback: VecDeque<Msg>,
    /// What the node said about processes whose last words are still being read.
    deferred: Map<ProcId, Vec<FromNode>>,
    waiting_adoptions: Vec<FromNode>,
    /// Segments of dead lessees in which owned values lie, and how many: the node frees their blocks.
    adopted: Map<SegmentId, usize>,
    /// The actor that this process is, and which of its lives.
    actor: Option<(ActorId, u32)>,
    closed: Option<String>,
    timer_armed: bool,
    task_event_set: bool,
    buffer: Vec<u8>,
}

pub struct Core {
    me: ProcId,
    node: ProcId,
    role: Role,
    start: Instant,
    transport: OnceLock<Arc<Transport>>,
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
    timer: OwnedFd,
    /// Readable while an event loop should poll for work.
    task_event: OwnedFd,
}

struct Shell(Weak<Core>);

/// A value as a reader gets it.
pub enum Fetched {
    Inline(Payload),
    /// A block, protected by a count on `object` until [`Core::release`].
    Stored {
        object: ObjectId,
        mapping: Arc<Mapping>,
        location: Location,
    },
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
            next_corr: 0,
            loopback: VecDeque::new(),
            deferred: Map::default(),
            waiting_adoptions: Vec::new(),
            adopted: Map::default(),
            actor: None,
            closed: None,
            timer_armed: false,
            task_event_set: false,
            buffer: Vec::new(),
        };
        let core = Arc::new(Self {
            me,
            node,
            role,
            start: Instant::now(),
            transport: OnceLock::new(),
            store: Store::new(me),
            state: Mutex::new(state),
            logs: Mutex::new(VecDeque::new()),
            logs_changed: Condvar::new(),
            logs_dropped: AtomicU64::new(0),
            descriptors: Mutex::new(Some(Descriptors { timer, task_event })),
            main_thread: AtomicU64::new(0),
            signals: OnceLock::new(),
            interrupted: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let config = Config {
            me,
            role,
            python_minor,
            session,
            token,
            node,
            node_address: address,
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
                Watch::Thread(waiter) => waiter.missing.store(0, Ordering::Release),
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
                    Effect::Notify(waiter) => woken |= Self::notify(state, waiter),
                    Effect::Free(location) => self.free(state, location),
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
            && let Some(at) = state.owner.poll_timeout()
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

    fn notify(state: &mut State, waiter: WaiterId) -> bool {
        match state.watches.get(&waiter) {
            Some(Watch::Thread(waiter)) => waiter.missing.fetch_sub(1, Ordering::AcqRel) == 1,
            Some(Watch::Event(completions, token)) => {
                completions.add(*token);
                state.watches.remove(&waiter);
                false
            }
            None => false,
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
        let mut buffer = std::mem::take(&mut state.buffer);
        buffer.clear();
        let buffer = postcard::to_extend(&msg, buffer).expect("plain data always encodes");
        let mode = if urgent { SendMode::Now } else { SendMode::Queue };
        self.transport().send(to, node_wire::CORE, 0, &[&buffer], mode);
        state.buffer = buffer;
    }

    fn send_node(&self, state: &State, msg: ToNode) {
        let (kind, body) = match msg {
            ToNode::LeaseDemand { class, count } => {
                (node_wire::LEASE_DEMAND, node_wire::lease_demand(class.0, count, state.owner.class_spec(class)))
            }
            ToNode::LeaseReturn { lease, reusable } => {
                (node_wire::LEASE_RETURN, node_wire::lease_return(lease, reusable))
            }
            ToNode::ActorCreate { creation, spec } => {
                (node_wire::ACTOR_CREATE, node_wire::actor_create(&creation, &spec))
            }
            ToNode::ActorSubscribe { actor } => (node_wire::ACTOR_SUBSCRIBE, node_wire::actor(actor)),
            ToNode::ActorRelease { actor } => (node_wire::ACTOR_RELEASE, node_wire::actor(actor)),
            ToNode::ActorKill { actor, no_restart } => {
                (node_wire::ACTOR_KILL, node_wire::actor_kill(actor, no_restart))
            }
            ToNode::PeerLost { proc } => (node_wire::PEER_LOST, node_wire::peer_lost(proc)),
        };
        self.tell_node(kind, 0, &body);
    }

    fn tell_node(&self, kind: u8, corr: u64, body: &[u8]) {
        if let Some(transport) = self.transport.get() {
            transport.send(self.node, kind, corr, &[body], SendMode::Now);
        }
    }

    fn free(&self, state: &mut State, location: Location) {
        if location.lessee == self.me {
            // A block of ours that is not allocated would be freed twice: a programmer's error.
            if let Err(error) = self.store.free(location.segment, location.offset) {
                debug_assert!(false, "{error}");
            }
            self.release_segments(&self.store.surplus());
        } else if state.adopted.contains_key(&location.segment) || state.owner.objects.is_dead(location.lessee) {
            if let Some(left) = state.adopted.get_mut(&location.segment) {
                *left -= 1;
                if *left == 0 {
                    state.adopted.remove(&location.segment);
                }
            }
            self.tell_node(node_wire::BLOCKS_FREED, 0, &node_wire::blocks_freed(location.segment, &[location.offset]));
        } else {
            let msg = Msg::FreeBlocks { blocks: vec![(location.segment, location.offset)] };
            let body = postcard::to_stdvec(&msg).expect("plain data always encodes");
            self.transport().send(location.lessee, node_wire::CORE, 0, &[&body], SendMode::Queue);
        }
    }

    // ---- waiting -------------------------------------------------------------------------------

    /// Drives the transport until `done`; in a worker's main thread a long wait gives CPUs back.
    fn wait_for(&self, done: &dyn Fn() -> bool, deadline: Option<Instant>, blocks: bool) -> Result<(), CoreError> {
        if done() {
            return Ok(());
        }
        let main = self.is_main_thread();
        // Workers are told by `interrupted` what a signal was for.
        let look =
            self.signals.get().filter(|_| self.role == Role::Driver && thread_id() == u64::from(std::process::id()));
        let signalled = || main && self.interrupted.load(Ordering::Acquire);
        let transport = self.transport().clone();
        let outcome = |driven: Driven| match driven {
            Driven::Done => Some(Ok(())),
            Driven::Interrupted => Some(Err(CoreError::Interrupted)),
            Driven::Closed => Some(Err(CoreError::Closed("its connection was closed".into()))),
            Driven::TimedOut => None,
        };
        let mut blocked = false;
        let result = loop {
            let soon = Instant::now() + BLOCK_AFTER;
            let wake_at = if blocks && !blocked { Some(soon) } else { look.map(|_| Instant::now() + LOOK_FOR_SIGNALS) };
            let until = [wake_at, deadline].into_iter().flatten().min();
            match outcome(transport.drive(&|| done() || signalled(), until)) {
                Some(Ok(())) if main && self.interrupted.swap(false, Ordering::AcqRel) => {
                    break Err(CoreError::Interrupted);
                }
                Some(result) => break result,
                None if deadline.is_some_and(|d| Instant::now() >= d) => {
                    break if done() { Ok(()) } else { Err(CoreError::TimedOut) };
                }
                None if blocks && !blocked => {
                    blocked = true;
                    self.begin_block();
                }
                None if look.is_some_and(|wants_end| wants_end()) => break Err(CoreError::Interrupted),
                None => {}
            }
        };
        if blocked {
            self.end_block();
        }
        result
    }

    /// Asked from time to time while the program's main thread waits; true ends the wait as interrupted.
    pub fn set_signals(&self, wants_end: fn() -> bool) {
        let _ = self.signals.set(wants_end);
    }

    fn is_main_thread(&self) -> bool {
        self.main_thread.load(Ordering::Relaxed) == thread_id()
    }

    /// Whether a wait of the calling thread stops a task that holds CPUs.
    fn holds_cpus(&self) -> bool {
        self.role == Role::Worker && self.is_main_thread()
    }

    fn begin_block(&self) {
        self.tell_node(node_wire::BLOCKED, 0, &node_wire::empty());
        self.step(|state, _| {
            let State { executor, owner, out, .. } = state;
            let counted = executor.block(out);
            owner.release_all(&counted, out);
        });
    }

    fn end_block(&self) {
        self.step(|state, _| state.executor.unblock(&mut state.out));
        self.tell_node(node_wire::UNBLOCKED, 0, &node_wire::empty());
    }

    /// Waits until `count` of the objects are ready. `TimedOut` after the deadline.
    pub fn wait_ready(&self, ids: &[ObjectId], count: usize, deadline: Option<Instant>) -> Result<(), CoreError> {
        let (waiter, watch) = {
            let mut state = self.state.lock();
            if let Some(why) = &state.closed {
                return Err(CoreError::Closed(why.clone()));
            }
            let ready = ids.iter().filter(|id| state.owner.objects.is_ready(**id)).count();
            if ready >= count {
                return Ok(());
            }
            state.next_watch += 1;
            let watch = WaiterId(state.next_watch);
            let waiter = Arc::new(Waiter { missing: AtomicI64::new((count - ready) as i64) });
            state.watches.insert(watch, Watch::Thread(waiter.clone()));
            let State { owner, out, .. } = &mut *state;
            for &id in ids {
                owner.objects.watch(id, watch, out);
            }
            let now = self.now_ns();
            self.perform(&mut state, now);
            (waiter, watch)
        };
        let result = self.wait_for(&|| waiter.is_done(), deadline, self.holds_cpus());
        let mut state = self.state.lock();
        state.watches.remove(&watch);
        for &id in ids {
            if !state.owner.objects.is_ready(id) {
                state.owner.objects.unwatch(id, watch);
            }
        }
        result?;
        match &state.closed {
            Some(why) => Err(CoreError::Closed(why.clone())),
            None => Ok(()),
        }
    }

    /// Which of the objects are ready.
    pub fn ready(&self, ids: &[ObjectId]) -> Vec<bool> {
        let state = self.state.lock();
        ids.iter().map(|id| state.owner.objects.is_ready(*id)).collect()
    }

    pub fn is_ready(&self, id: ObjectId) -> bool {
        self.state.lock().owner.objects.is_ready(id)
    }

    /// Positions of the first `count` ready objects, ascending.
    pub fn ready_at_most(&self, ids: &[ObjectId], count: usize) -> Vec<usize> {
        let state = self.state.lock();
        ids.iter()
            .enumerate()
            .filter(|(_, id)| state.owner.objects.is_ready(**id))
            .map(|(at, _)| at)
            .take(count)
            .collect()
    }

    /// The value of a ready object, unless that takes asking the node.
    pub fn fetch_mapped(&self, id: ObjectId) -> Option<Fetched> {
        let mut state = self.state.lock();
        match state.owner.objects.value(id)? {
            Value::Inline(payload) => Some(Fetched::Inline(payload.clone())),
            Value::Stored { location, .. } => {
                let location = *location;
                let mapping = self.store.mapping(location.segment)?;
                state.owner.objects.retain(id);
                Some(Fetched::Stored { object: id, mapping, location })
            }
        }
    }

    /// Counts a handle of an actor; one that this process neither owns nor was handed is announced to
    /// its owner.
    pub fn hold_handle(&self, handle: ObjectId) {
        self.step(|state, _| {
            let State { owner, out, .. } = state;
            owner.hold_handle(handle, out);
        });
    }

    /// Waits for the values of objects. Those that were lost with their segment are waited for anew.
    pub fn get(&self, ids: &[ObjectId], deadline: Option<Instant>) -> Result<Vec<Fetched>, CoreError> {
        let mut losses = 0;
        loop {
            self.wait_ready(ids, ids.len(), deadline)?;
            match self.fetch(ids) {
                Err(CoreError::SegmentGone(_)) if losses < LOSSES_MAX => losses += 1,
                other => return other,
            }
        }
    }

    /// A stored value whose location came along with the caller's work.
    pub fn get_at(&self, object: ObjectId, location: Location) -> Result<Fetched, CoreError> {
        match self.map(location.segment) {
            Ok(mapping) => {
                self.retain(object);
                Ok(Fetched::Stored { object, mapping, location })
            }
            Err(CoreError::SegmentGone(_)) => {
                self.report_missing(object, location.segment);
                let mut fetched = self.get(&[object], None)?;
                fetched.pop().ok_or_else(|| CoreError::Store("no value".into()))
            }
            Err(error) => Err(error),
        }
    }

    fn report_missing(&self, object: ObjectId, segment: SegmentId) {
        self.step(|state, now| state.owner.report_missing(object, segment, now, &mut state.out));
    }

    /// The values of ready objects. Stored ones are mapped and hold a count on their object. What is lost is
    /// reported before the error is returned.
    pub fn fetch(&self, ids: &[ObjectId]) -> Result<Vec<Fetched>, CoreError> {
        let mut fetched = Vec::with_capacity(ids.len());
        let mut unmapped = Vec::new();
        let mut failed = None;
        {
            let mut state = self.state.lock();
            for (at, &id) in ids.iter().enumerate() {
                match state.owner.objects.value(id) {
                    Some(Value::Inline(payload)) => fetched.push(Fetched::Inline(payload.clone())),
                    Some(Value::Stored { location, .. }) => {
                        let location = *location;
                        state.owner.objects.retain(id);
                        match self.store.mapping(location.segment) {
                            Some(mapping) => fetched.push(Fetched::Stored { object: id, mapping, location }),
                            None => {
                                unmapped.push((at, id, location));
                                fetched.push(Fetched::Inline(Payload::plain(&[])));
                            }
                        }
                    }
                    None => {
                        // Lost, and reported by another thread, since it was waited for.
                        let lost = || CoreError::SegmentGone(format!("object {id} was lost"));
                        failed = Some(state.closed.clone().map_or_else(lost, CoreError::Closed));
                        break;
                    }
                }
            }
        }
        for (at, object, location) in unmapped {
            match self.map(location.segment) {
                Ok(mapping) => fetched[at] = Fetched::Stored { object, mapping, location },
                Err(error) => {
                    if matches!(error, CoreError::SegmentGone(_)) {
                        self.report_missing(object, location.segment);
                    }
                    self.release(object);
                    failed = Some(error);
                }
            }
        }
        match failed {
            None => Ok(fetched),
            Some(error) => {
                for value in fetched {
                    if let Fetched::Stored { object, .. } = value {
                        self.release(object);
                    }
                }
                Err(error)
            }
        }
    }

    // ---- references ----------------------------------------------------------------------------

    pub fn retain(&self, id: ObjectId) {
        self.state.lock().owner.objects.retain(id);
    }

    pub fn release(&self, id: ObjectId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| state.owner.release(id, &mut state.out));
    }

    pub fn release_all(&self, ids: &[ObjectId]) {
        if !ids.is_empty() && !self.is_forked() {
            self.step(|state, _| state.owner.release_all(ids, &mut state.out));
        }
    }

    pub fn put(&self, value: Value) -> ObjectId {
        self.step(|state, _| state.owner.put(value))
    }

    pub fn watch(&self, id: ObjectId, completions: &Arc<Completions>, token: u64) {
        self.step(|state, _| {
            state.next_watch += 1;
            let watch = WaiterId(state.next_watch);
            if state.closed.is_some() || state.owner.objects.watch(id, watch, &mut state.out) {
                completions.add(token);
            } else {
                state.watches.insert(watch, Watch::Event(completions.clone(), token));
            }
        });
    }

    /// Forgets what `completions` waits for.
    pub fn unwatch_all(&self, completions: &Arc<Completions>) {
        let mut state = self.state.lock();
        state.watches.retain(|_, watch| !matches!(watch, Watch::Event(c, _) if Arc::ptr_eq(c, completions)));
    }

    // ---- calls ---------------------------------------------------------------------------------

    /// Registers a use of a remote function, until [`Self::undefine`].
    pub fn define(&self, call: CallDef, blob: Blob, class: Option<ClassSpec>, max_retries: i32) -> u32 {
        let mut state = self.state.lock();
        let class = class.map(|spec| state.owner.class(spec));
        state.owner.define(call, blob, class, max_retries)
    }

    pub fn undefine(&self, def: u32) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| state.owner.undefine(def, &mut state.out));
    }

    pub fn submit(
        &self,
        def: u32,
        args: Payload,
        deps: Vec<(Slot, ObjectId)>,
        handle: Option<ObjectId>,
        parent: Option<TaskId>,
    ) -> Result<TaskId, CoreError> {
        self.step(|state, now| {
            if let Some(why) = &state.closed {
                return Err(CoreError::Closed(why.clone()));
            }
            state.owner.submit(def, args, deps, handle, parent, now, &mut state.out).map_err(|refused| match refused {
                Refused::TooManyPendingCalls(limit) => CoreError::TooManyPendingCalls(limit),
            })
        })
    }

    /// False: an actor's call cannot be forced, and nothing was done.
    pub fn cancel(&self, id: ObjectId, force: bool, recursive: bool) -> bool {
        self.step(|state, now| {
            if force && state.owner.is_actor_call(id) {
                return false;
            }
            state.owner.cancel(id, force, recursive, now, &mut state.out);
            true
        })
    }

    pub fn why(&self, id: ObjectId) -> (String, Option<ObjectId>, Option<ClassId>, Option<ActorId>) {
        let now = self.now_ns();
        self.state.lock().owner.why(id, now)
    }

    // ---- streams -------------------------------------------------------------------------------

    /// The next item, its local count being the caller's; `None` at the end.
    pub fn stream_next(&self, task: TaskId, deadline: Option<Instant>) -> Result<Option<ObjectId>, CoreError> {
        loop {
            let (waiter, watch) = {
                let mut state = self.state.lock();
                let State { owner, out, .. } = &mut *state;
                let next = owner.stream_next(task, out);
                let now = self.now_ns();
                self.perform(&mut state, now);
                match next {
                    Next::Item(id) => return Ok(Some(id)),
                    Next::End => return Ok(None),
                    Next::NotYet => {}
                }
                if let Some(why) = &state.closed {
                    return Err(CoreError::Closed(why.clone()));
                }
                state.next_watch += 1;
                let watch = WaiterId(state.next_watch);
                let waiter = Arc::new(Waiter { missing: AtomicI64::new(1) });
                state.watches.insert(watch, Watch::Thread(waiter.clone()));
                state.owner.stream_watch(task, watch);
                (waiter, watch)
            };
            let result = self.wait_for(&|| waiter.is_done(), deadline, self.holds_cpus());
            let mut state = self.state.lock();
            state.watches.remove(&watch);
            state.owner.stream_unwatch(task, watch);
            drop(state);
            result?;
        }
    }

    pub fn stream_watch(&self, task: TaskId, completions: &Arc<Completions>, token: u64) {
        let mut state = self.state.lock();
        state.next_watch += 1;
        let watch = WaiterId(state.next_watch);
        if state.closed.is_some() || state.owner.stream_watch(task, watch) {
            completions.add(token);
        } else {
            state.watches.insert(watch, Watch::Event(completions.clone(), token));
        }
    }

    pub fn stream_ready(&self, task: TaskId) -> bool {
        self.state.lock().owner.stream_ready(task)
    }

    pub fn stream_dropped(&self, task: TaskId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, now| state.owner.stream_dropped(task, now, &mut state.out));
    }

    // ---- actors --------------------------------------------------------------------------------

    pub fn next_actor_id(&self) -> (ActorId, ObjectId) {
        self.state.lock().owner.next_actor_id()
    }

    pub fn create_actor(&self, creation: Creation, args: Payload, deps: Vec<(Slot, ObjectId)>) {
        self.step(|state, now| state.owner.create_actor(creation, args, deps, now, &mut state.out));
    }

    pub fn limit_pending_calls(&self, actor: ActorId, limit: i32) {
        self.state.lock().owner.limit_pending_calls(actor, limit);
    }

    pub fn actor_state(&self, actor: ActorId) -> Option<ActorState> {
        self.state.lock().owner.actor_state(actor).cloned()
    }

    pub fn kill_actor(&self, actor: ActorId, no_restart: bool) {
        self.step(|state, _| state.owner.kill_actor(actor, no_restart, &mut state.out));
    }

    /// `__init__` of the actor that this process is has returned.
    pub fn actor_ready(&self) {
        if let Some((actor, life)) = self.own_actor() {
            self.tell_node(node_wire::ACTOR_READY, 0, &node_wire::actor_ready(actor, life));
        }
    }

    pub fn actor_failed(&self, error: &[u8]) {
        if let Some((actor, life)) = self.own_actor() {
            self.tell_node(node_wire::ACTOR_FAILED, 0, &node_wire::actor_failed(actor, life, error));
        }
    }

    /// The end of this process, soon to come, is what the actor wants.
    pub fn actor_exit(&self, reason: &str) {
        {
            let mut state = self.state.lock();
            state.executor.exiting = true;
            self.raise_task_event(&mut state);
        }
        self.transport().wake();
        if let Some((actor, life)) = self.own_actor() {
            self.tell_node(node_wire::ACTOR_EXIT, 0, &node_wire::actor_exit(actor, life, reason));
        }
    }

    /// Gives back what was not started, before this worker ends by its own will.
    pub fn leave(&self, answered: bool) {
        self.step(|state, _| {
            let State { executor, owner, out, .. } = state;
            let counted = executor.leave(answered, out);
            owner.release_all(&counted, out);
        });
    }

    fn own_actor(&self) -> Option<(ActorId, u32)> {
        self.state.lock().actor
    }

    // ---- the node ------------------------------------------------------------------------------

    /// Asks the node and waits for its answer.
    pub fn request(&self, op: &str, args: &[u8], deadline: Option<Instant>) -> Result<(bool, Vec<u8>), CoreError> {
        match self.ask(node_wire::REQUEST, &node_wire::request(op, args), deadline)? {
            Answer::Reply { ok, body } => Ok((ok, body)),
            _ => Err(CoreError::Store("the node answered a request with something else".into())),
        }
    }

    fn ask(&self, kind: u8, body: &[u8], deadline: Option<Instant>) -> Result<Answer, CoreError> {
        let (corr, waiter) = {
            let mut state = self.state.lock();
            if let Some(why) = &state.closed {
                return Err(CoreError::Closed(why.clone()));
            }
            state.next_corr += 1;
            let corr = state.next_corr;
            state.answers.insert(corr, Answer::Waiting);
            let waiter = Arc::new(Waiter { missing: AtomicI64::new(1) });
            state.watches.insert(answer_watch(corr), Watch::Thread(waiter.clone()));
            (corr, waiter)
        };
        self.tell_node(kind, corr, body);
        let result = loop {
            // An answer of the node is near; a signal is looked at afterwards.
            match self.wait_for(&|| waiter.is_done(), deadline, false) {
                Err(CoreError::Interrupted) => {}
                other => break other,
            }
        };
        let mut state = self.state.lock();
        state.watches.remove(&answer_watch(corr));
        let answer = state.answers.remove(&corr);
        result?;
        match answer {
            Some(Answer::Waiting) | None => {
                Err(CoreError::Closed(state.closed.clone().unwrap_or_else(|| "no answer".into())))
            }
            Some(answer) => Ok(answer),
        }
    }

    // ---- shared memory -------------------------------------------------------------------------

    /// A block of `len` bytes in a segment of this process, asking the node for one if needed.
    pub fn alloc(&self, len: u64) -> Result<Block, CoreError> {
        loop {
            if let Some(block) = self.store.alloc(len) {
                return Ok(block);
            }
            let min_bytes = self.store.request_bytes(len);
            match self.ask(node_wire::SEGMENT_REQUEST, &node_wire::segment_request(min_bytes), None)? {
                Answer::Segment { segment, size, fd } => {
                    self.store.add_segment(segment, size, &fd).map_err(|e| CoreError::Store(e.to_string()))?;
                }
                Answer::Denied(message) => return Err(CoreError::StoreFull(message)),
                Answer::NoDescriptor => return Err(CoreError::Store(NO_DESCRIPTOR.into())),
                _ => {
                    return Err(CoreError::Store("the node answered a segment request with something else".into()));
                }
            }
        }
    }

    fn release_segments(&self, segments: &[SegmentId]) {
        for segment in segments {
            self.tell_node(node_wire::SEGMENT_RELEASE, 0, &node_wire::segment(*segment));
        }
    }

    pub fn map(&self, segment: SegmentId) -> Result<Arc<Mapping>, CoreError> {
        if let Some(mapping) = self.store.mapping(segment) {
            return Ok(mapping);
        }
        match self.ask(node_wire::SEGMENT_MAP, &node_wire::segment(segment), None)? {
            Answer::Segment { segment, size, fd } => {
                self.store.map_readonly(segment, size, &fd).map_err(|e| CoreError::Store(e.to_string()))
            }
            Answer::Denied(message) => Err(CoreError::SegmentGone(message)),
            Answer::NoDescriptor => Err(CoreError::Store(NO_DESCRIPTOR.into())),
            _ => Err(CoreError::Store("the node answered a map request with something else".into())),
        }
    }

    // ---- executing -----------------------------------------------------------------------------

    /// This thread is the one whose waits give CPUs back and whom cancellation interrupts.
    pub fn set_main_thread(&self) {
        self.main_thread.store(thread_id(), Ordering::Relaxed);
    }

    /// The next piece of work for a thread of `group`; `None`: leave.
    pub fn next_work(&self, group: &str) -> Result<Option<Work>, CoreError> {
        loop {
            {
                let mut state = self.state.lock();
                if state.closed.is_some() {
                    return Ok(None);
                }
                if let Some(work) = state.executor.take(group) {
                    return Ok(Some(work));
                }
                if state.executor.exiting {
                    return Ok(None);
                }
            }
            let done = || {
                let state = self.state.lock();
                state.executor.has_work(group) || state.executor.exiting || state.closed.is_some()
            };
            match self.wait_for(&done, None, false) {
                Ok(()) | Err(CoreError::Closed(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Work of any group, for an event loop.
    pub fn poll_work(&self) -> Option<Work> {
        let mut state = self.state.lock();
        let work = state.executor.take_any();
        if work.is_none() && state.task_event_set && state.closed.is_none() && !state.executor.exiting {
            if let Some(descriptors) = &*self.descriptors.lock() {
                let _ = rustix::io::read(&descriptors.task_event, &mut [0; 8]);
            }
            state.task_event_set = false;
        }
        work
    }

    pub fn task_event_fd(&self) -> i32 {
        self.descriptors.lock().as_ref().map_or(-1, |descriptors| descriptors.task_event.as_raw_fd())
    }

    pub fn tasks_over(&self) -> bool {
        let state = self.state.lock();
        state.executor.exiting || state.closed.is_some()
    }

    fn raise_task_event(&self, state: &mut State) {
        if !state.task_event_set {
            state.task_event_set = true;
            if let Some(descriptors) = &*self.descriptors.lock() {
                let _ = rustix::io::write(&descriptors.task_event, &1_u64.to_ne_bytes());
            }
        }
    }

    /// Sends the results of a piece of work and drops its counts.
    pub fn answer(&self, work: &Work, results: Vec<Value>, retryable: bool, run_ns: u64, items: u32) {
        self.step(|state, _| {
            let State { owner, executor, out, .. } = state;
            for value in &results {
                owner.objects.hand_over(value.refs(), work.owner, out);
            }
            executor.answer(work.owner, work.task, results, retryable, run_ns, items, out);
        });
    }

    /// Sends one item of a stream.
    pub fn send_item(&self, work: &Work, index: u32, value: Value) {
        self.step(|state, _| {
            let State { owner, out, .. } = state;
            owner.objects.hand_over(value.refs(), work.owner, out);
            out.effects.push(Effect::Send {
                to: work.owner,
                msg: Msg::Item { task: work.task, index, value },
                urgent: true,
            });
        });
    }

    /// Waits until the consumer has taken all but `limit` of `sent` items, or goes away.
    pub fn wait_items_taken(&self, task: TaskId, sent: u32, limit: u32) -> Result<(), CoreError> {
        let done = || {
            let state = self.state.lock();
            state.closed.is_some()
                || state.executor.is_cancelled(task)
                || state.executor.items_taken(task).is_none_or(|taken| sent < taken + limit)
        };
        self.wait_for(&done, None, self.holds_cpus())
    }

    /// The counts of a piece of work are not needed any more.
    pub fn forget_work(&self, work: &Work) {
        let counted = Executor::counted(&work.args, &work.deps);
        self.release_all(&counted);
    }

    /// A task that only the actor's main loop ends, such as its creation.
    pub fn work_left(&self, task: TaskId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| state.executor.left(task));
    }

    pub fn is_cancelled(&self, task: TaskId) -> bool {
        self.state.lock().executor.is_cancelled(task)
    }

    // ---- driver's logs -------------------------------------------------------------------------

    pub fn next_log(&self) -> Option<Log> {
        let mut logs = self.logs.lock();
        loop {
            let dropped = self.logs_dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                let text = format!("{dropped} batches of worker output were dropped: the driver printed too slowly.");
                return Some(Log::Notice { level: "warning".into(), text });
            }
            if let Some(log) = logs.pop_front() {
                return Some(log);
            }
            if self.ended.load(Ordering::Acquire) {
                return None;
            }
            self.logs_changed.wait(&mut logs);
        }
    }

    fn add_log(&self, log: Log) {
        let mut logs = self.logs.lock();
        if logs.len() >= LOG_LINES_MAX {
            logs.pop_front();
            self.logs_dropped.fetch_add(1, Ordering::Relaxed);
        }
        logs.push_back(log);
        self.logs_changed.notify_one();
    }

    pub fn describe_objects(&self) -> Vec<String> {
        self.state.lock().owner.objects.describe()
    }

    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        let state = self.state.lock();
        let mut all: Vec<_> = state.owner.statistics().to_vec();
        all.push(("watches", state.watches.len() as u64));
        all.push(("answers", state.answers.len() as u64));
        all.push(("deferred", (state.deferred.len() + state.waiting_adoptions.len()) as u64));
        all.push(("adopted_segments", state.adopted.len() as u64));
        let (definitions, functions) = state.executor.known();
        all.push(("known_definitions", definitions as u64));
        all.push(("known_functions", functions as u64));
        let store = self.store.statistics();
        all.push(("store_segments", store.leased_segments as u64));
        all.push(("store_segment_bytes", store.leased_bytes));
        all.push(("store_used_blocks", store.used_blocks as u64));
        all.push(("store_used_bytes", store.used_bytes));
        all
    }

    // ---- incoming ------------------------------------------------------------------------------

    fn handle_core_message(&self, state: &mut State, from: ProcId, msg: Msg, now: u64) {
        let State { owner, executor, out, .. } = state;
        match msg {
            // Of an owner whose end is known nothing more is learned: it would never be forgotten.
            Msg::Define { id, def, blob } if !owner.objects.is_dead(from) => {
                executor.handle_define(from, id, def, blob)
            }
            Msg::Define { .. } => {}
            Msg::Forget { ids } => executor.handle_forget(from, &ids),
            Msg::Push(push) => {
                owner.objects.arrive(&Executor::counted(&push.args, &push.deps));
                let counted = Executor::counted(&push.args, &push.deps);
                match executor.handle_push(from, push, out) {
                    Some(_) => self.work_arrived(state),
                    None => owner.release_all(&counted, out),
                }
            }
            Msg::Steal { max } => {
                let counted = executor.handle_steal(from, max, out);
                owner.release_all(&counted, out);
            }
            Msg::Cancel { task, recursive } => {
                let (step, counted) = executor.handle_cancel(task, out);
                owner.release_all(&counted, out);
                if recursive {
                    owner.cancel_children(task, now, out);
                }
                if step == CancelStep::Interrupt {
                    self.interrupt();
                }
            }
            Msg::ItemsTaken { task, taken } => {
                executor.handle_items_taken(task, taken);
                self.transport().wake();
            }
            Msg::FreeBlocks { blocks } => {
                for (segment, offset) in blocks {
                    // A peer's word: what is not a block of ours is not freed.
                    let _ = self.store.free(segment, offset);
                }
                self.release_segments(&self.store.surplus());
            }
            other => owner.handle_message(from, other, now, out),
        }
    }

    fn work_arrived(&self, state: &mut State) {
        if state.executor.is_async {
            self.raise_task_event(state);
        }
        self.transport().wake();
    }

    /// Interrupts what the main thread runs; its signal handler asks what for.
    fn interrupt(&self) {
        let thread = self.main_thread.load(Ordering::Relaxed);
        if thread != 0 {
            crate::sys::interrupt_thread(thread);
            // A signal that arrives between Python's last look and the wait does not end the wait; the
            // flag does. It is raised after the signal, so that whoever sees it finds the signal too.
            self.interrupted.store(true, Ordering::Release);
        }
        self.transport().wake();
    }

    fn handle_node_message(&self, state: &mut State, corr: u64, msg: FromNode, fd: Option<OwnedFd>, now: u64) {
        match msg {
            FromNode::LeaseGranted { class, lease, worker, pid, gpu_ids } => {
                let State { owner, out, .. } = state;
                owner.handle_lease_granted(ClassId(class), lease, worker, pid, gpu_ids, now, out);
            }
            FromNode::LeaseReclaim { lease } => state.owner.handle_lease_reclaim(lease, now, &mut state.out),
            FromNode::WorkerDied { proc, .. } if self.is_connected(proc) => {
                state.deferred.entry(proc).or_default().push(msg)
            }
            FromNode::ActorState { actor, state: ref new } if self.former_life(state, actor, new).is_some() => {
                let proc = self.former_life(state, actor, new).expect("just seen");
                state.deferred.entry(proc).or_default().push(msg);
            }
            FromNode::Deaths(dead) => {
                for (proc, cause) in dead {
                    if !state.owner.objects.is_dead(ProcId(proc)) {
                        let died = FromNode::WorkerDied { proc: ProcId(proc), cause, oom: false };
                        self.handle_node_message(state, 0, died, None, now);
                    }
                }
            }
            FromNode::WorkerDied { proc, cause, oom } => self.process_gone(state, proc, &cause, oom, now),
            FromNode::ActorState { actor, state: actor_state } => {
                let State { owner, out, .. } = state;
                owner.handle_actor_state(actor, actor_state, now, out);
            }
            FromNode::SegmentGranted { segment, size } | FromNode::SegmentMapped { segment, size } => {
                let answer = match fd {
                    Some(fd) => Answer::Segment { segment, size, fd },
                    None => Answer::NoDescriptor,
                };
                self.answered(state, corr, answer);
            }
            FromNode::SegmentDenied { message } => self.answered(state, corr, Answer::Denied(message)),
            FromNode::Reply { ok, body } => self.answered(state, corr, Answer::Reply { ok, body }),
            FromNode::SegmentTrim { bytes } => self.release_segments(&self.store.take_empty(bytes)),
            // Results of the dead lessee may be on their way still: they are claims, too.
            FromNode::SegmentAdopted { .. } if !state.deferred.is_empty() => state.waiting_adoptions.push(msg),
            FromNode::SegmentAdopted { segment } => {
                let blocks = state.owner.blocks_in(segment);
                if !blocks.is_empty() {
                    state.adopted.insert(segment, blocks.len());
                }
                self.tell_node(node_wire::SEGMENT_CLAIMS, 0, &node_wire::segment_claims(segment, &blocks));
            }
            FromNode::ActorInit { actor, incarnation, spec, gpu_ids } => {
                state.actor = Some((actor, incarnation));
                let owner_proc = spec.actor.proc;
                state.owner.objects.arrive(&Executor::counted(&spec.args, &spec.deps));
                state.executor.handle_actor_init(*spec, incarnation, gpu_ids, owner_proc);
                self.work_arrived(state);
            }
            FromNode::LogLines { name, pid, stream, lines } => self.add_log(Log::Lines { name, pid, stream, lines }),
            FromNode::Notice { level, text } => self.add_log(Log::Notice { level, text }),
            FromNode::LeaseFailed { class, reason } => {
                let State { owner, out, .. } = state;
                owner.handle_lease_failed(ClassId(class), &reason, now, out);
            }
            // A request: this process stays while others may need what it owns.
            FromNode::Exit if state.executor.running_count() > 0 || !state.owner.is_bare() => {}
            FromNode::ActorStop | FromNode::Exit => {
                state.executor.exiting = true;
                self.raise_task_event(state);
                self.transport().wake();
            }
        }
    }

    /// The process of an actor's life that `new` says has ended, while its last answers may be on their
    /// way: they are read before the end is believed.
    fn former_life(&self, state: &State, actor: ActorId, new: &ActorState) -> Option<ProcId> {
        match state.owner.actor_state(actor)? {
            ActorState::Alive { proc, .. } if !matches!(new, ActorState::Alive { proc: same, .. } if same == proc) => {
                Some(*proc).filter(|proc| self.is_connected(*proc))
            }
            _ => None,
        }
    }

    fn is_connected(&self, proc: ProcId) -> bool {
        self.transport.get().is_some_and(|transport| transport.peer_info(proc).is_some())
    }

    fn process_gone(&self, state: &mut State, proc: ProcId, cause: &str, oom: bool, now: u64) {
        let State { owner, executor, out, .. } = state;
        owner.handle_process_gone(proc, cause, oom, now, out);
        let (counted, interrupted) = executor.handle_process_gone(proc);
        owner.release_all(&counted, out);
        for task in &interrupted {
            owner.cancel_children(*task, now, out);
        }
        if !interrupted.is_empty() {
            self.interrupt();
        }
    }

    fn answered(&self, state: &mut State, corr: u64, answer: Answer) {
        // Nobody waits any more: a granted segment goes back, anything else is dropped.
        match state.answers.get_mut(&corr) {
            Some(slot) => *slot = answer,
            None => {
                if let Answer::Segment { segment, .. } = answer {
                    self.tell_node(node_wire::SEGMENT_RELEASE, 0, &node_wire::segment(segment));
                }
                return;
            }
        }
        if Self::notify(state, answer_watch(corr)) {
            self.transport().wake();
        }
    }
}

/// Watches of answers are numbered apart from those of objects.
fn answer_watch(corr: u64) -> WaiterId {
    WaiterId(corr | 1 << 63)
}

fn thread_id() -> u64 {
    rustix::thread::gettid().as_raw_nonzero().get() as u64
}

impl Handler for Shell {
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, fd: Option<OwnedFd>) {
        let Some(core) = self.0.upgrade() else { return };
        if frame.kind == node_wire::CORE {
            match postcard::from_bytes::<Msg>(frame.body) {
                Ok(msg) => core.step(|state, now| core.handle_core_message(state, from, msg, now)),
                // Same version, same session, and yet not our language: trust nothing more from there.
                Err(_) => core.transport().disconnect(from),
            }
        } else if from == core.node
            && let Some(msg) = node_wire::decode(frame.kind, frame.body)
        {
            core.step(|state, now| core.handle_node_message(state, frame.corr, msg, fd, now));
        }
    }

    fn on_started(&self, transport: &Arc<Transport>) {
        if let Some(core) = self.0.upgrade() {
            assert!(core.transport.set(transport.clone()).is_ok(), "a transport starts once");
        }
    }

    fn on_batch_end(&self) {}

    fn on_joined(&self, _peer: PeerInfo) {}

    fn on_closed(&self, peer: ProcId, reason: CloseReason) {
        let Some(core) = self.0.upgrade() else { return };
        if core.closing.load(Ordering::Acquire) {
            return;
        }
        if peer == core.node {
            if core.role == Role::Worker {
                // Nothing that this process does can be of use to anyone any more.
                crate::sys::exit_now(1);
            }
            core.fail(&format!("the connection to the node was lost ({reason})"));
            return;
        }
        core.step(|state, now| {
            let deferred = state.deferred.remove(&peer).unwrap_or_default();
            if deferred.is_empty() && !state.owner.objects.is_dead(peer) {
                state.out.effects.push(Effect::Node(ToNode::PeerLost { proc: peer }));
            }
            for msg in deferred {
                core.handle_node_message(state, 0, msg, None, now);
            }
            if state.deferred.is_empty() {
                for msg in std::mem::take(&mut state.waiting_adoptions) {
                    core.handle_node_message(state, 0, msg, None, now);
                }
            }
        });
    }

    fn on_fd_ready(&self, token: u64) {
        let Some(core) = self.0.upgrade() else { return };
        if token == TIMER_TOKEN {
            if let Some(descriptors) = &*core.descriptors.lock() {
                let _ = rustix::io::read(&descriptors.timer, &mut [0; 8]);
            }
            core.step(|state, now| {
                state.timer_armed = false;
                state.owner.handle_timeout(now, &mut state.out);
            });
        }
    }
}

/// Errors that stand in place of values.
#[must_use]
pub fn error_value(code: ErrorCode, text: &str) -> Value {
    Value::Inline(Payload::error(code, text))
}
