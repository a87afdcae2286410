//! Connections between nodes within TLS: who gets in, what is said on both sides when somebody does not, what is on the
//! wire, and that everything else is as without it. Whoever looks on, changes or repeats bytes is a [`Wire`] between.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proptest::prelude::*;

use skate_core::transport::{Address, BACKLOG_BYTES_MAX, DiscoverError, Found, Listener, PeerInfo, SendMode, discover};
use skate_proto::handshake::{
    ANSWER_LEN, Connector, Credentials, HELLO_LEN, HandshakeError, PREFACE_LEN, PROTOCOL_VERSION, Preface, Role,
};
use skate_proto::ids::ProcId;

mod cluster;
use cluster::wire::{Wire, relay, tcp};
use cluster::*;

const THERE: ProcId = ProcId(11);
const C: ProcId = ProcId(12);

/// Two nodes with a member on each, which know of each other; the way from `a` to `b` may lead elsewhere.
struct Two {
    a: Process,
    b: Process,
    here: Cluster,
    there: Cluster,
}

impl Two {
    fn new() -> Self {
        Self::of(Cluster::secured(NODE), Cluster::secured(THERE))
    }

    fn of(here: Cluster, there: Cluster) -> Self {
        let two = Self { a: here.join(A), b: there.join(B), here, there };
        two.a.transport.route(B, THERE);
        two.leads_to(two.there.address.clone());
        two
    }

    fn leads_to(&self, address: Address) {
        self.a.transport.set_address(THERE, address);
    }
}

#[test]
fn frames_of_all_sizes_keep_their_order_in_both_directions() {
    let two = Two::new();
    let sizes = [0, 1, 47, 16_384, 16_385, 70_000, 1 << 20, 3];
    let body = |n: usize| vec![n as u8; sizes[n % sizes.len()]];
    for n in 0..200 {
        let mode = if n % 3 == 0 { SendMode::Now } else { SendMode::Queue };
        let body = body(n);
        let (head, tail) = body.split_at(body.len() / 3);
        two.a.transport.send(B, ECHO, n as u64, &[head, tail], mode);
        two.a.transport.send(B, 9, n as u64, &[&body], mode);
    }
    two.b.drive_until(|h| h.count() == 200);
    two.a.drive_until(|h| h.count() == 200);
    for (n, (from, kind, corr, got)) in two.b.handler.frames.lock().iter().enumerate() {
        assert_eq!((*from, *kind, *corr), (A, 9, n as u64));
        assert!(*got == body(n));
    }
    assert_eq!(two.b.handler.joined.lock().iter().map(|peer| peer.proc).collect::<Vec<_>>(), [A]);
    assert!(two.a.handler.closed.lock().is_empty() && two.b.handler.closed.lock().is_empty());
    assert_eq!(two.a.transport.backlog(B), 0);
}

#[test]
fn nothing_that_is_said_between_nodes_can_be_read_on_the_wire() {
    const SECRET: &[u8] = b"the launch code is twelve";
    for secured in [true, false] {
        let cluster = |node| if secured { Cluster::secured(node) } else { Cluster::of(node) };
        let two = Two::of(cluster(NODE), cluster(THERE));
        let wire = Wire::to(&two.there.address, |_, _| {});
        two.leads_to(wire.address.clone());
        two.a.transport.send(B, ECHO, 1, &[SECRET], SendMode::Now);
        two.a.drive_until(|h| h.count() == 1);
        two.b.transport.send(A, 9, 2, &[&SECRET.repeat(10_000)], SendMode::Now);
        two.a.drive_until(|h| h.count() == 2);
        assert_eq!(wire.has_seen(SECRET), !secured, "the same relay sees it without TLS");
        assert!(wire.has_seen(&B.0.to_le_bytes()), "the preface is for the node");
        drop(two);
        wire.accepting.join().unwrap();
    }
}

#[test]
fn the_largest_frames_pass_both_ways_at_once() {
    let two = Two::new();
    let body: Vec<u8> = (0..64 << 20).map(|i| (i % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| two.a.transport.send(B, 9, 1, &[&body[..100], &body[100..]], SendMode::Now));
        scope.spawn(|| {
            wait_for("the connection", || two.b.transport.peer_info(A).is_some());
            two.b.transport.send(A, 9, 1, &[&body], SendMode::Now);
        });
    });
    for process in [&two.a, &two.b] {
        process.drive_until(|h| h.count() == 1);
        assert!(process.handler.frames.lock()[0].3 == body);
        assert!(process.handler.closed.lock().is_empty());
    }
}

