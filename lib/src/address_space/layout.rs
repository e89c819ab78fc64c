//! A guest's RAM: its blocks, where they count in `RamAddr`, and where the guest sees them now.

use serde::{Deserialize, Serialize};

use crate::addr::{Gpa, PAGE_2M, PAGE_SIZE, PageRange, RamAddr, RangeError, align_up};

/// Most RAM blocks a guest may have. Plans are measured with 10,000; the API's bound on a body is lower.
pub const MAX_BLOCKS: usize = 32_768;
/// Largest guest: 64 TiB of `RamAddr`, which is also the size of the helper's RAM window.
pub const MAX_RAM_BYTES: u64 = 64 << 40;

/// What a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockRole {
    /// The guest's memory: migrated page by page.
    Ram,
    /// Save areas of the vCPUs of an SEV-ES guest (VMSAs), modelled: encrypted, moved like RAM, never
    /// plugged. Real kernels keep these pages to themselves.
    Vmsa,
    /// Home of the migration helper: its code, data, tables and keys. Never exported, never imported over.
    Helper,
}

/// A part of a block that has a guest physical address now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plug {
    /// First byte of the part, counted from the block's start.
    pub offset: u64,
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
}

/// A piece of guest RAM with its own backing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// Name, unique in the guest.
    pub name: String,
    /// Where the block starts in the guest's RAM.
    pub ram_addr: RamAddr,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
    /// What it is for.
    pub role: BlockRole,
    /// Plugged parts, by ascending offset; empty when the whole block is unplugged.
    pub plugs: Vec<Plug>,
}

impl RamBlock {
    /// The block's span in `RamAddr`.
    pub fn ram_range(&self) -> PageRange {
        PageRange::new(self.ram_addr.get(), self.size).expect("a layout holds checked blocks only")
    }

    /// The GPA of the block's first byte, when that is plugged.
    pub fn gpa(&self) -> Option<Gpa> {
        self.plugs.first().filter(|p| p.offset == 0).map(|p| p.gpa)
    }
}

/// What a caller asks for: a block before it has a `RamAddr`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSpec {
    /// Name, unique in the guest.
    pub name: String,
    /// Bytes, a multiple of 4 KiB.
    pub size_bytes: u64,
    /// Where the guest sees the whole block; `None` leaves it unplugged.
    pub gpa: Option<Gpa>,
}

/// What is wrong with a block; `index` counts in the caller's list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A guest needs at least one block.
    #[error("a guest needs at least one RAM block")]
    Empty,
    /// More blocks than `MAX_BLOCKS`.
    #[error("{count} RAM blocks are more than {MAX_BLOCKS}")]
    TooMany {
        /// How many blocks were given.
        count: usize,
    },
    /// The name is empty, too long or has characters outside `[A-Za-z0-9._-]`.
    #[error("block {index}: name {name:?} is not 1 to 64 characters of [A-Za-z0-9._-]")]
    Name {
        /// Index of the block.
        index: usize,
        /// The name that is not allowed.
        name: String,
    },
    /// Two blocks have one name, or both are the helper's.
    #[error("block {index}: name {name:?} is taken by an earlier block")]
    DuplicateName {
        /// Index of the later of the two blocks.
        index: usize,
        /// The name that both have.
        name: String,
    },
    /// Size or address is zero, unaligned or wraps.
    #[error("block {index}: {field}")]
    Range {
        /// Index of the block.
        index: usize,
        /// Which field: `size_bytes` or `gpa`.
        field: &'static str,
        /// What is wrong with its range.
        #[source]
        source: RangeError,
    },
    /// Total RAM above [`MAX_RAM_BYTES`].
    #[error("block {index}: RAM grows beyond {MAX_RAM_BYTES} bytes")]
    TooLarge {
        /// The block that crosses the limit.
        index: usize,
    },
    /// Two plugged blocks share guest physical addresses.
    #[error("block {index} overlaps block {other} at {gpa}")]
    Overlap {
        /// Index of one of the blocks.
        index: usize,
        /// Index of the other block.
        other: usize,
        /// First address that both have.
        gpa: Gpa,
    },
}

/// The blocks of a guest: unique names, ascending disjoint `RamAddr`s, disjoint GPAs. Checked when made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<RamBlock>", into = "Vec<RamBlock>")]
pub struct GuestLayout {
    blocks: Vec<RamBlock>,
    /// Block and plugged part, by ascending GPA.
    by_gpa: Vec<(u32, u32)>,
}

