//! Which values leave memory when a node is short of it.
//!
//! The node decides when and how much ([`Owner::make_room`]); the owner decides which values, and the node writes them.
//! A value may be spilled when nobody can be reading it where it is:
//!
//! - no view of this process is on it, and no actor is to be made with it as an argument;
//! - no borrower knows the place. Who borrows is asked (`Evict`): it forgets the place, or says that it needs it. A worker
//!   that was sent tasks with the value as an argument is a borrower like any other, and asks again when they run. A
//!   process that learns of the place from a borrower was announced to the owner before that borrower answers, because
//!   links keep their order; so whoever is a borrower when the last answer comes is asked as well, and when none is
//!   left to ask, nobody knows. (A borrower that has never spoken to the owner cannot be asked, and counts as one that
//!   needs the place.)
//!
//! From the first question to the node's answer the value stays where it is, and any use of it (`Objects::read`,
//! `Objects::touch`) ends the attempt: what the node has written by then is given back. So nobody ever waits for a
//! spill, and nobody reads a block that was freed.
//!
//! Segments go back to the node only when they are empty. Therefore values are chosen by segment, those whose segment was
//! used least recently first, and segments in which something cannot move last.
//!
//! Invariants: a spill has a serial that no other spill of this process has; it is cancelled by whatever makes the
//! answer to it wrong.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::ids::{NodeKey, ObjectId, ProcId, SegmentId};
use crate::location::Location;
use crate::msg::Msg;
use crate::objects::Gone;
use crate::owner::{Effect, Out, Owner, ToNode};
use crate::tasks::Place;

/// A value on its way out of memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Spill {
    serial: u64,
    from: Location,
    /// Borrowers that have not answered.
    awaited: SmallVec<[ProcId; 2]>,
    /// Borrowers that were asked.
    asked: SmallVec<[ProcId; 2]>,
}

/// A block that its owner offers to the node for spilling.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    pub object: ObjectId,
    pub serial: u64,
    pub from: Location,
}

/// The node's answer to an [`Offered`]: where the value is on disk; `None` if it was not written.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    pub object: ObjectId,
    pub serial: u64,
    pub spill: Option<SegmentId>,
    pub len: u64,
}

impl Owner {
    /// A node is short of `bytes`: offers values that lie there, if there are any that nobody reads.
    pub fn make_room(&mut self, node: NodeKey, bytes: u64, out: &mut Out) {
        let pinned = self.needed_by_actors();
        let mut segments: BTreeMap<SegmentId, Shelf> = BTreeMap::new();
        for (object, location, used, is_busy) in self.objects.stored_at(node) {
            let shelf = segments.entry(location.segment).or_default();
            shelf.used = shelf.used.max(used);
            if is_busy || pinned.contains(&object) {
                shelf.has_pinned = true;
            } else {
                shelf.blocks.push((object, location));
            }
        }
        let mut shelves: Vec<Shelf> = segments.into_values().collect();
        shelves.sort_by_key(|shelf| (shelf.has_pinned, shelf.used));
        let mut chosen = Vec::new();
        let mut found = 0;
        for shelf in shelves {
            if found >= bytes {
                break;
            }
            found += shelf.blocks.iter().map(|(_, location)| location.len).sum::<u64>();
            chosen.extend(shelf.blocks);
        }
        self.begin_spills(chosen, out);
    }

    /// How many values are being spilled.
    #[must_use]
    pub fn spilling(&self) -> usize {
        self.objects.spilling().len()
    }

    fn begin_spills(&mut self, chosen: Vec<(ObjectId, Location)>, out: &mut Out) {
        let mut asked: BTreeMap<ProcId, Vec<ObjectId>> = BTreeMap::new();
        let mut ready = Vec::new();
        for (object, from) in chosen {
            self.spills_begun += 1;
            let borrowers: SmallVec<[ProcId; 2]> = self.objects.borrowers(object).into();
            for proc in &borrowers {
                asked.entry(*proc).or_default().push(object);
            }
            if borrowers.is_empty() {
                ready.push(Offered { object, serial: self.spills_begun, from });
            }
            let spill = Spill { serial: self.spills_begun, from, awaited: borrowers.clone(), asked: borrowers };
            self.objects.begin_spill(object, spill);
        }
        for (proc, objects) in asked {
            out.send(proc, Msg::Evict { objects });
        }
        self.offer(ready, out);
    }

    /// Hands blocks to the node on which they lie: one's own, or another through the process that allocated them.
    fn offer(&self, offered: Vec<Offered>, out: &mut Out) {
        let mut elsewhere: BTreeMap<ProcId, Vec<Offered>> = BTreeMap::new();
        let mut here = Vec::new();
        for each in offered {
            if each.from.node == self.node {
                here.push(each);
            } else {
                elsewhere.entry(each.from.lessee).or_default().push(each);
            }
        }
        if !here.is_empty() {
            out.node(ToNode::Spill { owner: self.me, offered: here });
        }
        for (lessee, offered) in elsewhere {
            out.send(lessee, Msg::Spill { offered });
        }
    }

