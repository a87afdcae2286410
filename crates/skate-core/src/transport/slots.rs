//! The receiving half of every connection, and where each one is in its life.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use skate_proto::frame::Assembler;
use skate_proto::handshake::{ANSWER_LEN, Acceptor, Connector, PREFACE_LEN};
use skate_proto::ids::ProcId;

use super::connection::Connection;
use super::poller::{Source, next_life};
use super::socket::Socket;

/// Where a connection is in its life.
pub(super) enum Phase {
    /// Accepted by a node; whom it is for is not known yet.
    Preface(Message),
    Accepting(Acceptor, Message),
    /// Not yet connected, to a node that passes on a connection; what is said to it then.
    Calling([u8; PREFACE_LEN]),
    /// That node was called back; the preface of the one who wants a process here follows.
    Called(Message),
    /// Not yet connected (TCP).
    Connecting(Arc<Connection>),
    Greeting(Connector, Message, Arc<Connection>),
    Open {
        peer: ProcId,
        inbound: bool,
        connection: Arc<Connection>,
    },
    /// Refused: the answer is on its way, and what the peer sent is read and dropped, because closing
    /// with unread bytes could take the answer back.
    Draining,
}

impl Phase {
    /// Whether it counts among the strangers, whose number is limited.
    pub(super) fn is_stranger(&self) -> bool {
        !matches!(self, Self::Connecting(_) | Self::Greeting(..) | Self::Open { .. })
    }

    /// A stranger that has come by itself and has not said whom it wants.
    pub(super) fn is_silent(&self) -> bool {
        matches!(self, Self::Preface(_))
    }

    pub(super) fn is_handshake(&self) -> bool {
        !matches!(self, Self::Open { .. })
    }

    /// The peer, if it is known; for a connection of ours, the one that we want.
    pub(super) fn peer(&self) -> Option<ProcId> {
        match self {
            Self::Open { peer, .. } => Some(*peer),
            Self::Connecting(connection) | Self::Greeting(_, _, connection) => Some(connection.peer),
            Self::Preface(_) | Self::Accepting(..) | Self::Calling(_) | Self::Called(_) | Self::Draining => None,
        }
    }
}

/// A handshake message that is being read.
#[derive(Default)]
pub(super) struct Message {
    bytes: Vec<u8>,
    filled: usize,
}

impl Message {
    /// Room for what is missing of a message of `wanted` bytes; never more, because what follows may be
    /// for another process.
    pub(super) fn room(&mut self, wanted: usize) -> &mut [u8] {
        debug_assert!(wanted <= ANSWER_LEN);
        self.bytes.resize(wanted, 0);
        &mut self.bytes[self.filled..]
    }

    /// Whether some of it is there.
    pub(super) fn has_begun(&self) -> bool {
        self.filled > 0
    }

    /// The message, when it is complete.
    pub(super) fn advance(&mut self, len: usize) -> Option<Vec<u8>> {
        self.filled += len;
        (self.filled == self.bytes.len()).then(|| {
            self.filled = 0;
            std::mem::take(&mut self.bytes)
        })
    }
}

pub(super) struct Slot {
    pub(super) socket: Arc<Socket>,
    pub(super) phase: Phase,
    /// When its handshake must be over.
    pub(super) until: Instant,
    pub(super) assembler: Assembler,
    /// Descriptors whose frames are not complete. `None`: it was sent, but this process could open no more.
    pub(super) fds: VecDeque<Option<OwnedFd>>,
}

impl Slot {
    pub(super) fn new(socket: Arc<Socket>, phase: Phase, until: Instant) -> Self {
        Self { socket, phase, until, assembler: Assembler::default(), fds: VecDeque::new() }
    }
}

/// All connections, by the number under which epoll knows them.
///
/// Invariant: `strangers` is the number of slots whose phase says so.
#[derive(Default)]
pub(super) struct Slots {
    entries: Vec<(u32, Option<Slot>)>,
    vacant: Vec<u32>,
    strangers: usize,
}

impl Slots {
    pub(super) fn insert(&mut self, slot: Slot) -> (u32, Source) {
        self.strangers += usize::from(slot.phase.is_stranger());
        let index = match self.vacant.pop() {
            Some(index) => {
                self.entries[index as usize].1 = Some(slot);
                index
            }
            None => {
                self.entries.push((0, Some(slot)));
                (self.entries.len() - 1) as u32
            }
        };
        (index, self.source(index))
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<Slot> {
        let (life, entry) = &mut self.entries[index as usize];
        let slot = entry.take()?;
        *life = next_life(*life);
        self.vacant.push(index);
        self.strangers -= usize::from(slot.phase.is_stranger());
        Some(slot)
    }

    pub(super) fn set_phase(&mut self, index: u32, phase: Phase) {
        if let Some(slot) = self.entries[index as usize].1.as_mut() {
            self.strangers -= usize::from(slot.phase.is_stranger());
            self.strangers += usize::from(phase.is_stranger());
            slot.phase = phase;
        }
    }

    pub(super) fn source(&self, index: u32) -> Source {
        Source::Connection { index, life: self.entries[index as usize].0 }
    }

    /// The slot, if it is still in the life in which its number was given out.
    pub(super) fn get(&mut self, index: u32, life: u32) -> Option<&mut Slot> {
        match self.entries.get_mut(index as usize) {
            Some((now, slot)) if *now == life => slot.as_mut(),
            _ => None,
        }
    }

    pub(super) fn at(&mut self, index: u32) -> Option<&mut Slot> {
        self.entries.get_mut(index as usize)?.1.as_mut()
    }

    pub(super) fn strangers(&self) -> usize {
        self.strangers
    }

    /// Numbers of the connections with a peer.
    pub(super) fn of_peer(&self, peer: ProcId) -> Vec<u32> {
        self.matching(|slot| slot.phase.peer() == Some(peer))
    }

    /// Peers of connections that this process makes and that are not open yet.
    pub(super) fn unfinished(&self) -> Vec<ProcId> {
        let slots = self.entries.iter().filter_map(|(_, slot)| slot.as_ref());
        slots.filter(|slot| slot.phase.is_handshake()).filter_map(|slot| slot.phase.peer()).collect()
    }

    pub(super) fn has_inbound(&self, from: ProcId) -> bool {
        let is = |slot: &Slot| matches!(slot.phase, Phase::Open { peer, inbound: true, .. } if peer == from);
        !self.matching(is).is_empty()
    }

    fn matching(&self, test: impl Fn(&Slot) -> bool) -> Vec<u32> {
        let numbered = self.entries.iter().enumerate();
        let slots = numbered.filter_map(|(index, (_, slot))| Some((index as u32, slot.as_ref()?)));
        slots.filter(|(_, slot)| test(slot)).map(|(index, _)| index).collect()
    }
}
