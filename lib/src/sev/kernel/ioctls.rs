//! The door to the kernel: five requests, and what they take.
//!
//! Owns: request numbers, descriptors, the one raw call. Must not know: what a command means. Sources:
//! include/uapi/linux/kvm.h and psp-sev.h (layouts and numbers).

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

/// A request, with the kernel's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    /// KVM_MEMORY_ENCRYPT_OP on the VM; takes a `kvm_sev_cmd`.
    EncryptOp = 0xc008_aeba,
    /// KVM_MEMORY_ENCRYPT_REG_REGION on the VM; takes a `kvm_enc_region`.
    RegisterRegion = 0x8010_aebb,
    /// KVM_MEMORY_ENCRYPT_UNREG_REGION on the VM; takes a `kvm_enc_region`.
    UnregisterRegion = 0x8010_aebc,
    /// KVM_ENABLE_CAP on the VM; takes a `kvm_enable_cap`.
    EnableCap = 0x4068_aea3,
    /// SEV_ISSUE_CMD on `/dev/sev`; takes the 16 bytes of a `sev_issue_cmd`.
    IssueCmd = 0xc010_5300,
}

/// What makes requests: the kernel, or a test's recorder.
pub(super) trait Ioctls: Send + Sync {
    /// The number that `kvm_sev_cmd` names `/dev/sev` by.
    fn sev_fd(&self) -> u32;

    /// Makes one request.
    ///
    /// # Errors
    /// The kernel's errno.
    ///
    /// # Safety
    /// `argument` points to what the request takes, and every address in that, and in what that points to, to
    /// memory that the kernel may read and write for the length beside it until this returns.
    #[expect(unsafe_code, reason = "UNSAFETY: the request's argument holds addresses that the kernel uses")]
    unsafe fn call(&self, request: Request, argument: *mut c_void) -> io::Result<()>;
}

/// The kernel itself, not a recorder.
pub(super) struct Kernel {
    /// Descriptor of `/dev/sev`.
    sev: Arc<OwnedFd>,
    /// Of the VM; none for the platform's own commands.
    vm: Option<OwnedFd>,
}

impl Kernel {
    pub fn platform(sev: OwnedFd) -> Self {
        Self { sev: Arc::new(sev), vm: None }
    }

    /// For a VM, with a descriptor of its own.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn vm(&self, vm: impl AsFd) -> io::Result<Self> {
        Ok(Self { sev: Arc::clone(&self.sev), vm: Some(vm.as_fd().try_clone_to_owned()?) })
    }
}

impl Ioctls for Kernel {
    fn sev_fd(&self) -> u32 {
        self.sev.as_raw_fd().cast_unsigned()
    }

    #[expect(unsafe_code, reason = "UNSAFETY: the one raw ioctl")]
    unsafe fn call(&self, request: Request, argument: *mut c_void) -> io::Result<()> {
        let fd = match request {
            Request::IssueCmd => Some(self.sev.as_raw_fd()),
            _ => self.vm.as_ref().map(AsRawFd::as_raw_fd),
        };
        let fd = fd.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        // SAFETY: the caller vouches for the argument; the descriptor is open as long as we are.
        let answer = unsafe { libc::ioctl(fd, request as libc::c_ulong, argument) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `_IOC` of asm-generic/ioctl.h: direction, size, type, number.
    const fn ioc(direction: u32, size: usize, kind: u32, number: u32) -> u32 {
        direction << 30 | (size as u32) << 16 | kind << 8 | number
    }

    #[test]
    fn the_numbers_are_the_kernels() {
        use kvm_bindings::{kvm_enable_cap, kvm_enc_region};
        let region = size_of::<kvm_enc_region>();
        // KVM_MEMORY_ENCRYPT_OP is declared with an unsigned long, though it takes a structure's address.
        assert_eq!(Request::EncryptOp as u32, ioc(3, size_of::<libc::c_ulong>(), 0xae, 0xba));
        assert_eq!(Request::RegisterRegion as u32, ioc(2, region, 0xae, 0xbb));
        assert_eq!(Request::UnregisterRegion as u32, ioc(2, region, 0xae, 0xbc));
        assert_eq!(Request::EnableCap as u32, ioc(1, size_of::<kvm_enable_cap>(), 0xae, 0xa3));
        assert_eq!(Request::IssueCmd as u32, ioc(3, 16, u32::from(b'S'), 0));
    }
}
