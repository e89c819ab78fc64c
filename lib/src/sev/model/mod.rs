//! A model of SEV: memory that really is ciphertext, a firmware with the published state machine, and KVM's rules above
//! it. It protects nothing; it makes wrong bits visible.

mod engine;

pub use engine::MemoryKey;

use std::sync::Arc;

/// One VM's context in the model.
#[derive(Debug)]
pub struct ModelContext {
    _private: (),
}

impl ModelContext {
    /// The key that the memory controller uses for this VM's ASID; `None` while it is not activated.
    pub fn memory_key(&self) -> Option<Arc<MemoryKey>> {
        None
    }
}
