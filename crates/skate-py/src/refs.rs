//! Python objects that count references.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};
use skate_core::core::Core;
use skate_proto::ids::{ActorId, NodeKey, ObjectId, ProcId, TaskId};

use crate::core::{PyCore, current};
use crate::value::collect;

/// What `__reduce__` returns: a callable, and its arguments.
type Reduced<'py, A> = (Bound<'py, PyAny>, A);

/// A reference to a value, counted while this object lives.
#[pyclass(frozen, weakref, name = "ObjectRef", module = "ray")]
pub(crate) struct ObjectRef {
    pub(crate) id: ObjectId,
    core: Option<Arc<Core>>,
}

impl ObjectRef {
    /// Adopts one local count.
    pub(crate) fn adopt(core: &Arc<Core>, id: ObjectId) -> Self {
        Self { id, core: Some(core.clone()) }
    }

    /// The id, for use with `core`.
    ///
    /// A reference that outlived its cluster means nothing to another one, which would wait for ever.
    pub(crate) fn id_in(&self, core: &Arc<Core>) -> PyResult<ObjectId> {
        match &self.core {
            Some(own) if !Arc::ptr_eq(own, core) => Err(stale(self.id)),
            _ => Ok(self.id),
        }
    }
}

impl Drop for ObjectRef {
    fn drop(&mut self) {
        if let Some(core) = &self.core {
            core.release(self.id);
        }
    }
}

fn stale(id: ObjectId) -> PyErr {
    PyValueError::new_err(format!(
        "ObjectRef({id}) belongs to a cluster that was shut down (ray.shutdown), and its value went with that; make the \
         value again, with ray.put() or by calling the task again"
    ))
}

#[pymethods]
impl ObjectRef {
    #[new]
    #[pyo3(signature = (id))]
    fn new(id: &[u8]) -> PyResult<Self> {
        let id = ObjectId::from_bytes(id).ok_or_else(|| {
            PyValueError::new_err(format!("an object id has {} bytes, not {}", ObjectId::LEN, id.len()))
        })?;
        let core = current();
        if let Some(core) = &core {
            core.retain(id);
        }
        Ok(Self { id, core })
    }

    fn binary<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.id.to_bytes())
    }

    fn hex(&self) -> String {
        self.id.to_string()
    }

    fn is_nil(&self) -> bool {
        self.id.to_bytes().iter().all(|b| *b == 0xff)
    }

    fn task_id_binary<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.id.task.to_bytes())
    }

    /// The id of the task that makes the value.
    fn task_id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("ray._runtime.ids")?.getattr("TaskID")?.call1((self.task_id_binary(py),))
    }

    fn owner(&self) -> u64 {
        self.id.owner().0
    }

    /// A `concurrent.futures.Future` of the value.
    fn future<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("ray._runtime.futures")?.call_method1("future_of", (slf,))
    }

    /// An `asyncio.Future` of the value, in the running loop.
    fn as_future<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("ray._runtime.futures")?.call_method1("as_asyncio_future", (slf,))
    }

    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("ray._runtime.futures")?.call_method1("await_ref", (slf,))
    }

    fn __hash__(&self) -> u64 {
        self.id.task.seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.id.task.proc.0 ^ u64::from(self.id.index)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().id == self.id)
    }

    fn __repr__(&self) -> String {
        format!("ObjectRef({})", self.id)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py, (Bound<'py, PyBytes>,)>> {
        if self.core.as_ref().is_some_and(|core| core.is_forked() || !core.is_open()) {
            return Err(stale(self.id));
        }
        leave(self.core.as_ref(), self.id);
        Ok((py.import("ray._core")?.getattr("_rebuild_ref")?, (self.binary(py),)))
    }

    #[classmethod]
    fn __class_getitem__<'py>(cls: &Bound<'py, PyType>, item: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        cls.py().import("types")?.getattr("GenericAlias")?.call1((cls, item))
    }

    #[classmethod]
    fn from_binary(_cls: &Bound<'_, PyType>, id: &[u8]) -> PyResult<Self> {
        Self::new(id)
    }

    #[classmethod]
    fn from_hex(_cls: &Bound<'_, PyType>, hex: &str) -> PyResult<Self> {
        let digit = |at| hex.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(digit).collect();
        Self::new(&bytes.ok_or_else(|| PyValueError::new_err(format!("{hex:?} is not hexadecimal")))?)
    }

    /// A reference to nothing, for tests of programs.
    #[classmethod]
    fn from_random(_cls: &Bound<'_, PyType>) -> PyResult<Self> {
        let word = || skate_core::sys::random_id().map(u64::to_be_bytes);
        let bytes = [word()?, word()?, word()?, word()?].concat();
        let id = ObjectId::from_bytes(&bytes[..ObjectId::LEN]).expect("the right length");
        Ok(Self { id, core: None })
    }

    #[classmethod]
    fn size(_cls: &Bound<'_, PyType>) -> usize {
        ObjectId::LEN
    }

    fn job_id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        py.import("ray._runtime.ids")?.getattr("JobID")?.call_method1("from_int", (1,))
    }

    /// Where the call stood; call sites are not recorded.
    fn call_site(&self) -> &'static str {
        ""
    }

    /// The owning process, in hexadecimal.
    fn owner_address(&self) -> String {
        format!("{:016x}", self.id.owner().0)
    }

    fn tensor_transport(&self) -> Option<&'static str> {
        None
    }

    fn __lt__(&self, other: &Self) -> bool {
        self.id < other.id
    }

    #[classmethod]
    fn nil(_cls: &Bound<'_, PyType>) -> PyResult<Self> {
        Ok(Self { id: ObjectId::from_bytes(&[0xff; ObjectId::LEN]).expect("the right length"), core: None })
    }
}

