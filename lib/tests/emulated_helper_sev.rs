//! The helper in mirrors of encrypted guests on the software machine: pages leave one key and arrive under
//! another.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::collections::HashSet;
use std::sync::Arc;

use mirrorvm::addr::{PAGE_SIZE, RamAddr, RamPage};
use mirrorvm::address_space::{
    Confidentiality, MailboxSize, MirrorPlan, PlanRequest, Shift, SlotBacking, Strategy, plan,
};
use mirrorvm::guest::helper_block::secret_span;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::hypervisor::{Exit, Hypervisor, NoPorts, Slot, SlotId, UserEntry, Vcpu, Vm};
use mirrorvm::memory::{GuestRam, Mapping, View};
use mirrorvm::mirror::HelperImage;
use mirrorvm::sev::model::{AsidLimits, ModelPlatform};
use mirrorvm::sev::{Context, Policy};
use mirrorvm_abi::evidence::Release;
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::mailbox::{
    CQ_AT, CQ_HEAD, CQ_TAIL, Completion, DOORBELL_PORT, Doorbell, ENTRY_BYTES, Fatal, PAYLOAD_AT, SQ_AT,
    SQ_TAIL, Submission, entry_at, slot_at,
};
use mirrorvm_abi::op::{Begin, Greeting, Op, Scan, Status};
use mirrorvm_abi::{config, layout as abi};
use support::ordinary_begin;

const RAM: u64 = 4 << 20;

/// A mirror with one worker, driven by hand.
struct Hand {
    vcpu: Box<dyn Vcpu>,
    ram: GuestRam,
    mailbox: Arc<Mapping>,
    cursor: u32,
    // The owner of the context.
    guest: Box<dyn Vm>,
    _mirror: Box<dyn Vm>,
}

/// What goes wrong at the launch.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The helper's zeroed data is not encrypted with its image.
    DataLeftPlain,
    /// The page tables have no C-bit where there should be one.
    NoCBit,
    ConfigLeftPlain,
}

fn slots(vm: &mut dyn Vm, plan: &MirrorPlan, ram: &GuestRam, mailbox: &Arc<Mapping>) {
    for (slot, id) in plan.slots.iter().zip(0..) {
        let (memory, offset) = match slot.backing {
            SlotBacking::Mailbox => (mailbox, 0),
            SlotBacking::Private { .. } => panic!("not under this strategy"),
            SlotBacking::Ram { ram_addr } => ram.locate(ram_addr, slot.len).unwrap(),
        };
        let slot = Slot {
            gpa: slot.gpa.get(),
            len: slot.len,
            memory: Arc::clone(memory),
            offset,
            view: View::Guest,
            dirty_log: false,
            read_only: false,
        };
        vm.set_slot(SlotId(id), slot).unwrap();
    }
}

/// Loads and measures the helper with the guest. The guest's RAM is not: nobody has written it yet.
fn launch(sev: &dyn Context, plan: &MirrorPlan, ram: &GuestRam, fault: Fault) {
    let layout = ram.layout();
    let block = layout.helper().unwrap();
    let memory = ram.mapping(block).unwrap();
    let p = &plan.placement;
    let image = HelperImage::built_in();
    memory.write(0, image.bytes());
    let ranges = &plan.allowed;
    let fixed = config::Config {
        workers: 1,
        slots: plan.mailbox.slots,
        pages: ranges.last().unwrap().end() / PAGE_SIZE,
        ranges: ranges.len() as u32,
        protection: config::PROTECTION_MODELLED,
        policy: config::POLICY_NODBG,
        digests: if plan.has_digests() { ranges.last().unwrap().end() / PAGE_SIZE } else { 0 },
    };
    memory.write(p.config_at, &fixed.encode());
    for (r, i) in ranges.iter().zip(0u64..) {
        let range = config::Range { first: r.start() / PAGE_SIZE, count: r.pages() };
        memory.write(
            p.config_at + config::FIXED_BYTES as u64 + i * config::RANGE_BYTES as u64,
            &range.encode(),
        );
    }
    memory.write(p.secret_at, secret_span(&[42; 32], &Release::NOT_DEMANDED).as_slice());
    let mut tables = plan.tables.bytes();
    if fault == Fault::NoCBit {
        for entry in tables.as_chunks_mut::<8>().0 {
            *entry = (u64::from_le_bytes(*entry) & !plan.tables.c_bit()).to_le_bytes();
        }
    }
    memory.write(p.tables_at, &tables);
    let data_end = image.header().data_end - image.header().base;
    let spans = match fault {
        Fault::DataLeftPlain => {
            let end = image.header().footprint();
            vec![(0, data_end), (end, block.size - end)]
        }
        Fault::ConfigLeftPlain => {
            let end = p.config_at + PAGE_SIZE;
            vec![(0, p.config_at), (end, block.size - end)]
        }
        _ => vec![(0, block.size)],
    };
    for (at, len) in spans {
        sev.launch_update_data(memory, at, len).unwrap();
    }
}

