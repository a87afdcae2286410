//! `NodeCore`: the node process's transport, as events for its Python loop.

use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use skate_core::core::CoreError;
use skate_core::relay::{Limits, Relay};
use skate_core::spill::format::OBJECT_LEN;
use skate_core::spill::{self, Piece, SpillError, Spiller};
use skate_core::transfer::{Bulk, Failure, Outcome, Pull, SILENCE_S_MAX, Source, parse_address};
use skate_core::transport::{
    Address, Called, CloseReason, Config, DiscoverError, Driven, Frame, Handler, Listener, PeerInfo, SendMode,
    Stranger, Stream, Transport,
};
use skate_proto::handshake::{HandshakeError, Role};
use skate_proto::ids::{ProcId, SegmentId};

use crate::core::{deadline, waiting};
use crate::errors::to_py;

enum Event {
    Frame { from: u64, kind: u8, corr: u64, body: Vec<u8>, fd: Option<OwnedFd> },
    Joined { proc: u64, role: u8, pid: u32 },
    Left { proc: u64, reason: String, ended: bool },
    Fd(u64),
    Pulled(Outcome),
    Spilled(&'static str, spill::Outcome),
    Stranger { ticket: u64, target: u64 },
}

#[derive(Default)]
struct Events {
    events: Mutex<Vec<Event>>,
    transport: Mutex<Option<Arc<Transport>>>,
}

impl Events {
    fn add(&self, event: Event) {
        self.events.lock().push(event);
        if let Some(transport) = &*self.transport.lock() {
            transport.wake();
        }
    }
}

#[derive(Default)]
struct Queue {
    events: Arc<Events>,
    /// Set when the transport has started.
    bulk: OnceLock<Bulk>,
    /// Passes on connections to nodes that only connect outwards; only a head's does.
    relay: Option<Relay>,
    spiller: OnceLock<Spiller>,
}

impl Queue {
    fn add(&self, event: Event) {
        self.events.add(event);
    }

    /// Started by its first use, which most sessions never come to.
    fn spiller(&self) -> &Spiller {
        self.spiller.get_or_init(|| {
            let (written, restored) = (self.events.clone(), self.events.clone());
            Spiller::new(
                move |outcome| written.add(Event::Spilled("written", outcome)),
                move |outcome| restored.add(Event::Spilled("restored", outcome)),
            )
        })
    }

    fn bulk(&self) -> &Bulk {
        self.bulk.get().expect("the transport starts before the node is handed out")
    }
}

impl Handler for Queue {
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, fd: Option<OwnedFd>) {
        self.add(Event::Frame { from: from.0, kind: frame.kind, corr: frame.corr, body: frame.body.to_vec(), fd });
    }

    fn on_started(&self, transport: &Arc<Transport>) {
        *self.events.transport.lock() = Some(transport.clone());
        let events = self.events.clone();
        let tell = move |outcome| events.add(Event::Pulled(outcome));
        let bulk = Bulk::new(&transport.me(), transport.credentials(), transport.tls(), SILENCE_S_MAX, tell);
        assert!(self.bulk.set(bulk).is_ok(), "a transport starts once");
    }

    fn on_batch_end(&self) {}

    fn on_joined(&self, peer: PeerInfo) {
        self.add(Event::Joined { proc: peer.proc.0, role: peer.role as u8, pid: peer.pid });
    }

    fn on_closed(&self, peer: ProcId, reason: CloseReason) {
        let ended = matches!(reason, CloseReason::Closed);
        self.add(Event::Left { proc: peer.0, reason: reason.to_string(), ended });
    }

    fn on_bulk(&self, _peer: PeerInfo, stream: Stream) {
        self.bulk().accept(stream);
    }

    fn relays(&self) -> bool {
        self.relay.is_some()
    }

    fn on_stranger(&self, target: ProcId, stranger: Stranger) {
        if let Some(ticket) = self.relay.as_ref().and_then(|relay| relay.hold(stranger)) {
            self.add(Event::Stranger { ticket, target: target.0 });
        }
    }

    fn on_called_back(&self, ticket: u64, called: Called) {
        if let Some(relay) = &self.relay {
            relay.join(ticket, called);
        }
    }

    fn on_fd_ready(&self, token: u64) {
        self.add(Event::Fd(token));
    }
}

