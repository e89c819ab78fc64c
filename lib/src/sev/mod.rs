//! Secure Encrypted Virtualization: what a VM asks of the security processor, real or modelled.
//!
//! Owns: policies, certificates, sessions, packets, the commands of a guest's life, KVM's rules for sharing
//! an encryption context. Must not know: guests' meaning, strategies, migration. Sources: AMD's SEV API
//! specification (publication 55766), the kernel's Documentation/virt/kvm/x86/amd-memory-encryption.rst and
//! arch/x86/kvm/svm/sev.c.

mod certificate;
pub mod copy;
mod error;
pub mod kernel;
pub mod model;
mod not_sent;
pub mod owner;
mod random;
mod session;

use std::sync::Arc;

use mirrorvm_abi::evidence::{self, MNONCE_BYTES, REPORT_BYTES};
use serde::{Deserialize, Serialize};

pub use mirrorvm_abi::evidence::CERTIFICATE_BYTES;

pub use certificate::{key_fingerprint, modelled_chip};
pub use copy::CopyRefusal;
pub use error::{FirmwareError, SevError};
pub use not_sent::NotSent;
pub use owner::GuestOwner;
pub use session::{COMPRESSED, HEADER_BYTES, MEASUREMENT_BYTES, SESSION_BYTES};

use crate::memory::Mapping;

/// A guest's policy: what its owner lets the platform do (SEV API, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Policy(pub u32);

impl Policy {
    /// Debugging of the guest is not allowed.
    pub const NODBG: u32 = 1 << 0;
    /// The key must not be shared with another guest.
    pub const NOKS: u32 = 1 << 1;
    /// The guest must be launched with SEV-ES.
    pub const ES: u32 = 1 << 2;
    /// The guest must not be sent to another platform.
    pub const NOSEND: u32 = 1 << 3;
    /// Only to platforms of the same domain (owner's certificate).
    pub const DOMAIN: u32 = 1 << 4;
    /// Only to platforms that are SEV capable.
    pub const SEV: u32 = 1 << 5;

    /// Whether all bits of `mask` are set.
    pub const fn has(self, mask: u32) -> bool {
        self.0 & mask == mask
    }
}

/// Where a guest's context is in its life, as KVM_SEV_GUEST_STATUS tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// There is no context.
    Invalid,
    /// Pages are being added and measured.
    Launching,
    /// Measured; a secret may be injected.
    Secret,
    /// The launch is finished: the guest may run.
    Running,
    /// Its pages are being received.
    Receiving,
    /// Its pages are being sent.
    Sending,
    /// Its pages left; it runs elsewhere.
    Sent,
}

/// Answer of GUEST_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStatus {
    /// The handle by which the firmware knows the guest.
    pub handle: u32,
    /// The policy in force.
    pub policy: Policy,
    /// Where the guest is in its life.
    pub state: GuestState,
}

/// A platform's Diffie-Hellman certificate (PDH), in the firmware's encoding.
#[derive(Clone, PartialEq, Eq)]
pub struct PdhCert(pub Vec<u8>);

impl std::fmt::Debug for PdhCert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PdhCert({} bytes)", self.0.len())
    }
}

/// A processor that its owner's or the chip's certificate stands for, as the public key on P-384: x and y,
/// big-endian.
pub type PlatformKey = [u8; evidence::KEY_BYTES];

/// What a platform's endorsement key (PEK) is certified by, and what certifies that.
#[derive(Clone, PartialEq, Eq)]
pub struct Endorsement {
    /// The PEK's certificate, in the firmware's encoding.
    pub pek: Box<[u8; CERTIFICATE_BYTES]>,
    /// The chip's own key (CEK), which signs the PEK's certificate; AMD's certificate of that is not looked
    /// at.
    pub chip: PlatformKey,
}

impl std::fmt::Debug for Endorsement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endorsement").field("chip", &key_fingerprint(&self.chip)).finish_non_exhaustive()
    }
}

/// All that SEND_START is told about the platform to send to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformCerts {
    /// The platform's Diffie-Hellman certificate.
    pub pdh: PdhCert,
    /// PEK, OCA and CEK certificates, one after the other, as PDH_CERT_EXPORT gives them. Empty in the model.
    pub chain: Vec<u8>,
    /// ASK and ARK certificates, which AMD publishes for a processor's generation. Empty in the model.
    pub amd: Vec<u8>,
}

