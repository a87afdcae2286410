//! The epoll instance and the eventfd that ends a wait in it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use super::fork::PrivateFd;

/// Descriptors reported by one wait. More are reported by the next.
const EVENTS_MAX: usize = 128;

/// What an event is about. The tag is in the upper bits of the epoll data.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Kick,
    /// Index and life of a slot: an event of a closed connection must not be taken for its successor's.
    Connection {
        index: u32,
        life: u32,
    },
    Listener(u32),
    Foreign(u32),
}

const LIFE_MASK: u32 = (1 << 30) - 1;

impl Source {
    pub(super) fn encode(self) -> u64 {
        let (tag, high, low) = match self {
            Self::Kick => (0u64, 0, 0),
            Self::Connection { index, life } => (1, life & LIFE_MASK, index),
            Self::Listener(index) => (2, 0, index),
            Self::Foreign(id) => (3, 0, id),
        };
        tag << 62 | u64::from(high) << 32 | u64::from(low)
    }

    pub(super) fn decode(data: u64) -> Self {
        let low = data as u32;
        match data >> 62 {
            0 => Self::Kick,
            1 => Self::Connection { index: low, life: (data >> 32) as u32 & LIFE_MASK },
            2 => Self::Listener(low),
            _ => Self::Foreign(low),
        }
    }
}

/// The next life of a slot.
pub(super) fn next_life(life: u32) -> u32 {
    (life + 1) & LIFE_MASK
}

pub(super) struct Poller {
    epoll: PrivateFd,
    kick: PrivateFd,
}

/// What one wait reported.
pub(super) type Events = Vec<(Source, EventFlags)>;

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = PrivateFd::new(epoll::create(CreateFlags::CLOEXEC)?);
        let kick = PrivateFd::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let new = Self { epoll, kick };
        // Edge-triggered, so that it need not be read: each write is a new edge.
        new.add(&new.kick, Source::Kick, EventFlags::IN | EventFlags::ET)?;
        Ok(new)
    }

    /// Makes the wait that is going on, or else the next one, return. An error means that the descriptor is not ours any more.
    pub(super) fn kick(&self) -> rustix::io::Result<()> {
        match rustix::io::write(&self.kick, &1u64.to_ne_bytes()) {
            // The counter would overflow, after 2^64 kicks: there is an edge already.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn add(&self, fd: impl AsFd, source: Source, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(source.encode()), flags)?)
    }

    pub(super) fn modify(&self, fd: impl AsFd, source: Source, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(source.encode()), flags)?)
    }

    pub(super) fn delete(&self, fd: impl AsFd) {
        // It may be gone already; what matters is that it is.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits until something is ready. A timeout is rounded up to the next millisecond.
    pub(super) fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> rustix::io::Result<()> {
        events.clear();
        let timeout = timeout.map(|t| {
            let ms = t.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i64;
            Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 }
        });
        let mut room = [const { MaybeUninit::<Event>::uninit() }; EVENTS_MAX];
        let (ready, _) = epoll::wait(&self.epoll, &mut room, timeout.as_ref())?;
        events.extend(ready.iter().map(|&Event { flags, data }| (Source::decode(data.u64()), flags)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_kernel() {
        for source in [
            Source::Kick,
            Source::Connection { index: u32::MAX, life: LIFE_MASK },
            Source::Connection { index: 0, life: 0 },
            Source::Listener(3),
            Source::Foreign(u32::MAX),
        ] {
            assert_eq!(Source::decode(source.encode()), source);
        }
    }
}