#[pyclass(frozen, module = "ray._core")]
pub(crate) struct NodeCore {
    transport: Arc<Transport>,
    queue: Arc<Queue>,
    node: ProcId,
    /// Where other nodes connect to.
    address: Option<Address>,
    /// Foreign descriptors, by token, and those that Python has been told of. The transport reports an
    /// edge; watching anew before the next wait makes a level of it, without a thread that spins while
    /// Python is busy.
    watched: Mutex<HashMap<u64, OwnedFd>>,
    told: Mutex<Vec<u64>>,
}

/// Listens on "host:port"; the first address of a host that can be bound is taken.
fn listen_at(listen: &str) -> PyResult<Listener> {
    let failed = |error: std::io::Error| {
        std::io::Error::new(error.kind(), format!("the node cannot listen at {listen:?}: {error}"))
    };
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for address in listen.to_socket_addrs().map_err(failed)? {
        match Listener::bind_tcp(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(failed(last).into())
}

/// Asks the node that listens at `address` who it is: its key, its pid, the minor version of its Python 3, and whether
/// the nodes of its cluster use TLS.
#[pyfunction]
#[pyo3(signature = (address, token, timeout_s, tls = None))]
pub(crate) fn discover(
    py: Python<'_>,
    address: &str,
    token: [u8; 32],
    timeout_s: f64,
    tls: Option<bool>,
) -> PyResult<(u64, u32, u8, bool)> {
    let until = deadline(Some(timeout_s))?.expect("a timeout was given");
    let minor = py.version_info().minor;
    let found = waiting(py, || match skate_core::transport::discover(address, token, minor, tls, until) {
        Err(DiscoverError::Interrupted) => Err(CoreError::Interrupted),
        outcome => outcome.map_err(CoreError::Discover),
    })?;
    let node = found.node;
    Ok((node.proc.0, node.pid, node.python_minor, found.tls))
}

impl NodeCore {
    /// A node that is not this one.
    fn other_node(&self, node: u64) -> PyResult<ProcId> {
        if node == 0 || node == self.node.0 {
            return Err(PyValueError::new_err(format!("{node} is not another node's key")));
        }
        Ok(ProcId(node))
    }

    fn watch_anew(&self) -> PyResult<()> {
        let watched = self.watched.lock();
        for token in self.told.lock().drain(..) {
            if let Some(fd) = watched.get(&token) {
                self.transport.unregister_fd(token);
                self.transport.register_fd(token, fd.as_fd())?;
            }
        }
        Ok(())
    }
}

#[pymethods]
impl NodeCore {
    #[new]
    #[pyo3(signature = (*, path, session, token, node, listen = None, tls = false, relays = false))]
    #[expect(clippy::too_many_arguments, reason = "all by keyword")]
    fn new(
        py: Python<'_>,
        path: String,
        session: [u8; 16],
        token: [u8; 32],
        node: u64,
        listen: Option<&str>,
        tls: bool,
        relays: bool,
    ) -> PyResult<Self> {
        let relay = relays.then(|| Relay::new(Limits::default())).transpose()?;
        let queue = Arc::new(Queue { relay, ..Queue::default() });
        let node = ProcId(node);
        let tcp = listen.map(|listen| py.detach(|| listen_at(listen))).transpose()?;
        let address = tcp.as_ref().map(Listener::local_address).transpose()?;
        let mut listeners = vec![Listener::bind_unix(path.as_ref())?];
        listeners.extend(tcp);
        let config = Config {
            me: node,
            role: Role::Node,
            python_minor: py.version_info().minor,
            session,
            token,
            node,
            node_address: Address::Unix(path.clone().into()),
            tls,
            listeners,
            io_thread: true,
        };
        let transport = Transport::start(config, queue.clone()).map_err(|error| to_py(CoreError::Start(error)))?;
        Ok(Self { transport, queue, node, address, watched: Mutex::default(), told: Mutex::default() })
    }

    /// Waits for events and takes them all.
    #[pyo3(signature = (timeout))]
    fn poll<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyList>> {
        let deadline = deadline(timeout)?;
        self.watch_anew()?;
        let waited =
            waiting(py, || match self.transport.drive(&|| !self.queue.events.events.lock().is_empty(), deadline) {
                Driven::Done | Driven::TimedOut => Ok(()),
                Driven::Interrupted => Err(CoreError::Interrupted),
                Driven::Closed => Err(CoreError::Closed("the transport was closed".into())),
            });
        waited?;
        let events = std::mem::take(&mut *self.queue.events.events.lock());
        let list = PyList::empty(py);
        for event in events {
            let item = match event {
                Event::Frame { from, kind, corr, body, fd: None } => {
                    ("frame", from, kind, corr, PyBytes::new(py, &body)).into_pyobject(py)?.into_any()
                }
                // The descriptor is Python's from here on.
                Event::Frame { from, kind, corr, body, fd: Some(fd) } => {
                    let fd = fd.into_raw_fd();
                    ("frame_fd", from, kind, corr, PyBytes::new(py, &body), fd).into_pyobject(py)?.into_any()
                }
                Event::Joined { proc, role, pid } => ("joined", proc, role, pid).into_pyobject(py)?.into_any(),
                Event::Left { proc, reason, ended } => ("left", proc, reason, ended).into_pyobject(py)?.into_any(),
                Event::Fd(token) => {
                    self.told.lock().push(token);
                    ("fd", token).into_pyobject(py)?.into_any()
                }
                Event::Pulled(Outcome { ticket, error, failures, bytes }) => {
                    let failure = |f: Failure| (f.node.0, f.refused, f.error);
                    let failures: Vec<_> = failures.into_iter().map(failure).collect();
                    ("pulled", ticket, error, failures, bytes).into_pyobject(py)?.into_any()
                }
                Event::Spilled(what, spill::Outcome { ticket, result }) => {
                    let (kind, error) = match result {
                        Ok(()) => ("", String::new()),
                        Err(error @ SpillError::Full(_)) => ("full", error.to_string()),
                        Err(error @ SpillError::Damaged(_)) => ("damaged", error.to_string()),
                        Err(error) => ("io", error.to_string()),
                    };
                    (what, ticket, kind, error).into_pyobject(py)?.into_any()
                }
                Event::Stranger { ticket, target } => ("stranger", ticket, target).into_pyobject(py)?.into_any(),
            };
            list.append(item)?;
        }
        Ok(list)
    }

    /// Where other nodes connect to, as bound: "ip:port".
    fn address(&self) -> Option<String> {
        self.address.as_ref().map(Address::to_string)
    }

    #[pyo3(signature = (node, address, relayed = false))]
    fn set_node_address(&self, node: u64, address: &str, relayed: bool) -> PyResult<()> {
        let node = self.other_node(node)?;
        let parsed = address.parse::<SocketAddr>();
        let parsed = parsed.map_err(|_| PyValueError::new_err(format!("{address:?} is not of the form ip:port")))?;
        match relayed {
            true => self.transport.set_address_of_head(node, Address::Tcp(parsed)),
            false => self.transport.set_address(node, Address::Tcp(parsed)),
        }
        Ok(())
    }

    fn forget_node(&self, node: u64, cause: &str) -> PyResult<()> {
        self.transport.forget_node(self.other_node(node)?, cause);
        Ok(())
    }

    /// Takes the connection that another node holds for this one under a ticket, by connecting to it.
    fn call_back(&self, node: u64, ticket: u64) -> PyResult<()> {
        self.transport.call_back(self.other_node(node)?, ticket);
        Ok(())
    }

    /// Nobody knows the process that the stranger with this ticket wants: it is told so.
    fn refuse_stranger(&self, ticket: u64) {
        if let Some(relay) = &self.queue.relay {
            // Whom it wants is in the stranger's own words, and is not repeated to it.
            relay.refuse(ticket, HandshakeError::UnknownTarget { target: self.node });
        }
    }

    /// Connections that wait for a node to call back, those that are passed on, and bytes passed on since the start.
    fn relayed(&self) -> (usize, usize, u64) {
        let statistics = self.queue.relay.as_ref().map(Relay::statistics).unwrap_or_default();
        (statistics.waiting, statistics.pairs, statistics.bytes)
    }

    fn send(&self, proc: u64, kind: u8, corr: u64, body: &[u8]) {
        self.transport.send(ProcId(proc), kind, corr, &[body], SendMode::Now);
    }

    fn send_fd(&self, proc: u64, kind: u8, corr: u64, body: &[u8], fd: i32) {
        // SAFETY: the caller's descriptor is open during this call; it is duplicated before it returns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        self.transport.send_fd(ProcId(proc), kind, corr, &[body], fd);
    }

    fn watch_fd(&self, fd: i32, token: u64) -> PyResult<()> {
        // SAFETY: as for `send_fd`.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let own = fd.try_clone_to_owned()?;
        self.transport.register_fd(token, own.as_fd())?;
        self.watched.lock().insert(token, own);
        Ok(())
    }

    fn unwatch_fd(&self, token: u64) {
        self.transport.unregister_fd(token);
        self.watched.lock().remove(&token);
    }

    /// Bytes that wait to be read by a process.
    fn backlog(&self, proc: u64) -> usize {
        self.transport.backlog(ProcId(proc))
    }

    fn disconnect(&self, proc: u64) {
        self.transport.disconnect(ProcId(proc));
    }

    /// Sends blocks of this segment to other nodes that ask; what is not `filled` comes by a pull. The descriptor is
    /// duplicated.
    fn offer_segment(&self, segment: u64, fd: i32, size: u64, filled: u64) -> PyResult<()> {
        // SAFETY: as for `send_fd`.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        self.queue.bulk().offer(SegmentId(segment), fd.try_clone_to_owned()?, size, filled);
        Ok(())
    }

    /// Sends no more of a segment; true if nothing of it is on its way, so that its memory may be used anew.
    fn withdraw_segment(&self, segment: u64) -> bool {
        self.queue.bulk().withdraw(SegmentId(segment))
    }

    /// Begins to pull a block into a segment of this node, from the first of the sources that delivers. Its end is an
    /// event. `sources` are (node, address, segment, offset).
    fn pull(
        &self,
        ticket: u64,
        sources: Vec<(u64, String, u64, u64)>,
        length: u64,
        segment: u64,
        fd: i32,
        offset: u64,
    ) -> PyResult<()> {
        let read = |(node, address, segment, offset): (u64, String, u64, u64)| {
            let address = parse_address(&address).ok_or_else(|| {
                PyValueError::new_err(format!("{address:?} is neither ip:port nor the path of a socket"))
            })?;
            Ok(Source { node: ProcId(node), address, segment: SegmentId(segment), offset })
        };
        let sources = sources.into_iter().map(read).collect::<PyResult<_>>()?;
        // SAFETY: as for `send_fd`.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        self.queue.bulk().pull(Pull { ticket, sources, len: length, segment: SegmentId(segment), fd, offset });
        Ok(())
    }

    /// Ends a pull soon; its event still comes.
    fn cancel_pull(&self, ticket: u64) {
        self.queue.bulk().cancel(ticket);
    }

    /// Begins to write a spill file. Its end is an event ("written", ticket, kind, error), in which an empty kind is
    /// success. `pieces` are (object, segment's descriptor or -1, path of another file, offset, length, place in the
    /// file), in order of their places.
    fn write_spill(
        &self,
        ticket: u64,
        path: PathBuf,
        pieces: Vec<(Vec<u8>, i32, PathBuf, u64, u64, u64)>,
        capacity_share: f64,
    ) -> PyResult<()> {
        let mut segments: HashMap<i32, Arc<OwnedFd>> = HashMap::new();
        let mut read = |(object, fd, from, offset, len, at): (Vec<u8>, i32, PathBuf, u64, u64, u64)| {
            let source = if fd < 0 {
                spill::Source::Record { path: from, at: offset }
            } else if let Some(segment) = segments.get(&fd) {
                spill::Source::Block { segment: segment.clone(), offset }
            } else {
                // SAFETY: as for `send_fd`.
                let segment = Arc::new(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?);
                segments.insert(fd, segment.clone());
                spill::Source::Block { segment, offset }
            };
            Ok(Piece { object: object_id(&object)?, source, len, at })
        };
        let pieces = pieces.into_iter().map(&mut read).collect::<PyResult<_>>()?;
        self.queue.spiller().write(spill::Write { ticket, path, pieces, capacity_share });
        Ok(())
    }

    /// Begins to read a spilled value into a segment of this node. Its end is an event ("restored", ticket, kind, error).
    fn read_spill(&self, ticket: u64, path: PathBuf, name: &[u8], at: u64, length: u64, fd: i32) -> PyResult<()> {
        // SAFETY: as for `send_fd`.
        let segment = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        let object = object_id(name)?;
        self.queue.spiller().read(spill::Read { ticket, path, object, at, len: length, segment });
        Ok(())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            self.transport.shutdown();
            self.queue.bulk().shutdown();
            if let Some(relay) = &self.queue.relay {
                relay.shutdown();
            }
            if let Some(spiller) = self.queue.spiller.get() {
                spiller.shutdown();
            }
        });
        *self.queue.events.transport.lock() = None;
    }
}

fn object_id(bytes: &[u8]) -> PyResult<[u8; OBJECT_LEN]> {
    bytes.try_into().map_err(|_| PyValueError::new_err(format!("an object's id has {OBJECT_LEN} bytes")))
}
