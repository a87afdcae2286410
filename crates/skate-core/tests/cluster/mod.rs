//! Transports that live in this process and find each other through a node, as processes would.

#![allow(dead_code, reason = "each of the tests that include it uses a part")]

pub(crate) mod wire;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use skate_core::transport::{
    Address, CloseReason, Config, Driven, Frame, Handler, Listener, PeerInfo, SendMode, StartError, Transport,
};
use skate_proto::handshake::Role;
use skate_proto::ids::ProcId;

pub(crate) const NODE: ProcId = ProcId(1);
pub(crate) const A: ProcId = ProcId(2);
pub(crate) const B: ProcId = ProcId(3);

/// Sender, kind, correlation and body.
pub(crate) type Recorded = (ProcId, u8, u64, Vec<u8>);

#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) transport: OnceLock<Weak<Transport>>,
    pub(crate) frames: Mutex<Vec<Recorded>>,
    pub(crate) count: AtomicUsize,
    pub(crate) fds: Mutex<Vec<Option<OwnedFd>>>,
    pub(crate) joined: Mutex<Vec<PeerInfo>>,
    pub(crate) closed: Mutex<Vec<(ProcId, String)>>,
    pub(crate) ready: Mutex<Vec<u64>>,
    pub(crate) unknown: Mutex<Vec<ProcId>>,
    pub(crate) warnings: AtomicUsize,
    pub(crate) warned: Mutex<Vec<String>>,
}

pub(crate) const ECHO: u8 = 40;
pub(crate) const COUNTED: u8 = 41;

impl Handler for Recorder {
    fn on_started(&self, transport: &Arc<Transport>) {
        let _ = self.transport.set(Arc::downgrade(transport));
    }
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, fd: Option<OwnedFd>) {
        if frame.kind == ECHO {
            let transport = self.transport.wait().upgrade().unwrap();
            return transport.send(from, COUNTED, frame.corr, &[frame.body], SendMode::Queue);
        }
        if frame.kind != COUNTED {
            self.frames.lock().push((from, frame.kind, frame.corr, frame.body.to_vec()));
        }
        if frame.flags != 0 {
            self.fds.lock().push(fd);
        }
        self.count.fetch_add(1, Ordering::Release);
    }
    fn on_batch_end(&self) {
        if let Some(transport) = self.transport.get().and_then(Weak::upgrade) {
            transport.wake();
        }
    }
    fn on_joined(&self, peer: PeerInfo) {
        self.joined.lock().push(peer);
    }
    fn on_closed(&self, peer: ProcId, reason: CloseReason) {
        self.closed.lock().push((peer, reason.to_string()));
    }
    fn on_unknown_node(&self, node: ProcId) {
        self.unknown.lock().push(node);
    }
    fn on_fd_ready(&self, token: u64) {
        self.ready.lock().push(token);
    }
    fn on_warning(&self, text: &str) {
        self.warned.lock().push(text.to_owned());
        self.warnings.fetch_add(1, Ordering::Release);
    }
}

impl Recorder {
    /// Why the connections with a peer ended.
    pub(crate) fn ends(&self, of: ProcId) -> Vec<String> {
        self.closed.lock().iter().filter(|(peer, _)| *peer == of).map(|(_, reason)| reason.clone()).collect()
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }
}

pub(crate) struct Process {
    pub(crate) transport: Arc<Transport>,
    pub(crate) handler: Arc<Recorder>,
}

impl Process {
    pub(crate) fn drive_until(&self, done: impl Fn(&Recorder) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match self.transport.drive(&|| done(&self.handler), Some(deadline)) {
                Driven::Done => return,
                Driven::Interrupted => {}
                other => panic!("{other:?}: {:?}", self.handler.closed.lock()),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.transport.shutdown();
    }
}

pub(crate) struct Cluster {
    pub(crate) directory: PathBuf,
    /// Where other nodes reach it.
    pub(crate) address: Address,
    pub(crate) node: Process,
}

pub(crate) fn config(me: ProcId, role: Role, address: Address, listeners: Vec<Listener>) -> Config {
    Config {
        me,
        role,
        python_minor: 12,
        session: [1; 16],
        token: [2; 32],
        node: NODE,
        node_address: address,
        tls: false,
        listeners,
        io_thread: true,
    }
}

pub(crate) fn start(config: Config) -> Result<Process, StartError> {
    let handler = Arc::new(Recorder::default());
    let transport = Transport::start(config, Arc::clone(&handler) as Arc<dyn Handler>)?;
    Ok(Process { transport, handler })
}

impl Cluster {
    pub(crate) fn new() -> Self {
        Self::of(NODE)
    }

    /// A node of a cluster of several.
    pub(crate) fn of(node: ProcId) -> Self {
        Self::with(node, |_| {})
    }

    /// The same in a cluster whose nodes use TLS.
    pub(crate) fn secured(node: ProcId) -> Self {
        Self::with(node, |config| config.tls = true)
    }

    pub(crate) fn with(node: ProcId, change: impl FnOnce(&mut Config)) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("skate-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("node.sock");
        let listener = Listener::bind_unix(&path).unwrap();
        let tcp = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.local_address().unwrap();
        let mut config = config(node, Role::Node, Address::Unix(path), vec![listener, tcp]);
        config.node = node;
        change(&mut config);
        Self { directory, address, node: start(config).unwrap() }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("node.sock")
    }

    pub(crate) fn config(&self, me: ProcId) -> Config {
        let mut config = config(me, Role::Worker, Address::Unix(self.path()), vec![]);
        config.node = self.node.transport.me().proc;
        config
    }

    pub(crate) fn join(&self, me: ProcId) -> Process {
        start(self.config(me)).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.node.transport.shutdown();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

pub(crate) fn wait_for(what: &str, test: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !test() {
        assert!(Instant::now() < until, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
