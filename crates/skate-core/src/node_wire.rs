//! Messages between a core and its node manager: msgpack arrays, one frame kind each.
//!
//! The Python side is `ray/_protocol.py`; the kinds and the order of the fields must agree, which
//! `tests/test_wire.py` checks. Golden rule: fields are only ever appended.

use serde::Serialize;
use serde_bytes::{ByteBuf, Bytes};
use skate_proto::actors::{ActorState, Creation};
use skate_proto::ids::{ActorId, LeaseId, NodeKey, ObjectId, ProcId, SegmentId};
use skate_proto::leases::{ClassSpec, Death};
use skate_proto::location::Location;
use skate_proto::msg::ActorSpec;
use skate_proto::objects::Bequest;
use skate_proto::payload::{Blob, ErrorCode, Payload};
use skate_proto::spilling::{Offered, Written};

/// Frames between cores; the body is a postcard `Msg`.
pub const CORE: u8 = 2;

pub const LEASE_DEMAND: u8 = 64;
pub const LEASE_RETURN: u8 = 65;
pub const BLOCKED: u8 = 66;
pub const UNBLOCKED: u8 = 67;
pub const SEGMENT_REQUEST: u8 = 68;
pub const SEGMENT_MAP: u8 = 69;
pub const SEGMENT_RELEASE: u8 = 70;
pub const SEGMENT_CLAIMS: u8 = 71;
pub const BLOCKS_FREED: u8 = 72;
pub const ACTOR_CREATE: u8 = 73;
pub const ACTOR_READY: u8 = 74;
pub const ACTOR_FAILED: u8 = 75;
pub const ACTOR_SUBSCRIBE: u8 = 76;
pub const ACTOR_RELEASE: u8 = 77;
pub const ACTOR_KILL: u8 = 78;
pub const ACTOR_EXIT: u8 = 79;
pub const PEER_LOST: u8 = 80;
pub const REQUEST: u8 = 81;
pub const RETIRED: u8 = 82;
pub const LEASE_KEPT: u8 = 83;
pub const WHERE_IS_NODE: u8 = 84;
pub const PULL: u8 = 85;
pub const PULL_RELEASED: u8 = 86;
pub const SPILL: u8 = 87;
pub const SPILL_RELEASED: u8 = 88;
pub const REGISTER_OPENED: u8 = 92;
pub const ESTATE_QUESTION: u8 = 93;

pub const LEASE_GRANTED: u8 = 96;
pub const LEASE_RECLAIM: u8 = 97;
pub const WORKER_DIED: u8 = 98;
pub const SEGMENT_GRANTED: u8 = 99;
pub const SEGMENT_DENIED: u8 = 100;
pub const SEGMENT_MAPPED: u8 = 101;
pub const SEGMENT_TRIM: u8 = 102;
pub const SEGMENT_ADOPTED: u8 = 103;
pub const ACTOR_STATE: u8 = 104;
pub const ACTOR_INIT: u8 = 105;
pub const REPLY: u8 = 106;
pub const LOG_LINES: u8 = 107;
pub const NOTICE: u8 = 108;
pub const LEASE_FAILED: u8 = 109;
pub const ACTOR_STOP: u8 = 110;
pub const EXIT: u8 = 111;
pub const DEATHS: u8 = 112;
pub const PRESSURE: u8 = 113;
pub const NODE_ADDRESS: u8 = 114;

pub const PULLED: u8 = 115;
pub const DESCRIBE: u8 = 116;
pub const DESCRIBED: u8 = 117;
pub const TASK_EVENTS: u8 = 118;
pub const SPILL_WANTED: u8 = 119;
pub const SPILLED: u8 = 120;
pub const ESTATE_ANSWER: u8 = 124;
pub const BLOCKS_RETIRED: u8 = 125;

/// `WorkerDied`: a retry is not charged to `max_retries`, or there is none; anything else is charged.
const RETRY_FREE: u8 = 1;
const RETRY_NEVER: u8 = 2;

/// Why an actor died, in [`ActorState`]: how to read the cause.
const CAUSE_INIT_ERROR: u8 = 1;
const CAUSE_UNSCHEDULABLE: u8 = 2;

