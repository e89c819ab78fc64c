//! How a change is asked for: the one form of every change that this host makes.
//!
//! Owns: the id of what is to be made, the generation that is expected, whether only the outcome is wanted.
//! Must not know: what is changed. A dry run takes the same way as the change, up to the point at which
//! something would be made or written: what one of them refuses, the other does.

use uuid::Uuid;

use super::{Expected, HostError, ResourceKind};

/// How a change is asked for. What it gives is what is then, or, of a dry run, what would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// The id of what is to be made; `None`: a new one. Of no meaning where nothing is made.
    pub id: Option<Uuid>,
    /// The generation that the resource must be at. Of no meaning where one is made.
    pub expected: Expected,
    /// Whether only the outcome is wanted: everything is checked, nothing is changed.
    pub dry_run: bool,
}

impl Ask {
    /// Does it, whatever the resource's generation is.
    pub const fn now() -> Self {
        Self { id: None, expected: Expected::any(), dry_run: false }
    }

    /// Only looks at what would come of it.
    pub const fn dry_run() -> Self {
        Self { id: None, expected: Expected::any(), dry_run: true }
    }

    /// The same, to make something under this id.
    #[must_use]
    pub fn with_id(self, id: Option<Uuid>) -> Self {
        Self { id, ..self }
    }

    /// The same, of a resource at the expected generation.
    #[must_use]
    pub fn at(self, expected: Expected) -> Self {
        Self { expected, ..self }
    }

    /// Holds a resource's `generation` against the expected one.
    ///
    /// # Errors
    /// [`HostError::GenerationMismatch`].
    pub fn check(&self, kind: ResourceKind, generation: u64) -> Result<(), HostError> {
        self.expected.check(kind, generation)
    }
}
