//! Evidence between two hosts: a guest's helper lets nothing go to a destination that is not what the guest's
//! owner demands, and the guest goes on.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mirrorvm::address_space::{PspVia, Strategy};
use mirrorvm::guest::{AttestationSpec, Hex};
use mirrorvm::host::*;
use mirrorvm::migration::wire::{self, kind};
use mirrorvm::sev::model::ModelPlatform;
use mirrorvm::sev::{Platform, Policy, modelled_chip};
use mirrorvm::transport::{Deadlines, Identity, Link, LinkError, ListenerLimits, PeerListener};
use mirrorvm_abi::evidence::Report;
use support::hosts::*;

/// Writes so little that it moves on the slowest machine.
const QUIET: WorkloadSpec =
    WorkloadSpec { working_set_bytes: 1 << 20, dirty_bytes_per_second: 1 << 20, ..WORKLOAD };

fn encrypted(es: bool, attestation: Option<AttestationSpec>) -> DriverSpec {
    let policy = Policy(if es { Policy::NODBG | Policy::ES } else { Policy::NODBG });
    let sev = SevSpec { policy, es, mirror: LaunchMirror { strategy: SHIFTED, workers: 2 }, attestation };
    EmulatedDriver::spec(&WorkloadGuest { vcpus: 1, workload: QUIET, sev: Some(sev) })
}

const DEMANDED: AttestationSpec = AttestationSpec { demanded: true, platforms: None, launches: None };

fn verified(end: &MigrationRecord) -> ([u8; 32], [u8; 32]) {
    match end.evidence {
        Some(Evidence::Verified { launch_digest, platform }) => (launch_digest, platform),
        ref other => panic!("{other:?}"),
    }
}