impl GuestLayout {
    /// Gives every block of `specs` its `RamAddr`, in order, each on a 2 MiB boundary so that large pages
    /// can map it.
    ///
    /// # Errors
    /// Every problem found, by block index.
    pub fn assign(specs: &[BlockSpec]) -> Result<Self, Vec<LayoutError>> {
        if specs.len() > MAX_BLOCKS {
            return Err(vec![LayoutError::TooMany { count: specs.len() }]);
        }
        let mut next = 0u64;
        let mut errors = Vec::new();
        let mut blocks = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let plugs =
                spec.gpa.map(|gpa| Plug { offset: 0, gpa, len: spec.size_bytes }).into_iter().collect();
            blocks.push(RamBlock {
                name: spec.name.clone(),
                ram_addr: RamAddr::new(next),
                size: spec.size_bytes,
                role: BlockRole::Ram,
                plugs,
            });
            let end = next.checked_add(spec.size_bytes).and_then(|e| align_up(e, PAGE_2M));
            match end.filter(|e| *e <= MAX_RAM_BYTES) {
                Some(end) => next = end,
                None => errors.push(LayoutError::TooLarge { index }),
            }
        }
        match Self::from_blocks(blocks) {
            Ok(layout) if errors.is_empty() => Ok(layout),
            Ok(_) => Err(errors),
            Err(more) => {
                // Beyond the limit a block is for both.
                let more: Vec<_> = more.into_iter().filter(|e| !errors.contains(e)).collect();
                errors.extend(more);
                Err(errors)
            }
        }
    }

    /// A layout from blocks that have their `RamAddr` already (QEMU's, a peer's).
    ///
    /// # Errors
    /// Every problem found, by block index.
    pub fn from_blocks(blocks: Vec<RamBlock>) -> Result<Self, Vec<LayoutError>> {
        if blocks.is_empty() {
            return Err(vec![LayoutError::Empty]);
        }
        if blocks.len() > MAX_BLOCKS {
            return Err(vec![LayoutError::TooMany { count: blocks.len() }]);
        }
        let mut errors = Vec::new();
        check_names(&blocks, &mut errors);
        check_ranges(&blocks, &mut errors);
        let by_gpa = parts_by_gpa(&blocks);
        check_overlap(&blocks, &by_gpa, &mut errors);
        if errors.is_empty() { Ok(Self { blocks, by_gpa }) } else { Err(errors) }
    }

    /// This layout with the plugged parts of one block replaced: what a hypervisor says of where its RAM is
    /// seen.
    ///
    /// # Errors
    /// As [`GuestLayout::from_blocks`].
    pub fn with_plugs(&self, name: &str, plugs: Vec<Plug>) -> Result<Self, Vec<LayoutError>> {
        let mut blocks = self.blocks.clone();
        if let Some(block) = blocks.iter_mut().find(|b| b.name == name) {
            block.plugs = plugs;
        }
        Self::from_blocks(blocks)
    }

    /// The blocks by ascending `RamAddr`.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The block called `name`.
    pub fn block(&self, name: &str) -> Option<&RamBlock> {
        self.blocks.iter().find(|b| b.name == name)
    }

    /// The block that holds `ram`.
    pub fn block_at(&self, ram: RamAddr) -> Option<&RamBlock> {
        let after = self.blocks.partition_point(|b| b.ram_addr <= ram);
        self.blocks.get(after.checked_sub(1)?).filter(|b| ram.get() - b.ram_addr.get() < b.size)
    }

    /// The helper's block, if this layout has one.
    pub fn helper(&self) -> Option<&RamBlock> {
        self.blocks.iter().find(|b| b.role == BlockRole::Helper)
    }

    /// The blocks that move with the guest: its memory, and its save areas.
    pub fn ram(&self) -> impl Iterator<Item = &RamBlock> {
        self.blocks.iter().filter(|b| b.role != BlockRole::Helper)
    }

    /// The block with the save areas of an SEV-ES guest.
    pub fn save_areas(&self) -> Option<&RamBlock> {
        self.blocks.iter().find(|b| b.role == BlockRole::Vmsa)
    }

    /// Bytes that move with the guest; the helper's block is not counted.
    pub fn ram_bytes(&self) -> u64 {
        self.ram().map(|b| b.size).sum()
    }

    /// The first `RamAddr` after every block.
    pub fn ram_end(&self) -> RamAddr {
        self.blocks.last().map_or(RamAddr::new(0), |b| RamAddr::new(b.ram_range().end()))
    }

    /// The first `RamAddr` after the guest's memory, whatever the helper's block does.
    pub fn guest_end(&self) -> RamAddr {
        RamAddr::new(self.ram().map(|b| b.ram_range().end()).max().unwrap_or(0))
    }

    /// Every plugged part with its block, by ascending GPA.
    pub fn plugged(&self) -> Vec<(&RamBlock, Plug)> {
        self.by_gpa.iter().map(|at| part(&self.blocks, *at)).collect()
    }

    /// The plugged parts that share an address with the `len` bytes from `gpa`, by ascending GPA.
    pub fn plugged_in(&self, gpa: Gpa, len: u64) -> impl Iterator<Item = (&RamBlock, Plug)> {
        let end = gpa.get().saturating_add(len);
        let first = self.by_gpa.partition_point(|at| {
            let (_, p) = part(&self.blocks, *at);
            p.gpa.get() + p.len <= gpa.get()
        });
        let parts = self.by_gpa[first..].iter().map(|at| part(&self.blocks, *at));
        parts.take_while(move |(_, p)| p.gpa.get() < end)
    }

    /// Where in RAM the guest's address `gpa` lies now.
    pub fn gpa_to_ram(&self, gpa: Gpa) -> Option<RamAddr> {
        let (block, plug) = self.plugged_in(gpa, 1).next()?;
        block.ram_addr.checked_add(plug.offset + gpa.offset_from(plug.gpa)?)
    }

    /// Where the guest sees `ram` now; `None` when it is unplugged or no RAM.
    pub fn ram_to_gpa(&self, ram: RamAddr) -> Option<Gpa> {
        let block = self.block_at(ram)?;
        let offset = ram.offset_from(block.ram_addr)?;
        let after = block.plugs.partition_point(|p| p.offset <= offset);
        let plug = block.plugs.get(after.checked_sub(1)?).filter(|p| offset - p.offset < p.len)?;
        plug.gpa.checked_add(offset - plug.offset)
    }

    /// This layout with a block for the save areas of `vcpus` vCPUs, a page each, unplugged.
    ///
    /// # Errors
    /// As [`GuestLayout::from_blocks`].
    pub fn with_save_areas(&self, vcpus: u32) -> Result<Self, Vec<LayoutError>> {
        let mut blocks = self.blocks.clone();
        blocks.push(RamBlock {
            name: VMSA_BLOCK.to_owned(),
            ram_addr: RamAddr::new(align_up(self.ram_end().get(), PAGE_2M).unwrap_or(u64::MAX)),
            size: u64::from(vcpus) * PAGE_SIZE,
            role: BlockRole::Vmsa,
            plugs: Vec::new(),
        });
        Self::from_blocks(blocks)
    }

    /// This layout with a block for the helper added after the others: at `size` bytes, plugged at the
    /// highest 2 MiB-aligned hole below 4 GiB, or above all RAM when there is none (`plugged`), or unplugged.
    ///
    /// # Errors
    /// As [`GuestLayout::from_blocks`]; a layout that has a helper's block already names it as a duplicate.
    pub fn with_helper(&self, size: u64, plugged: bool) -> Result<Self, Vec<LayoutError>> {
        self.with_helper_after(self.ram_end(), size, plugged)
    }

    /// The same with the helper's `RamAddr` at or after `from`, where a hypervisor has blocks of its own.
    ///
    /// # Errors
    /// As [`GuestLayout::with_helper`].
    pub fn with_helper_after(
        &self,
        from: RamAddr,
        size: u64,
        plugged: bool,
    ) -> Result<Self, Vec<LayoutError>> {
        let mut blocks = self.blocks.clone();
        let start = align_up(from.get().max(self.ram_end().get()), PAGE_2M).unwrap_or(u64::MAX);
        let plugs =
            if plugged { vec![Plug { offset: 0, gpa: self.hole_for(size), len: size }] } else { Vec::new() };
        blocks.push(RamBlock {
            name: HELPER_BLOCK.to_owned(),
            ram_addr: RamAddr::new(start),
            size,
            role: BlockRole::Helper,
            plugs,
        });
        Self::from_blocks(blocks)
    }

    fn hole_for(&self, size: u64) -> Gpa {
        let parts = self.plugged();
        let mut top = super::FOUR_GIB;
        for (_, p) in parts.iter().rev() {
            let end = p.gpa.get().saturating_add(p.len);
            if p.gpa.get() >= top {
                continue;
            }
            let start = top.saturating_sub(size) & !(PAGE_2M - 1);
            if start >= end && start.saturating_add(size) <= top {
                return Gpa::new(start);
            }
            top = p.gpa.get();
        }
        // Below the lowest part, or anywhere when nothing is plugged down there.
        if top >= size {
            return Gpa::new((top - size) & !(PAGE_2M - 1));
        }
        let above = parts.last().map_or(0, |(_, p)| p.gpa.get().saturating_add(p.len));
        Gpa::new(align_up(above.max(super::FOUR_GIB), PAGE_2M).unwrap_or(!(PAGE_2M - 1)))
    }
}

