//! One mapping of shared or anonymous memory, and copies in and out of it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::addr::{PAGE_1G, PAGE_2M, PAGE_SIZE};

/// Why memory could not be had or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero, not whole pages, or beyond this machine's address space.
    #[error("{bytes} bytes is no possible size")]
    Size {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The host has not that much memory to give.
    #[error("the host has {available} bytes of memory to give, {bytes} are needed")]
    NotEnough {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes there are (MemAvailable).
        available: u64,
    },
    /// A system call failed.
    #[error("{what} failed")]
    System {
        /// Which.
        what: &'static str,
        /// How.
        #[source]
        source: rustix::io::Errno,
    },
    /// Mapping failed.
    #[error("mapping {bytes} bytes failed")]
    Map {
        /// Bytes.
        bytes: u64,
        /// How.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}

/// Memory that this process has mapped, shared with whoever holds a clone of the `Arc`.
#[derive(Debug)]
pub struct Mapping {
    region: MmapRegion,
    memfd: Option<Arc<File>>,
    /// Where the software machine pretends that it lies in system-physical memory.
    physical: u64,
}

/// The next system-physical address that the software machine has not given away.
static PHYSICAL: AtomicU64 = AtomicU64::new(PAGE_1G);

/// A span of modelled system-physical addresses that nothing else in this process has.
fn give_physical(bytes: u64) -> u64 {
    PHYSICAL.fetch_add(bytes.next_multiple_of(PAGE_2M), Ordering::Relaxed)
}

impl Mapping {
    /// A new memfd of `bytes`, mapped. The content is zero. The file can neither shrink nor grow: a
    /// process that it is passed to cannot pull the memory away.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn memfd(name: &str, bytes: u64) -> Result<Arc<Self>, MemoryError> {
        let len = size(bytes)?;
        let system = |what| move |source| MemoryError::System { what, source };
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(system("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(system("ftruncate"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(system("fcntl(F_ADD_SEALS)"))?;
        let file = Arc::new(File::from(fd));
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), len)
            .map_err(|source| MemoryError::Map { bytes, source })?;
        Ok(Arc::new(Self { region, memfd: Some(file), physical: give_physical(bytes) }))
    }

    /// Anonymous memory of `bytes`, on huge pages where the kernel gives them.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn anonymous(bytes: u64) -> Result<Arc<Self>, MemoryError> {
        let len = size(bytes)?;
        let region = MmapRegion::new(len).map_err(|source| MemoryError::Map { bytes, source })?;
        let mapping = Self { region, memfd: None, physical: give_physical(bytes) };
        mapping.advise_huge();
        Ok(Arc::new(mapping))
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> u64 {
        self.region.size() as u64
    }

    /// Whether the mapping is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.region.size() == 0
    }

    /// The file behind it, for processes that map it too.
    pub fn memfd_fd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_deref().map(AsFd::as_fd)
    }

    /// Where it is mapped in this process: for the kernel, never for dereferencing.
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// Where it starts in the system-physical memory that the model of SEV pretends to have: a page's place there is
    /// the tweak of its encryption. Unique in this process; says nothing of real memory.
    pub const fn modelled_physical(&self) -> u64 {
        self.physical
    }

    /// Copies `to.len()` bytes at `offset` out.
    ///
    /// # Panics
    /// When the span leaves the mapping: offsets are computed from checked layouts.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        self.slice(offset, to.len()).copy_to(to);
    }

    /// Copies `from` in at `offset`.
    ///
    /// # Panics
    /// As [`Mapping::read`].
    pub fn write(&self, offset: u64, from: &[u8]) {
        self.slice(offset, from.len()).copy_from(from);
    }

    /// Reads an aligned `u32`, with acquire ordering.
    pub fn load_u32(&self, offset: u64) -> u32 {
        self.slice(offset, 4).load(0, Ordering::Acquire).expect("cursors are aligned")
    }

    /// Writes an aligned `u32`, with release ordering.
    pub fn store_u32(&self, offset: u64, value: u32) {
        self.slice(offset, 4).store(value, 0, Ordering::Release).expect("cursors are aligned");
    }

    /// Gives `len` bytes at `offset` back to the host; they read as zero from then on.
    ///
    /// # Errors
    /// [`MemoryError::System`] for anonymous memory or a refusing kernel.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let refused = |source| MemoryError::System { what: "fallocate", source };
        let file = self.memfd.as_deref().ok_or(refused(rustix::io::Errno::BADF))?;
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, offset, len).map_err(refused)
    }

    fn slice(&self, offset: u64, len: usize) -> vm_memory::VolatileSlice<'_> {
        usize::try_from(offset)
            .ok()
            .and_then(|o| self.region.get_slice(o, len).ok())
            .unwrap_or_else(|| panic!("{len} bytes at {offset:#x} leave a mapping of {:#x}", self.len()))
    }

    #[expect(unsafe_code, reason = "UNSAFETY: madvise takes an address range")]
    fn advise_huge(&self) {
        let at = self.region.as_ptr().cast();
        // SAFETY: the range is this mapping, which we own; MADV_HUGEPAGE changes no content. A refusal only
        // costs speed.
        let _ = unsafe { rustix::mm::madvise(at, self.region.size(), rustix::mm::Advice::LinuxHugepage) };
    }
}

/// Bytes of memory that the host could give without swapping (`MemAvailable`), `None` when it does not say.
pub fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn size(bytes: u64) -> Result<usize, MemoryError> {
    let len = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
    if len == 0 || !bytes.is_multiple_of(PAGE_SIZE) || bytes >= 1 << 46 {
        return Err(MemoryError::Size { bytes });
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memfd_reads_back_what_was_written_and_starts_zero() {
        let m = Mapping::memfd("t", 3 * PAGE_SIZE).unwrap();
        let mut page = [1u8; 4096];
        m.read(PAGE_SIZE, &mut page);
        assert_eq!(page, [0; 4096]);
        m.write(2 * PAGE_SIZE - 2, &[7; 4]);
        m.read(2 * PAGE_SIZE - 2, &mut page[..4]);
        assert_eq!(page[..4], [7; 4]);
        assert!(rustix::fs::ftruncate(m.memfd_fd().unwrap(), 1).is_err(), "the size is sealed");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [0, 1, PAGE_SIZE + 1, 1 << 47] {
            assert!(matches!(Mapping::memfd("t", bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }
}
