//! Mirrors on real KVM when things go wrong: bad images, failed launches, helpers that die, what stays
//! behind; and two workers at once.
#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping it")]

mod support;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mirrorvm::addr::{PAGE_SIZE, RamPage};
use mirrorvm::address_space::{
    HelperPlacement, HelperSet, MailboxSize, MirrorPlan, PlanRequest, Shift, Strategy, plan,
};
use mirrorvm::hypervisor::Hypervisor as _;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::{GuestRam, Mapping};
use mirrorvm::mirror::{HelperImage, HelperSource, LaneError, Mirror, MirrorError, WorkerEnd};
use mirrorvm::sev::model::ModelPlatform;
use mirrorvm::sev::{Context, Platform, Policy, modelled_chip};
use mirrorvm_abi::evidence::{EVIDENCE_BYTES, RELEASE_AT, Release};
use mirrorvm_abi::header::{FILE_MAX, HEADER_BYTES, HeaderError};
use mirrorvm_abi::layout::{IMAGE_MAX, IMAGE_VA, LAYOUT_HASH};
use mirrorvm_abi::mailbox::{BATCH_MAX, Fatal};
use mirrorvm_abi::op::{Begin, Greeting, Start, Status};
use mirrorvm_abi::record::{Direction, Front, GROUP_LABEL, Kind, LISTED_BYTES, piece_aad, piece_nonce};
use mirrorvm_helper::evidence::mnonce;
use ring::{aead, digest, hkdf};
use support::{Pair, kvm, ordinary_begin, random_fill};
use x25519_dalek::{X25519_BASEPOINT_BYTES, x25519};

const SECRET: [u8; 32] = *b"a secret that no chance turns up";

/// One test at a time: they count what the process holds.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mirror with as many workers as its plan has.
fn launch(
    kvm: &KvmHost,
    name: &str,
    plan: Arc<MirrorPlan>,
    ram: &GuestRam,
    image: &HelperImage,
) -> Result<Mirror, MirrorError> {
    let workers = plan.mailbox.workers;
    Mirror::launch(kvm, name, plan, workers, ram, image, HelperSource::Loaded { secret: &SECRET })
}

fn planned(kvm: &KvmHost, ram: &GuestRam, image: &HelperImage, workers: u32) -> MirrorPlan {
    let strategy = Strategy::Shifted { shift: Shift::FourGib };
    let (limits, size) = (kvm.limits(), MailboxSize { workers, slots: 4 });
    plan(&PlanRequest::new(&ram.layout(), image.header(), &limits, strategy, size)).unwrap()
}

/// The whole of the helper's block.
fn helper_memory(ram: &GuestRam) -> Vec<u8> {
    let layout = ram.layout();
    let block = layout.helper().unwrap();
    let mut bytes = vec![0; block.size as usize];
    ram.read(block.ram_addr, &mut bytes).unwrap();
    bytes
}

fn holds(memory: &[u8], secret: &[u8]) -> bool {
    memory.windows(secret.len()).any(|w| w == secret)
}

