//! Several nodes, each with its members, within this process: who reaches whom over TCP, what is asked for, and how
//! it ends. What needs a network of its own is in `transport_alone.rs`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use skate_core::transport::{Address, DiscoverError, Listener, PeerInfo, SendMode, Transport, discover};
use skate_proto::frame::{FLAG_FD, Header};
use skate_proto::handshake::{
    ANSWER_LEN, Connector, Credentials, HELLO_LEN, HandshakeError, PREFACE_LEN, PROTOCOL_VERSION, Role, Step,
};
use skate_proto::ids::ProcId;

mod cluster;
use cluster::*;

const THERE: ProcId = ProcId(11);
/// A second process on the other node.
const C: ProcId = ProcId(12);

fn tcp(address: &Address) -> SocketAddr {
    match address {
        Address::Tcp(address) => *address,
        Address::Unix(path) => panic!("{}", path.display()),
    }
}

/// Where nobody listens.
fn nowhere() -> Address {
    Listening::new().address
}

/// A port that accepts nothing by itself.
struct Listening {
    listener: TcpListener,
    address: Address,
}

impl Listening {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        Self { listener, address }
    }

    /// Accepts one connection, reads what a connector says first, and leaves the rest to `act`.
    fn answer(self, act: impl FnOnce(TcpStream) + Send + 'static) -> (String, std::thread::JoinHandle<()>) {
        let address = self.address.to_string();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = self.listener.accept().unwrap();
            stream.read_exact(&mut [0; PREFACE_LEN + HELLO_LEN]).unwrap();
            act(stream);
        });
        (address, thread)
    }
}

/// Two nodes with a member on each; the second one's address is `there.address`.
struct Two {
    a: Process,
    b: Process,
    here: Cluster,
    there: Cluster,
}

impl Two {
    fn new() -> Self {
        let (here, there) = (Cluster::new(), Cluster::of(THERE));
        Self { a: here.join(A), b: there.join(B), here, there }
    }

    fn acquainted() -> Self {
        let two = Self::new();
        two.a.transport.route(B, THERE);
        two.a.transport.set_address(THERE, two.there.address.clone());
        two
    }
}