impl Hand {
    fn new(host: &EmulatedHost, es: bool, fault: Fault) -> Self {
        Self::over(host, es, fault, support::ram(RAM))
    }

    fn over(host: &EmulatedHost, es: bool, fault: Fault, ram: GuestRam) -> Self {
        let image = HelperImage::built_in();
        let size = MailboxSize { workers: 1, slots: 1 };
        let strategy = Strategy::Shifted { shift: Shift::MaxPhys };
        let (layout, limits) = (ram.layout(), host.limits());
        let mut request = PlanRequest::new(&layout, image.header(), &limits, strategy, size);
        request.confidentiality = if es { Confidentiality::SevEs } else { Confidentiality::Sev };
        let plan = plan(&request).unwrap();
        let mailbox = Mapping::anonymous(size.bytes()).unwrap();

        let guest = host.create_vm().unwrap();
        let sev = guest.sev().unwrap();
        sev.init(es).unwrap();
        sev.launch_start(Policy(Policy::NODBG | if es { Policy::ES } else { 0 }), None).unwrap();
        launch(sev.as_ref(), &plan, &ram, fault);

        let mut mirror = host.create_vm().unwrap();
        slots(mirror.as_mut(), &plan, &ram, &mailbox);
        mirror.sev().unwrap().copy_from(&sev.copy_source()).unwrap();
        let mut vcpu = mirror.create_vcpu(0).unwrap();
        vcpu.enter_user_mode(&UserEntry {
            rip: image.header().entry,
            rsp: abi::WORKER_VA + abi::WORKER_BYTES - 8,
            rdi: 0,
            cr3: plan.tables.root().get() | plan.tables.c_bit(),
            tss: abi::TSS_VA,
        })
        .unwrap();
        if es {
            mirror.sev().unwrap().launch_update_vmsa().unwrap();
        }
        sev.launch_measure().unwrap();
        sev.launch_finish().unwrap();
        Self { vcpu, ram, mailbox, cursor: 0, guest, _mirror: mirror }
    }

    fn run(&mut self) -> Exit {
        self.vcpu.run(&mut NoPorts).unwrap()
    }

    /// A request with `pages` and `input` to its answer.
    fn ask(&mut self, op: Op, pages: &[u64], input: &[u8], count: u32, epoch: u32) -> (Completion, Vec<u8>) {
        let idle = Exit::PortWrite { port: DOORBELL_PORT, value: Doorbell::Idle as u32 };
        for (page, i) in pages.iter().zip(0..) {
            self.mailbox.write(slot_at(0) as u64 + i * 8, &page.to_le_bytes());
        }
        self.mailbox.write((slot_at(0) + PAYLOAD_AT) as u64, input);
        let id = u64::from(self.cursor) + 100;
        let request = Submission { id, op: op as u32, slot: 0, count, len: input.len() as u32, epoch };
        self.mailbox.write(entry_at(SQ_AT, self.cursor) as u64, &request.encode());
        let answer_at = entry_at(CQ_AT, self.cursor) as u64;
        self.cursor += 1;
        self.mailbox.store_u32(SQ_TAIL as u64, self.cursor);
        assert_eq!(self.run(), idle);
        assert_eq!(self.mailbox.load_u32(CQ_TAIL as u64), self.cursor, "one answer");
        let mut raw = [0; ENTRY_BYTES];
        self.mailbox.read(answer_at, &mut raw);
        let done = Completion::decode(&raw);
        assert_eq!(done.id, id);
        self.mailbox.store_u32(CQ_HEAD as u64, self.cursor);
        let mut output = vec![0; done.len as usize];
        self.mailbox.read((slot_at(0) + PAYLOAD_AT) as u64, &mut output);
        (done, output)
    }

