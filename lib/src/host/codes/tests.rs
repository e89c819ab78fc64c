//! The table of codes as it is published: what clients, records and other builds rely on.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::fmt::Write as _;
use std::time::Duration;

use uuid::Uuid;

use crate::address_space::{Refusal, RefusalCode};
use crate::boot_files::FileRefusal;
use crate::codes::{AnyCode, Capability, DriverCapability, PeerRefusal};
use crate::guest::{BadParameters, DriverSpec, MachineEnd, MachineError, PlugError, driver::Parameters};
use crate::host::faults::{end_fault, host_fault, machine_fault};
use crate::host::migrations::findings::{Finding, finding, findings};
use crate::host::migrations::refusals::{machine_refusal, refused_by};
use crate::host::{BatchRefusal, FieldError, HostError, ImageFault, PeerSilence, ResourceKind, Subject};
use crate::hypervisor::HypervisorError;
use crate::memory::{Bound, MemoryError, Shortage};
use crate::migration::MigrationFault;
use crate::migration::wire::Refused;
use crate::mirror::{LaneError, MirrorError};
use crate::qemu::QemuError;
use crate::sev::SevError;
use crate::store::StoreError;
use crate::transport::{CertRefusal, LinkError};

fn shortage() -> Shortage {
    Shortage { bytes: 2 << 20, available: 0, bound: Bound::HugePages }
}

fn code(code: &str) -> AnyCode {
    AnyCode::from(code.to_owned())
}

fn silence(by: &str, timed_out: bool) -> HostError {
    HostError::PeerSilent(PeerSilence { code: code(by), detail: "it said nothing".into(), timed_out })
}

fn lacks(what: Capability) -> HostError {
    HostError::lacks(what, "so it is")
}

fn host_errors() -> Vec<HostError> {
    let theirs =
        Finding { code: "name_taken".to_owned(), detail: "there is one".into(), fix: "rename".into() };
    let batch = BatchRefusal { code: "unsealed", index: 3, written: Vec::new() };
    // What SQLite says of a full disk, of one that fails, of a lock.
    let sqlite = [13, 10, 5].map(StoreError::of_sqlite);
    let owed = [13, 10, 5].map(StoreError::of_sqlite);
    let mut all = vec![
        HostError::missing(ResourceKind::Guest, "g"),
        HostError::missing(ResourceKind::PeerHost, "h"),
        HostError::missing(ResourceKind::HelperImage, "i"),
        HostError::missing(Subject::RamBlock, "r"),
        HostError::missing(Subject::HandOverToken, "t"),
        HostError::NameTaken { kind: ResourceKind::Guest, name: "g".into() },
        HostError::Invalid(vec![
            FieldError::new("/name", "invalid_format", "bad"),
            FieldError::new("/driver", "required", "missing"),
        ]),
        HostError::WrongState {
            kind: ResourceKind::Guest.into(),
            current: "stopped",
            allowed: &["running", "paused"],
        },
        HostError::GuestMigrating { migration: Uuid::nil() },
        HostError::GuestUnconfirmed { missing: vec!["b does not answer".into()] },
        HostError::GenerationMismatch { kind: ResourceKind::Mirror, generation: 7 },
        HostError::Maintenance,
        HostError::IdTaken { kind: ResourceKind::Migration },
        HostError::GuestMoved { peer: "b".into() },
        HostError::InUse { kind: ResourceKind::Guest, user: "a mirror".into() },
        HostError::LayoutUnusable { why: "the first RAM block has 1 bytes, the workload needs 2".into() },
        HostError::PastPointOfNoReturn,
        HostError::DestinationIsSelf,
        HostError::DestinationRefuses(vec![theirs]),
        silence("peer_lost", false),
        silence("peer_lost", true),
        silence("peer_not_mirrorvm", true),
        silence("peer_unresolved", false),
        silence("colour", false),
        HostError::PlanRefused(vec![
            Refusal::new(RefusalCode::Wraps, "shift", 8192),
            Refusal::new(RefusalCode::SlotOverlap, "slot", 4096),
        ]),
        HostError::PolicyForbids { why: "NOSEND".into() },
        HostError::MirrorAtLaunch,
        HostError::NotLaunched { offset: 4096 },
        HostError::ImageNotLaunched,
        HostError::ImageFailed { name: "i".into(), fault: ImageFault::Missing },
        HostError::BatchRefused(batch),
        HostError::GuestNotReady { why: "it said so" },
        HostError::PlugRefused(PlugError::InUse),
        HostError::NoMemory(shortage()),
        HostError::NoResources { what: "helper memory", source: None },
        HostError::ShuttingDown,
        HostError::internal("storage", std::io::Error::other("/var/lib/secret")),
    ];
    all.extend(sqlite.map(|e| HostError::storage("storing the guest", e)));
    all.extend(owed.map(HostError::owed));
    all
}