/// Why no worker can be had, in `LeaseFailed`.
const FAILED_GROUP_REMOVED: u8 = 1;
const FAILED_UNSCHEDULABLE: u8 = 2;

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec(value).expect("plain data always encodes")
}

/// A map, as Python wants demands.
struct Demand<'a>(&'a [(String, i64)]);

impl Serialize for Demand<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, amount)| (name, amount)))
    }
}

pub fn lease_demand(class: u32, count: u32, spec: &ClassSpec, label: &str, granted: u32) -> Vec<u8> {
    encode(&(
        class,
        Demand(&spec.demand),
        count,
        Bytes::new(&spec.env),
        Bytes::new(&spec.strategy),
        label,
        spec.retriable,
        granted,
    ))
}

pub fn lease_return(lease: LeaseId, reusable: bool, node: NodeKey) -> Vec<u8> {
    encode(&(lease.0, reusable, node.0))
}

pub fn empty() -> Vec<u8> {
    encode(&[(); 0])
}

pub fn segment_request(min_bytes: u64, wish_bytes: u64) -> Vec<u8> {
    encode(&(min_bytes, wish_bytes))
}

pub fn lease_kept(lease: LeaseId, node: NodeKey) -> Vec<u8> {
    encode(&(lease.0, node.0))
}

pub fn segment(segment: SegmentId) -> Vec<u8> {
    encode(&(segment.0,))
}

/// `discard`: blocks in it may be read for ever, and it must not be used again.
pub fn segment_release(segment: SegmentId, discard: bool) -> Vec<u8> {
    encode(&(segment.0, discard))
}

/// `node` is where the segment lies: other nodes have segments of the same number.
pub fn segment_claims(segment: SegmentId, blocks: &[(u64, u64)], node: NodeKey) -> Vec<u8> {
    let more = false; // a process says all at once
    encode(&(segment.0, blocks, node.0, more))
}

/// `node` as in [`segment_claims`].
pub fn blocks_freed(segment: SegmentId, offsets: &[u64], node: NodeKey) -> Vec<u8> {
    encode(&(segment.0, offsets, node.0))
}

pub fn pull(object: ObjectId, location: &Location, prefetch: bool) -> Vec<u8> {
    encode(&(
        Bytes::new(&object.to_bytes()),
        location.node.0,
        location.segment.0,
        location.offset,
        location.len,
        prefetch,
    ))
}

pub fn pull_released(object: ObjectId) -> Vec<u8> {
    encode(&(Bytes::new(&object.to_bytes()),))
}

/// Goes with the descriptor of the register.
pub fn register_opened(bytes: u64) -> Vec<u8> {
    encode(&(bytes,))
}

/// What the owners' node must hear first is what is given up.
pub fn estate_question(node: NodeKey, given_up: &[ObjectId], claimed: &[ObjectId]) -> Vec<u8> {
    encode(&(node.0, ids(given_up), ids(claimed)))
}

fn ids(objects: &[ObjectId]) -> Vec<ByteBuf> {
    objects.iter().map(|object| ByteBuf::from(object.to_bytes())).collect()
}

pub fn spill(owner: ProcId, offered: &[Offered]) -> Vec<u8> {
    let block =
        |o: &Offered| (ByteBuf::from(o.object.to_bytes()), o.serial, o.from.segment.0, o.from.offset, o.from.len);
    let blocks: Vec<_> = offered.iter().map(block).collect();
    encode(&(owner.0, blocks))
}

/// `node` is 0 for the node that is told.
pub fn spill_released(spill: SegmentId, node: u64) -> Vec<u8> {
    encode(&(spill.0, node))
}

pub fn actor_create(creation: &Creation, spec: &ActorSpec) -> Vec<u8> {
    let spec = postcard::to_stdvec(spec).expect("plain data always encodes");
    encode(&(
        Bytes::new(&creation.actor.to_bytes()),
        Bytes::new(&spec),
        Demand(&creation.place),
        Demand(&creation.run),
        Bytes::new(&creation.env),
        Bytes::new(&creation.strategy),
        &creation.name,
        &creation.namespace,
        creation.max_restarts,
        creation.detached,
        &creation.class_name,
        creation.actor.proc.0,
        &creation.label,
    ))
}

