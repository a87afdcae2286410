//! Copies on this node of values that lie on other nodes, or on a disk.
//!
//! The node makes them (`_node/pulls.py`) and keeps them as long as this process holds them: from its answer to a
//! `Pull` until `PullReleased`. The hold belongs to the object's entry and ends with it, so that a second reader finds
//! the copy mapped, and a live view, which is a count on the object, keeps its memory.
//!
//! Invariants: an object has copies here only while something counts it; the node is told of the end of every hold,
//! and of every wait that was given up, unless another thread still waits for the same object.

use std::sync::Arc;
use std::time::Instant;

use skate_proto::ids::{NodeKey, ObjectId};
use skate_proto::location::Location;
use skate_proto::msg::Slot;
use skate_proto::payload::Value;

use super::objects::{NO_DESCRIPTOR, full};
use super::requests::Answer;
use super::waiting::Wait;
use super::{Core, CoreError, Map, State};
use crate::node_wire::{self, Denial};
use crate::store::Mapping;

/// A block in memory of this process.
pub(super) type Readable = (Arc<Mapping>, Location);

struct Copy {
    origin: Location,
    here: Readable,
}

#[derive(Default)]
pub(super) struct Copies {
    /// Nearly always one for each object; more when a value was lost and made again.
    held: Map<ObjectId, Vec<Copy>>,
    /// Threads that wait for a copy.
    waiting: Map<ObjectId, u32>,
}

impl Copies {
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    fn find(&self, object: ObjectId, origin: &Location) -> Option<Readable> {
        let copy = self.held.get(&object)?.iter().find(|copy| copy.origin == *origin)?;
        Some(copy.here.clone())
    }

    fn begin_wait(&mut self, object: ObjectId) {
        *self.waiting.entry(object).or_default() += 1;
    }

    fn end_wait(&mut self, object: ObjectId) {
        if let Some(threads) = self.waiting.get_mut(&object) {
            *threads -= 1;
            if *threads == 0 {
                self.waiting.remove(&object);
            }
        }
    }

    fn is_unused(&self, object: ObjectId) -> bool {
        !self.held.contains_key(&object) && !self.waiting.contains_key(&object)
    }
}

impl Core {
    /// Whether it lies in memory of this node.
    pub(super) fn is_here(&self, location: &Location) -> bool {
        location.node == NodeKey(self.node.0) && !location.is_spilled()
    }

    /// Where a stored value can be read without asking the node.
    pub(super) fn find_readable(&self, state: &State, object: ObjectId, location: &Location) -> Option<Readable> {
        if self.is_here(location) {
            return Some((self.store.mapping(location.segment)?, *location));
        }
        state.copies.find(object, location)
    }

    /// Makes a stored value readable, which its caller holds a count on.
    pub(super) fn make_readable(
        &self,
        object: ObjectId,
        location: &Location,
        deadline: Option<Instant>,
    ) -> Result<Readable, CoreError> {
        if self.is_here(location) {
            return Ok((self.map(location.segment)?, *location));
        }
        let found = {
            let mut state = self.state.lock();
            let found = state.copies.find(object, location);
            if found.is_none() {
                state.copies.begin_wait(object);
            }
            found
        };
        if let Some(readable) = found {
            return Ok(readable);
        }
        let body = node_wire::pull(object, location, false);
        let ask = |corr| self.tell_node(node_wire::PULL, corr, &body);
        // Without lending the task's CPUs to others: the value is there, and tasks that begin while a full store makes
        // this one wait would fill it further.
        let pulled = self.ask_with(ask, deadline, Wait { blocks: false, hears: true });
        let readable = pulled.and_then(|answer| self.take_copy(answer, object, location));
        let mut state = self.state.lock();
        state.copies.end_wait(object);
        if let Ok(here) = &readable {
            // The first of several threads to come back decides what all read.
            if let Some(first) = state.copies.find(object, location) {
                return Ok(first);
            }
            if state.owner.objects.mark_copied(object) {
                let copy = Copy { origin: *location, here: here.clone() };
                state.copies.held.entry(object).or_default().push(copy);
                return readable;
            }
        }
        if state.copies.is_unused(object) {
            // An answer that is on its way is void by this; to a refusal it adds nothing.
            self.tell_node(node_wire::PULL_RELEASED, 0, &node_wire::pull_released(object));
        }
        readable
    }

    fn take_copy(&self, answer: Answer, object: ObjectId, origin: &Location) -> Result<Readable, CoreError> {
        match answer {
            Answer::Copy { segment, size, offset, fd } => {
                let mapping =
                    self.store.map_readonly(segment, size, &fd).map_err(|e| CoreError::Store(e.to_string()))?;
                // The block is read only here and never freed by its location, so the lessee is nobody.
                let node = NodeKey(self.node.0);
                Ok((mapping, Location { node, segment, lessee: self.node, offset, len: origin.len }))
            }
            Answer::Denied { why: Denial::Turn, .. } => Err(CoreError::NotYourTurn(object)),
            Answer::Denied { message, kept: true, why } => Err(full(message, why == Denial::DiskFull)),
            Answer::Denied { message, kept: false, .. } => Err(CoreError::SegmentGone(message)),
            Answer::NoDescriptor => Err(CoreError::Store(NO_DESCRIPTOR.into())),
            _ => Err(CoreError::Store("the node answered a pull with something else".into())),
        }
    }

    /// Has values copied here that will be read soon: their counts keep them meanwhile.
    pub(super) fn prefetch(&self, copies: &Copies, values: &[(Slot, ObjectId, Value)]) {
        for (_, object, value) in values {
            if let Value::Stored { location, .. } = value
                && copies.find(*object, location).is_none()
            {
                self.prefetch_one(*object, location);
            }
        }
    }

    pub(super) fn prefetch_one(&self, object: ObjectId, location: &Location) {
        if !self.is_here(location) {
            self.tell_node(node_wire::PULL, 0, &node_wire::pull(object, location, true));
        }
    }

    /// Lets go of copies that nothing views: the node may use their memory.
    pub(super) fn release_unviewed_copies(&self, state: &mut State) {
        let objects = &state.owner.objects;
        let mut unviewed: Vec<ObjectId> =
            state.copies.held.keys().copied().filter(|object| !objects.is_viewed(*object)).collect();
        unviewed.sort_unstable();
        for object in unviewed {
            state.owner.objects.unmark_copied(object);
            self.release_copies(state, object);
        }
    }

    /// Nothing counts the object any more, or it lies elsewhere now, so nothing reads its copies.
    pub(super) fn release_copies(&self, state: &mut State, object: ObjectId) {
        for copy in state.copies.held.remove(&object).unwrap_or_default() {
            self.store.unmap(copy.here.1.segment);
        }
        if state.copies.is_unused(object) {
            self.tell_node(node_wire::PULL_RELEASED, 0, &node_wire::pull_released(object));
        }
    }
}