fn capabilities() -> impl Iterator<Item = HostError> {
    let of_drivers = DriverCapability::new("colour", "a machine that is red");
    Capability::ALL.iter().copied().chain([of_drivers.into()]).map(lacks)
}

fn machine_errors() -> Vec<MachineError> {
    let exit = |stderr: &str| {
        let child = std::process::Command::new("false").status().unwrap();
        let exit = crate::qemu::ExitInfo { code: child.code(), signal: None, oom_killed: None, stderr: stderr.into() };
        MachineError::Qemu(Box::new(QemuError::Exited(exit)))
    };
    let parameters: BadParameters = DriverSpec::new("embedded", Parameters::new()).read::<u64>().unwrap_err();
    vec![
        MachineError::Hypervisor(HypervisorError::Unsettled),
        MachineError::Memory(MemoryError::NotEnough(shortage())),
        MachineError::Memory(MemoryError::Size { bytes: 7 }),
        MachineError::Sev(SevError::Unsupported { what: "SEND_START", why: "it is so" }),
        MachineError::Measurement,
        MachineError::Plug(PlugError::InUse),
        MachineError::TooSmall { have: 1, need: 2 },
        MachineError::NothingPlugged,
        MachineError::HelperImage(mirrorvm_abi::header::HeaderError::NotAHelper),
        MachineError::BadState { what: "a device" },
        MachineError::Ended(MachineEnd::PowerOff),
        MachineError::Thread(std::io::Error::other("no thread")),
        MachineError::Unsupported { what: "plug RAM blocks" },
        MachineError::BootFile { field: "kernel", refusal: FileRefusal::Outside },
        MachineError::BootFileChanged { field: "initrd" },
        MachineError::Parameters(parameters),
        MachineError::NoUser,
        exit("Cannot allocate memory"),
        exit("no such device"),
    ]
}

fn ends() -> [MachineEnd; 5] {
    [
        MachineEnd::PowerOff,
        MachineEnd::Reset,
        MachineEnd::Panicked,
        MachineEnd::Crashed { what: "it stopped", rip: None },
        MachineEnd::Exited { how: "exit code 1".into() },
    ]
}

fn migration_faults() -> Vec<MigrationFault> {
    let connect = MigrationFault::Connect;
    let identity = || format!("sha256:{}", "5a".repeat(32)).parse().unwrap();
    let no_storage = |kind: std::io::ErrorKind| MigrationFault::NoStorage(kind.into());
    vec![
        MigrationFault::Canceled,
        connect(LinkError::NotMirrorvm { said: "SSH".into() }),
        connect(LinkError::WrongProtocol),
        connect(LinkError::PeerRefused(CertRefusal::Malformed)),
        connect(LinkError::PeerRefused(CertRefusal::NotAdmitted(identity()))),
        connect(LinkError::RefusedByPeer { alert: None }),
        connect(LinkError::NoRoom),
        connect(LinkError::Broken),
        MigrationFault::PeerLost(LinkError::Broken),
        MigrationFault::PeerGone,
        MigrationFault::PeerRefused { code: code("no_memory"), detail: "none".into() },
        MigrationFault::PeerRefused { code: code("colour"), detail: "only red ones".into() },
        MigrationFault::Protocol("a message that cannot be read"),
        MigrationFault::Version { theirs: vec![9], ours: vec![4] },
        MigrationFault::Helper(LaneError::Broken("an answer")),
        MigrationFault::Mirror(MirrorError::Debuggable),
        MigrationFault::Machine(MachineError::Ended(MachineEnd::Reset)),
        MigrationFault::Machine(MachineError::Measurement),
        MigrationFault::PlaceLost(MachineEnd::PowerOff),
        MigrationFault::NotConverging { dirty_pages_per_second: 9, pages_per_second: 3, floor_ms: None },
        MigrationFault::Unreachable { page: 3 },
        MigrationFault::Fragmented,
        MigrationFault::AuditMismatch { pages: 1 },
        MigrationFault::AuditNotRun { why: crate::migration::NotRun::Timeout },
        MigrationFault::EvidenceMissing { why: "x" },
        MigrationFault::EvidenceRefused { why: "x" },
        MigrationFault::Resolved,
        no_storage(std::io::ErrorKind::StorageFull),
        no_storage(std::io::ErrorKind::QuotaExceeded),
        no_storage(std::io::ErrorKind::Other),
        MigrationFault::Journal("full".into()),
    ]
}

