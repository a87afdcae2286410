//! Connections within TLS: their beginning, and reading them.
//!
//! A read brings records, and a record any part of what was sent, so that here bytes are handed on as they come, to the
//! handshake or to the frames, whichever the connection has got to. Everything that a read brought is handed on at
//! once: nobody would be told of it again.

use std::io::IoSlice;
use std::mem;
use std::sync::Arc;

use rustix::io::Errno;

use skate_proto::frame::{self, Split};
use skate_proto::handshake::{Connector, PREFACE_LEN, is_refusal};
use skate_proto::ids::ProcId;

use super::super::connection::Connection;
use super::super::poller::Source;
use super::super::slots::{Message, Phase, Slot};
use super::super::socket::Socket;
use super::super::{CloseReason, Transport};
use super::{Reactor, deliver, nonce};

/// One read takes at most this much: four whole records.
const RECORDS_BYTES: usize = 64 << 10;

impl Reactor {
    /// Says whom we want, in clear, and begins TLS in the same breath.
    pub(super) fn greet_secured(&mut self, t: &Transport, index: u32, connection: Arc<Connection>, socket: &Socket) {
        let (machine, first) = Connector::over_tls(&t.me, &t.credentials, connection.peer, nonce());
        self.slots.set_phase(index, Phase::Greeting(machine, Message::default(), connection));
        let channel = match t.tls.get().and_then(|tls| tls.connect()) {
            Ok(channel) => channel,
            Err(error) => return self.fail(t, index, error.into()),
        };
        let opening = [&first[..PREFACE_LEN], &channel.opening()].concat();
        socket.secure(channel);
        match socket.send_in_clear(&[IoSlice::new(&opening)]) {
            Ok(len) if len == opening.len() => {}
            Ok(_) => self.fail(t, index, CloseReason::Io(std::io::ErrorKind::WriteZero.into())),
            Err(error) => self.fail(t, index, CloseReason::Io(error.into())),
        }
    }

    /// A secured connection can be read.
    pub(super) fn on_records(&mut self, t: &Transport, index: u32) {
        if self.is_refused(index) {
            return self.read_handshake(t, index);
        }
        if let Err(reason) = self.read_secured(t, index) {
            self.fail(t, index, reason);
        }
    }

    /// Whether what we connected to refuses us in clear, instead of beginning TLS.
    fn is_refused(&mut self, index: u32) -> bool {
        let Some(Slot { socket, phase: Phase::Greeting(_, message, _), .. }) = self.slots.at(index) else {
            return false;
        };
        let has_heard = socket.channel().is_some_and(|channel| channel.has_heard());
        !has_heard && (message.has_begun() || matches!(socket.peek(), Ok(Some(first)) if is_refusal(first)))
    }

    /// Reads a secured connection once. False if nothing was there.
    pub(super) fn read_secured(&mut self, t: &Transport, index: u32) -> Result<bool, CloseReason> {
        let source = self.slots.source(index);
        let (Some(slot), Source::Connection { life, .. }) = (self.slots.at(index), source) else {
            return Ok(false);
        };
        let socket = Arc::clone(&slot.socket);
        // Taken along, because another connection may be read meanwhile, for its last words; it gets a buffer of its own.
        let (mut records, mut plain) = (mem::take(&mut self.records), mem::take(&mut self.plain));
        records.resize(RECORDS_BYTES, 0);
        let outcome = match socket.receive_plain(&mut records) {
            Ok(0) => Err(CloseReason::Closed),
            Ok(len) => self.take_records(t, (index, life), &socket, &records[..len], &mut plain).map(|()| true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(CloseReason::Io(error.into())),
        };
        (self.records, self.plain) = (records, plain);
        outcome
    }

    fn take_records(
        &mut self,
        t: &Transport,
        (index, life): (u32, u32),
        socket: &Socket,
        mut incoming: &[u8],
        plain: &mut Vec<u8>,
    ) -> Result<(), CloseReason> {
        loop {
            plain.clear();
            let taken = socket.decrypt(&mut incoming, plain)?;
            if taken.established {
                self.on_established(t, index, socket)?;
            }
            if !self.hand_on(t, (index, life), plain)? {
                return Ok(());
            }
            if taken.ended {
                return Err(CloseReason::Closed);
            }
            if incoming.is_empty() && plain.is_empty() {
                return Ok(());
            }
        }
    }

    /// TLS is established: the handshake within is bound to it, and begins.
    fn on_established(&mut self, t: &Transport, index: u32, socket: &Socket) -> Result<(), CloseReason> {
        let (Some(channel), Some(slot)) = (socket.channel(), self.slots.at(index)) else {
            return Ok(());
        };
        let binding = channel.binding()?;
        match &mut slot.phase {
            Phase::Accepting(machine, _) => machine.bind(binding),
            Phase::Greeting(machine, ..) => {
                machine.bind(binding);
                let hello = machine.hello();
                self.say(t, index, &hello);
            }
            _ => {}
        }
        Ok(())
    }

    /// Hands on what a peer said. False when the connection is not there any more.
    fn hand_on(&mut self, t: &Transport, (index, life): (u32, u32), mut plain: &[u8]) -> Result<bool, CloseReason> {
        loop {
            let Some(slot) = self.slots.get(index, life) else {
                return Ok(false);
            };
            if plain.is_empty() {
                return Ok(true);
            }
            let (message, wanted) = match &mut slot.phase {
                Phase::Accepting(machine, message) => (message, machine.wants()),
                Phase::Greeting(machine, message, _) => (message, machine.wants()),
                Phase::Open { peer, .. } => {
                    let peer = *peer;
                    self.told |= take_frames(t, slot, peer, plain)?;
                    return Ok(true);
                }
                Phase::Preface(_) | Phase::Calling(_) | Phase::Called(_) | Phase::Connecting(_) | Phase::Draining => {
                    return Ok(true);
                }
            };
            let room = message.room(wanted);
            let (part, rest) = plain.split_at(room.len().min(plain.len()));
            room[..part.len()].copy_from_slice(part);
            plain = rest;
            if let Some(bytes) = message.advance(part.len()) {
                self.on_message(t, index, &bytes);
            }
        }
    }
}

/// Hands out the frames that these bytes complete. True if there was one.
fn take_frames(t: &Transport, slot: &mut Slot, peer: ProcId, mut bytes: &[u8]) -> Result<bool, CloseReason> {
    let Slot { assembler, fds, .. } = slot;
    let mut any = false;
    // No descriptor comes along, so that none is passed on, and a frame that claims to carry one breaks the protocol.
    let mut passed = Vec::new();
    while !assembler.is_empty() && !bytes.is_empty() {
        let (room, _) = assembler.room();
        let (part, rest) = bytes.split_at(room.len().min(bytes.len()));
        room[..part.len()].copy_from_slice(part);
        bytes = rest;
        assembler.advance(part.len())?;
        if let Some((header, body)) = assembler.finished() {
            deliver(t, peer, header, body, fds, &mut passed)?;
            assembler.clear();
            any = true;
        }
    }
    while !bytes.is_empty() {
        match frame::split(bytes)? {
            Split::Frame { header, body, rest } => {
                deliver(t, peer, header, body, fds, &mut passed)?;
                any = true;
                bytes = rest;
            }
            Split::Need { .. } => {
                assembler.keep(bytes)?;
                break;
            }
        }
    }
    Ok(any)
}
