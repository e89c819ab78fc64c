//! A guest's RAM: one mapping per block, addressed by `RamAddr`.

use std::os::fd::OwnedFd;
use std::sync::{Arc, RwLock};

use super::foreign::{self, BadFile, ForeignRamError};
use super::{Backing, Budget, Claim, Mapping, MemoryError, Purpose, Shortage};
use crate::addr::{PAGE_2M, PAGE_SIZE, RamAddr, RamPage};
use crate::address_space::{BlockRole, GuestLayout, HelperPlacement, RamBlock};
use crate::sync::Shared;

/// The span is not RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {at} are not RAM")]
pub struct OutsideRam {
    /// RAM address of the first byte.
    pub at: RamAddr,
    /// Length in bytes.
    pub len: usize,
}

/// The memory of every block of a layout. Cheap to clone; the memory goes when the last clone does.
#[derive(Clone, Debug)]
pub struct GuestRam {
    /// Where blocks lie in `RamAddr`, and how large they are: never changes.
    blocks: Arc<GuestLayout>,
    /// The same with what is plugged where at the moment.
    now: Arc<RwLock<Arc<GuestLayout>>>,
    mappings: Arc<[Arc<Mapping>]>,
    /// Whether all of it was zero when it came.
    was_zero: bool,
    /// What the kernel needs to keep track of it: page tables, logs.
    _overhead: Arc<Claim>,
}

/// Of this many bytes of RAM the kernel takes one for page tables and logs: two views here, and those of
/// guest and mirror.
const OVERHEAD: u64 = 128;

/// What of a block may be touched. The helper's has room that it never comes to use.
fn of_use(layout: &GuestLayout, block: &RamBlock) -> u64 {
    match block.role {
        BlockRole::Helper => block.size.saturating_sub(HelperPlacement::unused(layout)),
        BlockRole::Ram | BlockRole::Vmsa => block.size,
    }
}

/// What memory for a layout comes to, of which each block lies on what `on` says: bytes of ordinary memory
/// and of reserved huge pages.
fn needs(layout: &GuestLayout, on: impl Fn(&RamBlock) -> Backing) -> (u64, u64) {
    let mut needs = (0u64, 0u64);
    for block in layout.blocks() {
        let sum = if on(block) == Backing::Hugetlb { &mut needs.1 } else { &mut needs.0 };
        *sum = sum.saturating_add(of_use(layout, block));
    }
    needs.0 = needs.0.saturating_add(needs.0.saturating_add(needs.1) / OVERHEAD);
    needs
}

/// Reserved huge pages are for the guest's own memory, where its size is theirs; the rest lies on a memfd
/// then. So a guest of 128 MiB needs 64 of them.
const fn lies_on(block: &RamBlock, backing: Backing) -> Backing {
    match (backing, block.role) {
        (Backing::Hugetlb, BlockRole::Ram) if block.size.is_multiple_of(PAGE_2M) => Backing::Hugetlb,
        (Backing::Hugetlb, BlockRole::Ram | BlockRole::Vmsa | BlockRole::Helper) => Backing::Memfd,
        (Backing::Anonymous | Backing::Memfd, _) => backing,
    }
}

/// Another layout than this RAM's: plugged parts may change, blocks may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the layout has other blocks")]
pub struct OtherBlocks;

impl GuestRam {
    /// Memory for every block of `layout`, claimed as a whole before any of it is mapped. With reserved huge
    /// pages only the guest's own memory lies on them, as far as it is of whole ones; the rest lies on a
    /// memfd.
    ///
    /// # Errors
    /// [`MemoryError::NotEnough`] when the host cannot give it; otherwise what the system says.
    pub fn allocate(layout: Arc<GuestLayout>, backing: Backing) -> Result<Self, MemoryError> {
        let budget = Budget::of_this_process();
        let (ordinary, huge) = needs(&layout, |b| lies_on(b, backing));
        let plain = if backing == Backing::Hugetlb { Backing::Memfd } else { backing };
        let overhead = budget.claim(ordinary, plain, Purpose::Guest)?;
        let reserved =
            (huge > 0).then(|| budget.claim(huge, Backing::Hugetlb, Purpose::Guest)).transpose()?;
        let make = |b: &RamBlock| {
            let on = lies_on(b, backing);
            let claim = match &reserved {
                Some(reserved) if on == Backing::Hugetlb => reserved.split(b.size),
                _ => overhead.split(of_use(&layout, b)),
            };
            match (on, b.role) {
                // The image, stacks and tables lie apart in it.
                (Backing::Anonymous, BlockRole::Helper) => Mapping::private(b.size, 0, claim),
                _ => Mapping::claimed(&b.name, b.size, on, claim),
            }
        };
        let mappings = layout.blocks().iter().map(make).collect::<Result<_, _>>()?;
        let (now, overhead) = (Arc::new(RwLock::new(Arc::clone(&layout))), Arc::new(overhead));
        Ok(Self { now, blocks: layout, mappings, was_zero: true, _overhead: overhead })
    }

