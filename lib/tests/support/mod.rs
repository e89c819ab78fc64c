//! What tests of VMs share.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod hosts;

use std::sync::Arc;

use mirrorvm::addr::{Gpa, RamPage};
use mirrorvm::address_space::{
    BlockSpec, GuestLayout, HelperPlacement, MailboxSize, PlanRequest, Shift, Strategy, plan,
};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::{Backing, GuestRam};
use mirrorvm::mirror::{HelperImage, HelperSource, LaneError, Mirror};
use mirrorvm_abi::header::Header;
use mirrorvm_abi::op::{Begin, Greeting};
use mirrorvm_abi::record::Suite;

/// KVM, or a loud skip that is counted: the test runner fails when a host with /dev/kvm skipped.
pub fn kvm() -> Option<KvmHost> {
    match KvmHost::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            assert!(!std::path::Path::new("/dev/kvm").exists(), "/dev/kvm is there but: {error}");
            println!("SKIPPED (no /dev/kvm): this test ran nothing");
            None
        }
    }
}

/// RAM for one block of `bytes` at GPA 0, with a helper's block.
pub fn ram(bytes: u64) -> GuestRam {
    ram_sized(bytes, HelperPlacement::block_size)
}

/// The same with room for page digests: its helper can scan.
pub fn scanning_ram(bytes: u64) -> GuestRam {
    ram_sized(bytes, HelperPlacement::block_size_with_digests)
}

fn ram_sized(bytes: u64, size: fn(&Header, &GuestLayout) -> Option<u64>) -> GuestRam {
    let block = BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) };
    let bare = GuestLayout::assign(&[block]).unwrap();
    let size = size(HelperImage::built_in().header(), &bare).unwrap();
    GuestRam::allocate(Arc::new(bare.with_helper(size, true).unwrap()), Backing::Anonymous).unwrap()
}

/// A mirror over `ram`.
pub fn mirror(kvm: &dyn Hypervisor, ram: &GuestRam, workers: u32) -> Mirror {
    let image = HelperImage::built_in();
    let strategy = Strategy::Shifted { shift: Shift::FourGib };
    let size = MailboxSize { workers, slots: 4 };
    let limits = kvm.limits();
    let plan = plan(&PlanRequest::new(&ram.layout(), image.header(), &limits, strategy, size)).unwrap();
    let helper = HelperSource::Loaded { secret: &[42; 32] };
    Mirror::launch(kvm, "test", Arc::new(plan), workers, ram, &image, helper).unwrap()
}

/// Fills RAM with data that a seed decides.
pub fn random_fill(ram: &GuestRam, seed: u64) {
    let mut page = [0u64; 512];
    for block in ram.layout().ram() {
        let first = block.ram_addr.page().get();
        for p in first..first + block.size / 4096 {
            mirrorvm_workload::Pattern::new(p, seed).fill(&mut page);
            let bytes: Vec<u8> = page.iter().flat_map(|w| w.to_le_bytes()).collect();
            ram.write_page(RamPage::new(p), bytes.as_slice().try_into().unwrap()).unwrap();
        }
    }
}

/// What the helper of a source is told when an ordinary session with `peer` begins: one stream, and nothing
/// that may be left out. A test names what is different in its own, and the destination has the rest alike.
pub const fn ordinary_begin(peer: Greeting) -> Begin {
    Begin {
        source: true,
        elide_zero: false,
        fresh: false,
        digests: false,
        audit: false,
        suite: Suite::Aes256Gcm,
        streams: 1,
        session: [9; 16],
        transcript: [3; 32],
        peer,
    }
}

/// Two mirrors over memories of the same layout, with a host between them that carries records.
pub struct Pair {
    pub source: Mirror,
    pub destination: Mirror,
    pub source_ram: GuestRam,
    pub destination_ram: GuestRam,
}

impl Pair {
    pub fn new(kvm: &dyn Hypervisor, bytes: u64, workers: u32) -> Self {
        Self::over(kvm, ram(bytes), ram(bytes), workers)
    }

    /// Over memories of one layout.
    pub fn over(kvm: &dyn Hypervisor, source_ram: GuestRam, destination_ram: GuestRam, workers: u32) -> Self {
        Self {
            source: mirror(kvm, &source_ram, workers),
            destination: mirror(kvm, &destination_ram, workers),
            source_ram,
            destination_ram,
        }
    }

    pub fn begin(&mut self) {
        let (s, d) = (self.source.hello().unwrap(), self.destination.hello().unwrap());
        let streams = self.source.lanes().len() as u16;
        let base = Begin { elide_zero: true, digests: true, streams, ..ordinary_begin(d) };
        self.source.begin(&base).unwrap();
        self.destination.begin(&Begin { source: false, peer: s, fresh: true, ..base }).unwrap();
    }

    /// Seals pages on stream 0 and opens them.
    pub fn carry(&mut self, pages: &[RamPage], epoch: u32) -> Result<(), LaneError> {
        let sealed = self.export(pages, epoch)?;
        self.import(&sealed, pages.len() as u32, epoch)
    }

    pub fn export(&mut self, pages: &[RamPage], epoch: u32) -> Result<Vec<u8>, LaneError> {
        let lane = &mut self.source.lanes()[0];
        let slot = lane.acquire().unwrap();
        let pages: Vec<u64> = pages.iter().map(|p| p.get()).collect();
        lane.submit_export(slot, &pages, epoch);
        let done = lane.wait()?;
        let mut sealed = vec![0; done.len];
        lane.read_payload(done.slot, 0, &mut sealed);
        lane.release(done.slot);
        Ok(sealed)
    }

    pub fn import(&mut self, sealed: &[u8], count: u32, epoch: u32) -> Result<(), LaneError> {
        let lane = &mut self.destination.lanes()[0];
        let slot = lane.acquire().unwrap();
        lane.write_payload(slot, 0, sealed);
        lane.submit_import(slot, count, sealed.len() as u32, epoch);
        let done = lane.wait()?;
        lane.release(done.slot);
        Ok(())
    }
}