/// Name of the helper's block in every layout.
pub const HELPER_BLOCK: &str = "mirrorvm.helper";

/// Name of the block with the save areas of an SEV-ES guest.
pub const VMSA_BLOCK: &str = "mirrorvm.vmsa";

impl TryFrom<Vec<RamBlock>> for GuestLayout {
    type Error = LayoutError;

    fn try_from(blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        Self::from_blocks(blocks).map_err(|mut e| e.swap_remove(0))
    }
}

impl From<GuestLayout> for Vec<RamBlock> {
    fn from(layout: GuestLayout) -> Self {
        layout.blocks
    }
}

fn check_names(blocks: &[RamBlock], errors: &mut Vec<LayoutError>) {
    let mut seen = std::collections::HashSet::new();
    let mut helpers = 0;
    for (index, block) in blocks.iter().enumerate() {
        let name = &block.name;
        let legal = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        if name.is_empty() || name.len() > 64 || !name.bytes().all(legal) {
            errors.push(LayoutError::Name { index, name: name.chars().take(80).collect() });
        } else if !seen.insert(name.as_str()) || (block.role == BlockRole::Helper && helpers > 0) {
            errors.push(LayoutError::DuplicateName { index, name: name.clone() });
        }
        helpers += usize::from(block.role == BlockRole::Helper);
    }
}

