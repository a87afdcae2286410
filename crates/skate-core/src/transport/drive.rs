//! Who drives the reactor.
//!
//! At most one thread, the *driver*, waits in epoll and calls the handler. It is a user thread whenever
//! one would block anyway, so that a result does not have to be handed from the I/O thread to the thread
//! that wants it; else it is the I/O thread. The gate says who it is:
//!
//! - `Nobody`: a user thread has just left. The I/O thread *lingers*: it sleeps until [`LINGER`] after
//!   that thread left, so that a loop of synchronous calls finds the reactor free every time.
//! - `Io`: a user thread that wants to drive enters the queue and kicks the I/O thread, which grants the
//!   reactor to the first in the queue between two turns.
//! - `User`: further user threads enter the queue and sleep. The driver grants to the first when it leaves.
//!
//! # Why no wake-up is lost
//!
//! One word, `signal`, tells whether the driver sleeps in epoll (`WAITING_*`) and how many user threads
//! sleep in the queue. All the arguments are the same (Dekker's): a sleeper announces itself in `signal`
//! and *then* looks at what it waits for; a waker changes that and *then* looks at `signal`; both with a
//! sequentially consistent fence between, so at least one sees the other.
//!
//! - *Condition of a driving user.* It announces `WAITING_USER`, then evaluates `done()`, then waits.
//!   Whoever makes `done()` true calls [`Gate::wake`], which kicks if it sees `WAITING_USER`.
//! - *Condition of a queued user.* It counts itself in `signal`, loads its own word, evaluates `done()`,
//!   and sleeps only while the word is as loaded. `wake` changes the words of all in the queue if it sees
//!   a count.
//! - *Frames and commands for the driver.* It announces `WAITING_*`, then looks at `pending`. A sender
//!   sets `pending` and then calls [`Gate::notify_driver`], which kicks if it sees `WAITING_*`.
//! - *The reactor itself.* A user enters the queue (counts itself) and then kicks if it sees `WAITING_IO`;
//!   the I/O thread announces `WAITING_IO` and, from the same operation, learns the count.
//! - *The I/O thread's turn.* It sleeps without timeout only while a user holds the gate (`io_sleeps`,
//!   under the gate's lock), and that user wakes it when it leaves. Otherwise it sleeps with a deadline.
//!
//! A kick is a write to an edge-triggered eventfd: one that comes between announcement and wait makes
//! the wait return at once. `KICKED` suppresses further ones until the driver is back.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use rustix::io::Errno;

use super::futex::{self, Slept};
use super::poller::Poller;

/// How long the I/O thread leaves the reactor alone after a user thread left it. Longer than a user's
/// code takes between two calls of a loop; shorter than anybody notices when a frame comes meanwhile.
pub(super) const LINGER: Duration = Duration::from_micros(300);

const STATE_MASK: u32 = 3;
const WAITING_IO: u32 = 1;
const WAITING_USER: u32 = 2;
const KICKED: u32 = 3;
const ONE_QUEUED: u32 = 4;

/// In a waiter's word; the bits above count wake-ups.
const GRANTED: u32 = 1;
const WOKEN: u32 = 2;

thread_local! {
    static DRIVING: Cell<bool> = const { Cell::new(false) };
    static WAITER: Arc<AtomicU32> = Arc::new(AtomicU32::new(0));
}

/// How a wait ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Driven {
    /// `done()` was true.
    Done,
    TimedOut,
    /// A signal handler ran in this thread: look at what it left behind, then call again.
    Interrupted,
    /// The transport was shut down, or belongs to the process that forked this one, or has lost its descriptors.
    Closed,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Holder {
    Nobody,
    Io,
    User,
}

struct State {
    holder: Holder,
    queue: VecDeque<Arc<AtomicU32>>,
    /// The I/O thread sleeps without a timeout.
    io_sleeps: bool,
    /// When a user thread last left the reactor, and how often one took it.
    left_at: Instant,
    claims: u64,
    closing: bool,
}

pub(super) struct Gate {
    state: Mutex<State>,
    signal: AtomicU32,
    /// Something waits for the driver: dirty connections or commands.
    pending: AtomicBool,
    closing: AtomicBool,
    /// The error by which it was noticed that the poller's descriptors are gone; 0 while they are there.
    lost: AtomicI32,
    io_word: AtomicU32,
    /// Told when nobody holds the reactor while the transport closes.
    left: Condvar,
    poller: RwLock<Option<Arc<Poller>>>,
}

/// The right to drive; gives it back when dropped, also by a panic in the handler.
pub(super) struct Turn<'a> {
    gate: &'a Gate,
    waiting: u32,
}

