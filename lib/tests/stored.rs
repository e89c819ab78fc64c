//! The database of the last landing: opened with everything in it, saved as it was, put back.
//!
//! `data/stored/v4` has what a daemon of version 4 left; its head says how it was made.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm::address_space::{GuestLayout, PspVia, Shift, Strategy};
use mirrorvm::boot_files::BootFile;
use mirrorvm::codes::Capability;
use mirrorvm::guest::drivers::{Body, Definition, Driver, DriverSchema, Facts, MirrorsOn, Order};
use mirrorvm::guest::{BadParameters, MachineError, Parameters};
use mirrorvm::host::*;
use mirrorvm::memory::Backing;
use mirrorvm::reading::{FieldError, Fields};
use mirrorvm::store::{StoreError, Trouble};
use rusqlite::Connection;
use serde_json::json;

/// The version that this program writes, and the one after it.
const NOW: i64 = 7;
const NEWER: i64 = NOW + 1;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stored/v4").join(name)
}

fn private(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A state directory as the daemon of version 4 left it.
fn version_4(state: &Path) -> PathBuf {
    fs::create_dir_all(state).unwrap();
    private(state, 0o700);
    let database = state.join("mirrorvm.db");
    let connection = Connection::open(&database).unwrap();
    connection.execute_batch(&fs::read_to_string(data("mirrorvm.sql")).unwrap()).unwrap();
    drop(connection);
    private(&database, 0o600);
    fs::copy(data("mirrorvm.mark"), state.join("mirrorvm.mark")).unwrap();
    private(&state.join("mirrorvm.mark"), 0o600);
    database
}

/// What `table` has; the key that a ticket is found by is nobody's business here.
fn rows(database: &Path, table: &str) -> Vec<String> {
    let connection = Connection::open(database).unwrap();
    let mut statement = connection.prepare(&format!("SELECT * FROM {table} ORDER BY 1, 2")).unwrap();
    let columns = statement.column_count();
    let mut found = statement.query([]).unwrap();
    let mut all = Vec::new();
    while let Some(row) = found.next().unwrap() {
        let row: Vec<rusqlite::types::Value> = (0..columns).map(|n| row.get(n).unwrap()).collect();
        all.push(format!("{row:?}"));
    }
    all
}

fn content(database: &Path) -> Vec<Vec<String>> {
    let tables = ["document", "meta", "position", "event", "audit", "audit_outcome", "keyed"];
    tables.map(|table| rows(database, table)).into()
}

fn version_of(database: &Path) -> i64 {
    let connection = Connection::open(database).unwrap();
    connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
}

/// The one backup beside the database.
fn saved(state: &Path) -> PathBuf {
    let all = fs::read_dir(state).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("mirrorvm.db.v4-");
    let found: Vec<PathBuf> = all.filter(name).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

async fn open(state: &Path) -> Host {
    open_with(state, Drivers::default()).await
}

/// Opens the host when nobody is left of an earlier one in this process: not even the owner of a guest.
async fn open_with(state: &Path, drivers: Drivers) -> Host {
    let (state_dir, name) = (state.to_owned(), Some("a".into()));
    let config = HostConfig { state_dir, name, drivers, ..HostConfig::default() };
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Host::open(config.clone()).await {
            Ok(host) => return host,
            Err(OpenError::Store(StoreError::InUse)) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// Gives the host a key: that of its first daemon is not part of the test.
async fn accept(state: &Path) -> Result<(), OpenError> {
    accept_identity(state, |_, _| "\"a test\"".to_owned()).await.map(drop)
}

/// As [`restore_state`], when nobody is left of an earlier host.
async fn restore(from: &Path, state: &Path) -> StateRestored {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match restore_state(from, state, "\"restored\"") {
            Ok(restored) => return restored,
            Err(OpenError::Store(StoreError::InUse)) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

fn guest(host: &Host, name: &str) -> GuestRecord {
    host.guest(name).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_of_the_last_landing_opens_with_everything_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let database = version_4(&state);
    let before = content(&database);
    accept(&state).await.unwrap();
    assert_eq!(version_of(&database), NOW);
    assert_eq!((version_of(&saved(&state)), content(&saved(&state))), (4, before));
    check_state(&state).unwrap();

    let host = open(&state).await;
    assert_eq!(host.info().id.to_string(), "01a228a9-b669-7241-8db3-b819df0f5369");
    check_guests(&host);
    check_migrations(&host);
    check_the_rest(&host);
    host.shutdown().await;
    drop(host);
    check_state(&state).unwrap();
    saved(&state);
}

/// A start writes what is not so any more, and nothing of guests that are what they were.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_writes_only_the_guests_that_it_finds_changed() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    version_4(&state);
    accept(&state).await.unwrap();
    let mut seen = Vec::new();
    for round in 0..4 {
        let host = open(&state).await;
        let idle = guest(&host, "embedded-1");
        // It ran when its daemon ended: the first start says so, and it is what it was from then on.
        let ran = guest(&host, "emulated-1");
        assert_eq!((idle.state, ran.state), (GuestState::Stopped, GuestState::Stopped));
        seen.push((idle.generation, ran.generation));
        if round == 1 {
            let labels = |_: &Labels| Labels::from([("tier".into(), "other".into())]);
            let changed = host.change_labels("embedded-1", labels, &Ask::now()).await.unwrap();
            assert!(changed.generation > idle.generation);
        }
        assert_eq!(guest(&host, "embedded-1").spec.labels["tier"], if round == 0 { "test" } else { "other" });
        host.shutdown().await;
        drop(host);
    }
    let [(first, ran), rest @ ..] = seen.as_slice() else { panic!("{seen:?}") };
    let wanted = [(*first, ran + 1), (first + 2, ran + 1), (first + 2, ran + 1)];
    assert_eq!(rest, wanted);
}

fn check_guests(host: &Host) {
    let names: Vec<String> = host.guests().iter().map(|g| g.spec.name.clone()).collect();
    assert_eq!(names, ["embedded-1", "emulated-1", "sev-1", "qemu-1"]);
    let embedded = guest(host, "embedded-1");
    let workload = json!({"fill": "random", "working_set_bytes": 4096, "dirty_bytes_per_second": 0});
    let driver = DriverSpec::of("embedded", &json!({"vcpus": 1, "workload": workload})).unwrap();
    assert_eq!(embedded.spec.driver, driver);
    assert_eq!(embedded.spec.labels, Labels::from([("tier".into(), "test".into())]));
    assert_eq!((embedded.spec.backing, embedded.boot, embedded.unconfirmed), (None, None, false));
    let block = |n: usize| {
        let b = &embedded.spec.blocks[n];
        (b.name.as_str(), b.size_bytes, b.gpa.map(|gpa| gpa.get()))
    };
    assert_eq!([block(0), block(1)], [("ram0", 8 << 20, Some(0)), ("dimm", 2 << 20, None)]);
    let placed: Vec<_> = embedded
        .layout
        .blocks()
        .iter()
        .map(|b| (b.name.as_str(), b.ram_addr.get(), b.size, b.plugs.len()))
        .collect();
    let helper = ("mirrorvm.helper", 10_485_760, 6_291_456, 1);
    assert_eq!(placed, [("ram0", 0, 8 << 20, 1), ("dimm", 8 << 20, 2 << 20, 0), helper]);
    assert_eq!((embedded.state, embedded.generation), (GuestState::Stopped, 2));
    assert_eq!(embedded.protection, ProtectionLevel::None);
    assert_eq!(embedded.created_at.to_string(), "2026-11-29T18:55:41.0704659Z");

    let emulated = guest(host, "emulated-1");
    assert_eq!(emulated.protection, ProtectionLevel::Modelled);
    // It ran; its machine went with its daemon.
    assert_eq!(emulated.state, GuestState::Stopped);
    assert_eq!(emulated.error.map(|e| e.code.to_string()).as_deref(), Some("daemon_restarted"));
    assert!(emulated.started_at.is_some());
    let sev = guest(host, "sev-1");
    let mirror = json!({"strategy": {"kind": "psp-copied", "via": "launch-update"}, "workers": 2});
    let expected = json!({"policy": 1, "es": false, "mirror": mirror});
    assert_eq!(sev.spec.driver.parameters()["sev"], expected);

    let qemu = guest(host, "qemu-1");
    assert_eq!((qemu.spec.backing, qemu.spec.driver.kind()), (Some(Backing::Memfd), "qemu"));
    assert_eq!(qemu.spec.driver.parameters()["kernel"], "/srv/mirrorvm/images/vmlinuz");
    let BootFile { bytes, sha256 } = qemu.boot.unwrap().kernel.unwrap();
    assert_eq!((bytes, &sha256[..4]), (5000, &[98, 43, 139, 29][..]));
}

fn check_migrations(host: &Host) {
    let all = host.migrations();
    let seen: Vec<_> = all.iter().map(|m| (m.order, m.direction, m.state, m.peer.as_str())).collect();
    use MigrationDirection::{Incoming, Outgoing};
    use MigrationState::{Failed, Succeeded};
    let expected = [
        (1, Outgoing, Failed, "b"),
        (2, Outgoing, Succeeded, "b"),
        (3, Incoming, Succeeded, "b"),
        (4, Outgoing, Failed, "gone"),
    ];
    assert_eq!(seen, expected);
    let first = &all[0];
    let spec = first.spec.as_ref().unwrap();
    let strategy = Strategy::Shifted { shift: Shift::Explicit { bytes: 8 << 30 } };
    assert_eq!(spec.destination, Destination::Host("b".into()));
    assert_eq!((spec.mirror.clone(), first.strategy), (MirrorChoice::Template(strategy), strategy));
    let limits = MigrationLimits {
        bandwidth_bytes_per_second: Some(1 << 30),
        downtime_ms: 2000,
        ..MigrationLimits::default()
    };
    assert_eq!((spec.limits, spec.streams, spec.verify), (limits, 2, false));
    assert_eq!((spec.mode, spec.source_after), (MigrationMode::Precopy, SourceAfter::KeepStopped));
    assert_eq!(spec.template, MirrorOptions::default());
    assert_eq!(first.error.as_ref().map(|e| e.code.to_string()).as_deref(), Some("helper_not_launched"));
    let left = &all[1];
    assert_eq!((left.strategy, left.guest_state_after), (Strategy::Declared, Some(GuestState::Stopped)));
    assert_eq!((left.rounds.len(), left.workers.len(), left.labels["owner"].as_str()), (2, 2, "ops"));
    assert!(
        left.rounds[1].paused && left.rounds[0].pages_sealed > 2000 && left.progress.downtime_ms.is_some()
    );
    let came = &all[2];
    assert!(came.spec.is_none() && came.peer_identity.starts_with("sha256:"));
    // Its journal says that it is this host's: the token is there to be carried to the source.
    let token = host.hand_over_token(came.id).unwrap();
    assert_eq!((token.outcome, &token.token[..4]), (HandOverOutcome::Committed, &[4, 1, 255, 255][..]));
    assert_eq!(all[3].strategy, Strategy::PspCopied { via: PspVia::LaunchUpdate });
}

fn check_the_rest(host: &Host) {
    let peers: Vec<_> = host.peers().into_iter().map(|p| (p.spec.name, p.spec.address.to_string())).collect();
    let expected = [("b", "127.0.0.1:7912"), ("gone", "127.0.0.1:9")];
    assert_eq!(peers, expected.map(|(name, at)| (name.to_owned(), at.to_owned())));
    let settings = host.settings();
    assert_eq!(settings.labels, Labels::from([("site".into(), "lab".into())]));
    assert_eq!((settings.maintenance, settings.migration_slots, settings.generation), (false, 4, 2));
    let images = host.images().unwrap();
    assert!(images.iter().any(|i| i.name == "helper-2" && i.content.is_none()), "{images:?}");
    // The log is read on from its first entry, and its numbers mean what they meant.
    let page = host.events().page(None, 1000, &[], |_| true).unwrap();
    assert_eq!(page.events[0].body.kind(), "host.started");
    assert!(page.events.iter().any(|e| e.body.kind() == "migration.round_finished"));
    // Told before the host is opened, whatever becomes of it.
    assert_eq!(page.events.last().unwrap().body.kind(), "host.started");
    assert!(page.events.len() > 40 && !page.more, "{}", page.events.len());
    assert!(page.events[0].cursor.to_string().starts_with(&format!("{}-", host.ledger().epoch())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_saved_is_put_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let database = version_4(&state);
    let before = content(&database);
    accept(&state).await.unwrap();
    let host = open(&state).await;
    host.shutdown().await;
    drop(host);
    let restored = restore(&saved(&state), &state).await;
    assert!(restored.replaced.is_some() && restored.incomplete.is_none());
    let after = content(&database);
    assert_eq!(version_of(&database), 4);
    // Documents, events, outcomes, records with keys; the other tables say that it was put back.
    for table in [0, 3, 5, 6] {
        assert_eq!(after[table], before[table]);
    }
    assert_eq!(after[4].len(), before[4].len() + 1);
    accept(&state).await.unwrap();
    let host = open(&state).await;
    assert_eq!(host.guests().len(), 4);
    assert!(host.guests().iter().all(|g| g.unconfirmed), "its peers may know more");
    host.shutdown().await;
    drop(host);
    // That it was put back is noted once: from then on every guest's record has it.
    let host = open(&state).await;
    assert_eq!(host.guests().len(), 4);
    assert!(host.guests().iter().all(|g| g.unconfirmed), "nobody was asked meanwhile");
    host.shutdown().await;
}

/// A small file system, unmounted in the end.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_for_what_it_was_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    let options = ["-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs"];
    assert!(Command::new("mount").args(options).arg(&state).status().unwrap().success());
    let _small = Small(state.clone());
    let database = version_4(&state);
    let files = || ["mirrorvm.db", "mirrorvm.mark"].map(|name| fs::read(state.join(name)).unwrap());
    let before = files();
    let mut filler = fs::File::create(state.join("filler")).unwrap();
    while filler.write_all(&[0x5a; 4096]).is_ok() {}
    // Room for what a start writes in any case, and not for a second database.
    filler.set_len(filler.metadata().unwrap().len() - (64 << 10)).unwrap();
    let error = accept(&state).await.unwrap_err();
    let OpenError::Store(refused @ StoreError::NotSaved { found: 4, .. }) = &error else {
        panic!("{error:?}")
    };
    assert_eq!(refused.trouble(), Some(Trouble::Full), "{refused:?}");
    let told = refused.to_string();
    assert!(told.contains("mirrorvm.db is of schema version 4 and was left as it is"), "{told}");
    assert!(told.contains("mirrorvm.db.v4-") && told.contains("make room there"), "{told}");
    assert!(files() == before && version_of(&database) == 4);
    let left: Vec<_> = fs::read_dir(&state).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("v4-")), "{left:?}");
    drop(filler);
    fs::remove_file(state.join("filler")).unwrap();
    accept(&state).await.unwrap();
    assert_eq!((version_of(&database), version_of(&saved(&state))), (NOW, 4));
}

const CHILD: &str = "MIRRORVM_STORED_TEST_CHILD";

/// Not a test of its own: the body of the process that the next test kills.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_that_brings_a_database_forward() {
    let Some(state) = std::env::var_os(CHILD) else { return };
    accept(Path::new(&state)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_is_killed_on_the_way_forward_leaves_what_was_or_what_is_to_be() {
    let seed = std::env::var("MIRRORVM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random: u64 = seed.unwrap_or(0x0073_746f_7265_6435);
    println!("seed {random} (MIRRORVM_TEST_SEED)");
    let (mut early, mut late) = (0, 0);
    for _ in 0..24 {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let database = version_4(&state);
        let before = content(&database);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_brings_a_database_forward"])
            .env(CHILD, &state)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(random % 60_000));
        child.kill().unwrap();
        child.wait().unwrap();
        check_state(&state).unwrap();
        if version_of(&database) == 4 {
            early += 1;
            assert_eq!(content(&database), before);
        } else {
            late += 1;
        }
        accept(&state).await.unwrap();
        assert_eq!((version_of(&database), version_of(&saved(&state))), (NOW, 4));
        assert_eq!(content(&saved(&state)), before);
        check_state(&state).unwrap();
        let hidden = fs::read_dir(&state).unwrap().map(|e| e.unwrap().file_name());
        let left: Vec<_> =
            hidden.filter(|name| name.to_string_lossy().starts_with(".mirrorvm.db.v4")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    println!("killed before the change {early} times, after it {late} times");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_database_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let database = version_4(&state);
    Connection::open(&database).unwrap().pragma_update(None, "user_version", NEWER).unwrap();
    let before = fs::read(&database).unwrap();
    let error = accept(&state).await.unwrap_err();
    let OpenError::Store(refused @ StoreError::TooNew { found: NEWER, known: NOW, .. }) = &error else {
        panic!("{error:?}")
    };
    assert!(refused.to_string().contains("mirrorvm.db has schema version 8"), "{refused}");
    assert_eq!(fs::read(&database).unwrap(), before);
}

/// A driver whose machines are never made; it knows these members, and says that its guests need so many
/// bytes of their first block.
struct Paper(&'static [&'static str], u64);

impl Driver for Paper {
    fn name(&self) -> &'static str {
        "paper"
    }

    fn schema(&self) -> DriverSchema {
        DriverSchema {
            title: "DriverPaper",
            description: "None.",
            properties: Parameters::new(),
            required: Vec::new(),
            components: Vec::new(),
        }
    }

    fn read(&self, _: &mut Fields<'_, '_>, _: u64) -> Option<DriverSpec> {
        None
    }

    fn understood(&self, spec: &DriverSpec) -> Result<DriverSpec, BadParameters> {
        let known = spec.parameters().into_iter().filter(|(name, _)| self.0.contains(&name.as_str()));
        Ok(DriverSpec::new("paper", known.collect()))
    }

    fn check(&self, _: &Definition<'_>, _: &mut Vec<FieldError>) {}

    fn facts(&self, _: &DriverSpec) -> Facts {
        Facts { vcpus: 1, ..Facts::default() }
    }

    fn mirrors_on(&self) -> MirrorsOn {
        MirrorsOn::Software
    }

    fn starts_in(&self, _: &DriverSpec, home: &GuestLayout) -> Result<(), MachineError> {
        let have = home.ram().next().map_or(0, |block| block.size);
        if have < self.1 { Err(MachineError::TooSmall { have, need: self.1 }) } else { Ok(()) }
    }

    fn make(&self, _: Order<'_>) -> Result<Body, MachineError> {
        Err(MachineError::Unsupported { what: "paper" })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stored_guest_of_a_driver_that_is_gone_or_knows_less_is_kept_and_its_start_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let with = async |drivers: Drivers| open_with(&state, drivers).await;
    let paper = |known| Drivers::default().with(Arc::new(Paper(known, 0))).unwrap();
    let driver = DriverSpec::of("paper", &json!({"size": 3, "disks": [{"file": "a"}]})).unwrap();
    let host = with(paper(&["size", "disks"])).await;
    let spec = support::hosts::guest(driver, &[(8, Some(0))]);
    let defined = host.define_guest(spec, &Ask::now()).await.unwrap();
    host.shutdown().await;
    drop(host);
    let cases = [
        (Drivers::default(), "no driver \"paper\""),
        (paper(&["size"]), "/driver/disks: the driver paper of this build does not know this member"),
    ];
    for (drivers, why) in cases {
        let host = with(drivers).await;
        let kept = host.guest("g1").unwrap();
        assert_eq!((kept.id, &kept.spec), (defined.id, &defined.spec));
        match host.guest_action("g1", GuestAction::Start, &Ask::now()).await {
            Err(HostError::CapabilityMissing { what: Capability::Driver, why: told }) => {
                assert!(told.contains(why), "{told}")
            }
            other => panic!("{other:?}"),
        }
        // Others start as ever.
        let other = support::hosts::guest(EmulatedDriver::spec(&workload()), &[(8, Some(0))]);
        let other = GuestSpec { name: format!("g-{}", why.len()), ..other };
        let other = host.define_guest(other, &Ask::now()).await.unwrap();
        host.guest_action(&other.spec.name, GuestAction::Start, &Ask::now()).await.unwrap();
        host.shutdown().await;
    }
    let host = with(paper(&["size", "disks"])).await;
    assert_eq!(host.guest("g1").unwrap().spec, defined.spec, "nothing of it was lost meanwhile");
    host.shutdown().await;
}

fn workload() -> WorkloadGuest {
    let workload = WorkloadSpec {
        fill: Fill::Zero,
        working_set_bytes: 0,
        dirty_bytes_per_second: 0,
        withdraws_readiness_after_ms: None,
    };
    WorkloadGuest { vcpus: 1, workload, sev: None }
}

/// A build whose guests need more than those of the build before refuses new ones; it keeps what is defined.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stored_guest_that_cannot_start_in_its_ram_is_kept_and_its_start_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let needing = |bytes| Drivers::default().with(Arc::new(Paper(&[], bytes))).unwrap();
    let spec = || {
        let driver = DriverSpec::of("paper", &json!({})).unwrap();
        support::hosts::guest(driver, &[(8, None), (8, Some(0))])
    };
    let host = open_with(&state, needing(0)).await;
    let defined = host.define_guest(spec(), &Ask::now()).await.unwrap();
    host.shutdown().await;
    drop(host);
    let host = open_with(&state, needing(64 << 20)).await;
    assert_eq!(host.guest("g1").unwrap().spec, defined.spec);
    for ask in [Ask { dry_run: true, ..Ask::now() }, Ask::now()] {
        match host.guest_action("g1", GuestAction::Start, &ask).await {
            Err(HostError::LayoutUnusable { why }) => assert!(why.contains("needs 67108864"), "{why}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(host.guest("g1").unwrap().state, GuestState::Stopped);
        let another = GuestSpec { name: "g2".into(), ..spec() };
        match host.define_guest(another, &ask).await {
            Err(HostError::Invalid(errors)) => {
                // The first that is plugged: a guest starts from no other.
                let found: Vec<_> = errors.iter().map(|e| (e.pointer.as_str(), e.code)).collect();
                assert_eq!(found, [("/memory/blocks/1/size_bytes", "layout_unusable")]);
            }
            other => panic!("{other:?}"),
        }
    }
    host.delete_guest("g1", &Ask::now()).await.unwrap();
    host.shutdown().await;
}
