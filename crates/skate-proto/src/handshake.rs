//! How two processes prove to each other that they belong to the same session.
//!
//! ```text
//! connector                                        acceptor
//!   Preface (magic, version, session, target)  -->   routed by the node, then checked
//!   Hello   (nonce, who I am)                  -->
//!                                              <--   Challenge (nonce, who I am, proof), or Refused
//!   Proof                                      -->
//!                                              <--   Welcome, or the end of the connection
//! ```
//!
//! A proof is HMAC-SHA256 under the cluster token over the side's role and everything said before it.
//! The role keeps a proof from being sent back to its maker; the nonces keep it from being used again;
//! the preface is in it, so that a session or target changed on the way is noticed. Comparison takes
//! constant time.
//!
//! Over TLS the preface, which the node must read, and a refusal of it travel in clear, and everything else within.
//! Both say so in the preface, and both proofs also cover a value that only the two ends of this very TLS
//! connection can compute (its exporter, RFC 9266), so that whoever ends TLS in the middle is noticed even if it has
//! a certificate. Whether the other side is to use TLS is not negotiated: it is compared, and a difference refused.
//! A node tells its members in its challenge, so that they need no switch of their own.
//!
//! A target is a process, or [`WHO_LISTENS`]: whoever knows an address and the token, and not yet which node
//! is there, learns it from the challenge, whose proof covers it.
//!
//! Until the proof is there every message has a fixed length, so that a stranger's bytes are copied into
//! fixed fields and nothing is parsed. The machines here are told the bytes and the nonces and answer
//! with bytes; deadlines and sockets are the caller's.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use smallvec::SmallVec;
use thiserror::Error;

use crate::digest;
use crate::ids::ProcId;

/// Version of everything on the wire. Processes of different versions refuse each other.
pub const PROTOCOL_VERSION: u16 = 4;
const MAGIC: [u8; 4] = *b"SKAT";
/// The target that stands for the node that listens at the address. No process has this id.
pub const WHO_LISTENS: ProcId = ProcId(0);

pub const PREFACE_LEN: usize = 32;
pub const HELLO_LEN: usize = 48;
/// Challenge and Refused have one length, so that the connector knows what to wait for.
pub const ANSWER_LEN: usize = 84;
pub const PROOF_LEN: usize = 32;
pub const WELCOME_LEN: usize = 4;
/// Bytes of the value that binds proofs to a TLS connection.
pub const BINDING_LEN: usize = 32;

const NONCE_LEN: usize = 32;
const IDENTITY_LEN: usize = 16;
const TAG_CHALLENGE: u8 = 1;
const TAG_REFUSED: u8 = 2;
/// In the preface: TLS follows. The other bits have no meaning yet.
const FLAG_TLS: u8 = 1;
/// In the challenge: connections between the nodes of this cluster are TLS.
const FLAG_NODES_USE_TLS: u8 = 1;
/// What the key of [`Credentials::certificate_seed`] is for, which keeps it apart from every proof.
const CERTIFICATE_SEED: &[u8] = b"skate certificate authority\0\x01";
const WELCOME: [u8; WELCOME_LEN] = *b"SKOK";

/// Bytes that one side sends in one step.
pub type Message = SmallVec<[u8; PREFACE_LEN + HELLO_LEN + 16]>;

/// What a process is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    Node = 1,
    Driver = 2,
    Worker = 3,
    Tool = 4,
    /// A node that wants blocks of shared memory: after the handshake no frames follow, but what
    /// `skate_core::transfer` says.
    Bulk = 5,
}

impl Role {
    fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Node,
            2 => Self::Driver,
            3 => Self::Worker,
            4 => Self::Tool,
            5 => Self::Bulk,
            _ => return None,
        })
    }
}

/// Who a process says it is; what it says is covered by its proof.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub proc: ProcId,
    pub role: Role,
    pub pid: u32,
    /// Minor version of its Python 3, or 0 if it has none.
    pub python_minor: u8,
}

impl Identity {
    fn encode(&self) -> [u8; IDENTITY_LEN] {
        let mut out = [0; IDENTITY_LEN];
        out[..8].copy_from_slice(&self.proc.0.to_le_bytes());
        out[8..12].copy_from_slice(&self.pid.to_le_bytes());
        out[12] = self.role as u8;
        out[13] = self.python_minor;
        out
    }

    fn decode(bytes: &[u8; IDENTITY_LEN]) -> Result<Self, HandshakeError> {
        let role = Role::from_wire(bytes[12]).ok_or(HandshakeError::Malformed("role"))?;
        let proc = u64_at(bytes, 0);
        if proc == 0 {
            return Err(HandshakeError::Malformed("process id"));
        }
        let pid = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        Ok(Self { proc: ProcId(proc), role, pid, python_minor: bytes[13] })
    }
}

