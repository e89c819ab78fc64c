//! A host whose state directory has no room left: what cannot be stored is not made, whoever asks for it, and
//! nobody has to do anything when there is room again.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mirrorvm::address_space::BlockSpec;
use mirrorvm::host::*;
use mirrorvm::mirror::HelperImage;
use mirrorvm::store::{StoreError, Trouble};

use support::hosts::{SHIFTED, guest, migration, until};

/// A small file system, unmounted in the end.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Self {
        std::fs::create_dir(at).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs"];
        assert!(Command::new("mount").args(options).arg(at).status().unwrap().success());
        Self(at.to_owned())
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("filler")).unwrap();
        while file.write_all(&[0x5a; 4096]).is_ok() {}
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn spec(name: &str) -> GuestSpec {
    let workload = WorkloadSpec {
        fill: Fill::Zero,
        working_set_bytes: 0,
        dirty_bytes_per_second: 0,
        withdraws_readiness_after_ms: None,
    };
    let driver = EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload, sev: None });
    GuestSpec { name: name.into(), ..guest(driver, &[(8, Some(0))]) }
}

fn peer(name: &str) -> PeerSpec {
    let identity = format!("sha256:{}", format!("{:02x}", name.as_bytes()[0]).repeat(32));
    let address = "192.0.2.1:7801".parse().unwrap();
    PeerSpec { name: name.into(), address, identity, labels: Labels::new() }
}

fn labels(value: &str) -> Labels {
    Labels::from([("n".to_owned(), value.to_owned())])
}

/// Opens the host when nobody is left of an earlier one in this process: not even the owner of a guest that
/// was refused.
async fn open(dir: &Path) -> Host {
    let config = HostConfig {
        state_dir: dir.to_owned(),
        name: Some("a".into()),
        peer_listen: Some("127.0.0.1:0".parse().unwrap()),
        ..HostConfig::default()
    };
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

/// Everything that is stored, as somebody sees it.
fn all_of(host: &Host) -> String {
    format!(
        "{:#?} {:#?} {:#?} {:#?} {:#?}",
        host.guests(),
        host.peers(),
        host.migrations(),
        host.images().unwrap(),
        host.settings()
    )
}

/// Each kind of change, and what the host says to it. `g1` is stopped, `g2` runs, `b` and `c` are peers, `i`
/// is an image.
async fn each(host: &Host) -> Vec<(&'static str, Result<(), HostError>)> {
    let ticket = TicketSpec {
        source_name: "c".into(),
        source_identity: format!("sha256:{}", "5b".repeat(32)),
        expires_in_seconds: 60,
    };
    let leaving = MigrationSpec { guest: "g2".into(), verify: false, ..migration("b", SHIFTED, 1) };
    let block = BlockSpec { name: "more".into(), size_bytes: 4 << 20, gpa: None };
    let image = HelperImage::built_in().bytes().to_vec();
    let of_content = |e| match e {
        ContentError::Host(e) => e,
        ContentError::Header(e) => panic!("{e}"),
    };
    vec![
        ("labels", host.change_labels("g1", move |_| labels("other"), &Ask::now()).await.map(|_| ())),
        (
            "labels of a running guest",
            host.change_labels("g2", move |_| labels("other"), &Ask::now()).await.map(|_| ()),
        ),
        ("definition", host.define_guest(spec("g3"), &Ask::now()).await.map(|_| ())),
        ("RAM block", host.add_ram_block("g1", block, &Ask::now()).await.map(|_| ())),
        ("migration", host.create_migration(leaving, &Ask::now()).await.map(|_| ())),
        ("pause", host.guest_action("g2", GuestAction::Pause, &Ask::now()).await.map(|_| ())),
        ("start", host.guest_action("g1", GuestAction::Start, &Ask::now()).await.map(|_| ())),
        ("stop", host.guest_action("g2", GuestAction::Stop, &Ask::now()).await.map(|_| ())),
        ("deletion", host.delete_guest("g1", &Ask::now()).await.map(|_| ())),
        ("peer", host.add_peer(peer("d"), &Ask::now()).await.map(|_| ())),
        (
            "change of a peer",
            host.change_peer("b", |p| PeerSpec { labels: labels("p"), ..p }, &Ask::now()).map(|_| ()),
        ),
        ("forgetting a peer", host.delete_peer("c", &Ask::now()).await.map(|_| ())),
        ("settings", host.change_settings(|s| s.labels = labels("s"), &Ask::now()).map(|_| ())),
        ("ticket", host.create_ticket(ticket, &Ask::now()).await.map(|_| ())),
        ("image", host.create_image("j", &Ask::now()).map(|_| ())),
        ("image's content", host.fill_image("i", image, &Ask::now()).map(|_| ()).map_err(of_content)),
        ("deletion of an image", host.delete_image("i", &Ask::now()).map(|_| ())),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_made_that_cannot_be_stored() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED (not root: no file system can be mounted): this test ran nothing");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let small = Small::mount(&state);
    let host = open(&state).await;
    host.define_guest(spec("g1"), &Ask::now()).await.unwrap();
    host.define_guest(spec("g2"), &Ask::now()).await.unwrap();
    for name in ["b", "c"] {
        host.add_peer(peer(name), &Ask::now()).await.unwrap();
    }
    host.create_image("i", &Ask::now()).unwrap();
    host.guest_action("g2", GuestAction::Start, &Ask::now()).await.unwrap();
    until(&host, "the guest runs", || {
        let g2 = host.guest("g2").unwrap();
        (g2.state == GuestState::Running && g2.readiness.is_some_and(|r| r.ready)).then_some(())
    })
    .await;

    small.fill();
    // What room there is within the database's own files is used up first, by acknowledged changes.
    let mut kept = Labels::new();
    for n in 0..100_000 {
        let next = labels(&format!("{n}"));
        let wanted = next.clone();
        match host.change_labels("g1", move |_| wanted, &Ask::now()).await {
            Ok(_) => kept = next,
            Err(HostError::Storage { trouble: Trouble::Full, .. }) => break,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(host.guest("g1").unwrap().spec.labels, kept);
    let (before, events) = (all_of(&host), host.events().latest());
    for (what, result) in each(&host).await {
        assert!(
            matches!(result, Err(HostError::Storage { trouble: Trouble::Full, .. })),
            "{what}: {result:?}"
        );
    }
    assert_eq!(before, all_of(&host), "what was refused has changed something");
    assert_eq!(events, host.events().latest(), "what was refused is told of");
    assert_eq!(host.storage().await.failing.map(|f| f.0), Some(Trouble::Full));

    small.free();
    until(&host, "the database takes something", || host.info().storage.failing.is_none().then_some(()))
        .await;
    assert_eq!(host.info().storage.owed, 0, "nothing had happened");
    host.guest_action("g2", GuestAction::Pause, &Ask::now()).await.unwrap();
    host.guest_action("g2", GuestAction::Stop, &Ask::now()).await.unwrap();
    host.define_guest(spec("g3"), &Ask::now()).await.unwrap();
    host.delete_image("i", &Ask::now()).unwrap();
    host.shutdown().await;
    drop(host);
    let host = open(&state).await;
    assert_eq!(host.guest("g1").unwrap().spec.labels, kept);
    assert_eq!(host.guests().len(), 3);
    assert_eq!((host.peers().len(), host.images().unwrap().len()), (2, 1));
    host.shutdown().await;
}
