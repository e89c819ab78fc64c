//! Faults between and of two real daemons. After every one of them the guest runs at exactly one host, or its
//! migration is in doubt until the hosts can talk again; nothing half-made stays; the next attempt works.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm::migration::wire::{self, Abilities, Hello, HelloAck, Purpose, Refused, kind};
use mirrorvm::transport::{Deadlines, Identity, Link, ListenerLimits, PeerListener};
use mirrorvm_tests::{
    Act, Break, Daemon, Pair, Request, Way, embedded, is_terminal, kvm, migration, until, until_some,
};
use serde_json::{Value, json};

/// The version of the peer protocol that this build speaks.
const OURS: u32 = wire::PROTOCOL_VERSIONS[0];

const GUEST: &str = "g1";

fn quick(to: &str, mode: &str) -> Value {
    let mut m = migration(GUEST, to, mode);
    m["limits"] = json!({"stall_timeout_ms": 3000});
    m["streams"] = json!(2);
    m
}

fn slow(to: &str, mode: &str) -> Value {
    let mut m = migration(GUEST, to, mode);
    m["limits"] = json!({"bandwidth_bytes_per_second": 2 << 20, "stall_timeout_ms": 5000});
    m
}

fn state_of(m: &Value) -> String {
    m["state"].as_str().unwrap().to_owned()
}

fn code_of(m: &Value) -> String {
    m["error"]["code"].as_str().unwrap_or("-").to_owned()
}

/// Whether a guest's console moves on within a little while. Both hosts are watched over the same time.
fn tick_numbers(hosts: [&Daemon; 2]) -> [u64; 2] {
    hosts.map(|h| if h.guest_state(GUEST) == "absent" { 0 } else { h.ticks(GUEST).map_or(0, |t| t.number) })
}

/// The guest ticks at `at` while `other` shows not one tick more.
fn ticks_only_at(at: &Daemon, other: &Daemon) {
    let before = tick_numbers([at, other]);
    at.ticks_beyond(GUEST, before[0] + 20);
    assert_eq!(tick_numbers([at, other])[1], before[1], "the guest ticks at {} too", other.name);
    assert_ne!(other.guest_state(GUEST), "running", "two running");
}

/// Waits until a migration that `from` started has ended there and at `to`; says where the guest is. Checks
/// all that must hold after a fault.
fn settled<'d>(from: &'d Daemon, to: &'d Daemon, id: &str) -> (&'d Daemon, Value) {
    let end = from.migration_end(id);
    let (at, other) = if end["state"] == "succeeded" { (to, from) } else { (from, to) };
    at.guest_in(GUEST, "running");
    other.nothing_of(GUEST);
    ticks_only_at(at, other);
    let record = at.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!((&record["migration"], &record["error"]), (&Value::Null, &Value::Null), "{record}");
    let there = to.get(&format!("/v1/migrations/{id}"));
    match there.status {
        // The destination never heard of it.
        404 => assert_ne!(end["state"], "succeeded"),
        _ => {
            let there = there.expect(200).json();
            assert_eq!(
                there["state"] == "succeeded",
                end["state"] == "succeeded",
                "here {end}, there {there}"
            );
            assert!(is_terminal(&there["state"]), "{there}");
        }
    }
    assert!(at.items("/v1/mirrors").is_empty() && other.items("/v1/mirrors").is_empty(), "mirrors are gone");
    (at, end)
}

#[derive(Default, Debug)]
struct Tally {
    failed: u32,
    succeeded: u32,
    in_doubt: u32,
    untouched: u32,
}

/// One migration with the network broken at one point, then the network mended, then all checks. Gives where
/// the guest is.
fn broken_migration(pair: &Pair, from_a: bool, mode: &str, plan: Break, tally: &mut Tally) -> bool {
    let (from, to, proxy) =
        if from_a { (&pair.a, &pair.b, &pair.to_b) } else { (&pair.b, &pair.a, &pair.to_a) };
    let before = from.ticks(GUEST).unwrap();
    proxy.arm(plan);
    let id = from.migrate(&quick(&to.name, mode));
    let first = from.follow(&format!("/v1/migrations/{id}"), 60, |m| {
        is_terminal(&m["state"]) || m["state"] == "in_doubt"
    });
    let broken = proxy.is_broken();
    if first["state"] == "in_doubt" {
        tally.in_doubt += 1;
        let guest = from.follow(&format!("/v1/guests/{GUEST}"), 10, |g| g["state"] == "in_doubt");
        assert_eq!(guest["migration"], json!(id));
        // The source holds still while nobody knows, whatever the destination does.
        let held = from.ticks(GUEST).unwrap();
        for action in ["start", "resume", "stop"] {
            let refused = from.act(&format!("/v1/guests/{GUEST}/{action}"));
            assert_eq!(refused.expect(409).problem(), "guest_migrating", "{action}");
        }
        assert_eq!(from.ticks(GUEST).unwrap(), held);
    }
    proxy.mend();
    let (at, end) = settled(from, to, &id);
    println!(
        "{} to {}, {mode}, {:?} {:?} of link {} after {} records and {} bytes: {}{} {}",
        from.name,
        to.name,
        plan.act,
        plan.way,
        plan.connection,
        plan.records,
        plan.bytes,
        if first["state"] == "in_doubt" { "in_doubt, then " } else { "" },
        state_of(&end),
        code_of(&end)
    );
    match (broken, state_of(&end).as_str()) {
        (false, s) => {
            assert_eq!(s, "succeeded", "nothing was broken: {end}");
            tally.untouched += 1;
        }
        (true, "failed") => {
            tally.failed += 1;
            assert!(
                ["peer_lost", "peer_unreachable", "peer_protocol"].contains(&code_of(&end).as_str()),
                "{end}"
            );
            assert_eq!(end["guest_state_after"], "running");
        }
        (true, "succeeded") => tally.succeeded += 1,
        (true, other) => panic!("{other}: {end}"),
    }
    at.ticks_beyond(GUEST, before.number);
    std::ptr::eq(at, &pair.a)
}