#[test]
fn two_workers_at_once_carry_every_page() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    const BYTES: u64 = 64 << 20;
    let mut pair = Pair::new(&kvm, BYTES, 2);
    random_fill(&pair.source_ram, 11);
    pair.begin();
    let total = BYTES / PAGE_SIZE;
    for epoch in 1..=2 {
        // The second time everything goes again, over the other stream.
        let batches: Vec<Vec<RamPage>> = (0..total)
            .step_by(BATCH_MAX)
            .map(|first| (first..first + BATCH_MAX as u64).map(RamPage::new).collect())
            .collect();
        let lanes: Vec<_> = pair.source.lanes().iter_mut().zip(pair.destination.lanes()).collect();
        assert_eq!(lanes.len(), 2);
        std::thread::scope(|scope| {
            for (stream, (source, destination)) in lanes.into_iter().enumerate() {
                let mine: Vec<_> = batches
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| (i + epoch as usize) % 2 == stream)
                    .map(|(_, batch)| batch.as_slice())
                    .collect();
                scope.spawn(move || {
                    let mut sealed = Vec::new();
                    // Two requests under way: the helper works on one while the host carries the other.
                    let mut next = mine.iter();
                    let mut submit = |source: &mut mirrorvm::mirror::Lane| {
                        let Some(batch) = next.next() else { return };
                        let slot = source.acquire().unwrap();
                        let pages: Vec<u64> = batch.iter().map(|p| p.get()).collect();
                        source.submit_export(slot, &pages, epoch);
                    };
                    submit(source);
                    for _ in &mine {
                        submit(source);
                        let done = source.wait().unwrap();
                        sealed.resize(done.len, 0);
                        source.read_payload(done.slot, 0, &mut sealed);
                        source.release(done.slot);
                        let slot = destination.acquire().unwrap();
                        destination.write_payload(slot, 0, &sealed);
                        destination.submit_import(slot, done.pages, done.len as u32, epoch);
                        let imported = destination.wait().unwrap();
                        assert_eq!(imported.pages, BATCH_MAX as u32);
                        destination.release(imported.slot);
                    }
                    assert_eq!((source.in_flight(), destination.in_flight()), (0, 0));
                });
            }
        });
        let token = pair.source.end_epoch().unwrap();
        pair.destination.check_epoch(&token).unwrap();
        if epoch == 1 {
            random_fill(&pair.source_ram, 12);
        }
    }
    pair.source.paused().unwrap();
    let start = pair.source.start(&Start { state: [5; 32], shared_pages: 0 }).unwrap();
    pair.destination.state_arrived(&[5; 32]).unwrap();
    pair.destination.check_start(&start).unwrap();
    pair.destination.commit().unwrap();
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    for page in (0..total).map(RamPage::new) {
        pair.source_ram.read_page(page, &mut a).unwrap();
        pair.destination_ram.read_page(page, &mut b).unwrap();
        assert!(a == b, "{page:?} differs");
    }
    for stat in pair.source.watch().stats().iter().chain(&pair.destination.watch().stats()) {
        assert_eq!(stat.ended, None);
        assert!(stat.exits > 1, "both workers worked: {stat:?}");
    }
}

#[test]
fn a_helper_refuses_forged_records_on_kvm_as_in_software() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let mut pair = Pair::new(&kvm, 8 << 20, 1);
    random_fill(&pair.source_ram, 3);
    pair.begin();
    let mut before = [0; 4096];
    pair.destination_ram.read_page(RamPage::new(1), &mut before).unwrap();
    let mut sealed = pair.export(&[RamPage::new(1)], 1).unwrap();
    sealed[100] ^= 1;
    let refused = pair.import(&sealed, 1, 1);
    assert_eq!(refused, Err(LaneError::Refused { status: Status::Unsealed, index: 0 }));
    sealed[100] ^= 1;
    let dead = pair.import(&sealed, 1, 1);
    assert_eq!(dead, Err(LaneError::Refused { status: Status::WrongState, index: 0 }));
    let mut after = [0; 4096];
    pair.destination_ram.read_page(RamPage::new(1), &mut after).unwrap();
    assert!(before == after, "an unauthenticated page was written");
    assert!(pair.destination.commit().is_err());
    pair.destination.abort().unwrap();
}

#[test]
fn an_import_that_breaks_off_with_groups_at_the_helper_ends_in_abort() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let mut pair = Pair::new(&kvm, 8 << 20, 2);
    random_fill(&pair.source_ram, 5);
    pair.begin();
    let pages: Vec<RamPage> = (1..=BATCH_MAX as u64).map(RamPage::new).collect();
    let sealed = pair.export(&pages, 1).unwrap();
    // As many as there are slots, on both lanes; nobody waits for an answer. Only the first is genuine.
    for lane in pair.destination.lanes() {
        while let Some(slot) = lane.acquire() {
            lane.write_payload(slot, 0, &sealed);
            lane.submit_import(slot, pages.len() as u32, sealed.len() as u32, 1);
        }
        assert!(lane.in_flight() > 1);
    }
    let token = pair.destination.abort().unwrap();
    assert_eq!(token[0], Kind::Abort as u8);
    assert!(pair.destination.lanes().iter().all(|lane| lane.in_flight() == 0));
}

/// What this process holds that mirrors are made of.
#[derive(Debug, PartialEq, Eq)]
struct Census {
    fds: usize,
    kvm_and_memfds: usize,
    mirror_threads: usize,
    mappings_of_memfds: usize,
    mappings_of_vcpus: usize,
}

