//! One connection's half of TLS: plain bytes on one side, records on the other, and no socket.
//!
//! Any thread sends, one reads. Both need the same state, so it has a lock, held for one piece ([`PIECE_BYTES`]) or one
//! record at a time and for writes that do not wait, never for a peer.
//!
//! Sending is like a socket's: as many bytes are taken as their records could be written. What was encrypted and could
//! not be written is not taken yet: the caller keeps it, as it would what does not fit into a socket, and offers it
//! again as the first of what follows. So a backlog is counted where it was before, and a channel holds one piece of
//! records at most.
//!
//! An end without a farewell (`close_notify`) is an end: processes are killed, and frames know their lengths, so that
//! nothing that was cut off is ever taken for whole. None is sent either.
//!
//! Invariant: `in_flight` plain bytes are in records of which some are unwritten, and these are the bytes that the
//! caller offers first.

use std::io::{self, BufRead, IoSlice, Write};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustls::Connection;
use smallvec::SmallVec;

use skate_proto::handshake::BINDING_LEN;

use super::TlsError;

/// Encrypted and written at a time: four whole records.
const PIECE_BYTES: usize = 64 << 10;
/// RFC 9266, section 2.
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

struct State {
    connection: Connection,
    in_flight: usize,
    /// The peer has said something.
    heard: bool,
}

pub(in crate::transport) struct Channel {
    state: Mutex<State>,
}

/// What became of bytes that a peer sent.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(in crate::transport) struct Taken {
    /// The peer has said that nothing follows.
    pub(in crate::transport) ended: bool,
    /// The handshake was finished by them.
    pub(in crate::transport) established: bool,
}

impl Channel {
    pub(super) fn new(mut connection: Connection) -> Self {
        // What may be kept is counted by `in_flight`.
        connection.set_buffer_limit(None);
        Self { state: Mutex::new(State { connection, in_flight: 0, heard: false }) }
    }

    /// What is to be written first by whoever opens a connection; nothing for the other.
    pub(in crate::transport) fn opening(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        let mut bytes = Vec::new();
        while state.connection.wants_write() {
            // A vector takes everything.
            let _ = state.connection.write_tls(&mut bytes);
        }
        bytes
    }

    /// Whether the peer has said anything.
    pub(in crate::transport) fn has_heard(&self) -> bool {
        self.state.lock().heard
    }

    /// What only the two ends of this connection know, once it is established.
    pub(in crate::transport) fn binding(&self) -> Result<[u8; BINDING_LEN], TlsError> {
        let state = self.state.lock();
        state.connection.export_keying_material([0; BINDING_LEN], BINDING_LABEL, None).map_err(TlsError::Broken)
    }

