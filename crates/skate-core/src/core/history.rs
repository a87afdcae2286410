//! What ended: records of attempts of tasks, gathered here and sent to the node in batches.
//!
//! A record is a few copies under a lock that is held anyway. It leaves with a batch: at once when [`RECORDS_MAX`] or
//! [`TEXTS_BYTES_MAX`] is reached, [`FLUSH_NS`] after its first record, when somebody asks, and at the end of this
//! process. A failure leaves at once, with what is before it, unless one did within [`FAILURE_PAUSE_NS`]: what comes next
//! may well end the process. A process that is killed takes its last fifth of a second of other records along. While
//! the node has [`BACKLOG_BYTES_MAX`] unread, batches are dropped and counted; the next one says how many records are missing.
//!
//! A batch, all little-endian: the number of records, of bytes of definitions, of bytes of texts, and of records lost
//! before (u32 each); definitions (kind of work u8, whether it has an actor u8, the actor's 16 bytes, and name and method,
//! each a u16 length and UTF-8); texts (u16 length, UTF-8); and records of [`RECORD_LEN`] bytes: task (24), start (u64,
//! nanoseconds since 1970), duration (u64 nanoseconds), attempt (u32), definition (u16), text (u16, counted from 1; 0 is
//! none), outcome (u8: 0, or the code of the exception), whether it ran here (u8), and two zero bytes.
//! `python/ray/_runtime/history.py` reads them.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use skate_proto::executor::{Work, WorkKind};
use skate_proto::ids::TaskId;
use skate_proto::msg::CallDef;
use skate_proto::payload::{ErrorCode, TEXT_BYTES_MAX, Value};

use super::{Core, State};
use crate::node_wire;

/// Records of a batch: with [`RECORD_LEN`] 53 KB, so that a frame is written with one call.
const RECORDS_MAX: usize = 1024;
/// Texts of a batch.
const TEXTS_BYTES_MAX: usize = 64 << 10;
/// A record is sent after this time at the latest: five messages a second of a busy worker are not noticed.
const FLUSH_NS: u64 = 200_000_000;
/// How long the node is left alone after a failure was told at once; further ones wait like everything else.
const FAILURE_PAUSE_NS: u64 = 20_000_000;
/// What the node may have unread before records are dropped.
const BACKLOG_BYTES_MAX: usize = 4 << 20;
const RECORD_LEN: usize = 52;
const NAME_BYTES_MAX: usize = 256;

/// The records that were not sent yet.
#[derive(Debug)]
pub(super) struct History {
    kept: bool,
    /// Of the core's start, in nanoseconds since 1970: what its own times are added to.
    epoch_ns: u64,
    defs: Vec<(Arc<CallDef>, WorkKind)>,
    texts: Vec<u8>,
    text_count: u16,
    records: Vec<u8>,
    since_ns: Option<u64>,
    /// Until then failures wait, too.
    paused_until_ns: u64,
    lost: u32,
}

impl History {
    pub(super) fn new() -> Self {
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            // Ray's switches are named so, in lower case.
            kept: std::env::var_os("RAY_task_events").is_none_or(|value| value != "0"),
            epoch_ns: u64::try_from(epoch.as_nanos()).unwrap_or(u64::MAX),
            defs: Vec::new(),
            texts: Vec::new(),
            text_count: 0,
            records: Vec::new(),
            since_ns: None,
            paused_until_ns: 0,
            lost: 0,
        }
    }

    /// When the batch is due; `None` while it is empty.
    pub(super) fn poll_timeout(&self) -> Option<u64> {
        self.since_ns.map(|since| since + FLUSH_NS)
    }

    /// A time of this core as nanoseconds since 1970; 0 stays unknown.
    pub(super) fn wall_ns(&self, at_ns: u64) -> u64 {
        if at_ns == 0 { 0 } else { self.epoch_ns + at_ns }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a record")]
    fn add(
        &mut self,
        task: TaskId,
        def: &Arc<CallDef>,
        kind: WorkKind,
        attempt: u32,
        outcome: (u8, &str),
        ran: bool,
        now_ns: u64,
        run_ns: u64,
    ) {
        let def = self.number_of(def, kind);
        let text = self.add_text(outcome.1);
        self.since_ns.get_or_insert(now_ns);
        let mut record = [0; RECORD_LEN];
        record[..24].copy_from_slice(&task.to_bytes());
        record[24..32].copy_from_slice(&(self.epoch_ns + now_ns.saturating_sub(run_ns)).to_le_bytes());
        record[32..40].copy_from_slice(&run_ns.to_le_bytes());
        record[40..44].copy_from_slice(&attempt.to_le_bytes());
        record[44..46].copy_from_slice(&def.to_le_bytes());
        record[46..48].copy_from_slice(&text.to_le_bytes());
        record[48] = outcome.0;
        record[49] = u8::from(ran);
        self.records.extend_from_slice(&record);
    }

    fn number_of(&mut self, def: &Arc<CallDef>, kind: WorkKind) -> u16 {
        // Mostly the same as the one before; there are rarely more than a few.
        let known = self.defs.iter().rposition(|(known, of)| Arc::ptr_eq(known, def) && *of == kind);
        let at = known.unwrap_or_else(|| {
            self.defs.push((def.clone(), kind));
            self.defs.len() - 1
        });
        u16::try_from(at).expect("no more definitions than records")
    }

    fn add_text(&mut self, text: &str) -> u16 {
        if text.is_empty() {
            return 0;
        }
        push_text(&mut self.texts, text, TEXT_BYTES_MAX);
        self.text_count += 1;
        self.text_count
    }

    /// Whether a failure of this moment is to leave at once.
    fn is_pressing(&mut self, failed: bool, now_ns: u64) -> bool {
        let pressing = failed && now_ns >= self.paused_until_ns;
        if pressing {
            self.paused_until_ns = now_ns + FAILURE_PAUSE_NS;
        }
        pressing
    }

    fn is_full(&self) -> bool {
        self.records.len() >= RECORDS_MAX * RECORD_LEN || self.texts.len() >= TEXTS_BYTES_MAX
    }

    fn count(&self) -> u32 {
        u32::try_from(self.records.len() / RECORD_LEN).unwrap_or(u32::MAX)
    }

    fn take_batch(&mut self) -> Vec<u8> {
        let mut defs = Vec::new();
        for (def, kind) in self.defs.drain(..) {
            defs.push(number_of_kind(kind));
            defs.push(u8::from(def.actor.is_some()));
            defs.extend_from_slice(&def.actor.map_or([0; 16], |actor| actor.to_bytes()));
            push_text(&mut defs, &def.name, NAME_BYTES_MAX);
            push_text(&mut defs, &def.method, NAME_BYTES_MAX);
        }
        let mut batch = Vec::with_capacity(16 + defs.len() + self.texts.len() + self.records.len());
        for number in [self.count(), len_of(&defs), len_of(&self.texts), self.lost] {
            batch.extend_from_slice(&number.to_le_bytes());
        }
        batch.extend_from_slice(&defs);
        batch.append(&mut self.texts);
        batch.append(&mut self.records);
        (self.text_count, self.since_ns, self.lost) = (0, None, 0);
        batch
    }

    fn drop_batch(&mut self) {
        let lost = self.lost.saturating_add(self.count());
        self.take_batch();
        self.lost = lost;
    }
}

