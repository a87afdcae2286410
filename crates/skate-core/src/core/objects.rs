//! Values and references: put, get, and the shared memory that holds what is large.

use std::sync::Arc;
use std::time::Instant;

use skate_proto::ids::{NodeKey, ObjectId, SegmentId};
use skate_proto::location::Location;
use skate_proto::msg::Msg;
use skate_proto::payload::{Payload, Value};

use super::requests::Answer;
use super::spilling::Segment;
use super::{Core, CoreError, State};
use crate::node_wire::{self, Denial};
use crate::store::{Block, Mapping};
use crate::transport::SendMode;

/// How often a value may be gone from where its owner said it was before its reader gives up. Each time takes
/// another loss, or an answer that crossed the report of the last one.
const LOSSES_MAX: u32 = 16;
pub(super) const NO_DESCRIPTOR: &str =
    "this process has as many descriptors open as it may (ulimit -n), and could not take one for shared memory";

/// A value as a reader gets it.
pub enum Fetched {
    Inline(Payload),
    /// A block, protected by a view on `object` until [`Core::release_view`].
    Stored {
        object: ObjectId,
        mapping: Arc<Mapping>,
        location: Location,
    },
}

/// What became of several objects that were waited for together.
pub enum Got {
    All(Vec<Fetched>),
    /// The object at this position is an exception; others are not there yet.
    Failed(usize, Payload),
}

impl Core {
    pub fn put(&self, value: Value) -> ObjectId {
        self.step(|state, _| state.owner.put(value))
    }

    pub fn retain(&self, id: ObjectId) {
        self.state.lock().owner.objects.retain(id);
    }

