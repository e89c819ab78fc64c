//! What the self-test does, step by step: commands to the security processor and KVM, and what should come of
//! each.
//!
//! Owns: the steps, their order, what is expected. Must not know: whether the machine is real or modelled,
//! how results are shown. Expectations are what the kernel's and AMD's documents say, as the model has them:
//! a test runs all steps on the model, and every one must agree.

use std::sync::Arc;

use mirrorvm::hypervisor::{Hypervisor, HypervisorError, Slot, SlotId, Vcpu, Vm};
use mirrorvm::memory::{Mapping, MemoryError, View};
use mirrorvm::sev::{
    Context, FirmwareError, GuestOwner, GuestState, Platform, PlatformCerts, Policy, SevError,
};
use ring::digest::{SHA256, digest};

/// RAM of each guest: a few pages.
const RAM_BYTES: u64 = 64 << 10;
const PAGE: u64 = 4096;
/// What lies in the pages that are launched.
const PATTERN: &[u8; 16] = b"mirrorvm pattern";
/// Where a secret is put, and where a page is received.
const SECRET_AT: u64 = 8 * PAGE;
const FREE_AT: u64 = 12 * PAGE;
/// Where the model keeps a save area; hardware has its own place.
const AREA_AT: u64 = 15 * PAGE;

/// What should come of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// It works.
    Done,
    /// The firmware refuses with this status.
    Firmware(FirmwareError),
    /// The kernel refuses with this errno, and asks no firmware.
    Errno(i32),
}

/// What came of a step.
#[derive(Debug)]
pub(super) enum Came {
    /// It worked; what it told, as text.
    Done(String),
    /// It was refused.
    Refused(Failure),
    /// It was not tried.
    NotRun(String),
}

/// Why a step did not work.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The security processor, or KVM's part for it.
    #[error(transparent)]
    Sev(#[from] SevError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] HypervisorError),
    /// Memory for the test's guests.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It worked, and what it gave is not what was asked for.
    #[error("{0}")]
    Wrong(String),
}

/// A step and what came of it.
#[derive(Debug)]
pub(super) struct Step {
    /// Part of the test: `launch`, `mirror`, ...
    pub group: &'static str,
    /// What was done.
    pub name: &'static str,
    pub expected: Expected,
    pub came: Came,
    /// Commands that were issued for it, as far as the hypervisor tells.
    pub issued: std::ops::Range<usize>,
}

impl Step {
    /// Whether what came is what should; `None` when it was not tried.
    pub fn agrees(&self) -> Option<bool> {
        match (&self.came, self.expected) {
            (Came::NotRun(_), _) => None,
            (Came::Done(_), expected) => Some(expected == Expected::Done),
            (Came::Refused(Failure::Sev(error)), Expected::Firmware(code)) => {
                Some(error.firmware() == Some(code))
            }
            (Came::Refused(Failure::Sev(error)), Expected::Errno(errno)) => {
                Some(error.firmware().is_none() && error.errno() == Some(errno))
            }
            (Came::Refused(_), _) => Some(false),
        }
    }
}

/// A guest of the test's own.
struct Guest {
    // Before the memory: the VM must be gone when the memory goes.
    vcpu: Option<Box<dyn Vcpu>>,
    vm: Box<dyn Vm>,
    context: Arc<dyn Context>,
    ram: Arc<Mapping>,
}

impl Guest {
    fn new(host: &dyn Hypervisor) -> Result<Self, Failure> {
        let ram = Mapping::memfd("mirrorvm selftest", RAM_BYTES)?;
        (0..RAM_BYTES / 16).for_each(|at| ram.write(at * 16, PATTERN));
        Self::over(host, ram)
    }

    /// Another VM on the same memory.
    fn over(host: &dyn Hypervisor, ram: Arc<Mapping>) -> Result<Self, Failure> {
        let mut vm = host.create_vm()?;
        vm.set_slot(
            SlotId(0),
            Slot {
                gpa: 0,
                len: RAM_BYTES,
                memory: Arc::clone(&ram),
                offset: 0,
                view: View::Guest,
                dirty_log: false,
                read_only: false,
            },
        )?;
        let context = vm.sev().ok_or_else(|| Failure::Wrong("the VM has no encryption context".into()))?;
        Ok(Self { vcpu: None, vm, context, ram })
    }

