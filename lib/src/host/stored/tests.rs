//! What documents of this version look like, to the byte, and that nothing else is taken for one.

use std::fmt::Debug;
use std::path::PathBuf;

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::addr::{Gpa, RamAddr};
use crate::address_space::{BlockRole, BlockSpec, GuestLayout, Plug, PspVia, RamBlock, Shift, Strategy};
use crate::boot_files::{BootFile, BootFiles};
use crate::codes::Code;
use crate::guest::driver::Parameters;
use crate::guest::{AttestationSpec, Hex};
use crate::host::events::{Change, EventBody, ResourceKind};
use crate::host::images::types::ImageFacts;
use crate::host::migrations::endings::Ending;
use crate::host::migrations::hand_over::Settlement;
use crate::host::migrations::tickets::Kept;
use crate::host::{
    Audit, AuditMode, AuditState, Destination, DriverSpec, EmbeddedDriver, EmulatedDriver, Evidence, Fault,
    Fill, GuestAudit, GuestSpec, GuestState, HandOverOutcome, Labels, LaunchMirror, MigrationDirection,
    MigrationLimits, MigrationMode, MigrationSpec, MigrationState, MirrorChoice, MirrorOptions, NotRun,
    OnTimeout, PeerSpec, Progress, ProtectionLevel, QemuDriver, QemuGuest, Resolution, Round, SevSpec,
    SourceAfter, StreamTransport, Suite, WorkerInfo, WorkloadGuest, WorkloadSpec,
};
use crate::memory::Backing;
use crate::mirror::{Placement, Scheduler};
use crate::sev::Policy;
use crate::store::form::{self, Document, Part};

fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + n)
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_millisecond(1_800_000_000_000 + second * 1000 + 250).unwrap()
}

fn labels() -> Labels {
    Labels::from([("tier".into(), "test".into())])
}

fn fault() -> Fault {
    Fault { code: Code::DaemonRestarted.into(), detail: "its memory is lost".into() }
}

fn workload(sev: Option<SevSpec>) -> WorkloadGuest {
    let workload = WorkloadSpec {
        fill: Fill::Random,
        working_set_bytes: 4096,
        dirty_bytes_per_second: 7,
        withdraws_readiness_after_ms: Some(50),
    };
    WorkloadGuest { vcpus: 2, workload, sev }
}

fn guest(driver: DriverSpec, backing: Option<Backing>) -> GuestRecord {
    let ram = BlockSpec { name: "ram0".into(), size_bytes: 8 << 20, gpa: Some(Gpa::new(0)) };
    let dimm = BlockSpec { name: "dimm".into(), size_bytes: 2 << 20, gpa: None };
    let block = |name: &str, at, size, role, plugs| RamBlock {
        name: name.into(),
        ram_addr: RamAddr::new(at),
        size,
        role,
        plugs,
    };
    let blocks = vec![
        block("ram0", 0, 8 << 20, BlockRole::Ram, vec![Plug { offset: 0, gpa: Gpa::new(0), len: 8 << 20 }]),
        block("dimm", 8 << 20, 2 << 20, BlockRole::Ram, Vec::new()),
        block("mirrorvm.vmsa", 10 << 20, 4096, BlockRole::Vmsa, Vec::new()),
        block("mirrorvm.helper", 12 << 20, 6 << 20, BlockRole::Helper, Vec::new()),
    ];
    let layout = GuestLayout::from_blocks(blocks).unwrap();
    let spec = GuestSpec { name: "g1".into(), driver, blocks: vec![ram, dimm], backing, labels: labels() };
    let defined = GuestRecord::defined(id(1), spec, layout, ProtectionLevel::None, None);
    GuestRecord { created_at: at(0), ..defined }
}

fn embedded() -> GuestRecord {
    guest(EmbeddedDriver::spec(&workload(None)), None)
}

fn emulated() -> GuestRecord {
    let mirror = LaunchMirror { strategy: Strategy::Shifted { shift: Shift::FourGib }, workers: 2 };
    let attestation = AttestationSpec {
        demanded: true,
        platforms: Some(vec![Hex([5; 96])]),
        launches: Some(vec![Hex([6; 32])]),
    };
    let sev = SevSpec { policy: Policy(5), es: true, mirror, attestation: Some(attestation) };
    GuestRecord {
        state: GuestState::InDoubt,
        generation: 12,
        protection: ProtectionLevel::Modelled,
        migration: Some(id(2)),
        started_at: Some(at(1)),
        ..guest(EmulatedDriver::spec(&workload(Some(sev))), Some(Backing::Anonymous))
    }
}