    /// RAM on memory files that the caller brings: one for each of the guest's own blocks, in their order and
    /// of their sizes, which this process keeps from changing from now on. Blocks that are not the guest's
    /// own (the helper's, save areas) get a memfd of ours. What of the files has not been touched yet is
    /// claimed as any other guest's memory is.
    ///
    /// Whoever else has such a file may write into it, as the guest does, and must not punch holes into it
    /// while the guest is there: its memory would be gone.
    ///
    /// # Errors
    /// [`ForeignRamError`]; the files are closed then.
    pub fn from_fds(layout: Arc<GuestLayout>, files: Vec<OwnedFd>) -> Result<Self, ForeignRamError> {
        let (wanted, given) = (layout.ram().count(), files.len());
        if wanted != given {
            return Err(ForeignRamError::Count { wanted, given });
        }
        let mut fit: Vec<(RamAddr, foreign::Fit)> = Vec::new();
        for (block, fd) in layout.ram().zip(files) {
            let bad = |fault| ForeignRamError::File { block: block.name.clone(), fault };
            let one = foreign::fit(fd, block.size).map_err(bad)?;
            let same = layout.ram().zip(&fit).find(|(_, (_, other))| other.identity == one.identity);
            if let Some((other, _)) = same {
                return Err(bad(BadFile::Shared { other: other.name.clone() }));
            }
            fit.push((block.ram_addr, one));
        }
        let on = |b: &RamBlock| {
            let brought = fit.iter().find(|(at, _)| *at == b.ram_addr);
            brought.map_or(Backing::Memfd, |(_, fit)| fit.backing)
        };
        let budget = Budget::of_this_process();
        let claim = |bytes, on| budget.claim(bytes, on, Purpose::Guest).map_err(MemoryError::from);
        let (ordinary, huge) = needs(&layout, on);
        let overhead = claim(ordinary, Backing::Memfd)?;
        let reserved = (huge > 0).then(|| claim(huge, Backing::Hugetlb)).transpose()?;
        let mut fit = fit.into_iter();
        let make = |b: &RamBlock| match b.role {
            BlockRole::Ram => {
                let Some((_, foreign::Fit { file, backing, .. })) = fit.next() else {
                    return Err(MemoryError::Size { bytes: b.size });
                };
                let claim = match (backing, &reserved) {
                    (Backing::Hugetlb, Some(reserved)) => reserved.split(b.size),
                    (Backing::Hugetlb, None) | (Backing::Anonymous | Backing::Memfd, _) => {
                        overhead.split(of_use(&layout, b))
                    }
                };
                Mapping::of_file(file, b.size, backing, claim)
            }
            BlockRole::Helper | BlockRole::Vmsa => {
                Mapping::claimed(&b.name, b.size, Backing::Memfd, overhead.split(of_use(&layout, b)))
            }
        };
        let mappings = layout.blocks().iter().map(make).collect::<Result<_, _>>()?;
        let (now, overhead) = (Arc::new(RwLock::new(Arc::clone(&layout))), Arc::new(overhead));
        Ok(Self { now, blocks: layout, mappings, was_zero: false, _overhead: overhead })
    }

