//! A word to sleep on.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags};

/// Sleeping without a timeout is sleeping this long. The kernel restarts an untimed wait by itself after
/// a signal handler that was installed so; a timed one always ends with `EINTR`, and we want to know.
const FOREVER: Duration = Duration::from_secs(1 << 31);

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Slept {
    /// Woken, or the word had changed, or for no reason at all.
    Woken,
    TimedOut,
    Interrupted,
}

/// Sleeps as long as `word` holds `seen`.
pub(super) fn sleep(word: &AtomicU32, seen: u32, timeout: Option<Duration>) -> Slept {
    let timeout = timeout.unwrap_or(FOREVER).min(FOREVER);
    let timeout =
        rustix::time::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    match futex::wait(word, Flags::PRIVATE, seen, Some(&timeout)) {
        Ok(()) | Err(Errno::AGAIN) => Slept::Woken,
        Err(Errno::TIMEDOUT) => Slept::TimedOut,
        Err(Errno::INTR) => Slept::Interrupted,
        // The word is ours, aligned and mapped, and the timeout is in range.
        Err(error) => unreachable!("futex wait: {error}"),
    }
}

/// Changes `word` by adding `step` and wakes its sleeper. Release: what was written before is seen by
/// the sleeper, which loads the word with Acquire.
pub(super) fn wake(word: &AtomicU32, step: u32) {
    word.fetch_add(step, Ordering::Release);
    let _ = futex::wake(word, Flags::PRIVATE, 1);
}
