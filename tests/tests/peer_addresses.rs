//! Where peers are: addresses that cannot be one, what is told of oneself, names, and who else may be there.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use mirrorvm_tests::{Daemon, Request, embedded, kvm, migration};
use rustix::net::{AddressFamily, SocketType};
use serde_json::{Value, json};

/// An identity that nobody has.
fn somebody() -> String {
    format!("sha256:{}", "5a".repeat(32))
}

/// One of several of these.
fn another(what: &str) -> String {
    let byte = what.bytes().fold(0_u8, |sum, b| sum.wrapping_mul(31).wrapping_add(b));
    format!("sha256:{}", format!("{byte:02x}").repeat(32))
}

/// Where `localhost` is.
const WHERE_NAMES_LEAD: (&str, &str) = ("MIRRORVM_PEER_LISTEN", "127.0.0.1:0");

fn host(name: &str, address: &str, identity: &str) -> Value {
    json!({"name": name, "address": address, "identity": identity})
}

fn patch(daemon: &Daemon, key: &str, body: &Value) -> mirrorvm_tests::Reply {
    let request = Request::new("PATCH", &format!("/v1/hosts/{key}")).json(body);
    daemon.send(&request)
}

#[test]
fn an_address_or_identity_that_cannot_be_a_peers_is_refused_by_field_and_value() {
    let a = Daemon::start_with("a", &[WHERE_NAMES_LEAD]);
    let port = a.peer_address.rsplit(':').next().unwrap();
    let _ = a.post("/v1/hosts", &host("there", "192.0.2.7:7801", &somebody())).expect(201);
    let before = a.read("/v1/hosts/there");
    let mapped = format!("[::ffff:127.0.0.1]:{port}");
    let named = format!("localhost:{port}");
    let taken = another("taken");
    let _ = a.post("/v1/hosts", &host("taken", "192.0.2.9:7801", &taken)).expect(201);
    let own: &str = &a.identity;
    let good = another("good");
    for (address, identity, pointer, code) in [
        ("0.0.0.0:7801", &*good, "/address", "unusable_address"),
        ("[::]:7801", &good, "/address", "unusable_address"),
        ("[::ffff:0.0.0.0]:7801", &good, "/address", "unusable_address"),
        ("224.0.0.1:7801", &good, "/address", "unusable_address"),
        ("[ff02::1]:7801", &good, "/address", "unusable_address"),
        ("[::ffff:239.1.2.3]:7801", &good, "/address", "unusable_address"),
        ("255.255.255.255:7801", &good, "/address", "unusable_address"),
        ("[fe80::1]:7801", &good, "/address", "unusable_address"),
        ("[fe80::1%4294967295]:7801", &good, "/address", "unusable_address"),
        ("127.255.255.255:7801", &good, "/address", "unusable_address"),
        ("127.0.0.0:7801", &good, "/address", "unusable_address"),
        ("240.0.0.1:7801", &good, "/address", "unusable_address"),
        ("1.2.3.4:65536", &good, "/address", "invalid_format"),
        ("1.2.3.4:01", &good, "/address", "invalid_format"),
        ("[[::1]]:1", &good, "/address", "invalid_format"),
        ("192.0.2.7:0", &good, "/address", "out_of_range"),
        ("192.0.2.7", &good, "/address", "invalid_format"),
        ("host.example:0", &good, "/address", "invalid_format"),
        ("a_b:7801", &good, "/address", "invalid_format"),
        ("b\u{fc}cher.example:7801", &good, "/address", "invalid_format"),
        ("127.1:7801", &good, "/address", "invalid_format"),
        (&a.peer_address, &good, "/address", "own_address"),
        (&mapped, &good, "/address", "own_address"),
        (&named, &good, "/address", "own_address"),
        ("192.0.2.8:7801", &taken, "/identity", "duplicate_identity"),
        ("192.0.2.8:7801", own, "/identity", "own_identity"),
    ] {
        let changed = json!({"address": address, "identity": identity});
        for reply in [a.post("/v1/hosts", &host("x", address, identity)), patch(&a, "there", &changed)] {
            let problem = reply.expect(422).json();
            let error = &problem["errors"][0];
            assert_eq!(
                (&error["pointer"], &error["code"]),
                (&json!(pointer), &json!(code)),
                "{address}: {problem}"
            );
            let value = if pointer == "/address" { address } else { identity };
            let detail = error["detail"].as_str().unwrap();
            assert!(detail.contains(value), "{value} is not in {detail:?}");
        }
    }
    assert_eq!(a.read("/v1/hosts/there"), before);
    assert_eq!(a.items("/v1/hosts").len(), 2);
    // What it is already may be said again.
    let same = patch(&a, "taken", &json!({"identity": taken, "address": "192.0.2.10:7801"}));
    let _ = same.expect(200);
    for (name, address) in
        [("n1", "host.example:7801"), ("n2", "[2001:db8::7]:7801"), ("n3", "[fe80::7%1]:7801")]
    {
        let made = a.post("/v1/hosts", &host(name, address, &another(name))).expect(201).json();
        assert_eq!(made["address"], address);
    }
    let renamed = patch(&a, "n1", &json!({"address": "Other.Example:1"})).expect(200).json();
    assert_eq!(renamed["address"], "other.example:1");
}