impl From<PdhCert> for PlatformCerts {
    /// Without chains, which is enough for the model and refused by hardware.
    fn from(pdh: PdhCert) -> Self {
        Self { pdh, chain: Vec::new(), amd: Vec::new() }
    }
}

/// LAUNCH/SEND/RECEIVE session data, 128 bytes: nonce, wrapped TEK and TIK, IV, MAC of the wrap, MAC of the
/// policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Nonce of the key derivation.
    pub nonce: [u8; 16],
    /// TEK and TIK, encrypted under the KEK.
    pub wrap_tk: [u8; 32],
    /// IV of that encryption.
    pub wrap_iv: [u8; 16],
    /// MAC of `wrap_tk` under the KIK.
    pub wrap_mac: [u8; 32],
    /// MAC of the policy under the TIK.
    pub policy_mac: [u8; 32],
}

/// A packet's header, 52 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHeader {
    /// Flags of the packet. Bit 0: its content is compressed.
    pub flags: u32,
    /// IV of the packet's encryption under the TEK.
    pub iv: [u8; 16],
    /// MAC under the TIK.
    pub mac: [u8; 32],
}

/// Answer of LAUNCH_MEASURE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// HMAC under the TIK over versions, policy, digest and nonce.
    pub mac: [u8; 32],
    /// The nonce that the firmware drew for the measurement.
    pub nonce: [u8; 16],
}

/// The guest owner's part of a launch.
#[derive(Clone, Debug)]
pub struct OwnerSession {
    /// The owner's DH certificate.
    pub dh_cert: PdhCert,
    /// TEK and TIK for the platform, and the policy's MAC.
    pub session: Session,
}

/// What a platform says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformStatus {
    /// Major and minor version of the SEV API.
    pub api: (u8, u8),
    /// Build number of the firmware.
    pub build: u8,
    /// Whether SEV-ES is initialized.
    pub es: bool,
    /// Guests that the firmware holds a context for.
    pub guests: u32,
}

/// A security processor, real or modelled.
pub trait Platform: Send + Sync {
    /// Whether it is the model. A modelled platform protects nothing.
    fn is_modelled(&self) -> bool;

    /// PLATFORM_STATUS.
    ///
    /// # Errors
    /// [`SevError`].
    fn status(&self) -> Result<PlatformStatus, SevError>;

    /// PDH_CERT_EXPORT: who talks to this platform encrypts to this certificate.
    ///
    /// # Errors
    /// [`SevError`].
    fn pdh(&self) -> Result<PdhCert, SevError>;

    /// Of PDH_CERT_EXPORT's chain: the key that signs attestation reports, and whose word that is.
    ///
    /// # Errors
    /// [`SevError`]; [`SevError::Malformed`] for a chain that holds something else.
    fn endorsement(&self) -> Result<Endorsement, SevError>;
}

/// What a context may be copied from; holds the source alive.
#[derive(Clone)]
pub enum CopySource {
    /// A VM of the kernel's.
    Kernel(Arc<kernel::KernelSource>),
    /// A VM of the model's.
    Model(Arc<model::ModelContext>),
}

/// One VM's encryption context: the commands that KVM offers on the VM's descriptor, and its rules for them.
/// Memory is named as the kernel does: by where this process has it mapped.
pub trait Context: Send + Sync {
    /// KVM_SEV_INIT2 (KVM_SEV_INIT and KVM_SEV_ES_INIT before it).
    ///
    /// # Errors
    /// [`SevError`], as for all of these.
    fn init(&self, es: bool) -> Result<(), SevError>;

    /// KVM_MEMORY_ENCRYPT_REG_REGION: pins memory; encrypted pages that move are garbage.
    ///
    /// # Errors
    /// EINVAL on a mirror: it is not responsible for memory.
    fn register_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError>;

    /// KVM_MEMORY_ENCRYPT_UNREG_REGION, of a span as it was registered.
    ///
    /// # Errors
    /// EINVAL on a mirror, and for what was not registered.
    fn unregister_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError>;

    /// LAUNCH_START; gives the firmware's handle. Without an owner's session nobody outside knows TEK and
    /// TIK: the measurement cannot be checked and no secret can be delivered.
    ///
    /// # Errors
    /// [`SevError`].
    fn launch_start(&self, policy: Policy, owner: Option<&OwnerSession>) -> Result<u32, SevError>;

