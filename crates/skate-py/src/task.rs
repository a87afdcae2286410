//! The executing side: work for Python, and its results.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use skate_core::core::{Core, CoreError, INLINE_ANSWER_BYTES_MAX};
use skate_proto::executor::{Work, WorkKind};
use skate_proto::ids::{ObjectId, TaskId};
use skate_proto::msg::{Returns, Slot};
use skate_proto::payload::{ErrorCode, Payload, TAG_ERROR_PICKLE, TEXT_BYTES_MAX, Value};

use crate::Hooks;
use crate::core::waiting;
use crate::errors::NotYourTurn;
use crate::refs::ObjectRef;
use crate::value::{Bytes, Serialized};

thread_local! {
    /// What this thread runs: the parent of what it submits.
    static CURRENT_TASK: Cell<Option<TaskId>> = const { Cell::new(None) };
}

pub(crate) fn current_task() -> Option<TaskId> {
    CURRENT_TASK.get()
}

pub(crate) fn task_id(bytes: &[u8]) -> PyResult<TaskId> {
    TaskId::from_bytes(bytes).ok_or_else(|| PyValueError::new_err("a task id has 24 bytes"))
}

/// An exception as a payload.
pub(crate) fn error_payload(
    py: Python<'_>,
    hooks: &Hooks,
    error: &Bound<'_, PyAny>,
    code: ErrorCode,
) -> PyResult<Payload> {
    Ok(Serialized::pickle(py, hooks, error, TAG_ERROR_PICKLE, code as u8)?.into_payload(py))
}

/// The end of an exception's text, which names it; for history.
pub(crate) fn words(error: &Bound<'_, PyAny>) -> Option<String> {
    let text: String = error.str().ok()?.extract().ok()?;
    let mut from = text.len().saturating_sub(TEXT_BYTES_MAX);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    Some(text[from..].trim().to_owned())
}

/// One piece of work handed to this worker.
#[pyclass(frozen, module = "ray._core")]
pub(crate) struct Task {
    core: Arc<Core>,
    hooks: Py<Hooks>,
    work: Work,
    started: Instant,
    items: Mutex<u32>,
    /// The exception that ended a stream, in words.
    stream_error: Mutex<Option<String>>,
    answered: Mutex<bool>,
    /// The counts that came with the work have been given back.
    forgotten: AtomicBool,
    /// The argument for which there was no room.
    refused: Mutex<Option<ObjectId>>,
}

impl Task {
    pub(crate) fn new(core: &Arc<Core>, hooks: Py<Hooks>, work: Work) -> Self {
        Self {
            core: core.clone(),
            hooks,
            work,
            started: Instant::now(),
            items: Mutex::new(0),
            stream_error: Mutex::new(None),
            answered: Mutex::new(false),
            forgotten: AtomicBool::new(false),
            refused: Mutex::new(None),
        }
    }

    fn run_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Sends results once; a second answer is a bug in the worker's loop, but must not end it.
    fn answer(&self, results: Vec<Value>, failure: Option<&str>, retryable: bool) -> PyResult<()> {
        let mut answered = self.answered.lock();
        if std::mem::replace(&mut *answered, true) {
            return Err(PyRuntimeError::new_err("the task has been answered already"));
        }
        CURRENT_TASK.set(None);
        let items = *self.items.lock();
        self.core.answer(&self.work, results, failure, retryable, self.run_ns(), items);
        // Not when this object is dropped: the loop that holds it may wait long for its next one.
        self.forget_arguments();
        Ok(())
    }

