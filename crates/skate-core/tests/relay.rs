//! Nodes that nobody can connect to, reached through their head: between processes, and seen from the wire, where the
//! two who talk are plain sockets.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use skate_core::relay::{Limits, Relay, Statistics};
use skate_core::transport::{
    Address, Called, CloseReason, Frame, Handler, Listener, PeerInfo, SendMode, Stranger, Transport,
};
use skate_proto::call_back::CallBack;
use skate_proto::handshake::{ANSWER_LEN, HandshakeError, PREFACE_LEN, PROTOCOL_VERSION, Preface, Role};
use skate_proto::ids::ProcId;

mod cluster;
use cluster::*;

const HEAD: ProcId = ProcId(21);
const OUT: ProcId = ProcId(11);
const OUT_TOO: ProcId = ProcId(12);
const C: ProcId = ProcId(13);

/// What a head's handler does with strangers, without the messages between nodes that it takes.
struct Passing {
    relay: Relay,
    /// Which node is to call back for whom.
    ways: Mutex<HashMap<ProcId, Weak<Transport>>>,
    /// Strangers for whom there is no way, and their tickets.
    held: Mutex<Vec<(ProcId, u64)>>,
    warned: Mutex<Vec<String>>,
}

impl Handler for Passing {
    fn on_frame(&self, _: ProcId, _: Frame<'_>, _: Option<OwnedFd>) {}
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {}
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
    fn on_warning(&self, text: &str) {
        self.warned.lock().push(text.to_owned());
    }
    fn relays(&self) -> bool {
        true
    }
    fn on_stranger(&self, target: ProcId, stranger: Stranger) {
        let Some(ticket) = self.relay.hold(stranger) else { return };
        match self.ways.lock().get(&target).and_then(Weak::upgrade) {
            Some(node) => node.call_back(HEAD, ticket),
            None => self.held.lock().push((target, ticket)),
        }
    }
    fn on_called_back(&self, ticket: u64, called: Called) {
        self.relay.join(ticket, called);
    }
}

struct Head {
    transport: Arc<Transport>,
    passing: Arc<Passing>,
    address: Address,
}

impl Head {
    fn new(limits: Limits, tls: bool) -> Self {
        let passing = Arc::new(Passing {
            relay: Relay::new(limits).unwrap(),
            ways: Mutex::default(),
            held: Mutex::default(),
            warned: Mutex::default(),
        });
        let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_address().unwrap();
        let mut config = config(HEAD, Role::Node, address.clone(), vec![listener]);
        config.node = HEAD;
        config.tls = tls;
        let transport = Transport::start(config, Arc::clone(&passing) as Arc<dyn Handler>).unwrap();
        Self { transport, passing, address }
    }

    /// A node that listens nowhere, whose processes are `procs`.
    fn outbound(&self, node: ProcId, procs: &[ProcId], tls: bool) -> Cluster {
        let cluster = Cluster::with(node, |config| {
            config.listeners.truncate(1); // the Unix socket
            config.tls = tls;
        });
        cluster.node.transport.set_address(HEAD, self.address.clone());
        for proc in procs.iter().chain([&node]) {
            self.passing.ways.lock().insert(*proc, Arc::downgrade(&cluster.node.transport));
        }
        cluster
    }

    /// Makes a process know where another one lives.
    fn acquaint(&self, process: &Process, with: ProcId, on: ProcId) {
        process.transport.route(with, on);
        process.transport.set_address(on, self.address.clone());
    }

    fn port(&self) -> SocketAddr {
        match &self.address {
            Address::Tcp(address) => *address,
            Address::Unix(path) => panic!("{}", path.display()),
        }
    }

    /// Somebody who wants `target`.
    fn stranger(&self, target: ProcId) -> TcpStream {
        let preface = Preface { version: PROTOCOL_VERSION, session: [1; 16], target, tls: false };
        self.says(&preface.encode())
    }

    /// A node that calls back.
    fn call_back(&self, ticket: u64) -> TcpStream {
        self.says(&CallBack { version: PROTOCOL_VERSION, session: [1; 16], ticket }.encode())
    }

