//! vCPU threads: run, be held, end.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ports::VcpuPorts;
use crate::guest::{MachineEnd, MachineError};
use crate::hypervisor::{Exit, HypervisorError, Kicker, Vcpu};
use crate::sync::{Locked, WaitLocked};
use crate::threads::{self, Role};

/// What the vCPUs of one machine are told.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug)]
struct GateState {
    want: Want,
    /// Threads that are held.
    held: u32,
    threads: u32,
    /// While the guest is throttled: vCPUs stand still until then.
    doze: Option<Instant>,
    ended: Option<MachineEnd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Hold,
    Quit,
}

impl Gate {
    pub fn new(threads: u32) -> Arc<Self> {
        let state = GateState { want: Want::Hold, held: 0, threads, doze: None, ended: None };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    pub fn open(&self) {
        self.set(Want::Run);
    }

    /// Holds every thread; returns when all are.
    pub fn close(&self, kick: &[Kicker]) {
        self.set(Want::Hold);
        kick.iter().for_each(Kicker::kick);
        let mut state = self.lock();
        while state.held < state.threads {
            state = self.changed.wait_locked(state);
        }
    }

    pub fn quit(&self, kick: &[Kicker]) {
        self.set(Want::Quit);
        kick.iter().for_each(Kicker::kick);
    }

    pub fn ended(&self) -> Option<MachineEnd> {
        self.lock().ended.clone()
    }

    /// Whether a thread should leave the vCPU.
    fn calls(&self) -> bool {
        self.lock().want != Want::Run
    }

    /// Sleeps until `deadline`; false when it was cut short because the gate closes.
    pub fn sleep_until(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        loop {
            if state.want != Want::Run {
                return false;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return true;
            }
            state = self.changed.wait_locked_for(state, left);
        }
    }

    /// Lets every vCPU stand still until then, from its next exit on; an earlier time than now lets them go.
    pub fn doze_until(&self, until: Instant) {
        self.lock().doze = Some(until);
        self.changed.notify_all();
    }

    /// Stands still as long as the vCPUs are to doze; cut short when the gate closes.
    fn doze(&self) {
        let mut state = self.lock();
        while let (Want::Run, Some(until)) = (state.want, state.doze) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_locked_for(state, left);
        }
    }

    /// Sleeps until the gate closes.
    pub fn sleep_until_closing(&self) {
        let mut state = self.lock();
        while state.want == Want::Run {
            state = self.changed.wait_locked(state);
        }
    }

    /// Whether the vCPUs run, or are about to.
    pub fn is_open(&self) -> bool {
        self.lock().want == Want::Run
    }

    /// Held until the gate opens; false when it is time to go.
    fn hold(&self) -> bool {
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        while state.want == Want::Hold || (state.ended.is_some() && state.want != Want::Quit) {
            state = self.changed.wait_locked(state);
        }
        state.held -= 1;
        state.want == Want::Run
    }

    /// Records that the guest ended; true for the first to say so. The other vCPUs are called out.
    fn end(&self, how: MachineEnd) -> bool {
        let mut state = self.lock();
        if state.want != Want::Quit {
            state.want = Want::Hold;
        }
        self.changed.notify_all();
        state.ended.replace(how).is_none()
    }

    fn set(&self, want: Want) {
        let mut state = self.lock();
        if state.ended.is_none() || want == Want::Quit {
            state.want = want;
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.locked()
    }
}

/// A vCPU and the thread that runs it. The vCPU can be reached while the thread is held.
pub(super) struct VcpuThread {
    pub vcpu: Arc<Mutex<Box<dyn Vcpu>>>,
    pub kicker: Kicker,
    pub handle: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread, held.
    pub fn spawn(
        name: String,
        vcpu: Box<dyn Vcpu>,
        gate: Arc<Gate>,
        ports: VcpuPorts,
    ) -> Result<Self, MachineError> {
        let kicker = vcpu.kicker();
        let vcpu = Arc::new(Mutex::new(vcpu));
        let theirs = Arc::clone(&vcpu);
        let body = move || {
            threads::begin(Role::Vcpu);
            run(&theirs, &gate, ports)
        };
        let handle = std::thread::Builder::new().name(name).spawn(body).map_err(MachineError::Thread)?;
        Ok(Self { vcpu, kicker, handle: Some(handle) })
    }
}

fn run(vcpu: &Mutex<Box<dyn Vcpu>>, gate: &Gate, mut ports: VcpuPorts) {
    while gate.hold() {
        let mut vcpu = vcpu.locked();
        ports.resumed();
        let mut ended = turn(vcpu.as_mut(), gate, &mut ports);
        // An access that is half done completes now, so that the registers are whole while held.
        while ended.is_none() {
            let exit = vcpu.settle(&mut ports);
            if matches!(exit, Ok(None)) {
                break;
            }
            ended = act(vcpu.as_mut(), exit.map(|e| e.unwrap_or(Exit::Interrupted)), &mut ports);
        }
        drop(vcpu);
        if let Some(how) = ended
            && gate.end(how.clone())
        {
            ports.tell_end(how);
        }
    }
}

/// Runs the vCPU until the gate calls or the guest ends.
fn turn(vcpu: &mut dyn Vcpu, gate: &Gate, ports: &mut VcpuPorts) -> Option<MachineEnd> {
    while !gate.calls() {
        gate.doze();
        let exit = vcpu.run(ports);
        if let Some(end) = act(vcpu, exit, ports) {
            return Some(end);
        }
    }
    None
}

/// Does what an exit asks for; tells when the guest ended with it.
fn act(vcpu: &dyn Vcpu, exit: Result<Exit, HypervisorError>, ports: &mut VcpuPorts) -> Option<MachineEnd> {
    let what = match &exit {
        Ok(Exit::PortWrite { port, value }) => return ports.write(*port, *value),
        Ok(Exit::MsrWrite { msr, value }) => {
            ports.write_msr(*msr, *value);
            return None;
        }
        Ok(
            Exit::PortRead { .. }
            | Exit::MsrRead { .. }
            | Exit::MsrRefused { .. }
            | Exit::Hypercall { .. }
            | Exit::Interrupted,
        ) => return None,
        Ok(Exit::Mmio { .. }) => "access to an address without memory",
        Ok(Exit::Halt) => "it halted",
        Ok(Exit::Shutdown) => "triple fault",
        Ok(Exit::Unexpected { what }) => *what,
        Err(error) => {
            tracing::error!(%error, "a vCPU cannot be run");
            "KVM_RUN failed"
        }
    };
    let last = vcpu.last_exit();
    // Its thread is named after it: which vCPU of which guest is in every line of the log.
    let thread = std::thread::current();
    tracing::warn!(thread = thread.name(), what, ?exit, ?last, "a vCPU has stopped");
    let rip = last.and_then(|l| l.stood).map(|s| s.rip);
    Some(MachineEnd::Crashed { what, rip })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]
mod tests {
    use std::sync::mpsc;

