//! Peers that are not what they should be: strangers, other versions, nonsense, silence, boasts.

use mirrorvm::chain::chain;
use mirrorvm::codes::PeerRefusal;

use super::*;

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
    let ack = HelloAck { protocol, protocol_versions: Some(vec![protocol]), host: "fake".into() };
    wire::send(link, kind::HELLO_ACK, &ack).unwrap();
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
    let free = mirrorvm_tests::nobody();
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
            let refused =
                Refused { code: PeerRefusal::PeerVersion.into(), detail: "this host speaks [99]".into() };
            wire::send(&mut link, kind::REFUSED, &refused).unwrap();
            let _ = link.close();
        }),
        Fake::new(&a, "refuses", |mut link| {
            hello(&mut link);
            agree(&mut link, OURS);
            wire::expect(&mut link, &[kind::PREPARE], wire::MESSAGE_MAX).unwrap();
            // What a peer says is shown to people: bounded and printable.
            let detail = format!("no \u{1b}[31m{}", "x".repeat(5000));
            wire::send(&mut link, kind::REFUSED, &Refused { code: "Go Away!".to_owned().into(), detail })
                .unwrap();
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
    assert_eq!(answer.code().as_str(), "peer_version", "{}", chain(&answer));

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
        let end = link.recv_into(1 << 20, &mut Vec::new());
        assert!(!matches!(end, Ok(Some(wire::kind::PREPARED))), "{kind}: {end:?}");
    }
    // What became of a session that is none of ours.
    let session = "0199d3c5-6f0e-7c4c-a2b1-2f8a4f0d6f11".parse().unwrap();
    let asked = mirrorvm::migration::resolve(&(address.into(), pin), &identity, "us", session).unwrap_err();
    assert_eq!(asked.code().as_str(), "unknown_session");
    drop(link);
    assert!(b.items("/v1/guests").is_empty() && b.items("/v1/migrations").is_empty());
    until("no descriptor is left of them", 20, || b.census().fds <= census.fds);
}

#[test]
fn what_a_peer_says_it_can_do_is_bounded_and_shown_as_its_word() {
    let a = Daemon::start("a");
    let good = Abilities {
        drivers: vec!["emulated".into()],
        strategies: vec!["shifted".into()],
        helper_abi: (3, 3),
        helper_measurement: [0xab; 32],
        suites: vec!["aes-256-gcm".into(), "colour".into()],
        protocol_versions: vec![OURS, 70],
        max_phys_bits: 52,
        c_bit: Some(51),
        phys_bit_reduction: 1,
        slot_budget: 509,
        missing: vec!["kvm".into()],
    };
    let says = |bytes: Vec<u8>| {
        move |mut link: Link| {
            // It is looked for besides, now and then: no answer to that.
            if hello(&mut link).purpose != (Purpose::Ask {}) {
                return;
            }
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
    assert_eq!(shown["suites"], json!(["aes-256-gcm", "colour"]));
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
    let free = mirrorvm_tests::nobody();
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

#[test]
fn a_suite_that_the_destinations_helper_lacks_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.run_guest(&embedded(GUEST, 16, 0));
    // What a would say to a destination.
    let (say, said) = std::sync::mpsc::channel();
    let say = std::sync::Mutex::new(say);
    let _fake = Fake::new(&a, "listens", move |mut link| {
        hello(&mut link);
        agree(&mut link, OURS);
        let (_, prepare) = wire::expect(&mut link, &[kind::PREPARE], wire::MESSAGE_MAX).unwrap();
        say.lock().unwrap().send(prepare).unwrap();
        let _ = link.close();
    });
    let mut wanted = migration(GUEST, "listens", "precopy");
    wanted["suite"] = json!("aes-256-gcm-siv");
    let record = a.migration_end(&a.migrate(&wanted));
    assert_eq!((&record["suite"], &record["request"]["suite"]), (&wanted["suite"], &wanted["suite"]));
    let prepare = said.recv_timeout(Duration::from_secs(60)).unwrap();
    let prepare: wire::Prepare = wire::parse(&prepare).unwrap();
    assert_eq!(prepare.suite, "aes-256-gcm-siv");
    assert_eq!(prepare.suites, ["aes-256-gcm", "aes-256-gcm-siv"]);
    // Said to b by somebody whom it knows.
    let dir = tempfile::tempdir().unwrap();
    let identity = Identity::create(&dir.path().join("id")).unwrap();
    add_peer(&b, "us", "127.0.0.1:1", &identity.pin().to_string());
    let peer = (b.peer_address.parse().unwrap(), b.identity.parse().unwrap());
    let against = |suite: &str| {
        let mut prepare = prepare.clone();
        prepare.suite = suite.to_owned();
        let patience = Duration::from_secs(20);
        let verdict = mirrorvm::migration::check(&peer, &identity, "us", patience, &prepare).unwrap();
        verdict.unwrap().against
    };
    assert_eq!(against("aes-256-gcm-siv"), []);
    for strange in ["chacha20-poly1305", "", "AES-256-GCM", "\u{1b}[31m"] {
        let refused = against(strange);
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert_eq!(refused[0].code.as_str(), "suite_missing");
        assert!(refused[0].detail.ends_with("but by aes-256-gcm, aes-256-gcm-siv"), "{refused:?}");
    }
}
