//! The thread that passes on the bytes of all pairs, and says to strangers that they are refused.
//!
//! Invariants: a place in `places` is not used anew before the events of one wait are through, so that none is taken for
//! a successor's; `State::pairs` is the number of pairs that were ordered and not closed.

use std::collections::VecDeque;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use skate_proto::handshake::HandshakeError;

use super::pair::{BUFFER_BYTES, End, Pair, Turn};
use super::{Order, Shared, refusal};
use crate::transport::fork::PrivateFd;
use crate::transport::{Called, Stranger};

/// Descriptors reported by one wait. More are reported by the next.
const EVENTS_MAX: usize = 128;
/// Strangers that are being refused at a time; of more the oldest is closed before it may have heard why.
const REFUSED_MAX: usize = 256;
/// For so long a refused stranger may take to hang up. Until then what it sent is read and dropped: closing with unread
/// bytes could take the refusal back.
const REFUSED_S_MAX: Duration = Duration::from_secs(2);
/// Epoll data of the descriptor that ends the wait; others are a place and a side. Refused strangers are in no place.
const KICK: u64 = u64::MAX;

pub(super) struct Pairs {
    shared: Arc<Shared>,
    epoll: PrivateFd,
    places: Vec<Option<Pair>>,
    vacant: Vec<usize>,
    /// Vacated while the events of one wait are handled.
    vacated: Vec<usize>,
    /// Pairs whose turn was over before they were.
    unfinished: VecDeque<(usize, u64)>,
    /// Pairs of which one end has ended, and when they are looked at again.
    half_open: VecDeque<(Instant, usize, u64)>,
    refused: VecDeque<(Instant, PrivateFd)>,
    serial: u64,
    buffer: Vec<u8>,
}

impl Pairs {
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let epoll = PrivateFd::new(epoll::create(CreateFlags::CLOEXEC)?);
        epoll::add(&epoll, &shared.kick, EventData::new_u64(KICK), EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            shared,
            epoll,
            places: Vec::new(),
            vacant: Vec::new(),
            vacated: Vec::new(),
            unfinished: VecDeque::new(),
            half_open: VecDeque::new(),
            refused: VecDeque::new(),
            serial: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        while let Some(deadline) = self.obey() {
            if self.wait(&mut events, deadline).is_err() {
                break; // the program has closed our descriptors: there is nothing left to pass on
            }
            for &(data, flags) in &events {
                if data != KICK {
                    let (place, side) = ((data >> 1) as usize, (data & 1) as usize);
                    if let Some(Some(pair)) = self.places.get_mut(place) {
                        pair.note(side, flags);
                        self.turn(place);
                    }
                }
            }
            for _ in 0..self.unfinished.len() {
                let Some((place, serial)) = self.unfinished.pop_front() else { break };
                if self.is_there(place, serial) {
                    self.turn(place);
                }
            }
            self.vacant.append(&mut self.vacated);
        }
        self.shared.state.lock().pairs = 0;
    }

    /// Does what was ordered. The time of the next thing to do by the clock, if there is one; `None` at the end.
    fn obey(&mut self) -> Option<Option<Instant>> {
        let now = Instant::now();
        let (orders, ticket) = {
            let mut state = self.shared.state.lock();
            if state.closing {
                return None;
            }
            let next = state.expire(now);
            (mem::take(&mut state.orders), next)
        };
        for order in orders {
            match order {
                Order::Join(stranger, called) => self.join(stranger, called),
                Order::Refuse(stranger, why) => self.refuse(stranger, &why, now),
            }
        }
        self.close_half_open(now);
        self.hang_up(now);
        let half_open = self.half_open.front().map(|(at, ..)| *at);
        let refused = self.refused.front().map(|(at, _)| *at);
        Some([ticket, half_open, refused].into_iter().flatten().min())
    }

