//! Waiting for objects: by a thread that drives the transport meanwhile, or as events on a descriptor.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use skate_proto::handshake::Role;
use skate_proto::ids::ObjectId;
use skate_proto::objects::WaiterId;

use super::{Core, CoreError, State};
use crate::node_wire;
use crate::transport::Driven;
use crate::transport::fork::PrivateFd;

/// A wait shorter than this does not give the worker's CPUs back: telling the node costs as much.
const BLOCK_AFTER: Duration = Duration::from_micros(200);
/// How often a wait of the program's main thread looks for signals. One that comes while the thread is
/// busy with messages, or just before it goes to sleep, does not interrupt it.
const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(100);

/// A thread that waits for a number of events.
#[derive(Debug)]
pub(super) struct Waiter {
    missing: AtomicI64,
    /// Whether an exception among the values ends the wait for the others.
    fails_fast: bool,
}

impl Waiter {
    pub(super) fn new(missing: usize) -> Arc<Self> {
        Self::with(missing, false)
    }

    fn with(missing: usize, fails_fast: bool) -> Arc<Self> {
        Arc::new(Self { missing: AtomicI64::new(i64::try_from(missing).unwrap_or(i64::MAX)), fails_fast })
    }

    /// Ends the wait, whatever is missing.
    pub(super) fn end(&self) {
        self.missing.store(0, Ordering::Release);
    }

    pub(super) fn is_done(&self) -> bool {
        self.missing.load(Ordering::Acquire) <= 0
    }
}

/// Finished objects as events on a descriptor, for event loops.
pub struct Completions {
    fd: PrivateFd,
    done: Mutex<Vec<u64>>,
}

impl Completions {
    pub fn new() -> std::io::Result<Arc<Self>> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { fd: PrivateFd::new(fd), done: Mutex::new(Vec::new()) }))
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

pub(super) enum Watch {
    Thread(Arc<Waiter>),
    Event(Arc<Completions>, u64),
}

/// What a wait does besides waiting.
#[derive(Copy, Clone)]
pub(super) struct Wait {
    /// It stops a task that holds CPUs: a long one lends them to others.
    pub(super) blocks: bool,
    /// Signals and cancellations end it.
    pub(super) hears: bool,
}

impl Core {
    /// Drives the transport until `done`.
    pub(super) fn wait_for(
        &self,
        done: &dyn Fn() -> bool,
        deadline: Option<Instant>,
        Wait { blocks, hears }: Wait,
    ) -> Result<(), CoreError> {
        if done() {
            return Ok(());
        }
        let main = hears && self.is_main_thread();
        // Workers are told by `interrupted` what a signal was for.
        let is_users_main = || self.role != Role::Worker && thread_id() == u64::from(std::process::id());
        let look = self.signals.get().filter(|_| hears && is_users_main());
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

    pub(super) fn is_main_thread(&self) -> bool {
        self.main_thread.load(Ordering::Relaxed) == thread_id()
    }

    /// How user code waits.
    pub(super) fn users_wait(&self) -> Wait {
        Wait { blocks: self.role == Role::Worker && self.is_main_thread(), hears: true }
    }

    pub(super) fn begin_block(&self) {
        self.tell_node(node_wire::BLOCKED, 0, &node_wire::empty());
        self.step(|state, _| {
            let State { executor, owner, out, .. } = state;
            let counted = executor.block(out);
            owner.release_all(&counted, out);
        });
    }

    pub(super) fn end_block(&self) {
        self.step(|state, _| state.executor.unblock(&mut state.out));
        self.tell_node(node_wire::UNBLOCKED, 0, &node_wire::empty());
    }

    /// Waits until `count` of the objects are ready. `TimedOut` after the deadline.
    pub fn wait_ready(&self, ids: &[ObjectId], count: usize, deadline: Option<Instant>) -> Result<(), CoreError> {
        self.wait_objects(ids, count, deadline, false)
    }

    /// Waits until all are ready, or one that is an exception.
    pub(super) fn wait_all(&self, ids: &[ObjectId], deadline: Option<Instant>) -> Result<(), CoreError> {
        self.wait_objects(ids, ids.len(), deadline, true)
    }

    fn wait_objects(
        &self,
        ids: &[ObjectId],
        count: usize,
        deadline: Option<Instant>,
        fails_fast: bool,
    ) -> Result<(), CoreError> {
        let (waiter, watch) = {
            let mut state = self.state.lock();
            if let Some(why) = &state.closed {
                return Err(CoreError::Closed(why.clone()));
            }
            let ready = ids.iter().filter(|id| state.owner.objects.is_ready(**id)).count();
            if ready >= count || (fails_fast && state.owner.objects.first_failed(ids).is_some()) {
                return Ok(());
            }
            state.next_watch += 1;
            let watch = WaiterId(state.next_watch);
            let waiter = Waiter::with(count - ready, fails_fast);
            state.watches.insert(watch, Watch::Thread(waiter.clone()));
            let State { owner, out, .. } = &mut *state;
            for &id in ids {
                owner.objects.watch(id, watch, out);
            }
            let now = self.now_ns();
            self.perform(&mut state, now);
            (waiter, watch)
        };
        let result = self.wait_for(&|| waiter.is_done(), deadline, self.users_wait());
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

    pub(super) fn notify(state: &mut State, waiter: WaiterId, failed: bool) -> bool {
        match state.watches.get(&waiter) {
            Some(Watch::Thread(waiter)) if failed && waiter.fails_fast => {
                waiter.end();
                true
            }
            Some(Watch::Thread(waiter)) => waiter.missing.fetch_sub(1, Ordering::AcqRel) == 1,
            Some(Watch::Event(completions, token)) => {
                completions.add(*token);
                state.watches.remove(&waiter);
                false
            }
            None => false,
        }
    }
}

pub(super) fn thread_id() -> u64 {
    rustix::thread::gettid().as_raw_nonzero().get() as u64
}