fn census() -> Census {
    let links: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|f| std::fs::read_link(f.unwrap().path()).ok())
        .map(|l| l.to_string_lossy().into_owned())
        .collect();
    let threads = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|t| std::fs::read_to_string(t.unwrap().path().join("comm")).ok())
        .filter(|name| name.starts_with("mir"))
        .filter(|name| name.trim().ends_with("-census"));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = |what: &str| maps.lines().filter(|l| l.contains(what)).count();
    Census {
        fds: links.len(),
        kvm_and_memfds: links.iter().filter(|l| l.contains("kvm") || l.contains("memfd")).count(),
        mirror_threads: threads.count(),
        mappings_of_memfds: mapped("memfd:"),
        mappings_of_vcpus: mapped("kvm-vcpu"),
    }
}

#[test]
fn mirrors_come_and_go_and_nothing_stays() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let ram = support::ram(8 << 20);
    let image = HelperImage::built_in();
    let plan = Arc::new(planned(&kvm, &ram, &image, 2));
    let made = || launch(&kvm, "census", Arc::clone(&plan), &ram, &image).unwrap();
    let before = census();
    {
        let _mirror = made();
        let running = census();
        assert_eq!(running.mirror_threads, 2, "the census sees what there is: {running:?}");
        assert_eq!(running.kvm_and_memfds, before.kvm_and_memfds + 3, "a VM and two vCPUs");
        assert_eq!(running.mappings_of_vcpus, before.mappings_of_vcpus + 2);
    }
    assert_eq!(census(), before);
    for turn in 0..20 {
        let mut mirror = made();
        if turn % 2 == 0 {
            mirror.hello().unwrap();
        }
        drop(mirror);
        assert_eq!(census(), before, "turn {turn}");
    }
}

/// Places in what changed of a memory at which 32 bytes are the private half of a public key, as they are or
/// clamped.
fn private_halves(before: &[u8], after: &[u8], public_key: &[u8; 32]) -> Vec<[u8; 32]> {
    let changed: Vec<bool> = before.iter().zip(after).map(|(a, b)| a != b).collect();
    let windows = after.array_windows::<32>().zip(changed.array_windows::<32>());
    // Random bytes differ from what was there before in more than half of their places.
    let likely = windows.filter(|(_, changed)| changed.iter().filter(|c| **c).count() > 16).map(|(w, _)| *w);
    likely.filter(|key| x25519(*key, X25519_BASEPOINT_BYTES) == *public_key).collect()
}

#[test]
fn a_helper_that_has_begun_or_greets_anew_holds_its_ephemeral_key_nowhere() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let ram = support::ram(8 << 20);
    let image = HelperImage::built_in();
    let plan = Arc::new(planned(&kvm, &ram, &image, 1));
    let mut mirror = launch(&kvm, "ephemeral", plan, &ram, &image).unwrap();
    let before = helper_memory(&ram);
    let first = mirror.hello().unwrap();
    let held = private_halves(&before, &helper_memory(&ram), &first.public_key);
    assert_eq!(held.len(), 1, "the search finds it where it is kept, and there alone");
    let second = mirror.hello().unwrap();
    let memory = helper_memory(&ram);
    assert!(private_halves(&before, &memory, &first.public_key).is_empty(), "replaced by the next one");
    let key = private_halves(&before, &memory, &second.public_key)[0];

    let theirs = [5; 32];
    let peer = Greeting { nonce: [4; 32], public_key: x25519(theirs, X25519_BASEPOINT_BYTES) };
    let begin = ordinary_begin(peer);
    mirror.begin(&begin).unwrap();
    let memory = helper_memory(&ram);
    assert!(private_halves(&before, &memory, &second.public_key).is_empty(), "spent by Begin");
    let shared = x25519(key, peer.public_key);
    assert_eq!(shared, x25519(theirs, second.public_key));
    assert!(!holds(&memory, &shared), "and what came of it is gone, too");
    // A Begin that is refused spends it as well.
    mirror.cancel().unwrap();
    let third = mirror.hello().unwrap();
    assert_eq!(private_halves(&before, &helper_memory(&ram), &third.public_key).len(), 1);
    let low = Greeting { public_key: [0; 32], ..peer };
    for (what, bad) in
        [("no such stream", Begin { streams: 9, ..begin }), ("a key", Begin { peer: low, ..begin })]
    {
        let greeting = mirror.hello().unwrap();
        assert!(mirror.begin(&bad).is_err(), "{what}");
        assert!(private_halves(&before, &helper_memory(&ram), &greeting.public_key).is_empty(), "{what}");
    }
}