/// What every process of a session knows.
#[derive(Clone)]
pub struct Credentials {
    pub session: [u8; 16],
    pub token: [u8; 32],
}

impl Credentials {
    /// Those of a cluster, whose session follows from its token: who joins needs to know nothing else.
    #[must_use]
    pub fn of_cluster(token: [u8; 32]) -> Self {
        Self { session: digest::short(&token), token }
    }

    /// The private key of the cluster's certificate authority: who knows the token can make certificates, and nobody
    /// has to hand them out. This is HKDF-Expand of one block (RFC 5869, section 2.3); a token is random already, so
    /// that nothing has to be extracted (section 3.3).
    #[must_use]
    pub fn certificate_seed(&self) -> [u8; 32] {
        let mut mac = keyed(self);
        mac.update(CERTIFICATE_SEED);
        mac.finalize().into_bytes().into()
    }
}

impl std::fmt::Debug for Credentials {
    /// Shows the session and hides the token: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("session", &self.session).finish_non_exhaustive()
    }
}

/// Why an acceptor does not want a connection; it says so before it hangs up.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RefusalCode {
    Version = 1,
    Session = 2,
    UnknownTarget = 3,
    Busy = 4,
    TlsMissing = 5,
    TlsUnexpected = 6,
    RelayFull = 7,
    NotCalledBack = 8,
}

/// Whether what a connector hears first is a refusal. TLS never begins like one: its records have types from 20 on.
#[must_use]
pub fn is_refusal(first: u8) -> bool {
    first == TAG_REFUSED
}

impl RefusalCode {
    fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Version,
            2 => Self::Session,
            3 => Self::UnknownTarget,
            4 => Self::Busy,
            5 => Self::TlsMissing,
            6 => Self::TlsUnexpected,
            7 => Self::RelayFull,
            8 => Self::NotCalledBack,
            _ => return None,
        })
    }
}

/// Why a handshake failed. The connection is closed in every case.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    #[error("what connected does not speak this protocol (it did not begin with the magic bytes)")]
    NotOurs,
    #[error(
        "the peer speaks protocol version {theirs} and this process version {ours}; install the same release of Skate on both sides"
    )]
    Version { ours: u16, theirs: u16 },
    #[error(
        "the peer belongs to another session; is an old address or session directory in use, or the token of another cluster?"
    )]
    Session,
    #[error("the node does not know process {:#018x}; it has ended, or has not joined yet", target.0)]
    UnknownTarget { target: ProcId },
    #[error("process {:#018x} was asked for and {:#018x} was reached", wanted.0, reached.0)]
    WrongTarget { wanted: ProcId, reached: ProcId },
    #[error("the peer has too many unfinished handshakes; try again")]
    Busy,
    #[error("the peer could not prove that it knows the cluster token; start both sides with the same token")]
    WrongProof,
    #[error(
        "the cluster's nodes use TLS, and the process that connected does not: it is of another cluster, or was started without --tls or RAY_USE_TLS=1"
    )]
    TlsMissing,
    #[error(
        "the process that connected uses TLS, and the cluster's nodes do not: start the head with --tls or RAY_USE_TLS=1, or leave both out here"
    )]
    TlsUnexpected,
    #[error(
        "the process is on a node that only connects outwards, and the head passes on as many connections to such nodes as it can; try again when some have ended, or let that node be connected to"
    )]
    RelayFull,
    #[error(
        "the process is on a node that only connects outwards, and that node did not call back in time; is its connection with the head slow, or gone?"
    )]
    NotCalledBack,
    #[error("a handshake message has an impossible {0}")]
    Malformed(&'static str),
}

impl HandshakeError {
    /// What the acceptor tells the connector before it hangs up, or `None` if it owes it no answer.
    #[must_use]
    pub fn refusal(&self) -> Option<[u8; ANSWER_LEN]> {
        let code = match self {
            Self::Version { .. } => RefusalCode::Version,
            Self::Session => RefusalCode::Session,
            Self::UnknownTarget { .. } | Self::WrongTarget { .. } => RefusalCode::UnknownTarget,
            Self::Busy => RefusalCode::Busy,
            Self::TlsMissing => RefusalCode::TlsMissing,
            Self::TlsUnexpected => RefusalCode::TlsUnexpected,
            Self::RelayFull => RefusalCode::RelayFull,
            Self::NotCalledBack => RefusalCode::NotCalledBack,
            Self::NotOurs | Self::WrongProof | Self::Malformed(_) => return None,
        };
        let mut out = [0; ANSWER_LEN];
        out[0] = TAG_REFUSED;
        out[1] = code as u8;
        out[2..4].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        Some(out)
    }
}

