//! How fast blocks travel between two nodes over loopback TCP: ours, into memory that was touched before and into
//! new memory, in clear and within TLS, beside a plain loop of `sendfile` and `recv`, and a copy in memory.
//!
//! ```text
//! bulk [MiB] [rounds]
//! iperf3 -s -1 -p 5201 & iperf3 -c 127.0.0.1 -p 5201 -n 4G      # beside it
//! ```
//!
//! Between machines or network namespaces, each of these a process, until its standard input ends:
//!
//! ```text
//! bulk serve 11 10.0.0.1:7000 MiB                        # node 11 offers segment 1
//! bulk pull 12 10.0.0.2:7000 MiB 11@10.0.0.1:7000/1      # node 12 pulls it, and passes it on as segment 9
//! bulk pull 13 10.0.0.3:7000 MiB 12@10.0.0.2:7000/9      # from node 12, while it comes in
//! ```

#![expect(clippy::print_stdout, reason = "a program that reports")]

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Instant;

use rustix::time::{ClockId, Timespec, clock_gettime};

use skate_core::sys::create_segment;
use skate_core::transfer::{Bulk, Outcome, Pull, SILENCE_S_MAX, Source, parse_address};
use skate_core::transport::{Address, CloseReason, Config, Frame, Handler, Listener, PeerInfo, Stream, Transport};
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
        let _ =
            self.bulk.set(Bulk::new(&transport.me(), transport.credentials(), transport.tls(), SILENCE_S_MAX, tell));
    }
    fn on_frame(&self, _: ProcId, _: Frame<'_>, _: Option<OwnedFd>) {}
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {}
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
    fn on_bulk(&self, _: PeerInfo, stream: Stream) {
        self.bulk.wait().accept(stream);
    }
}

fn node(proc: u64, listen: &str, tls: bool) -> (Arc<Transport>, Arc<Node>, Address, mpsc::Receiver<Outcome>) {
    let listener = Listener::bind_tcp(listen.parse().expect("ip:port")).expect("a port");
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
        tls,
        listeners: vec![listener],
        io_thread: true,
    };
    let transport = Transport::start(config, Arc::clone(&handler) as Arc<dyn Handler>).expect("a node");
    (transport, handler, address, ended)
}

/// When something began, by the clock and by the processor time of this process: of both nodes, where both are in it.
struct Begun(Instant, Timespec);

impl Begun {
    fn now() -> Self {
        Self(Instant::now(), clock_gettime(ClockId::ProcessCPUTime))
    }

    fn report(&self, what: &str, len: u64) {
        let (seconds, used) = (self.0.elapsed().as_secs_f64(), clock_gettime(ClockId::ProcessCPUTime));
        let used = (used.tv_sec - self.1.tv_sec) as f64 + (used.tv_nsec - self.1.tv_nsec) as f64 / 1e9;
        let gigabytes = len as f64 / 1e9;
        println!("{what:<44} {:6.2} GB/s {:6.2} s of processors per GB", gigabytes / seconds, used / gigabytes);
    }
}

fn filled(len: u64) -> std::fs::File {
    let file = std::fs::File::from(create_segment("bulk", len).expect("memory"));
    file.write_all_at(&vec![7; len as usize], 0).expect("memory");
    file
}

/// One node of several: offers a block of its own, or pulls one and passes it on.
fn take_part(words: &[String]) -> Option<()> {
    let [mode, key, listen, mib, rest @ ..] = words else { return None };
    let len = mib.parse::<u64>().ok()? << 20;
    let (transport, node, _, ended) = node(key.parse().ok()?, listen, false);
    let file = filled(len);
    match (mode.as_str(), rest) {
        ("serve", []) => node.bulk.wait().offer(SegmentId(1), file.into(), len, len),
        ("pull", [from]) => {
            let (source, place) = from.split_once('@')?;
            let (address, segment) = place.split_once('/')?;
            let source = Source {
                node: ProcId(source.parse().ok()?),
                address: parse_address(address)?,
                segment: SegmentId(segment.parse().ok()?),
                offset: 0,
            };
            node.bulk.wait().offer(SegmentId(9), file.try_clone().ok()?.into(), len, 0);
            // Once all are ready, a line of input is the start, so that many may start together.
            println!("ready");
            std::io::stdin().read_line(&mut String::new()).ok()?;
            let begun = Begun::now();
            let (sources, segment) = (vec![source], SegmentId(9));
            node.bulk.wait().pull(Pull { ticket: 1, sources, len, segment, fd: file.into(), offset: 0 });
            let outcome = ended.recv().ok()?;
            assert_eq!(outcome.error, "");
            begun.report(&format!("node {key}, {:.3} s", begun.0.elapsed().as_secs_f64()), len);
        }
        _ => return None,
    }
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    transport.shutdown();
    node.bulk.wait().shutdown();
    Some(())
}

/// Two nodes, one of which has a block.
struct Pair {
    nodes: [(Arc<Transport>, Arc<Node>); 2],
    source: Source,
    ended: mpsc::Receiver<Outcome>,
}

impl Pair {
    fn new(tls: bool, block: &std::fs::File, len: u64) -> Self {
        let (a_transport, a, address, _) = node(11, "127.0.0.1:0", tls);
        let (b_transport, b, _, ended) = node(12, "127.0.0.1:0", tls);
        a.bulk.wait().offer(SegmentId(1), block.try_clone().expect("a descriptor").into(), len, len);
        let source = Source { node: ProcId(11), address, segment: SegmentId(1), offset: 0 };
        Self { nodes: [(a_transport, a), (b_transport, b)], source, ended }
    }

    fn pull(&self, ticket: u64, what: &str, into: &std::fs::File, len: u64) {
        let fd = into.try_clone().expect("a descriptor").into();
        let begun = Begun::now();
        let pull = Pull { ticket, sources: vec![self.source.clone()], len, segment: SegmentId(9), fd, offset: 0 };
        self.nodes[1].1.bulk.wait().pull(pull);
        let outcome = self.ended.recv().expect("an outcome");
        assert_eq!(outcome.error, "");
        begun.report(what, len);
    }

    fn shutdown(self) {
        for (transport, node) in self.nodes {
            transport.shutdown();
            node.bulk.wait().shutdown();
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.len() > 2 {
        return take_part(&words).expect("see the head of this program for what it can be told");
    }
    let number = |at, or| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (len, rounds) = (number(1, 1024_u64) << 20, number(2, 3));
    let bytes = vec![7_u8; len as usize];
    let new = || std::fs::File::from(create_segment("new", len).expect("memory"));
    let (source_file, warm) = (filled(len), filled(len));
    let clusters = [false, true].map(|tls| Pair::new(tls, &source_file, len));
    for round in 0..rounds {
        for (pair, how) in clusters.iter().zip(["in clear", "within TLS"]) {
            pair.pull(round, &format!("pull {how}, warm destination"), &warm, len);
            pair.pull(round, &format!("pull {how}, new destination"), &new(), len);
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
        let begun = Begun::now();
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer).expect("bytes") > 0 {}
        begun.report("sendfile into recv, nothing kept", len);
        let _ = sender.join();
        let mut copy = bytes.clone();
        let begun = Begun::now();
        copy.copy_from_slice(&bytes);
        begun.report("copy in memory, one thread", len);
    }
    clusters.into_iter().for_each(Pair::shutdown);
}
