//! The generation that a caller expects a resource to be at, checked by whoever changes it, in the act.

use super::{HostError, ResourceKind};

/// What a resource's generation must be for a change to happen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected(Option<Vec<u64>>);

impl Expected {
    /// Whatever it is.
    pub const fn any() -> Self {
        Self(None)
    }

    /// One of these; of none, no generation will do.
    pub const fn one_of(generations: Vec<u64>) -> Self {
        Self(Some(generations))
    }

    /// Holds a resource's `generation` against it.
    ///
    /// # Errors
    /// [`HostError::GenerationMismatch`].
    pub fn check(&self, kind: ResourceKind, generation: u64) -> Result<(), HostError> {
        match &self.0 {
            Some(list) if !list.contains(&generation) => {
                Err(HostError::GenerationMismatch { kind, generation })
            }
            _ => Ok(()),
        }
    }
}
