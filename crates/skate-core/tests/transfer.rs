//! Bulk transfers on the real kernel: nodes with a transport and a `Bulk` each live in this process and reach each
//! other over TCP, beside sources and clients that misbehave.

use std::io::{Read, Write};
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
use skate_core::transport::{Address, CloseReason, Frame, Handler, Listener, PeerInfo, Transport};
use skate_proto::handshake::{Acceptor, Connector, Credentials, Identity, PREFACE_LEN, Role, Step};
use skate_proto::ids::{ProcId, SegmentId};

mod cluster;
use cluster::{config, descriptors, wait_for};

/// The test that counts descriptors takes it for writing.
static ALONE: RwLock<()> = RwLock::new(());
const HERE: SegmentId = SegmentId(900);

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
        let bulk = Bulk::new(&transport.me(), transport.credentials(), self.silence, tell);
        assert!(self.bulk.set(Arc::new(bulk)).is_ok());
    }
    fn on_frame(&self, _: ProcId, _: Frame<'_>, _: Option<OwnedFd>) {}
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {
        panic!("a bulk connection is no peer");
    }
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
    fn on_bulk(&self, peer: PeerInfo, socket: OwnedFd) {
        assert_eq!(peer.role, Role::Bulk);
        self.connections.fetch_add(1, Ordering::AcqRel);
        self.bulk.wait().accept(socket);
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
    fn new() -> Self {
        Self::with_silence(SILENCE_S_MAX)
    }

    fn with_silence(silence: Duration) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(100);
        let proc = ProcId(NUMBER.fetch_add(1, Ordering::Relaxed));
        let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_address().unwrap();
        let mut config = config(proc, Role::Node, address.clone(), vec![listener]);
        config.node = proc;
        let handler = Arc::new(NodeHandler { silence, ..NodeHandler::default() });
        let transport = Transport::start(config, Arc::clone(&handler) as Arc<dyn Handler>).unwrap();
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
    fn connect(&self) -> TcpStream {
        let Address::Tcp(address) = self.address else { panic!() };
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let me = identity(ProcId(7));
        let (mut machine, first) = Connector::new(&me, &credentials(), self.proc, [3; 32]);
        stream.write_all(&first).unwrap();
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
    thread: Option<JoinHandle<()>>,
}

impl FakeSource {
    fn new(mut serve: impl FnMut(TcpStream) + Send + 'static, connections: usize) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(5000);
        let proc = ProcId(NUMBER.fetch_add(1, Ordering::Relaxed));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            for _ in 0..connections {
                let (mut stream, _) = listener.accept().unwrap();
                prove(&mut stream, proc);
                serve(stream);
            }
        });
        Self { proc, address, thread: Some(thread) }
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
    }
}

fn prove(stream: &mut TcpStream, proc: ProcId) {
    let mut preface = [0; PREFACE_LEN];
    stream.read_exact(&mut preface).unwrap();
    let mut machine = Acceptor::new(&identity(proc), &credentials(), &preface, [4; 32]).unwrap();
    loop {
        let mut message = vec![0; machine.wants()];
        stream.read_exact(&mut message).unwrap();
        match machine.handle(&message).unwrap() {
            Step::Send(answer) => stream.write_all(&answer).unwrap(),
            Step::Done { send, .. } => return stream.write_all(&send).unwrap(),
        }
    }
}

fn read_request(stream: &mut TcpStream) -> Request {
    let mut bytes = [0; REQUEST_LEN];
    stream.read_exact(&mut bytes).unwrap();
    Request::decode(&bytes).unwrap()
}

fn ask(stream: &mut TcpStream, segment: u64, offset: u64, len: u64) {
    stream.write_all(&Request::Range { segment: SegmentId(segment), offset, len }.encode()).unwrap();
}

fn read_answer(stream: &mut TcpStream) -> Result<u64, Refusal> {
    let mut bytes = [0; ANSWER_LEN];
    stream.read_exact(&mut bytes).unwrap();
    decode_answer(&bytes).unwrap()
}

