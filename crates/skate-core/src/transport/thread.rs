//! Threads that never run a signal handler: signals are for the threads that run the user's code.

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// Signals that this thread may not receive, until dropped. A thread started meanwhile inherits that.
pub(crate) struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> Self {
        let mut before = MaybeUninit::uninit();
        // SAFETY: both sets are memory of the right type; the first is filled before it is read, and the
        // second by a call that cannot fail for SIG_SETMASK.
        unsafe {
            let mut all = MaybeUninit::uninit();
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled by `all`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

pub(crate) fn block_signals() -> Blocked {
    Blocked::all()
}

/// Starts a thread in which all signals are blocked from its first instruction.
pub(crate) fn spawn_without_signals(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let _blocked = block_signals();
    Builder::new().name(name.to_owned()).spawn(work)
}