#[test]
fn a_bare_helper_checks_evidence_before_it_seals_anything() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let ram = support::ram(8 << 20);
    let image = HelperImage::built_in();
    let plan = Arc::new(planned(&kvm, &ram, &image, 1));
    let mut mirror = launch(&kvm, "evidence", plan, &ram, &image).unwrap();

    // A guest of the model, launched with one page of zeroes.
    let (platform, memory) = (ModelPlatform::new(), Mapping::memfd("t", PAGE_SIZE).unwrap());
    let guest = platform.context();
    guest.init(false).unwrap();
    guest.launch_start(Policy(Policy::NODBG), None).unwrap();
    guest.launch_update_data(&memory, 0, PAGE_SIZE).unwrap();
    guest.launch_measure().unwrap();
    guest.launch_finish().unwrap();
    let mut launched = [0; 32];
    launched.copy_from_slice(digest::digest(&digest::SHA256, &[0; PAGE_SIZE as usize]).as_ref());
    let release = Release::demanded(&[modelled_chip()], &[launched]).unwrap();
    // As its owner would have it delivered with the secret. Without encryption the host can do that, too.
    let layout = ram.layout();
    let placement = HelperPlacement::new(image.header(), &layout, HelperSet::Shifted).unwrap();
    let at = layout.helper().unwrap().ram_addr.checked_add(placement.secret_at + RELEASE_AT as u64).unwrap();
    ram.write(at, &release.encode()).unwrap();

    let theirs = Greeting { nonce: [4; 32], public_key: x25519([5; 32], X25519_BASEPOINT_BYTES) };
    let begin = ordinary_begin(theirs);
    let evidence = |own: &Greeting| -> [u8; EVIDENCE_BYTES] {
        let report = guest.attestation(&mnonce(&theirs, own, &begin.session)).unwrap();
        let both = [&report[..], &platform.endorsement().unwrap().pek[..]].concat();
        both.try_into().unwrap()
    };
    let first = mirror.hello().unwrap();
    let stale = evidence(&first);
    let refused = Err(LaneError::Refused { status: Status::EvidenceRefused, index: 0 });
    assert_eq!(mirror.begin(&begin), refused, "none");
    let _ = mirror.hello().unwrap();
    assert_eq!(mirror.begin_with(&begin, Some(&stale)), refused, "of an earlier session");
    let own = mirror.hello().unwrap();
    let mut forged = evidence(&own);
    forged[70] ^= 1;
    assert_eq!(mirror.begin_with(&begin, Some(&forged)), refused, "a signature of which one bit is another");
    let own = mirror.hello().unwrap();
    let good = evidence(&own);
    let asked = std::time::Instant::now();
    mirror.begin_with(&begin, Some(&good)).unwrap();
    println!("the helper took {:?} to look at it and to make keys", asked.elapsed());
}

/// What an HKDF makes of these.
fn expanded(secret: &hkdf::Prk, info: &[&[u8]]) -> [u8; 32] {
    struct Len;
    impl hkdf::KeyType for Len {
        fn len(&self) -> usize {
            32
        }
    }
    let mut out = [0; 32];
    secret.expand(info, Len).unwrap().fill(&mut out).unwrap();
    out
}

/// The key of a group of stream 0 of a session that began with these: what somebody would need of whom it is
/// that recorded the group.
fn group_key(input: &[u8], source: &Greeting, begin: &Begin, group: &[u8]) -> [u8; 32] {
    let salt = [source.encode(), begin.peer.encode()].concat();
    let session = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(input);
    let (suite, direction) = ([begin.suite as u8], [Direction::Forward as u8]);
    let label = b"mirrorvm stream secret v3";
    let stream = expanded(&session, &[label, &begin.session, &begin.transcript, &suite, &direction, &[0; 2]]);
    let header = &group[..mirrorvm_abi::record::HEADER_BYTES];
    let key = expanded(&hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &stream), &[GROUP_LABEL, header]);

    let front = Front::read(group).unwrap();
    let listed: [u8; LISTED_BYTES] = front.pages().next().unwrap().encode();
    let mut piece = group[front.bytes()..].to_vec();
    piece.truncate(PAGE_SIZE as usize + aead::AES_256_GCM.tag_len());
    let opener = aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, &key).unwrap());
    let nonce = aead::Nonce::assume_unique_for_key(piece_nonce(0));
    opener.open_in_place(nonce, aead::Aad::from(piece_aad(0, listed)), &mut piece).expect("it is the key");
    key
}

