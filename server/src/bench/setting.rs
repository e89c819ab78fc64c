//! What the scenarios share: RAM with incompressible content, mirrors over it, the machine's description.

use std::sync::Arc;

use mirrorvm::addr::{Gpa, RamPage};
use mirrorvm::address_space::{
    BlockSpec, GuestLayout, HelperPlacement, MailboxSize, MirrorPlan, PlanRequest, Shift, Strategy, plan,
};
use mirrorvm::hypervisor::Hypervisor as _;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::{Backing, GuestRam, Mapping};
use mirrorvm::mirror::{HelperImage, HelperSource, Mirror};

use serde_json::{Map, Value};

use super::{BenchArgs, BenchError};

/// One block of RAM at GPA 0 with a helper's block.
pub(super) fn ram(bytes: u64) -> Result<GuestRam, BenchError> {
    let block = BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) };
    let first = |mut e: Vec<mirrorvm::address_space::LayoutError>| e.swap_remove(0);
    let bare = GuestLayout::assign(&[block]).map_err(first)?;
    let size = HelperPlacement::block_size(HelperImage::built_in().header(), &bare).ok_or("RAM too large")?;
    Ok(GuestRam::allocate(Arc::new(bare.with_helper(size, true).map_err(first)?), Backing::Anonymous)?)
}

/// Touches as much free memory as a destination is about to need, and gives it back. In a virtual machine
/// whose host backs memory on demand, and takes back what is free, the first touch costs many times what the
/// kernel's own clearing does; without this the one that comes later would find memory that the one before
/// paid for.
pub(super) fn warm(bytes: u64) -> Result<(), BenchError> {
    let memory = Mapping::anonymous(bytes)?;
    memory.populate(0, bytes);
    Ok(())
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
    let size = MailboxSize { workers: 1, slots: 5 };
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

/// Whether `/dev/kvm` opens: most scenarios are about it.
pub(super) fn has_kvm() -> bool {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The machine, its load and what was asked for.
pub(super) fn conditions(args: &BenchArgs) -> Map<String, Value> {
    let uname = rustix::system::uname();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
    let loaded = |module: &str| std::path::Path::new("/sys/module").join(module).exists();
    let kvm = match () {
        () if !has_kvm() => "none",
        () if loaded("kvm_pvm") => "without hardware virtualization (PVM)",
        () => "with hardware virtualization",
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = read("/proc/meminfo").lines().find_map(kibibytes).unwrap_or(0) >> 20;
    let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let build = if cfg!(debug_assertions) { "debug: no figures worth keeping" } else { "release" };
    let runs =
        format!("{}{}", args.runs(), if args.smoke { ", smoke: no figures worth keeping" } else { "" });
    [
        ("date", jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string()),
        ("machine", format!("{cores} cores ({}), {memory} GiB", model.trim_start_matches(['\t', ' ', ':']))),
        ("kernel", format!("Linux {}", uname.release().to_string_lossy())),
        ("KVM", kvm.to_owned()),
        ("guest RAM", format!("{}, transparent huge pages {}", Backing::Anonymous.name(), huge.trim())),
        ("QEMU", first_line(super::qemu::BINARY).unwrap_or_else(|| "none".into())),
        ("libvirt", first_line(super::api::LIBVIRTD).unwrap_or_else(|| "none".into())),
        ("build", build.to_owned()),
        ("runs", runs),
        ("streams", args.streams().to_string()),
        ("load average before", load()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.into()))
    .collect()
}

/// What is known only when everything has run.
pub(super) fn after(conditions: &mut Map<String, Value>) {
    conditions.insert("load average after".into(), load().into());
}

fn load() -> String {
    read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn kibibytes(line: &str) -> Option<u64> {
    line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok()
}

/// What a program calls itself.
fn first_line(program: &str) -> Option<String> {
    let output = std::process::Command::new(program).arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}
