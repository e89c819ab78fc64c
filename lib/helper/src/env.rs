//! What the helper needs from what it runs on.

use mirrorvm_abi::{PAGE_BYTES, evidence::RELEASE_BYTES, mailbox::Doorbell};

/// A part of the mailbox, from the start of the worker's own part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region(pub usize);

/// The machine under the helper. Offsets and page numbers that reach an implementation have been checked
/// against the configuration by the caller.
pub trait Env {
    /// Reads a cursor of this worker's control page, with acquire ordering.
    fn load(&self, at: Region) -> u32;
    /// Writes a cursor of this worker's control page, with release ordering.
    fn store(&mut self, at: Region, value: u32);
    /// As [`Cells::fence`](mirrorvm_abi::ring::Cells::fence).
    fn fence(&self) {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }
    /// Copies out of this worker's part of the mailbox.
    fn read_mailbox(&mut self, at: Region, to: &mut [u8]);
    /// Copies into this worker's part of the mailbox.
    fn write_mailbox(&mut self, at: Region, from: &[u8]);
    /// Copies a page of RAM out.
    fn read_page(&mut self, page: u64, to: &mut [u8; PAGE_BYTES]);
    /// Has the processor fetch a page of RAM that is read soon, while it works on another. Changes nothing,
    /// and does nothing where that gains nothing.
    fn prefetch_page(&self, page: u64) {
        let _ = page;
    }
    /// Overwrites a page of RAM.
    fn write_page(&mut self, page: u64, from: &[u8; PAGE_BYTES]);
    /// Fills `words` with random ones that the host does not know and that no memory held before, straight
    /// from the processor; false when it gives none within the tries that its maker asks for. Whether they
    /// look like random ones is looked at by the caller.
    fn random(&mut self, words: &mut [u64]) -> bool;
    /// The guest's migration secret, if it has been delivered.
    fn secret(&self) -> Option<[u8; 32]>;
    /// What lies behind the secret: what the guest's owner demands, as
    /// [`Release`](mirrorvm_abi::evidence::Release) encodes it. Zeroes where nothing was delivered, which is
    /// no such thing.
    fn release(&self) -> [u8; RELEASE_BYTES];
    /// Leaves to the host with a reason; returns when the host lets the helper go on.
    fn doorbell(&mut self, reason: Doorbell);
}
