//! Answers to the node, which asks on behalf of somebody who looks at the cluster: what this process owns and runs, and
//! where its threads are.
//!
//! The thread that reads the question answers it, without the interpreter: a process that computes, or waits in native
//! code, answers as well.

use std::sync::Weak;

use serde::Serialize;
use serde_bytes::Bytes;
use skate_proto::describe::{ObjectRow, Rows, TaskRow};

use super::Core;
use super::history::{History, number_of_kind};
use crate::node_wire;

/// What `Describe` may ask for; the numbers are shared with Python.
const TASKS: u8 = 1;
const OBJECTS: u8 = 2;
const STACKS: u8 = 3;
/// Only that records are sent.
const NOTHING: u8 = 0;

/// Rows of one answer, whatever the question says.
const ROWS_MAX: usize = 10_000;
/// What is told of a name.
const NAME_CHARS_MAX: usize = 256;

impl Core {
    pub(super) fn describe(&self, corr: u64, what: u8, limit: u32) {
        // Behind the records, the answer says that they were sent.
        self.flush_history();
        let limit = usize::try_from(limit).unwrap_or(ROWS_MAX).min(ROWS_MAX);
        match what {
            TASKS => {
                let (owned, running, rows) = {
                    let state = self.state.lock();
                    let owned = state.owner.describe_tasks(limit);
                    let running = state.executor.describe_running(limit);
                    let rows: Vec<_> = owned
                        .rows
                        .iter()
                        .map(|row| encode_task(&state.history, row, false))
                        .chain(running.rows.iter().map(|row| encode_task(&state.history, row, true)))
                        .collect();
                    (owned.total, running.total, rows)
                };
                self.described(corr, what, owned + running, &rows);
            }
            OBJECTS => {
                let Rows { rows, total } = self.state.lock().owner.describe_objects(limit);
                self.described(corr, what, total, &rows.iter().map(encode_object).collect::<Vec<_>>());
            }
            STACKS => self.describe_stacks(corr),
            NOTHING => self.described(corr, what, 0, &[]),
            _ => self.described(corr, what, 0, &[]),
        }
    }

    fn described(&self, corr: u64, what: u8, total: u64, rows: &[Vec<u8>]) {
        self.tell_node(node_wire::DESCRIBED, corr, &node_wire::described(what, total, &join(rows)));
    }

    /// A thread of its own waits for the dump: the one that reads messages must not.
    fn describe_stacks(&self, corr: u64) {
        let this = self.this.get().cloned().unwrap_or_else(Weak::new);
        let dump = move || {
            let text = crate::stacks::dump();
            if let Some(core) = this.upgrade() {
                let row = rmp_serde::to_vec(&text).expect("plain data always encodes");
                core.described(corr, STACKS, 1, &[row]);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("ray-stacks".into()).spawn(dump) {
            let row = rmp_serde::to_vec(&format!("no thread for it: {error}")).expect("plain data always encodes");
            self.described(corr, STACKS, 1, &[row]);
        }
    }
}

/// A msgpack list of values that are msgpack already.
fn join(rows: &[Vec<u8>]) -> Vec<u8> {
    let count = u32::try_from(rows.len()).expect("bounded");
    let mut out = vec![0xdd];
    out.extend_from_slice(&count.to_be_bytes());
    for row in rows {
        out.extend_from_slice(row);
    }
    out
}

fn encode<T: Serialize>(row: &T) -> Vec<u8> {
    rmp_serde::to_vec(row).expect("plain data always encodes")
}

fn cut(text: &str) -> &str {
    text.char_indices().nth(NAME_CHARS_MAX).map_or(text, |(at, _)| &text[..at])
}

fn encode_task(history: &History, row: &TaskRow, runs: bool) -> Vec<u8> {
    let (proc, node, pid) = row.worker.map_or((0, 0, 0), |(proc, node, pid)| (proc.0, node.0, pid));
    encode(&(
        Bytes::new(&row.task.to_bytes()),
        row.attempt,
        cut(&row.name),
        cut(&row.method),
        number_of_kind(row.kind),
        row.state,
        row.actor.map(|actor| serde_bytes::ByteBuf::from(actor.to_bytes())),
        row.parent.map(|parent| serde_bytes::ByteBuf::from(parent.to_bytes())),
        history.wall_ns(row.submitted_ns),
        history.wall_ns(row.since_ns),
        (proc, node, pid),
        row.missing,
        runs,
    ))
}

fn encode_object(row: &ObjectRow) -> Vec<u8> {
    encode(&(
        Bytes::new(&row.id.to_bytes()),
        row.bytes,
        (row.stored, row.ready, row.failed, row.owned),
        (row.local, row.in_tasks, row.in_objects, row.borrowers),
        row.attempt,
        row.task_state,
    ))
}