fn qemu() -> GuestRecord {
    let driver = QemuDriver::spec(&QemuGuest::of_kernel(
        "/srv/images/vmlinuz",
        Some("/srv/images/initrd".into()),
        "quiet",
    ));
    let file = |n| BootFile { bytes: u64::from(n), sha256: [n; 32] };
    GuestRecord {
        boot: Some(BootFiles { kernel: Some(file(5)), initrd: Some(file(6)), firmware: Some(file(7)) }),
        moved_to: Some("b".into()),
        unconfirmed: true,
        audit: Some(GuestAudit { migration: id(2), audit: Audit::not_run(NotRun::HostRestarted) }),
        error: Some(fault()),
        ..guest(driver, Some(Backing::Memfd))
    }
}

/// Of a driver that no build of ours has.
fn foreign() -> GuestRecord {
    let parameters = Parameters::from_iter([("size".into(), json!({"cores": [1, 2]}))]);
    guest(DriverSpec::new("firecracker", parameters), Some(Backing::Hugetlb))
}

fn mismatch() -> Audit {
    let state = AuditState::Mismatch { pages: 2, first: vec![7, 260] };
    Audit { state, compared_pages: 2542, left_out_pages: 2, cpu_us: 1700 }
}

fn begun(direction: MigrationDirection, strategy: Strategy) -> MigrationRecord {
    let guest = embedded();
    let peer = format!("sha256:{}", "5a".repeat(32));
    let how = (strategy, Suite::Aes256Gcm);
    let begun = MigrationRecord::begun(id(2), direction, (guest.id, &guest.spec), "b", peer, how);
    MigrationRecord { created_at: at(2), started_at: Some(at(3)), order: 3, ..begun }
}

fn outgoing() -> MigrationRecord {
    let limits = MigrationLimits {
        bandwidth_bytes_per_second: Some(1 << 30),
        downtime_ms: 300,
        timeout_ms: 60_000,
        stall_timeout_ms: 30_000,
        on_timeout: OnTimeout::Throttle,
        auto_throttle: true,
        audit_timeout_ms: 45_000,
    };
    let strategy = Strategy::Shifted { shift: Shift::Explicit { bytes: 8 << 30 } };
    let placement = Placement { cpus: vec![2, 3], scheduler: Some(Scheduler::Fifo { priority: 10 }) };
    let spec = MigrationSpec {
        guest: "g1".into(),
        destination: Destination::Host("b".into()),
        mode: MigrationMode::Precopy,
        mirror: MirrorChoice::Template(strategy),
        template: MirrorOptions { placement, helper_image: Some("helper-2".into()) },
        streams: 2,
        stream_transport: StreamTransport::Sealed,
        suite: Suite::Aes256GcmSiv,
        limits,
        source_after: SourceAfter::KeepStopped,
        verify: true,
        audit: AuditMode::BeforeCommit,
    };
    let round = |number, paused| Round {
        number,
        pages_sealed: 2544,
        pages_shared: 16,
        pages_zero: 3,
        bytes: 10 << 20,
        duration_us: 82_928,
        dirtied_pages: 2,
        paused,
    };
    let progress = Progress {
        elapsed_ms: 156,
        setup_ms: 61,
        remaining_ms: Some(4),
        expected_downtime_ms: Some(21),
        downtime_floor_ms: Some(5),
        downtime_ms: Some(4.789),
        verify_ms: Some(1.5),
        total_bytes: 10 << 20,
        processed_bytes: 11 << 20,
        remaining_bytes: 4096,
        pages_sealed: 2544,
        pages_shared: 18,
        pages_zero: 3,
        dirty_pages_per_second: 24,
        throughput_bytes_per_second: 126_443_563,
        iteration: 2,
        precopy_bytes: 10 << 20,
        downtime_bytes: 8192,
        helper_errors: 1,
        shared_bytes: Some(65_536),
        status_changes: 7,
        throttle_percent: 20,
    };
    let resolution =
        Resolution { outcome: HandOverOutcome::Committed, reason: "seen there".into(), at: at(9) };
    MigrationRecord {
        spec: Some(spec),
        state: MigrationState::Succeeded,
        generation: 18,
        progress,
        rounds: vec![round(1, false), round(2, true)],
        workers: vec![WorkerInfo { tid: 7, exits: 19, cpu_ns: 15_159_448 }],
        helper_busy_percent: Some(6),
        guest_state_after: Some(GuestState::Stopped),
        error: Some(fault()),
        cancel_requested_at: Some(at(5)),
        committing: true,
        audit: Some(mismatch()),
        evidence: Some(Evidence::Verified { launch_digest: [7; 32], platform: [8; 32] }),
        resolution: Some(resolution),
        finished_at: Some(at(10)),
        ..begun(MigrationDirection::Outgoing, strategy)
    }
}