/// Places of a memory with 32 bytes that look drawn by lot, were not there `before` and have stayed in all of
/// `since`; but for what everybody was `told`.
fn secrets_at(before: &[u8], since: &[&[u8]], told: &[u8]) -> Vec<usize> {
    // With this SHA-256 begins everything, in the order of this machine's bytes.
    let sha256: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    let told = [told, sha256.map(u32::to_ne_bytes).as_flattened()].concat();
    let told: HashSet<&[u8]> = told.windows(8).collect();
    let drawn = |at: usize| {
        let [now, then] = [since[0], before].map(|memory| &memory[at..at + 32]);
        let new = now.iter().zip(then).filter(|(a, b)| a != b).count();
        new > 28
            && now.iter().collect::<HashSet<_>>().len() > 20
            && since.iter().all(|memory| &memory[at..at + 32] == now)
            && !now.chunks(8).any(|piece| told.contains(piece))
    };
    (0..before.len() - 32).step_by(4).filter(|at| drawn(*at)).collect()
}

#[test]
fn a_session_that_was_called_off_leaves_no_key_to_its_pages_in_its_helper() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    for audit in [false, true] {
        called_off_without_a_key_left(&kvm, audit);
    }
}

fn called_off_without_a_key_left(kvm: &KvmHost, audit: bool) {
    let mut pair = Pair::new(kvm, 1 << 20, 1);
    random_fill(&pair.source_ram, 5);
    let before = helper_memory(&pair.source_ram);
    let own = pair.source.hello().unwrap();
    let theirs = [5; 32];
    let peer = Greeting { nonce: [4; 32], public_key: x25519(theirs, X25519_BASEPOINT_BYTES) };
    let begin = Begin { audit, ..ordinary_begin(peer) };
    pair.source.begin(&begin).unwrap();
    let began = helper_memory(&pair.source_ram);
    let told = [&own.encode()[..], &begin.encode()].concat();
    let input = [[42; 32], x25519(theirs, own.public_key)].concat();
    let pages: Vec<_> = (0..4).map(RamPage::new).collect();
    for (epoch, pages) in (1..).zip([&pages[..1], &pages[..], &pages[2..]]) {
        let group = pair.export(pages, epoch).unwrap();
        pair.source.end_epoch().unwrap();
        let key = group_key(&input, &own, &begin, &group);
        assert!(!holds(&helper_memory(&pair.source_ram), &key), "the key of a group that has left");
    }
    let open = helper_memory(&pair.source_ram);
    assert!(
        !secrets_at(&before, &[&began, &open], &told).is_empty(),
        "the search finds them while they are used"
    );
    pair.source.cancel().unwrap();
    let closed = helper_memory(&pair.source_ram);
    let left = secrets_at(&before, &[&began, &open, &closed], &told);
    assert!(left.is_empty(), "{left:x?}");
}

#[test]
fn a_helper_whose_guest_was_committed_holds_no_key_to_the_pages_that_came() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let mut pair = Pair::new(&kvm, 1 << 20, 1);
    random_fill(&pair.source_ram, 5);
    let before = [&pair.source_ram, &pair.destination_ram].map(helper_memory);
    let (own, peer) = (pair.source.hello().unwrap(), pair.destination.hello().unwrap());
    let key = private_halves(&before[0], &helper_memory(&pair.source_ram), &own.public_key)[0];
    let input = [[42; 32], x25519(key, peer.public_key)].concat();
    let begin = ordinary_begin(peer);
    let theirs = Begin { source: false, peer: own, ..begin };
    pair.source.begin(&begin).unwrap();
    pair.destination.begin(&theirs).unwrap();
    let began = helper_memory(&pair.destination_ram);
    let told = [&own.encode()[..], &peer.encode(), &begin.encode(), &theirs.encode()].concat();
    let pages: Vec<_> = (0..(1 << 20) / PAGE_SIZE).map(RamPage::new).collect();
    for pages in pages.chunks(64) {
        let group = pair.export(pages, 1).unwrap();
        let key = group_key(&input, &own, &begin, &group);
        pair.import(&group, pages.len() as u32, 1).unwrap();
        assert!(!holds(&helper_memory(&pair.destination_ram), &key), "the key of a group that has come");
    }
    pair.source.paused().unwrap();
    let start = pair.source.start(&Start { state: [7; 32], shared_pages: 0 }).unwrap();
    pair.destination.state_arrived(&[7; 32]).unwrap();
    pair.destination.check_start(&start).unwrap();
    let open = helper_memory(&pair.destination_ram);
    let held = secrets_at(&before[1], &[&began, &open], &told);
    let commit = pair.destination.commit().unwrap();
    let closed = helper_memory(&pair.destination_ram);
    let left = secrets_at(&before[1], &[&began, &open, &closed], &told);
    // What it mints tokens with may stay; the stream's secret, which is two such places, does not.
    assert!(left.len() + 2 <= held.len(), "{left:x?} of {held:x?}");
    pair.source.check_commit(&commit).unwrap();
}

