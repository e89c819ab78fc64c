//! Why the firmware or the kernel refused.

use super::CopyRefusal;

/// Firmware error codes (SEV API, table 4: status codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("SEV firmware status {} ({:#x})", self.name(), *self as u16)]
#[expect(missing_docs, reason = "the names are the specification's")]
#[repr(u16)]
pub enum FirmwareError {
    InvalidPlatformState = 0x01,
    InvalidGuestState = 0x02,
    InvalidConfig = 0x03,
    InvalidLength = 0x04,
    AlreadyOwned = 0x05,
    InvalidCertificate = 0x06,
    PolicyFailure = 0x07,
    Inactive = 0x08,
    InvalidAddress = 0x09,
    BadSignature = 0x0a,
    BadMeasurement = 0x0b,
    AsidOwned = 0x0c,
    InvalidAsid = 0x0d,
    WbinvdRequired = 0x0e,
    DfFlushRequired = 0x0f,
    InvalidGuest = 0x10,
    InvalidCommand = 0x11,
    Active = 0x12,
    HwErrorPlatform = 0x13,
    HwErrorUnsafe = 0x14,
    Unsupported = 0x15,
    InvalidParam = 0x16,
    ResourceLimit = 0x17,
    SecureDataInvalid = 0x18,
}

impl FirmwareError {
    /// All of them.
    pub const ALL: [Self; 24] = [
        Self::InvalidPlatformState,
        Self::InvalidGuestState,
        Self::InvalidConfig,
        Self::InvalidLength,
        Self::AlreadyOwned,
        Self::InvalidCertificate,
        Self::PolicyFailure,
        Self::Inactive,
        Self::InvalidAddress,
        Self::BadSignature,
        Self::BadMeasurement,
        Self::AsidOwned,
        Self::InvalidAsid,
        Self::WbinvdRequired,
        Self::DfFlushRequired,
        Self::InvalidGuest,
        Self::InvalidCommand,
        Self::Active,
        Self::HwErrorPlatform,
        Self::HwErrorUnsafe,
        Self::Unsupported,
        Self::InvalidParam,
        Self::ResourceLimit,
        Self::SecureDataInvalid,
    ];

    /// Its name in the specification.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidPlatformState => "INVALID_PLATFORM_STATE",
            Self::InvalidGuestState => "INVALID_GUEST_STATE",
            Self::InvalidConfig => "INVALID_CONFIG",
            Self::InvalidLength => "INVALID_LENGTH",
            Self::AlreadyOwned => "ALREADY_OWNED",
            Self::InvalidCertificate => "INVALID_CERTIFICATE",
            Self::PolicyFailure => "POLICY_FAILURE",
            Self::Inactive => "INACTIVE",
            Self::InvalidAddress => "INVALID_ADDRESS",
            Self::BadSignature => "BAD_SIGNATURE",
            Self::BadMeasurement => "BAD_MEASUREMENT",
            Self::AsidOwned => "ASID_OWNED",
            Self::InvalidAsid => "INVALID_ASID",
            Self::WbinvdRequired => "WBINVD_REQUIRED",
            Self::DfFlushRequired => "DF_FLUSH_REQUIRED",
            Self::InvalidGuest => "INVALID_GUEST",
            Self::InvalidCommand => "INVALID_COMMAND",
            Self::Active => "ACTIVE",
            Self::HwErrorPlatform => "HW_ERROR_PLATFORM",
            Self::HwErrorUnsafe => "HW_ERROR_UNSAFE",
            Self::Unsupported => "UNSUPPORTED",
            Self::InvalidParam => "INVALID_PARAM",
            Self::ResourceLimit => "RESOURCE_LIMIT",
            Self::SecureDataInvalid => "SECURE_DATA_INVALID",
        }
    }

    /// The status with this number; `None` for success and for those that are not of SEV's table.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| *e as u32 == code)
    }
}

/// Why a SEV command did not work.
#[derive(Debug, thiserror::Error)]
pub enum SevError {
    /// The firmware refused a command.
    #[error("{command}: the firmware refused")]
    Firmware {
        /// The command, `LAUNCH_START` and so on.
        command: &'static str,
        /// The firmware's error code.
        #[source]
        code: FirmwareError,
    },
    /// The kernel refused, without asking the firmware.
    #[error("{command}: the kernel refused")]
    Kernel {
        /// The command or ioctl.
        command: &'static str,
        /// Its answer: EINVAL, EBUSY, ENOTTY, ...
        #[source]
        source: std::io::Error,
    },
    /// KVM_CAP_VM_COPY_ENC_CONTEXT_FROM was refused, by the kernel's rules.
    #[error("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: refused")]
    Copy(#[source] CopyRefusal),
    /// Bytes from elsewhere that are not what they should be.
    #[error("{what}: {why}")]
    Malformed {
        /// Certificate, session, packet, ...
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Today's kernel or hardware cannot do it, whatever is asked.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// What is not supported.
        what: &'static str,
        /// Why it is not supported.
        why: &'static str,
    },
}

impl SevError {
    /// The errno that the kernel answers with, where it is the one to answer. A command that the firmware
    /// refused is EIO.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Firmware { .. } => Some(libc::EIO),
            Self::Kernel { source, .. } => source.raw_os_error(),
            Self::Copy(refusal) => Some(refusal.errno()),
            Self::Malformed { .. } | Self::Unsupported { .. } => None,
        }
    }

    /// The firmware's status, where it is the one that refused.
    pub const fn firmware(&self) -> Option<FirmwareError> {
        match self {
            Self::Firmware { code, .. } => Some(*code),
            _ => None,
        }
    }
}