fn by_ticket() -> MigrationRecord {
    let asked = outgoing();
    let spec = asked.spec.map(|spec| MigrationSpec {
        destination: Destination::Ticket("mvmt1.7b7d".into()),
        mirror: MirrorChoice::Existing(id(4)),
        template: MirrorOptions::default(),
        ..spec
    });
    MigrationRecord { spec, ..begun(MigrationDirection::Outgoing, Strategy::Declared) }
}

fn incoming() -> MigrationRecord {
    begun(MigrationDirection::Incoming, Strategy::PspCopied { via: PspVia::LaunchUpdate })
}

fn event() -> EventBody {
    let mut body = EventBody::new(ResourceKind::Migration, Change::RoundFinished, id(2), 7);
    body.name = Some("g1".into());
    body.labels = labels();
    body.data = Parameters::from_iter([("round".into(), json!(2)), ("state".into(), json!("precopy"))]);
    body
}

fn hand_over(settled: Settlement, replaced: Option<GuestRecord>) -> HandOver {
    let peer = format!("sha256:{}", "5a".repeat(32));
    HandOver { peer, settled, unconfirmed: replaced.is_some(), replaced: replaced.map(Box::new) }
}

/// Every document, by the name of its file.
fn all(each: &mut impl Each) {
    each.one("guest-embedded", &embedded());
    each.one("guest-emulated", &emulated());
    each.one("guest-qemu", &qemu());
    each.one("guest-of-another-driver", &foreign());
    each.one("migration-outgoing", &outgoing());
    each.one("migration-by-ticket", &by_ticket());
    each.one("migration-incoming", &incoming());
    each.one("hand-over-open", &hand_over(Settlement::Open, Some(embedded())));
    each.one("hand-over-committed", &hand_over(Settlement::Committed { token: vec![4, 1, 255] }, None));
    each.one("hand-over-aborted", &hand_over(Settlement::Aborted { token: Some(vec![9]) }, None));
    let ending = Ending {
        guest: id(1),
        record: Some(embedded()),
        migration: incoming(),
        hand_over: Some(hand_over(Settlement::Aborted { token: None }, None)),
        events: vec![event()],
    };
    each.one("ending", &ending);
    each.one("event", &event());
    let spec = PeerSpec {
        name: "b".into(),
        address: "b.example:7801".parse().unwrap(),
        identity: format!("sha256:{}", "5a".repeat(32)),
        labels: labels(),
    };
    each.one("peer", &PeerRecord { id: id(5), spec, generation: 2, created_at: at(0) });
    let facts = ImageFacts { size_bytes: 40_960, measurement: [3; 32], abi_min: 1, abi_max: 2 };
    let image = ImageRecord {
        id: id(6),
        name: "helper-2".into(),
        generation: 2,
        content: Some(facts),
        fault: None,
        created_at: at(0),
    };
    each.one("helper-image", &image);
    let settings = HostSettings { labels: labels(), maintenance: true, migration_slots: 3, generation: 4 };
    each.one("settings", &settings);
    each.one("host-id", &HostId { id: id(7) });
    let identity = format!("sha256:{}", "0f".repeat(32)).parse().unwrap();
    each.one("identity", &KnownIdentity { identity });
    each.one("page-secret", &PageSecret { secret: [8; 32] });
    let ticket = Kept {
        source_name: "c".into(),
        source_identity: format!("sha256:{}", "ab".repeat(32)),
        used: true,
        good_until: Some(at(60)),
    };
    each.one("ticket", &ticket);
}

trait Each {
    fn one<T: Document + Debug>(&mut self, name: &str, value: &T);
}

fn file(version: &str, name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/stored/{version}/{name}.json"))
}

