//! What a node says that nobody can connect to, when it takes a connection that the head holds for it.
//!
//! Asked over the link that it has with the head, such a node connects to it, and says a [`CallBack`] with the ticket that
//! it was given, where others say a preface. From then on it is the acceptor of the connection that the head passes on,
//! whose preface follows. No handshake is spent on the call itself: the ticket is as random as a nonce and is used once,
//! and whoever took the call in the node's place would get a stream in which both ends still have to prove themselves.

use crate::handshake::{HandshakeError, PREFACE_LEN, check_same, u64_at};

const MAGIC: [u8; 4] = *b"SKCB";

/// The first bytes of a connection by which a node calls back: as long as a preface, and never taken for one.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct CallBack {
    pub version: u16,
    pub session: [u8; 16],
    /// What the head has named the connection that it holds.
    pub ticket: u64,
}

impl CallBack {
    #[must_use]
    pub fn encode(&self) -> [u8; PREFACE_LEN] {
        let mut out = [0; PREFACE_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[8..24].copy_from_slice(&self.session);
        out[24..].copy_from_slice(&self.ticket.to_le_bytes());
        out
    }

    /// Reads one; `None` if the bytes are something else. Its version and session are judged by [`Self::check`].
    #[must_use]
    pub fn decode(bytes: &[u8; PREFACE_LEN]) -> Option<Self> {
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[8..24]);
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        (bytes[..4] == MAGIC).then(|| Self { version, session, ticket: u64_at(bytes, 24) })
    }

    /// Whether its sender may be heard in `session`.
    pub fn check(&self, session: &[u8; 16]) -> Result<(), HandshakeError> {
        check_same(self.version, &self.session, session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::{PROTOCOL_VERSION, Preface};
    use crate::ids::ProcId;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn call_backs_round_trip_and_are_never_taken_for_prefaces(version: u16, session: [u8; 16], ticket: u64) {
            let call = CallBack { version, session, ticket };
            prop_assert_eq!(CallBack::decode(&call.encode()), Some(call));
            prop_assert_eq!(call.check(&session).is_ok(), version == PROTOCOL_VERSION);
            let right = CallBack { version: PROTOCOL_VERSION, ..call };
            prop_assert_eq!(right.check(&session), Ok(()));
            prop_assert_eq!(right.check(&[session[0].wrapping_add(1); 16]), Err(HandshakeError::Session));
            prop_assert_eq!(Preface::decode(&call.encode()), Err(HandshakeError::NotOurs));
            let preface = Preface { version, session, target: ProcId(ticket), tls: false };
            prop_assert_eq!(CallBack::decode(&preface.encode()), None);
        }
    }
}