fn len_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

pub(super) fn number_of_kind(kind: WorkKind) -> u8 {
    match kind {
        WorkKind::Task => 0,
        WorkKind::CreateActor => 1,
        WorkKind::Call => 2,
    }
}

/// A text with its length in front, cut between characters.
fn push_text(to: &mut Vec<u8>, text: &str, max: usize) {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    to.extend_from_slice(&u16::try_from(end).expect("cut to less").to_le_bytes());
    to.extend_from_slice(&text.as_bytes()[..end]);
}

impl Core {
    /// Whether records are kept of this work.
    pub fn is_recorded(&self, work: &Work) -> bool {
        work.def.recorded && self.state.lock().history.kept
    }

    /// Notes how a piece of work ended. `text` says more than `results`, where these are an exception.
    pub(super) fn note(
        &self,
        state: &mut State,
        work: &Work,
        results: &[Value],
        text: Option<&str>,
        now: u64,
        run_ns: u64,
    ) {
        if !state.history.kept || !work.def.recorded {
            return;
        }
        let failure = results.first().and_then(|value| match value {
            Value::Inline(payload) if payload.is_error() => Some(payload.describe_error()),
            _ => None,
        });
        let (code, own) = match (&failure, text) {
            (Some((code, own)), _) => (*code, own.as_str()),
            (None, Some(_)) => (ErrorCode::Task as u8, ""),
            (None, None) => (0, ""),
        };
        let outcome = (code, text.unwrap_or(own));
        state.history.add(work.task, &work.def, work.kind, work.attempt, outcome, true, now, run_ns);
        if state.history.is_full() || state.history.is_pressing(code != 0, now) {
            self.send_history(state);
        }
    }

    /// The creation of the actor that this process is has ended.
    pub(super) fn note_creation(&self, outcome: u8, text: &str) {
        self.step(|state, now| {
            let State { executor, history, .. } = state;
            let Some((task, def, attempt, since)) = executor.end_creation() else { return };
            if history.kept && def.recorded {
                let run = now.saturating_sub(since);
                history.add(task, &def, WorkKind::CreateActor, attempt, (outcome, text), true, now, run);
            }
        });
    }

    pub(super) fn note_unrun(&self, state: &mut State, unrun: &skate_proto::describe::Unrun, now: u64) {
        if !state.history.kept {
            return;
        }
        let kind = if unrun.def.actor.is_some() { WorkKind::Call } else { WorkKind::Task };
        let run = if unrun.since_ns == 0 { 0 } else { now.saturating_sub(unrun.since_ns) };
        let outcome = (unrun.code, unrun.text.as_str());
        state.history.add(unrun.task, &unrun.def, kind, unrun.attempt, outcome, false, now, run);
        if state.history.is_full() {
            self.send_history(state);
        }
    }

    /// Sends what there is to the node.
    pub(super) fn send_history(&self, state: &mut State) {
        if state.history.records.is_empty() {
            return;
        }
        let Some(transport) = self.transport.get() else { return };
        if transport.backlog(self.node) > BACKLOG_BYTES_MAX {
            state.history.drop_batch();
            return;
        }
        let batch = state.history.take_batch();
        self.tell_node(node_wire::TASK_EVENTS, 0, &node_wire::task_events(&batch));
    }

    pub(super) fn flush_history(&self) {
        let mut state = self.state.lock();
        self.send_history(&mut state);
    }
}
