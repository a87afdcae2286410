//! Every parser of bytes that come from a socket, as functions of any bytes at all.
//!
//! Fuzz targets (`fuzz/`) and quick property tests (`tests/parsers.rs`) call the same functions. Each panics
//! if the parser does, or if what it accepts is not what it would write.

use skate_proto::call_back::CallBack;
use skate_proto::frame::{Assembler, Header, Split, split};
use skate_proto::handshake::{
    Acceptor, BINDING_LEN, Connector, Credentials, Identity, PREFACE_LEN, PROTOCOL_VERSION, Preface, Role, Step,
};
use skate_proto::ids::ProcId;
use skate_proto::msg::{ActorSpec, Msg};

use crate::node_wire;

/// The kinds of all frames that a node sends.
const NODE_KINDS: std::ops::RangeInclusive<u8> = node_wire::LEASE_GRANTED..=node_wire::NODE_ADDRESS;

/// Frames: cut in pieces (the first byte says how long), a stream has the same frames and the same end.
pub fn frames(bytes: &[u8]) {
    let Some((&piece, stream)) = bytes.split_first() else {
        return;
    };
    let whole = {
        let (mut found, mut rest) = (Vec::new(), stream);
        loop {
            match split(rest) {
                Ok(Split::Frame { header, body, rest: after }) => {
                    found.push((header, body.to_vec()));
                    rest = after;
                }
                Ok(Split::Need { .. }) => break (found, true),
                Err(_) => break (found, false),
            }
        }
    };
    assert_eq!(in_pieces(stream, usize::from(piece) + 1), whole);
}

/// Frames, and whether more of them may follow.
type Frames = (Vec<(Header, Vec<u8>)>, bool);

fn in_pieces(mut stream: &[u8], piece: usize) -> Frames {
    let (mut found, mut assembler, mut pending) = (Vec::new(), Assembler::default(), Vec::new());
    loop {
        let mut rest = &pending[..];
        loop {
            match split(rest) {
                Ok(Split::Frame { header, body, rest: after }) => {
                    found.push((header, body.to_vec()));
                    rest = after;
                }
                Ok(Split::Need { .. }) => break,
                Err(_) => return (found, false),
            }
        }
        if stream.is_empty() {
            return (found, true);
        }
        if !rest.is_empty() {
            if assembler.keep(rest).is_err() {
                return (found, false);
            }
            while assembler.finished().is_none() && !stream.is_empty() {
                let (room, _) = assembler.room();
                let len = room.len().min(piece).min(stream.len());
                room[..len].copy_from_slice(&stream[..len]);
                stream = &stream[len..];
                if assembler.advance(len).is_err() {
                    return (found, false);
                }
            }
            match assembler.finished() {
                Some((header, body)) => found.push((header, body.to_vec())),
                None => return (found, true),
            }
            assembler.clear();
            pending.clear();
            continue;
        }
        let len = piece.min(stream.len());
        pending = stream[..len].to_vec();
        stream = &stream[len..];
    }
}

fn identity(proc: u64, role: Role) -> Identity {
    Identity { proc: ProcId(proc), role, pid: 7, python_minor: 12 }
}

/// Both ends of a handshake against a peer that says anything, with a right preface or with none.
pub fn handshake(bytes: &[u8]) {
    let credentials = Credentials { session: [3; 16], token: [4; 32] };
    let node = identity(1, Role::Node);
    let right = Preface { version: PROTOCOL_VERSION, session: credentials.session, target: node.proc, tls: false };
    let right = [right, Preface { tls: true, ..right }].map(|preface| preface.encode());
    let said = bytes.first_chunk::<PREFACE_LEN>().copied().unwrap_or(right[0]);
    if let Some(call) = CallBack::decode(&said) {
        assert!(Preface::decode(&said).is_err(), "a connection begins with one or the other");
        let _ = call.check(&credentials.session);
    }
    for preface in [right[0], right[1], said] {
        match Acceptor::new(&node, &credentials, &preface, [5; 32]) {
            Ok(mut acceptor) => {
                if acceptor.awaits_tls() {
                    acceptor.bind([7; BINDING_LEN]);
                }
                let mut rest = bytes;
                while let Some((message, after)) = rest.split_at_checked(acceptor.wants()) {
                    rest = after;
                    match acceptor.handle(message) {
                        Ok(Step::Send(_)) => {}
                        Ok(Step::Done { .. }) => panic!("a stranger guessed a proof"),
                        Err(error) => {
                            let _ = (error.refusal(), error.to_string());
                            break;
                        }
                    }
                }
            }
            Err(error) => {
                let _ = (error.refusal(), error.to_string());
            }
        }
    }
    let (mut connector, _) = Connector::new(&identity(2, Role::Driver), &credentials, node.proc, [6; 32]);
    if let Some(answer) = bytes.get(..connector.wants()) {
        match connector.handle(answer) {
            Ok(_) => panic!("a stranger guessed a proof"),
            Err(error) => {
                let _ = error.to_string();
            }
        }
    }
}

/// Records of TLS, for either end, before it is established and after.
pub fn records(bytes: &[u8]) {
    crate::transport::tls::bear(bytes);
}

/// Messages between cores, and what actors are made of.
pub fn message(bytes: &[u8]) {
    if let Ok(msg) = postcard::from_bytes::<Msg>(bytes) {
        let again = postcard::to_stdvec(&msg).expect("plain data always encodes");
        assert_eq!(postcard::from_bytes::<Msg>(&again).as_ref(), Ok(&msg));
    }
    if let Ok(spec) = postcard::from_bytes::<ActorSpec>(bytes) {
        let again = postcard::to_stdvec(&spec).expect("plain data always encodes");
        assert_eq!(postcard::from_bytes::<ActorSpec>(&again).as_ref(), Ok(&spec));
    }
}

/// Messages of the node, of every kind, known and not.
pub fn node_message(bytes: &[u8]) {
    let Some((&kind, body)) = bytes.split_first() else {
        return;
    };
    let _ = node_wire::decode(kind, body);
    for kind in NODE_KINDS {
        let _ = node_wire::decode(kind, body);
    }
}
