//! What arrives: messages of other members, of the node, and the ends of connections.
//!
//! What the node says about a process is believed only when everything that the process sent has been read.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use skate_proto::actors::ActorState;
use skate_proto::executor::{CancelStep, Executor};
use skate_proto::handshake::Role;
use skate_proto::ids::{ActorId, NodeKey, ProcId};
use skate_proto::leases::{ClassId, Death};
use skate_proto::msg::Msg;
use skate_proto::owner::{Effect, ToNode};

use super::logs::Log;
use super::requests::{Answer, refusal};
use super::{Core, State, TIMER_TOKEN};
use crate::node_wire::{self, FromNode};
use crate::transport::{Address, CloseReason, Frame, Handler, PeerInfo, Transport};

pub(super) struct Shell(pub(super) Weak<Core>);

impl Core {
    pub(super) fn handle_core_message(&self, state: &mut State, from: ProcId, msg: Msg, now: u64) {
        let State { owner, executor, out, copies, .. } = state;
        match msg {
            // Of an owner whose end is known nothing more is learned: it would never be forgotten.
            Msg::Define { id, def, blob } if !owner.objects.is_dead(from) => {
                executor.handle_define(from, id, def, blob)
            }
            Msg::Define { .. } => {}
            Msg::Forget { ids } => executor.handle_forget(from, &ids),
            Msg::Push(push) => {
                owner.objects.arrive(&Executor::counted(&push.args, &push.deps));
                let counted = Executor::counted(&push.args, &push.deps);
                self.prefetch(copies, &push.deps);
                match executor.handle_push(from, push, out) {
                    Some(_) => self.work_arrived(state),
                    None => owner.release_all(&counted, out),
                }
            }
            Msg::Steal { max } => {
                let counted = executor.handle_steal(from, max, out);
                owner.release_all(&counted, out);
            }
            Msg::Cancel { task, recursive } => {
                let (step, counted) = executor.handle_cancel(task, out);
                owner.release_all(&counted, out);
                if recursive {
                    owner.cancel_children(task, now, out);
                }
                if step == CancelStep::Interrupt {
                    self.interrupt();
                }
            }
            Msg::ItemsTaken { task, taken } => {
                executor.handle_items_taken(task, taken);
                self.transport().wake();
            }
            Msg::FreeBlocks { blocks } => {
                for (segment, offset) in blocks {
                    // A peer's word: what is not a block of ours is not freed.
                    let _ = self.store.free(segment, offset);
                }
                self.release_emptied();
                self.room_was_made(state);
            }
            Msg::Evict { objects } => owner.handle_evict(from, &objects, |object| executor.forget_place(object), out),
            Msg::Spill { offered } => self.tell_node(node_wire::SPILL, 0, &node_wire::spill(from, &offered)),
            Msg::Because { question, reason } => self.answered(state, question, Answer::Reason(reason)),
            other => owner.handle_message(from, other, now, out),
        }
    }