    /// Memory as [`GuestRam::allocate`] makes it on the first of `backings` that there is enough of; the
    /// error is the last one's.
    ///
    /// # Errors
    /// As [`GuestRam::allocate`].
    pub fn allocate_first(layout: &Arc<GuestLayout>, backings: &[Backing]) -> Result<Self, MemoryError> {
        let (last, before) = backings.split_last().map_or((Backing::Memfd, &[][..]), |(l, b)| (*l, b));
        for backing in before {
            match Self::allocate(Arc::clone(layout), *backing) {
                Err(MemoryError::NotEnough(why)) => tracing::debug!(%why, "other memory is taken"),
                made => return made,
            }
        }
        Self::allocate(Arc::clone(layout), last)
    }

    /// Bytes of memory that RAM for `layout` claims, whatever it lies on.
    pub fn claimed_bytes(layout: &GuestLayout) -> u64 {
        let (ordinary, huge) = needs(layout, |_| Backing::Memfd);
        ordinary.saturating_add(huge)
    }

    /// Whether [`GuestRam::allocate_first`] would find room now beside `more` bytes of ordinary memory;
    /// claims nothing.
    ///
    /// # Errors
    /// What is short.
    pub fn has_room(layout: &GuestLayout, backings: &[Backing], more: u64) -> Result<(), Shortage> {
        let budget = Budget::of_this_process();
        let mut found = Ok(());
        for backing in backings {
            let (ordinary, huge) = needs(layout, |b| lies_on(b, *backing));
            let room = |bytes, backing| budget.has_room(bytes, backing, Purpose::Guest);
            found = if huge > 0 { room(huge, Backing::Hugetlb) } else { Ok(()) };
            found = found.and_then(|()| room(ordinary.saturating_add(more), Backing::Memfd));
            if found.is_ok() {
                break;
            }
        }
        found
    }

    /// Takes what was reserved for it, so that no touch of it can fail; see [`Mapping::take_reserved`]. Takes
    /// a while for large guests.
    ///
    /// # Errors
    /// [`MemoryError::NotEnough`].
    pub fn take_reserved(&self) -> Result<(), MemoryError> {
        self.mappings.iter().try_for_each(|m| m.take_reserved())
    }

    /// The blocks, and what is plugged where now.
    pub fn layout(&self) -> Arc<GuestLayout> {
        Arc::clone(&self.now.to_read())
    }

    /// Notes that parts were plugged or unplugged; every clone sees it.
    ///
    /// # Errors
    /// [`OtherBlocks`] when more than that would change.
    pub fn replug(&self, layout: Arc<GuestLayout>) -> Result<(), OtherBlocks> {
        let same = |a: &RamBlock, b: &RamBlock| {
            (&a.name, a.ram_addr, a.size, a.role) == (&b.name, b.ram_addr, b.size, b.role)
        };
        let (old, new) = (self.blocks.blocks(), layout.blocks());
        if old.len() != new.len() || !old.iter().zip(new).all(|(a, b)| same(a, b)) {
            return Err(OtherBlocks);
        }
        *self.now.to_write() = layout;
        Ok(())
    }

    /// Whether every page was zero when it came: a page that nobody has written need not be zeroed. What
    /// others bring may hold anything.
    pub const fn was_zero(&self) -> bool {
        self.was_zero
    }

    /// What the blocks lie on, in the layout's order.
    pub fn backings(&self) -> Arc<[Backing]> {
        self.mappings.iter().map(|m| m.backing()).collect()
    }

    /// The mapping behind a block.
    pub fn mapping(&self, block: &RamBlock) -> Option<&Arc<Mapping>> {
        let index = self.blocks.blocks().iter().position(|b| b.ram_addr == block.ram_addr)?;
        self.mappings.get(index)
    }

    /// The mapping that holds `len` bytes at `at`, and the offset there.
    ///
    /// # Errors
    /// [`OutsideRam`] when the span is not inside one block.
    pub fn locate(&self, at: RamAddr, len: u64) -> Result<(&Arc<Mapping>, u64), OutsideRam> {
        let blocks = self.blocks.blocks();
        let after = blocks.partition_point(|b| b.ram_addr <= at);
        after
            .checked_sub(1)
            .and_then(|i| {
                let offset = at.offset_from(blocks[i].ram_addr)?;
                (offset.checked_add(len)? <= blocks[i].size).then_some((&self.mappings[i], offset))
            })
            .ok_or(OutsideRam { at, len: len as usize })
    }

