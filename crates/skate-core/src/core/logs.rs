//! Output of workers, on its way to the driver's terminal.

use std::sync::atomic::Ordering;

use skate_proto::payload::Payload;

use super::Core;

/// Log lines that the driver has not printed; beyond, the oldest are dropped and counted.
const LOG_LINES_MAX: usize = 10_000;

/// What a driver prints.
#[derive(Debug)]
pub enum Log {
    Lines {
        name: String,
        pid: u32,
        stream: u8,
        lines: Vec<String>,
        ip: String,
    },
    Notice {
        level: String,
        text: String,
    },
    /// The exception of a task at which nobody has looked.
    Unhandled(Payload),
}

impl Core {
    pub fn next_log(&self) -> Option<Log> {
        let mut logs = self.logs.lock();
        loop {
            let dropped = self.logs_dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                let text = format!("{dropped} batches of worker output were dropped: the driver printed too slowly.");
                return Some(Log::Notice { level: "warning".into(), text });
            }
            if let Some(log) = logs.pop_front() {
                return Some(log);
            }
            if self.ended.load(Ordering::Acquire) {
                return None;
            }
            self.logs_changed.wait(&mut logs);
        }
    }

    pub(super) fn add_log(&self, log: Log) {
        let mut logs = self.logs.lock();
        if logs.len() >= LOG_LINES_MAX {
            logs.pop_front();
            self.logs_dropped.fetch_add(1, Ordering::Relaxed);
        }
        logs.push_back(log);
        self.logs_changed.notify_one();
    }
}
