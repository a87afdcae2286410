//! A few threads for jobs that wait in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::transport::spawn_without_signals;

/// How long a thread is kept for what may come.
const IDLE_S: Duration = Duration::from_secs(15);

struct Queue<J> {
    jobs: VecDeque<J>,
    threads: Vec<JoinHandle<()>>,
    /// Those of `threads` that have not ended, and of these those that wait.
    running: usize,
    idle: usize,
    closing: bool,
}

struct Shared<J> {
    queue: Mutex<Queue<J>>,
    changed: Condvar,
    run: Box<dyn Fn(J) + Send + Sync>,
}

pub(super) struct Pool<J> {
    shared: Arc<Shared<J>>,
    name: &'static str,
    threads_max: usize,
}

impl<J: Send + 'static> Pool<J> {
    pub(super) fn new(name: &'static str, threads_max: usize, run: impl Fn(J) + Send + Sync + 'static) -> Self {
        let queue = Queue { jobs: VecDeque::new(), threads: Vec::new(), running: 0, idle: 0, closing: false };
        let shared = Shared { queue: Mutex::new(queue), changed: Condvar::new(), run: Box::new(run) };
        Self { shared: Arc::new(shared), name, threads_max }
    }

    /// Without a thread to be had, those that run take the job in turn; without any, the calling thread does it.
    pub(super) fn add(&self, job: J) {
        let mut queue = self.shared.queue.lock();
        if queue.closing {
            return;
        }
        queue.jobs.push_back(job);
        if queue.jobs.len() > queue.idle && queue.running < self.threads_max {
            let shared = Arc::clone(&self.shared);
            if let Ok(thread) = spawn_without_signals(self.name, move || shared.work()) {
                queue.running += 1;
                queue.threads.retain(|thread| !thread.is_finished());
                queue.threads.push(thread);
            } else if queue.running == 0
                && let Some(job) = queue.jobs.pop_front()
            {
                drop(queue);
                return (self.shared.run)(job);
            }
        }
        drop(queue);
        self.shared.changed.notify_one();
    }

    pub(super) fn shutdown(&self) {
        let threads = {
            let mut queue = self.shared.queue.lock();
            queue.closing = true;
            queue.jobs.clear();
            std::mem::take(&mut queue.threads)
        };
        self.shared.changed.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl<J> Shared<J> {
    fn work(&self) {
        let mut queue = self.queue.lock();
        loop {
            if queue.closing {
                break;
            }
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                (self.run)(job);
                queue = self.queue.lock();
                continue;
            }
            queue.idle += 1;
            let timed_out = self.changed.wait_for(&mut queue, IDLE_S).timed_out();
            queue.idle -= 1;
            if timed_out && queue.jobs.is_empty() {
                break;
            }
        }
        queue.running -= 1;
    }
}