    /// An owner wants places of its values forgotten. `forget` is told of each that is.
    pub fn handle_evict(
        &mut self,
        from: ProcId,
        objects: &[ObjectId],
        mut forget: impl FnMut(ObjectId),
        out: &mut Out,
    ) {
        // A task of this process may be sent, once or again, because its arguments are there.
        let mut pinned = self.needed_by_actors();
        let unfinished = self.tasks.values().filter(|entry| !matches!(entry.place, Place::Finished));
        pinned.extend(unfinished.flat_map(|entry| entry.deps.iter().map(|(_, id)| *id)));
        let mut gone = Gone::default();
        let (mut forgotten, mut kept) = (Vec::new(), Vec::new());
        for &object in objects.iter().filter(|object| object.owner() == from) {
            if self.objects.is_viewed(object) || pinned.contains(&object) {
                kept.push(object);
                continue;
            }
            forget(object);
            self.objects.forget_value(object, &mut gone, out);
            if self.objects.take_copied(object) {
                out.push(Effect::ReleaseCopies(object));
            }
            forgotten.push(object);
        }
        self.settle(gone, out);
        out.send(from, Msg::Evicted { forgotten, kept });
    }

    /// The answer; also the shell's, for a borrower that cannot be asked.
    pub fn handle_evicted(&mut self, from: ProcId, forgotten: &[ObjectId], kept: &[ObjectId], out: &mut Out) {
        for &object in kept {
            if self.objects.spill(object).is_some_and(|spill| spill.awaited.contains(&from)) {
                // It is in use, so that others are offered next time.
                self.objects.touch(object);
            }
        }
        self.answered(from, forgotten.to_vec(), out);
    }

    /// A process does not know the places of these objects any more.
    fn answered(&mut self, from: ProcId, objects: Vec<ObjectId>, out: &mut Out) {
        let mut asked: BTreeMap<ProcId, Vec<ObjectId>> = BTreeMap::new();
        let mut ready = Vec::new();
        for object in objects {
            let borrowers = self.objects.borrowers(object);
            let Some(spill) = self.objects.spill(object).filter(|spill| spill.awaited.contains(&from)) else {
                continue; // it was used meanwhile, or is freed
            };
            spill.awaited.retain(|proc| *proc != from);
            for proc in borrowers {
                if !spill.asked.contains(&proc) {
                    spill.asked.push(proc);
                    spill.awaited.push(proc);
                    asked.entry(proc).or_default().push(object);
                }
            }
            if spill.awaited.is_empty() {
                ready.push(Offered { object, serial: spill.serial, from: spill.from });
            }
        }
        for (proc, objects) in asked {
            out.send(proc, Msg::Evict { objects });
        }
        self.offer(ready, out);
    }

    /// What the node of a block made of an offer.
    pub fn handle_written(&mut self, node: NodeKey, written: Written, out: &mut Out) {
        let Written { object, serial, spill, len } = written;
        let is_wanted = self.objects.spill(object).is_some_and(|spill| spill.serial == serial && spill.from.len == len);
        if is_wanted {
            self.objects.end_spill(object);
        }
        let Some(spill) = spill else { return };
        let to = Location::spilled(node, spill, len);
        if !is_wanted {
            out.push(Effect::Free(to));
            return;
        }
        if let Some(from) = self.objects.relocate(object, to) {
            out.push(Effect::Free(from));
        }
        if self.objects.take_copied(object) {
            out.push(Effect::ReleaseCopies(object));
        }
    }

    /// A process has ended: it answers no question any more, and passes on no block.
    pub(crate) fn spills_without(&mut self, proc: ProcId, out: &mut Out) {
        let mut unasked = Vec::new();
        for object in self.objects.spilling() {
            let Some(spill) = self.objects.spill(object) else { continue };
            if spill.from.lessee == proc && spill.from.node != self.node {
                self.objects.end_spill(object);
            } else if spill.awaited.contains(&proc) {
                unasked.push(object);
            }
        }
        self.answered(proc, unasked, out);
    }

    /// Arguments of actors that may be made (again), whose places may be on their way through the control service.
    fn needed_by_actors(&self) -> BTreeSet<ObjectId> {
        self.creations.values().flat_map(|(_, entry)| entry.deps.iter().map(|(_, id)| *id)).collect()
    }
}

/// The blocks of one segment that this process owns.
#[derive(Default)]
struct Shelf {
    used: u64,
    has_pinned: bool,
    blocks: Vec<(ObjectId, Location)>,
}
