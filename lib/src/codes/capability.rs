//! What a host can lack.
//!
//! Owns: each with its code and its words, neither made from the other, and how a driver from outside names
//! what is its own. Must not know: why something is missing, what would help.

use std::fmt;

macro_rules! capabilities {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $words:literal;)+) => {
        /// Something that a host may lack.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Capability {
            $($(#[doc = $doc])+ $name,)+
            /// What a driver needs, named by itself.
            OfDriver(DriverCapability),
        }

        impl Capability {
            /// Every one that is not a driver's own.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Stable code.
            pub const fn code(self) -> &'static str {
                match self {
                    $(Self::$name => $code,)+
                    Self::OfDriver(its) => its.code,
                }
            }

            /// What people call it, as in "this host lacks ...".
            pub const fn words(self) -> &'static str {
                match self {
                    $(Self::$name => $words,)+
                    Self::OfDriver(its) => its.words,
                }
            }
        }
    };
}

capabilities! {
    /// `/dev/kvm`.
    Kvm = "kvm", "kvm";
    /// SEV guests.
    Sev = "sev", "sev";
    /// SEV-ES guests.
    SevEs = "sev-es", "sev-es";
    /// Mirrors of SEV-SNP guests.
    SevSnp = "sev-snp", "sev-snp";
    /// The driver that a definition names.
    Driver = "driver", "driver";
    /// An address at which other hosts find the peer listener.
    PeerAddress = "peer_address", "peer_address";
    /// A peer listener whose address can be told to others.
    PeerListener = "peer_listener", "peer listener";
    /// Helper images beside the built-in one, for this guest.
    OtherHelperImages = "other_helper_images", "other helper images";
    /// Holding back the guest's vCPUs.
    Throttling = "throttling", "throttling";
    /// Digests of the guest's pages.
    Verify = "verify", "verify";
    /// Plugging and unplugging RAM blocks of a guest that runs.
    Plugging = "plugging", "plugging";
    /// Further RAM blocks for a guest that is defined.
    AddingRamBlocks = "adding_RAM_blocks", "adding RAM blocks";
    /// The strategy `psp-copied` by send-receive.
    PspCopiedBySendReceive = "psp-copied_by_send-receive", "psp-copied by send-receive";
    /// A suite that the helper seals by.
    Suite = "suite", "the suite";
    /// The threads' placement and priority.
    Scheduling = "scheduling_of_threads", "scheduling of threads";
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

impl From<DriverCapability> for Capability {
    fn from(its: DriverCapability) -> Self {
        Self::OfDriver(its)
    }
}

/// What a driver needs and a host may lack: a code for programs, and words for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DriverCapability {
    code: &'static str,
    words: &'static str,
}

impl DriverCapability {
    /// Names it. Make it a `const`: a code that is none then does not compile. Once published it stays; the
    /// words may change.
    ///
    /// ```
    /// use mirrorvm::codes::DriverCapability;
    /// const FIRMWARE: DriverCapability =
    ///     DriverCapability::new("acme_firmware", "the firmware of ACME's machines");
    /// ```
    ///
    /// A sentence is no code:
    ///
    /// ```compile_fail
    /// # use mirrorvm::codes::DriverCapability;
    /// const FIRMWARE: DriverCapability = DriverCapability::new("the firmware", "the firmware");
    /// ```
    ///
    /// # Panics
    /// When `code` is not 1 to 64 of `[a-z0-9_-]`.
    pub const fn new(code: &'static str, words: &'static str) -> Self {
        let bytes = code.as_bytes();
        assert!(!bytes.is_empty() && bytes.len() <= 64, "a code has 1 to 64 characters");
        let mut i = 0;
        while i < bytes.len() {
            let legal = matches!(bytes[i], b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
            assert!(legal, "a code is of [a-z0-9_-]; what people read goes into the words");
            i += 1;
        }
        Self { code, words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_has_a_code_of_its_own() {
        let mut seen = std::collections::BTreeSet::new();
        for capability in Capability::ALL.iter().copied() {
            assert!(seen.insert(capability.code()), "{capability:?}");
            assert!(!capability.code().contains(' ') && !capability.words().is_empty());
        }
    }
}
