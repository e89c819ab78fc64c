//! The programs that the software machine knows, by the bytes that a processor would execute.
//!
//! It does not interpret x86: it fetches what lies at the entry through the MMU, and when that is a program
//! that was built with this library, the same program runs natively. Anything else (a wrong key, a wrong
//! C-bit, moved ciphertext, a changed page) is what it would be on hardware: instructions that make no sense.

use std::sync::LazyLock;

use mirrorvm_abi::header::Header;
use mirrorvm_workload as w;
use serde::{Deserialize, Serialize};

use super::mmu::{Access, Fault, Mmu};
use crate::addr::{HelperVa, PAGE_SIZE};
use crate::hypervisor::UserEntry;

/// The images, as the build script made them.
static HELPER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mirrorvm-helper.bin"));
static WORKLOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mirrorvm-workload.bin"));

static HEADER: LazyLock<Header> =
    LazyLock::new(|| Header::parse(HELPER).expect("the build script makes a helper image"));

/// A program that the software machine can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Program {
    /// The migration helper of a mirror, at CPL 3.
    Helper,
    /// The workload of a guest, at CPL 3.
    Workload,
    /// The workload's firmware, at CPL 0.
    Firmware,
}

impl Program {
    /// The program that is entered at `rip` at this privilege, if its bytes are there.
    pub fn at(entry: &UserEntry, user: bool) -> Option<Self> {
        let firmware = w::IMAGE_VA + w::FIRMWARE_AT;
        // Helper and workload share a base, but the helper's entry lies behind its header.
        match (entry.rip, user) {
            (w::IMAGE_VA, true) => Some(Self::Workload),
            (rip, true) if rip == HEADER.entry => Some(Self::Helper),
            (rip, false) if rip == firmware => Some(Self::Firmware),
            _ => None,
        }
    }

    /// Whether this program is what the MMU shows, and whether it can start: its stack is there.
    pub fn verify(self, mmu: &Mmu<'_>, entry: &UserEntry) -> Result<bool, Fault> {
        match self {
            Self::Helper => {
                let text = (HEADER.text_end - HEADER.base) as usize;
                Ok(same(HELPER, HEADER.base, 0..text, |va, to| mmu.fetch(va, to))?
                    && same(HELPER, HEADER.base, text..HELPER.len(), |va, to| mmu.read(va, to))?
                    && stack(mmu, entry)?)
            }
            Self::Workload => Ok(same(WORKLOAD, w::IMAGE_VA, 0..WORKLOAD.len(), |va, to| mmu.fetch(va, to))?
                && stack(mmu, entry)?),
            Self::Firmware => {
                // One page of it is more than it has.
                let from = w::FIRMWARE_AT as usize;
                same(WORKLOAD, w::IMAGE_VA, from..from + PAGE_SIZE as usize, |va, to| mmu.fetch(va, to))
            }
        }
    }
}

/// Zeroes the helper's uninitialized data, as its first worker does before anything else. Natively that data
/// lies elsewhere; what counts is that it could be written.
pub(super) fn clear_helper_data(mmu: &Mmu<'_>) -> Result<(), Fault> {
    for va in (HEADER.data_end..HEADER.bss_end).step_by(PAGE_SIZE as usize) {
        mmu.write(HelperVa::new(va), &[0; PAGE_SIZE as usize])?;
    }
    Ok(())
}

/// Whether a part of an image is what `look` gives, page by page.
fn same(
    image: &[u8],
    base: u64,
    part: std::ops::Range<usize>,
    look: impl Fn(HelperVa, &mut [u8]) -> Result<(), Fault>,
) -> Result<bool, Fault> {
    let mut buffer = [0; PAGE_SIZE as usize];
    let start = base + part.start as u64;
    for (expected, at) in image[part].chunks(buffer.len()).zip((start..).step_by(buffer.len())) {
        let found = &mut buffer[..expected.len()];
        look(HelperVa::new(at), found)?;
        if found != expected {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The first push would land in writable memory.
fn stack(mmu: &Mmu<'_>, entry: &UserEntry) -> Result<bool, Fault> {
    let below = HelperVa::new(entry.rsp.wrapping_sub(8));
    mmu.probe(below, 8, Access::Write).map(|()| true)
}
