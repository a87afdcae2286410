//! The transport where descriptors are few, strangers many, or time is measured: each test runs again alone in a process.

mod cluster;

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use skate_core::transport::{Driven, SendMode};
use skate_proto::ids::ProcId;

use cluster::*;

/// Runs one test of this file again, alone in a process of its own.
fn in_own_process(name: &str) -> bool {
    if std::env::var_os("SKATE_TEST_ALONE").is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("SKATE_TEST_ALONE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    false
}

#[test]
fn without_descriptors_accepting_pauses_and_recovers() {
    if !in_own_process("without_descriptors_accepting_pauses_and_recovers") {
        return;
    }
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let base = descriptors();
    let waiting: Vec<UnixStream> = (0..8).map(|_| UnixStream::connect(cluster.path()).unwrap()).collect();
    wait_for("their acceptance", || descriptors() >= base + 16);
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: lowers this process's own limit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let mut spare: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    // The connector's end takes the last one; none is left for the node's.
    spare.pop();
    let _late = UnixStream::connect(cluster.path()).unwrap();
    wait_for("the warning", || cluster.node.handler.warnings.load(Ordering::Acquire) > 0);
    let before = cpu_time();
    std::thread::sleep(Duration::from_millis(250));
    assert!(cpu_time() - before < Duration::from_millis(50), "accepting must not spin");
    a.transport.send(NODE, 9, 1, &[], SendMode::Now);
    wait_for("a frame on an old connection", || cluster.node.handler.count() == 1);
    drop(spare);
    drop(waiting);
    let _b = cluster.join(B);
}

#[test]
fn a_connection_waits_for_a_descriptor_at_either_end() {
    if !in_own_process("a_connection_waits_for_a_descriptor_at_either_end") {
        return;
    }
    let cluster = Cluster::new();
    let (a, b, c) = (cluster.join(A), cluster.join(B), cluster.join(ProcId(9)));
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: lowers this process's own limit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    // With none left the connector fails; with one, its end takes that, and the acceptor gets none.
    for (left, from) in [(0, &a), (1, &c)] {
        let mut spare: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        spare.truncate(spare.len() - left);
        from.transport.send(B, ECHO, 1, &[], SendMode::Now);
        let warned = || [from, &cluster.node].iter().any(|p| p.handler.warnings.swap(0, Ordering::AcqRel) > 0);
        wait_for("a warning", warned);
        drop(spare);
        from.drive_until(|h| h.count() == 1);
        assert!(from.handler.closed.lock().is_empty() && b.handler.closed.lock().is_empty());
    }
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn an_idle_transport_sleeps() {
    if !in_own_process("an_idle_transport_sleeps") {
        return;
    }
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    std::thread::sleep(Duration::from_millis(20));
    let switches = || -> u64 {
        let mut total = 0;
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap();
            let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            total += line.trim().parse::<u64>().unwrap();
        }
        total
    };
    let before = switches();
    std::thread::sleep(Duration::from_millis(300));
    // Only this thread went to sleep and came back.
    assert!(switches() - before <= 3);
    drop((a, b));
}

#[test]
fn strangers_that_say_nothing_are_limited_and_do_not_lock_others_out() {
    if !in_own_process("strangers_that_say_nothing_are_limited_and_do_not_lock_others_out") {
        return;
    }
    let cluster = Cluster::new();
    let strangers: Vec<UnixStream> = (0..300).map(|_| UnixStream::connect(cluster.path()).unwrap()).collect();
    wait_for("the limit", || descriptors() >= 300 + 256);
    std::thread::sleep(Duration::from_millis(20));
    assert!(descriptors() < 300 + 256 + 30);
    let begin = Instant::now();
    let (a, _b) = (cluster.join(A), cluster.join(B));
    a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    assert!(begin.elapsed() < Duration::from_secs(2), "those who speak need not wait for those who do not");
    drop(strangers);
}

#[test]
fn a_program_that_closes_all_descriptors_is_told_so_and_loses_no_file_of_its_own() {
    if !in_own_process("a_program_that_closes_all_descriptors_is_told_so_and_loses_no_file_of_its_own") {
        return;
    }
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    // SAFETY: closes what others own, which is what is under test; they must cope.
    assert_eq!(unsafe { libc::close_range(3, 1000, 0) }, 0);
    let files: Vec<_> = (0..200).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    for process in [&a, &b] {
        process.transport.send(NODE, 9, 1, &[], SendMode::Now);
        assert_eq!(process.transport.drive(&|| false, None), Driven::Closed);
        assert_eq!(process.transport.drive(&|| false, None), Driven::Closed);
        let closed = process.handler.closed.lock();
        assert!(matches!(&closed[..], [(NODE, text)] if text.contains("os.closerange")), "{closed:?}");
    }
    drop((a, b, cluster));
    assert!(files.iter().all(|file| file.metadata().is_ok()), "a number that is the program's own was closed");
}

/// Gives this thread, and those that it starts, a network of their own, in which there is nothing but a loopback device.
fn own_network() -> Result<(), Errno> {
    // SAFETY: only the network of this thread changes.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)? };
    set_loopback(true);
    Ok(())
}

/// Switches the device on, or off: then nothing that is sent arrives, and nobody is told.
fn set_loopback(on: bool) {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: zeros are a request without a name; a name of two letters is put in.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = if on { libc::IFF_UP as libc::c_short } else { 0 };
    // SAFETY: the request is what this call takes.
    assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) }, 0);
}

/// Slow: a cut takes 9 to 11 s to be noticed.
#[test]
fn a_cut_connection_is_noticed_by_who_waits_and_by_who_writes() {
    if !in_own_process("a_cut_connection_is_noticed_by_who_waits_and_by_who_writes") {
        return;
    }
    if let Err(error) = own_network() {
        return eprintln!("not tested: this system gives no network of its own ({error})");
    }
    let (here, there) = (Cluster::new(), Cluster::of(ProcId(11)));
    let (a, b) = (here.join(A), there.join(B));
    a.transport.route(B, ProcId(11));
    a.transport.set_address(ProcId(11), there.address.clone());
    a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    set_loopback(false);
    b.transport.send(A, 9, 2, &[], SendMode::Now);
    for (process, peer) in [(&a, B), (&b, A)] {
        process.drive_until(|h| !h.closed.lock().is_empty());
        let ends = process.handler.ends(peer);
        assert!(ends.len() == 1 && ends[0].contains("timed out"), "{ends:?}");
    }
    assert_eq!(a.handler.count(), 1);
}
