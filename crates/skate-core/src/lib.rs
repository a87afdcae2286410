//! What touches the system.