    fn says(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.port()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// The ticket of a stranger that has come for `target`.
    fn ticket(&self, target: ProcId) -> u64 {
        wait_for("a stranger", || self.passing.held.lock().iter().any(|(wanted, _)| *wanted == target));
        let mut held = self.passing.held.lock();
        let at = held.iter().position(|(wanted, _)| *wanted == target).unwrap();
        held.remove(at).1
    }

    /// Two plain sockets with the relay between them.
    fn pair(&self, target: ProcId) -> (TcpStream, TcpStream) {
        let stranger = self.stranger(target);
        let mut called = self.call_back(self.ticket(target));
        let mut preface = [0; PREFACE_LEN];
        called.read_exact(&mut preface).unwrap();
        assert_eq!(Preface::decode(&preface).unwrap().target, target, "the preface is passed on first");
        (stranger, called)
    }

    fn statistics(&self) -> Statistics {
        self.passing.relay.statistics()
    }

    fn wait_empty(&self) {
        wait_for("all connections to end", || {
            let Statistics { waiting, pairs, .. } = self.statistics();
            waiting + pairs == 0
        });
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        self.transport.shutdown();
    }
}

/// What a stranger was told instead of being passed on.
fn refusal_on(stream: &mut TcpStream) -> HandshakeError {
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "and then it was hung up");
    let known = [
        HandshakeError::UnknownTarget { target: B },
        HandshakeError::Session,
        HandshakeError::RelayFull,
        HandshakeError::NotCalledBack,
    ];
    let told = |error: &HandshakeError| error.refusal().unwrap() == answer;
    known.into_iter().find(told).unwrap_or_else(|| panic!("{answer:?}"))
}

#[test]
fn members_of_a_node_that_listens_nowhere_are_reached_and_reach_others() {
    for tls in [false, true] {
        let head = Head::new(Limits::default(), tls);
        let here = Cluster::with(NODE, |config| config.tls = tls);
        let there = head.outbound(OUT, &[B], tls);
        let (a, b) = (here.join(A), there.join(B));
        head.acquaint(&a, B, OUT);
        let sizes = [0, 1, 70_000, 1 << 20, 3];
        for n in 0..100 {
            a.transport.send(B, ECHO, n as u64, &[&vec![n as u8; sizes[n % sizes.len()]]], SendMode::Now);
            a.transport.send(B, 9, n as u64, &[&vec![n as u8; sizes[n % sizes.len()]]], SendMode::Queue);
        }
        b.drive_until(|h| h.count() == 100);
        a.drive_until(|h| h.count() == 100);
        for (n, (from, _, corr, body)) in b.handler.frames.lock().iter().enumerate() {
            assert_eq!((*from, *corr, body.len()), (A, n as u64, sizes[n % sizes.len()]));
        }
        assert_eq!(head.statistics().pairs, 1, "one connection serves both directions");
        // The other way nothing is passed on: it connects outwards.
        let c = here.join(C);
        b.transport.route(C, NODE);
        b.transport.set_address(NODE, here.address.clone());
        b.transport.send(C, 9, 7, &[b"outwards"], SendMode::Now);
        c.drive_until(|h| h.count() == 1);
        assert_eq!(head.statistics().pairs, 1);
        assert!(a.handler.closed.lock().is_empty() && b.handler.closed.lock().is_empty());
        drop(b);
        a.drive_until(|h| !h.ends(B).is_empty());
        assert!(a.handler.ends(B)[0].contains("closed the connection"), "{:?}", a.handler.ends(B));
        head.wait_empty();
    }
}

#[test]
fn a_node_that_listens_nowhere_is_itself_reached_by_other_nodes() {
    let head = Head::new(Limits::default(), true);
    let here = Cluster::secured(NODE);
    let there = head.outbound(OUT, &[], true);
    here.node.transport.set_address(OUT, head.address.clone());
    here.node.transport.send(OUT, ECHO, 1, &[b"from node to node"], SendMode::Now);
    here.node.drive_until(|h| h.count() == 1);
    assert_eq!(there.node.handler.joined.lock()[0].proc, NODE);
}

#[test]
fn two_nodes_that_listen_nowhere_reach_each_other_through_the_head() {
    let head = Head::new(Limits::default(), true);
    let one = head.outbound(OUT, &[A], true);
    let other = head.outbound(OUT_TOO, &[B], true);
    let (a, b) = (one.join(A), other.join(B));
    head.acquaint(&a, B, OUT_TOO);
    head.acquaint(&b, A, OUT);
    a.transport.send(B, ECHO, 1, &[b"x"], SendMode::Now);
    b.transport.send(A, ECHO, 1, &[b"y"], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    b.drive_until(|h| h.count() == 1);
}

#[test]
fn many_who_come_at_once_are_all_passed_on() {
    let head = Head::new(Limits::default(), false);
    let there = head.outbound(OUT, &[B], false);
    let b = there.join(B);
    let here = Cluster::new();
    let many = (100..160).map(|n| here.join(ProcId(n))).collect::<Vec<_>>();
    for process in &many {
        head.acquaint(process, B, OUT);
        process.transport.send(B, ECHO, 1, &[], SendMode::Now);
    }
    for process in &many {
        process.drive_until(|h| h.count() == 1);
    }
    assert_eq!((head.statistics().pairs, b.handler.joined.lock().len()), (60, 60));
    drop(many);
    head.wait_empty();
}

#[test]
fn who_is_nowhere_is_refused_in_words() {
    let head = Head::new(Limits::default(), false);
    let here = Cluster::new();
    let a = here.join(A);
    head.acquaint(&a, B, OUT);
    a.transport.send(B, 9, 1, &[], SendMode::Now);
    head.passing.relay.refuse(head.ticket(B), HandshakeError::UnknownTarget { target: B });
    a.drive_until(|h| !h.closed.lock().is_empty());
    assert!(a.handler.ends(B)[0].contains("does not know process"), "{:?}", a.handler.ends(B));
    assert_eq!(head.statistics(), Statistics::default());
}

#[test]
fn a_node_that_passes_nothing_on_refuses_as_before() {
    let here = Cluster::new();
    let Address::Tcp(port) = here.address else { panic!() };
    let mut wanting = TcpStream::connect(port).unwrap();
    let preface = Preface { version: PROTOCOL_VERSION, session: [1; 16], target: B, tls: false };
    wanting.write_all(&preface.encode()).unwrap();
    assert_eq!(refusal_on(&mut wanting), HandshakeError::UnknownTarget { target: B });
    let mut calling = TcpStream::connect(port).unwrap();
    calling.write_all(&CallBack { version: PROTOCOL_VERSION, session: [1; 16], ticket: 5 }.encode()).unwrap();
    assert_eq!(calling.read(&mut [0]).unwrap(), 0);
    assert!(here.node.handler.warned.lock()[0].contains("called back"));
}

#[test]
fn the_end_of_one_side_is_passed_on_and_the_other_may_go_on() {
    let head = Head::new(Limits::default(), false);
    let (mut one, mut other) = head.pair(B);
    one.write_all(b"my last words").unwrap();
    one.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    other.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"my last words");
    other.write_all(b"and mine").unwrap();
    let mut answer = [0; 8];
    one.read_exact(&mut answer).unwrap();
    assert_eq!((&answer, head.statistics().pairs), (b"and mine", 1));
    drop(other);
    assert_eq!(one.read(&mut [0]).unwrap(), 0);
    head.wait_empty();
}

/// Until nothing more fits anywhere on the way. Tells how much it was.
fn fill(stream: &mut TcpStream, pattern: impl Fn(usize) -> u8) -> usize {
    stream.set_nonblocking(true).unwrap();
    let (mut written, mut pauses) = (0, 0);
    while pauses < 50 {
        let chunk = (written..written + 65_536).map(&pattern).collect::<Vec<_>>();
        match stream.write(&chunk) {
            Ok(len) => (written, pauses) = (written + len, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(2)); // for the relay to take more, if it would
                pauses += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    written
}

#[test]
fn who_does_not_read_stops_the_other_side_and_nobody_else_and_loses_nothing() {
    let head = Head::new(Limits::default(), false);
    let (mut fast, mut slow) = head.pair(B);
    let pattern = |at: usize| (at % 251) as u8;
    let stuck = fill(&mut fast, pattern);
    assert!(stuck < 64 << 20, "{stuck} bytes were taken from a sender whose peer reads nothing");
    // Others, and the other direction, go on.
    let (mut one, mut other) = head.pair(C);
    one.write_all(b"hello").unwrap();
    let mut heard = [0; 5];
    other.read_exact(&mut heard).unwrap();
    slow.write_all(b"I am here").unwrap();
    fast.read_exact(&mut [0; 9]).unwrap();
    let rest = 8 << 20;
    let writer = std::thread::spawn(move || {
        fast.write_all(&(stuck..stuck + rest).map(pattern).collect::<Vec<_>>()).unwrap();
        fast.shutdown(Shutdown::Write).unwrap();
        fast
    });
    let mut all = Vec::new();
    slow.read_to_end(&mut all).unwrap();
    drop(writer.join().unwrap());
    assert_eq!(all.len(), stuck + rest);
    assert!(all.iter().enumerate().all(|(at, byte)| *byte == pattern(at)));
    assert!(head.statistics().bytes >= (stuck + rest) as u64);
    drop((slow, one, other));
    head.wait_empty();
}

#[test]
fn what_was_said_before_a_connection_broke_arrives_and_the_other_side_hears_an_end() {
    let limits = Limits { half_open: Duration::from_millis(200), ..Limits::default() };
    let head = Head::new(limits, false);
    let (mut one, mut other) = head.pair(B);
    other.write_all(b"nobody will read this").unwrap();
    wait_for("it to be there", || matches!(one.peek(&mut [0; 21]), Ok(21)));
    one.write_all(b"said before").unwrap();
    drop(one); // with unread bytes: the kernel resets the connection
    let mut heard = Vec::new();
    other.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"said before");
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while other.write_all(&[0; 1000]).is_ok() && head.statistics().pairs == 1 {
        assert!(std::time::Instant::now() < deadline, "nobody takes what nobody reads");
    }
    drop(other);
    head.wait_empty();
}

#[test]
fn a_connection_of_which_one_side_has_ended_and_the_other_is_silent_is_closed() {
    let limits = Limits { half_open: Duration::from_millis(200), ..Limits::default() };
    let head = Head::new(limits, false);
    let (one, mut other) = head.pair(B);
    one.shutdown(Shutdown::Write).unwrap();
    assert_eq!(other.read(&mut [0]).unwrap(), 0);
    head.wait_empty(); // although `other` keeps its socket
    drop(one);
}

#[test]
fn beyond_the_limit_a_stranger_is_refused_in_words_until_others_have_ended() {
    let head = Head::new(Limits { pairs: 2, ..Limits::default() }, false);
    let pair = head.pair(B);
    let waiting = head.stranger(C);
    let ticket = head.ticket(C);
    assert_eq!(refusal_on(&mut head.stranger(B)), HandshakeError::RelayFull);
    drop(pair);
    wait_for("the pair to end", || head.statistics().pairs == 0);
    let again = head.pair(B);
    drop((again, waiting));
    head.passing.relay.refuse(ticket, HandshakeError::NotCalledBack);
    head.wait_empty();
}

#[test]
fn a_stranger_for_whom_nobody_calls_back_in_time_is_refused_and_who_comes_late_is_closed() {
    let limits = Limits { call_back: Duration::from_millis(100), ..Limits::default() };
    let head = Head::new(limits, false);
    let mut stranger = head.stranger(B);
    let ticket = head.ticket(B);
    stranger.write_all(&[7; 48]).unwrap(); // its hello, which nobody reads
    assert_eq!(refusal_on(&mut stranger), HandshakeError::NotCalledBack);
    let mut late = head.call_back(ticket);
    assert_eq!(late.read(&mut [0]).unwrap(), 0);
    let mut guessed = head.call_back(ticket ^ 1);
    assert_eq!(guessed.read(&mut [0]).unwrap(), 0);
    assert_eq!((head.statistics().waiting, head.statistics().pairs), (0, 0));
}

#[test]
fn a_ticket_is_good_for_one_call() {
    let head = Head::new(Limits::default(), false);
    let mut stranger = head.stranger(B);
    let ticket = head.ticket(B);
    let mut first = head.call_back(ticket);
    first.read_exact(&mut [0; PREFACE_LEN]).unwrap();
    assert_eq!(head.call_back(ticket).read(&mut [0]).unwrap(), 0);
    stranger.write_all(b"still ours").unwrap();
    let mut heard = [0; 10];
    first.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still ours");
}

#[test]
fn a_caller_of_another_session_is_refused() {
    let head = Head::new(Limits::default(), false);
    let stranger = head.stranger(B);
    let ticket = head.ticket(B);
    let call = CallBack { version: PROTOCOL_VERSION, session: [9; 16], ticket };
    assert_eq!(refusal_on(&mut head.says(&call.encode())), HandshakeError::Session);
    assert_eq!(head.statistics().waiting, 1, "the ticket is still good");
    drop(stranger);
}

#[test]
fn shutting_down_closes_all_and_takes_nobody_any_more() {
    let head = Head::new(Limits::default(), false);
    let (mut one, mut other) = head.pair(B);
    let mut waiting = head.stranger(C);
    head.ticket(C);
    head.passing.relay.shutdown();
    for stream in [&mut one, &mut other, &mut waiting] {
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    }
    assert!(matches!(head.stranger(B).read(&mut [0]), Ok(0) | Err(_)));
    assert_eq!((head.statistics().waiting, head.statistics().pairs), (0, 0));
    head.passing.relay.shutdown();
}

#[test]
fn whom_a_member_wants_on_its_own_node_is_not_sought_elsewhere() {
    // The head's own members come by its Unix socket, and ask for others at their nodes' addresses.
    let limits = Limits::default();
    let passing = Arc::new(Passing {
        relay: Relay::new(limits).unwrap(),
        ways: Mutex::default(),
        held: Mutex::default(),
        warned: Mutex::default(),
    });
    let directory = std::env::temp_dir().join(format!("skate-relay-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("node.sock");
    let listener = Listener::bind_unix(&path).unwrap();
    let mut settings = config(HEAD, Role::Node, Address::Unix(path.clone()), vec![listener]);
    settings.node = HEAD;
    let head = Transport::start(settings, Arc::clone(&passing) as Arc<dyn Handler>).unwrap();
    let mut settings = config(A, Role::Worker, Address::Unix(path), vec![]);
    settings.node = HEAD;
    let a = start(settings).unwrap();
    a.transport.send(B, 9, 1, &[], SendMode::Now);
    a.drive_until(|h| !h.ends(B).is_empty());
    assert!(passing.held.lock().is_empty());
    head.shutdown();
    std::fs::remove_dir_all(directory).unwrap();
}

/// A child of the head's process must not keep connections alive that end in it.
#[test]
fn descriptors_of_the_relay_are_closed_on_exec() {
    let seen_by_a_child = || {
        let child = std::process::Command::new("ls").arg("/proc/self/fd").output().unwrap();
        String::from_utf8(child.stdout).unwrap()
    };
    let before = seen_by_a_child();
    let head = Head::new(Limits::default(), false);
    let pair = head.pair(B);
    assert_eq!(seen_by_a_child(), before);
    drop(pair);
}

#[test]
fn what_is_said_while_the_head_is_away_waits_for_the_next_one_wherever_it_is() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let former = Address::Tcp(nobody.local_addr().unwrap());
    drop(nobody);
    let here = Cluster::new();
    let (a, c) = (here.join(A), here.join(C));
    for process in [&a, &c] {
        process.transport.route(B, OUT);
        process.transport.set_address_of_head(OUT, former.clone());
        process.transport.send(B, 9, 1, &[b"early"], SendMode::Now);
    }
    // A node that listens itself is given up at once when nobody does.
    a.transport.route(ProcId(40), ProcId(41));
    a.transport.set_address(ProcId(41), former);
    a.transport.send(ProcId(40), 9, 1, &[], SendMode::Now);
    a.drive_until(|h| !h.ends(ProcId(40)).is_empty());
    let head = Head::new(Limits::default(), false);
    let there = head.outbound(OUT, &[B], false);
    let b = there.join(B);
    a.transport.set_address_of_head(OUT, head.address.clone());
    b.drive_until(|h| h.count() == 1);
    assert_eq!(b.handler.frames.lock()[0], (A, 9, 1, b"early".to_vec()));
    // Who is told that the node is lost waits no longer.
    c.transport.forget_node(OUT, "it did not come back");
    c.drive_until(|h| !h.ends(B).is_empty());
    assert!(c.handler.ends(B)[0].contains("did not come back"));
    assert!(a.handler.ends(B).is_empty());
}
