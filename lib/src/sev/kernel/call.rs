//! SEV commands to KVM, with what they borrow, and their structures.
//!
//! A [`Call`] holds every buffer that its structure names, so that building a structure and handing it to the
//! kernel needs one argument for its safety, in [`run`]. Structures are those of kvm-bindings.

use std::ffi::c_void;
use std::io;
use std::ptr::{from_mut, from_ref};

use kvm_bindings::{
    kvm_enable_cap, kvm_enc_region, kvm_sev_attestation_report, kvm_sev_cmd, kvm_sev_dbg,
    kvm_sev_guest_status, kvm_sev_init, kvm_sev_launch_measure, kvm_sev_launch_secret, kvm_sev_launch_start,
    kvm_sev_launch_update_data, kvm_sev_receive_start, kvm_sev_receive_update_data, kvm_sev_send_start,
    kvm_sev_send_update_data, sev_cmd_id_KVM_SEV_DBG_DECRYPT as DBG_DECRYPT,
    sev_cmd_id_KVM_SEV_ES_INIT as ES_INIT,
    sev_cmd_id_KVM_SEV_GET_ATTESTATION_REPORT as GET_ATTESTATION_REPORT,
    sev_cmd_id_KVM_SEV_GUEST_STATUS as GUEST_STATUS, sev_cmd_id_KVM_SEV_INIT as INIT,
    sev_cmd_id_KVM_SEV_INIT2 as INIT2, sev_cmd_id_KVM_SEV_LAUNCH_FINISH as LAUNCH_FINISH,
    sev_cmd_id_KVM_SEV_LAUNCH_MEASURE as LAUNCH_MEASURE, sev_cmd_id_KVM_SEV_LAUNCH_SECRET as LAUNCH_SECRET,
    sev_cmd_id_KVM_SEV_LAUNCH_START as LAUNCH_START,
    sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA as LAUNCH_UPDATE_DATA,
    sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA as LAUNCH_UPDATE_VMSA,
    sev_cmd_id_KVM_SEV_RECEIVE_FINISH as RECEIVE_FINISH, sev_cmd_id_KVM_SEV_RECEIVE_START as RECEIVE_START,
    sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA as RECEIVE_UPDATE_DATA,
    sev_cmd_id_KVM_SEV_SEND_CANCEL as SEND_CANCEL, sev_cmd_id_KVM_SEV_SEND_FINISH as SEND_FINISH,
    sev_cmd_id_KVM_SEV_SEND_START as SEND_START, sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA as SEND_UPDATE_DATA,
};

use mirrorvm_abi::evidence::{MNONCE_BYTES, REPORT_BYTES};

use super::ioctls::{Ioctls, Request};
use crate::memory::{Mapping, View};
use crate::sev::{
    FirmwareError, HEADER_BYTES, MEASUREMENT_BYTES, PlatformCerts, Policy, SESSION_BYTES, SevError,
};

/// How often a request that a signal interrupted is made again.
const INTERRUPTIONS: usize = 64;

/// The kernel's "the firmware was not asked" (psp-sev.h, SEV_RET_NO_FW_CALL).
const NO_FIRMWARE_CALL: u32 = u32::MAX;

/// Guest memory that a command names, checked to lie in its mapping.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    memory: &'a Mapping,
    offset: u64,
    len: u32,
}

impl<'a> Span<'a> {
    /// # Errors
    /// EINVAL for nothing, a wrap or more than 4 GiB, EFAULT outside the mapping; as KVM.
    pub fn new(command: &'static str, memory: &'a Mapping, offset: u64, len: u64) -> Result<Self, SevError> {
        let refused = |errno| SevError::Kernel { command, source: io::Error::from_raw_os_error(errno) };
        let end = offset.checked_add(len).filter(|_| len != 0).ok_or_else(|| refused(libc::EINVAL))?;
        if end > memory.len() {
            return Err(refused(libc::EFAULT));
        }
        let len = u32::try_from(len).map_err(|_| refused(libc::EINVAL))?;
        Ok(Self { memory, offset, len })
    }

    fn address(self) -> u64 {
        self.memory.host_address(View::Guest) + self.offset
    }
}

