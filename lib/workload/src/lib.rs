//! The contract between the reference workload guest and the host that runs it, and the workload's logic.
//!
//! The guest is a small 64-bit program without a kernel: it fills its RAM, rewrites a working set at a given
//! rate with a pattern that it checks before each rewrite, counts ticks and prints a line now and then. So it
//! notices by itself when a page is lost, stale or moved. Owns: boot information, ports, the pattern. Must
//! not know: KVM, migration.
//!
//! The program runs in two places: as a bare-metal image (`image.rs`) and natively on the software machine.
//! Both drive [`Cpu`], which holds every register that the program has; [`Memory`] is the seam to the
//! machine.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod cpu;
#[cfg(test)]
mod cpu_tests;
mod line;

pub use cpu::{CPU_WORDS, Cpu, Memory, Step};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Where the guest's image is linked and mapped.
pub const IMAGE_VA: u64 = 0x0040_0000;
/// Where RAM is mapped: `RamAddr` 0 appears here.
pub const RAM_VA: u64 = 0x1000_0000_0000;
/// Where the boot information is mapped, read-only.
pub const BOOT_VA: u64 = 0x1_0000_0000;
/// Where the pages that the guest shares with its host are mapped.
pub const SHARED_VA: u64 = 0x1_1000_0000;
/// Pages that the guest shares with its host: statistics, console buffer, room.
pub const SHARED_PAGES: u64 = 16;
/// Stack of vCPU 0; the others follow at [`STACK_BYTES`].
pub const STACK_VA: u64 = 0x1_2000_0000;
/// Where the task state segment is: in the boot page behind the boot information, all zero. See
/// `mirrorvm_abi::layout::TSS_VA` for why there is one.
pub const TSS_VA: u64 = BOOT_VA + 2048;
/// Bytes of a vCPU's stack.
pub const STACK_BYTES: u64 = 16 << 10;
/// Most vCPUs.
pub const VCPUS_MAX: u32 = 16;

/// Reads: waits for the next tick; gives the ticks that have passed (0: ask again).
pub const PORT_TICK: u16 = 0x510;
/// Writes: so many bytes of the console buffer are new output.
pub const PORT_CONSOLE: u16 = 0x511;
/// Reads: carries out the page status change that the statistics page describes; gives 0 when done. Stands in
/// for KVM_HC_MAP_GPA_RANGE, whose hypercall instruction not every KVM passes on.
pub const PORT_MAP_RANGE: u16 = 0x512;
/// Writes: switches the machine off.
pub const PORT_POWER_OFF: u16 = 0x513;

/// Reads, by the firmware at CPL 0: waits until it is to write MSR_KVM_MIGRATION_CONTROL; gives the value to
/// write (0 or 1), or [`FIRMWARE_AGAIN`].
pub const PORT_FIRMWARE: u16 = 0x514;
/// Answer of [`PORT_FIRMWARE`]: ask again.
pub const FIRMWARE_AGAIN: u32 = u32::MAX;
/// The MSR by which a guest says whether it can be migrated (KVM's x86 msr.rst).
pub const MSR_KVM_MIGRATION_CONTROL: u32 = 0x4b56_4d08;
/// The firmware's entry, from the start of the image. One vCPU more than the workload's runs there, at CPL 0:
/// it copies the declaration from [`DECLARATION_VA`] to the shared pages, then writes the MSR as
/// [`PORT_FIRMWARE`] tells.
pub const FIRMWARE_AT: u64 = PAGE as u64;
/// The firmware's copy of what it declares, in a read-only page behind the boot information: a count, then
/// tuples of guest-physical address, bytes, mirror-physical address; little-endian `u64`s.
pub const DECLARATION_VA: u64 = BOOT_VA + PAGE as u64;
/// Offset of the declaration in the shared pages, in the same form.
pub const DECLARATION_AT: usize = 3 * PAGE;
/// Most tuples.
pub const DECLARATION_MAX: usize = (PAGE - 8) / 24;
/// Offset of a word in the shared pages: bit `i` says that the host lets the guest use `Boot::more[i]`.
/// Before the first instruction the host sets this word and the next one alike: these are the pieces that the
/// workload fills. Later the host writes this word alone.
pub const PLUGGED_AT: usize = 4 * PAGE;
/// Offset of a word in the shared pages: bit `i` says that the guest uses `Boot::more[i]`. The host unplugs a
/// piece only when its bit is clear. Follows [`PLUGGED_AT`] once a tick, from when every vCPU has filled its
/// share.
pub const IN_USE_AT: usize = PLUGGED_AT + 8;

/// Ticks a second.
pub const TICKS_PER_SECOND: u64 = 100;
/// Offset of the console buffer in the shared pages.
pub const CONSOLE_AT: usize = PAGE;
/// Bytes of the console buffer.
pub const CONSOLE_BYTES: usize = PAGE;
/// Offset of the page status request in the shared pages: GPA, pages, 1 for private or 0 for shared.
pub const MAP_RANGE_AT: usize = 2 * PAGE;
/// Bytes of a vCPU's statistics, at its index from the start of the shared pages.
pub const STATS_BYTES: usize = 64;

