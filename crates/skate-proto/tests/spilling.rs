//! An owner, its node and borrowers, question by question.

use skate_proto::ids::{NodeKey, ObjectId, ProcId, SegmentId};
use skate_proto::leases::Death;
use skate_proto::location::Location;
use skate_proto::msg::Msg;
use skate_proto::owner::{Effect, Out, Owner, ToNode};
use skate_proto::payload::Value;
use skate_proto::spilling::{Offered, Written};

const NODE: NodeKey = NodeKey(100);
const ME: ProcId = ProcId(1);
const B: ProcId = ProcId(2);
const C: ProcId = ProcId(3);
const LEN: u64 = 1000;

fn place(segment: u64, offset: u64) -> Location {
    Location { node: NODE, segment: SegmentId(segment), lessee: ME, offset, len: LEN }
}

struct Bench {
    owner: Owner,
    out: Out,
}

impl Bench {
    fn new() -> Self {
        Self { owner: Owner::new(ME, NODE), out: Out::default() }
    }

    fn put(&mut self, segment: u64, offset: u64) -> ObjectId {
        self.owner.put(Value::Stored { location: place(segment, offset), refs: vec![] })
    }

    /// Gives a reference to another process, which then asks for the value.
    fn lend(&mut self, id: ObjectId, to: ProcId) {
        self.owner.objects.hand_over(&[id], to, &mut self.out);
        self.hear(to, Msg::Resolve { object: id });
        self.out.effects.clear();
    }

    fn hear(&mut self, from: ProcId, msg: Msg) {
        self.owner.handle_message(from, msg, 0, &mut self.out);
    }

    /// What is offered to the node, and who is asked to forget what, since the last look.
    fn done(&mut self) -> (Vec<Offered>, Vec<(ProcId, Vec<ObjectId>)>) {
        let (mut offers, mut asked) = (Vec::new(), Vec::new());
        for effect in self.out.effects.drain(..) {
            match effect {
                Effect::Node(ToNode::Spill { owner: ME, offered }) => offers.extend(offered),
                Effect::Send { to, msg: Msg::Evict { objects }, urgent: true } => asked.push((to, objects)),
                other => panic!("{other:?}"),
            }
        }
        (offers, asked)
    }

    fn make_room(&mut self, bytes: u64) -> (Vec<Offered>, Vec<(ProcId, Vec<ObjectId>)>) {
        self.owner.make_room(NODE, bytes, &mut self.out);
        self.done()
    }

    fn write(&mut self, offer: Offered, spill: Option<u64>) -> Vec<Effect> {
        let spill = spill.map(|number| SegmentId(SegmentId::SPILLED + number));
        let written = Written { object: offer.object, serial: offer.serial, spill, len: LEN };
        self.owner.handle_written(NODE, written, &mut self.out);
        std::mem::take(&mut self.out.effects)
    }
}

fn objects(offers: &[Offered]) -> Vec<ObjectId> {
    offers.iter().map(|offer| offer.object).collect()
}

#[test]
fn segments_used_least_recently_go_first_and_whole() {
    let mut bench = Bench::new();
    let (a, b, c, d) = (bench.put(1, 0), bench.put(2, 0), bench.put(1, 1024), bench.put(3, 0));
    for id in [a, c, d, b] {
        bench.owner.objects.read(id);
    }
    assert_eq!(objects(&bench.make_room(1).0), [a, c]);
    assert_eq!(objects(&bench.make_room(1).0), [d], "the others are on their way");
    assert_eq!(bench.make_room(LEN).0.len(), 1);
    assert_eq!(bench.make_room(LEN).0, []);
}

#[test]
fn a_segment_in_which_something_is_viewed_goes_last() {
    let mut bench = Bench::new();
    let (a, b, c) = (bench.put(1, 0), bench.put(1, 1024), bench.put(2, 0));
    bench.owner.objects.retain_view(a);
    bench.owner.objects.read(c);
    assert_eq!(objects(&bench.make_room(LEN).0), [c]);
    assert_eq!(objects(&bench.make_room(LEN).0), [b]);
    bench.owner.objects.end_view(a);
    assert_eq!(objects(&bench.make_room(LEN).0), [a]);
}

