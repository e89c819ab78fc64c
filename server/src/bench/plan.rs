//! Planning: plans of large guests, page tables, where a page is in a mirror, encryption status; and how each
//! grows.
//!
//! Needs no KVM. The figures to stay below: a plan for 1 TiB in 10,000 blocks 10 ms, tables for 1 TiB with 1
//! GiB pages 1 ms, a translation 20 ns, an update and a scan of the encryption status of 1 TiB 20 ms.

use std::hint::black_box;
use std::time::Instant;

use mirrorvm::addr::{Gpa, HelperVa, MirrorGpa, PAGE_1G, PAGE_2M, PAGE_SIZE, RamAddr};
use mirrorvm::address_space::{
    Access, BlockSpec, Confidentiality, Declaration, GuestLayout, HelperPlacement, HostLimits, MailboxSize,
    Mapping, MirrorPlan, PageTables, PlanRequest, PspVia, Shift, Strategy, plan, reference_declaration,
};
use mirrorvm::guest::EncryptionStatus;
use mirrorvm::mirror::HelperImage;

use super::{BenchArgs, BenchError, Row};

/// Most blocks of one guest in these scenarios.
const BLOCKS: u64 = 10_000;
/// Sizes of guests, to see what grows.
const SIZES: [(u64, &str); 3] = [(1 << 30, "1 GiB"), (32 << 30, "32 GiB"), (1 << 40, "1 TiB")];
/// A host with SEV.
const LIMITS: HostLimits = HostLimits {
    max_phys_bits: 48,
    c_bit: Some(51),
    phys_bit_reduction: 1,
    slot_budget: 32_764,
    gib_pages: true,
};

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    // Each takes milliseconds: more runs than were asked for cost little and say more.
    let runs = args.runs() * 4;
    let mut rows = Vec::new();
    for (bytes, size) in SIZES {
        let guest = Guest::new(bytes, 0)?;
        rows.push(plan_row(&guest, Strategy::Shifted { shift: Shift::FourGib }, size, runs)?);
    }
    let (bytes, size) = SIZES[2];
    let guest = Guest::new(bytes, 0)?;
    for strategy in [
        Strategy::Shifted { shift: Shift::MaxPhys },
        Strategy::IdentityCbit,
        Strategy::Declared,
        Strategy::PspCopied { via: PspVia::LaunchUpdate },
    ] {
        rows.push(plan_row(&guest, strategy, size, runs)?);
    }
    // A page more a block: no two blocks are neighbours in RAM, and each needs tables of its own.
    let uneven = Guest::new(bytes, 1)?;
    for strategy in [Strategy::Shifted { shift: Shift::FourGib }, Strategy::IdentityCbit] {
        rows.push(plan_row(&uneven, strategy, "1 TiB, uneven blocks", runs)?);
    }
    for (bytes, size) in SIZES {
        rows.push(table_row(bytes, size, runs));
    }
    for (bytes, size) in SIZES {
        let guest = Guest::new(bytes, 1)?;
        rows.push(translation_row(&guest, &format!("{size}, uneven blocks"), args.runs())?);
    }
    for (bytes, size) in SIZES {
        rows.extend(status_rows(&Guest::new(bytes, 0)?, size, runs)?);
    }
    Ok(rows)
}

/// A guest in as many blocks as [`BLOCKS`] and 2 MiB a block allow, all plugged above 4 GiB.
struct Guest {
    layout: GuestLayout,
    image: HelperImage,
    declaration: Declaration,
}

impl Guest {
    /// `odd` pages more than a multiple of 2 MiB in each block.
    fn new(bytes: u64, odd: u64) -> Result<Self, BenchError> {
        let blocks = BLOCKS.min(bytes / PAGE_2M);
        let each = bytes / blocks / PAGE_2M * PAGE_2M;
        let mut gpa = 4 << 30;
        let mut specs = Vec::new();
        for index in 0..blocks {
            let whole = if index + 1 == blocks { bytes - index * each } else { each };
            let size_bytes = whole + odd * PAGE_SIZE;
            specs.push(BlockSpec { name: format!("b{index}"), size_bytes, gpa: Some(Gpa::new(gpa)) });
            gpa += size_bytes;
        }
        let first = |mut e: Vec<mirrorvm::address_space::LayoutError>| e.swap_remove(0);
        let bare = GuestLayout::assign(&specs).map_err(first)?;
        let image = HelperImage::built_in();
        let size = HelperPlacement::block_size(image.header(), &bare).ok_or("RAM too large")?;
        let layout = bare.with_helper(size, true).map_err(first)?;
        let declaration =
            reference_declaration(&layout, image.header(), &LIMITS).ok_or("nothing to declare")?;
        Ok(Self { layout, image, declaration })
    }

