//! `Core`: a process's membership in a cluster, for Python.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use skate_core::core::{Completions, Core, CoreError, Fetched, Got, Log};
use skate_core::transport::Address;
use skate_proto::actors::{ActorState, Creation};
use skate_proto::handshake::Role;
use skate_proto::ids::{ActorId, FunctionId, ObjectId, ProcId};
use skate_proto::msg::{Reason, WaitsFor};
use skate_proto::payload::{Blob, ErrorCode};

use crate::Hooks;
use crate::errors::to_py;
use crate::refs::{ObjectRef, StreamRef};
use crate::task::Task;
use crate::template::{extract_call, function_id};
use crate::value::{Bytes, Serialized};

/// The core of this process, for references that are unpickled.
static CURRENT: Mutex<Option<Arc<Core>>> = Mutex::new(None);

pub(crate) fn current() -> Option<Arc<Core>> {
    CURRENT.lock().clone()
}

/// A point in time from seconds; `None` waits without end.
pub(crate) fn deadline(timeout: Option<f64>) -> PyResult<Option<Instant>> {
    let Some(seconds) = timeout else { return Ok(None) };
    if seconds.is_nan() || seconds < 0.0 {
        return Err(PyValueError::new_err(format!("timeout must not be negative, got {seconds}")));
    }
    // A century is forever, and fits.
    Ok(Some(Instant::now() + Duration::from_secs_f64(seconds.min(3.0e9))))
}

thread_local! {
    /// What a signal handler raised while this thread waited.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Runs the handlers of signals that have come; true if one raised.
fn handler_raised() -> bool {
    Python::attach(|py| match py.check_signals() {
        Ok(()) => false,
        Err(error) => {
            RAISED.set(Some(error));
            true
        }
    })
}

/// The one door for calls that may wait: releases the interpreter, and lets signals in.
pub(crate) fn waiting<T: Send>(py: Python<'_>, run: impl Fn() -> Result<T, CoreError> + Sync) -> PyResult<T> {
    loop {
        py.check_signals()?;
        match py.detach(&run) {
            Err(CoreError::Interrupted) => {
                if let Some(error) = RAISED.with_borrow_mut(Option::take) {
                    return Err(error);
                }
            }
            result => return result.map_err(to_py),
        }
    }
}

#[pyclass(frozen, name = "Core", module = "ray._core")]
pub(crate) struct PyCore {
    pub(crate) inner: Arc<Core>,
    pub(crate) hooks: Py<Hooks>,
}

fn ids_of(core: &Arc<Core>, refs: &Bound<'_, PyAny>) -> PyResult<Vec<ObjectId>> {
    let id = |item: &Bound<'_, PyAny>| match item.cast::<ObjectRef>() {
        Ok(reference) => reference.get().id_in(core),
        Err(_) => Err(PyTypeError::new_err(format!("expected ObjectRef, got {}", item.get_type().name()?))),
    };
    if let Ok(list) = refs.cast::<PyList>() {
        return list.iter().map(|item| id(&item)).collect();
    }
    refs.try_iter()?.map(|item| id(&item?)).collect()
}

impl PyCore {
    fn load<'py>(&self, py: Python<'py>, id: ObjectId, fetched: Fetched) -> PyResult<Bound<'py, PyAny>> {
        Bytes::of_fetched(&self.inner, fetched)?.load(py, self.hooks.get(), Some(id))
    }

    fn why_of(&self, py: Python<'_>, mut id: ObjectId) -> PyResult<Vec<(String, String)>> {
        let mut chain = Vec::new();
        let deadline = || Some(Instant::now() + Duration::from_secs(5));
        // Arguments of arguments; a cycle is impossible, a long chain is cut.
        while chain.len() < 64 {
            let mut reason = self.inner.why(id);
            if reason.waits_for == WaitsFor::Owner {
                let (where_, _) = self.ask_node(py, "why.process", rmp_int(id.owner().0))?;
                match waiting(py, || self.inner.ask_why(id, deadline())) {
                    Ok(told) => reason = Reason { text: format!("{}; its owner is {where_}", told.text), ..told },
                    Err(_) => {
                        let text = format!("it belongs to {where_}, which does not answer");
                        reason = Reason { text, waits_for: WaitsFor::Nothing };
                    }
                }
            }
            chain.push((format!("object {id}"), reason.text));
            let question = match reason.waits_for {
                WaitsFor::Nothing | WaitsFor::Owner => break,
                WaitsFor::Object(argument) => {
                    id = argument;
                    continue;
                }
                WaitsFor::Lease(class) => ("why.lease", rmp_pair(u64::from(class), id.owner().0)),
                WaitsFor::Actor(actor) => ("why.actor", rmp_bin(&actor.to_bytes())),
            };
            let (text, ok) = self.ask_node(py, question.0, question.1)?;
            chain.push(("node".into(), if ok { text } else { format!("the node could not say: {text}") }));
            break;
        }
        Ok(chain)
    }

    /// The node's answer to a request as text, and whether it could give one.
    fn ask_node(&self, py: Python<'_>, op: &str, args: Vec<u8>) -> PyResult<(String, bool)> {
        let deadline = Some(Instant::now() + Duration::from_secs(5));
        let (ok, body) = waiting(py, || self.inner.request(op, &args, deadline))?;
        let decoded = py.import("msgspec.msgpack")?.call_method1("decode", (PyBytes::new(py, &body),))?;
        Ok((decoded.str()?.extract()?, ok))
    }
}

