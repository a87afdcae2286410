//! Calling back: how a node that nobody can connect to gets the connections that are meant for it, and how the node to
//! which they came hands them out.

use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;

use skate_proto::call_back::CallBack;
use skate_proto::handshake::{PREFACE_LEN, PROTOCOL_VERSION};
use skate_proto::ids::ProcId;

use super::super::fork::PrivateFd;
use super::super::routes::Way;
use super::super::slots::{Message, Phase};
use super::super::socket::{Connecting, Socket};
use super::super::{CloseReason, Transport};
use super::{HANDSHAKE_S_MAX, Reactor, STRANGERS_MAX};

/// Calls that wait for room among the strangers. More are not made: those who are waited for give up, or try again.
const CALLS_MAX: usize = 1024;

/// A connection for a process that is not here, of which the preface was read.
pub struct Stranger {
    pub(crate) preface: [u8; PREFACE_LEN],
    pub(crate) socket: PrivateFd,
}

impl fmt::Debug for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stranger").finish_non_exhaustive()
    }
}

/// A connection by which a node calls back, of which the ticket was read.
pub struct Called {
    pub(crate) socket: PrivateFd,
}

impl fmt::Debug for Called {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Called").finish_non_exhaustive()
    }
}

impl Reactor {
    // ---- the node that is connected to

    pub(super) fn hand_out_stranger(&mut self, t: &Transport, index: u32, target: ProcId, preface: [u8; PREFACE_LEN]) {
        if let Some(socket) = self.take_out(index) {
            self.told = true;
            t.handler.on_stranger(target, Stranger { preface, socket });
        }
        self.admit();
    }

    pub(super) fn on_call_back(&mut self, t: &Transport, index: u32, call: &CallBack) {
        if let Err(error) = call.check(&t.credentials.session) {
            return self.fail(t, index, CloseReason::Handshake(error));
        }
        if !t.handler.relays() {
            self.warn(t, "a node called back, and this one passes nothing on; does it take this one for its head?");
            return self.remove(index);
        }
        if let Some(socket) = self.take_out(index) {
            self.told = true;
            t.handler.on_called_back(call.ticket, Called { socket });
        }
        self.admit();
    }

    /// Nobody but the slot has the socket before its handshake begins.
    fn take_out(&mut self, index: u32) -> Option<PrivateFd> {
        let slot = self.slots.remove(index)?;
        self.poller.delete(&*slot.socket);
        Arc::into_inner(slot.socket).map(Socket::into_fd)
    }

    // ---- the node that connects

    pub(super) fn on_call_wanted(&mut self, t: &Transport, via: ProcId, ticket: u64) {
        if self.calls.len() == CALLS_MAX {
            return self.warn(t, "more connections are passed on to this node than it can take just now");
        }
        self.calls.push_back((via, ticket));
        self.admit_calls(t);
    }

    /// Makes the calls that wait, as long as there is room. Nobody is closed to make some: who is called will speak.
    pub(super) fn admit_calls(&mut self, t: &Transport) {
        while self.slots.strangers() < STRANGERS_MAX
            && let Some((via, ticket)) = self.calls.pop_front()
        {
            if let Err(error) = self.call(t, via, ticket) {
                self.warn(t, &format!("a connection that is passed on to this node could not be taken: {error}"));
            }
        }
    }

    fn call(&mut self, t: &Transport, via: ProcId, ticket: u64) -> std::io::Result<()> {
        let Way::Node(address) = t.routes.lock().way(via) else {
            return Err(std::io::ErrorKind::AddrNotAvailable.into());
        };
        let socket = match Socket::connect(&address)? {
            Connecting::Done(socket) | Connecting::InProgress(socket) => socket,
            Connecting::Full => return Err(std::io::ErrorKind::WouldBlock.into()),
        };
        let session = t.credentials.session;
        let says = CallBack { version: PROTOCOL_VERSION, session, ticket }.encode();
        let until = Instant::now() + HANDSHAKE_S_MAX;
        // Connected at once or later: it is writable then.
        match self.insert(Arc::new(socket), Phase::Calling(says), EventFlags::OUT, until) {
            Some(_) => Ok(()),
            None => Err(std::io::Error::last_os_error()),
        }
    }

    pub(super) fn on_call_connected(&mut self, t: &Transport, index: u32) {
        let source = self.slots.source(index);
        let Some(slot) = self.slots.at(index) else {
            return;
        };
        let Phase::Calling(says) = slot.phase else {
            return;
        };
        let socket = Arc::clone(&slot.socket);
        if let Err(error) = socket.take_error() {
            self.warn(t, &format!("a connection that is passed on to this node could not be taken: {error}"));
            return self.remove(index);
        }
        let _ = self.poller.modify(&*socket, source, EventFlags::IN);
        self.slots.set_phase(index, Phase::Called(Message::default()));
        match socket.send(&[IoSlice::new(&says)], None) {
            Ok(len) if len == says.len() => {}
            Ok(_) => self.fail(t, index, CloseReason::Io(std::io::ErrorKind::WriteZero.into())),
            Err(error) => self.fail(t, index, CloseReason::Io(error.into())),
        }
    }
}
