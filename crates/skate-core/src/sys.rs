//! The few calls that end or interrupt.

/// Ends the process at once, without destructors: whatever thread holds whatever lock.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Sends SIGINT to one thread of this process.
pub fn interrupt_thread(thread: u64) {
    let pid = std::process::id();
    // SAFETY: a plain system call on numbers; a thread that is gone makes it fail with ESRCH.
    unsafe {
        libc::syscall(libc::SYS_tgkill, pid as libc::pid_t, thread as libc::pid_t, libc::SIGINT);
    }
}

/// Waits until a descriptor is readable, or the timeout passes.
pub fn wait_readable(fd: std::os::fd::BorrowedFd<'_>, timeout_s: Option<f64>) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = timeout_s.map(|s| Timespec { tv_sec: s as i64, tv_nsec: (s.fract() * 1e9) as i64 });
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let _ = poll(&mut fds, timeout.as_ref());
}

/// A random number that is not zero.
pub fn random_id() -> std::io::Result<u64> {
    loop {
        let mut bytes = [0_u8; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        match u64::from_ne_bytes(bytes) {
            0 => {}
            id => return Ok(id),
        }
    }
}

/// An anonymous file of fixed size, for a segment: what it holds vanishes with its last descriptor.
pub fn create_segment(name: &str, size: u64) -> std::io::Result<std::os::fd::OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    // A mapping of a file that shrank would be a trap: nobody can change the size any more.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(fd)
}
