//! The module `ray._core`: converts between Python and the core, and decides nothing.

mod core;
mod errors;
mod node_core;
mod refs;
mod task;
mod template;
mod value;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use skate_proto::payload::ErrorCode;

pub(crate) const ROLE_NODE: u8 = 1;
pub(crate) const ROLE_DRIVER: u8 = 2;
pub(crate) const ROLE_WORKER: u8 = 3;
pub(crate) const ROLE_TOOL: u8 = 4;

/// What the core calls back into Python for.
#[pyclass(frozen, module = "ray._core")]
pub(crate) struct Hooks {
    pub(crate) dump: Py<PyAny>,
    pub(crate) load: Py<PyAny>,
    pub(crate) load_error: Py<PyAny>,
}

#[pymethods]
impl Hooks {
    #[new]
    #[pyo3(signature = (*, dump, load, load_error))]
    fn new(dump: Py<PyAny>, load: Py<PyAny>, load_error: Py<PyAny>) -> Self {
        Self { dump, load, load_error }
    }
}

/// A random number that is not zero: an identity.
#[pyfunction]
fn random_id() -> PyResult<u64> {
    skate_core::sys::random_id().map_err(|error| PyOSError::new_err(error.to_string()))
}

/// A sealed anonymous file of `size` bytes; its descriptor.
#[pyfunction]
fn memfd(name: &str, size: u64) -> PyResult<i32> {
    use std::os::fd::IntoRawFd;
    let fd = skate_core::sys::create_segment(name, size)?;
    Ok(fd.into_raw_fd())
}

/// The signal and the descriptor of dumps of stacks, for `faulthandler.register`.
#[pyfunction]
fn stack_target() -> (i32, i32) {
    (skate_core::stacks::signal(), skate_core::stacks::descriptor())
}

/// Puts the core's handler in front of `faulthandler`'s.
#[pyfunction]
fn install_stack_handler() {
    skate_core::stacks::install();
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Hooks>()?;
    module.add_class::<core::PyCore>()?;
    module.add_class::<core::PyCompletions>()?;
    module.add_class::<node_core::NodeCore>()?;
    module.add_class::<refs::ObjectRef>()?;
    module.add_class::<refs::ActorHandleRef>()?;
    module.add_class::<refs::StreamRef>()?;
    module.add_class::<task::Task>()?;
    module.add_class::<template::Template>()?;
    module.add("CoreClosed", module.py().get_type::<errors::CoreClosed>())?;
    module.add("StoreFull", module.py().get_type::<errors::StoreFull>())?;
    module.add("DiskFull", module.py().get_type::<errors::DiskFull>())?;
    module.add_function(wrap_pyfunction!(refs::_rebuild_ref, module)?)?;
    module.add_function(wrap_pyfunction!(random_id, module)?)?;
    module.add_function(wrap_pyfunction!(memfd, module)?)?;
    module.add_function(wrap_pyfunction!(stack_target, module)?)?;
    module.add_function(wrap_pyfunction!(install_stack_handler, module)?)?;
    module.add_function(wrap_pyfunction!(node_core::discover, module)?)?;
    module.add("ROLE_NODE", ROLE_NODE)?;
    module.add("ROLE_DRIVER", ROLE_DRIVER)?;
    module.add("ROLE_WORKER", ROLE_WORKER)?;
    module.add("ROLE_TOOL", ROLE_TOOL)?;
    for (name, code) in [
        ("ERROR_TASK", ErrorCode::Task),
        ("ERROR_WORKER_CRASHED", ErrorCode::WorkerCrashed),
        ("ERROR_ACTOR_DIED", ErrorCode::ActorDied),
        ("ERROR_ACTOR_UNAVAILABLE", ErrorCode::ActorUnavailable),
        ("ERROR_CANCELLED", ErrorCode::Cancelled),
        ("ERROR_OWNER_DIED", ErrorCode::OwnerDied),
        ("ERROR_OBJECT_LOST", ErrorCode::ObjectLost),
        ("ERROR_OUT_OF_MEMORY", ErrorCode::OutOfMemory),
        ("ERROR_PENDING_CALLS", ErrorCode::PendingCalls),
        ("ERROR_INFEASIBLE", ErrorCode::Infeasible),
        ("ERROR_OTHER", ErrorCode::Other),
        ("ERROR_GROUP_REMOVED", ErrorCode::GroupRemoved),
    ] {
        module.add(name, code as u8)?;
    }
    Ok(())
}