/// The first bytes of a connection. A node reads them to learn whom the connection is for.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Preface {
    pub version: u16,
    pub session: [u8; 16],
    pub target: ProcId,
    /// Whether TLS follows.
    pub tls: bool,
}

impl Preface {
    #[must_use]
    pub fn encode(&self) -> [u8; PREFACE_LEN] {
        let mut out = [0; PREFACE_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[6] = if self.tls { FLAG_TLS } else { 0 };
        out[8..24].copy_from_slice(&self.session);
        out[24..].copy_from_slice(&self.target.0.to_le_bytes());
        out
    }

    /// Reads a preface. Its version and session are judged by [`Self::check`], so that both can be named.
    pub fn decode(bytes: &[u8; PREFACE_LEN]) -> Result<Self, HandshakeError> {
        if bytes[..4] != MAGIC {
            return Err(HandshakeError::NotOurs);
        }
        let mut session = [0; 16];
        session.copy_from_slice(&bytes[8..24]);
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        Ok(Self { version, session, target: ProcId(u64_at(bytes, 24)), tls: bytes[6] & FLAG_TLS != 0 })
    }

    /// Whether its sender may be heard in `session`.
    pub fn check(&self, session: &[u8; 16]) -> Result<(), HandshakeError> {
        check_same(self.version, &self.session, session)
    }

    /// Whether its sender wants TLS exactly if it is `expected`: nothing is ever taken in clear that should not be.
    pub fn check_tls(&self, expected: bool) -> Result<(), HandshakeError> {
        match (self.tls, expected) {
            (false, true) => Err(HandshakeError::TlsMissing),
            (true, false) => Err(HandshakeError::TlsUnexpected),
            _ => Ok(()),
        }
    }
}

pub(crate) fn check_same(version: u16, theirs: &[u8; 16], ours: &[u8; 16]) -> Result<(), HandshakeError> {
    if version != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { ours: PROTOCOL_VERSION, theirs: version });
    }
    if theirs != ours {
        return Err(HandshakeError::Session);
    }
    Ok(())
}

/// What a side does after a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send these bytes, then wait for `wants()` more.
    Send(Message),
    /// The peer is proven. Send these bytes (there may be none); frames follow.
    Done { peer: Identity, send: Message },
}

/// The side that opened the connection.
#[derive(Debug)]
pub struct Connector {
    credentials: Credentials,
    target: ProcId,
    preface: [u8; PREFACE_LEN],
    hello: [u8; HELLO_LEN],
    binding: Binding,
    /// Known once the acceptor's proof was right.
    peer: Option<Identity>,
    nodes_use_tls: bool,
}

impl Connector {
    /// Begins; the bytes are to be sent at once. `nonce` must be random and never used before.
    #[must_use]
    pub fn new(me: &Identity, credentials: &Credentials, target: ProcId, nonce: [u8; NONCE_LEN]) -> (Self, Message) {
        Self::begin(me, credentials, target, nonce, false)
    }

    /// The same over TLS: of the bytes the first [`PREFACE_LEN`] are to be sent in clear, at once, and the others within
    /// TLS, after [`Self::bind`].
    #[must_use]
    pub fn over_tls(
        me: &Identity,
        credentials: &Credentials,
        target: ProcId,
        nonce: [u8; NONCE_LEN],
    ) -> (Self, Message) {
        Self::begin(me, credentials, target, nonce, true)
    }

    fn begin(
        me: &Identity,
        credentials: &Credentials,
        target: ProcId,
        nonce: [u8; NONCE_LEN],
        tls: bool,
    ) -> (Self, Message) {
        let preface = Preface { version: PROTOCOL_VERSION, session: credentials.session, target, tls }.encode();
        let mut hello = [0; HELLO_LEN];
        hello[..NONCE_LEN].copy_from_slice(&nonce);
        hello[NONCE_LEN..].copy_from_slice(&me.encode());
        let first = preface.iter().chain(&hello).copied().collect();
        let binding = Binding::new(tls);
        let credentials = credentials.clone();
        let new = Self { credentials, target, preface, hello, binding, peer: None, nodes_use_tls: false };
        (new, first)
    }

    /// TLS is established: proofs are bound to it from now on.
    ///
    /// # Panics
    /// If it is not to be used, or bound already.
    pub fn bind(&mut self, value: [u8; BINDING_LEN]) {
        self.binding.set(value);
    }

