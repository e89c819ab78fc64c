//! One mapping of shared or anonymous memory, and copies in and out of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, MmapRegion, ReadVolatile, VolatileMemory, VolatileMemoryError, WriteVolatile,
};

use super::budget::{Budget, Claim, Purpose, Shortage, Touched};
use super::limits::{Bound, Tree};
use crate::addr::{PAGE_1G, PAGE_2M, PAGE_SIZE};
use crate::named::named;

/// Why memory could not be had or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero, not whole pages, or beyond this machine's address space.
    #[error("{bytes} bytes is no possible size")]
    Size {
        /// How many bytes were asked for.
        bytes: u64,
    },
    /// The host has not that much memory to give.
    #[error(transparent)]
    NotEnough(#[from] Shortage),
    /// A system call failed.
    #[error("{what} failed")]
    System {
        /// The operation that was tried.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: rustix::io::Errno,
    },
    /// The memory could not be mapped.
    #[error("mapping {bytes} bytes failed")]
    Map {
        /// How many bytes were to be mapped.
        bytes: u64,
        /// The system's reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}

named! {
    /// What lies behind memory.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum Backing {
        /// Anonymous memory of this process, on transparent huge pages where the kernel gives them. No other
        /// process can map it.
        Anonymous = "anonymous",
        /// A memfd; on transparent huge pages where the kernel gives them to shared memory, which few hosts
        /// do.
        Memfd = "memfd",
        /// A memfd on reserved 2 MiB pages (`vm.nr_hugepages`).
        Hugetlb = "hugetlb",
    }
}

impl Backing {
    /// Bytes of the largest pages that this host gives such memory, by what the kernel says of itself:
    /// whether a certain span got one is the kernel's decision at its first touch.
    pub fn page_size(self) -> u64 {
        let setting = |file: &str| {
            let text = std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{file}"));
            text.ok().and_then(|t| Some(t.split_once('[')?.1.split_once(']')?.0.to_owned()))
        };
        let huge = match self {
            Self::Hugetlb => true,
            Self::Anonymous => setting("enabled").is_some_and(|s| s != "never"),
            Self::Memfd => setting("shmem_enabled").is_some_and(|s| s != "never" && s != "deny"),
        };
        if huge { PAGE_2M } else { PAGE_SIZE }
    }
}

/// Which of a mapping's two views an access goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// The guest's. Post-copy would let accesses through it wait for a page.
    Guest,
    /// The helper's, which never waits. Of anonymous memory there is one view for both.
    Helper,
}

