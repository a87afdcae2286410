//! What the driving thread does in a turn: reads what is ready, runs handshakes, calls the handler,
//! performs the commands and writes the frames that other threads left.
//!
//! Owned by the driver alone, so nothing here is shared. It reads each ready socket once per turn, with
//! one large buffer, and hands out frames as slices of it; epoll is level-triggered and reports again
//! what was left. Senders never come here: they write by themselves, or leave a connection on the dirty
//! list, a command in the queue, and a notice at the gate.

mod calling;
mod connecting;
mod secured;

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use skate_proto::call_back::CallBack;
use skate_proto::frame::{self, FLAG_FD, Header, Split};
use skate_proto::handshake::{Acceptor, HandshakeError, PREFACE_LEN, Preface, Role, Step, WHO_LISTENS};
use skate_proto::ids::ProcId;

use super::connection::{Connection, Sent};
use super::eagerness::{Eagerness, LOOK, SHORT};
use super::fork::PrivateFd;
use super::poller::{Events, Poller, Source};
use super::slots::{Message, Phase, Slot, Slots};
use super::socket::{self, FDS_MAX, Socket};
use super::{CloseReason, Command, Frame, PASS_CONN, Peer, Transport};

pub use calling::{Called, Stranger};

/// One read takes at most this much. Larger bodies take several.
const READ_BYTES: usize = 256 << 10;
/// Reads of a connection that ends: more than fit into a socket's buffer. A peer that goes on sending
/// although it does not want to hear must not hold us.
const LAST_READS_MAX: usize = 256;
/// A handshake that takes longer is given up.
const HANDSHAKE_S_MAX: Duration = Duration::from_secs(5);
/// Strangers at a time. When there is one more, the one that has kept silent for longest is closed; if all have said
/// whom they want, more wait in the listener's backlog, or in `passed`.
const STRANGERS_MAX: usize = 256;
/// Passed connections that wait for their handshake. More are closed.
const PASSED_MAX: usize = 1024;
/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 64;
/// How long nothing is accepted or connected after the process ran out of descriptors, or a peer seems to have.
const DESCRIPTOR_PAUSE: Duration = Duration::from_millis(100);
/// How long to wait when a listener's backlog is full: the kernel does not tell when it no longer is.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);
/// How often, and for how long, a head is tried through which the way to a process leads: a little longer than its node
/// waits for the next head, after which that node is lost.
const HEAD_PAUSE: Duration = Duration::from_millis(100);
const HEAD_S_MAX: Duration = Duration::from_secs(75);
/// Warnings are no more frequent than this.
const WARNING_PAUSE: Duration = Duration::from_secs(1);

/// How joining the node goes, while the transport starts.
#[derive(Debug)]
pub(super) enum Joining {
    Pending,
    Joined,
    Failed(CloseReason),
}

pub(super) struct Reactor {
    poller: Arc<Poller>,
    events: Events,
    eagerness: Eagerness,
    buffer: Vec<u8>,
    /// What was read of a secured connection, and what it says. Empty until there is one.
    records: Vec<u8>,
    plain: Vec<u8>,
    slots: Slots,
    listeners: Vec<PrivateFd>,
    accepting: Accepting,
    /// Ends of handshakes, in order; entries of finished ones are skipped.
    deadlines: VecDeque<(Instant, u32, u32)>,
    /// Connections whose listener had no room, when to try again, and when to give up.
    retries: Vec<(Instant, Instant, Arc<Connection>)>,
    /// Connections to processes on nodes whose address was asked for, and when to give up.
    waiting: Vec<(ProcId, Instant, Arc<Connection>)>,
    passed: VecDeque<([u8; PREFACE_LEN], OwnedFd)>,
    /// Nodes that are to be called back, and the tickets.
    calls: VecDeque<(ProcId, u64)>,
    /// Memory of the lists that are swapped with those of the senders.
    dirty: Vec<Arc<Connection>>,
    commands: Vec<Command>,
    /// The handler was called in this turn.
    told: bool,
    warned_at: Option<Instant>,
    pub(super) joining: Option<Joining>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Accepting {
    Always,
    /// Too many strangers.
    WhenFewer,
    /// Out of descriptors.
    At(Instant),
}

impl Reactor {
    pub(super) fn new(poller: Arc<Poller>, listeners: Vec<PrivateFd>) -> std::io::Result<Self> {
        for (index, listener) in listeners.iter().enumerate() {
            poller.add(listener, Source::Listener(index as u32), EventFlags::IN)?;
        }
        Ok(Self {
            poller,
            events: Events::new(),
            eagerness: Eagerness::default(),
            buffer: vec![0; READ_BYTES],
            records: Vec::new(),
            plain: Vec::new(),
            slots: Slots::default(),
            listeners,
            accepting: Accepting::Always,
            deadlines: VecDeque::new(),
            retries: Vec::new(),
            waiting: Vec::new(),
            passed: VecDeque::new(),
            calls: VecDeque::new(),
            dirty: Vec::new(),
            commands: Vec::new(),
            told: false,
            warned_at: None,
            joining: None,
        })
    }

