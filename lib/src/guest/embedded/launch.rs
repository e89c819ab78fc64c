//! Where the workload lies in its RAM, and putting it there.

use mirrorvm_workload as w;

use super::WORKLOAD_IMAGE;
use crate::addr::{Gpa, HelperVa, MirrorGpa, PAGE_2M, PAGE_SIZE, PageRange, RamAddr};
use crate::address_space::{Access, Declaration, GuestLayout, Mapping, PageTables, RamBlock, TableError};
use crate::guest::MachineError;
use crate::hypervisor::UserEntry;
use crate::memory::GuestRam;

/// Offsets in the first plugged block: boot page, the firmware's declaration, shared pages, image, stacks,
/// page tables, free RAM.
#[derive(Clone, Debug)]
pub struct WorkloadPlan {
    home: GuestLayout,
    block: RamBlock,
    gpa: u64,
    image_at: u64,
    stacks_at: u64,
    tables_at: u64,
    free_at: u64,
    vcpus: u32,
}

/// What the workload is told at its start.
#[derive(Clone, Copy, Debug)]
pub struct WorkloadBoot<'a> {
    /// Whether free RAM is filled.
    pub fill: bool,
    /// Bytes that are rewritten.
    pub working_set: u64,
    /// How fast.
    pub dirty_bytes_per_second: u64,
    /// What the firmware declares for the helper; `None`: nothing.
    pub declaration: Option<&'a Declaration>,
    /// The C-bit for the guest's page tables; 0 without SEV.
    pub c_bit: u64,
}

const DECLARATION_AT: u64 = PAGE_SIZE;
const SHARED_AT: u64 = 2 * PAGE_SIZE;

impl WorkloadPlan {
    /// Places the workload in the first block of `home` (the layout that the guest was defined with) that is
    /// plugged as a whole.
    ///
    /// # Errors
    /// When there is none, or it is too small for the workload and `working_set` bytes.
    pub fn new(home: &GuestLayout, vcpus: u32, working_set: u64) -> Result<Self, MachineError> {
        let whole = |b: &&RamBlock| matches!(b.plugs.as_slice(), [p] if p.len == b.size);
        let block = home.ram().find(whole).ok_or(MachineError::NothingPlugged)?.clone();
        let gpa = block.plugs[0].gpa.get();
        let image_at = SHARED_AT + w::SHARED_PAGES * PAGE_SIZE;
        let stacks_at = image_at + (WORKLOAD_IMAGE.len() as u64).next_multiple_of(PAGE_SIZE);
        // One stack more: the firmware's.
        let tables_at = stacks_at + u64::from(vcpus + 1) * w::STACK_BYTES;
        let free_at = tables_at + table_pages(home) * PAGE_SIZE;
        let need = free_at.saturating_add(working_set);
        if block.size < need {
            return Err(MachineError::TooSmall { have: block.size, need });
        }
        Ok(Self { home: home.clone(), block, gpa, image_at, stacks_at, tables_at, free_at, vcpus })
    }

    /// Where the pages are that the guest shares with its host.
    pub fn shared(&self) -> RamAddr {
        RamAddr::new(self.block.ram_addr.get() + SHARED_AT)
    }

    /// The block that the guest runs from: it cannot be unplugged.
    pub const fn block(&self) -> &RamBlock {
        &self.block
    }

    /// The pieces of RAM beyond the first block that the guest uses while they are plugged, in the order of
    /// `Boot::more`: `RamAddr`, bytes, and the only address at which the guest's page tables see it.
    pub fn pieces(&self) -> Vec<(RamAddr, u64, Gpa)> {
        let others = self.home.ram().filter(|b| b.ram_addr != self.block.ram_addr);
        others
            .filter_map(|b| match b.plugs.as_slice() {
                [p] if p.len == b.size => Some((b.ram_addr, b.size, p.gpa)),
                _ => None,
            })
            .take(w::MORE_MAX)
            .collect()
    }

    /// How vCPU `index` starts; the one after the workload's last is the firmware's.
    pub fn entry(&self, index: u32, c_bit: u64) -> UserEntry {
        let top = w::STACK_VA + u64::from(index + 1) * w::STACK_BYTES;
        let firmware = index == self.vcpus;
        UserEntry {
            rip: w::IMAGE_VA + if firmware { w::FIRMWARE_AT } else { 0 },
            // As after a call: 8 below a multiple of 16.
            rsp: top - 8,
            rdi: u64::from(index),
            cr3: (self.gpa + self.tables_at) | c_bit,
            tss: w::TSS_VA,
        }
    }

