//! The workload's I/O ports: ticks, console, page status, power.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm_workload as w;

use super::vcpu::Gate;
use crate::addr::{Gpa, PAGE_SIZE, RamAddr};
use crate::address_space::{Declaration, Refusal};
use crate::guest::{Console, EncryptionStatus, MachineEnd, MigrationControl, OnEnd};
use crate::hypervisor::{KVM_ENOSYS, Ports};
use crate::memory::GuestRam;

/// KVM_HC_MAP_GPA_RANGE (include/uapi/linux/kvm_para.h).
const KVM_HC_MAP_GPA_RANGE: u64 = 12;
/// Its third argument, bit 4: the pages are encrypted.
const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

/// Arguments that make no sense (include/uapi/linux/kvm_para.h); negated in RAX.
const KVM_EINVAL: u64 = 22;

/// Says what is wrong with a declaration; empty when it can be used.
pub type CheckDeclaration = Arc<dyn Fn(&Declaration) -> Vec<Refusal> + Send + Sync>;

/// What every vCPU's ports reach.
#[derive(Clone)]
pub(super) struct Devices {
    pub ram: GuestRam,
    pub shared: RamAddr,
    pub console: Arc<Console>,
    pub encryption: Arc<EncryptionStatus>,
    pub gate: Arc<Gate>,
    pub on_end: OnEnd,
    pub control: Arc<MigrationControl>,
    pub check_declaration: CheckDeclaration,
    /// Told after every write of the MSR.
    pub on_readiness: Arc<dyn Fn() + Send + Sync>,
    /// When the firmware withdraws readiness, counted from the machine's making.
    pub withdraw_at: Option<Instant>,
}

pub(super) struct VcpuPorts {
    devices: Devices,
    /// When the last tick that was told happened.
    told: Instant,
}

const TICK: Duration = Duration::from_millis(1000 / w::TICKS_PER_SECOND);
/// Ticks that are told at once at most; a guest that was starved does not get the rest.
const TICKS_MAX: u32 = 100;

impl VcpuPorts {
    pub fn new(devices: Devices) -> Self {
        Self { devices, told: Instant::now() }
    }

    /// The vCPU runs again after a hold: time did not pass for it.
    pub fn resumed(&mut self) {
        self.told = Instant::now();
    }

    pub fn tell_end(&self, how: MachineEnd) {
        (self.devices.on_end)(how);
    }

    /// A port write; tells when the guest switched itself off. Unknown ports swallow writes, as on a PC.
    pub fn write(&self, port: u16, value: u32) -> Option<MachineEnd> {
        match port {
            w::PORT_CONSOLE => {
                // The guest's number: bounded before anything is read.
                let len = (value as usize).min(w::CONSOLE_BYTES);
                let mut line = vec![0; len];
                if self.devices.ram.read(self.in_shared(w::CONSOLE_AT), &mut line).is_ok() {
                    self.devices.console.append(&line);
                }
                None
            }
            w::PORT_POWER_OFF => Some(MachineEnd::PowerOff),
            _ => None,
        }
    }

    /// A write of an MSR that leaves to us.
    pub fn write_msr(&self, msr: u32, value: u64) {
        if msr != w::MSR_KVM_MIGRATION_CONTROL {
            return;
        }
        if value & 1 == 0 {
            self.devices.control.withdraw();
        } else {
            self.devices.control.announce(|| self.declaration());
        }
        (self.devices.on_readiness)();
    }

    /// What the firmware left in the shared pages: copied once, then checked.
    fn declaration(&self) -> Result<Option<Declaration>, Vec<Refusal>> {
        let mut raw = vec![0; PAGE_SIZE as usize];
        if self.devices.ram.read(self.in_shared(w::DECLARATION_AT), &mut raw).is_err() {
            return Ok(None);
        }
        let mut words = raw.chunks_exact(8).map(|c| {
            let mut b = [0; 8];
            b.copy_from_slice(c);
            u64::from_le_bytes(b)
        });
        let count = words.next().unwrap_or(0);
        if count == 0 {
            return Ok(None);
        }
        // As many as fit the page: a count that asks for more is refused below.
        let wanted = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(3);
        let words: Vec<u64> = words.take(wanted).collect();
        let declaration = Declaration::from_words(count, &words).map_err(|r| vec![r])?;
        let refusals = (self.devices.check_declaration)(&declaration);
        if refusals.is_empty() { Ok(Some(declaration)) } else { Err(refusals) }
    }