    use mirrorvm_workload as w;

    use super::super::ports::Devices;
    use super::*;
    use crate::addr::{Gpa, RamAddr};
    use crate::address_space::{BlockSpec, GuestLayout};
    use crate::guest::MigrationControl;
    use crate::hypervisor::{Ports, UserEntry};
    use crate::memory::{Backing, GuestRam};

    /// Leaves once, as it is told to, and then only when it is kicked.
    struct Leaves(Option<Result<Exit, HypervisorError>>);

    impl Vcpu for Leaves {
        fn enter_user_mode(&mut self, _: &UserEntry) -> Result<(), HypervisorError> {
            Ok(())
        }

        fn enter_supervisor_mode(&mut self, _: &UserEntry) -> Result<(), HypervisorError> {
            Ok(())
        }

        fn run(&mut self, _: &mut dyn Ports) -> Result<Exit, HypervisorError> {
            self.0.take().unwrap_or(Ok(Exit::Interrupted))
        }

        fn settle(&mut self, _: &mut dyn Ports) -> Result<Option<Exit>, HypervisorError> {
            Ok(None)
        }

        fn save(&mut self) -> Result<Vec<u8>, HypervisorError> {
            Ok(Vec::new())
        }

        fn restore(&mut self, _: &[u8]) -> Result<(), HypervisorError> {
            Ok(())
        }

        fn kicker(&self) -> Kicker {
            Kicker::of_nobody()
        }
    }

    /// How a guest ends whose vCPU leaves so: as its owner is told, and as whoever looks sees.
    fn end_after(exit: Result<Exit, HypervisorError>) -> MachineEnd {
        let block = BlockSpec { name: "ram0".into(), size_bytes: 1 << 20, gpa: Some(Gpa::new(0)) };
        let layout = Arc::new(GuestLayout::assign(&[block]).unwrap());
        let (gate, (tell, told)) = (Gate::new(1), mpsc::channel());
        let devices = Devices {
            ram: GuestRam::allocate(layout, Backing::Anonymous).unwrap(),
            shared: RamAddr::new(0),
            console: Arc::default(),
            encryption: Arc::default(),
            gate: Arc::clone(&gate),
            on_end: Arc::new(move |end| tell.send(end).unwrap()),
            control: Arc::new(MigrationControl::new(false)),
            check_declaration: Arc::new(|_| Vec::new()),
            on_readiness: Arc::new(|| {}),
            withdraw_at: None,
        };
        let vcpu = Box::new(Leaves(Some(exit)));
        let thread = VcpuThread::spawn("v".into(), vcpu, Arc::clone(&gate), VcpuPorts::new(devices)).unwrap();
        gate.open();
        let end = told.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(gate.ended(), Some(end.clone()));
        // It is over: nothing runs it any more.
        gate.open();
        assert!(!gate.is_open());
        gate.quit(&[]);
        thread.handle.unwrap().join().unwrap();
        assert!(told.try_recv().is_err(), "told once");
        end
    }

    #[test]
    fn every_end_of_a_workload_guest_has_its_reason() {
        let off = Exit::PortWrite { port: w::PORT_POWER_OFF, value: 0 };
        assert_eq!(end_after(Ok(off)), MachineEnd::PowerOff);
        let failed = HypervisorError::ApiVersion { version: 1 };
        for (exit, why) in [
            (Ok(Exit::Halt), "it halted"),
            (Ok(Exit::Shutdown), "triple fault"),
            (Ok(Exit::Mmio { gpa: 1 << 40, write: true }), "access to an address without memory"),
            (Ok(Exit::Unexpected { what: "KVM_EXIT_DEBUG" }), "KVM_EXIT_DEBUG"),
            (Err(failed), "KVM_RUN failed"),
        ] {
            let end = end_after(exit);
            assert_eq!(end, MachineEnd::Crashed { what: why, rip: None });
            assert_eq!(end.to_string(), format!("a vCPU stopped: {why}"));
        }
    }
}
