//! A core that reads values of another node, beside a stand-in for its own node that answers as a test wants.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use skate_core::core::{Core, CoreError, Fetched, Got};
use skate_core::node_wire as wire;
use skate_core::sys::create_segment;
use skate_core::transport::{Address, CloseReason, Frame, Handler, Listener, PeerInfo, SendMode, Transport};
use skate_proto::handshake::Role;
use skate_proto::ids::{NodeKey, ObjectId, ProcId, SegmentId};
use skate_proto::location::Location;
use skate_proto::msg::Msg;
use skate_proto::payload::Value;

mod cluster;
use cluster::{A, NODE, config, wait_for};

const ELSEWHERE: NodeKey = NodeKey(77);
const LEN: u64 = 200_000;
const OFFSET: u64 = 64;

/// What the node answers to the pulls that it gets, in turn.
enum Answer {
    Copy,
    Denied { kept: bool, why: u8 },
    Never,
}

#[derive(Default)]
struct NodeHandler {
    transport: OnceLock<Weak<Transport>>,
    answers: Mutex<VecDeque<Answer>>,
    heard: Mutex<Vec<(u8, Vec<u8>)>>,
}

impl Handler for NodeHandler {
    fn on_started(&self, transport: &Arc<Transport>) {
        let _ = self.transport.set(Arc::downgrade(transport));
    }
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, _: Option<OwnedFd>) {
        self.heard.lock().push((frame.kind, frame.body.to_vec()));
        if frame.kind != wire::PULL || frame.corr == 0 {
            return;
        }
        let transport = self.transport.wait().upgrade().unwrap();
        match self.answers.lock().pop_front() {
            Some(Answer::Copy) => {
                let fd = copy();
                let body = [0x93, 0x09, 0xce, 0, 3, 13, 128, OFFSET as u8]; // segment 9 of 200,064 bytes
                transport.send_fd(from, wire::PULLED, frame.corr, &[&body], fd.as_fd());
            }
            Some(Answer::Denied { kept, why }) => {
                let body = [0x93, 0xa2, b'n', b'o', if kept { 0xc3 } else { 0xc2 }, why];
                transport.send(from, wire::SEGMENT_DENIED, frame.corr, &[&body], SendMode::Now);
            }
            Some(Answer::Never) => {}
            None => panic!("a pull that the test does not know of"),
        }
    }
    fn on_batch_end(&self) {}
    fn on_joined(&self, _: PeerInfo) {}
    fn on_closed(&self, _: ProcId, _: CloseReason) {}
    fn on_fd_ready(&self, _: u64) {}
}

fn copy() -> OwnedFd {
    let fd = create_segment("copy", LEN + OFFSET).unwrap();
    let file = std::fs::File::from(fd.try_clone().unwrap());
    file.write_all_at(&[7; LEN as usize], OFFSET).unwrap();
    fd
}

struct Bench {
    directory: std::path::PathBuf,
    node: Arc<Transport>,
    handler: Arc<NodeHandler>,
    core: Arc<Core>,
}