/// A command with what it reads, and where its answer goes.
pub(super) enum Call<'a> {
    /// KVM_SEV_INIT2, without special features.
    Init2,
    /// KVM_SEV_INIT.
    Init,
    /// KVM_SEV_ES_INIT.
    EsInit,
    LaunchStart {
        policy: Policy,
        owner: Option<(&'a [u8], &'a [u8; SESSION_BYTES])>,
        handle: &'a mut u32,
    },
    LaunchUpdateData {
        at: Span<'a>,
    },
    LaunchUpdateVmsa,
    LaunchMeasure {
        to: &'a mut [u8; MEASUREMENT_BYTES],
    },
    LaunchSecret {
        header: &'a [u8; HEADER_BYTES],
        packet: &'a [u8],
        at: Span<'a>,
    },
    LaunchFinish,
    GuestStatus {
        to: &'a mut kvm_sev_guest_status,
    },
    Attestation {
        mnonce: &'a [u8; MNONCE_BYTES],
        to: &'a mut [u8; REPORT_BYTES],
    },
    SendStart {
        policy: Policy,
        target: &'a PlatformCerts,
        session: &'a mut [u8; SESSION_BYTES],
    },
    SendUpdateData {
        at: Span<'a>,
        header: &'a mut [u8; HEADER_BYTES],
        packet: &'a mut [u8],
    },
    SendFinish,
    SendCancel,
    ReceiveStart {
        policy: Policy,
        origin: &'a [u8],
        session: &'a [u8; SESSION_BYTES],
        handle: &'a mut u32,
    },
    ReceiveUpdateData {
        header: &'a [u8; HEADER_BYTES],
        packet: &'a [u8],
        at: Span<'a>,
    },
    ReceiveFinish,
    DebugDecrypt {
        at: Span<'a>,
        to: &'a mut [u8],
    },
}

/// Where bytes that the kernel reads are, and how many. Nothing is at address 0, as KVM takes "none".
fn input(bytes: &[u8]) -> (u64, u32) {
    let address = if bytes.is_empty() { 0 } else { bytes.as_ptr().expose_provenance() as u64 };
    (address, bytes.len() as u32)
}

/// Where bytes that the kernel writes are, and how many.
fn output(bytes: &mut [u8]) -> (u64, u32) {
    (bytes.as_mut_ptr().expose_provenance() as u64, bytes.len() as u32)
}

/// Hands a command's number and its structure on.
type Issue<'f> = &'f mut dyn FnMut(u32, *mut c_void) -> Result<(), Failure>;

