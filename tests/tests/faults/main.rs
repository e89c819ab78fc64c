//! Faults between and of two real daemons. After every one of them the guest runs at exactly one host, or its
//! migration is in doubt until the hosts can talk again; nothing half-made stays; the next attempt works.

#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code")]

mod called_off;
mod cuts;
mod kills;
mod peers;

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
const OURS: u32 = wire::PROTOCOL_VERSIONS[wire::PROTOCOL_VERSIONS.len() - 1];

const GUEST: &str = "g1";

/// Without an audit, so that COMMIT is the last word.
fn quick(to: &str, mode: &str) -> Value {
    let mut m = migration(GUEST, to, mode);
    m["audit"] = json!("never");
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

/// Keeps a link open until the other side ends it.
fn hold(mut link: Link) {
    let mut message = Vec::new();
    while let Ok(Some(_)) = link.recv_into(wire::MESSAGE_MAX, &mut message) {}
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
