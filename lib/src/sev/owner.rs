//! A guest owner: who says what a guest may do, checks what was launched, and gives it a secret.
//!
//! Owns: the owner's half of a launch. Must not know: the platform's half, KVM, migration. The owner's
//! machine is not the guest's host: what crosses are the certificate, [`OwnerSession`], [`Measurement`] and
//! the packet.

use super::certificate::DhKey;
use super::random::Random;
use super::session::{Launch, PacketKind, TransportKeys, WrappingKeys};
use super::{Measurement, OwnerSession, PacketHeader, PdhCert, PlatformStatus, Policy, SevError};

/// Bytes of the largest secret: what the firmware takes in one packet.
pub const MAX_SECRET: usize = 16 * 1024;

/// One guest's owner during its launch. Holds TEK and TIK, wiped when dropped.
pub struct GuestOwner {
    policy: Policy,
    keys: TransportKeys,
    session: OwnerSession,
    random: Random,
}

impl std::fmt::Debug for GuestOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestOwner").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// What the owner learned: this launch is the expected one. Secrets are made from it alone.
#[derive(Debug)]
pub struct VerifiedLaunch<'a> {
    owner: &'a mut GuestOwner,
    measurement: Measurement,
}

impl GuestOwner {
    /// An owner of a guest with `policy`, to be launched on the platform with certificate `platform`. The
    /// caller knows that certificate for the platform's own: its chain is not looked at here.
    ///
    /// # Errors
    /// [`SevError::Malformed`] for what is no such certificate.
    pub fn new(platform: &PdhCert, policy: Policy) -> Result<Self, SevError> {
        Self::with_random(platform, policy, Random::system())
    }

    /// With keys from a seed, for tests that must repeat: whoever knows the seed knows the keys.
    ///
    /// # Errors
    /// As [`GuestOwner::new`].
    pub fn seeded(platform: &PdhCert, policy: Policy, seed: u64) -> Result<Self, SevError> {
        Self::with_random(platform, policy, Random::seeded(seed))
    }

    fn with_random(platform: &PdhCert, policy: Policy, mut random: Random) -> Result<Self, SevError> {
        let key = DhKey::generate(&mut random);
        let z = key.agree(platform)?;
        let nonce = random.bytes();
        let wrapping = WrappingKeys::derive(&*z, &nonce);
        let keys = TransportKeys::random(&mut random);
        let session = keys.wrap(&wrapping, nonce, random.bytes(), policy);
        let session = OwnerSession { dh_cert: key.certificate().clone(), session };
        Ok(Self { policy, keys, session, random })
    }

    /// The session data that LAUNCH_START takes.
    pub const fn session(&self) -> &OwnerSession {
        &self.session
    }

    /// The policy that the session is bound to.
    pub const fn policy(&self) -> Policy {
        self.policy
    }

    /// Checks LAUNCH_MEASURE's answer: the guest consists of what `digest` (SHA-256 over all that was
    /// measured, in order) says, under this owner's policy, on firmware of the version in `platform`.
    ///
    /// # Errors
    /// [`SevError::Malformed`]: it is of another launch, or not by a platform that this owner made a session
    /// with.
    pub fn verify(
        &mut self,
        platform: &PlatformStatus,
        digest: &[u8; 32],
        measurement: &Measurement,
    ) -> Result<VerifiedLaunch<'_>, SevError> {
        let launch = Launch { api: platform.api, build: platform.build, policy: self.policy, digest };
        self.keys.verify(&launch, measurement).map_err(|_| SevError::Malformed {
            what: "launch measurement",
            why: "is not of the expected guest, policy and firmware",
        })?;
        Ok(VerifiedLaunch { owner: self, measurement: *measurement })
    }
}

impl VerifiedLaunch<'_> {
    /// Seals a secret for LAUNCH_SECRET. Only the platform of the session can open it, only into the launch
    /// verified.
    ///
    /// # Errors
    /// [`SevError::Malformed`] for a length that the firmware refuses: none, above [`MAX_SECRET`], no
    /// multiple of 16.
    pub fn secret(&mut self, plain: &[u8]) -> Result<(PacketHeader, Vec<u8>), SevError> {
        if plain.is_empty() || plain.len() > MAX_SECRET || !plain.len().is_multiple_of(16) {
            let why = "its length is zero, above 16 KiB or no multiple of 16";
            return Err(SevError::Malformed { what: "secret", why });
        }
        let iv = self.owner.random.bytes();
        let kind = PacketKind::Secret { measurement: &self.measurement.mac };
        Ok(self.owner.keys.seal(kind, iv, plain))
    }
}