#[test]
fn a_dropped_mirror_leaves_no_secret() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let ram = support::ram(8 << 20);
    let image = HelperImage::built_in();
    let plan = Arc::new(planned(&kvm, &ram, &image, 2));
    let mut mirror = launch(&kvm, "secret", Arc::clone(&plan), &ram, &image).unwrap();
    let own = mirror.hello().unwrap();
    let begin = Begin { streams: 2, ..ordinary_begin(own) };
    mirror.begin(&begin).unwrap();
    assert!(holds(&helper_memory(&ram), &SECRET), "the search finds it while it is there");
    let text = (image.header().text_end - image.header().base) as usize;
    assert!(holds(&helper_memory(&ram), &image.bytes()[..text]), "and the helper's code");
    drop(mirror);
    // Not the secret alone: keys, stacks, maps, tables, everything is gone.
    assert!(helper_memory(&ram).iter().all(|b| *b == 0), "the helper's block is not empty");
    let mut page = [0; 4096];
    for block in ram.layout().ram() {
        for p in block.ram_addr.page().get()..(block.ram_addr.get() + block.size) / PAGE_SIZE {
            ram.read_page(RamPage::new(p), &mut page).unwrap();
            assert!(!holds(&page, &SECRET[..16]), "page {p}");
        }
    }
}

#[test]
fn a_failed_launch_leaves_no_secret_and_nothing_else() {
    let _alone = alone();
    let Some(kvm) = kvm() else { return };
    let ram = support::ram(8 << 20);
    let image = HelperImage::built_in();
    let good = planned(&kvm, &ram, &image, 1);
    let before = census();
    let fails = |plan: MirrorPlan, image: &HelperImage| {
        let Err(error) = launch(&kvm, "census", Arc::new(plan), &ram, image) else {
            panic!("this launch must fail")
        };
        assert!(
            helper_memory(&ram).iter().all(|b| *b == 0),
            "{error:?} left something in the helper's block"
        );
        assert_eq!(census(), before, "{error:?}");
        error
    };
    // A plan for more RAM than there is.
    let large = support::ram(32 << 20);
    let other = planned(&kvm, &large, &image, 1);
    drop(large);
    let before_other = census();
    assert_eq!(before_other, before);
    assert!(matches!(fails(other, &image), MirrorError::PlanMismatch));
    // Slots that KVM refuses: two at one address.
    let mut doubled = good.clone();
    doubled.slots[1].gpa = doubled.slots[0].gpa;
    assert!(matches!(fails(doubled, &image), MirrorError::Hypervisor(_)));
    // A configuration that the helper refuses.
    let mut odd = good.clone();
    odd.mailbox.slots = 17;
    let error = fails(odd, &image);
    let not_ready = MirrorError::NotReady(LaneError::Ended(WorkerEnd::Fatal(Fatal::BadConfig)));
    assert_eq!(format!("{error:?}"), format!("{not_ready:?}"));
    // A helper whose first instruction is undefined: no handler, so a triple fault.
    let mut bytes = image.bytes().to_vec();
    let entry = (image.header().entry - IMAGE_VA) as usize;
    bytes[entry..entry + 2].copy_from_slice(&[0x0f, 0x0b]);
    let broken = HelperImage::parse(bytes).unwrap();
    let error = fails(good.clone(), &broken);
    let ended = matches!(error, MirrorError::NotReady(LaneError::Ended(WorkerEnd::Exit(_))));
    assert!(ended, "{error:?}");
    // And after all that a good one starts.
    let mut mirror = launch(&kvm, "census", Arc::new(good), &ram, &image).unwrap();
    mirror.hello().unwrap();
}