/// A reference is being pickled. By a program's own pickle nobody knows where the bytes go, so the
/// object is kept until this process ends.
fn leave(core: Option<&Arc<Core>>, id: ObjectId) {
    if !collect(id)
        && let Some(core) = core
    {
        core.retain(id);
    }
}

#[pyfunction]
pub(crate) fn _rebuild_ref(id: &[u8]) -> PyResult<ObjectRef> {
    ObjectRef::new(id)
}

/// Counts one handle of an actor, unless it is the actor's own, which must not keep itself alive.
#[pyclass(frozen, module = "ray._core")]
pub(crate) struct ActorHandleRef {
    pub(crate) object: ObjectId,
    pub(crate) core: Option<Arc<Core>>,
    counted: bool,
}

impl ActorHandleRef {
    pub(crate) fn actor(&self) -> ActorId {
        ActorId { proc: self.object.task.proc, seq: self.object.task.seq }
    }
}

impl Drop for ActorHandleRef {
    fn drop(&mut self) {
        if let (Some(core), true) = (&self.core, self.counted) {
            core.release(self.object);
        }
    }
}

#[pymethods]
impl ActorHandleRef {
    #[new]
    #[pyo3(signature = (actor, owner_node, *, counted = true))]
    fn new(actor: &[u8], owner_node: u64, counted: bool) -> PyResult<Self> {
        let id = ActorId::from_bytes(actor).ok_or_else(|| PyValueError::new_err("an actor id has 16 bytes"))?;
        let task = TaskId { node: NodeKey(owner_node), proc: ProcId(id.proc.0), seq: id.seq };
        let object = ObjectId { task, index: ObjectId::ACTOR_INDEX };
        let core = current();
        if let (Some(core), true) = (&core, counted) {
            core.hold_handle(object);
        }
        Ok(Self { object, core, counted })
    }

    fn binary<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.actor().to_bytes())
    }

    #[getter]
    fn owner_node(&self) -> u64 {
        self.object.task.node.0
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Reduced<'py, (Bound<'py, PyBytes>, u64)>> {
        leave(self.core.as_ref(), self.object);
        Ok((py.get_type::<Self>().into_any(), (self.binary(py), self.owner_node())))
    }
}

/// The consumer's end of a streaming generator.
#[pyclass(frozen, module = "ray._core")]
pub(crate) struct StreamRef {
    pub(crate) task: TaskId,
    core: Arc<Core>,
}

impl StreamRef {
    pub(crate) fn adopt(core: &Arc<Core>, task: TaskId) -> Self {
        Self { task, core: core.clone() }
    }
}

impl Drop for StreamRef {
    fn drop(&mut self) {
        if self.core.is_forked() {
            return;
        }
        self.core.stream_dropped(self.task);
        self.core.release(ObjectId { task: self.task, index: 0 });
    }
}

#[pymethods]
impl StreamRef {
    #[pyo3(signature = (timeout = None))]
    fn next(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<ObjectRef>> {
        let deadline = crate::core::deadline(timeout)?;
        let id = crate::core::waiting(py, || self.core.stream_next(self.task, deadline))?;
        Ok(id.map(|id| ObjectRef::adopt(&self.core, id)))
    }

    fn ready(&self) -> bool {
        self.core.stream_ready(self.task)
    }

    fn completed(&self) -> ObjectRef {
        let id = ObjectId { task: self.task, index: 0 };
        self.core.retain(id);
        ObjectRef::adopt(&self.core, id)
    }

    fn task_id_binary<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.task.to_bytes())
    }
}

impl PyCore {
    pub(crate) fn object_ref(&self, id: ObjectId) -> ObjectRef {
        ObjectRef::adopt(&self.inner, id)
    }
}