fn is_closed(stream: &mut TcpStream) -> bool {
    !matches!(stream.read(&mut [0; 1]), Ok(1..))
}

#[test]
fn blocks_of_any_size_arrive_whole_from_any_offset() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
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

#[test]
fn a_block_goes_to_its_place_in_the_destination_and_nowhere_else() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
    let source = a.offer(1, &pattern(10_000));
    let fd = segment_of(&[9; 30_000]);
    let file = std::fs::File::from(fd.try_clone().unwrap());
    b.bulk().pull(Pull { ticket: 1, sources: vec![source], len: 10_000, segment: HERE, fd, offset: 5000 });
    assert_eq!(b.outcome(1).error, "");
    let all = contents(&file, 30_000);
    assert!(all[..5000].iter().chain(&all[15_000..]).all(|byte| *byte == 9));
    assert!(all[5000..15_000] == pattern(10_000));
}

#[test]
fn a_destination_that_is_too_small_is_not_written() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
    let source = a.offer(1, &pattern(10_000));
    let fd = create_segment("small", 9_999).unwrap();
    b.bulk().pull(Pull { ticket: 1, sources: vec![source], len: 10_000, segment: HERE, fd, offset: 0 });
    assert!(b.outcome(1).error.contains("9999 bytes"));
    assert_eq!(a.connections(), 0);
}

#[test]
fn what_a_source_does_not_have_is_refused_and_the_next_one_is_asked() {
    let _shared = ALONE.read();
    let (a, b, c) = (Node::new(), Node::new(), Node::new());
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

#[test]
fn a_pull_that_no_source_serves_fails_and_names_each_reason() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
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

#[test]
fn a_source_that_dies_in_the_middle_is_replaced_and_what_it_sent_is_kept() {
    let _shared = ALONE.read();
    let bytes = pattern(8 << 20);
    let half = bytes.len() / 2;
    let sent = bytes.clone();
    let dying = FakeSource::new(
        move |mut stream| {
            let Request::Range { len, .. } = read_request(&mut stream) else { panic!() };
            assert_eq!(len, sent.len() as u64);
            stream.write_all(&encode_answer(Ok(len))).unwrap();
            stream.write_all(&sent[..half]).unwrap();
        },
        1,
    );
    let (a, b) = (Node::new(), Node::new());
    let good = a.offer(1, &bytes);
    let file = b.pull(1, bytes.len() as u64, &[dying.source(), good]);
    let outcome = b.outcome(1);
    assert_eq!((outcome.error.as_str(), outcome.bytes), ("", bytes.len() as u64), "no byte is fetched twice");
    assert_eq!(outcome.failures.len(), 1);
    assert!(outcome.failures[0].error.contains("closed the connection"));
    assert!(contents(&file, bytes.len()) == bytes);
}

#[test]
fn a_source_that_falls_silent_is_replaced() {
    let _shared = ALONE.read();
    let bytes = pattern(100_000);
    let (end, ended) = mpsc::channel::<()>();
    let silent = FakeSource::new(
        move |mut stream| {
            read_request(&mut stream);
            stream.write_all(&encode_answer(Ok(100_000))).unwrap();
            stream.write_all(&[0; 10]).unwrap();
            let _ = ended.recv();
        },
        1,
    );
    let (a, b) = (Node::new(), Node::with_silence(Duration::from_millis(100)));
    let good = a.offer(1, &bytes);
    let file = b.pull(1, 100_000, &[silent.source(), good]);
    let outcome = b.outcome(1);
    drop(end);
    assert_eq!(outcome.error, "");
    assert!(outcome.failures[0].error.contains("sent nothing"));
    assert!(contents(&file, 100_000)[10..] == bytes[10..]);
}

#[test]
fn a_source_that_talks_nonsense_is_given_up() {
    let _shared = ALONE.read();
    let mut answers = vec![encode_answer(Ok(5)).to_vec(), vec![0xff; ANSWER_LEN]];
    let broken = FakeSource::new(
        move |mut stream| {
            read_request(&mut stream);
            stream.write_all(&answers.pop().unwrap()).unwrap();
            assert!(is_closed(&mut stream), "no more is asked there");
        },
        2,
    );
    let b = Node::new();
    for ticket in 0..2 {
        b.pull(ticket, 1000, &[broken.source()]);
        assert!(b.outcome(ticket).error.contains("broke the protocol"));
    }
}

#[test]
fn garbage_ends_the_connection_on_which_it_came_and_no_other() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
    let source = a.offer(1, &pattern(1000));
    let mut other = a.connect();
    for garbage in [vec![0; REQUEST_LEN], vec![0xa5; 1000], Request::Taken.encode().map(|byte| byte ^ 1).to_vec()] {
        let mut stream = a.connect();
        stream.write_all(&garbage).unwrap();
        assert!(is_closed(&mut stream));
    }
    ask(&mut other, 1, 0, 1000);
    assert_eq!(read_answer(&mut other), Ok(1000));
    b.pull(1, 1000, &[source]);
    assert_eq!(b.outcome(1).error, "");
}

