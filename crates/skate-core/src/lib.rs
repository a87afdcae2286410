//! What touches the system: transport, shared memory, and the core that joins the machines to them.
//!
//! There is no Python in here: `cargo test -p skate-core` is a complete verdict on this crate.

pub mod core;
pub mod node_wire;
pub mod parsers;
pub mod register;
pub mod relay;
pub mod spill;
pub mod stacks;
pub mod store;
pub mod sys;
pub mod transfer;
pub mod transport;