pub fn actor(actor: ActorId) -> Vec<u8> {
    encode(&(Bytes::new(&actor.to_bytes()),))
}

pub fn actor_ready(actor: ActorId, incarnation: u32) -> Vec<u8> {
    encode(&(Bytes::new(&actor.to_bytes()), incarnation))
}

pub fn actor_failed(actor: ActorId, incarnation: u32, error: &[u8]) -> Vec<u8> {
    encode(&(Bytes::new(&actor.to_bytes()), incarnation, Bytes::new(error)))
}

pub fn actor_kill(actor: ActorId, no_restart: bool) -> Vec<u8> {
    encode(&(Bytes::new(&actor.to_bytes()), no_restart))
}

pub fn actor_exit(actor: ActorId, incarnation: u32, reason: &str) -> Vec<u8> {
    encode(&(Bytes::new(&actor.to_bytes()), incarnation, reason))
}

pub fn peer_lost(proc: ProcId) -> Vec<u8> {
    encode(&(proc.0,))
}

pub fn where_is_node(node: NodeKey) -> Vec<u8> {
    encode(&(node.0,))
}

pub fn request(op: &str, args: &[u8]) -> Vec<u8> {
    encode(&(op, Bytes::new(args)))
}

/// `rows` is a msgpack list.
pub fn described(what: u8, total: u64, rows: &[u8]) -> Vec<u8> {
    encode(&(what, total, Bytes::new(rows)))
}

pub fn task_events(batch: &[u8]) -> Vec<u8> {
    encode(&(Bytes::new(batch),))
}

/// Why there is no segment.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    Other,
    /// The store is full, and so is the disk.
    DiskFull,
    /// Others, who cannot let go of what they have, need the room first: let go of what was gathered, and ask again.
    Turn,
}

/// What the node says.
#[derive(Debug)]
pub enum FromNode {
    LeaseGranted {
        class: u32,
        lease: LeaseId,
        worker: ProcId,
        node: NodeKey,
        pid: u32,
        gpu_ids: Vec<u32>,
    },
    LeaseReclaim {
        lease: LeaseId,
        wanted: bool,
        node: NodeKey,
    },
    Pressure {
        pressed: bool,
    },
    WorkerDied {
        proc: ProcId,
        cause: String,
        death: Death,
    },
    Deaths(Vec<(u64, String)>),
    SegmentGranted {
        segment: SegmentId,
        size: u64,
    },
    SegmentDenied {
        message: String,
        kept: bool,
        why: Denial,
    },
    SegmentMapped {
        segment: SegmentId,
        size: u64,
    },
    Pulled {
        segment: SegmentId,
        size: u64,
        offset: u64,
    },
    SegmentTrim {
        bytes: u64,
    },
    SpillWanted {
        bytes: u64,
    },
    Spilled {
        owner: ProcId,
        written: Vec<Written>,
    },
    /// Of objects whose owner has died, what its node has; `None` is nothing.
    EstateAnswer(Vec<(ObjectId, Option<Bequest>)>),
    /// Nobody needs these blocks of dead owners, but whoever has them mapped may still read them.
    BlocksRetired(Vec<(SegmentId, u64)>),
    /// `lessee` has died, that had this segment of `node`.
    SegmentAdopted {
        segment: SegmentId,
        node: NodeKey,
        lessee: ProcId,
    },
    ActorState {
        actor: ActorId,
        state: ActorState,
    },
    ActorInit {
        actor: ActorId,
        incarnation: u32,
        spec: Box<ActorSpec>,
        gpu_ids: Vec<u32>,
    },
    Reply {
        ok: bool,
        body: Vec<u8>,
    },
    LogLines {
        name: String,
        pid: u32,
        stream: u8,
        lines: Vec<String>,
        ip: String,
    },
    Notice {
        level: String,
        text: String,
    },
    LeaseFailed {
        class: u32,
        reason: String,
        code: ErrorCode,
    },
    ActorStop,
    Exit,
    /// An empty address: the node is gone, with the cause.
    Describe {
        what: u8,
        limit: u32,
    },
    NodeAddress {
        node: NodeKey,
        address: String,
        cause: String,
        /// The address is the head's, through which the node is reached.
        relayed: bool,
    },
}