/// What another build may refuse with beside this one's refusals.
const REFUSALS: &[&str] = &["not_found", "colour"];

fn name(error: &dyn std::fmt::Debug) -> String {
    let text = format!("{error:?}");
    let end = text.find([' ', '(', '{']).unwrap_or(text.len());
    text[..end].to_owned()
}

/// The detail, where it is not the error's own sentence.
fn detail(detail: &str, said: &str) -> String {
    if detail == said { String::new() } else { format!(" [{detail}]") }
}

fn found(list: &[Finding], said: &str) -> String {
    let one = |f: &Finding| format!("{}{} ({})", f.code, detail(&f.detail, said), f.fix);
    list.iter().map(one).collect::<Vec<_>>().join(" + ")
}

fn as_published() -> String {
    let mut out = String::new();
    for e in host_errors().iter().chain(&capabilities().collect::<Vec<_>>()) {
        let (record, refusal, said) = (host_fault(e), refused_by(e), e.to_string());
        let [of_record, of_peer] = [&record.detail, &refusal.detail].map(|d| detail(d, &said));
        writeln!(out, "{}: {said}", name(e)).unwrap();
        writeln!(out, "    record {}{of_record}; peer {}{of_peer}", record.code, refusal.code).unwrap();
        writeln!(out, "    finding {}", found(&findings(e), &said)).unwrap();
    }
    for e in &machine_errors() {
        let (record, refusal) = (machine_fault(e), machine_refusal(e));
        writeln!(out, "machine {}", name(e)).unwrap();
        writeln!(out, "    record {} [{}]", record.code, record.detail).unwrap();
        writeln!(out, "    peer {} [{}]", refusal.code, refusal.detail).unwrap();
    }
    for end in &ends() {
        let record = end_fault(end);
        writeln!(out, "end {}: record {} [{}]", name(end), record.code, record.detail).unwrap();
    }
    for fault in &migration_faults() {
        writeln!(out, "migration {}: {}", name(fault), fault.code()).unwrap();
    }
    let ours = PeerRefusal::ALL.iter().map(|r| AnyCode::from(*r));
    for code in ours.chain(REFUSALS.iter().map(|r| code(r))) {
        let told = finding(Refused { code, detail: "so it is".into() });
        writeln!(out, "refused by a peer {}", found(&[told], "so it is")).unwrap();
    }
    let took = Duration::from_secs(5);
    let silence = crate::host::peers::probe::silence(&MigrationFault::PeerGone, took, took);
    writeln!(out, "silence {} {}", silence.code, silence.timed_out).unwrap();
    let [failed, unreadable] = [PeerSilence::failed(), crate::host::peers::probe::unreadable_identity()];
    writeln!(out, "silence {} {}", failed.code, unreadable.code).unwrap();
    out
}

#[test]
fn every_fault_has_the_codes_that_are_published_in_each_of_its_parts() {
    let (now, published) = (as_published(), include_str!("published.txt"));
    for (n, (now, published)) in now.lines().zip(published.lines()).enumerate() {
        assert_eq!(now, published, "line {} of published.txt", n + 1);
    }
    assert_eq!(now.lines().count(), published.lines().count(), "{now}");
}
