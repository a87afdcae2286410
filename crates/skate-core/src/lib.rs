//! What touches the system.

pub mod store;
pub mod transport;