#[test]
fn who_does_not_know_the_token_gets_nothing() {
    let _shared = ALONE.read();
    let a = Node::new();
    a.offer(1, &pattern(1000));
    let Address::Tcp(address) = a.address else { panic!() };
    let mut stream = TcpStream::connect(address).unwrap();
    let wrong = Credentials { token: [9; 32], ..credentials() };
    let (machine, first) = Connector::new(&identity(ProcId(7)), &wrong, a.proc, [3; 32]);
    stream.write_all(&first).unwrap();
    let mut answer = vec![0; machine.wants()];
    stream.read_exact(&mut answer).unwrap();
    stream.write_all(&[0; 32]).unwrap();
    assert!(is_closed(&mut stream));
    assert_eq!(a.connections(), 0);
}

#[test]
fn connections_are_used_again() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
    let source = a.offer(1, &pattern(100_000));
    for ticket in 0..5 {
        b.pull(ticket, 100_000, std::slice::from_ref(&source));
        assert_eq!(b.outcome(ticket).error, "");
    }
    assert_eq!(a.connections(), 1);
}

#[test]
fn a_kept_connection_that_was_closed_meanwhile_is_no_failure_of_its_source() {
    let _shared = ALONE.read();
    let bytes = pattern(50_000);
    let fake = FakeSource::new(
        move |mut stream| {
            let Request::Range { len, .. } = read_request(&mut stream) else { panic!() };
            stream.write_all(&encode_answer(Ok(len))).unwrap();
            stream.write_all(&bytes).unwrap();
            assert_eq!(read_request(&mut stream), Request::Taken);
        },
        2,
    );
    let b = Node::new();
    for ticket in 0..2 {
        b.pull(ticket, 50_000, &[fake.source()]);
        let outcome = b.outcome(ticket);
        assert_eq!((outcome.error.as_str(), outcome.failures.len()), ("", 0));
    }
}

/// A source that sends what a test hands it, piece by piece; `None` ends it.
fn fed_source() -> (FakeSource, mpsc::Sender<Option<Vec<u8>>>) {
    let (feed, pieces) = mpsc::channel::<Option<Vec<u8>>>();
    let source = FakeSource::new(
        move |mut stream| {
            let Request::Range { len, .. } = read_request(&mut stream) else { panic!() };
            stream.write_all(&encode_answer(Ok(len))).unwrap();
            while let Ok(Some(piece)) = pieces.recv() {
                stream.write_all(&piece).unwrap();
            }
        },
        1,
    );
    (source, feed)
}

