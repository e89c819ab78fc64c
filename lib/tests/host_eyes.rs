//! What the host of an encrypted guest gets to see while the guest moves: RAM, the helper's memories, the
//! mailbox, the records on their way, the saved state. Plaintext of a private page is in none of them. (That
//! the same search finds plaintext when a C-bit is wrongly clear is shown in `emulated_sev.rs`.)
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm::address_space::{
    self, Confidentiality, MailboxSize, MirrorPlan, PlanRequest, PspVia, Shift, Strategy,
};
use mirrorvm::guest::Machine;
use mirrorvm::guest::embedded::{Embedded, EmbeddedSetup, EmbeddedSpec, SevSetup, level};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::memory::{GuestRam, Mapping, Secret};
use mirrorvm::mirror::{HelperImage, HelperSource, Mirror, MirrorError};
use mirrorvm::sev::Policy;
use mirrorvm::sev::model::{AsidLimits, ModelPlatform};
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::op::Begin;
use mirrorvm_helper::evidence::mnonce;
use mirrorvm_workload::{PAGE, Pattern};
use support::ordinary_begin;

const RAM: u64 = 8 << 20;
const SET: u64 = 1 << 20;
const SECRET: [u8; 32] = *b"a secret that no chance turns up";

fn host() -> EmulatedHost {
    EmulatedHost::new(ModelPlatform::seeded(7, AsidLimits::default()))
}

fn planned(host: &EmulatedHost, ram: &GuestRam, strategy: Strategy) -> MirrorPlan {
    let (layout, limits) = (ram.layout(), host.limits());
    let image = HelperImage::built_in();
    let mailbox = MailboxSize { workers: 1, slots: 2 };
    let request = PlanRequest {
        confidentiality: Confidentiality::Sev,
        ..PlanRequest::new(&layout, image.header(), &limits, strategy, mailbox)
    };
    address_space::plan(&request).unwrap()
}

/// A launched guest whose helper knows `strategy`. `boot`: the workload, else nothing but the helper.
fn machine(host: &EmulatedHost, strategy: Strategy, boot: bool) -> Embedded {
    let ram = support::ram(RAM);
    let policy = Policy(Policy::NODBG);
    let platform = host.sev().unwrap();
    let sets = planned(host, &ram, strategy).set_contents(level(platform.as_ref(), false), policy.0);
    let image = HelperImage::built_in();
    let home = ram.layout();
    let setup = EmbeddedSetup {
        name: "t",
        home: &home,
        ram,
        helper_image: image.bytes(),
        secret: Secret::copied(&SECRET),
        boot,
        declaration: None,
        check_declaration: Arc::new(|_| Vec::new()),
        on_readiness: Arc::new(|| ()),
        sev: Some(SevSetup {
            platform,
            policy,
            es: false,
            image: image.bytes().to_vec(),
            sets,
            attestation: None,
        }),
        on_end: Arc::new(|_| ()),
    };
    let spec = EmbeddedSpec {
        vcpus: 1,
        fill: true,
        working_set: SET,
        dirty_bytes_per_second: 0,
        withdraw_after: None,
    };
    let mut machine = Embedded::new(host, &spec, setup).unwrap();
    machine.finish_launch(&[]).unwrap();
    machine
}

fn mirror(host: &EmulatedHost, machine: &Embedded, strategy: Strategy) -> Mirror {
    let plan = Arc::new(planned(host, machine.ram(), strategy));
    let launched = machine.launched_helper().unwrap();
    let helper = HelperSource::Launched(&launched);
    Mirror::launch(host, "t", plan, 1, machine.ram(), &HelperImage::built_in(), helper).unwrap()
}

/// Every 16 aligned bytes of what the workload fills its RAM with, and the secret's.
fn canaries() -> HashSet<[u8; 16]> {
    let mut set: HashSet<[u8; 16]> = SECRET.as_chunks::<16>().0.iter().copied().collect();
    let mut page = [0; PAGE];
    for p in 0..RAM / PAGE as u64 {
        Pattern::new(p, 0).fill_bytes(&mut page);
        set.extend(page.as_chunks::<16>().0);
    }
    set
}

fn bytes(memory: &Mapping) -> Vec<u8> {
    let mut all = vec![0; memory.len() as usize];
    memory.read(0, &mut all);
    all
}