impl Call<'_> {
    /// The command's name, for errors.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Init2 => "KVM_SEV_INIT2",
            Self::Init => "KVM_SEV_INIT",
            Self::EsInit => "KVM_SEV_ES_INIT",
            Self::LaunchStart { .. } => "LAUNCH_START",
            Self::LaunchUpdateData { .. } => "LAUNCH_UPDATE_DATA",
            Self::LaunchUpdateVmsa => "LAUNCH_UPDATE_VMSA",
            Self::LaunchMeasure { .. } => "LAUNCH_MEASURE",
            Self::LaunchSecret { .. } => "LAUNCH_SECRET",
            Self::LaunchFinish => "LAUNCH_FINISH",
            Self::GuestStatus { .. } => "GUEST_STATUS",
            Self::Attestation { .. } => "ATTESTATION",
            Self::SendStart { .. } => "SEND_START",
            Self::SendUpdateData { .. } => "SEND_UPDATE_DATA",
            Self::SendFinish => "SEND_FINISH",
            Self::SendCancel => "SEND_CANCEL",
            Self::ReceiveStart { .. } => "RECEIVE_START",
            Self::ReceiveUpdateData { .. } => "RECEIVE_UPDATE_DATA",
            Self::ReceiveFinish => "RECEIVE_FINISH",
            Self::DebugDecrypt { .. } => "DBG_DECRYPT",
        }
    }

    /// Builds the structure, has it issued, and takes the answer out of it.
    fn issue(&mut self, issue: Issue<'_>) -> Result<(), Failure> {
        match self {
            Self::Init2 => with(INIT2, &mut kvm_sev_init::default(), issue),
            Self::Init => issue(INIT, std::ptr::null_mut()),
            Self::EsInit => issue(ES_INIT, std::ptr::null_mut()),
            Self::LaunchStart { policy, owner, handle } => {
                let ((dh_uaddr, dh_len), (session_uaddr, session_len)) =
                    owner.map_or(((0, 0), (0, 0)), |(dh, session)| (input(dh), input(session)));
                let mut start = kvm_sev_launch_start {
                    policy: policy.0,
                    dh_uaddr,
                    dh_len,
                    session_uaddr,
                    session_len,
                    ..Default::default()
                };
                with(LAUNCH_START, &mut start, issue)?;
                **handle = start.handle;
                Ok(())
            }
            Self::LaunchUpdateData { at } => {
                let mut data = kvm_sev_launch_update_data { uaddr: at.address(), len: at.len, pad0: 0 };
                with(LAUNCH_UPDATE_DATA, &mut data, issue)
            }
            Self::LaunchUpdateVmsa => issue(LAUNCH_UPDATE_VMSA, std::ptr::null_mut()),
            Self::LaunchMeasure { to } => {
                let (uaddr, len) = output(&mut to[..]);
                with(LAUNCH_MEASURE, &mut kvm_sev_launch_measure { uaddr, len, pad0: 0 }, issue)
            }
            Self::LaunchSecret { header, packet, at } => {
                let ((hdr_uaddr, hdr_len), (trans_uaddr, trans_len)) = (input(&header[..]), input(packet));
                let mut secret = kvm_sev_launch_secret {
                    hdr_uaddr,
                    hdr_len,
                    guest_uaddr: at.address(),
                    guest_len: at.len,
                    trans_uaddr,
                    trans_len,
                    ..Default::default()
                };
                with(LAUNCH_SECRET, &mut secret, issue)
            }
            Self::LaunchFinish => issue(LAUNCH_FINISH, std::ptr::null_mut()),
            Self::GuestStatus { to } => with(GUEST_STATUS, &mut **to, issue),
            Self::Attestation { mnonce, to } => {
                let (uaddr, len) = output(&mut to[..]);
                let mut report = kvm_sev_attestation_report { mnonce: **mnonce, uaddr, len, pad0: 0 };
                with(GET_ATTESTATION_REPORT, &mut report, issue)?;
                // The firmware says how long a report is. One of another length is none that is known here.
                if report.len == len { Ok(()) } else { Err(Failure::of_length(report.len)) }
            }
            Self::SendStart { policy, target, session } => {
                let (pdh_cert_uaddr, pdh_cert_len) = input(&target.pdh.0);
                let (plat_certs_uaddr, plat_certs_len) = input(&target.chain);
                let (amd_certs_uaddr, amd_certs_len) = input(&target.amd);
                let (session_uaddr, session_len) = output(&mut session[..]);
                let mut start = kvm_sev_send_start {
                    policy: policy.0,
                    pdh_cert_uaddr,
                    pdh_cert_len,
                    plat_certs_uaddr,
                    plat_certs_len,
                    amd_certs_uaddr,
                    amd_certs_len,
                    session_uaddr,
                    session_len,
                    ..Default::default()
                };
                with(SEND_START, &mut start, issue)
            }
            Self::SendUpdateData { at, header, packet } => {
                let ((hdr_uaddr, hdr_len), (trans_uaddr, trans_len)) =
                    (output(&mut header[..]), output(packet));
                let mut data = kvm_sev_send_update_data {
                    hdr_uaddr,
                    hdr_len,
                    guest_uaddr: at.address(),
                    guest_len: at.len,
                    trans_uaddr,
                    trans_len,
                    ..Default::default()
                };
                with(SEND_UPDATE_DATA, &mut data, issue)
            }
            Self::SendFinish => issue(SEND_FINISH, std::ptr::null_mut()),
            Self::SendCancel => issue(SEND_CANCEL, std::ptr::null_mut()),
            Self::ReceiveStart { policy, origin, session, handle } => {
                let ((pdh_uaddr, pdh_len), (session_uaddr, session_len)) =
                    (input(origin), input(&session[..]));
                let mut start = kvm_sev_receive_start {
                    handle: **handle,
                    policy: policy.0,
                    pdh_uaddr,
                    pdh_len,
                    session_uaddr,
                    session_len,
                    ..Default::default()
                };
                with(RECEIVE_START, &mut start, issue)?;
                **handle = start.handle;
                Ok(())
            }
            Self::ReceiveUpdateData { header, packet, at } => {
                let ((hdr_uaddr, hdr_len), (trans_uaddr, trans_len)) = (input(&header[..]), input(packet));
                let mut data = kvm_sev_receive_update_data {
                    hdr_uaddr,
                    hdr_len,
                    guest_uaddr: at.address(),
                    guest_len: at.len,
                    trans_uaddr,
                    trans_len,
                    ..Default::default()
                };
                with(RECEIVE_UPDATE_DATA, &mut data, issue)
            }
            Self::ReceiveFinish => issue(RECEIVE_FINISH, std::ptr::null_mut()),
            Self::DebugDecrypt { at, to } => {
                let (dst_uaddr, len) = output(to);
                // The shorter of the two lengths, should a caller let them differ.
                let len = len.min(at.len);
                with(
                    DBG_DECRYPT,
                    &mut kvm_sev_dbg { src_uaddr: at.address(), dst_uaddr, len, pad0: 0 },
                    issue,
                )
            }
        }
    }
}

