//! Where the threads of this process are, for somebody who looks from outside.
//!
//! The interpreter can write its stacks from within a signal handler (`faulthandler.register`), without its lock, so
//! also when user code computes or waits in native code. The worker registers it for [`SIGNAL`] on [`descriptor`], a
//! number that nothing has open. A dump puts a memory file there, signals the main thread, whose stacks then stand still,
//! and waits for the end of the handler, which ours tells behind the interpreter's.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::thread::futex::{self, Flags};
use rustix::time::Timespec;

/// How long the main thread may take to come by: longer is an uninterruptible wait in the kernel.
const DUMP_TIMEOUT: Duration = Duration::from_secs(2);
/// Of a dump this much is read.
const DUMP_BYTES_MAX: u64 = 256 << 10;
/// Few programs have so many descriptors open, and the kernel's table of them stays small.
const DESCRIPTOR: i32 = 1023;

static INTERPRETERS: AtomicUsize = AtomicUsize::new(0);
/// What a dump is at, and the word on which its thread sleeps.
static PHASE: AtomicU32 = AtomicU32::new(IDLE);
const IDLE: u32 = 0;
const WANTED: u32 = 1;
const WRITING: u32 = 2;
const WRITTEN: u32 = 3;
/// One dump at a time.
static DUMPING: Mutex<()> = Mutex::new(());

/// The signal that asks for a dump: no program uses the last but one of the real-time signals, as far as is known.
#[must_use]
pub fn signal() -> i32 {
    libc::SIGRTMAX() - 1
}

/// The number that `faulthandler` writes to.
#[must_use]
pub fn descriptor() -> i32 {
    DESCRIPTOR
}

extern "C" fn handler(number: i32) {
    let theirs = INTERPRETERS.load(Ordering::Acquire);
    // A signal that somebody else sends while no dump is wanted would write to a descriptor of the program's.
    if theirs > 1 && PHASE.compare_exchange(WANTED, WRITING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        // SAFETY: the address is what `sigaction` gave as the handler before ours, and is more than SIG_DFL and SIG_IGN;
        // it takes the number of the signal, as `faulthandler`'s does.
        let theirs: extern "C" fn(i32) = unsafe { std::mem::transmute::<usize, extern "C" fn(i32)>(theirs) };
        theirs(number);
        PHASE.store(WRITTEN, Ordering::Release);
        let _ = futex::wake(&PHASE, Flags::PRIVATE, 1);
    }
}

/// Puts our handler in front of the interpreter's, which was registered just before.
pub fn install() {
    // SAFETY: plain system calls on a structure of our own. The handler only does what a handler may: atomic
    // operations, a system call, and a call of what is meant for signals.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal(), std::ptr::null(), &raw mut old) != 0 || old.sa_sigaction < 2 {
            return;
        }
        let ours: extern "C" fn(i32) = handler;
        if old.sa_sigaction == ours as usize {
            return;
        }
        INTERPRETERS.store(old.sa_sigaction, Ordering::Release);
        old.sa_sigaction = ours as usize;
        old.sa_flags |= libc::SA_RESTART;
        libc::sigaction(signal(), &raw const old, std::ptr::null_mut());
    }
}

/// The stacks of all threads that run Python, or why they could not be had.
#[must_use]
pub fn dump() -> String {
    let _turn = DUMPING.lock();
    if INTERPRETERS.load(Ordering::Acquire) < 2 {
        return "this process writes no stacks: it is no worker".into();
    }
    // SAFETY: asks about a number.
    if unsafe { libc::fcntl(DESCRIPTOR, libc::F_GETFD) } != -1 {
        return format!("the program uses descriptor {DESCRIPTOR}, which stacks are written to");
    }
    let taken = match rustix::fs::memfd_create("ray-stacks", rustix::fs::MemfdFlags::CLOEXEC) {
        Ok(fd) => fd.into_raw_fd(),
        Err(error) => return format!("there is no memory file for them: {error}"),
    };
    // SAFETY: `taken` was just made and is ours; the file that is made of it closes it.
    let mut file = unsafe { File::from_raw_fd(taken) };
    // SAFETY: plain system calls. Nothing had the number open a moment ago; should a thread of the program have got it
    // meanwhile, `dup3` would close its file: with a thousand descriptors open it is next to impossible.
    if unsafe { libc::dup3(file.as_raw_fd(), DESCRIPTOR, libc::O_CLOEXEC) } < 0 {
        return format!("descriptor {DESCRIPTOR} cannot be had: {}", std::io::Error::last_os_error());
    }
    PHASE.store(WANTED, Ordering::Release);
    let pid = std::process::id();
    // SAFETY: a signal to the main thread, whose number is the process's; it has a handler.
    unsafe { libc::syscall(libc::SYS_tgkill, pid as libc::pid_t, pid as libc::pid_t, signal()) };
    let deadline = Instant::now() + DUMP_TIMEOUT;
    let mut answered = false;
    loop {
        match PHASE.load(Ordering::Acquire) {
            WRITTEN => {
                answered = true;
                break;
            }
            phase => {
                let left = deadline.saturating_duration_since(Instant::now());
                // What has begun to write is not left alone: its descriptor must stay.
                if left.is_zero() && PHASE.compare_exchange(WANTED, IDLE, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    break;
                }
                let left = left.max(Duration::from_millis(1));
                let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
                let _ = futex::wait(&PHASE, Flags::PRIVATE, phase, Some(&left));
            }
        }
    }
    PHASE.store(IDLE, Ordering::Release);
    // SAFETY: the number is what `dup3` has made above.
    unsafe { libc::close(DESCRIPTOR) };
    let mut text = Vec::new();
    let read = file.rewind().and_then(|()| file.take(DUMP_BYTES_MAX).read_to_end(&mut text));
    match read {
        Err(error) => format!("the stacks cannot be read: {error}"),
        Ok(_) if !answered => {
            format!(
                "the main thread has not answered for {DUMP_TIMEOUT:?}: it waits in the kernel and cannot be interrupted"
            )
        }
        Ok(_) => String::from_utf8_lossy(&text).into_owned(),
    }
}