#[pymethods]
impl PyCore {
    #[new]
    #[pyo3(signature = (*, address, session, token, node, proc, role, hooks, task_oom_retries = -1))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        py: Python<'_>,
        address: String,
        session: [u8; 16],
        token: [u8; 32],
        node: u64,
        proc: u64,
        role: u8,
        hooks: Py<Hooks>,
        task_oom_retries: i32,
    ) -> PyResult<Self> {
        let role = match role {
            crate::ROLE_DRIVER => Role::Driver,
            crate::ROLE_WORKER => Role::Worker,
            crate::ROLE_TOOL => Role::Tool,
            other => return Err(PyValueError::new_err(format!("role {other} has no core of this kind"))),
        };
        let minor = py.version_info().minor;
        let inner = py
            .detach(|| {
                Core::start(Address::Unix(address.into()), session, token, ProcId(node), ProcId(proc), role, minor)
            })
            .map_err(to_py)?;
        if role == Role::Worker {
            inner.set_main_thread();
        } else {
            inner.set_signals(handler_raised);
        }
        inner.set_task_oom_retries(task_oom_retries);
        let mut current = CURRENT.lock();
        // A tool beside a driver leaves the driver's references as they are.
        if role != Role::Tool || current.is_none() {
            *current = Some(inner.clone());
        }
        drop(current);
        Ok(Self { inner, hooks })
    }

    #[getter]
    fn node(&self) -> u64 {
        self.inner.node().0
    }

    #[getter]
    fn proc(&self) -> u64 {
        self.inner.me().0
    }

    fn is_open(&self) -> bool {
        self.inner.is_open()
    }

    /// In a forked child: the process is in no cluster any more, and leaves the parent's as it is.
    fn abandon(&self) {
        *CURRENT.lock() = None;
    }

    fn close(&self, py: Python<'_>) {
        let mut current = CURRENT.lock();
        if current.as_ref().is_some_and(|core| Arc::ptr_eq(core, &self.inner)) {
            *current = None;
        }
        drop(current);
        py.detach(|| self.inner.close());
    }

    fn put(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<ObjectRef> {
        let value = Serialized::new(py, self.hooks.get(), value)?.into_value(py, &self.inner)?;
        Ok(self.object_ref(self.inner.put(value)))
    }

    #[pyo3(signature = (refs, timeout = None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        refs: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let ids = ids_of(&self.inner, refs)?;
        let deadline = deadline(timeout)?;
        let fetched = match waiting(py, || self.inner.get(&ids, deadline))? {
            Got::All(fetched) => fetched,
            Got::Failed(at, payload) => {
                Bytes::of_blob(&payload.data).load(py, self.hooks.get(), Some(ids[at]))?;
                return Err(PyRuntimeError::new_err("an exception could be loaded as a value"));
            }
        };
        // Every fetched value is taken over before the first may raise, so that none leaks.
        let bytes: Vec<PyResult<Bytes>> =
            fetched.into_iter().map(|value| Bytes::of_fetched(&self.inner, value)).collect();
        let values = PyList::empty(py);
        for (bytes, id) in bytes.into_iter().zip(&ids) {
            values.append(bytes?.load(py, self.hooks.get(), Some(*id))?)?;
        }
        Ok(values)
    }

    /// One value; the quick way for `ray.get(ref)`.
    #[pyo3(signature = (reference, timeout = None))]
    fn get_one<'py>(
        &self,
        py: Python<'py>,
        reference: &Bound<'py, ObjectRef>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let ids = [reference.get().id_in(&self.inner)?];
        let mut fetched = match self.inner.fetch_mapped(ids[0]) {
            Some(fetched) => fetched,
            None => {
                let deadline = deadline(timeout)?;
                match waiting(py, || self.inner.get(&ids, deadline))? {
                    Got::All(mut fetched) => fetched.pop().ok_or_else(|| PyRuntimeError::new_err("no value"))?,
                    Got::Failed(_, payload) => Fetched::Inline(payload),
                }
            }
        };
        if let Fetched::Inline(payload) = &mut fetched {
            return Bytes::of_blob(&payload.data).load(py, self.hooks.get(), Some(ids[0]));
        }
        self.load(py, ids[0], fetched)
    }

    /// Splits references into the first `num_returns` that are ready, and the others. `None`: the list
    /// holds something else than references, which is not waited for here.
    fn wait<'py>(
        &self,
        py: Python<'py>,
        refs: &Bound<'py, PyList>,
        num_returns: usize,
        timeout: Option<f64>,
    ) -> PyResult<Option<(Bound<'py, PyList>, Bound<'py, PyList>)>> {
        let mut ids = Vec::with_capacity(refs.len());
        for item in refs.iter() {
            let Ok(reference) = item.cast_exact::<ObjectRef>() else {
                return Ok(None);
            };
            ids.push(reference.get().id_in(&self.inner)?);
        }
        if has_duplicates(&ids) {
            return Err(PyValueError::new_err("ray.wait() was given the same reference twice"));
        }
        let mut ready = self.inner.ready_at_most(&ids, num_returns);
        if ready.len() < num_returns && timeout != Some(0.0) {
            let deadline = deadline(timeout)?;
            match waiting(py, || self.inner.wait_ready(&ids, num_returns, deadline)) {
                Err(error) if error.is_instance_of::<pyo3::exceptions::PyTimeoutError>(py) => {}
                other => other?,
            }
            ready = self.inner.ready_at_most(&ids, num_returns);
        }
        // `ready` ascends; what lies between two of them is copied in one piece.
        let first = PyList::empty(py);
        let mut rest = None;
        let mut from = 0;
        for at in ready.iter().copied().chain([refs.len()]) {
            let between = refs.get_slice(from, at);
            match &rest {
                None if at == refs.len() || !between.is_empty() => rest = Some(between),
                None => {}
                Some(rest) => rest.set_slice(rest.len(), rest.len(), between.as_any())?,
            }
            if at < refs.len() {
                first.append(refs.get_item(at)?)?;
            }
            from = at + 1;
        }
        Ok(Some((first, rest.unwrap_or_else(|| PyList::empty(py)))))
    }

    fn cancel(&self, reference: &Bound<'_, PyAny>, force: bool, recursive: bool) -> PyResult<()> {
        let id = match reference.cast::<StreamRef>() {
            Ok(stream) => ObjectId { task: stream.get().task, index: 0 },
            Err(_) => reference.cast::<ObjectRef>()?.get().id_in(&self.inner)?,
        };
        if self.inner.cancel(id, force, recursive) {
            return Ok(());
        }
        Err(PyValueError::new_err(
            "force=True is not for calls of actors, as it would end the actor: use ray.kill(actor) for that",
        ))
    }

    /// The chain of reasons why a value is not there: (what, reason), outermost first.
    fn why(&self, py: Python<'_>, reference: &Bound<'_, ObjectRef>) -> PyResult<Vec<(String, String)>> {
        self.why_of(py, reference.get().id_in(&self.inner)?)
    }

    /// The same by the object's id, which need not be held here.
    fn why_id(&self, py: Python<'_>, id: &[u8]) -> PyResult<Vec<(String, String)>> {
        let id = ObjectId::from_bytes(id).ok_or_else(|| PyValueError::new_err("an object id has 28 bytes"))?;
        self.why_of(py, id)
    }

    fn _describe_objects(&self) -> Vec<String> {
        self.inner.describe_objects()
    }

    fn statistics(&self) -> HashMap<&'static str, u64> {
        self.inner.statistics().into_iter().collect()
    }

    // ---- actors

    fn next_actor_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let (actor, _) = self.inner.next_actor_id();
        PyBytes::new(py, &actor.to_bytes())
    }

    #[pyo3(signature = (actor, *, blob, args, kwargs, place, run, env, strategy, name, namespace, class_name, label, max_restarts, max_task_retries, max_pending_calls, max_concurrency, is_async, concurrency_groups, detached, recorded))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn create_actor(
        &self,
        py: Python<'_>,
        actor: &[u8],
        blob: &[u8],
        args: &Bound<'_, PyTuple>,
        kwargs: &Bound<'_, PyDict>,
        place: HashMap<String, i64>,
        run: HashMap<String, i64>,
        env: Vec<u8>,
        strategy: Vec<u8>,
        name: String,
        namespace: String,
        class_name: String,
        label: String,
        max_restarts: i32,
        max_task_retries: i32,
        max_pending_calls: i32,
        max_concurrency: u32,
        is_async: bool,
        concurrency_groups: HashMap<String, u32>,
        detached: bool,
        recorded: bool,
    ) -> PyResult<()> {
        let _ = max_task_retries;
        let call = extract_call(py, &self.inner, self.hooks.get(), args, kwargs)?;
        let mut groups: Vec<(String, u32)> = concurrency_groups.into_iter().collect();
        groups.sort_unstable();
        let creation = Creation {
            actor: actor_id(actor)?,
            class: FunctionId(function_id(blob)),
            blob: Blob::new(blob),
            place: sorted(place),
            run: sorted(run),
            env,
            strategy,
            name,
            namespace,
            class_name,
            label,
            max_restarts,
            max_pending_calls,
            max_concurrency,
            is_async,
            groups,
            detached,
            recorded,
        };
        self.inner.create_actor(creation, call.args, call.deps);
        self.inner.release_all(&call.temporary);
        Ok(())
    }

    fn kill_actor(&self, actor: &[u8], no_restart: bool) -> PyResult<()> {
        self.inner.kill_actor(actor_id(actor)?, no_restart);
        Ok(())
    }

    #[pyo3(signature = (actor, *, max_pending, any_order))]
    fn configure_calls(&self, actor: &[u8], max_pending: i32, any_order: bool) -> PyResult<()> {
        self.inner.configure_calls(actor_id(actor)?, max_pending, any_order);
        Ok(())
    }

    /// 0 pending, 1 alive, 2 restarting, 3 dead, -1 never heard of.
    fn actor_state(&self, actor: &[u8]) -> PyResult<i32> {
        Ok(match self.inner.actor_state(actor_id(actor)?) {
            None => -1,
            Some(ActorState::Pending) => 0,
            Some(ActorState::Alive { .. }) => 1,
            Some(ActorState::Restarting) => 2,
            Some(ActorState::Dead(_)) => 3,
        })
    }

    // ---- the node

    #[pyo3(signature = (op, args, timeout = Some(30.0)))]
    fn request<'py>(
        &self,
        py: Python<'py>,
        op: &str,
        args: &[u8],
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let deadline = deadline(timeout)?;
        let (ok, body) = waiting(py, || self.inner.request(op, args, deadline))?;
        let body = PyBytes::new(py, &body);
        if ok {
            return Ok(body);
        }
        let parts: Vec<String> = py.import("msgspec.msgpack")?.call_method1("decode", (body,))?.extract()?;
        Err(PyErr::new::<PyRuntimeError, _>((parts.first().cloned(), parts.get(1).cloned())))
    }

    fn tell(&self, op: &str, args: &[u8]) -> PyResult<()> {
        self.inner.tell(op, args).map_err(to_py)
    }

    fn promise(
        &self,
        py: Python<'_>,
        value: &Bound<'_, PyAny>,
        op: &str,
        args: &[u8],
        awaited: &str,
    ) -> PyResult<ObjectRef> {
        let value = Serialized::new(py, self.hooks.get(), value)?.into_value(py, &self.inner)?;
        let object = self.inner.promise(op, args, value, awaited).map_err(to_py)?;
        Ok(self.object_ref(object))
    }

    fn next_log<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let log = py.detach(|| self.inner.next_log());
        Ok(match log {
            None => None,
            Some(Log::Lines { name, pid, stream, lines, ip }) => {
                Some((name, pid, stream, lines, ip).into_pyobject(py)?.into_any())
            }
            Some(Log::Notice { level, text }) => Some((level, text).into_pyobject(py)?.into_any()),
            Some(Log::Unhandled(payload)) => {
                let error = match Bytes::of_blob(&payload.data).load(py, self.hooks.get(), None) {
                    Ok(value) => value,
                    Err(error) => error.into_value(py).into_bound(py).into_any(),
                };
                Some((error,).into_pyobject(py)?.into_any())
            }
        })
    }

    // ---- executing

    #[pyo3(signature = (group = ""))]
    fn next_task(slf: &Bound<'_, Self>, group: &str) -> PyResult<Option<Task>> {
        let this = slf.get();
        let work = waiting(slf.py(), || this.inner.next_work(group))?;
        Ok(work.map(|work| Task::new(&this.inner, this.hooks.clone_ref(slf.py()), work)))
    }

    fn poll_task(&self, py: Python<'_>) -> Option<Task> {
        self.inner.poll_work().map(|work| Task::new(&self.inner, self.hooks.clone_ref(py), work))
    }

    fn task_fd(&self) -> i32 {
        self.inner.task_event_fd()
    }

    fn tasks_over(&self) -> bool {
        self.inner.tasks_over()
    }

    fn actor_ready(&self) {
        self.inner.actor_ready();
    }

    fn actor_failed(&self, py: Python<'_>, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let payload = crate::task::error_payload(py, self.hooks.get(), error, ErrorCode::ActorDied)?;
        self.inner.actor_failed(&payload.data, crate::task::words(error).as_deref().unwrap_or_default());
        Ok(())
    }

    #[pyo3(signature = (*, answered))]
    fn leave(&self, answered: bool) {
        self.inner.leave(answered);
    }

    fn linger(&self, py: Python<'_>) {
        py.detach(|| self.inner.linger());
    }

    fn actor_exit(&self, reason: &str) {
        self.inner.actor_exit(reason);
    }

    fn cancelled(&self, task: &[u8]) -> PyResult<bool> {
        Ok(self.inner.is_cancelled(crate::task::task_id(task)?))
    }
}