    fn blocks(&self) -> usize {
        self.layout.ram().count()
    }

    fn plan(&self, strategy: Strategy) -> Result<MirrorPlan, BenchError> {
        let size = MailboxSize { workers: 4, slots: 4 };
        let mut request = PlanRequest::new(&self.layout, self.image.header(), &LIMITS, strategy, size);
        (request.declaration, request.confidentiality) = (Some(&self.declaration), Confidentiality::Sev);
        plan(&request).map_err(|mut e| e.swap_remove(0).into())
    }
}

/// Milliseconds of each of `runs` runs.
fn times<T>(runs: u32, mut run: impl FnMut() -> T) -> Vec<f64> {
    let one = |_| {
        let begun = Instant::now();
        let made = run();
        let took = begun.elapsed().as_secs_f64() * 1e3;
        // Taking it apart is not measured.
        drop(black_box(made));
        took
    };
    (0..runs).map(one).collect()
}

fn plan_row(guest: &Guest, strategy: Strategy, size: &str, runs: u32) -> Result<Row, BenchError> {
    guest.plan(strategy)?;
    let name = match strategy {
        Strategy::Shifted { shift: Shift::MaxPhys } => "shifted, max-phys",
        Strategy::Shifted { shift: Shift::FourGib | Shift::Explicit { .. } }
        | Strategy::IdentityCbit
        | Strategy::Declared
        | Strategy::PspCopied { .. } => strategy.name(),
    };
    let name = format!("plan: {name}, {size}, {} blocks", guest.blocks());
    Ok(Row::new(name, "ms", times(runs, || guest.plan(strategy))))
}

fn table_row(bytes: u64, size: &str, runs: u32) -> Row {
    let window = Mapping {
        va: HelperVa::new(mirrorvm_abi::layout::WINDOW_VA),
        gpa: MirrorGpa::new(4 * PAGE_1G),
        len: bytes,
        access: Access::ReadWrite,
        encrypted: true,
    };
    let build = || PageTables::build(&[window], MirrorGpa::new(PAGE_2M), LIMITS.c_bit_mask(), true, 1 << 16);
    let microseconds = times(runs, build).into_iter().map(|ms| ms * 1e3).collect();
    Row::new(format!("page tables: {size}, 1 GiB pages"), "us", microseconds)
}

fn translation_row(guest: &Guest, size: &str, runs: u32) -> Result<Row, BenchError> {
    const LOOKUPS: u64 = 1 << 20;
    let plan = guest.plan(Strategy::IdentityCbit)?;
    let pages = guest.layout.guest_end().get() / PAGE_SIZE;
    // In an order that no prefetcher guesses (a full-period generator; Knuth's constants).
    let mut state = 1u64;
    let all = || {
        let mut sum = 0u64;
        for _ in 0..LOOKUPS {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let ram = RamAddr::new((state >> 20) % pages * PAGE_SIZE);
            sum ^= plan.mirror_gpa(ram).map_or(0, MirrorGpa::get);
        }
        sum
    };
    let nanoseconds = times(runs, all).into_iter().map(|ms| ms * 1e6 / LOOKUPS as f64).collect();
    Ok(Row::new(format!("RamAddr to mirror GPA: {size}, {} blocks", guest.blocks()), "ns", nanoseconds))
}

fn status_rows(guest: &Guest, size: &str, runs: u32) -> Result<Vec<Row>, BenchError> {
    let pages = guest.layout.ram_bytes() / PAGE_SIZE;
    let start = Gpa::new(4 << 30);
    let (mut updates, mut scans) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        // From nothing: memory for the bits is part of the cost.
        let status = EncryptionStatus::default();
        let begun = Instant::now();
        status.report(&guest.layout, start, pages, false)?;
        updates.push(begun.elapsed().as_secs_f64() * 1e3);
        let begun = Instant::now();
        black_box(status.extents(&guest.layout, RamAddr::new(0), usize::MAX));
        scans.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    let name = |what: &str| format!("encryption status: {what} {size}, {} blocks", guest.blocks());
    Ok(vec![Row::new(name("update of"), "ms", updates), Row::new(name("scan of"), "ms", scans)])
}
