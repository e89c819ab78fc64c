//! The firmware's commands over its guests: checks in the specification's spirit, then the cryptography.
//!
//! Owns: guest contexts (policy, keys, digest, state), the PDH and the PEK. Must not know: KVM, VMs. One
//! command runs at a time, as on the real processor with its one mailbox. Source: SEV API specification
//! (55766), chapter 6.

use std::collections::BTreeMap;
use std::sync::Arc;

use mirrorvm_abi::evidence::{MNONCE_BYTES, REPORT_BYTES};
use ring::digest;
use zeroize::Zeroizing;

use super::MemoryKey;
use super::asids::{AsidLimits, Asids};
use super::state::{Command, State, step};
use crate::memory::Mapping;
use crate::sev::certificate::{DhKey, Pek};
use crate::sev::random::Random;
use crate::sev::session::{Launch, PacketKind, TransportKeys, WrappingKeys};
use crate::sev::{
    Endorsement, FirmwareError, GuestStatus, Measurement, OwnerSession, PacketHeader, PdhCert, Policy,
    Session,
};

/// The API version that the model claims.
pub(super) const API: (u8, u8) = (1, 55);
/// Build number of the modelled firmware.
pub(super) const BUILD: u8 = 1;

/// What SEND_UPDATE_DATA, RECEIVE_UPDATE_DATA and LAUNCH_SECRET take at most.
pub(super) const MAX_PACKET: u64 = 16 * 1024;

/// Alignment of addresses and lengths: a cipher block.
const ALIGN: u64 = 16;

/// What the firmware keeps of a guest.
struct Guest {
    state: State,
    policy: Policy,
    /// The VEK, as the memory controller would hold it.
    key: Arc<MemoryKey>,
    /// TEK and TIK, while a session lasts.
    transport: Option<TransportKeys>,
    /// Over all that was measured.
    digest: digest::Context,
    /// The measurement that LAUNCH_MEASURE gave.
    measurement: Option<Measurement>,
}

/// The security processor's state.
pub(super) struct Firmware {
    pub asids: Asids,
    random: Random,
    pdh: DhKey,
    pek: Pek,
    guests: BTreeMap<u32, Guest>,
    last_handle: u32,
}

impl Firmware {
    pub fn new(mut random: Random, limits: AsidLimits) -> Self {
        let pdh = DhKey::generate(&mut random);
        let pek = Pek::modelled(&mut random);
        Self { asids: Asids::new(limits), random, pdh, pek, guests: BTreeMap::new(), last_handle: 0 }
    }

    pub fn pdh(&self) -> &PdhCert {
        self.pdh.certificate()
    }

    pub fn endorsement(&self) -> &Endorsement {
        self.pek.endorsement()
    }

    /// Becomes the firmware of another chip.
    pub fn change_chip(&mut self) {
        self.pek = Pek::of_another_chip(&mut self.random);
    }

    /// ATTESTATION.
    pub fn attestation(
        &mut self,
        handle: u32,
        mnonce: &[u8; MNONCE_BYTES],
    ) -> Result<[u8; REPORT_BYTES], FirmwareError> {
        let (guest, _) = self.at(handle, Command::Attestation)?;
        let (digest, policy) = (guest.launched(), guest.policy);
        Ok(self.pek.report(*mnonce, digest, policy))
    }

    pub fn guests(&self) -> u32 {
        self.guests.len() as u32
    }

    fn guest(&mut self, handle: u32) -> Result<&mut Guest, FirmwareError> {
        self.guests.get_mut(&handle).ok_or(FirmwareError::InvalidGuest)
    }

    /// The guest, if `command` is possible in its state; and where it leads.
    fn at(&mut self, handle: u32, command: Command) -> Result<(&mut Guest, State), FirmwareError> {
        let guest = self.guest(handle)?;
        let next = step(guest.state, command)?;
        Ok((guest, next))
    }