/// Whether an id stands twice. References that are waited for together were mostly made one after
/// another, so a bitmap over their running numbers answers nearly always; a clash is looked at closely.
fn has_duplicates(ids: &[ObjectId]) -> bool {
    const BITS: u64 = 1 << 16;
    let mut seen = vec![0_u64; (BITS / 64) as usize];
    for id in ids {
        let at = (id.task.seq.wrapping_add(u64::from(id.index))) % BITS;
        let word = &mut seen[(at / 64) as usize];
        if *word >> (at % 64) & 1 == 1 {
            return ids.iter().collect::<std::collections::HashSet<_>>().len() != ids.len();
        }
        *word |= 1 << (at % 64);
    }
    false
}

pub(crate) fn actor_id(bytes: &[u8]) -> PyResult<ActorId> {
    ActorId::from_bytes(bytes).ok_or_else(|| PyValueError::new_err("an actor id has 16 bytes"))
}

pub(crate) fn sorted(map: HashMap<String, i64>) -> Vec<(String, i64)> {
    let mut items: Vec<_> = map.into_iter().collect();
    items.sort_unstable();
    items
}

/// Msgpack of a list of one number.
fn rmp_int(number: u64) -> Vec<u8> {
    let mut out = vec![0x91, 0xcf];
    out.extend_from_slice(&number.to_be_bytes());
    out
}

