//! The machines of the data plane: events in, effects out.
//!
//! Nothing here knows a socket, a clock, a thread or a file. What must happen is returned, and
//! `skate-core` makes it happen; so the same code runs in production, in unit tests and in simulation.

#![forbid(unsafe_code)]

pub mod alloc;
pub mod frame;
pub mod handshake;
pub mod ids;
pub mod location;