/// What the host tells the guest, in one read-only page of little-endian `u64`s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// vCPUs that were started.
    pub vcpus: u64,
    /// First byte of RAM that is the guest's to use, as an offset in the RAM window.
    pub free_from: u64,
    /// First byte after it.
    pub free_to: u64,
    /// Whether to fill free RAM with incompressible data.
    pub fill: u64,
    /// Pages of the working set, at the start of free RAM.
    pub working_set: u64,
    /// Pages to rewrite per tick, times 65536.
    pub pages_per_tick_q16: u64,
    /// Where the shared pages are in guest-physical space.
    pub shared_gpa: u64,
    /// More pieces of RAM to fill, as pairs of offset and length in the RAM window; zero length ends them.
    pub more: [(u64, u64); MORE_MAX],
}

/// Pieces of RAM beyond the first that the workload fills; further ones stay as they are.
pub const MORE_MAX: usize = 64;
/// Bytes of an encoded [`Boot`].
pub const BOOT_BYTES: usize = (7 + 2 * MORE_MAX) * 8;

impl Boot {
    /// As bytes for the boot page.
    pub fn encode(&self) -> [u8; BOOT_BYTES] {
        let mut b = [0; BOOT_BYTES];
        let head = [
            self.vcpus,
            self.free_from,
            self.free_to,
            self.fill,
            self.working_set,
            self.pages_per_tick_q16,
            self.shared_gpa,
        ];
        let words = head.into_iter().chain(self.more.iter().flat_map(|(a, l)| [*a, *l]));
        for (chunk, word) in b.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        b
    }

    /// From the boot page; `None` when the program cannot run by it: unaligned pieces, numbers that sums or
    /// products would overflow with. The host writes the boot page, but on the software machine a wrong key
    /// turns it into garbage.
    pub fn decode(b: &[u8; BOOT_BYTES]) -> Option<Self> {
        let word = |i: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&b[i * 8..i * 8 + 8]);
            u64::from_le_bytes(w)
        };
        let boot = Self {
            vcpus: word(0),
            free_from: word(1),
            free_to: word(2),
            fill: word(3),
            working_set: word(4),
            pages_per_tick_q16: word(5),
            shared_gpa: word(6),
            more: core::array::from_fn(|i| (word(7 + 2 * i), word(8 + 2 * i))),
        };
        boot.is_sane().then_some(boot)
    }

    fn is_sane(&self) -> bool {
        const TOP: u64 = 1 << 46;
        let piece = |from: u64, to: u64| from <= to && to <= TOP && (from | to).is_multiple_of(PAGE as u64);
        (1..=u64::from(VCPUS_MAX)).contains(&self.vcpus)
            && piece(self.free_from, self.free_to)
            && self.working_set <= (self.free_to - self.free_from) / PAGE as u64
            && self.more.iter().all(|(at, len)| at.checked_add(*len).is_some_and(|to| piece(*at, to)))
    }
}

/// A vCPU's statistics as they lie in the shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Stats {
    /// Ticks counted.
    pub ticks: u64,
    /// Pages rewritten.
    pub pages: u64,
    /// Pages whose content was not what this vCPU had left there.
    pub errors: u64,
    /// 1 when RAM is filled and the work has begun.
    pub working: u64,
    /// Bit `i`: this vCPU has filled its share of `Boot::more[i]`. Whole when `working` is 1.
    pub filled: u64,
}

impl Stats {
    /// From a vCPU's part of the shared page.
    pub fn decode(b: &[u8; STATS_BYTES]) -> Self {
        let word = |i: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&b[i * 8..i * 8 + 8]);
            u64::from_le_bytes(w)
        };
        Self { ticks: word(0), pages: word(1), errors: word(2), working: word(3), filled: word(4) }
    }
}

/// The generator behind every page's content (SplitMix64): cheap, and nothing that a compressor finds.
#[derive(Clone, Copy, Debug)]
pub struct Pattern(u64);

impl Pattern {
    /// The content of page `page` in `generation`; generation 0 is the initial fill.
    pub const fn new(page: u64, generation: u64) -> Self {
        // Not the step of `word`: with that, a page would be its neighbour's words moved up by one.
        Self(page.wrapping_mul(0xa076_1d64_78bd_642f) ^ generation.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    /// The next word.
    pub const fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Writes a page's content.
    pub fn fill(mut self, page: &mut [u64; PAGE / 8]) {
        page.iter_mut().for_each(|w| *w = self.word());
    }

    /// Writes a page's content as bytes.
    pub fn fill_bytes(mut self, page: &mut [u8; PAGE]) {
        page.as_chunks_mut::<8>().0.iter_mut().for_each(|c| *c = self.word().to_le_bytes());
    }

    /// Whether a page's bytes have the content.
    pub fn matches_bytes(mut self, page: &[u8; PAGE]) -> bool {
        page.as_chunks::<8>().0.iter().fold(true, |same, c| same & (u64::from_le_bytes(*c) == self.word()))
    }

    /// Whether a page has the content.
    pub fn matches(mut self, page: &[u64; PAGE / 8]) -> bool {
        page.iter().fold(true, |same, w| same & (*w == self.word()))
    }
}

/// The slice of `total` that vCPU `index` of `vcpus` works on.
pub const fn share(total: u64, index: u64, vcpus: u64) -> (u64, u64) {
    (total * index / vcpus, total * (index + 1) / vcpus)
}
