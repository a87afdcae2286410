//! Serialised values as they travel and rest: bytes, and the references met inside them.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::ObjectId;
use crate::location::Location;

/// Immutable bytes, shared by reference count.
#[derive(Clone, PartialEq, Eq)]
pub struct Blob(pub Arc<[u8]>);

impl Blob {
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(Arc::from(bytes))
    }

    #[must_use]
    pub fn empty() -> Self {
        Self(Arc::from([].as_slice()))
    }
}

impl std::ops::Deref for Blob {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes: &[u8] = serde_bytes::deserialize(deserializer)?;
        Ok(Self::new(bytes))
    }
}

/// A serialised value and the references that it contains. Whoever keeps a payload keeps them alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    pub data: Blob,
    pub refs: Vec<ObjectId>,
}

impl Payload {
    #[must_use]
    pub fn plain(data: &[u8]) -> Self {
        Self { data: Blob::new(data), refs: Vec::new() }
    }

    /// A value that stands for an exception; readers raise it.
    #[must_use]
    pub fn error(code: ErrorCode, text: &str) -> Self {
        let mut data = Vec::with_capacity(text.len() + 2);
        data.push(TAG_ERROR_TEXT);
        data.push(code as u8);
        data.extend_from_slice(text.as_bytes());
        Self::plain(&data)
    }

    #[must_use]
    pub fn is_error(&self) -> bool {
        matches!(self.data.first(), Some(&TAG_ERROR_TEXT | &TAG_ERROR_PICKLE))
    }

    /// Whether a task failed, by its own fault or with its worker: somebody should hear of it.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        const FAILURES: [u8; 3] = [ErrorCode::Task as u8, ErrorCode::WorkerCrashed as u8, ErrorCode::OutOfMemory as u8];
        self.is_error() && self.data.get(1).is_some_and(|code| FAILURES.contains(code))
    }

    /// The code of an exception, and what it says in plain text, cut to [`TEXT_BYTES_MAX`].
    #[must_use]
    pub fn describe_error(&self) -> (u8, String) {
        let code = self.data.get(1).copied().unwrap_or(ErrorCode::Other as u8);
        if self.data.first() != Some(&TAG_ERROR_TEXT) {
            return (code, String::new());
        }
        let text = self.data.get(2..).unwrap_or_default();
        (code, String::from_utf8_lossy(&text[..text.len().min(TEXT_BYTES_MAX)]).into_owned())
    }

    /// The same exception under another code.
    #[must_use]
    pub fn with_code(&self, code: ErrorCode) -> Self {
        let mut data = self.data.to_vec();
        if let Some(old) = data.get_mut(1).filter(|_| self.is_error()) {
            *old = code as u8;
        }
        Self { data: Blob::new(&data), refs: self.refs.clone() }
    }
}

/// What history keeps of an exception's text.
pub const TEXT_BYTES_MAX: usize = 1024;

/// First byte of a payload that holds an exception's text; the code follows.
pub const TAG_ERROR_TEXT: u8 = 64;
/// First byte of a payload that holds a pickled exception; the code follows.
pub const TAG_ERROR_PICKLE: u8 = 65;

/// Why a value is an exception. The numbers are shared with Python.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ErrorCode {
    Task = 1,
    WorkerCrashed = 2,
    ActorDied = 3,
    ActorUnavailable = 4,
    Cancelled = 5,
    OwnerDied = 6,
    ObjectLost = 7,
    OutOfMemory = 8,
    PendingCalls = 9,
    Infeasible = 10,
    Other = 11,
    GroupRemoved = 12,
}

/// A value: inside the message, or in a segment of shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    Inline(Payload),
    Stored { location: Location, refs: Vec<ObjectId> },
}

impl Value {
    #[must_use]
    pub fn refs(&self) -> &[ObjectId] {
        match self {
            Self::Inline(payload) => &payload.refs,
            Self::Stored { refs, .. } => refs,
        }
    }

    #[must_use]
    pub fn is_error(&self) -> bool {
        matches!(self, Self::Inline(payload) if payload.is_error())
    }
}
