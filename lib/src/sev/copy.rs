//! KVM's rules for sharing an encryption context (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM), as a pure function.
//!
//! Source: arch/x86/kvm/svm/sev.c, sev_vm_copy_enc_context_from and sev_lock_two_vms; the rule on SEV-SNP is
//! of June 2026. The kernel tells them apart by errno alone; here each has a name.

/// What the rules ask of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyFacts {
    /// It has an encryption context, its own or another's.
    pub encrypted: bool,
    /// That context is another VM's.
    pub mirror: bool,
    /// It is an SEV-SNP guest.
    pub snp: bool,
    /// Whether vCPUs were created in the VM.
    pub has_vcpus: bool,
}

/// Why a VM does not become a mirror of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CopyRefusal {
    /// The source is no VM of this hypervisor.
    #[error("the source is no virtual machine of this hypervisor")]
    NotAVm,
    /// A VM does not mirror itself.
    #[error("a virtual machine cannot mirror itself")]
    Itself,
    /// One of the two is being copied or moved right now; to be tried again.
    #[error("another copy or move of one of the two is in progress")]
    Busy,
    /// The mirror-to-be has a context already.
    #[error("the mirror has an encryption context already")]
    AlreadyEncrypted,
    /// There is nothing to share.
    #[error("the source has no encryption context")]
    SourceNotEncrypted,
    /// Mirrors of mirrors are not allowed.
    #[error("the source is itself a mirror; mirror its owner")]
    SourceIsMirror,
    /// KVM decides at a vCPU's creation what it intercepts.
    #[error("the mirror has vCPUs already; copy the context before the first is created")]
    HasVcpus,
    /// An SNP guest's context would have to come with its features.
    #[error("the source is an SEV-SNP guest, which the kernel does not let be mirrored")]
    Snp,
}

impl CopyRefusal {
    /// The error number that KVM answers with.
    pub const fn errno(self) -> i32 {
        match self {
            Self::NotAVm => libc::EBADF,
            Self::Busy => libc::EBUSY,
            _ => libc::EINVAL,
        }
    }
}

/// Whether the kernel lets `destination`, another VM, share the context of `source`.
///
/// # Errors
/// The first of the kernel's rules that is broken, in its order.
pub const fn check(destination: CopyFacts, source: CopyFacts) -> Result<(), CopyRefusal> {
    if destination.encrypted {
        Err(CopyRefusal::AlreadyEncrypted)
    } else if !source.encrypted {
        Err(CopyRefusal::SourceNotEncrypted)
    } else if source.mirror {
        Err(CopyRefusal::SourceIsMirror)
    } else if source.snp {
        Err(CopyRefusal::Snp)
    } else if destination.has_vcpus {
        Err(CopyRefusal::HasVcpus)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_exactly_when_nothing_speaks_against_it() {
        let all = (0..16u8).map(|n| CopyFacts {
            encrypted: n & 1 != 0,
            mirror: n & 2 != 0,
            snp: n & 4 != 0,
            has_vcpus: n & 8 != 0,
        });
        let mut allowed = 0;
        for destination in all.clone() {
            for source in all.clone() {
                let verdict = check(destination, source);
                let fine = !destination.encrypted
                    && !destination.has_vcpus
                    && source.encrypted
                    && !source.mirror
                    && !source.snp;
                assert_eq!(verdict.is_ok(), fine, "{destination:?} from {source:?}: {verdict:?}");
                assert!(verdict.is_ok() || verdict.unwrap_err().errno() == libc::EINVAL);
                allowed += u32::from(fine);
            }
        }
        assert_eq!(
            allowed,
            4 * 2,
            "the destination's mirror and snp bits and the source's vCPUs do not matter"
        );
    }
}
