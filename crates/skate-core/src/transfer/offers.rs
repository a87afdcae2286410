//! The segments that may be sent, and how much of each is there.
//!
//! A segment that is being pulled grows: its bytes are there from its start up to `filled`. A range that is asked for
//! beyond that is *parked* with its connection, and goes on as soon as bytes arrive; so no thread waits for another
//! node's progress, and pulls that feed each other across nodes cannot use up the threads that all of them need.
//!
//! Invariants: `filled` never decreases and is at most `size`; nothing is parked in a segment that was withdrawn, nor
//! in a part that is there.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use skate_proto::ids::SegmentId;

use super::server::Job;

pub(super) struct Offer {
    pub(super) fd: OwnedFd,
    /// How much there will be, and may be asked for.
    size: AtomicU64,
    filled: AtomicU64,
    withdrawn: AtomicBool,
    /// Ranges that were begun, and that their receivers have not said to have taken. Counts for ever a range whose
    /// connection was closed from here: the receiver may read what lies in its socket at any time.
    under_way: AtomicUsize,
    /// Its lock also guards the decision to park, so that no bytes arrive in between unnoticed.
    parked: Mutex<Vec<Job>>,
}

impl Offer {
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn filled(&self) -> u64 {
        self.filled.load(Ordering::Acquire)
    }

    pub(super) fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::Acquire)
    }

    /// Lets a job wait for the byte at `at`; the job comes back if that is there, or will never be.
    pub(super) fn park(&self, job: Job, at: u64) -> Option<Job> {
        let mut parked = self.parked.lock();
        if self.filled() > at || self.is_withdrawn() {
            return Some(job);
        }
        parked.push(job);
        None
    }

    /// Bytes up to `to` are there. Returns the jobs that can go on.
    #[must_use]
    pub(super) fn advance(&self, to: u64) -> Vec<Job> {
        debug_assert!(to <= self.size());
        let mut parked = self.parked.lock();
        self.filled.fetch_max(to, Ordering::AcqRel);
        parked.extract_if(.., |job| job.next_byte() < to).collect()
    }
}

/// A range of a segment that was begun to be sent: its memory may be in a socket.
pub(super) struct UnderWay(Arc<Offer>);

impl UnderWay {
    /// `None` if the segment was withdrawn meanwhile. Under the lock, so that a withdrawal either sees it or is seen.
    pub(super) fn new(offer: &Arc<Offer>) -> Option<Self> {
        let parked = offer.parked.lock();
        if offer.is_withdrawn() {
            return None;
        }
        offer.under_way.fetch_add(1, Ordering::AcqRel);
        drop(parked);
        Some(Self(Arc::clone(offer)))
    }
}

impl UnderWay {
    /// The receiver has read everything, or has closed its socket and reads nothing more.
    pub(super) fn taken(self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Default)]
pub(super) struct Offers {
    segments: Mutex<HashMap<SegmentId, Arc<Offer>, RandomState>>,
}

impl Offers {
    /// Offers the first `filled` bytes of a segment of `size` bytes. An offer that was there before is withdrawn.
    pub(super) fn offer(&self, segment: SegmentId, fd: OwnedFd, size: u64, filled: u64) -> Arc<Offer> {
        let offer = Arc::new(Offer {
            fd,
            size: AtomicU64::new(size),
            filled: AtomicU64::new(filled),
            withdrawn: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            parked: Mutex::default(),
        });
        let before = self.segments.lock().insert(segment, Arc::clone(&offer));
        if let Some(before) = before {
            retract(&before);
        }
        offer
    }

    /// The offer of a segment that is about to be filled from `start` to `end`: the one that is there, with those who
    /// wait for its first byte already, or a new one.
    pub(super) fn grow(&self, segment: SegmentId, fd: OwnedFd, start: u64, end: u64) -> Arc<Offer> {
        if let Some(offer) = self.get(segment)
            && offer.filled() == start
            && end <= offer.size()
        {
            offer.size.store(end, Ordering::Release);
            return offer;
        }
        self.offer(segment, fd, end, start)
    }

    pub(super) fn withdraw(&self, segment: SegmentId) -> bool {
        let offer = self.segments.lock().remove(&segment);
        offer.is_none_or(|offer| retract(&offer))
    }

    pub(super) fn get(&self, segment: SegmentId) -> Option<Arc<Offer>> {
        self.segments.lock().get(&segment).cloned()
    }
}

/// Whether nothing of it is on its way. Parked ranges have not been begun to their end: their connections close.
fn retract(offer: &Offer) -> bool {
    let parked = {
        let mut parked = offer.parked.lock();
        offer.withdrawn.store(true, Ordering::Release);
        std::mem::take(&mut *parked)
    };
    drop(parked);
    offer.under_way.load(Ordering::Acquire) == 0
}
