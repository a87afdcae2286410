//! The bulk server: connections that wait for a request, and threads that answer them.
//!
//! One thread watches the idle connections; one that speaks goes into the queue, from which up to [`SENDERS_MAX`]
//! threads take. A thread reads the request, sends the range, and gives the connection back; if the range is not
//! there yet, it parks it with the segment (`offers`) and takes the next.
//!
//! Locks, in the order in which they may be taken: an offer's, the queue, then the watcher or `open`.
//!
//! Invariants: a connection is at one place: with the watcher, in the queue, with a thread, or parked; `open` has all
//! of them, so that shutting down reaches a thread that is stuck in one.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use foldhash::fast::RandomState;
use parking_lot::{Condvar, Mutex};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::retry_on_intr;

use super::offers::{Offer, Offers, UnderWay};
use super::wire::{REQUEST_LEN, Refusal, Request, encode_answer};
use super::{CONNECTIONS_MAX, IDLE_S, SENDERS_MAX};
use crate::transport::{Stream, spawn_without_signals};

/// One `sendfile` sends at most this much. Larger ones make the receiver slower (by a third from 4 MiB on, in processor
/// time): what waits for it grows, and is cold when it comes.
const SEND_BYTES: u64 = 256 << 10;
/// Read, encrypted and written at once within TLS: what a channel takes in one piece.
const ENCRYPT_BYTES: u64 = 64 << 10;
/// Epoll data of the descriptor that ends the watcher's wait. Connections count up from 0.
const KICK: u64 = u64::MAX;

/// A connection of a pulling node.
struct Connection {
    id: u64,
    stream: Arc<Stream>,
    /// The last range, until the client has said that it took it.
    sent: Option<UnderWay>,
    server: Weak<Shared>,
}