    /// As [`Firmware::at`], for commands that touch guest memory: without an ASID there is no key in the
    /// memory controller.
    fn active(&mut self, handle: u32, command: Command) -> Result<&mut Guest, FirmwareError> {
        self.at(handle, command)?;
        if !self.asids.is_active(handle) {
            return Err(FirmwareError::Inactive);
        }
        self.guest(handle)
    }

    fn add(&mut self, state: State, policy: Policy, key: Arc<MemoryKey>, keys: TransportKeys) -> u32 {
        // Handles are not given twice; four billion guests do not happen.
        self.last_handle += 1;
        let digest = digest::Context::new(&digest::SHA256);
        let guest = Guest { state, policy, key, transport: Some(keys), digest, measurement: None };
        self.guests.insert(self.last_handle, guest);
        self.last_handle
    }

    fn new_key(&mut self) -> Arc<MemoryKey> {
        let mut bytes = Zeroizing::new([0; 32]);
        self.random.fill(&mut *bytes);
        Arc::new(MemoryKey::new(&bytes))
    }

    fn unwrap(
        &self,
        peer: &PdhCert,
        session: &Session,
        policy: Policy,
    ) -> Result<TransportKeys, FirmwareError> {
        let z = self.pdh.agree(peer).map_err(|_| FirmwareError::InvalidCertificate)?;
        TransportKeys::unwrap(&WrappingKeys::derive(&*z, &session.nonce), session, policy)
    }

    /// LAUNCH_START.
    pub fn launch_start(
        &mut self,
        policy: Policy,
        owner: Option<&OwnerSession>,
    ) -> Result<u32, FirmwareError> {
        let state = step(State::Uninit, Command::LaunchStart)?;
        check_version(policy)?;
        let keys = match owner {
            Some(owner) => self.unwrap(&owner.dh_cert, &owner.session, policy)?,
            None => TransportKeys::random(&mut self.random),
        };
        let key = self.new_key();
        Ok(self.add(state, policy, key, keys))
    }

    /// ACTIVATE.
    pub fn activate(&mut self, handle: u32, asid: u32) -> Result<(), FirmwareError> {
        let (guest, _) = self.at(handle, Command::Activate)?;
        let (es, key) = (guest.policy.has(Policy::ES), Arc::clone(&guest.key));
        self.asids.activate(asid, handle, es, &key)
    }

    /// DEACTIVATE.
    pub fn deactivate(&mut self, handle: u32) -> Result<(), FirmwareError> {
        self.at(handle, Command::Deactivate)?;
        self.asids.deactivate(handle);
        Ok(())
    }

    /// DECOMMISSION: forgets the guest.
    pub fn decommission(&mut self, handle: u32) -> Result<(), FirmwareError> {
        self.at(handle, Command::Decommission)?;
        if self.asids.is_active(handle) {
            return Err(FirmwareError::Active);
        }
        self.guests.remove(&handle);
        Ok(())
    }

    /// LAUNCH_UPDATE_DATA.
    pub fn launch_update_data(&mut self, handle: u32, at: Span<'_>) -> Result<(), FirmwareError> {
        let guest = self.active(handle, Command::LaunchUpdateData)?;
        at.aligned()?;
        guest.measure_and_encrypt(at);
        Ok(())
    }

    /// LAUNCH_UPDATE_VMSA for one save area.
    pub fn launch_update_vmsa(&mut self, handle: u32, at: Span<'_>) -> Result<(), FirmwareError> {
        let guest = self.active(handle, Command::LaunchUpdateVmsa)?;
        if !guest.policy.has(Policy::ES) {
            return Err(FirmwareError::PolicyFailure);
        }
        at.aligned()?;
        guest.measure_and_encrypt(at);
        Ok(())
    }

    /// LAUNCH_MEASURE.
    pub fn launch_measure(&mut self, handle: u32) -> Result<Measurement, FirmwareError> {
        let nonce = self.random.bytes();
        let (guest, next) = self.at(handle, Command::LaunchMeasure)?;
        let digest = guest.launched();
        let measurement = guest
            .transport()?
            .measure(&Launch { api: API, build: BUILD, policy: guest.policy, digest: &digest }, nonce);
        guest.measurement = Some(measurement);
        guest.state = next;
        Ok(measurement)
    }

