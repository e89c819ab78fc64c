//! A vCPU.

use std::sync::Arc;

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, kvm_regs, kvm_segment, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::RunKick;
use super::state::VcpuState;
use crate::hypervisor::{
    Exit, HypervisorError, Kicker, LAST_EXITS, LastExit, NoPorts, Ports, Stood, UserEntry, Vcpu,
};

pub(super) struct KvmVcpu {
    fd: VcpuFd,
    kicker: RunKick,
    /// The last exit completes at the next entry only.
    half_done: bool,
    /// How often it has left guest mode.
    exits: u64,
    /// The last of them and those before, the latest first.
    last: [Option<Exit>; LAST_EXITS + 1],
    /// The kernel's name for the last one, and what it added.
    reason: (&'static str, u64),
}

impl KvmVcpu {
    pub fn new(mut fd: VcpuFd) -> Self {
        let kicker = RunKick::new(fd.get_kvm_run());
        Self { fd, kicker, half_done: false, exits: 0, last: [None; LAST_EXITS + 1], reason: ("none", 0) }
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
/// The parts of the extended state that are saved: x87, SSE and AVX.
const XCR0: u64 = 7;
/// IOPL 3 so that CPL 3 reaches I/O ports, IF, and the bit that is always set.
const RFLAGS: u64 = 0x3202;

impl KvmVcpu {
    /// 64-bit mode at privilege level `cpl`.
    fn enter(&mut self, entry: &UserEntry, cpl: u8) -> Result<(), HypervisorError> {
        self.finish()?;
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

impl KvmVcpu {
    /// One entry and what it came back with.
    fn once(&mut self, ports: &mut dyn Ports) -> Result<Exit, HypervisorError> {
        let exit = match self.fd.run() {
            Ok(exit) => {
                self.reason = (name(&exit), 0);
                answer(exit, ports)
            }
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                Answered::left(Exit::Interrupted)
            }
            Err(e) => {
                (self.half_done, self.reason) = (false, ("KVM_RUN failed", e.errno().unsigned_abs().into()));
                return Err(HypervisorError::kernel("KVM_RUN")(e));
            }
        };
        self.half_done = exit.half_done;
        if exit.exit == Exit::Interrupted {
            return Ok(exit.exit);
        }
        self.reason.1 = exit.code.unwrap_or_else(|| self.sub_error());
        self.exits += 1;
        self.last.rotate_right(1);
        self.last[0] = Some(exit.exit);
        Ok(exit.exit)
    }

    /// Completes what is half done where nobody could act upon a further exit.
    fn finish(&mut self) -> Result<(), HypervisorError> {
        match self.settle(&mut NoPorts)? {
            None => Ok(()),
            Some(_) => Err(HypervisorError::Unsettled),
        }
    }

    /// Which kind of internal error the last exit was. The data that the kernel adds to it is left alone:
    /// with a failed emulation that is the guest's code.
    #[expect(unsafe_code, reason = "UNSAFETY: kvm_run is a union of what exits tell")]
    fn sub_error(&mut self) -> u64 {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return 0;
        }
        // SAFETY: the reason of the last exit says which field the kernel filled, and plain numbers have no
        // wrong value.
        u64::from(unsafe { run.__bindgen_anon_1.internal.suberror })
    }

    fn stood(&self) -> Option<Stood> {
        let regs = self.fd.get_regs().ok()?;
        let sregs = self.fd.get_sregs().ok()?;
        Some(Stood {
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags,
            cs: sregs.cs.selector,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
        })
    }
}

/// An exit that was answered.
struct Answered {
    exit: Exit,
    /// The kernel completes it at the next entry.
    half_done: bool,
    /// What the kernel adds to it; `None` when that is still to be looked up.
    code: Option<u64>,
}

impl Answered {
    /// One with nothing left to do.
    const fn left(exit: Exit) -> Self {
        Self { exit, half_done: false, code: Some(0) }
    }

    /// One that completes at the next entry.
    const fn pending(exit: Exit) -> Self {
        Self { exit, half_done: true, code: Some(0) }
    }
}

/// Gives the kernel what the guest waits for.
fn answer(exit: VcpuExit<'_>, ports: &mut dyn Ports) -> Answered {
    let unexpected = |what| Answered::left(Exit::Unexpected { what });
    match exit {
        VcpuExit::IoOut(port, data) => Answered::pending(Exit::PortWrite { port, value: number(data) }),
        VcpuExit::IoIn(port, data) => {
            let value = ports.read(port).to_le_bytes();
            for (to, from) in data.iter_mut().zip(value) {
                *to = from;
            }
            Answered::pending(Exit::PortRead { port })
        }
        VcpuExit::MmioRead(gpa, data) => {
            data.fill(0xff);
            Answered::pending(Exit::Mmio { gpa, write: false })
        }
        VcpuExit::MmioWrite(gpa, _) => Answered::pending(Exit::Mmio { gpa, write: true }),
        VcpuExit::X86Rdmsr(exit) => {
            let msr = exit.index;
            let value = ports.read_msr(msr);
            (*exit.data, *exit.error) = (value.unwrap_or(0), u8::from(value.is_none()));
            Answered::pending(value.map_or(Exit::MsrRefused { msr }, |_| Exit::MsrRead { msr }))
        }
        VcpuExit::X86Wrmsr(exit) => {
            let (msr, value) = (exit.index, exit.data);
            let taken = ports.takes_msr(msr, value);
            *exit.error = u8::from(!taken);
            Answered::pending(if taken { Exit::MsrWrite { msr, value } } else { Exit::MsrRefused { msr } })
        }
        VcpuExit::Hypercall(exit) => {
            *exit.ret = ports.hypercall(exit.nr, &exit.args);
            Answered::pending(Exit::Hypercall { nr: exit.nr })
        }
        VcpuExit::Hlt => Answered::left(Exit::Halt),
        VcpuExit::Shutdown => Answered::left(Exit::Shutdown),
        VcpuExit::Intr => Answered::left(Exit::Interrupted),
        VcpuExit::FailEntry(reason, _) => {
            Answered { code: Some(reason), ..unexpected("KVM_EXIT_FAIL_ENTRY") }
        }
        VcpuExit::InternalError => Answered { code: None, ..unexpected("KVM_EXIT_INTERNAL_ERROR") },
        VcpuExit::Exception => unexpected("KVM_EXIT_EXCEPTION"),
        _ => unexpected("an exit that was not asked for"),
    }
}

/// The kernel's name for an exit, as far as it is one that is asked for.
const fn name(exit: &VcpuExit<'_>) -> &'static str {
    match exit {
        VcpuExit::IoOut(..) | VcpuExit::IoIn(..) => "KVM_EXIT_IO",
        VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => "KVM_EXIT_MMIO",
        VcpuExit::X86Rdmsr(_) => "KVM_EXIT_X86_RDMSR",
        VcpuExit::X86Wrmsr(_) => "KVM_EXIT_X86_WRMSR",
        VcpuExit::Hypercall(_) => "KVM_EXIT_HYPERCALL",
        VcpuExit::Hlt => "KVM_EXIT_HLT",
        VcpuExit::Shutdown => "KVM_EXIT_SHUTDOWN",
        VcpuExit::Intr => "KVM_EXIT_INTR",
        VcpuExit::FailEntry(..) => "KVM_EXIT_FAIL_ENTRY",
        VcpuExit::InternalError => "KVM_EXIT_INTERNAL_ERROR",
        VcpuExit::Exception => "KVM_EXIT_EXCEPTION",
        _ => "an exit that was not asked for",
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
        let exit = self.once(ports);
        self.kicker.release();
        if matches!(exit, Ok(Exit::Interrupted)) {
            self.kicker.clear();
        }
        exit
    }

    fn settle(&mut self, ports: &mut dyn Ports) -> Result<Option<Exit>, HypervisorError> {
        if !self.half_done {
            return Ok(None);
        }
        // api.rst, 5: I/O, MMIO and similar exits are complete only when KVM_RUN was entered again; with
        // immediate_exit it does that and nothing else.
        self.kicker.set();
        let exit = self.once(ports);
        self.kicker.clear();
        Ok(Some(exit?).filter(|exit| *exit != Exit::Interrupted))
    }

    fn save(&mut self) -> Result<Vec<u8>, HypervisorError> {
        self.finish()?;
        let state = VcpuState::read(&self.fd)?;
        Ok(serde_json::to_vec(&state).expect("plain numbers serialize"))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), HypervisorError> {
        let state: VcpuState =
            serde_json::from_slice(state).map_err(|source| HypervisorError::BadState { source })?;
        // What completes later would write its result over the registers that are set now.
        self.finish()?;
        state.write(&self.fd)
    }

    fn last_exit(&self) -> Option<LastExit> {
        let (reason, code) = self.reason;
        let mut before = [None; LAST_EXITS];
        before.copy_from_slice(&self.last[1..]);
        (self.exits > 0).then(|| LastExit { reason, code, exits: self.exits, before, stood: self.stood() })
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