/// Object, serial, number (0 if it was not written) and length.
type SpilledBlocks = Vec<(ByteBuf, u64, u64, u64)>;

/// Decodes a frame of the node; `None` for what is malformed or not known.
pub fn decode(kind: u8, body: &[u8]) -> Option<FromNode> {
    fn get<'a, T: serde::Deserialize<'a>>(body: &'a [u8]) -> Option<T> {
        rmp_serde::from_slice(body).ok()
    }
    Some(match kind {
        LEASE_GRANTED => {
            let (class, lease, worker, node, pid, gpu_ids): (u32, u64, u64, u64, u32, Vec<u32>) = get(body)?;
            let (lease, worker, node) = (LeaseId(lease), ProcId(worker), NodeKey(node));
            FromNode::LeaseGranted { class, lease, worker, node, pid, gpu_ids }
        }
        LEASE_RECLAIM => {
            let (lease, wanted, node): (u64, bool, u64) = get(body)?;
            FromNode::LeaseReclaim { lease: LeaseId(lease), wanted, node: NodeKey(node) }
        }
        PRESSURE => FromNode::Pressure { pressed: get::<(bool,)>(body)?.0 },
        WORKER_DIED => {
            let (proc, _lease, cause, _exit_code, _intended, oom, retry): (u64, u64, String, i32, bool, bool, u8) =
                get(body)?;
            let death = match (oom, retry) {
                (false, _) => Death::Crashed,
                (true, RETRY_FREE) => Death::Evicted,
                (true, RETRY_NEVER) => Death::EvictedAlone,
                (true, _) => Death::OutOfMemory,
            };
            FromNode::WorkerDied { proc: ProcId(proc), cause, death }
        }
        DEATHS => FromNode::Deaths(get::<(Vec<(u64, String)>,)>(body)?.0),
        SEGMENT_GRANTED => {
            let (segment, size): (u64, u64) = get(body)?;
            FromNode::SegmentGranted { segment: SegmentId(segment), size }
        }
        SEGMENT_DENIED => {
            let (message, kept, why): (String, bool, u8) = get(body)?;
            let why = match why {
                1 => Denial::DiskFull,
                2 => Denial::Turn,
                _ => Denial::Other,
            };
            FromNode::SegmentDenied { message, kept, why }
        }
        SEGMENT_MAPPED => {
            let (segment, size, _lessee): (u64, u64, u64) = get(body)?;
            FromNode::SegmentMapped { segment: SegmentId(segment), size }
        }
        PULLED => {
            let (segment, size, offset): (u64, u64, u64) = get(body)?;
            FromNode::Pulled { segment: SegmentId(segment), size, offset }
        }
        ESTATE_ANSWER => {
            type Found = Vec<(ByteBuf, Vec<u64>, ByteBuf)>;
            let (found, absent): (Found, Vec<ByteBuf>) = get(body)?;
            let found = found.iter().map(|(object, location, deed)| {
                Some((ObjectId::from_bytes(object)?, Some(decode_bequest(location, deed)?)))
            });
            let absent = absent.iter().map(|object| Some((ObjectId::from_bytes(object)?, None)));
            FromNode::EstateAnswer(found.chain(absent).collect::<Option<_>>()?)
        }
        BLOCKS_RETIRED => {
            let blocks = get::<(Vec<(u64, u64)>,)>(body)?.0;
            FromNode::BlocksRetired(blocks.into_iter().map(|(segment, offset)| (SegmentId(segment), offset)).collect())
        }
        SEGMENT_TRIM => FromNode::SegmentTrim { bytes: get::<(u64,)>(body)?.0 },
        SPILL_WANTED => FromNode::SpillWanted { bytes: get::<(u64,)>(body)?.0 },
        SPILLED => {
            let (owner, blocks): (u64, SpilledBlocks) = get(body)?;
            let written = |(object, serial, spill, len): (ByteBuf, u64, u64, u64)| {
                let spill = (spill != 0).then_some(SegmentId(spill));
                Some(Written { object: ObjectId::from_bytes(&object)?, serial, spill, len })
            };
            FromNode::Spilled { owner: ProcId(owner), written: blocks.into_iter().map(written).collect::<Option<_>>()? }
        }
        SEGMENT_ADOPTED => {
            let (segment, node, lessee): (u64, u64, u64) = get(body)?;
            FromNode::SegmentAdopted { segment: SegmentId(segment), node: NodeKey(node), lessee: ProcId(lessee) }
        }
        ACTOR_STATE => decode_actor_state(body)?,
        ACTOR_INIT => {
            let (actor, incarnation, spec, gpu_ids, _namespace, _name): (
                ByteBuf,
                u32,
                ByteBuf,
                Vec<u32>,
                String,
                String,
            ) = get(body)?;
            FromNode::ActorInit {
                actor: ActorId::from_bytes(&actor)?,
                incarnation,
                spec: Box::new(postcard::from_bytes(&spec).ok()?),
                gpu_ids,
            }
        }
        REPLY => {
            let (ok, body): (bool, ByteBuf) = get(body)?;
            FromNode::Reply { ok, body: body.into_vec() }
        }
        LOG_LINES => {
            let (name, pid, stream, lines, ip): (String, u32, u8, Vec<String>, String) = get(body)?;
            FromNode::LogLines { name, pid, stream, lines, ip }
        }
        NOTICE => {
            let (level, text): (String, String) = get(body)?;
            FromNode::Notice { level, text }
        }
        LEASE_FAILED => {
            let (class, reason, code): (u32, String, u8) = get(body)?;
            let code = match code {
                FAILED_GROUP_REMOVED => ErrorCode::GroupRemoved,
                FAILED_UNSCHEDULABLE => ErrorCode::Infeasible,
                _ => ErrorCode::Other,
            };
            FromNode::LeaseFailed { class, reason, code }
        }
        NODE_ADDRESS => {
            let (node, address, cause, relayed): (u64, String, String, bool) = get(body)?;
            FromNode::NodeAddress { node: NodeKey(node), address, cause, relayed }
        }
        DESCRIBE => {
            let (what, limit): (u8, u32) = get(body)?;
            FromNode::Describe { what, limit }
        }
        ACTOR_STOP => FromNode::ActorStop,
        EXIT => FromNode::Exit,
        _ => return None,
    })
}