    /// LAUNCH_SECRET.
    pub fn launch_secret(
        &mut self,
        handle: u32,
        header: &PacketHeader,
        packet: &[u8],
        at: Span<'_>,
    ) -> Result<(), FirmwareError> {
        let guest = self.active(handle, Command::LaunchSecret)?;
        at.packet(packet)?;
        let measurement = guest.measurement.ok_or(FirmwareError::InvalidGuestState)?;
        let kind = PacketKind::Secret { measurement: &measurement.mac };
        let plain = guest.transport()?.open(kind, header, packet)?;
        guest.key.write(at.memory, at.offset, &plain);
        Ok(())
    }

    /// LAUNCH_FINISH.
    pub fn launch_finish(&mut self, handle: u32) -> Result<(), FirmwareError> {
        self.end(handle, Command::LaunchFinish)
    }

    /// Leaves a session: its keys are wiped.
    fn end(&mut self, handle: u32, command: Command) -> Result<(), FirmwareError> {
        let (guest, next) = self.at(handle, command)?;
        guest.state = next;
        guest.transport = None;
        guest.measurement = None;
        Ok(())
    }

    /// GUEST_STATUS.
    pub fn guest_status(&mut self, handle: u32) -> Result<GuestStatus, FirmwareError> {
        let (guest, _) = self.at(handle, Command::GuestStatus)?;
        Ok(GuestStatus { handle, policy: guest.policy, state: guest.state.shown() })
    }

    /// SEND_START. The model knows no chains: DOMAIN, which asks for the same owner's certificate authority,
    /// admits only this platform itself; SEV admits any platform of the model.
    pub fn send_start(&mut self, handle: u32, target: &PdhCert) -> Result<Session, FirmwareError> {
        let z = self.pdh.agree(target).map_err(|_| FirmwareError::InvalidCertificate);
        let (keys, nonce, iv) =
            (TransportKeys::random(&mut self.random), self.random.bytes(), self.random.bytes());
        let same_domain = target == self.pdh.certificate();
        let (guest, next) = self.at(handle, Command::SendStart)?;
        if guest.policy.has(Policy::NOSEND) || guest.policy.has(Policy::DOMAIN) && !same_domain {
            return Err(FirmwareError::PolicyFailure);
        }
        let session = keys.wrap(&WrappingKeys::derive(&*z?, &nonce), nonce, iv, guest.policy);
        guest.transport = Some(keys);
        guest.state = next;
        Ok(session)
    }

    /// SEND_UPDATE_DATA.
    pub fn send_update_data(
        &mut self,
        handle: u32,
        at: Span<'_>,
    ) -> Result<(PacketHeader, Vec<u8>), FirmwareError> {
        let iv = self.random.bytes();
        let guest = self.active(handle, Command::SendUpdateData)?;
        at.aligned()?;
        if at.len > MAX_PACKET {
            return Err(FirmwareError::InvalidLength);
        }
        let mut plain = Zeroizing::new(vec![0; at.len as usize]);
        guest.key.read(at.memory, at.offset, &mut plain);
        Ok(guest.transport()?.seal(PacketKind::Data, iv, &plain))
    }

    /// SEND_FINISH.
    pub fn send_finish(&mut self, handle: u32) -> Result<(), FirmwareError> {
        self.end(handle, Command::SendFinish)
    }

    /// SEND_CANCEL.
    pub fn send_cancel(&mut self, handle: u32) -> Result<(), FirmwareError> {
        self.end(handle, Command::SendCancel)
    }

