//! The connections that this process makes: the way to a peer, waiting for its node's address, trying again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use skate_proto::handshake::{Connector, HandshakeError};
use skate_proto::ids::ProcId;

use super::super::connection::Connection;
use super::super::routes::Way;
use super::super::slots::{Message, Phase};
use super::super::socket::{Connecting, Socket};
use super::super::{CloseReason, Transport};
use super::{CONNECT_PAUSE, DESCRIPTOR_PAUSE, HANDSHAKE_S_MAX, HEAD_PAUSE, HEAD_S_MAX, Reactor, is_exhaustion, nonce};

impl Reactor {
    pub(super) fn connect(&mut self, t: &Transport, connection: Arc<Connection>, until: Instant) {
        let target = connection.peer;
        if !t.is_current(&connection) {
            return;
        }
        let way = t.routes.lock().way(target);
        let other = match way {
            Way::OwnNode => None,
            Way::Node(address) => Some(address),
            Way::Unknown(node) => return self.ask_for(t, node, connection, until),
            Way::Gone(cause) => return self.close_peer(t, target, CloseReason::NodeGone(cause)),
            Way::None => {
                let error = HandshakeError::UnknownTarget { target };
                return self.close_peer(t, target, CloseReason::Handshake(error));
            }
        };
        let address = other.as_ref().unwrap_or(&t.node_address);
        let failed = |source| match other.clone() {
            Some(address) => CloseReason::Unreachable { address, source },
            None => CloseReason::Connect(source),
        };
        let (socket, phase, flags) = match Socket::connect(address) {
            Ok(Connecting::Done(socket)) => (socket, Phase::Connecting(connection), EventFlags::IN),
            Ok(Connecting::InProgress(socket)) => (socket, Phase::Connecting(connection), EventFlags::OUT),
            Ok(Connecting::Full) => {
                let reason = failed(std::io::ErrorKind::TimedOut.into());
                return self.connect_later(t, connection, CONNECT_PAUSE, until, reason);
            }
            Err(error) if is_exhaustion(&error) => {
                self.warn(t, "no descriptor is left to connect to another process; raise the limit (ulimit -n)");
                return self.connect_later(t, connection, DESCRIPTOR_PAUSE, until, failed(error));
            }
            Err(error) => return self.give_up(t, connection, failed(error)),
        };
        let connected = flags == EventFlags::IN;
        match self.insert(Arc::new(socket), phase, flags, until) {
            Some(index) if connected => self.on_connected(t, index),
            Some(_) => {}
            None => {
                let error = std::io::Error::last_os_error();
                self.close_peer(t, target, failed(error));
            }
        }
    }

    /// Tries again after a pause, or gives up when that would be too late.
    pub(super) fn connect_later(
        &mut self,
        t: &Transport,
        connection: Arc<Connection>,
        pause: Duration,
        until: Instant,
        reason: CloseReason,
    ) {
        let again = Instant::now() + pause;
        if again < until {
            self.retries.push((again, until, connection));
        } else {
            self.give_up(t, connection, reason);
        }
    }

    /// A connection could not be made. If the way leads through the head, that says nothing of the process: as long as
    /// there may be a next head it is tried again.
    pub(super) fn give_up(&mut self, t: &Transport, connection: Arc<Connection>, reason: CloseReason) {
        let again = Instant::now() + HEAD_PAUSE;
        if again < connection.since + HEAD_S_MAX && t.routes.lock().is_behind_head(connection.peer) {
            self.retries.push((again, again + HANDSHAKE_S_MAX, connection));
        } else {
            self.close_peer(t, connection.peer, reason);
        }
    }

    /// Keeps a connection until the address of its node is known. The handler is asked for it, unless it was already
    /// and others wait for its answer.
    fn ask_for(&mut self, t: &Transport, node: ProcId, connection: Arc<Connection>, until: Instant) {
        let is_asked = self.waiting.iter().any(|(of, ..)| *of == node);
        self.waiting.push((node, until, connection));
        if !is_asked {
            self.told = true;
            t.handler.on_unknown_node(node);
        }
    }

    pub(super) fn on_node_known(&mut self, t: &Transport, node: ProcId) {
        for (_, until, connection) in self.waiting.extract_if(.., |(of, ..)| *of == node).collect::<Vec<_>>() {
            self.connect(t, connection, until);
        }
    }

    /// Ends the connections with a node and with processes on it that are not open yet. Open ones end by themselves,
    /// when what was sent on them has been read.
    pub(super) fn on_node_gone(&mut self, t: &Transport, node: ProcId) {
        // Open connections too: one that was cut may look well for ten seconds more.
        let greeted = self.slots.unfinished().into_iter();
        let retried = self.retries.iter().map(|(_, _, connection)| connection.peer);
        let waiting = self.waiting.iter().map(|(_, _, connection)| connection.peer);
        let mut concerned = greeted.chain(retried).chain(waiting).collect::<Vec<_>>();
        concerned.extend(t.peers.read().keys());
        concerned.sort_unstable();
        concerned.dedup();
        for peer in concerned {
            let cause = {
                let routes = t.routes.lock();
                if routes.is_on(peer, node) { routes.way(peer) } else { Way::OwnNode }
            };
            if let Way::Gone(cause) = cause {
                self.close_peer(t, peer, CloseReason::NodeGone(cause));
            }
        }
    }

    /// The socket is connected, or failed to.
    pub(super) fn on_connected(&mut self, t: &Transport, index: u32) {
        let source = self.slots.source(index);
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        let Phase::Connecting(connection) = &slot.phase else {
            return;
        };
        let connection = Arc::clone(connection);
        let socket = Arc::clone(&slot.socket);
        if let Err(error) = socket.take_error() {
            let way = t.routes.lock().way(connection.peer);
            let reason = match way {
                Way::Node(address) => CloseReason::Unreachable { address, source: error },
                _ => CloseReason::Connect(error),
            };
            return self.fail(t, index, reason);
        }
        let _ = self.poller.modify(&*socket, source, EventFlags::IN);
        if socket.is_tcp() && t.nodes_use_tls() {
            return self.greet_secured(t, index, connection, &socket);
        }
        let (machine, first) = Connector::new(&t.me, &t.credentials, connection.peer, nonce());
        self.slots.set_phase(index, Phase::Greeting(machine, Message::default(), connection));
        self.say(t, index, &first);
    }
}