    fn gather<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let whole = self.work.deps.iter().find(|(slot, ..)| *slot == Slot::Whole);
        let bytes = match whole {
            Some((_, id, value)) => self.bytes_of(py, *id, value)?,
            None => Bytes::of_blob(&self.work.args.data),
        };
        let (mut positional, keywords) = bytes.load_args(py, self.hooks.get())?;
        let keywords = keywords.unwrap_or_else(|| PyDict::new(py));
        for (slot, id, value) in &self.work.deps {
            match slot {
                Slot::Whole => {}
                Slot::Keyword(name) => keywords.set_item(name, self.value_of(py, *id, value)?)?,
                Slot::Position(at) => {
                    let place = positional
                        .get_mut(*at as usize)
                        .ok_or_else(|| PyValueError::new_err("an argument's position is out of range"))?;
                    *place = self.value_of(py, *id, value)?;
                }
            }
        }
        Ok((PyTuple::new(py, positional)?, keywords))
    }

    fn value_of<'py>(&self, py: Python<'py>, id: ObjectId, value: &Value) -> PyResult<Bound<'py, PyAny>> {
        self.bytes_of(py, id, value)?.load(py, self.hooks.get(), Some(id))
    }

    fn bytes_of(&self, py: Python<'_>, id: ObjectId, value: &Value) -> PyResult<Bytes> {
        match value {
            Value::Inline(payload) => Ok(Bytes::of_blob(&payload.data)),
            Value::Stored { location, .. } => {
                let get = || {
                    self.core.get_at(id, *location).inspect_err(|error| {
                        if let CoreError::NotYourTurn(object) = error {
                            *self.refused.lock() = Some(*object);
                        }
                    })
                };
                let fetched = waiting(py, get)?;
                Bytes::of_fetched(&self.core, fetched)
            }
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.core.is_forked() {
            return;
        }
        self.forget_arguments();
        if !*self.answered.lock() {
            self.core.work_left(self.work.task);
        }
    }
}