impl Gate {
    pub(super) fn new(poller: Arc<Poller>) -> Self {
        let state = State {
            holder: Holder::Nobody,
            queue: VecDeque::new(),
            io_sleeps: false,
            left_at: Instant::now(),
            claims: 0,
            closing: false,
        };
        Self {
            state: Mutex::new(state),
            signal: AtomicU32::new(0),
            pending: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            lost: AtomicI32::new(0),
            io_word: AtomicU32::new(0),
            left: Condvar::new(),
            poller: RwLock::new(Some(poller)),
        }
    }

    /// Whether the calling thread is inside the handler.
    pub(super) fn is_driving() -> bool {
        DRIVING.get()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Why nobody can drive any more, if the poller's descriptors are gone.
    pub(super) fn lost(&self) -> Option<Errno> {
        match self.lost.load(Ordering::Acquire) {
            0 => None,
            error => Some(Errno::from_raw_os_error(error)),
        }
    }

    /// The poller's descriptors are gone. Nobody gets the reactor from now on, and who waits for it is told. A
    /// thread that waits in epoll may stay there for ever, for nothing can wake it: nobody waits for that thread.
    pub(super) fn lose(&self, error: Errno) {
        if self.lost.compare_exchange(0, error.raw_os_error(), Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return;
        }
        let mut state = self.state.lock();
        state.closing = true;
        self.closing.store(true, Ordering::SeqCst);
        for word in &state.queue {
            futex::wake(word, WOKEN);
        }
        futex::wake(&self.io_word, WOKEN);
        self.left.notify_all();
    }

    /// Runs with the poller, unless it is closed.
    pub(super) fn with_poller<R>(&self, act: impl FnOnce(&Poller) -> R) -> Option<R> {
        self.poller.read().as_deref().map(act)
    }

    pub(super) fn take_poller(&self) -> Option<Arc<Poller>> {
        self.poller.write().take()
    }

    /// Makes every waiting thread evaluate its `done()` again. One fence and one load if none waits.
    #[inline]
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        let signal = self.signal.load(Ordering::Relaxed);
        if signal & STATE_MASK == WAITING_USER {
            self.kick(WAITING_USER);
        }
        if signal >= ONE_QUEUED {
            self.wake_queue();
        }
    }

    /// Says that there is work for the driver. If nobody drives, the next who does will find it.
    pub(super) fn notify_driver(&self) {
        self.pending.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let state = self.signal.load(Ordering::Relaxed) & STATE_MASK;
        if matches!(state, WAITING_IO | WAITING_USER) {
            self.kick(state);
        }
    }