#[test]
fn many_threads_send_at_once_and_lose_nothing() {
    let two = Two::new();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let transport = &two.a.transport;
            scope.spawn(move || {
                for n in 0..500 {
                    let body = vec![thread as u8; (n as usize * 37) % 5000];
                    let mode = if n % 2 == 0 { SendMode::Now } else { SendMode::Queue };
                    transport.send(B, ECHO, thread << 32 | n, &[&body], mode);
                    transport.send(B, 9, thread << 32 | n, &[&body], mode);
                }
            });
        }
    });
    two.b.drive_until(|h| h.count() == 2000);
    two.a.drive_until(|h| h.count() == 2000);
    let frames = two.b.handler.frames.lock();
    for thread in 0..4 {
        let of_thread = frames.iter().filter(|frame| frame.2 >> 32 == thread);
        assert!(of_thread.map(|frame| frame.2 & 0xffff_ffff).eq(0..500), "in the order of their thread");
    }
}

// ---- who reads slowly, or not at all

/// A process that speaks TLS and the handshake by itself cannot be made here without a transport; one that does not
/// read is one whose way is held up.
fn held_up(node: &Address) -> (Address, Arc<Mutex<()>>, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, node) = (Address::Tcp(listener.local_addr().unwrap()), tcp(node));
    let gate = Arc::<Mutex<()>>::default();
    let passes = Arc::clone(&gate);
    let thread = std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = TcpStream::connect(node).unwrap();
        let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let nobody = Mutex::default();
        let back = std::thread::spawn(move || relay(back_from, back_to, &Mutex::default(), &|_, _| {}));
        relay(near, far, &nobody, &|_, _| drop(passes.lock()));
        back.join().unwrap();
    });
    (address, gate, thread)
}

