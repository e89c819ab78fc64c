//! What was asked of the kernel and what it answered, kept for whoever looks for differences.
//!
//! Owns: which structure a command takes and where addresses lie in it, a list of requests. Must not know:
//! what they are for. No content of a buffer is kept and no address: what is left of a structure has no
//! secrets. Sources: include/uapi/linux/kvm.h and psp-sev.h.

use std::ffi::c_void;
use std::io;
use std::sync::{Arc, Mutex};

use super::ioctls::{Ioctls, Kernel, Request};
use crate::sev::session::part;
use crate::sync::Locked;

/// What a field of a structure names.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "only what takes the kernel's place looks at what is behind")
)]
pub(super) enum Names {
    /// Bytes that the kernel reads: offset of the address, of the length.
    In(usize, usize),
    /// Bytes that it writes, likewise.
    Out(usize, usize),
    /// Guest memory: offset of the address.
    Guest(usize),
}

/// Size of the structure that an encryption command takes, and what it names; numbers of kvm.h.
pub(super) fn layout(id: u32) -> (usize, &'static [Names]) {
    use Names::{Guest, In, Out};
    match id {
        22 => (48, &[]),
        2 => (40, &[In(8, 16), In(24, 32)]),
        3 => (16, &[Guest(0)]),
        6 => (16, &[Out(0, 8)]),
        5 | 13 => (48, &[In(0, 8), Guest(16), In(32, 40)]),
        16 => (12, &[]),
        8 => (72, &[In(8, 16), In(24, 32), In(40, 48), Out(56, 64)]),
        9 => (48, &[Out(0, 8), Guest(16), Out(32, 40)]),
        12 => (40, &[In(8, 16), In(24, 32)]),
        17 => (24, &[Guest(0), Out(8, 16)]),
        20 => (32, &[Out(16, 24)]),
        _ => (0, &[]),
    }
}

/// The same for a command to the platform; `None` for those that nobody here gives.
pub(super) fn platform_layout(id: u32) -> Option<(usize, &'static [Names])> {
    use Names::Out;
    match id {
        1 => Some((12, &[])),
        5 => Some((24, &[Out(0, 8), Out(12, 20)])),
        _ => None,
    }
}

/// A request and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The request's number.
    pub request: u32,
    /// Number of the encryption or platform command in it; 0 for requests that have none.
    pub command: u32,
    /// The structure as it was before the request, with zeroes for addresses.
    pub before: Vec<u8>,
    /// As it was after it, likewise.
    pub after: Vec<u8>,
    /// The kernel's errno; 0 when it did as asked.
    pub errno: i32,
    /// The firmware's status; 0 for requests that have none.
    pub firmware: u32,
}

/// Requests in the order in which they were answered.
#[derive(Debug, Default)]
pub struct Trace(Mutex<Vec<Issued>>);

impl Trace {
    /// How many there were.
    pub fn len(&self) -> usize {
        self.0.locked().len()
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them.
    pub fn issued(&self) -> Vec<Issued> {
        self.0.locked().clone()
    }
}

/// Passes requests on, and keeps them.
pub(super) struct Traced<I> {
    pub inner: I,
    pub trace: Arc<Trace>,
}

impl Traced<Arc<dyn Ioctls>> {
    /// `kernel`, traced where there is somebody who wants it.
    pub fn of(kernel: Kernel, trace: Option<&Arc<Trace>>) -> Arc<dyn Ioctls> {
        let inner: Arc<dyn Ioctls> = Arc::new(kernel);
        match trace {
            Some(trace) => Arc::new(Self { inner, trace: Arc::clone(trace) }),
            None => inner,
        }
    }
}

impl Ioctls for Traced<Arc<dyn Ioctls>> {
    fn sev_fd(&self) -> u32 {
        self.inner.sev_fd()
    }

    #[expect(unsafe_code, reason = "UNSAFETY: passes a request on, and looks at its structure")]
    unsafe fn call(&self, request: Request, argument: *mut c_void) -> io::Result<()> {
        // SAFETY: the caller vouches for the argument.
        let (command, data, size, names) = unsafe { inside(request, argument) };
        let look = || {
            if data.is_null() || size == 0 {
                return Vec::new();
            }
            // SAFETY: the caller vouches for the argument: this is the structure of this command, which has
            // that size.
            let mut bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size) }.to_vec();
            for name in names {
                let (Names::In(at, _) | Names::Out(at, _) | Names::Guest(at)) = *name;
                bytes[at..at + 8].fill(0);
            }
            bytes
        };
        let before = look();
        // SAFETY: as the caller vouches for it.
        let answer = unsafe { self.inner.call(request, argument) };
        let after = look();
        let firmware = match request {
            // SAFETY: the caller vouches for the argument.
            Request::EncryptOp => unsafe { word(argument, 16) },
            // SAFETY: likewise.
            Request::IssueCmd => unsafe { word(argument, 12) },
            Request::RegisterRegion | Request::UnregisterRegion | Request::EnableCap => 0,
        };
        let errno = answer.as_ref().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
        let issued = Issued { request: request as u32, command, before, after, errno, firmware };
        self.trace.0.locked().push(issued);
        answer
    }
}

/// A word of a request's argument.
///
/// # Safety
/// `argument` has `at + 4` bytes.
#[expect(unsafe_code, reason = "UNSAFETY: reads a request's argument")]
unsafe fn word(argument: *const c_void, at: usize) -> u32 {
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(argument.cast::<u8>().add(at), 4) };
    u32::from_ne_bytes(part(bytes, 0))
}

/// The command that a request carries, and its structure.
///
/// # Safety
/// `argument` is what the request takes.
#[expect(unsafe_code, reason = "UNSAFETY: reads a request's argument")]
unsafe fn inside(request: Request, argument: *mut c_void) -> (u32, *const c_void, usize, &'static [Names]) {
    let address = |at: usize, len: usize| {
        // SAFETY: both arguments that hold an address have it within their bytes.
        let bytes = unsafe { std::slice::from_raw_parts(argument.cast::<u8>(), len) };
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        std::ptr::with_exposed_provenance::<c_void>(u64::from_ne_bytes(word) as usize)
    };
    match request {
        Request::EncryptOp => {
            // SAFETY: a kvm_sev_cmd, 24 bytes.
            let id = unsafe { word(argument, 0) };
            let (size, names) = layout(id);
            (id, address(8, 24), size, names)
        }
        Request::IssueCmd => {
            // SAFETY: a sev_issue_cmd, 16 bytes.
            let id = unsafe { word(argument, 0) };
            let (size, names) = platform_layout(id).unwrap_or_default();
            (id, address(4, 16), size, names)
        }
        Request::RegisterRegion | Request::UnregisterRegion => (0, argument, 16, &[Names::Guest(0)]),
        Request::EnableCap => (0, argument, 104, &[]),
    }
}
