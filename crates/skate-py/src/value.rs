//! Values as bytes and back.
//!
//! The layout of a payload, after its first byte:
//!
//! - *native*: one of the `TAG_*` below 32; plain builtins, encoded here without pickle;
//! - `TAG_PICKLE` (and errors with `TAG_ERROR_PICKLE`): at byte 1 a code, at 4 the number of buffers
//!   (u32), at 8 the length of the pickle (u64), at 16 the length of each buffer (u64), then the pickle,
//!   then the buffers, each at a multiple of 64 from the start.
//!
//! Containers are encoded natively only where pickle would give the same: a list or dict inside
//! another container could be shared with a third, and sharing is only kept by pickle.

use std::cell::RefCell;
use std::os::raw::c_int;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use skate_core::core::{Core, Fetched, INLINE_BYTES_MAX};
use skate_core::store::{Mapping, copy_into};
use skate_proto::ids::ObjectId;
use skate_proto::payload::{Blob, Payload, TAG_ERROR_PICKLE, TAG_ERROR_TEXT, Value};

use crate::Hooks;
use crate::core::waiting;

const TAG_NONE: u8 = 0;
const TAG_FALSE: u8 = 1;
const TAG_TRUE: u8 = 2;
const TAG_INT: u8 = 3;
const TAG_FLOAT: u8 = 4;
const TAG_STR: u8 = 5;
const TAG_BYTES: u8 = 6;
const TAG_TUPLE: u8 = 7;
const TAG_LIST: u8 = 8;
const TAG_DICT: u8 = 9;
pub(crate) const TAG_PICKLE: u8 = 32;
/// A call's arguments: none; or natively, positional ones and keywords.
pub(crate) const TAG_NO_ARGS: u8 = 40;
pub(crate) const TAG_ARGS: u8 = 41;

/// Containers with more elements than this are pickled: its C loop is as fast.
const NATIVE_ELEMENTS_MAX: usize = 64;
const NATIVE_DEPTH_MAX: u32 = 4;
const BUFFER_ALIGN: usize = 64;
const HEADER: usize = 16;

thread_local! {
    /// References met by the pickling that goes on in this thread.
    static COLLECTORS: RefCell<Vec<Vec<ObjectId>>> = const { RefCell::new(Vec::new()) };
}

/// Notes a reference that is being pickled. False: no value of ours is being pickled.
pub(crate) fn collect(id: ObjectId) -> bool {
    COLLECTORS.with_borrow_mut(|stack| match stack.last_mut() {
        Some(refs) => {
            refs.push(id);
            true
        }
        None => false,
    })
}

/// A value ready to be copied to where it will live.
pub(crate) enum Serialized {
    Native(Vec<u8>),
    Pickled { tag: u8, code: u8, pickle: Py<PyBytes>, buffers: Vec<PyBuffer<u8>>, refs: Vec<ObjectId>, len: usize },
}