    /// Encrypts bytes, and gives the records to `write`, which is as a socket that does not wait. Tells how many were
    /// taken, with all records that they are in; `EAGAIN` if none were.
    ///
    /// # Panics
    /// If the connection is not established.
    pub(in crate::transport) fn send(
        &self,
        parts: &[IoSlice<'_>],
        write: impl Fn(&[IoSlice<'_>]) -> rustix::io::Result<usize>,
    ) -> rustix::io::Result<usize> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let mut taken = 0;
        loop {
            // Let go between two pieces, so that whoever reads gets its turn.
            let mut state = self.state.lock();
            match state.write_records(&write) {
                Err(Errno::AGAIN) if taken > 0 => return Ok(taken),
                outcome => outcome?,
            }
            taken += std::mem::take(&mut state.in_flight);
            assert!(taken <= total, "what was offered before is offered again");
            if taken == total {
                return Ok(total);
            }
            state.encrypt(parts, taken).map_err(|_| Errno::IO)?;
        }
    }

    /// Decrypts some of what the peer sent, at most about a record, and appends what it says to `plain`. What it has to
    /// be answered is given to `write`. The bytes that were used are taken off `incoming`; to be called again until
    /// there are none and nothing was appended.
    pub(in crate::transport) fn take(
        &self,
        incoming: &mut &[u8],
        plain: &mut Vec<u8>,
        write: impl Fn(&[IoSlice<'_>]) -> rustix::io::Result<usize>,
    ) -> Result<Taken, TlsError> {
        let mut state = self.state.lock();
        let was_handshaking = state.connection.is_handshaking();
        let outcome = state.decrypt(incoming, plain);
        if was_handshaking || outcome.is_err() {
            // An answer, or an alert that says what is wrong. It fits into the buffer of a socket that is new, and if it
            // does not, the connection is given up as one that is silent is.
            let _ = state.write_records(&write);
        }
        let ended = outcome?;
        Ok(Taken { ended, established: was_handshaking && !state.connection.is_handshaking() })
    }
}

impl State {
    fn write_records(
        &mut self,
        write: &impl Fn(&[IoSlice<'_>]) -> rustix::io::Result<usize>,
    ) -> rustix::io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Sink(write)) {
                Ok(0) => return Err(Errno::AGAIN),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
        }
        Ok(())
    }

    /// Encrypts the next piece of what is offered, of which `taken` bytes are through.
    fn encrypt(&mut self, parts: &[IoSlice<'_>], taken: usize) -> io::Result<()> {
        assert!(!self.connection.is_handshaking(), "nothing is said before TLS is established");
        let (mut skip, mut room) = (taken, PIECE_BYTES);
        let mut piece: SmallVec<[IoSlice<'_>; 8]> = SmallVec::new();
        for part in parts {
            let from = skip.min(part.len());
            skip -= from;
            let len = room.min(part.len() - from);
            room -= len;
            if len > 0 {
                piece.push(IoSlice::new(&part[from..from + len]));
            }
        }
        self.in_flight = self.connection.writer().write_vectored(&piece)?;
        debug_assert_eq!(self.in_flight, PIECE_BYTES - room);
        Ok(())
    }

    /// True if the peer has said that nothing follows.
    fn decrypt(&mut self, incoming: &mut &[u8], plain: &mut Vec<u8>) -> Result<bool, TlsError> {
        let mut ended = false;
        while !incoming.is_empty() && !ended {
            self.heard = true;
            // It reads from memory, and refuses only what comes after the end or does not fit, which is read before.
            let read = self.connection.read_tls(incoming);
            read.map_err(|error| TlsError::Broken(rustls::Error::General(error.to_string())))?;
            let state = self.connection.process_new_packets().map_err(TlsError::Broken)?;
            ended = state.peer_has_closed();
            if self.take_plain(plain) {
                break;
            }
        }
        Ok(ended)
    }

    fn take_plain(&mut self, plain: &mut Vec<u8>) -> bool {
        let before = plain.len();
        let mut reader = self.connection.reader();
        while let Ok(chunk @ [_, ..]) = reader.fill_buf() {
            let len = chunk.len();
            plain.extend_from_slice(chunk);
            reader.consume(len);
        }
        plain.len() > before
    }
}

impl std::fmt::Debug for Channel {
    /// Shows no key: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").finish_non_exhaustive()
    }
}

/// Where records are written.
struct Sink<'a, F>(&'a F);

impl<F: Fn(&[IoSlice<'_>]) -> rustix::io::Result<usize>> Write for Sink<'_, F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok((self.0)(parts)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::pair;
    use super::*;
    use proptest::prelude::*;

    /// Gives all of `records` to a channel; what they say.
    fn read(channel: &Channel, mut records: &[u8]) -> Result<Vec<u8>, TlsError> {
        let mut all = Vec::new();
        loop {
            let mut plain = Vec::new();
            channel.take(&mut records, &mut plain, |_| Err(Errno::AGAIN))?;
            if records.is_empty() && plain.is_empty() {
                return Ok(all);
            }
            assert!(plain.len() <= 2 * (16 << 10), "about a record at a time");
            all.extend(plain);
        }
    }

    fn everything(to: &Mutex<Vec<u8>>) -> impl Fn(&[IoSlice<'_>]) -> rustix::io::Result<usize> {
        |parts| {
            let mut to = to.lock();
            let before = to.len();
            parts.iter().for_each(|part| to.extend_from_slice(part));
            Ok(to.len() - before)
        }
    }

    #[test]
    fn both_ends_compute_one_binding_and_no_two_connections_the_same() {
        let ((client, server), (other, _)) = (pair(), pair());
        assert_eq!(client.binding().unwrap(), server.binding().unwrap());
        assert_ne!(client.binding().unwrap(), other.binding().unwrap());
    }

    #[test]
    fn records_that_were_changed_repeated_or_left_out_are_not_taken() {
        let acts: [fn(&mut Vec<Vec<u8>>); 4] = [
            |records| records[1][30] ^= 1,
            |records| records.swap(0, 1),
            |records| drop(records.remove(1)),
            |records| records.insert(1, records[0].clone()),
        ];
        for act in acts {
            let (client, server) = pair();
            let mut records: Vec<Vec<u8>> = (0..3u8)
                .map(|n| {
                    let out = Mutex::default();
                    client.send(&[IoSlice::new(&[n; 100])], everything(&out)).unwrap();
                    out.into_inner()
                })
                .collect();
            act(&mut records);
            let taken: Vec<_> = records.iter().map_while(|record| read(&server, record).ok()).collect();
            assert!(taken.len() < records.len(), "the first wrong one ends it");
            assert!(taken.iter().enumerate().all(|(n, plain)| *plain == [n as u8; 100]));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

        /// A socket that takes a little, nothing, or much, and a caller that appends meanwhile and offers again what was
        /// not taken.
        #[test]
        fn what_is_taken_arrives_once_and_in_order_however_little_the_socket_takes(
            steps in prop::collection::vec((0usize..200_000, prop_oneof![0usize..50, 0usize..100_000]), 1..30),
        ) {
            let (client, server) = pair();
            let (mut sent, mut unsent, mut got) = (Vec::new(), Vec::new(), Vec::new());
            let written = Mutex::new(Vec::new());
            for (n, (len, room)) in steps.iter().copied().chain([(1, usize::MAX)]).enumerate() {
                let more: Vec<u8> = (0..len).map(|i| (i + n) as u8).collect();
                sent.extend_from_slice(&more);
                unsent.extend_from_slice(&more);
                let left = std::cell::Cell::new(room);
                let outcome = client.send(&[IoSlice::new(&unsent[..unsent.len() / 3]), IoSlice::new(&unsent[unsent.len() / 3..])], |parts| {
                    let mut taken = 0;
                    for part in parts {
                        let len = part.len().min(left.get());
                        written.lock().extend_from_slice(&part[..len]);
                        left.set(left.get() - len);
                        taken += len;
                    }
                    if taken == 0 { Err(Errno::AGAIN) } else { Ok(taken) }
                });
                match outcome {
                    Ok(taken) => drop(unsent.drain(..taken)),
                    Err(error) => prop_assert_eq!(error, Errno::AGAIN),
                }
                got.extend(read(&server, &std::mem::take(&mut *written.lock())).unwrap());
                prop_assert!(!unsent.is_empty() || got == sent, "nobody would be told to write the rest");
                // What was not taken has not been heard, but for the piece that is in flight.
                prop_assert!(sent.starts_with(&got) && got.len() <= sent.len() - unsent.len() + PIECE_BYTES);
            }
            prop_assert!(unsent.is_empty() && got == sent);
        }
    }
}