fn with<T>(id: u32, structure: &mut T, issue: Issue<'_>) -> Result<(), Failure> {
    issue(id, from_mut(structure).cast())
}

/// What the kernel answered to a command that did not work.
pub(super) struct Failure {
    pub errno: io::Error,
    /// The firmware's status, as the kernel passes it on.
    pub firmware: u32,
}

impl Failure {
    /// An answer of a length that none has.
    fn of_length(len: u32) -> Self {
        Self { errno: io::Error::other(format!("an answer of {len} bytes")), firmware: 0 }
    }

    /// The firmware's reason, where it gave one; else the kernel's.
    pub fn explain(self, command: &'static str) -> SevError {
        match self.firmware {
            0 | NO_FIRMWARE_CALL => SevError::Kernel { command, source: self.errno },
            status => match FirmwareError::from_code(status) {
                Some(code) => SevError::Firmware { command, code },
                None => {
                    let source = io::Error::other(format!("{}, firmware status {status:#x}", self.errno));
                    SevError::Kernel { command, source }
                }
            },
        }
    }
}

/// Runs a command.
///
/// # Errors
/// [`SevError::Firmware`], [`SevError::Kernel`].
pub(super) fn run(ioctls: &dyn Ioctls, call: Call<'_>) -> Result<(), SevError> {
    let name = call.name();
    try_run(ioctls, call).map_err(|failure| failure.explain(name))
}

/// As [`run`], with the kernel's bare answer.
///
/// # Errors
/// [`Failure`].
#[expect(unsafe_code, reason = "UNSAFETY: a command's structure holds addresses that the kernel uses")]
pub(super) fn try_run(ioctls: &dyn Ioctls, mut call: Call<'_>) -> Result<(), Failure> {
    call.issue(&mut |id, data| {
        let mut command = kvm_sev_cmd {
            id,
            pad0: 0,
            data: data.expose_provenance() as u64,
            error: 0,
            sev_fd: ioctls.sev_fd(),
        };
        retry(|| {
            // SAFETY: the structure outlives the call (`with` borrows it, or it is null for commands that
            // take none); its addresses are those of buffers that `call` borrows, or of guest memory inside a
            // mapping that `call` borrows and that is touched by volatile access alone.
            unsafe { ioctls.call(Request::EncryptOp, from_mut(&mut command).cast()) }
        })
        .map_err(|errno| Failure { errno, firmware: command.error })
    })
}

/// A request that takes a structure which the kernel only reads.
#[derive(Clone, Copy)]
pub(super) enum Plain<'a> {
    /// KVM_MEMORY_ENCRYPT_REG_REGION.
    Register(&'a kvm_enc_region),
    /// KVM_MEMORY_ENCRYPT_UNREG_REGION.
    Unregister(&'a kvm_enc_region),
    /// KVM_ENABLE_CAP.
    EnableCap(&'a kvm_enable_cap),
}

/// Makes a plain request.
///
/// # Errors
/// The kernel's errno.
#[expect(unsafe_code, reason = "UNSAFETY: the request is an ioctl")]
pub(super) fn plain(ioctls: &dyn Ioctls, call: Plain<'_>) -> io::Result<()> {
    let (request, argument): (_, *const c_void) = match call {
        Plain::Register(region) => (Request::RegisterRegion, from_ref(region).cast()),
        Plain::Unregister(region) => (Request::UnregisterRegion, from_ref(region).cast()),
        Plain::EnableCap(cap) => (Request::EnableCap, from_ref(cap).cast()),
    };
    // SAFETY: the structure is the request's and borrowed here; the kernel reads it alone. A region's memory
    // is pinned, not touched.
    retry(|| unsafe { ioctls.call(request, argument.cast_mut()) })
}

/// Calls again what a signal interrupted, so often and no more.
pub(super) fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut answer = call();
    for _ in 0..INTERRUPTIONS {
        match &answer {
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => answer = call(),
            _ => break,
        }
    }
    answer
}
