//! Calls: from Python arguments to the owner machine.

use std::collections::HashMap;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use skate_core::core::{Core, INLINE_BYTES_MAX};
use skate_proto::ids::{FunctionId, ObjectId};
use skate_proto::leases::ClassSpec;
use skate_proto::msg::{CallDef, Returns, Slot};
use skate_proto::payload::{Blob, Payload};

use crate::Hooks;
use crate::core::{PyCore, sorted};
use crate::errors::to_py;
use crate::refs::{ActorHandleRef, ObjectRef, StreamRef};
use crate::value::{Serialized, encode_args};

/// A remote function or actor method with its options, ready to be submitted.
#[pyclass(frozen, module = "ray._core")]
pub(crate) struct Template {
    core: Arc<Core>,
    hooks: Py<Hooks>,
    def: u32,
    returns: Returns,
    handle: Option<Py<ActorHandleRef>>,
}

/// A call's arguments as the owner machine takes them.
pub(crate) struct Call {
    pub(crate) args: Payload,
    pub(crate) deps: Vec<(Slot, ObjectId)>,
    /// Objects made for this call, which the task counts from its submission on.
    pub(crate) temporary: Vec<ObjectId>,
}

/// Names a pickled function by its content.
pub(crate) fn function_id(blob: &[u8]) -> [u8; 16] {
    if blob.is_empty() {
        return [0; 16];
    }
    skate_proto::digest::short(blob)
}

pub(crate) fn extract_call(
    py: Python<'_>,
    core: &Arc<Core>,
    hooks: &Hooks,
    args: &Bound<'_, PyTuple>,
    kwargs: &Bound<'_, PyDict>,
) -> PyResult<Call> {
    let mut deps = Vec::new();
    for (at, item) in args.iter().enumerate() {
        if let Ok(reference) = item.cast::<ObjectRef>() {
            deps.push((Slot::Position(at as u32), reference.get().id_in(core)?));
        }
    }
    for (key, item) in kwargs.iter() {
        if let Ok(reference) = item.cast::<ObjectRef>() {
            deps.push((Slot::Keyword(key.extract()?), reference.get().id_in(core)?));
        }
    }
    if let Some(bytes) = encode_args(args, Some(kwargs), |item| item.cast::<ObjectRef>().is_ok())
        && bytes.len() <= INLINE_BYTES_MAX
    {
        return Ok(Call { args: Payload::plain(&bytes), deps, temporary: Vec::new() });
    }
    let both = if deps.is_empty() {
        PyTuple::new(py, [args.as_any(), kwargs.as_any()])?
    } else {
        let none = py.None().into_bound(py);
        let positional = args.iter().map(|item| if item.cast::<ObjectRef>().is_ok() { none.clone() } else { item });
        let positional = PyTuple::new(py, positional.collect::<Vec<_>>())?;
        let keywords = PyDict::new(py);
        for (key, item) in kwargs.iter() {
            keywords.set_item(key, if item.cast::<ObjectRef>().is_ok() { none.clone() } else { item })?;
        }
        PyTuple::new(py, [positional.as_any(), keywords.as_any()])?
    };
    let serialized = Serialized::pickle(py, hooks, both.as_any(), crate::value::TAG_PICKLE, 0)?;
    if serialized.len() <= INLINE_BYTES_MAX {
        return Ok(Call { args: serialized.into_payload(py), deps, temporary: Vec::new() });
    }
    let object = core.put(serialized.into_value(py, core)?);
    deps.insert(0, (Slot::Whole, object));
    Ok(Call { args: Payload::plain(&[crate::value::TAG_NO_ARGS]), deps, temporary: vec![object] })
}

impl Drop for Template {
    fn drop(&mut self) {
        // In a forked child the lock may be held by a thread that is not there.
        if !self.core.is_forked() {
            self.core.undefine(self.def);
        }
    }
}

#[pymethods]
impl Template {
    #[new]
    #[pyo3(signature = (core, *, blob, name, num_returns, max_retries, retry_exceptions, demand = None, env = Vec::new(), strategy = Vec::new(), actor = None, method = String::new(), concurrency_group = String::new(), backpressure = -1, recorded = true))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        core: &Bound<'_, PyCore>,
        blob: &[u8],
        name: String,
        num_returns: i64,
        max_retries: i32,
        retry_exceptions: bool,
        demand: Option<HashMap<String, i64>>,
        env: Vec<u8>,
        strategy: Vec<u8>,
        actor: Option<Py<ActorHandleRef>>,
        method: String,
        concurrency_group: String,
        backpressure: i64,
        recorded: bool,
    ) -> PyResult<Self> {
        let py = core.py();
        let core = core.get();
        let returns = match num_returns {
            -1 => Returns::Streaming,
            -2 => Returns::Dynamic,
            count => Returns::Count(
                u32::try_from(count).map_err(|_| PyValueError::new_err("num_returns must not be negative"))?,
            ),
        };
        let class = match (&actor, demand) {
            (None, Some(demand)) => {
                Some(ClassSpec { demand: sorted(demand), env, strategy, retriable: max_retries != 0 })
            }
            (None, None) => return Err(PyValueError::new_err("a task needs a demand")),
            (Some(_), _) => None,
        };
        let call = CallDef {
            function: FunctionId(function_id(blob)),
            name,
            method,
            group: concurrency_group,
            returns,
            retry_exceptions,
            backpressure: u32::try_from(backpressure).unwrap_or(0),
            actor: actor.as_ref().map(|handle| handle.bind(py).get().actor()),
            recorded,
        };
        let def = core.inner.define(call, Blob::new(blob), class, max_retries);
        Ok(Self { core: core.inner.clone(), hooks: core.hooks.clone_ref(py), def, returns, handle: actor })
    }

    fn submit<'py>(
        &self,
        py: Python<'py>,
        args: &Bound<'py, PyTuple>,
        kwargs: &Bound<'py, PyDict>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let call = extract_call(py, &self.core, self.hooks.get(), args, kwargs)?;
        let handle = self.handle.as_ref().map(|handle| handle.bind(py).get().object);
        let result = self.core.submit(self.def, call.args, call.deps, handle, crate::task::current_task());
        self.core.release_all(&call.temporary);
        let task = result.map_err(to_py)?;
        let reference = |index| ObjectRef::adopt(&self.core, ObjectId { task, index });
        Ok(match self.returns {
            Returns::Count(0) => py.None().into_bound(py),
            Returns::Count(1) | Returns::Dynamic => Bound::new(py, reference(0))?.into_any(),
            Returns::Count(count) => {
                let list = PyList::empty(py);
                for index in 0..count {
                    list.append(Bound::new(py, reference(index))?)?;
                }
                list.into_any()
            }
            Returns::Streaming => Bound::new(py, StreamRef::adopt(&self.core, task))?.into_any(),
        })
    }

    /// The content's name, as the worker will see it.
    #[staticmethod]
    fn function_id<'py>(py: Python<'py>, blob: &[u8]) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &function_id(blob))
    }
}
