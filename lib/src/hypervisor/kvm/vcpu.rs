//! A vCPU.

use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::RunKick;
use super::state::VcpuState;
use crate::hypervisor::{Exit, HypervisorError, Kicker, Ports, UserEntry, Vcpu};

pub(super) struct KvmVcpu {
    fd: VcpuFd,
    kicker: RunKick,
}

impl KvmVcpu {
    pub fn new(mut fd: VcpuFd) -> Self {
        let kicker = RunKick::new(fd.get_kvm_run());
        Self { fd, kicker }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kicker.retire();
    }
}

// Control register and EFER bits, AMD APM vol. 2, 3.1.
const CR0: u64 = 0x8005_0033; // PG AM WP NE ET MP PE
const CR4: u64 = 0x620 | 1 << 18; // OSXMMEXCPT OSFXSR PAE, OSXSAVE
const EFER: u64 = 0xd01; // NXE LMA LME SCE
/// Enough for the permission bits of every port used here, when the bitmap starts at offset 0.
const TSS_LIMIT: u32 = 0xfff;
/// x87, SSE, AVX.
const XCR0: u64 = 7;
/// IOPL 3 so that CPL 3 reaches I/O ports, IF, and the bit that is always set.
const RFLAGS: u64 = 0x3202;

impl KvmVcpu {
    /// 64-bit mode at privilege level `cpl`.
    fn enter(&mut self, entry: &UserEntry, cpl: u8) -> Result<(), HypervisorError> {
        let k = HypervisorError::kernel;
        let mut sregs = self.fd.get_sregs().map_err(k("KVM_GET_SREGS"))?;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x28 | u16::from(cpl),
            type_: 3,
            present: 1,
            dpl: cpl,
            db: 1,
            s: 1,
            l: 0,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment { selector: 0x30 | u16::from(cpl), type_: 11, l: 1, db: 0, ..data };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        (sregs.tr.base, sregs.tr.limit) = (entry.tss, TSS_LIMIT);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, entry.cr3, CR4, EFER);
        self.fd.set_sregs(&sregs).map_err(k("KVM_SET_SREGS"))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: XCR0 };
        self.fd.set_xcrs(&xcrs).map_err(k("KVM_SET_XCRS"))?;
        let regs =
            kvm_regs { rip: entry.rip, rsp: entry.rsp, rdi: entry.rdi, rflags: RFLAGS, ..Default::default() };
        self.fd.set_regs(&regs).map_err(k("KVM_SET_REGS"))
    }
}

impl Vcpu for KvmVcpu {
    fn enter_user_mode(&mut self, entry: &UserEntry) -> Result<(), HypervisorError> {
        self.enter(entry, 3)
    }

    fn enter_supervisor_mode(&mut self, entry: &UserEntry) -> Result<(), HypervisorError> {
        self.enter(entry, 0)
    }

    fn run(&mut self, ports: &mut dyn Ports) -> Result<Exit, HypervisorError> {
        self.kicker.adopt();
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => Ok(Exit::PortWrite { port, value: number(data) }),
            Ok(VcpuExit::IoIn(port, data)) => {
                let value = ports.read(port).to_le_bytes();
                for (to, from) in data.iter_mut().zip(value) {
                    *to = from;
                }
                Ok(Exit::PortRead { port })
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                data.fill(0xff);
                Ok(Exit::Mmio { gpa, write: false })
            }
            Ok(VcpuExit::MmioWrite(gpa, _)) => Ok(Exit::Mmio { gpa, write: true }),
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                *exit.error = 0;
                Ok(Exit::MsrWrite { msr: exit.index, value: exit.data })
            }
            Ok(VcpuExit::Hypercall(exit)) => {
                *exit.ret = ports.hypercall(exit.nr, &exit.args);
                Ok(Exit::Hypercall { nr: exit.nr })
            }
            Ok(VcpuExit::Hlt) => Ok(Exit::Halt),
            Ok(VcpuExit::Shutdown) => Ok(Exit::Shutdown),
            Ok(VcpuExit::Intr) => Ok(Exit::Interrupted),
            Ok(VcpuExit::FailEntry(..)) => Ok(Exit::Unexpected { what: "KVM_EXIT_FAIL_ENTRY" }),
            Ok(VcpuExit::InternalError) => Ok(Exit::Unexpected { what: "KVM_EXIT_INTERNAL_ERROR" }),
            Ok(VcpuExit::Exception) => Ok(Exit::Unexpected { what: "KVM_EXIT_EXCEPTION" }),
            Ok(_) => Ok(Exit::Unexpected { what: "an exit that was not asked for" }),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Ok(Exit::Interrupted),
            Err(e) => Err(HypervisorError::kernel("KVM_RUN")(e)),
        };
        self.kicker.release();
        if matches!(exit, Ok(Exit::Interrupted)) {
            self.kicker.clear();
        }
        exit
    }

    fn settle(&mut self) -> Result<(), HypervisorError> {
        // api.rst, 5: I/O, MMIO and similar exits are complete only when KVM_RUN was entered again; with
        // immediate_exit it does that and nothing else.
        self.kicker.set();
        let result = match self.fd.run() {
            Err(e) if e.errno() == libc::EINTR => Ok(()),
            Err(e) => Err(HypervisorError::kernel("KVM_RUN")(e)),
            Ok(_) => Ok(()),
        };
        self.kicker.clear();
        result
    }

    fn save(&mut self) -> Result<Vec<u8>, HypervisorError> {
        let state = VcpuState::read(&self.fd)?;
        Ok(serde_json::to_vec(&state).expect("plain numbers serialize"))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), HypervisorError> {
        let state: VcpuState =
            serde_json::from_slice(state).map_err(|source| HypervisorError::BadState { source })?;
        state.write(&self.fd)
    }

    fn kicker(&self) -> Kicker {
        Kicker::new(Arc::new(self.kicker.clone()))
    }
}

fn number(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}
