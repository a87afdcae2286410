//! Whether it pays to look for a while before sleeping.
//!
//! To sleep and be woken takes 5 us where the waker is on the same processor, but 20 to 40 where an idle processor must
//! be woken, as in virtual machines; a synchronous call to a process that is awake comes back sooner. So a thread of the
//! user's looks for [`LOOK`] before it sleeps, while its waits are mostly shorter than that. A process that has nothing
//! to do, or waits for something long, does not look at all.
//!
//! It looks without yielding: on a busy processor `sched_yield` would give it away for a whole time slice, while a sleeper
//! that is woken goes first.

use std::time::Duration;

/// How long to look; a few round trips.
pub(super) const LOOK: Duration = Duration::from_micros(40);
/// A wait of this length might have been shorter than `LOOK`, without the time to wake up.
pub(super) const SHORT: Duration = Duration::from_micros(100);
const SCORE_MAX: i32 = 16;
/// What a look in vain costs, in waits that were short.
const COST: i32 = 4;

/// Each short wait counts one, each look in vain costs [`COST`]; above zero it pays to look.
#[derive(Debug, Default)]
pub(super) struct Eagerness {
    score: i32,
}

impl Eagerness {
    pub(super) fn is_high(&self) -> bool {
        self.score > 0
    }

    /// A wait was short, whether or not one looked.
    pub(super) fn paid(&mut self) {
        self.score = (self.score + 1).min(SCORE_MAX);
    }

    pub(super) fn failed(&mut self) {
        self.score = (self.score - COST).max(-SCORE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_long_stops_looking_and_who_waits_shortly_begins_again() {
        let mut eagerness = Eagerness::default();
        assert!(!eagerness.is_high());
        (0..100).for_each(|_| eagerness.paid());
        assert!(eagerness.is_high());

        let mut vain = 0;
        while eagerness.is_high() {
            eagerness.failed();
            vain += 1;
        }
        assert!(vain <= SCORE_MAX / COST);
        (0..100).for_each(|_| eagerness.failed());
        let needed = (0..100)
            .take_while(|_| {
                eagerness.paid();
                !eagerness.is_high()
            })
            .count();
        assert!(needed <= SCORE_MAX as usize);
    }
}
