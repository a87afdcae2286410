//! Objects outlive their owner: what is recorded of them while it lives, and how they are had when it has died.
//!
//! The owner's half: an object is *given away* when a reference to it leaves the process, and so is everything that its
//! value refers to, since whoever has the one can come by the others. What is given away and has a value is recorded
//! ([`Effect::Record`]) before the message that gives it away is sent; what gets its value later is recorded then. So is
//! every block of another process, given away or not: that process must get it back. What never leaves costs nothing.
//!
//! The borrower's half: all that a process holds of a dead owner it *claims* from the owner's node, whether or not it
//! has the value, because the claim is what keeps the value there. The answer is the value with its references, which
//! are claimed in turn if they are of the same owner. So everything that can be reached from a claim is claimed, and the
//! estate need not know which object refers to which. A claim ends with the entry.
//!
//! Invariants: only objects of dead owners are claimed; who waits for such an object has claimed it or has its value;
//! a value whose object was given away is recorded until it is forgotten or freed.

use smallvec::SmallVec;

use super::{Objects, is_recorded};
use crate::ids::{NodeKey, ObjectId, SegmentId};
use crate::location::Location;
use crate::msg::Msg;
use crate::owner::{Effect, Out};
use crate::payload::{ErrorCode, Payload, Value};

/// What the estate of a dead owner was told about an object that this process holds, and what it said.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Claim {
    /// The owner lives, as far as is known here.
    #[default]
    None,
    Asked,
    /// The estate has it, and keeps it until it hears that this process does not need it.
    Held,
    /// The estate does not have it.
    Refused,
}

/// What an estate has of one object: where the value lies, and what was written down beside it, which is the value
/// itself if it lies nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bequest {
    pub location: Option<Location>,
    pub deed: Option<Payload>,
}

impl Bequest {
    /// How an owned value is recorded.
    #[must_use]
    pub fn of(value: &Value) -> Self {
        match value {
            Value::Inline(payload) => Self { location: None, deed: Some(payload.clone()) },
            Value::Stored { location, refs } if refs.is_empty() => Self { location: Some(*location), deed: None },
            Value::Stored { location, refs } => {
                let deed = Payload { refs: refs.clone(), ..Payload::plain(&[]) };
                Self { location: Some(*location), deed: Some(deed) }
            }
        }
    }

    fn into_value(self) -> Option<Value> {
        match (self.location, self.deed) {
            (Some(location), deed) => {
                Some(Value::Stored { location, refs: deed.map(|deed| deed.refs).unwrap_or_default() })
            }
            (None, Some(payload)) => Some(Value::Inline(payload)),
            (None, None) => None,
        }
    }
}

/// For the node of dead owners: first what this process does not hold any more, then what it claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub node: NodeKey,
    pub given_up: Vec<ObjectId>,
    pub claimed: Vec<ObjectId>,
}

impl Objects {
    /// A reference to an owned object is about to leave this process.
    pub(crate) fn give_away(&mut self, id: ObjectId, out: &mut Out) {
        let mut work: SmallVec<[ObjectId; 4]> = SmallVec::new();
        work.push(id);
        while let Some(id) = work.pop() {
            if !self.is_owned(id) || id.index == ObjectId::ACTOR_INDEX {
                continue;
            }
            let Some(entry) = self.entries.get_mut(&id).filter(|entry| !entry.given_away) else { continue };
            let was_recorded = entry.value.as_ref().is_some_and(|value| is_recorded(value, false, id, self.me));
            entry.given_away = true;
            if let Some(value) = &entry.value {
                work.extend_from_slice(value.refs());
                if !was_recorded {
                    out.push(Effect::Record(id));
                }
            }
        }
    }

    /// An owned object has got its value.
    pub(crate) fn note_value(&mut self, id: ObjectId, out: &mut Out) {
        let Some(entry) = self.entries.get(&id) else { return };
        let Some(value) = &entry.value else { return };
        if !is_recorded(value, entry.given_away, id, self.me) {
            return;
        }
        out.push(Effect::Record(id));
        if entry.given_away && !value.refs().is_empty() {
            let inner: SmallVec<[ObjectId; 4]> = value.refs().into();
            for id in inner {
                self.give_away(id, out);
            }
        }
    }

    /// Claims an object that this process holds, if its owner is known to be dead.
    #[inline]
    pub(crate) fn claim(&mut self, id: ObjectId) {
        if !self.dead.is_empty() {
            self.claim_of_dead(id);
        }
    }