impl Serialized {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Native(bytes) => bytes.len(),
            Self::Pickled { len, .. } => *len,
        }
    }

    /// Pickles through the hook.
    pub(crate) fn pickle(py: Python<'_>, hooks: &Hooks, value: &Bound<'_, PyAny>, tag: u8, code: u8) -> PyResult<Self> {
        COLLECTORS.with_borrow_mut(|stack| stack.push(Vec::new()));
        let result = hooks.dump.bind(py).call1((value,));
        let refs = COLLECTORS.with_borrow_mut(Vec::pop).unwrap_or_default();
        let (pickle, raw): (Bound<'_, PyBytes>, Vec<Bound<'_, PyAny>>) = result?.extract()?;
        let mut buffers = Vec::with_capacity(raw.len());
        for buffer in raw {
            let bytes = match buffer.getattr("raw") {
                Ok(method) => method.call0()?,
                Err(_) => buffer,
            };
            buffers.push(PyBuffer::get(&bytes)?);
        }
        let mut len = HEADER + 8 * buffers.len() + pickle.as_bytes().len();
        for buffer in &buffers {
            len = len.next_multiple_of(BUFFER_ALIGN) + buffer.len_bytes();
        }
        Ok(Self::Pickled { tag, code, pickle: pickle.unbind(), buffers, refs, len })
    }

    pub(crate) fn new(py: Python<'_>, hooks: &Hooks, value: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut bytes = Vec::with_capacity(32);
        if encode(value, &mut bytes, 0) {
            return Ok(Self::Native(bytes));
        }
        Self::pickle(py, hooks, value, TAG_PICKLE, 0)
    }

    /// The parts to copy: (offset, bytes). They do not overlap and ascend.
    fn with_parts<R>(&self, py: Python<'_>, run: impl FnOnce(&[(usize, &[u8])]) -> R) -> R {
        match self {
            Self::Native(bytes) => run(&[(0, bytes)]),
            Self::Pickled { tag, code, pickle, buffers, .. } => {
                let pickle = pickle.bind(py).as_bytes();
                let mut header = Vec::with_capacity(HEADER + 8 * buffers.len());
                header.extend_from_slice(&[*tag, *code, 0, 0]);
                header.extend_from_slice(&(buffers.len() as u32).to_le_bytes());
                header.extend_from_slice(&(pickle.len() as u64).to_le_bytes());
                for buffer in buffers {
                    header.extend_from_slice(&(buffer.len_bytes() as u64).to_le_bytes());
                }
                let mut at = header.len() + pickle.len();
                let mut parts: Vec<(usize, &[u8])> = Vec::with_capacity(2 + buffers.len());
                parts.push((0, &header));
                parts.push((header.len(), pickle));
                for buffer in buffers {
                    at = at.next_multiple_of(BUFFER_ALIGN);
                    // SAFETY: the PyBuffer keeps its memory exported and in place; it is contiguous
                    // (pickle's raw() refuses others), and nobody writes while it is copied unless the
                    // user's program races with itself.
                    let bytes =
                        unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
                    parts.push((at, bytes));
                    at += bytes.len();
                }
                run(&parts)
            }
        }
    }

    pub(crate) fn into_payload(self, py: Python<'_>) -> Payload {
        if let Self::Native(bytes) = &self {
            return Payload::plain(bytes);
        }
        let mut data = vec![0; self.len()];
        self.with_parts(py, |parts| {
            for (at, bytes) in parts {
                data[*at..*at + bytes.len()].copy_from_slice(bytes);
            }
        });
        let refs = match self {
            Self::Pickled { refs, .. } => refs,
            Self::Native(_) => Vec::new(),
        };
        Payload { data: Blob(Arc::from(data)), refs }
    }

    /// Inline when small, else copied into a block of shared memory.
    pub(crate) fn into_value(self, py: Python<'_>, core: &Core) -> PyResult<Value> {
        self.into_value_within(py, core, &mut INLINE_BYTES_MAX.clone())
    }

    /// The same for one of several values that travel together: inline as long as `budget` lasts.
    pub(crate) fn into_value_within(self, py: Python<'_>, core: &Core, budget: &mut usize) -> PyResult<Value> {
        if self.len() <= INLINE_BYTES_MAX.min(*budget) {
            *budget -= self.len();
            return Ok(Value::Inline(self.into_payload(py)));
        }
        let len = self.len() as u64;
        let block = waiting(py, || core.alloc(len))?;
        self.with_parts(py, |parts| {
            // Buffers are plain memory: the copy needs no interpreter.
            let parts: Vec<(usize, SendSlice)> =
                parts.iter().map(|(at, bytes)| (*at, SendSlice(bytes.as_ptr(), bytes.len()))).collect();
            py.detach(|| {
                let slices: Vec<(u64, &[u8])> = parts.iter().map(|(at, slice)| (*at as u64, slice.get())).collect();
                copy_into(&block, &slices);
            });
        });
        let refs = match self {
            Self::Pickled { refs, .. } => refs,
            Self::Native(_) => Vec::new(),
        };
        Ok(Value::Stored { location: block.location(), refs })
    }
}

/// A call's arguments as Python has them; `None`: no keywords.
type Arguments<'py> = (Vec<Bound<'py, PyAny>>, Option<Bound<'py, PyDict>>);

/// Memory that `Serialized` keeps in place while another scope, without the interpreter, reads it.
struct SendSlice(*const u8, usize);

// SAFETY: see `with_parts`: the bytes stay exported for as long as the slice is used.
unsafe impl Send for SendSlice {}
// SAFETY: read only.
unsafe impl Sync for SendSlice {}

impl SendSlice {
    fn get(&self) -> &[u8] {
        // SAFETY: made from a live slice in `into_value`, within whose scope it is used.
        unsafe { std::slice::from_raw_parts(self.0, self.1) }
    }
}

