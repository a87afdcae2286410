//! What a fork of the user's process must not inherit.
//!
//! A user's code may fork (`multiprocessing`, a library, a daemon). The child has copies of every
//! descriptor but none of the threads. If it kept them, it could corrupt the parent's streams, and a
//! child that outlives its parent would hide the parent's death from every peer, because a socket is
//! closed only when its last copy is. So the child, before `fork` returns in it, replaces each
//! descriptor by one that leads nowhere; and everything that asks [`forked_since`] turns into a no-op.
//!
//! Replacing (`dup3`) rather than closing keeps the numbers taken: when an inherited owner is dropped in
//! the child, it closes a number that is still its own.

use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Counts the forks between this process and the one that started.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// Counts the times that the program has closed our descriptors.
static LOSSES: AtomicU32 = AtomicU32::new(0);
static REGISTRY: Registry =
    Registry { locked: AtomicBool::new(false), state: UnsafeCell::new(State { fds: Vec::new() }) };

/// Descriptors that a forked child must lose.
///
/// The lock is a spin lock because it is released in the child of a fork, where the bookkeeping of a
/// parking lock may have been caught in any state. It is held for a few instructions.
struct Registry {
    locked: AtomicBool,
    state: UnsafeCell<State>,
}

struct State {
    fds: Vec<RawFd>,
}

// SAFETY: `state` is only reached through `lock`, which admits one thread at a time.
unsafe impl Sync for Registry {}

impl Registry {
    fn lock(&self) {
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
    }

    fn unlock(&self) {
        self.locked.store(false, Ordering::Release);
    }

    fn with<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        self.lock();
        // SAFETY: the lock is held, and `act` is one of the closures below, none of which calls `with`.
        let result = act(unsafe { &mut *self.state.get() });
        self.unlock();
        result
    }
}

extern "C" fn before_fork() {
    REGISTRY.lock();
}

extern "C" fn after_fork_in_parent() {
    REGISTRY.unlock();
}

extern "C" fn after_fork_in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    // SAFETY: `before_fork` took the lock on this thread, the only one of the child. Nothing here
    // allocates or takes another lock; `eventfd`, `dup3` and `close` are plain system calls.
    let state = unsafe { &mut *REGISTRY.state.get() };
    if !state.fds.is_empty() {
        // SAFETY: as above. Without a descriptor to spare the child keeps its copies, and refuses to
        // use them all the same.
        let nowhere = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        for &fd in &state.fds {
            // SAFETY: `fd` is open and registered, so its owner is in this module's care.
            unsafe { libc::dup3(nowhere, fd, libc::O_CLOEXEC) };
        }
        // SAFETY: opened above, and nobody else's.
        unsafe { libc::close(nowhere) };
    }
    state.fds.clear();
    REGISTRY.unlock();
}

/// Called before the first descriptor is registered.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers are plain functions that live as long as the process. If there is no
        // memory for them, a child merely keeps its copies.
        unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork_in_parent), Some(after_fork_in_child)) };
    });
}

pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Whether this process is a forked child of the one in which `generation` was read.
#[inline]
pub(crate) fn forked_since(generation: u32) -> bool {
    GENERATION.load(Ordering::Relaxed) != generation
}

/// Takes every descriptor to be closed by the program behind our back. Their numbers may be the program's
/// own by now: none of them is closed or replaced any more.
pub(crate) fn disown() {
    REGISTRY.with(|state| {
        LOSSES.fetch_add(1, Ordering::Relaxed);
        state.fds.clear();
    });
}

/// A descriptor that a forked child loses.
#[derive(Debug)]
pub(crate) struct PrivateFd {
    fd: ManuallyDrop<OwnedFd>,
    /// `LOSSES` when it was opened.
    losses: u32,
}

impl PrivateFd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let number = fd.as_raw_fd();
        let losses = REGISTRY.with(|state| {
            state.fds.push(number);
            LOSSES.load(Ordering::Relaxed)
        });
        Self { fd: ManuallyDrop::new(fd), losses }
    }

    /// Whether the number is still this descriptor's; see [`disown`].
    pub(crate) fn is_owned(&self) -> bool {
        LOSSES.load(Ordering::Relaxed) == self.losses
    }
}

/// Takes a number off the list, which must happen before it is closed and can be used anew.
fn forget(number: RawFd) {
    REGISTRY.with(|state| {
        if let Some(at) = state.fds.iter().position(|&fd| fd == number) {
            state.fds.swap_remove(at);
        }
    });
}

impl Drop for PrivateFd {
    fn drop(&mut self) {
        if self.is_owned() {
            forget(self.fd.as_raw_fd());
            // SAFETY: this is the only place that drops it, and it is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.fd) };
        }
    }
}

impl AsFd for PrivateFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
