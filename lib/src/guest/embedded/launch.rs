//! Where the workload lies in its RAM, and putting it there.

use mirrorvm_abi::{config::SECRET_MAGIC, header::Header};
use mirrorvm_workload as w;

use super::WORKLOAD_IMAGE;
use crate::addr::{HelperVa, MirrorGpa, PAGE_2M, PAGE_SIZE, RamAddr};
use crate::address_space::{
    Access, GuestLayout, HelperPlacement, HelperSet, Mapping, PageTables, RamBlock, TableError,
};
use crate::guest::MachineError;
use crate::hypervisor::UserEntry;
use crate::memory::GuestRam;

/// Offsets in the first plugged block: boot page, shared pages, image, stacks, page tables, free RAM.
#[derive(Clone, Debug)]
pub struct WorkloadPlan {
    block: RamBlock,
    gpa: u64,
    image_at: u64,
    stacks_at: u64,
    tables_at: u64,
    free_at: u64,
    vcpus: u32,
}

const SHARED_AT: u64 = PAGE_SIZE;

impl WorkloadPlan {
    /// Places the workload in the first block of `layout` that is plugged as a whole.
    ///
    /// # Errors
    /// When there is none, or it is too small for the workload and `working_set` bytes.
    pub fn new(layout: &GuestLayout, vcpus: u32, working_set: u64) -> Result<Self, MachineError> {
        let whole = |b: &&RamBlock| matches!(b.plugs.as_slice(), [p] if p.len == b.size);
        let block = layout.ram().find(whole).ok_or(MachineError::NothingPlugged)?.clone();
        let gpa = block.plugs[0].gpa.get();
        let image_at = SHARED_AT + w::SHARED_PAGES * PAGE_SIZE;
        let stacks_at = image_at + (WORKLOAD_IMAGE.len() as u64).next_multiple_of(PAGE_SIZE);
        let tables_at = stacks_at + u64::from(vcpus) * w::STACK_BYTES;
        let free_at = tables_at + table_pages(layout) * PAGE_SIZE;
        let need = free_at.saturating_add(working_set);
        if block.size < need {
            return Err(MachineError::TooSmall { have: block.size, need });
        }
        Ok(Self { block, gpa, image_at, stacks_at, tables_at, free_at, vcpus })
    }

    /// Where the pages are that the guest shares with its host.
    pub fn shared(&self) -> RamAddr {
        RamAddr::new(self.block.ram_addr.get() + SHARED_AT)
    }

    /// How vCPU `index` starts.
    pub fn entry(&self, index: u32) -> UserEntry {
        let top = w::STACK_VA + u64::from(index + 1) * w::STACK_BYTES;
        UserEntry {
            rip: w::IMAGE_VA,
            // As after a call: 8 below a multiple of 16.
            rsp: top - 8,
            rdi: u64::from(index),
            cr3: self.gpa + self.tables_at,
            tss: w::TSS_VA,
        }
    }

    /// Writes boot page, image and page tables.
    pub fn load(
        &self,
        ram: &GuestRam,
        fill: bool,
        working_set: u64,
        dirty_bytes_per_second: u64,
    ) -> Result<(), MachineError> {
        let layout = ram.layout();
        let base = self.block.ram_addr.get();
        let mut more = [(0, 0); w::MORE_MAX];
        let others = layout.ram().filter(|b| b.ram_addr != self.block.ram_addr);
        let whole = others.filter(|b| matches!(b.plugs.as_slice(), [p] if p.len == b.size));
        for (piece, b) in more.iter_mut().zip(whole) {
            *piece = (b.ram_addr.get(), b.size);
        }
        let boot = w::Boot {
            vcpus: u64::from(self.vcpus),
            free_from: base + self.free_at,
            free_to: base + self.block.size,
            fill: u64::from(fill),
            working_set: working_set / PAGE_SIZE,
            pages_per_tick_q16: u64::try_from(
                u128::from(dirty_bytes_per_second) * 65536 / u128::from(PAGE_SIZE * w::TICKS_PER_SECOND),
            )
            .unwrap_or(u64::MAX / 2),
            shared_gpa: self.gpa + SHARED_AT,
            more,
        };
        let tables = self.tables(layout).map_err(|_| MachineError::NothingPlugged)?;
        let put = |offset: u64, bytes: &[u8]| {
            ram.write(RamAddr::new(base + offset), bytes).expect("the plan lies inside its block");
        };
        put(0, &boot.encode());
        put(self.image_at, WORKLOAD_IMAGE);
        put(self.tables_at, &tables.bytes());
        Ok(())
    }

