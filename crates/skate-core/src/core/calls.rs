//! What a program submits: tasks, streams of their items, actors.

use std::sync::Arc;
use std::time::Instant;

use skate_proto::actors::{ActorState, Creation};
use skate_proto::ids::{ActorId, ObjectId, TaskId};
use skate_proto::leases::ClassSpec;
use skate_proto::msg::{CallDef, Msg, Reason, Slot};
use skate_proto::objects::WaiterId;
use skate_proto::owner::Effect;
use skate_proto::payload::{Blob, Payload};
use skate_proto::streams::Next;
use skate_proto::tasks::Refused;

use super::requests::Answer;
use super::waiting::{Completions, Wait, Waiter, Watch};
use super::{Core, CoreError, State};

impl Core {
    /// Registers a use of a remote function, until [`Self::undefine`].
    pub fn define(&self, call: CallDef, blob: Blob, class: Option<ClassSpec>, max_retries: i32) -> u32 {
        let mut state = self.state.lock();
        let class = class.map(|spec| state.owner.class(spec));
        state.owner.define(call, blob, class, max_retries)
    }

    /// See [`skate_proto::owner::Owner::set_task_oom_retries`].
    pub fn set_task_oom_retries(&self, count: i32) {
        self.state.lock().owner.set_task_oom_retries(count);
    }

    pub fn undefine(&self, def: u32) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| state.owner.undefine(def, &mut state.out));
    }

    pub fn submit(
        &self,
        def: u32,
        args: Payload,
        deps: Vec<(Slot, ObjectId)>,
        handle: Option<ObjectId>,
        parent: Option<TaskId>,
    ) -> Result<TaskId, CoreError> {
        self.step(|state, now| {
            if let Some(why) = &state.closed {
                return Err(CoreError::Closed(why.clone()));
            }
            state.owner.submit(def, args, deps, handle, parent, now, &mut state.out).map_err(|refused| match refused {
                Refused::TooManyPendingCalls(limit) => CoreError::TooManyPendingCalls(limit),
            })
        })
    }

    /// False: an actor's call cannot be forced, and nothing was done.
    pub fn cancel(&self, id: ObjectId, force: bool, recursive: bool) -> bool {
        self.step(|state, now| {
            if force && state.owner.is_actor_call(id) {
                return false;
            }
            state.owner.cancel(id, force, recursive, now, &mut state.out);
            true
        })
    }

    /// Why a value is not there, as far as this process knows.
    pub fn why(&self, id: ObjectId) -> Reason {
        let now = self.now_ns();
        self.state.lock().owner.why(id, now)
    }

    /// The same, as its owner knows.
    pub fn ask_why(&self, object: ObjectId, deadline: Option<Instant>) -> Result<Reason, CoreError> {
        let ask = |question| {
            self.step(|state, _| {
                let msg = Msg::Why { object, question };
                state.out.effects.push(Effect::Send { to: object.owner(), msg, urgent: true });
            });
        };
        match self.ask_with(ask, deadline, Wait { blocks: false, hears: true })? {
            Answer::Reason(reason) => Ok(reason),
            _ => Err(CoreError::Store("a process answered a question with something else".into())),
        }
    }

    /// The next item, its local count being the caller's; `None` at the end.
    pub fn stream_next(&self, task: TaskId, deadline: Option<Instant>) -> Result<Option<ObjectId>, CoreError> {
        loop {
            let (waiter, watch) = {
                let mut state = self.state.lock();
                let State { owner, out, .. } = &mut *state;
                let next = owner.stream_next(task, out);
                let now = self.now_ns();
                self.perform(&mut state, now);
                match next {
                    Next::Item(id) => return Ok(Some(id)),
                    Next::End => return Ok(None),
                    Next::NotYet => {}
                }
                if let Some(why) = &state.closed {
                    return Err(CoreError::Closed(why.clone()));
                }
                state.next_watch += 1;
                let watch = WaiterId(state.next_watch);
                let waiter = Waiter::new(1);
                state.watches.insert(watch, Watch::Thread(waiter.clone()));
                state.owner.stream_watch(task, watch);
                (waiter, watch)
            };
            let result = self.wait_for(&|| waiter.is_done(), deadline, self.users_wait());
            let mut state = self.state.lock();
            state.watches.remove(&watch);
            state.owner.stream_unwatch(task, watch);
            drop(state);
            result?;
        }
    }

    pub fn stream_watch(&self, task: TaskId, completions: &Arc<Completions>, token: u64) {
        let mut state = self.state.lock();
        state.next_watch += 1;
        let watch = WaiterId(state.next_watch);
        if state.closed.is_some() || state.owner.stream_watch(task, watch) {
            completions.add(token);
        } else {
            state.watches.insert(watch, Watch::Event(completions.clone(), token));
        }
    }

    pub fn stream_ready(&self, task: TaskId) -> bool {
        self.state.lock().owner.stream_ready(task)
    }

    pub fn stream_dropped(&self, task: TaskId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, now| state.owner.stream_dropped(task, now, &mut state.out));
    }

    pub fn next_actor_id(&self) -> (ActorId, ObjectId) {
        self.state.lock().owner.next_actor_id()
    }

    pub fn create_actor(&self, creation: Creation, args: Payload, deps: Vec<(Slot, ObjectId)>) {
        self.step(|state, now| state.owner.create_actor(creation, args, deps, now, &mut state.out));
    }

    pub fn configure_calls(&self, actor: ActorId, max_pending: i32, any_order: bool) {
        self.state.lock().owner.configure_calls(actor, max_pending, any_order);
    }

    pub fn actor_state(&self, actor: ActorId) -> Option<ActorState> {
        self.state.lock().owner.actor_state(actor).cloned()
    }

    pub fn kill_actor(&self, actor: ActorId, no_restart: bool) {
        self.step(|state, _| state.owner.kill_actor(actor, no_restart, &mut state.out));
    }
}