    fn wait(&self, events: &mut Vec<(u64, EventFlags)>, deadline: Option<Instant>) -> rustix::io::Result<()> {
        events.clear();
        let left = match deadline {
            _ if !self.unfinished.is_empty() => Some(Duration::ZERO),
            Some(at) => Some(at.saturating_duration_since(Instant::now())),
            None => None,
        };
        let timeout = left.map(|left| {
            let ms = left.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i64;
            Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 }
        });
        let mut room = [const { MaybeUninit::<Event>::uninit() }; EVENTS_MAX];
        match epoll::wait(&self.epoll, &mut room, timeout.as_ref()) {
            Ok((ready, _)) => events.extend(ready.iter().map(|&Event { flags, data }| (data.u64(), flags))),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    // ---- pairs

    fn join(&mut self, stranger: Stranger, called: Called) {
        let Stranger { preface, socket } = stranger;
        self.serial += 1;
        let ends = [End::new(socket, Vec::new()), End::new(called.socket, preface.to_vec())];
        let pair = Pair::new(ends, self.serial);
        let place = self.vacant.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        for (side, socket) in pair.sockets().into_iter().enumerate() {
            let data = EventData::new_u64((place as u64) << 1 | side as u64);
            if epoll::add(&self.epoll, socket, data, flags).is_err() {
                // No memory is left for it, or a limit of the system was reached: both sides see an end.
                self.vacant.push(place);
                self.shared.state.lock().pairs -= 1;
                return;
            }
        }
        self.places[place] = Some(pair);
        self.turn(place);
    }

    fn turn(&mut self, place: usize) {
        let Some(pair) = &mut self.places[place] else {
            return;
        };
        let (turn, passed) = pair.turn(&mut self.buffer);
        self.shared.bytes.fetch_add(passed as u64, Ordering::Relaxed);
        match turn {
            Turn::Over => return self.close(place),
            Turn::Unfinished if !self.unfinished.contains(&(place, pair.serial)) => {
                self.unfinished.push_back((place, pair.serial));
            }
            Turn::Unfinished | Turn::Waits => {}
        }
        if pair.is_half_open() && !pair.is_watched {
            let until = Instant::now() + self.shared.limits.half_open;
            (pair.is_watched, pair.moved) = (true, false);
            self.half_open.push_back((until, place, pair.serial));
        }
    }

    fn close(&mut self, place: usize) {
        if self.places[place].take().is_some() {
            self.vacated.push(place);
            self.shared.state.lock().pairs -= 1;
        }
    }

    fn is_there(&self, place: usize, serial: u64) -> bool {
        matches!(&self.places[place], Some(pair) if pair.serial == serial)
    }

    fn close_half_open(&mut self, now: Instant) {
        while let Some(&(at, place, serial)) = self.half_open.front()
            && (at <= now || !self.is_there(place, serial))
        {
            self.half_open.pop_front();
            let Some(pair) = self.places[place].as_mut().filter(|pair| pair.serial == serial) else {
                continue;
            };
            if mem::take(&mut pair.moved) {
                self.half_open.push_back((now + self.shared.limits.half_open, place, serial));
            } else {
                self.close(place);
            }
        }
    }

    // ---- refusals

    fn refuse(&mut self, stranger: Stranger, why: &HandshakeError, now: Instant) {
        let socket = stranger.socket;
        // It fits into the empty buffer of a socket on which nothing was said.
        let _ = rustix::net::send(&socket, &refusal(why), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        let _ = rustix::net::shutdown(&socket, Shutdown::Write);
        if self.refused.len() == REFUSED_MAX {
            self.refused.pop_front();
        }
        self.refused.push_back((now + REFUSED_S_MAX, socket));
    }

    /// Closes refused strangers whose time is over, after dropping what they have sent.
    fn hang_up(&mut self, now: Instant) {
        while let Some((at, socket)) = self.refused.front()
            && *at <= now
        {
            while matches!(rustix::net::recv(socket.as_fd(), &mut *self.buffer, RecvFlags::DONTWAIT), Ok((1.., _))) {}
            self.refused.pop_front();
        }
    }
}