/// Cuts at points spread over both directions of the control link and of the stream: handshake, preparation,
/// every epoch, state, START, COMMIT. The guest goes to and fro, so that every break is followed by another
/// try.
#[test]
fn a_cut_anywhere_leaves_the_guest_at_exactly_one_host() {
    if !kvm() {
        return;
    }
    let seed: u64 = 0x5eed_2026;
    println!("seed {seed:#x}");
    let pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 1 << 20));

    // What a whole migration carries, in records.
    let mut at_a = true;
    let mut whole = Vec::new();
    for mode in ["stop_and_copy", "precopy"] {
        let (from, to, proxy) =
            if at_a { (&pair.a, &pair.b, &pair.to_b) } else { (&pair.b, &pair.a, &pair.to_a) };
        proxy.watch();
        let id = from.migrate(&quick(&to.name, mode));
        let (at, end) = settled(from, to, &id);
        assert_eq!(end["state"], "succeeded", "{end}");
        at_a = std::ptr::eq(at, &pair.a);
        let traffic = proxy.traffic();
        println!("{mode}: {traffic:?}");
        assert_eq!(traffic.len(), 3, "a control link and two streams");
        whole.push((mode, traffic));
    }

    let mut points = Vec::new();
    let mut random = seed;
    let mut dice = |n: u64| {
        // SplitMix64.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    };
    let control = whole[0].1[0];
    // Stop-and-copy has the same records each time: every boundary of the control link, both ways; every
    // second one in the middle of the record.
    for (way, records) in [(Way::Up, control.up), (Way::Down, control.down)] {
        for record in 0..records {
            let act = if record % 3 == 2 { Act::Truncate } else { Act::Cut };
            points.push((
                "stop_and_copy",
                Break { connection: 0, way, records: record, bytes: dice(2) * (1 + dice(20)), act },
            ));
        }
    }
    for connection in [1, 2] {
        let stream = whole[0].1[connection];
        for (way, records) in [(Way::Up, stream.up), (Way::Down, stream.down)] {
            for _ in 0..3 {
                let (records, bytes) = (dice(records), dice(30));
                points.push(("stop_and_copy", Break { connection, way, records, bytes, act: Act::Cut }));
            }
        }
    }
    let control = whole[1].1[0];
    for _ in 0..4 {
        let up =
            Break { connection: 0, way: Way::Up, records: dice(control.up), bytes: dice(20), act: Act::Cut };
        let down = Break { way: Way::Down, records: dice(control.down), ..up };
        let connection = 1 + dice(2) as usize;
        let data = Break { connection, records: dice(whole[1].1[connection].up), ..up };
        points.extend([("precopy", up), ("precopy", down), ("precopy", data)]);
    }
    assert!(points.len() >= 25, "{}", points.len());
    let mut tally = Tally::default();
    for (mode, plan) in &points {
        at_a = broken_migration(&pair, at_a, mode, *plan, &mut tally);
    }
    println!("{} points: {tally:?}", points.len());
    // The spread is worth its name only if it reached both sides of START.
    assert!(tally.failed >= 10 && tally.in_doubt >= 2 && tally.succeeded >= 1, "{tally:?}");

    // And a clean one.
    let (from, to) = if at_a { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
    let id = from.migrate(&quick(&to.name, "precopy"));
    assert_eq!(settled(from, to, &id).1["state"], "succeeded");
}

/// A host made by the test: its key is known to the daemon, what it says is the test's.
struct Fake {
    _listener: PeerListener,
    _dir: tempfile::TempDir,
}

impl Fake {
    fn new(daemon: &Daemon, name: &str, says: impl Fn(Link) + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::create(&dir.path().join("id")).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let limits = ListenerLimits::default();
        let listener =
            PeerListener::bind(any, &identity, Arc::new(|_| true), limits, Arc::new(says)).unwrap();
        add_peer(daemon, name, &listener.local_addr().to_string(), &identity.pin().to_string());
        Self { _listener: listener, _dir: dir }
    }
}

fn add_peer(daemon: &Daemon, name: &str, address: &str, identity: &str) {
    let body = json!({"name": name, "address": address, "identity": identity});
    let _ = daemon.post("/v1/hosts", &body).expect(201);
}

fn hello(link: &mut Link) -> Hello {
    let (_, payload) = wire::expect(link, &[kind::HELLO], 64 << 10).unwrap();
    wire::parse(&payload).unwrap()
}

fn agree(link: &mut Link, protocol: u32) {
    let ack = HelloAck { protocol, host: "fake".into() };
    wire::send(link, kind::HELLO_ACK, &ack).unwrap();
}

/// Keeps a link open until the other side ends it.
fn hold(mut link: Link) {
    while let Ok(Some(_)) = link.recv(wire::MESSAGE_MAX) {}
}

#[test]
fn peers_that_are_not_what_they_should_be_get_a_typed_answer() {
    if !kvm() {
        return;
    }
    let a = Daemon::start("a");
    a.run_guest(&embedded(GUEST, 16, 0));
    let b = Daemon::start("b");
    b.add_peer(&a, &a.peer_address);

    // Another host's key under a known address.
    let other = |byte: &str| format!("sha256:{}", byte.repeat(32));
    add_peer(&a, "wrong-key", &b.peer_address, &other("ab"));
    // A host that does not know us.
    let c = Daemon::start("c");
    add_peer(&a, "stranger", &c.peer_address, &c.identity);
    // Nobody, and somebody who speaks something else.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    add_peer(&a, "nobody", &free.to_string(), &other("ac"));
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    add_peer(&a, "plain", &plain.local_addr().unwrap().to_string(), &other("ad"));
    let server = std::thread::spawn(move || {
        let (mut stream, _) = plain.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"220 mail.example ESMTP\r\n").unwrap();
        let _ = stream.read(&mut [0; 512]);
    });
    // Accepts TCP and says nothing at all.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    add_peer(&a, "mute", &mute.local_addr().unwrap().to_string(), &other("ae"));
    let _fakes = [
        Fake::new(&a, "newer", |mut link| {
            hello(&mut link);
            agree(&mut link, 99);
            hold(link);
        }),
        Fake::new(&a, "newer-refuses", |mut link| {
            hello(&mut link);
            let refused = Refused { code: "peer_version".into(), detail: "this host speaks [99]".into() };
            wire::send(&mut link, kind::REFUSED, &refused).unwrap();
            let _ = link.close();
        }),
        Fake::new(&a, "refuses", |mut link| {
            hello(&mut link);
            agree(&mut link, OURS);
            wire::expect(&mut link, &[kind::PREPARE], wire::MESSAGE_MAX).unwrap();
            // What a peer says is shown to people: bounded and printable.
            let detail = format!("no \u{1b}[31m{}", "x".repeat(5000));
            wire::send(&mut link, kind::REFUSED, &Refused { code: "Go Away!".into(), detail }).unwrap();
            let _ = link.close();
        }),
        Fake::new(&a, "silent", |mut link| {
            hello(&mut link);
            agree(&mut link, OURS);
            wire::expect(&mut link, &[kind::PREPARE], wire::MESSAGE_MAX).unwrap();
            hold(link);
        }),
        Fake::new(&a, "silent-at-once", hold),
        Fake::new(&a, "babbles", |mut link| {
            hello(&mut link);
            link.send(kind::HELLO_ACK, b"{\"protocol\": \"4\", \"host\": \"x\"}").unwrap();
            hold(link);
        }),
        Fake::new(&a, "jumps", |mut link| {
            hello(&mut link);
            agree(&mut link, OURS);
            wire::expect(&mut link, &[kind::PREPARE], wire::MESSAGE_MAX).unwrap();
            link.send(kind::COMMITTED, b"{\"token\": [], \"verify_us\": 0, \"reason\": null}").unwrap();
            hold(link);
        }),
        Fake::new(&a, "floods", |mut link| {
            hello(&mut link);
            let _ = link.send(kind::HELLO_ACK, &vec![b' '; 1 << 20]);
            hold(link);
        }),
    ];
    for (peer, codes) in [
        ("wrong-key", &["peer_identity"][..]),
        ("stranger", &["peer_identity"]),
        ("nobody", &["peer_unreachable"]),
        ("plain", &["peer_not_mirrorvm"]),
        ("mute", &["peer_unreachable"]),
        ("newer", &["peer_version"]),
        ("newer-refuses", &["peer_version"]),
        ("refuses", &["peer_refused"]),
        ("silent", &["peer_lost"]),
        ("silent-at-once", &["peer_lost"]),
        ("babbles", &["peer_protocol"]),
        ("jumps", &["peer_protocol"]),
        ("floods", &["peer_protocol", "peer_lost"]),
    ] {
        let mut m = migration(GUEST, peer, "precopy");
        m["limits"] = json!({"stall_timeout_ms": 1500});
        let before = a.ticks(GUEST).unwrap().number;
        let begun = std::time::Instant::now();
        let id = a.migrate(&m);
        let end = a.migration_end(&id);
        let (code, detail) = (code_of(&end), end["error"]["detail"].as_str().unwrap_or("").to_owned());
        println!("{peer}: {code} after {:?}: {detail:.100}", begun.elapsed());
        assert_eq!(state_of(&end), "failed", "{peer}");
        assert!(codes.contains(&code.as_str()), "{peer}: {end}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{peer} took {:?}", begun.elapsed());
        assert!(detail.len() < 1000 && !detail.chars().any(char::is_control), "{peer}: {detail:?}");
        assert_eq!(end["guest_state_after"], "running", "{peer}");
        // The guest was never paused for it.
        assert_eq!(end["progress"]["downtime_ms"], Value::Null, "{peer}");
        a.ticks_beyond(GUEST, before);
    }
    server.join().unwrap();
    assert!(a.items("/v1/mirrors").is_empty());
    assert!(b.items("/v1/migrations").is_empty() && c.items("/v1/migrations").is_empty());
}