#[test]
fn what_was_written_moves_and_its_block_is_freed() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    let (offers, _) = bench.make_room(LEN);
    assert_eq!(bench.write(offers[0], Some(5)), [Effect::Free(place(1, 0))]);
    let spilled = bench.owner.objects.location(a).unwrap();
    assert_eq!(spilled, Location::spilled(NODE, SegmentId(SegmentId::SPILLED + 5), LEN));
    assert_eq!(bench.make_room(LEN).0, [], "it is on the disk");
    bench.owner.release(a, &mut bench.out);
    assert_eq!(bench.out.effects, [Effect::Free(spilled)]);
}

#[test]
fn what_is_declined_stays_and_may_be_offered_again() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    let (offers, _) = bench.make_room(LEN);
    assert_eq!(bench.write(offers[0], None), []);
    assert_eq!(bench.owner.objects.location(a), Some(place(1, 0)));
    assert_eq!(objects(&bench.make_room(LEN).0), [a]);
}

#[test]
fn a_use_while_it_is_written_keeps_it_and_gives_the_file_back() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    let (offers, _) = bench.make_room(LEN);
    bench.owner.objects.read(a);
    let spilled = Location::spilled(NODE, SegmentId(SegmentId::SPILLED + 5), LEN);
    assert_eq!(bench.write(offers[0], Some(5)), [Effect::Free(spilled)]);
    assert_eq!(bench.owner.objects.location(a), Some(place(1, 0)));
}

#[test]
fn an_answer_to_an_earlier_offer_is_not_taken_for_one_to_a_later() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    let (first, _) = bench.make_room(LEN);
    bench.owner.objects.read(a);
    let (second, _) = bench.make_room(LEN);
    assert_ne!(first[0].serial, second[0].serial);
    assert!(matches!(bench.write(first[0], Some(5))[..], [Effect::Free(at)] if at.is_spilled()));
    assert_eq!(bench.write(second[0], Some(6)), [Effect::Free(place(1, 0))]);
}

#[test]
fn what_is_freed_while_it_is_written_leaves_nothing() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    let (offers, _) = bench.make_room(LEN);
    bench.owner.release(a, &mut bench.out);
    assert_eq!(std::mem::take(&mut bench.out.effects), [Effect::Free(place(1, 0))]);
    assert!(matches!(bench.write(offers[0], Some(5))[..], [Effect::Free(at)] if at.is_spilled()));
}

#[test]
fn borrowers_are_asked_and_all_must_forget() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    bench.lend(a, B);
    bench.lend(a, C);
    assert_eq!(bench.make_room(LEN), (vec![], vec![(B, vec![a]), (C, vec![a])]));
    bench.hear(B, Msg::Evicted { forgotten: vec![a], kept: vec![] });
    assert_eq!(bench.done(), (vec![], vec![]));
    bench.hear(C, Msg::Evicted { forgotten: vec![a], kept: vec![] });
    assert_eq!(objects(&bench.done().0), [a]);
}

#[test]
fn one_borrower_that_needs_the_place_keeps_the_value() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    bench.lend(a, B);
    bench.lend(a, C);
    bench.make_room(LEN);
    bench.hear(B, Msg::Evicted { forgotten: vec![], kept: vec![a] });
    bench.hear(C, Msg::Evicted { forgotten: vec![a], kept: vec![] });
    assert_eq!(bench.done(), (vec![], vec![]));
    assert_eq!(bench.owner.spilling(), 0);
}

#[test]
fn what_a_borrower_needs_does_not_stand_in_the_way_of_what_nobody_needs() {
    let mut bench = Bench::new();
    let (a, b) = (bench.put(1, 0), bench.put(2, 0));
    bench.lend(a, B);
    bench.lend(b, B);
    assert_eq!(bench.make_room(LEN).1, [(B, vec![a])]);
    bench.hear(B, Msg::Evicted { forgotten: vec![], kept: vec![a] });
    assert_eq!(bench.make_room(LEN).1, [(B, vec![b])]);
}