#[test]
fn what_a_slow_peer_has_not_read_is_counted_and_arrives_when_it_reads() {
    let two = Two::new();
    let (address, gate, thread) = held_up(&two.there.address);
    two.leads_to(address);
    two.a.transport.send(B, ECHO, 0, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    let held = gate.lock();
    let body = vec![5; 100_000];
    let mut sent = 0;
    while two.a.transport.backlog(B) < 10 << 20 {
        sent += 1;
        let mode = if sent % 2 == 0 { SendMode::Now } else { SendMode::Queue };
        two.a.transport.send(B, 9, sent, &[&body], mode);
        assert!(sent < 10_000, "a socket's buffers are smaller");
    }
    drop(held);
    two.a.drive_until(|_| two.a.transport.backlog(B) == 0);
    two.b.drive_until(|h| h.count() == sent as usize);
    assert!(two.b.handler.frames.lock().iter().map(|frame| frame.2).eq(1..=sent));
    drop(two);
    thread.join().unwrap();
}

#[test]
fn a_peer_that_stops_reading_costs_a_bounded_buffer() {
    let two = Two::new();
    let (address, gate, thread) = held_up(&two.there.address);
    two.leads_to(address);
    two.a.transport.send(B, ECHO, 0, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    let held = gate.lock();
    let body = vec![5; 4 << 20];
    let mut most = 0;
    for corr in 0..100 {
        two.a.transport.send(B, 9, corr, &[&body], SendMode::Now);
        most = most.max(two.a.transport.backlog(B));
    }
    two.a.drive_until(|h| !h.ends(B).is_empty());
    assert!(two.a.handler.ends(B)[0].contains("does not read"), "{:?}", two.a.handler.ends(B));
    assert!(most > BACKLOG_BYTES_MAX / 2 && most < BACKLOG_BYTES_MAX + (5 << 20), "{most}");
    drop(held);
    drop(two);
    thread.join().unwrap();
}

// ---- who is let in

#[test]
fn a_process_without_tls_and_a_cluster_with_it_refuse_each_other_in_words() {
    for (here, there) in [(false, true), (true, false)] {
        let cluster = |node, tls| if tls { Cluster::secured(node) } else { Cluster::of(node) };
        let two = Two::of(cluster(NODE, here), cluster(THERE, there));
        let words = if there { "the cluster's nodes use TLS, and" } else { "uses TLS, and the cluster's nodes do not" };
        for (from, to, at) in [(&two.a, B, &two.b), (&two.here.node, THERE, &two.there.node)] {
            from.transport.set_address(THERE, two.there.address.clone());
            from.transport.send(to, 9, 1, &[b"secret"], SendMode::Now);
            from.drive_until(|h| !h.ends(to).is_empty());
            assert!(from.handler.ends(to)[0].contains(words), "{:?}", from.handler.ends(to));
            wait_for("the warning", || at.handler.warned.lock().iter().any(|text| text.contains(words)));
            assert!(at.handler.joined.lock().iter().all(|peer| peer.role != Role::Node && peer.proc != A));
            assert_eq!(at.handler.count(), 0);
        }
    }
}

#[test]
fn another_token_of_the_same_session_is_refused_by_both_sides_before_anything_is_said() {
    // The connector sees the certificate of the acceptor first, so it is the one that complains.
    let there = Cluster::with(THERE, |config| (config.tls, config.token) = (true, [9; 32]));
    let here = Cluster::secured(NODE);
    here.node.transport.set_address(THERE, there.address.clone());
    here.node.transport.send(THERE, 9, 1, &[], SendMode::Now);
    here.node.drive_until(|h| !h.ends(THERE).is_empty());
    let reason = &here.node.handler.ends(THERE)[0];
    assert!(reason.contains("no certificate of this cluster") && reason.contains("token"), "{reason}");
    wait_for("the warning", || !there.node.handler.warned.lock().is_empty());
    let warned = there.node.handler.warned.lock()[0].clone();
    assert!(warned.contains("does not accept this process's certificate"), "{warned}");
    assert!(there.node.handler.joined.lock().is_empty());
}

#[test]
fn members_need_no_switch_and_a_connection_on_one_machine_stays_in_clear() {
    let two = Two::new();
    assert!(two.a.transport.nodes_use_tls() && two.b.transport.nodes_use_tls());
    let c = two.here.join(C);
    // A descriptor can be sent, which within TLS it could not.
    let (reader, mut writer) = std::io::pipe().unwrap();
    two.a.transport.send_fd(C, 9, 1, &[], reader.as_fd());
    c.drive_until(|h| h.fds.lock().len() == 1);
    writer.write_all(b"x").unwrap();
    drop(writer);
    let mut text = String::new();
    std::fs::File::from(c.handler.fds.lock().pop().unwrap().unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "x");
    two.a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    let refused = catch_unwind(AssertUnwindSafe(|| two.a.transport.send_fd(B, 9, 1, &[], reader.as_fd())));
    assert!(refused.is_err());
    let plain = Cluster::of(ProcId(77));
    assert!(!plain.join(ProcId(78)).transport.nodes_use_tls());
}

// ---- what somebody between them may do

#[test]
fn a_changed_record_ends_the_connection_and_nothing_of_it_is_taken() {
    for at in [PREFACE_LEN + 20, PREFACE_LEN + 3000] {
        let two = Two::new();
        // Beyond the greeting when the frames are long; within the first record of TLS otherwise.
        let tamper = move |before: usize, bytes: &mut [u8]| {
            if (before..before + bytes.len()).contains(&at) {
                bytes[at - before] ^= 1;
            }
        };
        let wire = Wire::to(&two.there.address, tamper);
        two.leads_to(wire.address.clone());
        two.a.transport.send(B, 9, 1, &[&[3; 40_000]], SendMode::Now);
        two.a.drive_until(|h| !h.ends(B).is_empty());
        assert_eq!(two.b.handler.count(), 0);
        assert!(two.b.handler.frames.lock().is_empty());
        drop(two);
        wire.accepting.join().unwrap();
    }
}

#[test]
fn a_connection_that_is_cut_in_a_record_is_an_end_after_what_was_whole() {
    let two = Two::new();
    let wire = Wire::to(&two.there.address, |_, _| {});
    two.leads_to(wire.address.clone());
    for corr in 0..20 {
        two.a.transport.send(B, 9, corr, &[&[corr as u8; 30_000]], SendMode::Now);
    }
    two.b.drive_until(|h| h.count() == 20);
    let seen = std::mem::take(&mut *wire.seen.lock());
    drop(two);
    wire.accepting.join().unwrap();
    // The same bytes once more, as somebody who kept them would send them, and cut.
    let two = Two::new();
    let mut stream = TcpStream::connect(tcp(&two.there.address)).unwrap();
    let _ = stream.write_all(&seen[..seen.len() - 100]);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
    assert_eq!(two.b.handler.count(), 0, "what was said once is not heard again");
    assert!(two.b.handler.joined.lock().is_empty());
}

#[test]
fn a_peer_that_ends_is_noticed_and_its_last_words_come_first() {
    let two = Two::new();
    two.a.transport.send(B, ECHO, 1, &[b"x"], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
    let Two { a, b, here: _here, there: _there } = two;
    b.transport.send(A, COUNTED, 2, &[&[1; 300_000]], SendMode::Now);
    wait_for("the writing", || b.transport.backlog(A) == 0);
    drop(b);
    a.drive_until(|h| !h.closed.lock().is_empty());
    assert_eq!((a.handler.count(), a.handler.ends(B).len()), (2, 1));
    assert!(a.handler.ends(B)[0].contains("its process has probably ended"));
}

/// Says the preface of a connection to be secured, and then `said`; what comes back.
fn strange(cluster: &Cluster, target: ProcId, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(tcp(&cluster.address)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let preface = Preface { version: PROTOCOL_VERSION, session: [1; 16], target, tls: true };
    let _ = stream.write_all(&preface.encode());
    let _ = stream.write_all(said);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    answer
}

#[test]
fn whoever_has_no_certificate_gets_nowhere_even_if_it_knows_how_to_shake_hands() {
    let two = Two::new();
    // The handshake in clear, after a preface that promises TLS.
    let me = PeerInfo { proc: C, role: Role::Tool, pid: 1, python_minor: 0 };
    let credentials = Credentials { session: [1; 16], token: [2; 32] };
    let (_, first) = Connector::over_tls(&me, &credentials, B, [3; 32]);
    strange(&two.there, B, &first[PREFACE_LEN..]);
    // A plain preface that tells the truth is refused in words, before any proof.
    let mut stream = TcpStream::connect(tcp(&two.there.address)).unwrap();
    let (mut connector, first) = Connector::new(&me, &credentials, B, [3; 32]);
    stream.write_all(&first).unwrap();
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(connector.handle(&answer), Err(HandshakeError::TlsMissing));
    assert!(two.b.handler.joined.lock().is_empty());
    // Everybody else is served as before.
    two.a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    two.a.drive_until(|h| h.count() == 1);
}

#[test]
fn an_announcement_of_tls_on_one_machine_is_refused() {
    let cluster = Cluster::secured(NODE);
    let mut stream = std::os::unix::net::UnixStream::connect(cluster.path()).unwrap();
    let me = PeerInfo { proc: C, role: Role::Tool, pid: 1, python_minor: 0 };
    let credentials = Credentials { session: [1; 16], token: [2; 32] };
    let (mut connector, first) = Connector::over_tls(&me, &credentials, NODE, [3; 32]);
    stream.write_all(&first).unwrap();
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(connector.handle(&answer), Err(HandshakeError::TlsUnexpected));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_on_a_port_end_their_connection_and_nothing_else(
        said in prop::collection::vec(any::<u8>(), 0..400),
        kind in prop_oneof![Just(None), (20u8..25).prop_map(Some)],
        flip in prop::option::of((any::<prop::sample::Index>(), 0u8..8)),
    ) {
        static TWO: std::sync::LazyLock<Cluster> = std::sync::LazyLock::new(|| Cluster::secured(THERE));
        // Anything at all; records of each type with anything in them; a true greeting with one bit that is not.
        let said = match (kind, flip) {
            (Some(kind), _) => {
                let len = said.len() as u16;
                [&[kind, 3, 3][..], &len.to_be_bytes(), &said].concat()
            }
            (None, Some((at, bit))) => {
                let mut greeting = greeting();
                let at = PREFACE_LEN + at.index(greeting.len() - PREFACE_LEN);
                greeting[at] ^= 1 << bit;
                greeting.split_off(PREFACE_LEN)
            }
            (None, None) => said,
        };
        strange(&TWO, THERE, &said);
        prop_assert!(TWO.node.handler.joined.lock().is_empty());
        prop_assert_eq!(TWO.node.handler.count(), 0);
    }
}

/// What a process of the cluster says first, as somebody who listens hears it.
fn greeting() -> Vec<u8> {
    static GREETING: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = Cluster::secured(NODE);
        here.node.transport.set_address(THERE, Address::Tcp(listener.local_addr().unwrap()));
        here.node.transport.send(THERE, 9, 1, &[], SendMode::Now);
        let (mut stream, _) = listener.accept().unwrap();
        let mut greeting = vec![0; PREFACE_LEN + 5];
        stream.read_exact(&mut greeting).unwrap();
        let len = u16::from_be_bytes([greeting[PREFACE_LEN + 3], greeting[PREFACE_LEN + 4]]);
        let mut record = vec![0; usize::from(len)];
        stream.read_exact(&mut record).unwrap();
        [greeting, record].concat()
    });
    GREETING.clone()
}

#[test]
fn a_connector_bears_whatever_answers_it() {
    let answers: [&[u8]; 4] =
        [b"HTTP/1.1 400 Bad Request\r\n\r\n", &[22, 3, 3, 0, 4, 2, 0, 0, 0], &[21, 3, 3, 0, 2, 2, 40], &[0xff; 300]];
    for answer in answers {
        let here = Cluster::secured(NODE);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        here.node.transport.set_address(THERE, Address::Tcp(listener.local_addr().unwrap()));
        here.node.transport.send(THERE, 9, 1, &[], SendMode::Now);
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; PREFACE_LEN]).unwrap();
        stream.write_all(answer).unwrap();
        here.node.drive_until(|h| !h.ends(THERE).is_empty());
        let reason = &here.node.handler.ends(THERE)[0];
        assert!(reason.contains("not secure"), "{reason}");
    }
}