fn compare(version: &str, name: &str, text: &str) {
    let path = file(version, name);
    let text = format!("{text}\n");
    if std::env::var_os("UPDATE_STORED").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        there, text,
        "{name} looks otherwise on disk than what builds of this version write. A form that changes gets another version, and \
         a way there from this one; its files go beside these. Only for a version that was never landed: UPDATE_STORED=1"
    );
}

#[test]
fn every_document_looks_as_its_file_and_is_read_from_it() {
    struct Compare;
    impl Each for Compare {
        fn one<T: Document + Debug>(&mut self, name: &str, value: &T) {
            let text = form::write(value).unwrap();
            compare(&format!("v{}", T::VERSION), name, &text);
            assert!(text.starts_with(&format!("{{\"version\":{},", T::VERSION)), "{text}");
            let read: T = form::read(text.as_bytes()).unwrap();
            assert_eq!(format!("{read:?}"), format!("{value:?}"), "{name}");
            assert_eq!(form::renewed::<T>(text.as_bytes()).unwrap(), None, "{name}");
        }
    }
    all(&mut Compare);
}

#[test]
fn every_word_is_in_the_file_of_words() {
    fn words<T: Part>(all: &[T]) -> Vec<Value> {
        all.iter().map(|one| serde_json::to_value(one.form()).unwrap()).collect()
    }
    let mut words = json!({
        "backing": words(ram::BackingForm::ALL),
        "block role": words(ram::RoleForm::ALL),
        "guest state": words(guest::GuestStateForm::ALL),
        "protection": words(guest::ProtectionForm::ALL),
        "outcome": words(migration::OutcomeForm::ALL),
        "direction": words(migration::DirectionForm::ALL),
        "migration state": words(migration::MigrationStateForm::ALL),
        "mode": words(migration::ModeForm::ALL),
        "on timeout": words(migration::OnTimeoutForm::ALL),
        "stream transport": words(migration::TransportForm::ALL),
        "suite": words(migration::SuiteForm::ALL),
        "source after": words(migration::SourceAfterForm::ALL),
        "resource": words(event::ResourceForm::ALL),
        "change": words(event::ChangeForm::ALL),
        "audit": words(migration::AuditModeForm::ALL),
        "audit not run": words(migration::NotRunForm::ALL),
        "strategy": words(&[
            Strategy::Shifted { shift: Shift::FourGib },
            Strategy::Shifted { shift: Shift::MaxPhys },
            Strategy::Shifted { shift: Shift::Explicit { bytes: 8 << 30 } },
            Strategy::IdentityCbit,
            Strategy::Declared,
            Strategy::PspCopied { via: PspVia::LaunchUpdate },
            Strategy::PspCopied { via: PspVia::SendReceive },
        ]),
        "scheduler": words(&[
            Scheduler::Other { nice: -5 },
            Scheduler::Batch { nice: 19 },
            Scheduler::Idle,
            Scheduler::Fifo { priority: 99 },
        ]),
    });
    words.sort_all_objects();
    compare("v7", "words", &serde_json::to_string_pretty(&words).unwrap());
}

/// Pointers to all objects of a document whose members are the form's, and not somebody's free choice.
fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            found.push(at.to_owned());
            for (name, value) in members.iter().filter(|m| !["labels", "data", "driver"].contains(&&**m.0)) {
                objects(value, &format!("{at}/{name}"), found);
            }
        }
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(n, value)| objects(value, &format!("{at}/{n}"), found));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn a_member_more_or_less_anywhere_is_refused() {
    struct Change;
    impl Each for Change {
        fn one<T: Document + Debug>(&mut self, name: &str, value: &T) {
            let whole = serde_json::to_value(value.form()).unwrap();
            let mut found = Vec::new();
            objects(&whole, "", &mut found);
            let refused = |document: &Value| form::read::<T>(document.to_string().as_bytes()).is_err();
            assert!(!refused(&whole), "{name}");
            for at in found {
                let members = whole.pointer(&at).unwrap().as_object().unwrap();
                for member in members.keys() {
                    let mut less = whole.clone();
                    less.pointer_mut(&at).unwrap().as_object_mut().unwrap().remove(member);
                    // Without a version it is of the one before the first, which had fewer members.
                    assert!(refused(&less) || member == "version", "{name} without {at}/{member}");
                }
                let mut more = whole.clone();
                more.pointer_mut(&at).unwrap()["colour"] = json!("red");
                assert!(refused(&more), "{name} with {at}/colour");
            }
        }
    }
    all(&mut Change);
}

