//! `/dev/sev`: the platform's own commands.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::from_mut;
use std::sync::Arc;

use super::call::{Failure, retry};
use super::context::{KernelContext, VmKind};
use super::ioctls::{Ioctls, Kernel, Request};
use super::probe::{DEVICE, Missing, probe};
use super::trace::{Trace, Traced};
use crate::sev::session::part;
use crate::sev::{
    CERTIFICATE_BYTES, Endorsement, PdhCert, Platform, PlatformCerts, PlatformStatus, SevError,
};

/// Command numbers of include/uapi/linux/psp-sev.h.
const PLATFORM_STATUS: u32 = 1;
const PDH_CERT_EXPORT: u32 = 5;

/// Flag of the status: SEV-ES is initialized.
const CONFIG_ES: u32 = 1 << 8;

/// This host's security processor. Written by the kernel's and AMD's documents and tested against a recorder;
/// it has never run on such hardware.
pub struct KernelPlatform {
    ioctls: Arc<dyn Ioctls>,
    kernel: Option<Kernel>,
    /// Where requests are kept, of the platform and of its contexts.
    trace: Option<Arc<Trace>>,
}

impl std::fmt::Debug for KernelPlatform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KernelPlatform")
    }
}

impl KernelPlatform {
    /// Opens `/dev/sev` where this host can run SEV guests.
    ///
    /// # Errors
    /// What is missing for that.
    pub fn open() -> Result<Self, Missing> {
        Self::open_with(None)
    }

    /// The same, with every request of it and of its contexts kept in `trace`.
    ///
    /// # Errors
    /// As [`KernelPlatform::open`].
    pub fn traced(trace: Arc<Trace>) -> Result<Self, Missing> {
        Self::open_with(Some(trace))
    }

    fn open_with(trace: Option<Arc<Trace>>) -> Result<Self, Missing> {
        probe()?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|e| Missing::device(&e))?;
        let device = OwnedFd::from(device);
        let kernel = device.try_clone().map(Kernel::platform).map_err(|e| Missing::device(&e))?;
        let ioctls = Traced::of(Kernel::platform(device), trace.as_ref());
        Ok(Self { ioctls, kernel: Some(kernel), trace })
    }

    #[cfg(test)]
    pub(super) fn over(ioctls: Arc<dyn Ioctls>) -> Self {
        Self { ioctls, kernel: None, trace: None }
    }

    /// The context of the VM with descriptor `vm`, made as `kind`. The descriptor is duplicated: the VM lives
    /// as long as its context.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn context(&self, vm: impl AsFd, kind: VmKind) -> io::Result<Arc<KernelContext>> {
        let vm = vm.as_fd();
        let kernel = self.kernel.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let ioctls = Traced::of(kernel.vm(vm)?, self.trace.as_ref());
        Ok(Arc::new(KernelContext::new(ioctls, vm.try_clone_to_owned()?, kind)))
    }

    /// Its certificate and the chain up to the processor's own key. AMD's certificates of that are not on the
    /// host: they come from AMD's key distribution service.
    ///
    /// # Errors
    /// [`SevError`].
    pub fn certs(&self) -> Result<PlatformCerts, SevError> {
        let (mut pdh, mut chain) = (vec![0; CERTIFICATE_BYTES], vec![0; 3 * CERTIFICATE_BYTES]);
        let mut export = [0; 24];
        put(&mut export, 0, &(pdh.as_mut_ptr().expose_provenance() as u64).to_le_bytes());
        put(&mut export, 8, &(CERTIFICATE_BYTES as u32).to_le_bytes());
        put(&mut export, 12, &(chain.as_mut_ptr().expose_provenance() as u64).to_le_bytes());
        put(&mut export, 20, &(3 * CERTIFICATE_BYTES as u32).to_le_bytes());
        self.issue("PDH_CERT_EXPORT", PDH_CERT_EXPORT, &mut export, &mut [&mut pdh, &mut chain])?;
        Ok(PlatformCerts { pdh: PdhCert(pdh), chain, amd: Vec::new() })
    }

    /// Issues a platform command. `_buffers` are those that `data` names, borrowed for as long as it takes.
    #[expect(
        unsafe_code,
        reason = "UNSAFETY: the command's structure holds addresses that the kernel writes to"
    )]
    fn issue(
        &self,
        name: &'static str,
        number: u32,
        data: &mut [u8],
        _buffers: &mut [&mut Vec<u8>],
    ) -> Result<(), SevError> {
        // struct sev_issue_cmd, packed: command, address of its data, the firmware's status.
        let mut command = [0; 16];
        put(&mut command, 0, &number.to_le_bytes());
        put(&mut command, 4, &(data.as_mut_ptr().expose_provenance() as u64).to_le_bytes());
        retry(|| {
            // SAFETY: `data` is the structure of this command, and its addresses are of `_buffers`, both
            // borrowed here.
            unsafe { self.ioctls.call(Request::IssueCmd, from_mut(&mut command).cast()) }
        })
        .map_err(|errno| Failure { errno, firmware: u32::from_le_bytes(part(&command, 12)) }.explain(name))
    }
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Platform for KernelPlatform {
    fn is_modelled(&self) -> bool {
        false
    }

    fn status(&self) -> Result<PlatformStatus, SevError> {
        // struct sev_user_data_status, packed: major, minor, state, flags (4), build, guests (4).
        let mut status = [0; 12];
        self.issue("PLATFORM_STATUS", PLATFORM_STATUS, &mut status, &mut [])?;
        Ok(PlatformStatus {
            api: (status[0], status[1]),
            build: status[7],
            es: u32::from_le_bytes(part(&status, 3)) & CONFIG_ES != 0,
            guests: u32::from_le_bytes(part(&status, 8)),
        })
    }

    fn pdh(&self) -> Result<PdhCert, SevError> {
        self.certs().map(|certs| certs.pdh)
    }

    fn endorsement(&self) -> Result<Endorsement, SevError> {
        Endorsement::from_chain(&self.certs()?.chain)
    }
}