// ---- discovering

const TOKEN: [u8; 32] = [2; 32];

fn ask(address: &Address, token: [u8; 32], tls: Option<bool>) -> Result<Found, DiscoverError> {
    discover(&address.to_string(), token, 12, tls, Instant::now() + Duration::from_secs(20))
}

/// A node of a cluster whose session follows from its token.
fn listening_node(tls: bool) -> (Process, Address) {
    let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let mut config = config(THERE, Role::Node, address.clone(), vec![listener]);
    config.node = THERE;
    config.session = Credentials::of_cluster(TOKEN).session;
    config.tls = tls;
    (start(config).unwrap(), address)
}

#[test]
fn who_joins_learns_whether_there_is_tls_and_may_insist_on_either() {
    for there in [true, false] {
        let (node, address) = listening_node(there);
        for asked in [None, Some(there)] {
            let found = ask(&address, TOKEN, asked).unwrap();
            assert_eq!((found.node.proc, found.node.role, found.tls), (THERE, Role::Node, there));
        }
        let error = ask(&address, TOKEN, Some(!there)).unwrap_err();
        let expected = if there { HandshakeError::TlsMissing } else { HandshakeError::TlsUnexpected };
        assert!(matches!(&error, DiscoverError::Refused { reason, .. } if *reason == expected), "{error}");
        assert!(error.to_string().contains("--tls") && error.to_string().contains(&address.to_string()));
        let error = ask(&address, [3; 32], None).unwrap_err();
        assert!(matches!(error, DiscoverError::Token { .. }), "{error}");
        assert!(node.handler.joined.lock().is_empty() && node.handler.closed.lock().is_empty());
    }
}

