//! Streaming generators: items are objects of the consumer, handed out in order while the task runs.
//!
//! Index 0 of the task is the completion; items count from 1. A repeated task sends its first items
//! again; those that are there already are dropped, and count as taken for a worker that holds back.
//!
//! Dynamic returns are items, too, but nobody takes them while the task runs: each has one local count
//! until the task's value is there, which refers to all of them.

use crate::ids::{ObjectId, ProcId, TaskId};
use crate::msg::Msg;
use crate::objects::{Gone, WaiterId};
use crate::owner::{Effect, Out, Owner};
use crate::payload::{Payload, Value};
use crate::tasks::Place;

#[derive(Debug, Default)]
pub struct Stream {
    received: u32,
    taken: u32,
    total: Option<u32>,
    waiters: Vec<WaiterId>,
}

/// What the consumer gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Its local count is the caller's.
    Item(ObjectId),
    NotYet,
    End,
}

impl Owner {
    pub fn stream_next(&mut self, task: TaskId, out: &mut Out) -> Next {
        let Some(stream) = self.streams.get_mut(&task) else {
            return Next::End;
        };
        if stream.taken < stream.received {
            stream.taken += 1;
            let taken = stream.taken;
            if let Some(entry) = self.tasks.get(&task)
                && self.definitions[entry.def].call.backpressure > 0
                && let Some(worker) = self.runs_at(entry.place)
            {
                out.push(Effect::Send { to: worker, msg: Msg::ItemsTaken { task, taken }, urgent: true });
            }
            return Next::Item(ObjectId { task, index: taken });
        }
        if stream.total.is_some() { Next::End } else { Next::NotYet }
    }

    #[must_use]
    pub fn stream_ready(&self, task: TaskId) -> bool {
        self.streams.get(&task).is_none_or(|s| s.taken < s.received || s.total.is_some())
    }

    /// True if there is something to take now; otherwise the waiter is told.
    pub fn stream_watch(&mut self, task: TaskId, waiter: WaiterId) -> bool {
        if self.stream_ready(task) {
            return true;
        }
        if let Some(stream) = self.streams.get_mut(&task) {
            stream.waiters.push(waiter);
        }
        false
    }

    pub fn stream_unwatch(&mut self, task: TaskId, waiter: WaiterId) {
        if let Some(stream) = self.streams.get_mut(&task) {
            stream.waiters.retain(|w| *w != waiter);
        }
    }

    /// The consumer went away: items not taken are released, and the producer is stopped.
    pub fn stream_dropped(&mut self, task: TaskId, now_ns: u64, out: &mut Out) {
        let Some(stream) = self.streams.remove(&task) else {
            return;
        };
        let mut gone = Gone::default();
        for index in stream.taken + 1..=stream.received {
            self.objects.release(ObjectId { task, index }, &mut gone, out);
        }
        self.settle(gone, out);
        if stream.total.is_none() && self.tasks.contains_key(&task) {
            self.cancel(ObjectId { task, index: 0 }, false, false, now_ns, out);
        }
    }

    pub(crate) fn handle_item(&mut self, from: ProcId, task: TaskId, index: u32, value: Value, out: &mut Out) {
        self.objects.arrive(value.refs());
        let wanted = self.streams.get(&task).is_some_and(|s| index == s.received + 1 && s.total.is_none());
        if !wanted {
            let mut gone = Gone::default();
            self.objects.discard(&value, &mut gone, out);
            self.settle(gone, out);
            // A new attempt begins with no item taken, and would wait for the consumer to take again
            // what it took from the attempt before.
            let holds_back =
                self.tasks.get(&task).is_some_and(|entry| self.definitions[entry.def].call.backpressure > 0);
            if let Some(stream) = self.streams.get(&task).filter(|s| holds_back && index <= s.received) {
                out.push(Effect::Send { to: from, msg: Msg::ItemsTaken { task, taken: stream.taken }, urgent: true });
            }
            return;
        }
        self.add_item(task, value, out);
    }

    fn add_item(&mut self, task: TaskId, value: Value, out: &mut Out) {
        let Some(stream) = self.streams.get_mut(&task) else {
            return;
        };
        stream.received += 1;
        let id = ObjectId { task, index: stream.received };
        for waiter in stream.waiters.drain(..) {
            out.push(Effect::Notify { waiter, failed: false });
        }
        self.objects.create(id, Some(value), None);
        self.objects.note_value(id, out);
    }

    /// The task ended; `items` is how many it sent in all.
    pub(crate) fn finish_stream(&mut self, task: TaskId, _items: u32, out: &mut Out) {
        let Some(stream) = self.streams.get_mut(&task) else {
            return;
        };
        stream.total = Some(stream.received);
        for waiter in stream.waiters.drain(..) {
            out.push(Effect::Notify { waiter, failed: false });
        }
    }

    /// The task failed outside its code: the exception is the last item.
    pub(crate) fn break_stream(&mut self, task: TaskId, error: &Payload, out: &mut Out) {
        if self.streams.get(&task).is_some_and(|s| s.total.is_none()) {
            for &inner in &error.refs {
                self.objects.retain(inner);
            }
            self.add_item(task, Value::Inline(error.clone()), out);
        }
    }

    /// A call with dynamic returns has ended: its value, which lists the items, counts them from now on.
    pub(crate) fn close_dynamic(&mut self, task: TaskId, out: &mut Out) {
        let Some(stream) = self.streams.remove(&task) else {
            return;
        };
        let mut gone = Gone::default();
        for index in 1..=stream.received {
            self.objects.release(ObjectId { task, index }, &mut gone, out);
        }
        self.settle(gone, out);
    }

    fn runs_at(&self, place: Place) -> Option<ProcId> {
        match place {
            Place::Pushed(lease) => self.leases.worker(lease),
            Place::Sent { proc, .. } => Some(proc),
            _ => None,
        }
    }
}
