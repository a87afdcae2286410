//! The reference protocol: who keeps which object alive.
//!
//! Each object has one owner, the process named in its id. Every other process that holds it is a
//! *borrower*. A reference never travels alone: it sits in a message, and the sender *hands it over*,
//! which costs the owner's books one *token* for the receiver:
//!
//! - the sender is the owner: it writes the token down and sends the message;
//! - the receiver is the owner: nothing to write, its own count goes up on arrival, before the sender's
//!   `Release`, which travels behind on the same connection;
//! - neither: the sender tells the owner (`AddBorrower`) and sends the message without delay. Should the
//!   receiver give the token back before the owner has heard of it, its balance is minus one for a
//!   moment; the object is safe, because the sender's own `Release` travels behind its `AddBorrower`.
//!
//! A receiver adds up its tokens and gives all of them back when its last local count goes. So at each
//! moment an object that anyone can reach is counted at its owner, or held by a process that is.
//! (Weighted counting, Bevan 1987, would save the third case's message, but could not tell the owner
//! who died.)
//!
//! Local counts are taken by Python references, by payloads that contain the reference, by arguments
//! of unfinished tasks, and by live views on shared memory: one protocol, no second way to pin.
//!
//! Invariants: an entry exists exactly while something counts it; the references inside a value are
//! counted while the value is kept; a freed block is freed once; views are counts, too, and not more than these.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use smallvec::SmallVec;

use crate::ids::{NodeKey, ObjectId, ProcId, SegmentId, TaskId};
use crate::location::Location;
use crate::msg::Msg;
use crate::owner::{Effect, Out};
use crate::payload::{ErrorCode, Payload, Value};
use crate::spilling::Spill;

/// A local party that waits for objects; numbered by the shell.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaiterId(pub u64);

#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub(crate) value: Option<Value>,
    pub(crate) local: u32,
    /// How many of `local` are views on memory that the value, or a copy of it, lies in.
    views: u32,
    /// When it was last used, counted in uses of any object.
    used: u64,
    /// Owner: its value is about to leave memory; see `spilling`.
    spill: Option<Box<Spill>>,
    /// Owner: tokens out, by process. A balance may be negative for a moment.
    pub(crate) borrowers: SmallVec<[(ProcId, i32); 1]>,
    /// Borrower: tokens to give back.
    tokens: u32,
    waiters: SmallVec<[WaiterId; 1]>,
    /// Owner: processes that want the value when it is there.
    resolvers: SmallVec<[ProcId; 1]>,
    /// Unfinished tasks of this process that have it as an argument.
    pub(crate) dependents: SmallVec<[TaskId; 1]>,
    resolving: bool,
    /// Owner: somebody has looked at the value.
    read: bool,
    /// Owner: the task that can make it again.
    pub(crate) lineage: Option<TaskId>,
    /// The shell holds copies of values of this object that lie on other nodes.
    copied: bool,
}

#[derive(Debug)]
pub struct Objects {
    me: ProcId,
    entries: HashMap<ObjectId, Entry, foldhash::fast::RandomState>,
    /// Processes that have ended; their numbers are never used again. Who is told of an older death than
    /// these by a late message asks the node about that process, and hears of its end once more.
    dead: HashMap<ProcId, Box<str>, foldhash::fast::RandomState>,
    dead_order: VecDeque<ProcId>,
    /// Results that were read before they were there, and dropped: should they be failures, somebody who waited for
    /// several has had another one. As many as there are unfinished tasks at most.
    awaited: HashSet<ObjectId, foldhash::fast::RandomState>,
    uses: u64,
    /// Those with a [`Spill`].
    spilling: BTreeSet<ObjectId>,
}

/// As many as the node remembers.
pub const DEATHS_REMEMBERED: usize = 10_000;
/// Of a cause of death this much is kept: what happened, without the log lines that follow it.
const CAUSE_BYTES_MAX: usize = 400;

/// What became of an entry, for the machines that hold more about it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Gone {
    pub(crate) lineage: Vec<TaskId>,
    pub(crate) actors: Vec<ObjectId>,
}