impl Bench {
    fn new(name: &str, answers: impl IntoIterator<Item = Answer>) -> Self {
        let directory = std::env::temp_dir().join(format!("skate-copies-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let address = Address::Unix(directory.join("node.sock"));
        let listener = Listener::bind_unix(&directory.join("node.sock")).unwrap();
        let handler =
            Arc::new(NodeHandler { answers: Mutex::new(answers.into_iter().collect()), ..Default::default() });
        let node = Transport::start(
            config(NODE, Role::Node, address.clone(), vec![listener]),
            Arc::clone(&handler) as Arc<dyn Handler>,
        )
        .unwrap();
        let core = Core::start(address, [1; 16], [2; 32], NODE, A, Role::Driver, 11).unwrap();
        wait_for("the node to notice", || node.peer_info(A).is_some());
        Self { directory, node, handler, core }
    }

    fn address(&self) -> Address {
        Address::Unix(self.directory.join("node.sock"))
    }

    /// An object of this process whose value lies on another node.
    fn stored(&self, segment: u64) -> ObjectId {
        let location =
            Location { node: ELSEWHERE, segment: SegmentId(segment), lessee: ProcId(5), offset: 4096, len: LEN };
        self.core.put(Value::Stored { location, refs: Vec::new() })
    }

    fn get(&self, ids: &[ObjectId]) -> Result<Vec<Fetched>, CoreError> {
        match self.core.get(ids, Some(Instant::now() + Duration::from_secs(20)))? {
            Got::All(all) => Ok(all),
            Got::Failed(_, payload) => Ok(vec![Fetched::Inline(payload)]),
        }
    }

    fn count(&self, kind: u8) -> usize {
        self.handler.heard.lock().iter().filter(|(heard, _)| *heard == kind).count()
    }

    fn copied(&self) -> u64 {
        self.core.statistics().into_iter().find(|(name, _)| *name == "copied_objects").unwrap().1
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.core.close();
        self.node.shutdown();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn check(fetched: &Fetched) {
    let Fetched::Stored { mapping, location, .. } = fetched else { panic!("an error instead of a value") };
    let start = mapping.slice(location.offset, location.len).unwrap();
    assert_eq!(location.len, LEN);
    // SAFETY: `slice` checked the bounds, the mapping lives, and nobody writes to the copy.
    let bytes = unsafe { std::slice::from_raw_parts(start, LEN as usize) };
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn a_value_of_another_node_is_copied_once_and_held_until_its_object_goes() {
    let bench = Bench::new("once", [Answer::Copy]);
    let id = bench.stored(3);
    for fetched in [bench.get(&[id]).unwrap(), bench.get(&[id]).unwrap(), vec![bench.core.fetch_mapped(id).unwrap()]] {
        check(&fetched[0]);
        bench.core.release_view(id);
    }
    let pull =
        wire::pull(id, &Location { node: ELSEWHERE, segment: SegmentId(3), lessee: A, offset: 4096, len: LEN }, false);
    assert!(bench.handler.heard.lock().contains(&(wire::PULL, pull)));
    assert_eq!((bench.count(wire::PULL), bench.count(wire::PULL_RELEASED), bench.copied()), (1, 0, 1));
    bench.core.release(id);
    wait_for("the release", || bench.count(wire::PULL_RELEASED) == 1);
    assert_eq!(bench.copied(), 0);
}

#[test]
fn a_live_view_keeps_the_copy() {
    let bench = Bench::new("view", [Answer::Copy]);
    let id = bench.stored(3);
    let view = bench.get(&[id]).unwrap();
    bench.core.release(id);
    assert_eq!(bench.copied(), 1, "the view counts the object");
    check(&view[0]);
    bench.core.release_view(id);
    wait_for("the release", || bench.count(wire::PULL_RELEASED) == 1);
}

#[test]
fn several_values_are_under_way_together() {
    let bench = Bench::new("several", [Answer::Copy, Answer::Copy, Answer::Copy]);
    let ids: Vec<ObjectId> = (3..6).map(|segment| bench.stored(segment)).collect();
    bench.get(&ids).unwrap().iter().for_each(check);
    let pulls: Vec<bool> = {
        let heard = bench.handler.heard.lock();
        heard.iter().filter(|(kind, _)| *kind == wire::PULL).map(|(_, body)| body.last() == Some(&0xc3)).collect()
    };
    assert_eq!(pulls, [true, true, false, false, false], "prefetches first");
    ids.iter().for_each(|id| bench.core.release_view(*id));
    ids.iter().for_each(|id| bench.core.release(*id));
    wait_for("the releases", || bench.count(wire::PULL_RELEASED) == 3);
}

#[test]
fn two_threads_that_read_one_value_share_its_copy() {
    let bench = Bench::new("threads", [Answer::Copy, Answer::Copy]);
    let id = bench.stored(3);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                check(&bench.get(&[id]).unwrap()[0]);
                bench.core.release_view(id);
            });
        }
    });
    assert_eq!((bench.copied(), bench.count(wire::PULL_RELEASED)), (1, 0));
    bench.core.release(id);
    wait_for("the release", || bench.count(wire::PULL_RELEASED) == 1);
}

