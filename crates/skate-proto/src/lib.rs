//! The machines of the data plane: events in, effects out.
//!
//! Nothing here knows a socket, a clock, a thread or a file. What must happen is returned, and
//! `skate-core` makes it happen; so the same code runs in production, in unit tests and in simulation.

#![forbid(unsafe_code)]

pub mod actors;
pub mod alloc;
pub mod call_back;
pub mod describe;
pub mod digest;
pub mod executor;
pub mod frame;
pub mod handshake;
pub mod ids;
pub mod leases;
pub mod locality;
pub mod location;
pub mod msg;
pub mod objects;
pub mod owner;
pub mod payload;
pub mod spilling;
pub mod streams;
pub mod tasks;