    /// Whether work was announced since the last call.
    pub(super) fn take_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::SeqCst)
    }

    #[cold]
    fn wake_queue(&self) {
        let state = self.state.lock();
        for word in &state.queue {
            futex::wake(word, WOKEN);
        }
    }

    /// Ends the driver's wait, if it is still the one that was seen.
    fn kick(&self, seen: u32) {
        let mut signal = self.signal.load(Ordering::Relaxed);
        while signal & STATE_MASK == seen {
            let kicked = signal & !STATE_MASK | KICKED;
            match self.signal.compare_exchange_weak(signal, kicked, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => {
                    if let Some(Err(error)) = self.with_poller(Poller::kick) {
                        self.lose(error);
                    }
                    return;
                }
                Err(now) => signal = now,
            }
        }
    }

    /// Takes the reactor for a user thread, or waits like [`super::Transport::drive`] until the wait is
    /// over or the reactor is granted.
    pub(super) fn claim_for_user(
        &self,
        done: &dyn Fn() -> bool,
        deadline: Option<Instant>,
    ) -> Result<Turn<'_>, Driven> {
        let mut state = self.state.lock();
        if state.closing {
            return Err(Driven::Closed);
        }
        if state.holder == Holder::Nobody {
            state.holder = Holder::User;
            state.claims += 1;
            drop(state);
            return Ok(Turn::new(self, WAITING_USER));
        }
        let word = WAITER.with(Arc::clone);
        word.store(0, Ordering::Relaxed);
        state.queue.push_back(Arc::clone(&word));
        self.signal.fetch_add(ONE_QUEUED, Ordering::SeqCst);
        let io_drives = state.holder == Holder::Io;
        drop(state);
        fence(Ordering::SeqCst);
        if io_drives {
            self.kick(WAITING_IO);
        }
        match self.wait_in_queue(&word, done, deadline) {
            None => Ok(Turn::new(self, WAITING_USER)),
            Some(outcome) => {
                self.leave_queue(&word);
                Err(outcome)
            }
        }
    }

    /// `None` when the reactor was granted.
    fn wait_in_queue(&self, word: &AtomicU32, done: &dyn Fn() -> bool, deadline: Option<Instant>) -> Option<Driven> {
        loop {
            let seen = word.load(Ordering::Acquire);
            if seen & GRANTED != 0 {
                return None;
            }
            if done() {
                return Some(Driven::Done);
            }
            if self.is_closing() {
                return Some(Driven::Closed);
            }
            let timeout = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Some(Driven::TimedOut),
                timeout => timeout,
            };
            match futex::sleep(word, seen, timeout) {
                Slept::Interrupted => return Some(Driven::Interrupted),
                Slept::Woken | Slept::TimedOut => {}
            }
        }
    }

    fn leave_queue(&self, word: &Arc<AtomicU32>) {
        let mut state = self.state.lock();
        match state.queue.iter().position(|queued| Arc::ptr_eq(queued, word)) {
            Some(at) => {
                state.queue.remove(at);
                self.signal.fetch_sub(ONE_QUEUED, Ordering::SeqCst);
            }
            None => {
                // It was granted meanwhile, and is passed on.
                assert!(word.load(Ordering::Acquire) & GRANTED != 0);
                self.pass_on(&mut state);
            }
        }
    }

    /// Gives the reactor to the next user thread, or to nobody.
    fn pass_on(&self, state: &mut State) {
        assert!(state.holder != Holder::Nobody, "only the holder passes the reactor on");
        if let Some(next) = state.queue.pop_front() {
            self.signal.fetch_sub(ONE_QUEUED, Ordering::SeqCst);
            state.holder = Holder::User;
            state.claims += 1;
            futex::wake(&next, GRANTED);
            return;
        }
        state.holder = Holder::Nobody;
        state.left_at = Instant::now();
        if std::mem::take(&mut state.io_sleeps) {
            futex::wake(&self.io_word, WOKEN);
        }
        if state.closing {
            self.left.notify_all();
        }
    }

    /// Takes the reactor for the I/O thread when no user thread had it for [`LINGER`]. `None` when closing.
    pub(super) fn claim_for_io(&self) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        let mut claims_seen = state.claims;
        loop {
            if state.closing {
                return None;
            }
            let seen = self.io_word.load(Ordering::Relaxed);
            let timeout = if state.holder == Holder::Nobody {
                let left_since = state.left_at.elapsed();
                if left_since >= LINGER {
                    state.holder = Holder::Io;
                    drop(state);
                    return Some(Turn::new(self, WAITING_IO));
                }
                Some(LINGER - left_since)
            } else if state.claims != claims_seen {
                // A loop of calls: its thread must not have to wake this one each time it leaves.
                claims_seen = state.claims;
                Some(LINGER)
            } else {
                // A long wait.
                state.io_sleeps = true;
                None
            };
            drop(state);
            futex::sleep(&self.io_word, seen, timeout);
            state = self.state.lock();
            state.io_sleeps = false;
        }
    }

    /// From now on nobody gets the reactor; all who wait are told. Returns when its holder has left.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        self.closing.store(true, Ordering::SeqCst);
        for word in &state.queue {
            futex::wake(word, WOKEN);
        }
        futex::wake(&self.io_word, WOKEN);
        if let Some(Err(error)) = self.with_poller(Poller::kick) {
            drop(state);
            return self.lose(error);
        }
        while state.holder != Holder::Nobody && !Self::is_driving() && self.lost().is_none() {
            self.left.wait(&mut state);
        }
    }
}

impl<'a> Turn<'a> {
    fn new(gate: &'a Gate, waiting: u32) -> Self {
        DRIVING.set(true);
        Self { gate, waiting }
    }

    /// Announces a wait. True if user threads are in the queue.
    pub(super) fn announce(&self) -> bool {
        let before = self.gate.signal.fetch_add(self.waiting, Ordering::SeqCst);
        debug_assert_eq!(before & STATE_MASK, 0);
        fence(Ordering::SeqCst);
        before >= ONE_QUEUED
    }

    /// Withdraws the announcement.
    pub(super) fn withdraw(&self) {
        self.gate.signal.fetch_and(!STATE_MASK, Ordering::SeqCst);
    }

    /// Whether work for the driver was announced.
    pub(super) fn is_pending(&self) -> bool {
        self.gate.pending.load(Ordering::SeqCst)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        DRIVING.set(false);
        let gate = self.gate;
        // After a panic the announcement may still be there; else this changes nothing.
        gate.signal.fetch_and(!STATE_MASK, Ordering::SeqCst);
        gate.pass_on(&mut gate.state.lock());
    }
}