#[test]
fn helper_images_that_do_not_fit_are_refused_by_name() {
    let good = HelperImage::built_in();
    let bytes = good.bytes();
    let h = *good.header();
    let patched = |at: usize, value: &[u8]| {
        let mut file = bytes.to_vec();
        file[at..at + value.len()].copy_from_slice(value);
        HelperImage::parse(file).map(|i| i.measurement())
    };
    let u32_at = |at, value: u32| patched(at, &value.to_le_bytes());
    let u64_at = |at, value: u64| patched(at, &value.to_le_bytes());
    assert_eq!(u32_at(16, 1), Ok(good.measurement()), "unchanged is good");
    for len in [0, 1, HEADER_BYTES - 1] {
        let short = HelperImage::parse(bytes[..len].to_vec()).map(|_| ());
        assert_eq!(short, Err(HeaderError::Short { len }));
    }
    for (at, byte) in bytes.iter().enumerate().take(16) {
        assert_eq!(patched(at, &[byte ^ 1]), Err(HeaderError::NotAHelper));
    }
    assert_eq!(u32_at(16, 2), Err(HeaderError::HeaderVersion { version: 2 }));
    assert_eq!(u32_at(20, 95), Err(HeaderError::HeaderVersion { version: 1 }), "another header length");
    let abi = |min: u32, max: u32| patched(24, &[min.to_le_bytes(), max.to_le_bytes()].concat());
    let v = mirrorvm_abi::ABI_VERSION;
    for (min, max) in [(1, 1), (v - 1, v - 1), (v + 1, v + 6), (0, 0), (v + 1, 1), (u32::MAX, u32::MAX)] {
        assert_eq!(abi(min, max), Err(HeaderError::Abi { min, max }));
    }
    assert!(abi(0, v).is_ok() && abi(1, v + 4).is_ok() && abi(0, u32::MAX).is_ok());
    assert_eq!(u64_at(32, LAYOUT_HASH ^ 1), Err(HeaderError::Layout { hash: LAYOUT_HASH ^ 1 }));
    let section = |field, value| Err(HeaderError::Section { field, value });
    let end = IMAGE_VA + IMAGE_MAX;
    for value in [0, IMAGE_VA + 4096, IMAGE_VA - 1, u64::MAX] {
        assert_eq!(u64_at(40, value), section("base", value));
    }
    for (at, field) in [(56, "text_end"), (64, "rodata_end"), (72, "data_end"), (80, "bss_end")] {
        for value in [0, IMAGE_VA - 4096, end + 4096, u64::MAX, u64::MAX - 4095, 1 << 63] {
            assert_eq!(u64_at(at, value), section(field, value), "{value:#x}");
        }
        let unaligned = [h.text_end, h.rodata_end, h.data_end, h.bss_end][(at - 56) / 8] + 8;
        assert_eq!(u64_at(at, unaligned), section(field, unaligned));
    }
    // Sections that go back.
    assert_eq!(u64_at(56, h.rodata_end + 4096), section("rodata_end", h.rodata_end));
    for value in [0, IMAGE_VA, IMAGE_VA + HEADER_BYTES as u64 - 1, h.text_end, u64::MAX] {
        assert_eq!(u64_at(48, value), section("entry", value));
    }
    for suites in [0, 1, 1 << 2, !(1 << 1)] {
        assert_eq!(u64_at(88, suites), Err(HeaderError::Suites { suites }), "{suites:#x}");
    }
    // Those of later builds are taken.
    assert!(u64_at(88, u64::MAX).is_ok());
    let declared = h.data_end - h.base;
    for actual in [bytes.len() - 1, bytes.len() + 1, bytes.len() - 4096, bytes.len() + 4096] {
        let mut file = bytes.to_vec();
        file.resize(actual, 0);
        let refused = HelperImage::parse(file).map(|_| ());
        assert_eq!(refused, Err(HeaderError::FileLength { declared, actual }));
    }
    let actual = FILE_MAX + 1;
    let huge = HelperImage::parse(vec![0; actual]).map(|_| ());
    assert_eq!(huge, Err(HeaderError::FileLength { declared: FILE_MAX as u64, actual }));
}
