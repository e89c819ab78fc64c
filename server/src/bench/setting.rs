//! What the scenarios share: RAM with incompressible content, mirrors over it, the machine's description.

use std::sync::Arc;

use mirrorvm::addr::{Gpa, RamPage};
use mirrorvm::address_space::{
    BlockSpec, GuestLayout, HelperPlacement, MailboxSize, MirrorPlan, PlanRequest, Shift, Strategy, plan,
};
use mirrorvm::hypervisor::Hypervisor as _;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::{Backing, GuestRam};
use mirrorvm::mirror::{HelperImage, HelperSource, Mirror};

use super::{BenchArgs, BenchError};

/// One block of RAM at GPA 0 with a helper's block.
pub(super) fn ram(bytes: u64) -> Result<GuestRam, BenchError> {
    let block = BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) };
    let first = |mut e: Vec<mirrorvm::address_space::LayoutError>| e.swap_remove(0);
    let bare = GuestLayout::assign(&[block]).map_err(first)?;
    let size = HelperPlacement::block_size(HelperImage::built_in().header(), &bare).ok_or("RAM too large")?;
    Ok(GuestRam::allocate(Arc::new(bare.with_helper(size, true).map_err(first)?), Backing::Anonymous)?)
}

/// Fills all of it with data that does not compress.
pub(super) fn fill(ram: &GuestRam) -> Result<(), BenchError> {
    use ring::rand::SecureRandom;
    let random = ring::rand::SystemRandom::new();
    let mut chunk = vec![0; 1 << 20];
    random.fill(&mut chunk).map_err(|_| "no random numbers")?;
    for page in 0..ram.layout().ram_bytes() / 4096 {
        // The same megabyte over and over would do for AES; the page number keeps pages different.
        let at = (page as usize * 4096) % chunk.len();
        chunk[at..at + 8].copy_from_slice(&page.to_le_bytes());
        let bytes: &[u8; 4096] = chunk[at..at + 4096].try_into()?;
        ram.write_page(RamPage::new(page), bytes)?;
    }
    Ok(())
}

/// The plan of a mirror with one worker.
pub(super) fn mirror_plan(kvm: &KvmHost, ram: &GuestRam) -> Result<MirrorPlan, BenchError> {
    let strategy = Strategy::Shifted { shift: Shift::FourGib };
    let size = MailboxSize { workers: 1, slots: 4 };
    let (image, limits) = (HelperImage::built_in(), kvm.limits());
    plan(&PlanRequest::new(&ram.layout(), image.header(), &limits, strategy, size))
        .map_err(|mut e| e.swap_remove(0).into())
}

/// A mirror with one worker.
pub(super) fn mirror(kvm: &KvmHost, ram: &GuestRam) -> Result<Mirror, BenchError> {
    let plan = mirror_plan(kvm, ram)?;
    let helper = HelperSource::Loaded { secret: &[7; 32] };
    Ok(Mirror::launch(kvm, "bench", Arc::new(plan), 1, ram, &HelperImage::built_in(), helper)?)
}

/// The conditions of a run, in one line.
pub(super) fn conditions(args: &BenchArgs) -> String {
    let uname = rustix::system::uname();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or("")
        .trim_start_matches(['\t', ' ', ':']);
    let pvm = std::path::Path::new("/sys/module/kvm_pvm").exists();
    format!(
        "{} CPUs ({model}), Linux {}, KVM {}, RAM anonymous on transparent huge pages, {} MiB, median of {} runs",
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        uname.release().to_string_lossy(),
        if pvm { "without hardware virtualization (PVM)" } else { "with hardware virtualization" },
        args.memory_mib,
        args.runs,
    )
}
