//! The engine by itself, as another VMM embeds it: a guest of a machine that is none of this crate's moves
//! between two engines. There is no host here, no database, no driver of ours, and the guest's RAM, its vCPU
//! (a thread) and its dirty log are this file's.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mirrorvm::addr::{PAGE_SIZE, RamPage};
use mirrorvm::guest::{
    Console, EncryptionStatus, EndWatch, Labels, Machine, MachineError, MigrationControl, ProtectionLevel,
};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::memory::GuestRam;
use mirrorvm::migration::wire::{Prepare, Purpose, Refused};
use mirrorvm::migration::{
    Arrival, Arrived, Audit, AuditMode, AuditState, Control, Departure, Held, Journal, Kept, MigrationFault,
    MigrationLimits, MigrationMode, MigrationState, NotRun, NotStored, Outgoing, PastPointOfNoReturn,
    Receiver, Sequel, SourceEnd, Spoken, StreamTransport, Suite, Terms, accept_hello, run_source,
    serve_import,
};
use mirrorvm::mirror::{HelperImage, LaneError, Mirror, SealedToken};
use mirrorvm::pages::PageSet;
use mirrorvm::transport::{Endpoint, Identity, Link, ListenerLimits, PeerIdentity, PeerListener};
use mirrorvm_abi::op::Status;
use support::{mirror, ram, random_fill, scanning_ram};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const RAM_BYTES: u64 = 16 << 20;
const DEFINITION: &str = r#"a "definition" in words of its own: {colour: red}"#;

/// A guest whose one vCPU is a thread: it counts, and writes each count to a page of its RAM.
struct Clockwork {
    ram: GuestRam,
    console: Arc<Console>,
    encryption: Arc<EncryptionStatus>,
    control: Arc<MigrationControl>,
    shared: Arc<Shared>,
    vcpu: Option<JoinHandle<()>>,
    /// A page that changes when the state is saved, without a word in the log.
    loses: Option<RamPage>,
    /// On its way out.
    goes: Hook,
}

#[derive(Default)]
struct Shared {
    held: AtomicBool,
    count: AtomicU64,
    /// Pages written since the last look; `None` while nobody wants to know.
    dirty: Mutex<Option<PageSet>>,
}

impl Clockwork {
    fn new(ram: GuestRam) -> Self {
        let (console, encryption) = (Arc::default(), Arc::default());
        let control = Arc::new(MigrationControl::new(false));
        Self {
            ram,
            console,
            encryption,
            control,
            shared: Arc::default(),
            vcpu: None,
            loses: None,
            goes: Mutex::default(),
        }
    }

    fn count(&self) -> u64 {
        self.shared.count.load(Ordering::SeqCst)
    }

    /// Waits until the guest has counted to `count`. The deadline only bounds a failure.
    fn until(&self, count: u64) {
        let by = Instant::now() + Duration::from_secs(60);
        while self.count() < count {
            assert!(Instant::now() < by, "the guest does not count");
            std::thread::yield_now();
        }
    }

    /// What its page of a count holds.
    fn page(count: u64) -> (RamPage, [u8; 4096]) {
        let mut content = [0; 4096];
        content.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&count.to_le_bytes()));
        // The upper half of RAM is never written.
        (RamPage::new(count % (RAM_BYTES / PAGE_SIZE / 2)), content)
    }
}

impl Machine for Clockwork {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn console(&self) -> &Arc<Console> {
        &self.console
    }

    fn encryption(&self) -> &Arc<EncryptionStatus> {
        &self.encryption
    }

    fn migration_control(&self) -> &Arc<MigrationControl> {
        &self.control
    }