#[test]
fn a_caller_of_another_version_or_with_nonsense_is_refused() {
    let b = Daemon::start("b");
    let dir = tempfile::tempdir().unwrap();
    let identity = Identity::create(&dir.path().join("id")).unwrap();
    let (address, pin) = (b.peer_address.parse().unwrap(), b.identity.parse().unwrap());
    let deadlines = Deadlines { idle: Some(Duration::from_secs(15)), ..Deadlines::default() };
    // Before we are known.
    let stranger = Link::connect(address, &identity, &pin, deadlines);
    assert!(stranger.is_err(), "{stranger:?}");
    add_peer(&b, "us", "127.0.0.1:1", &identity.pin().to_string());
    let census = b.census();

    let mut link = Link::connect(address, &identity, &pin, deadlines).unwrap();
    let hello = Hello { protocol_versions: vec![0, 1, 99], host: "us".into(), purpose: Purpose::Migrate {} };
    wire::send(&mut link, kind::HELLO, &hello).unwrap();
    let answer = wire::expect(&mut link, &[kind::HELLO_ACK], 64 << 10).unwrap_err();
    assert_eq!(answer.code(), "peer_version", "{}", answer.chain());

    // A newer caller that also speaks ours gets ours.
    let mut link = Link::connect(address, &identity, &pin, deadlines).unwrap();
    wire::send(&mut link, kind::HELLO, &Hello { protocol_versions: vec![OURS, OURS + 1], ..hello.clone() })
        .unwrap();
    let (_, ack) = wire::expect(&mut link, &[kind::HELLO_ACK], 64 << 10).unwrap();
    assert_eq!(wire::parse::<HelloAck>(&ack).unwrap().protocol, OURS);
    // What does not belong, does not parse or is too long ends the link and makes nothing.
    for (kind, payload) in [
        (kind::START, vec![0; 64]),
        (kind::PREPARE, b"{\"session\": 1}".to_vec()),
        (kind::PREPARE, vec![b'['; 100_000]),
        (77, Vec::new()),
    ] {
        let mut link = Link::connect(address, &identity, &pin, deadlines).unwrap();
        wire::send(&mut link, wire::kind::HELLO, &Hello { protocol_versions: vec![OURS], ..hello.clone() })
            .unwrap();
        wire::expect(&mut link, &[wire::kind::HELLO_ACK], 64 << 10).unwrap();
        link.send(kind, &payload).unwrap();
        let end = link.recv(1 << 20).map(|f| f.map(|f| f.kind));
        assert!(!matches!(end, Ok(Some(wire::kind::PREPARED))), "{kind}: {end:?}");
    }
    // What became of a session that is none of ours.
    let session = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11".parse().unwrap();
    let asked = mirrorvm::migration::resolve(&(address.into(), pin), &identity, "us", session).unwrap_err();
    assert_eq!(asked.code(), "unknown_session");
    drop(link);
    assert!(b.items("/v1/guests").is_empty() && b.items("/v1/migrations").is_empty());
    until("no descriptor is left of them", 20, || b.census().fds <= census.fds);
}