    /// Waits until a socket is ready, a deadline of the reactor's own passes, or `until`.
    pub(super) fn wait(&mut self, until: Option<Instant>, pending: bool) -> rustix::io::Result<()> {
        let timeout = if pending {
            Some(Duration::ZERO)
        } else {
            let at = [until, self.next_deadline()].into_iter().flatten().min();
            at.map(|at| at.saturating_duration_since(Instant::now()))
        };
        self.poller.wait(&mut self.events, timeout)
    }

    /// The same for a thread of the user's, which looks for a while before it sleeps, as long as that pays.
    pub(super) fn wait_eagerly(&mut self, until: Option<Instant>, pending: bool) -> rustix::io::Result<()> {
        if pending {
            return self.wait(until, pending);
        }
        let begun = Instant::now();
        if self.eagerness.is_high() {
            loop {
                self.poller.wait(&mut self.events, Some(Duration::ZERO))?;
                if !self.events.is_empty() {
                    self.eagerness.paid();
                    return Ok(());
                }
                if begun.elapsed() >= LOOK {
                    self.eagerness.failed();
                    break;
                }
            }
        }
        let waited = self.wait(until, pending);
        if begun.elapsed() < SHORT {
            self.eagerness.paid();
        }
        waited
    }

    /// Handles what the last wait reported.
    pub(super) fn dispatch(&mut self, t: &Transport) {
        let events = mem::take(&mut self.events);
        for &event in &events {
            match event {
                (Source::Connection { index, life }, flags) => self.on_socket(t, index, life, flags),
                (Source::Kick, _) => {}
                (Source::Foreign(id), _) => {
                    if let Some(token) = t.foreign.lock().token(id) {
                        self.told = true;
                        t.handler.on_fd_ready(token);
                    }
                }
                (Source::Listener(index), _) => self.accept(t, index as usize),
            }
        }
        self.events = events;
        self.pass_deadlines(t);
        self.admit_calls(t);
        if mem::take(&mut self.told) {
            t.handler.on_batch_end();
        }
    }

    /// Performs the commands and writes the frames left by senders, among them those of the handler.
    pub(super) fn settle(&mut self, t: &Transport) {
        if !t.gate.take_pending() {
            return;
        }
        let mut commands = mem::take(&mut self.commands);
        mem::swap(&mut commands, &mut *t.commands.lock());
        for command in commands.drain(..) {
            self.perform(t, command);
        }
        self.commands = commands;
        if mem::take(&mut self.told) {
            t.handler.on_batch_end();
        }
        self.flush_dirty(t);
    }

    /// Writes what can still be written, at the end.
    pub(super) fn finish(&mut self, t: &Transport) {
        self.flush_dirty(t);
    }

    fn flush_dirty(&mut self, t: &Transport) {
        let mut dirty = mem::take(&mut self.dirty);
        mem::swap(&mut dirty, &mut *t.dirty.lock());
        for connection in dirty.drain(..) {
            t.see_to(&connection, connection.flush(false));
        }
        self.dirty = dirty;
    }

