//! What touches the system.

pub mod transport;