#[test]
fn a_destination_without_memory_or_with_the_name_taken_refuses_before_the_pause() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    // Zero fill: addresses, not memory, are what is scarce here.
    let mut guest = embedded(GUEST, 1024, 0);
    guest["driver"]["workload"]["fill"] = json!("zero");
    a.run_guest(&guest);
    b.limit_memory(Some(512 << 20));
    let before = a.ticks(GUEST).unwrap().number;
    let m = a.migrate(&quick("b", "precopy"));
    let end = a.migration_end(&m);
    assert_eq!((state_of(&end), code_of(&end)), ("failed".into(), "no_memory".into()), "{end}");
    assert_eq!(end["progress"]["downtime_ms"], Value::Null);
    assert_eq!(end["progress"]["memory"]["iteration"], 0, "refused before the first page");
    a.ticks_beyond(GUEST, before);
    b.nothing_of(GUEST);
    assert!(b.items("/v1/guests").is_empty() && b.items("/v1/migrations").is_empty());
    b.limit_memory(None);

    let _ = b.post("/v1/guests", &embedded(GUEST, 16, 0)).expect(201);
    let m = a.migrate(&quick("b", "precopy"));
    let end = a.migration_end(&m);
    assert_eq!((state_of(&end), code_of(&end)), ("failed".into(), "name_taken".into()), "{end}");
    a.ticks_on(GUEST);
    let theirs = b.items("/v1/guests");
    assert_eq!((theirs.len(), &theirs[0]["state"]), (1, &json!("stopped")), "the other guest is untouched");
    let _ = b.delete(&format!("/v1/guests/{GUEST}")).expect(204);

    let m = a.migrate(&quick("b", "precopy"));
    let (at, end) = settled(a, b, &m);
    assert_eq!((at.name.as_str(), state_of(&end)), ("b", "succeeded".into()), "{end}");
}

/// Every guest and migration of a daemon that came up again is in a state that is so.
fn honest(d: &Daemon) {
    for g in d.items("/v1/guests") {
        assert_eq!((&g["state"], &g["migration"]), (&json!("stopped"), &Value::Null), "{}: {g}", d.name);
    }
    for m in d.items("/v1/migrations") {
        assert!(is_terminal(&m["state"]), "{}: {m}", d.name);
        assert!(m["finished_at"].is_string(), "{m}");
    }
    assert!(d.items("/v1/mirrors").is_empty());
}