    /// What the firmware is to write next, or that it asks again.
    fn firmware(&self) -> u32 {
        use crate::guest::ReadinessReason as R;
        let d = &self.devices;
        let reason = d.control.readiness().reason;
        if matches!(reason, R::NotEncrypted | R::NotYet) {
            return 1;
        }
        match d.withdraw_at.filter(|_| reason == R::Announced) {
            Some(at) => {
                if d.gate.sleep_until(at) {
                    return 0;
                }
            }
            None => d.gate.sleep_until_closing(),
        }
        w::FIRMWARE_AGAIN
    }

    fn tick(&mut self) -> u32 {
        if !self.devices.gate.sleep_until(self.told + TICK) {
            return 0;
        }
        let passed = self.told.elapsed().as_millis() / TICK.as_millis();
        let ticks = u32::try_from(passed).unwrap_or(u32::MAX).min(TICKS_MAX);
        self.told = if ticks == TICKS_MAX { Instant::now() } else { self.told + TICK * ticks };
        ticks
    }

    /// The request lies in shared memory: copied once, then checked.
    fn map_range(&self) -> u32 {
        let mut raw = [0; 24];
        if self.devices.ram.read(self.in_shared(w::MAP_RANGE_AT), &mut raw).is_err() {
            return u32::MAX;
        }
        let word = |i: usize| {
            let mut b = [0; 8];
            b.copy_from_slice(&raw[i * 8..i * 8 + 8]);
            u64::from_le_bytes(b)
        };
        u32::from(!self.report(Gpa::new(word(0)), word(1), word(2) != 0))
    }

    /// A report of page status; false when it is refused.
    fn report(&self, gpa: Gpa, pages: u64, private: bool) -> bool {
        let reported = self.devices.encryption.report(&self.devices.ram.layout(), gpa, pages, private);
        reported.inspect_err(|error| tracing::debug!(%error, "a page status report was refused")).is_ok()
    }

    fn in_shared(&self, offset: usize) -> RamAddr {
        RamAddr::new(self.devices.shared.get() + offset as u64)
    }
}

