//! Getting a vCPU out of [`super::Vcpu::run`] from another thread, whatever runs it.

use std::fmt::Debug;
use std::sync::Arc;

/// How one kind of vCPU is kicked.
pub(super) trait Kick: Send + Sync + Debug {
    /// Makes the present or next run return. Harmless when the vCPU is gone or not running.
    fn kick(&self);
}

/// Kicks one vCPU; cheap to clone. Harmless when the vCPU is gone or not running.
#[derive(Clone, Debug)]
pub struct Kicker(Arc<dyn Kick>);

impl Kicker {
    pub(super) fn new(how: Arc<dyn Kick>) -> Self {
        Self(how)
    }

    /// Of a vCPU that a test made up and that comes back by itself.
    #[cfg(test)]
    pub fn of_nobody() -> Self {
        #[derive(Debug)]
        struct Nobody;
        impl Kick for Nobody {
            fn kick(&self) {}
        }
        Self::new(Arc::new(Nobody))
    }

    /// Makes the present or next [`super::Vcpu::run`] return [`super::Exit::Interrupted`]; once asked for,
    /// that stays until it has happened.
    pub fn kick(&self) {
        self.0.kick();
    }
}
