//! Objects whose value somebody else decides on, and what fails because a placement group is gone.

use skate_proto::ids::{FunctionId, NodeKey, ObjectId, ProcId, TaskId};
use skate_proto::leases::ClassSpec;
use skate_proto::msg::{CallDef, Msg, Returns};
use skate_proto::objects::WaiterId;
use skate_proto::owner::{Effect, Out, Owner};
use skate_proto::payload::{Blob, ErrorCode, Payload, Value};

const ME: ProcId = ProcId(1);
const READER: ProcId = ProcId(2);

fn value(bytes: &[u8]) -> Value {
    Value::Inline(Payload::plain(bytes))
}

#[test]
fn a_promise_is_there_when_it_is_kept_and_not_before() {
    let (mut owner, mut out) = (Owner::new(ME, NodeKey(9)), Out::default());
    let id = owner.promise("group g is created");
    assert!(!owner.objects.is_ready(id));
    assert_eq!(owner.why(id, 0).text, "it waits until group g is created");
    assert!(!owner.objects.watch(id, WaiterId(7), &mut out), "it is not there yet");
    owner.handle_message(READER, Msg::Resolve { object: id }, 0, &mut out);
    out.effects.clear();
    owner.keep_promise(id, Ok(value(b"v")), 0, &mut out);
    assert_eq!(owner.objects.value(id), Some(&value(b"v")));
    assert!(out.effects.contains(&Effect::Notify { waiter: WaiterId(7), failed: false }), "{:?}", out.effects);
    let answered = |effect: &Effect| matches!(effect, Effect::Send { to: READER, msg: Msg::Resolved { .. }, .. });
    assert!(out.effects.iter().any(answered), "a reader elsewhere gets it too: {:?}", out.effects);
    owner.keep_promise(id, Ok(value(b"w")), 0, &mut out);
    assert_eq!(owner.objects.value(id), Some(&value(b"v")), "a promise is kept once");
}

#[test]
fn a_promise_that_will_not_be_kept_is_an_exception() {
    let (mut owner, mut out) = (Owner::new(ME, NodeKey(9)), Out::default());
    let id = owner.promise("group g is created");
    owner.keep_promise(id, Err(Payload::error(ErrorCode::GroupRemoved, "gone")), 0, &mut out);
    assert!(owner.objects.value(id).is_some_and(Value::is_error));
}

#[test]
fn nothing_is_left_of_a_promise_that_nobody_waits_for() {
    let (mut owner, mut out) = (Owner::new(ME, NodeKey(9)), Out::default());
    let id = owner.promise("group g is created");
    owner.release(id, &mut out);
    owner.keep_promise(id, Ok(value(b"v")), 0, &mut out);
    assert_eq!(owner.objects.len(), 0);
    assert!(owner.is_bare());
}

#[test]
fn tasks_fail_with_their_placement_group() {
    let (mut owner, mut out) = (Owner::new(ME, NodeKey(9)), Out::default());
    let class = owner.class(ClassSpec {
        demand: vec![("CPU_group_g".into(), 10_000)],
        env: vec![],
        strategy: vec![],
        retriable: true,
    });
    let call = CallDef {
        function: FunctionId([7; 16]),
        name: "f".into(),
        method: String::new(),
        group: String::new(),
        returns: Returns::Count(1),
        retry_exceptions: false,
        backpressure: 0,
        actor: None,
        recorded: true,
    };
    let def = owner.define(call, Blob::new(b"code"), Some(class), 3);
    let task: TaskId = owner.submit(def, Payload::plain(b""), vec![], None, None, 0, &mut out).unwrap();
    owner.handle_lease_failed(class, "group g was removed", ErrorCode::GroupRemoved, 0, &mut out);
    let Some(Value::Inline(payload)) = owner.objects.value(ObjectId { task, index: 0 }) else { panic!("no value") };
    assert_eq!(payload.data[1], ErrorCode::GroupRemoved as u8);
    assert!(payload.data.ends_with(b"group g was removed"));
}
