//! Slowing a guest: its vCPUs are held for a share of their time.
//!
//! Owns: the clock thread that calls the vCPUs out. Must not know: why a guest is slowed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::vcpu::Gate;
use crate::guest::MachineError;
use crate::hypervisor::Kicker;
use crate::threads::{self, Role};

/// How long vCPUs run between two pauses. Short enough that a guest stays responsive at small shares, long
/// enough that kicks cost little.
const RUN: Duration = Duration::from_millis(10);

/// Most that makes sense: the guest still gets somewhere.
pub(super) const PERCENT_MAX: u8 = 99;

/// How long vCPUs are held after each [`RUN`], so that it is `percent` of their time.
fn pause_after_run(percent: u8) -> Duration {
    let percent = u32::from(percent.min(PERCENT_MAX));
    RUN * percent / (100 - percent)
}

/// Holds vCPUs until it is dropped.
pub(super) struct Throttle {
    quit: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Holds the vCPUs behind `gate` for `percent` (1 to [`PERCENT_MAX`]) of their time.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        name: &str,
        percent: u8,
        gate: Arc<Gate>,
        kickers: Vec<Kicker>,
    ) -> Result<Self, MachineError> {
        let quit = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&quit);
        let pause = pause_after_run(percent);
        let body = move || {
            threads::begin(Role::Vcpu);
            while !theirs.load(Ordering::Acquire) {
                std::thread::park_timeout(RUN);
                let until = Instant::now() + pause;
                gate.doze_until(until);
                kickers.iter().for_each(Kicker::kick);
                while !theirs.load(Ordering::Acquire) {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    std::thread::park_timeout(left);
                }
            }
            gate.doze_until(Instant::now());
        };
        let handle = std::thread::Builder::new()
            .name(format!("thr-{name}"))
            .spawn(body)
            .map_err(MachineError::Thread)?;
        Ok(Self { quit, handle: Some(handle) })
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Release);
        if let Some(handle) = self.handle.take() {
            handle.thread().unpark();
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_what_was_asked_for() {
        for percent in 1..=PERCENT_MAX {
            let (run, pause) = (RUN.as_secs_f64(), pause_after_run(percent).as_secs_f64());
            let share = pause / (run + pause) * 100.0;
            assert!((share - f64::from(percent)).abs() < 0.01, "{percent}: {share}");
        }
        assert_eq!(pause_after_run(100), pause_after_run(PERCENT_MAX), "never for ever");
    }
}