#[test]
fn a_process_that_heard_of_it_from_a_borrower_is_asked_before_it_goes() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    bench.lend(a, B);
    bench.make_room(LEN);
    bench.hear(B, Msg::AddBorrower { object: a, proc: C });
    bench.hear(B, Msg::Evicted { forgotten: vec![a], kept: vec![] });
    assert_eq!(bench.done(), (vec![], vec![(C, vec![a])]));
    bench.hear(C, Msg::Evicted { forgotten: vec![a], kept: vec![] });
    assert_eq!(objects(&bench.done().0), [a]);
}

#[test]
fn a_borrower_that_died_needs_nothing() {
    let mut bench = Bench::new();
    let a = bench.put(1, 0);
    bench.lend(a, B);
    bench.make_room(LEN);
    bench.owner.handle_process_gone(B, "killed", Death::Crashed, 0, &mut bench.out);
    assert_eq!(objects(&bench.done().0), [a]);
}

#[test]
fn a_block_elsewhere_is_offered_by_the_process_that_allocated_it() {
    let mut bench = Bench::new();
    let there = Location { node: NodeKey(200), lessee: B, ..place(1, 0) };
    let a = bench.owner.put(Value::Stored { location: there, refs: vec![] });
    bench.hear(B, Msg::MakeRoom { node: NodeKey(200), bytes: 1 });
    let offered = match bench.out.effects.drain(..).next() {
        Some(Effect::Send { to: B, msg: Msg::Spill { offered }, .. }) => offered,
        other => panic!("{other:?}"),
    };
    assert_eq!(objects(&offered), [a]);
    bench.owner.handle_process_gone(B, "killed", Death::Crashed, 0, &mut bench.out);
    assert_eq!(bench.owner.spilling(), 0, "nobody will answer");
}

/// A process that borrowed `id` from its owner and knows where it is.
fn borrower(id: ObjectId) -> Bench {
    let mut bench = Bench { owner: Owner::new(B, NODE), out: Out::default() };
    bench.owner.objects.arrive(&[id]);
    bench.hear(ME, Msg::Resolved { object: id, value: Value::Stored { location: place(1, 0), refs: vec![] } });
    bench.out.effects.clear();
    bench
}

fn evicted(bench: &mut Bench, id: ObjectId) -> (Vec<ObjectId>, Vec<ObjectId>) {
    let mut told = Vec::new();
    bench.owner.handle_evict(ME, &[id], |object| told.push(object), &mut bench.out);
    match bench.out.effects.drain(..).next() {
        Some(Effect::Send { to: ME, msg: Msg::Evicted { forgotten, kept }, .. }) => {
            assert_eq!(told, forgotten);
            (forgotten, kept)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_borrower_forgets_what_it_does_not_use_and_asks_again_when_it_does() {
    let id = Bench::new().put(1, 0);
    let mut bench = borrower(id);
    assert_eq!(evicted(&mut bench, id), (vec![id], vec![]));
    assert!(!bench.owner.objects.is_ready(id));
    assert!(!bench.owner.objects.watch(id, skate_proto::objects::WaiterId(1), &mut bench.out));
    assert!(matches!(&bench.out.effects[..], [Effect::Send { to: ME, msg: Msg::Resolve { .. }, .. }]));
}

#[test]
fn a_borrower_keeps_what_it_views() {
    let id = Bench::new().put(1, 0);
    let mut bench = borrower(id);
    bench.owner.objects.retain_view(id);
    assert_eq!(evicted(&mut bench, id), (vec![], vec![id]));
    assert!(bench.owner.objects.is_ready(id));
    bench.owner.objects.end_view(id);
    assert_eq!(evicted(&mut bench, id), (vec![id], vec![]));
}