impl Connection {
    /// Nothing of the last range is on its way any more.
    fn take_back(&mut self) {
        if let Some(sent) = self.sent.take() {
            sent.taken();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(server) = self.server.upgrade() {
            server.open.lock().remove(&self.id);
        }
    }
}

/// A connection that has something to be done.
pub(super) struct Job {
    connection: Connection,
    range: Option<Range>,
}

struct Range {
    offer: Arc<Offer>,
    next: u64,
    end: u64,
}

impl Job {
    /// Of a parked range, the first byte that was not sent.
    pub(super) fn next_byte(&self) -> u64 {
        self.range.as_ref().map_or(0, |range| range.next)
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle_threads: usize,
    threads: Vec<JoinHandle<()>>,
    /// Those of `threads` that have not ended.
    running: usize,
    /// Connections that wait for a request, oldest first.
    waiting: Vec<Connection>,
    next_id: u64,
    closing: bool,
}

struct Shared {
    offers: Arc<Offers>,
    /// A client that takes nothing for so long is given up.
    silence: Duration,
    queue: Mutex<Queue>,
    changed: Condvar,
    watcher: Mutex<Option<Watcher>>,
    open: Mutex<HashMap<u64, Arc<Stream>, RandomState>>,
}

struct Watcher {
    epoll: Arc<OwnedFd>,
    kick: OwnedFd,
    thread: JoinHandle<()>,
}

pub(super) struct Server {
    shared: Arc<Shared>,
}

impl Server {
    pub(super) fn new(offers: Arc<Offers>, silence: Duration) -> Self {
        let shared = Shared {
            offers,
            silence,
            queue: Mutex::default(),
            changed: Condvar::new(),
            watcher: Mutex::default(),
            open: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Takes a connection whose peer is proven. Without a descriptor or thread to serve it, it is closed: the client
    /// sees that, and asks elsewhere.
    pub(super) fn accept(&self, stream: Stream) {
        let shared = &self.shared;
        // A peer whose machine is gone closes nothing.
        let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
        let mut queue = shared.queue.lock();
        if queue.closing || stream.set_patience(shared.silence).is_err() || shared.watch().is_err() {
            return;
        }
        let stream = Arc::new(stream);
        let full = shared.open.lock().len() >= CONNECTIONS_MAX;
        let idle_longest = if full {
            if queue.waiting.is_empty() {
                return;
            }
            Some(queue.waiting.remove(0))
        } else {
            None
        };
        let id = queue.next_id;
        queue.next_id += 1;
        shared.open.lock().insert(id, Arc::clone(&stream));
        let connection = Connection { id, stream, sent: None, server: Arc::downgrade(shared) };
        shared.wait_for_request(&mut queue, connection, true);
        drop(queue);
        drop(idle_longest);
    }

    /// Jobs whose bytes have arrived go on.
    pub(super) fn resume(&self, jobs: Vec<Job>) {
        jobs.into_iter().for_each(|job| self.shared.enqueue(job));
    }

    pub(super) fn shutdown(&self) {
        let (jobs, waiting, threads) = {
            let mut queue = self.shared.queue.lock();
            queue.closing = true;
            let Queue { jobs, waiting, threads, .. } = &mut *queue;
            (std::mem::take(jobs), std::mem::take(waiting), std::mem::take(threads))
        };
        self.shared.changed.notify_all();
        #[expect(clippy::iter_over_hash_type, reason = "all are shut, in whatever order")]
        for stream in self.shared.open.lock().values() {
            stream.shut();
        }
        drop((jobs, waiting));
        // Not joined under its lock, which a sender may want.
        let watcher = self.shared.watcher.lock().take();
        if let Some(watcher) = watcher {
            // It fails only when the counter overflows, after 2^64 kicks.
            let _ = rustix::io::write(&watcher.kick, &1_u64.to_ne_bytes());
            let _ = watcher.thread.join();
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Starts the watcher, if there is none.
    fn watch(self: &Arc<Self>) -> io::Result<()> {
        let mut watcher = self.watcher.lock();
        if watcher.is_some() {
            return Ok(());
        }
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        let kick = eventfd(0, EventfdFlags::CLOEXEC)?;
        epoll::add(&*epoll, &kick, EventData::new_u64(KICK), EventFlags::IN)?;
        let (shared, watched) = (Arc::clone(self), Arc::clone(&epoll));
        let thread = spawn_without_signals("skate-bulk", move || shared.run_watcher(&watched))?;
        *watcher = Some(Watcher { epoll, kick, thread });
        Ok(())
    }

    fn run_watcher(self: &Arc<Self>, epoll: &OwnedFd) {
        loop {
            let mut room = [const { MaybeUninit::<Event>::uninit() }; 64];
            let Ok((ready, _)) = epoll::wait(epoll, &mut room, None) else {
                continue; // a signal, which is blocked on this thread: a stop and a continuation of the process
            };
            for &Event { data, .. } in &*ready {
                let id = data.u64();
                if id == KICK {
                    return;
                }
                let mut queue = self.queue.lock();
                let at = queue.waiting.iter().position(|connection| connection.id == id);
                let connection = at.map(|at| queue.waiting.remove(at));
                drop(queue);
                if let Some(connection) = connection {
                    self.enqueue(Job { connection, range: None });
                }
            }
        }
    }

    /// Gives a connection to the watcher, which reports it once.
    fn wait_for_request(&self, queue: &mut Queue, connection: Connection, is_new: bool) {
        let watcher = self.watcher.lock();
        let Some(watcher) = watcher.as_ref() else {
            return; // shutting down: it is closed
        };
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        let data = EventData::new_u64(connection.id);
        let watched = if is_new {
            epoll::add(&*watcher.epoll, &*connection.stream, data, flags)
        } else {
            epoll::modify(&*watcher.epoll, &*connection.stream, data, flags)
        };
        if watched.is_ok() {
            queue.waiting.push(connection);
        }
    }

    /// Queues a job, for a thread that is started if all are busy and there may be one more.
    fn enqueue(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue.lock();
        if queue.closing {
            return;
        }
        queue.jobs.push_back(job);
        if queue.jobs.len() > queue.idle_threads && queue.running < SENDERS_MAX {
            let shared = Arc::clone(self);
            // Without a thread to be had, those that run take it in turn; without any, a later job tries again.
            if let Ok(thread) = spawn_without_signals("skate-send", move || shared.run_sender()) {
                queue.running += 1;
                queue.threads.retain(|thread| !thread.is_finished());
                queue.threads.push(thread);
            }
        }
        drop(queue);
        self.changed.notify_one();
    }

    fn run_sender(self: &Arc<Self>) {
        let mut queue = self.queue.lock();
        loop {
            if queue.closing {
                break;
            }
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                let done = self.serve(job);
                queue = self.queue.lock();
                if let Some(connection) = done
                    && !queue.closing
                {
                    if connection.stream.has_unread() {
                        // Its next request is here already, and its socket would be silent about it.
                        queue.jobs.push_back(Job { connection, range: None });
                    } else {
                        self.wait_for_request(&mut queue, connection, false);
                    }
                }
                continue;
            }
            queue.idle_threads += 1;
            let timed_out = self.changed.wait_for(&mut queue, IDLE_S).timed_out();
            queue.idle_threads -= 1;
            if timed_out && queue.jobs.is_empty() {
                break;
            }
        }
        queue.running -= 1;
    }

    /// Does what can be done for a connection. It comes back when it waits for a request; otherwise it is parked, or
    /// was closed.
    fn serve(&self, mut job: Job) -> Option<Connection> {
        if job.range.is_none() {
            let mut bytes = [0; REQUEST_LEN];
            let read = job.connection.stream.read_exact(&mut bytes);
            // Whatever it says, it has read the last range, and if it has gone it will not read it.
            let has_gone = |error: &io::Error| error.kind() != io::ErrorKind::WouldBlock;
            if read.as_ref().err().is_none_or(has_gone) {
                job.connection.take_back();
            }
            read.ok()?;
            let (segment, offset, len) = match Request::decode(&bytes)? {
                Request::Taken => return Some(job.connection),
                Request::Range { segment, offset, len } => (segment, offset, len),
            };
            let answer = self.find(segment, offset, len);
            let said = encode_answer(answer.as_ref().map(|_| len).map_err(|error| *error));
            job.connection.stream.write_all(&said).ok()?;
            let Ok((offer, under_way)) = answer else {
                return Some(job.connection);
            };
            job.connection.sent = Some(under_way);
            job.range = Some(Range { offer, next: offset, end: offset + len });
        }
        send(job)
    }

    fn find(
        &self,
        segment: skate_proto::ids::SegmentId,
        offset: u64,
        len: u64,
    ) -> Result<(Arc<Offer>, UnderWay), Refusal> {
        let offer = self.offers.get(segment).ok_or(Refusal::UnknownSegment)?;
        if offset.checked_add(len).is_none_or(|end| end > offer.size()) {
            return Err(Refusal::OutOfBounds);
        }
        let under_way = UnderWay::new(&offer).ok_or(Refusal::UnknownSegment)?;
        Ok((offer, under_way))
    }
}

/// Sends what is there of a range.
fn send(mut job: Job) -> Option<Connection> {
    let mut buffer = Vec::new();
    loop {
        let Some(range) = &mut job.range else {
            return Some(job.connection);
        };
        let there = range.offer.filled().min(range.end);
        if range.next == range.end {
            job.range = None;
        } else if range.offer.is_withdrawn() {
            return None;
        } else if range.next < there {
            match send_some(&job.connection.stream, &range.offer.fd, &mut range.next, there, &mut buffer) {
                Ok(1..) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    job.connection.take_back();
                    return None;
                }
                // The peer has taken nothing for too long.
                Ok(0) | Err(_) => return None,
            }
        } else {
            let (offer, at) = (Arc::clone(&range.offer), range.next);
            job = offer.park(job, at)?;
        }
    }
}

/// Sends a piece of a file, from `next` on and not beyond `end`: inside the kernel if the connection is in clear.
fn send_some(stream: &Stream, file: &OwnedFd, next: &mut u64, end: u64, buffer: &mut Vec<u8>) -> io::Result<usize> {
    if stream.is_secured() {
        buffer.resize((end - *next).min(ENCRYPT_BYTES) as usize, 0);
        let len = retry_on_intr(|| rustix::io::pread(file, &mut **buffer, *next))?;
        stream.write_all(&buffer[..len])?;
        *next += len as u64;
        return Ok(len);
    }
    let len = (end - *next).min(SEND_BYTES) as usize;
    Ok(retry_on_intr(|| rustix::fs::sendfile(stream, file, Some(next), len))?)
}