    /// What a launch encrypts and measures: everything but the shared pages and free RAM.
    pub fn launched(&self) -> [PageRange; 2] {
        let range = |from: u64, to: u64| {
            PageRange::new(self.block.ram_addr.get() + from, to - from).expect("offsets are whole pages")
        };
        [range(0, SHARED_AT), range(self.image_at, self.free_at)]
    }

    /// Writes boot page, declaration, image and page tables, as they are before a launch encrypts them.
    pub fn load(&self, ram: &GuestRam, what: &WorkloadBoot<'_>) -> Result<(), MachineError> {
        let base = self.block.ram_addr.get();
        let mut more = [(0, 0); w::MORE_MAX];
        for (piece, (at, size, _)) in more.iter_mut().zip(self.pieces()) {
            *piece = (at.get(), size);
        }
        let rate = u128::from(what.dirty_bytes_per_second) * 65536;
        let boot = w::Boot {
            vcpus: u64::from(self.vcpus),
            free_from: base + self.free_at,
            free_to: base + self.block.size,
            fill: u64::from(what.fill),
            working_set: what.working_set / PAGE_SIZE,
            pages_per_tick_q16: u64::try_from(rate / u128::from(PAGE_SIZE * w::TICKS_PER_SECOND))
                .unwrap_or(u64::MAX / 2),
            shared_gpa: self.gpa + SHARED_AT,
            more,
        };
        let tables = self.tables(what.c_bit).map_err(|_| MachineError::NothingPlugged)?;
        let put = |offset: u64, bytes: &[u8]| {
            ram.write(RamAddr::new(base + offset), bytes).expect("the plan lies inside its block");
        };
        put(0, &boot.encode());
        put(DECLARATION_AT, &declaration_page(what.declaration));
        put(self.image_at, WORKLOAD_IMAGE);
        put(self.tables_at, &tables.bytes());
        Ok(())
    }

    fn tables(&self, c_bit: u64) -> Result<PageTables, TableError> {
        let mapping = |va, offset: u64, len, access, encrypted| Mapping {
            va: HelperVa::new(va),
            gpa: MirrorGpa::new(self.gpa + offset),
            len,
            access,
            encrypted,
        };
        let (image, stacks) = (self.stacks_at - self.image_at, self.tables_at - self.stacks_at);
        let mut list = vec![
            mapping(w::BOOT_VA, 0, 2 * PAGE_SIZE, Access::Read, true),
            mapping(w::SHARED_VA, SHARED_AT, w::SHARED_PAGES * PAGE_SIZE, Access::ReadWrite, false),
            mapping(w::IMAGE_VA, self.image_at, image, Access::ReadExecute, true),
            mapping(w::STACK_VA, self.stacks_at, stacks, Access::ReadWrite, true),
        ];
        list.extend(self.home.ram().flat_map(|b| {
            b.plugs.iter().map(|p| Mapping {
                va: HelperVa::new(w::RAM_VA + b.ram_addr.get() + p.offset),
                gpa: MirrorGpa::new(p.gpa.get()),
                len: p.len,
                access: Access::ReadWrite,
                encrypted: true,
            })
        }));
        let base = MirrorGpa::new(self.gpa + self.tables_at);
        PageTables::build(&list, base, c_bit, false, table_pages(&self.home) as usize)
    }
}

/// The declaration as the firmware finds it: a count, then tuples.
fn declaration_page(declaration: Option<&Declaration>) -> Vec<u8> {
    let tuples = declaration.map_or(&[][..], |d| d.tuples());
    let mut words = vec![tuples.len().min(w::DECLARATION_MAX) as u64];
    for t in tuples.iter().take(w::DECLARATION_MAX) {
        words.extend([t.guest.get(), t.len, t.mirror.get()]);
    }
    let mut page: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    page.resize(PAGE_SIZE as usize, 0);
    page
}

/// Enough page-table pages for every plugged part: edges, directories, and 4 KiB tables where a part's
/// address does not allow large pages.
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
