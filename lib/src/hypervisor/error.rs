//! Why a hypervisor could not do something.

/// What failed, with the kernel's errno where there is one.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// `/dev/kvm` is not there or not for us.
    #[error("/dev/kvm cannot be opened{}", fix.as_ref().map_or_else(String::new, |fix| format!(" ({fix})")))]
    NoKvm {
        /// What helps, where the device is there and not for this user.
        fix: Option<String>,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The kernel speaks another API.
    #[error("KVM API version {version} is not 12")]
    ApiVersion {
        /// The version that the kernel has.
        version: i32,
    },
    /// A call to the kernel failed.
    #[error("{call} failed")]
    Kernel {
        /// Name of the call.
        call: &'static str,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A slot that leaves its memory, changes its place, or is not logged.
    #[error("slot {slot}: {what}")]
    Slot {
        /// Number of the slot.
        slot: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// This hypervisor has no such thing.
    #[error("this hypervisor cannot {what}")]
    Unsupported {
        /// What is missing.
        what: &'static str,
    },
    /// Registers cannot be saved: the instruction that is under way has left once more, and nobody acted upon
    /// it.
    #[error("an instruction that leaves to the host several times is not finished")]
    Unsettled,
    /// Bytes that are no saved vCPU state.
    #[error("vCPU state cannot be read")]
    BadState {
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
}

impl HypervisorError {
    pub(crate) fn kernel(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |e| Self::Kernel { call, source: std::io::Error::from_raw_os_error(e.errno()) }
    }
}