#[test]
fn a_destination_killed_in_precopy_costs_nothing() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 32, 0));
    let m = pair.a.migrate(&slow("b", "precopy"));
    pair.a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == "precopy");
    until("it is there", 20, || pair.b.guest_state(GUEST) == "incoming");
    let before = pair.a.ticks(GUEST).unwrap().number;
    pair.b.kill();
    let end = pair.a.migration_end(&m);
    assert_eq!((state_of(&end), code_of(&end)), ("failed".into(), "peer_lost".into()), "{end}");
    pair.a.ticks_beyond(GUEST, before);
    pair.b.restart();
    honest(&pair.b);
    assert!(pair.b.items("/v1/guests").is_empty(), "what never arrived is not there");
    assert_eq!(code_of(&pair.b.migration_end(&m)), "daemon_restarted");
    let m = pair.a.migrate(&quick("b", "precopy"));
    let (at, _) = settled(&pair.a, &pair.b, &m);
    assert_eq!(at.name, "b");
}

#[test]
fn a_source_killed_in_precopy_loses_its_guest_and_says_so() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 32, 0));
    let m = pair.a.migrate(&slow("b", "precopy"));
    pair.a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == "precopy");
    until("it is there", 20, || pair.b.guest_state(GUEST) == "incoming");
    pair.a.kill();
    pair.b.nothing_of(GUEST);
    assert!(pair.b.items("/v1/guests").is_empty());
    assert_eq!(state_of(&pair.b.migration_end(&m)), "failed");
    pair.a.restart();
    honest(&pair.a);
    let guest = pair.a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!(
        (&guest["error"]["code"], &guest["moved_to"]),
        (&json!("daemon_restarted"), &Value::Null),
        "{guest}"
    );
    assert_eq!(code_of(&pair.a.migration_end(&m)), "daemon_restarted");
    // It can be started afresh and moved.
    let _ = pair.a.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    pair.a.ticks_on(GUEST);
    let m = pair.a.migrate(&quick("b", "precopy"));
    assert_eq!(settled(&pair.a, &pair.b, &m).0.name, "b");
}

/// Records of the control link of a stop-and-copy migration, there and back: the same each time.
fn stop_and_copy_records(pair: &Pair) -> mirrorvm_tests::Traffic {
    let mut traffic = Vec::new();
    for (from, to, proxy) in [(&pair.a, &pair.b, &pair.to_b), (&pair.b, &pair.a, &pair.to_a)] {
        proxy.watch();
        let id = from.migrate(&quick(&to.name, "stop_and_copy"));
        assert_eq!(settled(from, to, &id).1["state"], "succeeded");
        traffic.push(proxy.traffic()[0]);
    }
    traffic[0]
}

/// The last records each way are START and COMMITTED, then the goodbyes.
fn before_commit(whole: mirrorvm_tests::Traffic, act: Act) -> Break {
    Break { connection: 0, way: Way::Down, records: whole.down - 2, bytes: 0, act }
}

fn before_start(whole: mirrorvm_tests::Traffic, act: Act) -> Break {
    Break { connection: 0, way: Way::Up, records: whole.up - 2, bytes: 0, act }
}

#[test]
fn a_destination_killed_before_it_saw_start_gives_the_guest_back() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    println!("{whole:?}");
    pair.to_b.arm(before_start(whole, Act::Stall));
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    let path = format!("/v1/migrations/{m}");
    pair.a.follow(&path, 30, |now| now["state"] == "finishing");
    pair.to_b.wait_broken(10);
    pair.b.kill();
    pair.to_b.cut();
    pair.a.follow(&path, 30, |now| now["state"] == "in_doubt");
    assert_eq!(pair.a.act(&format!("{path}/cancel")).expect(409).problem(), "past_point_of_no_return");
    let held = pair.a.ticks(GUEST).unwrap();
    pair.b.restart();
    honest(&pair.b);
    assert_eq!(pair.a.ticks(GUEST).unwrap(), held, "in doubt, the source holds still");
    pair.to_b.mend();
    let (at, end) = settled(&pair.a, &pair.b, &m);
    assert_eq!((at.name.as_str(), state_of(&end)), ("a", "failed".into()), "{end}");
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    assert_eq!(settled(&pair.a, &pair.b, &m).0.name, "b");
}

#[test]
fn a_destination_killed_after_it_committed_keeps_what_it_took() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    pair.to_b.arm(before_commit(whole, Act::Stall));
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    pair.to_b.wait_broken(60);
    // As soon as the token is on its way, which is in the midst of the destination's last steps.
    pair.b.kill();
    pair.to_b.cut();
    let path = format!("/v1/migrations/{m}");
    pair.a.follow(&path, 30, |now| now["state"] == "in_doubt");
    pair.b.restart();
    honest(&pair.b);
    // The guest was the destination's: it went with that daemon, and both say so.
    let there = pair.b.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!(there["error"]["code"], "daemon_restarted", "{there}");
    assert_eq!(
        state_of(&pair.b.read(&path)),
        "succeeded",
        "the destination's record: {}",
        pair.b.read(&path)
    );
    pair.to_b.mend();
    let end = pair.a.migration_end(&m);
    assert_eq!(state_of(&end), "succeeded", "{end}");
    let here = pair.a.read(&format!("/v1/guests/{GUEST}"));
    assert_eq!((&here["state"], &here["moved_to"]), (&json!("stopped"), &json!("b")), "{here}");
    assert_eq!(pair.a.act(&format!("/v1/guests/{GUEST}/start")).expect(409).problem(), "guest_moved");
    let _ = pair.b.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
    pair.b.ticks_on(GUEST);
}

