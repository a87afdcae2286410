//! The bulk client: pulls blocks, each by one or a few streams, from whichever of its sources delivers.
//!
//! A block is cut into ranges. A stream takes the first missing range, asks a source for it, and moves what comes
//! into the destination; what is lacking when the source fails is missing again, and another source is asked. A
//! source that failed is not asked again for this pull. The pull fails when none is left.
//!
//! Invariants: each byte is missing, being fetched by one stream, or there; a pull is told of once, by the last of its
//! streams, when none writes any more.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use foldhash::fast::RandomState;
use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use super::connect::{ConnectError, Dialer, Idle, socket_for};
use super::offers::{Offer, Offers};
use super::server::Server;
use super::sink::{MoveError, Sink};
use super::wire::{ANSWER_LEN, Refusal, Request, decode_answer};
use super::{Failure, IDLE_S, Outcome, PULLERS_MAX, Pull, RANGE_BYTES_MAX, STREAM_BYTES_MIN, STREAMS_MAX};
use crate::transport::{Stream, spawn_without_signals};

#[derive(Debug, Error)]
#[non_exhaustive]
enum PullError {
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("it refused: {0}")]
    Refused(#[from] Refusal),
    #[error("it sent nothing for too long")]
    Silent,
    #[error("it closed the connection in the middle; its process has probably ended")]
    Closed,
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
    #[error("it broke the protocol")]
    Malformed,
    /// Not the source's fault: no other would do better.
    #[error("the destination cannot be written: {0}")]
    Destination(#[source] io::Error),
}

impl From<io::Error> for PullError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Silent,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

impl From<MoveError> for PullError {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::Source(error) => error.into(),
            MoveError::Destination(error) => Self::Destination(error),
        }
    }
}

/// A part of a block: from, to.
type Span = (u64, u64);

struct Running {
    pull: Pull,
    offer: Arc<Offer>,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    /// In order, so that the block grows from its start.
    missing: VecDeque<Span>,
    /// What streams fetch just now, and the connection on which each does.
    fetching: HashMap<usize, (Span, Arc<Stream>), RandomState>,
    /// By position among the sources.
    failed: Vec<(usize, Failure)>,
    /// Why no source could help.
    fatal: Option<String>,
    cancelled: bool,
    /// Streams that have not left.
    streams: usize,
    bytes: u64,
}

impl Progress {
    /// The first source that has not failed.
    fn source(&self, count: usize) -> Option<usize> {
        (0..count).find(|at| self.failed.iter().all(|(failed, _)| failed != at))
    }

    fn is_over(&self, count: usize) -> bool {
        self.cancelled || self.fatal.is_some() || self.source(count).is_none()
    }

    /// Up to where everything is there.
    fn filled(&self, len: u64) -> u64 {
        let fetching = self.fetching.values().map(|(span, _)| span.0);
        self.missing.iter().map(|span| span.0).chain(fetching).min().unwrap_or(len)
    }
}

#[derive(Default)]
struct Queue {
    /// One entry for each stream that is wanted.
    streams: VecDeque<(Arc<Running>, usize)>,
    pulls: HashMap<u64, Arc<Running>, RandomState>,
    threads: Vec<JoinHandle<()>>,
    running: usize,
    idle: usize,
    closing: bool,
}

struct Shared {
    dialer: Dialer,
    /// A source that sends nothing for so long has failed.
    silence: Duration,
    offers: Arc<Offers>,
    server: Arc<Server>,
    tell: Box<dyn Fn(Outcome) + Send + Sync>,
    kept: Idle,
    queue: Mutex<Queue>,
    changed: Condvar,
}

pub(super) struct Client {
    shared: Arc<Shared>,
}