    fn make_vcpu(&mut self, es: bool) -> Result<(), Failure> {
        if es {
            match self.vm.place_save_area(0, Arc::clone(&self.ram), AREA_AT) {
                // Hardware: the kernel owns that page.
                Ok(()) | Err(HypervisorError::Unsupported { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.vcpu = Some(self.vm.create_vcpu(0)?);
        Ok(())
    }
}

/// What the steps are run with.
pub(super) struct Ground<'a> {
    pub host: &'a dyn Hypervisor,
    pub platform: &'a dyn Platform,
    /// All that SEND_START takes of this platform, to send to itself; a sentence that says what is missing.
    pub certs: Result<PlatformCerts, String>,
    /// Why there is no SEV-ES.
    pub no_es: Option<String>,
    /// How many commands were issued so far.
    pub issued: &'a dyn Fn() -> usize,
}

/// Collects steps.
struct Run<'a, 'b> {
    ground: &'a Ground<'b>,
    group: &'static str,
    steps: Vec<Step>,
}

impl Run<'_, '_> {
    /// Does a step and keeps what came of it. Gives its value where it worked.
    fn step<T>(
        &mut self,
        name: &'static str,
        expected: Expected,
        act: impl FnOnce() -> Result<(T, String), Failure>,
    ) -> Option<T> {
        let from = (self.ground.issued)();
        let (value, came) = match act() {
            Ok((value, told)) => (Some(value), Came::Done(told)),
            Err(failure) => (None, Came::Refused(failure)),
        };
        let issued = from..(self.ground.issued)();
        self.steps.push(Step { group: self.group, name, expected, came, issued });
        value
    }

    /// A step without a value.
    fn plain(&mut self, name: &'static str, expected: Expected, act: impl FnOnce() -> Result<(), SevError>) {
        let _ = self.step(name, expected, || Ok((act()?, String::new())));
    }

    fn skip(&mut self, name: &'static str, expected: Expected, why: impl Into<String>) {
        let came = Came::NotRun(why.into());
        self.steps.push(Step { group: self.group, name, expected, came, issued: 0..0 });
    }

    fn status_is(&mut self, context: &dyn Context, policy: Policy, state: GuestState) {
        let _ = self.step("GUEST_STATUS", Expected::Done, || {
            let status = context.guest_status()?;
            let told = format!("state {:?}, policy {:#x}", status.state, status.policy.0);
            if (status.policy, status.state) == (policy, state) {
                return Ok(((), told));
            }
            Err(Failure::Wrong(format!("{told}; expected state {state:?}, policy {:#x}", policy.0)))
        });
    }
}

/// Runs all steps. One that needs what an earlier one did not give is told as not run.
pub(super) fn run(ground: &Ground<'_>) -> Vec<Step> {
    let mut run = Run { ground, group: "platform", steps: Vec::new() };
    platform(&mut run);
    let guest = launch(&mut run);
    mirror(&mut run, guest.as_ref());
    debug(&mut run);
    send(&mut run);
    es(&mut run);
    run.steps
}

fn platform(run: &mut Run<'_, '_>) {
    let platform = run.ground.platform;
    let _ = run.step("PLATFORM_STATUS", Expected::Done, || {
        let s = platform.status()?;
        let told = format!("API {}.{}, build {}, SEV-ES {}", s.api.0, s.api.1, s.build, s.es);
        Ok(((), format!("{told}, {} guests", s.guests)))
    });
    let _ = run.step("PDH_CERT_EXPORT", Expected::Done, || {
        let pdh = platform.pdh()?;
        Ok(((), format!("{} bytes", pdh.0.len())))
    });
}

/// A guest from its context to its first instruction, with an owner who looks at it.
fn launch(run: &mut Run<'_, '_>) -> Option<Guest> {
    use Expected::{Done, Errno, Firmware};
    run.group = "launch";
    let (host, platform) = (run.ground.host, run.ground.platform);
    let guest = run.step("KVM_CREATE_VM", Done, || Ok((Guest::new(host)?, String::new())))?;
    let (sev, ram) = (&*guest.context, &guest.ram);
    let policy = Policy(Policy::NODBG);
    run.plain("LAUNCH_START before KVM_SEV_INIT", Errno(libc::ENOTTY), || {
        sev.launch_start(policy, None).map(drop)
    });
    run.plain("KVM_SEV_INIT", Done, || sev.init(false));
    run.plain("KVM_SEV_INIT again", Errno(libc::EINVAL), || sev.init(false));
    run.plain("KVM_MEMORY_ENCRYPT_REG_REGION", Done, || sev.register_region(ram, 0, RAM_BYTES));
    let owner = run.step("a session for this platform", Done, || {
        Ok((GuestOwner::new(&platform.pdh()?, policy)?, String::new()))
    });
    let Some(mut owner) = owner else {
        run.skip("LAUNCH_START", Done, "there is no session");
        return None;
    };
    run.step("LAUNCH_START", Done, || {
        let handle = sev.launch_start(policy, Some(owner.session()))?;
        Ok(((), format!("handle {handle}")))
    })?;
    run.status_is(sev, policy, GuestState::Launching);
    let mut bytes = vec![0; PAGE as usize];
    ram.read(0, &mut bytes);
    let expected = digest(&SHA256, &bytes);
    run.plain("LAUNCH_UPDATE_DATA", Done, || sev.launch_update_data(ram, 0, PAGE));
    let _ = run.step("what was launched is ciphertext", Done, || {
        let mut now = vec![0; PAGE as usize];
        ram.read(0, &mut now);
        if now == bytes {
            Err(Failure::Wrong("it is still in plain".into()))
        } else {
            Ok(((), String::new()))
        }
    });
    run.plain("LAUNCH_FINISH before LAUNCH_MEASURE", Firmware(FirmwareError::InvalidGuestState), || {
        sev.launch_finish()
    });
    let measured = run.step("LAUNCH_MEASURE", Done, || Ok((sev.launch_measure()?, String::new())));
    let sealed = run.step("the owner finds the measurement right, and seals a secret", Done, || {
        let measured = measured.ok_or_else(|| Failure::Wrong("there is no measurement".into()))?;
        let mut digest = [0; 32];
        digest.copy_from_slice(expected.as_ref());
        let mut launch = owner.verify(&platform.status()?, &digest, &measured)?;
        Ok((launch.secret(PATTERN)?, String::new()))
    });
    match &sealed {
        Some((header, packet)) => {
            run.plain("LAUNCH_SECRET", Done, || sev.launch_secret(header, packet, ram, SECRET_AT));
            let mut forged = packet.clone();
            forged[0] ^= 1;
            run.plain(
                "LAUNCH_SECRET of which one bit is another",
                Firmware(FirmwareError::BadMeasurement),
                || sev.launch_secret(header, &forged, ram, SECRET_AT),
            );
        }
        None => run.skip("LAUNCH_SECRET", Done, "there is no secret"),
    }
    run.plain("LAUNCH_FINISH", Done, || sev.launch_finish());
    run.status_is(sev, policy, GuestState::Running);
    let _ = run.step("ATTESTATION", Done, || {
        let nonce = *b"mirrorvm's test.";
        let report = sev.attestation(&nonce)?;
        let mut launch = [0; 32];
        launch.copy_from_slice(expected.as_ref());
        match platform.endorsement()?.check(&report, &nonce, launch, policy) {
            Ok(()) => Ok(((), "signed by a PEK that the chip has certified".into())),
            Err(unfit) => Err(Failure::Wrong(format!("a helper would refuse it: {unfit:?}"))),
        }
    });
    run.plain("LAUNCH_UPDATE_DATA after LAUNCH_FINISH", Firmware(FirmwareError::InvalidGuestState), || {
        sev.launch_update_data(ram, 4 * PAGE, PAGE)
    });
    Some(guest)
}

/// A second VM that takes the first one's encryption context, and what it may not do.
fn mirror(run: &mut Run<'_, '_>, guest: Option<&Guest>) {
    use Expected::{Done, Errno, Firmware};
    run.group = "mirror";
    let Some(guest) = guest else {
        return run.skip("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM", Done, "no guest was launched");
    };
    let host = run.ground.host;
    let made =
        run.step("KVM_CREATE_VM", Done, || Ok((Guest::over(host, Arc::clone(&guest.ram))?, String::new())));
    let Some(mirror) = made else { return };
    let sev = &*mirror.context;
    run.plain("KVM_CAP_VM_COPY_ENC_CONTEXT_FROM", Done, || sev.copy_from(&guest.context.copy_source()));
    run.status_is(sev, Policy(Policy::NODBG), GuestState::Running);
    run.plain("KVM_MEMORY_ENCRYPT_REG_REGION of a mirror", Errno(libc::EINVAL), || {
        sev.register_region(&mirror.ram, 0, RAM_BYTES)
    });
    run.plain("LAUNCH_START of a mirror", Errno(libc::EINVAL), || {
        sev.launch_start(Policy(Policy::NODBG), None).map(drop)
    });
    run.plain("LAUNCH_MEASURE of a mirror", Errno(libc::EINVAL), || sev.launch_measure().map(drop));
    run.plain("ATTESTATION of a mirror", Errno(libc::EINVAL), || sev.attestation(&[7; 16]).map(drop));
    run.plain(
        "DBG_DECRYPT of a mirror whose guest forbids it",
        Firmware(FirmwareError::PolicyFailure),
        || sev.debug_decrypt(&mirror.ram, 0, &mut [0; 16]),
    );
    let _ = run.step("the mirror ends, and its guest stays", Done, || {
        drop(mirror);
        let state = guest.context.guest_status()?.state;
        match state {
            GuestState::Running => Ok(((), String::new())),
            other => Err(Failure::Wrong(format!("the guest is {other:?}"))),
        }
    });
}

/// A guest whose owner lets the host look: the one way to see that a mirror reads what its guest has.
fn debug(run: &mut Run<'_, '_>) {
    use Expected::Done;
    run.group = "debug";
    let host = run.ground.host;
    let launched = run.step("a guest without NODBG", Done, || {
        let guest = Guest::new(host)?;
        let sev = &*guest.context;
        sev.init(false)?;
        sev.register_region(&guest.ram, 0, RAM_BYTES)?;
        sev.launch_start(Policy(0), None)?;
        sev.launch_update_data(&guest.ram, 0, 2 * PAGE)?;
        sev.launch_measure()?;
        sev.launch_finish()?;
        Ok((guest, String::new()))
    });
    let Some(guest) = launched else { return };
    let mirror = run.step("its mirror", Done, || {
        let mirror = Guest::over(host, Arc::clone(&guest.ram))?;
        mirror.context.copy_from(&guest.context.copy_source())?;
        Ok((mirror, String::new()))
    });
    let reads = |sev: &dyn Context| {
        let mut plain = [0; 16];
        sev.debug_decrypt(&guest.ram, PAGE, &mut plain)?;
        if plain == *PATTERN {
            Ok(((), String::new()))
        } else {
            Err(Failure::Wrong("it is not what was launched".into()))
        }
    };
    let _ = run.step("DBG_DECRYPT of the guest", Done, || reads(&*guest.context));
    match &mirror {
        Some(mirror) => {
            let _ = run.step("DBG_DECRYPT of the mirror", Done, || reads(&*mirror.context));
        }
        None => run.skip("DBG_DECRYPT of the mirror", Done, "there is no mirror"),
    }
}

/// A guest's page from one context to another of the same platform, by the firmware.
fn send(run: &mut Run<'_, '_>) {
    use Expected::{Done, Firmware};
    run.group = "send";
    let (host, platform) = (run.ground.host, run.ground.platform);
    let certs = match &run.ground.certs {
        Ok(certs) => certs.clone(),
        Err(why) => return run.skip("SEND_START", Done, why.clone()),
    };
    let make = |policy: Policy| -> Result<Guest, Failure> {
        let guest = Guest::new(host)?;
        let sev = &*guest.context;
        sev.init(false)?;
        sev.register_region(&guest.ram, 0, RAM_BYTES)?;
        sev.launch_start(policy, None)?;
        sev.launch_update_data(&guest.ram, 0, PAGE)?;
        sev.launch_measure()?;
        sev.launch_finish()?;
        Ok(guest)
    };
    if let Some(kept) = run.step("a guest that may not be sent", Done, || {
        Ok((make(Policy(Policy::NODBG | Policy::NOSEND))?, String::new()))
    }) {
        run.plain("SEND_START of it", Firmware(FirmwareError::PolicyFailure), || {
            kept.context.send_start(&certs).map(drop)
        });
    }
    let Some(from) = run.step("a guest that may", Done, || Ok((make(Policy(0))?, String::new()))) else {
        return;
    };
    let Some(session) =
        run.step("SEND_START", Done, || Ok((from.context.send_start(&certs)?, String::new())))
    else {
        return;
    };
    run.status_is(&*from.context, Policy(0), GuestState::Sending);
    run.plain("SEND_CANCEL", Done, || from.context.send_cancel());
    run.status_is(&*from.context, Policy(0), GuestState::Running);
    let again = run.step("SEND_START again", Done, || Ok((from.context.send_start(&certs)?, String::new())));
    let session = again.unwrap_or(session);
    let packet = run.step("SEND_UPDATE_DATA", Done, || {
        Ok((from.context.send_update_data(&from.ram, 0, PAGE)?, String::new()))
    });
    run.plain("SEND_FINISH", Done, || from.context.send_finish());
    run.status_is(&*from.context, Policy(0), GuestState::Sent);
    let Some(to) = run.step("a VM to receive it", Done, || {
        let to = Guest::new(host)?;
        to.context.init(false)?;
        to.context.register_region(&to.ram, 0, RAM_BYTES)?;
        Ok((to, String::new()))
    }) else {
        return;
    };
    run.plain("RECEIVE_START", Done, || {
        to.context.receive_start(Policy(0), &platform.pdh()?, &session, None).map(drop)
    });
    run.status_is(&*to.context, Policy(0), GuestState::Receiving);
    match &packet {
        Some((header, sealed)) => {
            run.plain("RECEIVE_UPDATE_DATA", Done, || {
                to.context.receive_update_data(header, sealed, &to.ram, FREE_AT)
            });
            let mut forged = sealed.clone();
            forged[0] ^= 1;
            run.plain(
                "RECEIVE_UPDATE_DATA of which one bit is another",
                Firmware(FirmwareError::BadMeasurement),
                || to.context.receive_update_data(header, &forged, &to.ram, FREE_AT + PAGE),
            );
        }
        None => run.skip("RECEIVE_UPDATE_DATA", Done, "nothing was sent"),
    }
    run.plain("RECEIVE_FINISH", Done, || to.context.receive_finish());
    run.status_is(&*to.context, Policy(0), GuestState::Running);
    let _ = run.step("DBG_DECRYPT of what arrived", Done, || {
        let mut plain = [0; 16];
        to.context.debug_decrypt(&to.ram, FREE_AT, &mut plain)?;
        if plain == *PATTERN {
            Ok(((), String::new()))
        } else {
            Err(Failure::Wrong("it is not what was sent".into()))
        }
    });
}

/// SEV-ES: vCPUs are made and measured during the launch, the mirror's as well.
fn es(run: &mut Run<'_, '_>) {
    use Expected::Done;
    run.group = "es";
    if let Some(why) = &run.ground.no_es {
        return run.skip("KVM_SEV_ES_INIT", Done, why.clone());
    }
    let host = run.ground.host;
    let policy = Policy(Policy::NODBG | Policy::ES);
    let begun = run.step("KVM_SEV_ES_INIT and LAUNCH_START", Done, || {
        let mut guest = Guest::new(host)?;
        guest.context.init(true)?;
        guest.context.register_region(&guest.ram, 0, RAM_BYTES)?;
        guest.context.launch_start(policy, None)?;
        guest.make_vcpu(true)?;
        guest.context.launch_update_data(&guest.ram, 0, PAGE)?;
        Ok((guest, String::new()))
    });
    let Some(guest) = begun else { return };
    let sev = &*guest.context;
    run.plain("LAUNCH_UPDATE_VMSA", Done, || sev.launch_update_vmsa());
    let mirror = run.step("its mirror, while it is launched", Done, || {
        let mut mirror = Guest::over(host, Mapping::memfd("mirrorvm selftest", RAM_BYTES)?)?;
        mirror.context.copy_from(&sev.copy_source())?;
        mirror.make_vcpu(true)?;
        Ok((mirror, String::new()))
    });
    match &mirror {
        Some(mirror) => {
            run.plain("LAUNCH_UPDATE_VMSA of the mirror", Done, || mirror.context.launch_update_vmsa())
        }
        None => run.skip("LAUNCH_UPDATE_VMSA of the mirror", Done, "there is no mirror"),
    }
    run.plain("LAUNCH_MEASURE", Done, || sev.launch_measure().map(drop));
    run.plain("LAUNCH_FINISH", Done, || sev.launch_finish());
    run.status_is(sev, policy, GuestState::Running);
}
