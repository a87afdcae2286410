//! What touches the system: transport, shared memory, and the core that joins the machines to them.

pub mod core;
pub mod node_wire;
pub mod store;
pub mod sys;
pub mod transport;