    /// LAUNCH_UPDATE_DATA: encrypts memory in place and measures it. 16-byte aligned.
    ///
    /// # Errors
    /// [`SevError`].
    fn launch_update_data(&self, memory: &Mapping, offset: u64, len: u64) -> Result<(), SevError>;

    /// LAUNCH_UPDATE_VMSA: encrypts and measures the save areas of all vCPUs made so far. One of the four
    /// commands that a mirror may give.
    ///
    /// # Errors
    /// [`SevError`].
    fn launch_update_vmsa(&self) -> Result<(), SevError>;

    /// Where the save areas of its vCPUs lie, as far as anybody but the kernel knows: in the model. Before
    /// LAUNCH_UPDATE_VMSA they can be read, which is how a guest's owner learns what will be measured.
    fn save_areas(&self) -> Vec<(Arc<Mapping>, u64)> {
        Vec::new()
    }

    /// LAUNCH_MEASURE.
    ///
    /// # Errors
    /// [`SevError`].
    fn launch_measure(&self) -> Result<Measurement, SevError>;

    /// LAUNCH_SECRET: decrypts `packet` into guest memory.
    ///
    /// # Errors
    /// [`SevError`].
    fn launch_secret(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError>;

    /// LAUNCH_FINISH.
    ///
    /// # Errors
    /// [`SevError`].
    fn launch_finish(&self) -> Result<(), SevError>;

    /// GUEST_STATUS.
    ///
    /// # Errors
    /// [`SevError`].
    fn guest_status(&self) -> Result<GuestStatus, SevError>;

    /// ATTESTATION: has the firmware say what this guest was launched with, signed by the platform's PEK,
    /// with `mnonce` in it. Whoever has the context chooses that: the guest has no say in it.
    ///
    /// # Errors
    /// EINVAL on a mirror: KVM has only the guest's own VM ask for it. INVALID_GUEST_STATE before the launch
    /// was measured.
    fn attestation(&self, mnonce: &[u8; MNONCE_BYTES]) -> Result<[u8; REPORT_BYTES], SevError>;

    /// KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: this VM becomes a mirror.
    ///
    /// # Errors
    /// [`SevError::Copy`] by the rules of sev_vm_copy_enc_context_from, see [`copy`]; [`SevError::Kernel`].
    fn copy_from(&self, source: &CopySource) -> Result<(), SevError>;

    /// What another VM copies this context from.
    fn copy_source(&self) -> CopySource;

    /// SEND_START to the platform with certificates `target`.
    ///
    /// # Errors
    /// POLICY_FAILURE under NOSEND; [`SevError`].
    fn send_start(&self, target: &PlatformCerts) -> Result<Session, SevError>;

    /// SEND_UPDATE_DATA: at most 16 KiB by the firmware, at most a page and not across one by KVM.
    ///
    /// # Errors
    /// [`SevError`].
    fn send_update_data(
        &self,
        memory: &Mapping,
        offset: u64,
        len: u64,
    ) -> Result<(PacketHeader, Vec<u8>), SevError>;

    /// SEND_FINISH.
    ///
    /// # Errors
    /// [`SevError`].
    fn send_finish(&self) -> Result<(), SevError>;

    /// SEND_CANCEL: back to running.
    ///
    /// # Errors
    /// [`SevError`].
    fn send_cancel(&self) -> Result<(), SevError>;

    /// RECEIVE_START; with `share`, the handle of a guest on this platform whose key the new context shares.
    ///
    /// # Errors
    /// [`SevError`].
    fn receive_start(
        &self,
        policy: Policy,
        origin: &PdhCert,
        session: &Session,
        share: Option<u32>,
    ) -> Result<u32, SevError>;

    /// RECEIVE_UPDATE_DATA.
    ///
    /// # Errors
    /// [`SevError`].
    fn receive_update_data(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError>;

    /// RECEIVE_FINISH.
    ///
    /// # Errors
    /// [`SevError`].
    fn receive_finish(&self) -> Result<(), SevError>;

    /// DBG_DECRYPT; one of the four commands that a mirror may give.
    ///
    /// # Errors
    /// POLICY_FAILURE under NODBG.
    fn debug_decrypt(&self, memory: &Mapping, offset: u64, to: &mut [u8]) -> Result<(), SevError>;
}