    fn claim_of_dead(&mut self, id: ObjectId) {
        if id.index == ObjectId::ACTOR_INDEX || !self.dead.contains_key(&id.owner()) {
            return;
        }
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.claim == Claim::None
        {
            entry.claim = Claim::Asked;
            self.to_claim.push(id);
        }
    }

    /// The entry of an object that was claimed is gone.
    #[cold]
    pub(super) fn end_claim(&mut self, id: ObjectId) {
        self.to_give_up.push(id);
        self.missed.remove(&id);
    }

    /// The value of a dead owner's object was not where it was said to be. Maybe the owner had known better before it
    /// died; where this fails is not tried again.
    pub(crate) fn claim_again(&mut self, id: ObjectId, node: NodeKey, segment: SegmentId) {
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.value.is_none()
            && entry.claim != Claim::Asked
        {
            entry.claim = Claim::Asked;
            self.missed.insert(id, (node, segment));
            self.to_claim.push(id);
        }
    }

    /// What the estate has said about an object, as the value that it has here from now on. `None`: nobody needs one,
    /// and its references are not counted.
    pub(crate) fn inherit(&mut self, id: ObjectId, bequest: Option<Bequest>, out: &mut Out) -> Option<Value> {
        let missed = self.missed.remove(&id);
        let value = bequest.and_then(Bequest::into_value);
        let entry = self.entries.get_mut(&id).filter(|entry| entry.claim == Claim::Asked)?;
        entry.claim = if value.is_some() { Claim::Held } else { Claim::Refused };
        if entry.value.is_some() {
            return None;
        }
        let Some(value) = value else { return Some(self.no_bequest(id)) };
        if let (Value::Stored { location, .. }, Some(place)) = (&value, missed)
            && (location.node, location.segment) == place
        {
            let text = format!(
                "Object {id} was lost with its shared memory on node {:016x}, and the process that owned it has ended, \
                 so that nobody can make it again.",
                location.node.0
            );
            return Some(Value::Inline(Payload::error(ErrorCode::ObjectLost, &text)));
        }
        for &inner in value.refs() {
            // Nobody has handed these over, so their owners learn of it from here.
            let is_known = self.entries.contains_key(&inner);
            self.retain(inner);
            if !is_known && !self.is_owned(inner) && !self.dead.contains_key(&inner.owner()) {
                self.adopt_token(inner);
                out.send(inner.owner(), Msg::AddBorrower { object: inner, proc: self.me });
            }
        }
        Some(value)
    }

    /// What the nodes of dead owners must be told, in any order, since this was last asked.
    #[must_use]
    pub fn take_questions(&mut self) -> Vec<Question> {
        let mut questions: Vec<Question> = Vec::new();
        for id in std::mem::take(&mut self.to_give_up) {
            about(&mut questions, id).given_up.push(id);
        }
        for id in std::mem::take(&mut self.to_claim) {
            // What went again meanwhile is not claimed; it was given up, which says nothing new.
            if self.entries.get(&id).is_some_and(|entry| entry.claim == Claim::Asked) {
                about(&mut questions, id).claimed.push(id);
            }
        }
        questions
    }

    #[must_use]
    pub fn has_questions(&self) -> bool {
        !self.to_claim.is_empty() || !self.to_give_up.is_empty()
    }

    /// What readers get of an object that its owner's estate does not have.
    pub(crate) fn no_bequest(&self, id: ObjectId) -> Value {
        let cause = self.dead.get(&id.owner()).map_or("long ago", |cause| cause);
        owner_died(id, cause)
    }
}

fn about(questions: &mut Vec<Question>, id: ObjectId) -> &mut Question {
    let node = id.task.node;
    let at = questions.iter().position(|question| question.node == node).unwrap_or_else(|| {
        questions.push(Question { node, given_up: Vec::new(), claimed: Vec::new() });
        questions.len() - 1
    });
    &mut questions[at]
}

pub(super) fn owner_died(id: ObjectId, cause: &str) -> Value {
    let text = format!(
        "Object {id} will never have a value here: the process that owned it has ended ({cause}), and its node has not \
         kept one: it was still being computed, was not handed to anybody, or was lost with the node. Let a process that \
         outlives the readers create what is still to be computed, such as the driver or a detached actor."
    );
    Value::Inline(Payload::error(ErrorCode::OwnerDied, &text))
}
