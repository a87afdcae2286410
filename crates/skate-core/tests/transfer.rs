//! Bulk transfers on the real kernel: nodes with a transport and a `Bulk` each live in this process and reach each
//! other over TCP, in clear and within TLS, beside sources and clients that misbehave.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use skate_core::sys::create_segment;
use skate_core::transfer::wire::{ANSWER_LEN, REQUEST_LEN, Refusal, Request, decode_answer, encode_answer};
use skate_core::transfer::{Bulk, Outcome, Pull, RANGE_BYTES_MAX, SILENCE_S_MAX, STREAM_BYTES_MIN, Source};
use skate_core::transport::{Address, CloseReason, Config, Frame, Handler, Listener, PeerInfo, Stream, Transport};
use skate_proto::handshake::{Connector, Credentials, Identity, PREFACE_LEN, Role, Step};
use skate_proto::ids::{ProcId, SegmentId};

mod cluster;
use cluster::wire::Wire;
use cluster::{config, descriptors, wait_for};

/// The test that counts descriptors takes it for writing.
static ALONE: RwLock<()> = RwLock::new(());
const HERE: SegmentId = SegmentId(900);
/// How long a peer that misbehaves waits for ours.
const PATIENCE: Duration = Duration::from_secs(20);

/// Each of these holds in clear and within TLS.
macro_rules! over_both {
    ($($name:ident)*) => {
        mod in_clear {
            $(#[test] fn $name() { super::$name(false); })*
        }
        mod within_tls {
            $(#[test] fn $name() { super::$name(true); })*
        }
    };
}

over_both! {
    blocks_of_any_size_arrive_whole_from_any_offset
    a_block_goes_to_its_place_in_the_destination_and_nowhere_else
    a_destination_that_is_too_small_is_not_written
    what_a_source_does_not_have_is_refused_and_the_next_one_is_asked
    a_pull_that_no_source_serves_fails_and_names_each_reason
    a_source_that_dies_in_the_middle_is_replaced_and_what_it_sent_is_kept
    a_source_that_falls_silent_is_replaced
    a_source_that_talks_nonsense_is_given_up
    garbage_ends_the_connection_on_which_it_came_and_no_other
    who_does_not_know_the_token_gets_nothing
    connections_are_used_again
    a_kept_connection_that_was_closed_meanwhile_is_no_failure_of_its_source
    a_block_is_passed_on_while_it_comes_in
    who_asks_before_the_pull_has_begun_waits_for_its_first_byte
    who_was_fed_by_a_pull_that_failed_goes_on_elsewhere
    a_cancelled_pull_ends_at_once_and_is_not_offered_any_more
    memory_is_on_its_way_until_its_receiver_has_taken_it
    many_pulls_at_once_wait_for_a_thread_and_all_arrive
    nothing_is_left_after_a_shutdown_in_the_middle
    requests_that_come_together_are_all_answered
    what_is_pulled_can_be_read_on_the_wire_only_without_tls
}

#[derive(Default)]
struct NodeHandler {
    bulk: OnceLock<Arc<Bulk>>,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    connections: AtomicUsize,
    silence: Duration,
}

impl Handler for NodeHandler {
    fn on_started(&self, transport: &Arc<Transport>) {
        let outcomes = Arc::clone(&self.outcomes);
        let tell = move |outcome| outcomes.lock().push(outcome);
        let bulk = Bulk::new(&transport.me(), transport.credentials(), transport.tls(), self.silence, tell);
        assert!(self.bulk.set(Arc::new(bulk)).is_ok());
    }
    fn on_frame(&self, _: ProcId, _: Frame<'_>, _: Option<OwnedFd>) {}
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {
        panic!("a bulk connection is no peer");
    }
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
    fn on_bulk(&self, peer: PeerInfo, stream: Stream) {
        assert_eq!(peer.role, Role::Bulk);
        self.connections.fetch_add(1, Ordering::AcqRel);
        self.bulk.wait().accept(stream);
    }
}

/// A node with a TCP port.
struct Node {
    proc: ProcId,
    address: Address,
    transport: Arc<Transport>,
    handler: Arc<NodeHandler>,
}

impl Node {
    fn new(tls: bool) -> Self {
        Self::with_silence(tls, SILENCE_S_MAX)
    }

    fn with_silence(tls: bool, silence: Duration) -> Self {
        Self::with(tls, silence, credentials().token)
    }

    fn with(tls: bool, silence: Duration, token: [u8; 32]) -> Self {
        let handler = Arc::new(NodeHandler { silence, ..NodeHandler::default() });
        let (proc, address, transport) = listening(tls, token, Arc::clone(&handler) as Arc<dyn Handler>);
        Self { proc, address, transport, handler }
    }

    fn bulk(&self) -> &Bulk {
        self.handler.bulk.wait()
    }

    /// Offers a segment that holds `bytes` from its start.
    fn offer(&self, segment: u64, bytes: &[u8]) -> Source {
        let fd = segment_of(bytes);
        self.bulk().offer(SegmentId(segment), fd, bytes.len() as u64, bytes.len() as u64);
        self.source(segment, 0)
    }

    fn source(&self, segment: u64, offset: u64) -> Source {
        Source { node: self.proc, address: self.address.clone(), segment: SegmentId(segment), offset }
    }

    /// Begins a pull into a new segment of its own length, and returns the segment.
    fn pull(&self, ticket: u64, len: u64, sources: &[Source]) -> std::fs::File {
        let fd = create_segment("destination", len).unwrap();
        let file = std::fs::File::from(fd.try_clone().unwrap());
        self.bulk().pull(Pull { ticket, sources: sources.to_vec(), len, segment: HERE, fd, offset: 0 });
        file
    }

    fn outcome(&self, ticket: u64) -> Outcome {
        let outcomes = &self.handler.outcomes;
        wait_for("the outcome", || outcomes.lock().iter().any(|outcome| outcome.ticket == ticket));
        let mut outcomes = outcomes.lock();
        let at = outcomes.iter().position(|outcome| outcome.ticket == ticket).unwrap();
        outcomes.remove(at)
    }

    fn connections(&self) -> usize {
        self.handler.connections.load(Ordering::Acquire)
    }

    /// A connection that has proved itself, for clients that misbehave.
    fn connect(&self) -> Stream {
        let Address::Tcp(address) = self.address else { panic!() };
        let stream = Stream::new(TcpStream::connect(address).unwrap().into());
        stream.set_patience(PATIENCE).unwrap();
        let me = identity(ProcId(7));
        let tls = self.transport.tls();
        let begin = if tls.is_some() { Connector::over_tls } else { Connector::new };
        let (mut machine, first) = begin(&me, &credentials(), self.proc, [3; 32]);
        if let Some(tls) = tls {
            machine.bind(stream.secure(&tls, &first[..PREFACE_LEN]).unwrap().unwrap());
            stream.write_all(&first[PREFACE_LEN..]).unwrap();
        } else {
            stream.write_all(&first).unwrap();
        }
        loop {
            let mut message = vec![0; machine.wants()];
            stream.read_exact(&mut message).unwrap();
            match machine.handle(&message).unwrap() {
                Step::Send(answer) => stream.write_all(&answer).unwrap(),
                Step::Done { .. } => return stream,
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.transport.shutdown();
        self.bulk().shutdown();
    }
}

/// The transport of a node with a TCP port.
fn listening(tls: bool, token: [u8; 32], handler: Arc<dyn Handler>) -> (ProcId, Address, Arc<Transport>) {
    static NUMBER: AtomicU64 = AtomicU64::new(100);
    let proc = ProcId(NUMBER.fetch_add(1, Ordering::Relaxed));
    let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let config = config(proc, Role::Node, address.clone(), vec![listener]);
    let transport = Transport::start(Config { node: proc, tls, token, ..config }, handler).unwrap();
    (proc, address, transport)
}

fn credentials() -> Credentials {
    Credentials { session: [1; 16], token: [2; 32] }
}

fn identity(proc: ProcId) -> Identity {
    Identity { proc, role: Role::Bulk, pid: 1, python_minor: 0 }
}

fn segment_of(bytes: &[u8]) -> OwnedFd {
    let fd = create_segment("source", bytes.len() as u64).unwrap();
    let file = std::fs::File::from(fd.try_clone().unwrap());
    file.write_all_at(bytes, 0).unwrap();
    fd
}

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31) >> 3) as u8).collect()
}

fn contents(file: &std::fs::File, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A source that proves itself and then does what a test wants with each of its connections, in turn.
struct FakeSource {
    proc: ProcId,
    address: Address,
    transport: Arc<Transport>,
    thread: Option<JoinHandle<()>>,
}

struct FakeHandler(mpsc::Sender<Stream>);

impl Handler for FakeHandler {
    fn on_frame(&self, _: ProcId, _: Frame<'_>, _: Option<OwnedFd>) {}
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {}
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
    fn on_bulk(&self, _: PeerInfo, stream: Stream) {
        stream.set_patience(PATIENCE).unwrap();
        self.0.send(stream).unwrap();
    }
}

impl FakeSource {
    fn new(tls: bool, mut serve: impl FnMut(Stream) + Send + 'static, connections: usize) -> Self {
        let (proven, streams) = mpsc::channel();
        let (proc, address, transport) = listening(tls, credentials().token, Arc::new(FakeHandler(proven)));
        let thread = std::thread::spawn(move || streams.iter().take(connections).for_each(&mut serve));
        Self { proc, address, transport, thread: Some(thread) }
    }

    fn source(&self) -> Source {
        Source { node: self.proc, address: self.address.clone(), segment: SegmentId(1), offset: 0 }
    }
}

impl Drop for FakeSource {
    fn drop(&mut self) {
        // After a failure it may wait for a connection for ever.
        if !std::thread::panicking() {
            self.thread.take().unwrap().join().unwrap();
        }
        self.transport.shutdown();
    }
}

fn read_request(stream: &Stream) -> Request {
    let mut bytes = [0; REQUEST_LEN];
    stream.read_exact(&mut bytes).unwrap();
    Request::decode(&bytes).unwrap()
}

fn ask(stream: &Stream, segment: u64, offset: u64, len: u64) {
    stream.write_all(&Request::Range { segment: SegmentId(segment), offset, len }.encode()).unwrap();
}

fn read_answer(stream: &Stream) -> Result<u64, Refusal> {
    let mut bytes = [0; ANSWER_LEN];
    stream.read_exact(&mut bytes).unwrap();
    decode_answer(&bytes).unwrap()
}

fn is_closed(stream: &Stream) -> bool {
    stream.read_exact(&mut [0; 1]).is_err()
}

fn blocks_of_any_size_arrive_whole_from_any_offset(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let bytes = pattern((2 * STREAM_BYTES_MIN + RANGE_BYTES_MAX) as usize + 12_345);
    a.offer(1, &bytes);
    for (ticket, (offset, len)) in
        [(0, 1), (1, 4096), (4095, 100_000), (777, 5 << 20), (0, bytes.len()), (3, bytes.len() - 3)]
            .into_iter()
            .enumerate()
    {
        let file = b.pull(ticket as u64, len as u64, &[a.source(1, offset as u64)]);
        let outcome = b.outcome(ticket as u64);
        assert_eq!((outcome.error.as_str(), outcome.bytes), ("", len as u64));
        assert!(outcome.failures.is_empty());
        assert!(contents(&file, len) == bytes[offset..offset + len], "{len} bytes at {offset}");
    }
}

fn a_block_goes_to_its_place_in_the_destination_and_nowhere_else(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let source = a.offer(1, &pattern(10_000));
    let fd = segment_of(&[9; 30_000]);
    let file = std::fs::File::from(fd.try_clone().unwrap());
    b.bulk().pull(Pull { ticket: 1, sources: vec![source], len: 10_000, segment: HERE, fd, offset: 5000 });
    assert_eq!(b.outcome(1).error, "");
    let all = contents(&file, 30_000);
    assert!(all[..5000].iter().chain(&all[15_000..]).all(|byte| *byte == 9));
    assert!(all[5000..15_000] == pattern(10_000));
}

fn a_destination_that_is_too_small_is_not_written(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let source = a.offer(1, &pattern(10_000));
    let fd = create_segment("small", 9_999).unwrap();
    b.bulk().pull(Pull { ticket: 1, sources: vec![source], len: 10_000, segment: HERE, fd, offset: 0 });
    assert!(b.outcome(1).error.contains("9999 bytes"));
    assert_eq!(a.connections(), 0);
}

fn what_a_source_does_not_have_is_refused_and_the_next_one_is_asked(tls: bool) {
    let _shared = ALONE.read();
    let (a, b, c) = (Node::new(tls), Node::new(tls), Node::new(tls));
    let bytes = pattern(200_000);
    a.offer(1, &bytes[..1000]);
    let good = b.offer(1, &bytes);
    let file = c.pull(1, 200_000, &[a.source(77, 0), a.source(1, 0), a.source(1, u64::MAX), good]);
    let outcome = c.outcome(1);
    assert_eq!(outcome.error, "");
    assert!(contents(&file, 200_000) == bytes);
    let failures: Vec<_> = outcome.failures.iter().map(|f| (f.node, f.refused, f.error.as_str())).collect();
    let short = "it refused: the segment is shorter than the range that was asked for";
    let gone = "it refused: it does not have the segment any more";
    assert_eq!(failures, [(a.proc, true, gone), (a.proc, true, short), (a.proc, true, short)]);
    assert_eq!(a.connections(), 1, "a refusal costs no connection");
}

fn a_pull_that_no_source_serves_fails_and_names_each_reason(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = Source { address: Address::Tcp(nobody), ..a.source(1, 0) };
    let mut wrong = a.source(1, 0);
    wrong.node = ProcId(4242);
    b.pull(1, 1000, &[unreachable, wrong, a.source(1, 0)]);
    let outcome = b.outcome(1);
    assert_eq!(outcome.failures.iter().map(|f| f.refused).collect::<Vec<_>>(), [false, false, true]);
    for part in ["no source delivered it", "Connection refused", "does not know process", "does not have the segment"] {
        assert!(outcome.error.contains(part), "{} lacks {part}", outcome.error);
    }
    b.pull(2, 1000, &[]);
    assert_eq!(b.outcome(2).error, "no node has it");
}

fn a_source_that_dies_in_the_middle_is_replaced_and_what_it_sent_is_kept(tls: bool) {
    let _shared = ALONE.read();
    let bytes = pattern(8 << 20);
    let half = bytes.len() / 2;
    let sent = bytes.clone();
    let dying = FakeSource::new(
        tls,
        move |stream| {
            let Request::Range { len, .. } = read_request(&stream) else { panic!() };
            assert_eq!(len, sent.len() as u64);
            stream.write_all(&encode_answer(Ok(len))).unwrap();
            stream.write_all(&sent[..half]).unwrap();
        },
        1,
    );
    let (a, b) = (Node::new(tls), Node::new(tls));
    let good = a.offer(1, &bytes);
    let file = b.pull(1, bytes.len() as u64, &[dying.source(), good]);
    let outcome = b.outcome(1);
    assert_eq!((outcome.error.as_str(), outcome.bytes), ("", bytes.len() as u64), "no byte is fetched twice");
    assert_eq!(outcome.failures.len(), 1);
    assert!(outcome.failures[0].error.contains("closed the connection"));
    assert!(contents(&file, bytes.len()) == bytes);
}

fn a_source_that_falls_silent_is_replaced(tls: bool) {
    let _shared = ALONE.read();
    let bytes = pattern(100_000);
    let (end, ended) = mpsc::channel::<()>();
    let silent = FakeSource::new(
        tls,
        move |stream| {
            read_request(&stream);
            stream.write_all(&encode_answer(Ok(100_000))).unwrap();
            stream.write_all(&[0; 10]).unwrap();
            let _ = ended.recv();
        },
        1,
    );
    let (a, b) = (Node::new(tls), Node::with_silence(tls, Duration::from_millis(100)));
    let good = a.offer(1, &bytes);
    let file = b.pull(1, 100_000, &[silent.source(), good]);
    let outcome = b.outcome(1);
    drop(end);
    assert_eq!(outcome.error, "");
    assert!(outcome.failures[0].error.contains("sent nothing"));
    assert!(contents(&file, 100_000)[10..] == bytes[10..]);
}

fn a_source_that_talks_nonsense_is_given_up(tls: bool) {
    let _shared = ALONE.read();
    let mut answers = vec![encode_answer(Ok(5)).to_vec(), vec![0xff; ANSWER_LEN]];
    let broken = FakeSource::new(
        tls,
        move |stream| {
            read_request(&stream);
            stream.write_all(&answers.pop().unwrap()).unwrap();
            assert!(is_closed(&stream), "no more is asked there");
        },
        2,
    );
    let b = Node::new(tls);
    for ticket in 0..2 {
        b.pull(ticket, 1000, &[broken.source()]);
        assert!(b.outcome(ticket).error.contains("broke the protocol"));
    }
}

fn garbage_ends_the_connection_on_which_it_came_and_no_other(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let source = a.offer(1, &pattern(1000));
    let other = a.connect();
    for garbage in [vec![0; REQUEST_LEN], vec![0xa5; 1000], Request::Taken.encode().map(|byte| byte ^ 1).to_vec()] {
        let stream = a.connect();
        stream.write_all(&garbage).unwrap();
        assert!(is_closed(&stream));
    }
    ask(&other, 1, 0, 1000);
    assert_eq!(read_answer(&other), Ok(1000));
    b.pull(1, 1000, &[source]);
    assert_eq!(b.outcome(1).error, "");
}

fn who_does_not_know_the_token_gets_nothing(tls: bool) {
    let _shared = ALONE.read();
    let (a, stranger) = (Node::new(tls), Node::with(tls, SILENCE_S_MAX, [9; 32]));
    let source = a.offer(1, &pattern(1000));
    stranger.pull(1, 1000, &[source]);
    let expected = if tls { "it does not know the cluster token" } else { "handshake failed" };
    let outcome = stranger.outcome(1);
    assert!(outcome.error.contains(expected), "{}", outcome.error);
    assert_eq!((outcome.bytes, a.connections()), (0, 0));
}

fn requests_that_come_together_are_all_answered(tls: bool) {
    let _shared = ALONE.read();
    let a = Node::new(tls);
    let bytes = pattern(3000);
    a.offer(1, &bytes);
    let stream = a.connect();
    let range = |offset| Request::Range { segment: SegmentId(1), offset, len: 1000 }.encode();
    stream.write_all(&[range(0), Request::Taken.encode(), range(1000), range(2000)].concat()).unwrap();
    for part in bytes.chunks(1000) {
        assert_eq!(read_answer(&stream), Ok(1000));
        let mut got = [0; 1000];
        stream.read_exact(&mut got).unwrap();
        assert!(got == part);
    }
}

fn what_is_pulled_can_be_read_on_the_wire_only_without_tls(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let secret = b"the launch code is twelve";
    let source = a.offer(1, &secret.repeat(10_000));
    let wire = Wire::to(&a.address, |_, _| {});
    let file = b.pull(1, 250_000, &[Source { address: wire.address.clone(), ..source }]);
    assert_eq!(b.outcome(1).error, "");
    assert!(contents(&file, 250_000) == secret.repeat(10_000));
    assert_eq!(wire.has_seen(secret), !tls, "the same relay sees it without TLS");
    drop((a, b));
    wire.accepting.join().unwrap();
}

#[test]
fn what_was_changed_on_its_way_is_noticed_and_fetched_elsewhere_within_tls() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(true), Node::new(true));
    let bytes = pattern(4 << 20);
    let (source, other) = (a.offer(1, &bytes), a.source(1, 0));
    // One bit, in the middle of the block.
    let wire = Wire::back_from(&a.address, |before, part| {
        if let Some(byte) = (2_usize << 20).checked_sub(before).and_then(|at| part.get_mut(at)) {
            *byte ^= 1;
        }
    });
    let file = b.pull(1, bytes.len() as u64, &[Source { address: wire.address.clone(), ..source }, other]);
    let outcome = b.outcome(1);
    assert_eq!((outcome.error.as_str(), outcome.failures.len()), ("", 1));
    assert!(outcome.failures[0].error.contains("was changed on its way"), "{}", outcome.failures[0].error);
    assert!(contents(&file, bytes.len()) == bytes);
    drop((a, b));
    wire.accepting.join().unwrap();
}

#[test]
fn nodes_that_disagree_about_tls_refuse_each_other_and_say_so() {
    let _shared = ALONE.read();
    for tls in [true, false] {
        let (a, b) = (Node::new(tls), Node::new(!tls));
        let source = a.offer(1, &pattern(1000));
        b.pull(1, 1000, &[source]);
        let outcome = b.outcome(1);
        assert!(outcome.error.contains("TLS"), "{}", outcome.error);
        assert_eq!((outcome.bytes, a.connections()), (0, 0));
    }
}

fn connections_are_used_again(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let source = a.offer(1, &pattern(100_000));
    for ticket in 0..5 {
        b.pull(ticket, 100_000, std::slice::from_ref(&source));
        assert_eq!(b.outcome(ticket).error, "");
    }
    assert_eq!(a.connections(), 1);
}

fn a_kept_connection_that_was_closed_meanwhile_is_no_failure_of_its_source(tls: bool) {
    let _shared = ALONE.read();
    let bytes = pattern(50_000);
    let fake = FakeSource::new(
        tls,
        move |stream| {
            let Request::Range { len, .. } = read_request(&stream) else { panic!() };
            stream.write_all(&encode_answer(Ok(len))).unwrap();
            stream.write_all(&bytes).unwrap();
            assert_eq!(read_request(&stream), Request::Taken);
        },
        2,
    );
    let b = Node::new(tls);
    for ticket in 0..2 {
        b.pull(ticket, 50_000, &[fake.source()]);
        let outcome = b.outcome(ticket);
        assert_eq!((outcome.error.as_str(), outcome.failures.len()), ("", 0));
    }
}

/// A source that sends what a test hands it, piece by piece; `None` ends it.
fn fed_source(tls: bool) -> (FakeSource, mpsc::Sender<Option<Vec<u8>>>) {
    let (feed, pieces) = mpsc::channel::<Option<Vec<u8>>>();
    let source = FakeSource::new(
        tls,
        move |stream| {
            let Request::Range { len, .. } = read_request(&stream) else { panic!() };
            stream.write_all(&encode_answer(Ok(len))).unwrap();
            while let Ok(Some(piece)) = pieces.recv() {
                stream.write_all(&piece).unwrap();
            }
        },
        1,
    );
    (source, feed)
}

fn a_block_is_passed_on_while_it_comes_in(tls: bool) {
    let _shared = ALONE.read();
    let bytes = pattern(1 << 20);
    let (origin, feed) = fed_source(tls);
    let (a, b) = (Node::new(tls), Node::new(tls));
    let file = a.pull(1, bytes.len() as u64, &[origin.source()]);
    let downstream = a.connect();
    ask(&downstream, HERE.0, 0, bytes.len() as u64);
    assert_eq!(read_answer(&downstream), Ok(bytes.len() as u64));
    let second = b.pull(2, bytes.len() as u64, &[a.source(HERE.0, 0)]);
    let mut got = vec![0; bytes.len()];
    for (n, piece) in bytes.chunks(100_000).enumerate() {
        feed.send(Some(piece.to_vec())).unwrap();
        let at = n * 100_000;
        downstream.read_exact(&mut got[at..at + piece.len()]).unwrap();
    }
    feed.send(None).unwrap();
    assert!(got == bytes);
    assert_eq!((a.outcome(1).error, b.outcome(2).error), (String::new(), String::new()));
    assert!(contents(&file, bytes.len()) == bytes && contents(&second, bytes.len()) == bytes);
}

fn who_asks_before_the_pull_has_begun_waits_for_its_first_byte(tls: bool) {
    let _shared = ALONE.read();
    let (a, b, c) = (Node::new(tls), Node::new(tls), Node::new(tls));
    let bytes = pattern(300_000);
    let source = a.offer(1, &bytes);
    let fd = create_segment("destination", 400_000).unwrap();
    b.bulk().offer(HERE, fd.try_clone().unwrap(), 400_000, 0);
    let file = c.pull(2, 300_000, &[b.source(HERE.0, 0)]);
    wait_for("the request", || b.connections() == 1);
    b.bulk().pull(Pull { ticket: 1, sources: vec![source], len: 300_000, segment: HERE, fd, offset: 0 });
    let outcome = c.outcome(2);
    assert_eq!((outcome.error.as_str(), outcome.failures.len()), ("", 0));
    assert!(contents(&file, 300_000) == bytes);
    let stream = b.connect();
    ask(&stream, HERE.0, 300_000, 1);
    assert_eq!(read_answer(&stream), Err(Refusal::OutOfBounds), "the block ends before its segment does");
}

fn who_was_fed_by_a_pull_that_failed_goes_on_elsewhere(tls: bool) {
    let _shared = ALONE.read();
    let bytes = pattern(1 << 20);
    let (origin, feed) = fed_source(tls);
    let (a, b, c) = (Node::new(tls), Node::new(tls), Node::new(tls));
    let good = c.offer(1, &bytes);
    a.pull(1, bytes.len() as u64, &[origin.source()]);
    let file = b.pull(2, bytes.len() as u64, &[a.source(HERE.0, 0), good]);
    feed.send(Some(bytes[..300_000].to_vec())).unwrap();
    wait_for("the first bytes", || contents(&file, 300_000) == bytes[..300_000]);
    feed.send(None).unwrap();
    assert!(a.outcome(1).error.contains("closed the connection"));
    let outcome = b.outcome(2);
    assert_eq!((outcome.error.as_str(), outcome.bytes), ("", bytes.len() as u64));
    assert_eq!(outcome.failures[0].node, a.proc);
    assert!(contents(&file, bytes.len()) == bytes);
    assert!(b.bulk().withdraw(HERE));
}

fn a_cancelled_pull_ends_at_once_and_is_not_offered_any_more(tls: bool) {
    let _shared = ALONE.read();
    let (origin, feed) = fed_source(tls);
    let a = Node::new(tls);
    let file = a.pull(1, 1 << 20, &[origin.source()]);
    feed.send(Some(vec![5; 1000])).unwrap();
    wait_for("the first bytes", || contents(&file, 1000) == [5; 1000]);
    a.bulk().cancel(1);
    let outcome = a.outcome(1);
    assert_eq!((outcome.error.as_str(), outcome.failures.len()), ("it was cancelled", 0));
    feed.send(None).unwrap();
    let stream = a.connect();
    ask(&stream, HERE.0, 0, 10);
    assert_eq!(read_answer(&stream), Err(Refusal::UnknownSegment));
}

fn memory_is_on_its_way_until_its_receiver_has_taken_it(tls: bool) {
    let _shared = ALONE.read();
    let a = Node::new(tls);
    a.offer(1, &pattern(1000));
    a.offer(2, &pattern(1000));
    a.offer(3, &pattern(1000));
    let stream = a.connect();
    ask(&stream, 1, 0, 1000);
    assert_eq!(read_answer(&stream), Ok(1000));
    stream.read_exact(&mut [0; 1]).unwrap();
    assert!(!a.bulk().withdraw(SegmentId(1)), "it lies in the socket");
    stream.read_exact(&mut [0; 999]).unwrap();
    ask(&stream, 2, 0, 1000);
    assert_eq!(read_answer(&stream), Ok(1000));
    stream.read_exact(&mut [0; 1000]).unwrap();
    stream.write_all(&Request::Taken.encode()).unwrap();
    ask(&stream, 3, 0, 1000);
    assert_eq!(read_answer(&stream), Ok(1000));
    assert!(a.bulk().withdraw(SegmentId(2)), "it was taken");
    stream.read_exact(&mut [0; 1000]).unwrap();
    stream.write_all(&Request::Taken.encode()).unwrap();
    ask(&stream, 3, 0, 1001);
    assert_eq!(read_answer(&stream), Err(Refusal::OutOfBounds));
    assert!(a.bulk().withdraw(SegmentId(3)));
    assert!(a.bulk().withdraw(SegmentId(4)), "nothing is offered under that number");
}

fn many_pulls_at_once_wait_for_a_thread_and_all_arrive(tls: bool) {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(tls), Node::new(tls));
    let bytes = pattern(300_000);
    let source = a.offer(1, &bytes);
    let files: Vec<_> = (0..60)
        .map(|ticket| {
            let fd = create_segment("destination", 300_000).unwrap();
            let file = std::fs::File::from(fd.try_clone().unwrap());
            let segment = SegmentId(1000 + ticket);
            b.bulk().pull(Pull { ticket, sources: vec![source.clone()], len: 300_000, segment, fd, offset: 0 });
            file
        })
        .collect();
    for (ticket, file) in files.iter().enumerate() {
        assert_eq!(b.outcome(ticket as u64).error, "");
        assert!(contents(file, 300_000) == bytes);
    }
    assert!(a.connections() <= skate_core::transfer::PULLERS_MAX);
}

fn nothing_is_left_after_a_shutdown_in_the_middle(tls: bool) {
    let _alone = ALONE.write();
    let before = descriptors();
    {
        let (origin, feed) = fed_source(tls);
        let (a, b) = (Node::new(tls), Node::new(tls));
        a.pull(1, 1 << 20, &[origin.source()]);
        b.pull(2, 1 << 20, &[a.source(HERE.0, 0)]);
        let idle = a.connect();
        feed.send(Some(vec![5; 1000])).unwrap();
        ask(&idle, HERE.0, 0, 10);
        assert_eq!(read_answer(&idle), Ok(10));
        idle.read_exact(&mut [0; 10]).unwrap();
        drop((a, b));
        feed.send(None).unwrap();
    }
    wait_for("descriptors to be closed", || descriptors() == before);
    let is_ours = |task: std::fs::DirEntry| {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        ["skate-bulk", "skate-send", "skate-pull"].contains(&name.trim())
    };
    assert!(!std::fs::read_dir("/proc/self/task").unwrap().any(|task| is_ours(task.unwrap())));
}