/// Encodes natively; false leaves `out` in an unspecified state.
fn encode(value: &Bound<'_, PyAny>, out: &mut Vec<u8>, depth: u32) -> bool {
    let py = value.py();
    if value.is_none() {
        out.push(TAG_NONE);
    } else if value.is_exact_instance_of::<PyInt>() {
        let mut overflow: c_int = 0;
        // SAFETY: an exact int; overflow is reported, not raised.
        let number = unsafe { ffi::PyLong_AsLongLongAndOverflow(value.as_ptr(), &raw mut overflow) };
        if overflow != 0 {
            return false;
        }
        out.push(TAG_INT);
        out.extend_from_slice(&number.to_le_bytes());
    } else if value.is_exact_instance_of::<PyString>() {
        // SAFETY: an exact str; lone surrogates raise and are pickled instead.
        let Ok(text) = (unsafe { value.cast_unchecked::<PyString>() }).to_str() else {
            return false;
        };
        out.push(TAG_STR);
        out.extend_from_slice(&(text.len() as u32).to_le_bytes());
        out.extend_from_slice(text.as_bytes());
    } else if value.is_exact_instance_of::<PyFloat>() {
        // SAFETY: an exact float.
        let number = unsafe { ffi::PyFloat_AsDouble(value.as_ptr()) };
        out.push(TAG_FLOAT);
        out.extend_from_slice(&number.to_le_bytes());
    } else if value.is_exact_instance_of::<PyBool>() {
        out.push(if value.is(PyBool::new(py, true)) { TAG_TRUE } else { TAG_FALSE });
    } else if let Ok(bytes) = value.cast_exact::<PyBytes>() {
        let bytes = bytes.as_bytes();
        if bytes.len() > INLINE_BYTES_MAX {
            return false;
        }
        out.push(TAG_BYTES);
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(bytes);
    } else if let Ok(tuple) = value.cast_exact::<PyTuple>() {
        return tuple.len() <= NATIVE_ELEMENTS_MAX && depth < NATIVE_DEPTH_MAX && {
            out.push(TAG_TUPLE);
            out.extend_from_slice(&(tuple.len() as u32).to_le_bytes());
            tuple.iter().all(|item| encode(&item, out, depth + 1))
        };
    } else if depth > 0 {
        return false;
    } else if let Ok(list) = value.cast_exact::<PyList>() {
        return list.len() <= NATIVE_ELEMENTS_MAX && {
            out.push(TAG_LIST);
            out.extend_from_slice(&(list.len() as u32).to_le_bytes());
            list.iter().all(|item| encode(&item, out, depth + 1))
        };
    } else if let Ok(dict) = value.cast_exact::<PyDict>() {
        return dict.len() <= NATIVE_ELEMENTS_MAX && {
            out.push(TAG_DICT);
            out.extend_from_slice(&(dict.len() as u32).to_le_bytes());
            dict.iter().all(|(key, item)| encode(&key, out, depth + 1) && encode(&item, out, depth + 1))
        };
    } else {
        return false;
    }
    true
}