    /// RECEIVE_START. With `share`, the new guest gets that guest's key if the policies are equal and allow
    /// it.
    pub fn receive_start(
        &mut self,
        policy: Policy,
        origin: &PdhCert,
        session: &Session,
        share: Option<u32>,
    ) -> Result<u32, FirmwareError> {
        let state = step(State::Uninit, Command::ReceiveStart)?;
        check_version(policy)?;
        let keys = self.unwrap(origin, session, policy)?;
        let key = match share {
            None => self.new_key(),
            Some(handle) => {
                let other = self.guest(handle)?;
                if other.policy != policy || policy.has(Policy::NOKS) {
                    return Err(FirmwareError::PolicyFailure);
                }
                Arc::clone(&other.key)
            }
        };
        Ok(self.add(state, policy, key, keys))
    }

    /// RECEIVE_UPDATE_DATA.
    pub fn receive_update_data(
        &mut self,
        handle: u32,
        header: &PacketHeader,
        packet: &[u8],
        at: Span<'_>,
    ) -> Result<(), FirmwareError> {
        let guest = self.active(handle, Command::ReceiveUpdateData)?;
        at.packet(packet)?;
        let plain = guest.transport()?.open(PacketKind::Data, header, packet)?;
        guest.key.write(at.memory, at.offset, &plain);
        Ok(())
    }

    /// RECEIVE_FINISH.
    pub fn receive_finish(&mut self, handle: u32) -> Result<(), FirmwareError> {
        self.end(handle, Command::ReceiveFinish)
    }

    /// DBG_DECRYPT of whole blocks; KVM cuts out what is wanted.
    pub fn debug_decrypt(&mut self, handle: u32, at: Span<'_>, to: &mut [u8]) -> Result<(), FirmwareError> {
        let guest = self.active(handle, Command::DbgDecrypt)?;
        if guest.policy.has(Policy::NODBG) {
            return Err(FirmwareError::PolicyFailure);
        }
        guest.key.read(at.memory, at.offset, to);
        Ok(())
    }
}

impl Guest {
    fn transport(&self) -> Result<&TransportKeys, FirmwareError> {
        self.transport.as_ref().ok_or(FirmwareError::InvalidGuestState)
    }

    /// SHA-256 over all that was measured so far.
    fn launched(&self) -> [u8; 32] {
        let mut digest = [0; 32];
        digest.copy_from_slice(self.digest.clone().finish().as_ref());
        digest
    }

    fn measure_and_encrypt(&mut self, at: Span<'_>) {
        let mut page = Zeroizing::new([0; crate::addr::PAGE_SIZE as usize]);
        let mut done = 0;
        while done < at.len {
            let part = &mut page[..(at.len - done).min(crate::addr::PAGE_SIZE) as usize];
            at.memory.read(at.offset + done, part);
            self.digest.update(part);
            self.key.write(at.memory, at.offset + done, part);
            done += part.len() as u64;
        }
    }
}

/// A span of guest memory that a command names; checked to lie in its mapping.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub memory: &'a Mapping,
    pub offset: u64,
    pub len: u64,
}

impl Span<'_> {
    fn aligned(self) -> Result<(), FirmwareError> {
        if !self.offset.is_multiple_of(ALIGN) {
            return Err(FirmwareError::InvalidAddress);
        }
        if self.len == 0 || !self.len.is_multiple_of(ALIGN) {
            return Err(FirmwareError::InvalidLength);
        }
        Ok(())
    }

    /// Can it hold what `packet` opens to?
    fn packet(self, packet: &[u8]) -> Result<(), FirmwareError> {
        self.aligned()?;
        if packet.len() as u64 != self.len || self.len > MAX_PACKET {
            return Err(FirmwareError::InvalidLength);
        }
        Ok(())
    }
}

/// A policy names the oldest API version that the guest accepts (bits 16 to 31).
fn check_version(policy: Policy) -> Result<(), FirmwareError> {
    let wanted = ((policy.0 >> 16) as u8, (policy.0 >> 24) as u8);
    if wanted > API { Err(FirmwareError::PolicyFailure) } else { Ok(()) }
}