    /// Whether the handshake travels within TLS, which is not established yet.
    #[must_use]
    pub fn awaits_tls(&self) -> bool {
        matches!(self.binding, Binding::Awaited)
    }

    /// What is to be said within TLS, first of all.
    #[must_use]
    pub fn hello(&self) -> [u8; HELLO_LEN] {
        self.hello
    }

    /// Length of the message that comes next.
    #[must_use]
    pub fn wants(&self) -> usize {
        if self.peer.is_none() { ANSWER_LEN } else { WELCOME_LEN }
    }

    /// Who the other side is, once its proof was right; that is before it has heard ours.
    #[must_use]
    pub fn peer(&self) -> Option<Identity> {
        self.peer
    }

    /// Whether connections between the nodes of the other side's cluster are TLS. Known together with [`Self::peer`];
    /// only nodes say so.
    #[must_use]
    pub fn nodes_use_tls(&self) -> bool {
        self.nodes_use_tls
    }

    /// Takes the message of `wants()` bytes.
    ///
    /// # Panics
    /// If `bytes` has another length, or if it is to be heard within TLS, and [`Self::bind`] was not called.
    pub fn handle(&mut self, bytes: &[u8]) -> Result<Step, HandshakeError> {
        assert_eq!(bytes.len(), self.wants());
        match (self.peer, <&[u8; ANSWER_LEN]>::try_from(bytes)) {
            (None, Ok(answer)) => self.handle_answer(answer),
            (Some(peer), _) if bytes == WELCOME => Ok(Step::Done { peer, send: Message::new() }),
            _ => Err(HandshakeError::Malformed("welcome")),
        }
    }

    fn handle_answer(&mut self, answer: &[u8; ANSWER_LEN]) -> Result<Step, HandshakeError> {
        match answer[0] {
            TAG_CHALLENGE => {}
            TAG_REFUSED => return Err(self.refused(answer)),
            _ => return Err(HandshakeError::Malformed("answer")),
        }
        let (challenge, proof) = answer.split_at(ANSWER_LEN - PROOF_LEN);
        let said = [&self.preface[..], &self.hello, challenge, self.binding.value()];
        if !is_proof(&self.credentials, Side::Acceptor, &said, proof) {
            return Err(HandshakeError::WrongProof);
        }
        let mut identity = [0; IDENTITY_LEN];
        identity.copy_from_slice(&challenge[4 + NONCE_LEN..]);
        let peer = Identity::decode(&identity)?;
        let is_wanted = if self.target == WHO_LISTENS { peer.role == Role::Node } else { peer.proc == self.target };
        if !is_wanted {
            return Err(HandshakeError::WrongTarget { wanted: self.target, reached: peer.proc });
        }
        self.peer = Some(peer);
        self.nodes_use_tls = peer.role == Role::Node && challenge[1] & FLAG_NODES_USE_TLS != 0;
        let said = [&self.preface[..], &self.hello, answer, self.binding.value()];
        Ok(Step::Send(prove(&self.credentials, Side::Connector, &said).as_slice().into()))
    }

    fn refused(&self, answer: &[u8; ANSWER_LEN]) -> HandshakeError {
        match RefusalCode::from_wire(answer[1]) {
            Some(RefusalCode::Version) => {
                HandshakeError::Version { ours: PROTOCOL_VERSION, theirs: u16::from_le_bytes([answer[2], answer[3]]) }
            }
            Some(RefusalCode::Session) => HandshakeError::Session,
            Some(RefusalCode::UnknownTarget) => HandshakeError::UnknownTarget { target: self.target },
            Some(RefusalCode::Busy) => HandshakeError::Busy,
            Some(RefusalCode::TlsMissing) => HandshakeError::TlsMissing,
            Some(RefusalCode::TlsUnexpected) => HandshakeError::TlsUnexpected,
            Some(RefusalCode::RelayFull) => HandshakeError::RelayFull,
            Some(RefusalCode::NotCalledBack) => HandshakeError::NotCalledBack,
            None => HandshakeError::Malformed("refusal"),
        }
    }
}

/// The side that was connected to. It begins when the preface was read and routed.
#[derive(Debug)]
pub struct Acceptor {
    me: Identity,
    credentials: Credentials,
    nonce: [u8; NONCE_LEN],
    preface: [u8; PREFACE_LEN],
    binding: Binding,
    nodes_use_tls: bool,
    /// The connector's hello and our challenge to it.
    asked: Option<([u8; HELLO_LEN], [u8; ANSWER_LEN])>,
}

