//! One table from the core's errors to Python's.

use pyo3::create_exception;
use pyo3::exceptions::{
    PyConnectionError, PyKeyboardInterrupt, PyMemoryError, PyPermissionError, PyRuntimeError, PyTimeoutError,
    PyValueError,
};
use pyo3::prelude::*;
use skate_core::core::CoreError;
use skate_core::transport::DiscoverError;

// What the core says must be told from what user code raises, which may be any builtin exception.
create_exception!(ray._core, CoreClosed, PyConnectionError, "The core has lost its node, or was closed.");
create_exception!(ray._core, StoreFull, PyMemoryError, "The object store has no room for a value.");
create_exception!(ray._core, DiskFull, StoreFull, "Neither the object store nor the disk has room for a value.");
create_exception!(ray._core, NotYourTurn, StoreFull, "Others need the room in the object store first.");

/// The Python layer turns these into Ray's exceptions, where it knows what the user asked for.
pub(crate) fn to_py(error: CoreError) -> PyErr {
    match error {
        CoreError::TimedOut => PyTimeoutError::new_err("the timeout passed"),
        CoreError::Interrupted => PyKeyboardInterrupt::new_err(()),
        CoreError::Closed(_) | CoreError::Start(_) => CoreClosed::new_err(error.to_string()),
        CoreError::Discover(ref reason) => {
            let text = error.to_string();
            match reason {
                DiscoverError::NoAddress { .. } => PyValueError::new_err(text),
                DiscoverError::Timeout { .. } => PyTimeoutError::new_err(text),
                DiscoverError::Token { .. } => PyPermissionError::new_err(text),
                _ => PyConnectionError::new_err(text),
            }
        }
        CoreError::StoreFull(_) => StoreFull::new_err(error.to_string()),
        CoreError::DiskFull(_) => DiskFull::new_err(error.to_string()),
        CoreError::NotYourTurn(_) => NotYourTurn::new_err(error.to_string()),
        CoreError::TooManyPendingCalls(_) => Python::attach(|py| {
            let class = py.import("ray.exceptions").and_then(|module| module.getattr("PendingCallsLimitExceeded"));
            match class.and_then(|class| class.call1((error.to_string(),))) {
                Ok(instance) => PyErr::from_value(instance),
                Err(broken) => broken,
            }
        }),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}