impl Ports for VcpuPorts {
    fn read(&mut self, port: u16) -> u32 {
        match port {
            w::PORT_TICK => self.tick(),
            w::PORT_MAP_RANGE => self.map_range(),
            w::PORT_FIRMWARE => self.firmware(),
            _ => u32::MAX,
        }
    }

    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        (msr == w::MSR_KVM_MIGRATION_CONTROL).then(|| u64::from(self.devices.control.readiness().ready))
    }

    fn takes_msr(&self, msr: u32, value: u64) -> bool {
        // Bit 0 is all that it has (KVM's x86 msr.rst).
        msr == w::MSR_KVM_MIGRATION_CONTROL && value & !1 == 0
    }

    fn hypercall(&mut self, nr: u64, args: &[u64; 6]) -> u64 {
        if nr != KVM_HC_MAP_GPA_RANGE {
            return KVM_ENOSYS.wrapping_neg();
        }
        // Bits 0 to 3 name the size of page that the guest has there; the count is of 4 KiB pages in any
        // case.
        let taken = self.report(Gpa::new(args[0]), args[1], args[2] & MAP_GPA_RANGE_ENCRYPTED != 0);
        if taken { 0 } else { KVM_EINVAL.wrapping_neg() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_space::{BlockSpec, GuestLayout};
    use crate::hypervisor::{Exit, HypervisorError, Kicker, UserEntry, Vcpu};
    use crate::memory::Backing;

    const GIB: u64 = 1 << 30;

    fn ports() -> VcpuPorts {
        let block = |name: &str, gpa| BlockSpec { name: name.into(), size_bytes: 4 << 20, gpa };
        let specs = [
            block("low", Some(Gpa::new(0))),
            block("high", Some(Gpa::new(5 * GIB))),
            block("unplugged", None),
        ];
        let layout = GuestLayout::assign(&specs).unwrap().with_helper(2 << 20, true).unwrap();
        VcpuPorts::new(Devices {
            ram: GuestRam::allocate(Arc::new(layout), Backing::Memfd).unwrap(),
            shared: RamAddr::new(0x2000),
            console: Arc::default(),
            encryption: Arc::default(),
            gate: Gate::new(1),
            on_end: Arc::new(|_| ()),
            control: Arc::new(MigrationControl::new(true)),
            check_declaration: Arc::new(|_| Vec::new()),
            on_readiness: Arc::new(|| ()),
            withdraw_at: None,
        })
    }

    /// A vCPU that comes back with hypercalls, as KVM_EXIT_HYPERCALL does; no KVM here passes the instruction
    /// on.
    struct Caller(Vec<(u64, [u64; 6])>, Vec<u64>);

    impl Vcpu for Caller {
        fn enter_user_mode(&mut self, _: &UserEntry) -> Result<(), HypervisorError> {
            unreachable!()
        }
        fn enter_supervisor_mode(&mut self, _: &UserEntry) -> Result<(), HypervisorError> {
            unreachable!()
        }
        fn run(&mut self, ports: &mut dyn Ports) -> Result<Exit, HypervisorError> {
            let (nr, args) = self.0.remove(0);
            self.1.push(ports.hypercall(nr, &args));
            Ok(Exit::Hypercall { nr })
        }
        fn settle(&mut self, _: &mut dyn Ports) -> Result<Option<Exit>, HypervisorError> {
            Ok(None)
        }
        fn save(&mut self) -> Result<Vec<u8>, HypervisorError> {
            unreachable!()
        }
        fn restore(&mut self, _: &[u8]) -> Result<(), HypervisorError> {
            unreachable!()
        }
        fn kicker(&self) -> Kicker {
            unreachable!()
        }
    }

    #[test]
    fn the_migration_control_msr_reads_as_what_the_guest_said_last_and_has_one_bit() {
        let mut ports = ports();
        let msr = w::MSR_KVM_MIGRATION_CONTROL;
        assert_eq!(ports.read_msr(msr), Some(0), "an encrypted guest starts with 0");
        for value in [1, 0, 1] {
            assert!(ports.takes_msr(msr, value));
            ports.write_msr(msr, value);
            assert_eq!(ports.read_msr(msr), Some(value));
        }
        for value in [2, 3, 1 << 63, u64::MAX] {
            assert!(!ports.takes_msr(msr, value), "{value:#x}");
        }
        for other in [msr - 1, msr + 1, 0x10, 0xc000_0080] {
            assert_eq!((ports.read_msr(other), ports.takes_msr(other, 1)), (None, false), "{other:#x}");
        }
    }

    #[test]
    fn a_guest_s_hypercalls_change_the_status_by_ram_addr() {
        let mut ports = ports();
        let map = |gpa: u64, pages: u64, attributes: u64| (12, [gpa, pages, attributes, 0, 0, 0]);
        let helper = ports.devices.ram.layout().helper().unwrap().gpa().unwrap().get();
        let calls = vec![
            map(5 * GIB + 0x1000, 3, 0),
            // 2 MiB pages, still counted in 4 KiB.
            map(0, 512, 1),
            map(0x1000, 2, 1 << 4),
            // Refused, each as a whole: a hole, past the end, the helper's, no pages, unaligned, past 2^64.
            map(GIB, 1, 0),
            map(5 * GIB, 1025, 0),
            map(helper, 1, 0),
            map(0, 0, 0),
            map(0x10, 1, 0),
            map(u64::MAX - 0xfff, 2, 0),
            map(0, u64::MAX, 0),
            (5, [0; 6]),
        ];
        let mut vcpu = Caller(calls, Vec::new());
        while !vcpu.0.is_empty() {
            assert!(matches!(vcpu.run(&mut ports), Ok(Exit::Hypercall { .. })));
        }
        let (bad, unknown) = ((-22i64) as u64, (-1000i64) as u64);
        assert_eq!(vcpu.1, [0, 0, 0, bad, bad, bad, bad, bad, bad, bad, unknown]);
        let high = (4 << 20) / 4096;
        assert_eq!(ports.devices.encryption.shared().runs(), [(0, 1), (3, 509), (high + 1, 3)]);
    }
}
