//! Work goes to where its arguments lie, as long as that costs neither parallelism nor fairness.
//!
//! Only a choice among what is possible anyway: of workers that are equally free the one near the arguments is taken,
//! and a worker is given, of the first tasks of the queue, one whose arguments are on its node. Whoever can begin
//! elsewhere does not wait for a place nearby: moving bytes takes less time than most tasks.
//!
//! Invariants: a task is passed over at most [`PASSED_OVER_MAX`] times; tasks whose arguments are small, or lie in
//! their message, are taken in order.

use crate::ids::{LeaseId, NodeKey, TaskId};
use crate::leases::ClassId;
use crate::owner::Owner;
use crate::payload::Value;

/// Arguments of fewer bytes are moved in less time than a choice could save.
pub const NEAR_BYTES_MIN: u64 = 1 << 20;
/// So many tasks at the front of a queue are looked at.
const LOOK_AHEAD: usize = 16;
/// The first task of a queue is taken wherever its arguments are when so many others have been taken before it.
pub const PASSED_OVER_MAX: u32 = 16;

impl Owner {
    /// The node on which most bytes of a task's arguments lie, if they are many.
    pub(crate) fn near(&self, task: TaskId) -> Option<NodeKey> {
        let mut found: Vec<(NodeKey, u64)> = Vec::new();
        for (_, id) in &self.tasks.get(&task)?.deps {
            let Some(Value::Stored { location, .. }) = self.objects.value(*id) else {
                continue;
            };
            match found.iter_mut().find(|(node, _)| *node == location.node) {
                Some((_, bytes)) => *bytes = bytes.saturating_add(location.len),
                None => found.push((location.node, location.len)),
            }
        }
        found.into_iter().filter(|(_, bytes)| *bytes >= NEAR_BYTES_MIN).max_by_key(|(_, bytes)| *bytes).map(|(n, _)| n)
    }

    /// The task to give to this lease, and its place in the queue: the first one, unless its arguments lie elsewhere
    /// and those of one close behind lie here.
    pub(crate) fn next_for(&mut self, class: ClassId, lease: LeaseId) -> Option<TaskId> {
        let queue = self.leases.queue(class);
        let first = *queue.front()?;
        let here = self.leases.node(lease)?;
        let is_elsewhere = self.near(first).is_some_and(|node| node != here);
        let at = if is_elsewhere && self.leases.passed_over(class) < PASSED_OVER_MAX {
            // The lease was chosen for how long the first one takes.
            let fits = |task: &TaskId| self.estimate_ns(*task) <= self.estimate_ns(first);
            let is_here = |task: &TaskId| self.near(*task) == Some(here) && self.has_arguments(*task) && fits(task);
            queue.iter().take(LOOK_AHEAD).position(is_here).unwrap_or(0)
        } else {
            0
        };
        self.leases.take(class, at)
    }
}