impl Acceptor {
    /// Begins with a preface that was read already, whose target must be this process, or [`WHO_LISTENS`] if it is a
    /// node. `nonce` must be random and never used before.
    pub fn new(
        me: &Identity,
        credentials: &Credentials,
        preface: &[u8; PREFACE_LEN],
        nonce: [u8; NONCE_LEN],
    ) -> Result<Self, HandshakeError> {
        let read = Preface::decode(preface)?;
        read.check(&credentials.session)?;
        let is_meant = read.target == me.proc || (read.target == WHO_LISTENS && me.role == Role::Node);
        if !is_meant {
            return Err(HandshakeError::WrongTarget { wanted: read.target, reached: me.proc });
        }
        let (credentials, binding) = (credentials.clone(), Binding::new(read.tls));
        Ok(Self { me: *me, credentials, nonce, preface: *preface, binding, nodes_use_tls: false, asked: None })
    }

    /// Makes a node say in its challenge whether connections between the nodes of its cluster are TLS.
    #[must_use]
    pub fn telling(mut self, nodes_use_tls: bool) -> Self {
        self.nodes_use_tls = nodes_use_tls;
        self
    }

    /// Whether the rest of the handshake travels within TLS, which is not established yet.
    #[must_use]
    pub fn awaits_tls(&self) -> bool {
        matches!(self.binding, Binding::Awaited)
    }

    /// TLS is established: proofs are bound to it from now on.
    ///
    /// # Panics
    /// If the preface does not announce it, or it is bound already.
    pub fn bind(&mut self, value: [u8; BINDING_LEN]) {
        self.binding.set(value);
    }

    /// Length of the message that comes next.
    #[must_use]
    pub fn wants(&self) -> usize {
        if self.asked.is_none() { HELLO_LEN } else { PROOF_LEN }
    }

    /// Takes the message of `wants()` bytes.
    ///
    /// # Panics
    /// If `bytes` has another length, or if it is to be heard within TLS, and [`Self::bind`] was not called.
    pub fn handle(&mut self, bytes: &[u8]) -> Result<Step, HandshakeError> {
        assert_eq!(bytes.len(), self.wants());
        match &self.asked {
            None => {
                let mut hello = [0; HELLO_LEN];
                hello.copy_from_slice(bytes);
                identity_in(&hello)?;
                let answer = self.challenge(&hello);
                self.asked = Some((hello, answer));
                Ok(Step::Send(answer.as_slice().into()))
            }
            Some((hello, answer)) => {
                let said = [&self.preface[..], hello, answer, self.binding.value()];
                if !is_proof(&self.credentials, Side::Connector, &said, bytes) {
                    return Err(HandshakeError::WrongProof);
                }
                Ok(Step::Done { peer: identity_in(hello)?, send: WELCOME.as_slice().into() })
            }
        }
    }

    fn challenge(&self, hello: &[u8; HELLO_LEN]) -> [u8; ANSWER_LEN] {
        let mut out = [0; ANSWER_LEN];
        let unproven = ANSWER_LEN - PROOF_LEN;
        out[0] = TAG_CHALLENGE;
        out[1] = if self.nodes_use_tls { FLAG_NODES_USE_TLS } else { 0 };
        out[2..4].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        out[4..4 + NONCE_LEN].copy_from_slice(&self.nonce);
        out[4 + NONCE_LEN..unproven].copy_from_slice(&self.me.encode());
        let said = [&self.preface[..], hello, &out[..unproven], self.binding.value()];
        let proof = prove(&self.credentials, Side::Acceptor, &said);
        out[unproven..].copy_from_slice(&proof);
        out
    }
}

fn identity_in(hello: &[u8; HELLO_LEN]) -> Result<Identity, HandshakeError> {
    let mut identity = [0; IDENTITY_LEN];
    identity.copy_from_slice(&hello[NONCE_LEN..]);
    Identity::decode(&identity)
}

/// What ties the proofs to the TLS connection in which they travel.
#[derive(Debug)]
enum Binding {
    InClear,
    /// Not established yet.
    Awaited,
    Bound([u8; BINDING_LEN]),
}

impl Binding {
    fn new(tls: bool) -> Self {
        if tls { Self::Awaited } else { Self::InClear }
    }

    fn set(&mut self, value: [u8; BINDING_LEN]) {
        assert!(matches!(self, Self::Awaited), "a handshake over TLS is bound to it once");
        *self = Self::Bound(value);
    }

    /// What goes into a proof. Of a fixed length in either case, and the preface, before it, says which.
    fn value(&self) -> &[u8] {
        match self {
            Self::InClear => &[],
            Self::Awaited => panic!("a handshake over TLS is bound to it before a proof is made"),
            Self::Bound(value) => value,
        }
    }
}