    fn migration_secret(&self) -> &[u8; 32] {
        // What the mirrors of `support` are made with.
        &[42; 32]
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.vcpu.is_some() {
            return Ok(());
        }
        let (ram, shared) = (self.ram.clone(), Arc::clone(&self.shared));
        shared.held.store(false, Ordering::SeqCst);
        let vcpu = move || {
            while !shared.held.load(Ordering::SeqCst) {
                let count = shared.count.load(Ordering::SeqCst) + 1;
                let (page, content) = Self::page(count);
                ram.write_page(page, &content).unwrap();
                // After the write: a page that is taken off the log is complete.
                if let Some(dirty) = &mut *shared.dirty.lock().unwrap() {
                    dirty.insert(page);
                }
                shared.count.store(count, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(300));
            }
        };
        self.vcpu = Some(std::thread::spawn(vcpu));
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.shared.held.store(true, Ordering::SeqCst);
        self.vcpu.take().map_or(Ok(()), |vcpu| {
            vcpu.join().unwrap();
            Ok(())
        })
    }

    fn can_log_dirty(&self) -> bool {
        true
    }

    fn log_dirty(&mut self, on: bool) -> Result<(), MachineError> {
        *self.shared.dirty.lock().unwrap() = on.then(PageSet::new);
        Ok(())
    }

    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), MachineError> {
        if let Some(log) = &mut *self.shared.dirty.lock().unwrap() {
            for page in std::mem::take(log).iter() {
                dirty.insert(page);
            }
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        if let Some(page) = self.loses {
            self.ram.write_page(page, &[0x1e; 4096]).unwrap();
        }
        Ok(self.count().to_le_bytes().to_vec())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.shared.count.store(u64::from_le_bytes(state.try_into().unwrap()), Ordering::SeqCst);
        Ok(())
    }

    fn end_watch(&self) -> EndWatch {
        EndWatch::new(|| None)
    }
}

impl Drop for Clockwork {
    fn drop(&mut self) {
        let _ = self.pause();
        take(&self.goes);
    }
}

/// Something that is done once, at a turn of a migration.
type Hook = Mutex<Option<Box<dyn FnOnce() + Send>>>;

fn take(hook: &Hook) {
    if let Some(hook) = hook.lock().unwrap().take() {
        hook();
    }
}

/// The notes of a source that never stops: in memory.
#[derive(Default)]
struct Notes {
    start_sent: AtomicBool,
    /// When START is noted and not minted yet.
    before_start: Hook,
}

impl Journal for Notes {
    fn held(&self) {}

    fn runs_on(&self) {}

    fn start_sent(&self) -> Result<(), Failure> {
        self.start_sent.store(true, Ordering::SeqCst);
        take(&self.before_start);
        Ok(())
    }

    fn last_labels(&self) -> Result<Labels, Failure> {
        Ok(Labels::from([("shelf".to_owned(), "3".to_owned())]))
    }
}

/// A destination: it takes one kind of guest, once.
struct Place {
    identity: Identity,
    hypervisor: Arc<dyn Hypervisor>,
    /// Whether its guests have room for digests.
    digests: bool,
    peer: Mutex<HashMap<Uuid, mpsc::SyncSender<(u16, Link)>>>,
    arrived: mpsc::SyncSender<Box<dyn Machine>>,
    count: Mutex<Option<Arc<Shared>>>,
    labels: Mutex<Labels>,
    committed: AtomicBool,
    /// When START has arrived and COMMIT has not left.
    before_commit: Hook,
    /// Whether the host goes then: COMMIT is minted and never leaves.
    goes: AtomicBool,
    minted: Mutex<Option<SealedToken>>,
    /// Why it gives up every audit at once.
    gives_up: Option<NotRun>,
    audited: mpsc::SyncSender<Audit>,
    /// Why an import was given up, for a test that expects it.
    aborted: Mutex<Option<mpsc::SyncSender<String>>>,
}