/// A location without numbers and a deed without bytes are none.
fn decode_bequest(location: &[u64], deed: &[u8]) -> Option<Bequest> {
    let location = match *location {
        [] => None,
        [node, segment, lessee, offset, len] => {
            let (node, segment, lessee) = (NodeKey(node), SegmentId(segment), ProcId(lessee));
            Some(Location { node, segment, lessee, offset, len })
        }
        _ => return None,
    };
    // The dead owner wrote it, and may have been killed by its own broken memory: what cannot be read is not there.
    let deed = if deed.is_empty() { None } else { postcard::from_bytes(deed).ok() };
    Some(Bequest { location, deed })
}

fn decode_actor_state(body: &[u8]) -> Option<FromNode> {
    type Fields = (ByteBuf, u8, u64, u64, u32, u8, ByteBuf, i64, u32);
    let (actor, state, proc, node, incarnation, cause_kind, cause, _left, _pid): Fields =
        rmp_serde::from_slice(body).ok()?;
    let actor = ActorId::from_bytes(&actor)?;
    let state = match state {
        0 => ActorState::Pending,
        1 => ActorState::Alive { proc: ProcId(proc), node: NodeKey(node), incarnation },
        2 => ActorState::Restarting,
        3 if cause_kind == CAUSE_INIT_ERROR => ActorState::Dead(Payload { data: Blob::new(&cause), refs: Vec::new() }),
        3 => {
            let unschedulable = cause_kind == CAUSE_UNSCHEDULABLE;
            let code = if unschedulable { ErrorCode::ActorUnschedulable } else { ErrorCode::ActorDied };
            ActorState::Dead(Payload::error(code, &String::from_utf8_lossy(&cause)))
        }
        _ => return None,
    };
    Some(FromNode::ActorState { actor, state })
}