/// Msgpack of a list of two numbers.
fn rmp_pair(first: u64, second: u64) -> Vec<u8> {
    let mut out = vec![0x92, 0xcf];
    out.extend_from_slice(&first.to_be_bytes());
    out.push(0xcf);
    out.extend_from_slice(&second.to_be_bytes());
    out
}

/// Msgpack of a list of one short byte string.
fn rmp_bin(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x91, 0xc4, bytes.len() as u8];
    out.extend_from_slice(bytes);
    out
}

/// Finished references as events, for event loops and futures.
#[pyclass(frozen, name = "Completions", module = "ray._core")]
pub(crate) struct PyCompletions {
    core: Arc<Core>,
    queue: Arc<Completions>,
}

#[pymethods]
impl PyCompletions {
    #[new]
    fn new(core: &Bound<'_, PyCore>) -> PyResult<Self> {
        Ok(Self { core: core.get().inner.clone(), queue: Completions::new()? })
    }

    fn fileno(&self) -> i32 {
        self.queue.as_fd().as_raw_fd()
    }

    fn watch(&self, reference: &Bound<'_, ObjectRef>, token: u64) -> PyResult<()> {
        self.core.watch(reference.get().id_in(&self.core)?, &self.queue, token);
        Ok(())
    }

    fn watch_stream(&self, stream: &Bound<'_, StreamRef>, token: u64) {
        self.core.stream_watch(stream.get().task, &self.queue, token);
    }

    fn drain(&self) -> Vec<u64> {
        self.queue.drain()
    }

    /// Waits for events on the descriptor; a thread of its own does that.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> Vec<u64> {
        py.detach(|| skate_core::sys::wait_readable(self.queue.as_fd(), timeout));
        self.queue.drain()
    }

    /// Forgets everything that is watched, and ends a `wait()` of another thread.
    fn close(&self) {
        self.core.unwatch_all(&self.queue);
        self.queue.add(u64::MAX);
    }
}