    pub fn release(&self, id: ObjectId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| state.owner.release(id, &mut state.out));
    }

    /// A view has ended: see [`Fetched::Stored`].
    pub fn release_view(&self, id: ObjectId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| {
            state.owner.objects.end_view(id);
            state.owner.release(id, &mut state.out);
        });
    }

    pub fn release_all(&self, ids: &[ObjectId]) {
        if !ids.is_empty() && !self.is_forked() {
            self.step(|state, _| state.owner.release_all(ids, &mut state.out));
        }
    }

    /// Counts a handle of an actor; one that this process neither owns nor was handed is announced to
    /// its owner.
    pub fn hold_handle(&self, handle: ObjectId) {
        self.step(|state, _| {
            let State { owner, out, .. } = state;
            owner.hold_handle(handle, out);
        });
    }

    /// Waits for the values of objects, or for the first exception among them. Those that were lost with their
    /// segment are waited for anew.
    pub fn get(&self, ids: &[ObjectId], deadline: Option<Instant>) -> Result<Got, CoreError> {
        loop {
            match self.get_in_turn(ids, deadline) {
                Err(CoreError::NotYourTurn(object)) => self.await_turn(object, deadline)?,
                got => return got,
            }
        }
    }

    /// After [`CoreError::NotYourTurn`], when the caller has no views left on what it gathers: lets go of copies, and
    /// waits until there is room for the one that was refused. Views on other blocks would keep these from being
    /// spilled meanwhile.
    pub fn await_turn(&self, object: ObjectId, deadline: Option<Instant>) -> Result<(), CoreError> {
        loop {
            self.step(|state, _| self.release_unviewed_copies(state));
            match self.get_in_turn(&[object], deadline) {
                Err(CoreError::NotYourTurn(_)) => {}
                Err(error) => return Err(error),
                Ok(Got::Failed(..)) => return Ok(()),
                Ok(Got::All(fetched)) => {
                    for value in fetched {
                        if let Fetched::Stored { object, .. } = value {
                            self.release_view(object);
                        }
                    }
                    return Ok(());
                }
            }
        }
    }

    fn get_in_turn(&self, ids: &[ObjectId], deadline: Option<Instant>) -> Result<Got, CoreError> {
        let mut losses = 0;
        loop {
            self.wait_all(ids, deadline)?;
            if let Some((at, payload)) = self.failed_early(ids) {
                return Ok(Got::Failed(at, payload));
            }
            match self.fetch(ids, deadline) {
                Err(CoreError::SegmentGone(_)) if losses < LOSSES_MAX => losses += 1,
                other => return other.map(Got::All),
            }
        }
    }

    /// An exception that is there while others are missing.
    fn failed_early(&self, ids: &[ObjectId]) -> Option<(usize, Payload)> {
        let mut state = self.state.lock();
        let objects = &mut state.owner.objects;
        let at = objects.first_failed(ids)?;
        if ids.iter().all(|id| objects.is_ready(*id)) {
            return None;
        }
        // Whoever gets one exception has asked for all of them.
        for id in ids {
            objects.read(*id);
        }
        match objects.value(ids[at]) {
            Some(Value::Inline(payload)) => Some((at, payload.clone())),
            _ => None,
        }
    }

    /// A stored value whose location came along with the caller's work, unless it has left that place since.
    pub fn get_at(&self, object: ObjectId, location: Location) -> Result<Fetched, CoreError> {
        let knows_place = {
            let mut state = self.state.lock();
            let knows_place = state.executor.knows_place(object);
            if knows_place {
                state.owner.objects.retain_view(object);
            }
            knows_place
        };
        if knows_place {
            let error = match self.make_readable(object, &location, None) {
                Ok((mapping, location)) => return Ok(Fetched::Stored { object, mapping, location }),
                Err(error) => error,
            };
            let is_gone = matches!(error, CoreError::SegmentGone(_));
            if is_gone {
                self.report_missing(object, &location);
            }
            self.release_view(object);
            if !is_gone {
                return Err(error);
            }
        }
        match self.get_in_turn(&[object], None)? {
            Got::All(mut fetched) => fetched.pop().ok_or_else(|| CoreError::Store("no value".into())),
            Got::Failed(_, payload) => Ok(Fetched::Inline(payload)),
        }
    }

    /// The values of ready objects. Stored ones are mapped, from copies if they lie on other nodes, and hold a count on
    /// their object. What is lost is reported before the error is returned.
    pub fn fetch(&self, ids: &[ObjectId], deadline: Option<Instant>) -> Result<Vec<Fetched>, CoreError> {
        let mut fetched = Vec::with_capacity(ids.len());
        let mut unmapped = Vec::new();
        let mut failed = None;
        {
            let mut state = self.state.lock();
            for (at, &id) in ids.iter().enumerate() {
                match state.owner.objects.read(id) {
                    Some(Value::Inline(payload)) => fetched.push(Fetched::Inline(payload.clone())),
                    Some(Value::Stored { location, .. }) => {
                        let location = *location;
                        state.owner.objects.retain_view(id);
                        match self.find_readable(&state, id, &location) {
                            Some((mapping, location)) => {
                                fetched.push(Fetched::Stored { object: id, mapping, location });
                            }
                            None => {
                                unmapped.push((at, id, location));
                                fetched.push(Fetched::Inline(Payload::plain(&[])));
                            }
                        }
                    }
                    None => {
                        // Lost, and reported by another thread, since it was waited for.
                        let lost = || CoreError::SegmentGone(format!("object {id} was lost"));
                        failed = Some(state.closed.clone().map_or_else(lost, CoreError::Closed));
                        break;
                    }
                }
            }
        }
        // All that come from other nodes are under way together, however many this thread waits for in turn.
        for (_, object, location) in unmapped.iter().skip(1) {
            self.prefetch_one(*object, location);
        }
        for (at, object, location) in unmapped {
            match self.make_readable(object, &location, deadline) {
                Ok((mapping, location)) => fetched[at] = Fetched::Stored { object, mapping, location },
                Err(error) => {
                    if matches!(error, CoreError::SegmentGone(_)) {
                        self.report_missing(object, &location);
                    }
                    self.release_view(object);
                    failed = Some(error);
                }
            }
        }
        match failed {
            None => Ok(fetched),
            Some(error) => {
                for value in fetched {
                    if let Fetched::Stored { object, .. } = value {
                        self.release_view(object);
                    }
                }
                Err(error)
            }
        }
    }

    /// The value of a ready object, unless that takes asking the node.
    pub fn fetch_mapped(&self, id: ObjectId) -> Option<Fetched> {
        let mut state = self.state.lock();
        match state.owner.objects.read(id)? {
            Value::Inline(payload) => Some(Fetched::Inline(payload.clone())),
            Value::Stored { location, .. } => {
                let location = *location;
                let (mapping, location) = self.find_readable(&state, id, &location)?;
                state.owner.objects.retain_view(id);
                Some(Fetched::Stored { object: id, mapping, location })
            }
        }
    }

    fn report_missing(&self, object: ObjectId, location: &Location) {
        let Location { node, segment, .. } = *location;
        self.step(|state, now| state.owner.report_missing(object, node, segment, now, &mut state.out));
    }

    /// A block of `len` bytes in a segment of this process, asking the node for one if needed.
    pub fn alloc(&self, len: u64) -> Result<Block, CoreError> {
        loop {
            if let Some(block) = self.store.alloc(len) {
                return Ok(block);
            }
            let answer = match self.ask_for_segment(len)? {
                Segment::Found(block) => return Ok(block),
                Segment::Answered(answer) => answer,
            };
            match answer {
                Answer::Segment { segment, size, fd } => {
                    self.store.add_segment(segment, size, &fd).map_err(|e| CoreError::Store(e.to_string()))?;
                }
                Answer::Denied { message, why, .. } => return Err(full(message, why == Denial::DiskFull)),
                Answer::NoDescriptor => return Err(CoreError::Store(NO_DESCRIPTOR.into())),
                _ => {
                    return Err(CoreError::Store("the node answered a segment request with something else".into()));
                }
            }
        }
    }

    pub fn map(&self, segment: SegmentId) -> Result<Arc<Mapping>, CoreError> {
        if let Some(mapping) = self.store.mapping(segment) {
            return Ok(mapping);
        }
        match self.ask(node_wire::SEGMENT_MAP, &node_wire::segment(segment), None, false)? {
            Answer::Segment { segment, size, fd } => {
                self.store.map_readonly(segment, size, &fd).map_err(|e| CoreError::Store(e.to_string()))
            }
            Answer::Denied { message, .. } => Err(CoreError::SegmentGone(message)),
            Answer::NoDescriptor => Err(CoreError::Store(NO_DESCRIPTOR.into())),
            _ => Err(CoreError::Store("the node answered a map request with something else".into())),
        }
    }

    pub(super) fn free(&self, state: &mut State, location: Location) {
        if location.lessee == self.me {
            // A block of ours that is not allocated would be freed twice: a programmer's error.
            if let Err(error) = self.store.free(location.segment, location.offset) {
                debug_assert!(false, "{error}");
            }
            self.release_segments(&self.store.surplus());
            self.room_was_made(state);
        } else if location.is_spilled() {
            let node = if location.node == NodeKey(self.node.0) { 0 } else { location.node.0 };
            self.tell_node(node_wire::SPILL_RELEASED, 0, &node_wire::spill_released(location.segment, node));
        } else if state.adopted.contains_key(&(location.node, location.segment))
            || state.owner.objects.is_dead(location.lessee)
        {
            let segment = (location.node, location.segment);
            if let Some(left) = state.adopted.get_mut(&segment) {
                *left -= 1;
                if *left == 0 {
                    state.adopted.remove(&segment);
                }
            }
            let freed = node_wire::blocks_freed(location.segment, &[location.offset], location.node);
            self.tell_node(node_wire::BLOCKS_FREED, 0, &freed);
        } else {
            self.route(location.lessee, location.node);
            let msg = Msg::FreeBlocks { blocks: vec![(location.segment, location.offset)] };
            let body = postcard::to_stdvec(&msg).expect("plain data always encodes");
            self.transport().send(location.lessee, node_wire::CORE, 0, &[&body], SendMode::Queue);
        }
    }

    pub(super) fn release_segments(&self, segments: &[SegmentId]) {
        for segment in segments {
            self.tell_node(node_wire::SEGMENT_RELEASE, 0, &node_wire::segment(*segment));
        }
    }
}

pub(super) fn full(message: String, is_disk_full: bool) -> CoreError {
    if is_disk_full { CoreError::DiskFull(message) } else { CoreError::StoreFull(message) }
}