#[derive(Copy, Clone)]
enum Side {
    Connector,
    Acceptor,
}

fn keyed(credentials: &Credentials) -> Hmac<Sha256> {
    // An HMAC takes a key of any length, so this cannot fail.
    Hmac::<Sha256>::new_from_slice(&credentials.token).expect("any key length")
}

fn mac(credentials: &Credentials, side: Side, said: &[&[u8]; 4]) -> Hmac<Sha256> {
    let mut mac = keyed(credentials);
    mac.update(match side {
        Side::Connector => b"skate connector\0",
        Side::Acceptor => b"skate acceptor\0\0",
    });
    said.iter().for_each(|part| mac.update(part));
    mac
}

fn prove(credentials: &Credentials, side: Side, said: &[&[u8]; 4]) -> [u8; PROOF_LEN] {
    mac(credentials, side, said).finalize().into_bytes().into()
}

/// Compares in constant time, as `verify_slice` promises.
fn is_proof(credentials: &Credentials, side: Side, said: &[&[u8]; 4], proof: &[u8]) -> bool {
    mac(credentials, side, said).verify_slice(proof).is_ok()
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

const _: () = {
    assert!(HELLO_LEN == NONCE_LEN + IDENTITY_LEN);
    assert!(ANSWER_LEN == 4 + NONCE_LEN + IDENTITY_LEN + PROOF_LEN);
    // A refusal must never be shorter than what a connector waits for, nor be taken for a welcome.
    assert!(ANSWER_LEN > WELCOME_LEN);
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn credentials(token: u8) -> Credentials {
        Credentials { session: [7; 16], token: [token; 32] }
    }

    fn identity(proc: u64, role: Role) -> Identity {
        Identity { proc: ProcId(proc), role, pid: 4000 + proc as u32, python_minor: 12 }
    }

    /// What the two ends of a handshake that runs over TLS know of it.
    type Bindings = Option<([u8; BINDING_LEN], [u8; BINDING_LEN])>;

    /// Runs a handshake in which `tamper` may change each message on its way.
    fn shake(
        connector_token: u8,
        acceptor_token: u8,
        tamper: impl FnMut(usize, &mut Message),
    ) -> Result<(Identity, Identity), HandshakeError> {
        shake_over(None, connector_token, acceptor_token, tamper)
    }

    fn shake_over(
        bindings: Bindings,
        connector_token: u8,
        acceptor_token: u8,
        mut tamper: impl FnMut(usize, &mut Message),
    ) -> Result<(Identity, Identity), HandshakeError> {
        let (a, b) = (identity(1, Role::Driver), identity(2, Role::Worker));
        let begin = if bindings.is_some() { Connector::over_tls } else { Connector::new };
        let (mut connector, mut first) = begin(&a, &credentials(connector_token), b.proc, [1; 32]);
        tamper(0, &mut first);
        let (preface, hello) = first.split_first_chunk::<PREFACE_LEN>().unwrap();
        Preface::decode(preface)?.check_tls(bindings.is_some())?;
        let mut acceptor = Acceptor::new(&b, &credentials(acceptor_token), preface, [2; 32])?;
        if let Some((at_connector, at_acceptor)) = bindings {
            connector.bind(at_connector);
            acceptor.bind(at_acceptor);
        }
        let Step::Send(mut challenge) = acceptor.handle(hello)? else { panic!() };
        tamper(1, &mut challenge);
        let Step::Send(mut proof) = connector.handle(&challenge)? else { panic!() };
        tamper(2, &mut proof);
        let Step::Done { peer: seen_a, send: mut welcome } = acceptor.handle(&proof)? else { panic!() };
        tamper(3, &mut welcome);
        let Step::Done { peer: seen_b, .. } = connector.handle(&welcome)? else { panic!() };
        Ok((seen_a, seen_b))
    }

    #[test]
    fn both_sides_learn_who_the_other_is() {
        let (a, b) = shake(9, 9, |_, _| {}).unwrap();
        assert_eq!((a, b), (identity(1, Role::Driver), identity(2, Role::Worker)));
    }

    #[test]
    fn another_token_is_noticed_by_the_connector_before_it_proves_anything() {
        assert_eq!(shake(9, 8, |_, _| {}), Err(HandshakeError::WrongProof));
    }

    #[test]
    fn a_proof_cannot_be_sent_back_to_its_maker() {
        let me = identity(1, Role::Driver);
        let (mut connector, first) = Connector::new(&me, &credentials(9), me.proc, [1; 32]);
        let (preface, hello) = first.split_first_chunk::<PREFACE_LEN>().unwrap();
        let mut acceptor = Acceptor::new(&me, &credentials(9), preface, [2; 32]).unwrap();
        let Step::Send(challenge) = acceptor.handle(hello).unwrap() else { panic!() };
        let Step::Send(proof) = connector.handle(&challenge).unwrap() else { panic!() };
        assert_ne!(proof[..], challenge[ANSWER_LEN - PROOF_LEN..]);
        assert_eq!(acceptor.handle(&challenge[ANSWER_LEN - PROOF_LEN..]), Err(HandshakeError::WrongProof));
    }

    #[test]
    fn a_mismatch_of_versions_names_both() {
        let (mut connector, _) = Connector::new(&identity(1, Role::Tool), &credentials(9), ProcId(2), [1; 32]);
        let preface = Preface { version: 77, session: [7; 16], target: ProcId(2), tls: false };
        let error = preface.check(&[7; 16]).unwrap_err();
        assert_eq!(error, HandshakeError::Version { ours: PROTOCOL_VERSION, theirs: 77 });
        let mut refusal = error.refusal().unwrap();
        refusal[2] = 78;
        let heard = connector.handle(&refusal).unwrap_err();
        assert_eq!(heard, HandshakeError::Version { ours: PROTOCOL_VERSION, theirs: 78 });
        assert!(heard.to_string().contains("78"));
    }

    #[test]
    fn another_session_and_an_unknown_target_are_told_apart() {
        for error in [
            HandshakeError::Session,
            HandshakeError::UnknownTarget { target: ProcId(2) },
            HandshakeError::Busy,
            HandshakeError::RelayFull,
            HandshakeError::NotCalledBack,
        ] {
            let (mut connector, _) = Connector::new(&identity(1, Role::Tool), &credentials(9), ProcId(2), [1; 32]);
            assert_eq!(connector.handle(&error.refusal().unwrap()), Err(error));
        }
    }

    /// A connector that does not know whom it reaches, and what it learns from whoever is `there`.
    fn ask_who_listens(there: Identity) -> Result<Option<Identity>, HandshakeError> {
        let credentials = Credentials::of_cluster([9; 32]);
        let (mut connector, first) = Connector::new(&identity(1, Role::Tool), &credentials, WHO_LISTENS, [1; 32]);
        let (preface, hello) = first.split_first_chunk::<PREFACE_LEN>().unwrap();
        let mut acceptor = Acceptor::new(&there, &credentials, preface, [2; 32])?;
        let Step::Send(challenge) = acceptor.handle(hello)? else { panic!() };
        assert_eq!(connector.peer(), None);
        connector.handle(&challenge)?;
        Ok(connector.peer())
    }

    #[test]
    fn whoever_listens_is_learned_from_its_proof_if_it_is_a_node() {
        let node = identity(7, Role::Node);
        assert_eq!(ask_who_listens(node), Ok(Some(node)));
        let wrong = Err(HandshakeError::WrongTarget { wanted: WHO_LISTENS, reached: ProcId(8) });
        assert_eq!(ask_who_listens(identity(8, Role::Worker)), wrong);
    }

    #[test]
    fn a_process_that_is_no_node_is_not_taken_for_one() {
        let credentials = Credentials::of_cluster([9; 32]);
        let (mut connector, first) = Connector::new(&identity(1, Role::Tool), &credentials, WHO_LISTENS, [1; 32]);
        let (preface, hello) = first.split_first_chunk::<PREFACE_LEN>().unwrap();
        // A worker with the token that answers although it is not meant: its proof is right, its role is not.
        let worker = identity(8, Role::Worker);
        let mut acceptor = Acceptor {
            me: worker,
            credentials,
            nonce: [2; 32],
            preface: *preface,
            binding: Binding::InClear,
            nodes_use_tls: false,
            asked: None,
        };
        let Step::Send(challenge) = acceptor.handle(hello).unwrap() else { panic!() };
        let heard = connector.handle(&challenge);
        assert_eq!(heard, Err(HandshakeError::WrongTarget { wanted: WHO_LISTENS, reached: ProcId(8) }));
    }

    #[test]
    fn proofs_are_bound_to_the_tls_connection_in_which_they_travel() {
        let one = [5; BINDING_LEN];
        assert!(shake_over(Some((one, one)), 9, 9, |_, _| {}).is_ok());
        // Somebody ends TLS in the middle, and passes on what the two sides say.
        let outcome = shake_over(Some((one, [6; BINDING_LEN])), 9, 9, |_, _| {});
        assert_eq!(outcome, Err(HandshakeError::WrongProof));
    }

    #[test]
    fn tls_is_compared_and_refused_in_words_on_both_sides() {
        for (tls, expected) in [(false, HandshakeError::TlsMissing), (true, HandshakeError::TlsUnexpected)] {
            let preface = Preface { version: PROTOCOL_VERSION, session: [7; 16], target: ProcId(2), tls };
            assert_eq!(preface.check_tls(tls), Ok(()));
            assert_eq!(preface.check_tls(!tls), Err(expected));
            let refusal = expected.refusal().unwrap();
            assert!(is_refusal(refusal[0]) && expected.to_string().contains("--tls"));
            let begin = if tls { Connector::over_tls } else { Connector::new };
            let (mut connector, _) = begin(&identity(1, Role::Tool), &credentials(9), ProcId(2), [1; 32]);
            assert_eq!(connector.handle(&refusal), Err(expected), "also before TLS is established");
        }
    }

    #[test]
    fn a_node_tells_its_members_whether_nodes_use_tls_and_nobody_else_does() {
        for (role, tls) in [(Role::Node, true), (Role::Node, false), (Role::Worker, true)] {
            let there = identity(2, role);
            let (mut connector, first) =
                Connector::new(&identity(1, Role::Worker), &credentials(9), there.proc, [1; 32]);
            let (preface, hello) = first.split_first_chunk::<PREFACE_LEN>().unwrap();
            let mut acceptor = Acceptor::new(&there, &credentials(9), preface, [2; 32]).unwrap().telling(tls);
            let Step::Send(challenge) = acceptor.handle(hello).unwrap() else { panic!() };
            connector.handle(&challenge).unwrap();
            assert_eq!(connector.nodes_use_tls(), tls && role == Role::Node);
        }
    }

    #[test]
    fn the_key_of_the_authority_follows_from_the_token_alone_and_is_no_proof() {
        // As computed by another implementation: HMAC-SHA256 of the label under 32 bytes of 9.
        let seed = credentials(9).certificate_seed();
        assert_eq!(seed[..4], [0xe9, 0xa3, 0x39, 0xbd]);
        assert_eq!(seed, Credentials::of_cluster([9; 32]).certificate_seed());
        assert_ne!(seed, credentials(8).certificate_seed());
    }

    #[test]
    fn the_session_of_a_cluster_follows_from_its_token() {
        let session = Credentials::of_cluster([0; 32]).session;
        // The beginning of the SHA-256 of 32 zero bytes, as any tool computes it.
        assert_eq!(session[..4], [0x66, 0x68, 0x7a, 0xad]);
        assert_ne!(session, Credentials::of_cluster([1; 32]).session);
    }

    #[test]
    fn the_token_is_not_shown() {
        assert!(!format!("{:?}", credentials(123)).contains("123"));
    }

    proptest! {
        #[test]
        fn any_changed_bit_is_noticed(message in 0usize..4, byte: prop::sample::Index, bit in 0u8..8) {
            let mut changed = false;
            let outcome = shake(9, 9, |n, bytes| {
                if n == message {
                    // Some bits of the preface and of an answer have no meaning yet, yet are proven.
                    let at = byte.index(bytes.len());
                    bytes[at] ^= 1 << bit;
                    changed = true;
                }
            });
            prop_assert!(changed || outcome.is_err());
            prop_assert!(outcome.is_err());
        }

        #[test]
        fn garbage_never_panics(
            preface in prop::array::uniform32(any::<u8>()),
            magic: bool,
            tls: bool,
            answer in prop::collection::vec(any::<u8>(), ANSWER_LEN),
            hello in prop::collection::vec(any::<u8>(), HELLO_LEN),
            proof in prop::collection::vec(any::<u8>(), PROOF_LEN),
        ) {
            let mut preface = preface;
            if magic {
                preface = Preface { version: PROTOCOL_VERSION, session: [7; 16], target: ProcId(2), tls }.encode();
            }
            let me = identity(2, Role::Worker);
            if let Ok(mut acceptor) = Acceptor::new(&me, &credentials(9), &preface, [0; 32]) {
                if acceptor.awaits_tls() {
                    acceptor.bind([3; BINDING_LEN]);
                }
                if acceptor.handle(&hello).is_ok() {
                    prop_assert_eq!(acceptor.handle(&proof), Err(HandshakeError::WrongProof));
                }
            }
            let (mut connector, _) = Connector::new(&me, &credentials(9), ProcId(1), [1; 32]);
            prop_assert!(connector.handle(&answer).is_err());
        }

        #[test]
        fn prefaces_round_trip(version: u16, session: [u8; 16], target: u64, tls: bool) {
            let preface = Preface { version, session, target: ProcId(target), tls };
            prop_assert_eq!(Preface::decode(&preface.encode()).unwrap(), preface);
        }
    }
}
