//! A whole migration between two engines, with a host on the way that has the keys of both.
//!
//! The bytes are what it does to which message of which link. Whatever that is, both ends come to an end, the
//! guest is never at both of them, and nobody has to guess: a source that was not told is told by one token
//! of the destination and by no other. What a destination takes is what the source had, page by page, but for
//! pages that came unsealed. Where nothing was done, the guest moves.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use mirrorvm::addr::{Gpa, PAGE_SIZE, RamPage};
use mirrorvm::address_space::{
    BlockSpec, GuestLayout, HelperPlacement, MailboxSize, PlanRequest, Shift, Strategy, plan,
};
use mirrorvm::guest::{
    Console, EncryptionStatus, EndWatch, Labels, Machine, MachineError, MigrationControl, ProtectionLevel,
};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::memory::{Backing, GuestRam};
use mirrorvm::migration::wire::{Hello, Prepare, Purpose, Refused, kind, parse};
use mirrorvm::migration::{
    Arrival, Arrived, Audit, AuditMode, Control, Departure, Held, Journal, MigrationFault, MigrationLimits,
    MigrationMode, MigrationState, NotStored, Outgoing, Receiver, SourceEnd, Spoken, StreamTransport, Suite,
    Terms, accept_hello, run_source, serve_import,
};
use mirrorvm::mirror::{HelperImage, HelperSource, Mirror, SealedToken};
use mirrorvm::pages::PageSet;
use mirrorvm::transport::{Deadlines, Endpoint, Identity, Link, ListenerLimits, PeerListener};
use uuid::Uuid;

use crate::{Bytes, Seed};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const RAM_BYTES: u64 = 1 << 20;
const SECRET: [u8; 32] = [42; 32];
const STATE: &[u8] = b"registers";
const DEFINITION: &str = "a guest that stands still";
const STREAMS: u16 = 2;
/// Bounds what only a fault of ours makes last.
const LONGEST: Duration = Duration::from_secs(50);
/// How long the host on the way waits for what it may itself have made impossible.
const SILENCE: Duration = Duration::from_millis(150);
/// Longest message that it carries.
const MESSAGE_MAX: u32 = 16 << 20;

/// A guest whose vCPU does nothing.
struct Still {
    ram: GuestRam,
    console: Arc<Console>,
    encryption: Arc<EncryptionStatus>,
    control: Arc<MigrationControl>,
    state: Vec<u8>,
}

impl Still {
    fn new() -> Self {
        let block = BlockSpec { name: "ram0".into(), size_bytes: RAM_BYTES, gpa: Some(Gpa::new(0)) };
        let bare = GuestLayout::assign(&[block]).unwrap();
        let size = HelperPlacement::block_size_with_digests(HelperImage::built_in().header(), &bare).unwrap();
        let layout = Arc::new(bare.with_helper(size, true).unwrap());
        let ram = GuestRam::allocate(layout, Backing::Anonymous).unwrap();
        let control = Arc::new(MigrationControl::new(false));
        Self { ram, console: Arc::default(), encryption: Arc::default(), control, state: Vec::new() }
    }

    fn mirror(&self, host: &dyn Hypervisor) -> Mirror {
        let (image, workers) = (HelperImage::built_in(), u32::from(STREAMS));
        let strategy = Strategy::Shifted { shift: Shift::FourGib };
        let (layout, limits, size) = (self.ram.layout(), host.limits(), MailboxSize { workers, slots: 4 });
        let request = PlanRequest::new(&layout, image.header(), &limits, strategy, size);
        let plan = Arc::new(plan(&request).unwrap());
        let helper = HelperSource::Loaded { secret: &SECRET };
        Mirror::launch(host, "fuzzed", plan, workers, &self.ram, &image, helper).unwrap()
    }

    fn page(&self, page: u64) -> [u8; 4096] {
        let mut content = [0; 4096];
        self.ram.read_page(RamPage::new(page), &mut content).unwrap();
        content
    }
}

impl Machine for Still {
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
        &SECRET
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn can_log_dirty(&self) -> bool {
        true
    }

    fn log_dirty(&mut self, _: bool) -> Result<(), MachineError> {
        Ok(())
    }

    fn take_dirty(&mut self, _: &mut PageSet) -> Result<(), MachineError> {
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        Ok(self.state.clone())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.state = state.to_vec();
        Ok(())
    }