/// There, and back again as what has arrived itself; by fewer streams than there are workers, too.
async fn there_and_back(driver: DriverSpec, strategy: Strategy) {
    let two = two().await;
    run(&two, guest(driver, &[(16, Some(0))])).await;
    let there = moved(&two.a, &two.b, migration("b", strategy, 1)).await;
    until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > 20)).await;
    let back = moved(&two.b, &two.a, migration("a", strategy, 2)).await;
    // A guest that waits for pages is launched alike everywhere, whatever it was launched with first.
    assert_eq!(verified(&there), verified(&back));
    let chip = ring::digest::digest(&ring::digest::SHA256, &modelled_chip());
    assert_eq!(verified(&there).1, chip.as_ref());
    assert_eq!(two.b.migration(there.id).unwrap().evidence, None, "the destination demands nothing");
    two.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_encrypted_guest_moves_there_and_back_with_evidence_that_its_helpers_have_checked() {
    there_and_back(encrypted(false, None), SHIFTED).await;
    there_and_back(encrypted(false, None), Strategy::PspCopied { via: PspVia::LaunchUpdate }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_with_encrypted_registers_does_too() {
    there_and_back(encrypted(true, None), SHIFTED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_destination_that_is_not_what_the_owner_demands_gets_no_page_and_the_guest_goes_on() {
    let another = ModelPlatform::of_another_chip().endorsement().unwrap().chip;
    for (attestation, why) in [
        (AttestationSpec { platforms: Some(vec![Hex(another)]), ..DEMANDED }, "`platforms`"),
        (AttestationSpec { launches: Some(vec![Hex([7; 32])]), ..DEMANDED }, "launched as something else"),
    ] {
        let two = two().await;
        run(&two, guest(encrypted(false, Some(attestation)), &[(16, Some(0))])).await;
        refused(&two, migration("b", SHIFTED, 2), why).await;
        assert!(two.b.guest("g1").is_err(), "nothing is left of it there");
        two.close().await;
    }
}

/// Its helper does not let the guest of `a` go to `b`, for this reason: no page leaves, it goes on at `a`.
async fn refused(two: &Two, wish: MigrationSpec, why: &str) {
    let id = two.a.create_migration(wish, &Ask::now()).await.unwrap().record.id;
    let over = |host: &Host| Some(host.migration(id).ok()?).filter(|m| m.state.is_terminal());
    let end = until(&two.a, "the end", || over(&two.a)).await;
    let error = end.error.clone().unwrap();
    assert_eq!((end.state, error.code.as_str()), (MigrationState::Failed, "evidence_refused"), "{error:?}");
    assert!(error.detail.contains(why), "{error:?}");
    assert_eq!(end.evidence, None);
    let there = until(&two.b, "the end there", || over(&two.b)).await;
    for record in [&end, &there] {
        let Progress { pages_sealed, pages_shared, processed_bytes, .. } = record.progress;
        assert_eq!((pages_sealed, pages_shared, processed_bytes), (0, 0, 0), "{record:?}");
    }
    let before = ticks(&two.a).unwrap();
    until(&two.a, "the guest goes on", || ticks(&two.a).filter(|t| t.0 > before.0 + 5)).await;
}

/// What the host `b` is when it is not honest: who has its key answers for it, has the honest daemon behind
/// it do the work, and hands everything on as it is said, but for the evidence.
struct Dishonest {
    listener: PeerListener,
    evidence: Arc<Mutex<Played>>,
}

#[derive(Default)]
struct Played {
    /// The firmware's, of every session so far.
    made: Vec<wire::Evidence>,
    /// What is shown in its place; `None`: what was made.
    shown: Option<wire::Evidence>,
}

impl Dishonest {
    /// Stands in for `b` from now on: where `a` knows it to be.
    async fn in_place_of_b(two: &Two) -> Self {
        let [a, b] = [&two.dirs.0, &two.dirs.1]
            .map(|dir| Identity::load(&dir.path().join("state").join("identity")).unwrap());
        let info = two.b.info();
        let honest = info.peer_address.unwrap().address().unwrap();
        let evidence = Arc::new(Mutex::new(Played::default()));
        let (own, played) = (b.clone(), Arc::clone(&evidence));
        let serve = move |near| {
            let far = Link::connect(honest, &a, own.pin(), Deadlines::default()).unwrap();
            hand_on(near, far, &played);
        };
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let limits = ListenerLimits::default();
        let listener = PeerListener::bind(any, &b, Arc::new(|_| true), limits, Arc::new(serve)).unwrap();
        two.a.delete_peer("b", &Ask::now()).await.unwrap();
        let address = listener.local_addr().to_string().parse().unwrap();
        let (name, identity, labels) = (info.name, info.identity, Labels::new());
        two.a.add_peer(PeerSpec { name, address, identity, labels }, &Ask::now()).await.unwrap();
        Self { listener, evidence }
    }

    /// The evidence of the session before.
    fn last(&self) -> wire::Evidence {
        self.evidence.lock().unwrap().made.last().unwrap().clone()
    }

    fn shows(&self, evidence: Option<wire::Evidence>) {
        self.evidence.lock().unwrap().shown = evidence;
    }
}

/// Hands on what either end of a connection says until one of them ends it.
fn hand_on(mut near: Link, mut far: Link, evidence: &Mutex<Played>) {
    let mut message = Vec::new();
    let mut pass = |from: &mut Link, to: &mut Link| -> Result<bool, LinkError> {
        // Either may be the next to speak.
        while from.await_input(Instant::now() + Duration::from_millis(2))? {
            let Some(kind) = from.recv_into(wire::MESSAGE_MAX, &mut message)? else { return Ok(false) };
            if kind == kind::PREPARED {
                let mut prepared: wire::Prepared = wire::parse(&message).unwrap();
                let mut played = evidence.lock().unwrap();
                played.made.extend(prepared.evidence.clone());
                if played.shown.is_some() {
                    prepared.evidence.clone_from(&played.shown);
                    message = wire::written(&prepared).unwrap().to_vec();
                }
            }
            to.send(kind, &message)?;
        }
        Ok(true)
    };
    while matches!((pass(&mut near, &mut far), pass(&mut far, &mut near)), (Ok(true), Ok(true))) {}
    let _ = (near.close(), far.close());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_destination_that_plays_an_earlier_report_back_gets_no_page_and_the_guest_goes_on() {
    let two = two().await;
    let there = Dishonest::in_place_of_b(&two).await;
    run(&two, guest(encrypted(false, None), &[(16, Some(0))])).await;
    let wish = |to| MigrationSpec { stream_transport: StreamTransport::Tls, ..migration(to, SHIFTED, 1) };
    // With the evidence that is made for it, nobody notices who is in between.
    verified(&moved(&two.a, &two.b, wish("b")).await);
    let earlier = there.last();
    moved(&two.b, &two.a, wish("a")).await;
    there.shows(Some(earlier.clone()));
    refused(&two, wish("b"), "not made for this migration").await;
    // All but the nonce, and what was signed with it, is what the right one has.
    let right = there.last();
    let read = |evidence: &wire::Evidence| Report::decode(evidence.report[..].try_into().unwrap()).unwrap();
    let (old, new) = (read(&earlier), read(&right));
    assert_eq!((old.launch_digest, old.policy), (new.launch_digest, new.policy));
    assert!(old.mnonce != new.mnonce && earlier.certificate == right.certificate);
    // Nor is the one that has just been made good for the next attempt, which the honest host gets.
    there.shows(Some(right));
    refused(&two, wish("b"), "not made for this migration").await;
    there.shows(None);
    verified(&moved(&two.a, &two.b, wish("b")).await);
    until(&two.b, "ticks there", || ticks(&two.b).filter(|t| t.0 > 20)).await;
    two.close().await;
    there.listener.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_an_owner_names_himself_is_enough_and_who_demands_nothing_is_shown_as_such() {
    let two = two().await;
    let own = AttestationSpec { platforms: Some(vec![Hex([1; 96]), Hex(modelled_chip())]), ..DEMANDED };
    run(&two, guest(encrypted(false, Some(own)), &[(16, Some(0))])).await;
    let (launch, _) = verified(&moved(&two.a, &two.b, migration("b", SHIFTED, 1)).await);
    two.close().await;

    let two = self::two().await;
    let own = AttestationSpec { launches: Some(vec![Hex([1; 32]), Hex(launch)]), ..DEMANDED };
    run(&two, guest(encrypted(false, Some(own)), &[(16, Some(0))])).await;
    verified(&moved(&two.a, &two.b, migration("b", SHIFTED, 1)).await);
    two.close().await;

    let two = self::two().await;
    let nothing = AttestationSpec { demanded: false, ..DEMANDED };
    run(&two, guest(encrypted(false, Some(nothing)), &[(16, Some(0))])).await;
    let end = moved(&two.a, &two.b, migration("b", SHIFTED, 1)).await;
    assert_eq!(end.evidence, Some(Evidence::NotDemanded));
    two.close().await;
}
