//! Measures the transport between two processes that found each other through a third.
//!
//! `cargo run --release -p skate-core --example pingpong [seconds]`
//!
//! The node only passes the connection. The worker's main thread drives while it waits for requests, as
//! the main thread of a real worker does; so does the driver's while it waits for a reply.

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
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

const PING: u8 = 10;
const ONE_WAY: u8 = 11;
const COUNT: u8 = 12;
const ECHO_QUEUED: u8 = 13;

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

fn config(me: ProcId, role: Role, path: &Path, listeners: Vec<Listener>) -> Config {
    Config {
        me,
        role,
        python_minor: 0,
        session: [1; 16],
        token: [2; 32],
        node: NODE,
        node_address: Address::Unix(path.to_owned()),
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

fn node(path: &Path, listener: Listener) {
    let handler = Arc::new(Counter::default());
    let transport = Transport::start(config(NODE, Role::Node, path, vec![listener]), handler.clone()).unwrap();
    while handler.asked.load(Ordering::Acquire) != u64::MAX {
        std::thread::sleep(Duration::from_millis(50));
    }
    transport.shutdown();
}

fn worker(path: &Path) {
    let handler = Arc::new(Counter::default());
    let transport = Transport::start(config(WORKER, Role::Worker, path, vec![]), handler.clone()).unwrap();
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

fn call(transport: &Transport, handler: &Counter, corr: u64) {
    transport.send(WORKER, PING, corr, &[&[1; 16], &[7; 32]], SendMode::Now);
    while transport.drive(&|| handler.pings.load(Ordering::Acquire) == corr, None) != Driven::Done {}
}

fn main() {
    let seconds = std::env::args().nth(1).map_or(2.0, |s| s.parse().expect("seconds"));
    let directory = std::env::temp_dir().join(format!("skate-pingpong-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("node.sock");
    println!("bare socket, round trips      {:8.0} /s", bare_round_trips(seconds));
    let listener = Listener::bind_unix(&path).unwrap();
    let mut listener = Some(listener);
    let node_pid = in_child(|| node(&path, listener.take().unwrap()));
    drop(listener);
    let worker_pid = in_child(|| worker(&path));

    let handler = Arc::new(Counter::default());
    let transport = Transport::start(config(DRIVER, Role::Driver, &path, vec![]), handler.clone()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let mut corr = 0;
    let mut next = || {
        corr += 1;
        corr
    };
    let begin = Instant::now();
    call(&transport, &handler, next());
    println!("first call, with connecting   {:8.0} us", begin.elapsed().as_secs_f64() * 1e6);

    let begin = Instant::now();
    let mut rounds = 0u32;
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..100 {
            call(&transport, &handler, next());
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
        call(&transport, &handler, next());
        longest.push(begin.elapsed());
    }
    longest.sort();
    println!("call after a pause of 2 ms    {:8.1} us median", longest[100].as_secs_f64() * 1e6);

    let mut total = 0;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..1000 {
            while transport.backlog(WORKER) > 8 << 20 {
                transport.drive(&|| transport.backlog(WORKER) <= 4 << 20, None);
            }
            transport.send(WORKER, ONE_WAY, 0, &[&[1; 16], &[7; 32]], SendMode::Queue);
        }
        total += 1000;
    }
    transport.send(WORKER, COUNT, total, &[], SendMode::Now);
    transport.drive(&|| handler.asked.load(Ordering::Acquire) == total, None);
    let took = begin.elapsed().as_secs_f64();
    println!("queued frames, one way        {:8.0} /s", total as f64 / took);

    let (mut sent, before) = (0u64, handler.frames.load(Ordering::Acquire));
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        for _ in 0..1000 {
            transport.send(WORKER, ECHO_QUEUED, 0, &[&[1; 16], &[7; 32]], SendMode::Queue);
        }
        sent += 1000;
        let floor = before + sent.saturating_sub(20_000);
        transport.drive(&|| handler.frames.load(Ordering::Acquire) >= floor, None);
    }
    transport.drive(&|| handler.frames.load(Ordering::Acquire) >= before + sent, None);
    let took = begin.elapsed().as_secs_f64();
    println!("queued frames, there and back {:8.0} /s", sent as f64 / took);

    transport.shutdown();
    for pid in [worker_pid, node_pid] {
        // SAFETY: waits for a child of this process.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    }
    let _ = std::fs::remove_dir_all(&directory);
}
