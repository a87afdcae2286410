//! Measures the transport between two processes that found each other through a third: on one node, where that is a
//! Unix socket, and then on two, between which it is TCP over the loopback device, in clear and within TLS.
//!
//! `cargo run --release -p skate-core --example pingpong [seconds]`
//!
//! The node only passes the connection. The worker's main thread drives while it waits for requests, as
//! the main thread of a real worker does; so does the driver's while it waits for a reply.

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use skate_core::transport::{
    Address, CloseReason, Config, Driven, Frame, Handler, Listener, PeerInfo, SendMode, Transport,
};
use skate_proto::handshake::Role;
use skate_proto::ids::ProcId;

const NODE: ProcId = ProcId(1);
const DRIVER: ProcId = ProcId(2);
const WORKER: ProcId = ProcId(3);
const FAR_NODE: ProcId = ProcId(4);
const FAR_WORKER: ProcId = ProcId(5);

const PING: u8 = 10;
const ONE_WAY: u8 = 11;
const COUNT: u8 = 12;
const ECHO_QUEUED: u8 = 13;
const LARGE_BYTES: usize = 1 << 20;

#[derive(Default)]
struct Counter {
    transport: std::sync::OnceLock<Arc<Transport>>,
    pings: AtomicU64,
    frames: AtomicU64,
    asked: AtomicU64,
    joined: AtomicU64,
}

impl Handler for Counter {
    fn on_started(&self, transport: &Arc<Transport>) {
        let _ = self.transport.set(Arc::clone(transport));
    }
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, _fd: Option<OwnedFd>) {
        match frame.kind {
            PING => self.pings.store(frame.corr, Ordering::Release),
            COUNT => self.asked.store(frame.corr, Ordering::Release),
            ECHO_QUEUED => self.transport.wait().send(from, ONE_WAY, frame.corr, &[frame.body], SendMode::Queue),
            _ => drop(self.frames.fetch_add(1, Ordering::Release)),
        }
    }
    fn on_batch_end(&self) {
        if let Some(transport) = self.transport.get() {
            transport.wake();
        }
    }
    fn on_joined(&self, _peer: PeerInfo) {
        self.joined.fetch_add(1, Ordering::Release);
    }
    fn on_closed(&self, _peer: ProcId, _reason: CloseReason) {
        self.asked.store(u64::MAX, Ordering::Release);
    }
    fn on_fd_ready(&self, _token: u64) {}
}

fn config(me: ProcId, role: Role, node: ProcId, path: &Path, tls: bool, listeners: Vec<Listener>) -> Config {
    Config {
        me,
        role,
        python_minor: 0,
        session: [1; 16],
        token: [2; 32],
        node,
        node_address: Address::Unix(path.to_owned()),
        tls,
        listeners,
        io_thread: true,
    }
}