#[test]
fn nobody_can_talk_a_joiner_out_of_tls() {
    // Somebody in the middle refuses TLS in the cluster's name, and then relays what is said in clear.
    let (_node, address) = listening_node(true);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle = Address::Tcp(listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut near, _) = listener.accept().unwrap();
        let mut said = [0; PREFACE_LEN + HELLO_LEN];
        near.read_exact(&mut said).unwrap();
        let mut far = TcpStream::connect(tcp(&address)).unwrap();
        far.write_all(&said).unwrap();
        let mut answer = [0; ANSWER_LEN];
        far.read_exact(&mut answer).unwrap();
        let refused = Connector::new(
            &PeerInfo { proc: C, role: Role::Tool, pid: 1, python_minor: 0 },
            &Credentials::of_cluster(TOKEN),
            THERE,
            [1; 32],
        );
        let (mut connector, _) = refused;
        assert!(
            matches!(connector.handle(&answer), Err(HandshakeError::TlsMissing)),
            "the node makes no proof in clear"
        );
        near.write_all(&answer).unwrap();
        drop(near);
        // The joiner comes again, within TLS, and is told that there is none.
        let (mut near, _) = listener.accept().unwrap();
        near.read_exact(&mut [0; PREFACE_LEN]).unwrap();
        near.write_all(&HandshakeError::TlsUnexpected.refusal().unwrap()).unwrap();
    });
    let error = ask(&middle, TOKEN, None).unwrap_err();
    assert!(matches!(error, DiscoverError::Refused { reason: HandshakeError::TlsUnexpected, .. }), "{error}");
    thread.join().unwrap();
}