    fn perform(&mut self, t: &Transport, command: Command) {
        match command {
            Command::Connect(connection) => {
                let until = Instant::now() + HANDSHAKE_S_MAX;
                self.connect(t, connection, until);
            }
            Command::Close(connection, reason) => {
                if t.is_current(&connection) {
                    self.close_peer(t, connection.peer, reason);
                }
            }
            Command::Disconnect(peer) => {
                if t.peers.read().contains_key(&peer) {
                    self.close_peer(t, peer, CloseReason::Disconnected);
                }
            }
            Command::NodeKnown(node) => self.on_node_known(t, node),
            Command::NodeGone(node) => self.on_node_gone(t, node),
            Command::CallBack(via, ticket) => self.on_call_wanted(t, via, ticket),
        }
    }

    // ---- sockets

    fn on_socket(&mut self, t: &Transport, index: u32, life: u32, flags: EventFlags) {
        let Some(slot) = self.slots.get(index, life) else {
            return;
        };
        if flags.contains(EventFlags::OUT) {
            match &slot.phase {
                Phase::Open { connection, .. } => {
                    let connection = Arc::clone(connection);
                    self.on_room(t, &connection);
                }
                Phase::Connecting(_) => return self.on_connected(t, index),
                Phase::Calling(_) => return self.on_call_connected(t, index),
                _ => {}
            }
        }
        if !flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            return;
        }
        let Some(slot) = self.slots.get(index, life) else {
            return;
        };
        match slot.phase {
            _ if slot.socket.channel().is_some() => self.on_records(t, index),
            Phase::Open { peer, .. } => {
                if let Err(reason) = self.read_frames(t, index, peer) {
                    self.close_peer(t, peer, reason);
                }
            }
            Phase::Connecting(_) => self.on_connected(t, index),
            Phase::Calling(_) => self.on_call_connected(t, index),
            Phase::Draining => self.drain(index),
            _ => self.read_handshake(t, index),
        }
    }

    fn on_room(&mut self, t: &Transport, connection: &Arc<Connection>) {
        let sent = connection.flush(true);
        if sent == Sent::Full {
            return;
        }
        let Some((socket, token)) = connection.opened() else {
            return;
        };
        let _ = self.poller.modify(&**socket, Source::decode(*token), EventFlags::IN);
        // A sender may have filled the socket again and asked for this notice before it was withdrawn.
        if connection.is_armed() {
            t.see_to(connection, Sent::Full);
        }
    }

    /// Reads a connection once. False if nothing was there.
    fn read_frames(&mut self, t: &Transport, index: u32, peer: ProcId) -> Result<bool, CloseReason> {
        let Some(slot) = self.slots.at(index) else {
            return Ok(false);
        };
        if slot.socket.channel().is_some() {
            return self.read_secured(t, index);
        }
        let mut passed = Vec::new();
        let read = read_once(t, slot, peer, &mut self.buffer, &mut passed);
        for (preface, fd) in passed {
            self.on_passed(t, peer, preface, fd);
        }
        let read = read?;
        self.told |= read.frames;
        Ok(read.bytes)
    }

    /// Hands out what a peer sent before it ended, on all of its connections: it may have sent on another
    /// than the one whose end was noticed first.
    fn read_last_words(&mut self, t: &Transport, peer: ProcId) {
        for index in self.slots.of_peer(peer) {
            let is_open = |slot: &mut Slot| matches!(slot.phase, Phase::Open { .. });
            if !self.slots.at(index).is_some_and(is_open) {
                continue;
            }
            for _ in 0..LAST_READS_MAX {
                if !matches!(self.read_frames(t, index, peer), Ok(true)) {
                    break;
                }
            }
        }
    }

    // ---- handshakes