impl Objects {
    #[must_use]
    pub fn new(me: ProcId) -> Self {
        Self {
            me,
            entries: HashMap::default(),
            dead: HashMap::default(),
            dead_order: VecDeque::new(),
            awaited: HashSet::default(),
            uses: 0,
            spilling: BTreeSet::new(),
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many owned objects are known; the look at all of them is for rare questions.
    #[must_use]
    pub fn owned(&self) -> usize {
        self.entries.keys().filter(|id| id.owner() == self.me).count()
    }

    /// Whether other processes refer to an object of this one; also for rare questions.
    #[must_use]
    pub fn is_lender(&self) -> bool {
        self.entries.iter().any(|(id, entry)| id.owner() == self.me && !entry.borrowers.is_empty())
    }

    #[must_use]
    pub fn is_dead(&self, proc: ProcId) -> bool {
        self.dead.contains_key(&proc)
    }

    #[must_use]
    pub fn deaths(&self) -> usize {
        self.dead.len()
    }

    #[must_use]
    pub fn is_owned(&self, id: ObjectId) -> bool {
        id.owner() == self.me
    }

    #[must_use]
    pub fn value(&self, id: ObjectId) -> Option<&Value> {
        self.entries.get(&id)?.value.as_ref()
    }

    /// The same for who uses it: should it be an exception, it has not gone unnoticed.
    pub fn read(&mut self, id: ObjectId) -> Option<&Value> {
        self.uses += 1;
        let entry = self.entries.get_mut(&id)?;
        entry.read = true;
        entry.used = self.uses;
        if entry.spill.take().is_some() {
            self.spilling.remove(&id);
        }
        entry.value.as_ref()
    }

    /// The value is about to be used where it is: it is not spilled now.
    pub(crate) fn touch(&mut self, id: ObjectId) {
        self.uses += 1;
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.used = self.uses;
        if entry.spill.take().is_some() {
            self.spilling.remove(&id);
        }
    }

    #[must_use]
    pub fn is_ready(&self, id: ObjectId) -> bool {
        self.value(id).is_some()
    }

    /// Position of the first whose value is there and is an exception.
    #[must_use]
    pub fn first_failed(&self, ids: &[ObjectId]) -> Option<usize> {
        ids.iter().position(|id| self.value(*id).is_some_and(Value::is_error))
    }

    #[must_use]
    pub fn is_known(&self, id: ObjectId) -> bool {
        self.entries.contains_key(&id)
    }

    /// Everything that is known, to be looked at.
    pub(crate) fn entries(&self) -> &HashMap<ObjectId, Entry, foldhash::fast::RandomState> {
        &self.entries
    }

    pub(crate) fn entry(&mut self, id: ObjectId) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    /// A new owned object with one local count.
    pub(crate) fn create(&mut self, id: ObjectId, value: Option<Value>, lineage: Option<TaskId>) {
        debug_assert!(self.is_owned(id));
        let entry = Entry { value, local: 1, lineage, ..Entry::default() };
        let before = self.entries.insert(id, entry);
        assert!(before.is_none(), "object {id} was created twice");
    }

    /// One more local count. An unknown id becomes a borrowed entry without tokens: its owner may
    /// not know of it, and its value comes from asking.
    pub fn retain(&mut self, id: ObjectId) {
        self.entries.entry(id).or_default().local += 1;
    }

    /// One more local count, of a view: as long as it lives, the value is not spilled, nor a copy let go of.
    pub fn retain_view(&mut self, id: ObjectId) {
        let entry = self.entries.entry(id).or_default();
        entry.local += 1;
        entry.views += 1;
    }

    /// Before the count of a view is released.
    pub fn end_view(&mut self, id: ObjectId) {
        // The entry of a dead owner may have been swept already.
        if let Some(entry) = self.entries.get_mut(&id) {
            assert!(entry.views > 0, "a view on object {id} ended more often than it began");
            entry.views -= 1;
        }
    }

    #[must_use]
    pub fn is_viewed(&self, id: ObjectId) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.views > 0)
    }