/// Memory that this process has mapped, shared with whoever holds a clone of the `Arc`.
#[derive(Debug)]
pub struct Mapping {
    /// Goes first: whoever looks what of it was touched finds the memory there.
    _claim: Claim,
    region: MmapRegion,
    /// The same file once more, for helpers.
    second: Option<MmapRegion>,
    /// Where the memory starts in `region`: on a boundary that huge pages can begin at.
    base: usize,
    len: usize,
    backing: Backing,
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
    /// New memory of `bytes`; its content is zero. It is claimed first: what this host cannot give is not
    /// mapped.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(name: &str, bytes: u64, backing: Backing) -> Result<Arc<Self>, MemoryError> {
        size(bytes)?;
        Self::claimed(name, bytes, backing, Budget::of_this_process().claim(bytes, backing, Purpose::Guest)?)
    }

    /// New memory under a claim that there is.
    pub(super) fn claimed(
        name: &str,
        bytes: u64,
        backing: Backing,
        claim: Claim,
    ) -> Result<Arc<Self>, MemoryError> {
        match backing {
            Backing::Anonymous => Self::private(bytes, bytes, claim),
            Backing::Memfd => Self::file(name, bytes, MemfdFlags::empty(), backing, claim),
            Backing::Hugetlb if !bytes.is_multiple_of(PAGE_2M) => Err(MemoryError::Size { bytes }),
            Backing::Hugetlb => {
                Self::file(name, bytes, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, backing, claim)
            }
        }
    }

    /// A new memfd of `bytes`, mapped. The content is zero. The file can neither shrink nor grow: a
    /// process that it is passed to cannot pull the memory away.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn memfd(name: &str, bytes: u64) -> Result<Arc<Self>, MemoryError> {
        Self::new(name, bytes, Backing::Memfd)
    }

    /// The same for a mirror that touches only `of_use` of them.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn memfd_sparing(name: &str, bytes: u64, of_use: u64) -> Result<Arc<Self>, MemoryError> {
        size(bytes)?;
        let claim = Budget::of_this_process().claim(of_use, Backing::Memfd, Purpose::Mirror)?;
        Self::claimed(name, bytes, Backing::Memfd, claim)
    }

    fn file(
        name: &str,
        bytes: u64,
        flags: MemfdFlags,
        backing: Backing,
        claim: Claim,
    ) -> Result<Arc<Self>, MemoryError> {
        size(bytes)?;
        let system = |what| move |source| MemoryError::System { what, source };
        let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags).map_err(system("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(system("ftruncate"))?;
        // Huge pages get one seal more, once everybody has them mapped.
        let last = if backing == Backing::Hugetlb { SealFlags::empty() } else { SealFlags::SEAL };
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | last)
            .map_err(system("fcntl(F_ADD_SEALS)"))?;
        Self::of_file(File::from(fd), bytes, backing, claim)
    }

    /// Maps a file of exactly `bytes` that can neither shrink nor grow.
    pub(super) fn of_file(
        file: File,
        bytes: u64,
        backing: Backing,
        claim: Claim,
    ) -> Result<Arc<Self>, MemoryError> {
        let len = size(bytes)?;
        let file = Arc::new(file);
        // The kernel reserves huge pages with the mapping, or refuses it; without, the first touch of one
        // that is not there would be a SIGBUS. Of small pages there is nothing to reserve: the claim stands
        // for them.
        let reserve = if backing == Backing::Hugetlb { 0 } else { libc::MAP_NORESERVE };
        let view = || {
            let whole = Some(FileOffset::from_arc(Arc::clone(&file), 0));
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | reserve);
            MmapRegion::build(whole, len, access, flags).map_err(|source| not_mapped(bytes, backing, source))
        };
        let (region, second) = (view()?, Some(view()?));
        claim.watch(Touched::File(Arc::clone(&file)));
        let (memfd, physical) = (Some(file), give_physical(bytes));
        let mapping = Self { _claim: claim, region, second, base: 0, len, backing, memfd, physical };
        mapping.keep_to_ourselves();
        if backing == Backing::Memfd {
            mapping.advise_huge();
        }
        Ok(Arc::new(mapping))
    }

    /// Anonymous memory of `bytes`, on huge pages where the kernel gives them.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn anonymous(bytes: u64) -> Result<Arc<Self>, MemoryError> {
        Self::new("", bytes, Backing::Anonymous)
    }

    /// A mirror's memory of `bytes` of which the first `dense` are used throughout and the rest here and
    /// there: huge pages that fit into `dense`, small pages behind them.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn anonymous_sparing(bytes: u64, dense: u64) -> Result<Arc<Self>, MemoryError> {
        size(bytes)?;
        let claim = Budget::of_this_process().claim(bytes, Backing::Anonymous, Purpose::Mirror)?;
        Self::private(bytes, dense, claim)
    }

    /// The same under a claim that there is.
    pub(super) fn private(bytes: u64, dense: u64, claim: Claim) -> Result<Arc<Self>, MemoryError> {
        let len = size(bytes)?;
        // A huge page begins at a multiple of its size in the host's, the guest's and the mirror's addresses
        // alike.
        let spare = if bytes < PAGE_2M { 0 } else { PAGE_2M as usize };
        let region =
            MmapRegion::new(len + spare).map_err(|source| not_mapped(bytes, Backing::Anonymous, source))?;
        let base = if spare == 0 { 0 } else { (region.as_ptr() as usize).wrapping_neg() % spare };
        claim.watch(Touched::Anonymous(region.as_ptr() as usize, len + spare));
        let (backing, physical) = (Backing::Anonymous, give_physical(bytes));
        let mapping = Self { _claim: claim, region, second: None, base, len, backing, memfd: None, physical };
        mapping.keep_to_ourselves();
        let huge = dense.min(bytes) / PAGE_2M * PAGE_2M;
        // Refusals cost speed or memory, nothing else.
        let _ = mapping.advise(0, huge, rustix::mm::Advice::LinuxHugepage);
        let _ = mapping.advise(huge, mapping.len() - huge, rustix::mm::Advice::LinuxNoHugepage);
        Ok(Arc::new(mapping))
    }

    /// Takes the huge pages that were reserved with the mapping. A reservation is the whole host's: without
    /// this a touch could still find none of them on the nodes, or within the control group, that this
    /// process is bound to, and that is a `SIGBUS`. Other memory comes when it is touched.
    ///
    /// # Errors
    /// [`MemoryError::NotEnough`] when the kernel does not give them.
    pub fn take_reserved(&self) -> Result<(), MemoryError> {
        let Some(file) = self.memfd.as_deref().filter(|_| self.backing == Backing::Hugetlb) else {
            return Ok(());
        };
        let none = rustix::fs::FallocateFlags::empty();
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, none, 0, self.len())) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::NOMEM | rustix::io::Errno::NOSPC) => Err(no_huge_pages(self.len()).into()),
            Err(source) => Err(MemoryError::System { what: "fallocate", source }),
        }
    }

    /// From now on nobody who has the file takes pages out of it, or maps it anew for writing: a guest that
    /// took over its QEMU could give reserved pages back, and this process's next touch would be a `SIGBUS`.
    /// Where pages come when they are touched there is nothing to keep, and nothing is done.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn keep_pages(&self) -> Result<(), MemoryError> {
        let Some(file) = self.memfd.as_deref().filter(|_| self.backing == Backing::Hugetlb) else {
            return Ok(());
        };
        rustix::fs::fcntl_add_seals(file, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
            .map_err(|source| MemoryError::System { what: "fcntl(F_ADD_SEALS)", source })
    }

    /// What it lies on.
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// Bytes of the mapping.
    pub const fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the mapping is empty; it never is.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file behind it, for processes that map it too.
    pub fn memfd_fd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_deref().map(AsFd::as_fd)
    }

    /// Where a view of it is mapped in this process: for the kernel, never for dereferencing.
    pub fn host_address(&self, view: View) -> u64 {
        self.region_of(view).as_ptr() as u64 + self.base as u64
    }

    /// Where it starts in the system-physical memory that the model of SEV pretends to have: a page's place
    /// there is the tweak of its encryption. Unique in this process; says nothing of real memory.
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

    /// Writes up to `len` bytes at `offset` into a socket or file, without a copy in between; gives how many
    /// it took.
    ///
    /// # Errors
    /// The system's, `WouldBlock` included.
    ///
    /// # Panics
    /// As [`Mapping::read`].
    pub fn write_to(&self, offset: u64, len: usize, fd: BorrowedFd<'_>) -> io::Result<usize> {
        volatile_result((&fd).write_volatile(&self.slice(offset, len)))
    }

    /// Reads up to `len` bytes from a socket or file to `offset`, without a copy in between; gives how many
    /// came.
    ///
    /// # Errors
    /// The system's, `WouldBlock` included.
    ///
    /// # Panics
    /// As [`Mapping::read`].
    pub fn read_from(&self, offset: u64, len: usize, fd: BorrowedFd<'_>) -> io::Result<usize> {
        volatile_result((&fd).read_volatile(&mut self.slice(offset, len)))
    }

    /// Reads an aligned `u32`, with acquire ordering.
    pub fn load_u32(&self, offset: u64) -> u32 {
        self.slice(offset, 4).load(0, Ordering::Acquire).expect("cursors are aligned")
    }

    /// Writes an aligned `u32`, with release ordering.
    pub fn store_u32(&self, offset: u64, value: u32) {
        self.slice(offset, 4).store(value, 0, Ordering::Release).expect("cursors are aligned");
    }

    /// Gives `len` bytes at `offset` back to the host; they read as zero from then on. On reserved huge pages
    /// they are zeroed and kept: a page that was given back is no longer reserved, and the next touch of it
    /// might find none.
    ///
    /// # Errors
    /// A refusing kernel.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let Some(file) = self.memfd.as_deref() else {
            let refused = |source| MemoryError::System { what: "madvise(MADV_DONTNEED)", source };
            return self.advise(offset, len, rustix::mm::Advice::LinuxDontNeed).map_err(refused);
        };
        if self.backing == Backing::Hugetlb {
            let zeros = vec![0; (len as usize).min(PAGE_2M as usize)];
            for at in (offset..offset + len).step_by(PAGE_2M as usize) {
                let piece = (offset + len - at).min(PAGE_2M) as usize;
                self.write(at, zeros.get(..piece).unwrap_or_default());
            }
            return Ok(());
        }
        let refused = |source| MemoryError::System { what: "fallocate", source };
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, offset, len).map_err(refused)
    }

    /// Makes the pages of a span present and writable in the helper's view, in one call instead of a fault a
    /// page. Their content stays. A refusal only costs speed.
    ///
    /// # Panics
    /// As [`Mapping::read`].
    pub fn populate(&self, offset: u64, len: u64) {
        if let Err(error) = self.advise(offset, len, rustix::mm::Advice::LinuxPopulateWrite) {
            tracing::debug!(%error, offset, len, "memory could not be populated");
        }
    }

    const fn region_of(&self, view: View) -> &MmapRegion {
        match (view, &self.second) {
            (View::Helper, Some(second)) => second,
            (View::Helper, None) | (View::Guest, _) => &self.region,
        }
    }

    fn slice(&self, offset: u64, len: usize) -> vm_memory::VolatileSlice<'_> {
        self.check(offset, len as u64);
        self.region.get_slice(self.base + offset as usize, len).expect("the span was checked")
    }

    fn check(&self, offset: u64, len: u64) {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len());
        assert!(inside, "{len} bytes at {offset:#x} leave a mapping of {:#x}", self.len());
    }

    #[expect(unsafe_code, reason = "UNSAFETY: madvise takes an address range")]
    fn advise(&self, offset: u64, len: u64, advice: rustix::mm::Advice) -> Result<(), rustix::io::Errno> {
        self.check(offset, len);
        let at = self.region_of(View::Helper).as_ptr().wrapping_add(self.base + offset as usize);
        // SAFETY: the range is inside this mapping, which we own and which nothing reads through references.
        // Populating changes no content; DONTNEED makes the span read as zero, which is what its caller asks
        // for.
        unsafe { rustix::mm::madvise(at.cast(), len as usize, advice) }
    }

    /// Leaves the memory out of a fork: between fork and exec a child has no use for it, and copying how it
    /// is mapped would hold up the guest that runs in it. And out of dumps, whoever makes one: a helper's
    /// memory has its guest's migration secret and the keys of its sessions.
    #[expect(unsafe_code, reason = "UNSAFETY: madvise takes an address range")]
    fn keep_to_ourselves(&self) {
        use rustix::mm::Advice::{LinuxDontDump, LinuxDontFork};
        for region in std::iter::once(&self.region).chain(&self.second) {
            for advice in [LinuxDontFork, LinuxDontDump] {
                // SAFETY: the range is a mapping that we own; only children, which run nothing but exec, and
                // dumps are affected. A refusal of the first costs speed; nobody who knows the second refuses
                // it.
                let _ = unsafe { rustix::mm::madvise(region.as_ptr().cast(), region.size(), advice) };
            }
        }
    }

    #[expect(unsafe_code, reason = "UNSAFETY: madvise takes an address range")]
    fn advise_huge(&self) {
        for region in std::iter::once(&self.region).chain(&self.second) {
            // SAFETY: the range is a mapping that we own; MADV_HUGEPAGE changes no content. A refusal only
            // costs speed.
            let _ = unsafe {
                rustix::mm::madvise(region.as_ptr().cast(), region.size(), rustix::mm::Advice::LinuxHugepage)
            };
        }
    }
}

