//! A VM of the kernel's to copy an encryption context from.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sev::CopyRefusal;
use crate::sev::copy::CopyFacts;

/// What this process knows of a VM that it has; the kernel knows the truth.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub encrypted: AtomicBool,
    pub mirror: AtomicBool,
    pub snp: AtomicBool,
    pub has_vcpus: AtomicBool,
}

impl Known {
    pub fn facts(&self) -> CopyFacts {
        let get = |flag: &AtomicBool| flag.load(Ordering::Acquire);
        CopyFacts {
            encrypted: get(&self.encrypted),
            mirror: get(&self.mirror),
            snp: get(&self.snp),
            has_vcpus: get(&self.has_vcpus),
        }
    }
}

/// A VM's descriptor, held open, and what is known of it.
#[derive(Debug)]
pub struct KernelSource {
    fd: OwnedFd,
    known: Arc<Known>,
}

impl KernelSource {
    /// A VM that something else has made, say QEMU; `facts` are what the caller knows of it.
    ///
    /// # Errors
    /// [`CopyRefusal::NotAVm`] for a descriptor of anything but a VM.
    pub fn foreign(fd: OwnedFd, facts: CopyFacts) -> Result<Self, CopyRefusal> {
        // The kernel names the file by what it is (virt/kvm/kvm_main.c, kvm_dev_ioctl_create_vm).
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if !link.is_ok_and(|link| link.as_os_str() == "anon_inode:kvm-vm") {
            return Err(CopyRefusal::NotAVm);
        }
        let known = Known {
            encrypted: facts.encrypted.into(),
            mirror: facts.mirror.into(),
            snp: facts.snp.into(),
            has_vcpus: facts.has_vcpus.into(),
        };
        Ok(Self { fd, known: Arc::new(known) })
    }

    pub(super) const fn own(fd: OwnedFd, known: Arc<Known>) -> Self {
        Self { fd, known }
    }

    pub(super) fn raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    pub(super) const fn known(&self) -> &Arc<Known> {
        &self.known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vm_is_no_source() {
        let refused = |fd: OwnedFd| KernelSource::foreign(fd, CopyFacts::default()).err();
        let (read, write) = std::io::pipe().unwrap();
        assert_eq!(refused(read.into()), Some(CopyRefusal::NotAVm));
        assert_eq!(refused(write.into()), Some(CopyRefusal::NotAVm));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(refused(file.into()), Some(CopyRefusal::NotAVm));
    }
}