#[test]
fn a_process_on_another_node_is_reached_through_that_node_s_port() {
    let two = Two::new();
    let c = two.there.join(C);
    two.a.transport.route(B, THERE);
    two.a.transport.route(C, THERE);
    for corr in 0..500 {
        let mode = if corr % 3 == 0 { SendMode::Now } else { SendMode::Queue };
        two.a.transport.send(B, 9, corr, &[&corr.to_le_bytes()], mode);
    }
    two.a.transport.send(C, 9, 7, &[], SendMode::Now);
    two.a.drive_until(|h| !h.unknown.lock().is_empty());
    two.a.transport.set_address(THERE, two.there.address.clone());
    two.b.drive_until(|h| h.count() == 500);
    let corrs: Vec<u64> = two.b.handler.frames.lock().iter().map(|frame| frame.2).collect();
    assert_eq!(corrs, (0..500).collect::<Vec<_>>());
    c.drive_until(|h| h.count() == 1);
    assert_eq!(*two.a.handler.unknown.lock(), [THERE], "asked once for both");
    // Back on the same connection, of which the other side was told nothing.
    two.b.transport.send(A, 10, 5, &[b"back"], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    assert_eq!(two.a.transport.peer_info(B).unwrap().role, Role::Worker);
    assert_eq!(two.b.handler.joined.lock().iter().map(|peer| peer.proc).collect::<Vec<_>>(), [A]);
    // The nodes only passed the connections on, and none of them ended.
    assert!(two.here.node.handler.joined.lock().iter().all(|peer| peer.proc == A));
    assert!(two.there.node.handler.joined.lock().iter().all(|peer| peer.proc != A));
    assert!(two.a.handler.closed.lock().is_empty());
    assert_eq!(two.a.transport.known_routes(), (2, 1));
}

#[test]
fn the_end_of_a_process_on_another_node_is_told_and_its_route_dropped() {
    let two = Two::acquainted();
    let Two { a, b, here: _here, there: _there } = two;
    a.transport.send(B, ECHO, 1, &[b"x"], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    b.transport.send(A, COUNTED, 2, &[], SendMode::Now);
    drop(b);
    a.drive_until(|h| !h.closed.lock().is_empty());
    assert_eq!((a.handler.count(), a.handler.ends(B).len()), (2, 1), "its last words came first");
    assert_eq!(a.transport.known_routes(), (0, 1));
}

#[test]
fn a_process_that_ended_is_refused_by_its_node() {
    let two = Two::acquainted();
    two.a.transport.route(C, THERE);
    two.a.transport.send(C, 9, 1, &[], SendMode::Now);
    two.a.drive_until(|h| !h.closed.lock().is_empty());
    assert!(two.a.handler.ends(C)[0].contains("does not know process"), "{:?}", two.a.handler.ends(C));
}

#[test]
fn what_waits_for_a_node_fails_with_the_cause_when_it_is_forgotten_and_so_does_what_comes_later() {
    let two = Two::new();
    for proc in [B, C] {
        two.a.transport.route(proc, THERE);
        two.a.transport.send(proc, 9, 1, &[], SendMode::Now);
    }
    two.a.drive_until(|h| !h.unknown.lock().is_empty());
    assert!(two.a.handler.closed.lock().is_empty());
    two.a.transport.forget_node(THERE, "its machine was switched off");
    two.a.drive_until(|h| h.closed.lock().len() == 2);
    for proc in [B, C] {
        assert!(two.a.handler.ends(proc)[0].contains("its machine was switched off"));
    }
    two.a.transport.send(B, 9, 2, &[], SendMode::Now);
    two.a.drive_until(|h| h.ends(B).len() == 2);
    assert!(two.a.handler.ends(B)[1].contains("its machine was switched off"));
    assert_eq!(*two.a.handler.unknown.lock(), [THERE], "nobody is asked for what is known");
    // It was a mistake.
    two.a.transport.set_address(THERE, two.there.address.clone());
    two.a.transport.send(B, 9, 3, &[], SendMode::Now);
    two.b.drive_until(|h| h.count() == 1);
    assert_eq!(two.b.handler.frames.lock()[0].2, 3);
}

#[test]
fn connections_end_with_their_node_also_while_they_are_being_made() {
    let two = Two::acquainted();
    two.a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    let silent = Listening::new();
    let node = ProcId(21);
    two.a.transport.route(C, node);
    two.a.transport.set_address(node, silent.address.clone());
    two.a.transport.send(C, 9, 1, &[], SendMode::Now);
    let (mut greeted, _) = silent.listener.accept().unwrap();
    greeted.read_exact(&mut [0; PREFACE_LEN]).unwrap();
    two.a.transport.forget_node(node, "it left");
    two.a.transport.forget_node(THERE, "it left as well");
    two.a.drive_until(|h| !h.closed.lock().is_empty());
    assert!(two.a.handler.ends(C)[0].contains("it left"));
    two.a.drive_until(|h| !h.ends(B).is_empty());
    assert!(two.a.handler.ends(B)[0].contains("it left as well"));
}

/// Slow: it waits for the deadline of handshakes, 5 s.
#[test]
fn a_node_about_which_nobody_answers_is_given_up_and_asked_for_again() {
    let two = Two::new();
    two.a.transport.route(B, THERE);
    two.a.transport.send(B, 9, 1, &[], SendMode::Now);
    two.a.drive_until(|h| !h.closed.lock().is_empty());
    assert!(two.a.handler.ends(B)[0].contains("was not learned"));
    assert_eq!(*two.a.handler.unknown.lock(), [THERE]);
    two.a.transport.send(B, 9, 2, &[], SendMode::Now);
    two.a.drive_until(|h| h.unknown.lock().len() == 2);
    two.a.transport.set_address(THERE, two.there.address.clone());
    two.b.drive_until(|h| h.count() == 1);
}

#[test]
fn a_refused_connection_is_noticed_at_once_and_names_the_address() {
    let two = Two::new();
    let address = nowhere();
    two.a.transport.route(B, THERE);
    two.a.transport.set_address(THERE, address.clone());
    two.a.transport.send(B, 9, 1, &[], SendMode::Now);
    two.a.drive_until(|h| !h.closed.lock().is_empty());
    let reason = &two.a.handler.ends(B)[0];
    assert!(reason.contains(&address.to_string()) && reason.contains("refused"), "{reason}");
}

/// A peer that connected by TCP, knows the token, and is then free to misbehave.
fn raw_peer(cluster: &Cluster, me: ProcId, target: ProcId) -> Result<TcpStream, HandshakeError> {
    let mut stream = TcpStream::connect(tcp(&cluster.address)).unwrap();
    let me = PeerInfo { proc: me, role: Role::Tool, pid: 1, python_minor: 0 };
    let credentials = Credentials { session: [1; 16], token: [2; 32] };
    let (mut connector, first) = Connector::new(&me, &credentials, target, [3; 32]);
    stream.write_all(&first).unwrap();
    loop {
        let mut message = vec![0; connector.wants()];
        stream.read_exact(&mut message).unwrap();
        match connector.handle(&message)? {
            Step::Send(bytes) => stream.write_all(&bytes).unwrap(),
            Step::Done { .. } => return Ok(stream),
        }
    }
}

#[test]
fn a_reset_connection_is_noticed_at_once() {
    let there = Cluster::of(THERE);
    let b = there.join(B);
    let stream = raw_peer(&there, A, B).unwrap();
    wait_for("the joining", || !b.handler.joined.lock().is_empty());
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: `linger` is what this option takes.
    let set = unsafe {
        let (value, size) = (std::ptr::from_ref(&linger).cast(), size_of::<libc::linger>() as u32);
        libc::setsockopt(std::os::fd::AsRawFd::as_raw_fd(&stream), libc::SOL_SOCKET, libc::SO_LINGER, value, size)
    };
    assert_eq!(set, 0);
    drop(stream);
    b.drive_until(|h| !h.closed.lock().is_empty());
    assert!(b.handler.ends(A)[0].contains("reset"), "{:?}", b.handler.ends(A));
}

#[test]
fn a_descriptor_that_a_peer_claims_to_send_over_tcp_breaks_the_protocol() {
    let there = Cluster::of(THERE);
    let b = there.join(B);
    for target in [THERE, B] {
        let mut stream = raw_peer(&there, A, target).unwrap();
        stream.write_all(&Header { body_len: 0, kind: 9, flags: FLAG_FD, corr: 0 }.encode()).unwrap();
        let handler = if target == B { &b.handler } else { &there.node.handler };
        wait_for("the breach", || !handler.closed.lock().is_empty());
        assert!(handler.ends(A)[0].contains("descriptors"));
        assert_eq!((handler.count(), stream.read(&mut [0; 1]).unwrap_or(0)), (0, 0));
    }
}

#[test]
fn a_descriptor_of_ours_is_never_sent_to_another_node() {
    let two = Two::acquainted();
    let (reader, _writer) = std::io::pipe().unwrap();
    let refuses = |to: &Transport, proc| {
        let sent = catch_unwind(AssertUnwindSafe(|| to.send_fd(proc, 9, 1, &[], reader.as_fd())));
        let text = *sent.expect_err("it panics").downcast::<String>().unwrap();
        assert!(text.contains("on another node"), "{text}");
    };
    refuses(&two.a.transport, B);
    two.a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    refuses(&two.a.transport, B);
    refuses(&two.b.transport, A);
    two.here.node.transport.set_address(THERE, two.there.address.clone());
    refuses(&two.here.node.transport, THERE);
    // Nothing of it went out, and the connections serve on.
    two.a.transport.send(B, ECHO, 2, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 2);
}

#[test]
fn nodes_connect_to_each_other_and_see_each_other_leave() {
    let (here, there) = (Cluster::new(), Cluster::of(THERE));
    here.node.transport.set_address(THERE, there.address.clone());
    here.node.transport.send(THERE, ECHO, 1, &[b"hello"], SendMode::Now);
    here.node.drive_until(|h| h.count() == 1);
    let joined = there.node.handler.joined.lock().clone();
    assert_eq!(joined.iter().map(|peer| (peer.proc, peer.role)).collect::<Vec<_>>(), [(NODE, Role::Node)]);
    there.node.transport.send(NODE, 9, 2, &[], SendMode::Now);
    here.node.drive_until(|h| h.count() == 2);
    here.node.transport.shutdown();
    there.node.drive_until(|h| !h.closed.lock().is_empty());
    assert_eq!(there.node.handler.ends(NODE).len(), 1);
}

#[test]
fn a_node_connects_to_no_member_and_to_no_node_that_is_not_known() {
    let two = Two::new();
    let node = &two.here.node;
    for unknown in [ProcId(77), B, THERE] {
        node.transport.route(unknown, THERE);
        node.transport.send(unknown, 9, 1, &[], SendMode::Now);
        node.drive_until(|h| !h.ends(unknown).is_empty());
        assert!(node.handler.ends(unknown)[0].contains("does not know"));
    }
    assert!(node.handler.unknown.lock().is_empty());
    node.transport.forget_node(THERE, "it was drained");
    node.transport.send(THERE, 9, 1, &[], SendMode::Now);
    node.drive_until(|h| h.ends(THERE).len() == 2);
    assert!(node.handler.ends(THERE)[1].contains("it was drained"));
}

#[test]
fn no_connection_is_passed_to_another_node() {
    let (here, there) = (Cluster::new(), Cluster::of(THERE));
    here.node.transport.set_address(THERE, there.address.clone());
    here.node.transport.send(THERE, ECHO, 1, &[], SendMode::Now);
    here.node.drive_until(|h| h.count() == 1);
    for (cluster, wanted) in [(&there, NODE), (&here, THERE)] {
        assert_eq!(raw_peer(cluster, C, wanted).unwrap_err(), HandshakeError::UnknownTarget { target: wanted });
    }
    here.node.transport.send(THERE, ECHO, 2, &[], SendMode::Now);
    here.node.drive_until(|h| h.count() == 2);
}

#[test]
fn a_port_is_found_again_although_connections_of_its_former_owner_linger() {
    let there = Cluster::of(THERE);
    let address = tcp(&there.address);
    let mut stream = raw_peer(&there, A, THERE).unwrap();
    there.node.transport.shutdown();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    let again = Listener::bind_tcp(address).unwrap();
    assert_eq!(again.local_address().unwrap(), there.address);
}

// ---- discovering

const TOKEN: [u8; 32] = [2; 32];

fn ask(address: &str, token: [u8; 32]) -> Result<PeerInfo, DiscoverError> {
    let found = discover(address, token, 12, None, Instant::now() + Duration::from_secs(20))?;
    assert!(!found.tls);
    Ok(found.node)
}

/// A node of a cluster whose session follows from its token.
fn listening_node() -> (Process, Address) {
    let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let mut config = config(THERE, Role::Node, address.clone(), vec![listener]);
    config.node = THERE;
    config.session = Credentials::of_cluster(TOKEN).session;
    (start(config).unwrap(), address)
}

#[test]
fn who_listens_is_learned_without_its_noticing() {
    let (node, address) = listening_node();
    let found = ask(&address.to_string(), TOKEN).unwrap();
    assert_eq!((found.proc, found.role, found.pid), (THERE, Role::Node, std::process::id()));
    // A host's name serves as well, although it may have an address where nobody listens.
    assert_eq!(ask(&format!("localhost:{}", tcp(&address).port()), TOKEN).unwrap().proc, THERE);
    let error = ask(&address.to_string(), [3; 32]).unwrap_err();
    assert!(matches!(error, DiscoverError::Token { .. }), "{error}");
    assert!(error.to_string().contains("the token is not this cluster's"));
    assert!(node.handler.joined.lock().is_empty() && node.handler.closed.lock().is_empty());
}

#[test]
fn a_node_that_knows_another_token_of_the_same_session_is_not_believed() {
    // As whoever pretends to be a node would: it has seen the session, and does not know the token.
    let (address, thread) = Listening::new().answer(|mut stream| {
        let mut answer = [0; ANSWER_LEN];
        answer[0] = 1;
        stream.write_all(&answer).unwrap();
    });
    let error = ask(&address, TOKEN).unwrap_err();
    assert!(matches!(error, DiscoverError::Token { .. }), "{error}");
    thread.join().unwrap();
}

#[test]
fn discovering_says_what_is_wrong_with_the_address() {
    let address = nowhere().to_string();
    let refused = ask(&address, TOKEN).unwrap_err();
    assert!(matches!(refused, DiscoverError::Unreachable { .. }), "{refused}");
    assert!(refused.to_string().contains("refused") && refused.to_string().contains(&address), "{refused}");
    let malformed = ask("somewhere", TOKEN).unwrap_err();
    assert!(malformed.to_string().contains("\"somewhere\" is not of the form host:port"), "{malformed}");
    let unknown = ask("no-such-host.invalid:1", TOKEN).unwrap_err();
    assert!(unknown.to_string().contains("no-such-host.invalid:1 is not known"), "{unknown}");
    let silent = Listening::new();
    let deadline = Instant::now() + Duration::from_millis(50);
    let timeout = discover(&silent.address.to_string(), TOKEN, 12, None, deadline).unwrap_err();
    assert!(matches!(timeout, DiscoverError::Timeout { .. }), "{timeout}");
    assert!(timeout.to_string().contains(&silent.address.to_string()));
}

#[test]
fn discovering_says_what_is_wrong_with_who_answers() {
    type Act = fn(TcpStream);
    let garbage: [(Act, &str); 3] = [
        (|mut stream| stream.write_all(&[b'H'; ANSWER_LEN]).unwrap(), "its answer means nothing"),
        (|mut stream| stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap(), "without an answer"),
        (drop, "without an answer"),
    ];
    for (act, said) in garbage {
        let (address, thread) = Listening::new().answer(act);
        let error = ask(&address, TOKEN).unwrap_err().to_string();
        assert!(error.contains("is not a Skate node") && error.contains(said) && error.contains(&address), "{error}");
        thread.join().unwrap();
    }
    let (address, thread) = Listening::new().answer(|mut stream| {
        let mut refusal = HandshakeError::Version { ours: 0, theirs: 0 }.refusal().unwrap();
        refusal[2..4].copy_from_slice(&900_u16.to_le_bytes());
        stream.write_all(&refusal).unwrap();
    });
    let error = ask(&address, TOKEN).unwrap_err().to_string();
    let both = [format!("version 900 and this process version {PROTOCOL_VERSION}"), address];
    assert!(both.iter().all(|text| error.contains(text)), "{error}");
    thread.join().unwrap();
}