#[test]
fn a_host_that_listens_on_all_addresses_names_the_one_that_it_is_told_to() {
    let a = Daemon::start("a");
    let b = Daemon::start_with("b", &[("MIRRORVM_PEER_LISTEN", "0.0.0.0:0")]);
    let of = |daemon: &Daemon| daemon.read("/v1/host");
    assert_eq!(of(&a)["peer_address"], json!(a.peer_address));
    assert_eq!(of(&a)["peer_listen"], json!(a.peer_address));
    let lacks = |daemon: &Daemon| {
        let missing = daemon.read("/v1/host/capabilities")["missing"].clone();
        missing.as_array().unwrap().iter().any(|m| m["code"] == "peer_address")
    };
    assert_eq!((of(&b)["peer_address"].clone(), lacks(&b), lacks(&a)), (Value::Null, true, false));
    assert_eq!(of(&b)["peer_listen"], json!(b.peer_address));
    assert!(b.peer_address.starts_with("0.0.0.0:"));
    // It knows itself at every address that is the machine's.
    let port = b.peer_address.rsplit(':').next().unwrap();
    let here = b.post("/v1/hosts", &host("x", &format!("127.0.0.1:{port}"), &somebody())).expect(422).json();
    assert_eq!(here["errors"][0]["code"], "own_address");
    let elsewhere = host("x", &format!("192.0.2.7:{port}"), &somebody());
    let _ = b.post("/v1/hosts", &elsewhere).expect(201);
    drop(b);

    let told = [("MIRRORVM_PEER_LISTEN", "0.0.0.0:0"), ("MIRRORVM_ADVERTISE", "LocalHost")];
    let b = Daemon::start_with("b", &told);
    let port = b.peer_address.rsplit(':').next().unwrap();
    let address = of(&b)["peer_address"].clone();
    assert_eq!((address.clone(), lacks(&b)), (json!(format!("localhost:{port}")), false));
    // What it says can be registered as it is.
    let _ = b.post("/v1/hosts", &host("a", &a.peer_address, &a.identity)).expect(201);
    let _ = a.post("/v1/hosts", &host("b", address.as_str().unwrap(), &b.identity)).expect(201);
    assert_eq!(a.read("/v1/hosts/b/capabilities")["reachable"], true);
}

#[test]
fn what_leads_back_to_the_host_is_told_when_it_is_used() {
    // Its own port through another one, as a relay or a name that has moved would have it.
    let a = Daemon::start("a");
    let relay = mirrorvm_tests::Proxy::to(&a.peer_address);
    let _ = a.post("/v1/hosts", &host("there", &relay.address(), &somebody())).expect(201);
    let problem = a.get("/v1/hosts/there/capabilities").expect(502).json();
    assert_eq!(problem["code"], "peer_failed", "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("this host itself"), "{problem}");
}

#[test]
fn peers_are_awaited_at_an_address_of_a_name() {
    let (a, b) = (Daemon::start("a"), Daemon::start_with("b", &[("MIRRORVM_PEER_LISTEN", "localhost:0")]));
    let at: SocketAddr = b.peer_address.parse().unwrap();
    assert!(at.ip().is_loopback() && at.port() != 0, "{at}");
    assert_eq!(b.read("/v1/host")["peer_address"], json!(b.peer_address));
    a.add_peer(&b, &b.peer_address);
    b.add_peer(&a, &a.peer_address);
    assert_eq!(a.read("/v1/hosts/b/capabilities")["reachable"], true);
}

#[test]
fn a_host_that_is_not_known_over_there_is_told_what_to_register_there() {
    let (a, b) = (Daemon::start("a"), Daemon::start("b"));
    a.add_peer(&b, &b.peer_address);
    let problem = a.get("/v1/hosts/b/capabilities").expect(502).json();
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("does not know this one") && detail.contains(&a.identity), "{problem}");
    assert!(detail.contains("/v1/hosts") && detail.contains("identity pair"), "{problem}");
}

