//! An independent reader of page tables: what a processor would do with them, written from the
//! architecture (AMD APM vol. 2, 5.3.3 to 5.3.5) and sharing no code with the builder, so that one can
//! check the other.

use crate::addr::{HelperVa, MirrorGpa};

use super::page_tables::Access;

/// A translation that a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Where the byte lies.
    pub gpa: MirrorGpa,
    /// What user mode may do there.
    pub access: Access,
    /// Whether the C-bit was set in the last entry.
    pub encrypted: bool,
    /// Bytes in the page that maps it.
    pub page_bytes: u64,
}

/// Why a walk found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// Bits 63:47 are not all equal, or the address is in the upper half, which a helper never uses.
    #[error("{0} is not in the lower canonical half")]
    NotCanonical(HelperVa),
    /// A table lies where there is no memory.
    #[error("no table at {0}")]
    NoTable(MirrorGpa),
    /// An entry is not present.
    #[error("{0} is not mapped")]
    NotPresent(HelperVa),
    /// User mode may not use the page.
    #[error("{0} is not for user mode")]
    Supervisor(HelperVa),
    /// The page is writable and executable.
    #[error("{0} is writable and executable")]
    WriteExecute(HelperVa),
    /// Reserved bits are set.
    #[error("entry {entry:#x} for {va} has reserved bits set")]
    Reserved {
        /// The address that was walked.
        va: HelperVa,
        /// The table entry at fault.
        entry: u64,
    },
}

/// Translates `va` by the tables at `root`; `read` gives the eight bytes at a mirror-physical address.
///
/// # Errors
/// [`WalkError`] says at what the walk ended.
pub fn walk(
    va: HelperVa,
    root: MirrorGpa,
    c_bit: u64,
    phys_limit: u64,
    read: impl Fn(MirrorGpa) -> Option<u64>,
) -> Result<Translation, WalkError> {
    let v = va.get();
    if v >> 47 != 0 {
        return Err(WalkError::NotCanonical(va));
    }
    let mut table = root.get();
    let (mut writable, mut executable) = (true, true);
    let mut shift = 39;
    loop {
        let at = MirrorGpa::new(table + ((v >> shift) & 0x1ff) * 8);
        let entry = read(at).ok_or(WalkError::NoTable(at))?;
        if entry & 1 == 0 {
            return Err(WalkError::NotPresent(va));
        }
        if entry & 4 == 0 {
            return Err(WalkError::Supervisor(va));
        }
        writable &= entry & 2 != 0;
        executable &= entry >> 63 == 0;
        let address = entry & 0x000f_ffff_ffff_f000 & !c_bit;
        let large = entry & 0x80 != 0;
        if address >= phys_limit || (large && shift == 39) {
            return Err(WalkError::Reserved { va, entry });
        }
        if shift == 12 || large {
            let page_bytes = 1u64 << shift;
            if address & (page_bytes - 1) != 0 {
                return Err(WalkError::Reserved { va, entry });
            }
            let access = match (writable, executable) {
                (true, true) => return Err(WalkError::WriteExecute(va)),
                (true, false) => Access::ReadWrite,
                (false, true) => Access::ReadExecute,
                (false, false) => Access::Read,
            };
            return Ok(Translation {
                gpa: MirrorGpa::new(address | (v & (page_bytes - 1))),
                access,
                encrypted: c_bit != 0 && entry & c_bit != 0,
                page_bytes,
            });
        }
        table = address;
        shift -= 9;
    }
}