    pub(super) fn handle_node_message(
        &self,
        state: &mut State,
        corr: u64,
        msg: FromNode,
        fd: Option<OwnedFd>,
        now: u64,
    ) {
        match msg {
            FromNode::LeaseGranted { class, lease, worker, node, pid, gpu_ids } => {
                self.route(worker, node);
                let State { owner, out, .. } = state;
                owner.handle_lease_granted(ClassId(class), lease, worker, node, pid, gpu_ids, now, out);
            }
            FromNode::LeaseReclaim { lease, wanted, node } => {
                state.owner.handle_lease_reclaim(lease, wanted, node, now, &mut state.out);
            }
            FromNode::Pressure { pressed } => state.owner.handle_pressure(pressed, now, &mut state.out),
            FromNode::WorkerDied { proc, .. } if self.is_connected(proc) => {
                state.deferred.entry(proc).or_default().push(msg)
            }
            FromNode::ActorState { actor, state: ref new } if self.former_life(state, actor, new).is_some() => {
                let proc = self.former_life(state, actor, new).expect("just seen");
                state.deferred.entry(proc).or_default().push(msg);
            }
            FromNode::Deaths(dead) => {
                for (proc, cause) in dead {
                    if !state.owner.objects.is_dead(ProcId(proc)) {
                        let died = FromNode::WorkerDied { proc: ProcId(proc), cause, death: Death::Crashed };
                        self.handle_node_message(state, 0, died, None, now);
                    }
                }
            }
            FromNode::WorkerDied { proc, cause, death } => self.process_gone(state, proc, &cause, death, now),
            FromNode::ActorState { actor, state: actor_state } => {
                if let ActorState::Alive { proc, node, .. } = actor_state {
                    self.route(proc, node);
                }
                let State { owner, out, .. } = state;
                owner.handle_actor_state(actor, actor_state, now, out);
            }
            FromNode::SegmentGranted { segment, size } | FromNode::SegmentMapped { segment, size } => {
                let answer = match fd {
                    Some(fd) => Answer::Segment { segment, size, fd },
                    None => Answer::NoDescriptor,
                };
                self.answered(state, corr, answer);
            }
            FromNode::Pulled { segment, size, offset } => {
                let answer = match fd {
                    Some(fd) => Answer::Copy { segment, size, offset, fd },
                    None => Answer::NoDescriptor,
                };
                self.answered(state, corr, answer);
            }
            FromNode::SegmentDenied { message, kept, why } => {
                self.answered(state, corr, Answer::Denied { message, kept, why });
            }
            FromNode::Reply { ok, body } => match state.promises.remove(&corr) {
                Some((object, value)) => {
                    let kept = if ok { Ok(value) } else { Err(refusal(&body)) };
                    let State { owner, out, .. } = state;
                    owner.keep_promise(object, kept, now, out);
                }
                None => self.answered(state, corr, Answer::Reply { ok, body }),
            },
            FromNode::EstateAnswer(said) => {
                let State { owner, out, .. } = state;
                owner.handle_bequests(said, now, out);
            }
            FromNode::BlocksRetired(blocks) => {
                for (segment, offset) in blocks {
                    // The word of the dead: what is not a block of ours is not retired.
                    let _ = self.store.retire(segment, offset);
                }
                self.release_emptied();
            }
            FromNode::SpillWanted { bytes } => self.make_room(state, bytes),
            FromNode::Spilled { owner, written } => self.written(state, owner, written),
            FromNode::SegmentTrim { bytes } => self.release_segments(&self.store.take_empty(bytes)),
            // Results of the dead lessee may be on their way still: they are claims, too.
            FromNode::SegmentAdopted { lessee, .. } if !state.deferred.is_empty() || self.is_connected(lessee) => {
                state.waiting_adoptions.push(msg);
            }
            FromNode::SegmentAdopted { segment, node, .. } => {
                let blocks = state.owner.objects.blocks_in(node, segment);
                if blocks.is_empty() {
                    state.adopted.remove(&(node, segment));
                } else {
                    state.adopted.insert((node, segment), blocks.len());
                }
                self.tell_node(node_wire::SEGMENT_CLAIMS, 0, &node_wire::segment_claims(segment, &blocks, node));
            }
            FromNode::ActorInit { actor, incarnation, spec, gpu_ids } => {
                state.actor = Some((actor, incarnation));
                let owner_proc = spec.actor.proc;
                self.route(owner_proc, spec.task.node);
                state.owner.objects.arrive(&Executor::counted(&spec.args, &spec.deps));
                state.executor.handle_actor_init(*spec, incarnation, gpu_ids, owner_proc);
                self.work_arrived(state);
            }
            FromNode::LogLines { name, pid, stream, lines, ip } => {
                self.add_log(Log::Lines { name, pid, stream, lines, ip });
            }
            FromNode::Notice { level, text } => self.add_log(Log::Notice { level, text }),
            FromNode::LeaseFailed { class, reason, code } => {
                let State { owner, out, .. } = state;
                owner.handle_lease_failed(ClassId(class), &reason, code, now, out);
            }
            FromNode::NodeAddress { node, address, cause, relayed } => {
                if address.is_empty() {
                    state.owner.handle_node_lost(node, &cause);
                    state.adopted.retain(|(at, _), _| *at != node);
                }
                self.node_found(ProcId(node.0), &address, relayed, &cause);
            }
            // Answered before it comes here.
            FromNode::Describe { .. } => {}
            // A request: this process stays while others may need what it owns.
            FromNode::Exit if state.executor.running_count() > 0 || !state.owner.is_bare() => {}
            FromNode::ActorStop | FromNode::Exit => {
                state.executor.exiting = true;
                self.raise_task_event(state);
                self.transport().wake();
            }
        }
    }

    /// The process of an actor's life that `new` says has ended, while its last answers may be on their
    /// way: they are read before the end is believed.
    pub(super) fn former_life(&self, state: &State, actor: ActorId, new: &ActorState) -> Option<ProcId> {
        match state.owner.actor_state(actor)? {
            ActorState::Alive { proc, .. } if !matches!(new, ActorState::Alive { proc: same, .. } if same == proc) => {
                Some(*proc).filter(|proc| self.is_connected(*proc))
            }
            _ => None,
        }
    }