impl Client {
    pub(super) fn new(
        dialer: Dialer,
        silence: Duration,
        offers: Arc<Offers>,
        server: Arc<Server>,
        tell: Box<dyn Fn(Outcome) + Send + Sync>,
    ) -> Self {
        let shared = Shared {
            dialer,
            silence,
            offers,
            server,
            tell,
            kept: Idle::default(),
            queue: Mutex::default(),
            changed: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    pub(super) fn pull(&self, pull: Pull) {
        let shared = &self.shared;
        let failed = |error: String| Outcome { ticket: pull.ticket, error, failures: Vec::new(), bytes: 0 };
        let end = pull.offset.checked_add(pull.len);
        let size = rustix::fs::fstat(&pull.fd).map_or(0, |stat| stat.st_size as u64);
        let Some(end) = end.filter(|end| pull.len > 0 && *end <= size) else {
            let outcome = failed(format!("the destination has {size} bytes, which the block does not fit into"));
            return (shared.tell)(outcome);
        };
        let copy = match pull.fd.try_clone() {
            Ok(copy) => copy,
            Err(error) => return (shared.tell)(failed(format!("no descriptor is left for the destination: {error}"))),
        };
        let offer = shared.offers.grow(pull.segment, copy, pull.offset, end);
        let streams = streams_for(pull.len);
        let missing = spans(pull.len).collect();
        let progress = Progress { missing, streams, ..Progress::default() };
        let running = Arc::new(Running { pull, offer, progress: Mutex::new(progress) });
        let mut queue = shared.queue.lock();
        if queue.closing {
            return;
        }
        queue.pulls.insert(running.pull.ticket, Arc::clone(&running));
        for stream in 0..streams {
            queue.streams.push_back((Arc::clone(&running), stream));
        }
        shared.start_threads(&mut queue);
        drop(queue);
        shared.changed.notify_all();
    }

    pub(super) fn cancel(&self, ticket: u64) {
        let running = self.shared.queue.lock().pulls.get(&ticket).cloned();
        if let Some(running) = running {
            running.cancel();
        }
    }

    pub(super) fn shutdown(&self) {
        let (threads, pulls) = {
            let mut queue = self.shared.queue.lock();
            queue.closing = true;
            queue.streams.clear();
            (std::mem::take(&mut queue.threads), std::mem::take(&mut queue.pulls))
        };
        self.shared.changed.notify_all();
        #[expect(clippy::iter_over_hash_type, reason = "all are ended, in whatever order")]
        for running in pulls.values() {
            running.cancel();
        }
        for thread in threads {
            let _ = thread.join();
        }
        self.shared.kept.clear();
    }
}

impl Running {
    fn cancel(&self) {
        let mut progress = self.progress.lock();
        progress.cancelled = true;
        progress.interrupt();
    }
}

impl Progress {
    /// Ends every stream's wait.
    fn interrupt(&self) {
        #[expect(clippy::iter_over_hash_type, reason = "all are shut, in whatever order")]
        for (_, socket) in self.fetching.values() {
            socket.shut();
        }
    }
}

impl Shared {
    fn start_threads(self: &Arc<Self>, queue: &mut Queue) {
        queue.threads.retain(|thread| !thread.is_finished());
        for _ in queue.idle..queue.streams.len() {
            if queue.running >= PULLERS_MAX {
                return;
            }
            let shared = Arc::clone(self);
            // Without a thread to be had, those that run take the streams in turn, and without any the next pull
            // tries again.
            let Ok(thread) = spawn_without_signals("skate-pull", move || shared.run()) else {
                return;
            };
            queue.running += 1;
            queue.threads.push(thread);
        }
    }

    fn run(self: &Arc<Self>) {
        let mut queue = self.queue.lock();
        while !queue.closing {
            if let Some((running, stream)) = queue.streams.pop_front() {
                drop(queue);
                self.run_stream(&running, stream);
                queue = self.queue.lock();
                continue;
            }
            queue.idle += 1;
            let timed_out = self.changed.wait_for(&mut queue, IDLE_S).timed_out();
            queue.idle -= 1;
            // The last thread stays until every kept connection is closed.
            if timed_out && queue.streams.is_empty() && (self.kept.expire() || queue.running > 1) {
                break;
            }
        }
        queue.running -= 1;
    }

    fn run_stream(&self, running: &Arc<Running>, stream: usize) {
        let count = running.pull.sources.len();
        let mut connection: Option<(usize, Arc<Stream>, bool)> = None;
        loop {
            let (span, source) = {
                let mut progress = running.progress.lock();
                let source = progress.source(count).filter(|_| !progress.is_over(count));
                let (Some(source), Some(span)) = (source, progress.missing.front().copied()) else {
                    progress.streams -= 1;
                    let is_last = progress.streams == 0;
                    drop(progress);
                    if let Some((source, socket, _)) = connection.take() {
                        self.leave(running, source, socket);
                    }
                    if is_last {
                        self.finish(running);
                    }
                    return;
                };
                progress.missing.pop_front();
                (span, source)
            };
            if connection.as_ref().is_some_and(|(at, ..)| *at != source) {
                connection = None;
            }
            self.fetch(running, stream, source, span, &mut connection);
        }
    }

    /// Fetches a span from a source; what is lacking afterwards is missing again.
    fn fetch(
        &self,
        running: &Arc<Running>,
        stream: usize,
        source: usize,
        span: Span,
        connection: &mut Option<(usize, Arc<Stream>, bool)>,
    ) {
        let from = &running.pull.sources[source];
        let (socket, was_used, is_new) = match connection.take() {
            Some((_, socket, was_used)) => (Ok(socket), was_used, false),
            None => match self.kept.take(from.node) {
                Some(socket) => (Ok(socket), true, false),
                None => (socket_for(from).map(Arc::new), false, true),
            },
        };
        let kept = socket.as_ref().ok().cloned();
        let result = socket.map_err(PullError::from).and_then(|socket| {
            let mut progress = running.progress.lock();
            progress.fetching.insert(stream, (span, Arc::clone(&socket)));
            if progress.cancelled {
                return Err(PullError::Closed);
            }
            drop(progress);
            if is_new {
                self.dialer.connect(&socket, from, self.silence)?;
            }
            self.read_range(running, stream, source, span, &socket)?;
            Ok(socket)
        });
        let mut progress = running.progress.lock();
        let (start, end) = progress.fetching.remove(&stream).map_or(span, |(span, _)| span);
        match result {
            Ok(socket) => {
                *connection = Some((source, socket, false));
                return;
            }
            // A kept connection may have been closed while nobody looked; that says nothing of its peer.
            Err(PullError::Closed | PullError::Io(_)) if was_used && start == span.0 => {}
            Err(_) if progress.cancelled => {}
            Err(error @ PullError::Destination(_)) => {
                progress.fatal = Some(error.to_string());
                progress.interrupt();
            }
            Err(error) if progress.failed.iter().all(|(at, _)| *at != source) => {
                let refused = matches!(error, PullError::Refused(_));
                if let Some(socket) = kept.filter(|_| refused) {
                    self.kept.keep(from.node, socket); // nothing is wrong with the connection
                }
                let failure = Failure { node: from.node, refused, error: error.to_string() };
                progress.failed.push((source, failure));
            }
            Err(_) => {}
        }
        let at = progress.missing.partition_point(|missing| missing.0 < start);
        progress.missing.insert(at, (start, end));
    }

    fn read_range(
        &self,
        running: &Arc<Running>,
        stream: usize,
        source: usize,
        (start, end): Span,
        socket: &Stream,
    ) -> Result<(), PullError> {
        let Pull { sources, fd, offset, len, .. } = &running.pull;
        let from = &sources[source];
        // A peer's claim: an offset with which it does not add up is refused by the source, not wrapped here.
        let at = from.offset.checked_add(start).ok_or(Refusal::OutOfBounds)?;
        socket.write_all(&Request::Range { segment: from.segment, offset: at, len: end - start }.encode())?;
        let mut answer = [0; ANSWER_LEN];
        socket.read_exact(&mut answer)?;
        if decode_answer(&answer).ok_or(PullError::Malformed)?? != end - start {
            return Err(PullError::Malformed);
        }
        let sink = Sink::of(socket).map_err(PullError::Destination)?;
        let mut next = start;
        while next < end {
            let moved = sink.move_bytes(socket, fd, offset + next, end - next)?;
            next += moved;
            let filled = {
                let mut progress = running.progress.lock();
                progress.bytes += moved;
                if let Some((span, _)) = progress.fetching.get_mut(&stream) {
                    span.0 = next;
                }
                progress.filled(*len)
            };
            self.advance(running, filled);
        }
        Ok(())
    }

    fn advance(&self, running: &Running, filled: u64) {
        let to = running.pull.offset + filled;
        if to > running.offer.filled() {
            self.server.resume(running.offer.advance(to));
        }
    }

    /// Says that everything was taken, and keeps the connection for what comes next.
    fn leave(&self, running: &Running, source: usize, socket: Arc<Stream>) {
        if socket.write_all(&Request::Taken.encode()).is_ok() {
            self.kept.keep(running.pull.sources[source].node, socket);
        }
    }

    /// The last stream has left: the pull is whole, or will not become so.
    fn finish(&self, running: &Running) {
        let outcome = {
            let mut progress = running.progress.lock();
            let whole = progress.missing.is_empty();
            let error = match progress.fatal.take() {
                _ if whole => String::new(),
                _ if progress.cancelled => "it was cancelled".to_owned(),
                Some(fatal) => fatal,
                None if running.pull.sources.is_empty() => "no node has it".to_owned(),
                None => describe(&progress.failed),
            };
            let failures = progress.failed.drain(..).map(|(_, failure)| failure).collect();
            Outcome { ticket: running.pull.ticket, error, failures, bytes: progress.bytes }
        };
        if outcome.error.is_empty() {
            self.advance(running, running.pull.len);
        } else {
            self.offers.withdraw(running.pull.segment);
        }
        let mut queue = self.queue.lock();
        queue.pulls.remove(&running.pull.ticket);
        let closing = queue.closing;
        drop(queue);
        if !closing {
            (self.tell)(outcome);
        }
    }
}

fn describe(failed: &[(usize, Failure)]) -> String {
    let each: Vec<String> = failed.iter().map(|(_, f)| format!("node {:016x}: {}", f.node.0, f.error)).collect();
    format!("no source delivered it ({})", each.join("; "))
}

/// How many streams a block is worth.
fn streams_for(len: u64) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let worth = usize::try_from(len / STREAM_BYTES_MIN).unwrap_or(usize::MAX);
    worth.min(cores / 2).clamp(1, STREAMS_MAX)
}

fn spans(len: u64) -> impl Iterator<Item = Span> {
    (0..len.div_ceil(RANGE_BYTES_MAX)).map(move |n| {
        let start = n * RANGE_BYTES_MAX;
        (start, (start + RANGE_BYTES_MAX).min(len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_a_block_without_gap_or_overlap() {
        for len in [1, RANGE_BYTES_MAX - 1, RANGE_BYTES_MAX, RANGE_BYTES_MAX + 1, 5 * RANGE_BYTES_MAX] {
            let all: Vec<Span> = spans(len).collect();
            assert_eq!((all[0].0, all[all.len() - 1].1), (0, len));
            assert!(all.windows(2).all(|pair| pair[0].1 == pair[1].0));
            assert!(all.iter().all(|(from, to)| from < to && to - from <= RANGE_BYTES_MAX));
        }
    }

    #[test]
    fn small_blocks_have_one_stream() {
        assert_eq!(streams_for(1), 1);
        assert!(streams_for(u64::MAX) <= STREAMS_MAX);
    }
}