#[test]
fn a_block_is_passed_on_while_it_comes_in() {
    let _shared = ALONE.read();
    let bytes = pattern(1 << 20);
    let (origin, feed) = fed_source();
    let (a, b) = (Node::new(), Node::new());
    let file = a.pull(1, bytes.len() as u64, &[origin.source()]);
    let mut downstream = a.connect();
    ask(&mut downstream, HERE.0, 0, bytes.len() as u64);
    assert_eq!(read_answer(&mut downstream), Ok(bytes.len() as u64));
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

#[test]
fn who_asks_before_the_pull_has_begun_waits_for_its_first_byte() {
    let _shared = ALONE.read();
    let (a, b, c) = (Node::new(), Node::new(), Node::new());
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
    let mut stream = b.connect();
    ask(&mut stream, HERE.0, 300_000, 1);
    assert_eq!(read_answer(&mut stream), Err(Refusal::OutOfBounds), "the block ends before its segment does");
}

#[test]
fn who_was_fed_by_a_pull_that_failed_goes_on_elsewhere() {
    let _shared = ALONE.read();
    let bytes = pattern(1 << 20);
    let (origin, feed) = fed_source();
    let (a, b, c) = (Node::new(), Node::new(), Node::new());
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

#[test]
fn a_cancelled_pull_ends_at_once_and_is_not_offered_any_more() {
    let _shared = ALONE.read();
    let (origin, feed) = fed_source();
    let a = Node::new();
    let file = a.pull(1, 1 << 20, &[origin.source()]);
    feed.send(Some(vec![5; 1000])).unwrap();
    wait_for("the first bytes", || contents(&file, 1000) == [5; 1000]);
    a.bulk().cancel(1);
    let outcome = a.outcome(1);
    assert_eq!((outcome.error.as_str(), outcome.failures.len()), ("it was cancelled", 0));
    feed.send(None).unwrap();
    let mut stream = a.connect();
    ask(&mut stream, HERE.0, 0, 10);
    assert_eq!(read_answer(&mut stream), Err(Refusal::UnknownSegment));
}

#[test]
fn memory_is_on_its_way_until_its_receiver_has_taken_it() {
    let _shared = ALONE.read();
    let a = Node::new();
    a.offer(1, &pattern(1000));
    a.offer(2, &pattern(1000));
    a.offer(3, &pattern(1000));
    let mut stream = a.connect();
    ask(&mut stream, 1, 0, 1000);
    assert_eq!(read_answer(&mut stream), Ok(1000));
    stream.read_exact(&mut [0; 1]).unwrap();
    assert!(!a.bulk().withdraw(SegmentId(1)), "it lies in the socket");
    stream.read_exact(&mut [0; 999]).unwrap();
    ask(&mut stream, 2, 0, 1000);
    assert_eq!(read_answer(&mut stream), Ok(1000));
    stream.read_exact(&mut [0; 1000]).unwrap();
    stream.write_all(&Request::Taken.encode()).unwrap();
    ask(&mut stream, 3, 0, 1000);
    assert_eq!(read_answer(&mut stream), Ok(1000));
    assert!(a.bulk().withdraw(SegmentId(2)), "it was taken");
    stream.read_exact(&mut [0; 1000]).unwrap();
    stream.write_all(&Request::Taken.encode()).unwrap();
    ask(&mut stream, 3, 0, 1001);
    assert_eq!(read_answer(&mut stream), Err(Refusal::OutOfBounds));
    assert!(a.bulk().withdraw(SegmentId(3)));
    assert!(a.bulk().withdraw(SegmentId(4)), "nothing is offered under that number");
}

#[test]
fn many_pulls_at_once_wait_for_a_thread_and_all_arrive() {
    let _shared = ALONE.read();
    let (a, b) = (Node::new(), Node::new());
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

#[test]
fn nothing_is_left_after_a_shutdown_in_the_middle() {
    let _alone = ALONE.write();
    let before = descriptors();
    {
        let (origin, feed) = fed_source();
        let (a, b) = (Node::new(), Node::new());
        a.pull(1, 1 << 20, &[origin.source()]);
        b.pull(2, 1 << 20, &[a.source(HERE.0, 0)]);
        let mut idle = a.connect();
        feed.send(Some(vec![5; 1000])).unwrap();
        ask(&mut idle, HERE.0, 0, 10);
        assert_eq!(read_answer(&mut idle), Ok(10));
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
