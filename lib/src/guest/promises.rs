//! What holds for a guest at its protection level: the promises of `SECURITY.md` that depend on it.
//!
//! Owns: the closed list, and which level keeps which. Must not know: how a promise is kept, how it is shown.

use super::driver::ProtectionLevel;
use crate::named::named;

named! {
    /// A promise that depends on what the hardware gives a guest.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub enum Promise {
        /// A host that only looks at the guest's memory sees none of it.
        MemoryHiddenFromPassiveHost = "memory_hidden_from_passive_host",
        /// Nor does one that changes what it can: registers, slots, what lies where.
        MemoryHiddenFromActiveHost = "memory_hidden_from_active_host",
        /// A host cannot put one page, or an older one, in another's place under the running guest.
        MemoryIntegrity = "memory_integrity",
        /// Pages, their addresses and their order are authenticated from helper to helper.
        PagesAuthenticated = "pages_authenticated",
        /// What was sent in another session is refused in this one.
        ReplayRefused = "replay_refused",
        /// Of hosts that follow the protocol at most one runs the guest.
        AtMostOneCopy = "at_most_one_copy",
        /// No key is used twice, whatever a host puts back of the helper's memory between two requests.
        KeysOutliveRollback = "keys_outlive_rollback",
        /// What crosses tells nobody on the path which pages are zero.
        TrafficShapeHidden = "traffic_shape_hidden",
        /// Where a guest's owner says nothing else, its pages leave only for a destination whose evidence its
        /// helper has checked. Where he names platforms they do at `sev` and `sev-es`, too: a guest's own
        /// `protection` tells.
        DestinationEvidence = "destination_evidence",
    }
}

impl ProtectionLevel {
    /// Whether a promise holds at this level.
    pub const fn keeps(self, promise: Promise) -> bool {
        match promise {
            // A model protects nothing, however like the real thing it is.
            Promise::MemoryHiddenFromPassiveHost => matches!(self, Self::Sev | Self::SevEs),
            // SEV leaves registers in the open, and keys go through the helper's.
            Promise::MemoryHiddenFromActiveHost => matches!(self, Self::SevEs),
            // SEV-SNP's table of who owns which page; SNP guests have no mirrors.
            Promise::MemoryIntegrity => false,
            Promise::PagesAuthenticated
            | Promise::ReplayRefused
            | Promise::AtMostOneCopy
            | Promise::KeysOutliveRollback => true,
            // Hosts at level `none` see the pages anyway, so zero pages go as such.
            Promise::TrafficShapeHidden => !matches!(self, Self::None),
            // Of a real platform nobody can guess the key that evidence would have to be signed by.
            Promise::DestinationEvidence => matches!(self, Self::Modelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hardware_hides_memory_and_nothing_here_keeps_its_place() {
        for level in ProtectionLevel::ALL {
            let real = matches!(level, ProtectionLevel::Sev | ProtectionLevel::SevEs);
            assert_eq!(level.keeps(Promise::MemoryHiddenFromPassiveHost), real, "{level:?}");
            assert!(!level.keeps(Promise::MemoryIntegrity));
            // Registers are hidden with SEV-ES alone.
            let hidden = matches!(level, ProtectionLevel::SevEs);
            assert_eq!(level.keeps(Promise::MemoryHiddenFromActiveHost), hidden, "{level:?}");
        }
    }
}