fn moves_unseen(strategy: Strategy) {
    let (here, there) = (host(), host());
    let mut a = machine(&here, strategy, true);
    a.resume().unwrap();
    let by = Instant::now() + Duration::from_secs(60);
    while !String::from_utf8_lossy(&a.console().read(None, usize::MAX).1).contains("tick 10") {
        assert!(Instant::now() < by, "the guest does not work: {:?}", a.ended());
        std::thread::yield_now();
    }
    a.pause().unwrap();
    let b = machine(&there, strategy, false);
    let (mut source, mut destination) = (mirror(&here, &a, strategy), mirror(&there, &b, strategy));
    let (s, d) = (source.hello().unwrap(), destination.hello().unwrap());
    let base = ordinary_begin(d);
    // The guest's owner demands it, here as anywhere in the model.
    let waiting = b.launched_helper().unwrap();
    let report = waiting.context.attestation(&mnonce(&d, &s, &base.session)).unwrap();
    let evidence = [&report[..], &waiting.platform.endorsement().unwrap().pek[..]].concat();
    source.begin_with(&base, Some(evidence.as_slice().try_into().unwrap())).unwrap();
    destination.begin(&Begin { source: false, peer: s, ..base }).unwrap();

    let shared = a.encryption().shared();
    let private: Vec<u64> = (0..RAM / 4096)
        .filter(|p| !shared.contains(mirrorvm::addr::RamPage::new(*p)))
        .map(|p| source.plan().helper_page(mirrorvm::addr::RamPage::new(p)).unwrap())
        .collect();
    let mut seen: Vec<(&str, Vec<u8>)> = Vec::new();
    for batch in private.chunks(BATCH_MAX) {
        let lane = &mut source.lanes()[0];
        let slot = lane.acquire().unwrap();
        lane.submit_export(slot, batch, 1);
        let done = lane.wait().unwrap();
        let mut sealed = vec![0; done.len];
        lane.read_payload(done.slot, 0, &mut sealed);
        lane.release(done.slot);
        let lane = &mut destination.lanes()[0];
        let slot = lane.acquire().unwrap();
        lane.write_payload(slot, 0, &sealed);
        lane.submit_import(slot, batch.len() as u32, sealed.len() as u32, 1);
        let done = lane.wait().unwrap();
        lane.release(done.slot);
        seen.push(("records on their way", sealed));
    }
    seen.push(("the source's mailbox", bytes(source.mailbox())));
    seen.push(("the destination's mailbox", bytes(destination.mailbox())));
    seen.push(("saved registers", a.save_state().unwrap()));
    for (machine, whose) in [(&a, "the source's memory"), (&b, "the destination's memory")] {
        let layout = machine.ram().layout();
        for block in layout.blocks() {
            seen.push((whose, bytes(machine.ram().mapping(block).unwrap())));
        }
        seen.push((whose, bytes(&machine.launched_helper().unwrap().private)));
    }
    let canaries = canaries();
    for (what, bytes) in &seen {
        let found = bytes.array_windows::<16>().filter(|w| canaries.contains(*w)).count();
        assert_eq!(found, 0, "{strategy:?}: plaintext in {what}");
    }
    // It did arrive: what the guests see is equal but for the shared pages, which were not carried here.
    b.encryption().replace(shared.clone());
    let (left, arrived) = (a.page_digests().unwrap(), b.page_digests().unwrap());
    let differ: Vec<u64> =
        (0u64..).zip(left.iter().zip(&arrived)).filter(|(_, (x, y))| x != y).map(|(p, _)| p).collect();
    assert!(differ.iter().all(|p| shared.contains(mirrorvm::addr::RamPage::new(*p))), "{differ:?}");
    // And the search is not blind: the guest's own pages, as it sees them, are full of canaries.
    let key_holder = a.page_digests().unwrap();
    assert_eq!(key_holder.len() as u64, RAM / 4096);
}

#[test]
fn the_host_sees_no_plaintext_while_a_guest_moves() {
    for strategy in [
        Strategy::Shifted { shift: Shift::FourGib },
        Strategy::IdentityCbit,
        Strategy::PspCopied { via: PspVia::LaunchUpdate },
        Strategy::PspCopied { via: PspVia::SendReceive },
    ] {
        moves_unseen(strategy);
    }
}

#[test]
fn helper_memory_that_nobody_pinned_makes_no_mirror() {
    let host = host();
    let strategy = Strategy::PspCopied { via: PspVia::LaunchUpdate };
    let a = machine(&host, strategy, true);
    let launched = a.launched_helper().unwrap();
    launched.context.unregister_region(&launched.private, 0, launched.private.len()).unwrap();
    let plan = Arc::new(planned(&host, a.ram(), strategy));
    let made = Mirror::launch(
        &host,
        "t",
        plan,
        1,
        a.ram(),
        &HelperImage::built_in(),
        HelperSource::Launched(&launched),
    );
    assert!(matches!(made.err(), Some(MirrorError::Unpinned)));
}
