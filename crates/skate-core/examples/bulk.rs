//! How fast blocks travel between two nodes over loopback TCP: ours, into memory that was touched before and into
//! new memory, beside a plain loop of `sendfile` and `recv`, and a copy in memory.
//!
//! ```text
//! cargo run --release -p skate-core --example bulk [MiB] [rounds]
//! iperf3 -s -1 -p 5201 & iperf3 -c 127.0.0.1 -p 5201 -n 4G      # beside it
//! ```

#![expect(clippy::print_stdout, reason = "a program that reports")]

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Instant;

use skate_core::sys::create_segment;
use skate_core::transfer::{Bulk, Outcome, Pull, SILENCE_S_MAX, Source};
use skate_core::transport::{Address, CloseReason, Config, Frame, Handler, Listener, PeerInfo, Transport};
use skate_proto::handshake::Role;
use skate_proto::ids::{ProcId, SegmentId};

struct Node {
    bulk: OnceLock<Bulk>,
    outcomes: mpsc::Sender<Outcome>,
}

impl Handler for Node {
    fn on_started(&self, transport: &Arc<Transport>) {
        let outcomes = self.outcomes.clone();
        let tell = move |outcome| drop(outcomes.send(outcome));
        let _ = self.bulk.set(Bulk::new(&transport.me(), transport.credentials(), SILENCE_S_MAX, tell));
    }
    fn on_frame(&self, _: ProcId, _: Frame<'_>, _: Option<OwnedFd>) {}
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {}
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
    fn on_bulk(&self, _: PeerInfo, socket: OwnedFd) {
        self.bulk.wait().accept(socket);
    }
}

fn node(proc: u64) -> (Arc<Transport>, Arc<Node>, Address, mpsc::Receiver<Outcome>) {
    let listener = Listener::bind_tcp("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let address = listener.local_address().expect("bound");
    let (outcomes, ended) = mpsc::channel();
    let handler = Arc::new(Node { bulk: OnceLock::new(), outcomes });
    let config = Config {
        me: ProcId(proc),
        role: Role::Node,
        python_minor: 0,
        session: [1; 16],
        token: [2; 32],
        node: ProcId(proc),
        node_address: address.clone(),
        listeners: vec![listener],
        io_thread: true,
    };
    let transport = Transport::start(config, Arc::clone(&handler) as Arc<dyn Handler>).expect("a node");
    (transport, handler, address, ended)
}

fn report(what: &str, len: u64, begun: Instant) {
    let seconds = begun.elapsed().as_secs_f64();
    println!("{what:<44} {:6.2} GB/s", len as f64 / seconds / 1e9);
}

fn main() {
    let number = |at, or| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (len, rounds) = (number(1, 1024_u64) << 20, number(2, 3));
    let bytes = vec![7_u8; len as usize];
    let file = |name| std::fs::File::from(create_segment(name, len).expect("memory"));
    let (source_file, warm) = (file("source"), file("warm"));
    source_file.write_all_at(&bytes, 0).expect("memory");
    warm.write_all_at(&bytes, 0).expect("memory");
    let (a_transport, a, address, _a_ended) = node(11);
    let (b_transport, b, _, ended) = node(12);
    a.bulk.wait().offer(SegmentId(1), source_file.try_clone().expect("a descriptor").into(), len);
    let source = Source { node: ProcId(11), address, segment: SegmentId(1), offset: 0 };
    for round in 0..rounds {
        for (what, file) in [("pull, warm destination", &warm), ("pull, new destination", &file("new"))] {
            let fd = file.try_clone().expect("a descriptor").into();
            let begun = Instant::now();
            let pull = Pull { ticket: round, sources: vec![source.clone()], len, segment: SegmentId(9), fd, offset: 0 };
            b.bulk.wait().pull(pull);
            let outcome = ended.recv().expect("an outcome");
            assert_eq!(outcome.error, "");
            report(what, len, begun);
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound");
        let from = source_file.try_clone().expect("a descriptor");
        let sender = std::thread::spawn(move || {
            let stream = TcpStream::connect(port).expect("a connection");
            let mut at = 0;
            while at < len {
                let sent = rustix::fs::sendfile(&stream, &from, Some(&mut at), 4 << 20);
                assert!(sent.is_ok_and(|sent| sent > 0));
            }
        });
        let (mut stream, _) = listener.accept().expect("a connection");
        let begun = Instant::now();
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer).expect("bytes") > 0 {}
        report("sendfile into recv, nothing kept", len, begun);
        let _ = sender.join();
        let mut copy = bytes.clone();
        let begun = Instant::now();
        copy.copy_from_slice(&bytes);
        report("copy in memory, one thread", len, begun);
    }
    for (transport, node) in [(a_transport, a), (b_transport, b)] {
        transport.shutdown();
        node.bulk.wait().shutdown();
    }
}