#[test]
fn a_lost_value_is_reported_to_its_owner_and_one_without_room_is_not() {
    let bench = Bench::new("denied", [Answer::Denied { kept: true, why: 0 }, Answer::Denied { kept: false, why: 0 }]);
    let id = bench.stored(3);
    assert!(matches!(bench.get(&[id]), Err(CoreError::StoreFull(text)) if text == "no"));
    assert!(bench.core.is_ready(id), "the value is where it was");
    let Fetched::Inline(payload) = bench.get(&[id]).unwrap().remove(0) else { panic!("a value that is lost") };
    assert!(payload.is_error(), "it was put, so nobody can make it again");
    assert_eq!(bench.copied(), 0);
}

#[test]
fn who_is_to_let_others_go_first_lets_go_and_asks_again() {
    let bench = Bench::new("turn", [Answer::Denied { kept: true, why: 2 }, Answer::Copy]);
    let id = bench.stored(3);
    check(&bench.get(&[id]).unwrap()[0]);
    assert_eq!((bench.count(wire::PULL), bench.count(wire::PULL_RELEASED)), (2, 1));
    bench.core.release_view(id);
}

#[test]
fn who_gives_up_waiting_tells_the_node() {
    let bench = Bench::new("timeout", [Answer::Never, Answer::Copy]);
    let id = bench.stored(3);
    let soon = Instant::now() + Duration::from_millis(20);
    assert!(matches!(bench.core.get(&[id], Some(soon)), Err(CoreError::TimedOut)));
    wait_for("the release", || bench.count(wire::PULL_RELEASED) == 1);
    check(&bench.get(&[id]).unwrap()[0]);
    assert_eq!(bench.count(wire::PULL), 2);
}

#[test]
fn blocks_of_a_dead_lessee_on_another_node_are_freed_through_the_own_node() {
    let bench = Bench::new("free", []);
    let id = bench.stored(3);
    let died = [0x97, 5, 0, 0xa4, b'g', b'o', b'n', b'e', 0xf7, 0xc2, 0xc2, 0];
    bench.node.send(A, wire::WORKER_DIED, 0, &[&died], SendMode::Now);
    let knows = || bench.core.statistics().contains(&("deaths_remembered", 1));
    wait_for("the death", knows);
    bench.core.release(id);
    let freed = (wire::BLOCKS_FREED, wire::blocks_freed(SegmentId(3), &[4096], ELSEWHERE));
    wait_for("the free", || bench.handler.heard.lock().contains(&freed));
}

#[test]
fn what_a_dead_lessee_may_still_be_saying_is_read_before_its_segments_are_claimed() {
    const LESSEE: ProcId = ProcId(5);
    let bench = Bench::new("adopted", []);
    let id = bench.stored(3);
    let lessee = cluster::start(config(LESSEE, Role::Worker, bench.address(), vec![])).unwrap();
    let question = postcard::to_stdvec(&Msg::Resolve { object: id }).unwrap();
    lessee.transport.send(A, wire::CORE, 0, &[&question], SendMode::Now);
    wait_for("the answer", || !lessee.handler.frames.lock().is_empty());
    let adopted = |segment, lessee: ProcId| {
        let body = [0x93, segment, ELSEWHERE.0 as u8, lessee.0 as u8];
        bench.node.send(A, wire::SEGMENT_ADOPTED, 0, &[&body], SendMode::Now);
    };
    let claims = || {
        let heard = bench.handler.heard.lock();
        heard.iter().filter(|(kind, _)| *kind == wire::SEGMENT_CLAIMS).map(|(_, body)| body.clone()).collect::<Vec<_>>()
    };
    adopted(3, LESSEE);
    adopted(4, ProcId(6));
    let none = wire::segment_claims(SegmentId(4), &[], ELSEWHERE);
    wait_for("the second answer", || claims() == [none.clone()]);
    drop(lessee);
    let some = wire::segment_claims(SegmentId(3), &[(4096, LEN)], ELSEWHERE);
    wait_for("the first answer", || claims() == [none.clone(), some.clone()]);
    bench.core.release(id);
    let freed = (wire::BLOCKS_FREED, wire::blocks_freed(SegmentId(3), &[4096], ELSEWHERE));
    wait_for("the free", || bench.handler.heard.lock().contains(&freed));
}
