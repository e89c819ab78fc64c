//! Streams without TLS: what the network sees of them, and what it can do to them.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

use mirrorvm_abi::record::{Front, HEADER_BYTES, Header, Kind, Listed, Suite};
use mirrorvm_tests::{Act, Break, Pair, Way, embedded, is_terminal, kvm, migration};
use serde_json::{Value, json};

const GUEST: &str = "g1";

fn body(to: &str, transport: &str) -> Value {
    let mut body = migration(GUEST, to, "precopy");
    body["stream_transport"] = json!(transport);
    body["limits"] = json!({"stall_timeout_ms": 4000});
    body
}

/// Places in `bytes` where what a group begins with stands in plain sight: kind, version, stream, epoch, a
/// small sequence number, pages below `pages`.
fn fronts(bytes: &[u8], pages: u64) -> usize {
    let plausible = |at: usize| {
        Front::read(&bytes[at..]).is_some_and(|front| {
            let h = front.header;
            h.stream < 16
                && (1..100).contains(&h.epoch)
                && h.sequence < 1 << 32
                && front.pages().all(|p| p.page < pages)
        })
    };
    (0..bytes.len().saturating_sub(HEADER_BYTES)).filter(|at| plausible(*at)).count()
}

#[test]
fn nobody_on_the_path_reads_which_page_a_record_is_of() {
    if !kvm() {
        return;
    }
    let (kind, suite, random) = (Kind::Pages, Suite::Aes256Gcm, [3; 24]);
    let header = Header { kind, suite, stream: 1, count: 1, epoch: 1, sequence: 5, random }.encode();
    let listed = Listed { page: 77, zero: false }.encode();
    let seen = [&[9; 50][..], &header, &listed, &[7; 50]].concat();
    assert_eq!(fronts(&seen, 8192), 1, "the search finds what it looks for");

    let pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 32, 4 << 20));
    for (transport, suite) in [("sealed", "aes-256-gcm-siv"), ("tls", "aes-256-gcm")] {
        pair.to_b.listen();
        let mut wanted = body("b", transport);
        wanted["suite"] = json!(suite);
        let id = pair.a.migrate(&wanted);
        let end = pair.a.migration_end(&id);
        assert_eq!(end["state"], "succeeded", "{end}");
        let there = pair.b.read(&format!("/v1/migrations/{id}"));
        assert_eq!((&end["suite"], &there["suite"]), (&json!(suite), &json!(suite)));
        assert_eq!(end["request"]["stream_transport"], transport);
        let heard = pair.to_b.heard();
        let stream = heard.iter().max_by_key(|h| h.len()).unwrap();
        assert!(stream.len() > 3 << 20, "{transport}: {} bytes", stream.len());
        assert_eq!(fronts(stream, 8192), 0, "{transport}");
        // Nothing is compressible, and a page is never sent as it lies in memory.
        let zeros = stream.windows(64).step_by(64).filter(|w| w.iter().all(|b| *b == 0)).count();
        assert_eq!(zeros, 0, "{transport}");
        let back = pair.b.migrate(&body("a", transport));
        assert_eq!(pair.b.migration_end(&back)["state"], "succeeded");
    }
}

/// A changed bit, wherever it is: the migration fails by name, the guest goes on at the source, nothing is
/// left at the destination, and the next try works.
#[test]
fn a_bit_that_the_network_changes_ends_the_migration_and_nothing_else() {
    if !kvm() {
        return;
    }
    let pair = Pair::start();
    pair.a.run_guest(&embedded(GUEST, 32, 4 << 20));
    let mut codes = Vec::new();
    // The first few are records of the handshake and the hello; behind them come the stream's raw bytes,
    // which the proxy takes for records of whatever length their bytes say: places all over frames, headers,
    // ciphertext and tags.
    for (records, bytes) in
        [(3, 9), (4, 1), (5, 0), (5, 4), (6, 0), (6, 5), (7, 3), (8, 12), (9, 700), (12, 2), (40, 9), (90, 0)]
    {
        let ticks = pair.a.ticks(GUEST).unwrap();
        pair.to_b.arm(Break { connection: 1, way: Way::Up, records, bytes, act: Act::Flip });
        let id = pair.a.migrate(&body("b", "sealed"));
        let end = pair.a.follow(&format!("/v1/migrations/{id}"), 60, |m| is_terminal(&m["state"]));
        let hit = pair.to_b.is_broken();
        pair.to_b.mend();
        println!("{records} {bytes}: {} {}", end["state"], end["error"]["code"]);
        if end["state"] == "succeeded" {
            assert!(!hit, "a changed bit went through: {end}");
            let back = pair.b.migrate(&body("a", "sealed"));
            assert_eq!(pair.b.migration_end(&back)["state"], "succeeded");
            continue;
        }
        assert!(hit && end["state"] == "failed", "{end}");
        codes.push(end["error"]["code"].as_str().unwrap().to_owned());
        assert_eq!(end["guest_state_after"], "running");
        pair.a.ticks_beyond(GUEST, ticks.number);
        pair.b.nothing_of(GUEST);
    }
    assert!(codes.len() >= 6, "most places were hit: {codes:?}");
    assert!(
        codes.iter().all(
            |c| ["helper_failed", "peer_protocol", "peer_lost", "peer_unreachable"].contains(&c.as_str())
        ),
        "{codes:?}"
    );
    assert!(codes.iter().any(|c| c == "helper_failed"), "a helper found out: {codes:?}");
    let id = pair.a.migrate(&body("b", "sealed"));
    assert_eq!(pair.a.migration_end(&id)["state"], "succeeded");
}