    fn end_watch(&self) -> EndWatch {
        EndWatch::new(|| None)
    }
}

struct Notes;

impl Journal for Notes {
    fn held(&self) {}

    fn runs_on(&self) {}

    fn start_sent(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn last_labels(&self) -> Result<Labels, Failure> {
        Ok(Labels::new())
    }
}

/// What the destination has come to.
#[derive(Default)]
struct Ends {
    /// The token that says that the guest is here.
    committed: Option<SealedToken>,
    arrived: Option<Box<dyn Machine>>,
    /// How often an import was given up, and the last token that says so.
    aborted: (u32, Option<SealedToken>),
}

/// The destination. It takes the guest once.
struct There {
    identity: Identity,
    hypervisor: EmulatedHost,
    peer: Mutex<HashMap<Uuid, mpsc::SyncSender<(u16, Link)>>>,
    admitted: AtomicBool,
    ends: Mutex<Ends>,
}

impl There {
    fn serve(&self, mut link: Link) {
        let Ok((purpose, agreed)) = accept_hello(&mut link, &self.identity, "there") else { return };
        match purpose {
            Purpose::Migrate {} => serve_import(Spoken { link, agreed }, "here", self),
            Purpose::Stream { session, index } => {
                let sender = self.peer.lock().unwrap().get(&session).cloned();
                // Full, or over: it is nobody's.
                if let Some(sender) = sender {
                    let _ = sender.try_send((index, link));
                }
            }
            _ => {}
        }
    }
}

impl Receiver for There {
    fn admit(&self, prepare: &Prepare, _: &str) -> Result<Arrival, Refused> {
        let machine = Still::new();
        let fits = prepare.definition == DEFINITION
            && prepare.layout == *machine.ram.layout()
            && prepare.streams == STREAMS;
        if !fits || self.admitted.swap(true, Ordering::SeqCst) {
            return Err(Refused { code: "other".to_owned().into(), detail: "not this one".into() });
        }
        let mirror = machine.mirror(&self.hypervisor);
        let (sender, streams) = mpsc::sync_channel(usize::from(STREAMS));
        self.peer.lock().unwrap().insert(prepare.session, sender);
        let control = Control::new(MigrationState::Preparing, MigrationLimits::default(), Box::new(|| ()));
        Ok(Arrival { machine: Box::new(machine), fresh: true, mirror, control: Arc::new(control), streams })
    }

    fn labels(&self, _: Uuid, _: Labels) -> Result<(), Failure> {
        Ok(())
    }

    fn commit(&self, _: Uuid, token: &SealedToken, _: bool) -> Result<(), NotStored> {
        assert!(self.ends.lock().unwrap().committed.replace(*token).is_none(), "committed twice");
        Ok(())
    }

    fn arrived(&self, _: Uuid, arrived: Arrived) {
        let mut ends = self.ends.lock().unwrap();
        assert!(ends.committed.is_some() && arrived.fault.is_none());
        assert!(ends.arrived.replace(arrived.machine).is_none(), "arrived twice");
    }

    fn audited(&self, _: Uuid, _: Uuid, _: Audit, _: &Arc<Held>) {}

