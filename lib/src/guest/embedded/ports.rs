//! The workload's I/O ports: ticks, console, page status, power.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm_workload as w;

use super::vcpu::Gate;
use crate::addr::{Gpa, RamAddr};
use crate::guest::{Console, EncryptionStatus, MachineEnd, OnEnd};
use crate::hypervisor::Ports;
use crate::memory::GuestRam;

/// What every vCPU's ports reach.
#[derive(Clone)]
pub(super) struct Devices {
    pub ram: GuestRam,
    pub shared: RamAddr,
    pub console: Arc<Console>,
    pub encryption: Arc<EncryptionStatus>,
    pub gate: Arc<Gate>,
    pub on_end: OnEnd,
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
        let (gpa, pages, private) = (Gpa::new(word(0)), word(1), word(2) != 0);
        match self.devices.encryption.report(self.devices.ram.layout(), gpa, pages, private) {
            Ok(()) => 0,
            Err(error) => {
                tracing::debug!(%error, "a page status report was refused");
                1
            }
        }
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
            _ => u32::MAX,
        }
    }
}