#[pymethods]
impl Task {
    /// 0 task, 1 actor creation, 2 actor method.
    #[getter]
    fn kind(&self) -> u8 {
        match self.work.kind {
            WorkKind::Task => 0,
            WorkKind::CreateActor => 1,
            WorkKind::Call => 2,
        }
    }

    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.work.task.to_bytes())
    }

    #[getter]
    fn function_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.work.def.function.0)
    }

    #[getter]
    fn blob<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.work.blob.as_ref().map(|blob| PyBytes::new(py, blob))
    }

    #[getter]
    fn name(&self) -> &str {
        &self.work.def.name
    }

    #[getter]
    fn method(&self) -> &str {
        &self.work.def.method
    }

    #[getter]
    fn actor<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let id = self.work.def.actor.map(|actor| actor.to_bytes().to_vec()).unwrap_or_default();
        PyBytes::new(py, &id)
    }

    #[getter]
    fn concurrency_group(&self) -> &str {
        &self.work.def.group
    }

    #[getter]
    fn num_returns(&self) -> i64 {
        match self.work.def.returns {
            Returns::Count(count) => i64::from(count),
            Returns::Streaming => -1,
            Returns::Dynamic => -2,
        }
    }

    #[getter]
    fn attempt(&self) -> u32 {
        self.work.attempt
    }

    #[getter]
    fn gpu_ids(&self) -> Vec<u32> {
        self.work.gpu_ids.clone()
    }

    #[getter]
    fn retry_exceptions(&self) -> bool {
        self.work.def.retry_exceptions
    }

    #[getter]
    fn incarnation(&self) -> u32 {
        self.work.actor.as_ref().map_or(0, |life| life.incarnation)
    }

    #[getter]
    fn max_concurrency(&self) -> u32 {
        self.work.actor.as_ref().map_or(1, |life| life.max_concurrency)
    }

    #[getter]
    fn is_async(&self) -> bool {
        self.work.actor.as_ref().is_some_and(|life| life.is_async)
    }

    #[getter]
    fn concurrency_groups<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (group, limit) in self.work.actor.iter().flat_map(|life| &life.groups) {
            dict.set_item(group, limit)?;
        }
        Ok(dict)
    }

    #[getter]
    fn backpressure(&self) -> i64 {
        match self.work.def.backpressure {
            0 => -1,
            limit => i64::from(limit),
        }
    }

    #[getter]
    fn owner(&self) -> u64 {
        self.work.owner.0
    }

    /// Tasks that each have some of their arguments in memory and wait for room for the others might wait for each
    /// other: all but one let go then, and begin anew.
    fn arguments<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        loop {
            match self.gather(py) {
                Err(error) if error.is_instance_of::<NotYourTurn>(py) => {
                    let refused = self.refused.lock().take();
                    if let Some(object) = refused {
                        waiting(py, || self.core.await_turn(object, None))?;
                    }
                }
                gathered => return gathered,
            }
        }
    }

    /// Whether the results, or an error, were sent: an exception that comes later is not the task's.
    #[getter]
    fn answered(&self) -> bool {
        *self.answered.lock()
    }

    /// The arguments are in user code's hands: what they were made of is not needed any more. `finish` and
    /// `fail` imply it.
    fn forget_arguments(&self) {
        if !self.forgotten.swap(true, Ordering::AcqRel) {
            self.core.forget_work(&self.work);
        }
    }

    fn enter(&self) {
        CURRENT_TASK.set(Some(self.work.task));
    }

    fn finish(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let hooks = self.hooks.get();
        let results = match self.work.def.returns {
            Returns::Count(0) => Vec::new(),
            Returns::Count(1) | Returns::Dynamic | Returns::Streaming => {
                vec![Serialized::new(py, hooks, value)?.into_value(py, &self.core)?]
            }
            Returns::Count(count) => {
                let wrong = |what: String| {
                    PyValueError::new_err(format!(
                        "{} is declared with num_returns={count}, but returned {what}",
                        self.work.def.name
                    ))
                };
                let Ok(items) = value.try_iter() else {
                    return Err(wrong(format!(
                        "an object of type {}, which is not iterable",
                        value.get_type().name()?
                    )));
                };
                let items: Vec<Bound<'_, PyAny>> = items.collect::<PyResult<_>>()?;
                if items.len() != count as usize {
                    return Err(wrong(format!("{} values", items.len())));
                }
                let mut budget = INLINE_ANSWER_BYTES_MAX;
                items
                    .iter()
                    .map(|item| Serialized::new(py, hooks, item)?.into_value_within(py, &self.core, &mut budget))
                    .collect::<PyResult<_>>()?
            }
        };
        self.answer(results, None, false)
    }

    #[pyo3(signature = (error, *, retryable))]
    fn fail(&self, py: Python<'_>, error: &Bound<'_, PyAny>, retryable: bool) -> PyResult<()> {
        let payload = error_payload(py, self.hooks.get(), error, ErrorCode::Task)?;
        let text = if self.core.is_recorded(&self.work) { words(error) } else { None };
        self.answer(vec![Value::Inline(payload)], text.as_deref(), retryable)
    }

    fn fail_code(&self, code: u8, message: &str) -> PyResult<()> {
        self.answer(vec![Value::Inline(Payload::error(code_of(code), message))], None, false)
    }

    /// One item of a stream; waits while back-pressure holds.
    fn yield_item(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let value = Serialized::new(py, self.hooks.get(), value)?.into_value(py, &self.core)?;
        self.send_item(py, value)
    }

    /// A reference to an item that was sent: the owner counts it, this process only names it.
    fn item(&self, index: u32) -> ObjectRef {
        let id = ObjectId { task: self.work.task, index };
        self.core.retain(id);
        ObjectRef::adopt(&self.core, id)
    }

    /// The exception that ends a stream, as its last item.
    fn yield_error(&self, py: Python<'_>, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let payload = error_payload(py, self.hooks.get(), error, ErrorCode::Task)?;
        *self.stream_error.lock() = words(error);
        self.send_item(py, Value::Inline(payload))
    }

    fn finish_stream(&self) -> PyResult<()> {
        let failure = self.stream_error.lock().take();
        self.answer(vec![Value::Inline(Payload::plain(&[0]))], failure.as_deref(), false)
    }
}

impl Task {
    fn send_item(&self, py: Python<'_>, value: Value) -> PyResult<()> {
        let index = {
            let mut items = self.items.lock();
            *items += 1;
            *items
        };
        self.core.send_item(&self.work, index, value);
        let limit = self.work.def.backpressure;
        if limit > 0 {
            waiting(py, || self.core.wait_items_taken(self.work.task, index, limit))?;
        }
        Ok(())
    }
}

fn code_of(code: u8) -> ErrorCode {
    use ErrorCode as E;
    [
        E::Task,
        E::WorkerCrashed,
        E::ActorDied,
        E::ActorUnavailable,
        E::Cancelled,
        E::OwnerDied,
        E::ObjectLost,
        E::OutOfMemory,
        E::PendingCalls,
        E::Infeasible,
    ]
    .into_iter()
    .find(|known| *known as u8 == code)
    .unwrap_or(E::Other)
}