    fn tables(&self, layout: &GuestLayout) -> Result<PageTables, TableError> {
        let mapping = |va, offset: u64, len, access| Mapping {
            va: HelperVa::new(va),
            gpa: MirrorGpa::new(self.gpa + offset),
            len,
            access,
            encrypted: false,
        };
        let mut list = vec![
            mapping(w::BOOT_VA, 0, PAGE_SIZE, Access::Read),
            mapping(w::SHARED_VA, SHARED_AT, w::SHARED_PAGES * PAGE_SIZE, Access::ReadWrite),
            mapping(w::IMAGE_VA, self.image_at, self.stacks_at - self.image_at, Access::ReadExecute),
            mapping(w::STACK_VA, self.stacks_at, self.tables_at - self.stacks_at, Access::ReadWrite),
        ];
        list.extend(layout.ram().flat_map(|b| {
            b.plugs.iter().map(|p| Mapping {
                va: HelperVa::new(w::RAM_VA + b.ram_addr.get() + p.offset),
                gpa: MirrorGpa::new(p.gpa.get()),
                len: p.len,
                access: Access::ReadWrite,
                encrypted: false,
            })
        }));
        let base = MirrorGpa::new(self.gpa + self.tables_at);
        PageTables::build(&list, base, 0, false, table_pages(layout) as usize)
    }
}

/// Enough page-table pages for every plugged part: edges, directories, and 4 KiB tables where a part's address
/// does not allow large pages.
fn table_pages(layout: &GuestLayout) -> u64 {
    let parts = layout.ram().flat_map(|b| b.plugs.iter().map(move |p| (b, p)));
    parts
        .map(|(b, p)| {
            let large = (p.gpa.get() ^ (b.ram_addr.get() + p.offset)) % PAGE_2M == 0;
            6 + p.len.div_ceil(1 << 30) + if large { 0 } else { p.len.div_ceil(PAGE_2M) + 1 }
        })
        .sum::<u64>()
        + 24
}

/// Loads the helper's image and the guest's migration secret into the helper's block: a part of the guest's launch.
/// Configuration and page tables come with a mirror, whose strategy decides them.
///
/// # Errors
/// An image that cannot be used, or a block that it does not fit.
pub fn load_helper(ram: &GuestRam, image: &[u8], secret: &[u8; 32]) -> Result<(), MachineError> {
    let header = Header::parse(image).map_err(MachineError::HelperImage)?;
    let layout = ram.layout();
    let block = layout.helper().ok_or(MachineError::NothingPlugged)?;
    // Image and secret have one place whatever the strategy.
    let placement = HelperPlacement::new(&header, layout, HelperSet::Shifted)
        .filter(|p| p.block_len() <= block.size)
        .ok_or(MachineError::TooSmall { have: block.size, need: header.footprint() })?;
    let put = |offset: u64, bytes: &[u8]| {
        let at = RamAddr::new(block.ram_addr.get() + offset);
        ram.write(at, bytes).expect("the placement lies inside the block");
    };
    put(0, image);
    put(placement.secret_at, &SECRET_MAGIC.to_le_bytes());
    put(placement.secret_at + 8, secret);
    Ok(())
}