#[test]
fn what_is_not_understood_is_said() {
    let told = |change: &dyn Fn(&mut Value)| {
        let mut document = serde_json::to_value(embedded().form()).unwrap();
        change(&mut document);
        let error = form::read::<GuestRecord>(document.to_string().as_bytes()).unwrap_err();
        crate::chain::chain(&error)
    };
    let later = told(&|d| d["version"] = json!(9));
    assert!(
        later.contains("version 9") && later.contains("up to 8") && later.contains("run the build"),
        "{later}"
    );
    let unknown = told(&|d| d["spec"]["colour"] = json!(1));
    assert!(unknown.contains("unknown field `colour`") && unknown.contains("version 8"), "{unknown}");
    let word = told(&|d| d["state"] = json!("melted"));
    assert!(word.contains("melted") && word.contains("state restore"), "{word}");
    let layout = told(&|d| d["layout"][1]["name"] = json!("ram0"));
    assert!(layout.contains("/layout: block 1") && layout.contains("\"ram0\""), "{layout}");
    assert!(told(&|d| d["version"] = json!("five")).contains("version"));
    assert!(told(&|d| *d = json!([])).contains("invalid length"));
}

#[test]
fn documents_of_version_5_are_led_forward() {
    fn of_version_5<T: Document>(name: &str) -> T {
        let text = std::fs::read(file("v5", name)).unwrap();
        assert!(form::renewed::<T>(&text).unwrap().is_some(), "{name}");
        form::read(&text).unwrap()
    }
    for name in ["migration-outgoing", "migration-by-ticket", "migration-incoming"] {
        let record: MigrationRecord = of_version_5(name);
        assert_eq!(record.suite, Suite::Aes256Gcm, "{name}");
        assert_eq!(record.spec.is_some(), name != "migration-incoming");
        assert!(record.spec.is_none_or(|spec| spec.suite == Suite::Aes256Gcm), "{name}");
    }
    let ending: Ending = of_version_5("ending");
    assert_eq!((ending.migration.suite, ending.events.len()), (Suite::Aes256Gcm, 1));
}

#[test]
fn documents_of_version_6_are_led_forward() {
    fn of<T: Document>(version: &str, name: &str) -> T {
        let text = std::fs::read(file(version, name)).unwrap();
        assert!(form::renewed::<T>(&text).unwrap().is_some(), "{name}");
        form::read(&text).unwrap()
    }
    let guest = |name| of::<GuestRecord>("v5", name);
    for name in ["guest-embedded", "guest-emulated", "guest-qemu", "guest-of-another-driver"] {
        assert_eq!(guest(name).audit, None, "{name}");
    }
    for name in ["migration-outgoing", "migration-by-ticket", "migration-incoming"] {
        let record: MigrationRecord = of("v6", name);
        assert_eq!((record.audit, record.evidence), (None, None), "{name}");
        let limits = MigrationLimits::default();
        let asked = record.spec.map(|spec| (spec.audit, spec.limits.audit_timeout_ms));
        assert!(asked.is_none_or(|asked| asked == (AuditMode::Never, limits.audit_timeout_ms)), "{name}");
    }
    let ending: Ending = of("v6", "ending");
    assert!(ending.migration.audit.is_none() && ending.record.is_some_and(|g| g.audit.is_none()));
    let open: HandOver = of("v5", "hand-over-open");
    assert!(open.replaced.is_some_and(|guest| guest.audit.is_none()));
}

