//! When `psp-copied` by send-receive is closed.
//!
//! Owns: the rule and its reasons, stated once for the host's look at a definition and the launch of a
//! mirror. Must not know: how either refuses.

use super::Policy;

/// Why firmware does not send a guest's memory into the context of its mirror (`psp-copied` by send-receive).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// The guest is not encrypted.
    #[error("the guest has no encryption context to send from")]
    NoContext,
    /// SEV-ES. KVM has no RECEIVE_UPDATE_VMSA for the mirror's vCPUs either.
    #[error("with SEV-ES the mirror is made during the launch, and firmware sends running guests only")]
    EncryptedState,
    /// Every released KVM (`sev_vm_copy_enc_context_from`, `is_cmd_allowed_from_mirror` in
    /// `arch/x86/kvm/svm/sev.c`).
    #[error(
        "KVM refuses RECEIVE commands on a VM that shares another's context, and copying a context into a VM that has one; use \
         launch-update"
    )]
    Kernel,
    /// By the guest's policy.
    #[error("NOKS: the firmware does not share the guest's key with another guest")]
    NoKeySharing,
    /// By the guest's policy.
    #[error("NOSEND: the firmware refuses SEND_START")]
    NoSend,
}

impl NotSent {
    /// The first reason there is, for a guest with or without encrypted state (`es`), on modelled firmware or
    /// KVM's, with this policy.
    pub const fn reason(es: bool, modelled: bool, policy: Policy) -> Option<Self> {
        match (es, modelled) {
            (true, _) => Some(Self::EncryptedState),
            (false, false) => Some(Self::Kernel),
            (false, true) if policy.has(Policy::NOKS) => Some(Self::NoKeySharing),
            (false, true) if policy.has(Policy::NOSEND) => Some(Self::NoSend),
            (false, true) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_policy_can_change_comes_before_what_one_can() {
        let (free, closed) = (Policy(Policy::NODBG), Policy(Policy::NOKS | Policy::NOSEND));
        for policy in [free, closed] {
            for modelled in [false, true] {
                assert_eq!(NotSent::reason(true, modelled, policy), Some(NotSent::EncryptedState));
            }
            assert_eq!(NotSent::reason(false, false, policy), Some(NotSent::Kernel));
        }
        assert_eq!(NotSent::reason(false, true, closed), Some(NotSent::NoKeySharing));
        assert_eq!(NotSent::reason(false, true, Policy(Policy::NOSEND)), Some(NotSent::NoSend));
        assert_eq!(NotSent::reason(false, true, free), None);
    }
}