#[test]
fn a_doubt_is_settled_with_a_peer_that_has_another_address_by_then() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    pair.to_b.arm(before_commit(whole, Act::Cut));
    let m = pair.a.migrate(&quick("b", "stop_and_copy"));
    pair.a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == "in_doubt");
    // The old way stays cut for good.
    let moved = json!({"address": pair.b.peer_address});
    let _ = pair.a.send(&Request::new("PATCH", "/v1/hosts/b").json(&moved)).expect(200);
    let end = pair.a.migration_end(&m);
    assert_eq!(end["state"], "succeeded", "{end}");
    pair.b.ticks_on(GUEST);
}

#[test]
fn a_source_killed_in_doubt_asks_on_when_it_is_back() {
    if !kvm() {
        return;
    }
    let mut pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    for (plan, arrives) in [(before_start(whole, Act::Cut), false), (before_commit(whole, Act::Cut), true)] {
        pair.to_b.arm(plan);
        let m = pair.a.migrate(&quick("b", "stop_and_copy"));
        let path = format!("/v1/migrations/{m}");
        pair.a.follow(&path, 60, |now| now["state"] == "in_doubt");
        pair.a.kill();
        pair.a.restart();
        // Still cut off: the new daemon does not guess.
        assert_eq!(state_of(&pair.a.read(&path)), "in_doubt");
        let guest = pair.a.read(&format!("/v1/guests/{GUEST}"));
        assert_eq!(guest["state"], "in_doubt", "{guest}");
        for (verb, target) in [("start", "/start"), ("resume", "/resume"), ("stop", "/stop")] {
            let refused = pair.a.act(&format!("/v1/guests/{GUEST}{target}"));
            assert_eq!(refused.status, 409, "{verb}: {}", refused.text());
        }
        assert_eq!(pair.a.delete(&format!("/v1/guests/{GUEST}")).status, 409);
        assert_eq!(pair.a.delete(&path).status, 409);
        pair.to_b.mend();
        let end = pair.a.migration_end(&m);
        println!("arrives {arrives}: {} {}", state_of(&end), code_of(&end));
        honest(&pair.a);
        let here = pair.a.read(&format!("/v1/guests/{GUEST}"));
        if arrives {
            assert_eq!(
                (state_of(&end), &here["moved_to"]),
                ("succeeded".into(), &json!("b")),
                "{end} {here}"
            );
            pair.b.ticks_on(GUEST);
        } else {
            // The memory went with the killed daemon; the destination never ran it: it may be started afresh.
            assert_eq!(
                (state_of(&end), code_of(&end)),
                ("failed".into(), "source_restarted".into()),
                "{end}"
            );
            pair.b.nothing_of(GUEST);
            let _ = pair.a.act(&format!("/v1/guests/{GUEST}/start")).expect(202);
            pair.a.ticks_on(GUEST);
        }
    }
}

#[test]
fn cancel_in_every_state() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    // Left alone, each of these takes a minute: what ends sooner was canceled, on a busy machine, too.
    a.run_guest(&embedded(GUEST, 64, 0));
    let held = |mode: &str| {
        let mut m = migration(GUEST, "b", mode);
        m["limits"] = json!({"bandwidth_bytes_per_second": 1 << 20, "stall_timeout_ms": 60_000});
        m
    };
    let whole = stop_and_copy_records(&pair);
    let canceled = |m: &str, within: Duration| {
        let begun = std::time::Instant::now();
        let reply = a.act(&format!("/v1/migrations/{m}/cancel")).expect(202).json();
        assert!(reply["cancel_requested_at"].is_string());
        let end = a.migration_end(m);
        println!("canceled within {:?}", begun.elapsed());
        assert!(begun.elapsed() < within, "cancel took {:?}", begun.elapsed());
        assert_eq!((state_of(&end), code_of(&end)), ("canceled".into(), "-".into()), "{end}");
        pair.to_b.mend();
        assert_eq!(settled(a, b, m).0.name, "a");
    };
    let in_state = |m: &str, state: &str| {
        a.follow(&format!("/v1/migrations/{m}"), 60, |now| now["state"] == state);
        println!("in {state}");
    };
    let soon = Duration::from_secs(20);

    // Queued: the host's four slots are taken by other guests.
    let others: Vec<String> = (0..4).map(|i| format!("other-{i}")).collect();
    let taken: Vec<String> = others
        .iter()
        .map(|name| {
            a.run_guest(&embedded(name, 64, 0));
            let mut m = held("precopy");
            m["guest"] = json!(name);
            a.migrate(&m)
        })
        .collect();
    for m in &taken {
        in_state(m, "precopy");
    }
    let m = a.migrate(&held("precopy"));
    assert_eq!(state_of(&a.read(&format!("/v1/migrations/{m}"))), "queued");
    let begun = std::time::Instant::now();
    let _ = a.act(&format!("/v1/migrations/{m}/cancel")).expect(202);
    assert_eq!(state_of(&a.migration_end(&m)), "canceled");
    assert!(begun.elapsed() < soon, "cancel in the queue took {:?}", begun.elapsed());
    for other in &taken {
        let _ = a.act(&format!("/v1/migrations/{other}/cancel")).expect(202);
        assert_eq!(state_of(&a.migration_end(other)), "canceled");
    }
    assert_eq!(b.get(&format!("/v1/migrations/{m}")).status, 404, "the destination never heard of it");
    for name in &others {
        a.ticks_on(name);
        let _ = a.act(&format!("/v1/guests/{name}/stop")).expect(202);
        a.guest_in(name, "stopped");
        let _ = a.delete(&format!("/v1/guests/{name}")).expect(204);
    }
    until("the others are gone there", 30, || b.items("/v1/guests").iter().all(|g| g["name"] == GUEST));

    // Preparing: in the handshake, and while PREPARED is held up.
    for records in [1, whole.down - 4] {
        pair.to_b.arm(Break { connection: 0, way: Way::Down, records, bytes: 0, act: Act::Stall });
        let m = a.migrate(&held("stop_and_copy"));
        pair.to_b.wait_broken(20);
        assert_eq!(state_of(&a.read(&format!("/v1/migrations/{m}"))), "preparing");
        canceled(&m, soon);
    }
    // Pre-copy.
    let m = a.migrate(&held("precopy"));
    in_state(&m, "precopy");
    canceled(&m, soon);
    // Switchover: the guest is paused, and goes on.
    let m = a.migrate(&held("stop_and_copy"));
    in_state(&m, "switchover");
    canceled(&m, soon);
    // From the destination's side.
    let m = a.migrate(&held("precopy"));
    until("it is there", 30, || b.get(&format!("/v1/migrations/{m}")).status == 200);
    in_state(&m, "precopy");
    let _ = b.act(&format!("/v1/migrations/{m}/cancel")).expect(202);
    let (at, end) = settled(a, b, &m);
    assert_eq!(at.name, "a");
    println!("canceled by the destination: {} {}", state_of(&end), code_of(&end));
    assert_eq!(state_of(&b.read(&format!("/v1/migrations/{m}"))), "canceled");

    // Finishing and in doubt: too late.
    pair.to_b.arm(before_commit(whole, Act::Stall));
    let m = a.migrate(&quick("b", "stop_and_copy"));
    let path = format!("/v1/migrations/{m}");
    in_state(&m, "finishing");
    pair.to_b.wait_broken(20);
    assert_eq!(a.act(&format!("{path}/cancel")).expect(409).problem(), "past_point_of_no_return");
    pair.to_b.cut();
    in_state(&m, "in_doubt");
    assert_eq!(a.act(&format!("{path}/cancel")).expect(409).problem(), "past_point_of_no_return");
    assert_eq!(a.read(&path)["cancel_requested_at"], Value::Null, "a refused request leaves no trace");
    pair.to_b.mend();
    let (at, end) = settled(a, b, &m);
    assert_eq!((at.name.as_str(), state_of(&end)), ("b", "succeeded".into()));
    // Ended: the record as it is.
    let after = a.act(&format!("{path}/cancel")).expect(200).json();
    assert_eq!(after, end);
}