#[test]
fn a_document_without_a_version_is_read_as_version_4_had_it() {
    // As a daemon of version 4 wrote them; what a database of its has is in tests/stored.rs.
    let guest = json!({
        "id": id(1),
        "spec": {
            "name": "g1",
            "driver": {"kind": "embedded", "vcpus": 2},
            "blocks": [{"name": "ram0", "size_bytes": 2 << 20, "gpa": 0}],
            "labels": {},
        },
        "layout": [{"name": "ram0", "ram_addr": 0, "size": 2 << 20, "role": "ram", "plugs": []}],
        "state": "stopped", "generation": 1, "protection": "none", "migration": null, "moved_to": null,
        "error": null, "created_at": at(0), "started_at": null,
    });
    let migration = json!({
        "id": id(2), "direction": "outgoing", "guest": id(1), "guest_name": "g1", "peer": "b",
        "spec": {
            "guest": "g1", "destination": {"Ticket": "mvmt1.7b7d"}, "mode": "precopy", "mirror": {"Existing": id(4)},
            "streams": 1, "limits": {"downtime_ms": 40}, "source_after": "delete", "verify": false,
        },
        "strategy": {"kind": "identity-cbit"}, "state": "failed", "generation": 3,
        "progress": {
            "elapsed_ms": 1, "setup_ms": 1, "remaining_ms": null, "expected_downtime_ms": null, "downtime_ms": null,
            "verify_ms": null, "total_bytes": 0, "processed_bytes": 0, "remaining_bytes": 0, "pages_sealed": 0,
            "pages_shared": 0, "pages_zero": 0, "dirty_pages_per_second": 0, "throughput_bytes_per_second": 0,
            "iteration": 0, "precopy_bytes": 0, "downtime_bytes": 0, "helper_errors": 0,
        },
        "rounds": [], "guest_state_after": "running", "error": null, "cancel_requested_at": null,
        "created_at": at(0), "started_at": null, "finished_at": at(1),
    });
    let event = json!({"resource": "guest", "change": "created", "id": id(1), "name": "g1", "generation": 1,
        "labels": {}, "data": {}});
    let hand_over = json!({"peer": "sha256:5a", "settled": {"kind": "open"}, "replaced": guest});
    let ending = json!({"guest": id(1), "record": guest, "migration": migration, "hand_over": hand_over,
        "events": [event]});
    let ending: Ending = form::read(ending.to_string().as_bytes()).unwrap();
    assert!(ending.record.as_ref().is_some_and(|g| g.boot.is_none() && !g.unconfirmed));
    assert_eq!(ending.record.unwrap().spec.backing, None);
    let replaced = ending.hand_over.unwrap().replaced.unwrap();
    assert_eq!((replaced.id, replaced.spec.driver.kind()), (id(1), "embedded"));
    let MigrationRecord { spec: Some(spec), labels, order, peer_identity, .. } = ending.migration else {
        panic!("it was asked for")
    };
    assert!(labels.is_empty() && order == 0 && peer_identity.is_empty());
    assert_eq!(spec.destination, Destination::Ticket("mvmt1.7b7d".into()));
    assert_eq!(spec.mirror, MirrorChoice::Existing(id(4)));
    assert_eq!((spec.stream_transport, spec.template), (StreamTransport::Sealed, MirrorOptions::default()));
    assert_eq!(spec.suite, Suite::Aes256Gcm);
    let limits = MigrationLimits { downtime_ms: 40, ..MigrationLimits::default() };
    assert_eq!(spec.limits, limits);
    assert_eq!(ending.events[0].kind(), "guest.created");
    let ticket: Kept =
        form::read(br#"{"source_name":"c","source_identity":"sha256:ab","used":false}"#).unwrap();
    assert_eq!((ticket.used, ticket.good_until), (false, None));
    let bare = |text: &str| text.as_bytes().to_vec();
    assert_eq!(form::read::<HostId>(&bare(&format!("\"{}\"", id(7)))).unwrap().id, id(7));
    let secret: PageSecret = form::read(&bare(&serde_json::to_string(&[8u8; 32]).unwrap())).unwrap();
    assert_eq!(secret.secret, [8; 32]);
    let identity = format!("sha256:{}", "0f".repeat(32));
    let known: KnownIdentity = form::read(&bare(&format!("\"{identity}\""))).unwrap();
    assert_eq!(known.identity.to_string(), identity);
}

proptest::proptest! {
    #[test]
    fn any_text_is_a_document_or_refused(text in "\\PC{0,300}", at in 0usize..4000, byte: u8) {
        proptest::prop_assert!(form::read::<GuestRecord>(text.as_bytes()).is_err());
        proptest::prop_assert!(form::read::<Ending>(text.as_bytes()).is_err());
        // One byte of a whole one, too: what is read is then what was written there.
        let mut body = form::write(&outgoing()).unwrap().into_bytes();
        let at = at % body.len();
        body[at] = byte;
        if let Ok(read) = form::read::<MigrationRecord>(&body) {
            let again = form::write(&read).unwrap();
            proptest::prop_assert_eq!(form::renewed::<MigrationRecord>(again.as_bytes()).unwrap(), None);
        }
    }
}