    fn aborted(&self, _: Uuid, token: Option<&SealedToken>, _: &MigrationFault) {
        let aborted = &mut self.ends.lock().unwrap().aborted;
        *aborted = (aborted.0 + 1, token.copied());
    }
}

/// What is done to a message.
#[derive(Clone, Debug)]
enum Deed {
    /// A bit of it, counted from its beginning and round its end, is turned.
    Flip(u16),
    /// Of its payload no more than this is sent.
    Cut(u16),
    /// It is called another kind of message.
    Kind(u8),
    /// One of its digits is another: numbers of JSON stay numbers.
    Digit(u8, u8),
    Twice,
    Never,
    /// It comes after the next.
    Late,
    /// Another comes first.
    Before(u8, Vec<u8>),
    /// Its payload is another.
    Instead(Vec<u8>),
    /// The link ends instead.
    End,
}

/// Its kind, and what it says.
type Message = (u8, Vec<u8>);

impl Deed {
    /// What is sent in a message's place; `None`: the link ends.
    fn done_to(&self, kind: u8, mut payload: Vec<u8>) -> Option<Vec<Message>> {
        let len = payload.len();
        match self {
            Self::Flip(bit) => {
                let bit = usize::from(*bit) % (len * 8).max(1);
                if let Some(byte) = payload.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            Self::Cut(most) => payload.truncate(usize::from(*most)),
            Self::Kind(other) => return Some(vec![(*other, payload)]),
            Self::Digit(which, digit) => {
                let digits: Vec<usize> = (0..len).filter(|i| payload[*i].is_ascii_digit()).collect();
                if let Some(place) = digits.get(usize::from(*which) % digits.len().max(1)) {
                    payload[*place] = b'0' + digit % 10;
                }
            }
            Self::Twice => return Some(vec![(kind, payload.clone()), (kind, payload)]),
            Self::Never | Self::Late => return Some(Vec::new()),
            Self::Before(other, bytes) => return Some(vec![(*other, bytes.clone()), (kind, payload)]),
            Self::Instead(bytes) => return Some(vec![(kind, bytes.clone())]),
            Self::End => return None,
        }
        Some(vec![(kind, payload)])
    }
}

/// One thing that the host on the way does: on which link, 0 being the control link, in which direction, and
/// to which of its messages, counted from 0.
#[derive(Clone, Debug)]
struct Act {
    link: u8,
    up: bool,
    at: u8,
    deed: Deed,
}

/// What the bytes say: how the guest moves, and what is done to it.
struct Script {
    suite: Suite,
    audit: AuditMode,
    mode: MigrationMode,
    acts: Vec<Act>,
}

impl Script {
    fn read(data: &[u8]) -> Self {
        let mut bytes = Bytes(data);
        let how = bytes.u8();
        let suite = if how & 1 == 0 { Suite::Aes256Gcm } else { Suite::Aes256GcmSiv };
        let audit = if how & 2 == 0 { AuditMode::Never } else { AuditMode::BeforeCommit };
        let mode = if how & 4 == 0 { MigrationMode::Precopy } else { MigrationMode::StopAndCopy };
        let mut acts = Vec::new();
        while !bytes.is_empty() && acts.len() < 4 {
            let (whose, at, deed) = (bytes.u8(), bytes.u8(), bytes.u8());
            let deed = match deed % 10 {
                0 => Deed::Flip(bytes.u16()),
                1 => Deed::Cut(bytes.u16()),
                2 => Deed::Kind(bytes.u8()),
                3 => Deed::Digit(bytes.u8(), bytes.u8()),
                4 => Deed::Twice,
                5 => Deed::Never,
                6 => Deed::Late,
                7 => {
                    let (kind, len) = (bytes.u8(), bytes.u16());
                    Deed::Before(kind, bytes.up_to(len.into()).to_vec())
                }
                8 => {
                    let len = bytes.u16();
                    Deed::Instead(bytes.up_to(len.into()).to_vec())
                }
                _ => Deed::End,
            };
            acts.push(Act { link: (whose >> 1) % 3, up: whose & 1 == 1, at, deed });
        }
        Self { suite, audit, mode, acts }
    }
}

/// Keys of both hosts, made once.
fn keys() -> &'static (Identity, Identity) {
    static KEYS: OnceLock<(Identity, Identity)> = OnceLock::new();
    KEYS.get_or_init(|| {
        let keys = tempfile::tempdir().unwrap();
        let identity = |name: &str| Identity::load_or_create(&keys.path().join(name)).unwrap();
        (identity("us"), identity("them"))
    })
}

/// The host on the way: to the source it is the destination, and to that the source.
struct Way {
    there: SocketAddr,
    acts: Vec<Act>,
    /// Whether a message was touched: nothing has to come any more.
    touched: AtomicBool,
    /// Whether pages came to the destination that no helper had sealed.
    unsealed: AtomicBool,
    heard: Mutex<Instant>,
}

impl Way {
    fn carry(&self, mut source: Link) {
        let (us, them) = keys();
        let Ok(mut there) = Link::connect(self.there, us, them.pin(), Deadlines::default()) else { return };
        let (mut number, mut counts) = (None, [0u8; 2]);
        let mut late: [Option<Message>; 2] = [None, None];
        loop {
            for up in [true, false] {
                let (from, to) = if up { (&mut source, &mut there) } else { (&mut there, &mut source) };
                // What the source says decides when nothing else is to be heard.
                let until = Instant::now() + Duration::from_millis(u64::from(!up));
                if !matches!(from.await_input(until), Ok(true)) {
                    continue;
                }
                *self.heard.lock().unwrap() = Instant::now();
                let mut payload = Vec::new();
                let kind = match from.recv_into(MESSAGE_MAX, &mut payload) {
                    Ok(Some(kind)) => kind,
                    Ok(None) => {
                        let _ = if up { there.close() } else { source.close() };
                        return;
                    }
                    // A cut is carried on as one.
                    Err(_) => return,
                };
                let number = *number.get_or_insert_with(|| {
                    match parse::<Hello>(&payload).map(|hello| hello.purpose) {
                        Ok(Purpose::Stream { index, .. }) => 1 + u8::try_from(index).unwrap_or(u8::MAX - 1),
                        _ => 0,
                    }
                });
                let count = &mut counts[usize::from(up)];
                let at = *count;
                *count = count.wrapping_add(1);
                let act = self.acts.iter().find(|act| (act.link, act.up, act.at) == (number, up, at));
                self.touched.fetch_or(act.is_some(), Ordering::SeqCst);
                let before = late[usize::from(up)].take();
                let mut sent = match act.map(|act| &act.deed) {
                    None => vec![(kind, payload)],
                    Some(Deed::Late) => {
                        late[usize::from(up)] = Some((kind, payload));
                        Vec::new()
                    }
                    Some(deed) => match deed.done_to(kind, payload) {
                        Some(sent) => sent,
                        None => return,
                    },
                };
                sent.extend(before);
                for (kind, payload) in sent {
                    self.unsealed.fetch_or(up && kind == kind::SHARED, Ordering::SeqCst);
                    // A kind that is the transport's own ends the link.
                    if to.send(kind, &payload).is_err() {
                        return;
                    }
                }
            }
            let heard = self.heard.lock().unwrap().elapsed();
            if heard > LONGEST || heard > SILENCE && self.touched.load(Ordering::SeqCst) {
                return;
            }
        }
    }
}

fn listener(
    identity: &Identity,
    of: &Identity,
    serve: impl Fn(Link) + Send + Sync + 'static,
) -> PeerListener {
    let (pin, at) = (*of.pin(), "127.0.0.1:0".parse().unwrap());
    let known = Arc::new(move |peer: &_| *peer == pin);
    PeerListener::bind(at, identity, known, ListenerLimits::default(), Arc::new(serve)).unwrap()
}

/// A migration to which this is done.
pub fn run(data: &[u8]) {
    let script = Script::read(data);
    let (us, them) = keys();
    let destination = Arc::new(There {
        identity: them.clone(),
        hypervisor: EmulatedHost::without_sev(),
        peer: Mutex::default(),
        admitted: AtomicBool::new(false),
        ends: Mutex::default(),
    });
    let serving = Arc::clone(&destination);
    let arrivals = listener(them, us, move |link| serving.serve(link));
    let way = Arc::new(Way {
        there: arrivals.local_addr(),
        acts: script.acts,
        touched: AtomicBool::new(false),
        unsealed: AtomicBool::new(false),
        heard: Mutex::new(Instant::now()),
    });
    let carrying = Arc::clone(&way);
    let passage = listener(them, us, move |link| carrying.carry(link));

    let hypervisor = EmulatedHost::without_sev();
    let mut here = Still::new();
    here.state = STATE.to_vec();
    for page in 0..RAM_BYTES / PAGE_SIZE {
        // A quarter is zero.
        here.ram.write_page(RamPage::new(page), &[page as u8 % 4; 4096]).unwrap();
    }
    let mut mirror = here.mirror(&hypervisor);
    let control = Control::new(MigrationState::Queued, MigrationLimits::default(), Box::new(|| ()));
    let layout = here.ram.layout();
    let out = Outgoing {
        helper_measurement: HelperImage::built_in().measurement(),
        id: Uuid::now_v7(),
        departure: Departure {
            guest: Uuid::now_v7(),
            definition: DEFINITION,
            layout: &layout,
            protection: ProtectionLevel::None,
        },
        terms: Terms {
            mode: script.mode,
            streams: STREAMS,
            // Streams outside TLS could be touched only where no message begins or ends.
            stream_transport: StreamTransport::Tls,
            suite: script.suite,
            verify: false,
            audit: script.audit,
        },
        peer: (Endpoint::from(passage.local_addr()), *them.pin()),
        identity: us,
        host: "here",
        control: &control,
        journal: &Notes,
    };
    let end = run_source(&out, &mut here, &mut mirror, true);
    // They wait for whoever still serves.
    passage.shutdown();
    arrivals.shutdown();
    judge(&way, &here, &mut mirror, end, &destination);
}

fn judge(way: &Way, here: &Still, mirror: &mut Mirror, end: SourceEnd, destination: &There) {
    let ends = std::mem::take(&mut *destination.ends.lock().unwrap());
    let committed = ends.committed;
    assert_eq!(committed.is_some(), ends.arrived.is_some(), "what is committed arrives");
    let imports = u32::from(destination.admitted.load(Ordering::SeqCst));
    assert_eq!(ends.aborted.0 + u32::from(committed.is_some()), imports, "an import has one end");
    match &end {
        SourceEnd::Succeeded { .. } => assert!(committed.is_some(), "nobody has the guest"),
        SourceEnd::NotMoved { resumed, .. } => assert!(*resumed && committed.is_none(), "two have the guest"),
        SourceEnd::InDoubt { .. } => {
            if let Some(token) = committed {
                assert!(mirror.check_abort(&token).is_err(), "COMMIT read as ABORT");
                mirror.check_commit(&token).expect("the destination's word");
            } else if let (_, Some(token)) = ends.aborted {
                assert!(mirror.check_commit(&token).is_err(), "ABORT read as COMMIT");
                mirror.check_abort(&token).expect("the destination's word");
            }
        }
    }
    if !way.touched.load(Ordering::SeqCst) {
        assert!(matches!(end, SourceEnd::Succeeded { .. }), "nothing was done: {end:?}");
    }
    if let Some(there) = ends.arrived.filter(|_| !way.unsealed.load(Ordering::SeqCst)) {
        let mut content = [0; 4096];
        for page in 0..RAM_BYTES / PAGE_SIZE {
            there.ram().read_page(RamPage::new(page), &mut content).unwrap();
            assert!(content == here.page(page), "page {page}");
        }
    }
}

/// One thing at a time, to messages at every turn of the course.
pub fn seeds() -> Vec<Seed> {
    let mut all: Vec<Seed> = (0..8).map(|how| (format!("nothing-{how}"), vec![how])).collect();
    let mut add = |name: &str, how: u8, whose: u8, at: u8, deed: &[u8]| {
        all.push((name.to_owned(), [&[how, whose, at], deed].concat()));
    };
    // The control link's ways: 1 from the source, 0 from the destination. Its messages up: HELLO, PREPARE,
    // an epoch's begin and token, again, STATE, START; down: the answer to HELLO, PREPARED, acknowledgements,
    // COMMITTED.
    for at in 0..7 {
        add(&format!("up-{at}-flipped"), 0, 1, at, &[0, 40, 1]);
        add(&format!("up-{at}-never"), 4, 1, at, &[5]);
        add(&format!("up-{at}-twice"), 0, 1, at, &[4]);
        add(&format!("up-{at}-late"), 4, 1, at, &[6]);
        add(&format!("up-{at}-end"), 2, 1, at, &[9]);
    }
    for at in 0..5 {
        add(&format!("down-{at}-flipped"), 0, 0, at, &[0, 40, 1]);
        add(&format!("down-{at}-never"), 2, 0, at, &[5]);
        add(&format!("down-{at}-end"), 4, 0, at, &[9]);
        add(&format!("down-{at}-digit"), 0, 0, at, &[3, 9, 7]);
    }
    for (stream, at) in [(2, 0), (2, 1), (4, 1), (4, 2)] {
        add(&format!("stream-{stream}-{at}-flipped"), 0, stream + 1, at, &[0, 200, 90]);
        add(&format!("stream-{stream}-{at}-cut"), 1, stream + 1, at, &[1, 100, 0]);
        add(&format!("stream-{stream}-{at}-never"), 4, stream + 1, at, &[5]);
    }
    // Pages of the helper's own block, as if the guest had shared them.
    add("shared-pages-of-nobody", 0, 1, 3, &[7, kind::SHARED, 8, 0, 1, 0, 0, 0, 0, 4, 0, 0]);
    add("prepare-of-other-streams", 0, 1, 1, &[3, 200, 3]);
    add("commit-for-abort", 4, 0, 4, &[2, kind::ABORTED]);
    add("start-before-all", 0, 1, 2, &[2, kind::START]);
    all
}