/// A call's arguments, natively; `None` where `skip` says that a reference stands there.
pub(crate) fn encode_args(
    args: &Bound<'_, PyTuple>,
    kwargs: Option<&Bound<'_, PyDict>>,
    skip: impl Fn(&Bound<'_, PyAny>) -> bool,
) -> Option<Vec<u8>> {
    let keywords = kwargs.map_or(0, |k| k.len());
    if args.is_empty() && keywords == 0 {
        return Some(vec![TAG_NO_ARGS]);
    }
    let mut out = Vec::with_capacity(48);
    out.push(TAG_ARGS);
    out.extend_from_slice(&(args.len() as u32).to_le_bytes());
    for item in args.iter() {
        if skip(&item) {
            out.push(TAG_NONE);
        } else if !encode(&item, &mut out, 0) {
            return None;
        }
    }
    out.extend_from_slice(&(keywords as u32).to_le_bytes());
    for (key, item) in kwargs.into_iter().flatten() {
        if !encode(&key, &mut out, 1) {
            return None;
        }
        if skip(&item) {
            out.push(TAG_NONE);
        } else if !encode(&item, &mut out, 0) {
            return None;
        }
    }
    Some(out)
}

/// Reads what `encode` wrote. The bytes come from another process: every length is checked.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> PyResult<&'a [u8]> {
        let (head, tail) = self
            .bytes
            .split_at_checked(count)
            .ok_or_else(|| PyValueError::new_err("a serialised value ends too early"))?;
        self.bytes = tail;
        Ok(head)
    }

    fn u32(&mut self) -> PyResult<usize> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    }

    fn eight(&mut self) -> PyResult<[u8; 8]> {
        let mut out = [0; 8];
        out.copy_from_slice(self.take(8)?);
        Ok(out)
    }

    fn items<'py>(&mut self, py: Python<'py>, depth: u32) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let count = self.u32()?;
        // Each item takes at least a byte; a lying count must not reserve memory.
        let mut items = Vec::with_capacity(count.min(self.bytes.len()));
        for _ in 0..count {
            items.push(self.value(py, depth)?);
        }
        Ok(items)
    }

    fn value<'py>(&mut self, py: Python<'py>, depth: u32) -> PyResult<Bound<'py, PyAny>> {
        if depth > NATIVE_DEPTH_MAX + 2 {
            return Err(PyValueError::new_err("a serialised value is nested too deeply"));
        }
        Ok(match self.take(1)?[0] {
            TAG_NONE => py.None().into_bound(py),
            TAG_FALSE => PyBool::new(py, false).to_owned().into_any(),
            TAG_TRUE => PyBool::new(py, true).to_owned().into_any(),
            TAG_INT => i64::from_le_bytes(self.eight()?).into_pyobject(py)?.into_any(),
            TAG_FLOAT => PyFloat::new(py, f64::from_le_bytes(self.eight()?)).into_any(),
            TAG_STR => {
                let len = self.u32()?;
                let text = std::str::from_utf8(self.take(len)?)
                    .map_err(|_| PyValueError::new_err("a serialised str is not UTF-8"))?;
                PyString::new(py, text).into_any()
            }
            TAG_BYTES => {
                let len = self.u32()?;
                PyBytes::new(py, self.take(len)?).into_any()
            }
            TAG_TUPLE => PyTuple::new(py, self.items(py, depth + 1)?)?.into_any(),
            TAG_LIST => PyList::new(py, self.items(py, depth + 1)?)?.into_any(),
            TAG_DICT => {
                let dict = PyDict::new(py);
                for _ in 0..self.u32()? {
                    let key = self.value(py, depth + 1)?;
                    dict.set_item(key, self.value(py, depth + 1)?)?;
                }
                dict.into_any()
            }
            tag => {
                return Err(PyValueError::new_err(format!("a serialised value begins with the unknown tag {tag}")));
            }
        })
    }
}

/// What keeps the memory of a view in place.
enum Hold {
    Blob(#[expect(dead_code, reason = "held, not read")] Blob),
    Stored(#[expect(dead_code, reason = "held, not read")] StoredHold),
}

/// A view on a stored object, which all views in Python share: it ends with the last of them.
pub(crate) struct StoredHold {
    core: Arc<Core>,
    object: ObjectId,
    #[expect(dead_code, reason = "held, not read")]
    mapping: Arc<Mapping>,
}

impl Drop for StoredHold {
    fn drop(&mut self) {
        if !self.core.is_forked() {
            self.core.release_view(self.object);
        }
    }
}

/// Read-only bytes inside a payload, for the buffer protocol.
#[pyclass(frozen, module = "ray._core")]
pub(crate) struct View {
    start: *const u8,
    len: usize,
    hold: Arc<Hold>,
}

// SAFETY: the memory is read-only and kept by `hold`; the pointer is only handed out as a buffer.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

#[pymethods]
impl View {
    /// # Safety
    /// Called by the interpreter with a valid `view`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        // SAFETY: the exporter (`slf`, whose reference FillInfo takes) keeps the memory alive and
        // read-only until the buffer is released.
        let status = unsafe {
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), this.start as *mut _, this.len as ffi::Py_ssize_t, 1, flags)
        };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }

    fn __len__(&self) -> usize {
        self.len
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Named so that its purpose is visible: the last view lets go of the memory.
        let _ = &self.hold;
    }
}

/// A payload's bytes and what keeps them.
pub(crate) struct Bytes {
    start: *const u8,
    len: usize,
    hold: Arc<Hold>,
}

impl Bytes {
    pub(crate) fn of_blob(blob: &Blob) -> Self {
        Self { start: blob.as_ptr(), len: blob.len(), hold: Arc::new(Hold::Blob(blob.clone())) }
    }

