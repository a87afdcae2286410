//! What a worker does with the work it is sent.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;

use skate_proto::executor::{Executor, Work};
use skate_proto::ids::{ActorId, TaskId};
use skate_proto::msg::Msg;
use skate_proto::owner::Effect;
use skate_proto::payload::{ErrorCode, Value};

use super::waiting::Wait;
use super::waiting::thread_id;
use super::{Core, CoreError, State};
use crate::node_wire;

impl Core {
    /// This thread is the one whose waits give CPUs back and whom cancellation interrupts.
    pub fn set_main_thread(&self) {
        self.main_thread.store(thread_id(), Ordering::Relaxed);
    }

    /// The next piece of work for a thread of `group`; `None`: leave.
    pub fn next_work(&self, group: &str) -> Result<Option<Work>, CoreError> {
        loop {
            {
                let mut state = self.state.lock();
                if state.closed.is_some() {
                    return Ok(None);
                }
                if let Some(work) = state.executor.take(group, self.now_ns()) {
                    return Ok(Some(work));
                }
                if state.executor.exiting {
                    return Ok(None);
                }
            }
            let done = || {
                let state = self.state.lock();
                state.executor.has_work(group) || state.executor.exiting || state.closed.is_some()
            };
            match self.wait_for(&done, None, Wait { blocks: false, hears: true }) {
                Ok(()) | Err(CoreError::Closed(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Work of any group, for an event loop.
    pub fn poll_work(&self) -> Option<Work> {
        let mut state = self.state.lock();
        let work = state.executor.take_any(self.now_ns());
        if work.is_none() && state.task_event_set && state.closed.is_none() && !state.executor.exiting {
            if let Some(descriptors) = &*self.descriptors.lock() {
                let _ = rustix::io::read(&descriptors.task_event, &mut [0; 8]);
            }
            state.task_event_set = false;
        }
        work
    }

    pub fn task_event_fd(&self) -> i32 {
        self.descriptors.lock().as_ref().map_or(-1, |descriptors| descriptors.task_event.as_fd().as_raw_fd())
    }

    pub fn tasks_over(&self) -> bool {
        let state = self.state.lock();
        state.executor.exiting || state.closed.is_some()
    }

    pub(super) fn raise_task_event(&self, state: &mut State) {
        if !state.task_event_set {
            state.task_event_set = true;
            if let Some(descriptors) = &*self.descriptors.lock() {
                let _ = rustix::io::write(&descriptors.task_event, &1_u64.to_ne_bytes());
            }
        }
    }

    pub(super) fn work_arrived(&self, state: &mut State) {
        if state.executor.is_async {
            self.raise_task_event(state);
        }
        self.transport().wake();
    }

    /// Interrupts what the main thread runs; its signal handler asks what for.
    pub(super) fn interrupt(&self) {
        let thread = self.main_thread.load(Ordering::Relaxed);
        if thread != 0 {
            crate::sys::interrupt_thread(thread);
            // A signal that arrives between Python's last look and the wait does not end the wait; the
            // flag does. It is raised after the signal, so that whoever sees it finds the signal too.
            self.interrupted.store(true, Ordering::Release);
        }
        self.transport().wake();
    }

    /// Sends the results of a piece of work and drops its counts. `failure` is the exception in words, for history.
    pub fn answer(
        &self,
        work: &Work,
        results: Vec<Value>,
        failure: Option<&str>,
        retryable: bool,
        run_ns: u64,
        items: u32,
    ) {
        self.step(|state, now| {
            self.note(state, work, &results, failure, now, run_ns);
            let State { owner, executor, out, served, .. } = state;
            if work.task.node.0 != self.node.0 && results.iter().any(is_stored) {
                served.insert(work.owner, work.task.node);
            }
            for value in &results {
                owner.objects.hand_over(value.refs(), work.owner, out);
            }
            executor.answer(work.owner, work.task, results, retryable, run_ns, items, out);
        });
    }

    /// Sends one item of a stream.
    pub fn send_item(&self, work: &Work, index: u32, value: Value) {
        self.step(|state, _| {
            let State { owner, out, served, .. } = state;
            if work.task.node.0 != self.node.0 && is_stored(&value) {
                served.insert(work.owner, work.task.node);
            }
            owner.objects.hand_over(value.refs(), work.owner, out);
            out.effects.push(Effect::Send {
                to: work.owner,
                msg: Msg::Item { task: work.task, index, value },
                urgent: true,
            });
        });
    }

    /// Waits until the consumer has taken all but `limit` of `sent` items, or goes away.
    pub fn wait_items_taken(&self, task: TaskId, sent: u32, limit: u32) -> Result<(), CoreError> {
        let done = || {
            let state = self.state.lock();
            state.closed.is_some()
                || state.executor.is_cancelled(task)
                || state.executor.items_taken(task).is_none_or(|taken| sent < taken + limit)
        };
        self.wait_for(&done, None, self.users_wait())
    }

    /// The counts of a piece of work are not needed any more.
    pub fn forget_work(&self, work: &Work) {
        let counted = Executor::counted(&work.args, &work.deps);
        self.release_all(&counted);
    }

    /// A task that only the actor's main loop ends, such as its creation.
    pub fn work_left(&self, task: TaskId) {
        if self.is_forked() {
            return;
        }
        self.step(|state, _| state.executor.left(task));
    }

    pub fn is_cancelled(&self, task: TaskId) -> bool {
        self.state.lock().executor.is_cancelled(task)
    }

    /// Gives back what was not started, before this worker ends by its own will.
    pub fn leave(&self, answered: bool) {
        self.step(|state, _| {
            let State { executor, owner, out, .. } = state;
            let counted = executor.leave(answered, out);
            owner.release_all(&counted, out);
        });
    }

    /// `__init__` of the actor that this process is has returned.
    pub fn actor_ready(&self) {
        self.note_creation(0, "");
        if let Some((actor, life)) = self.own_actor() {
            self.tell_node(node_wire::ACTOR_READY, 0, &node_wire::actor_ready(actor, life));
        }
    }

    pub fn actor_failed(&self, error: &[u8], text: &str) {
        self.note_creation(ErrorCode::ActorDied as u8, text);
        self.flush_history();
        if let Some((actor, life)) = self.own_actor() {
            self.tell_node(node_wire::ACTOR_FAILED, 0, &node_wire::actor_failed(actor, life, error));
        }
    }

    /// The end of this process, soon to come, is what the actor wants.
    pub fn actor_exit(&self, reason: &str) {
        {
            let mut state = self.state.lock();
            state.executor.exiting = true;
            self.raise_task_event(&mut state);
        }
        self.transport().wake();
        if let Some((actor, life)) = self.own_actor() {
            self.tell_node(node_wire::ACTOR_EXIT, 0, &node_wire::actor_exit(actor, life, reason));
        }
    }

    /// Stays, without taking tasks, as long as other processes refer to values of this one.
    pub fn linger(&self) {
        let done = || {
            let state = self.state.lock();
            state.closed.is_some() || !state.owner.objects.is_lender()
        };
        if !done() {
            self.tell_node(node_wire::RETIRED, 0, &node_wire::empty());
            // Nothing but the end of the lending, or of the cluster, ends this wait.
            while matches!(
                self.wait_for(&done, None, Wait { blocks: false, hears: false }),
                Err(CoreError::Interrupted)
            ) {}
        }
    }

    pub(super) fn own_actor(&self) -> Option<(ActorId, u32)> {
        self.state.lock().actor
    }
}

fn is_stored(value: &Value) -> bool {
    matches!(value, Value::Stored { .. })
}
