//! What an owner has written down before it gives it away, and what becomes of it at those who hold it.

use skate_proto::ids::{NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use skate_proto::leases::Death;
use skate_proto::location::Location;
use skate_proto::msg::Msg;
use skate_proto::objects::{Bequest, Question, WaiterId};
use skate_proto::owner::{Effect, Out, Owner};
use skate_proto::payload::{ErrorCode, Payload, Value};

const ME: ProcId = ProcId(1);
const OTHER: ProcId = ProcId(2);
const THIRD: ProcId = ProcId(3);
const NODE: NodeKey = NodeKey(9);
const THEIRS: NodeKey = NodeKey(8);

fn inline(refs: Vec<ObjectId>) -> Value {
    Value::Inline(Payload { refs, ..Payload::plain(b"v") })
}

fn location(lessee: ProcId) -> Location {
    Location { node: NODE, segment: SegmentId(5), lessee, offset: 64, len: 200_000 }
}

fn stored(lessee: ProcId) -> Value {
    Value::Stored { location: location(lessee), refs: Vec::new() }
}

fn owned_by(proc: ProcId, seq: u64) -> ObjectId {
    ObjectId { task: TaskId { node: THEIRS, proc, seq }, index: 0 }
}

fn new() -> (Owner, Out) {
    (Owner::new(ME, NODE), Out::default())
}

fn take(out: &mut Out) -> Vec<Effect> {
    std::mem::take(&mut out.effects)
}

fn recorded(effects: &[Effect]) -> Vec<ObjectId> {
    let of = |effect: &Effect| if let Effect::Record(id) = effect { Some(*id) } else { None };
    effects.iter().filter_map(of).collect()
}

fn code(value: Option<&Value>) -> Option<u8> {
    match value {
        Some(Value::Inline(payload)) if payload.is_error() => payload.data.get(1).copied(),
        _ => None,
    }
}

// ---- the owner -------------------------------------------------------------------------------------

#[test]
fn what_never_leaves_is_not_recorded() {
    let (mut owner, mut out) = new();
    let small = owner.put(inline(vec![]));
    let large = owner.put(stored(ME));
    let outer = owner.put(inline(vec![small, large]));
    owner.release_all(&[small, large, outer], &mut out);
    assert_eq!(take(&mut out), [Effect::Free(location(ME))]);
}

#[test]
fn what_is_given_away_is_recorded_once_with_all_that_it_refers_to() {
    let (mut owner, mut out) = new();
    let inner = owner.put(inline(vec![]));
    let middle = owner.put(stored(ME));
    let outer = owner.put(inline(vec![inner, middle, owned_by(OTHER, 1)]));
    owner.objects.hand_over(&[outer], OTHER, &mut out);
    let mut all = recorded(&take(&mut out));
    all.sort_unstable();
    assert_eq!(all, [inner, middle, outer]);
    owner.objects.hand_over(&[inner, outer], THIRD, &mut out);
    assert_eq!(recorded(&take(&mut out)), []);
}

#[test]
fn a_value_that_comes_later_is_recorded_before_anybody_gets_it() {
    let (mut owner, mut out) = new();
    let inner = owner.put(inline(vec![]));
    let id = owner.promise("it is there");
    owner.handle_message(OTHER, Msg::Resolve { object: id }, 0, &mut out);
    assert_eq!(recorded(&take(&mut out)), [], "there is nothing to record yet");
    owner.keep_promise(id, Ok(inline(vec![inner])), 0, &mut out);
    let effects = take(&mut out);
    assert_eq!(recorded(&effects), [id, inner]);
    let sends = |effect: &Effect| matches!(effect, Effect::Send { to: OTHER, msg: Msg::Resolved { .. }, .. });
    let sent = effects.iter().position(sends).expect("who waits for it gets it");
    assert!(effects.iter().skip(sent).all(|effect| !matches!(effect, Effect::Record(_))), "{effects:?}");
}

#[test]
fn a_block_of_another_process_is_recorded_although_nobody_has_it() {
    let (mut owner, mut out) = new();
    let id = owner.promise("it is there");
    owner.keep_promise(id, Ok(stored(OTHER)), 0, &mut out);
    assert_eq!(recorded(&take(&mut out)), [id]);
    owner.objects.hand_over(&[id], THIRD, &mut out);
    assert_eq!(recorded(&take(&mut out)), [], "it is there already");
}

#[test]
fn the_record_goes_before_the_block() {
    let (mut owner, mut out) = new();
    let id = owner.put(stored(ME));
    owner.objects.hand_over(&[id], OTHER, &mut out);
    owner.release(id, &mut out);
    take(&mut out);
    owner.handle_message(OTHER, Msg::Release { object: id, tokens: 1 }, 0, &mut out);
    assert_eq!(take(&mut out), [Effect::Unrecord(id), Effect::Free(location(ME))]);
}

#[test]
fn what_is_recorded_is_what_is_inherited() {
    for value in [inline(vec![]), inline(vec![owned_by(OTHER, 7)]), stored(ME)] {
        let (mut owner, mut out) = new();
        let id = owned_by(OTHER, 1);
        owner.objects.retain(id);
        owner.handle_process_gone(OTHER, "killed", Death::Crashed, 0, &mut out);
        owner.handle_bequests(vec![(id, Some(Bequest::of(&value)))], 0, &mut out);
        assert_eq!(owner.objects.value(id), Some(&value));
    }
}

// ---- a borrower ------------------------------------------------------------------------------------

fn bereaved(held: &[ObjectId]) -> (Owner, Out) {
    let (mut owner, mut out) = new();
    owner.objects.arrive(held);
    owner.handle_process_gone(OTHER, "killed by signal 9", Death::Crashed, 0, &mut out);
    (owner, out)
}

fn claims(claimed: Vec<ObjectId>) -> Vec<Question> {
    vec![Question { node: THEIRS, given_up: vec![], claimed }]
}

#[test]
fn all_that_is_held_of_the_dead_is_claimed_once() {
    let (mut owner, mut out) = new();
    let (there, missing, others) = (owned_by(OTHER, 1), owned_by(OTHER, 2), owned_by(THIRD, 3));
    owner.objects.arrive(&[there, missing, others]);
    owner.handle_message(OTHER, Msg::Resolved { object: there, value: inline(vec![]) }, 0, &mut out);
    assert!(!owner.objects.has_questions());
    owner.handle_process_gone(OTHER, "killed", Death::Crashed, 0, &mut out);
    assert_eq!(owner.objects.take_questions(), claims(vec![there, missing]));
    owner.objects.watch(missing, WaiterId(1), &mut out);
    owner.objects.arrive(&[there]);
    assert_eq!(owner.objects.take_questions(), []);
}

#[test]
fn references_that_come_after_the_death_are_claimed() {
    let (mut owner, _) = bereaved(&[]);
    let (arrived, made) = (owned_by(OTHER, 1), owned_by(OTHER, 2));
    owner.objects.arrive(&[arrived]);
    owner.objects.retain(made);
    assert_eq!(owner.objects.take_questions(), claims(vec![arrived, made]));
}

#[test]
fn readers_wait_for_the_answer_and_get_what_it_says() {
    let id = owned_by(OTHER, 1);
    let (mut owner, mut out) = bereaved(&[id]);
    assert!(!owner.objects.watch(id, WaiterId(4), &mut out));
    assert_eq!(owner.why(id, 0).text, "its owner has ended, and the owner's node is asked for it");
    owner.handle_bequests(vec![(id, Some(Bequest::of(&inline(vec![]))))], 0, &mut out);
    assert!(take(&mut out).contains(&Effect::Notify { waiter: WaiterId(4), failed: false }));
    assert_eq!(owner.objects.value(id), Some(&inline(vec![])));
}

#[test]
fn what_an_inherited_value_refers_to_is_claimed_or_announced() {
    let (id, inner, others) = (owned_by(OTHER, 1), owned_by(OTHER, 2), owned_by(THIRD, 3));
    let (mut owner, mut out) = bereaved(&[id]);
    assert_eq!(owner.objects.take_questions(), claims(vec![id]));
    owner.handle_bequests(vec![(id, Some(Bequest::of(&inline(vec![inner, others]))))], 0, &mut out);
    assert_eq!(owner.objects.take_questions(), claims(vec![inner]));
    let msg = Msg::AddBorrower { object: others, proc: ME };
    assert!(take(&mut out).contains(&Effect::Send { to: THIRD, msg, urgent: true }), "nobody had handed it over");
    owner.release(id, &mut out);
    let msg = Msg::Release { object: others, tokens: 1 };
    assert!(take(&mut out).contains(&Effect::Send { to: THIRD, msg, urgent: false }));
    let questions = vec![Question { node: THEIRS, given_up: vec![id, inner], claimed: vec![] }];
    assert_eq!(owner.objects.take_questions(), questions);
    assert!(owner.objects.is_empty());
}

#[test]
fn what_the_estate_does_not_have_is_an_error_with_the_cause() {
    let id = owned_by(OTHER, 1);
    let (mut owner, mut out) = bereaved(&[id]);
    assert_eq!(owner.objects.take_questions(), claims(vec![id]));
    owner.handle_bequests(vec![(id, None)], 0, &mut out);
    assert_eq!(code(owner.objects.value(id)), Some(ErrorCode::OwnerDied as u8));
    let Some(Value::Inline(payload)) = owner.objects.value(id) else { panic!("no value") };
    assert!(String::from_utf8_lossy(&payload.data).contains("killed by signal 9"));
    owner.release(id, &mut out);
    assert_eq!(owner.objects.take_questions(), [], "what was refused is not given up");
}

#[test]
fn a_value_that_is_here_stays_whatever_the_estate_says() {
    let (mut owner, mut out) = new();
    let id = owned_by(OTHER, 1);
    owner.objects.arrive(&[id]);
    owner.handle_message(OTHER, Msg::Resolved { object: id, value: inline(vec![]) }, 0, &mut out);
    owner.handle_process_gone(OTHER, "killed", Death::Crashed, 0, &mut out);
    owner.handle_bequests(vec![(id, None)], 0, &mut out);
    assert_eq!(owner.objects.value(id), Some(&inline(vec![])));
}

#[test]
fn an_answer_that_nobody_waits_for_counts_nothing() {
    let (id, inner) = (owned_by(OTHER, 1), owned_by(THIRD, 2));
    let (mut owner, mut out) = bereaved(&[id]);
    owner.release(id, &mut out);
    take(&mut out);
    owner.handle_bequests(vec![(id, Some(Bequest::of(&inline(vec![inner]))))], 0, &mut out);
    assert!(owner.objects.is_empty());
    assert_eq!(take(&mut out), []);
}

#[test]
fn what_is_not_where_the_estate_says_is_asked_for_once_more_and_then_lost() {
    let id = owned_by(OTHER, 1);
    let (mut owner, mut out) = bereaved(&[id]);
    let said = || vec![(id, Some(Bequest::of(&stored(THIRD))))];
    assert_eq!(owner.objects.take_questions(), claims(vec![id]));
    owner.handle_bequests(said(), 0, &mut out);
    owner.report_missing(id, NODE, SegmentId(5), 0, &mut out);
    assert!(!owner.objects.is_ready(id));
    assert_eq!(owner.objects.take_questions(), claims(vec![id]), "the owner may have made it again before it died");
    owner.handle_bequests(said(), 0, &mut out);
    assert_eq!(code(owner.objects.value(id)), Some(ErrorCode::ObjectLost as u8));
}
