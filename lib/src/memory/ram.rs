//! A guest's RAM: one mapping per block, addressed by `RamAddr`.

use std::sync::{Arc, RwLock};

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

/// What memory for a layout comes to: bytes of ordinary memory and of reserved huge pages.
fn needs(layout: &GuestLayout, backing: Backing) -> (u64, u64) {
    let mut needs = (0u64, 0u64);
    for block in layout.blocks() {
        let sum = if lies_on(block, backing) == Backing::Hugetlb { &mut needs.1 } else { &mut needs.0 };
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
        let (ordinary, huge) = needs(&layout, backing);
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
        Ok(Self { now, blocks: layout, mappings, _overhead: overhead })
    }

    /// The same on the first of `backings` that there is enough of; the error is the last one's.
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

    /// Whether [`GuestRam::allocate_first`] would find room now beside `more` bytes of ordinary memory;
    /// claims nothing.
    ///
    /// # Errors
    /// What is short.
    pub fn has_room(layout: &GuestLayout, backings: &[Backing], more: u64) -> Result<(), Shortage> {
        let budget = Budget::of_this_process();
        let mut found = Ok(());
        for backing in backings {
            let (ordinary, huge) = needs(layout, *backing);
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