    fn ok(&mut self, op: Op, pages: &[u64], input: &[u8], count: u32, epoch: u32) -> Vec<u8> {
        let (done, output) = self.ask(op, pages, input, count, epoch);
        assert_eq!(done.status, Status::Ok as u32, "{op:?}: {done:?}");
        output
    }

    /// A page as the guest sees it, through DBG-free means: a vCPU's key.
    fn plain(&self, page: u64) -> [u8; 4096] {
        // The model's contexts are not asked through the trait: the memory controller has the key.
        let sev = self.guest.sev().unwrap();
        let mirrorvm::sev::CopySource::Model(context) = sev.copy_source() else { panic!("a model") };
        let (memory, at) = self.ram.locate(RamAddr::new(page * PAGE_SIZE), PAGE_SIZE).unwrap();
        let mut bytes = [0; 4096];
        context.memory_key().unwrap().read(memory, at, &mut bytes);
        bytes
    }

    fn write_plain(&self, page: u64, bytes: &[u8; 4096]) {
        let sev = self.guest.sev().unwrap();
        let mirrorvm::sev::CopySource::Model(context) = sev.copy_source() else { panic!("a model") };
        let (memory, at) = self.ram.locate(RamAddr::new(page * PAGE_SIZE), PAGE_SIZE).unwrap();
        context.memory_key().unwrap().write(memory, at, bytes);
    }
}

fn content(page: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    mirrorvm_workload::Pattern::new(page, 5).fill_bytes(&mut bytes);
    bytes
}

fn carries(es: bool) {
    let host = |seed| EmulatedHost::new(ModelPlatform::seeded(seed, AsidLimits::default()));
    let (a, b) = (host(1), host(2));
    // The source's helper has room for digests, which its launch has encrypted and measured with it.
    let mut a = Hand::over(&a, es, Fault::None, support::scanning_ram(RAM));
    let mut b = Hand::new(&b, es, Fault::None);
    let pages: Vec<u64> = (0..RAM / PAGE_SIZE).collect();
    pages.iter().for_each(|p| a.write_plain(*p, &content(*p)));
    for hand in [&mut a, &mut b] {
        let idle = Exit::PortWrite { port: DOORBELL_PORT, value: Doorbell::Idle as u32 };
        assert_eq!(hand.run(), idle);
    }
    let hello =
        |hand: &mut Hand| Greeting::decode(hand.ok(Op::Hello, &[], &[], 0, 0).as_slice().try_into().unwrap());
    let (theirs, ours) = (hello(&mut b), hello(&mut a));
    let begin = Begin { digests: true, ..ordinary_begin(theirs) };
    a.ok(Op::Begin, &[], &begin.encode(), 0, 0);
    // Not `fresh`: encrypted memory that nobody wrote does not read as zero.
    b.ok(Op::Begin, &[], &Begin { source: false, peer: ours, ..begin }.encode(), 0, 0);
    for batch in pages.chunks(BATCH_MAX) {
        let sealed = a.ok(Op::Export, batch, &[], batch.len() as u32, 1);
        let canaries: HashSet<[u8; 16]> =
            batch.iter().flat_map(|p| content(*p).as_chunks::<16>().0.to_vec()).collect();
        assert!(!sealed.array_windows().any(|w| canaries.contains(w)), "plaintext in a record");
        b.ok(Op::Import, &[], &sealed, batch.len() as u32, 1);
    }
    let (mut raw, mut raw_b) = ([0; 4096], [0; 4096]);
    for p in pages {
        assert!(b.plain(p) == content(p), "page {p} differs");
        a.ram.read_page(RamPage::new(p), &mut raw).unwrap();
        b.ram.read_page(RamPage::new(p), &mut raw_b).unwrap();
        assert!(raw != raw_b && raw_b != content(p), "page {p}: ciphertext of another key");
    }
    let token = a.ok(Op::EndEpoch, &[], &[], 0, 0);
    b.ok(Op::EpochToken, &[], &token, 0, 0);
    // Digests are of what the guest sees. Changed, changed and changed back, and garbage that its host made.
    let scan = |a: &mut Hand| -> Vec<u64> {
        let all = Scan { first: 0, count: (RAM / PAGE_SIZE) as u32 };
        let map = a.ok(Op::Scan, &[], &all.encode(), 0, 2);
        (0..u64::from(all.count)).filter(|p| map[(p / 8) as usize] >> (p % 8) & 1 != 0).collect()
    };
    assert!(scan(&mut a).is_empty());
    a.write_plain(7, &content(8));
    a.write_plain(100, &content(9));
    assert_eq!(scan(&mut a), [7, 100]);
    a.write_plain(100, &content(100));
    a.ram.read_page(RamPage::new(200), &mut raw).unwrap();
    a.ram.write_page(RamPage::new(201), &raw).unwrap();
    assert_eq!(scan(&mut a), [7, 201]);
    let sealed = a.ok(Op::Export, &[7, 201], &[], 2, 2);
    b.ok(Op::Import, &[], &sealed, 2, 2);
    assert!(scan(&mut a).is_empty());
    for p in 0..RAM / PAGE_SIZE {
        assert!(a.plain(p) == b.plain(p), "page {p} differs after the second round");
    }
}