#[test]
fn failing_and_retrying_leaks_nothing() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    let (a, b) = (&pair.a, &pair.b);
    a.run_guest(&embedded(GUEST, 16, 0));
    let whole = stop_and_copy_records(&pair);
    let both = || (a.census(), b.census());
    // Idle threads of the runtime's blocking pool come and go on their own: what counts is that the rounds do
    // not add to them. One whole round before the first count has made everything that is made once.
    let round = |i: u64| {
        pair.to_b.arm(Break {
            connection: i as usize % 2,
            way: if i.is_multiple_of(3) { Way::Down } else { Way::Up },
            records: [3, whole.up - 3, 2, whole.down - 3, 5][i as usize % 5],
            bytes: i % 7,
            act: Act::Cut,
        });
        let m = a.migrate(&quick("b", if i.is_multiple_of(2) { "precopy" } else { "stop_and_copy" }));
        let end = a.follow(&format!("/v1/migrations/{m}"), 60, |m| {
            is_terminal(&m["state"]) || m["state"] == "in_doubt"
        });
        pair.to_b.mend();
        let at = settled(a, b, &m).0;
        println!("round {i}: {} {}; {:?}", state_of(&end), code_of(&end), both());
        // Back to where it was, through a migration that works.
        if at.name == "a" {
            let m = a.migrate(&quick("b", "precopy"));
            assert_eq!(settled(a, b, &m).0.name, "b");
        }
        let m = b.migrate(&quick("a", "precopy"));
        assert_eq!(settled(b, a, &m).0.name, "a");
    };
    round(0);
    // The connection of the last look may still be closing: what counts is the least of several looks.
    let least = |x: mirrorvm_tests::Census, y: mirrorvm_tests::Census| if y.fds < x.fds { y } else { x };
    let start = (0..10).map(|_| both()).reduce(|x, y| (least(x.0, y.0), least(x.1, y.1))).unwrap();
    for i in 1..=15 {
        round(i);
    }
    let mut last = start.clone();
    let what = format!("descriptors and threads as at the start: {start:?}");
    let end = until_some(&what, 20, || {
        let now = both();
        if now != last {
            println!("now {now:?}");
            last = now.clone();
        }
        let same = |s: &mirrorvm_tests::Census, n: &mirrorvm_tests::Census| {
            (n.fds, n.memfds, n.kvm, n.children) == (s.fds, s.memfds, s.kvm, s.children)
                && n.threads <= s.threads
        };
        (same(&start.0, &now.0) && same(&start.1, &now.1)).then_some(now)
    });
    println!("from {start:?} to {end:?}");
}

