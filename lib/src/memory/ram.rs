//! A guest's RAM: one mapping per block, addressed by `RamAddr`.

use std::sync::{Arc, PoisonError, RwLock};

use super::mapping::available_bytes;
use super::{Backing, Mapping, MemoryError};
use crate::addr::{PAGE_2M, PAGE_SIZE, RamAddr, RamPage};
use crate::address_space::{BlockRole, GuestLayout, RamBlock};

/// The span is not RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {at} are not RAM")]
pub struct OutsideRam {
    /// First byte.
    pub at: RamAddr,
    /// Bytes.
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
}

/// Another layout than this RAM's: plugged parts may change, blocks may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the layout has other blocks")]
pub struct OtherBlocks;

impl GuestRam {
    /// Memory for every block of `layout`. Blocks that reserved huge pages cannot hold because of their size, the
    /// helper's for one, lie on a memfd then.
    ///
    /// # Errors
    /// [`MemoryError::NotEnough`] when the host has visibly less; otherwise what the system says.
    pub fn allocate(layout: Arc<GuestLayout>, backing: Backing) -> Result<Self, MemoryError> {
        let fits = |b: &RamBlock| backing != Backing::Hugetlb || b.size.is_multiple_of(PAGE_2M);
        // Reserved pages are not part of what is available to others.
        let bytes =
            layout.blocks().iter().filter(|b| backing != Backing::Hugetlb || !fits(b)).map(|b| b.size);
        let bytes = bytes.sum();
        if let Some(available) = available_bytes().filter(|a| *a < bytes) {
            return Err(MemoryError::NotEnough { bytes, available });
        }
        let make = |b: &RamBlock| match (backing, b.role) {
            // The image, stacks and tables lie apart in it.
            (Backing::Anonymous, BlockRole::Helper) => Mapping::anonymous_sparing(b.size, 0),
            _ => Mapping::new(&b.name, b.size, if fits(b) { backing } else { Backing::Memfd }),
        };
        let mappings = layout.blocks().iter().map(make).collect::<Result<_, _>>()?;
        Ok(Self { now: Arc::new(RwLock::new(Arc::clone(&layout))), blocks: layout, mappings })
    }

    /// The blocks, and what is plugged where now.
    pub fn layout(&self) -> Arc<GuestLayout> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
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
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = layout;
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