    pub(super) fn is_connected(&self, proc: ProcId) -> bool {
        self.transport.get().is_some_and(|transport| transport.peer_info(proc).is_some())
    }

    /// The answer to [`node_wire::WHERE_IS_NODE`].
    fn node_found(&self, node: ProcId, address: &str, relayed: bool, cause: &str) {
        match (address, address.parse()) {
            ("", _) => self.transport().forget_node(node, cause),
            (_, Ok(address)) if relayed => self.transport().set_address_of_head(node, Address::Tcp(address)),
            (_, Ok(address)) => self.transport().set_address(node, Address::Tcp(address)),
            (_, Err(error)) => {
                let cause =
                    format!("this process's node says that it listens at {address:?}, which is no address: {error}");
                self.transport().forget_node(node, &cause);
            }
        }
    }

    pub(super) fn process_gone(&self, state: &mut State, proc: ProcId, cause: &str, death: Death, now: u64) {
        self.transport().drop_route(proc);
        state.served.remove(&proc);
        let State { owner, executor, out, .. } = state;
        owner.handle_process_gone(proc, cause, death, now, out);
        let (counted, interrupted) = executor.handle_process_gone(proc);
        owner.release_all(&counted, out);
        for task in &interrupted {
            owner.cancel_children(*task, now, out);
        }
        if !interrupted.is_empty() {
            self.interrupt();
        }
    }
}

impl Handler for Shell {
    fn on_frame(&self, from: ProcId, frame: Frame<'_>, fd: Option<OwnedFd>) {
        let Some(core) = self.0.upgrade() else { return };
        if frame.kind == node_wire::CORE {
            match postcard::from_bytes::<Msg>(frame.body) {
                Ok(msg) => core.step(|state, now| core.handle_core_message(state, from, msg, now)),
                // Same version, same session, and yet not our language: trust nothing more from there.
                Err(_) => core.transport().disconnect(from),
            }
        } else if from == core.node
            && let Some(msg) = node_wire::decode(frame.kind, frame.body)
        {
            if let FromNode::Describe { what, limit } = msg {
                return core.describe(frame.corr, what, limit);
            }
            core.step(|state, now| core.handle_node_message(state, frame.corr, msg, fd, now));
        }
    }

    fn on_started(&self, transport: &Arc<Transport>) {
        if let Some(core) = self.0.upgrade() {
            assert!(core.transport.set(transport.clone()).is_ok(), "a transport starts once");
        }
    }

    fn on_batch_end(&self) {}

    fn on_joined(&self, _peer: PeerInfo) {}

    fn on_closed(&self, peer: ProcId, reason: CloseReason) {
        let Some(core) = self.0.upgrade() else { return };
        if core.closing.load(Ordering::Acquire) {
            return;
        }
        if peer == core.node {
            if core.role == Role::Worker {
                // Nothing that this process does can be of use to anyone any more.
                crate::sys::exit_now(1);
            }
            core.fail(&format!("the connection to the node was lost ({reason})"));
            return;
        }
        core.step(|state, now| {
            let deferred = state.deferred.remove(&peer).unwrap_or_default();
            if deferred.is_empty() && !state.owner.objects.is_dead(peer) {
                state.out.effects.push(Effect::Node(ToNode::PeerLost { proc: peer }));
            }
            for msg in deferred {
                core.handle_node_message(state, 0, msg, None, now);
            }
            if state.deferred.is_empty() {
                for msg in std::mem::take(&mut state.waiting_adoptions) {
                    core.handle_node_message(state, 0, msg, None, now);
                }
            }
        });
    }

    fn on_unknown_node(&self, node: ProcId) {
        if let Some(core) = self.0.upgrade() {
            core.tell_node(node_wire::WHERE_IS_NODE, 0, &node_wire::where_is_node(NodeKey(node.0)));
        }
    }

    fn on_fd_ready(&self, token: u64) {
        let Some(core) = self.0.upgrade() else { return };
        if token == TIMER_TOKEN {
            if let Some(descriptors) = &*core.descriptors.lock() {
                let _ = rustix::io::read(&descriptors.timer, &mut [0; 8]);
            }
            core.step(|state, now| {
                state.timer_armed = false;
                state.owner.handle_timeout(now, &mut state.out);
                if state.history.poll_timeout().is_some_and(|at| at <= now) {
                    core.send_history(state);
                }
            });
        }
    }
}