#[test]
fn pages_of_an_sev_guest_leave_one_key_and_arrive_under_another() {
    carries(false);
}

#[test]
fn pages_of_an_sev_es_guest_too_by_a_vcpu_that_was_measured_with_it() {
    carries(true);
}

#[test]
fn a_helper_that_was_launched_wrongly_does_not_start() {
    let host = EmulatedHost::new(ModelPlatform::seeded(1, AsidLimits::default()));
    let first = |fault| Hand::new(&host, false, fault).run();
    // The first worker clears the helper's data, so that garbage there does not matter.
    let idle = Exit::PortWrite { port: DOORBELL_PORT, value: Doorbell::Idle as u32 };
    assert_eq!(first(Fault::DataLeftPlain), idle);
    // Code and tables are private in any case; data is where the C-bit says.
    assert_eq!(first(Fault::NoCBit), Exit::Shutdown);
    let fatal = Doorbell::Fatal as u32 | (Fatal::BadConfig as u32) << 8;
    assert_eq!(first(Fault::ConfigLeftPlain), Exit::PortWrite { port: DOORBELL_PORT, value: fatal });
}

#[test]
fn a_mirror_vcpu_of_an_es_guest_is_late_after_the_launch() {
    let host = EmulatedHost::new(ModelPlatform::seeded(1, AsidLimits::default()));
    let hand = Hand::new(&host, true, Fault::None);
    let mut late = host.create_vm().unwrap();
    late.sev().unwrap().copy_from(&hand.guest.sev().unwrap().copy_source()).unwrap();
    let mut vcpu = late.create_vcpu(0).unwrap();
    vcpu.enter_user_mode(&UserEntry { rip: 0, rsp: 0, rdi: 0, cr3: 0, tss: 0 }).unwrap();
    assert!(late.sev().unwrap().launch_update_vmsa().is_err());
    assert_eq!(vcpu.run(&mut NoPorts).unwrap(), Exit::Unexpected { what: "KVM_EXIT_FAIL_ENTRY" });
}

#[test]
fn a_lost_slot_ends_the_worker_without_another_effect() {
    let host = EmulatedHost::new(ModelPlatform::seeded(1, AsidLimits::default()));
    let mut hand = Hand::new(&host, false, Fault::None);
    assert_eq!(hand.run(), Exit::PortWrite { port: DOORBELL_PORT, value: Doorbell::Idle as u32 });
    assert!(hand.vcpu.save().is_err(), "a helper's vCPU does not travel");
    hand.mailbox.store_u32(SQ_TAIL as u64, 1);
    // The mailbox is the highest or lowest slot, by strategy: take every slot away but the helper's own.
    let before: Vec<u8> = {
        let mut all = vec![0; 4 * 4096];
        hand.mailbox.read(0, &mut all);
        all
    };
    for id in 0..8 {
        let _ = hand._mirror.remove_slot(SlotId(id));
    }
    assert!(matches!(hand.run(), Exit::Shutdown | Exit::Mmio { .. }));
    let mut after = vec![0; 4 * 4096];
    hand.mailbox.read(0, &mut after);
    assert_eq!(before, after);
}