#[test]
fn what_a_peer_says_it_can_do_is_bounded_and_shown_as_its_word() {
    let a = Daemon::start("a");
    let good = Abilities {
        drivers: vec!["emulated".into()],
        strategies: vec!["shifted".into()],
        helper_abi: (3, 3),
        helper_measurement: [0xab; 32],
        protocol_versions: vec![OURS, 70],
        max_phys_bits: 52,
        c_bit: Some(51),
        phys_bit_reduction: 1,
        slot_budget: 509,
        missing: vec!["kvm".into()],
    };
    let says = |bytes: Vec<u8>| {
        move |mut link: Link| {
            assert_eq!(hello(&mut link).purpose, Purpose::Ask {});
            agree(&mut link, OURS);
            let _ = link.send(kind::ABILITIES, &bytes);
            hold(link);
        }
    };
    let bytes = |change: &dyn Fn(&mut Abilities)| {
        let mut said = good.clone();
        change(&mut said);
        serde_json::to_vec(&said).unwrap()
    };
    let cases: [(&str, Vec<u8>); 6] = [
        ("garbles", b"\xff\x00{}".to_vec()),
        ("floods", vec![b' '; wire::ABILITIES_MAX as usize + 1]),
        ("escapes", bytes(&|s| s.missing = vec!["\u{1b}[31m".into()])),
        ("many", bytes(&|s| s.drivers = vec!["d".into(); 33])),
        ("backwards", bytes(&|s| s.helper_abi = (4, 3))),
        ("beyond", bytes(&|s| s.c_bit = Some(64))),
    ];
    let mut fakes = vec![Fake::new(&a, "good", says(bytes(&|_| ())))];
    for (name, said) in cases {
        fakes.push(Fake::new(&a, name, says(said)));
        let problem = a.get(&format!("/v1/hosts/{name}/capabilities")).expect(502).json();
        assert_eq!(problem["code"], "peer_failed", "{name}: {problem}");
        assert!(!problem.to_string().contains('\u{1b}'), "{name}: {problem}");
    }
    // A later build may say more: what this one knows of it counts.
    let later = [&b"{\"more\": {\"to\": [\"say\"]}, "[..], &bytes(&|_| ())[1..]].concat();
    fakes.push(Fake::new(&a, "later", says(later)));
    assert_eq!(a.read("/v1/hosts/later/capabilities")["slot_budget"], 509);
    fakes.push(Fake::new(&a, "older", |mut link| {
        // A build that does not know the question.
        hello(&mut link);
        let _ = link.close();
    }));
    let problem = a.get("/v1/hosts/older/capabilities").expect(502).json();
    assert_eq!(problem["code"], "peer_failed", "{problem}");

    let shown = a.read("/v1/hosts/good/capabilities");
    assert_eq!(shown["protocol_versions"], json!([OURS]), "{shown}");
    assert_eq!((&shown["drivers"], &shown["missing"]), (&json!(["emulated"]), &json!(["kvm"])));
    assert_eq!(shown["helper_measurement"], format!("sha256:{}", "ab".repeat(32)));
    assert_eq!((&shown["c_bit_position"], &shown["slot_budget"]), (&json!(51), &json!(509)));

    // A check before a migration goes by it.
    let _ = a.post("/v1/guests", &embedded(GUEST, 16, 0)).expect(201);
    let check = a.post("/v1/migration-checks", &migration(GUEST, "good", "precopy")).expect(200).json();
    let blockers = check["blockers"].as_array().unwrap();
    for code in ["destination_lacks_driver", "destination_has_another_helper"] {
        assert!(blockers.iter().any(|b| b["code"] == code), "{code}: {check}");
    }
}

#[test]
fn a_peer_that_cannot_be_asked_is_said_to_be_so_in_time() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    // Another host's key under a known address, a host that does not know us, and nobody at all.
    add_peer(&a, "wrong-key", &b.peer_address, &format!("sha256:{}", "ab".repeat(32)));
    add_peer(&a, "stranger", &b.peer_address, &b.identity);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    add_peer(&a, "nobody", &free.to_string(), &format!("sha256:{}", "cd".repeat(32)));
    for (name, reason) in
        [("wrong-key", "peer_identity: "), ("stranger", "peer_identity: "), ("nobody", "peer_unreachable: ")]
    {
        let problem = a.get(&format!("/v1/hosts/{name}/capabilities")).expect(502).json();
        assert_eq!(problem["code"], "peer_failed", "{name}: {problem}");
        assert!(problem["detail"].as_str().unwrap().starts_with(reason), "{name}: {problem}");
    }
    // One that ends the link where its answer belongs, and one that is down afterwards.
    let other = Fake::new(&a, "leaves", |mut link| {
        hello(&mut link);
        agree(&mut link, OURS);
        let _ = link.close();
    });
    let problem = a.get("/v1/hosts/leaves/capabilities").expect(502).json();
    assert_eq!(problem["code"], "peer_failed", "{problem}");
    drop(other);
    let _ = a.get("/v1/hosts/leaves/capabilities").expect(502);

    // One bound for the whole conversation: a peer that is just in time with its first word has none left for
    // the next.
    let (agreed, seen) = std::sync::mpsc::channel();
    let _late = Fake::new(&a, "late", move |mut link| {
        hello(&mut link);
        let begun = Instant::now();
        // The delay is what is tested; nothing waits for it.
        std::thread::sleep(Duration::from_secs(4));
        agree(&mut link, OURS);
        hold(link);
        let _ = agreed.send(begun.elapsed());
    });
    let begun = Instant::now();
    let problem = a.get("/v1/hosts/late/capabilities").expect(504).json();
    let took = begun.elapsed();
    assert_eq!(problem["code"], "peer_timed_out", "{problem}");
    // Five seconds are a look's patience; a second five from the first word on would make it nine.
    assert!(took < Duration::from_secs(8), "{took:?}");
    let held = seen.recv_timeout(Duration::from_secs(10)).unwrap();
    println!("answered after {took:?}; the peer was let go after {held:?}");
}