    /// Copies bytes of RAM out.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn read(&self, at: RamAddr, to: &mut [u8]) -> Result<(), OutsideRam> {
        let (mapping, offset) = self.locate(at, to.len() as u64)?;
        mapping.read(offset, to);
        Ok(())
    }

    /// Copies bytes into RAM.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn write(&self, at: RamAddr, from: &[u8]) -> Result<(), OutsideRam> {
        let (mapping, offset) = self.locate(at, from.len() as u64)?;
        mapping.write(offset, from);
        Ok(())
    }

    /// Copies a page out.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn read_page(&self, page: RamPage, to: &mut [u8; 4096]) -> Result<(), OutsideRam> {
        self.read(page_addr(page), to)
    }

    /// Copies a page in.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn write_page(&self, page: RamPage, from: &[u8; 4096]) -> Result<(), OutsideRam> {
        self.write(page_addr(page), from)
    }
}

fn page_addr(page: RamPage) -> RamAddr {
    RamAddr::new(page.get().saturating_mul(PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;
    use crate::address_space::BlockSpec;

    const MIB: u64 = 1 << 20;

    fn layout() -> Arc<GuestLayout> {
        let block = |name: &str, gpa: u64| BlockSpec {
            name: name.into(),
            size_bytes: 2 * MIB,
            gpa: Some(crate::addr::Gpa::new(gpa)),
        };
        let bare = GuestLayout::assign(&[block("a", 0), block("b", 4 * MIB)]).unwrap();
        Arc::new(bare.with_helper(2 * MIB, true).unwrap())
    }

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("theirs", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        fd
    }

    fn refused(files: Vec<OwnedFd>) -> String {
        GuestRam::from_fds(layout(), files).unwrap_err().to_string()
    }

    #[test]
    fn ram_on_files_of_others_is_theirs_too_and_keeps_its_size() {
        let (a, b) = (memfd(2 * MIB), memfd(2 * MIB));
        let theirs = a.try_clone().unwrap();
        rustix::io::pwrite(&theirs, b"there before", 4096).unwrap();
        let ram = GuestRam::from_fds(layout(), vec![a, b]).unwrap();
        let mut twelve = [0; 12];
        ram.read(RamAddr::new(4096), &mut twelve).unwrap();
        assert_eq!(&twelve, b"there before");
        ram.write(RamAddr::new(0), b"ours").unwrap();
        let mut four = [0; 4];
        rustix::io::pread(&theirs, &mut four, 0).unwrap();
        assert_eq!(&four, b"ours");
        assert!(rustix::fs::ftruncate(theirs.as_fd(), MIB).is_err(), "it cannot shrink any more");
        let layout = ram.layout();
        let helper = ram.mapping(layout.helper().unwrap()).unwrap();
        assert_eq!((helper.len(), helper.backing()), (2 * MIB, Backing::Memfd));
    }

    #[test]
    fn files_that_cannot_be_ram_are_refused_by_block_and_reason() {
        assert_eq!(refused(vec![memfd(2 * MIB)]), "1 files are brought for 2 RAM blocks");
        let small = refused(vec![memfd(2 * MIB), memfd(MIB)]);
        assert!(
            small.starts_with("RAM block \"b\": the file has 1048576 bytes and the block 2097152"),
            "{small}"
        );
        let twice = memfd(2 * MIB);
        let twice = refused(vec![twice.try_clone().unwrap(), twice]);
        assert_eq!(twice, "RAM block \"b\": the file is also that of block \"a\"");
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(2 * MIB).unwrap();
        assert!(refused(vec![plain.into(), memfd(2 * MIB)]).contains("memfd_create"));
        let written = memfd(2 * MIB);
        rustix::fs::fcntl_add_seals(&written, SealFlags::WRITE).unwrap();
        assert!(refused(vec![written, memfd(2 * MIB)]).contains("F_SEAL_WRITE"));
        let open = rustix::fs::memfd_create("open", MemfdFlags::empty()).unwrap();
        rustix::fs::ftruncate(&open, 2 * MIB).unwrap();
        assert!(refused(vec![open, memfd(2 * MIB)]).contains("F_SEAL_SHRINK"));
    }
}