    fn insert(&mut self, socket: Arc<Socket>, phase: Phase, flags: EventFlags, until: Instant) -> Option<u32> {
        let (index, source) = self.slots.insert(Slot::new(Arc::clone(&socket), phase, until));
        if self.poller.add(&*socket, source, flags).is_err() {
            self.slots.remove(index);
            return None;
        }
        if let Source::Connection { life, .. } = source {
            self.deadlines.push_back((until, index, life));
        }
        Some(index)
    }

    fn remove(&mut self, index: u32) {
        if let Some(slot) = self.slots.remove(index) {
            self.poller.delete(&*slot.socket);
        }
        self.admit();
    }

    fn accept(&mut self, t: &Transport, index: usize) {
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.has_room(t) {
                return self.set_accepting(Accepting::WhenFewer);
            }
            match socket::accept(&self.listeners[index]) {
                Ok(socket) => {
                    socket.tune();
                    let phase = Phase::Preface(Message::default());
                    let until = Instant::now() + HANDSHAKE_S_MAX;
                    self.insert(Arc::new(socket), phase, EventFlags::IN, until);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.warn(t, "no descriptor is left for a new connection; raise the limit (ulimit -n)");
                    return self.set_accepting(Accepting::At(Instant::now() + DESCRIPTOR_PAUSE));
                }
                // The connection was given up by its peer.
                Err(_) => {}
            }
        }
    }

    /// Whether one more stranger may come, after closing one that has said nothing if need be: what connects and
    /// keeps silent must not keep workers out, which speak at once.
    fn has_room(&mut self, t: &Transport) -> bool {
        while self.slots.strangers() >= STRANGERS_MAX {
            let Some((index, life)) = self.longest_silent() else {
                return false;
            };
            // What it has said may only not have been read yet.
            self.read_handshake(t, index);
            if self.slots.get(index, life).is_some_and(|slot| slot.phase.is_silent()) {
                self.remove(index);
            }
        }
        true
    }

    fn longest_silent(&mut self) -> Option<(u32, u32)> {
        let Self { deadlines, slots, .. } = self;
        let is_silent = |&(index, life): &(u32, u32)| slots.get(index, life).is_some_and(|s| s.phase.is_silent());
        deadlines.iter().map(|&(_, index, life)| (index, life)).find(is_silent)
    }

    fn set_accepting(&mut self, accepting: Accepting) {
        if self.accepting == accepting {
            return;
        }
        let flags = if accepting == Accepting::Always { EventFlags::IN } else { EventFlags::empty() };
        for (index, listener) in self.listeners.iter().enumerate() {
            let _ = self.poller.modify(listener, Source::Listener(index as u32), flags);
        }
        self.accepting = accepting;
    }

    /// Lets waiting strangers in, when there is room.
    fn admit(&mut self) {
        if self.slots.strangers() < STRANGERS_MAX && self.accepting == Accepting::WhenFewer {
            self.set_accepting(Accepting::Always);
        }
    }

    fn on_passed(&mut self, t: &Transport, from: ProcId, preface: [u8; PREFACE_LEN], fd: OwnedFd) {
        if from != t.node || self.passed.len() >= PASSED_MAX {
            return self.warn(t, "a passed connection was dropped: too many, or not from the node");
        }
        self.passed.push_back((preface, fd));
        self.admit_passed(t);
    }

    fn admit_passed(&mut self, t: &Transport) {
        while !self.passed.is_empty() && self.has_room(t) {
            let Some((preface, fd)) = self.passed.pop_front() else {
                return;
            };
            if socket::set_nonblocking(&fd).is_err() {
                continue;
            }
            let phase = Phase::Preface(Message::default());
            let until = Instant::now() + HANDSHAKE_S_MAX;
            let socket = Arc::new(Socket::new(fd));
            if let Some(index) = self.insert(socket, phase, EventFlags::IN, until) {
                self.on_preface(t, index, &preface);
            }
        }
    }

    fn read_handshake(&mut self, t: &Transport, index: u32) {
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        let (message, wanted) = match &mut slot.phase {
            Phase::Preface(message) | Phase::Called(message) => (message, PREFACE_LEN),
            Phase::Accepting(machine, message) => (message, machine.wants()),
            Phase::Greeting(machine, message, _) => (message, machine.wants()),
            Phase::Calling(_) | Phase::Connecting(_) | Phase::Open { .. } | Phase::Draining => return,
        };
        match slot.socket.receive_plain(message.room(wanted)) {
            Ok(0) => self.fail(t, index, CloseReason::Closed),
            Ok(len) => {
                if let Some(bytes) = message.advance(len) {
                    self.on_message(t, index, &bytes);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => self.fail(t, index, CloseReason::Io(error.into())),
        }
    }

    fn on_message(&mut self, t: &Transport, index: u32, bytes: &[u8]) {
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        let step = match &mut slot.phase {
            Phase::Preface(_) | Phase::Called(_) => {
                // The length is what was asked for.
                let preface = bytes.try_into().expect("a whole preface");
                return self.on_preface(t, index, preface);
            }
            Phase::Accepting(machine, _) => machine.handle(bytes),
            Phase::Greeting(machine, ..) => machine.handle(bytes),
            Phase::Calling(_) | Phase::Connecting(_) | Phase::Open { .. } | Phase::Draining => return,
        };
        match step {
            Ok(Step::Send(answer)) => self.say(t, index, &answer),
            Ok(Step::Done { peer, send }) => {
                if !send.is_empty() {
                    self.say(t, index, &send);
                }
                self.on_proven(t, index, peer);
            }
            Err(error) => self.fail(t, index, CloseReason::Handshake(error)),
        }
    }

    /// Routes a stranger to the process it wants.
    fn on_preface(&mut self, t: &Transport, index: u32, bytes: &[u8; PREFACE_LEN]) {
        if let Some(call) = CallBack::decode(bytes) {
            return self.on_call_back(t, index, &call);
        }
        let preface = match Preface::decode(bytes).and_then(|p| p.check(&t.credentials.session).map(|()| p)) {
            Ok(preface) => preface,
            Err(error) => return self.fail(t, index, CloseReason::Handshake(error)),
        };
        let target = preface.target;
        if target == t.me.proc || target == WHO_LISTENS || self.listeners.is_empty() {
            return match self.accept_peer(t, index, bytes, &preface) {
                Ok(machine) => self.slots.set_phase(index, Phase::Accepting(machine, Message::default())),
                Err(reason) => self.fail(t, index, reason),
            };
        }
        // Another node is a peer as well; a way to it that leads through this one is none by descriptor.
        let is_member = |peer: &&Peer| peer.info.is_some() && peer.connection.carries_descriptors() == Some(true);
        let joined = t.peers.read().get(&target).filter(is_member).map(|p| Arc::clone(&p.connection));
        let Some(connection) = joined else {
            if t.handler.relays() && self.slots.at(index).is_some_and(|slot| slot.socket.is_tcp()) {
                return self.hand_out_stranger(t, index, target, *bytes);
            }
            let error = HandshakeError::UnknownTarget { target };
            return self.fail(t, index, CloseReason::Handshake(error));
        };
        let Some(slot) = self.slots.remove(index) else {
            return;
        };
        self.poller.delete(&*slot.socket);
        let header = Header { body_len: PREFACE_LEN as u32, kind: PASS_CONN, flags: FLAG_FD, corr: 0 };
        let sent = connection.send_now(&header.encode(), &[bytes], Some(slot.socket.as_fd()));
        t.see_to(&connection, sent);
        self.admit();
    }

    /// Begins our side of a handshake, secured if our node's cluster wants it and the peer is not on our own node.
    fn accept_peer(
        &mut self,
        t: &Transport,
        index: u32,
        bytes: &[u8; PREFACE_LEN],
        preface: &Preface,
    ) -> Result<Acceptor, CloseReason> {
        let socket = self.slots.at(index).map(|slot| Arc::clone(&slot.socket)).ok_or(CloseReason::Closed)?;
        preface.check_tls(socket.is_tcp() && t.nodes_use_tls()).map_err(CloseReason::Handshake)?;
        let machine = Acceptor::new(&t.me, &t.credentials, bytes, nonce()).map_err(CloseReason::Handshake)?;
        if preface.tls {
            socket.secure(t.tls.get()?.accept()?);
        }
        Ok(machine.telling(t.nodes_use_tls()))
    }

    /// Writes a handshake message, which always fits into the empty buffer of a new socket.
    fn say(&mut self, t: &Transport, index: u32, bytes: &[u8]) {
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        match slot.socket.send(&[IoSlice::new(bytes)], None) {
            Ok(len) if len == bytes.len() => {}
            Ok(_) => self.fail(t, index, CloseReason::Io(std::io::ErrorKind::WriteZero.into())),
            Err(error) => self.fail(t, index, CloseReason::Io(error.into())),
        }
    }

    fn on_proven(&mut self, t: &Transport, index: u32, peer: super::PeerInfo) {
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        let socket = Arc::clone(&slot.socket);
        let token = self.slots.source(index).encode();
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        if let Phase::Greeting(machine, _, connection) = &slot.phase {
            let connection = Arc::clone(connection);
            if peer.proc == t.node && self.joining.is_some() {
                t.nodes_use_tls.store(machine.nodes_use_tls(), Ordering::Relaxed);
            }
            let phase = Phase::Open { peer: peer.proc, inbound: false, connection: Arc::clone(&connection) };
            self.slots.set_phase(index, phase);
            if let Some(entry) = t.peers.write().get_mut(&peer.proc) {
                entry.info = Some(peer);
            }
            t.see_to(&connection, connection.open(socket, token));
            if peer.proc == t.node && self.joining.is_some() {
                self.joining = Some(Joining::Joined);
            }
            return;
        }
        if peer.proc == t.me.proc {
            return self.remove(index);
        }
        if peer.role == Role::Bulk {
            return self.hand_out(t, index, peer);
        }
        // A process opens one connection at a time, so it gave an earlier one up, or it is a restarted
        // copy. Either way what was agreed with the earlier one is void.
        if self.slots.has_inbound(peer.proc) {
            self.close_peer(t, peer.proc, CloseReason::Replaced);
        }
        let connection = Arc::new(Connection::new(peer.proc));
        let phase = Phase::Open { peer: peer.proc, inbound: true, connection: Arc::clone(&connection) };
        self.slots.set_phase(index, phase);
        t.see_to(&connection, connection.open(socket, token));
        t.note_joined(peer, connection);
        self.told = true;
        t.handler.on_joined(peer);
        self.admit();
        self.admit_passed(t);
    }

    /// A proven connection that carries no frames: the handler's from now on.
    fn hand_out(&mut self, t: &Transport, index: u32, peer: super::PeerInfo) {
        let Some(slot) = self.slots.remove(index) else {
            return;
        };
        self.poller.delete(&*slot.socket);
        match slot.socket.to_stream() {
            Ok(stream) => {
                self.told = true;
                t.handler.on_bulk(peer, stream);
            }
            Err(_) => self.warn(t, "no descriptor is left for a bulk connection; raise the limit (ulimit -n)"),
        }
        self.admit();
        self.admit_passed(t);
    }

    fn drain(&mut self, index: u32) {
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        match slot.socket.receive_plain(&mut self.buffer) {
            Ok(1..) | Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(0) | Err(_) => self.remove(index),
        }
    }

    // ---- endings

    /// Ends one connection. If it was ours, or proven, its peer is lost.
    fn fail(&mut self, t: &Transport, index: u32, reason: CloseReason) {
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        if let Phase::Greeting(_, _, connection) = &slot.phase
            && matches!(reason, CloseReason::Closed | CloseReason::Io(_))
        {
            // Who refuses says so. Closed without a word, it found no descriptor at the peer, or had to make room
            // for others at the node; or the peer has died, which the node will say when asked again.
            let (connection, until) = (Arc::clone(connection), slot.until);
            self.remove(index);
            return self.connect_later(t, connection, DESCRIPTOR_PAUSE, until, reason);
        }
        if let Phase::Connecting(connection) = &slot.phase {
            let connection = Arc::clone(connection);
            self.remove(index);
            return self.give_up(t, connection, reason);
        }
        if let Some(peer) = slot.phase.peer() {
            return self.close_peer(t, peer, reason);
        }
        let socket = Arc::clone(&slot.socket);
        let text = match &reason {
            CloseReason::Handshake(error) => {
                if let HandshakeError::TlsMissing | HandshakeError::TlsUnexpected = error {
                    self.warn(t, &format!("a connection was refused: {error}"));
                }
                if let Some(answer) = error.refusal()
                    && socket.send_in_clear(&[IoSlice::new(&answer)]).is_ok()
                {
                    socket.shut_write();
                    return self.slots.set_phase(index, Phase::Draining);
                }
                error.to_string()
            }
            CloseReason::Tls(error) => error.to_string(),
            _ => return self.remove(index),
        };
        self.warn(t, &format!("a connection was closed before its handshake: {text}"));
        self.remove(index);
    }

    /// Ends everything with a peer and tells the handler.
    pub(super) fn close_peer(&mut self, t: &Transport, peer: ProcId, reason: CloseReason) {
        if matches!(reason, CloseReason::Closed | CloseReason::Io(_) | CloseReason::NodeGone(_)) {
            self.read_last_words(t, peer);
        }
        if let Some(entry) = t.peers.write().remove(&peer) {
            entry.connection.close();
        }
        for index in self.slots.of_peer(peer) {
            self.remove(index);
        }
        self.retries.retain(|(_, _, connection)| connection.peer != peer);
        self.waiting.retain(|(_, _, connection)| connection.peer != peer);
        // Of a node that was not found nothing was learned about the process.
        if !matches!(reason, CloseReason::NodeGone(_) | CloseReason::NodeUnknown) {
            t.routes.lock().drop_route(peer);
        }
        if peer == t.node && matches!(self.joining, Some(Joining::Pending)) {
            self.joining = Some(Joining::Failed(reason));
            return;
        }
        self.told = true;
        t.handler.on_closed(peer, reason);
    }

    // ---- time

    fn next_deadline(&mut self) -> Option<Instant> {
        while let Some(&(_, index, life)) = self.deadlines.front() {
            match self.slots.get(index, life) {
                Some(slot) if slot.phase.is_handshake() => break,
                _ => self.deadlines.pop_front(),
            };
        }
        let accept = match self.accepting {
            Accepting::At(at) => Some(at),
            Accepting::Always | Accepting::WhenFewer => None,
        };
        let retry = self.retries.iter().map(|(at, ..)| *at).min();
        let handshake = self.deadlines.front().map(|(at, ..)| *at);
        let address = self.waiting.iter().map(|(_, until, _)| *until).min();
        [accept, retry, handshake, address].into_iter().flatten().min()
    }

    fn pass_deadlines(&mut self, t: &Transport) {
        let Some(first) = self.next_deadline() else {
            return;
        };
        let now = Instant::now();
        if now < first {
            return;
        }
        if matches!(self.accepting, Accepting::At(at) if at <= now) {
            self.set_accepting(Accepting::Always);
        }
        while let Some(&(at, index, life)) = self.deadlines.front()
            && at <= now
        {
            self.deadlines.pop_front();
            match self.slots.get(index, life) {
                Some(slot) if matches!(slot.phase, Phase::Draining) => self.remove(index),
                Some(slot) if slot.phase.is_handshake() => self.fail(t, index, CloseReason::HandshakeTimeout),
                _ => {}
            }
        }
        self.admit_passed(t);
        let due = self.retries.extract_if(.., |(at, ..)| *at <= now).collect::<Vec<_>>();
        for (_, until, connection) in due {
            self.connect(t, connection, until);
        }
        let unanswered = self.waiting.extract_if(.., |(_, until, _)| *until <= now).collect::<Vec<_>>();
        for (_, _, connection) in unanswered {
            self.close_peer(t, connection.peer, CloseReason::NodeUnknown);
        }
    }

    fn warn(&mut self, t: &Transport, text: &str) {
        let now = Instant::now();
        if self.warned_at.is_none_or(|at| now - at >= WARNING_PAUSE) {
            self.warned_at = Some(now);
            t.handler.on_warning(text);
        }
    }
}

/// Whether the system has no descriptor, or no memory for one, just now.
fn is_exhaustion(error: &std::io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// What a read brought.
struct Read {
    bytes: bool,
    frames: bool,
}

/// Reads a connection once and hands out the frames that are complete.
fn read_once(
    t: &Transport,
    slot: &mut Slot,
    peer: ProcId,
    buffer: &mut [u8],
    passed: &mut Vec<([u8; PREFACE_LEN], OwnedFd)>,
) -> Result<Read, CloseReason> {
    let Slot { socket, assembler, fds, .. } = slot;
    let mut read = Read { bytes: false, frames: false };
    let mut behind = if assembler.is_empty() {
        let len = receive(socket, &mut [IoSliceMut::new(buffer)], fds)?;
        read.bytes = len > 0;
        &buffer[..len]
    } else {
        let (room, complete) = assembler.room();
        let room_len = room.len();
        let len = if complete {
            receive(socket, &mut [IoSliceMut::new(room), IoSliceMut::new(buffer)], fds)?
        } else {
            receive(socket, &mut [IoSliceMut::new(room)], fds)?
        };
        read.bytes = len > 0;
        let inside = len.min(room_len);
        assembler.advance(inside)?;
        if let Some((header, body)) = assembler.finished() {
            deliver(t, peer, header, body, fds, passed)?;
            read.frames = true;
            assembler.clear();
        }
        &buffer[..len - inside]
    };
    while !behind.is_empty() {
        match frame::split(behind)? {
            Split::Frame { header, body, rest } => {
                deliver(t, peer, header, body, fds, passed)?;
                read.frames = true;
                behind = rest;
            }
            Split::Need { .. } => {
                assembler.keep(behind)?;
                break;
            }
        }
    }
    Ok(read)
}

/// Zero bytes mean that nothing was there after all.
fn receive(
    socket: &Socket,
    parts: &mut [IoSliceMut<'_>],
    fds: &mut VecDeque<Option<OwnedFd>>,
) -> Result<usize, CloseReason> {
    let len = match socket.receive(parts, fds) {
        Ok(0) => return Err(CloseReason::Closed),
        Ok(len) => len,
        Err(Errno::AGAIN | Errno::INTR) => 0,
        Err(error) => return Err(CloseReason::Io(error.into())),
    };
    if fds.len() > FDS_MAX { Err(CloseReason::Descriptors) } else { Ok(len) }
}

fn deliver(
    t: &Transport,
    from: ProcId,
    header: Header,
    body: &[u8],
    fds: &mut VecDeque<Option<OwnedFd>>,
    passed: &mut Vec<([u8; PREFACE_LEN], OwnedFd)>,
) -> Result<(), CloseReason> {
    let fd = if header.carries_fd() { fds.pop_front().ok_or(CloseReason::Descriptors)? } else { None };
    if header.kind == PASS_CONN {
        let preface = body.try_into().map_err(|_| CloseReason::Descriptors)?;
        // Without a descriptor this process has none left; the stranger sees its connection end.
        passed.extend(fd.map(|fd| (preface, fd)));
        return Ok(());
    }
    let Header { kind, flags, corr, .. } = header;
    t.handler.on_frame(from, Frame { kind, flags, corr, body }, fd);
    Ok(())
}

/// Random, and never used before.
pub(crate) fn nonce() -> [u8; 32] {
    let mut nonce = [0; 32];
    let filled = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty());
    // Up to 256 bytes are given whole and without an error once the system has started.
    assert_eq!(filled, Ok(nonce.len()), "the system gives random bytes");
    nonce
}
