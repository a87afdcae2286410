//! Room in the store: asking for it, waiting for it, and making it when the node is short.

use std::cell::{Cell, RefCell};

use skate_proto::ids::{NodeKey, ProcId};
use skate_proto::msg::Msg;
use skate_proto::owner::Effect;
use skate_proto::spilling::Written;

use super::requests::Answer;
use super::waiting::Wait;
use super::{Core, CoreError, State};
use crate::node_wire;
use crate::store::Block;

/// What came of asking for a segment.
pub(super) enum Segment {
    Answered(Answer),
    /// Blocks were freed in a segment that this process has, before the node had a whole one.
    Found(Block),
}

impl Core {
    pub(super) fn ask_for_segment(&self, len: u64) -> Result<Segment, CoreError> {
        let request = node_wire::segment_request(len, self.store.wish_bytes(len));
        let found = RefCell::new(None);
        let frees = Cell::new(self.store.frees());
        let look_again = || {
            let now = self.store.frees();
            if frees.replace(now) != now {
                *found.borrow_mut() = self.store.alloc(len);
            }
            found.borrow().is_some()
        };
        self.state.lock().allocating += 1;
        let ask = |corr| self.tell_node(node_wire::SEGMENT_REQUEST, corr, &request);
        let (answer, corr) = self.ask_unless(ask, None, Wait { blocks: false, hears: true }, &look_again);
        self.state.lock().allocating -= 1;
        match (answer, found.into_inner()) {
            (Ok(Some(answer)), None) => Ok(Segment::Answered(answer)),
            (Ok(Some(answer)), Some(block)) => {
                // Both came at once. The block is as good; the segment is for the next.
                if let Answer::Segment { segment, size, fd } = answer {
                    self.store.add_segment(segment, size, &fd).map_err(|e| CoreError::Store(e.to_string()))?;
                }
                Ok(Segment::Found(block))
            }
            (Ok(None), block) => {
                self.withdraw_request(corr);
                block.map(Segment::Found).ok_or_else(|| CoreError::Closed("no answer".into()))
            }
            (Err(error), block) => {
                self.withdraw_request(corr);
                if let Some(block) = block {
                    let _ = self.store.free(block.location().segment, block.location().offset);
                }
                Err(error)
            }
        }
    }

    /// Nobody waits for the segment any more. A grant that is on its way goes back when it comes.
    fn withdraw_request(&self, corr: u64) {
        self.tell_node(node_wire::SEGMENT_REQUEST, corr, &node_wire::segment_request(0, 0));
    }

    /// Blocks of this process's segments were freed.
    pub(super) fn room_was_made(&self, state: &State) {
        if state.allocating > 0 {
            self.transport().wake();
        }
    }

    /// The node is short of memory: what can be had without writing is given back, and owned values are offered. Owners
    /// on other nodes, of which the node knows nothing, are told.
    pub(super) fn make_room(&self, state: &mut State, bytes: u64) {
        self.release_unviewed_copies(state);
        self.release_segments(&self.store.take_empty(bytes));
        let node = NodeKey(self.node.0);
        let State { owner, out, served, .. } = state;
        owner.make_room(node, bytes, out);
        for (&to, &at) in served.iter() {
            self.route(to, at);
            out.effects.push(Effect::Send { to, msg: Msg::MakeRoom { node, bytes }, urgent: true });
        }
    }

    /// The node's answer to an offer, which this process made for itself or for an owner on another node.
    pub(super) fn written(&self, state: &mut State, owner: ProcId, written: Vec<Written>) {
        let node = NodeKey(self.node.0);
        let State { owner: machine, out, .. } = state;
        if owner != self.me {
            out.effects.push(Effect::Send { to: owner, msg: Msg::Written { node, written }, urgent: true });
            return;
        }
        for each in written {
            machine.handle_written(node, each, out);
        }
    }
}