#[test]
fn a_daemon_does_not_start_where_nobody_could_connect_to() {
    let d = Daemon::start("a");
    let state = d.directory().join("another");
    for (option, value, why) in [
        ("--peer-listen", "224.0.0.1:0", "multicast"),
        ("--peer-listen", "255.255.255.255:0", "broadcast"),
        ("--peer-listen", "127.255.255.255:0", "broadcast"),
        ("--peer-listen", "240.0.0.1:0", "reserved"),
        ("--peer-listen", "[ff02::1]:0", "multicast"),
        ("--listen", "tcp:127.255.255.255:0", "broadcast"),
        ("--listen", "tcp:127.0.0.0:0", "network's own"),
        ("--metrics-listen", "tcp:127.255.255.255:0", "broadcast"),
        ("--advertise", "[[::1", "usable"),
        ("--advertise", "::1]]", "usable"),
        ("--advertise", "240.0.0.1", "reserved"),
        ("--advertise", "1.2.3.4:01", "port"),
        ("--advertise", "1.2.3.4:65536", "port"),
    ] {
        let peers = ["--peer-listen", "127.0.0.1:0"];
        let more: &[&str] = if option == "--advertise" { &peers } else { &[] };
        let state = state.to_string_lossy();
        let arguments = [&["serve", "--state-dir", &state, option, value], more].concat();
        let (code, _, said) = d.command_line(&arguments);
        let bare = value.trim_start_matches("tcp:");
        assert!(
            code != 0 && said.contains(bare) && (why == "usable" || said.contains(why)),
            "{value}: {said}"
        );
    }
}

/// Says `words` to everybody who connects, as long as the test runs.
fn somebody_else(words: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let _ = stream.write_all(words);
                let _ = stream.read_to_end(&mut Vec::new());
            });
        }
    });
    at
}

#[test]
fn who_else_is_at_a_peers_address_is_told_at_once() {
    let a = Daemon::start("a");
    let ssh = somebody_else(b"SSH-2.0-OpenSSH_9.2p1\r\n").to_string();
    let web = somebody_else(b"HTTP/1.1 400 Bad Request\r\n\r\n").to_string();
    let tty = somebody_else(b"\x1b]0;gotcha\x07 login:").to_string();
    let gone = mirrorvm_tests::nobody().to_string();
    for (name, address, code, detail) in [
        ("ssh", &*ssh, "peer_not_mirrorvm", "SSH-2.0-OpenSSH_9.2p1"),
        ("web", &web, "peer_not_mirrorvm", "HTTP/1.1 400 Bad Request"),
        ("tty", &tty, "peer_not_mirrorvm", "\\x1b]0;gotcha\\x07 login:"),
        ("gone", &gone, "peer_failed", "refused"),
        ("nobody", "nobody.invalid:7801", "peer_unresolved", "nobody.invalid:7801"),
    ] {
        let _ = a.post("/v1/hosts", &host(name, address, &another(name))).expect(201);
        let begun = Instant::now();
        let problem = a.get(&format!("/v1/hosts/{name}/capabilities")).json();
        assert_eq!(problem["code"], code, "{name}: {problem}");
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{name}: {problem}");
        // A resolver may take its time.
        if name != "nobody" {
            assert!(begun.elapsed() < Duration::from_secs(4), "{name} took {:?}", begun.elapsed());
        }
    }
}

#[test]
fn a_peer_is_found_by_name_and_known_by_its_key_wherever_it_is() {
    if !kvm() {
        return;
    }
    let (a, b) = (Daemon::start("a"), Daemon::start_with("b", &[WHERE_NAMES_LEAD]));
    let port = b.peer_address.rsplit(':').next().unwrap();
    let _ = a.post("/v1/hosts", &host("b", &format!("localhost:{port}"), &b.identity)).expect(201);
    // The destination has an address of the source that is long out of date.
    let _ = b.post("/v1/hosts", &host("a", "192.0.2.1:1", &a.identity)).expect(201);
    a.run_guest(&embedded("g1", 16, 1 << 20));
    let id = a.migrate(&migration("g1", "b", "precopy"));
    let end = a.migration_end(&id);
    assert_eq!(end["state"], "succeeded", "{end}");
    assert_eq!(b.read("/v1/migrations")["items"][0]["peer"], "a");
}

#[test]
fn a_migration_to_a_dead_address_is_canceled_at_once() {
    if !kvm() {
        return;
    }
    let a = Daemon::start("a");
    // A listener with a full backlog does not answer, as a dead address does not.
    let fd = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&fd, &SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 0)).unwrap();
    rustix::net::listen(&fd, 0).unwrap();
    let dead = TcpListener::from(fd);
    let at = dead.local_addr().unwrap();
    let _full: Vec<_> =
        (0..4).map(|_| std::net::TcpStream::connect_timeout(&at, Duration::from_millis(200))).collect();
    let _ = a.post("/v1/hosts", &host("dead", &at.to_string(), &somebody())).expect(201);
    a.run_guest(&embedded("g1", 16, 1 << 20));
    let id = a.migrate(&migration("g1", "dead", "precopy"));
    a.follow(&format!("/v1/migrations/{id}"), 30, |m| m["state"] == "preparing");
    let asked = Instant::now();
    let _ = a.act(&format!("/v1/migrations/{id}/cancel")).expect(202);
    let end = a.migration_end(&id);
    assert_eq!(end["state"], "canceled", "{end}");
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
    a.ticks_on("g1");
}