impl Place {
    fn serve(self: &Arc<Self>, mut link: Link) {
        let (purpose, agreed) = accept_hello(&mut link, &self.identity, "there").unwrap();
        match purpose {
            Purpose::Migrate {} => serve_import(Spoken { link, agreed }, "here", self.as_ref()),
            Purpose::Stream { session, index } => {
                self.peer.lock().unwrap()[&session].send((index, link)).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
}

impl Receiver for Place {
    fn admit(&self, prepare: &Prepare, peer: &str) -> Result<Arrival, Refused> {
        if prepare.definition != DEFINITION {
            return Err(Refused { code: "colour".to_owned().into(), detail: "only red ones".into() });
        }
        assert_eq!(peer, "here");
        let ram = if self.digests { scanning_ram(RAM_BYTES) } else { ram(RAM_BYTES) };
        assert_eq!(*ram.layout(), prepare.layout);
        let machine = Clockwork::new(ram);
        let mirror = mirror(self.hypervisor.as_ref(), &machine.ram, u32::from(prepare.streams));
        *self.count.lock().unwrap() = Some(Arc::clone(&machine.shared));
        let (sender, streams) = mpsc::sync_channel(usize::from(prepare.streams));
        self.peer.lock().unwrap().insert(prepare.session, sender);
        let control = Control::new(MigrationState::Preparing, MigrationLimits::default(), Box::new(|| ()));
        Ok(Arrival { machine: Box::new(machine), fresh: true, mirror, control: Arc::new(control), streams })
    }

    fn labels(&self, _: Uuid, labels: Labels) -> Result<(), Failure> {
        *self.labels.lock().unwrap() = labels;
        Ok(())
    }

    fn commit(&self, _: Uuid, token: &SealedToken, paused: bool) -> Result<(), NotStored> {
        assert!(!paused);
        take(&self.before_commit);
        *self.minted.lock().unwrap() = Some(*token);
        if self.goes.load(Ordering::SeqCst) {
            return Err(NotStored::Ever);
        }
        let counted = self.count.lock().unwrap().as_ref().unwrap().count.load(Ordering::SeqCst);
        self.committed.store(counted > 0, Ordering::SeqCst);
        Ok(())
    }

    fn arrived(&self, _: Uuid, arrived: Arrived) {
        assert!(arrived.fault.is_none() && self.committed.load(Ordering::SeqCst));
        if let (Some(why), Some(held)) = (self.gives_up, &arrived.audit) {
            assert!(held.give_up(why).is_some(), "nobody else has it");
        }
        self.arrived.send(arrived.machine).unwrap();
    }

    fn audited(&self, _: Uuid, _: Uuid, audit: Audit, held: &Arc<Held>) {
        assert_eq!(held.give_up(NotRun::PeerLost).is_none(), self.gives_up.is_some());
        self.audited.send(audit).unwrap();
    }

    fn aborted(&self, _: Uuid, _: Option<&SealedToken>, fault: &MigrationFault) {
        match self.aborted.lock().unwrap().take() {
            Some(told) => told.send(fault.code().as_str().to_owned()).unwrap(),
            None => panic!("given up: {fault}"),
        }
    }
}

struct Engines {
    place: Arc<Place>,
    arrivals: mpsc::Receiver<Box<dyn Machine>>,
    audits: mpsc::Receiver<Audit>,
    listener: PeerListener,
    us: Identity,
    there: PeerIdentity,
    hypervisor: Arc<dyn Hypervisor>,
    _keys: tempfile::TempDir,
}

fn engines(hypervisor: Arc<dyn Hypervisor>) -> Engines {
    engines_that(hypervisor, true, None)
}

fn engines_that(hypervisor: Arc<dyn Hypervisor>, digests: bool, gives_up: Option<NotRun>) -> Engines {
    let keys = tempfile::tempdir().unwrap();
    let identity = |name: &str| Identity::load_or_create(&keys.path().join(name)).unwrap();
    let (us, them) = (identity("us"), identity("them"));
    let (arrived, arrivals) = mpsc::sync_channel(1);
    let (audited, audits) = mpsc::sync_channel(1);
    let place = Arc::new(Place {
        identity: them.clone(),
        hypervisor: Arc::clone(&hypervisor),
        digests,
        peer: Mutex::default(),
        arrived,
        count: Mutex::default(),
        labels: Mutex::default(),
        committed: AtomicBool::new(false),
        before_commit: Hook::default(),
        goes: AtomicBool::new(false),
        minted: Mutex::default(),
        gives_up,
        audited,
        aborted: Mutex::default(),
    });
    let (pin, serving) = (*us.pin(), Arc::clone(&place));
    let listener = PeerListener::bind(
        "127.0.0.1:0".parse().unwrap(),
        &them,
        Arc::new(move |peer| *peer == pin),
        ListenerLimits::default(),
        Arc::new(move |link| serving.serve(link)),
    )
    .unwrap();
    Engines { place, arrivals, audits, listener, us, there: *them.pin(), hypervisor, _keys: keys }
}

impl Engines {
    fn depart(&self, machine: &mut Clockwork, definition: &str) -> (SourceEnd, Notes) {
        let mut mirror = mirror(self.hypervisor.as_ref(), &machine.ram, 2);
        let notes = Notes::default();
        let control = Control::new(MigrationState::Queued, MigrationLimits::default(), Box::new(|| ()));
        let how = (Suite::Aes256GcmSiv, AuditMode::Never);
        (self.depart_with(machine, &mut mirror, definition, how, (&control, &notes)), notes)
    }

    fn depart_with(
        &self,
        machine: &mut Clockwork,
        mirror: &mut Mirror,
        definition: &str,
        (suite, audit): (Suite, AuditMode),
        (control, notes): (&Control, &Notes),
    ) -> SourceEnd {
        let layout = machine.ram.layout();
        let out = Outgoing {
            helper_measurement: HelperImage::built_in().measurement(),
            id: Uuid::now_v7(),
            departure: Departure {
                guest: Uuid::now_v7(),
                definition,
                layout: &layout,
                protection: ProtectionLevel::None,
            },
            terms: Terms {
                mode: MigrationMode::Precopy,
                streams: 2,
                stream_transport: StreamTransport::Sealed,
                suite,
                verify: false,
                audit,
            },
            peer: (Endpoint::from(self.listener.local_addr()), self.there),
            identity: &self.us,
            host: "here",
            control,
            journal: notes,
        };
        run_source(&out, machine, mirror, true)
    }
}

/// Every page of two memories.
fn compare(a: &GuestRam, b: &GuestRam) {
    let (mut here, mut there) = ([0; 4096], [0; 4096]);
    for page in (0..RAM_BYTES / PAGE_SIZE).map(RamPage::new) {
        a.read_page(page, &mut here).unwrap();
        b.read_page(page, &mut there).unwrap();
        assert!(here == there, "page {}", page.get());
    }
}

fn running() -> Clockwork {
    let mut machine = Clockwork::new(scanning_ram(RAM_BYTES));
    random_fill(&machine.ram, 7);
    machine.resume().unwrap();
    machine.until(100);
    machine
}

fn moves(hypervisor: Arc<dyn Hypervisor>) {
    let engines = engines(hypervisor);
    let mut here = running();
    let (end, notes) = engines.depart(&mut here, DEFINITION);
    assert!(matches!(end, SourceEnd::Succeeded { .. }), "{end:?}");
    assert!(notes.start_sent.load(Ordering::SeqCst));
    let mut there = engines.arrivals.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(engines.place.labels.lock().unwrap()["shelf"], "3");
    // It counts on from where it was held.
    let shared = engines.place.count.lock().unwrap().clone().unwrap();
    let left = here.count();
    let by = Instant::now() + Duration::from_secs(60);
    while shared.count.load(Ordering::SeqCst) < left + 50 {
        assert!(Instant::now() < by, "the guest does not count on");
        std::thread::yield_now();
    }
    there.pause().unwrap();
    // What it did there, done here, too, must come to the same memory.
    for count in left + 1..=shared.count.load(Ordering::SeqCst) {
        let (page, content) = Clockwork::page(count);
        here.ram.write_page(page, &content).unwrap();
    }
    compare(&here.ram, there.ram());
    engines.listener.shutdown();
}

#[test]
fn a_guest_of_another_vmm_moves_without_a_host_and_without_a_database() {
    moves(Arc::new(EmulatedHost::without_sev()));
}

#[test]
fn a_guest_of_another_vmm_moves_through_mirrors_on_kvm() {
    let Some(kvm) = support::kvm() else { return };
    moves(Arc::new(kvm));
}

#[test]
fn a_guest_that_nobody_takes_goes_on_where_it_was() {
    let engines = engines(Arc::new(EmulatedHost::without_sev()));
    let mut here = running();
    let (end, notes) = engines.depart(&mut here, "a blue one");
    let SourceEnd::NotMoved { fault, resumed: true } = end else { panic!("{end:?}") };
    assert_eq!(
        (fault.code().as_str(), fault.to_string()),
        ("colour", "the peer refuses: only red ones".into())
    );
    assert!(!notes.start_sent.load(Ordering::SeqCst));
    here.until(here.count() + 50);
    engines.listener.shutdown();
}

/// A source whose helper's memory is put back to what it was before START, when START has left.
struct PutBack {
    engines: Engines,
    here: Clockwork,
    mirror: Mirror,
    control: Arc<Control>,
    end: SourceEnd,
    cancelled: Option<Result<(), PastPointOfNoReturn>>,
}

/// `goes`: the destination goes before its COMMIT has left.
fn put_back_after_start(goes: bool) -> PutBack {
    let engines = engines(Arc::new(EmulatedHost::without_sev()));
    engines.place.goes.store(goes, Ordering::SeqCst);
    let source = Arc::new(EmulatedHost::without_sev());
    let mut here = running();
    let mut mirror = mirror(source.as_ref(), &here.ram, 2);
    let control = Control::new(MigrationState::Queued, MigrationLimits::default(), Box::new(|| ()));
    let control = Arc::new(control);
    let notes = Notes::default();
    let copies = Arc::new(Mutex::new(None));
    let (host, keep) = (Arc::clone(&source), Arc::clone(&copies));
    *notes.before_start.lock().unwrap() =
        Some(Box::new(move || *keep.lock().unwrap() = Some(host.copy_helpers())));
    let cancelled = Arc::new(Mutex::new(None));
    let (wish, asked) = (Arc::clone(&control), Arc::clone(&cancelled));
    *engines.place.before_commit.lock().unwrap() = Some(Box::new(move || {
        source.put_helpers_back(copies.lock().unwrap().as_ref().unwrap());
        *asked.lock().unwrap() = Some(wish.cancel());
    }));
    let how = (Suite::Aes256Gcm, AuditMode::Never);
    let end = engines.depart_with(&mut here, &mut mirror, DEFINITION, how, (&control, &notes));
    assert!(notes.start_sent.load(Ordering::SeqCst));
    let cancelled = *cancelled.lock().unwrap();
    PutBack { engines, here, mirror, control, end, cancelled }
}

#[test]
fn a_source_whose_helper_was_put_back_to_before_start_goes_by_the_destinations_token() {
    let went = put_back_after_start(false);
    assert_eq!(went.cancelled, Some(Err(PastPointOfNoReturn)), "START was noted before it was minted");
    // The helper did not know of START any more, and took COMMIT all the same.
    assert!(matches!(went.end, SourceEnd::Succeeded { .. }), "{:?}", went.end);
    assert!(went.here.vcpu.is_none(), "the guest is the destination's");
    let mut mirror = went.mirror;
    let refused = |answer: Result<(), LaneError>| {
        matches!(answer, Err(LaneError::Refused { status: Status::WrongState, .. }))
    };
    assert!(refused(mirror.cancel()) && refused(mirror.paused()), "it is done");
    drop(went.engines.arrivals.recv_timeout(Duration::from_secs(60)).unwrap());
    went.engines.listener.shutdown();
}

#[test]
fn a_source_whose_helper_was_put_back_and_that_hears_nothing_is_in_doubt_until_the_token_comes() {
    let went = put_back_after_start(true);
    assert_eq!(went.cancelled, Some(Err(PastPointOfNoReturn)));
    assert!(matches!(went.end, SourceEnd::InDoubt { .. }), "{:?}", went.end);
    assert_eq!(went.control.cancel(), Err(PastPointOfNoReturn), "nor is it called off later");
    assert!(went.here.vcpu.is_none(), "the guest is held");
    let minted = went.engines.place.minted.lock().unwrap().unwrap();
    let mut mirror = went.mirror;
    // Made up by the source's own host: the helper stays where it is.
    for bit in [0, 8 * 60, 8 * 159 + 7] {
        let mut forged = minted;
        forged[bit / 8] ^= 1 << (bit % 8);
        let unsealed = |answer: Result<(), LaneError>| {
            matches!(answer, Err(LaneError::Refused { status: Status::Unsealed, .. }))
        };
        assert!(unsealed(mirror.check_commit(&forged)) && unsealed(mirror.check_abort(&forged)), "{bit}");
    }
    mirror.check_commit(&minted).expect("the destination's token decides");
    let late = mirror.cancel();
    assert!(matches!(late, Err(LaneError::Refused { status: Status::WrongState, .. })), "{late:?}");
    went.engines.listener.shutdown();
}

/// What an audit leaves: the source's word of it, and the destination's, if it had one.
struct Audited {
    engines: Engines,
    here: Clockwork,
    control: Control,
    end: Option<Audit>,
}

/// A guest that moves, and its audit; `gives_up` at the source.
fn audited(engines: Engines, mut here: Clockwork, gives_up: Option<NotRun>, timeout_ms: u64) -> Audited {
    let mirror_of = mirror(engines.hypervisor.as_ref(), &here.ram, 2);
    let limits = MigrationLimits { audit_timeout_ms: timeout_ms, ..MigrationLimits::default() };
    let control = Control::new(MigrationState::Queued, limits, Box::new(|| ()));
    let (mut mirror, notes) = (mirror_of, Notes::default());
    let how = (Suite::Aes256Gcm, AuditMode::After);
    let end = engines.depart_with(&mut here, &mut mirror, DEFINITION, how, (&control, &notes));
    let SourceEnd::Succeeded { sequel, .. } = end else { panic!("{end:?}") };
    let held = Held::new(Kept { machine: None, mirror }, 0);
    if let Some(why) = gives_up {
        drop(held.give_up(why).expect("nobody else has it"));
    }
    let end = sequel.audit(&held, &PageSet::new(), &control);
    drop(engines.arrivals.recv_timeout(Duration::from_secs(60)).unwrap());
    Audited { engines, here, control, end }
}

impl Audited {
    /// What the destination says, and what both must say.
    fn both(self, expected: &AuditState) {
        assert_eq!(self.control.live().audit.map(|a| a.state), Some(AuditState::Pending), "at COMMIT");
        let there = self.engines.audits.recv_timeout(Duration::from_secs(60)).unwrap();
        let here = self.end.expect("the source's word");
        assert_eq!((&here.state, &there.state), (expected, expected));
        if matches!(expected, AuditState::Proven | AuditState::Mismatch { .. }) {
            let pages = RAM_BYTES / PAGE_SIZE;
            assert_eq!((here.compared_pages, there.compared_pages), (pages, pages));
        }
        assert!(self.here.vcpu.is_none(), "whatever was found, the guest is the destination's");
        self.engines.listener.shutdown();
    }
}

const LOST: RamPage = RamPage::new(3000);

fn audits_find_a_lost_page_and_nothing_else(hypervisor: &Arc<dyn Hypervisor>) {
    let engines = || engines(Arc::clone(hypervisor));
    audited(engines(), running(), None, 60_000).both(&AuditState::Proven);
    let mut here = running();
    here.loses = Some(LOST);
    let found = AuditState::Mismatch { pages: 1, first: vec![LOST.get()] };
    audited(engines(), here, None, 60_000).both(&found);
}

#[test]
fn a_write_that_the_dirty_log_lost_is_found_by_the_audit_and_named() {
    audits_find_a_lost_page_and_nothing_else(&(Arc::new(EmulatedHost::without_sev()) as Arc<dyn Hypervisor>));
}

#[test]
fn a_write_that_the_dirty_log_lost_is_found_through_mirrors_on_kvm() {
    let Some(kvm) = support::kvm() else { return };
    audits_find_a_lost_page_and_nothing_else(&(Arc::new(kvm) as Arc<dyn Hypervisor>));
}

#[test]
fn an_audit_that_either_end_gives_up_ends_for_both_with_its_reason() {
    let hypervisor = || Arc::new(EmulatedHost::without_sev());
    for why in [NotRun::MirrorNeeded, NotRun::GuestStopped] {
        let engines = engines_that(hypervisor(), true, Some(why));
        audited(engines, running(), None, 60_000).both(&AuditState::NotRun { why });
    }
    let why = NotRun::MemoryNeeded;
    audited(engines(hypervisor()), running(), Some(why), 60_000).both(&AuditState::NotRun { why });
}

/// Whoever looks for memory may come when an audit has just ended and its machine is on its way out.
#[test]
fn whoever_needs_what_an_audit_keeps_waits_until_it_is_free_whoever_frees_it() {
    let here = Clockwork::new(support::ram(RAM_BYTES));
    let mirror = mirror(&EmulatedHost::without_sev(), &here.ram, 2);
    let (bytes, (going, goes), (go, may)) =
        (here.ram.layout().ram_bytes(), mpsc::channel(), mpsc::channel::<()>());
    let freed = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&freed);
    *here.goes.lock().unwrap() = Some(Box::new(move || {
        going.send(()).unwrap();
        may.recv().unwrap();
        noted.store(true, Ordering::SeqCst);
    }));
    let held = Held::new(Kept { machine: Some(Box::new(here)), mirror }, bytes);
    assert_eq!(held.bytes(), bytes);
    std::thread::scope(|scope| {
        scope.spawn(|| held.free(NotRun::PeerLost));
        goes.recv().unwrap();
        assert_eq!(held.bytes(), bytes, "it is not free yet");
        let (told, done) = mpsc::channel();
        let (held, freed) = (&held, &freed);
        scope.spawn(move || {
            held.free(NotRun::MemoryNeeded);
            told.send(freed.load(Ordering::SeqCst)).unwrap();
        });
        // Who does not wait is done by now, mostly.
        let early = done.recv_timeout(Duration::from_millis(200));
        go.send(()).unwrap();
        assert!(early.or_else(|_| done.recv()).unwrap(), "it went on before there was room");
    });
    assert_eq!(held.bytes(), 0);
}

#[test]
fn an_audit_has_a_limit_of_time() {
    let engines = engines(Arc::new(EmulatedHost::without_sev()));
    let audited = audited(engines, running(), None, 0);
    audited.both(&AuditState::NotRun { why: NotRun::Timeout });
}

#[test]
fn an_audit_whose_source_goes_comes_to_no_verdict() {
    let engines = engines(Arc::new(EmulatedHost::without_sev()));
    let mut here = running();
    let mut mirror = mirror(engines.hypervisor.as_ref(), &here.ram, 2);
    let control = Control::new(MigrationState::Queued, MigrationLimits::default(), Box::new(|| ()));
    let how = (Suite::Aes256Gcm, AuditMode::After);
    let notes = Notes::default();
    let end = engines.depart_with(&mut here, &mut mirror, DEFINITION, how, (&control, &notes));
    assert!(matches!(end, SourceEnd::Succeeded { .. }));
    // With its link.
    drop(end);
    let there = engines.audits.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(there.state, AuditState::NotRun { why: NotRun::PeerLost });
    drop(engines.arrivals.recv_timeout(Duration::from_secs(60)).unwrap());
    engines.listener.shutdown();
}

#[test]
fn before_commit_a_lost_page_keeps_the_guest_where_it_is() {
    let depart = |here: &mut Clockwork, timeout_ms| {
        let engines = engines(Arc::new(EmulatedHost::without_sev()));
        let (told, aborted) = mpsc::sync_channel(1);
        *engines.place.aborted.lock().unwrap() = Some(told);
        let mut mirror = mirror(engines.hypervisor.as_ref(), &here.ram, 2);
        let limits = MigrationLimits { audit_timeout_ms: timeout_ms, ..MigrationLimits::default() };
        let control = Control::new(MigrationState::Queued, limits, Box::new(|| ()));
        let how = (Suite::Aes256Gcm, AuditMode::BeforeCommit);
        let notes = Notes::default();
        let end = engines.depart_with(here, &mut mirror, DEFINITION, how, (&control, &notes));
        assert!(notes.start_sent.load(Ordering::SeqCst));
        let state = control.live().audit.expect("there was one").state;
        if matches!(end, SourceEnd::Succeeded { .. }) {
            drop(engines.arrivals.recv_timeout(Duration::from_secs(60)).unwrap());
        } else {
            assert!(engines.arrivals.try_recv().is_err(), "it never ran there");
        }
        engines.listener.shutdown();
        (end, state, aborted.try_recv().ok())
    };
    let mut here = running();
    let (end, state, aborted) = depart(&mut here, 60_000);
    assert!(matches!(end, SourceEnd::Succeeded { .. }), "{end:?}");
    assert_eq!((state, aborted), (AuditState::Proven, None));
    assert!(here.vcpu.is_none());

    let mut here = running();
    here.loses = Some(LOST);
    for (timeout_ms, found, code) in [
        (60_000, AuditState::Mismatch { pages: 1, first: vec![LOST.get()] }, "audit_mismatch"),
        (0, AuditState::NotRun { why: NotRun::Timeout }, "audit_not_run"),
    ] {
        here.ram.write_page(LOST, &[7; 4096]).unwrap();
        let (end, state, aborted) = depart(&mut here, timeout_ms);
        let SourceEnd::NotMoved { fault, resumed: true } = end else { panic!("{end:?}") };
        assert_eq!((fault.code().as_str(), aborted.as_deref(), state), (code, Some(code), found));
        here.until(here.count() + 50);
    }
}

#[test]
fn without_room_for_digests_there_is_no_audit_and_that_is_said() {
    let run = |audit| {
        let engines = engines_that(Arc::new(EmulatedHost::without_sev()), false, None);
        let mut here = Clockwork::new(ram(RAM_BYTES));
        here.resume().unwrap();
        let mut mirror = mirror(engines.hypervisor.as_ref(), &here.ram, 2);
        let control = Control::new(MigrationState::Queued, MigrationLimits::default(), Box::new(|| ()));
        let (how, notes) = ((Suite::Aes256Gcm, audit), Notes::default());
        let end = engines.depart_with(&mut here, &mut mirror, DEFINITION, how, (&control, &notes));
        if matches!(end, SourceEnd::Succeeded { .. }) {
            drop(engines.arrivals.recv_timeout(Duration::from_secs(60)).unwrap());
        }
        engines.listener.shutdown();
        (end, control.live().audit)
    };
    let (end, audit) = run(AuditMode::After);
    assert!(matches!(end, SourceEnd::Succeeded { sequel: Sequel::Nothing, .. }), "{end:?}");
    assert_eq!(audit, Some(Audit::not_run(NotRun::NoRoom)));
    let (end, audit) = run(AuditMode::Never);
    assert!(matches!(end, SourceEnd::Succeeded { .. }) && audit.is_none(), "{end:?}");
    let (end, _) = run(AuditMode::BeforeCommit);
    let SourceEnd::NotMoved { fault: MigrationFault::AuditNotRun { why: NotRun::NoRoom }, resumed: true } =
        end
    else {
        panic!("{end:?}")
    };
}