fn check_ranges(blocks: &[RamBlock], errors: &mut Vec<LayoutError>) {
    let mut end = 0u64;
    for (index, block) in blocks.iter().enumerate() {
        match PageRange::new(block.ram_addr.get(), block.size) {
            Err(source) => {
                // Its plugged parts have the same length: one problem, one error.
                errors.push(LayoutError::Range { index, field: "size_bytes", source });
                continue;
            }
            Ok(range) if range.start() < end || range.end() > MAX_RAM_BYTES => {
                errors.push(LayoutError::TooLarge { index });
            }
            Ok(range) => end = range.end(),
        }
        let mut after = 0u64;
        for plug in &block.plugs {
            let inside = PageRange::new(plug.offset, plug.len)
                .and_then(|r| PageRange::new(plug.gpa.get(), plug.len).map(|_| r));
            match inside {
                Err(source) => errors.push(LayoutError::Range { index, field: "gpa", source }),
                Ok(r) if r.end() > block.size || r.start() < after => errors.push(LayoutError::Range {
                    index,
                    field: "gpa",
                    source: RangeError::Wraps { start: plug.offset, len: plug.len },
                }),
                Ok(r) => after = r.end(),
            }
        }
    }
}

fn part(blocks: &[RamBlock], at: (u32, u32)) -> (&RamBlock, Plug) {
    let block = &blocks[at.0 as usize];
    (block, block.plugs[at.1 as usize])
}

/// Every plugged part, by ascending GPA.
fn parts_by_gpa(blocks: &[RamBlock]) -> Vec<(u32, u32)> {
    let count = blocks.iter().map(|b| b.plugs.len()).sum();
    let mut keyed: Vec<(Gpa, u32, u32)> = Vec::with_capacity(count);
    for (b, block) in (0u32..).zip(blocks) {
        keyed.extend((0u32..).zip(&block.plugs).map(|(p, plug)| (plug.gpa, b, p)));
    }
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, b, p)| (b, p)).collect()
}

/// Parts that are no ranges have been told of, and overlap nothing.
fn check_overlap(blocks: &[RamBlock], by_gpa: &[(u32, u32)], errors: &mut Vec<LayoutError>) {
    let mut widest: Option<(usize, u64)> = None;
    for at in by_gpa {
        let (index, plug) = (at.0 as usize, part(blocks, *at).1);
        let Ok(range) = PageRange::new(plug.gpa.get(), plug.len) else { continue };
        let (start, end) = (range.start(), range.end());
        if let Some((other, widest_end)) = widest
            && start < widest_end
        {
            errors.push(LayoutError::Overlap { index, other, gpa: plug.gpa });
        }
        if widest.is_none_or(|(_, e)| end > e) {
            widest = Some((index, end));
        }
    }
}