    pub(crate) fn of_fetched(core: &Arc<Core>, fetched: Fetched) -> PyResult<Self> {
        match fetched {
            Fetched::Inline(payload) => Ok(Self::of_blob(&payload.data)),
            Fetched::Stored { object, mapping, location } => {
                let start = mapping.slice(location.offset, location.len);
                let hold = StoredHold { core: core.clone(), object, mapping };
                let start = start.ok_or_else(|| PyValueError::new_err("a stored value lies outside its segment"))?;
                Ok(Self { start, len: location.len as usize, hold: Arc::new(Hold::Stored(hold)) })
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `hold` keeps the memory; its bounds were checked when this was made. A block is
        // written before its object has a value and not again.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    fn view(&self, py: Python<'_>, at: usize, len: usize) -> PyResult<Py<View>> {
        let part = self
            .bytes()
            .get(at..at.saturating_add(len))
            .ok_or_else(|| PyValueError::new_err("a serialised value ends too early"))?;
        Py::new(py, View { start: part.as_ptr(), len, hold: self.hold.clone() })
    }

    fn pickle_parts(&self, py: Python<'_>) -> PyResult<(Py<View>, Vec<Py<View>>)> {
        let mut reader = Reader { bytes: self.bytes().get(4..).unwrap_or_default() };
        let count = reader.u32()?;
        let pickle_len = u64::from_le_bytes(reader.eight()?) as usize;
        let mut lens = Vec::with_capacity(count.min(1024));
        for _ in 0..count {
            lens.push(u64::from_le_bytes(reader.eight()?) as usize);
        }
        let mut at = HEADER + 8 * count;
        let pickle = self.view(py, at, pickle_len)?;
        at += pickle_len;
        let mut buffers = Vec::with_capacity(lens.len());
        for len in lens {
            at = at.next_multiple_of(BUFFER_ALIGN);
            buffers.push(self.view(py, at, len)?);
            at = at.saturating_add(len);
        }
        Ok((pickle, buffers))
    }

    /// The value; an exception if the payload stands for one.
    pub(crate) fn load<'py>(
        &self,
        py: Python<'py>,
        hooks: &Hooks,
        object: Option<ObjectId>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let bytes = self.bytes();
        match bytes.first() {
            Some(&TAG_PICKLE) => {
                let (pickle, buffers) = self.pickle_parts(py)?;
                hooks.load.bind(py).call1((pickle, buffers))
            }
            Some(&TAG_ERROR_TEXT) => {
                let code = bytes.get(1).copied().unwrap_or(0);
                let body = PyBytes::new(py, bytes.get(2..).unwrap_or_default());
                Err(self.error(py, hooks, code, body.into_any(), Vec::new(), object)?)
            }
            Some(&TAG_ERROR_PICKLE) => {
                let (pickle, buffers) = self.pickle_parts(py)?;
                let code = bytes[1];
                let body = PyBytes::new(py, pickle.get().bytes());
                Err(self.error(py, hooks, code, body.into_any(), buffers, object)?)
            }
            _ => Reader { bytes }.value(py, 0),
        }
    }

    fn error(
        &self,
        py: Python<'_>,
        hooks: &Hooks,
        code: u8,
        body: Bound<'_, PyAny>,
        buffers: Vec<Py<View>>,
        object: Option<ObjectId>,
    ) -> PyResult<PyErr> {
        let id = PyBytes::new(py, &object.map(ObjectId::to_bytes).map(|id| id.to_vec()).unwrap_or_default());
        let error = hooks.load_error.bind(py).call1((code, body, buffers, id))?;
        Ok(PyErr::from_value(error))
    }

    /// A call's arguments.
    pub(crate) fn load_args<'py>(&self, py: Python<'py>, hooks: &Hooks) -> PyResult<Arguments<'py>> {
        let bytes = self.bytes();
        match bytes.first() {
            Some(&TAG_NO_ARGS) => Ok((Vec::new(), None)),
            Some(&TAG_ARGS) => {
                let mut reader = Reader { bytes: &bytes[1..] };
                let positional = reader.items(py, 0)?;
                let count = reader.u32()?;
                if count == 0 {
                    return Ok((positional, None));
                }
                let keywords = PyDict::new(py);
                for _ in 0..count {
                    let key = reader.value(py, 1)?;
                    keywords.set_item(key, reader.value(py, 0)?)?;
                }
                Ok((positional, Some(keywords)))
            }
            _ => {
                let (args, kwargs): (Bound<'py, PyTuple>, Bound<'py, PyDict>) =
                    self.load(py, hooks, None)?.extract()?;
                Ok((args.iter().collect(), Some(kwargs)))
            }
        }
    }
}

impl View {
    fn bytes(&self) -> &[u8] {
        // SAFETY: as for `Bytes::bytes`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}