fn in_child(run: impl FnOnce()) -> libc::pid_t {
    // SAFETY: this process has one thread when it forks.
    match unsafe { libc::fork() } {
        0 => {
            run();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        pid => pid,
    }
}

fn node(me: ProcId, path: &Path, tls: bool, listeners: Vec<Listener>) {
    let handler = Arc::new(Counter::default());
    let transport = Transport::start(config(me, Role::Node, me, path, tls, listeners), handler.clone()).unwrap();
    while handler.asked.load(Ordering::Acquire) != u64::MAX {
        std::thread::sleep(Duration::from_millis(50));
    }
    transport.shutdown();
}

fn worker(me: ProcId, node: ProcId, path: &Path) {
    let handler = Arc::new(Counter::default());
    let transport = Transport::start(config(me, Role::Worker, node, path, false, vec![]), handler.clone()).unwrap();
    let (mut answered, mut asked) = (0, 0);
    loop {
        let done =
            || handler.pings.load(Ordering::Acquire) != answered || handler.asked.load(Ordering::Acquire) != asked;
        transport.drive(&done, None);
        let ping = handler.pings.load(Ordering::Acquire);
        if ping != answered {
            answered = ping;
            transport.send(DRIVER, PING, ping, &[&[7; 48]], SendMode::Now);
        }
        match handler.asked.load(Ordering::Acquire) {
            u64::MAX => break,
            now if now != asked => {
                // The answer is sent when all frames are there.
                asked = now;
                transport.drive(&|| handler.frames.load(Ordering::Acquire) >= asked, None);
                transport.send(DRIVER, COUNT, asked, &[], SendMode::Now);
            }
            _ => {}
        }
    }
    transport.shutdown();
}

/// What the machine can do: 64 bytes there and back over a bare socket with blocking calls.
fn bare_round_trips(seconds: f64) -> f64 {
    let (mut a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut bytes = [0; 64];
    let pid = in_child(|| {
        let mut bytes = [0; 64];
        while b.read_exact(&mut bytes).is_ok() && bytes[0] == 0 {
            b.write_all(&bytes).unwrap();
        }
    });
    let begin = Instant::now();
    let mut rounds = 0u32;
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..100 {
            a.write_all(&bytes).unwrap();
            a.read_exact(&mut bytes).unwrap();
        }
        rounds += 100;
    }
    let rate = f64::from(rounds) / begin.elapsed().as_secs_f64();
    bytes[0] = 1;
    a.write_all(&bytes).unwrap();
    // SAFETY: waits for a child of this process.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    rate
}

fn call(transport: &Transport, handler: &Counter, worker: ProcId, corr: u64) {
    transport.send(worker, PING, corr, &[&[1; 16], &[7; 32]], SendMode::Now);
    while transport.drive(&|| handler.pings.load(Ordering::Acquire) == corr, None) != Driven::Done {}
}

/// A node and a worker of it, each a process. The listeners are closed here.
fn start_node(directory: &Path, me: ProcId, member: ProcId, tls: bool) -> ([libc::pid_t; 2], PathBuf, Address) {
    let path = directory.join(format!("{}.sock", me.0));
    let tcp = Listener::bind_tcp("127.0.0.1:0".parse().expect("an address")).unwrap();
    let address = tcp.local_address().unwrap();
    let mut listeners = Some(vec![Listener::bind_unix(&path).unwrap(), tcp]);
    let node_pid = in_child(|| node(me, &path, tls, listeners.take().unwrap()));
    drop(listeners);
    let worker_pid = in_child(|| worker(member, me, &path));
    ([worker_pid, node_pid], path, address)
}

fn main() {
    let seconds = std::env::args().nth(1).map_or(2.0, |s| s.parse().expect("seconds"));
    let directory = std::env::temp_dir().join(format!("skate-pingpong-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    println!("bare socket, round trips      {:8.0} /s", bare_round_trips(seconds));
    for tls in [false, true] {
        measure_cluster(&directory, seconds, tls);
    }
    let _ = std::fs::remove_dir_all(&directory);
}

fn measure_cluster(directory: &Path, seconds: f64, tls: bool) {
    let directory = directory.join(if tls { "tls" } else { "clear" });
    std::fs::create_dir_all(&directory).unwrap();
    let (pids, path, _) = start_node(&directory, NODE, WORKER, tls);
    let (far_pids, _, far_address) = start_node(&directory, FAR_NODE, FAR_WORKER, tls);

    let handler = Arc::new(Counter::default());
    let transport =
        Transport::start(config(DRIVER, Role::Driver, NODE, &path, false, vec![]), handler.clone()).unwrap();
    transport.route(FAR_WORKER, FAR_NODE);
    transport.set_address(FAR_NODE, far_address);
    std::thread::sleep(Duration::from_millis(50));
    let mut corr = 0;
    let kinds = [("Unix socket, one node", WORKER), ("TCP, two nodes", FAR_WORKER)];
    let within_tls = [("TCP within TLS, two nodes", FAR_WORKER)];
    for (kind, target) in if tls { &within_tls[..] } else { &kinds } {
        println!("{kind}:");
        measure(&transport, &handler, *target, seconds, &mut corr);
    }
    transport.shutdown();
    for pid in pids.into_iter().chain(far_pids) {
        // SAFETY: waits for a child of this process, which has been told to end.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    }
}

fn measure(transport: &Transport, handler: &Counter, worker: ProcId, seconds: f64, corr: &mut u64) {
    let mut next = || {
        *corr += 1;
        *corr
    };
    let begin = Instant::now();
    call(transport, handler, worker, next());
    println!("first call, with connecting   {:8.0} us", begin.elapsed().as_secs_f64() * 1e6);

    let begin = Instant::now();
    let mut rounds = 0u32;
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..100 {
            call(transport, handler, worker, next());
        }
        rounds += 100;
    }
    let took = begin.elapsed().as_secs_f64();
    println!(
        "synchronous round trips       {:8.0} /s  ({:.1} us)",
        f64::from(rounds) / took,
        took / f64::from(rounds) * 1e6
    );

    let pause = Duration::from_millis(2);
    let mut longest = Vec::new();
    for _ in 0..200 {
        std::thread::sleep(pause);
        let begin = Instant::now();
        call(transport, handler, worker, next());
        longest.push(begin.elapsed());
    }
    longest.sort();
    println!("call after a pause of 2 ms    {:8.1} us median", longest[100].as_secs_f64() * 1e6);

    let mut total = 0;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..1000 {
            while transport.backlog(worker) > 8 << 20 {
                transport.drive(&|| transport.backlog(worker) <= 4 << 20, None);
            }
            transport.send(worker, ONE_WAY, 0, &[&[1; 16], &[7; 32]], SendMode::Queue);
        }
        total += 1000;
    }
    transport.send(worker, COUNT, total, &[], SendMode::Now);
    transport.drive(&|| handler.asked.load(Ordering::Acquire) == total, None);
    let took = begin.elapsed().as_secs_f64();
    println!("queued frames, one way        {:8.0} /s", total as f64 / took);

    let (mut sent, before) = (0u64, handler.frames.load(Ordering::Acquire));
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..1000 {
            transport.send(worker, ECHO_QUEUED, 0, &[&[1; 16], &[7; 32]], SendMode::Queue);
        }
        sent += 1000;
        let floor = before + sent.saturating_sub(20_000);
        transport.drive(&|| handler.frames.load(Ordering::Acquire) >= floor, None);
    }
    transport.drive(&|| handler.frames.load(Ordering::Acquire) >= before + sent, None);
    let took = begin.elapsed().as_secs_f64();
    println!("queued frames, there and back {:8.0} /s", sent as f64 / took);

    let body = vec![7; LARGE_BYTES];
    let (mut total, before) = (0u64, handler.asked.load(Ordering::Acquire));
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        while transport.backlog(worker) > 8 << 20 {
            transport.drive(&|| transport.backlog(worker) <= 4 << 20, None);
        }
        transport.send(worker, ONE_WAY, 0, &[&body], SendMode::Now);
        total += 1;
    }
    transport.send(worker, COUNT, before + total, &[], SendMode::Now);
    transport.drive(&|| handler.asked.load(Ordering::Acquire) == before + total, None);
    let bytes = (total * LARGE_BYTES as u64) as f64;
    println!("frames of 1 MiB, one way      {:8.2} GB/s", bytes / begin.elapsed().as_secs_f64() / 1e9);
}