    /// The shell took a copy of a value that lies on another node, and holds it until [`Effect::ReleaseCopies`]: as
    /// long as anything counts the object, also when the value that was copied is lost, because views on the copy are
    /// counts like any other. False if nothing counts the object; then the copy is not held.
    #[must_use]
    pub fn mark_copied(&mut self, id: ObjectId) -> bool {
        self.entries.get_mut(&id).map(|entry| entry.copied = true).is_some()
    }

    /// The shell has let go of the copies.
    pub fn unmark_copied(&mut self, id: ObjectId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.copied = false;
        }
    }

    /// A token that this process takes for itself.
    pub(crate) fn adopt_token(&mut self, id: ObjectId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.tokens += 1;
        }
    }

    /// References that arrived in a message: one local count each, and a token unless they are ours.
    pub fn arrive(&mut self, refs: &[ObjectId]) {
        for &id in refs {
            let token = u32::from(!self.is_owned(id));
            let entry = self.entries.entry(id).or_default();
            entry.local += 1;
            entry.tokens += token;
        }
    }

    /// Before `refs` are sent to `to`.
    pub fn hand_over(&mut self, refs: &[ObjectId], to: ProcId, out: &mut Out) {
        for &id in refs {
            if id.owner() == to || to == self.me || self.dead.contains_key(&to) || self.dead.contains_key(&id.owner()) {
                continue;
            }
            if self.is_owned(id) {
                let entry = self.entries.entry(id).or_default();
                add(&mut entry.borrowers, to, 1);
            } else {
                out.send(id.owner(), Msg::AddBorrower { object: id, proc: to });
            }
        }
    }

    pub(crate) fn handle_add_borrower(&mut self, id: ObjectId, proc: ProcId, gone: &mut Gone, out: &mut Out) {
        if proc == self.me || self.dead.contains_key(&proc) {
            return;
        }
        // An object that is not known any more was freed after a death took the sender's tokens.
        if let Some(entry) = self.entries.get_mut(&id) {
            add(&mut entry.borrowers, proc, 1);
            self.sweep(id, gone, out);
        }
    }

    pub(crate) fn handle_release(&mut self, from: ProcId, id: ObjectId, tokens: u32, gone: &mut Gone, out: &mut Out) {
        // What a process gives back after its end was heard of (its connection came late) is void already, and
        // its negative balance would keep the object for ever.
        if self.dead.contains_key(&from) {
            return;
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        add(&mut entry.borrowers, from, -i32::try_from(tokens).unwrap_or(i32::MAX));
        self.sweep(id, gone, out);
    }

    /// One local count less.
    pub(crate) fn release(&mut self, id: ObjectId, gone: &mut Gone, out: &mut Out) {
        // The entry of a dead owner may have been swept already.
        let Some(entry) = self.entries.get_mut(&id) else { return };
        assert!(entry.local > 0, "object {id} was released more often than retained");
        entry.local -= 1;
        if entry.local == 0 {
            self.sweep(id, gone, out);
        }
    }

    /// Removes an entry that nothing counts, and whatever only it kept alive.
    fn sweep(&mut self, id: ObjectId, gone: &mut Gone, out: &mut Out) {
        // A worklist, because values may nest deeply.
        let mut work: SmallVec<[ObjectId; 4]> = SmallVec::new();
        work.push(id);
        while let Some(id) = work.pop() {
            let Some(entry) = self.entries.get(&id) else { continue };
            if entry.local > 0 || !entry.borrowers.is_empty() {
                continue;
            }
            let Some(entry) = self.entries.remove(&id) else {
                continue;
            };
            if entry.spill.is_some() {
                self.spilling.remove(&id);
            }
            if entry.tokens > 0 {
                out.send(id.owner(), Msg::Release { object: id, tokens: entry.tokens });
            }
            if id.index == ObjectId::ACTOR_INDEX {
                gone.actors.push(id);
            }
            gone.lineage.extend(entry.lineage);
            if entry.copied {
                out.push(Effect::ReleaseCopies(id));
            }
            if entry.read && entry.value.is_none() && id.owner() == self.me {
                self.awaited.insert(id);
            }
            if let Some(value) = entry.value {
                match &value {
                    Value::Stored { location, .. } if id.owner() == self.me => out.push(Effect::Free(*location)),
                    Value::Inline(payload) if id.owner() == self.me && !entry.read && payload.is_failure() => {
                        out.push(Effect::Unread(payload.clone()));
                    }
                    _ => {}
                }
                for &inner in value.refs() {
                    if let Some(inner_entry) = self.entries.get_mut(&inner) {
                        inner_entry.local -= 1;
                        if inner_entry.local == 0 {
                            work.push(inner);
                        }
                    }
                }
            }
        }
    }

    /// Drops a value that has no entry to live in: its references and its block.
    pub(crate) fn discard(&mut self, value: &Value, gone: &mut Gone, out: &mut Out) {
        for &inner in value.refs() {
            self.release(inner, gone, out);
        }
        if let Value::Stored { location, .. } = value {
            out.push(Effect::Free(*location));
        }
    }

    /// The value of an owned object is there (its references were counted by `arrive` or by the
    /// caller). Returns the tasks that waited for it.
    pub(crate) fn fulfil(
        &mut self,
        id: ObjectId,
        value: Value,
        gone: &mut Gone,
        out: &mut Out,
    ) -> SmallVec<[TaskId; 1]> {
        let owned = self.is_owned(id);
        let Some(entry) = self.entries.get_mut(&id) else {
            if owned {
                let awaited = self.awaited.remove(&id);
                if let Value::Inline(payload) = &value
                    && payload.is_failure()
                    && !awaited
                {
                    out.push(Effect::Unread(payload.clone()));
                }
                self.discard(&value, gone, out);
            } else {
                for &inner in value.refs() {
                    self.release(inner, gone, out);
                }
            }
            return SmallVec::new();
        };
        if entry.value.is_some() {
            // Made twice, by a retry after a partial loss: the first stays.
            if owned {
                self.discard(&value, gone, out);
            } else {
                for &inner in value.refs() {
                    self.release(inner, gone, out);
                }
            }
            return SmallVec::new();
        }
        let failed = value.is_error();
        entry.value = Some(value);
        entry.resolving = false;
        for waiter in entry.waiters.drain(..) {
            out.push(Effect::Notify { waiter, failed });
        }
        let dependents = std::mem::take(&mut entry.dependents);
        let resolvers = std::mem::take(&mut entry.resolvers);
        for to in resolvers {
            self.send_value(id, to, out);
        }
        dependents
    }

    /// The value of an owned object was lost; readers wait again.
    pub(crate) fn forget_value(&mut self, id: ObjectId, gone: &mut Gone, out: &mut Out) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.spill.take().is_some() {
            self.spilling.remove(&id);
        }
        if let Some(value) = entry.value.take() {
            for &inner in value.refs() {
                self.release(inner, gone, out);
            }
        }
    }

    /// Gives an object whose owner has ended, and which came here since, its last value.
    pub(crate) fn doom(&mut self, id: ObjectId) {
        let Some(cause) = self.dead.get(&id.owner()) else {
            return;
        };
        let error = owner_died(id, cause);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.value.get_or_insert(error);
        }
    }

    /// Adds a waiter; true if the value is there already (then nothing was added).
    pub fn watch(&mut self, id: ObjectId, waiter: WaiterId, out: &mut Out) -> bool {
        let owned = self.is_owned(id);
        self.doom(id);
        let entry = self.entries.entry(id).or_default();
        if entry.value.is_some() {
            return true;
        }
        entry.waiters.push(waiter);
        if !owned {
            self.resolve(id, out);
        }
        false
    }

    pub fn unwatch(&mut self, id: ObjectId, waiter: WaiterId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.waiters.retain(|w| *w != waiter);
        }
    }

    /// Asks the owner for a borrowed object's value, once.
    pub(crate) fn resolve(&mut self, id: ObjectId, out: &mut Out) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.value.is_none() && !entry.resolving {
            entry.resolving = true;
            out.send(id.owner(), Msg::Resolve { object: id });
        }
    }

    pub(crate) fn handle_resolve(&mut self, from: ProcId, id: ObjectId, out: &mut Out) {
        match self.entries.get_mut(&id) {
            Some(entry) if entry.value.is_some() => self.send_value(id, from, out),
            Some(entry) => {
                if !entry.resolvers.contains(&from) {
                    entry.resolvers.push(from);
                }
            }
            None => {
                let text = format!(
                    "Object {id} is not known to its owner any more: every reference that the owner knew of was \
                     dropped. Keep the ObjectRef, or pass it inside task arguments or other objects rather than as bytes."
                );
                let value = Value::Inline(Payload::error(ErrorCode::ObjectLost, &text));
                out.send(from, Msg::Resolved { object: id, value });
            }
        }
    }

    fn send_value(&mut self, id: ObjectId, to: ProcId, out: &mut Out) {
        let Some(value) = self.read(id).cloned() else { return };
        self.hand_over(value.refs(), to, out);
        out.send(to, Msg::Resolved { object: id, value });
    }

    /// A process is gone: its tokens are void, what it owned will not come.
    ///
    /// Returns borrowed objects that will never have a value.
    pub(crate) fn handle_process_gone(
        &mut self,
        proc: ProcId,
        cause: &str,
        gone: &mut Gone,
        out: &mut Out,
    ) -> Vec<ObjectId> {
        let mut end = cause.len().min(CAUSE_BYTES_MAX);
        while !cause.is_char_boundary(end) {
            end -= 1;
        }
        if self.dead.insert(proc, cause[..end].into()).is_none() {
            self.dead_order.push_back(proc);
        }
        while self.dead_order.len() > DEATHS_REMEMBERED {
            if let Some(oldest) = self.dead_order.pop_front() {
                self.dead.remove(&oldest);
            }
        }
        let mut swept = Vec::new();
        let mut orphans = Vec::new();
        #[expect(clippy::iter_over_hash_type, reason = "what is collected is sorted below")]
        for (&id, entry) in &mut self.entries {
            let before = entry.borrowers.len();
            entry.borrowers.retain(|(p, _)| *p != proc);
            entry.resolvers.retain(|p| *p != proc);
            if entry.borrowers.len() != before && entry.borrowers.is_empty() && entry.local == 0 {
                swept.push(id);
            }
            if id.owner() == proc {
                entry.tokens = 0;
                if entry.value.is_none() {
                    orphans.push(id);
                }
            }
        }
        swept.sort_unstable();
        orphans.sort_unstable();
        for id in swept {
            self.sweep(id, gone, out);
        }
        orphans
    }

    /// Blocks of a segment that owned values occupy.
    #[must_use]
    pub fn blocks_in(&self, node: NodeKey, segment: SegmentId) -> Vec<(u64, u64)> {
        let mut blocks: Vec<_> = self
            .entries
            .iter()
            .filter(|(id, _)| id.owner() == self.me)
            .filter_map(|(_, entry)| match &entry.value {
                Some(Value::Stored { location, .. }) if location.node == node && location.segment == segment => {
                    Some((location.offset, location.len))
                }
                _ => None,
            })
            .collect();
        blocks.sort_unstable();
        blocks
    }

    #[must_use]
    pub fn location(&self, id: ObjectId) -> Option<Location> {
        match self.value(id)? {
            Value::Stored { location, .. } => Some(*location),
            Value::Inline(_) => None,
        }
    }

    /// What keeps the first objects alive, a line for each; for reports of leaks.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let mut ids: Vec<&ObjectId> = self.entries.keys().collect();
        ids.sort_unstable();
        let line = |id: &ObjectId| {
            let entry = &self.entries[id];
            let borrowers: Vec<_> =
                entry.borrowers.iter().map(|(p, n)| (format!("{:x}", p.0), *n, self.dead.contains_key(p))).collect();
            format!(
                "{id}: local {}, borrowers (process, tokens, dead) {borrowers:?}, value {:?}, lineage {:?}",
                entry.local,
                entry.value,
                entry.lineage.map(|t| t.seq)
            )
        };
        ids.into_iter().take(20).map(line).collect()
    }

    /// Counts of an entry, for tests and explanations: (local, tokens out, tokens in).
    #[must_use]
    pub fn counts(&self, id: ObjectId) -> Option<(u32, i32, u32)> {
        let entry = self.entries.get(&id)?;
        Some((entry.local, entry.borrowers.iter().map(|(_, n)| n).sum(), entry.tokens))
    }
}

