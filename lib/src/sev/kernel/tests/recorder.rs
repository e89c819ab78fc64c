//! What takes the kernel's place in tests: records requests byte by byte, gives answers as scripted.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::io;
use std::sync::{Arc, Mutex};

use crate::sev::kernel::ioctls::{Ioctls, Request};
use crate::sev::kernel::trace::{Names, layout, platform_layout};
use crate::sev::session::part;

/// What stands for `/dev/sev` in commands.
pub(super) const SEV_FD: u32 = 77;

/// A request as it reached the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub request: Request,
    /// Of an encryption or platform command.
    pub id: u32,
    /// The structure, with the addresses of buffers set to zero.
    pub bytes: Vec<u8>,
    /// Guest addresses, in the order of the structure.
    pub guest: Vec<u64>,
    /// The content of buffers that the kernel reads.
    pub read: Vec<Vec<u8>>,
}

/// An answer to come.
#[derive(Default)]
pub(super) struct Answer {
    pub errno: i32,
    pub firmware: u32,
    /// Bytes put into the structure.
    pub put: Vec<(usize, Vec<u8>)>,
    /// Bytes put into the buffers that the kernel writes, in order.
    pub write: Vec<Vec<u8>>,
}

#[derive(Default)]
pub(super) struct Recorder {
    seen: Mutex<Vec<Seen>>,
    answers: Mutex<VecDeque<Answer>>,
}

impl Recorder {
    #[expect(unsafe_code, reason = "UNSAFETY: what the kernel does with a request's addresses")]
    fn take(&self, request: Request, argument: *mut c_void) -> io::Result<()> {
        // SAFETY: the trait's promise: `argument` is the request's structure, and its addresses are of live
        // buffers of the lengths beside them.
        let bytes = |at: *const u8, len: usize| unsafe { std::slice::from_raw_parts(at, len) }.to_vec();
        let copy_out = |at: u64, from: &[u8]| {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(at as usize);
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
        };
        let answer = self.answers.lock().unwrap().pop_front().unwrap_or_default();
        let whole = |len| bytes(argument.cast::<u8>().cast_const(), len);
        let (id, data, structure) = match request {
            Request::EncryptOp => {
                let command = whole(24);
                assert_eq!(u32::from_ne_bytes(part(&command, 20)), SEV_FD);
                assert_eq!(u32::from_ne_bytes(part(&command, 4)), 0, "padding");
                let id = u32::from_ne_bytes(part(&command, 0));
                (id, u64::from_ne_bytes(part(&command, 8)), layout(id))
            }
            Request::IssueCmd => {
                let command = whole(16);
                let id = u32::from_ne_bytes(part(&command, 0));
                let platform = platform_layout(id).unwrap_or_else(|| panic!("platform command {id}"));
                (id, u64::from_ne_bytes(part(&command, 4)), platform)
            }
            Request::RegisterRegion | Request::UnregisterRegion => {
                (0, argument as u64, (16, &[Names::Guest(0)][..]))
            }
            Request::EnableCap => (0, argument as u64, (104, &[][..])),
        };
        let (size, names) = structure;
        assert_eq!(data == 0, size == 0, "a structure where there is one");
        let from = std::ptr::with_exposed_provenance::<u8>(data as usize);
        let mut content = if size == 0 { vec![] } else { bytes(from, size) };
        let (mut guest, mut read, mut writes) = (vec![], vec![], answer.write.into_iter());
        for name in names {
            let (Names::In(at, _) | Names::Out(at, _) | Names::Guest(at)) = *name;
            let address = u64::from_ne_bytes(part(&content, at));
            let length = |at| u32::from_ne_bytes(part(&content, at)) as usize;
            match *name {
                Names::Guest(_) => guest.push(address),
                Names::In(_, len) => {
                    let buffer = std::ptr::with_exposed_provenance::<u8>(address as usize);
                    assert_eq!(address == 0, length(len) == 0);
                    read.push(if address == 0 { vec![] } else { bytes(buffer, length(len)) });
                }
                Names::Out(_, len) => {
                    let written = writes.next().unwrap_or_default();
                    assert!(written.len() <= length(len));
                    copy_out(address, &written);
                }
            }
            content[at..at + 8].fill(0);
        }
        for (at, value) in answer.put {
            copy_out(data + at as u64, &value);
        }
        self.seen.lock().unwrap().push(Seen { request, id, bytes: content, guest, read });
        let status_at = if request == Request::EncryptOp { 16 } else { 12 };
        if matches!(request, Request::EncryptOp | Request::IssueCmd) {
            copy_out(argument as u64 + status_at, &answer.firmware.to_ne_bytes());
        }
        if answer.errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(answer.errno)) }
    }

    pub fn answer(&self, answer: Answer) {
        self.answers.lock().unwrap().push_back(answer);
    }

    /// Takes back the answers that were not given.
    pub fn forget_answers(&self) {
        self.answers.lock().unwrap().clear();
    }

    /// What was asked since the last time.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

pub(super) struct Shared(pub Arc<Recorder>);

impl Ioctls for Shared {
    fn sev_fd(&self) -> u32 {
        SEV_FD
    }

    #[expect(unsafe_code, reason = "UNSAFETY: implements the trait")]
    unsafe fn call(&self, request: Request, argument: *mut c_void) -> io::Result<()> {
        argument.expose_provenance();
        self.0.take(request, argument)
    }
}