fn volatile_result(result: Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    result.map_err(|e| match e {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    })
}

/// Reserved pages were there a moment ago and are not there now, or a bound that nobody tells of has been
/// met.
fn no_huge_pages(bytes: u64) -> Shortage {
    let available = Tree::host().rooms(Backing::Hugetlb).iter().map(|r| r.bytes).min().unwrap_or(0);
    Shortage { bytes, available: available.min(bytes.saturating_sub(1)), bound: Bound::HugePages }
}

/// Why the kernel did not map memory.
fn not_mapped(bytes: u64, backing: Backing, source: MmapRegionError) -> MemoryError {
    match (&source, backing) {
        (MmapRegionError::Mmap(error), _) if error.raw_os_error() != Some(libc::ENOMEM) => {
            MemoryError::Map { bytes, source }
        }
        (MmapRegionError::Mmap(_), Backing::Hugetlb) => no_huge_pages(bytes).into(),
        (MmapRegionError::Mmap(_), Backing::Anonymous | Backing::Memfd) => {
            let (available, bound) = (Tree::host().mappable(), Bound::AddressSpace);
            Shortage { bytes, available: available.min(bytes.saturating_sub(1)), bound }.into()
        }
        _ => MemoryError::Map { bytes, source },
    }
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
    fn anonymous_memory_starts_where_a_huge_page_can_and_can_be_given_back() {
        let m = Mapping::anonymous(3 * PAGE_2M).unwrap();
        assert_eq!(m.host_address(View::Guest) % PAGE_2M, 0);
        assert_eq!(m.host_address(View::Guest), m.host_address(View::Helper), "one view");
        m.populate(0, m.len());
        m.write(m.len() - 4, &[9; 4]);
        m.write(PAGE_2M - 2, &[8; 4]);
        m.discard(0, PAGE_2M).unwrap();
        let mut four = [1; 4];
        m.read(PAGE_2M - 2, &mut four);
        assert_eq!(four, [0, 0, 8, 8]);
        m.read(m.len() - 4, &mut four);
        assert_eq!(four, [9; 4]);
    }

    #[test]
    fn a_file_has_two_views_of_the_same_bytes() {
        let m = Mapping::memfd("t", 2 * PAGE_2M).unwrap();
        assert_ne!(m.host_address(View::Guest), m.host_address(View::Helper));
        m.populate(PAGE_SIZE, PAGE_SIZE);
        assert!(m.memfd_fd().is_some());
    }

    #[test]
    fn bytes_cross_a_socket_without_a_buffer() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let (from, to) = (Mapping::anonymous(PAGE_SIZE).unwrap(), Mapping::memfd("t", PAGE_SIZE).unwrap());
        from.write(10, b"sealed");
        assert_eq!(from.write_to(10, 6, a.as_fd()).unwrap(), 6);
        assert_eq!(to.read_from(100, 6, b.as_fd()).unwrap(), 6);
        let mut six = [0; 6];
        to.read(100, &mut six);
        assert_eq!(&six, b"sealed");
        b.set_nonblocking(true).unwrap();
        let empty = to.read_from(0, 6, b.as_fd()).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn huge_pages_that_are_not_there_are_refused_before_anything_is_touched() {
        // More than any machine has reserved.
        let bytes = 1 << 45;
        for _ in 0..2 {
            let refused = Mapping::new("t", bytes, Backing::Hugetlb).unwrap_err();
            let MemoryError::NotEnough(Shortage { bytes: asked, bound, .. }) = refused else {
                panic!("{refused:?}")
            };
            assert_eq!((asked, bound), (bytes, Bound::HugePages));
        }
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_whatever_it_would_lie_on() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let refused = Mapping::new("t", 1 << 45, backing).unwrap_err();
            assert!(matches!(refused, MemoryError::NotEnough(_)), "{refused:?}");
        }
    }

    #[test]
    fn a_child_between_fork_and_exec_has_no_guest_memory() {
        let m = Mapping::memfd("not in children", PAGE_2M).unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let at = format!("{:x}-", m.host_address(View::Guest));
        let mut lines = maps.lines().skip_while(|l| !l.starts_with(&at)).skip(1);
        let flags = lines.find(|l| l.starts_with("VmFlags:")).unwrap();
        assert!(flags.split(' ').any(|f| f == "dc"), "{flags}");
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [0, 1, PAGE_SIZE + 1, 1 << 47] {
            assert!(matches!(Mapping::memfd("t", bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }
}