/// What `spilling` asks of the entries, and does to them.
impl Objects {
    /// Owned values in memory of a node that nothing views and that are not being spilled: object, place, last use.
    pub(crate) fn stored_at(&self, node: NodeKey) -> Vec<(ObjectId, Location, u64, bool)> {
        let mut stored: Vec<_> = self
            .entries
            .iter()
            .filter(|(id, _)| id.owner() == self.me)
            .filter_map(|(id, entry)| match &entry.value {
                Some(Value::Stored { location, .. }) if location.node == node && !location.is_spilled() => {
                    Some((*id, *location, entry.used, entry.views > 0 || entry.spill.is_some()))
                }
                _ => None,
            })
            .collect();
        stored.sort_unstable_by_key(|(id, ..)| *id);
        stored
    }

    /// Processes that may know where the value is.
    pub(crate) fn borrowers(&self, id: ObjectId) -> Vec<ProcId> {
        self.entries.get(&id).map_or_else(Vec::new, |entry| entry.borrowers.iter().map(|(proc, _)| *proc).collect())
    }

    pub(crate) fn begin_spill(&mut self, id: ObjectId, spill: Spill) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.spill = Some(Box::new(spill));
            self.spilling.insert(id);
        }
    }

    pub(crate) fn spill(&mut self, id: ObjectId) -> Option<&mut Spill> {
        self.entries.get_mut(&id)?.spill.as_deref_mut()
    }

    pub(crate) fn end_spill(&mut self, id: ObjectId) -> Option<Spill> {
        let spill = self.entries.get_mut(&id)?.spill.take()?;
        self.spilling.remove(&id);
        Some(*spill)
    }

    /// Objects that are being spilled.
    pub(crate) fn spilling(&self) -> Vec<ObjectId> {
        self.spilling.iter().copied().collect()
    }

    /// The value lies elsewhere from now on. Returns where it lay.
    pub(crate) fn relocate(&mut self, id: ObjectId, to: Location) -> Option<Location> {
        match self.entries.get_mut(&id)?.value.as_mut()? {
            Value::Stored { location, .. } => Some(std::mem::replace(location, to)),
            Value::Inline(_) => None,
        }
    }

    /// Whether the shell holds copies of the object; it does not any more.
    pub(crate) fn take_copied(&mut self, id: ObjectId) -> bool {
        self.entries.get_mut(&id).is_some_and(|entry| std::mem::take(&mut entry.copied))
    }
}

/// What readers get of an object whose owner ended before the value was known here.
pub(crate) fn owner_died(id: ObjectId, cause: &str) -> Value {
    let text = format!(
        "Object {id} will never have a value here: the process that owned it has ended ({cause}). Create the object in a \
         process that outlives its readers, such as the driver or a detached actor."
    );
    Value::Inline(Payload::error(ErrorCode::OwnerDied, &text))
}

fn add(borrowers: &mut SmallVec<[(ProcId, i32); 1]>, proc: ProcId, tokens: i32) {
    if let Some(at) = borrowers.iter().position(|(p, _)| *p == proc) {
        borrowers[at].1 = borrowers[at].1.saturating_add(tokens);
        if borrowers[at].1 == 0 {
            borrowers.swap_remove(at);
        }
    } else {
        borrowers.push((proc, tokens));
    }
}
