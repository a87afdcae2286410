//! Members whose leases, actors and objects are on another node. The nodes are played by the tests: what a member tells
//! its node is recorded, and what the node says is written here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use skate_core::core::{Core, Fetched, Got};
use skate_core::node_wire as wire;
use skate_core::transport::{Address, SendMode};
use skate_proto::executor::Work;
use skate_proto::handshake::Role;
use skate_proto::ids::{ActorId, FunctionId, NodeKey, ObjectId, ProcId, TaskId};
use skate_proto::leases::ClassSpec;
use skate_proto::msg::{CallDef, Msg, Reason, Returns, WaitsFor};
use skate_proto::payload::{Blob, Payload, Value};

mod cluster;
use cluster::*;

const THERE: ProcId = ProcId(11);

/// A member whose last act is to leave before its node does.
struct Member(Arc<Core>);

impl Drop for Member {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl std::ops::Deref for Member {
    type Target = Core;
    fn deref(&self) -> &Core {
        &self.0
    }
}

/// A driver, because a worker ends its process when it loses its node.
fn member(cluster: &Cluster, me: ProcId) -> Member {
    let node = cluster.node.transport.me().proc;
    let address = Address::Unix(cluster.path());
    Member(Core::start(address, [1; 16], [2; 32], node, me, Role::Driver, 12).unwrap())
}

/// What a member told its node in frames of this kind, so far.
fn told(cluster: &Cluster, member: ProcId, kind: u8) -> Vec<Vec<u8>> {
    let frames = cluster.node.handler.frames.lock();
    frames.iter().filter(|frame| (frame.0, frame.1) == (member, kind)).map(|frame| frame.3.clone()).collect()
}

fn wait_told(cluster: &Cluster, member: ProcId, kind: u8) -> Vec<u8> {
    wait_for("what the member tells its node", || !told(cluster, member, kind).is_empty());
    told(cluster, member, kind).remove(0)
}

fn say<T: serde::Serialize>(cluster: &Cluster, to: ProcId, kind: u8, message: &T) {
    let body = rmp_serde::to_vec(message).unwrap();
    cluster.node.transport.send(to, kind, 0, &[&body], SendMode::Now);
}

fn say_address(cluster: &Cluster, to: ProcId, of: &Cluster) {
    let node = of.node.transport.me().proc;
    say(cluster, to, wire::NODE_ADDRESS, &(node.0, of.address.to_string(), "", false));
}

fn call(actor: Option<ActorId>) -> CallDef {
    CallDef {
        function: FunctionId([7; 16]),
        name: "f".into(),
        method: String::new(),
        group: String::new(),
        returns: Returns::Count(1),
        retry_exceptions: false,
        backpressure: 0,
        actor,
        recorded: true,
    }
}

/// Submits a task, and answers the demand with a worker that is on another node.
fn submit_to(here: &Cluster, a: &Core, args: Payload, worker: ProcId, node: ProcId) -> ObjectId {
    let class = ClassSpec { demand: vec![("CPU".into(), 10_000)], env: vec![], strategy: vec![], retriable: true };
    let def = a.define(call(None), Blob::new(b"code"), Some(class), 0);
    let task = a.submit(def, args, vec![], None, None).unwrap();
    wait_told(here, a.me(), wire::LEASE_DEMAND);
    say(here, a.me(), wire::LEASE_GRANTED, &(0, 1_u64 << 40, worker.0, node.0, 42, [0_u32; 0]));
    ObjectId { task, index: 0 }
}

fn wait_work(core: &Core) -> Work {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match core.poll_work() {
            Some(work) => return work,
            None => assert!(Instant::now() < until, "timed out waiting for work"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn get(core: &Core, object: ObjectId) -> Payload {
    let until = Instant::now() + Duration::from_secs(20);
    match core.get(&[object], Some(until)).unwrap() {
        Got::All(mut found) => match found.remove(0) {
            Fetched::Inline(payload) => payload,
            Fetched::Stored { .. } => panic!("small values are inline"),
        },
        Got::Failed(_, payload) => payload,
    }
}

fn messages(process: &Process, from: ProcId) -> Vec<Msg> {
    let frames = process.handler.frames.lock();
    let of_core = frames.iter().filter(|frame| (frame.0, frame.1) == (from, wire::CORE));
    of_core.map(|frame| postcard::from_bytes(&frame.3).unwrap()).collect()
}

fn answer(process: &Process, to: ProcId, msg: &Msg) {
    process.transport.send(to, wire::CORE, 0, &[&postcard::to_stdvec(msg).unwrap()], SendMode::Now);
}

#[test]
fn a_task_runs_on_a_worker_of_another_node_and_reads_what_its_owner_has() {
    let (here, there) = (Cluster::new(), Cluster::of(THERE));
    let (a, b, c) = (member(&here, A), member(&there, B), member(&there, ProcId(12)));
    let value = a.put(Value::Inline(Payload::plain(b"value")));
    let args = Payload { data: Blob::new(b"args"), refs: vec![value] };
    let result = submit_to(&here, &a, args.clone(), B, THERE);
    let asked = wait_told(&here, A, wire::WHERE_IS_NODE);
    assert_eq!(asked, rmp_serde::to_vec(&(THERE.0,)).unwrap());
    say_address(&here, A, &there);
    let work = wait_work(&b);
    assert_eq!((work.owner, work.task), (A, result.task));
    // The worker gives the reference on, to one that has no connection with its owner and must find it.
    let further = submit_to(&there, &b, args, c.me(), THERE);
    let inner = wait_work(&c);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| get(&c, value));
        wait_told(&there, c.me(), wire::WHERE_IS_NODE);
        say_address(&there, c.me(), &here);
        assert_eq!(reader.join().unwrap(), Payload::plain(b"value"));
    });
    for (core, work) in [(&c, &inner), (&b, &work)] {
        core.answer(work, vec![Value::Inline(Payload::plain(b"done"))], None, false, 0, 0);
    }
    assert_eq!(get(&b, further), Payload::plain(b"done"));
    assert_eq!(get(&a, result), Payload::plain(b"done"));
    // The worker goes back to the node that lent it, when it is idle or when that is asked.
    let returned = wait_told(&here, A, wire::LEASE_RETURN);
    assert_eq!(returned, rmp_serde::to_vec(&(1_u64 << 40, true, THERE.0)).unwrap());
    assert!(told(&here, A, wire::PEER_LOST).is_empty());
    assert_eq!(told(&here, A, wire::WHERE_IS_NODE).len(), 1);
}

#[test]
fn a_lease_in_use_is_kept_under_the_name_of_its_node() {
    let (here, there) = (Cluster::new(), Cluster::of(THERE));
    let (a, b) = (member(&here, A), member(&there, B));
    submit_to(&here, &a, Payload::plain(b"args"), B, THERE);
    wait_told(&here, A, wire::WHERE_IS_NODE);
    say_address(&here, A, &there);
    wait_work(&b);
    say(&here, A, wire::LEASE_RECLAIM, &(1_u64 << 40, true, THERE.0));
    assert_eq!(wait_told(&here, A, wire::LEASE_KEPT), rmp_serde::to_vec(&(1_u64 << 40, THERE.0)).unwrap());
}

#[test]
fn a_worker_whose_node_is_gone_is_reported_as_lost() {
    let here = Cluster::new();
    let a = member(&here, A);
    let result = submit_to(&here, &a, Payload::plain(b"args"), B, THERE);
    wait_told(&here, A, wire::WHERE_IS_NODE);
    say(&here, A, wire::NODE_ADDRESS, &(THERE.0, "", "it was switched off", false));
    assert_eq!(wait_told(&here, A, wire::PEER_LOST), rmp_serde::to_vec(&(B.0,)).unwrap());
    say(&here, A, wire::WORKER_DIED, &(B.0, 1_u64 << 40, "node 11 was switched off", 0, false, false, 0_u8));
    let error = get(&a, result);
    assert!(error.is_error() && String::from_utf8_lossy(&error.data).contains("switched off"), "{error:?}");
    wait_for("the route to be dropped", || a.statistics().contains(&("routes", 0)));
}

#[test]
fn an_address_that_cannot_be_read_counts_as_none() {
    let here = Cluster::new();
    let a = member(&here, A);
    submit_to(&here, &a, Payload::plain(b"args"), B, THERE);
    wait_told(&here, A, wire::WHERE_IS_NODE);
    say(&here, A, wire::NODE_ADDRESS, &(THERE.0, "over there", "", false));
    wait_told(&here, A, wire::PEER_LOST);
}

#[test]
fn calls_reach_an_actor_on_another_node_and_only_the_own_node_says_where_nodes_are() {
    let (here, there) = (Cluster::new(), Cluster::of(THERE));
    let (a, b) = (member(&here, A), there.join(B));
    let call_actor = |seq, node: ProcId| {
        let actor = ActorId { proc: ProcId(99), seq };
        let handle = ObjectId { task: TaskId { node: NodeKey(NODE.0), proc: A, seq: 1000 + seq }, index: 0 };
        let def = a.define(call(Some(actor)), Blob::empty(), None, 0);
        a.submit(def, Payload::plain(b"args"), vec![], Some(handle), None).unwrap();
        wait_for("the subscription", || told(&here, A, wire::ACTOR_SUBSCRIBE).len() as u64 == seq);
        let name = serde_bytes::ByteBuf::from(actor.to_bytes());
        let cause = serde_bytes::Bytes::new(b"");
        say(&here, A, wire::ACTOR_STATE, &(name, 1, B.0 + seq - 1, node.0, 0, 0, cause, 0, 42));
    };
    call_actor(1, THERE);
    wait_told(&here, A, wire::WHERE_IS_NODE);
    say_address(&here, A, &there);
    b.drive_until(|h| h.frames.lock().len() >= 2);
    assert!(matches!(&messages(&b, A)[..], [Msg::Define { .. }, Msg::Push(_)]));
    // What a member says about a node is not heard: the question is asked all the same.
    let lie = rmp_serde::to_vec(&(33_u64, "", "gone", false)).unwrap();
    b.transport.send(A, wire::NODE_ADDRESS, 0, &[&lie], SendMode::Now);
    let question = ObjectId { task: TaskId { node: NodeKey(NODE.0), proc: A, seq: 5 }, index: 0 };
    answer(&b, A, &Msg::Why { object: question, question: 1 });
    b.drive_until(|h| h.frames.lock().len() >= 3);
    call_actor(2, ProcId(33));
    wait_for("the second question", || told(&here, A, wire::WHERE_IS_NODE).len() == 2);
    assert!(told(&here, A, wire::PEER_LOST).is_empty());
}

#[test]
fn every_message_to_an_owner_finds_its_node() {
    let (here, there) = (Cluster::new(), Cluster::of(THERE));
    let (a, owner) = (member(&here, A), there.join(B));
    let object = |seq, index| ObjectId { task: TaskId { node: NodeKey(THERE.0), proc: B, seq }, index };
    let lose = |ends: usize| {
        // Whoever the connection is lost with, its route goes, and the next message must bring a new one.
        owner.transport.disconnect(A);
        wait_for("its end", || told(&here, A, wire::PEER_LOST).len() == ends);
    };
    a.hold_handle(object(1, ObjectId::ACTOR_INDEX));
    wait_told(&here, A, wire::WHERE_IS_NODE);
    say_address(&here, A, &there);
    let heard = |count| wait_for("the message", || messages(&owner, A).len() == count);
    heard(1);
    lose(1);
    a.release(object(1, ObjectId::ACTOR_INDEX));
    heard(2);
    lose(2);
    a.retain(object(2, 0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| get(&a, object(2, 0)));
        heard(3);
        answer(&owner, A, &Msg::Resolved { object: object(2, 0), value: Value::Inline(Payload::plain(b"v")) });
        assert_eq!(reader.join().unwrap(), Payload::plain(b"v"));
    });
    lose(3);
    a.retain(object(3, 0));
    a.cancel(object(3, 0), false, false);
    heard(4);
    lose(4);
    std::thread::scope(|scope| {
        let until = Instant::now() + Duration::from_secs(20);
        let asking = scope.spawn(move || a.ask_why(object(3, 0), Some(until)).map(|reason| (a, reason)).unwrap());
        heard(5);
        let Msg::Why { question, .. } = messages(&owner, A)[4] else { panic!("{:?}", messages(&owner, A)) };
        let reason = Reason { text: "so".into(), waits_for: WaitsFor::Nothing };
        answer(&owner, A, &Msg::Because { question, reason: reason.clone() });
        assert_eq!(asking.join().unwrap().1, reason);
    });
    let said = messages(&owner, A);
    assert!(
        matches!(
            &said[..],
            [
                Msg::AddBorrower { .. },
                Msg::Release { .. },
                Msg::Resolve { .. },
                Msg::CancelObject { .. },
                Msg::Why { .. }
            ]
        ),
        "{said:?}"
    );
    assert_eq!(told(&here, A, wire::WHERE_IS_NODE).len(), 1);
}
