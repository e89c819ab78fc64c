//! Getting a vCPU thread out of KVM_RUN from another thread.
#![expect(
    unsafe_code,
    reason = "UNSAFETY: immediate_exit is a byte of shared kernel memory; tgkill, signal handler"
)]

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once};

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::hypervisor::HypervisorError;
use crate::hypervisor::kick::Kick;
use crate::sync::Locked;

/// The immediate_exit flag of one vCPU and the thread that runs it; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct RunKick(Arc<Mutex<Target>>);

#[derive(Debug, Default)]
struct Target {
    /// Address of `kvm_run.immediate_exit`, `None` once the vCPU is gone.
    immediate_exit: Option<usize>,
    /// The thread that runs the vCPU.
    thread: Option<i32>,
}

impl Kick for RunKick {
    /// Once set, immediate_exit stays until [`RunKick::clear`].
    fn kick(&self) {
        let target = self.target();
        if let Some(at) = target.immediate_exit {
            flag(at).store(1, Ordering::SeqCst);
            if let Some(thread) = target.thread {
                // SAFETY: tgkill has no memory effects here; our handler is installed and does nothing. The
                // thread entry is cleared by its own thread under this lock before it ends, so the id is not
                // another thread's.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
            }
        }
    }
}

impl RunKick {
    pub(super) fn new(run: &mut kvm_run) -> Self {
        let at = &raw mut run.immediate_exit as usize;
        Self(Arc::new(Mutex::new(Target { immediate_exit: Some(at), thread: None })))
    }

    /// Called by the vCPU's thread when it starts to run the vCPU.
    pub(super) fn adopt(&self) {
        self.target().thread = Some(rustix::thread::gettid().as_raw_nonzero().get());
    }

    /// Called by the vCPU's thread when it has seen the kick.
    pub(super) fn clear(&self) {
        if let Some(at) = self.target().immediate_exit {
            flag(at).store(0, Ordering::SeqCst);
        }
    }

    pub(super) fn set(&self) {
        if let Some(at) = self.target().immediate_exit {
            flag(at).store(1, Ordering::SeqCst);
        }
    }

    /// Called by the vCPU's thread when it stops running the vCPU for now.
    pub(super) fn release(&self) {
        self.target().thread = None;
    }

    /// Called when the vCPU goes.
    pub(super) fn retire(&self) {
        *self.target() = Target::default();
    }

    fn target(&self) -> std::sync::MutexGuard<'_, Target> {
        self.0.locked()
    }
}

fn flag<'a>(at: usize) -> &'a AtomicU8 {
    // SAFETY: the address is of a byte in the mapped kvm_run of a vCPU that lives: `retire` takes it away
    // under the lock before the mapping goes. The kernel reads the byte racily by design (api.rst,
    // immediate_exit).
    unsafe { &*(at as *const AtomicU8) }
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler that makes the signal interrupt KVM_RUN instead of killing the process.
pub(super) fn install_handler() -> Result<(), HypervisorError> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), nothing).map_err(|e| HypervisorError::Kernel {
            call: "sigaction",
            source: std::io::Error::from_raw_os_error(e.errno()),
        });
    });
    result
}
