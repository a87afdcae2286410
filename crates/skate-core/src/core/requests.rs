//! Questions to the node that somebody waits for.

use std::os::fd::OwnedFd;
use std::time::Instant;

use skate_proto::ids::{ObjectId, SegmentId};
use skate_proto::msg::Reason;
use skate_proto::objects::WaiterId;
use skate_proto::payload::{ErrorCode, Payload, Value};

use super::waiting::{Wait, Waiter, Watch};
use super::{Core, CoreError, State};
use crate::node_wire::{self, Denial};

/// A node's answer to a request.
#[derive(Debug)]
pub(super) enum Answer {
    Waiting,
    Reply {
        ok: bool,
        body: Vec<u8>,
    },
    Segment {
        segment: SegmentId,
        size: u64,
        fd: OwnedFd,
    },
    /// The block of another node, copied to a segment of this one.
    Copy {
        segment: SegmentId,
        size: u64,
        offset: u64,
        fd: OwnedFd,
    },
    /// `kept`: a value that was to be copied is still where it was.
    Denied {
        message: String,
        kept: bool,
        why: Denial,
    },
    /// Of another member.
    Reason(Reason),
    /// This process can open no more descriptors.
    NoDescriptor,
}

impl Core {
    /// Asks the node and waits for its answer.
    pub fn request(&self, op: &str, args: &[u8], deadline: Option<Instant>) -> Result<(bool, Vec<u8>), CoreError> {
        match self.ask(node_wire::REQUEST, &node_wire::request(op, args), deadline, false)? {
            Answer::Reply { ok, body } => Ok((ok, body)),
            _ => Err(CoreError::Store("the node answered a request with something else".into())),
        }
    }

    /// Tells the node something that it does not answer.
    pub fn tell(&self, op: &str, args: &[u8]) -> Result<(), CoreError> {
        if let Some(why) = &self.state.lock().closed {
            return Err(CoreError::Closed(why.clone()));
        }
        self.tell_node(node_wire::REQUEST, 0, &node_wire::request(op, args));
        Ok(())
    }

    /// An object that gets `value` when the node has answered, and the node's refusal as an exception. `awaited` is
    /// what the answer waits for, in words.
    pub fn promise(&self, op: &str, args: &[u8], value: Value, awaited: &str) -> Result<ObjectId, CoreError> {
        let (corr, object) = {
            let mut state = self.state.lock();
            if let Some(why) = &state.closed {
                return Err(CoreError::Closed(why.clone()));
            }
            state.next_corr += 1;
            let corr = state.next_corr;
            let object = state.owner.promise(awaited);
            state.promises.insert(corr, (object, value));
            (corr, object)
        };
        self.tell_node(node_wire::REQUEST, corr, &node_wire::request(op, args));
        Ok(object)
    }

    /// `interruptible`: the answer may take long, and a signal ends the wait for it. Otherwise it is near, and a
    /// signal is looked at afterwards.
    pub(super) fn ask(
        &self,
        kind: u8,
        body: &[u8],
        deadline: Option<Instant>,
        interruptible: bool,
    ) -> Result<Answer, CoreError> {
        let wait = Wait { blocks: false, hears: interruptible };
        self.ask_with(|corr| self.tell_node(kind, corr, body), deadline, wait)
    }

    pub(super) fn ask_with(
        &self,
        ask: impl FnOnce(u64),
        deadline: Option<Instant>,
        wait: Wait,
    ) -> Result<Answer, CoreError> {
        let (answer, _) = self.ask_unless(ask, deadline, wait, &|| false);
        answer?.ok_or_else(|| CoreError::Closed("no answer".into()))
    }

    /// The same until `unless` holds: then there is no answer. Returns the question's number as well.
    pub(super) fn ask_unless(
        &self,
        ask: impl FnOnce(u64),
        deadline: Option<Instant>,
        wait: Wait,
        unless: &dyn Fn() -> bool,
    ) -> (Result<Option<Answer>, CoreError>, u64) {
        let (corr, waiter) = {
            let mut state = self.state.lock();
            if let Some(why) = &state.closed {
                return (Err(CoreError::Closed(why.clone())), 0);
            }
            state.next_corr += 1;
            let corr = state.next_corr;
            state.answers.insert(corr, Answer::Waiting);
            let waiter = Waiter::new(1);
            state.watches.insert(answer_watch(corr), Watch::Thread(waiter.clone()));
            (corr, waiter)
        };
        ask(corr);
        let result = loop {
            match self.wait_for(&|| waiter.is_done() || unless(), deadline, wait) {
                Err(CoreError::Interrupted) if !wait.hears => {}
                other => break other,
            }
        };
        let mut state = self.state.lock();
        state.watches.remove(&answer_watch(corr));
        let answer = state.answers.remove(&corr);
        let outcome = match (result, answer) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(Answer::Waiting) | None) => {
                state.closed.clone().map_or(Ok(None), |why| Err(CoreError::Closed(why)))
            }
            (Ok(()), answer) => Ok(answer),
        };
        (outcome, corr)
    }

    pub(super) fn answered(&self, state: &mut State, corr: u64, answer: Answer) {
        // Nobody waits any more: a granted segment goes back, anything else is dropped. (Who gave up waiting for a copy
        // has told the node already.)
        match state.answers.get_mut(&corr) {
            Some(slot) => *slot = answer,
            None => {
                if let Answer::Segment { segment, .. } = answer {
                    self.tell_node(node_wire::SEGMENT_RELEASE, 0, &node_wire::segment(segment));
                }
                return;
            }
        }
        if Self::notify(state, answer_watch(corr), false) {
            self.transport().wake();
        }
    }
}

/// The exception that a refusal stands for.
pub(super) fn refusal(body: &[u8]) -> Payload {
    let (name, text): (String, String) = rmp_serde::from_slice(body).unwrap_or_default();
    let code = if name == "PlacementGroupRemoved" { ErrorCode::GroupRemoved } else { ErrorCode::Other };
    Payload::error(code, &text)
}

/// Watches of answers are numbered apart from those of objects.
fn answer_watch(corr: u64) -> WaiterId {
    WaiterId(corr | 1 << 63)
}
